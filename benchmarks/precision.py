"""What float32 loses on the paper's full run: the same seeds in float32 and float64.

    python -m benchmarks.precision [--seeds 64] [--tau 0.035]

1.75e8 steps at ε = 2e-5 and h = 1e-5 with the same starts and samples in both precisions. Prints,
along the run, the largest and the median difference of a position in widths η and of a weight,
and two-sample Kolmogorov-Smirnov tests of the final positions' moves and of the final losses.
"""

import argparse
import time

import numpy as np
from scipy.stats import ks_2samp

from benchmarks.setting import JUMPS, VALUES, Setting


NEURONS, ETA = Setting.neurons, Setting.eta


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description="What float32 loses on the paper's full run.")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--tau", type=float, default=0.035, help="slow time of the run")
    parser.add_argument("--gradient", choices=("exact", "box"), default="box")
    given = parser.parse_args()

    import jax

    import tts_jax as tts

    problem = tts.Univariate(
        tts.PiecewiseConstant(jumps=JUMPS, values=VALUES),
        neurons=NEURONS,
        eta=ETA,
        noise=1.0,
    )
    tau = given.tau * np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    runs = {}
    for dtype in ("float32", "float64"):
        started = time.perf_counter()
        runs[dtype] = tts.sgd(
            problem,
            key=jax.random.key(0),
            seeds=given.seeds,
            epsilon=2e-5,
            step_size=1e-5,
            tau=tau,
            gradient=given.gradient,
            dtype=dtype,
        )
        engine = dict(runs[dtype].notes)["engine"]
        print(f"{dtype}: {time.perf_counter() - started:.1f} s, engine {engine}", flush=True)
    narrow, wide = runs["float32"], runs["float64"]
    print(f"{given.seeds} seeds, gradient {given.gradient}")
    print(f"{'tau':>8} {'max |du|/eta':>13} {'median':>9} {'max |da|':>9} {'median':>9}")
    for index, time_ in enumerate(np.asarray(wide.tau)):
        moved = np.abs(narrow.slow[:, index] - wide.slow[:, index]) / ETA
        weights = np.abs(narrow.fast[:, index] - wide.fast[:, index])
        columns = moved.max(), np.median(moved), weights.max(), np.median(weights)
        print(f"{time_:8.4f} {columns[0]:13.2e}" + "".join(f" {c:9.1e}" for c in columns[1:]))
    moves = [np.ravel(run.slow[:, -1] - run.slow[:, 0]) / ETA for run in (narrow, wide)]
    losses = [np.asarray(run.loss[:, -1]) for run in (narrow, wide)]
    print(
        f"largest move {np.abs(moves[1]).max():.1f} eta, losses {losses[1].min():.4f} to", end=" "
    )
    print(f"{losses[1].max():.4f}, largest difference {np.abs(losses[0] - losses[1]).max():.1e}")
    print(f"KS of the moves: p = {ks_2samp(*moves, method='asymp').pvalue:.4f}")
    print(f"KS of the losses: p = {ks_2samp(*losses, method='asymp').pvalue:.4f}")


if __name__ == "__main__":
    main()
