"""Time and error of `sharp_limit` on random starts of the paper's problem.

    python benchmarks/sharp_limit.py [--starts N] [--check N]

m = 20 neurons at i.i.d. uniform positions, the paper's target, 100 recorded times up to τ = 0.035
and up to 0.2. Seconds are those of the fastest of five calls, compilation apart; CPU seconds are
the process's own, which other load on the machine does not lengthen. The error is the largest
difference to SciPy's DOP853 at tolerance 1e-13 between events that its root finder locates
(`tests/sharp_reference.py`), over the first starts; the weights follow from the positions. Printed
besides: how the lanes ended, the events, and how many starts are decoupled.
"""

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path

import numpy as np

from tts_jax import _compat


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def processor():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=10_000)
    parser.add_argument("--check", type=int, default=100, help="starts compared with SciPy")
    arguments = parser.parse_args()
    import jax

    import tts_jax as tts

    reference = importlib.import_module("sharp_reference")

    jumps, values = np.linspace(0.2, 0.8, 5), np.array([1.0, 5, 1, 3, 1, 5])
    problem = tts.Univariate(tts.PiecewiseConstant(jumps, values), neurons=20)
    slow = np.sort(np.random.default_rng(2023).random((arguments.starts, 20)), axis=1)
    state = problem.state(slow=slow)
    print(f"{processor()}, {_compat.cores()} cores")
    for end in (0.035, 0.2):
        tau = np.linspace(0.0, end, 100)
        started = time.perf_counter()
        run = jax.block_until_ready(tts.sharp_limit(problem, state, tau=tau))
        first = time.perf_counter() - started
        seconds, work = np.inf, np.inf
        for _ in range(5):
            started, used = time.perf_counter(), time.process_time()
            run = jax.block_until_ready(tts.sharp_limit(problem, state, tau=tau))
            seconds = min(seconds, time.perf_counter() - started)
            work = min(work, time.process_time() - used)
        count = min(arguments.check, arguments.starts)
        error = 0.0
        for lane in range(count):
            expected, _ = reference.simulate(slow[lane], jumps, values, tau)
            error = max(error, np.max(np.abs(expected - run.slow[lane])))
        happened = np.isfinite(run.events["time"])
        print(
            f"τ ≤ {end}: {arguments.starts} starts × {len(tau)} times in {seconds:.2f} s "
            f"({work:.2f} CPU s; first call {first:.1f} s); error {error:.1e} on {count} starts"
        )
        for kind in tts.Event:
            print(f"  {kind.name}: {np.sum(happened & (run.events['kind'] == kind))}")
        print(f"  most events of a start: {np.max(np.sum(happened, axis=1))}")
        print("  " + run.summary().replace("\n", "\n  "))


if __name__ == "__main__":
    main()
