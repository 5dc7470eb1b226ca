"""The univariate flow and its limit by Rodas5P on plateau values, many lanes at a time, in JAX.

In the coordinates y = (F_0, u_1, F_1, …, u_m, F_m) of `_plateau` the flow is M y′ = −∇L with the
tridiagonal mass ε BᵀB on F (B: differences) and 1 on u. A stage of Rodas5P solves
S k_i = −∇L(y_i) + M Σ_j C_ij k_j/h with S = M/(γh) + ∇²L, a symmetric band that one LDLᵀ
factorisation per step serves. ε → 0 gives the reduced flow: an index-1 differential-algebraic
system, for which the method is stiffly accurate.

A lane is one start with one ε. Some (`LANES`) of them move together, lanes last, each with its own
step size, and one that ends takes the next start from the queue, so that the work is the sum over
lanes. Neurons are kept in ascending order and sorted again after a step in which some crossed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tts_jax import _rosenbrock as rodas
from tts_jax._problem import State
from tts_jax._trajectory import Status
from tts_jax.checks import inside_trace, is_traced
from tts_jax.problems import _plateau
from tts_jax.problems._plateau import Numbers, Pair, Places, Singles, Weighted


# Lanes that move together: enough that a call of a small kernel costs little per lane. On a CPU
# more would be spread over threads, which takes longer than to compute them.
LANES, LANES_CPU = 128, 16
# Neighbours that are summed (and those of them in the matrix of the stages); a lane in which more
# overlap begins anew with the next, and with all neighbours and a dense matrix in the end. A
# matrix without the second neighbour's small entries costs no steps.
BANDS = ((2, 1), (4, 3), (8, 8), (16, 16))
# Mass of the plateau values in the limit, far below rounding where they are determined.
_NO_MASS = 1e-18
_NARROW = -1  # a lane in which more neighbours overlap than were summed
_SAFETY, _SLOWER, _FASTER = 0.9, 0.2, 10.0


class Width(NamedTuple):
    """How many neighbours are summed, and how many of them are in the matrix; all if `dense`."""

    summed: int
    matrix: int
    dense: bool


def widths(neurons: int) -> list[Width]:
    """The bandwidths that lanes are tried with, the last of which holds every pair."""
    chosen = [Width(k, j, False) for k, j in BANDS if k < neurons - 1]
    rest = neurons - 1
    return [*chosen, Width(rest, rest, rest > BANDS[0][0])]


# --- right-hand side and matrix -----------------------------------------------------------------


def _down(x: Array, by: int) -> Array:
    """Rows moved down by `by`, zeros on top."""
    return jnp.concatenate([jnp.zeros_like(x[:by]), x[: x.shape[0] - by]]) if by else x


def _up(x: Array, by: int) -> Array:
    return jnp.concatenate([x[by:], jnp.zeros_like(x[:by])]) if by else x


def _rows(at: Places, rows: Any) -> Places:
    return Places(*(part[rows] for part in at))


def _pairs(at: Places, eta: Array, width: Width, ends: Any) -> tuple[list[Pair], list[tuple]]:
    """Pairs at offsets 1 … K, the rows of the first of them, or all pairs as a matrix."""
    m = at.slow.shape[0]
    if width.dense:
        first, second = np.triu_indices(m, 1)
        return [_plateau.pair(_rows(at, first), _rows(at, second), eta, ends)], [(first, second)]
    places = [(slice(0, m - o), slice(o, m)) for o in range(1, width.summed + 1)]
    return [_plateau.pair(_rows(at, i), _rows(at, j), eta, ends) for i, j in places], places


def _sums(
    weights: Array, alone: Singles, pairs: list[Pair], places: list[tuple], ones: Array
) -> Weighted:
    # each is used at both ends of its pair; see `_factorise` for the division
    pairs = [Pair(*(part / ones for part in both)) for both in pairs]
    overlap, force = alone.own * weights, alone.own_slope * weights
    for both, (first, second) in zip(pairs, places, strict=True):
        before, after = both.overlap * weights[second], both.overlap * weights[first]
        push, pull = both.before * weights[second], both.after * weights[first]
        if isinstance(first, slice):
            o = second.start
            pad = jnp.zeros_like(weights[:o])
            overlap += jnp.concatenate([before, pad]) + jnp.concatenate([pad, after])
            force += jnp.concatenate([push, pad]) + jnp.concatenate([pad, pull])
        else:
            overlap = overlap.at[first].add(before).at[second].add(after)
            force = force.at[first].add(push).at[second].add(pull)
    return Weighted(overlap, force)


def _reach(at: Places, width: Width) -> Bool[Array, ""]:
    if width.summed == 0:
        return jnp.zeros((), bool)
    if width.dense:
        return jnp.any(at.left > -0.5) | jnp.any(at.right > -0.5)
    return jnp.any(at.left[1:] > -0.5) | jnp.any(at.right[:-1] > -0.5)


def _gradient(y: Array, numbers: Numbers, width: Width, ones: Array) -> Array:
    """−∂L/∂y, `[2m + 1, lanes]`."""
    at = _plateau.places(y[1::2], numbers.eta)

    def compute(y: Array, at: Places, numbers: Numbers, ones: Array, ends: bool) -> Array:
        plateaus = y[0::2]
        weights = plateaus[1:] - plateaus[:-1]
        alone = _plateau.singles(at, numbers)
        pairs, places = _pairs(at, numbers.eta, width, ends)
        sums = _sums(weights, alone, pairs, places, ones)
        drive, misfit = _plateau.velocities(plateaus, weights, alone, sums, numbers)
        return _interleaved(drive, 2.0 * weights * misfit)

    with_ends, without = partial(compute, ends=True), partial(compute, ends=False)
    return jax.lax.cond(_reach(at, width), with_ends, without, y, at, numbers, ones)


def _interleaved(plateaus: Array, slow: Array) -> Array:
    both = jnp.stack([plateaus[:-1], slow], axis=1).reshape(-1, *slow.shape[1:])
    return jnp.concatenate([both, plateaus[-1:]])


def _loss(y: Array, numbers: Numbers, width: Width) -> Float[Array, " lanes"]:
    """The loss of lanes."""
    plateaus, at = y[0::2], _plateau.places(y[1::2], numbers.eta)
    weights = plateaus[1:] - plateaus[:-1]
    alone = _plateau.singles(at, numbers)
    mean, square = _plateau.mean_square(numbers)
    total = jnp.sum(alone.own * weights**2, axis=0)
    pairs, places = _pairs(at, numbers.eta, width, _reach(at, width))
    for both, (first, second) in zip(pairs, places, strict=True):
        total += 2.0 * jnp.sum(both.overlap * weights[first] * weights[second], axis=0)
    lengths = jnp.diff(_plateau._ends(alone.start, 1.0), axis=0)
    areas = jnp.diff(_plateau._ends(alone.area, mean), axis=0)
    fit = jnp.sum(plateaus * (plateaus * lengths - 2.0 * areas), axis=0)
    return fit - numbers.eta * total + square


def _fast_hessian(
    alone: Singles, pairs: list[Pair], eta: Array, matrix: int
) -> list[Float[Array, "m1 lanes"]]:
    """½ ∂²L/∂F²: entries (k, k + o) for o = 0 … matrix + 1, `[m + 1, lanes]`, indexed by k."""
    zero = jnp.zeros_like(alone.own[:1])
    own = jnp.concatenate([zero, alone.own, zero])
    t = [own]
    for o in range(1, matrix + 3):
        if o <= matrix:
            pad = jnp.zeros_like(alone.own[:o])
            t.append(jnp.concatenate([zero, pairs[o - 1].overlap, pad, zero]))
        else:
            t.append(jnp.zeros_like(own))
    gaps = jnp.diff(_plateau._ends(alone.start, 1.0), axis=0)
    band = []
    for o in range(matrix + 2):
        before = t[1][:-1] if o == 0 else t[o - 1][1:]
        entry = -eta * (t[o][:-1] - before - t[o + 1][:-1] + t[o][1:])
        band.append(entry + gaps if o == 0 else entry)
    return band


def _slow_curvature(
    plateaus: Array, weights: Array, at: Places, pull: Array, numbers: Numbers
) -> Array:
    """∂²L/∂u_j² with `pull` = Σ_{i≠j} a_i ∫σ′_iσ′_j/η²."""
    eta, jumps, values = numbers
    left, right = _step_bumps(at)
    at_0 = plateaus[0] + jnp.sum(weights * _plateau._step.step(at.left), axis=0) - values[0]
    at_1 = plateaus[-1] - jnp.sum(weights * _plateau._step.step(at.right), axis=0) - values[-1]
    curvature = at_1 * right - at_0 * left
    for k in range(jumps.shape[0]):
        bump = _plateau._step.bump((jumps[k] - at.slow) / eta)
        curvature = curvature + (values[k + 1] - values[k]) * bump
    return 2.0 * weights * jnp.where(at.alive, curvature / eta - pull, 0.0)


def _step_bumps(at: Places) -> tuple[Array, Array]:
    return _plateau._step.bump(at.left), _plateau._step.bump(at.right)


def _hessian(y: Array, numbers: Numbers, width: Width) -> Array:
    """∂²L/∂y²: entries (r, r − d), `[2K + 3, n, lanes]`; if dense `[n, n, lanes]`."""
    at = _plateau.places(y[1::2], numbers.eta)
    build = _dense_hessian if width.dense else _band_hessian
    with_ends = partial(build, width=width, ends=True)
    without = partial(build, width=width, ends=False)
    return jax.lax.cond(_reach(at, width), with_ends, without, y, at, numbers)


def _band_hessian(y: Array, at: Places, numbers: Numbers, width: Width, ends: bool) -> Array:
    eta = numbers.eta
    plateaus = y[0::2]
    weights = plateaus[1:] - plateaus[:-1]
    m = weights.shape[0]
    alone = _plateau.singles(at, numbers)
    pairs, places = _pairs(at, eta, width, ends)
    ones = jnp.ones_like(y[0])
    sums = _sums(weights, alone, pairs, places, ones)
    _, misfit = _plateau.velocities(plateaus, weights, alone, sums, numbers)
    near = width.matrix
    fast = [2.0 * entry for entry in _fast_hessian(alone, pairs, eta, near)]
    # D[s] by row j: η ∂overlap(j, j + s)/∂u_j
    zero = jnp.zeros_like(weights)
    slope = {0: alone.own_slope, near + 1: zero, -near - 1: zero}
    pull, slow = zero, []
    for o in range(1, width.summed + 1):
        first, second = places[o - 1]
        density = _plateau.pair_density(_rows(at, first), _rows(at, second), eta, ends)
        pad = jnp.zeros_like(weights[:o])
        pull += jnp.concatenate([density * weights[second], pad])
        pull += jnp.concatenate([pad, density * weights[first]])
        if o <= near:
            slope[o] = jnp.concatenate([pairs[o - 1].before, pad])
            slope[-o] = jnp.concatenate([pad, pairs[o - 1].after])
            slow.append(jnp.concatenate([2.0 * weights[first] * weights[second] * density, pad]))
    slow.insert(0, _slow_curvature(plateaus, weights, at, pull, numbers))
    # mixed[t] by row j: ∂²L/∂F_{j+t}∂u_j
    mixed = {}
    for t in range(-near - 1, near + 1):
        entry = slope[t] - slope[t + 1]
        if t in (-1, 0):
            entry = entry + alone.mass / 2
        entry = -2.0 * weights * entry
        mixed[t] = entry + (-2.0 * misfit if t == 0 else 2.0 * misfit if t == -1 else 0.0)
    band = []
    for d in range(2 * near + 3):
        o = d // 2
        if d % 2 == 0:
            ours = _down(fast[o], o)
            theirs = _down(slow[o], o) if o <= near else zero
        else:
            # (F_k, u_{k−o}): mixed[o] of row j = k − o ≥ 1, j = k = 0 does not exist
            ours = _down(jnp.concatenate([zero[:1], mixed[o]]) if o <= near else zero, o)
            # (u_j, F_{j−o−1})
            theirs = mixed[-o - 1] * (jnp.arange(m) >= o)[:, None]
        band.append(_interleaved(ours, theirs))
    return jnp.stack(band)


def _dense_hessian(y: Array, at: Places, numbers: Numbers, width: Width, ends: bool) -> Array:
    eta = numbers.eta
    plateaus = y[0::2]
    weights = plateaus[1:] - plateaus[:-1]
    m, lanes = weights.shape
    alone = _plateau.singles(at, numbers)
    pairs, places = _pairs(at, eta, width, ends)
    ones = jnp.ones_like(y[0])
    sums = _sums(weights, alone, pairs, places, ones)
    _, misfit = _plateau.velocities(plateaus, weights, alone, sums, numbers)
    (both,), ((i, j),) = pairs, places
    own = np.arange(m)
    overlap = jnp.zeros((m + 2, m + 2, lanes)).at[own + 1, own + 1].set(alone.own)
    overlap = overlap.at[i + 1, j + 1].set(both.overlap).at[j + 1, i + 1].set(both.overlap)
    fast = -2.0 * eta * jnp.diff(jnp.diff(overlap, axis=0), axis=1)
    gaps = jnp.diff(_plateau._ends(alone.start, 1.0), axis=0)
    # the second difference has the sign of (k, l) + (k + 1, l + 1) − …
    fast = fast.at[np.arange(m + 1), np.arange(m + 1)].add(2.0 * gaps)
    slope = jnp.zeros((m, m + 2, lanes)).at[own, own + 1].set(alone.own_slope)
    slope = slope.at[i, j + 1].set(both.before).at[j, i + 1].set(both.after)
    mixed = slope[:, :-1] - slope[:, 1:]
    mixed = mixed.at[own, own].add(alone.mass / 2).at[own, own + 1].add(alone.mass / 2)
    mixed = -2.0 * weights[:, None] * mixed
    mixed = mixed.at[own, own].add(2.0 * misfit).at[own, own + 1].add(-2.0 * misfit)
    density = _plateau.pair_density(_rows(at, i), _rows(at, j), eta, ends)
    full = jnp.zeros((m, m, lanes)).at[i, j].set(density).at[j, i].set(density)
    pull = jnp.sum(full * weights, axis=1)
    slow = 2.0 * weights[:, None] * weights * full
    curvature = _slow_curvature(plateaus, weights, at, pull, numbers)
    slow = slow.at[own, own].add(curvature)
    f, u = np.arange(0, 2 * m + 1, 2), np.arange(1, 2 * m + 1, 2)
    matrix = jnp.zeros((2 * m + 1, 2 * m + 1, lanes))
    matrix = matrix.at[np.ix_(f, f)].set(fast).at[np.ix_(u, u)].set(slow)
    return matrix.at[np.ix_(u, f)].set(mixed).at[np.ix_(f, u)].set(jnp.swapaxes(mixed, 0, 1))


def _mass_times(vector: Array, epsilon: Array, inertia: Array) -> Array:
    """M times a vector, `[2m + 1, lanes]`."""
    plateaus = vector[0::2]
    steps = jnp.concatenate([plateaus[:1], plateaus[1:] - plateaus[:-1]])
    return _interleaved(epsilon * (steps - _up(steps, 1)), inertia * vector[1::2])


def _with_mass(hessian: Array, width: Width, scale: Array, epsilon: Array, inertia: Array) -> Array:
    """∇²L + M · scale."""
    m, lanes = inertia.shape
    twice = jnp.concatenate([jnp.full((m, lanes), 2.0), jnp.ones((1, lanes))])
    diagonal = _interleaved(twice * epsilon * scale, inertia * scale)
    side = _interleaved(
        jnp.concatenate([jnp.zeros((1, lanes)), jnp.ones((m, lanes))]) * (-epsilon * scale),
        jnp.zeros((m, lanes)),
    )
    if not width.dense:
        return jnp.concatenate(
            [(hessian[0] + diagonal)[None], hessian[1:2], (hessian[2] + side)[None], hessian[3:]]
        )
    n = 2 * m + 1
    rows = np.arange(n)
    hessian = hessian.at[rows, rows].add(diagonal)
    hessian = hessian.at[rows[2:], rows[:-2]].add(side[2:])
    return hessian.at[rows[:-2], rows[2:]].add(side[2:])


# --- the linear solves --------------------------------------------------------------------------

# Rows that are eliminated in one straight line, and as a multiple of the bandwidth at least: more
# of them take longer to compile.
_BLOCK = 8


class Factor(NamedTuple):
    """A factorised matrix: LDLᵀ of a band in blocks of rows, or LU."""

    parts: tuple[Array, ...]


def _blocking(n: int, b: int) -> tuple[int, int]:
    """Rows of a block, which must hold the bandwidth, and number of blocks."""
    size = min(max(_BLOCK, b), n)
    return size, -(-n // size)


def _factorise(matrix: Array, ones: Array) -> Factor:
    """LDLᵀ without pivoting, of a band `[b + 1, n, lanes]`.

    C = LD is kept, so that both substitutions end in a division. XLA would compute values with
    several consumers again in each, hence recursively; it never repeats a division, and so what
    is used again is divided by `ones`.
    """
    b, n, lanes = matrix.shape[0] - 1, matrix.shape[1], matrix.shape[2]
    size, count = _blocking(n, b)
    filler = jnp.zeros((b + 1, size * count - n, lanes)).at[0].set(1.0)
    blocks = jnp.concatenate([matrix, filler], axis=1).reshape(b + 1, count, size, lanes)

    def block(carry: tuple[Array, Array], rows: Array) -> tuple[Any, Any]:
        # L and D of the b rows before, by offset and row
        lower = {(-b + i, d): carry[0][i, d - 1] for i in range(b) for d in range(1, b + 1)}
        pivot = {-b + i: carry[1][i] for i in range(b)}
        scaled = {}
        for r in range(size):
            for d in range(b, 0, -1):
                c = r - d
                value = rows[d, r]
                for k in range(d + 1, b + 1):  # columns r − k, left of c
                    if k - d <= b:
                        value = value - scaled[r, k] * lower[c, k - d]
                scaled[r, d] = value / ones
            for d in range(1, b + 1):
                lower[r, d] = scaled[r, d] / pivot[r - d]
            value = rows[0, r]
            for d in range(1, b + 1):
                value = value - scaled[r, d] * lower[r, d]
            pivot[r] = value / ones
        last = range(size - b, size)
        new = jnp.stack([jnp.stack([lower[r, d] for d in range(1, b + 1)]) for r in last])
        carry = new, jnp.stack([pivot[r] for r in last])
        found = jnp.stack([scaled[r, d] for r in range(size) for d in range(1, b + 1)])
        return carry, (found, jnp.stack([pivot[r] for r in range(size)]))

    start = jnp.zeros((b, b, lanes)), jnp.ones((b, lanes))
    blocks = jnp.swapaxes(blocks, 0, 1)
    if count == 1:
        _, (scaled, pivot) = block(start, blocks[0])
        return Factor((scaled[None], pivot[None]))
    return Factor(jax.lax.scan(block, start, blocks)[1])


def _substitute(factor: Factor, right: Array) -> Array:
    """Solve with the factors for one right-hand side `[n, lanes]`."""
    scaled, pivot = factor.parts
    count, size, lanes = pivot.shape
    b = scaled.shape[1] // size
    n = right.shape[0]
    right = jnp.concatenate([right, jnp.zeros((size * count - n, lanes))])
    right = right.reshape(count, size, lanes)

    def forward(carry: Array, parts: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        scaled, pivot, right = parts
        z = {-b + i: carry[i] for i in range(b)}
        for r in range(size):
            value = right[r]
            for d in range(1, b + 1):
                if count > 1 or r >= d:
                    value = value - scaled[r * b + d - 1] * z[r - d]
            z[r] = value / pivot[r]
        return jnp.stack([z[r] for r in range(size - b, size)]), jnp.stack(
            [z[r] for r in range(size)]
        )

    def backward(carry: tuple[Array, Array], parts: tuple[Array, ...]) -> tuple[Any, Array]:
        # the solution and the factors of the b rows after
        after, factors = carry
        scaled, pivot, z = parts
        x = {size + i: after[i] for i in range(b)}
        for r in reversed(range(size)):
            value = z[r] * pivot[r]
            for d in range(1, b + 1):
                if r + d < size:
                    value = value - scaled[(r + d) * b + d - 1] * x[r + d]
                elif count > 1:
                    value = value - factors[(r + d - size) * b + d - 1] * x[r + d]
            x[r] = value / pivot[r]
        carry = jnp.stack([x[r] for r in range(b)]), scaled[: b * b]
        return carry, jnp.stack([x[r] for r in range(size)])

    start = jnp.zeros((b, lanes))
    after = start, jnp.zeros((b * b, lanes))
    if count == 1:
        _, z = forward(start, (scaled[0], pivot[0], right[0]))
        return backward(after, (scaled[0], pivot[0], z))[1]
    _, z = jax.lax.scan(forward, start, (scaled, pivot, right))
    _, x = jax.lax.scan(backward, after, (scaled, pivot, z), reverse=True)
    return x.reshape(-1, lanes)[:n]


def _band_times(band: Array, vector: Array) -> Array:
    """The product of a symmetric band with a vector."""
    total = band[0] * vector
    for d in range(1, band.shape[0]):
        total = total + band[d] * _down(vector, d)
        total = total + _up(band[d], d) * _up(vector, d)
    return total


# --- one step -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What all lanes share.

    Attributes:
        numbers: the numbers of the problem.
        slow_scale: the length of the slow variable that weighs like 1 of the fast one in errors.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step.
        tau: recorded times, `[T]`.
        max_steps: step limit of a lane.
    """

    numbers: Numbers
    slow_scale: Array
    rtol: Array
    atol: Array
    tau: Array
    max_steps: Array


