"""The gradient flow at finite ε: a stiff singular-perturbation ODE in slow time, by Diffrax."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import _checks, _compat
from tts_jax._precision import double_precision, require_double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._rosenbrock import Rodas5P
from tts_jax._trajectory import Status, Trajectory, raise_on_failure, record


# Steps that stability asks of the explicit solver below which it is the faster one
# (benchmarks/flow.py at m = 20; the estimate of the fastest rate is on the safe side).
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
        `.stats` are `steps`, `accepted` and `rejected` per lane. A lane that fails has a
        status, and NaN after the time where it failed; other lanes do not notice.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
        RuntimeError: traced with `jax_enable_x64` off; or a lane failed and `throw` is set.
    """
    require_double_precision("flow", problem, state, epsilon, tau)
    remedy = "ε is the ratio of the slow to the fast learning rate; for ε = 0 use `limit`."
    _checks.positive("epsilon", epsilon, remedy)
    _checks.increasing_times(tau)
    check_start(problem, state)
    epsilon = jnp.asarray(epsilon, jnp.float64)
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), state)
    solver, solver_name = _choose_solver(solver, problem, state, epsilon, tau)
    run = Run(
        problem,
        tau,
        solver,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        adjoint=adjoint,
        progress_meter=progress_meter,
    )
    answer, names = solve_lanes(problem, _solve_lane, state, epsilon, problem, run)
    trajectory = record(
        problem,
        method="flow",
        tau=run.tau,
        batch_dims=names,
        settings={
            "epsilon": jnp.broadcast_to(epsilon, answer["status"].shape if epsilon.ndim else ()),
            "rtol": rtol,
            "atol": atol,
        },
        notes={"solver": solver_name},
        **answer,
    )
    return raise_on_failure(trajectory) if throw else trajectory


class ErrorNorm(eqx.Module):
    """The size of a scaled step error: RMS over the fast variable, maximum over the slow one.

    A fast error relaxes within ε and only its mean size matters; a slow error stays, so its
    largest entry counts, measured in units of `problem.slow_scale()`.
    """

    slow_scale: Float[Array, ""]

    def __call__(self, error: State) -> Float[Array, ""]:
        fast, slow = (jax.tree.leaves(part) for part in error)
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in slow])) / self.slow_scale
        if not fast:  # the reduced flow has no fast variable
            return largest
        count = sum(leaf.size for leaf in fast)
        mean = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in fast) / count)
        return jnp.maximum(mean, largest)


def check_start(problem: AbstractProblem, state: State) -> None:
    """Refuse what is no state, or has no lanes, or has a NaN or an infinity in it."""
    _checks.instance("problem", problem, AbstractProblem, "Build for example `tts.Univariate`.")
    remedy = "Build it with `problem.state(...)` or `problem.init(key=...)`."
    _checks.instance("state", state, State, remedy)
    lanes = batch_shape(problem, state)
    if 0 in lanes:
        raise ValueError(
            f"Argument `state` must have at least one lane, got batch axes {lanes}. {remedy}"
        )
    for name, part in (("state.fast", state.fast), ("state.slow", state.slow)):
        for leaf in jax.tree.leaves(part):
            _checks.finite(name, leaf, "Start from finite values.")


def _slow_time_field(tau: Array, y: State, args: tuple[AbstractProblem, Array]) -> State:
    del tau
    problem, epsilon = args
    velocity = problem.fields(*y)
    return State(jax.tree.map(lambda v: v / epsilon, velocity.fast), velocity.slow)


def _slow_time_jacobian(
    tau: Array, y: State, args: tuple[AbstractProblem, Array]
) -> Float[Array, "n n"]:
    del tau
    problem, epsilon = args
    count = sum(leaf.size for leaf in jax.tree.leaves(y.fast))
    jacobian = problem.jacobian(*y)
    return jacobian.at[:count].divide(epsilon)


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
    _checks.one_of("solver", solver, names, "Or pass a Diffrax solver, `diffrax.Kvaerno3()`.")
    if solver == "auto":
        solver = "rodas5p" if _is_stiff(problem, state, epsilon, tau) else "tsit5"
    choices: dict[str, Callable[[], diffrax.AbstractSolver]] = {
        "rodas5p": lambda: Rodas5P(jacobian=_slow_time_jacobian),
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
    if _checks.is_traced(problem, state, epsilon, tau) or _checks.inside_trace():
        return True
    lanes = batch_shape(problem, state)
    first = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lanes) :])[0], state)
    rate = _fastest_rate(problem, first, jnp.min(epsilon))
    # a rate that is not finite is for the solver to report
    return not float(np.max(np.asarray(tau)) * rate) < EXPLICIT_STEPS * EXPLICIT_REACH


