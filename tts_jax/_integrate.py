"""Integrating lanes with Diffrax: the part that `flow` and `limit` share.

A lane is one start with one ε. `Run` says how a lane is integrated, `solve_lanes` runs a batch of
them, and `lane_answer` turns a Diffrax solution into states, losses, a status and step counts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from tts_jax import _compat, _simd, checks
from tts_jax._precision import on_host
from tts_jax._problem import AbstractProblem, State, batch_shape, check_geometry, quickly
from tts_jax._trajectory import Status
from tts_jax.geometry import Euclidean


def as_double(value: ArrayLike) -> Array:
    """`value` in float64, by NumPy where it is concrete: much faster for single solves."""
    if checks.is_traced(value):
        return jnp.asarray(value, jnp.float64)
    return cast(Array, np.asarray(value, np.float64))


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


class Run(eqx.Module):
    """How to integrate one lane: shared by `flow` and `limit`."""

    tau: Float[Array, " T"]
    solver: diffrax.AbstractSolver
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: int = eqx.field(static=True)
    adjoint: diffrax.AbstractAdjoint | None
    progress_meter: diffrax.AbstractProgressMeter | None

    def __init__(
        self,
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
            ValueError: a tolerance or `max_steps` is out of range.
        """
        checks.positive("rtol", rtol, "Use for example 1e-7.", single=True)
        checks.positive("atol", atol, "Use for example 1e-7.", single=True)
        # arrays, so that another tolerance does not compile anew
        self.tau, self.rtol, self.atol = (as_double(x) for x in (tau, rtol, atol))
        self.solver = solver
        self.max_steps = checks.positive_integer("max_steps", max_steps, "Use e.g. 20_000.")
        self.adjoint, self.progress_meter = adjoint, progress_meter
        remedy = "Pass for example `diffrax.ForwardMode()`, or leave it out."
        if adjoint is not None:
            checks.instance("adjoint", adjoint, diffrax.AbstractAdjoint, remedy)
        remedy = "Pass for example `diffrax.TqdmProgressMeter()`, or leave it out."
        if progress_meter is not None:
            kind = diffrax.AbstractProgressMeter
            checks.instance("progress_meter", progress_meter, kind, remedy)

    def solve(
        self, problem: AbstractProblem, field: Callable[..., Any], start: State, args: Any
    ) -> diffrax.Solution:
        """Integrate `field` by Diffrax; `.ys` are the states at `tau` and the time reached."""
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            self.solver,
            t0=0.0,
            t1=self.tau[-1],
            dt0=None,
            y0=start,
            args=args,
            saveat=diffrax.SaveAt(
                subs=[
                    diffrax.SubSaveAt(ts=self.tau),
                    diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: t),
                ]
            ),
            stepsize_controller=diffrax.PIDController(
                self.rtol,
                self.atol,
                norm=ErrorNorm(jnp.asarray(problem.slow_scale(), jnp.float64)),
            ),
            max_steps=self.max_steps,
            adjoint=self.adjoint or diffrax.RecursiveCheckpointAdjoint(),
            progress_meter=self.progress_meter or diffrax.NoProgressMeter(),
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
    return {
        "fast": fast,
        "slow": slow,
        "loss": loss,
        "status": solution_status(solution, (fast, slow)),
        "stats": {
            "steps": solution.stats["num_steps"],
            "accepted": solution.stats["num_accepted_steps"],
            "rejected": solution.stats["num_rejected_steps"],
            "reached": cast(list, solution.ys)[1][0],
        },
    }


def solution_status(solution: diffrax.Solution, recorded: PyTree[Array]) -> Int[Array, ""]:
    """The `Status` of one Diffrax solution with the `recorded` states."""
    results = diffrax.RESULTS
    status = jnp.asarray(int(Status.SOLVER_FAILED), jnp.int32)
    for result, known in (
        (results.successful, Status.SUCCESS),
        (results.max_steps_reached, Status.MAX_STEPS),
        (results.dt_min_reached, Status.STEP_TOO_SMALL),
    ):
        status = jnp.where(solution.result == result, int(known), status)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(recorded)])
    lost = (status == int(Status.SUCCESS)) & ~jnp.all(finite)
    return jnp.where(lost, int(Status.DIVERGED), status)


def check_start(problem: AbstractProblem, state: State) -> None:
    """Refuse what is no state, or has no lanes, or has a NaN or an infinity in it."""
    checks.instance("problem", problem, AbstractProblem, "Build for example `tts.Univariate`.")
    remedy = "Build it with `problem.state(...)` or `problem.init(key=...)`."
    checks.instance("state", state, State, remedy)
    lanes = batch_shape(problem, state)
    if 0 in lanes:
        raise ValueError(
            f"Argument `state` must have at least one lane, got batch axes {lanes}. {remedy}"
        )
    for name, part in (("state.fast", state.fast), ("state.slow", state.slow)):
        for leaf in jax.tree.leaves(part):
            checks.finite(name, leaf, "Start from finite values.")
    check_geometry(problem, state)