class Start(NamedTuple):
    """Starts in ascending order of position, lanes first.

    Attributes:
        plateaus: F, `[lanes, m + 1]`.
        slow: u, `[lanes, m]`.
        label: the neuron at each place, counted from 0, `[lanes, m]`.
        inertia: how many neurons of the problem it stands for, `[lanes, m]`.
        epsilon: `[lanes]`; the limit, which starts from a*(u), where it is 0.
    """

    plateaus: Array
    slow: Array
    label: Array
    inertia: Array
    epsilon: Array


class Step(NamedTuple):
    """One attempt.

    Attributes:
        end: y at its end, `[n, lanes]`.
        stages: the eight stages k, `[8, n, lanes]`.
        low: the least value of each position over the stages, `[m, lanes]`.
        high: the largest.
    """

    end: Array
    stages: Array
    low: Array
    high: Array


def _attempt(
    y: Array,
    h: Array,
    epsilon: Array,
    inertia: Array,
    ones: Array,
    numbers: Numbers,
    width: Width,
    *,
    differentiable: bool = False,
) -> Step:
    """A step of Rodas5P of all lanes."""
    mass = jnp.where(epsilon > 0, epsilon, _NO_MASS)
    matrix = _hessian(y, numbers, width)
    matrix = _with_mass(matrix, width, 1.0 / (rodas.GAMMA * h), mass, inertia)
    still = jax.lax.stop_gradient(matrix)
    if width.dense:
        lanes_first = jnp.moveaxis(still, -1, 0)
        factor: Any = jax.scipy.linalg.lu_factor(lanes_first)

        def times(vector: Array) -> Array:
            return jnp.einsum("ijl,jl->il", matrix, vector)

        def solved(right: Array) -> Array:
            return jax.scipy.linalg.lu_solve(factor, right.T[..., None])[..., 0].T
    else:
        factor = _factorise(still, ones)

        def times(vector: Array) -> Array:
            return _band_times(matrix, vector)

        def solved(right: Array) -> Array:
            return _substitute(factor, right)

    a, c = jnp.asarray(rodas.A), jnp.asarray(rodas.C)

    def stage(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        stages, low, high = carry
        here = y + _combined(a[i], stages)
        right = _gradient(here, numbers, width, ones)
        right = right + _mass_times(_combined(c[i], stages) / h, mass, inertia)
        if differentiable:
            k = jax.lax.custom_linear_solve(times, right, lambda _, b: solved(b), symmetric=True)
        else:
            k = solved(right)
        place = jax.lax.stop_gradient(here[1::2])
        low, high = jnp.minimum(low, place), jnp.maximum(high, place)
        return jax.lax.dynamic_update_index_in_dim(stages, k, i, 0), low, high

    place = jax.lax.stop_gradient(y[1::2])
    carry = jnp.zeros((8, *y.shape)), place, place
    stages, low, high = jax.lax.fori_loop(0, 8, stage, carry)
    end = y + _combined(jnp.asarray(rodas.B), stages)
    place = jax.lax.stop_gradient(end[1::2])
    return Step(end, stages, jnp.minimum(low, place), jnp.maximum(high, place))


def _combined(coefficients: Array, stages: Array) -> Array:
    total = coefficients[0] * stages[0]
    for j in range(1, 8):
        total = total + coefficients[j] * stages[j]
    return total


def _weights(y: Array) -> Array:
    """a, `[m + 1, lanes]`."""
    return jnp.concatenate([y[:1], y[2::2] - y[:-2:2]])


def _norm(value: Array, first: Array, second: Array, epsilon: Array, setting: Setting) -> Array:
    """Size of `value`, `[n, lanes]`, in units of the tolerance at two states, as `ErrorNorm`."""

    def scaled(value: Array, first: Array, second: Array) -> Array:
        size = jnp.maximum(jnp.abs(first), jnp.abs(second))
        return value / (setting.atol + setting.rtol * size)

    slow = scaled(value[1::2], first[1::2], second[1::2])
    slow = jnp.max(jnp.abs(slow), axis=0) / setting.slow_scale
    fast = scaled(_weights(value), _weights(first), _weights(second))
    fast = jnp.sqrt(jnp.sum(fast**2, axis=0) / fast.shape[0])
    return jnp.where(epsilon > 0, jnp.maximum(slow, fast), slow)


def _velocity(y: Array, epsilon: Array, inertia: Array, numbers: Numbers, width: Width) -> Array:
    """dy/dτ; in the limit 0 for the plateaus."""
    gradient = _gradient(y, numbers, width, jnp.ones_like(y[0]))
    fast = jnp.cumsum(jnp.cumsum(gradient[0::2][::-1], axis=0)[::-1], axis=0)
    fast = jnp.where(epsilon > 0, fast / jnp.where(epsilon > 0, epsilon, 1.0), 0.0)
    return _interleaved(fast, gradient[1::2] / inertia)


def _first_step(
    y: Array, epsilon: Array, inertia: Array, setting: Setting, width: Width
) -> Float[Array, " lanes"]:
    """The first step size by Hairer, Nørsett & Wanner I, II.4, as Diffrax chooses it."""
    d0 = _norm(y, y, y, epsilon, setting)

    def probe(_: int, carry: tuple) -> tuple:
        # first the velocity at y, then the one a small step h0 away
        _, velocity, (_, before), (_, h0) = carry
        moved = _velocity(y + h0 * velocity, epsilon, inertia, setting.numbers, width)
        d1 = _norm(moved, y, y, epsilon, setting)
        tiny = (d0 < 1e-5) | (d1 < 1e-5)
        new = jnp.where(tiny, 1e-6, 0.01 * d0 / jnp.where(tiny, 1.0, d1))
        return velocity, moved, (before, d1), (h0, new)

    zero = jnp.zeros_like(y)
    start = zero, zero, (d0, d0), (jnp.zeros_like(d0), jnp.zeros_like(d0))
    velocity, moved, (d1, _), (h0, _) = jax.lax.fori_loop(0, 2, probe, start)
    d2 = _norm(moved - velocity, y, y, epsilon, setting) / h0
    most = jnp.maximum(d1, d2)
    flat = most <= 1e-15
    h1 = jnp.where(
        flat, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.where(flat, 1.0, most)) ** (1 / 5)
    )
    return jnp.minimum(100 * h0, h1)


