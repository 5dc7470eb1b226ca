"""Variable projection with ReLU features on the circle against the published algorithm in PyTorch.

    python -m benchmarks.varpro [--width 1024] [--samples 4096] [--seeds 2] [--epochs 20]
                                [--dense] [--alone] [--torch PYTHON]

Results must be equal: after `--epochs` epochs from equal starts on equal data the features of
PyTorch in float64 and ours may differ by 1e-8, else the exit code is 1. How far PyTorch in float32,
as published, is from float64 is told as well; distances are the largest of all features.

Times are seconds of one epoch of one seed, on the clock and of the processor; only the latter mean
something while others use the machine, and they hold what threads spend on waiting for each other.
PyTorch takes one seed in float32 on all cores. Ours is float64, with several seeds at once, which
share the cores, and without compilation: a short run is subtracted from a long one. Every number is
the fastest of three, NaN if the runs were too short to tell, beside the machine's load. Ratios are
PyTorch's time over ours.

`--dense` adds our general path, which does not use that inputs and features lie in the plane.
`--large M N` is one more problem for ours, with its memory. `--alone` leaves PyTorch out: then the
two ways of ours are compared with each other. `--torch` is a Python that has torch and NumPy, by
default this one. Every side runs in a process of its own.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


PENALTY, STEP, GAMMA, TEACHER_WIDTH = 1e-3, 2.0**-10, 100.0, 4096
TOLERANCE, ROUNDS = 1e-8, 3

Times = dict[str, float]


# --- what both get ----------------------------------------------------------------------------


def save_problems(path: Path, width: int, samples: int, count: int) -> None:
    """Gaussian inputs, labels of a teacher with two modes, and uniform features, `[count, ...]`."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, samples, 2))
    starts = rng.normal(size=(count, width, 2))
    starts /= np.linalg.norm(starts, axis=-1, keepdims=True)
    labels = np.empty((count, samples))
    for x, y in zip(inputs, labels, strict=True):
        a = rng.uniform(-np.pi / 2, np.pi / 2, TEACHER_WIDTH)
        angles = 2 * np.arctan2(np.sin(a), np.sqrt(1 + GAMMA) * np.cos(a))
        angles[1::3] += 0.4 * np.pi
        goal = np.stack([np.cos(angles), np.sin(angles)])
        for first in range(0, samples, 512):  # so that this process stays small
            rows = slice(first, first + 512)
            y[rows] = np.maximum(x[rows] @ goal, 0.0).mean(axis=1)
    np.savez(path, inputs=inputs, labels=labels, starts=starts)


