"""Integrating lanes with Diffrax: the part that `flow` and `limit` share.

A lane is one start with one ε. `Run` says how a lane is integrated, `solve_lanes` runs a batch of
them, and `lane_answer` turns a Diffrax solution into states, losses, a status and step counts.
"""

import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import _checks, _compat
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._trajectory import Status


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
        # arrays, so that another tolerance does not compile anew
        tolerances = jnp.asarray(rtol, jnp.float64), jnp.asarray(atol, jnp.float64)
        self.controller = diffrax.PIDController(*tolerances, norm=norm)
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
