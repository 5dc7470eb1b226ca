"""Figures of single-location regression, at tiny settings."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import single_location


TINY = dataclasses.replace(
    single_location.SETTINGS["single_location"]["quick"],
    seeds=3,
    many=2,
    grid=4,
    draws=2,
    records=3,
)
# one case of a kind, so that few programs are compiled, and few steps
KEPT = {
    "single_location_published": ("manifold", "small_gain"),
    "single_location_fast": ("fast_2", "fast_1", "fast_limit"),
    "single_location_schedule": ("schedule_40", "schedule_16"),
    "single_location_basins": ("basins", "basins_around"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    jax.devices()
    table = {"quick": TINY, "paper": TINY}
    monkeypatch.setitem(single_location.SETTINGS, "single_location", table)
    for name, case in single_location.CASES.items():
        rate = case.step_size * (1.0 if case.epsilon is None else case.epsilon)
        monkeypatch.setitem(single_location.CASES, name, dataclasses.replace(case, end=40 * rate))
    for name, methods in KEPT.items():
        spec = dataclasses.replace(single_location.FIGURES[name], methods=methods)
        monkeypatch.setitem(single_location.FIGURES, name, spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single_location")


def reproduced(name, folder, capsys):
    assert cli.main(["reproduce", name, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data = single_location.load_data(folder, name)
    assert set(data) == set(single_location.FIGURES[name].methods)
    assert sum(line.startswith(f"{name} ") for line in said.splitlines()) == len(data)
    assert "swapped" in said
    assert "recovered" not in said


def test_the_published_figure_and_its_table(folder, capsys):
    reproduced("single_location_published", folder, capsys)
    run = single_location.load_data(folder, "single_location_published")["small_gain"]
    ends = {"kappa": [-0.99, 0.99, 0.0], "nu": [-0.99, -0.99, 0.0], "eta": [0.0, 0.0, -1.0]}
    observables = dict(run.observables)
    for seen, values in ends.items():
        observables[seen] = np.repeat(np.array(values)[:, None], 3, axis=1)
    status = np.array([0, 0, int(tts.Status.DIVERGED)], np.int32)
    told = dataclasses.replace(run, observables=observables, status=status)
    table = single_location.table("single_location_published", {"small_gain": told}, 1.0)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["found"], row["swapped"], row["failed"]) == ("1", "1", "1")
    assert (row["λ"], row["ε"], row["|κ|"]) == ("0.1", "1", "0.99")


@pytest.mark.slow
def test_the_basins_and_their_starts(folder, capsys):
    reproduced("single_location_basins", folder, capsys)
    data = single_location.load_data(folder, "single_location_basins")
    axis = np.array([-0.75, -0.25, 0.25, 0.75])
    for seen, expected in (("kappa", np.repeat(axis, 4)), ("nu", np.tile(axis, 4))):
        np.testing.assert_allclose(data["basins"].observables[seen][:, 0], expected)
    assert np.all(data["basins"].observables["manifold_distance"] == 0.0)
    around = data["basins_around"].observables
    small = np.array([-0.125, 0.125])
    np.testing.assert_allclose(around["kappa"][:, 0], np.repeat(small, 4))
    np.testing.assert_allclose(around["nu"][:, 0], np.tile(np.repeat(small, 2), 2))
    assert np.all(around["manifold_distance"][:, 0] > 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single_location_fast", "single_location_schedule"])
def test_figures_of_two_timescales(name, folder, capsys):
    reproduced(name, folder, capsys)
    if name == "single_location_fast":
        data = single_location.load_data(folder, name)
        np.testing.assert_array_equal(data["fast_1"].slow[:, 0], data["fast_2"].slow[:, 0])
        assert float(data["fast_limit"].settings["epsilon"]) == 0.0
        sizes = [float(data[one].settings["step_size"]) for one in ("fast_1", "fast_2")]
        assert sizes == [4e-3, 2e-3]  # the step of k stays the published one


@pytest.mark.slow
def test_the_experiments_with_a_schedule_share_the_figure():
    data = single_location.compute(TINY, ("small_gain", "schedule", "batches"))
    assert isinstance(single_location.draw_published(data), Figure)
    assert float(data["batches"].settings["epsilon"]) == 0.5  # in a hurry


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of 'manifold'"):
        single_location.compute(TINY, ("plane",))
    with pytest.raises(FileNotFoundError, match="There are no data"):
        single_location.load_data(tmp_path, "single_location_fast")
    with pytest.raises(ValueError, match="`figure` must be one of 'single_location_published'"):
        single_location.load_data(tmp_path, "figure3")
