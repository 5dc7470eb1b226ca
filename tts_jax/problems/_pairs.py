"""Exact integrals of the two smooth steps, logistic and erf: of one, and of products of two.

With σ′ the density of a random Z and S₁ = ∫σ, S₂ = ∫S₁ (from −∞), a product over a half line is

    P(p, q) = ∫_{t<0} σ(t + p) σ(t + q) dt,   ∂P/∂p = Q(p, q) = ∫_{t<0} σ′(t + p) σ(t + q) dt,
    ∂Q/∂q = R(p, q) = ∫_{t<0} σ′(t + p) σ′(t + q) dt,    ∂Q/∂p = σ′(p) σ(q) − R,

and a product over [0, 1] is the difference of two of them. docs/activations.md has the derivations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf as _erf, erfc as _erfc, spence
from jaxtyping import Array, Float


Single = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Pair = Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]


class SmoothStep(NamedTuple):
    """The integrals of one step: σ, σ′, S₁, S₂, P, Q, R, in the module's notation."""

    step: Single
    bump: Single
    ramp: Single
    bowl: Single
    mean: Pair
    cdf: Pair
    density: Pair


def _ladder(
    step: Single,
    bump: Single,
    slope: Single,
    ramp: Single,
    bowl: Single,
    mean: Pair,
    cdf: Pair,
    density: Pair,
) -> SmoothStep:
    """The functions, each with the next one as its derivative."""
    bump, step, ramp, bowl = map(jax.custom_jvp, (bump, step, ramp, bowl))
    bump.defjvps(lambda dz, _, z: slope(z) * dz)
    step.defjvps(lambda dz, _, z: bump(z) * dz)
    ramp.defjvps(lambda dz, _, z: step(z) * dz)
    bowl.defjvps(lambda dz, _, z: ramp(z) * dz)
    mean, cdf = map(jax.custom_jvp, (mean, cdf))
    mean.defjvps(lambda dp, _, p, q: cdf(p, q) * dp, lambda dq, _, p, q: cdf(q, p) * dq)
    cdf.defjvps(
        lambda dp, _, p, q: (bump(p) * step(q) - density(p, q)) * dp,
        lambda dq, _, p, q: density(p, q) * dq,
    )
    return SmoothStep(step, bump, ramp, bowl, mean, cdf, density)