def _fast_optimum(slow: Array, numbers: Numbers, width: Width) -> Float[Array, "m1 lanes"]:
    """The plateau values of a*(u); differentiable."""
    at = _plateau.places(slow, numbers.eta)
    alone = _plateau.singles(at, numbers)
    pairs, places = _pairs(at, numbers.eta, width, _reach(at, width))
    mean, _ = _plateau.mean_square(numbers)
    areas = jnp.diff(_plateau._ends(alone.area, mean), axis=0)
    lengths = jnp.diff(_plateau._ends(alone.start, 1.0), axis=0)
    m = slow.shape[0]
    if width.dense:
        (both,), ((i, j),) = pairs, places
        own = np.arange(m)
        overlap = jnp.zeros((m + 2, m + 2, slow.shape[1])).at[own + 1, own + 1].set(alone.own)
        overlap = overlap.at[i + 1, j + 1].set(both.overlap).at[j + 1, i + 1].set(both.overlap)
        matrix = -numbers.eta * jnp.diff(jnp.diff(overlap, axis=0), axis=1)
        rows = np.arange(m + 1)
        matrix = matrix.at[rows, rows].add(lengths)
        trace = jnp.sum(matrix[rows, rows], axis=0)

        def times(vector: Array) -> Array:
            return jnp.einsum("ijl,jl->il", matrix, vector)

        shifted = matrix.at[rows, rows].add(_plateau._shift(trace))
        shifted = jax.lax.stop_gradient(jnp.moveaxis(shifted, -1, 0))
        factor = jax.scipy.linalg.lu_factor(shifted)

        def solved(right: Array) -> Array:
            return jax.scipy.linalg.lu_solve(factor, right.T[..., None])[..., 0].T
    else:
        # the whole band of the summed neighbours: nothing corrects what were left out
        band = _fast_hessian(alone, pairs, numbers.eta, width.summed)
        entries = jnp.stack([_down(entry, o) for o, entry in enumerate(band)])

        def times(vector: Array) -> Array:
            return _band_times(entries, vector)

        trace = jnp.sum(entries[0], axis=0)
        still = jax.lax.stop_gradient(entries.at[0].add(_plateau._shift(trace)))
        banded = _factorise(still, jnp.ones_like(slow[0]))

        def solved(right: Array) -> Array:
            return _substitute(banded, right)

    def refined(product: Callable, right: Array) -> Array:
        def correct(_: int, solution: Array) -> Array:
            return solution + solved(right - product(solution))

        return jax.lax.fori_loop(0, 4, correct, jnp.zeros_like(right))

    return jax.lax.custom_linear_solve(times, areas, refined, symmetric=True)


