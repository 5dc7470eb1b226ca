"""Samples and sample gradients of the univariate problem, for one seed and for seeds in lanes.

Paper symbols: f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η), target f*, label noise of half-width
`noise`; one sample is (x, label noise) with label y = f*(x) + noise and loss (f(x) − y)². With
the residual r = f(x) − y its gradient is 2 r σ_j in a_j and −2 r a_j σ′_j/η in u_j. The
published code replaces σ′(z) by the box 1{|z| ≤ ½}, which has the same integral.

In the lanes (arrays end in the seeds) a position is kept as an offset from its start, in units of
η, or of η/∛4 for the cubic step: with κ = ∛4/η and z = κ(x − start) − offset the transition is
|z| < ∛4/2 = c, and with w = c − min(|z|, c) the folded cubic is w³, so that σ = w³ or 1 − w³ and
σ′/η = (12/∛16) w²/η. The offset keeps float32 accurate: one step moves u by about the spacing
of float32 numbers near 1.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from tts_jax import _compat
from tts_jax._batch_last import Lanes, each_row, is_number, sum_rows
from tts_jax._problem import State
from tts_jax._random import (
    Words,
    key_words,
    step_words,
    symmetric_uniform,
    threefry2x32,
    unit_uniform,
)
from tts_jax.problems._targets import PiecewiseConstant


_CUBE_ROOT = float(np.cbrt(4.0))  # units of a lane position per η
_REACH = _CUBE_ROOT / 2.0  # half-width c of a transition in these units
_SLOPE = 12.0 / _CUBE_ROOT**2  # σ′ = _SLOPE · w²

GRADIENTS = ("exact", "box")

DIVERGED = 1e10  # residual beyond which a lane has left the problem

Sample = tuple[Float[Array, "..."], Float[Array, "..."]]


# --- one seed -------------------------------------------------------------------------------


def draw(key: Words, step: Words, noise: Array, dtype: Any) -> Sample:
    """The sample (x, label noise) of one step: words 0 and 1 of its Threefry block."""
    first, second = threefry2x32(key, step)
    return unit_uniform(first, dtype), symmetric_uniform(second, dtype) * noise


def sample(noise: Array, *, key: PRNGKeyArray, step: Any) -> Sample:
    """The sample (x, label noise) of step `step`, two scalars."""
    dtype = jnp.result_type(noise)
    return draw(key_words(key), step_words(step), jnp.asarray(noise), dtype)


def residual(problem: Any, fast: Array, slow: Array, sample: Sample) -> Array:
    """f(x) − f*(x) − noise."""
    x, noise = sample
    features = problem.sigma((x - slow) / problem.eta)
    return fast[0] + features @ fast[1:] - problem.target.elementwise(x) - noise


def sample_gradient(
    problem: Any, fast: Array, slow: Array, sample: Sample, *, gradient: str
) -> State:
    """The gradient of the squared residual, `State([m+1], [m])`; `gradient` as in `sgd`."""
    _check_gradient(problem, gradient)
    z = (sample[0] - slow) / problem.eta
    double = 2 * residual(problem, fast, slow, sample)
    value, slope = jax.jvp(problem.sigma, (z,), (jnp.ones_like(z),))
    features = jnp.concatenate([jnp.ones_like(z[:1]), value])
    if gradient == "box":
        slope = (jnp.abs(z) <= 0.5).astype(z.dtype)
    return State(double * features, -double * fast[1:] * slope / problem.eta)


def _check_gradient(problem: Any, gradient: str) -> None:
    if gradient == "box" and problem.activation != "cubic":
        raise ValueError(
            f"Argument `gradient` must be 'exact' with the activation `{problem.activation}`, got "
            f"'box': that is the published code's estimator of the slope of the cubic step. Leave "
            f"it out."
        )


# --- seeds in lanes -------------------------------------------------------------------------


class Levels(NamedTuple):
    """A piecewise-constant target, in the dtype of the run."""

    jumps: Float[Array, " jumps"]
    first: Float[Array, ""]  # level of the first piece
    heights: Float[Array, " jumps"]


class Shared(NamedTuple):
    """What all lanes know, in the dtype of the run."""

    target: Any  # `Levels`, or the numbers of any other target
    sigma: Any  # the numbers of the activation, if it has any


class Fixed(NamedTuple):
    """What a lane keeps through the run."""

    start: Float[Array, "m W"]  # positions that the offsets refer to
    noise: Float[Array, " W"]
    scale: Float[Array, " W"]  # units of a lane position per x: κ
    kick: Float[Array, " W"]  # units of a lane weight per a_j
    inverse_kick: Float[Array, " W"]
    rate: Float[Array, " W"]  # 2h
    inverse_rate: Float[Array, " W"]


class Carry(NamedTuple):
    """What a step changes."""

    bias: Float[Array, " W"]
    weights: Float[Array, "m W"]  # times kick
    offsets: Float[Array, "m W"]
    limit: Float[Array, " W"]  # of the residual; negative once the lane is frozen


def lane_start(
    problem: Any, state: State, *, step_size: float, epsilon: float, gradient: str, dtype: Any
) -> Lanes:
    """Lanes from float64 states `State([m+1, lanes], [m, lanes])`."""
    _check_gradient(problem, gradient)
    fast, slow = (np.asarray(leaf, dtype=np.float64) for leaf in state)
    lanes = slow.shape[-1]

    def cast(value: Any) -> Any:
        with np.errstate(over="ignore"):  # a start out of range is a lane that diverges
            return np.asarray(value, dtype=dtype)

    def every(value: Any) -> Any:
        return np.full(lanes, value, dtype=dtype)

    def numbers(tree: Any) -> Any:
        return jax.tree.map(cast, eqx.filter(tree, is_number))

    start, target = cast(slow), problem.target
    cubic = problem.activation == "cubic"
    unit = _CUBE_ROOT if cubic else 1.0
    scale = every(unit / float(problem.eta))
    slope = _SLOPE if cubic and gradient == "exact" else 1.0
    if isinstance(target, PiecewiseConstant):
        values = np.asarray(target.values, dtype=np.float64)
        target = Levels(cast(target.jumps), cast(values[0]), cast(np.diff(values)))
    else:
        target = numbers(target)
    shared = Shared(target, numbers(problem.sigma))
    kick = every(unit * epsilon * slope / float(problem.eta) ** 2)
    rate = every(2.0 * step_size)
    fixed = Fixed(start, every(problem.noise), scale, kick, 1 / kick, rate, 1 / rate)
    offsets = cast((slow - start.astype(np.float64)) * scale.astype(np.float64))
    return Lanes(
        shared,
        fixed,
        Carry(cast(fast[0]), cast(fast[1:] * kick.astype(np.float64)), offsets, every(DIVERGED)),
    )


def lane_state(lanes: Lanes) -> tuple[State, np.ndarray]:
    """The float64 states `State([m+1, lanes], [m, lanes])`, and which lanes are alive."""
    fixed, carry = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=np.float64), lanes[1:])
    # with the very numbers of the steps, rounded or not
    fast = np.concatenate([carry.bias[None], carry.weights * fixed.inverse_kick])
    return State(fast, fixed.start + carry.offsets / fixed.scale), carry.limit > 0


def lane_sample(shared: Shared, fixed: Fixed, key: Words, step: Words) -> Sample:
    """The samples (x, label noise) of lanes and steps, of the words' broadcast shape."""
    return draw(key, step, fixed.noise, fixed.noise.dtype)