def _gauss(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (1.0 + nodes) / 2.0, weights / 2.0


# --- erf: Z normal with variance ½ --------------------------------------------------------------

_OWEN = _gauss(20)


def _wedge(h: Array, k: Array) -> Array:
    """Owen's T(h, k/h) for h, k ≥ 0, the larger one first in the integral: then it is smooth.

    T(h, a) = 1/(2π) ∫₀^a exp(−h²(1 + x²)/2)/(1 + x²) dx, and for h, k ≥ 0
    T(h, k/h) + T(k, h/k) = ¼ (1 − erf(h/√2) erf(k/√2)).
    """
    large, small = jnp.maximum(h, k), jnp.minimum(h, k)
    ratio = small / jnp.where(large > 0, large, 1.0)
    nodes, weights = (jnp.asarray(x, large.dtype) for x in _OWEN)
    square = (ratio[..., None] * nodes) ** 2
    values = jnp.exp(-(large[..., None] ** 2) * (1.0 + square) / 2.0) / (1.0 + square)
    inner = ratio * (values @ weights) / (2.0 * np.pi)
    root = np.sqrt(0.5)
    other = 0.25 * (1.0 - _erf(root * h) * _erf(root * k)) - inner
    return jnp.where(k <= h, inner, other)


def _erf_step(z: Array) -> Array:
    return 0.5 * _erfc(-z)


def _erf_bump(z: Array) -> Array:
    return jnp.exp(-z * z) / np.sqrt(np.pi)


def _erf_ramp(z: Array) -> Array:
    return z * _erf_step(z) + 0.5 * _erf_bump(z)


def _erf_bowl(z: Array) -> Array:
    return (0.5 * z * z + 0.25) * _erf_step(z) + 0.25 * z * _erf_bump(z)


def _erf_density(p: Array, q: Array) -> Array:
    gap = p - q
    return jnp.exp(-gap * gap / 2) * 0.5 * _erfc(-(p + q) / np.sqrt(2.0)) / np.sqrt(2.0 * np.pi)


def _erf_cdf(p: Array, q: Array) -> Array:
    """P(Z ≤ p, Z′ ≤ Z + q − p), a bivariate normal distribution, by Owen's T."""

    def sign(x: Array) -> Array:
        return jnp.where(x < 0, -1.0, 1.0)

    tiny = jnp.finfo(jnp.result_type(p, q)).tiny
    origin = (p == 0) & (q == 0)  # where the wedges jump, but not their sum
    p, q = jnp.where(origin, tiny, p), jnp.where(origin, tiny, q)
    root, gap, both = np.sqrt(2.0), q - p, p + q
    first = sign(p) * sign(q) * _wedge(root * jnp.abs(p), root * jnp.abs(q))
    second = sign(gap) * sign(both) * _wedge(jnp.abs(gap), jnp.abs(both))
    apart = jnp.where(sign(p) * sign(gap) < 0, 0.5, 0.0)
    return 0.5 * (_erf_step(p) + _erf_step(gap / root)) - first - second - apart


def _erf_mean(p: Array, q: Array) -> Array:
    """By parts, with z σ′(z) = −σ″(z)/2 and Q(p, q) + Q(q, p) = σ(p) σ(q)."""
    moments = (p - q) * _erf_cdf(p, q) + q * _erf_step(p) * _erf_step(q)
    ends = _erf_bump(p) * _erf_step(q) + _erf_step(p) * _erf_bump(q)
    return moments + 0.5 * ends - _erf_density(p, q)


ERF = _ladder(
    _erf_step,
    _erf_bump,
    lambda z: -2.0 * z * _erf_bump(z),
    _erf_ramp,
    _erf_bowl,
    _erf_mean,
    _erf_cdf,
    _erf_density,
)


# --- logistic -----------------------------------------------------------------------------------

# In v = σ(t + (p + q)/2) and with c = cosh((p − q)/2) − 1 the integrands are rational:
# σ(t + p) σ(t + q) = v²/D, D = 1 + 2c v(1 − v), dt = dv/(v(1 − v)). The closed forms cancel where p
# and q are close; there the Gauss sum is exact to rounding.
_NEAR = 2.0
_RATIONAL = _gauss(16)


def _softplus_gap(low: Array, high: Array) -> Array:
    """S₁(low) − S₁(high)."""
    return jax.nn.softplus(low) - jax.nn.softplus(high)


def _near_or_far(p: Array, q: Array, near: Pair, far: Any) -> tuple[Array, ...]:
    """Whether p and q are close, ∫₀^v `near`(v, D) dv, c, their gap, and what `far` makes of the
    lower one, the higher one and e to the power of their difference."""
    p, q = jnp.broadcast_arrays(p, q)
    gap = jnp.clip(p - q, -_NEAR, _NEAR)
    middle = jax.nn.sigmoid((p + q) / 2)
    c = 2.0 * jnp.sinh(gap / 4) ** 2
    nodes, weights = (jnp.asarray(x, middle.dtype) for x in _RATIONAL)
    v = middle[..., None] * nodes
    total = middle * (near(v, 1.0 + 2.0 * c[..., None] * v * (1.0 - v)) @ weights)
    low, high = jnp.minimum(p, q), jnp.maximum(p, q)
    close = high - low < _NEAR
    decay = jnp.exp(jnp.where(close, -_NEAR, low - high))
    return close, total, c, gap, far(low, high, decay)


def _logistic_mean(p: Array, q: Array) -> Array:
    def far(low: Array, high: Array, decay: Array) -> Array:
        return jax.nn.softplus(high) + _softplus_gap(low, high) / (1.0 - decay)

    close, total, c, _, apart = _near_or_far(p, q, lambda v, d: v * v / d, far)
    middle = (p + q) / 2
    together = jax.nn.softplus(middle) - jax.nn.sigmoid(middle) - 2.0 * c * total
    return jnp.where(close, together, apart)


def _logistic_cdf(p: Array, q: Array) -> Array:
    product = jax.nn.sigmoid(p) * jax.nn.sigmoid(q)

    def far(low: Array, high: Array, decay: Array) -> Array:
        rest = _softplus_gap(low, high) * decay
        return (jax.nn.sigmoid(low) * (1.0 - decay) + rest) / (1.0 - decay) ** 2

    close, total, _, gap, apart = _near_or_far(p, q, lambda v, d: (v / d) ** 2, far)
    together = 0.5 * product - jnp.sinh(gap / 2) * total
    return jnp.where(close, together, jnp.where(p < q, apart, product - apart))


def _logistic_density(p: Array, q: Array) -> Array:
    def far(low: Array, high: Array, decay: Array) -> Array:
        both = (jax.nn.sigmoid(low) + jax.nn.sigmoid(high)) * (1.0 - decay)
        rest = _softplus_gap(low, high) * (1.0 + decay)
        return -decay * (both + rest) / (1.0 - decay) ** 3

    close, total, _, _, apart = _near_or_far(p, q, lambda v, d: v * (1.0 - v) / (d * d), far)
    return jnp.where(close, total, apart)


def _logistic_bump(z: Array) -> Array:
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def _logistic_bowl(z: Array) -> Array:
    """−Li₂(−eᶻ), by its inversion where z > 0."""
    tail = -spence(1.0 + jnp.exp(-jnp.abs(z)))
    return jnp.where(z > 0, z * z / 2 + np.pi**2 / 6 - tail, tail)


LOGISTIC = _ladder(
    jax.nn.sigmoid,
    _logistic_bump,
    lambda z: _logistic_bump(z) * (1.0 - 2.0 * jax.nn.sigmoid(z)),
    jax.nn.softplus,
    _logistic_bowl,
    _logistic_mean,
    _logistic_cdf,
    _logistic_density,
)

SMOOTH_STEPS = {"logistic": LOGISTIC, "erf": ERF}