def fastest(advance: Callable[[int], Any], short: int, long: int, seeds: int = 1) -> Times:
    """Seconds of one epoch of one seed, from runs of `short` (or 0) and `long` epochs."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    best = {(name, count): np.inf for name in clocks for count in (short, long)}
    for _ in range(ROUNDS):
        for count in (short, long):
            began = {name: clock() for name, clock in clocks.items()}
            advance(count)
            for name, clock in clocks.items():
                best[name, count] = min(best[name, count], clock() - began[name])
    spent = {name: best[name, long] - best[name, short] for name in clocks}
    work = (long - short) * seeds
    times = {name: one / work if one > 0 else np.nan for name, one in spent.items()}
    return times | {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else np.nan}


# --- PyTorch ------------------------------------------------------------------------------------


def published(path: Path, seeds: int, epochs: int) -> dict[str, Any]:
    """Features of both precisions after `epochs`, and the times of float32."""
    import torch

    given = np.load(path)

    class Student:
        def __init__(self, seed: int, dtype: Any) -> None:
            def tensor(name: str) -> Any:
                return torch.from_numpy(given[name][seed]).to(dtype)

            self.x, self.y = tensor("inputs"), tensor("labels")
            self.w = torch.nn.Parameter(tensor("starts"))
            self.optimizer = torch.optim.SGD([self.w], lr=len(self.w) * STEP)
            self.ridge = PENALTY * torch.eye(len(self.w), dtype=dtype)

        def advance(self, epochs: int) -> None:
            n, m = len(self.x), len(self.w)
            for _ in range(epochs):
                with torch.no_grad():
                    features = torch.relu(self.x @ self.w.T)
                    gram = features.T @ features / (n * m)
                    right = features.T @ self.y / n + PENALTY
                    u = torch.linalg.solve(gram + self.ridge, right)
                self.optimizer.zero_grad()
                f = torch.relu(self.x @ self.w.T) @ u / m
                misfit = torch.mean((f - self.y) ** 2) / (2 * PENALTY)
                (misfit + torch.mean((u - 1) ** 2) / 2).backward()
                self.optimizer.step()
                with torch.no_grad():
                    self.w /= torch.linalg.vector_norm(self.w, dim=1, keepdim=True)

    said: dict[str, Any] = {"version": torch.__version__, "threads": torch.get_num_threads()}
    for name in ("float64", "float32"):
        students = [Student(seed, getattr(torch, name)) for seed in range(seeds)]
        for student in students:
            student.advance(epochs)
        said[name] = [student.w.detach().tolist() for student in students]
    said["times"] = fastest(students[0].advance, 0, epochs)
    return said


# --- ours ---------------------------------------------------------------------------------------


def ours(path: Path, seeds: int, epochs: int, way: str) -> dict[str, Any]:
    """Features after `epochs`, and the times of several numbers of seeds at once."""
    from tts_jax._compat import configure_cpu

    configure_cpu()

    import equinox as eqx
    import jax

    import tts_jax as tts
    from benchmarks.suite.worker import peak_bytes

    given = np.load(path)
    inputs, labels, starts = given["inputs"], given["labels"], given["starts"]
    width = starts.shape[1]
    features = tts.Relu(tangential=False)  # as published
    problems = [
        tts.VarPro(x, y, width=width, penalty=PENALTY, features=features)
        for x, y in zip(inputs, labels, strict=True)
    ]
    if way == "dense":
        problems = [eqx.tree_at(lambda one: one._data, each, None) for each in problems]

    def run(count: int, epochs: int) -> np.ndarray:
        start = tts.State(np.ones((count, width)), starts[:count])
        trajectory = tts.sgd(
            problems[:count],
            key=jax.random.key(0),
            state=start,
            regime="limit",
            step_size=STEP,
            tau=[epochs * STEP],
            throw=True,
        )
        return np.asarray(trajectory.slow)[:, -1]

    short, long = {
        "circle": (epochs, 11 * epochs),
        "dense": (1, 1 + max(1, epochs // 4)),
        "large": (1, 1 + epochs),
    }[way]
    said: dict[str, Any] = {"before": peak_bytes() / 2**20, "times": {}}
    said["float64"] = run(seeds, epochs).tolist()
    counts = {"circle": {1, seeds, 4 * seeds}, "dense": {seeds}, "large": {1}}
    for count in sorted(counts[way]):
        run(count, short)  # compiles
        advance = functools.partial(run, count)
        said["times"][count] = fastest(advance, short, long, count)
    return said | {"peak": peak_bytes() / 2**20}


# --- both ---------------------------------------------------------------------------------------


def side(way: str, path: Path, seeds: int, epochs: int) -> dict[str, Any]:
    """What one process does."""
    if way == "torch":
        return published(path, seeds, epochs)
    return ours(path, seeds, epochs, way)


def apart(python: str, way: str, path: Path, seeds: int, epochs: int) -> dict[str, Any]:
    """The answer of `side` in a process of its own."""
    # PyTorch's Python need not have this package
    command = [os.path.abspath(__file__)] if way == "torch" else ["-m", "benchmarks.varpro"]
    command += ["--side", way, str(path), "--seeds", str(seeds), "--epochs", str(epochs)]
    done = subprocess.run([python, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def farthest(one: Any, other: Any) -> float:
    """The largest distance of two features; infinite if any is not a number."""
    gaps = np.linalg.norm(np.asarray(one) - np.asarray(other), axis=-1)
    return float(np.max(gaps)) if np.all(np.isfinite(gaps)) else float("inf")


def row(name: str, times: Times, peer: Times | None = None) -> None:
    """Print the times of one epoch, and how many times those of `peer` are as long."""
    ratios = ""
    if peer is not None:
        wall, processor = (peer[clock] / times[clock] for clock in ("wall", "processor"))
        ratios = f"{wall:8.1f} {processor:8.1f}"
    spent = f"{times['wall']:10.5f} {times['processor']:10.5f}"
    print(f"{name:30} {spent} {ratios:17} {times['load']:6.1f}", flush=True)


def compare(given: argparse.Namespace, folder: Path) -> int:
    """Check that results are equal, then print the times; the exit code."""
    from benchmarks.suite import machine

    here = machine.describe("cpu")
    kept = ("tts_jax", "jax", "numpy")
    versions = [f"{name} {here['versions'][name]}" for name in kept if here["versions"][name]]
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}; {', '.join(versions)}")
    print(f"M = {given.width}, N = {given.samples}, λ = {PENALTY}, step {STEP}", flush=True)
    ways = ["circle", "dense"] if given.dense or given.alone else ["circle"]
    path = folder / "problems.npz"
    save_problems(path, given.width, given.samples, 4 * given.seeds)
    print(f"\n{'':30} {'seconds/epoch/seed':>21} {'ratio':>17}")
    print(f"{'':30} {'wall':>10} {'processor':>10} {'wall':>8} {'proc.':>8} {'load':>6}")
    peer, times, expected = "circle", None, None
    if not given.alone:
        said = apart(given.torch, "torch", path, given.seeds, given.epochs)
        peer, times, expected = "PyTorch in float64", said["times"], said["float64"]
        row(f"PyTorch {said['version']}, {said['threads']} threads", times)
        print(f"    float32 to float64: {farthest(said['float32'], expected):.1e}", flush=True)
    for way in ways:
        mine = apart(sys.executable, way, path, given.seeds, given.epochs)
        if expected is None:
            expected = mine["float64"]
        else:
            gap = farthest(mine["float64"], expected)
            print(f"    {way} to {peer}: {gap:.1e}", flush=True)
            if gap > TOLERANCE:
                print(f"not equal: more than {TOLERANCE:.0e}", file=sys.stderr)
                return 1
        for count, own in mine["times"].items():
            row(f"{way}, {count} seed{'' if int(count) == 1 else 's'}", own, times)
    width, samples = given.large
    save_problems(path, width, samples, 1)
    large = apart(sys.executable, "large", path, 1, given.epochs)
    for own in large["times"].values():
        row(f"circle, {width} x {samples}", own)
    peak, before = large["peak"], large["before"]
    print(f"    peak memory {peak:.0f} MiB, {before:.0f} before the first step and its compilation")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both, or do what one of them does."""
    parser = argparse.ArgumentParser(description="Variable projection against PyTorch.")
    for name, default in (("width", 1024), ("samples", 4096), ("seeds", 2), ("epochs", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--large", type=int, nargs=2, default=(4096, 100_000), metavar=("M", "N"))
    parser.add_argument("--dense", action="store_true", help="also our general path")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        way, path = given.side
        print(json.dumps(side(way, Path(path), given.seeds, given.epochs)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
