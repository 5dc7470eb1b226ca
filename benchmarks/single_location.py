"""The five experiments of single-location regression against steps as published.

    python -m benchmarks.single_location [--seeds 30] [--steps 600] [--only NAME ...] [--alone]

Ours is `compute` of `tts_jax.experiments.single_location` at the paper's scale: every experiment
from the first step to the last, all seeds together, in float64, compilation included.

The peer is written here after the published code (PierreMarion23/single-location-regression), which
takes about an hour on a laptop: one run after the other, one compiled step per call from Python, in
float32, with vectors of d entries, the gradients in k and in v each by a differentiation of its
own, and prompts of d entries on batches. `--steps` of its steps are timed after the first ones, and
told for all steps of all seeds; what it spends on records is left out.

Results must be equal: after `--steps` steps of descent from one start the overlaps of both may
differ by 1e-3, else the exit code is 1. The peer's are float32.

Times are in seconds, on the clock and of the processor; only the latter mean something while others
use the machine. Both sides run in a process of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


NAMES = ("manifold", "large_gain", "small_gain", "schedule", "batches")
CLOCKS = ("wall", "processor")
TOLERANCE = 1e-3


def clocks() -> np.ndarray:
    """Seconds on the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def numbers(name: str) -> dict[str, Any]:
    """Of an experiment: step size, gain, rate of its fall, steps, whether it is on batches."""
    from tts_jax.experiments.single_location import CASES

    case = CASES[name]
    assert case.epsilon is not None
    rate = case.epsilon * case.step_size if case.scheduled else 0.0
    steps = round(case.end / (case.epsilon * case.step_size))
    return {"size": case.step_size, "gain": case.gain, "rate": rate, "steps": steps} | {
        "batch": case.batch,
        "manifold": case.start == "manifold",
    }


# --- ours ---------------------------------------------------------------------------------------


def ours(name: str, seeds: int, steps: int) -> dict[str, Any]:
    """Times and outcome of an experiment, and overlaps after `steps` from the peer's start."""
    from tts_jax._compat import configure_cpu

    configure_cpu()

    import jax

    import tts_jax as tts
    from tts_jax.experiments import single_location

    began = clocks()
    settings = single_location.settings_of("single_location", "paper", seeds)
    run = single_location.compute(settings, (name,))[name]
    spent = clocks() - began
    said: dict[str, Any] = {"times": spent.tolist(), "found": int(single_location.found(run).sum())}
    given = numbers(name)
    if not given["batch"]:
        case = single_location.CASES[name]
        problem = settings.problem(case)
        state = problem.state(**dict(zip(_OVERLAPS, start(given["manifold"], 400)[0], strict=True)))
        per_step = case.step_size * (case.epsilon or 1.0)
        near = tts.sgd(
            problem,
            key=jax.random.key(0),
            state=state,
            epsilon=case.epsilon,
            step_size=case.step_size,
            tau=np.array([steps * per_step]),
        )
        said["overlaps"] = [float(near.observables[seen][0, 0]) for seen in _OVERLAPS]
    return said


# --- the peer -----------------------------------------------------------------------------------

_OVERLAPS = ("kappa", "nu", "theta", "eta", "rho")


