"""Hitting times: when a trajectory first comes within a radius of its goals; differentiable.

With d_k(τ) the distance to goal k, an observable of the problem, the hitting time is the first T_k
with d_k(T_k) = r. It is located between two records of a trajectory and refined by Newton's
method on trajectories recorded at the candidates. One more step of the method,

    T_k = T − (d_k(T; θ) − r) / (dd_k/dτ),   T and dd_k/dτ held fixed,

differentiated in whatever θ the trajectory depends on, is the implicit function theorem,
dT_k/dθ = −(∂d_k/∂θ − ∂r/∂θ) / (dd_k/dτ).
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import checks
from tts_jax._flow import flow
from tts_jax._integrate import check_start
from tts_jax._limit import limit
from tts_jax._precision import double_precision, require_double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape


# Lanes whose candidates are recorded in one call of the dynamics: each lane records those of all.
_TOGETHER = 8


@double_precision
def hitting_times(
    problem: AbstractProblem,
    state: State,
    *,
    epsilon: Float[ArrayLike, "..."] | None = None,
    tau_end: Float[ArrayLike, ""],
    radius: Float[ArrayLike, ""] | None = None,
    observable: str = "recovery",
    records: int = 200,
    refinements: int = 3,
    **options: Any,
) -> Float[Array, "... goals"]:
    """First slow times at which a trajectory is within `radius` of each goal.

    For `Univariate` the goals are the jumps of the target, and a jump is hit when some neuron is
    within η of it. The times are exact up to the error of the trajectory: 1e-5 in the neurons at
    the default tolerances becomes 1e-5 over the speed of the neuron.

    Derivatives exist in forward and reverse mode with respect to everything that is a number in
    `problem` (target, η), `state`, `epsilon` and `radius`, where the neuron that hits is the only
    one at that distance and does not stand still. They are as exact as the times. Reverse mode
    works as it is; forward mode needs `adjoint=diffrax.ForwardMode()`. A time that is 0 or
    infinite has the derivative 0.

    Shapes, `records`, `refinements`, `observable` and whether `epsilon` and `radius` are given
    must be concrete. Under a transformation the lanes run one after the other (on other devices
    than a CPU: together), each with a trajectory of its own per refinement.

    Args:
        problem: the two-timescale problem.
        state: the start, with any leading batch axes.
        epsilon: ε of the flow, a scalar or an array that broadcasts against the batch axes of
            `state`; by default the trajectory is that of `limit`.
        tau_end: how long to follow the trajectory.
        radius: distance r at which a goal counts as hit, by default `problem.goal_radius()`: η
            for `Univariate`.
        observable: name of the distances in `problem.observables`, `[goals]`.
        records: number of intervals of [0, `tau_end`] in which a crossing is looked for. A visit
            to the goal that begins and ends within one of them is not seen.
        refinements: Newton steps, the differentiable last one included. Each costs a trajectory.
        **options: of `flow` or `limit`, such as `rtol`, `atol`, `solver`, `adjoint`.

    Returns:
        Hitting times, `[..., goals]`: infinite where the goal is not hit up to `tau_end`, NaN
        where the trajectory failed before it was hit.

    Raises:
        ValueError: an argument is out of range or has the wrong shape, or the problem has no such
            observable.
        TypeError: `radius` is not given and the problem does not define `goal_radius`.
        RuntimeError: traced with `jax_enable_x64` off.
    """
    require_double_precision("hitting_times", problem, state, epsilon, tau_end, radius)
    check_start(problem, state)
    checks.positive("tau_end", tau_end, "The paper's runs end at 0.035.", single=True)
    radius = problem.goal_radius() if radius is None else radius
    checks.positive("radius", radius, "For `Univariate` it is η by default.", single=True)
    checks.positive_integer("records", records, "Use for example 200.")
    checks.positive_integer("refinements", refinements, "Use for example 3.")
    if epsilon is not None:
        remedy = "Leave it out for the limit ε → 0."
        checks.positive("epsilon", epsilon, remedy)
    known = jax.eval_shape(lambda state: problem.observables(*state), problem.structure())
    if not known:
        raise TypeError(
            f"`hitting_times` needs distances to goals, but this `{type(problem).__name__}` has no "
            f"observables. Use a target with jumps, knots or breakpoints, or define `observables`."
        )
    checks.one_of("observable", observable, known, "Or add it to `problem.observables`.")
    if len(known[observable].shape) != 1:
        raise ValueError(
            f"Argument `observable` must name a vector of distances, got `{observable}` of shape "
            f"{known[observable].shape}. Use another one."
        )
    return _hitting_times(
        problem,
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), state),
        None if epsilon is None else jnp.asarray(epsilon, jnp.float64),
        jnp.asarray(tau_end, jnp.float64),
        jnp.asarray(radius, jnp.float64),
        (observable, records, refinements),
        options,
    )


def _hitting_times(
    problem: AbstractProblem,
    state: State,
    epsilon: Array | None,
    tau_end: Array,
    radius: Array,
    settings: tuple[str, int, int],
    options: dict[str, Any],
) -> Array:
    observable, records, refinements = settings
    lanes = batch_shape(problem, state)
    own = () if epsilon is None else epsilon.shape
    try:
        shape = np.broadcast_shapes(lanes, own)
    except ValueError as error:
        raise ValueError(
            f"Argument `epsilon` must broadcast against the batch axes {lanes} of `state`, got "
            f"shape {own}. Give it shape `[..., 1]` to cross it with the starts."
        ) from error
    count = math.prod(shape)

    def flatten(leaf: Array, own: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(leaf, shape + own).reshape(count, *own)

    states = jax.tree.map(lambda leaf: flatten(leaf, leaf.shape[len(lanes) :]), state)
    epsilons = None if epsilon is None else flatten(epsilon, ())
    moving = _Dynamics(problem, states, epsilons, observable, options)
    still = _held(moving)
    end, near = _held((tau_end, radius))

    crossing = still.first_crossing(jnp.linspace(0.0, 1.0, records + 1) * end, near)
    for _ in range(refinements - 1):
        distance, speed = still.at(crossing.guess, end)
        crossing = _narrowed(crossing, distance - near, speed)
    distance, speed = moving.at(crossing.guess, end)
    later = crossing.hit & ~crossing.at_start
    slope = jnp.where(later & (speed != 0.0), speed, 1.0)
    step = jnp.where(later, (distance - radius) / slope, 0.0)
    # where the speed all but vanishes the step may lead astray: keep its derivative, not its value
    away = ~(jnp.abs(step) <= crossing.high - crossing.low)
    times = crossing.guess - step + jnp.where(away, _held(step), 0.0)
    times = jnp.where(crossing.at_start, 0.0, times)
    times = jnp.where(crossing.hit, times, jnp.where(crossing.lost, jnp.nan, jnp.inf))
    return times.reshape(*shape, times.shape[-1])


def _held(tree: Any) -> Any:
    """The same numbers, without derivatives."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


