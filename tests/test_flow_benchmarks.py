"""The flow's benchmarks: peers solve the same problem, errors, equal-error ratios, the gate."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tts_jax as tts
from benchmarks.peers import FLOW_PEERS, Peer
from benchmarks.peers.flow_engine import EngineRun
from benchmarks.setting import JUMPS, KINDS, VALUES, Answer, FlowSetting, mixed_starts
from benchmarks.suite import flow, flow_report, measure, metrics
from benchmarks.suite.__main__ import main
from benchmarks.suite.session import PeerError, Session


numba_flow = pytest.importorskip("benchmarks.peers.numba_flow")


@pytest.fixture
def made():
    """The problem of a setting."""

    def make(setting):
        target = tts.PiecewiseConstant(JUMPS, VALUES)
        return tts.Univariate(target, neurons=setting.neurons, eta=setting.eta)

    return make


# --- the right-hand side and the Jacobian -----------------------------------------------------


@pytest.mark.parametrize(("neurons", "eta"), [(20, 4e-3), (8, 0.3), (1, 0.05), (40, 0.02)])
def test_numba_has_the_closed_forms(made, neurons, eta):
    epsilon = 1e-2
    problem = made(FlowSetting(1, neurons=neurons, eta=eta))
    rows = numba_flow.Flow(neurons, eta, epsilon)
    starts, _ = mixed_starts(60, neurons, eta)
    # several on one side of each end, at once
    if neurons >= 8:
        starts[0, :6] = eta * np.array([-0.4, 0.1, 0.49, 0.0, 0.5, -0.5]) + [0, 0, 0, 1, 1, 1]
    rng = np.random.default_rng(3)
    for slow in starts:
        fast = 3 * rng.normal(size=neurons + 1)
        y = np.concatenate([fast, slow])
        fields = problem.fields(fast, slow)
        wanted = np.concatenate([np.asarray(fields.fast) / epsilon, fields.slow])
        found = rows.velocity(0.0, y)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
        wanted = -np.asarray(problem.hessian(fast, slow))
        wanted[: neurons + 1] /= epsilon
        found = rows.jacobian(0.0, y)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_the_kept_order_does_not_show():
    setting = FlowSetting(2, neurons=12, eta=0.05)
    one, two = setting.states() + 0.3
    kept = numba_flow.Flow(12, 0.05, 1.0)
    kept.velocity(0.0, one[::-1].copy())
    again = numba_flow.Flow(12, 0.05, 1.0)
    np.testing.assert_array_equal(kept.velocity(0.0, two), again.velocity(0.0, two))


# --- solvers ----------------------------------------------------------------------------------

SHORT = FlowSetting(2, 1e-9, neurons=4, eta=0.05, epsilon=1e-2, end=0.05, records=5)


@pytest.fixture(scope="module")
def solved():
    target = tts.PiecewiseConstant(JUMPS, VALUES)
    problem = tts.Univariate(target, neurons=SHORT.neurons, eta=SHORT.eta)
    answer = tts.flow(
        problem,
        problem.state(slow=SHORT.starts()),
        epsilon=SHORT.epsilon,
        tau=SHORT.tau(),
        rtol=1e-11,
        atol=1e-11,
        solver="rodas5p",
    )
    assert np.all(answer.status == 0)
    return Answer(np.asarray(answer.fast), np.asarray(answer.slow), ["", ""])


SLOW_TO_BUILD = [pytest.param(one, marks=pytest.mark.slow) for one in ("bdf", "radau")]


@pytest.mark.parametrize("method", ["cvode", "lsoda", *SLOW_TO_BUILD])
def test_a_solver_solves_the_flow(method, solved):
    stiff = pytest.importorskip("benchmarks.peers.stiff")
    if method == "cvode":
        pytest.importorskip("sksundae")
    run = stiff.StiffRun(SHORT, method=method)  # one thread: no processes
    run.advance(1)
    found = flow.errors(run.answer(), solved)
    assert found.shape == (2,)
    assert np.all(found < 1e-6)
    loose = stiff.StiffRun(dataclasses.replace(SHORT, tolerance=1e-4), method=method)
    loose.advance(1)
    assert np.all(flow.errors(loose.answer(), solved) > 10 * found)


def test_cvode_factors_with_lapack_too(solved):
    pytest.importorskip("sksundae")
    from benchmarks.peers.sundials import Cvode

    solver = Cvode(numba_flow.Block(4, 0.05, 1e-2), 1e-10, lapack=True)
    states = solver(SHORT.states()[1], SHORT.tau())
    np.testing.assert_allclose(states[:, :5], solved.fast[1], atol=1e-7)
    counts = solver.counts()
    assert 0 < counts["jacobians"] <= counts["factors"] < counts["steps"] < counts["fields"]


@pytest.mark.parametrize("method", ["cvode", "bdf"])
def test_a_start_that_cannot_be_solved_is_a_failure(method, monkeypatch):
    stiff = pytest.importorskip("benchmarks.peers.stiff")
    if method == "cvode":
        pytest.importorskip("sksundae")
    states = SHORT.states()
    states[1, 0] = 1e200  # its loss overflows
    monkeypatch.setattr(FlowSetting, "states", lambda self: states)
    run = stiff.StiffRun(SHORT, method=method)
    with np.errstate(all="ignore"):
        run.advance(1)
    answer = run.answer()
    assert answer.reasons == ["", "the solver gave up"]
    assert flow.failures(answer) == {"the solver gave up": 1}


def test_the_engine_solves_the_flow(solved):
    run = EngineRun(dataclasses.replace(SHORT, tolerance=1e-10), reference=True)
    run.advance(1)
    assert np.all(flow.errors(run.answer(), solved) < 1e-7)


def test_processes_share_the_starts_and_end_with_their_peer(solved):
    pytest.importorskip("benchmarks.peers.stiff")
    code = (
        "import multiprocessing, os, signal\n"
        "import numpy as np\n"
        "from benchmarks.peers.stiff import StiffRun\n"
        "from benchmarks.setting import FlowSetting\n"
        "if __name__ == '__main__':\n"
        "    setting = FlowSetting(5, 1e-6, 4, 2, 0.05, 1e-2, 0.05, 5)\n"
        "    run = StiffRun(setting, method='lsoda')\n"
        "    run.advance(2)\n"
        "    both = run.answer()\n"
        "    alone = FlowSetting(5, 1e-6, 4, 1, 0.05, 1e-2, 0.05, 5)\n"
        "    alone = StiffRun(alone, method='lsoda')\n"
        "    alone.advance(1)\n"
        "    assert np.array_equal(both.slow, alone.answer().slow)\n"
        "    print(*(one.pid for one in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert told.returncode == -signal.SIGKILL, told.stderr
    children = [int(pid) for pid in told.stdout.split()]
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline, "a process outlived its peer"
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as told:
            return told.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- starts, errors ---------------------------------------------------------------------------


def test_mixed_starts_are_what_they_say():
    eta = 4e-3
    starts, kinds = mixed_starts(200, 20, eta)
    fewer, _ = mixed_starts(50, 20, eta)
    np.testing.assert_array_equal(starts[:50], fewer)
    assert set(kinds) == set(KINDS)
    assert 0.6 < kinds.count("random") / len(kinds) < 0.75
    for u, kind in zip(starts, kinds, strict=True):
        gaps = np.diff(np.sort(u))
        if kind == "coincident":
            assert np.sum(gaps == 0) >= 2
        elif kind == "close":
            assert np.sum((gaps > 0) & (gaps < 2e-3 * eta)) >= 1
        elif kind == "straddling":
            assert np.sum(np.minimum(np.abs(u), np.abs(u - 1)) < eta / 2) >= 2
        elif kind == "on jumps":
            assert np.sum(np.isin(u, JUMPS)) >= 2
        elif kind == "crossing":
            assert np.sort(np.abs(u - np.asarray(JUMPS)[:, None]).min(0))[1] < 2 * eta
        elif kind == "outside":
            assert np.sum((u < 0) | (u > 1)) >= 2


def test_nudged_starts_are_one_ulp_away():
    setting = FlowSetting(30, mixed=True)
    starts = setting.starts()
    moved = dataclasses.replace(setting, nudged=True).starts()
    assert set(np.unique(np.sign(moved - starts))) == {-1, 1}
    np.testing.assert_array_less(np.abs(moved - starts), 1.01 * np.spacing(np.abs(starts)))


def test_errors_are_maxima_and_failures_are_not_errors():
    fast, slow = np.zeros((3, 4, 3)), np.zeros((3, 4, 2))
    reference = Answer(fast, slow, ["", "", ""])
    off = Answer(fast.copy(), slow.copy(), ["", "stalled", ""])
    off.fast[0, 2, 1] = -0.5
    off.slow[2, 3, 0] = 0.25
    off.fast[1] = np.nan
    np.testing.assert_array_equal(flow.errors(off, reference), [0.5, np.nan, 0.25])
    kinds = np.array(["random", "close", "random"])
    ulp = np.array([1e-9, 1e-9, 1e-3])
    told = flow._by_kind(kinds, flow.errors(off, reference), ulp)
    assert told["kinds"]["random"]["worst"] == 0.5
    assert told["kinds"]["random"]["median"] == 0.375
    assert told["kinds"]["close"]["unsolved"] == 1
    assert told["kinds"]["close"]["worst"] is None
    assert [(one["start"], one["sensitive"]) for one in told["above"]] == [(0, False), (2, True)]
    assert told["kinds"]["random"]["sensitive"] == 1
    assert told["worst"] == 0.5
    json.dumps(told, allow_nan=False)


def test_what_cannot_run_is_left_out_with_a_reason():
    peer = Peer(
        "odd",
        "odd",
        "benchmarks.peers.flow_engine:EngineRun",
        {"engine": "no such engine"},
        setting="FlowSetting",
        most_seeds=1,
        tolerances=(1e-6,),
    )
    effort = dataclasses.replace(flow.QUICK, rounds=1, seconds=0.01)
    with measure.pool(effort) as processes:
        (row,) = measure.time_cell(processes, [peer], SHORT)
        with pytest.raises(PeerError):
            flow.solve(processes, peer, SHORT)
    assert row["seeds"] == 1  # it would have taken the first start alone
    assert row["neurons"] == 4
    assert "engine" in row["skipped"]
    assert "ns" not in row


def test_a_cell_times_and_judges(solved):
    pytest.importorskip("benchmarks.peers.stiff")
    peer = next(peer for peer in FLOW_PEERS if peer.name == "lsoda")
    effort = dataclasses.replace(flow.QUICK, rounds=2, seconds=0.02)
    setting = dataclasses.replace(SHORT, tolerance=1e-6)
    with measure.pool(effort) as processes:
        judge = flow._judge(processes, solved)
        (row,) = measure.time_cell(processes, [peer], setting, judge)
    assert row["skipped"] is None
    assert len(row["ns"]) == 2
    assert row["failed"] == {}
    assert 1e-9 < row["error"] <= row["worst"] < 1e-3


def test_a_session_says_what_a_flow_answers(tmp_path, solved):
    peer = next(peer for peer in FLOW_PEERS if peer.name == "lsoda")
    with Session(peer) as session:
        session.ask("hello")
        session.ask("start", setting=dataclasses.asdict(SHORT))
        session.ask("advance", steps=1)
        assert session.ask("save", path=str(tmp_path / "x.npz"))["reasons"] == ["", ""]
    with np.load(tmp_path / "x.npz") as stored:
        np.testing.assert_allclose(stored["slow"], solved.slow, atol=1e-6)


# --- numbers, report, gate --------------------------------------------------------------------


def measured(peer, tolerance, error, ns, *, neurons=20, eta=4e-3, seeds=64, skipped=None):
    row = {"peer": peer, "seeds": seeds, "neurons": neurons, "eta": eta, "epsilon": 2e-5}
    row.update(end=0.035, tolerance=tolerance, skipped=skipped)
    if skipped:
        return row
    row.update(layout="", compile_seconds=0.5, ns=ns, error=error, worst=2 * error, failed={})
    return row


@pytest.fixture
def run():
    """A run of made-up numbers: time is error^(-1/5), and the peer takes ten times as long."""
    tolerances = (1e-5, 1e-7, 1e-9)

    def curve(peer, factor, shift, **more):
        return [
            measured(
                peer,
                one,
                shift * one,
                [factor * (shift * one) ** -0.2, 2 * factor * (shift * one) ** -0.2],
                **more,
            )
            for one in tolerances
        ]

    def grown(m, **more):
        eta = 0.08 / m
        ours = [
            measured("engine", one, one, [m**1.5 * one**-0.2], neurons=m, eta=eta)
            for one in tolerances
        ]
        return [*ours, measured("cvode", 1e-8, 1e-7, [60 * m**1.5 * 1e-7**-0.2], **more)]

    machine = {
        "processor": "an abacus",
        "cores": 2,
        "load": 0.1,
        "backend": "cpu",
        "system": "wood",
        "python": "3",
        "versions": {"jax": "1"},
        "date": "2000-01-01",
    }

    def group(*rows):
        return {"machine": machine, "quick": False, "rows": list(rows)}

    hard = {
        **measured("engine", 1e-8, 1e-8, [1.0]),
        "kinds": {
            "close": {
                "starts": 3,
                "unsolved": 0,
                "median": 1e-8,
                "worst": 3e-6,
                "ulp": 1e-10,
                "sensitive": 0,
            }
        },
        "worst": 3e-6,
        "above": [
            {"start": 7, "kind": "close", "error": 3e-6, "ulp": 1e-10, "sensitive": False},
            {"start": 8, "kind": "close", "error": 3e-6, "ulp": 1e-3, "sensitive": True},
        ],
    }
    groups = {
        "accuracy": group(hard),
        "flow": group(
            *curve("engine", 1e3, 1.0),
            *curve("cvode", 1e4, 30.0),
            *curve("engine", 1e3, 1.0, seeds=1),
            measured("xla", 1e-7, 0, [], skipped="no such engine"),
        ),
        "flow-neurons": group(
            *grown(20), *grown(100, neurons=100, eta=8e-4), *grown(300, neurons=300, eta=0.08 / 300)
        ),
        "limit": group(*curve("engine", 1e3, 1.0), *curve("limit", 2e2, 1.0)),
        "sharp": group(measured("sharp-limit", 1e-8, 0, [5e4], seeds=10_000)),
    }
    return {"format": metrics.FORMAT, "groups": groups}


def test_peers_are_compared_at_equal_error(run):
    rows = run["groups"]["flow"]["rows"]
    peers = metrics.batches(rows)[2e-5, 0.035, 4e-3, 20, False]
    ours, theirs = peers["engine"], peers["cvode"]
    # at equal tolerance the ratio would be 10 * 30^-0.2 = 5.1
    assert metrics.equal_error_ratios(1e-6, theirs, ours) == pytest.approx([10.0, 10.0])
    assert metrics.times_at(1e-6, ours) == pytest.approx([1e3 * 1e-6**-0.2, 2e3 * 1e-6**-0.2])
    assert metrics.times_at(1e-10, ours) == []
    assert metrics.times_at(1e-3, ours) == []
    bound = metrics.times_at(1e-3, ours, at_most=True)
    assert bound == pytest.approx([1e3 * 1e-5**-0.2, 2e3 * 1e-5**-0.2])
    assert metrics.times_at(1e-6, []) == []


def test_numbers_from_rows(run):
    values = {metric.key: metric.value for metric in metrics.metrics(run)}
    place = "20 neurons/eta 0.004/epsilon 2e-05/tau 0.035"
    assert values[f"flow/{place}/cvode/ratio at error 1e-06"] == pytest.approx(10.0)
    assert values[f"flow-neurons/{place}/cvode/ratio at error its own"] == pytest.approx(60.0)
    assert values["flow-neurons/engine/exponent at fixed gap/eta"] == pytest.approx(1.5)
    assert values[f"limit/{place}/limit/ratio at error 1e-08"] == pytest.approx(0.2)
    at = "eta 0.004/epsilon 2e-05/tau 0.035/tolerance 1e-08"
    assert values[f"sharp/10000 seeds/20 neurons/{at}/sharp-limit/time"] == 5e4
    assert values[f"accuracy/64 seeds/20 neurons/{at}/engine/above 1e-6"] == 1.0
    at = "eta 0.004/epsilon 2e-05/tau 0.035/tolerance 1e-07"
    assert values[f"flow/64 seeds/20 neurons/{at}/xla/ran"] == 0.0


def verdicts(run, baseline):
    found = metrics.compare(run, baseline)
    return {one.key: one.verdict for one in found if one.verdict not in ("same", "new")}


def test_what_the_gate_calls_worse(run):
    assert verdicts(run, run) == {}
    worse = copy.deepcopy(run)
    worse["groups"]["flow"]["machine"] = {"processor": "slide rule", "cores": 2, "backend": "cpu"}
    row = worse["groups"]["flow"]["rows"][1]
    row["failed"] = {"STALLED": 2}
    row["ns"] = [2 * one for one in row["ns"]]
    row["error"] *= 3
    found = verdicts(worse, run)
    key = "flow/64 seeds/20 neurons/eta 0.004/epsilon 2e-05/tau 0.035/tolerance 1e-07/engine"
    # errors and failures count on every machine
    assert found[f"{key}/failed"] == found[f"{key}/error"] == "worse"
    assert found[f"{key}/time"] == "other machine"
    slower = copy.deepcopy(run)
    for row in slower["groups"]["limit"]["rows"]:
        if row["peer"] == "limit":
            row["ns"] = [3 * one for one in row["ns"]]
    found = verdicts(slower, run)
    assert (
        found["limit/20 neurons/eta 0.004/epsilon 2e-05/tau 0.035/limit/ratio at error 1e-06"]
        == "worse"
    )


def test_the_report_compares_at_equal_error(run, tmp_path):
    text = flow_report.markdown(run, metrics.compare(run, run), "plot.png")
    row = next(line for line in text.splitlines() if "SUNDIALS CVODE" in line)
    assert row.endswith("| 158 (10×) | – |")
    assert "(60×)" in text
    assert "| 1.50 | 0 of 576 |" in text
    assert "`limit` is 5 times as fast at an error of 1e-06 and 5 times as fast at" in text
    assert "no such engine" in text
    assert "start 7 (close): 3.0e-06" in text
    assert "| 10000 | 0.50 |" in text
    assert flow_report.plot(run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    nothing = {"format": metrics.FORMAT, "groups": {"sharp": run["groups"]["sharp"]}}
    assert not flow_report.plot(nothing, tmp_path / "none.png")


def test_the_flow_has_files_of_its_own(run, tmp_path, capsys):
    out, baseline = tmp_path / "out", tmp_path / "flow_results.json"
    common = ["--backend", "cpu", "--out", str(out), "--baseline", str(baseline), "--replot"]
    out.mkdir()
    (out / "flow_run.json").write_text(json.dumps(run))
    assert main(common) == 2  # SGD's run is not there
    assert main(["flow", *common, "--update-baseline"]) == 0
    for name in ("flow_results.json", "flow_results.md", "flow_results.png"):
        assert (tmp_path / name).exists()
    assert (out / "flow_report.md").exists()
    assert main(["--only", "flow", "limit", *common, "--gate"]) == 0
    run["groups"]["accuracy"]["rows"][0]["failed"] = {"DIVERGED": 1}
    (out / "flow_run.json").write_text(json.dumps(run))
    assert main(["flow", *common, "--gate"]) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--only", "flow", "ensembles", *common])
    assert "one after the other" in capsys.readouterr().err
