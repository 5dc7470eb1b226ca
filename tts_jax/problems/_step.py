"""The cubic step activation and its exact integrals: single, pairwise, and cut at an edge.

The step is σ(z) = 0 for z ≤ −½, 4(z+½)³ on [−½, 0], 1 − 4(½−z)³ on [0, ½], 1 for z ≥ ½, so σ′
is a density with mean 0. With Z, Z′ ~ σ′ independent and W = Z − Z′, every integral of products
of steps over the line is an expectation over W, a piecewise polynomial in the signed gap
r = (u_i − u_j)/η. A step that crosses an end of the interval needs the part of the integral
beyond that end taken off again (`cut_*`).

Each function differentiates into the next one exactly, to any order that the activation has,
also where |r| or |z| has its kink.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _horner(coefficients: tuple[float, ...], s: Array) -> Array:
    value = jnp.full_like(s, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * s + coefficient
    return value


# --- one step -------------------------------------------------------------------------------


@jax.custom_jvp
def ramp(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫_{−∞}^z σ = max(z, 0) + (½ − |z|)₊⁴."""
    return jnp.maximum(z, 0.0) + jnp.maximum(0.5 - jnp.abs(z), 0.0) ** 4


@jax.custom_jvp
def step(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation σ(z)."""
    tail = 4.0 * jnp.maximum(0.5 - jnp.abs(z), 0.0) ** 3
    return jnp.where(z > 0, 1.0 - tail, tail)


@jax.custom_jvp
def bump(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """σ′(z) = 12 (½ − |z|)₊²."""
    return 12.0 * jnp.maximum(0.5 - jnp.abs(z), 0.0) ** 2


def bump_slope(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """σ″(z) = −24 sign(z) (½ − |z|)₊."""
    return -24.0 * jnp.sign(z) * jnp.maximum(0.5 - jnp.abs(z), 0.0)


ramp.defjvps(lambda dz, _, z: step(z) * dz)
step.defjvps(lambda dz, _, z: bump(z) * dz)
bump.defjvps(lambda dz, _, z: bump_slope(z) * dz)


# --- two steps, over the whole line ---------------------------------------------------------

# On |r| < ½, coefficients of ½E|r + W|, P(W > |r|) and the density of W in |r|; on ½ < |r| < 1
# they are |r|/2 + FAR_MEAN d⁷, FAR_TAIL d⁶ and FAR_DENSITY d⁵ with d = 1 − |r|.
NEAR_MEAN, FAR_MEAN = (5 / 56, 0.0, 0.9, 0.0, -2.0, 2.4, -0.8, -4 / 35), 0.8 / 7
NEAR_TAIL, FAR_TAIL = (0.5, -1.8, 0.0, 8.0, -12.0, 4.8, 0.8), 0.8
NEAR_DENSITY, FAR_DENSITY = (1.8, 0.0, -24.0, 48.0, -24.0, -4.8), 4.8


@jax.custom_jvp
def gap_mean(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """½ E|r + W|; the overlap is ∫_{−∞}^1 σ_i σ_j = 1 − (u_i + u_j)/2 − η gap_mean(r)."""
    s = jnp.abs(r)
    near = _horner(NEAR_MEAN, s)
    far = s / 2 + FAR_MEAN * jnp.maximum(1.0 - s, 0.0) ** 7
    return jnp.where(s < 0.5, near, far)


@jax.custom_jvp
def gap_cdf(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """P(W ≤ r) = ∫ σ′_i σ_j dx/η with r = (u_i − u_j)/η."""
    s = jnp.abs(r)
    near = _horner(NEAR_TAIL, s)
    tail = jnp.where(s < 0.5, near, FAR_TAIL * jnp.maximum(1.0 - s, 0.0) ** 6)
    return jnp.where(r > 0, 1.0 - tail, tail)


@jax.custom_jvp
def gap_density(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """The density of W: ∫ σ′_i σ′_j dx/η with r = (u_i − u_j)/η."""
    s = jnp.abs(r)
    near = _horner(NEAR_DENSITY, s)
    return jnp.where(s < 0.5, near, FAR_DENSITY * jnp.maximum(1.0 - s, 0.0) ** 5)


def gap_density_slope(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative of the density of W."""
    s = jnp.abs(r)
    near = _horner((0.0, -48.0, 144.0, -96.0, -24.0), s)
    return jnp.sign(r) * jnp.where(s < 0.5, near, -24.0 * jnp.maximum(1.0 - s, 0.0) ** 4)


gap_mean.defjvps(lambda dr, _, r: (gap_cdf(r) - 0.5) * dr)
gap_cdf.defjvps(lambda dr, _, r: gap_density(r) * dr)
gap_density.defjvps(lambda dr, _, r: gap_density_slope(r) * dr)


# --- two steps, over the half line beyond an edge -------------------------------------------

NODES, WEIGHTS = np.polynomial.legendre.leggauss(4)  # exact up to degree 7


def _half_line(f, g, p: Array, q: Array) -> Array:
    """∫_{t<0} f(t + p) g(t + q) dt for f, g in {σ, σ′, σ″}, where p, q ≤ ½.

    Gauss–Legendre between the breakpoints of both factors, exact because each piece is a
    polynomial of degree at most 6.
    """
    p, q = jnp.broadcast_arrays(p, q)
    low = jnp.minimum(-0.5 - jnp.minimum(p, q), 0.0)
    first = jnp.clip(-jnp.maximum(p, q), low, 0.0)
    second = jnp.clip(-jnp.minimum(p, q), low, 0.0)
    total = jnp.zeros_like(p)
    for left, right in ((low, first), (first, second), (second, jnp.zeros_like(p))):
        half, middle = (right - left) / 2, (right + left) / 2
        t = middle[..., None] + half[..., None] * jnp.asarray(NODES, p.dtype)
        values = f(t + p[..., None]) * g(t + q[..., None])
        total += half * jnp.sum(values * jnp.asarray(WEIGHTS, p.dtype), axis=-1)
    return total


@jax.custom_jvp
def cut_mean(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫_{t<0} σ(t + p) σ(t + q) dt for p, q ≤ ½."""
    return _half_line(step, step, p, q)


@jax.custom_jvp
def cut_cdf(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫_{t<0} σ′(t + p) σ(t + q) dt for p, q ≤ ½."""
    return _half_line(bump, step, p, q)


@jax.custom_jvp
def cut_density(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫_{t<0} σ′(t + p) σ′(t + q) dt for p, q ≤ ½."""
    return _half_line(bump, bump, p, q)


cut_mean.defjvps(
    lambda dp, _, p, q: cut_cdf(p, q) * dp,
    lambda dq, _, p, q: cut_cdf(q, p) * dq,
)
cut_cdf.defjvps(
    lambda dp, _, p, q: (bump(p) * step(q) - cut_density(p, q)) * dp,
    lambda dq, _, p, q: cut_density(p, q) * dq,
)
cut_density.defjvps(
    lambda dp, _, p, q: _half_line(bump_slope, bump, p, q) * dp,
    lambda dq, _, p, q: _half_line(bump_slope, bump, q, p) * dq,
)
