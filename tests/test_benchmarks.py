"""The benchmark suite: equal work, peers that fail, numbers from rows, the gate."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from benchmarks import gpu, varpro
from benchmarks.peers import CPU_PEERS, Peer, peers_for
from benchmarks.peers.engine import EngineRun
from benchmarks.setting import JUMPS, VALUES, Setting
from benchmarks.suite import equal_work, measure, metrics, report
from benchmarks.suite.__main__ import SUBJECTS, main
from benchmarks.suite.equal_work import Ensemble
from benchmarks.suite.session import PeerError, Session


# --- equal work -------------------------------------------------------------------------------


def plain_sgd(setting, *, noise=3.0, rate=1.0, drift=1.0, box=False, seed=5):
    """SGD of all seeds in NumPy, by the formulas of the paper; the arguments make it wrong."""
    rng = np.random.default_rng(seed)
    start = setting.starts()
    bias, weights, positions = np.zeros(setting.seeds), np.zeros_like(start), start.copy()
    levels = np.asarray(VALUES)
    for _ in range(equal_work.STEPS):
        x = rng.random(setting.seeds)
        label = levels[np.searchsorted(JUMPS, x, side="right")]
        label = label + noise * rng.uniform(-1, 1, setting.seeds)
        z = (x[:, None] - positions) / setting.eta
        left = 4 * np.clip(z + 0.5, 0, 0.5) ** 3
        step = left + 0.5 - 4 * np.clip(0.5 - z, 0, 0.5) ** 3
        slope = (np.abs(z) <= 0.5) if box else 12 * np.maximum(0.5 - np.abs(z), 0) ** 2
        double = 2 * (bias + np.sum(weights * step, axis=1) - label)[:, None]
        down = -double * weights * slope / setting.eta
        h = rate * setting.step_size
        positions = positions - drift * h * setting.epsilon * down
        weights = weights - h * double * step
        bias = bias - h * double[:, 0]
    return Ensemble.of(setting, np.concatenate([bias[:, None], weights], axis=1), positions)


@pytest.fixture(scope="module")
def setting():
    return equal_work.check_setting(256, "float32", threads=1)


@pytest.fixture(scope="module")
def reference(setting):
    run = EngineRun(setting)
    run.advance(equal_work.STEPS)
    return Ensemble.of(setting, *run.read())


def test_the_engine_does_the_work_of_the_formulas(setting, reference):
    found = equal_work.compare(reference, plain_sgd(setting))
    assert found["comparable"], found


@pytest.mark.parametrize(
    ("name", "dtype"), [("PlainRun", "float32"), ("LaneRun", "float32"), ("LaneRun", "float64")]
)
def test_the_numba_peers_do_the_same_work(name, dtype, reference):
    numba_sgd = pytest.importorskip("benchmarks.peers.numba_sgd")
    setting = equal_work.check_setting(256, dtype, threads=1)
    run = getattr(numba_sgd, name)(setting)
    run.advance(equal_work.STEPS - 5)  # not a multiple of the block of samples
    run.advance(5)
    found = equal_work.compare(reference, Ensemble.of(setting, *run.read()))
    assert found["comparable"], found


@pytest.mark.parametrize(
    "wrong",
    [{"noise": 1.5}, {"rate": 1.25}, {"drift": 0.75}, {"drift": 0.0}, {"box": True}],
    ids=str,
)
def test_other_work_is_noticed(wrong, setting, reference):
    found = equal_work.compare(reference, plain_sgd(setting, **wrong))
    assert not found["comparable"]
    assert "loss" in found["reason"] or "move" in found["reason"]


def test_a_diverged_peer_is_not_comparable(reference):
    broken = Ensemble(np.full(256, np.nan), reference.move)
    found = equal_work.compare(reference, broken)
    assert not found["comparable"]
    assert "not finite" in found["reason"]
    json.dumps(found, allow_nan=False)


def test_the_loss_of_the_check_is_the_population_loss():
    setting = Setting(1)
    level = setting.starts() * 0 + 5.0  # neurons that are off everywhere
    loss = equal_work.population_loss(setting, np.zeros((1, 21)), level)
    lengths = np.diff([0, *JUMPS, 1])
    assert loss[0] == pytest.approx(np.sum(np.square(VALUES) * lengths), rel=1e-9)


# --- processes --------------------------------------------------------------------------------

_FAKE = """
import os, time
import numpy as np