def lane_label(problem: Any, shared: Shared, sample: Sample) -> tuple[Array, Array]:
    """(x, y) with y = f*(x) + noise."""
    x, noise = sample
    of = shared.target
    if not isinstance(of, Levels):
        return x, noise + eqx.combine(of, problem.target).elementwise(x)
    level = noise + of.first
    for k in range(len(of.jumps)):
        level = level + jnp.where(x >= of.jumps[k], of.heights[k], 0)
    return x, level


def lane_step(
    problem: Any,
    shared: Shared,
    fixed: Fixed,
    carry: Carry,
    point: tuple[Array, Array],
    *,
    gradient: str,
) -> Carry:
    """One SGD step of all lanes: a by h, u by εh, both gradients at the old state.

    A lane whose residual leaves ±`DIVERGED` is frozen where it was before the step.
    """
    bias, weights, offsets, limit = carry
    x, y = point
    reach = x.dtype.type(_REACH)
    sigma = eqx.combine(shared.sigma, problem.sigma)

    def cubic(start: Array, offset: Array) -> tuple[Array, Array]:
        z = (x - start) * fixed.scale - offset
        w = reach - jnp.minimum(jnp.abs(z), reach)
        square = w * w
        tail = square * w
        slope = square if gradient == "exact" else (jnp.abs(z) <= reach).astype(x.dtype)
        return lax.select(z > 0, 1 - tail, tail), slope

    def any_other(start: Array, offset: Array) -> tuple[Array, Array]:
        z = (x - start) * fixed.scale - offset
        return jax.jvp(sigma, (z,), (jnp.ones_like(z),))

    transition = cubic if problem.activation == "cubic" else any_other
    features, slopes = each_row(transition, fixed.start, offsets)
    total = sum_rows(each_row(jnp.multiply, weights, features))
    residual = total * fixed.inverse_kick + (bias - y)
    tame = jnp.abs(residual) <= limit  # false for NaN, and for good once false
    limit = lax.select(tame, limit, -jnp.ones_like(limit))
    pull = _compat.fenced_scale(tame, residual, fixed.rate, fixed.inverse_rate)  # 2 h r
    push = fixed.kick * pull

    def move(weight: Array, offset: Array, feature: Array, slope: Array) -> tuple[Array, Array]:
        moved = offset + pull * (weight * slope)
        return weight - push * feature, moved

    weights, offsets = each_row(move, weights, offsets, features, slopes)
    return Carry(bias - pull, weights, offsets, limit)
