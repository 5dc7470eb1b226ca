"""The command line and the experiments behind it, at tiny settings."""

import dataclasses
import os
import signal
import time

import jax
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import SYSTEMS, additive, marion_berthier as mb


@pytest.fixture(autouse=True)
def backend():
    """Start the backend, so that the command line does not set up this process."""
    jax.devices()


@pytest.fixture
def tiny(monkeypatch):
    """Every experiment with two seeds, five records and a few hundred steps."""
    few = {"seeds": 2, "records": 5}
    for name, change in {
        "two_timescale": {"step_size": 1e-1, "tau_end": 2e-3, **few},
        "same_rate": {"step_size": 1e-3, "tau_end": 0.2, **few},
        "epsilon_boxes": {"step_size": 1e-3, "tau_end": 0.02, **few},
    }.items():
        settings = dataclasses.replace(mb.SETTINGS[name]["quick"], **change)
        monkeypatch.setitem(mb.SETTINGS, name, {"quick": settings, "paper": settings})
    # 2-D and 10-D of one shape, which compiles once
    few |= {"samples": 200, "epochs": (12, 6), "records": 3}
    for name, change in {
        "additive_2d": few,
        "additive_10d": {"dimensions": 2, **few},
        "additive_relu": few,
    }.items():
        settings = dataclasses.replace(additive.SETTINGS[name]["quick"], **change)
        monkeypatch.setitem(additive.SETTINGS, name, {"quick": settings, "paper": settings})


def forbid(monkeypatch):
    """Fail if anything long is started."""

    def started(*args, **kwargs):
        raise AssertionError("a computation was started")

    monkeypatch.setattr(tts, "sgd", started)
    monkeypatch.setattr(tts, "flow", started)


