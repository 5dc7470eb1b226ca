"""Joint training against the reduced flow of `InContext`, over teachers and starts.

    python -m benchmarks.kim_suzuki [--seeds 8] [--counts 1 10 100] [--steps 2000] [--after 0.1]
                                    [--samples 1500] [--particles 100]

Prints, for every seed, the loss with the attention eliminated at the start and the end; for each
count c of steps of the attention per step of the particles (of size 0.05 for one, else 0.5) the
largest gap to it after a part of the run, and the loss at the end; and for all runs the step of the
particles times the largest curvature at the end, with the attention eliminated and held fixed,
of which 2 is the limit of stability. See docs/kim_suzuki.md.
"""

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import tts_jax as tts
from tts_jax import regime


STEP = 0.2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--after", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--particles", type=int, default=100)
    given = parser.parse_args(arguments)
    rows = []
    for seed in range(given.seeds):
        rows.append(measured(seed, given))
        losses, gaps, ends, stable = rows[-1]
        print(
            f"seed {seed}: reduced {losses[0]:.3f} -> {losses[1]:.2e}, gaps {np.round(gaps, 3)}, "
            f"joint ends {np.array2string(ends, precision=5)}",
            flush=True,
        )
        print(f"    step times curvature (eliminated, fixed): {np.round(stable, 2).tolist()}")
    losses, gaps, ends, _ = (np.stack(part) for part in zip(*rows, strict=True))
    ratio = losses[:, 1] / losses[:, 0]
    print(
        f"reduced, end over start: {np.median(ratio):.2e} ({ratio.min():.2e} to {ratio.max():.2e})"
    )
    for place, count in enumerate(given.counts):
        gap, end = gaps[:, place], ends[:, place]
        print(
            f"c = {count}: gap {np.median(gap):.3f} ({gap.min():.3f} to {gap.max():.3f}), "
            f"end {np.median(end):.2e}"
        )
    return 0


def measured(seed: int, given: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Losses of the reduced run; gaps and last losses of the joint ones; curvatures of all."""
    problem = tts.InContext.of_teacher(
        key=jax.random.key(seed), samples=given.samples, particles=given.particles
    )
    records = np.unique(np.rint(np.linspace(0, given.steps, 101)))
    options = {
        "key": jax.random.key(2),
        "state": problem.init(key=jax.random.key(100 + seed)),
        "tau": records * STEP,
        "progress": False,
    }
    runs = [tts.sgd(problem, regime="limit", step_size=STEP, **options)]
    for count in given.counts:
        rate = 0.05 if count == 1 else 0.5
        how = {"regime": regime.Inner(count), "step_size": rate, "epsilon": STEP / rate}
        runs.append(tts.sgd(problem, **how, **options))
    reduced = runs[0].loss[0]
    late = records > given.after * given.steps
    gaps = [np.max(np.abs(run.loss[0] - reduced)[late]) for run in runs[1:]]
    ends = [run.loss[0, -1] for run in runs[1:]]
    with jax.enable_x64(True):
        stable = [
            [STEP * float(largest(problem, *last(run), fixed)) for fixed in (False, True)]
            for run in runs
        ]
    return reduced[[0, -1]], np.asarray(gaps), np.asarray(ends), np.asarray(stable)


def last(run: tts.Trajectory) -> tts.State:
    """The last state of a run of one seed."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0, -1]), tts.State(run.fast, run.slow))


@eqx.filter_jit
def largest(problem: tts.InContext, fast: Any, slow: Any, fixed: bool) -> Any:
    """The largest curvature by the power method, of L at fixed W or with W eliminated."""
    flat, unravel = ravel_pytree(slow)

    def force(flat: Any) -> Any:
        slow = unravel(flat)
        velocity = problem.slow_field(fast, slow) if fixed else problem.reduced_field(slow)
        return -ravel_pytree(velocity)[0]

    product = jax.linearize(force, flat)[1]

    def step(_: Any, vector: Any) -> Any:
        vector = product(vector)
        return vector / jnp.linalg.norm(vector)

    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    vector = jax.lax.fori_loop(0, 200, step, start)
    return vector @ product(vector)


if __name__ == "__main__":
    raise SystemExit(main())
