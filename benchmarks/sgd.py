"""What a step of SGD costs on this machine, against the published algorithm in plain NumPy.

    python benchmarks/sgd.py [--quick] [--as-library]

Measures the engine as the command line runs it, on all cores: nanoseconds per step and per
seed-step for ensembles of 1 to 1024 seeds in float32 and float64, the time to compile apart.
`--as-library` leaves XLA's flags and the number of devices as an import finds them. Every number
is the smallest of several repetitions.
"""

import argparse
import os
import platform
import time

import numpy as np

from tts_jax import _compat


JUMPS = np.array([0.2, 0.35, 0.5, 0.65, 0.8])
VALUES = np.array([1.0, 5.0, 1.0, 3.0, 1.0, 5.0])
NEURONS, ETA, EPSILON, STEP_SIZE = 20, 4e-3, 2e-5, 1e-5
PAPER_STEPS = 175_000_000


def numpy_step_seconds(steps: int, repetitions: int) -> float:
    """Seconds per step of the published algorithm: one seed, an interpreted loop over steps."""
    rng = np.random.RandomState(0)
    positions = np.concatenate([[-ETA / 2], np.sort(rng.rand(NEURONS))])
    weights = np.zeros(NEURONS + 1)
    target_positions = np.concatenate([[-5e-9], JUMPS])
    target_weights = np.diff(VALUES, prepend=0.0)

    def activation(z: np.ndarray) -> np.ndarray:
        left = np.minimum(np.maximum(4 * (z + 0.5) ** 3, 0), 0.5)
        return left + np.minimum(np.maximum(0.5 - 4 * (0.5 - z) ** 3, 0), 0.5)

    def error(x: float, noise: float) -> float:
        label = np.dot(activation((x - target_positions) / 1e-8), target_weights) + noise
        return label - np.dot(activation((x - positions) / ETA), weights)

    best = np.inf
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(steps):
            x = rng.rand()
            noise = 2 * rng.rand() - 1
            slope_weights = -2 * error(x, noise) * activation((x - positions) / ETA)
            hit = np.all([x >= positions - ETA / 2, x <= positions + ETA / 2], axis=0)
            slope_positions = 2 * error(x, noise) * weights * hit / ETA
            weights -= STEP_SIZE * slope_weights
            positions -= STEP_SIZE * EPSILON * slope_positions
        best = min(best, (time.perf_counter() - started) / steps)
    return best


def engine_step_seconds(seeds: int, dtype: str, seconds: float, repetitions: int) -> dict:
    """Seconds per step of an ensemble, and seconds until its first step is done."""
    import jax

    import tts_jax as tts
    from tts_jax import _lanes, _random

    target = tts.PiecewiseConstant(jumps=JUMPS, values=VALUES)
    problem = tts.Univariate(target, neurons=NEURONS, eta=ETA, noise=1.0)
    with jax.enable_x64(True):
        streams, starts = _random.seed_keys(jax.random.key(0), seeds)
        state = jax.tree.map(np.asarray, jax.vmap(lambda key: problem.init(key=key))(starts))
        run = _lanes.LaneRun(
            problem,
            state,
            _random.key_words(streams),
            step_size=STEP_SIZE,
            epsilon=EPSILON,
            gradient="exact",
            dtype=dtype,
        )
        jax.clear_caches()
        started = time.perf_counter()
        run.lower().compile()
        compile_seconds = time.perf_counter() - started
        run.advance(100)
        jax.block_until_ready(run.carry)
        steps, best = 2000, np.inf
        for _ in range(repetitions):
            started = time.perf_counter()
            run.advance(steps)
            jax.block_until_ready(run.carry)
            best = min(best, (time.perf_counter() - started) / steps)
            steps = max(2000, int(seconds / repetitions / best))
    return {"step": best, "compile": compile_seconds, "layout": run.layout}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description="What a step of SGD costs on this machine.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--as-library", action="store_true", help="without `configure_cpu`")
    arguments = parser.parse_args()
    if not arguments.as_library:
        _compat.configure_cpu()
    import jax

    print(f"{platform.platform()}, {_cpu_name()}, {_compat.cores()} cores, load {_load()}")
    print(f"Python {platform.python_version()}, jax {jax.__version__}, {jax.local_devices()}")
    quick = arguments.quick
    reference = numpy_step_seconds(300 if quick else 3000, 2 if quick else 4)
    print(f"published algorithm in NumPy: {reference * 1e9:,.0f} ns per step and seed\n")
    header = ("dtype", "seeds", "groups x width", "compile", "ns/step", "ns/seed-step")
    header += ("NumPy ratio", "paper run")
    print("{:>8} {:>6} {:>15} {:>9} {:>10} {:>13} {:>12} {:>10}".format(*header))
    for dtype in ("float32", "float64"):
        for seeds in (1, 64, 1024) if quick else (1, 16, 32, 64, 128, 256, 1024):
            found = engine_step_seconds(seeds, dtype, 0.4 if quick else 2.0, 3 if quick else 8)
            step = found["step"]
            print(
                f"{dtype:>8} {seeds:>6} {found['layout']:>15} {found['compile']:>7.2f} s "
                f"{step * 1e9:>10,.0f} {step * 1e9 / seeds:>13.2f} "
                f"{reference * seeds / step:>11,.0f}x {step * PAPER_STEPS:>8,.0f} s",
                flush=True,
            )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "unknown processor"


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    main()