@eqx.filter_jit
def _fastest_rate(problem: AbstractProblem, state: State, epsilon: Array) -> Array:
    return jnp.asarray(problem.fastest_rate(*state, epsilon))


def _solve_lane(
    start: State, epsilon: Array, problem: AbstractProblem, run: "Run"
) -> dict[str, Any]:
    solution = run.solve(_slow_time_field, start, (problem, epsilon))
    return lane_answer(problem, solution, *cast(State, solution.ys))


class Run(eqx.Module):
    """How to integrate one lane with Diffrax: shared by `flow` and `limit`."""

    tau: Float[Array, " T"]
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    max_steps: int = eqx.field(static=True)
    adjoint: diffrax.AbstractAdjoint
    progress_meter: diffrax.AbstractProgressMeter

    def __init__(
        self,
        problem: AbstractProblem,
        tau: Float[ArrayLike, " T"],
        solver: diffrax.AbstractSolver,
        *,
        rtol: float,
        atol: float,
        max_steps: int,
        adjoint: diffrax.AbstractAdjoint | None,
        progress_meter: diffrax.AbstractProgressMeter | None,
    ) -> None:
        """Check the settings that both dynamics share.

        Raises:
            ValueError: `tau`, a tolerance or `max_steps` is out of range.
        """
        _checks.increasing_times(tau)
        _checks.positive("rtol", rtol, "Use for example 1e-7.", single=True)
        _checks.positive("atol", atol, "Use for example 1e-7.", single=True)
        self.tau = jnp.asarray(tau, jnp.float64)
        self.solver = solver
        norm = ErrorNorm(jnp.asarray(problem.slow_scale(), jnp.float64))
        self.controller = diffrax.PIDController(rtol=rtol, atol=atol, norm=norm)
        self.max_steps = _checks.positive_integer("max_steps", max_steps, "Use e.g. 20_000.")
        self.adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
        self.progress_meter = (
            diffrax.NoProgressMeter() if progress_meter is None else progress_meter
        )
        remedy = "Pass for example `diffrax.ForwardMode()`, or leave it out."
        _checks.instance("adjoint", self.adjoint, diffrax.AbstractAdjoint, remedy)
        remedy = "Pass for example `diffrax.TqdmProgressMeter()`, or leave it out."
        meter = self.progress_meter
        _checks.instance("progress_meter", meter, diffrax.AbstractProgressMeter, remedy)

    def solve(self, field: Callable[..., Any], start: State, args: Any) -> diffrax.Solution:
        """Integrate `field` from τ = 0 and record at `tau`."""
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            self.solver,
            t0=0.0,
            t1=self.tau[-1],
            dt0=None,
            y0=start,
            args=args,
            saveat=diffrax.SaveAt(ts=self.tau),
            stepsize_controller=self.controller,
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            progress_meter=self.progress_meter,
            throw=False,
        )


def lane_answer(
    problem: AbstractProblem, solution: diffrax.Solution, fast: PyTree[Array], slow: PyTree[Array]
) -> dict[str, Any]:
    """States, losses, status and step counts of one Diffrax solution."""
    fast, slow = jax.tree.map(
        lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, jnp.nan), (fast, slow)
    )
    loss = jax.lax.map(lambda y: problem.loss(*y), (fast, slow))
    results = diffrax.RESULTS
    status = jnp.asarray(int(Status.SOLVER_FAILED), jnp.int32)
    for result, known in (
        (results.successful, Status.SUCCESS),
        (results.max_steps_reached, Status.MAX_STEPS),
        (results.dt_min_reached, Status.STEP_TOO_SMALL),
    ):
        status = jnp.where(solution.result == result, int(known), status)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((fast, slow))])
    lost = (status == int(Status.SUCCESS)) & ~jnp.all(finite)
    return {
        "fast": fast,
        "slow": slow,
        "loss": loss,
        "status": jnp.where(lost, int(Status.DIVERGED), status),
        "stats": {
            "steps": solution.stats["num_steps"],
            "accepted": solution.stats["num_accepted_steps"],
            "rejected": solution.stats["num_rejected_steps"],
        },
    }