class Run:
    chunk, layout, compile_seconds = 4, "one", 0.0
    def __init__(self, setting, fault=None):
        self.fault, self.setting, self.calls = fault, setting, 0
        if fault == "refuse":
            raise ValueError("no such layout\\nsecond line")
    def advance(self, steps):
        assert steps % self.chunk == 0
        self.calls += 1
        if self.fault == "crash":
            os._exit(3)
        if self.fault == "late crash" and self.calls > 12:
            os._exit(4)
        if self.fault == "hang":
            time.sleep(60)
        print("noise on standard output")
        time.sleep(1e-4 * steps)
    def read(self):
        return np.zeros((self.setting.seeds, 21)), self.setting.starts()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A peer whose process does something wrong."""
    (tmp_path / "fake_peer.py").write_text(_FAKE)
    (tmp_path / "lacking.py").write_text("import no_such_package_at_all\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def make(name, fault=None, module="fake_peer"):
        options = {} if fault is None else {"fault": fault}
        return Peer(name, name, f"{module}:Run", options)

    return make


def test_failures_are_rows_with_a_reason(fake):
    peers = [
        fake("engine"),
        fake("a", "refuse"),
        fake("b", "crash"),
        fake("c", "late crash"),
        fake("d", module="lacking"),
        Peer("e", "e", "fake_peer:Run", most_seeds=2),
    ]
    effort = measure.Effort(rounds=4, seconds=0.02, timeout=60.0)
    with measure.pool(effort) as processes:
        rows = measure.time_cell(processes, peers, Setting(3))
        again = measure.time_cell(processes, peers[:3], Setting(3))
    reasons = {row["peer"]: row["skipped"] for row in rows}
    assert reasons == {
        "engine": None,
        "a": "ValueError: no such layout",
        "b": "the process ended with code 3",
        "c": "the process ended with code 4: noise on standard output",
        "d": "ModuleNotFoundError: No module named 'no_such_package_at_all'",
        "e": "a step of 3 seeds takes too long",
    }
    assert len(rows[0]["ns"]) == 4
    # 1e-4 s per step of three seeds
    assert 3e4 < min(rows[0]["ns"]) < 1e5
    assert [row["skipped"] is None for row in again] == [True, False, False]


def test_a_peer_that_hangs_is_ended(fake):
    with Session(fake("slow", "hang")) as session:
        session.ask("hello")
        with pytest.raises(PeerError, match="no answer to `build` within 0.5 s"):
            session.ask("build", setting=dataclasses.asdict(Setting(3)), timeout=0.5)
        with pytest.raises(PeerError, match="ended with code -9"):
            session.ask("read")


def test_a_gpu_adds_peers():
    assert peers_for("cpu") == CPU_PEERS
    added = [peer for peer in peers_for("gpu") if peer not in CPU_PEERS]
    assert added
    assert all(peer.backend == "gpu" for peer in added)


def test_a_gpu_peer_is_refused_without_a_gpu():
    scan = next(peer for peer in peers_for("gpu") if peer.name == "gpu-jax-scan")
    scan = dataclasses.replace(scan, variables={**scan.variables, "JAX_PLATFORMS": "cpu"})
    effort = measure.Effort(rounds=1, seconds=0.05, timeout=120.0)
    with measure.pool(effort) as processes:
        refused, measured = (
            measure.time_cell(processes, [peer], Setting(3))[0]
            for peer in (scan, dataclasses.replace(scan, name="here", backend="cpu"))
        )
    assert "not on gpu" in refused["skipped"]
    assert measured["skipped"] is None
    assert measured["ns"]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    effort = measure.Effort(rounds=2, seconds=0.02, timeout=120.0, calls=1, together=True)
    monkeypatch.setattr(gpu, "EFFORT", effort)
    peers = ["--backend", "cpu", "--peers", "gpu-kernel", "gpu-loop", "gpu-jax-scan"]
    cells = ["--seeds", "64", "--dtypes", "float32", "--out", str(tmp_path)]
    assert gpu.main([*peers, *cells]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["sections"]["sgd"]
    timed = {row["peer"]: row for row in rows if row.get("seeds") == 64}
    assert "for GPUs" in timed["gpu-kernel"]["skipped"]
    assert len(timed["gpu-loop"]["ns"]) == len(timed["gpu-jax-scan"]["ns"]) == 2
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "gpu.md").read_text().strip()
    assert "(1×)" in text
    assert "all comparable" in text
    # no time left
    assert gpu.main([*peers, *cells, "--seconds", "0"]) == 0
    assert "(1×)" not in capsys.readouterr().out


# --- numbers, report, gate --------------------------------------------------------------------


def timed(peer, ns, *, seeds=1024, neurons=20, skipped=None):
    row = {"peer": peer, "seeds": seeds, "dtype": "float32", "neurons": neurons}
    row.update(skipped=skipped, layout="1 x 1 on 1", compile_seconds=0.5)
    return row if skipped else {**row, "ns": ns}


@pytest.fixture
def run():
    """A run of made-up numbers."""
    machine = {
        "processor": "an abacus",
        "cores": 2,
        "load": 0.1,
        "backend": "cpu",
        "system": "wood",
        "python": "3",
        "versions": {"jax": "1", "torch": None},
        "date": "2000-01-01",
    }

    def check(peer, comparable=True):
        number = {"mean": 0.7, "reference": 0.7, "p": 0.5}
        row = {"peer": peer, "dtype": "float32", "skipped": None, "comparable": comparable}
        return {**row, "reason": None if comparable else "too good", "loss": number, "move": number}

    def group(*rows):
        return {"machine": machine, "quick": False, "rows": list(rows)}

    groups = {
        "check": group(check("engine"), check("numba"), check("torch", comparable=False)),
        "ensembles": group(
            timed("engine", [2.0, 4.0, 2.0]),
            timed("numba", [20.0, 60.0, 20.0]),
            timed("torch", [1.0, 1.0, 1.0]),
            timed("numpy", [], skipped="numpy was stolen"),
        ),
        "neurons": group(*(timed("engine", [0.1 * m**1.5], neurons=m) for m in (20, 100, 300))),
        "commands": group({"command": "tts-jax reproduce x", "skipped": None, "seconds": 9.0}),
        "memory": group(
            {
                "peer": "engine",
                "seeds": 64,
                "dtype": "float32",
                "skipped": None,
                "imports": 2**20,
                "peak": 2**21,
            }
        ),
    }
    return {"format": metrics.FORMAT, "groups": groups}


def test_numbers_from_rows(run):
    values = {metric.key: metric.value for metric in metrics.metrics(run)}
    assert values["ensembles/float32/1024 seeds/20 neurons/engine/time"] == 2.0
    # within rounds 10, 15 and 10: not the ratio of any two times of different rounds
    assert values["ensembles/float32/1024 seeds/20 neurons/numba/ratio"] == 10.0
    assert values["neurons/engine/exponent"] == pytest.approx(1.5)
    assert values["memory/float32/64 seeds/engine"] == 2.0
    assert not any("torch/ratio" in key or "numpy" in key for key in values)


def verdicts(run, baseline):
    return {
        one.key: one.verdict
        for one in metrics.compare(run, baseline)
        if one.verdict not in ("same", "new")
    }


def test_what_the_gate_calls_worse(run):
    assert verdicts(run, run) == {}

    slower = copy.deepcopy(run)
    slower["groups"]["ensembles"]["rows"][0]["ns"] = [20.0, 40.0, 20.0]
    cell = "ensembles/float32/1024 seeds/20 neurons"
    assert verdicts(slower, run) == {f"{cell}/engine/time": "worse", f"{cell}/numba/ratio": "worse"}
    assert set(verdicts(run, slower).values()) == {"better"}
    slower["groups"]["ensembles"]["machine"] = {"processor": "slide rule", "cores": 2} | {
        "backend": "cpu"
    }
    assert set(verdicts(slower, run).values()) == {"other machine"}

    wrong = copy.deepcopy(run)
    wrong["groups"]["check"]["machine"] = {"processor": "slide rule", "cores": 2, "backend": "cpu"}
    wrong["groups"]["check"]["rows"][0]["loss"] = {"mean": 0.72, "reference": 0.72, "p": 1.0}
    wrong["groups"]["check"]["rows"][1]["comparable"] = False
    found = verdicts(wrong, run)
    assert found["check/float32/engine/mean loss"] == "worse"
    assert found["check/float32/numba/comparable"] == "worse"

    crashed = copy.deepcopy(run)
    crashed["groups"]["ensembles"]["rows"][0] = timed("engine", [], skipped="crash")
    assert verdicts(crashed, run) == {f"{cell}/engine/ran": "worse"}

    smaller = {"format": metrics.FORMAT, "groups": {"check": run["groups"]["check"]}}
    assert verdicts(smaller, run) == {}


def test_the_report_says_what_was_left_out(run, tmp_path):
    text = report.markdown(run, metrics.compare(run, run), "plot.png")
    assert "numpy was stolen" in text
    assert "**not comparable**: too good" in text
    assert "(1, not comparable)" in text
    assert "20 (10×)" in text
    assert "1.50" in text
    assert report.plot(run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    nothing = {"format": metrics.FORMAT, "groups": {"check": run["groups"]["check"]}}
    assert not report.plot(nothing, tmp_path / "none.png")


def test_the_command_line_gates_and_updates(run, tmp_path, capsys):
    out, baseline = tmp_path / "out", tmp_path / "committed" / "results.json"
    common = ["--backend", "cpu", "--out", str(out), "--baseline", str(baseline), "--replot"]
    assert main(common) == 2  # nothing stored
    out.mkdir()
    (out / "run.json").write_text(json.dumps(run))
    assert main([*common, "--gate"]) == 2  # nothing to compare with
    assert main([*common, "--update-baseline"]) == 0
    for name in ("results.json", "results.md", "results.png"):
        assert (baseline.parent / name).exists()
    assert main([*common, "--gate"]) == 0
    run["groups"]["ensembles"]["rows"][0]["ns"] = [20.0, 40.0, 20.0]
    (out / "run.json").write_text(json.dumps(run))
    capsys.readouterr()
    assert main([*common, "--gate"]) == 1
    assert "2 worse" in capsys.readouterr().out
    # a partial run replaces its own workloads in the baseline and no others
    part = {"format": metrics.FORMAT, "groups": {"commands": run["groups"]["commands"]}}
    part["groups"]["commands"]["rows"][0]["seconds"] = 3.0
    (out / "run.json").write_text(json.dumps(part))
    assert main([*common, "--update-baseline"]) == 0
    merged = json.loads(baseline.read_text())["groups"]
    assert merged["commands"]["rows"][0]["seconds"] == 3.0
    assert merged["ensembles"]["rows"][0]["ns"] == [2.0, 4.0, 2.0]


def test_a_run_that_dies_keeps_the_workloads_it_finished(run, tmp_path, monkeypatch):
    def finishes(processes, peers, quick):
        return run["groups"]["commands"]["rows"]

    def dies(processes, peers, quick):
        raise KeyboardInterrupt

    workloads = {"commands": finishes, "memory": dies}
    subject = dataclasses.replace(SUBJECTS["sgd"], workloads=workloads)
    monkeypatch.setitem(SUBJECTS, "sgd", subject)
    baseline = tmp_path / "results.json"
    given = ["--only", "memory", "commands", "--out", str(tmp_path), "--baseline", str(baseline)]
    with pytest.raises(KeyboardInterrupt):
        main([*given, "--backend", "cpu", "--update-baseline"])
    for path in (tmp_path / "run.json", baseline):
        assert list(json.loads(path.read_text())["groups"]) == ["commands"]


# --- variable projection ----------------------------------------------------------------------


def test_variable_projection_is_compared_with_what_it_must_equal(monkeypatch, capsys):
    """Ours is real on the general path, the answers of the other processes are made from it."""
    real, off = {}, {"PyTorch": 1e-12, "circle": 0.0}
    times = {"wall": 0.02, "processor": 0.04, "load": 0.5}

    def answer(python, way, path, seeds, epochs):
        if way == "large":
            return real | {"times": {"1": times}}
        if not real:
            said = varpro.side("dense", path, seeds, epochs)
            real.update(json.loads(json.dumps(said, allow_nan=True)))
            assert list(real["times"]) == ["1"]
        here = np.asarray(real["float64"])
        assert here.shape == (1, 5, 2)
        np.testing.assert_allclose(np.linalg.norm(here, axis=-1), 1.0, rtol=1e-14)
        if way == "torch":
            here = here + off["PyTorch"]
            said = {"version": "2", "threads": 1, "float32": here + 1e-3}
            slow = {"wall": 0.2, "processor": 0.2, "load": 0.5}
            return said | {"float64": here.tolist(), "times": slow}
        moved = (here + off["circle"]).tolist() if way == "circle" else here.tolist()
        return real | {"float64": moved, "times": {"1": times}}

    monkeypatch.setattr(varpro, "apart", answer)
    monkeypatch.setattr(varpro, "ROUNDS", 1)
    small = ["--width", "5", "--samples", "12", "--seeds", "1", "--epochs", "2"]
    small += ["--large", "6", "14"]
    assert varpro.main([*small, "--dense"]) == 0
    said = capsys.readouterr().out
    for line in ("float32 to float64: 1.4e-03", "circle to PyTorch in float64: 1.4e-12"):
        assert line in said
    assert [line.split()[-3:-1] for line in said.splitlines() if "1 seed" in line] == [
        ["10.0", "5.0"]
    ] * 2
    assert varpro.main([*small, "--alone"]) == 0
    assert "PyTorch" not in capsys.readouterr().out
    for name, gap in (("PyTorch", 1e-7), ("PyTorch", np.nan), ("circle", 1e-7)):
        with monkeypatch.context() as patch:
            patch.setitem(off, name, gap)
            assert varpro.main([*small, *(["--alone"] if name == "circle" else [])]) == 1
    assert "not equal" in capsys.readouterr().err


@pytest.mark.slow
def test_variable_projection_without_pytorch(capsys):
    """All processes of ours at a tiny size; most of the time is compilation."""
    small = ["--width", "8", "--samples", "20", "--seeds", "1", "--epochs", "2"]
    assert varpro.main([*small, "--alone", "--large", "9", "21"]) == 0
    assert "dense to circle" in capsys.readouterr().out