def check_noiseless(who: str, problem: AbstractProblem, *, averaged: bool = False) -> None:
    """Refuse a problem with Langevin noise, which is no ordinary differential equation; unless it
    is `averaged` over: the fast variable's, by the problem's own reduced field."""
    fast, slow = problem.temperature
    averaged = averaged and type(problem).reduced_field is not AbstractProblem.reduced_field
    if slow is not None or (fast is not None and not averaged):
        raise TypeError(
            f"`{who}` is for problems without noise, but `{type(problem).__name__}` has a "
            f"`temperature`. Use `sgd`, with `regime='limit'` for the fast variable eliminated."
        )


def projected(problem: AbstractProblem, state: State) -> State:
    """The nearest state whose variables, or its slow one alone, are where their geometries have
    them."""
    fast = None if state.fast is None else problem.fast_geometry.project(state.fast)
    return State(fast, problem.geometry.project(state.slow))


def projected_jacobian(
    problem: AbstractProblem, state: State, rows: Callable[[State], Array]
) -> Array:
    """The Jacobian of a field of the projected state; `rows` gives it where the geometries have
    it."""
    jacobian = rows(projected(problem, state))
    places = problem.geometry, problem.fast_geometry
    if all(isinstance(place, Euclidean) for place in places):
        return jacobian
    flat, unravel = ravel_pytree(state)
    inward = jax.jacfwd(lambda y: ravel_pytree(projected(problem, unravel(y)))[0])(flat)
    return jacobian @ inward


class Batch:
    """The broadcast batch of starts and ε as a flat list of lanes.

    Attributes:
        state: leaves with one axis of lanes in front.
        epsilon: ε of each lane, `[lanes]`.
        shape: the batch axes.
        names: their names.
    """

    state: State
    epsilon: Float[Array, " lanes"]
    shape: tuple[int, ...]
    names: tuple[str, ...]

    def __init__(self, problem: AbstractProblem, state: State, epsilon: Array) -> None:
        """Broadcast.

        Raises:
            ValueError: the shapes do not go together, or there is no lane.
        """
        lanes = batch_shape(problem, state)
        try:
            self.shape = np.broadcast_shapes(lanes, epsilon.shape)
        except ValueError as error:
            raise ValueError(
                f"Argument `epsilon` must broadcast against the batch axes {lanes} of `state`, got "
                f"shape {epsilon.shape}. Give it shape `[..., 1]` to cross it with the starts."
            ) from error
        count = math.prod(self.shape)
        if count == 0:
            raise ValueError(
                f"Argument `state` must have at least one lane, got batch axes {self.shape}. "
                f"Pass a start."
            )

        def flatten(leaf: Any, own: tuple[int, ...]) -> Any:
            xp = np if isinstance(leaf, np.ndarray) else jnp
            return xp.broadcast_to(leaf, self.shape + own).reshape(count, *own)

        self.state = jax.tree.map(lambda leaf: flatten(leaf, leaf.shape[len(lanes) :]), state)
        self.epsilon = flatten(epsilon, ())
        self.names = _axis_names(lanes, epsilon.shape, self.shape) if self.shape else ()

    def unflatten(self, answer: Any) -> Any:
        """Leaves `[lanes, ...]` with the batch axes in front."""
        if on_host() and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(answer)):
            return jax.tree.map(lambda leaf: leaf.reshape((*self.shape, *leaf.shape[1:])), answer)
        return _reshape(answer, self.shape)


@functools.partial(jax.jit, static_argnames="shape")
def _reshape(answer: Any, shape: tuple[int, ...]) -> Any:
    # jitted because that is by far the fastest way from many small NumPy arrays to JAX's
    return jax.tree.map(lambda leaf: leaf.reshape((*shape, *leaf.shape[1:])), answer)


EngineName = Literal["auto", "cuda", "simd", "loop", "diffrax"]
ENGINES: tuple[str, ...] = get_args(EngineName)
ON_HOST = ("cuda", "simd")  # engines that get NumPy arrays


