"""Figures of the mean-field kernel experiments, at tiny settings."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import takakura_suzuki


TINY = dataclasses.replace(
    takakura_suzuki.SETTINGS["takakura_suzuki"]["quick"],
    dimension=3,
    samples=12,
    width=10,
    steps=20,
    tests=20,
    seeds=2,
    records=5,
)


# the notebook runs the same experiments
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    jax.devices()
    table = {"quick": TINY, "paper": TINY}
    monkeypatch.setitem(takakura_suzuki.SETTINGS, "takakura_suzuki", table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("takakura_suzuki")


def test_both_figures_from_one_set_of_runs(folder, capsys, monkeypatch):
    runs, sgd = [], tts.sgd
    monkeypatch.setattr(tts, "sgd", lambda *a, **k: runs.append(k["regime"]) or sgd(*a, **k))
    assert cli.main(["reproduce", "takakura_suzuki", "--out", str(folder)]) == 0
    assert runs == 5 * ["limit"]
    said = capsys.readouterr().out
    for name, spec in takakura_suzuki.FIGURES.items():
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert sum(line.startswith(f"{name} ") for line in said.splitlines()) == 3
        data = takakura_suzuki.load_data(folder, name)
        assert set(data) == set(spec.methods)
        figure = spec.draw(data)
        assert isinstance(figure, Figure)
        assert [len(ax.lines) for ax in figure.axes] == [3, 3, 3]


def test_runs_differ_in_the_noise_only(folder):
    data = takakura_suzuki.load_data(folder, "takakura_suzuki_alignment")
    quiet, noisy = data["noise_0"], data["noise_2"]
    np.testing.assert_array_equal(quiet.slow[:, 0], noisy.slow[:, 0])
    assert np.all(quiet.slow[0, 0] != quiet.slow[1, 0])
    np.testing.assert_allclose(quiet.series["tau"], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert quiet.series["test_error"].shape == (2, 5)
    problems = TINY.problems(takakura_suzuki.CASES["noise_2"])
    np.testing.assert_allclose(
        noisy.series["degrees_of_freedom"][:, -1],
        [problems[seed].degrees_of_freedom(noisy.slow[seed, -1]) for seed in range(2)],
        rtol=1e-6,
    )
    off = problems[1].labels - problems[1].clean_labels
    assert 1.0 < np.max(np.abs(off)) <= 2.0
    loud = takakura_suzuki.load_data(folder, "takakura_suzuki_label_noise")["label_noise_2"]
    assert loud.settings["label_noise"] == 2.0


def test_the_table_counts_failures(folder):
    run = takakura_suzuki.load_data(folder, "takakura_suzuki_label_noise")["noise_1"]
    status = np.array([0, int(tts.Status.DIVERGED)], np.int32)
    table = takakura_suzuki.table("x", {"noise_1": dataclasses.replace(run, status=status)}, 1.0)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["seeds"], row["failed"]) == ("2", "1")
    ends = np.asarray(run.observables["test_error"])[0]
    assert row["test error"] == f"{ends[0]:.3g} → {ends[1]:.3g}"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of 'noise_0'"):
        takakura_suzuki.compute(TINY, ("base",))
    with pytest.raises(FileNotFoundError, match="There are no data"):
        takakura_suzuki.load_data(tmp_path, "takakura_suzuki_alignment")
    with pytest.raises(ValueError, match="`figure` must be one of 'takakura_suzuki_alignment'"):
        takakura_suzuki.load_data(tmp_path, "figure3")
