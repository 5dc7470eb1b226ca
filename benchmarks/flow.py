"""Work against precision of the gradient-flow solvers, in one run on one machine.

    python benchmarks/flow.py [--quick] [--starts N] [--case I ...]

Every solver integrates the same random starts of the paper's problem (m = 20, η = 4e-3). Its
error is the maximum over recorded times and components of the distance to a reference at
tolerance 1e-12; its time is the minimum over repeats of the time for all starts, one after the
other on one CPU device, compilation excluded. The column `first` is the extra time of a
solver's first call, nearly all of it compilation; rodas5p compiles for the reference already.
Solvers are compared at equal error, by interpolating log time in log error.
"""

import argparse
import platform
import time

import diffrax
import jax
import numpy as np
from scipy.integrate import solve_ivp

import tts_jax as tts


TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
CASES = ((2e-5, 0.035), (1e-2, 0.3), (1.0, 1.0), (1.0, 0.1))  # (ε, τ_max)


def paper_problem():
    target = tts.PiecewiseConstant([0.2, 0.35, 0.5, 0.65, 0.8], [1, 5, 1, 3, 1, 5])
    return tts.Univariate(target, neurons=20, eta=4e-3)


def machine():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def error_of(trajectory, reference):
    """Maximum error of every start, `[starts]`."""
    fast = np.abs(trajectory.fast - reference.fast).max(axis=(1, 2))
    slow = np.abs(trajectory.slow - reference.slow).max(axis=(1, 2))
    return np.maximum(fast, slow)


def measure(run, repeats):
    """(answer, seconds of the first call, least seconds of the later ones)."""
    started = time.perf_counter()
    answer = jax.block_until_ready(run())
    first = time.perf_counter() - started
    best = np.inf
    for _ in range(repeats):
        started = time.perf_counter()
        answer = jax.block_until_ready(run())
        best = min(best, time.perf_counter() - started)
    return answer, first, best


def lsoda_seconds(problem, states, epsilon, tau, tolerance):
    """SciPy's LSODA on our compiled field and Jacobian: (fast, slow, seconds)."""
    split = problem.neurons + 1
    field = jax.jit(lambda y: jax.numpy.concatenate(problem.fields(y[:split], y[split:])))
    jacobian = jax.jit(lambda y: problem.jacobian(y[:split], y[split:]))
    scale = np.where(np.arange(2 * problem.neurons + 1) < split, 1 / epsilon, 1.0)
    answers, seconds = [], 0.0
    for fast, slow in zip(*states, strict=True):
        start = np.concatenate([fast, slow])
        field(start), jacobian(start)
        started = time.perf_counter()
        solution = solve_ivp(
            lambda t, y: scale * np.asarray(field(y)),
            (0, tau[-1]),
            start,
            method="LSODA",
            t_eval=tau,
            rtol=tolerance,
            atol=tolerance,
            jac=lambda t, y: scale[:, None] * np.asarray(jacobian(y)),
        )
        seconds += time.perf_counter() - started
        answers.append(solution.y.T)
    stacked = np.stack(answers)
    return stacked[..., :split], stacked[..., split:], seconds


def time_at(error, errors, seconds):
    """Time at which a solver reaches `error`, log-log; NaN outside what was measured."""
    order = np.argsort(errors)
    x, y = np.log(np.asarray(errors)[order]), np.log(np.asarray(seconds)[order])
    return float(np.exp(np.interp(np.log(error), x, y, left=np.nan, right=np.nan)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 starts, ε = 2e-5 only")
    parser.add_argument("--starts", type=int, default=4, help="number of random starts")
    cases = range(len(CASES))
    parser.add_argument("--case", type=int, nargs="+", choices=cases, help=f"of {CASES}")
    options = parser.parse_args()
    chosen = [0] if options.quick else options.case or cases
    jax.config.update("jax_enable_x64", True)
    starts = 2 if options.quick else options.starts
    repeats = 1 if options.quick else 2
    print(f"{machine()}, jax {jax.__version__}, one CPU device")
    problem = paper_problem()
    states = jax.vmap(lambda key: problem.init(key=key))(
        jax.random.split(jax.random.key(1), starts)
    )
    solvers = {
        "rodas5p": "rodas5p",
        "kvaerno5 (tuned)": "kvaerno5",
        "Kvaerno5() (stock)": diffrax.Kvaerno5(),
        "tsit5": "tsit5",
    }
    for epsilon, end in (CASES[index] for index in chosen):
        tau = np.linspace(0, end, 36)
        setting = dict(epsilon=epsilon, tau=tau, max_steps=200_000)
        reference = tts.flow(problem, states, rtol=1e-12, atol=1e-12, solver="rodas5p", **setting)
        print(f"\nepsilon = {epsilon:g}, tau = {end:g}, {starts} starts")
        print(f"{'solver':20} {'tol':>6} {'median error':>13} {'steps':>7} {'ms':>9} {'first':>8}")
        curves = {}
        for name, solver in solvers.items():
            if name == "tsit5" and epsilon < 1e-3:
                continue  # ~10,000 steps whatever the tolerance
            # the stock solver needs thousands of steps already at loose tolerances
            for tolerance in TOLERANCES[:3] if "stock" in name else TOLERANCES:
                answer, first, best = measure(
                    lambda rtol=tolerance, solver=solver, setting=setting: tts.flow(
                        problem, states, rtol=rtol, atol=rtol, solver=solver, **setting
                    ),
                    repeats,
                )
                error = float(np.median(error_of(answer, reference)))
                per_lane = best / starts * 1e3
                curves.setdefault(name, []).append((error, per_lane))
                steps = float(np.mean(answer.stats["steps"]))
                failed = int(np.sum(np.asarray(answer.status) != 0))
                note = f"  {failed} failed" if failed else ""
                print(
                    f"{name:20} {tolerance:6.0e} {error:13.1e} {steps:7.0f} {per_lane:9.2f} "
                    f"{max(first - best, 0.0):7.1f}s{note}",
                    flush=True,
                )
        for tolerance in TOLERANCES[1:]:
            fast, slow, seconds = lsoda_seconds(problem, states, epsilon, tau, tolerance)
            error = np.maximum(
                np.abs(fast - reference.fast).max((1, 2)), np.abs(slow - reference.slow).max((1, 2))
            )
            curves.setdefault("SciPy LSODA", []).append(
                (float(np.median(error)), seconds / starts * 1e3)
            )
            print(
                f"{'SciPy LSODA':20} {tolerance:6.0e} {np.median(error):13.1e} {'':7} "
                f"{seconds / starts * 1e3:9.2f}"
            )
        print("times the time of rodas5p, at equal error:")
        for error in (1e-5, 1e-6, 1e-7):
            ours = time_at(error, *zip(*curves["rodas5p"], strict=True))
            ratios = ", ".join(
                f"{name} {time_at(error, *zip(*points, strict=True)) / ours:.1f}"
                for name, points in curves.items()
                if name != "rodas5p"
            )
            print(f"  error {error:.0e}: rodas5p {ours:.2f} ms; {ratios}", flush=True)


if __name__ == "__main__":
    main()
