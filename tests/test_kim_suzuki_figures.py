"""Figures of features in context, at tiny settings."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import kim_suzuki


TINY = dataclasses.replace(
    kim_suzuki.SETTINGS["kim_suzuki"]["quick"],
    dimension=3,
    features=2,
    particles=16,
    samples=40,
    steps=20,
    saddle_steps=20,
    records=6,
    curvatures=3,
    prompts=4,
)


# the notebook runs the same experiments
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    jax.devices()
    monkeypatch.setitem(kim_suzuki.SETTINGS, "kim_suzuki", {"quick": TINY, "paper": TINY})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kim_suzuki")


def test_all_figures_from_one_set_of_runs(folder, capsys, monkeypatch):
    # the joint runs compile anew for every c, and prompts for every n
    for name in ("joint_10", "joint_100", "prompt_100", "prompt_1000", "birth_death_1"):
        first = {"j": "joint_1", "p": "prompt_10", "b": "birth_death_tenth"}[name[0]]
        monkeypatch.setitem(kim_suzuki.CASES, name, kim_suzuki.CASES[first])
    runs, sgd = [], tts.sgd
    monkeypatch.setattr(tts, "sgd", lambda *a, **k: runs.append(k["regime"]) or sgd(*a, **k))
    assert cli.main(["reproduce", "kim_suzuki", "--out", str(folder)]) == 0
    assert len(runs) == len(kim_suzuki.CASES)
    said = capsys.readouterr().out
    for name, spec in kim_suzuki.FIGURES.items():
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert sum(line.startswith(f"{name} ") for line in said.splitlines()) == len(spec.methods)
        data = kim_suzuki.load_data(folder, name)
        assert set(data) == set(spec.methods)
        assert isinstance(spec.draw(data), Figure)


def test_what_is_recorded_is_what_it_is_called(folder):
    data = kim_suzuki.load_data(folder, "kim_suzuki_prompts")
    (problem,) = TINY.problems(kim_suzuki.CASES["reduced"])
    for case in ("prompt_10", "reduced"):
        slow = {name: value[0, -1] for name, value in data[case].slow.items()}
        loss = data[case].observables["feature_loss"][0, -1]
        np.testing.assert_allclose(loss, problem.reduced_loss(slow), rtol=1e-9)
    assert data["prompt_10"].loss[0, -1] > loss
    curvature = data["reduced"].observables["curvature"][0]
    np.testing.assert_array_equal(np.isnan(curvature), [False, True, False, True, True, False])
    found = tts.smallest_curvature(problem, slow, key=jax.random.key(0), steps=48)
    np.testing.assert_allclose(curvature[-1], found.value, rtol=1e-6)
    joint = kim_suzuki.load_data(folder, "kim_suzuki_joint")
    assert joint["joint_1"].series["epsilon_eff"].shape == (1, 21)
    gap = np.abs(joint["joint_1"].loss - joint["reduced"].loss)[:, 1:]  # after 2 of 20 steps
    np.testing.assert_allclose(
        kim_suzuki.largest_gap(joint["joint_1"], joint["reduced"]), np.max(gap, axis=1)
    )


def test_the_table_counts_failures(folder):
    run = kim_suzuki.load_data(folder, "kim_suzuki_joint")["reduced"]
    status = np.full(1, int(tts.Status.DIVERGED), np.int32)
    broken = dataclasses.replace(run, status=status)
    table = kim_suzuki.table("kim_suzuki_joint", {"reduced": broken}, 1.0)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["seeds"], row["failed"], row["at the end"]) == ("1", "1", "-")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of 'reduced'"):
        kim_suzuki.compute(TINY, ("wide",))
    with pytest.raises(FileNotFoundError, match="There are no data"):
        kim_suzuki.load_data(tmp_path, "kim_suzuki_joint")
    with pytest.raises(ValueError, match="`figure` must be one of 'kim_suzuki_joint'"):
        kim_suzuki.load_data(tmp_path, "figure3")
