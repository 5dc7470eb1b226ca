"""Sums over a data set of one-dimensional neurons, in time n + (points in transitions).

A neuron σ((x − u)/η) of a coordinate is 0 left of its transition and a straight line right of it,
so that only the points inside need σ. Each coordinate keeps its points in order, cut into blocks
of equal length; a transition touches at most two neighbouring blocks. Blocks right of them
get the straight lines of all their neurons together, and give back sums of their own. What passes
between the order of a coordinate and that of the data is one gather per coordinate and direction.

Where that does not pay, because the data are few or the transition is unbounded, nothing is sorted
and every neuron sees every point.
"""

import math
from typing import NamedTuple, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tts_jax.problems._activation import Activation, Transition, derivative


WINDOW = 2
_SHORTEST = 32  # points of a block at least


class Placed(NamedTuple):
    """Neurons at some positions: the points of which they need σ, and in sorted data the blocks
    where these are and whether a block lies beyond them."""

    z: Float[Array, "d m *near"]
    blocks: Int[Array, "d m window"] | None
    beyond: Bool[Array, "d blocks m"] | None


class Ordered(eqx.Module):
    """A data set in the order of each of its coordinates.

    Attributes:
        values: the points of each coordinate in ascending order, `[d, blocks, length]`; the last
            block is filled up with the largest. If not sorted, `[d, n]`.
        rank: where point i stands in `values`, as a flat index, `[d, n]`.
        order: which point stands there, n where none does, `[d, blocks * length]`.
    """

    values: Float[Array, "d ..."]
    rank: Int[Array, "d n"] | None
    order: Int[Array, "d places"] | None

    def __init__(self, inputs: Float[Array, "n d"], reach: float) -> None:
        """Sort concrete points for transitions of width `reach` (may be 0, or infinite)."""
        points = np.asarray(inputs, dtype=np.float64).T
        dimensions, count = points.shape
        length = _block_length(points, reach)
        if length is None:
            self.values, self.rank, self.order = cast(Array, points), None, None
            return
        blocks = -(-count // length)
        order = np.argsort(points, axis=1, kind="stable")
        rank = np.empty((dimensions, count), dtype=np.int32)
        for coordinate in range(dimensions):
            rank[coordinate, order[coordinate]] = np.arange(count) + coordinate * blocks * length
        spare = ((0, 0), (0, blocks * length - count))
        values = np.pad(np.take_along_axis(points, order, axis=1), spare, mode="edge")
        self.values = cast(Array, values.reshape(dimensions, blocks, length))
        self.rank = cast(Array, rank)
        padded = np.pad(order, spare, constant_values=count)
        self.order = cast(Array, padded.astype(np.int32))

    def place(self, slow: Float[Array, "d m"], eta: Array, transition: Transition) -> Placed:
        """Find the blocks that the transitions touch."""
        values = jnp.asarray(self.values)
        if self.rank is None:
            return Placed((values[:, None, :] - slow[:, :, None]) / eta, None, None)
        dimensions, blocks, _ = values.shape
        left = values[:, :, -1][:, None, :] < (slow + eta * transition.start)[:, :, None]
        first = jnp.minimum(jnp.sum(left, axis=-1, dtype=jnp.int32), blocks - WINDOW)
        index = jnp.arange(blocks, dtype=jnp.int32)
        own = jnp.arange(dimensions, dtype=jnp.int32)[:, None] * blocks
        touched = (first + own)[..., None] + index[:WINDOW]
        near = _take(values.reshape(dimensions * blocks, -1), touched)
        z = (near - slow[:, :, None, None]) / eta
        return Placed(z, touched, index[:, None] >= first[:, None, :] + WINDOW)

    def network(
        self,
        weights: Float[Array, "d m"],
        slow: Float[Array, "d m"],
        eta: Array,
        placed: Placed,
        activation: Activation,
        transition: Transition,
    ) -> Float[Array, " n"]:
        """Σ_c Σ_j a_cj σ((x_ic − u_cj)/η) at every point."""
        values, steps = jnp.asarray(self.values), activation(placed.z)
        if placed.blocks is None or placed.beyond is None or self.rank is None:
            return jnp.einsum("cm,cmn->n", weights, steps)
        level = weights * (transition.level - transition.slope * slow / eta)
        total = jnp.sum(jnp.where(placed.beyond, level[:, None, :], 0), axis=-1)[..., None]
        if transition.slope:
            slope = weights * (transition.slope / eta)
            slopes = jnp.sum(jnp.where(placed.beyond, slope[:, None, :], 0), axis=-1)
            total = total + slopes[..., None] * values
        flat = jnp.broadcast_to(total, values.shape).reshape(-1, values.shape[-1])
        near = weights[:, :, None, None] * steps
        flat = flat.at[placed.blocks].add(near, mode="promise_in_bounds")
        return jnp.sum(_take(flat.reshape(-1), jnp.asarray(self.rank)), axis=0)

    def projections(
        self,
        values_at: Float[Array, " n"],
        slow: Float[Array, "d m"],
        eta: Array,
        placed: Placed,
        activation: Activation,
        transition: Transition,
    ) -> tuple[Float[Array, "d m"], Float[Array, "d m"]]:
        """Σ_i r_i σ(z_icj) and Σ_i r_i σ′(z_icj)/η for the values r_i."""
        steps, bumps = activation(placed.z), derivative(activation, placed.z)
        if placed.blocks is None or placed.beyond is None:
            return steps @ values_at, bumps @ values_at / eta
        extended = jnp.concatenate([values_at, jnp.zeros(1, values_at.dtype)])
        ordered = _take(extended, jnp.asarray(self.order)).reshape(self.values.shape)
        sums = jnp.sum(ordered, axis=-1)
        tails = jnp.sum(jnp.where(placed.beyond, sums[..., None], 0), axis=1)
        whole, slopes = transition.level * tails, jnp.zeros_like(tails)
        if transition.slope:
            moments = jnp.sum(ordered * jnp.asarray(self.values), axis=-1)
            moments = jnp.sum(jnp.where(placed.beyond, moments[..., None], 0), axis=1)
            whole = whole + transition.slope * (moments - slow * tails) / eta
            slopes = transition.slope * tails / eta
        near = _take(ordered.reshape(-1, ordered.shape[-1]), placed.blocks)
        own = jnp.sum(near * steps, axis=(-2, -1))
        return whole + own, slopes + jnp.sum(near * bumps, axis=(-2, -1)) / eta


def _take(array: Array, index: Array) -> Array:
    return array.at[index].get(mode="promise_in_bounds")


def _block_length(points: np.ndarray, reach: float) -> int | None:
    """Points per block, or None where sorting does not pay.

    As many points as a transition of width `reach` holds at most make a block, so that it touches
    two; the length is rounded up from an estimate for evenly spread points, so that data sets of
    one size agree on it.
    """
    count = points.shape[1]
    if not math.isfinite(reach):
        return None
    extent = float(np.max(points.max(axis=1) - points.min(axis=1)))
    mean = count * min(reach / extent, 1.0) if extent > 0 else count
    expected = mean + 6.0 * math.sqrt(mean) + 8.0
    most = max(_most_within(row, reach) for row in np.sort(points, axis=1))
    length = 1 << math.ceil(math.log2(max(most, expected, _SHORTEST)))
    return length if 2 * WINDOW * length <= count else None


def _most_within(ordered: np.ndarray, reach: float) -> int:
    """The largest number of points in any interval of width `reach`, with some slack."""
    ends = ordered + reach * (1.0 + 1e-5) + 1e-6 * max(1.0, float(np.abs(ordered).max()))
    return int(np.max(np.searchsorted(ordered, ends, side="right") - np.arange(ordered.size)))