def start(manifold: bool, dimension: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Overlaps of a start, and its vectors; k* and v* are the first two axes."""
    k, v = np.random.default_rng(1).normal(size=(2, dimension))
    k, v = k / np.linalg.norm(k), v / np.linalg.norm(v)
    if manifold:
        k[1] = v[0] = 0.0
        k /= np.linalg.norm(k)
        rest = np.where(np.arange(dimension) > 1, k, 0.0)
        v -= (v @ rest) * rest / (rest @ rest)
        v /= np.linalg.norm(v)
    return [float(x) for x in (k[0], v[1], v[0], k[1], k @ v)], k, v


def peer(name: str, steps: int) -> dict[str, Any]:
    """Seconds of one step, and overlaps after `steps`."""
    import jax
    import jax.numpy as jnp
    from jax.scipy.special import erf

    from tts_jax.problems.single_location import mean_square_erf

    given = numbers(name)
    batch, count = given["batch"], 10
    dimension, noise = (80, 0.1) if batch else (400, 0.0)
    spread, shift = np.sqrt(0.5), np.sqrt(dimension / 2)
    k_star, v_star = jnp.eye(dimension, dtype=jnp.float32)[:2]

    def risk(k, v, gain):
        kappa, nu, theta, eta, rho = k @ k_star, v @ v_star, v @ k_star, k @ v_star, k @ v
        t, g = gain * shift * kappa, gain * spread
        ordinary = jax.grad(lambda t: erf(t / jnp.sqrt(1 + 2 * g**2)))
        squared = jax.grad(mean_square_erf)
        mean, zeta = erf(t / jnp.sqrt(1 + 2 * g**2)), mean_square_erf(t, g)
        first, second = ordinary(t), jax.grad(ordinary)(t)
        right = spread**2 * (nu * mean + eta * rho * g**2 * second)
        right += spread * eta * shift * theta * g * first
        own = ((shift * theta) ** 2 + spread**2) * zeta
        own += 2 * shift * theta * spread * rho * g * squared(t, g)
        own += (spread * rho * g) ** 2 * jax.grad(squared)(t, g)
        wide = 1 + 2 * gain**2
        c = 2 * gain / jnp.sqrt(np.pi * wide)
        loud = 8 / np.pi * gain**2 / (wide * jnp.sqrt(1 + 4 * gain**2))
        others = rho**2 * (loud + (count - 2) * c**2)
        others += 2 * c * rho * (shift * theta * mean + spread * rho * g * first)
        return spread**2 - 2 * right + own + (count - 1) * others

    def moved(x, slope):
        x = x - given["size"] * (slope - (x @ slope) * x)
        return x / jnp.linalg.norm(x)

    @jax.jit
    def descend(k, v, gain, key):
        del key
        told = risk(k, v, gain)
        of_k, of_v = jax.grad(risk, 0)(k, v, gain), jax.grad(risk, 1)(k, v, gain)
        k, v = moved(k, of_k), moved(v, of_v)
        return k, v, told, k @ k_star, v @ v_star, v @ k_star, k @ v_star, k @ v

    def loss(k, v, tokens, labels, gain):
        found = jax.vmap(lambda x: erf(gain * x @ k) @ (x @ v))(tokens)
        return jnp.mean((found - labels) ** 2)

    @jax.jit
    def on_batch(k, v, gain, key):
        keys = jax.random.split(key, 3)
        signal = spread * jax.random.normal(keys[0], (5, 1, dimension)) + shift * k_star
        others = jax.random.normal(keys[1], (5, count - 1, dimension))
        labels = signal[:, 0] @ v_star + noise * jax.random.normal(keys[2], (5,))
        tokens = jnp.concatenate([signal, others], axis=1)
        told, slopes = jax.value_and_grad(loss, (0, 1))(k, v, tokens, labels, gain)
        k, v = moved(k, slopes[0]), moved(v, slopes[1])
        return k, v, told, k @ k_star, v @ v_star, v @ k_star, k @ v_star, k @ v

    step, keys = (on_batch if batch else descend), jax.random.split(jax.random.key(0), steps)

    def run(steps):
        k, v = (jnp.asarray(x, jnp.float32) for x in start(given["manifold"], dimension)[1:])
        seen = (k, v)
        for index in range(steps):
            gain = given["gain"] / (1 + given["rate"] * index)
            k, v, *seen = step(k, v, gain, keys[index])
        return [float(one) for one in seen[1:]]

    run(20)
    began = clocks()
    overlaps = run(steps)
    said: dict[str, Any] = {"times": ((clocks() - began) / steps).tolist()}
    return said if batch else said | {"overlaps": overlaps}


# --- both ---------------------------------------------------------------------------------------


def apart(side: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The answer of a side in a process of its own."""
    command = ["-m", "benchmarks.single_location", "--side", side, name]
    command += ["--seeds", str(given.seeds), "--steps", str(given.steps)]
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare(given: argparse.Namespace) -> int:
    """Check that results are equal, and print the times; the exit code."""
    from benchmarks.suite import machine

    here = machine.describe("cpu")
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}", flush=True)
    print(f"\n{'':12} {'steps':>8} {'found':>8} {'ours':>17} {'peer':>17} {'ratio':>15}")
    print(f"{f'{given.seeds} seeds':12} {'':8} {'':8}" + 2 * f" {'wall':>8} {'proc.':>8}", end="")
    print(f" {'wall':>7} {'proc.':>7} {'load':>5}", flush=True)
    total, wrong = np.zeros((2, 2)), False
    for name in given.only or NAMES:
        steps = numbers(name)["steps"]
        mine = apart("ours", name, given)
        times = [np.array(mine["times"]), np.full(2, np.nan)]
        if not given.alone:
            theirs = apart("peer", name, given)
            times[1] = np.array(theirs["times"]) * steps * given.seeds
            if "overlaps" in mine:
                gap = np.max(np.abs(np.subtract(mine["overlaps"], theirs["overlaps"])))
                wrong |= not gap <= TOLERANCE
                print(f"    overlaps after {given.steps} steps: {gap:.1e} apart", flush=True)
        total += np.array(times)
        row(name, f"{steps}", f"{mine['found']}", times)
    row("all", "", "", list(total))
    if wrong:
        print(f"not equal: more than {TOLERANCE:g}", file=sys.stderr)
    return int(wrong)


def row(name: str, steps: str, found: str, times: Sequence[np.ndarray]) -> None:
    """Print the times of both, and their ratio."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else np.nan
    both = " ".join(f"{one:8.1f}" for one in np.concatenate(times))
    ratios = " ".join(f"{one:7.1f}" for one in times[1] / times[0])
    print(f"{name:12} {steps:>8} {found:>8} {both} {ratios} {load:5.1f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both, or do what one of them does."""
    parser = argparse.ArgumentParser(description="Single-location regression, all experiments.")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=600, help="steps of the peer that are timed")
    parser.add_argument("--only", nargs="*", choices=NAMES, help="some of the experiments")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        side, name = given.side
        said = ours(name, given.seeds, given.steps) if side == "ours" else peer(name, given.steps)
        print(json.dumps(said))
        return 0
    return compare(given)


if __name__ == "__main__":
    sys.exit(main())
