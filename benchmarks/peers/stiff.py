"""General stiff solvers on the flow, their right-hand side and Jacobian compiled by Numba.

Each in the form that costs least: CVODE without Python between callbacks (`sundials`), LSODA as
SciPy's `odeint`, whose loop over steps is compiled, BDF and Radau as `solve_ivp`. Starts are
spread over processes, one per core.
"""

import functools
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.integrate import odeint, solve_ivp

from benchmarks.peers._cores import Cores
from benchmarks.peers.numba_flow import Block, Flow
from benchmarks.peers.sundials import Cvode
from benchmarks.setting import Answer, FlowSetting


_MOST_STEPS = 10_000_000
_FAILED = "the solver gave up"

# from the starting state [2m + 1] and τ [T] to the states [T, 2m + 1], NaN where it failed
Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_solver(method: str, setting: FlowSetting) -> Solver:
    """The solver called `"cvode"`, `"lsoda"`, `"bdf"` or `"radau"`."""
    problem = setting.neurons, setting.eta, setting.epsilon
    tolerance = {"rtol": setting.tolerance, "atol": setting.tolerance}
    if method == "cvode":
        return Cvode(Block(*problem), setting.tolerance)
    flow = Flow(*problem)
    first = setting.states()[0]
    flow.velocity(0.0, first), flow.jacobian(0.0, first)  # compile

    def lsoda(start: np.ndarray, tau: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failure is in the answer
            states, told = odeint(
                flow.velocity,
                start,
                tau,
                Dfun=flow.columns,
                col_deriv=True,
                tfirst=True,
                mxstep=_MOST_STEPS,
                full_output=True,
                **tolerance,
            )
        done = told["message"] == "Integration successful."
        return states if done else np.full_like(states, np.nan)

    def python(start: np.ndarray, tau: np.ndarray) -> np.ndarray:
        name = {"bdf": "BDF", "radau": "Radau"}[method]
        states = np.full((tau.size, start.size), np.nan)
        span = 0.0, tau[-1]
        try:
            found = solve_ivp(flow.velocity, span, start, name, tau, jac=flow.jacobian, **tolerance)
        except ValueError:  # a matrix that is not finite
            return states
        states[: found.t.size] = found.y.T
        return states

    return lsoda if method == "lsoda" else python


def make_job(method: str, setting: FlowSetting) -> Callable[[int], np.ndarray]:
    """From the number of a start to its states, `[T, 2m + 1]`; all is compiled."""
    solve, tau = make_solver(method, setting), setting.tau()
    starts = setting.states()
    solve(starts[0], np.asarray([0.0, 1e-9 * setting.end]))
    return lambda index: solve(starts[index], tau)


@functools.cache
def _cores(count: int) -> Cores:
    return Cores(count)


class StiffRun:
    """All starts by one solver, on up to `threads` processes."""

    chunk = 1

    def __init__(self, setting: FlowSetting, *, method: str) -> None:
        count = min(setting.threads, setting.seeds)
        self._setting, self._cores = setting, _cores(count)
        started = time.perf_counter()
        self._cores.prepare("benchmarks.peers.stiff:make_job", method, setting)
        self.compile_seconds = time.perf_counter() - started
        self.layout = f"{setting.seeds} starts on {count} processes"

    def advance(self, steps: int) -> None:
        """Solve all starts `steps` times."""
        for _ in range(steps):
            self._cores.run(self._setting.seeds)

    def answer(self) -> Answer:
        """The last states."""
        states = np.stack(self._cores.collect())
        split = self._setting.neurons + 1
        reasons = ["" if np.all(np.isfinite(one)) else _FAILED for one in states]
        return Answer(states[..., :split], states[..., split:], reasons)
