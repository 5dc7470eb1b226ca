"""The univariate network by its plateaus: loss, gradient, Hessian and a*(u) in O(m).

With neurons in ascending order of position the network is written by its plateau values
F_k = Σ_{j≤k} a_j, k = 0 … m, so a_j = F_j − F_{j−1}. Let σ_j(x) = σ((x − u_j)/η) on [0, 1] and

    start_j = ∫(1 − σ_j),  area_j = ∫f*(1 − σ_j),  overlap_ij = ∫(1 − σ_i) σ_j/η for i before j,

with start_0 = area_0 = 0, start_{m+1} = 1, area_{m+1} = ∫f*. Then
∫σ_iσ_j = 1 − start_j − η overlap_ij and the loss is

    L = Σ_k F_k² (start_{k+1} − start_k) − 2 Σ_k F_k (area_{k+1} − area_k)
        − η Σ_ij a_i a_j overlap_ij + ∫f*².

The overlap of two neurons vanishes once they are η apart, and for one that is 0 or 1 all over
[0, 1]: sums over pairs run over near neighbours, and the Hessian in (F, u) is a band. Nothing here
divides by a gap, and all formulas hold for neurons in any order, so they stay exact when two of
them coincide, or cross within a step of an integrator: `before` and `after` then mean the order of
labels. A step that reaches past 0 or 1 has corrections in p = −u/η and q = (u − 1)/η.

Rows are neurons (axis 0); any trailing axes are lanes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tts_jax.problems import _step
from tts_jax.problems._step import _horner


# --- the functions of the signed gap r = (u_j − u_i)/η, i before j ------------------------------


@jax.custom_jvp
def gap_overlap(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫(1 − σ_i) σ_j dx/η over the line, `_step.gap_mean(r) − r/2`; 0 from r = 1 on."""
    s = jnp.abs(r)
    near = _horner((5 / 56, -0.5, 0.9, 0.0, -2.0, 2.4, -0.8, -4 / 35), s)
    tail = jnp.maximum(1.0 - s, 0.0)
    square = tail * tail
    tail = (0.8 / 7) * square * square * square * tail
    return jnp.where(s < 0.5, near, tail) + jnp.maximum(-r, 0.0)


