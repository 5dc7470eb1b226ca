"""The gradient flow at finite ε: a stiff singular-perturbation ODE in slow time, by Diffrax."""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float

from tts_jax import checks
from tts_jax._integrate import (
    EngineName,
    Run,
    as_double,
    check_noiseless,
    check_start,
    choose_engine,
    lane_answer,
    projected,
    projected_jacobian,
    solve,
)
from tts_jax._precision import double_precision, require_double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._rosenbrock import Rodas5P
from tts_jax._trajectory import Trajectory, raise_on_failure, record


# Steps that stability asks of the explicit solver below which it is the faster one
# (`python -m benchmarks.suite --only flow`; the estimate of the fastest rate is on the safe side).
EXPLICIT_STEPS = 1500
# Length of Tsit5's stability interval on the negative real axis.
EXPLICIT_REACH = 3.3

SolverName = Literal["auto", "rodas5p", "kvaerno5", "tsit5"]


@double_precision
def flow(
    problem: AbstractProblem,
    state: State,
    *,
    epsilon: Float[ArrayLike, "..."],
    tau: Float[ArrayLike, " T"],
    rtol: float = 1e-7,
    atol: float = 1e-7,
    engine: EngineName = "auto",
    solver: SolverName | diffrax.AbstractSolver = "auto",
    max_steps: int = 20_000,
    throw: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> Trajectory:
    """Solve the gradient flow ε dy/dτ = −∇_y g, dx/dτ = V from τ = 0.

    Args:
        problem: the two-timescale problem.
        state: the start, with any leading batch axes.
        epsilon: timescale separation ε > 0; a scalar or an array that broadcasts against the
            batch axes of `state`.
        tau: recorded slow times, `[T]`, strictly increasing, ≥ 0.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step, in the units of the state.
        engine: how the lanes are solved. `"simd"`: side by side in the vectors of the CPU, compiled
            by LLVM (extra `cpu`); `"cuda"`: the same program in the threads of an NVIDIA GPU, a
            lane each; `"loop"`: the same in JAX alone, on any device, differentiable in both
            modes, but slow to compile; `"diffrax"`: one by one by Diffrax. All but the last are
            for problems with a structure to use, such as `Univariate` (banded stages, time and
            memory in proportion to m). `"auto"`: `"simd"` where it can be used, which is outside
            transformations, else `"diffrax"`. `solver`, `adjoint` and `progress_meter` are
            Diffrax's: to give one of them chooses it.
        solver: `"rodas5p"` (stiff, uses `problem.jacobian`), `"kvaerno5"` (Diffrax's stiff
            solver with Newton iterations that converge), `"tsit5"` (explicit), any Diffrax
            solver, or `"auto"`: Tsit5 when by `problem.fastest_rate` stability costs it few
            steps (a large ε and a short τ), else Rodas5P. Inside a transformation, where
            numbers are unknown, `"auto"` is Rodas5P.
        max_steps: step limit of one lane.
        throw: raise on the first failure instead of returning its status.
        adjoint: how Diffrax differentiates through the solve; its default suits reverse mode,
            `diffrax.ForwardMode()` is needed for forward mode.
        progress_meter: a Diffrax progress meter, for example `diffrax.TqdmProgressMeter()`.

    Returns:
        A `Trajectory` whose batch axes are those of `state` and `epsilon`, broadcast. Its
        `.stats` are per lane `steps`, `accepted`, `rejected` and `reached`, the slow time up to
        which it was computed, and by `"simd"` and `"cuda"` the `bandwidth`, the largest number of
        neighbours that overlapped, and whether the lane was left to Diffrax (`dense`) because
        that was too many. A lane that fails has a status, keeps what was recorded until then, and
        has NaN after that; other lanes do not notice.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
        RuntimeError: traced with `jax_enable_x64` off; or a lane failed and `throw` is set.
    """
    require_double_precision("flow", problem, state, epsilon, tau)
    remedy = "ε is the ratio of the slow to the fast learning rate; for ε = 0 use `limit`."
    checks.positive("epsilon", epsilon, remedy)
    checks.increasing_times(tau)
    check_start(problem, state)
    check_noiseless("flow", problem)
    epsilon = as_double(epsilon)
    state = jax.tree.map(as_double, state)
    engine = choose_engine(
        engine,
        problem,
        (state, epsilon, tau, rtol, atol),
        own=solver == "auto" and adjoint is None and progress_meter is None,
    )
    if engine == "diffrax":
        solver, solver_name = _choose_solver(solver, problem, state, epsilon, tau)
    else:
        # by Diffrax too where the engine does not reach
        solver, solver_name = _choose_solver("rodas5p", problem, state, epsilon, tau)
    run = Run(
        tau,
        solver,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        adjoint=adjoint,
        progress_meter=progress_meter,
    )
    answer, names = solve(problem, engine, _solve_lane, state, epsilon, run)
    trajectory = record(
        problem,
        method="flow",
        tau=run.tau,
        batch_dims=names,
        settings={
            "epsilon": jnp.broadcast_to(epsilon, answer["status"].shape)
            if epsilon.ndim
            else epsilon,
            "rtol": rtol,
            "atol": atol,
        },
        notes={"engine": engine, "solver": solver_name},
        **answer,
    )
    return raise_on_failure(trajectory) if throw else trajectory


def _slow_time_field(tau: Array, y: State, args: tuple[AbstractProblem, Array]) -> State:
    del tau
    problem, epsilon = args
    velocity = problem.fields(*projected(problem, y))
    return State(jax.tree.map(lambda v: v / epsilon, velocity.fast), velocity.slow)


def _slow_time_jacobian(
    tau: Array, y: State, args: tuple[AbstractProblem, Array]
) -> Float[Array, "n n"]:
    del tau
    problem, epsilon = args
    count = sum(leaf.size for leaf in jax.tree.leaves(y.fast))
    jacobian = projected_jacobian(problem, y, lambda near: problem.jacobian(*near))
    return jacobian.at[:count].divide(epsilon)


@functools.cache
def _rodas5p() -> Rodas5P:
    return Rodas5P(jacobian=_slow_time_jacobian)


def _choose_solver(
    solver: SolverName | diffrax.AbstractSolver,
    problem: AbstractProblem,
    state: State,
    epsilon: Array,
    tau: Float[ArrayLike, " T"],
) -> tuple[diffrax.AbstractSolver, str]:
    if isinstance(solver, diffrax.AbstractSolver):
        return solver, type(solver).__name__
    names = ("auto", "rodas5p", "kvaerno5", "tsit5")
    checks.one_of("solver", solver, names, "Or pass a Diffrax solver, `diffrax.Kvaerno3()`.")
    if solver == "auto":
        solver = "rodas5p" if _is_stiff(problem, state, epsilon, tau) else "tsit5"
    choices: dict[str, Callable[[], diffrax.AbstractSolver]] = {
        "rodas5p": _rodas5p,
        # Diffrax's default root finder (VeryChord at the step tolerances) gives up on half of
        # the steps here; iterating the chord method to convergence costs less.
        "kvaerno5": lambda: diffrax.Kvaerno5(root_finder=optx.Chord(rtol=1e-9, atol=1e-9)),
        "tsit5": diffrax.Tsit5,
    }
    return choices[solver](), solver


def _is_stiff(
    problem: AbstractProblem, state: State, epsilon: Array, tau: Float[ArrayLike, " T"]
) -> bool:
    """Whether stability would hold an explicit solver back, judged at the first start."""
    if checks.is_traced(problem, state, epsilon, tau) or checks.inside_trace():
        return True
    lanes = batch_shape(problem, state)
    first = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lanes) :])[0], state)
    rate = _fastest_rate(problem, first, jnp.min(epsilon))
    # a rate that is not finite is for the solver to report
    return not float(np.max(np.asarray(tau)) * rate) < EXPLICIT_STEPS * EXPLICIT_REACH


@eqx.filter_jit
def _fastest_rate(problem: AbstractProblem, state: State, epsilon: Array) -> Array:
    return jnp.asarray(problem.fastest_rate(*state, epsilon))


def _solve_lane(start: State, epsilon: Array, problem: AbstractProblem, run: Run) -> dict[str, Any]:
    solution = run.solve(problem, _slow_time_field, start, (problem, epsilon))
    states = cast(list[State], solution.ys)[0]
    fast, slow = jax.lax.map(lambda state: projected(problem, state), states)
    return lane_answer(problem, solution, fast, slow)