class _Crossing(NamedTuple):
    """Where distances first cross the radius, each `[lanes, goals]`."""

    low: Array  # the latest known time before the crossing
    high: Array  # the earliest known time after it
    guess: Array  # the next candidate; the end of the trajectory where there is no crossing
    hit: Array  # whether there is a crossing
    at_start: Array  # whether it is at τ = 0
    lost: Array  # whether the trajectory failed before there was one


def _narrowed(crossing: _Crossing, excess: Array, speed: Array) -> _Crossing:
    """A safeguarded Newton step from the distances and speeds at `crossing.guess`."""
    guess = crossing.guess
    low = jnp.where(excess > 0.0, guess, crossing.low)
    high = jnp.where(excess <= 0.0, guess, crossing.high)
    newton = guess - excess / jnp.where(speed != 0.0, speed, 1.0)
    sound = (newton >= low) & (newton <= high) & (speed != 0.0)
    following = jnp.where(sound, newton, (low + high) / 2.0)
    searching = crossing.hit & ~crossing.at_start
    return crossing._replace(
        low=jnp.where(searching, low, crossing.low),
        high=jnp.where(searching, high, crossing.high),
        guess=jnp.where(searching, following, guess),
    )


class _Dynamics(eqx.Module):
    """The trajectories of all lanes, of the flow or, where ε is None, of the limit."""

    problem: AbstractProblem
    states: State
    epsilon: Float[Array, " lanes"] | None
    observable: str
    options: dict[str, Any]

    def recorded(self, tau: Float[Array, " T"]) -> tuple[State, Float[Array, "lanes T goals"]]:
        """States, leaves `[lanes, T, ...]`, and distances at `tau`."""
        if self.epsilon is None:
            run = limit(self.problem, self.states, tau=tau, **self.options)
        else:
            run = flow(self.problem, self.states, epsilon=self.epsilon, tau=tau, **self.options)
        return State(run.fast, run.slow), run.observables[self.observable]

    def first_crossing(self, grid: Float[Array, " T"], radius: Array) -> _Crossing:
        """The records between which each distance first falls to the radius."""
        states, distance = self.recorded(grid)
        inside = distance <= radius
        hit = jnp.any(inside, axis=1)
        after = jnp.argmax(inside, axis=1)
        at_start = hit & (after == 0)
        after = jnp.where(hit & ~at_start, after, grid.size - 1)
        low, high = grid[after - 1], grid[after]

        def end(index: Array) -> tuple[Array, Array]:
            excess = jnp.take_along_axis(distance, index[:, None, :], axis=1)[:, 0] - radius
            return excess, _own_speed(self, _picked(states, index))

        guess = low + (high - low) * _cubic_root(*end(after - 1), *end(after), high - low)
        guess = jnp.where(hit & ~at_start, guess, grid[-1])
        lost = ~hit & jnp.any(jnp.isnan(distance), axis=1)
        return _Crossing(low, high, guess, hit, at_start, lost)

    def at(self, times: Float[Array, "lanes goals"], end: Array) -> tuple[Array, Array]:
        """Distance to each goal at its own time, and the speed there, each `[lanes, goals]`.

        Called with numbers, lanes go through the dynamics many at a time; under a
        transformation each has recorded times of its own.
        """
        if checks.is_traced(self, times, end) or checks.inside_trace():

            def alone(lane: Any) -> tuple[Array, Array]:
                states, epsilon, asked = jax.tree.map(lambda leaf: leaf[None], lane)
                one = _Dynamics(self.problem, states, epsilon, self.observable, self.options)
                distance, speed = one._at_once(asked, end)
                return distance[0], speed[0]

            lanes = self.states, self.epsilon, times
            on_cpu = jax.local_devices()[0].platform == "cpu"
            return jax.lax.map(alone, lanes) if on_cpu else jax.vmap(alone)(lanes)
        count = times.shape[0]
        together = min(count, _TOGETHER)
        # the last call repeats the first lanes, so that all calls have one shape
        rows = np.arange(-(-count // together) * together) % count
        answers = []
        for some in rows.reshape(-1, together):
            states, epsilon = jax.tree.map(
                lambda x, some=some: x[some], (self.states, self.epsilon)
            )
            part = _Dynamics(self.problem, states, epsilon, self.observable, self.options)
            answers.append(part._at_once(times[some], end))
        distance, speed = (jnp.concatenate(parts)[:count] for parts in zip(*answers, strict=True))
        return distance, speed

    def _at_once(self, times: Float[Array, "lanes goals"], end: Array) -> tuple[Array, Array]:
        """The same by one call of the dynamics, in which every lane records the times of all."""
        order = jnp.argsort(times.ravel())
        # apart by a few ulp, because recorded times increase
        ulps = 4.0 * jnp.finfo(times.dtype).eps * end * jnp.arange(times.size)
        states, distance = self.recorded(times.ravel()[order] + ulps)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(times.size)).reshape(times.shape)
        own = jnp.take_along_axis(distance, place[:, None, :], axis=1)[:, 0]
        return own, _own_speed(self, _held(_picked(states, place)))


def _picked(states: State, index: Array) -> State:
    """Of states `[lanes, T, ...]` those at `index`, leaves `[lanes, goals, ...]`."""
    lanes = jnp.arange(index.shape[0])[:, None]
    return jax.tree.map(lambda leaf: leaf[lanes, index], states)


@eqx.filter_jit
def _own_speed(dynamics: _Dynamics, states: State) -> Float[Array, "lanes goals"]:
    """dd_k/dτ at the states `[lanes, goals, ...]`, each goal at a state of its own."""
    problem, name = dynamics.problem, dynamics.observable

    def speeds(fast: PyTree[Array], slow: PyTree[Array], epsilon: Array | None) -> Array:
        if epsilon is None:

            def reduced(slow: PyTree[Array]) -> Array:
                return problem.observables(problem.critical(slow), slow)[name]

            return jax.jvp(reduced, (slow,), (problem.reduced_field(slow),))[1]
        fields = problem.fields(fast, slow)
        velocity = jax.tree.map(lambda v: v / epsilon, fields.fast), fields.slow
        return jax.jvp(lambda f, s: problem.observables(f, s)[name], (fast, slow), velocity)[1]

    def lane(fast: PyTree[Array], slow: PyTree[Array], epsilon: Array | None) -> Array:
        return jnp.diagonal(jax.vmap(lambda f, s: speeds(f, s, epsilon))(fast, slow))

    return jax.vmap(lane)(*states, _held(dynamics.epsilon))


def _cubic_root(
    first: Array, first_speed: Array, last: Array, last_speed: Array, width: Array
) -> Array:
    """Root in [0, 1] of the cubic that has given values and speeds at the ends of an interval."""
    a, b = width * first_speed, width * last_speed

    def cubic(s: Array) -> Array:
        t = 1.0 - s
        return t * t * ((1.0 + 2.0 * s) * first + s * a) + s * s * ((1.0 + 2.0 * t) * last - t * b)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2.0
        before = cubic(middle) > 0.0
        return jnp.where(before, middle, ends[0]), jnp.where(before, ends[1], middle)

    low, high = jax.lax.fori_loop(0, 50, halve, (jnp.zeros_like(first), jnp.ones_like(first)))
    return (low + high) / 2.0
