"""The two-timescale limit: the reduced flow on the critical manifold."""

from typing import Any, Literal, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from tts_jax import _compat, checks
from tts_jax._integrate import (
    ON_HOST,
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
from tts_jax._problem import AbstractProblem, State
from tts_jax._rosenbrock import Rodas5P
from tts_jax._trajectory import Status, Trajectory, over_lanes, raise_on_failure, record


@double_precision
def limit(
    problem: AbstractProblem,
    state: State,
    *,
    tau: Float[ArrayLike, " T"],
    rtol: float = 1e-7,
    atol: float = 1e-7,
    engine: EngineName = "auto",
    solver: Literal["auto", "rodas5p", "tsit5"] | diffrax.AbstractSolver = "auto",
    max_steps: int = 20_000,
    throw: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> Trajectory:
    """Solve the reduced flow dx/dτ = V(y*(x), x), the limit ε → 0 of `flow`.

    The fast variable is eliminated exactly, by `problem.critical`; by the envelope theorem no
    derivative of y* is needed, unless the problem says so (`envelope`). `state.fast` plays no part:
    it jumps to y*(x) at τ = 0⁺, and the answer records y*(x) at τ = 0 already.

    Args:
        problem: the two-timescale problem.
        state: the start, with any leading batch axes; only its slow part is used.
        tau: recorded slow times, `[T]`, strictly increasing, ≥ 0.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step, in the units of the slow variable.
        engine: how the lanes are solved, as in `flow`. The engines that use the structure of
            the problem solve the flow's equations at ε = 0, which are differential-algebraic.
        solver: `"rodas5p"` (what `"auto"` means), `"tsit5"` or any Diffrax solver. The reduced
            flow is stiff once part of it has come to rest while the rest still moves.
        max_steps: step limit of one lane.
        throw: raise on the first failure instead of returning its status.
        adjoint: how Diffrax differentiates through the solve, as in `flow`.
        progress_meter: a Diffrax progress meter.

    Returns:
        A `Trajectory` with the batch axes of `state`. Its `.stats` are those of `flow` and what
        `problem.reduced_observables` reports at each τ: for `Univariate` the `condition` number
        that tells how well a*(u) is determined (by `"simd"` and `"cuda"` within some percent).
        Neurons may meet; these engines then let them rest some 1e-3 η apart, by a ridge of a few
        ulp in the loss (`problems/_banded_program`), while Diffrax may end with `MAX_STEPS`.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
        RuntimeError: traced with `jax_enable_x64` off; or a lane failed and `throw` is set.
    """
    require_double_precision("limit", problem, state, tau)
    checks.increasing_times(tau)
    check_start(problem, state)
    check_noiseless("limit", problem, averaged=True)
    own = solver == "auto" and adjoint is None and progress_meter is None
    engine = choose_engine(engine, problem, (state, tau, rtol, atol), own=own)
    if not isinstance(solver, diffrax.AbstractSolver):
        names = ("auto", "rodas5p", "tsit5")
        checks.one_of("solver", solver, names, "Or pass a Diffrax solver, `diffrax.Tsit5()`.")
        name = "tsit5" if solver == "tsit5" else "rodas5p"
        solver = Rodas5P(jacobian=_reduced_jacobian) if name == "rodas5p" else diffrax.Tsit5()
    else:
        name = type(solver).__name__
    state = jax.tree.map(as_double, state)
    run = Run(
        tau,
        solver,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        adjoint=adjoint,
        progress_meter=progress_meter,
    )
    # `critical` may have an `eigh` in it
    spread = not _compat.loops_run_inline()
    answer, names = solve(problem, engine, _solve_lane, state, jnp.zeros(()), run, spread=spread)
    if engine not in ON_HOST or np.any(answer["stats"]["dense"]):  # else the engine has them
        more = over_lanes(_reduced_observables, jnp.ndim(answer["loss"]), problem, answer["slow"])
        answer["stats"] |= more
        if "converged" in more:  # the fast variable that was found is not on the manifold
            good = jnp.all(more["converged"], axis=-1) | (answer["status"] != int(Status.SUCCESS))
            answer["status"] = jnp.where(good, answer["status"], int(Status.SOLVER_FAILED))
    trajectory = record(
        problem,
        method="limit",
        tau=run.tau,
        batch_dims=names,
        settings={"rtol": rtol, "atol": atol},
        notes={"engine": engine, "solver": name},
        **answer,
    )
    return raise_on_failure(trajectory) if throw else trajectory


def _reduced_field(tau: Array, y: State, problem: AbstractProblem) -> State:
    del tau
    return State(None, problem.reduced_field(projected(problem, y).slow))


def _reduced_jacobian(tau: Array, y: State, problem: AbstractProblem) -> Array:
    del tau

    def rows(near: State) -> Array:
        return problem.reduced_jacobian(problem.critical(near.slow), near.slow)

    return projected_jacobian(problem, y, rows)


def _solve_lane(start: State, epsilon: Array, problem: AbstractProblem, run: Run) -> dict[str, Any]:
    del epsilon
    solution = run.solve(problem, _reduced_field, State(None, start.slow), problem)
    slow = jax.lax.map(problem.geometry.project, cast(list[State], solution.ys)[0].slow)
    return lane_answer(problem, solution, jax.lax.map(problem.critical, slow), slow)


def _reduced_observables(problem: AbstractProblem, slow: Any) -> dict[str, Array]:
    return problem.reduced_observables(slow)