def choose_engine(
    engine: EngineName, problem: AbstractProblem, numbers: Any, *, own: bool
) -> EngineName:
    """The engine that `"auto"` stands for, or the given one if it can be used.

    Args:
        numbers: what may be traced besides the problem.
        own: whether nothing was asked for that only Diffrax has.

    Raises:
        ValueError: the engine does not exist, or not for this problem, here, or together with the
            other arguments.
    """
    checks.one_of("engine", engine, ENGINES, "Or leave it out.")
    remedy = "Leave `engine` out."
    if engine not in ("auto", "diffrax"):
        if not own:
            raise ValueError(
                f"Argument `engine` must be 'diffrax' together with `solver`, `adjoint` or "
                f"`progress_meter`, got {engine!r}. Leave one of them out."
            )
        if engine not in problem.flow_engines:
            kind = type(problem).__name__
            raise ValueError(
                f"Argument `engine` is {engine!r}, which this `{kind}` does not have. {remedy}"
            )
    traced = checks.is_traced(problem, numbers) or checks.inside_trace()

    def reason(name: str) -> str | None:
        """Why an engine on the host cannot be used."""
        if traced:
            return "numbers are not known inside a transformation"
        return _simd.missing() or (_simd.cuda.missing() if name == "cuda" else None)

    if engine in ON_HOST and (why := reason(engine)) is not None:
        raise ValueError(f"Argument `engine` is {engine!r}, but {why}. {remedy}")
    if engine != "auto":
        return engine
    # "loop" is only taken when asked for, as it takes long to compile, and so is "cuda", as the
    # cores beside a GPU are about as fast (`python -m benchmarks.gpu --only flow`)
    simd = own and "simd" in problem.flow_engines and reason("simd") is None
    return "simd" if simd else "diffrax"


def solve(
    problem: AbstractProblem,
    engine: EngineName,
    solve_lane: Callable[..., Any],
    state: State,
    epsilon: Array,
    run: Run,
    *,
    spread: bool = True,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All lanes by the engine: the answer, and the names of the batch axes.

    Args:
        solve_lane: `solve_lane(state, epsilon, problem, run)`, one lane by Diffrax; it also does
            what the problem's own engine leaves to it.
        spread: whether Diffrax may use several devices.
    """
    if engine == "diffrax":
        return solve_lanes(problem, solve_lane, state, epsilon, problem, run, spread=spread)
    batch = Batch(problem, state, epsilon)
    answer = quickly(
        problem,
        "solve_flow",
        engine,
        batch.state,
        batch.epsilon,
        run.tau,
        rtol=run.rtol,
        atol=run.atol,
        max_steps=run.max_steps,
    )
    if engine not in ON_HOST:
        return batch.unflatten(answer), batch.names
    beyond = np.flatnonzero(answer["stats"].get("dense", False))
    if beyond.size:
        answer = jax.tree.map(np.array, answer)
        some = jax.tree.map(lambda leaf: leaf[beyond], batch.state)
        lanes = some, batch.epsilon[beyond]
        rest, _ = solve_lanes(problem, solve_lane, *lanes, problem, run, spread=spread)
        kept = {name: answer["stats"][name][beyond] for name in answer["stats"]}
        rest["stats"] = kept | rest["stats"]

        def put(old: np.ndarray, new: Any) -> None:
            old[beyond] = new

        jax.tree.map(put, answer, rest)
    return batch.unflatten(answer), batch.names


def solve_lanes(
    problem: AbstractProblem,
    solve: Callable[..., dict[str, Any]],
    state: State,
    epsilon: Array,
    *args: Any,
    spread: bool = True,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run `solve(state, epsilon, *args)` on every lane of the broadcast batch of both.

    On a CPU device lanes run one after the other, each with its own number of steps, so that no
    lane waits for another; elsewhere they run together under `vmap`. Several local devices
    share the lanes, unless `spread` is off.

    Returns:
        The stacked answers and the names of the batch axes.
    """
    batch = Batch(problem, state, epsilon)
    count = math.prod(batch.shape)
    devices = jax.local_devices()[: None if spread else 1]
    if not batch.shape:
        mesh = _compat.lane_mesh(devices[:1])
        return _map_lanes(solve, "one", mesh, (state, epsilon), args), ()
    flat = (batch.state, batch.epsilon)
    traced = checks.is_traced(flat, args) or checks.inside_trace()
    mesh = _compat.lane_mesh(devices[: 1 if traced else count])
    # idle lanes of the last device repeat the first ones
    padded = np.arange(-(-count // mesh.size) * mesh.size) % count
    flat = jax.tree.map(lambda leaf: leaf[padded], flat)
    how = "one by one" if devices[0].platform == "cpu" else "together"
    answer = _map_lanes(solve, how, mesh, flat, args)
    answer = batch.unflatten(jax.tree.map(lambda leaf: leaf[:count], answer))
    return answer, batch.names


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
