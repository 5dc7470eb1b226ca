"""Implicit diffusion against a loop that is written as the published code is.

    python -m benchmarks.implicit_diffusion [--particles 1000] [--steps 2000] [--check 100]

The published code (github.com/google-deepmind/implicit_diffusion) is a Python loop that calls
compiled functions of JAX: one moves the particles, one draws from the reference, one moves the
logits; then the mean reward is logged. `published` below is such a loop, of our own writing: the
same calls, the same derivatives by automatic differentiation, the same float32. Ours is
`tts.sgd(regime=regime.Inner(1))` in float32.

Results must be equal: after `--check` steps in float64 from one start, with the same noise, logits
and particles may differ by 1e-8, else the exit code is 1.

Times are seconds of one step of one run without compilation: a short run is subtracted from a long
one, and each number is the fastest of three. Only those of the processor mean something while
others use the machine. Both have all cores and processes of their own. The loop is timed as
published, and without its log, which ours does not keep either.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.varpro import Times, fastest


GAMMA, ETA = 0.2, 0.1
START = (1.5, 0.0, 1.5, 0.0, 1.5, 0.0)
TOLERANCE = 1e-8


# --- the loop -----------------------------------------------------------------------------------


def published(path: Path, particles: int, steps: int) -> dict[str, Any]:
    """Where given noise leads in float64, and the times of both kinds of float32 runs."""
    import jax
    import jax.numpy as jnp

    angles = np.arange(6) * np.pi / 3
    centers = 4.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def energy(x: Any, theta: Any) -> Any:
        weights = jax.nn.softmax(theta)
        terms = [
            w * jnp.exp(jnp.sum(-((x - c) ** 2)) / 2.0)
            for w, c in zip(weights, centers, strict=True)
        ]
        return -jnp.log(sum(terms))

    def reward(x: Any) -> Any:
        gap = (x - jnp.array([4.0, 3.8])) ** 2 / 20.0
        return (x[0] >= 0).astype(float) * jnp.exp(-jnp.sum(gap)) / 2.5

    in_x = jax.vmap(jax.grad(energy), in_axes=(0, None))
    in_theta = jax.vmap(jax.grad(energy, argnums=1), in_axes=(0, None))
    rewards = jax.jit(jax.vmap(reward))

    def moved(x: Any, theta: Any, z: Any) -> Any:
        return x - GAMMA * in_x(x, theta) + jnp.sqrt(2 * GAMMA) * z

    @jax.jit
    def move(key: Any, x: Any, theta: Any) -> Any:
        return moved(x, theta, jax.random.normal(key, x.shape))

    @jax.jit
    def reference(key: Any, x: Any) -> Any:
        one, two = jax.random.split(key)
        probabilities = jax.nn.softmax(jnp.array(START))
        mode = jax.random.choice(one, 6, shape=x.shape[:1], p=probabilities)
        return jnp.asarray(centers)[mode] + 2.0 * jax.random.normal(two, x.shape)

    @jax.jit
    def climb(x: Any, theta: Any, other: Any, eta: Any) -> Any:
        mean = jnp.mean(in_theta(x, theta), axis=0)
        pull = jnp.mean(in_theta(other, theta), axis=0) - mean
        slope = -rewards(x) @ in_theta(x, theta) / len(x) + jnp.mean(rewards(x)) * mean
        return theta + eta * (slope + 0.0 * pull), pull

    rate = jax.jit(lambda eta, step: eta + 0 * step)

    def run(count: int, log: bool) -> tuple[Any, list[Any]]:
        keys = jax.random.split(jax.random.PRNGKey(0), 3)
        x = jax.random.normal(keys[1], (particles, 2))
        other = jax.random.normal(keys[2], (1, 2))
        theta = jnp.array(START)
        logged = []
        for step in range(count):
            keys = jax.random.split(keys[0], num=3)
            x = move(keys[1], x, theta)
            other = reference(keys[2], other)
            theta, pull = climb(x, theta, other, rate(ETA, step))
            if log:
                logged.append((jnp.mean(rewards(x)), jnp.linalg.norm(pull), theta))
        return jax.block_until_ready((x, theta)), logged

    said: dict[str, Any] = {"version": jax.__version__, "times": {}}
    given = np.load(path)
    with jax.enable_x64(True):
        x, theta = jnp.asarray(given["start"]), jnp.array(START)
        for z in given["noise"]:
            x = jax.jit(moved)(x, theta, jnp.asarray(z))
            theta, _ = climb(x, theta, x[:1], jnp.asarray(ETA))
        said |= {"fast": np.asarray(x).tolist(), "slow": np.asarray(theta).tolist()}
    for name, log in (("published", True), ("published, no log", False)):
        said["times"][name] = fastest(lambda count, log=log: run(count, log), 10, 10 + steps)
    return said


# --- ours ---------------------------------------------------------------------------------------


def ours(path: Path, particles: int, steps: int, check: int) -> dict[str, Any]:
    """Writes start and noise of a run to `path`; where it ended, and the times."""
    from tts_jax._compat import configure_cpu

    configure_cpu()

    import jax

    import tts_jax as tts
    from tts_jax._sgd import _noise_key, _seed_keys
    from tts_jax.geometry import Euclidean

    problem, key = tts.ImplicitDiffusion(particles=particles), jax.random.key(0)

    def run(count: int, dtype: Any = np.float32) -> tts.Trajectory:
        return tts.sgd(
            problem,
            key=key,
            regime=tts.regime.Inner(1),
            step_size=GAMMA,
            epsilon=ETA / GAMMA,
            tau=np.array([0.0, count * ETA]),
            dtype=dtype,
            throw=True,
        )

    done = run(check, np.float64)
    with jax.enable_x64(True):
        start = np.asarray(done.fast)[0, 0]
        stream = _seed_keys(key, 1)[0][0]

        @jax.jit
        def noise(step: Any) -> Any:
            mine = jax.random.split(_noise_key(stream, step))[0]
            return Euclidean().noise(start, jax.random.fold_in(mine, 0))

        drawn = np.stack([np.asarray(noise(np.int64(step))).T for step in range(check)])
    np.savez(path, start=start.T, noise=drawn)
    said = {"fast": np.asarray(done.fast)[0, 1].T.tolist(), "slow": done.slow[0, 1].tolist()}
    run(10)  # compiles
    return said | {"times": {"ours": fastest(run, 10, 10 + 5 * steps)}}


# --- both ---------------------------------------------------------------------------------------


def side(way: str, path: Path, particles: int, steps: int, check: int) -> dict[str, Any]:
    """What one process does."""
    if way == "published":
        return published(path, particles, steps)
    return ours(path, particles, steps, check)


def apart(way: str, path: Path, particles: int, steps: int, check: int) -> dict[str, Any]:
    """The answer of `side` in a process of its own."""
    numbers = ["--particles", str(particles), "--steps", str(steps), "--check", str(check)]
    command = ["-m", "benchmarks.implicit_diffusion", "--side", way, str(path), *numbers]
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def row(name: str, times: Times, own: Times) -> None:
    """Print the times of one step, and how many times as long as ours they are."""
    clocks = ("wall", "processor")
    spent = " ".join(f"{1e6 * times[clock]:10.1f}" for clock in clocks)
    ratios = " ".join(f"{times[clock] / own[clock]:8.1f}" for clock in clocks)
    print(f"{name:22} {spent} {ratios} {times['load']:6.1f}", flush=True)


def compare(given: argparse.Namespace, folder: Path) -> int:
    """Check that results are equal, then print the times; the exit code."""
    from benchmarks.suite import machine

    here = machine.describe("cpu")
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}")
    print(f"{given.particles} particles, γ = {GAMMA}, η = {ETA}", flush=True)
    numbers = folder / "noise.npz", given.particles, given.steps, given.check
    mine = apart("ours", *numbers)
    theirs = apart("published", *numbers)
    gaps = [np.max(np.abs(np.subtract(mine[part], theirs[part]))) for part in ("fast", "slow")]
    print(f"after {given.check} steps: particles to {gaps[0]:.1e}, logits to {gaps[1]:.1e}")
    if not max(gaps) <= TOLERANCE:
        print(f"not equal: more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    print(f"\n{'':22} {'microseconds per step':>21} {'ratio to ours':>17}")
    print(f"{'':22} {'wall':>10} {'processor':>10} {'wall':>8} {'proc.':>8} {'load':>6}")
    own = mine["times"]["ours"]
    for name, times in (theirs["times"] | mine["times"]).items():
        row(name, times, own)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both, or do what one of them does."""
    parser = argparse.ArgumentParser(description="Implicit diffusion against the published loop.")
    for name, default in (("particles", 1000), ("steps", 2000), ("check", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        way, path = given.side
        said = side(way, Path(path), given.particles, given.steps, given.check)
        print(json.dumps(said))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