# --- arguments ------------------------------------------------------------------------------


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tts-jax {tts.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_commands(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "reproduce" in capsys.readouterr().out


def test_help_of_reproduce_is_complete(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", "--help"])
    assert ended.value.code == 0
    # as one line, whatever the width of the terminal
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    figures = [name for system in SYSTEMS.values() for name in system.figures]
    for word in (*SYSTEMS, *figures, "--scale", "quick", "paper"):
        assert word in said
    for word in ("--seeds", "--out", "default: results", "default: quick", "default: all: 32"):
        assert word in said


@pytest.mark.parametrize("arguments", [["figure9"], ["--scale", "huge"], ["--seeds", "many"]])
def test_arguments_that_do_not_parse(arguments, capsys, monkeypatch):
    forbid(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert arguments[-1] in said
    assert arguments[0].removeprefix("--") in said


@pytest.mark.parametrize("seeds", ["0", "-3"])
def test_too_few_seeds(seeds, capsys, monkeypatch, tmp_path):
    forbid(monkeypatch)
    assert cli.main(["reproduce", "figure3", "--seeds", seeds, "--out", str(tmp_path)]) == 2
    assert f"`--seeds` must be an integer of at least 1, got {seeds}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    forbid(monkeypatch)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below"
    assert cli.main(["reproduce", "all", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "`--out`" in said
    assert str(out) in said
    assert "Choose another folder" in said


# --- reproduce ------------------------------------------------------------------------------


def test_reproduce_all(tiny, capsys, monkeypatch, tmp_path):
    runs = []
    sgd = tts.sgd
    monkeypatch.setattr(tts, "sgd", lambda *a, **k: runs.append(k["epsilon"]) or sgd(*a, **k))
    out = tmp_path / "new" / "folder"
    assert cli.main(["reproduce", "all", "--out", str(out)]) == 0
    # figures 3 and 4 share their run of SGD, so do figure6 and figure_2d
    assert runs == [2e-5, 1.0, 0.01, 0.1, 1.0] + 3 * [0.01, 1.0]
    said = capsys.readouterr().out
    for figure in ("figure3", "figure4", "figure5", "figure7"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert any(line.startswith(figure + " ") for line in said.splitlines())
        for name, trajectory in mb.load_data(out, figure).items():
            assert np.shape(trajectory.status) == (2,), name
            assert np.shape(trajectory.slow) == (2, 5, 20)
    for figure in ("figure1", "figure2", "proof"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert set(mb.load_data(out, figure)) == set(mb.FIGURES[figure].methods)
        assert f"{figure}: 1 seed\n" in said
        assert str(out / f"{figure}.pdf") in said
    assert set(mb.load_data(out, "figure3")) == {"sgd"}
    assert set(mb.load_data(out, "figure4")) == {"sgd", "flow", "limit", "sharp_limit"}
    assert set(mb.load_data(out, "figure5")) == {"sgd", "flow"}
    assert set(mb.load_data(out, "figure7")) == {f"sgd_epsilon_{e:g}" for e in (0.01, 0.1, 1.0)}
    for figure in additive.FIGURES:
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        data = additive.load_data(out, figure)
        assert set(data) == {"sgd_epsilon_0.01", "sgd_epsilon_1"}
        assert all(np.shape(run.status) == (2,) for run in data.values())
    row = next(line for line in said.splitlines() if line.startswith("figure_relu "))
    assert " - " in row  # a kink has no radius of recovery
    assert "loss SGD" in said
    assert "recovered" in said
    assert "seconds" in said
    assert not list(out.glob(".*"))
    # the files draw again
    assert isinstance(mb.draw_figure4(mb.load_data(out, "figure4")), Figure)


def test_a_failing_drawing_keeps_the_data(tiny, capsys, monkeypatch, tmp_path):
    def broken(data):
        raise RuntimeError("no ink")

    spec = dataclasses.replace(mb.FIGURES["figure5"], draw=broken)
    monkeypatch.setitem(mb.FIGURES, "figure5", spec)
    assert cli.main(["reproduce", "figure5", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "no ink" in said.err
    assert "figure5 could not be drawn" in said.err
    assert "figure5 " in said.out
    assert bool(np.all(mb.load_data(tmp_path, "figure5")["sgd"].success))


def test_a_failing_computation_keeps_what_came_before(tiny, capsys, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("singular")

    monkeypatch.setattr(tts, "flow", broken)
    assert cli.main(["reproduce", "figure5", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "singular" in said.err
    assert "could not be computed" in said.err
    assert set(mb.load_data(tmp_path, "figure5")) == {"sgd"}
    assert (tmp_path / "figure5.png").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_keeps_what_came_before(number, code, word, tiny, capsys, monkeypatch, tmp_path):
    def told_to_stop(*args, **kwargs):
        while not (tmp_path / "figure5_sgd.nc").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # for the line that names it
        os.kill(os.getpid(), number)
        time.sleep(2)
        raise AssertionError("the signal went unheard")

    monkeypatch.setattr(tts, "flow", told_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["reproduce", "figure5", "--out", str(tmp_path)]) == code
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr()
    assert f"tts-jax: {word}; files named above are complete." in said.err
    assert "Traceback" not in said.err
    assert str(tmp_path / "figure5_sgd.nc") in said.out
    assert set(mb.load_data(tmp_path, "figure5")) == {"sgd"}


def test_diverged_seeds_are_counted_and_explained(tiny, capsys, monkeypatch, tmp_path):
    settings = dataclasses.replace(mb.SETTINGS["same_rate"]["quick"], step_size=0.5, tau_end=500.0)
    monkeypatch.setitem(mb.SETTINGS, "same_rate", {"quick": settings})
    spec = dataclasses.replace(mb.FIGURES["figure5"], methods=("sgd",))
    monkeypatch.setitem(mb.FIGURES, "figure5", spec)
    assert cli.main(["reproduce", "figure5", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 lanes: DIVERGED" in said
    assert "step_size" in said
    assert (tmp_path / "figure5.png").exists()


# --- experiments ----------------------------------------------------------------------------


def test_settings_are_the_papers():
    paper = {name: mb.settings_of(name, "paper") for name in mb.SETTINGS}
    assert paper["two_timescale"].steps == 175_000_000
    assert mb.settings_of("two_timescale", "quick").steps == 1_750_000
    assert paper["same_rate"].steps == 1_000_000
    assert paper["epsilon_boxes"].steps == 30_000_000 + 3_000_000 + 300_000
    assert paper["epsilon_boxes"].seeds >= 20
    boxes = {name: additive.settings_of(name, "paper") for name in additive.SETTINGS}
    assert all(one.steps == 5300 and one.seeds == 20 for one in boxes.values())
    assert [one.samples * one.dimensions for one in boxes.values()] == [2000, 100_000, 1000]
    for name in ("two_timescale", "same_rate", "epsilon_boxes"):
        settings = paper[name]
        assert (settings.neurons, settings.eta, settings.noise) == (20, 4e-3, 1.0)


def test_seed_0_starts_from_the_published_positions_and_the_others_do_not_depend_on_the_number():
    few, many = (np.asarray(mb.settings_of("same_rate", seeds=n).start().slow) for n in (2, 5))
    assert np.array_equal(few, many[:2])
    assert np.array_equal(few[0], np.sort(np.random.RandomState(42).rand(20)))
    assert np.all(np.diff(many, axis=1) >= 0)
    assert many.dtype == np.float64


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`scale` must be one of 'quick', 'paper', got 'slow'"):
        mb.two_timescale(scale="slow")
    with pytest.raises(ValueError, match="`seeds` must be an integer of at least 1, got 0"):
        mb.same_rate(seeds=0)
    with pytest.raises(ValueError, match="`methods` must be one of"):
        mb.two_timescale(seeds=1, methods=["euler"])
    with pytest.raises(ValueError, match="`figure` must be one of"):
        mb.load_data(".", "figure9")
    with pytest.raises(ValueError, match="`figure` must be one of"):
        additive.load_data(".", "figure3")
    with pytest.raises(ValueError, match="`seeds` must be an integer of at least 1, got 0"):
        additive.boxes_2d(seeds=0)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tts-jax reproduce figure3"):
        mb.load_data(tmp_path, "figure3")


def test_outcome_counts_recovered_jumps_and_failed_seeds(tiny, tmp_path):
    run = mb.two_timescale(methods=["sgd"])["sgd"]
    run.save(tmp_path / "run.nc")
    with xarray.open_dataset(tmp_path / "run.nc", engine="h5netcdf") as opened:
        dataset = opened.load()
    dataset["recovery"][:, -1] = [[0.0, 1e-3, 4e-3, 4.1e-3, 0.1], [np.nan] * 5]
    dataset["status"][:] = [0, int(tts.Status.DIVERGED)]
    dataset["loss"][:, -1] = [0.25, np.nan]
    dataset.to_netcdf(tmp_path / "changed.nc", engine="h5netcdf")
    found = mb.outcome(tts.load(tmp_path / "changed.nc"))
    assert (found.seeds, found.failed, found.loss) == (2, 1, 0.25)
    assert (found.recovered, found.jumps, found.all_recovered) == (3.0, 5, 0.0)
    assert found.epsilon == 2e-5