def _wide_enough(low: Array, high: Array, eta: Array, width: Width) -> Bool[Array, " lanes"]:
    """Whether all pairs that are not summed stay η apart between `low` and `high`."""
    m = low.shape[0]
    if width.summed >= m - 1:
        return jnp.ones(low.shape[1:], bool)
    # a step that is 0 or 1 on [0, 1] throughout overlaps with nothing
    low = jnp.where(low >= 1 + eta / 2, jnp.inf, low)
    high = jnp.where(high <= -eta / 2, -jnp.inf, high)
    least = jax.lax.cummin(low[width.summed + 1 :], axis=0, reverse=True)
    most = jax.lax.cummax(high[: m - width.summed - 1], axis=0)
    return jnp.all(least - most >= eta, axis=0)


def _sorted_lane(y: Array, label: Array, inertia: Array) -> tuple[Array, Array, Array]:
    """Neurons in ascending order again: swapping k and k + 1 makes F_k F_{k−1} + F_{k+1} − F_k."""

    def sort(y: Array, label: Array, inertia: Array) -> tuple[Array, Array, Array]:
        order = jnp.argsort(jax.lax.stop_gradient(y[1::2]), axis=0, stable=True)
        crossed = jnp.any(jnp.diff(order, axis=0) < 0, axis=0)
        weights = _weights(y)
        moved = [jnp.take_along_axis(x, order, axis=0) for x in (weights[1:], y[1::2])]
        plateaus = jnp.cumsum(jnp.concatenate([weights[:1], moved[0]]), axis=0)
        return (
            jnp.where(crossed, _interleaved(plateaus, moved[1]), y),
            jnp.where(crossed, jnp.take_along_axis(label, order, axis=0), label),
            jnp.where(crossed, jnp.take_along_axis(inertia, order, axis=0), inertia),
        )

    crossed = jnp.any(y[3::2] < y[1:-2:2])
    return jax.lax.cond(crossed, sort, lambda *same: same, y, label, inertia)