def solve_lanes(
    problem: AbstractProblem,
    solve: Callable[..., dict[str, Any]],
    state: State,
    epsilon: Array,
    *args: Any,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run `solve(state, epsilon, *args)` on every lane of the broadcast batch of both.

    On a CPU device lanes run one after the other, each with its own number of steps, so that no
    lane waits for another; elsewhere they run together under `vmap`. Several local devices
    share the lanes.

    Returns:
        The stacked answers and the names of the batch axes.
    """
    lanes = batch_shape(problem, state)
    try:
        shape = np.broadcast_shapes(lanes, epsilon.shape)
    except ValueError as error:
        raise ValueError(
            f"Argument `epsilon` must broadcast against the batch axes {lanes} of `state`, got "
            f"shape {epsilon.shape}. Give it shape `[..., 1]` to cross it with the starts."
        ) from error
    count = math.prod(shape)
    if count == 0:
        raise ValueError(
            f"Argument `state` must have at least one lane, got batch axes {shape}. Pass a start."
        )
    devices = jax.local_devices()
    if not shape:
        mesh = _compat.lane_mesh(devices[:1])
        return _map_lanes(solve, "one", mesh, (state, epsilon), args), ()

    def flatten(leaf: Array, own: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(leaf, shape + own).reshape(count, *own)

    flat = jax.tree.map(lambda leaf: flatten(leaf, leaf.shape[len(lanes) :]), state)
    flat = (flat, flatten(epsilon, ()))
    traced = _checks.is_traced(flat, args) or _checks.inside_trace()
    mesh = _compat.lane_mesh(devices[: 1 if traced else count])
    # idle lanes of the last device repeat the first ones
    padded = np.arange(-(-count // mesh.size) * mesh.size) % count
    flat = jax.tree.map(lambda leaf: leaf[padded], flat)
    how = "one by one" if devices[0].platform == "cpu" else "together"
    answer = _map_lanes(solve, how, mesh, flat, args)
    answer = jax.tree.map(lambda leaf: leaf[:count].reshape(*shape, *leaf.shape[1:]), answer)
    return answer, _axis_names(lanes, epsilon.shape, shape)


@eqx.filter_jit
def _map_lanes(
    solve: Callable[..., Any],
    how: str,
    mesh: jax.sharding.Mesh,
    lanes: tuple[State, Array],
    args: tuple[Any, ...],
) -> Any:
    if how == "one":
        return solve(*lanes, *args)
    numbers, static = eqx.partition(args, eqx.is_array)

    def on_device(lanes: tuple[State, Array], numbers: Any) -> Any:
        args = eqx.combine(numbers, static)

        def one(lane: tuple[State, Array]) -> Any:
            return solve(*lane, *args)

        return jax.vmap(one)(lanes) if how == "together" else jax.lax.map(one, lanes)

    return _compat.over_devices(on_device, mesh, (True, False))(lanes, numbers)


def _axis_names(
    lanes: tuple[int, ...], epsilons: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[str, ...]:
    """`epsilon` for an axis along which only ε varies, `seed` for the last axis of starts."""
    rank = len(shape)
    first = rank - len(lanes)
    lanes = (1,) * first + lanes
    epsilons = (1,) * (rank - len(epsilons)) + epsilons
    names = [f"batch_{axis}" for axis in range(rank)]
    starts = [axis for axis in range(first, rank) if lanes[axis] > 1 or epsilons[axis] == 1]
    only_epsilon = [axis for axis in range(rank) if axis not in starts]
    if starts:
        names[starts[-1]] = "seed"
    if only_epsilon:
        names[only_epsilon[-1]] = "epsilon"
    return tuple(names)
