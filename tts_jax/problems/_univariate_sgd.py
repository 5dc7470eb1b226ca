"""Samples and sample gradients of the univariate problem, for one seed and for seeds in lanes.

Paper symbols: f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η), target f*, label noise of half-width
`noise`; one sample is (x, label noise) with label y = f*(x) + noise and loss (f(x) − y)². With
the residual r = f(x) − y its gradient is 2 r σ_j in a_j and −2 r a_j σ′_j/η in u_j. The
published code replaces σ′(z) by the box 1{|z| ≤ ½}, which has the same integral.

In the lanes (arrays end in the seeds) a position is kept as an offset from its start and in
units of η/∛4: with κ = ∛4/η and z = κ(x − start) − offset the transition is |z| < ∛4/2 = c,
and with w = c − min(|z|, c) the folded cubic is w³, so that σ = w³ or 1 − w³ and
σ′/η = (12/∛16) w²/η. The offset keeps float32 accurate: one step moves u by about the spacing
of float32 numbers near 1.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from tts_jax import _compat
from tts_jax._lanes import Lanes, sum_rows
from tts_jax._problem import State
from tts_jax._random import (
    Words,
    key_words,
    step_words,
    symmetric_uniform,
    threefry2x32,
    unit_uniform,
)
from tts_jax.problems import _step


_CUBE_ROOT = float(np.cbrt(4.0))  # units of a lane position per η
_REACH = _CUBE_ROOT / 2.0  # half-width c of a transition in these units
_SLOPE = 12.0 / _CUBE_ROOT**2  # σ′ = _SLOPE · w²

GRADIENTS = ("exact", "box")

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
    features = _step.step((x - slow) / problem.eta)
    return fast[0] + features @ fast[1:] - problem.target(x) - noise


def sample_gradient(
    problem: Any, fast: Array, slow: Array, sample: Sample, *, gradient: str
) -> State:
    """The gradient of the squared residual, `State([m+1], [m])`; `gradient` as in `sgd`."""
    z = (sample[0] - slow) / problem.eta
    double = 2 * residual(problem, fast, slow, sample)
    features = jnp.concatenate([jnp.ones_like(z[:1]), _step.step(z)])
    slope = _step.bump(z) if gradient == "exact" else (jnp.abs(z) <= 0.5).astype(z.dtype)
    return State(double * features, -double * fast[1:] * slope / problem.eta)


# --- seeds in lanes -------------------------------------------------------------------------


class Shared(NamedTuple):
    """Numbers that all lanes share, in the dtype of the run."""

    jumps: Float[Array, " jumps"]
    first: Float[Array, ""]  # level of the first piece
    heights: Float[Array, " jumps"]
    noise: Float[Array, ""]
    scale: Float[Array, ""]  # κ
    kick: Float[Array, ""]  # moves an offset: kick · (2 h r) · a_j · w²


class Fixed(NamedTuple):
    """What a lane keeps through the run."""

    start: Float[Array, "m W"]  # positions that the offsets refer to
    fence: Float[Array, " W"]  # 1/(2h)


class Carry(NamedTuple):
    """What a step changes."""

    bias: Float[Array, " W"]
    weights: Float[Array, "m W"]
    offsets: Float[Array, "m W"]  # in units of η/∛4


def lane_start(
    problem: Any, state: State, *, step_size: float, epsilon: float, gradient: str, dtype: Any
) -> Lanes:
    """Lanes from float64 states `State([m+1, lanes], [m, lanes])`."""
    fast, slow = (np.asarray(leaf, dtype=np.float64) for leaf in state)

    def cast(value: Any) -> Any:
        return np.asarray(value, dtype=dtype)

    start = cast(slow)
    scale = _CUBE_ROOT / float(problem.eta)
    slope = _SLOPE if gradient == "exact" else 1.0
    values = np.asarray(problem.target.values, dtype=np.float64)
    shared = Shared(
        jumps=cast(problem.target.jumps),
        first=cast(values[0]),
        heights=cast(np.diff(values)),
        noise=cast(problem.noise),
        scale=cast(scale),
        kick=cast(scale * epsilon * slope / float(problem.eta)),
    )
    fixed = Fixed(start, cast(np.full(slow.shape[-1], 1.0 / (2.0 * step_size))))
    offsets = cast((slow - start.astype(np.float64)) * scale)
    return Lanes(shared, fixed, Carry(cast(fast[0]), cast(fast[1:]), offsets))


def lane_state(problem: Any, lanes: Lanes) -> State:
    """The float64 states `State([m+1, lanes], [m, lanes])` of lanes."""
    bias, weights, offsets = (np.asarray(leaf, dtype=np.float64) for leaf in lanes.carry)
    start = np.asarray(lanes.fixed.start, dtype=np.float64)
    scale = _CUBE_ROOT / float(problem.eta)
    return State(np.concatenate([bias[None], weights]), start + offsets / scale)


def lane_sample(shared: Shared, key: Words, step: Words) -> Sample:
    """The samples (x, label noise) of lanes and steps, of the words' broadcast shape."""
    return draw(key, step, shared.noise, shared.noise.dtype)


def lane_label(shared: Shared, sample: Sample) -> tuple[Array, Array]:
    """(x, y) with y = f*(x) + noise."""
    x, noise = sample
    level = noise + shared.first
    for k in range(shared.jumps.shape[0]):
        level = level + jnp.where(x >= shared.jumps[k], shared.heights[k], 0)
    return x, level


def lane_step(
    shared: Shared, fixed: Fixed, carry: Carry, point: tuple[Array, Array], *, gradient: str
) -> Carry:
    """One SGD step of all lanes: a by h, u by εh, both gradients at the old state."""
    bias, weights, offsets = carry
    x, y = point
    reach = np.asarray(_REACH, weights.dtype)
    z = (x - fixed.start) * shared.scale - offsets
    w = reach - jnp.minimum(jnp.abs(z), reach)
    square = w * w
    tail = square * w
    features = jnp.where(z > 0, 1 - tail, tail)
    output = bias + sum_rows([weights[j] * features[j] for j in range(weights.shape[0])])
    pull = _compat.fenced_scale(output - y, fixed.fence)  # 2 h r
    slope = square if gradient == "exact" else (jnp.abs(z) <= reach).astype(weights.dtype)
    push = (shared.kick * pull) * weights
    return Carry(bias - pull, weights - pull * features, offsets + push * slope)
