"""The energy distance of two weighted point sets, in space, on a torus and on the circle.

D² = 2 E|X − Y| − E|X − X′| − E|Y − Y′| ≥ 0 for independent X, X′ of one set and Y, Y′ of the other;
D is the maximum mean discrepancy of the kernel −|x − y| (Székely & Rizzo, 2013).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from tts_jax import checks
from tts_jax._precision import double_precision


def _root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """√max(0, square), with derivative 0 where that is 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _points(name: str, value: Float[ArrayLike, "..."], ndim: int, shape: str) -> Array:
    """`value` as an array of float points."""
    remedy = f"Give it shape `{shape}`."
    checks.finite(name, value, remedy)
    if np.ndim(value) != ndim or 0 in np.shape(value):
        raise ValueError(
            f"Argument `{name}` must be at least one point in an array with {ndim} axes, got shape "
            f"{np.shape(value)}. {remedy}"
        )
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def _weights(
    name: str, value: Float[ArrayLike, " n"] | None, points: Float[Array, "n ..."]
) -> Float[Array, " n"]:
    """Weights of sum 1, equal ones for `None`."""
    count = points.shape[0]
    if value is None:
        return jnp.full(count, 1 / count, points.dtype)
    remedy = "Give one weight ≥ 0 per point, or leave it out for equal weights."
    checks.nonnegative(name, value, remedy)
    if np.shape(value) != (count,):
        raise ValueError(
            f"Argument `{name}` must have shape ({count},), got {np.shape(value)}. {remedy}"
        )
    if not checks.is_traced(value) and not np.sum(np.asarray(value)) > 0:
        raise checks.argument_error(name, "have a positive sum", value, remedy)
    weights = jnp.asarray(value).astype(points.dtype)
    return weights / jnp.sum(weights)


def _blocks(
    points: Float[Array, "n d"], weights: Float[Array, " n"], rows: int
) -> tuple[Float[Array, "blocks d rows"], Float[Array, "blocks rows"]]:
    """Coordinates and weights in blocks of points, filled up by points of weight 0."""
    rest = -points.shape[0] % rows
    points = jnp.pad(points, ((0, rest), (0, 0)), mode="edge")
    weights = jnp.pad(weights, (0, rest))
    blocks = points.reshape(-1, rows, points.shape[1])
    return jnp.swapaxes(blocks, 1, 2), weights.reshape(-1, rows)


@double_precision
def energy_distance(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    x_weights: Float[ArrayLike, " n"] | None = None,
    y_weights: Float[ArrayLike, " m"] | None = None,
    period: Float[ArrayLike, "..."] | None = None,
    chunk: int = 1024,
) -> Float[Array, ""]:
    """√(2 E|X − Y| − E|X − X′| − E|Y − Y′|) of two weighted point sets.

    All pairs are visited, (n + m)²/2 + O(chunk (n + m)) of them, in blocks of `chunk`² that are
    never kept. The square is right to about 1e-15 times the largest distance, so that distances
    below 1e-7 of it are rounding. Derivatives are those of the distances; a pair of coincident
    points, and equal sets, count as 0.

    Args:
        x: points, `[n, d]`.
        y: points, `[m, d]`.
        x_weights: their weights ≥ 0, of any sum; equal ones by default.
        y_weights: likewise.
        period: on a torus its side, one number or one per coordinate, `[d]`: distances are then
            the shortest ones. In space by default.
        chunk: points per block; it bounds memory to a few `chunk`² numbers.

    Raises:
        ValueError: shapes that do not go together, points that are not finite, negative weights
            or all zero, a period or `chunk` that is not positive.
    """
    x, y = _points("x", x, 2, "[n, d]"), _points("y", y, 2, "[m, d]")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Arguments `x` and `y` must be points with the same number of coordinates, got shapes "
            f"{x.shape} and {y.shape}. Give them shapes `[n, d]` and `[m, d]`."
        )
    p, q = _weights("x_weights", x_weights, x), _weights("y_weights", y_weights, y)
    if period is not None:
        remedy = "It is the side of the torus; leave it out for points in space."
        checks.positive("period", period, remedy)
        if np.shape(period) not in ((), (x.shape[1],)):
            raise ValueError(
                f"Argument `period` must be one number or have shape ({x.shape[1]},), got shape "
                f"{np.shape(period)}. {remedy}"
            )
        period = jnp.broadcast_to(jnp.asarray(period, x.dtype), x.shape[1:])
    chunk = checks.positive_integer("chunk", chunk, "The default is 1024.")
    rows = min(chunk, max(x.shape[0], y.shape[0]))
    return _energy_distance(x, y, p, q, period, rows)


