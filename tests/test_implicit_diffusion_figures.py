"""Figures of implicit diffusion, at tiny settings."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import implicit_diffusion


NAME = "implicit_diffusion"
TINY = dataclasses.replace(
    implicit_diffusion.SETTINGS[NAME]["quick"], particles=20, moves=1000, seeds=2, records=6
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """All cases with one number of particles, so that they share what is compiled."""
    jax.devices()
    monkeypatch.setitem(implicit_diffusion.SETTINGS, NAME, {"quick": TINY, "paper": TINY})
    for name, case in implicit_diffusion.CASES.items():
        monkeypatch.setitem(
            implicit_diffusion.CASES, name, dataclasses.replace(case, finer=1, thinner=1)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp(NAME)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return tmp_path_factory.mktemp("all_of_" + NAME)


def check_figures(names, folder, said):
    for name in names:
        spec = implicit_diffusion.FIGURES[name]
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert sum(line.startswith(f"{name} ") for line in said.splitlines()) == len(spec.methods)
        data = implicit_diffusion.load_data(folder, name)
        assert set(data) == set(spec.methods)
        assert isinstance(spec.draw(data), Figure)


@pytest.mark.parametrize("figure", ["particles", pytest.param("ratio", marks=pytest.mark.slow)])
def test_a_figure(figure, folder, capsys):
    name = f"{NAME}_{figure}"
    assert cli.main(["reproduce", name, "--out", str(folder)]) == 0
    check_figures([name], folder, capsys.readouterr().out)


@pytest.mark.slow
def test_all_figures_from_one_set_of_runs(everything, capsys, monkeypatch):
    runs, sgd = [], tts.sgd
    monkeypatch.setattr(tts, "sgd", lambda *a, **k: runs.append(k["regime"]) or sgd(*a, **k))
    assert cli.main(["reproduce", NAME, "--out", str(everything)]) == 0
    inner = [one.steps for one in runs if one != "limit"]
    assert (inner.count(1), inner.count(10), inner.count(100)) == (27, 3, 2)
    check_figures(implicit_diffusion.FIGURES, everything, capsys.readouterr().out)


@pytest.mark.slow
def test_runs_have_one_budget_and_one_start(everything):
    name = "implicit_diffusion_budget"
    if not any(everything.iterdir()):  # run by itself
        assert cli.main(["reproduce", name, "--out", str(everything)]) == 0
    data = implicit_diffusion.load_data(everything, name)
    single = data["single"]
    assert single.fast.shape == (2, 6, 2, 20)
    for name, run in data.items():
        if name == "limit":
            continue
        moves = implicit_diffusion._moves(run)
        np.testing.assert_allclose(moves[[0, -1]], [0.0, 1000.0], rtol=1e-12)
        np.testing.assert_array_equal(run.fast[:, 0], single.fast[:, 0])
    # the same step of the logits: a tenth of the way; ten times as long: all of it
    assert data["nested"].tau[-1] == pytest.approx(10.0)
    assert data["nested_10"].tau[-1] == pytest.approx(100.0)
    ends = {
        name: np.mean(run.observables["expected_reward"][..., -1]) for name, run in data.items()
    }
    assert ends["nested"] < ends["single"] - 0.05
    assert single.series["epsilon_eff"].shape == (2, 51)


@pytest.mark.slow
def test_both_signs_are_there(everything):
    data = implicit_diffusion.load_data(everything, "implicit_diffusion_penalty")
    ends = {
        name: np.mean(np.asarray(run.observables["divergence"])[..., -1])
        for name, run in data.items()
    }
    assert ends["released"] > 3.0 > 1.0 > ends["penalised_limit"]


@pytest.mark.slow
def test_the_gap_is_that_to_the_reduced_flow(folder):
    data = implicit_diffusion.load_data(folder, "implicit_diffusion_ratio")
    run, limit = data["wide_0.5"], data["limit"]
    problem = TINY.problem(implicit_diffusion.CASES["single"])
    start = tts.State(run.fast[0, 0], run.slow[0, 0])
    flow = tts.limit(problem, start, tau=run.tau, throw=True)
    expected = run.observables["expected_reward"] - flow.observables["expected_reward"]
    np.testing.assert_allclose(run.observables["gap"], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(limit.observables["gap"], 0.0)
    assert 0.5 < implicit_diffusion.leaving_ratio(limit) < 2.0


def test_the_table_counts_failures(folder):
    run = implicit_diffusion.load_data(folder, "implicit_diffusion_particles")["single"]
    broken = dataclasses.replace(run, status=np.array([0, int(tts.Status.DIVERGED)], np.int32))
    table = implicit_diffusion.table("implicit_diffusion_particles", {"single": broken}, 1.0)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["seeds"], row["failed"]) == ("2", "1")
    assert row["reward"] == f"{run.observables['mean_reward'][0, -1]:.3g}"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`methods` must be one of 'limit'"):
        implicit_diffusion.compute(TINY, ("double",))
    with pytest.raises(FileNotFoundError, match="There are no data"):
        implicit_diffusion.load_data(tmp_path, "implicit_diffusion_ratio")
    with pytest.raises(ValueError, match="`figure` must be one of 'implicit_diffusion_budget'"):
        implicit_diffusion.load_data(tmp_path, "figure3")
