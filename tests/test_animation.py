"""Animations: their time axis, their frames, their files, and what is left when a writer fails."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import tts_jax as tts
from tts_jax import cli, plot
from tts_jax.experiments import animation, marion_berthier as mb


FRAMES = 5


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A run of a few hundred steps."""
    jax.devices()
    change = {"step_size": 1e-1, "tau_end": 2e-3, "records": 9}
    settings = dataclasses.replace(mb.SETTINGS["two_timescale"]["quick"], **change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mb.SETTINGS, "two_timescale", {"quick": settings})
        yield


def animate(out, *more):
    return cli.main(["animate", "--frames", str(FRAMES), "--dpi", "40", "--out", str(out), *more])


def program(folder, words):
    """A folder with an `ffmpeg` that is a shell script."""
    folder.mkdir()
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `animate` writes and says where there is no ffmpeg."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(out / "nothing"))
        assert animate(out) == 0
    return out


def test_gif_has_every_frame_and_they_differ(run):
    with Image.open(run / "animation_two_timescale.gif") as film:
        assert film.n_frames == FRAMES
        pictures, durations = [], []
        for index in range(FRAMES):
            film.seek(index)
            pictures.append(np.asarray(film.convert("RGB"), dtype=int))
            durations.append(film.info["duration"])
    assert pictures[0].shape == (188, 360, 3)
    for before, after in zip(pictures, pictures[1:], strict=False):
        assert np.any(before != after)
    assert durations == [80] * (FRAMES - 1) + [2000]
    assert not list(run.glob("*.mp4"))
    # frames after the first are patches of it: they must not lose what does not move
    movie = animation.draw(load(run), frames=FRAMES)
    drawn = np.asarray(list(movie.images(40.0))[-1], dtype=int)
    assert np.mean(np.abs(pictures[-1] - drawn)) < 2.0


def load(folder):
    names = animation.METHODS
    return {name: tts.load(folder / f"animation_two_timescale_{name}.nc") for name in names}


def test_records_are_frames_evenly_spaced_on_the_axis_shown(run):
    data = load(run)
    tau = np.asarray(data["flow"].tau)
    early = 5e-4 * 2e-3
    assert tau[0] == 0.0
    assert tau[-1] == 2e-3
    assert np.diff(np.arcsinh(tau / early)) == pytest.approx(np.arcsinh(2e3) / (FRAMES - 1))
    movie = animation.draw(data, frames=FRAMES)
    assert movie.frames == FRAMES
    # each frame shows the network and the neurons of its time
    above, below = movie.figure.axes[1], movie.figure.axes[4]
    movie.show(3)
    slow = np.asarray(data["flow"].slow)[0, 3]
    network, *marks = above.get_lines()
    assert [line.get_xdata()[0] for line in marks] == list(slow)
    problem = mb.settings_of("two_timescale").problem()
    expected = problem.predict(data["flow"].fast[0, 3], slow, network.get_xdata())
    assert np.array_equal(network.get_ydata(), expected)
    assert below.get_lines()[-1].get_xdata()[0] == tau[3]


def test_pace_takes_recorded_times_once_each():
    even = np.linspace(0.0, 1.0, 201)
    chosen = animation.pace(even, 50, 0.005)
    assert chosen[0] == 0
    assert chosen[-1] == 200
    assert np.all(np.diff(chosen) > 0)
    assert chosen.size < 50
    assert np.array_equal(animation.pace(np.sinh(np.linspace(0, 5, 50)), 50, 1.0), np.arange(50))


def test_data_of_the_figure_are_used_and_ffmpeg_gets_every_pixel(
    run, tmp_path, monkeypatch, capsys
):
    for name, trajectory in load(run).items():
        trajectory.save(tmp_path / f"figure4_{name}.nc")
    # the last argument is the file; what comes in is written there as it is
    copy = program(tmp_path / "bin", 'for last; do :; done; /bin/cat > "$last"')
    monkeypatch.setenv("PATH", copy)
    assert animate(tmp_path) == 0
    said = capsys.readouterr().out
    assert "sgd, flow, limit: data of figure4" in said
    assert "MP4" not in said
    assert (tmp_path / "animation_two_timescale.mp4").stat().st_size == FRAMES * 360 * 188 * 3
    assert not list(tmp_path.glob("animation_*.nc"))


def test_data_of_another_run_are_not_used(run, tmp_path):
    load(run)["sgd"].save(tmp_path / "figure4_sgd.nc")
    settings = animation.settings_of("two_timescale", frames=FRAMES)
    assert set(animation.saved(tmp_path, "two_timescale", settings)) == {"sgd"}
    for change in ({"step_size": 1e-2}, {"seeds": 2}, {"tau_end": 1e-3}, {"key": 1, "seeds": 2}):
        other = dataclasses.replace(settings, **change)
        assert not animation.saved(tmp_path, "two_timescale", other), change


def test_a_failing_writer_leaves_data_and_the_other_file(run, tmp_path, monkeypatch, capsys):
    for name, trajectory in load(run).items():
        trajectory.save(tmp_path / f"figure4_{name}.nc")
    (tmp_path / "animation_two_timescale.mp4").write_text("an earlier film")
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "echo no such codec >&2; exit 3"))
    assert animate(tmp_path) == 1
    said = capsys.readouterr()
    assert "ffmpeg failed: no such codec" in said.err
    assert "the MP4 could not be written" in said.err
    assert (tmp_path / "animation_two_timescale.mp4").read_text() == "an earlier film"
    assert (tmp_path / "animation_two_timescale.gif").is_file()
    assert (tmp_path / "figure4_sgd.nc").is_file()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs `ffmpeg`"):
        plot.save_mp4([Image.new("RGB", (2, 2))], tmp_path / "x.mp4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], "`seed` must be zero or positive"),
        (["--frames", "1"], "`frames` must be at least 2"),
        (["--fps", "0"], "`fps` must be positive"),
        (["--fps", "60"], "`fps` must be at most 50"),
        (["--dpi", "-5"], "`dpi` must be positive"),
    ],
)
def test_bad_arguments(arguments, words, capsys, tmp_path):
    assert cli.main(["animate", *arguments, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