# --- all lanes ----------------------------------------------------------------------------------


class Loop(NamedTuple):
    """What moves: `lanes` lanes, the queue of starts and what was recorded of each.

    Attributes:
        y: the states, `[n, lanes]`.
        label: the neuron at each place, `[m, lanes]`.
        inertia: how many neurons it stands for, `[m, lanes]`.
        epsilon: `[lanes]`.
        time: slow time, `[lanes]`.
        h: the next step size, `[lanes]`.
        start: which start the lane holds, `[lanes]`; none if it is their number.
        running: whether the lane moves, `[lanes]`.
        status: how it ended, `[lanes]`.
        steps: attempts, `[lanes]`.
        accepted: accepted steps, `[lanes]`.
        recorded: how many times were recorded, `[lanes]`.
        taken: how many starts were taken from the queue.
        records: rows of y and the labels, `[starts · T, n + m]`.
        answers: (time, status, steps, accepted) of each start, `[starts, 4]`.
        sizes: the accepted step sizes, `[starts, steps]`, or nothing.
    """

    y: Array
    label: Array
    inertia: Array
    epsilon: Array
    time: Array
    h: Array
    start: Array
    running: Array
    status: Array
    steps: Array
    accepted: Array
    recorded: Array
    taken: Array
    records: Array
    answers: Array
    sizes: Array


