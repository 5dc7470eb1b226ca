"""The published run of Takakura & Suzuki (2024), 16 seeds at once: time, memory, precision.

    python -m benchmarks.takakura_suzuki                  # 100 steps, extrapolated to 10,000
    python -m benchmarks.takakura_suzuki --steps 10000    # the whole run

d = 15, N = 2000 features, n = 300 data of their own for each seed, η = 0.2, λ = 0.004, in float32;
`--dtype float64` and `--label-noise 1` are the other cases. Time is that of the steps alone, from
two runs of different length; memory is the peak of the process, and what the compiled step needs.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tts_jax._compat import configure_cpu


WHOLE = 10_000  # steps of the published run
STEP = 0.2


def timed(advance: Any, steps: int) -> dict[str, float]:
    """Seconds of `advance(steps)`, by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    advance(steps)
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
    }


def step_bytes(problem: Any, dtype: str) -> int:
    """Bytes that a compiled step of one seed needs beside its state."""
    import jax
    import jax.numpy as jnp

    import tts_jax as tts

    with jax.enable_x64(True):
        numbers = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem)
        form = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), problem.structure()
        )
        sample = numbers.sample(key=jax.random.key(0), step=0)
        sample = jax.tree.map(lambda leaf: leaf.astype(dtype), sample)

        def step(state: tts.State) -> Any:
            way = tts.regime.Eliminated()
            return way.step(numbers, state, sample, jnp.ones((), dtype), None, "exact")

        return jax.jit(step).lower(form).compile().memory_analysis().temp_size_in_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"seeds": 16, "steps": 100, "dimension": 15, "width": 2000, "samples": 300}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--label-noise", type=float, default=None, metavar="SIGMA")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    given = parser.parse_args(arguments)
    configure_cpu()

    import jax
    import numpy as np

    import tts_jax as tts
    from benchmarks.suite import machine
    from benchmarks.suite.worker import peak_bytes

    here = machine.describe("cpu")
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}")
    problems = [
        tts.MeanFieldKernel.of_target(
            key=jax.random.key(seed),
            dimension=given.dimension,
            samples=given.samples,
            width=given.width,
            label_noise=given.label_noise,
            directions=np.eye(given.dimension)[:2],
        )
        for seed in range(given.seeds)
    ]
    before, found = peak_bytes(), {}

    def advance(steps: int) -> None:
        run = tts.sgd(
            problems,
            key=jax.random.key(0),
            regime="limit",
            step_size=STEP,
            tau=[0.0, STEP * steps],
            dtype=given.dtype,
            throw=True,
        )
        found.update(run.observables, loss=run.loss)

    advance(1)  # compiles
    short, long = timed(advance, 1), timed(advance, 1 + given.steps)
    noise = "no label noise" if given.label_noise is None else f"label noise {given.label_noise:g}"
    print(
        f"d = {given.dimension}, N = {given.width}, n = {given.samples}, {given.seeds} seeds, "
        f"{given.dtype}, {noise}, {given.steps} steps"
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    for clock in ("wall", "processor"):
        spent = long[clock] - short[clock]
        each = 1e3 * spent / given.steps / given.seeds
        whole = spent * WHOLE / given.steps / 60
        print(f"{clock:10} {each:7.2f} ms per step and seed, {whole:6.1f} min for {WHOLE} steps")
    print(f"load {load:.1f} at the end")
    print(
        f"memory     {peak_bytes() / 2**20:.0f} MiB peak, {before / 2**20:.0f} before the first "
        f"step; {step_bytes(problems[0], given.dtype) / 2**20:.1f} MiB for the step of a seed"
    )
    for name, values in found.items():
        ends = np.mean(np.asarray(values), axis=0)
        print(f"{name:20} {ends[0]:9.4f} → {ends[-1]:9.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