@jax.custom_jvp
def gap_tail(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫σ′_i σ_j dx/η over the line, `1 − _step.gap_cdf(r)`; 0 from r = 1 on."""
    s = jnp.abs(r)
    near = _horner((0.5, -1.8, 0.0, 8.0, -12.0, 4.8, 0.8), s)
    square = jnp.maximum(1.0 - s, 0.0) ** 2
    tail = jnp.where(s < 0.5, near, 0.8 * square * square * square)
    return jnp.where(r < 0, 1.0 - tail, tail)


gap_overlap.defjvps(lambda dr, _, r: -gap_tail(r) * dr)
gap_tail.defjvps(lambda dr, _, r: -_step.gap_density(r) * dr)


@jax.custom_jvp
def own_cut(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """∫_{t<0} (σ² − σ)(t + z) dt for z ≤ ½: what an edge takes from a neuron's own overlap."""
    w = jnp.maximum(0.5 - jnp.abs(z), 0.0)
    cube = w * w * w
    part = cube * w * (1.0 - (16 / 7) * cube)
    return jnp.where(z > 0, part - 5 / 56, -part)


own_cut.defjvps(lambda dz, _, z: -_step.step(z) * (1.0 - _step.step(z)) * dz)


# --- one neuron ---------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """The numbers of the problem: width η, jumps v `[jumps]`, levels of f* `[jumps + 1]`.

    Each may have lanes as trailing axes.
    """

    eta: Array
    jumps: Array
    values: Array


class Places(NamedTuple):
    """Positions moved to the nearest point of [−η/2, 1 + η/2], and their distances past the ends.

    Attributes:
        slow: the positions, `[m, ...]`.
        left: −u/η, above −½ for a step that reaches past 0.
        right: (u − 1)/η, above −½ for a step that reaches past 1.
        alive: whether the step is neither 0 nor 1 all over [0, 1].
    """

    slow: Array
    left: Array
    right: Array
    alive: Array


class Singles(NamedTuple):
    """What concerns one neuron alone, `[m, ...]` each; see the module.

    Attributes:
        start: ∫(1 − σ_j).
        area: ∫f*(1 − σ_j).
        mass: ∫σ′_j/η, 1 off the ends.
        level: ∫f*σ′_j/η.
        own: ∫(1 − σ_j)σ_j/η.
        own_slope: half the derivative of `own` in u_j/η.
    """

    start: Array
    area: Array
    mass: Array
    level: Array
    own: Array
    own_slope: Array


def places(slow: Float[Array, "m ..."], eta: Array) -> Places:
    """Positions with what is past the ends cut off, which changes nothing on [0, 1]."""
    reach = eta / 2
    alive = (slow > -reach) & (slow < 1.0 + reach)
    clipped = jnp.clip(slow, -reach, 1.0 + reach)
    return Places(clipped, -clipped / eta, (clipped - 1.0) / eta, alive)


def singles(at: Places, numbers: Numbers) -> Singles:
    """What concerns each neuron alone; O(m · jumps)."""
    eta, jumps, values = numbers
    left, right = _step.ramp(at.left), _step.ramp(at.right)
    left_step, right_step = _step.step(at.left), _step.step(at.right)
    start = at.slow + eta * (left - right)
    mass = 1.0 - left_step - right_step
    total = values[-1] - values[0]
    area = values[0] * start - total * (eta * right)
    level = values[0] * mass - total * right_step
    for k in range(jumps.shape[0]):
        height, z = values[k + 1] - values[k], (at.slow - jumps[k]) / eta
        area = area + (height * eta) * _step.ramp(z)
        level = level + height * _step.step(z)
    own = 5 / 56 + own_cut(at.left) + own_cut(at.right)
    own_slope = (left_step * (1.0 - left_step) - right_step * (1.0 - right_step)) / 2
    return Singles(start, area, jnp.where(at.alive, mass, 0.0), level, own, own_slope)


def mean_square(numbers: Numbers) -> tuple[Array, Array]:
    """∫f* and ∫f*²."""
    _, jumps, values = numbers
    ends = jnp.zeros_like(values[:1]), jnp.ones_like(values[:1])
    lengths = jnp.diff(jnp.concatenate([ends[0], jumps, ends[1]]), axis=0)
    return jnp.sum(values * lengths, axis=0), jnp.sum(values**2 * lengths, axis=0)


# --- two neurons --------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two neurons, i before j.

    Attributes:
        overlap: ∫(1 − σ_i)σ_j/η.
        before: its derivative in u_i, times η: ∫σ′_iσ_j/η.
        after: its derivative in u_j, times η: −∫(1 − σ_i)σ′_j/η.
    """

    overlap: Array
    before: Array
    after: Array


def _part(at: Places, rows: Callable[[Array], Array]) -> Places:
    return Places(*(rows(part) for part in at))


def any_reach(first: Places, second: Places) -> Bool[Array, ""]:
    """Whether an end of [0, 1] changes the overlap of any pair, `second` after `first`."""
    return jnp.any(second.left > -0.5) | jnp.any(first.right > -0.5)


def _only_if(condition: Bool[Array, ""] | bool, correction: Callable, none: Callable, *args):
    if isinstance(condition, bool):
        return (correction if condition else none)(*args)
    return jax.lax.cond(condition, correction, none, *args)


def pair(first: Places, second: Places, eta: Array, reach: Bool[Array, ""] | bool) -> Pair:
    """Overlaps of `first` with `second`, which is after it; arrays of equal shapes.

    `reach` is `any_reach` of a set of pairs with these in it: without it the corrections for the
    ends, which are then zero, cost nothing.
    """
    gap = (second.slow - first.slow) / eta
    tail = gap_tail(gap)

    def ends(first: Places, second: Places) -> Pair:
        p, q = (first.left, second.left), (first.right, second.right)
        overlap = _step.cut_mean(*p) - _step.ramp(p[1]) + _step.cut_mean(*q) - _step.ramp(q[0])
        before = _step.cut_cdf(*q) - _step.step(q[0]) - _step.cut_cdf(*p)
        after = _step.step(p[1]) - _step.cut_cdf(*p[::-1]) + _step.cut_cdf(*q[::-1])
        return Pair(overlap, before, after)

    def none(first: Places, second: Places) -> Pair:
        zero = jnp.zeros_like(first.slow + second.slow)
        return Pair(zero, zero, zero)

    cut = _only_if(reach, ends, none, first, second)
    # a step that is 1 on [0, 1] leaves nothing of 1 − σ_i, one that is 0 there nothing of σ_j
    some = (first.left < 0.5) & (second.right < 0.5)
    return Pair(
        jnp.where(some, gap_overlap(gap) + cut.overlap, 0.0),
        jnp.where(some & first.alive, tail + cut.before, 0.0),
        jnp.where(some & second.alive, cut.after - tail, 0.0),
    )


def pair_density(
    first: Places, second: Places, eta: Array, reach: Bool[Array, ""] | bool
) -> Float[Array, "..."]:
    """∫σ′_iσ′_j/η², which is symmetric."""

    def ends(first: Places, second: Places) -> Array:
        cut = _step.cut_density(first.left, second.left)
        return cut + _step.cut_density(first.right, second.right)

    def none(first: Places, second: Places) -> Array:
        return jnp.zeros_like(first.slow + second.slow)

    cut = _only_if(reach, ends, none, first, second)
    density = _step.gap_density((second.slow - first.slow) / eta) - cut
    return jnp.where(first.alive & second.alive, density / eta, 0.0)


# --- sums over pairs for one state: as many neighbours as overlap ------------------------------

# Neighbours at so many offsets are summed in one go, as long as there are any closer than η.
_GROUP = 4


def neighbours(at: Places, eta: Array) -> Int[Array, ""]:
    """The largest number of later neurons, in ascending order, closer to a neuron than η."""
    rows = jnp.arange(at.slow.shape[0])
    last = jnp.searchsorted(at.slow, at.slow + eta, side="left")
    # what is past an end overlaps with nothing
    last = jnp.minimum(last, jnp.sum(at.right < 0.5))
    return jnp.max(jnp.where(at.left < 0.5, last - rows - 1, 0))


def _over_groups(visit: Callable, total: Array, neurons: int, count: Array) -> Array:
    """`total` after `visit(total, first offset, number of offsets)` for all overlapping pairs.

    A group in which nothing overlaps is skipped. Groups are computed anew when they are
    differentiated, so that nothing of size m × neighbours is kept.
    """
    groups = -(-(neurons - 1) // _GROUP)
    if groups == 0:
        return total

    @jax.checkpoint
    def group(total: Array, offset: Array) -> Array:
        compute = partial(visit, size=_GROUP)
        return jax.lax.cond(count >= offset, compute, lambda total, _: total, total, offset)

    if groups == 1:
        return group(total, jnp.asarray(1))
    offsets = 1 + _GROUP * jnp.arange(groups)
    return jax.lax.scan(lambda total, o: (group(total, o), None), total, offsets)[0]


def _windows(x: Array, offset: Array | int, size: int, fill: float | bool) -> Array:
    """Rows i + offset + c of `x` for c < size, `[size, m]`, `fill` beyond the end."""
    rows = x.shape[0]
    padded = jnp.concatenate([x, jnp.full(rows + size, fill, x.dtype)])
    block = jax.lax.dynamic_slice_in_dim(padded, offset, rows + size)
    if size > _GROUP:
        return jax.vmap(lambda c: jax.lax.dynamic_slice_in_dim(block, c, rows))(jnp.arange(size))
    return jnp.stack([block[c : c + rows] for c in range(size)])


def _shifted_sum(x: Array, offset: Array | int, rows: int) -> Array:
    """Σ_c of row c of `x`, `[size, m]`, moved down by offset + c; `[m]`."""
    size = x.shape[0]
    block = sum(jnp.pad(x[c], (c, size - c)) for c in range(size))
    wide = jnp.zeros(2 * rows + size, x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wide, block, offset, 0)[:rows]


def _later(at: Places, offset: Array | int, size: int) -> Places:
    # beyond the last neuron: steps that are 0 on [0, 1]
    return Places(
        _windows(at.slow, offset, size, 2.0),
        _windows(at.left, offset, size, -1.0),
        _windows(at.right, offset, size, 0.5),
        _windows(at.alive, offset, size, False),
    )


class Weighted(NamedTuple):
    """Sums over all pairs for weights a, `[m]` each, the neuron itself included.

    Attributes:
        overlap: Σ_i a_i overlap_ij.
        force: Σ_i a_i ∂(overlap_ij η)/∂u_j, half of it for i = j.
    """

    overlap: Array
    force: Array


def weighted(
    at: Places, alone: Singles, weights: Float[Array, " m"], eta: Array, count: Array
) -> Weighted:
    """Sums over the neighbours of every neuron."""
    rows = weights.shape[0]
    reach = any_reach(at, _later(at, 1, 1))

    def visit(total: Array, offset: Array | int, size: int) -> Array:
        first = _part(at, lambda part: jnp.broadcast_to(part, (size, rows)))
        both = pair(first, _later(at, offset, size), eta, reach)
        later = _windows(weights, offset, size, 0.0)
        overlap = jnp.sum(both.overlap * later, axis=0)
        force = jnp.sum(both.before * later, axis=0)
        overlap += _shifted_sum(both.overlap * weights, offset, rows)
        force += _shifted_sum(both.after * weights, offset, rows)
        return total + jnp.stack([overlap, force])

    total = jnp.stack([alone.own * weights, alone.own_slope * weights])
    return Weighted(*_over_groups(visit, total, rows, count))


def _quadratic(
    at: Places, alone: Singles, weights: Float[Array, " m"], eta: Array, count: Array
) -> Float[Array, ""]:
    """Σ_ij a_i a_j overlap_ij."""
    rows = weights.shape[0]
    reach = any_reach(at, _later(at, 1, 1))

    def visit(total: Array, offset: Array | int, size: int) -> Array:
        first = _part(at, lambda part: jnp.broadcast_to(part, (size, rows)))
        both = pair(first, _later(at, offset, size), eta, reach)
        return total + 2.0 * jnp.sum(both.overlap * weights * _windows(weights, offset, size, 0.0))

    return _over_groups(visit, jnp.sum(alone.own * weights**2), rows, count)


def _sorted(fast: Array, slow: Array) -> tuple[Array, Array, Array]:
    """Weights and positions in ascending order of position, and that order."""
    order = jnp.argsort(jax.lax.stop_gradient(slow))
    return fast[1:][order], slow[order], order


def _ends(x: Float[Array, "m ..."], last: Array | float) -> Float[Array, "m2 ..."]:
    """`x` between a row of zeros and a row of `last`."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x, jnp.zeros_like(x[:1]) + last])


def loss(fast: Float[Array, " m1"], slow: Float[Array, " m"], numbers: Numbers) -> Float[Array, ""]:
    """The population loss of one state, neurons in any order; O(m · neighbours)."""
    weights, slow, _ = _sorted(fast, slow)
    at = places(slow, numbers.eta)
    alone, count = singles(at, numbers), neighbours(at, numbers.eta)
    mean, square = mean_square(numbers)
    plateaus = fast[0] + jnp.concatenate([jnp.zeros_like(fast[:1]), jnp.cumsum(weights)])
    lengths, areas = jnp.diff(_ends(alone.start, 1.0)), jnp.diff(_ends(alone.area, mean))
    pairs = numbers.eta * _quadratic(at, alone, weights, numbers.eta, count)
    return jnp.sum(plateaus * (plateaus * lengths - 2.0 * areas)) - pairs + square


def fields(
    fast: Float[Array, " m1"], slow: Float[Array, " m"], numbers: Numbers
) -> tuple[Float[Array, " m1"], Float[Array, " m"]]:
    """−∂L/∂a and −∂L/∂u of one state, neurons in any order; O(m · neighbours)."""
    weights, slow, order = _sorted(fast, slow)
    at = places(slow, numbers.eta)
    alone, count = singles(at, numbers), neighbours(at, numbers.eta)
    sums = weighted(at, alone, weights, numbers.eta, count)
    plateaus = fast[0] + jnp.concatenate([jnp.zeros_like(fast[:1]), jnp.cumsum(weights)])
    drive, misfit = velocities(plateaus, weights, alone, sums, numbers)
    # ∂L/∂a_j = Σ_{k≥j} ∂L/∂F_k
    towards = jnp.cumsum(drive[::-1])[::-1]
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
    velocity = jnp.concatenate([towards[:1], towards[1:][back]])
    return velocity, (2.0 * weights * misfit)[back]


def velocities(
    plateaus: Float[Array, "m1 ..."],
    weights: Float[Array, "m ..."],
    alone: Singles,
    sums: Weighted,
    numbers: Numbers,
) -> tuple[Float[Array, "m1 ..."], Float[Array, "m ..."]]:
    """−∂L/∂F, and E with E_j = ∫(f − f*)σ′_j/η and −∂L/∂u_j = 2a_jE_j."""
    mean, _ = mean_square(numbers)
    lengths = jnp.diff(_ends(alone.start, 1.0), axis=0)
    areas = jnp.diff(_ends(alone.area, mean), axis=0)
    overlaps = jnp.diff(_ends(sums.overlap, 0.0), axis=0)
    drive = -2.0 * (plateaus * lengths - areas + numbers.eta * overlaps)
    misfit = alone.mass * (plateaus[:-1] + plateaus[1:]) / 2 + sums.force - alone.level
    return drive, misfit


# --- the critical manifold ----------------------------------------------------------------------

# Block sizes of the block-tridiagonal Cholesky factorisation; wider bands are solved densely.
_BLOCKS = (16, 128)


def fast_band(at: Places, alone: Singles, eta: Array, width: int) -> Float[Array, "width1 m1"]:
    """Half the Hessian in F: row o has the entries (k, k + o), zero beyond the end."""
    rows = at.slow.shape[0]
    offsets = min(width, rows - 1) if rows > 1 else 0
    overlap = jnp.concatenate([alone.own[None], jnp.zeros((width + 1, rows), alone.own.dtype)])
    if offsets:
        first = _part(at, lambda part: jnp.broadcast_to(part, (offsets, rows)))
        reach = any_reach(at, _later(at, 1, 1))
        found = pair(first, _later(at, 1, offsets), eta, reach).overlap
        overlap = overlap.at[1 : offsets + 1].set(found)
    # t[o, k] = overlap of k and k + o for k = 0 … m + 1, zero for the bias and past the end
    t = jnp.pad(overlap, ((0, 0), (1, 1)))
    before = jnp.concatenate([t[1:2, :-1], t[:width, 1:]])  # (k + 1, k + o)
    band = -eta * (t[: width + 1, :-1] - before - t[1 : width + 2, :-1] + t[: width + 1, 1:])
    return band.at[0].add(jnp.diff(_ends(alone.start, 1.0)))


def _blocks_solver(
    band: Float[Array, "width1 n"], size: int, shift: Array
) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
    """Solve with the band matrix of half-bandwidth ≤ size by blocks of that size."""
    n = band.shape[1]
    count = -(-n // size)
    band = jnp.pad(band[: size + 1], ((0, 0), (0, count * size - n)))
    # rows past the end are those of the identity
    diagonal = band[0] + jnp.where(jnp.arange(count * size) < n, shift, 1.0)
    band = band.at[0].set(diagonal)
    row, column = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    starts = size * np.arange(count)[:, None, None]
    own = band[np.abs(row - column), starts + np.minimum(row, column)]
    # the block below block b: row (b + 1) size + i, column b size + j
    below = size + row - column
    under = jnp.where(below <= size, band[np.minimum(below, size), starts + column], 0.0)

    def factor(carry: tuple[Array, Array], blocks: tuple[Array, Array]) -> tuple:
        schur, _ = carry
        here, lower = blocks
        chol = jnp.linalg.cholesky(here - schur)
        side = jax.scipy.linalg.solve_triangular(chol, lower.T, lower=True)
        return (side.T @ side, side), (chol, side)

    zero = jnp.zeros((size, size), band.dtype)
    _, (chols, sides) = jax.lax.scan(factor, (zero, zero), (own, under))

    def solve(right: Array) -> Array:
        right = jnp.pad(right, (0, count * size - n)).reshape(count, size)

        def forward(carry: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            chol, side, b = block
            y = jax.scipy.linalg.solve_triangular(chol, b - carry, lower=True)
            return side.T @ y, y

        def backward(carry: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            chol, side, y = block
            x = jax.scipy.linalg.solve_triangular(chol, y - side @ carry, lower=True, trans=1)
            return x, x

        start = jnp.zeros(size, right.dtype)
        _, y = jax.lax.scan(forward, start, (chols, sides, right))
        _, x = jax.lax.scan(backward, start, (chols, sides, y), reverse=True)
        return x.reshape(-1)[:n]

    return solve


class Normal(NamedTuple):
    """The normal equations of the plateau values, ½ ∂²L/∂F² F = areas, of one state.

    Attributes:
        matvec: the product with ½ ∂²L/∂F², O(m · neighbours) and differentiable.
        with_solver: `with_solver(use, *args)` is `use(solve, *args)`, where `solve` solves with
            one factorisation; it is not to be differentiated.
        areas: the right-hand side, `[m + 1]`.
    """

    matvec: Callable[[Array], Array]
    with_solver: Callable[..., Array]
    areas: Array


def normal_equations(slow: Float[Array, " m"], numbers: Numbers) -> Normal:
    """The normal equations for neurons in ascending order.

    They are factorised by Cholesky with a shift of a few ulp, taken out again by refinement;
    the factorisation is a band of blocks of 16 or 128 rows, or dense if neurons overlap with
    more neighbours than that.
    """
    eta = numbers.eta
    at = places(slow, eta)
    alone, count = singles(at, numbers), neighbours(at, eta)
    mean, _ = mean_square(numbers)
    lengths, areas = jnp.diff(_ends(alone.start, 1.0)), jnp.diff(_ends(alone.area, mean))

    def matvec(plateaus: Array) -> Array:
        sums = weighted(at, alone, jnp.diff(plateaus), eta, count)
        return plateaus * lengths + eta * jnp.diff(_ends(sums.overlap, 0.0))

    fixed = jax.lax.stop_gradient((at, alone, eta))
    n = areas.shape[0]
    sizes = [size for size in _BLOCKS if size < n]

    def refined(solve: Callable[[Array], Array], right: Array) -> Array:
        at, alone, eta = fixed
        lengths = jnp.diff(_ends(alone.start, 1.0))

        def correct(_: int, solution: Array) -> Array:
            sums = weighted(at, alone, jnp.diff(solution), eta, count)
            product = solution * lengths + eta * jnp.diff(_ends(sums.overlap, 0.0))
            return solution + solve(right - product)

        return jax.lax.fori_loop(0, 4, correct, jnp.zeros_like(right))

    def with_blocks(use: Callable, size: int, *args: Array) -> Array:
        at, alone, eta = fixed
        band = fast_band(at, alone, eta, size)
        solve = _blocks_solver(band, size, _shift(jnp.sum(band[0])))
        return use(partial(refined, solve), *args)

    def with_matrix(use: Callable, *args: Array) -> Array:
        at, alone, eta = fixed
        band = fast_band(at, alone, eta, n - 1)
        # rows moved right by their number, by reading the padded rows in a shorter stride
        skewed = jnp.pad(band.T, ((0, 0), (0, n))).reshape(-1)[: n * (2 * n - 1)]
        upper = skewed.reshape(n, 2 * n - 1)[:, :n]
        matrix = upper + upper.T - jnp.diag(band[0])
        shifted = matrix + _shift(jnp.trace(matrix)) * jnp.eye(n, dtype=matrix.dtype)
        factor = jax.scipy.linalg.cho_factor(shifted)
        return use(partial(refined, partial(jax.scipy.linalg.cho_solve, factor)), *args)

    def with_solver(use: Callable, *args: Array) -> Array:
        branches = [partial(with_blocks, use, size) for size in sizes]
        # half-bandwidth: neighbours and one more
        which = sum((count + 1 > size).astype(int) for size in sizes) if sizes else 0
        return jax.lax.switch(which, [*branches, partial(with_matrix, use)], *args)

    return Normal(matvec, with_solver, areas)


def _shift(trace: Array) -> Array:
    return 8.0 * jnp.finfo(trace.dtype).eps * trace


def critical(slow: Float[Array, " m"], numbers: Numbers) -> Float[Array, " m1"]:
    """a*(u) = argmin_a L of one state, neurons in any order; O(m) for few neighbours.

    Where neurons coincide the minimiser is not unique; this is the one of least norm.
    """
    order = jnp.argsort(jax.lax.stop_gradient(slow))
    slow = slow[order]
    normal = normal_equations(slow, numbers)

    def solved(_: Callable, right: Array) -> Array:
        return normal.with_solver(lambda solve, right: solve(right), right)

    plateaus = jax.lax.custom_linear_solve(normal.matvec, normal.areas, solved, symmetric=True)
    weights = jnp.diff(plateaus, prepend=0.0)
    # steps that are equal on [0, 1] to rounding (the bias is one at −η/2) share their weight
    # evenly, and a step that is 0 there has none
    at = places(slow, numbers.eta)
    positions = jnp.concatenate([-numbers.eta / 2 * jnp.ones_like(slow[:1]), at.slow])
    gaps = jnp.diff(jax.lax.stop_gradient(positions))
    new = gaps > 64.0 * jnp.finfo(slow.dtype).eps
    group = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(new.astype(int))])
    n = group.shape[0]
    size = jax.ops.segment_sum(jnp.ones_like(weights), group, n, indices_are_sorted=True)
    total = jax.ops.segment_sum(weights, group, n, indices_are_sorted=True)
    shared = (total / jnp.maximum(size, 1.0))[group]
    shared = jnp.where(positions < 1.0 + numbers.eta / 2, shared, 0.0)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
    return jnp.concatenate([shared[:1], shared[1:][back]])


# Lanczos steps for the extreme eigenvalues of the Gram matrix.
_LANCZOS_STEPS = 48


def condition(slow: Float[Array, " m"], numbers: Numbers) -> Float[Array, ""]:
    """The condition number of ∫σ_iσ_j of one state by Lanczos iteration, O(m).

    The smallest eigenvalue is that of the inverse, with the factorisation of `normal_equations`;
    infinite where it is not resolved, as for coincident neurons.
    """
    order = jnp.argsort(jax.lax.stop_gradient(slow))
    normal = normal_equations(slow[order], numbers)

    # in plateau values the Gram matrix is Cᵀ A C with C the cumulative sum
    def gram(weights: Array) -> Array:
        return jnp.cumsum(normal.matvec(jnp.cumsum(weights))[::-1])[::-1]

    n = slow.shape[0] + 1

    def smallest(solve: Callable[[Array], Array]) -> Array:
        def inverse(right: Array) -> Array:
            return jnp.diff(solve(-jnp.diff(right, append=0.0)), prepend=0.0)

        return _extreme(inverse, n, slow.dtype)

    largest, vector = _extreme(gram, n, slow.dtype), normal.with_solver(smallest)
    top, bottom = largest @ gram(largest), vector @ gram(vector)
    resolved = bottom > jnp.finfo(slow.dtype).eps * top
    return jnp.where(resolved | jnp.isnan(bottom), top / jnp.where(resolved, bottom, 1.0), jnp.inf)


def _extreme(matvec: Callable[[Array], Array], n: int, dtype: np.dtype) -> Float[Array, " n"]:
    """The unit eigenvector of the eigenvalue of largest size, by Lanczos with reorthogonalisation.

    Its start is a fixed vector with a share of every eigenvector in practice.
    """
    steps = min(_LANCZOS_STEPS, n)
    start = jnp.asarray(np.random.default_rng(0).standard_normal(n), dtype)

    def body(k: int, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        basis, projected, vector, scale = carry
        basis = basis.at[k].set(vector)
        image = matvec(vector)
        row = basis @ image
        projected = projected.at[k].set(row)
        image = image - basis.T @ (basis @ image)
        image = image - basis.T @ (basis @ image)
        # once the space is exhausted the rest is zero
        norm = jnp.linalg.norm(image)
        scale = jnp.maximum(scale, jnp.abs(row[k]))
        small = norm <= 64.0 * jnp.finfo(dtype).eps * scale
        image = jnp.where(small, 0.0, image / jnp.where(small, 1.0, norm))
        return basis, projected, image, scale

    carry = (
        jnp.zeros((steps, n), dtype),
        jnp.zeros((steps, steps), dtype),
        start / jnp.linalg.norm(start),
        jnp.zeros((), dtype),
    )
    basis, projected, _, _ = jax.lax.fori_loop(0, steps, body, carry)
    lower = jnp.tril(projected)
    _, vectors = jnp.linalg.eigh(lower + jnp.tril(projected, -1).T)
    vector = basis.T @ vectors[:, -1]

    def unit(vector: Array) -> Array:
        return vector / jnp.linalg.norm(vector)

    # where the eigenvalues span all digits the basis alone is not accurate enough
    return jax.lax.fori_loop(0, 2, lambda _, vector: unit(matvec(vector)), unit(vector))