def _run(
    starts: Start,
    chosen: Bool[Array, " starts"],
    setting: Setting,
    width: Width,
    lanes: int,
    log: int,
) -> tuple[Array, Array, Array]:
    """Integrate the chosen starts: (records, answers, step sizes) of `Loop`."""
    count, m = starts.slow.shape
    n, times = 2 * m + 1, setting.tau.shape[0]
    eta, end = setting.numbers.eta, setting.tau[-1]
    queue = jnp.argsort(~chosen, stable=True)
    total = jnp.sum(chosen)
    ones = jnp.ones(lanes) + 0.0 * setting.rtol  # not a constant to the compiler

    def refill(loop: Loop) -> Loop:
        """Idle lanes give their answer and take the next starts; records are left alone."""
        loop = _retired(loop)
        free = ~loop.running
        place = loop.taken + jnp.cumsum(free) - 1
        fill = free & (place < total)
        which = queue[jnp.clip(place, 0, count - 1)]
        slow, inertia = starts.slow[which].T, starts.inertia[which].T
        epsilon = starts.epsilon[which]
        optimum = jax.lax.cond(
            jnp.any(fill & (epsilon == 0)),
            lambda slow: _fast_optimum(slow, setting.numbers, width),
            lambda slow: jnp.zeros((m + 1, lanes)),
            slow,
        )
        plateaus = jnp.where(epsilon > 0, starts.plateaus[which].T, optimum)
        y = _interleaved(plateaus, slow)
        h = _first_step(y, epsilon, inertia, setting, width)
        loop = loop._replace(
            y=jnp.where(fill, y, loop.y),
            label=jnp.where(fill, starts.label[which].T, loop.label),
            inertia=jnp.where(fill, inertia, loop.inertia),
            epsilon=jnp.where(fill, epsilon, loop.epsilon),
            time=jnp.where(fill, 0.0, loop.time),
            h=jnp.where(fill, h, loop.h),
            start=jnp.where(fill, which, jnp.where(free, count, loop.start)),
            running=loop.running | fill,
            status=jnp.where(fill, int(Status.SUCCESS), loop.status),
            steps=jnp.where(fill, 0, loop.steps),
            accepted=jnp.where(fill, 0, loop.accepted),
            recorded=jnp.where(fill, 0, loop.recorded),
            taken=jnp.minimum(loop.taken + jnp.sum(free), total),
        )
        over = fill & (end <= 0)
        too_narrow = fill & ~_wide_enough(slow, slow, eta, width)
        return loop._replace(
            running=loop.running & ~over & ~too_narrow,
            status=jnp.where(too_narrow, _NARROW, loop.status),
        )

    def _retired(loop: Loop) -> Loop:
        where = jnp.where(loop.running, count, loop.start)
        answer = jnp.stack([loop.time, loop.status, loop.steps, loop.accepted], axis=1)
        return loop._replace(answers=loop.answers.at[where].set(answer, mode="drop"))

    def _recorded(
        loop: Loop, before: Array, stages: Array, since: Array, h: Array, moved: Array
    ) -> Loop:
        """Record at all times up to `loop.time`, many lanes at once; `loop.y` is the new state."""
        reached = jnp.searchsorted(setting.tau, loop.time, side="right")
        pending = jnp.where(moved, reached - loop.recorded, 0)
        until = jnp.cumsum(pending)
        slots = max(lanes // 2, 1)

        def some(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            done, records = carry
            slot = done + jnp.arange(slots)
            lane = jnp.minimum(jnp.searchsorted(until, slot, side="right"), lanes - 1)
            index = loop.recorded[lane] + slot - (until[lane] - pending[lane])
            theta = (setting.tau[jnp.minimum(index, times - 1)] - since[lane]) / h[lane]
            y = _between(before[:, lane], loop.y[:, lane], stages[:, :, lane], theta)
            row = jnp.concatenate([y, loop.label[:, lane].astype(y.dtype)]).T
            where = jnp.where(slot < until[-1], loop.start[lane] * times + index, count * times)
            return done + slots, records.at[where].set(row, mode="drop")

        _, records = jax.lax.while_loop(
            lambda carry: carry[0] < until[-1], some, (jnp.zeros_like(until[-1]), loop.records)
        )
        return loop._replace(records=records, recorded=loop.recorded + pending)

    def advance(loop: Loop) -> Loop:
        # a step that would leave a sliver ends at the last time
        last = loop.time + loop.h * (1 + 1e-10) >= end
        h = jnp.where(last, end - loop.time, loop.h)
        step = _attempt(loop.y, h, loop.epsilon, loop.inertia, ones, setting.numbers, width)
        error = _norm(step.stages[7], loop.y, step.end, loop.epsilon, setting)
        sound = jnp.all(jnp.isfinite(step.end), axis=0) & jnp.isfinite(error)
        error = jnp.where(sound, error, jnp.inf)
        keep = loop.running & (error < 1)
        too_narrow = keep & ~_wide_enough(step.low, step.high, eta, width)
        keep = keep & ~too_narrow
        factor = _SAFETY * error ** (-1 / 5)
        factor = jnp.where(keep, jnp.clip(factor, 1.0, _FASTER), jnp.clip(factor, _SLOWER, _SAFETY))
        time = jnp.where(keep, jnp.where(last, end, loop.time + h), loop.time)
        sizes = loop.sizes
        if log:
            row = jnp.where(keep, loop.start, count)
            sizes = sizes.at[row, loop.accepted].set(h, mode="drop")
        before = loop.y
        moved = loop._replace(
            y=jnp.where(keep, step.end, loop.y),
            time=time,
            h=jnp.where(loop.running, h * factor, loop.h),
            steps=loop.steps + loop.running,
            accepted=loop.accepted + keep,
            sizes=sizes,
        )
        moved = _recorded(moved, before, step.stages, loop.time, h, keep)
        y, label, inertia = _sorted_lane(moved.y, moved.label, moved.inertia)
        finished = loop.running & (time >= end)
        out_of_steps = loop.running & (moved.steps >= setting.max_steps)
        # below this a step no longer changes the time
        stuck = loop.running & (moved.h <= 4e-16 * jnp.maximum(time, 1e-12 * end))
        status = jnp.where(stuck, int(Status.STEP_TOO_SMALL), moved.status)
        status = jnp.where(out_of_steps, int(Status.MAX_STEPS), status)
        status = jnp.where(finished, int(Status.SUCCESS), status)
        status = jnp.where(too_narrow, _NARROW, status)
        running = loop.running & ~(finished | out_of_steps | stuck | too_narrow)
        return moved._replace(y=y, label=label, inertia=inertia, status=status, running=running)

    def body(loop: Loop) -> Loop:
        idle = jnp.sum(~loop.running)
        due = (loop.taken < total) & ((idle >= max(lanes // 8, 1)) | (idle == lanes))
        # a branch that returned the large arrays would copy them
        small = loop._replace(records=jnp.zeros(0), sizes=jnp.zeros(0))
        small = jax.lax.cond(due, refill, lambda loop: loop, small)
        return advance(small._replace(records=loop.records, sizes=loop.sizes))

    def unfinished(loop: Loop) -> Array:
        return jnp.any(loop.running) | (loop.taken < total)

    whole = partial(jnp.zeros, dtype=jnp.int32)
    records = jnp.full((count, times, n + m), jnp.nan)
    # the start of a flow is known even if no step succeeds
    known = chosen & (starts.epsilon > 0) & (setting.tau[0] <= 0)
    first = _interleaved(starts.plateaus.T, starts.slow.T).T
    first = jnp.concatenate([first, starts.label.astype(first.dtype)], axis=1)
    records = records.at[:, 0].set(jnp.where(known[:, None], first, jnp.nan))
    loop = Loop(
        y=jnp.zeros((n, lanes)),
        label=jnp.zeros((m, lanes), starts.label.dtype),
        inertia=jnp.ones((m, lanes)),
        epsilon=jnp.ones(lanes),
        time=jnp.zeros(lanes),
        h=jnp.ones(lanes),
        start=jnp.full(lanes, count, queue.dtype),
        running=jnp.zeros(lanes, bool),
        status=whole(lanes),
        steps=whole(lanes),
        accepted=whole(lanes),
        recorded=jnp.zeros(lanes, jnp.searchsorted(setting.tau, 0.0).dtype),
        taken=jnp.zeros_like(total),
        records=records.reshape(count * times, n + m),
        answers=jnp.zeros((count, 4)),
        sizes=jnp.zeros((count, log)),
    )
    loop = _retired(jax.lax.while_loop(unfinished, body, loop))
    return loop.records.reshape(count, times, n + m), loop.answers, loop.sizes


def _between(before: Array, after: Array, stages: Array, theta: Array) -> Array:
    """The dense output of Rodas5P."""
    h = jnp.asarray(rodas.H)
    curve = [_combined(h[i], stages) for i in range(3)]
    correction = (1 - theta) * (curve[0] + theta * (curve[1] + theta * curve[2]))
    return (1 - theta) * before + theta * (after + correction)


# --- starts and answers -------------------------------------------------------------------------


class Sharing(NamedTuple):
    """How an answer follows from the neurons that moved, `[lanes, m + 1]`, index 0 for the bias.

    Attributes:
        source: the weight or neuron that moved in place of each.
        share: what part of its weight belongs to each.
    """

    source: Array
    share: Array


def _prepared(state: State, epsilon: Array, numbers: Numbers) -> tuple[Start, Sharing]:
    """Starts in order. In the limit neurons that coincide share a weight and move as one.

    The one that moves has the inertia of all; the others wait beyond 1, where they do nothing.
    A neuron left of [0, 1] is one with the bias, a neuron right of it has no weight.
    """
    eta = numbers.eta
    m = state.slow.shape[-1]

    def one(fast: Array, slow: Array, epsilon: Array) -> tuple[Start, Sharing]:
        order = jnp.argsort(jax.lax.stop_gradient(slow), stable=True)
        place = jax.lax.stop_gradient(jnp.clip(slow[order], -eta / 2, 1.0 + eta / 2))
        place = jnp.concatenate([-eta / 2 * jnp.ones(1), place])
        new = jnp.diff(place) > 64.0 * jnp.finfo(place.dtype).eps
        group = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(new.astype(int))])
        size = jax.ops.segment_sum(jnp.ones(m + 1), group, m + 1)[group]
        index = jnp.concatenate([jnp.zeros(1, order.dtype), order + 1])
        first = jax.ops.segment_min(jnp.arange(m + 1), group, m + 1)[group]
        dead = place >= 1.0 + eta / 2
        limit = epsilon == 0
        source = jnp.where(limit, index[first], index)
        share = jnp.where(limit, jnp.where(dead, 0.0, 1.0 / size), 1.0)
        waits = limit & ((first != jnp.arange(m + 1)) | dead)
        moving = jnp.where(waits[1:], 2.0 + eta, slow[order])
        again = jnp.argsort(jax.lax.stop_gradient(moving), stable=True)
        label = order[again]
        inertia = jnp.where(limit & ~waits[1:], size[1:], 1.0)[again]
        plateaus = jnp.cumsum(jnp.concatenate([fast[:1], fast[1:][label]]))
        start = Start(plateaus, moving[again], label, inertia, epsilon)
        back = jnp.zeros(m + 1, int).at[index].set(jnp.arange(m + 1))
        return start, Sharing(source[back], share[back])

    return jax.vmap(one)(state.fast, state.slow, epsilon)


def _answered(
    y: Array, label: Array, state: State, sharing: Sharing, eta: Array
) -> tuple[Array, Array]:
    """(a, u) of one lane by neuron from rows of y `[T, n]` and labels `[T, m]`."""
    weights = jnp.concatenate([y[:, :1], y[:, 2::2] - y[:, :-2:2]], axis=1)
    back = jnp.argsort(label, axis=1)
    known = jnp.isfinite(weights[:, :1])
    fast = jnp.concatenate(
        [weights[:, :1], jnp.take_along_axis(weights[:, 1:], back, axis=1)], axis=1
    )
    slow = jnp.take_along_axis(y[:, 1::2], back, axis=1)
    shared = jnp.where(sharing.share > 0, fast[:, sharing.source] * sharing.share, 0.0)
    fast = jnp.where(known, shared, jnp.nan)
    # who waits out of sight stands where it stood
    source = sharing.source[1:]
    seen = (state.slow > -eta / 2) & (state.slow < 1 + eta / 2)
    slow = jnp.where(seen, slow[:, jnp.maximum(source - 1, 0)], state.slow)
    return fast, jnp.where(known, slow, jnp.nan)


def _losses(y: Array, numbers: Numbers, width: Width) -> Float[Array, "lanes T"]:
    """The loss of records `[lanes, T, n]`."""
    by_time = jnp.moveaxis(y, 0, 2)
    return jax.lax.map(lambda y: _loss(y, numbers, width), by_time).T


def _lanes_for(count: int, width: Width, neurons: int) -> int:
    """Lanes that move together: a power of two, fewer where a lane is large."""
    most = LANES_CPU if jax.default_backend() == "cpu" else LANES
    if width.dense:
        most = max(1, min(16, 40_000 // (2 * neurons + 1) ** 2))
    return min(most, max(4, 1 << (count - 1).bit_length()))


class Solution(NamedTuple):
    """Records of the starts in their order, and how they ended.

    Attributes:
        y: rows of y, `[lanes, T, n]`.
        label: the neuron at each place, `[lanes, T, m]`.
        loss: `[lanes, T]`.
        answers: (time, status, steps, accepted), `[lanes, 4]`.
        width: which of `widths` a lane took, `[lanes]`.
        sizes: the accepted step sizes, `[lanes, steps]`, or nothing.
    """

    y: Array
    label: Array
    loss: Array
    answers: Array
    width: Array
    sizes: Array


@partial(jax.jit, static_argnames=("width", "lanes", "log"))
def _one_width(
    starts: Start,
    chosen: Array,
    setting: Setting,
    before: Solution,
    *,
    width: Width,
    lanes: int,
    log: int,
) -> Solution:
    """Integrate the chosen starts with one bandwidth, the others keep their solution."""
    records, answers, sizes = _run(starts, chosen, setting, width, lanes, log)
    n = 2 * starts.slow.shape[1] + 1
    y = records[..., :n]
    loss = _losses(y, setting.numbers, width)
    new = Solution(y, records[..., n:], loss, answers, before.width + 1, sizes)
    return jax.tree.map(
        lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, before
    )


def _all_widths(starts: Start, setting: Setting, log: int) -> Solution:
    """Integrate all starts, each with the first bandwidth that holds its neighbours."""
    count, m = starts.slow.shape
    times = setting.tau.shape[0]
    nothing = partial(jnp.full, fill_value=jnp.nan)
    solution = Solution(
        nothing((count, times, 2 * m + 1)),
        nothing((count, times, m)),
        nothing((count, times)),
        jnp.zeros((count, 4)).at[:, 1].set(_NARROW),
        jnp.full(count, -1),
        jnp.zeros((count, log)),
    )
    tried = widths(m)
    concrete = not (is_traced((starts, setting)) or inside_trace())
    overlapping = _first_overlaps(starts.slow, setting.numbers.eta)
    for level, width in enumerate(tried):
        last = level == len(tried) - 1
        chosen = solution.answers[:, 1] == _NARROW
        if not last:
            # who has too many neighbours to begin with waits for its width
            skipped = chosen & (overlapping > width.summed)
            solution = solution._replace(width=jnp.where(skipped, level, solution.width))
            chosen &= ~skipped
        run = partial(_one_width, width=width, lanes=_lanes_for(count, width, m), log=log)
        if concrete:
            # in a batch of their own size, so that the few that are left stay cheap
            if np.any(np.asarray(chosen)):
                solution = run(starts, chosen, setting, solution)
        else:
            solution = jax.lax.cond(
                jnp.any(chosen), run, lambda *args: args[-1], starts, chosen, setting, solution
            )
    return solution


@jax.jit
def _first_overlaps(slow: Array, eta: Array) -> Int[Array, " lanes"]:
    """The number of neighbours that overlap at the start, of every lane."""
    return jax.vmap(lambda slow: _plateau.neighbours(_plateau.places(slow, eta), eta))(slow)


# --- the replay: the same steps again, to be differentiated -------------------------------------


class Steps(NamedTuple):
    """The steps that an adaptive solve took; a derivative is that of the same steps once more.

    Attributes:
        sizes: the accepted step sizes of each lane, `[lanes, steps]`, zeros after the last.
        width: which of `widths` each lane needs, `[lanes]`.
    """

    sizes: Array
    width: Array


def _replay_width(
    starts: Start, setting: Setting, steps: Steps, width: Width
) -> tuple[Array, Array, Array]:
    """(y `[lanes, T, n]`, labels, loss) of given steps; differentiable in both modes."""
    count, m = starts.slow.shape
    tau, ones = setting.tau, jnp.ones(count)
    slow, inertia = starts.slow.T, starts.inertia.T
    optimum = jax.lax.cond(
        jnp.any(starts.epsilon == 0),
        lambda slow: _fast_optimum(slow, setting.numbers, width),
        lambda slow: jnp.zeros((m + 1, count)),
        slow,
    )
    plateaus = jnp.where(starts.epsilon > 0, starts.plateaus.T, optimum)
    y = _interleaved(plateaus, slow)
    sizes = jax.lax.stop_gradient(steps.sizes).T
    since = jnp.cumsum(sizes, axis=0) - sizes
    total = jnp.sum(sizes, axis=0)
    fixed_tau = jax.lax.stop_gradient(tau)
    # the last step ends on the last time, by rounding not quite
    whole = total >= fixed_tau[-1] * (1 - 1e-9)
    first = fixed_tau[:, None] <= 0
    records = jnp.where(first[:, None], y, jnp.nan)
    labels = jnp.where(first[:, None], starts.label.T.astype(y.dtype), jnp.nan)

    @jax.checkpoint
    def step(carry: tuple, part: tuple[Array, Array]) -> tuple:
        y, label, inertia, records, labels = carry
        size, since = part
        moves = size > 0
        h = jnp.where(moves, size, 1.0)
        here = _attempt(
            y, h, starts.epsilon, inertia, ones, setting.numbers, width, differentiable=True
        )
        until = jnp.where(whole & (since + size >= total), jnp.inf, since + size)
        within = moves & (fixed_tau[:, None] > since) & (fixed_tau[:, None] <= until)
        theta = jnp.where(within, (tau[:, None] - since) / h, 0.0)
        curve = _between(y[None], here.end[None], here.stages[:, None], theta[:, None])
        records = jnp.where(within[:, None], curve, records)
        labels = jnp.where(within[:, None], label.astype(y.dtype), labels)
        y = jnp.where(moves, here.end, y)
        return *_sorted_lane(y, label, inertia), records, labels

    @jax.checkpoint
    def block(carry: tuple, parts: tuple[Array, Array]) -> tuple[tuple, None]:
        def all_steps(carry: tuple, parts: tuple[Array, Array]) -> tuple:
            def one(carry: tuple, part: tuple[Array, Array]) -> tuple[tuple, None]:
                some = jnp.any(part[0] > 0)
                return jax.lax.cond(some, step, lambda carry, _: carry, carry, part), None

            return jax.lax.scan(one, carry, parts)[0]

        some = jnp.any(parts[0] > 0)
        return jax.lax.cond(some, all_steps, lambda carry, _: carry, carry, parts), None

    most = sizes.shape[0]
    per_block = max(math.isqrt(most), 1)
    blocks = -(-most // per_block)
    parts = [
        jnp.concatenate([x, jnp.zeros((blocks * per_block - most, count))]).reshape(
            blocks, per_block, count
        )
        for x in (sizes, since)
    ]
    carry = (y, starts.label.T, inertia, records, labels)
    (_, _, _, records, labels), _ = jax.lax.scan(block, carry, tuple(parts))
    records, labels = jnp.moveaxis(records, 2, 0), jnp.moveaxis(labels, 2, 0)
    # NaN would spoil derivatives: what was not reached stands still
    reached = jnp.isfinite(jax.lax.stop_gradient(records[..., :1]))
    loss = _losses(jnp.where(reached, records, 0.0), setting.numbers, width)
    return records, labels, jnp.where(reached[..., 0], loss, jnp.nan)


def replay(
    numbers: Numbers, state: State, epsilon: Array, tau: Array, steps: Steps
) -> tuple[Array, Array, Array]:
    """(fast `[lanes, T, m+1]`, slow `[lanes, T, m]`, loss `[lanes, T]`) of the given steps.

    A pure function of all but `steps`, differentiable in both modes: it takes the steps of an
    adaptive solve again, without control of errors. In reverse mode it keeps some √steps states.
    """
    setting = Setting(numbers, numbers.eta, tau[0], tau[0], tau, tau[0])
    starts, sharing = _prepared(state, epsilon, numbers)
    tried = widths(state.slow.shape[1])
    n, times = 2 * state.slow.shape[1] + 1, tau.shape[0]
    count = starts.slow.shape[0]
    total = (
        jnp.full((count, times, n), jnp.nan),
        jnp.full((count, times, n // 2), jnp.nan),
        jnp.full((count, times), jnp.nan),
    )
    for level, width in enumerate(tried):
        chosen = steps.width == level
        own = Steps(jnp.where(chosen[:, None], steps.sizes, 0.0), steps.width)

        def one(
            total: tuple,
            starts: Start,
            setting: Setting,
            own: Steps,
            mine: Array,
            width: Width = width,
        ) -> tuple:
            new = _replay_width(starts, setting, own, width)
            return jax.tree.map(
                lambda a, b: jnp.where(mine.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, total
            )

        total = jax.lax.cond(
            jnp.any(chosen), one, lambda total, *_: total, total, starts, setting, own, chosen
        )
    y, label, loss = total
    answered = partial(_answered, eta=numbers.eta)
    fast, slow = jax.vmap(answered)(y, label, state, sharing)
    return fast, slow, loss


# --- the solver ---------------------------------------------------------------------------------


class Tolerances(NamedTuple):
    """Tolerances of one step and the step limit, which are not differentiated."""

    slow_scale: Array
    rtol: Array
    atol: Array


def _solved(
    numbers: Numbers,
    state: State,
    epsilon: Array,
    tau: Array,
    tolerances: Tolerances,
    max_steps: int,
    log: bool = False,
) -> tuple[dict[str, Any], Steps]:
    setting = Setting(numbers, *tolerances, tau, jnp.asarray(max_steps))
    starts, sharing = _prepared(state, epsilon, numbers)
    solution = _all_widths(starts, setting, max_steps if log else 0)
    return _assembled(solution, state, sharing, numbers), Steps(solution.sizes, solution.width)


def _assembled(
    solution: Solution, state: State, sharing: Sharing, numbers: Numbers
) -> dict[str, Any]:
    fast, slow = jax.vmap(partial(_answered, eta=numbers.eta))(
        solution.y, solution.label, state, sharing
    )
    time, status, steps, accepted = solution.answers.T
    summed = jnp.asarray([width.summed for width in widths(state.slow.shape[1])])
    return {
        "fast": fast,
        "slow": slow,
        "loss": solution.loss,
        "status": status.astype(jnp.int32),
        "stats": {
            "steps": steps.astype(int),
            "accepted": accepted.astype(int),
            "rejected": (steps - accepted).astype(int),
            "bandwidth": summed[solution.width],
            "reached": time,
        },
    }


def differentiable(values: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A solver with derivatives: its answers are those of `values`, its tangents those of `replay`.

    Args:
        values: `values(numbers, state, epsilon, tau, tolerances, max_steps)` gives what `solve`
            does; any engine that solves the same equations to the same tolerances.

    Returns:
        The same function, differentiable in both modes with respect to its first four arguments.
        Only where it is differentiated the adaptive solve here is run too, for its step sizes,
        `[lanes, max_steps]`, and its steps are taken again.
    """

    @partial(jax.custom_jvp, nondiff_argnums=(5,))
    def solver(
        numbers: Numbers,
        state: State,
        epsilon: Array,
        tau: Array,
        tolerances: Tolerances,
        max_steps: int,
    ) -> dict[str, Any]:
        return values(numbers, state, epsilon, tau, tolerances, max_steps)

    @solver.defjvp
    def _(max_steps: int, primals: tuple, tangents: tuple) -> tuple:
        numbers, state, epsilon, tau, tolerances = jax.lax.stop_gradient(primals)
        _, steps = _solved(numbers, state, epsilon, tau, tolerances, max_steps, log=True)
        answer = values(numbers, state, epsilon, tau, tolerances, max_steps)

        def again(numbers: Numbers, state: State, epsilon: Array, tau: Array) -> tuple:
            return replay(numbers, state, epsilon, tau, steps)

        _, (fast, slow, loss) = jax.jvp(again, primals[:4], tangents[:4])

        def none(value: Array) -> Any:
            if jnp.issubdtype(value.dtype, jnp.floating):
                return jnp.zeros_like(value)
            return np.zeros(value.shape, jax.dtypes.float0)

        zero = jax.tree.map(none, answer)
        return answer, {**zero, "fast": fast, "slow": slow, "loss": loss}

    return solver


def _values(*args: Any) -> dict[str, Any]:
    return _solved(*args)[0]


_differentiable = differentiable(_values)


def solve(
    problem: Any,
    state: State,
    epsilon: Float[Array, " lanes"],
    tau: Float[Array, " T"],
    *,
    rtol: Float[Array, ""] | float,
    atol: Float[Array, ""] | float,
    max_steps: int,
) -> dict[str, Any]:
    """Solve the flow, or its limit where ε = 0, of every lane and record at `tau`.

    Args:
        problem: a `Univariate` problem.
        state: starts, fast `[lanes, m+1]` and slow `[lanes, m]`, float64, neurons in any order.
        epsilon: timescale separation of each lane; where it is 0 the limit is solved, from a*(u).
        tau: recorded slow times, strictly increasing, ≥ 0.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step.
        max_steps: step limit of one lane.

    Returns:
        fast `[lanes, T, m+1]`, slow `[lanes, T, m]`, loss `[lanes, T]`, status `[lanes]` and
        stats, `[lanes]` each: steps, accepted, rejected, bandwidth (how many neighbours on each
        side were summed) and reached (the slow time at the end). NaN after a failure.

    Differentiable in both modes with respect to the problem's numbers, `state`, `epsilon` and
    `tau`: the derivative is that of the accepted steps (`replay`).
    """
    numbers = numbers_of(problem)
    tolerances = Tolerances(
        jnp.asarray(problem.slow_scale(), jnp.float64),
        jnp.asarray(rtol, jnp.float64),
        jnp.asarray(atol, jnp.float64),
    )
    return _differentiable(numbers, state, epsilon, tau, tolerances, max_steps)


def numbers_of(problem: Any) -> Numbers:
    """The numbers of a `Univariate` problem, in float64."""
    target = problem.target
    return Numbers(
        *(jnp.asarray(x, jnp.float64) for x in (problem.eta, target.jumps, target.values))
    )
