"""Figures and animation of variable projection, at tiny settings."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import animation, varpro


TINY = dataclasses.replace(
    varpro.SETTINGS["varpro"]["quick"],
    samples=60,
    teacher_width=30,
    width=12,
    penalty=0.02,
    epochs=24,
    time_step=2.0**-6,
    seeds=2,
    records=5,
    cells=64,
)


# the notebook runs the same experiments
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """All cases at the base's width, so that they share what is compiled."""
    jax.devices()
    monkeypatch.setitem(varpro.SETTINGS, "varpro", {"quick": TINY, "paper": TINY})
    for name, case in varpro.CASES.items():
        monkeypatch.setitem(varpro.CASES, name, dataclasses.replace(case, narrower=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("varpro")


def test_all_figures_from_one_set_of_runs(folder, capsys, monkeypatch):
    runs, sgd = [], tts.sgd
    monkeypatch.setattr(tts, "sgd", lambda *a, **k: runs.append(k["regime"]) or sgd(*a, **k))
    assert cli.main(["reproduce", "varpro", "--out", str(folder)]) == 0
    assert sorted(runs) == 3 * ["joint"] + 12 * ["limit"]
    said = capsys.readouterr().out
    for name, spec in varpro.FIGURES.items():
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert sum(line.startswith(f"{name} ") for line in said.splitlines()) == len(spec.methods)
        data = varpro.load_data(folder, name)
        assert set(data) == set(spec.methods)
        assert isinstance(spec.draw(data), Figure)
    assert "two_timescale_100" in said
    assert "0.0078" in said  # ε/λ
    assert "recovered" not in said


def test_a_run_starts_from_the_features_of_its_seed(folder):
    data = varpro.load_data(folder, "varpro_penalty")
    base, biased = data["base"], data["biased"]
    assert base.slow.shape == (2, 5, 12, 2)
    np.testing.assert_array_equal(base.slow[:, 0], biased.slow[:, 0])
    assert np.all(base.slow[0, 0] != base.slow[1, 0])
    problem = TINY.problems(varpro.CASES["base"])[1]
    np.testing.assert_allclose(
        base.observables["teacher_distance"][1, -1], problem.teacher_distance(base.slow[1, -1])
    )
    angles = np.arctan2(base.slow[1, -1, :, 1], base.slow[1, -1, :, 0])
    diffusion = tts.UltraFastDiffusion(tts.CircleTeacher(10.0), 64)
    density = diffusion.solve(None, [TINY.t[-1]]).density[0]
    expected = tts.circle_energy_distance(angles, diffusion.theta, phi_weights=density)
    np.testing.assert_allclose(base.observables["diffusion_distance"][1, -1], expected, rtol=1e-6)


def test_the_table_counts_failures(folder):
    run = varpro.load_data(folder, "varpro_density")["base"]
    status = np.array([0, int(tts.Status.DIVERGED)], np.int32)
    lost = np.array([False, True])
    broken = dataclasses.replace(run, status=status, loss=np.where(lost[:, None], np.nan, run.loss))
    table = varpro.table("varpro_density", {"base": broken}, 1.0)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["seeds"], row["failed"]) == ("2", "1")
    assert row["risk"] == f"{run.loss[0, -1]:.3g}"


def test_the_animation_takes_the_data_of_the_figure(folder, capsys, monkeypatch):
    monkeypatch.setattr("tts_jax.plot.ffmpeg", lambda: None)
    command = ["animate", "varpro", "--frames", "3", "--dpi", "40", "--seed", "1"]
    assert cli.main([*command, "--out", str(folder)]) == 0
    assert f"data of varpro_density in {folder}" in capsys.readouterr().out
    with Image.open(folder / "animation_varpro.gif") as gif:
        assert gif.n_frames == 3
    images = list(animation.draw(varpro.load_data(folder, "varpro_density"), frames=3).images(40))
    assert np.any(np.asarray(images[0]) != np.asarray(images[-1]))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of 'base'"):
        varpro.compute(TINY, ("wide",))
    with pytest.raises(FileNotFoundError, match="There are no data"):
        varpro.load_data(tmp_path, "varpro_density")
    with pytest.raises(ValueError, match="`figure` must be one of 'varpro_widths'"):
        varpro.load_data(tmp_path, "figure3")
    assert varpro.saved(tmp_path, "varpro_density", TINY) is None