@functools.partial(jax.jit, static_argnames="rows")
def _energy_distance(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    p: Float[Array, " n"],
    q: Float[Array, " m"],
    period: Float[Array, " d"] | None,
    rows: int,
) -> Float[Array, ""]:
    # one signed set: D² = −Σ_ij s_i s_j |z_i − z_j|, with weights s = p on x and −q on y
    x_blocks, y_blocks = _blocks(x, p, rows), _blocks(y, -q, rows)
    points, weights = (jnp.concatenate(pair) for pair in zip(x_blocks, y_blocks, strict=True))

    zeros = jnp.zeros((rows, rows), x.dtype)

    def add_coordinate(square: Array, coordinate: Any) -> tuple[Array, None]:
        left, right, side = coordinate
        away = left[:, None] - right
        if side is not None:
            away = away - side * jnp.round(away / side)
        return square + away**2, None

    @jax.checkpoint
    def block(i: Array, j: Array) -> Array:
        square, _ = jax.lax.scan(add_coordinate, zeros, (points[i], points[j], period))
        distance = _root(square)
        twice = jnp.where(i == j, 1.0, 2.0)
        return twice * (weights[i] @ distance @ weights[j])

    first, second = np.triu_indices(points.shape[0])

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + block(*pair), None

    pairs = jnp.asarray(first), jnp.asarray(second)
    total, _ = jax.lax.scan(add, jnp.zeros((), x.dtype), pairs)
    return _root(-total)


@double_precision
def circle_energy_distance(
    theta: Float[ArrayLike, " n"],
    phi: Float[ArrayLike, " m"],
    *,
    theta_weights: Float[ArrayLike, " n"] | None = None,
    phi_weights: Float[ArrayLike, " m"] | None = None,
) -> Float[Array, ""]:
    """The energy distance of points on the unit circle of R², given by their angles.

    Distances are chords, 2|sin((θ − φ)/2)|. The cost is that of sorting the angles, and the result
    itself, not only its square, is right to about 1e-15: the potential u = Σ_k s_k |· − z_k| of
    the signed weights solves u″ + u/4 = 2 Σ_k s_k δ_k on the circle, so that D² = −Σ_k s_k u(θ_k) =
    ½ ∫ (u′² − u²/4) dθ, where a difference of two sums has become one of small functions.

    Args:
        theta: angles, `[n]`, of any size.
        phi: angles, `[m]`; cell centres, for a density on a grid.
        theta_weights: their weights ≥ 0, of any sum; equal ones by default.
        phi_weights: likewise; cell averages, for a density on a grid of equal cells.

    Raises:
        ValueError: angles that are not finite, no vectors, weights of another shape, negative or
            all zero.
    """
    theta, phi = _points("theta", theta, 1, "[n]"), _points("phi", phi, 1, "[m]")
    p = _weights("theta_weights", theta_weights, theta)
    q = _weights("phi_weights", phi_weights, phi)
    return _circle_energy_distance(theta, phi, p, q)


@jax.jit
def _circle_energy_distance(
    theta: Float[Array, " n"], phi: Float[Array, " m"], p: Float[Array, " n"], q: Float[Array, " m"]
) -> Float[Array, ""]:
    angles = jnp.mod(jnp.concatenate([theta, phi]), 2 * jnp.pi)
    order = jnp.argsort(angles)
    angles, weights = angles[order], jnp.concatenate([p, -q])[order]
    # between neighbours u = 2 (a sin(θ/2) − b cos(θ/2))
    cosines = jnp.cumsum(weights * jnp.cos(angles / 2))
    sines = jnp.cumsum(weights * jnp.sin(angles / 2))
    a, b = 2 * cosines - cosines[-1], 2 * sines - sines[-1]
    following = jnp.append(angles[1:], angles[0] + 2 * jnp.pi)
    middle = (angles + following) / 2
    integrand = (a**2 - b**2) * jnp.cos(middle) + 2 * a * b * jnp.sin(middle)
    return _root(jnp.sum(jnp.sin((following - angles) / 2) * integrand))
