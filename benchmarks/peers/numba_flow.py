"""The gradient flow's right-hand side and Jacobian in Numba, for solvers that are not ours.

Paper symbols: y = (a_0 … a_m, u_1 … u_m); the flow is dy/dτ = −D ∇L(y) with D = 1/ε on a and 1
on u, its Jacobian −D ∇²L. Both are the closed forms, at any positions: neurons may coincide,
cross, straddle an end of [0, 1] or lie outside it.

A pair of neurons further than η apart is trivial: ∫σ_iσ_j = 1 − max(u_i, u_j), and one's bump sees
the other's step as 0 or 1. So neurons are visited in sorted order, trivial pairs enter by running
sums, and only near pairs cost a polynomial: the right-hand side takes O(m) operations, the
dense Jacobian one pass over its entries. The order is kept between calls, where an insertion
sort has little to do.

Everything a call needs is in one block of memory (`Block`), so that a C callback can pass it as
its user data.
"""

import numpy as np
from numba import njit

from benchmarks.setting import JUMPS, VALUES


HEAD = 6  # numbers of a block before the jumps: m and jumps (int64), η, ε, first and last level
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)  # exact up to degree 7
# not `nnan`: an implicit solver may try states that are not finite
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_options = {"fastmath": _FAST, "error_model": "numpy"}
# cached on disk: every process of a peer compiles alike
compiled = njit(**_options, cache=True)


class Block:
    """The numbers of the problem and room for a call, as float64 that are partly int64.

    Attributes:
        reals: the block; a C callback gets its address.
        words: the same memory as int64.
        size: of y, 2m + 1.
    """

    def __init__(self, neurons: int, eta: float, epsilon: float) -> None:
        jumps = len(JUMPS)
        self.size = 2 * neurons + 1
        self.reals = np.zeros(HEAD + 2 * jumps + 8 * (neurons + 1))
        self.words = self.reals.view(np.int64)
        self.words[:2] = neurons, jumps
        self.reals[2:HEAD] = eta, epsilon, VALUES[0], VALUES[-1]
        self.reals[HEAD : HEAD + jumps] = JUMPS
        self.reals[HEAD + jumps : HEAD + 2 * jumps] = np.diff(VALUES)
        self.words[HEAD + 2 * jumps : HEAD + 2 * jumps + neurons] = np.arange(neurons)


# --- one step, and two ------------------------------------------------------------------------


@compiled
def _tail(z):
    return max(0.5 - abs(z), 0.0)


@compiled
def _ramp(z):
    """∫_{−∞}^z σ."""
    square = _tail(z) ** 2
    return max(z, 0.0) + square * square


@compiled
def _step(z):
    """σ(z)."""
    tail = 4.0 * _tail(z) ** 3
    return 1.0 - tail if z > 0.0 else tail


@compiled
def _bump(z):
    """σ′(z)."""
    return 12.0 * _tail(z) ** 2


@compiled
def _pair_excess(s):
    """½ E|r + W| − s/2 for s = |r| < 1, W the difference of two draws from σ′."""
    if s < 0.5:
        inner = -2.0 + s * (2.4 + s * (-0.8 - (4 / 35) * s))
        return 5 / 56 + s * (-0.5 + s * (0.9 + s * s * inner))
    far = 1.0 - s
    return (0.8 / 7) * far * (far * far) ** 3


@compiled
def _pair_tail(s):
    """P(W > s) for 0 ≤ s < 1."""
    if s < 0.5:
        return 0.5 + s * (-1.8 + s * s * (8.0 + s * (-12.0 + s * (4.8 + 0.8 * s))))
    return 0.8 * ((1.0 - s) ** 2) ** 3


@compiled
def _pair_density(s):
    """The density of W at s, 0 ≤ s < 1."""
    if s < 0.5:
        return 1.8 + s * s * (-24.0 + s * (48.0 + s * (-24.0 - 4.8 * s)))
    far = 1.0 - s
    return 4.8 * far * (far * far) ** 2


# --- two steps beyond an end ------------------------------------------------------------------


@compiled
def _beyond(p, q, first, second):
    """∫_{t<0} f(t + p) g(t + q) dt for p, q in (−½, ½]; f, g are σ, or σ′ where the flag is set.

    Gauss–Legendre between the breakpoints of both factors, exact for these polynomials.
    """
    low = min(-0.5 - min(p, q), 0.0)
    one = min(max(-max(p, q), low), 0.0)
    two = min(max(-min(p, q), low), 0.0)
    total = 0.0
    for piece in range(3):
        left = low if piece == 0 else (one if piece == 1 else two)
        right = one if piece == 0 else (two if piece == 1 else 0.0)
        half, middle = 0.5 * (right - left), 0.5 * (right + left)
        for k in range(4):
            t = middle + half * _NODES[k]
            f = _bump(t + p) if first else _step(t + p)
            g = _bump(t + q) if second else _step(t + q)
            total += half * _WEIGHTS[k] * f * g
    return total


# --- what right-hand side and Jacobian share --------------------------------------------------


@compiled
def _parts(reals, words):
    """Sizes, numbers and views of a block."""
    m, jumps = words[0], words[1]
    place = HEAD + 2 * jumps
    order = words[place : place + m]
    room = reals[place + m :]
    return m, jumps, order, room


@compiled
def _sort(order, u):
    for k in range(1, order.size):
        j = order[k]
        l = k
        while l > 0 and u[order[l - 1]] > u[j]:
            order[l] = order[l - 1]
            l -= 1
        order[l] = j


@compiled
def _clip(u, eta):
    """Positions moved to the nearest point of [−η/2, 1 + η/2], the same on [0, 1]."""
    return min(max(u, -0.5 * eta), 1.0 + 0.5 * eta)


@compiled
def gradient(reals, words, y, out):
    """∇L(y) into `out`, both `[2m + 1]`."""
    m, jumps, order, room = _parts(reals, words)
    eta, first_level, last_level = reals[2], reals[4], reals[5]
    inverse = 1.0 / eta
    v, heights = reals[HEAD:], reals[HEAD + jumps :]
    a, u = y[1 : m + 1], y[m + 1 :]
    _sort(order, u)
    # sorted positions and weights, and the sums over pairs
    x, w, gram, cross = room[:m], room[m : 2 * m], room[2 * m : 3 * m], room[3 * m : 4 * m]
    total = past_one = 0.0
    for k in range(m):
        j = order[k]
        x[k], w[k] = _clip(u[j], eta), a[j]
        gram[k] = cross[k] = 0.0
        total += w[k]
        past_one += w[k] * _ramp((x[k] - 1.0) * inverse)
    # near pairs beyond their trivial part
    for k in range(m):
        here, own = x[k], w[k]
        gram_sum = 0.0
        cross_sum = 0.5 * own  # ∫σ_k σ′_k
        for l in range(k + 1, m):
            gap = x[l] - here
            if not gap < eta:
                break
            s = gap * inverse
            excess, tail = _pair_excess(s), _pair_tail(s)
            gram_sum += w[l] * excess
            gram[l] += own * excess
            cross_sum += w[l] * tail  # step l under the bump of k
            cross[l] -= own * tail  # and of k under that of l, which the running sum has as 1
        gram[k] = -eta * (gram[k] + gram_sum + (5 / 56) * own)
        cross[k] += cross_sum
    # trivial pairs by running sums; edges and target
    before = 0.0
    beyond = 0.0  # Σ_{l ≥ k} w_l (1 − x_l)
    for k in range(m):
        beyond += w[k] * (1.0 - x[k])
    slope_bias = y[0]
    for k in range(m):
        here, own = x[k], w[k]
        beyond -= own * (1.0 - here)
        left, right = -here * inverse, (here - 1.0) * inverse
        ramp_left, ramp_right = _ramp(left), _ramp(right)
        single = eta * (_ramp(-right) - ramp_left)
        product = gram[k] + (before + own) * (1.0 - here) + beyond
        product += single * y[0] + eta * (ramp_right * total + past_one)
        seen = cross[k] + before
        step_left, step_right = _step(left), _step(right)
        seen += (1.0 - step_right - step_left) * y[0] - step_right * total
        if left > -0.5:
            for l in range(m):
                other = -x[l] * inverse
                if not other > -0.5:
                    break
                product -= eta * w[l] * _beyond(left, other, False, False)
                seen -= w[l] * _beyond(left, other, True, False)
        if right > -0.5:
            for l in range(m - 1, -1, -1):
                other = (x[l] - 1.0) * inverse
                if not other > -0.5:
                    break
                product -= eta * w[l] * _beyond(right, other, False, False)
                seen += w[l] * _beyond(right, other, True, False)
        goal = last_level * _ramp(-right) - first_level * ramp_left
        goal_seen = last_level * (1.0 - step_right) - first_level * step_left
        for n in range(jumps):
            z = (v[n] - here) * inverse
            if z > -0.5:
                goal -= heights[n] * _ramp(z)
                goal_seen -= heights[n] * _step(z)
        before += own
        j = order[k]
        out[j + 1] = 2.0 * (product - eta * goal)
        inside = -0.5 * eta < u[j] < 1.0 + 0.5 * eta
        out[m + 1 + j] = -2.0 * own * (seen - goal_seen) if inside else 0.0
        slope_bias += single * own
    mean = last_level
    for n in range(jumps):
        mean -= heights[n] * v[n]
    # ∫f* by parts: the last level, less every jump times its position
    out[0] = 2.0 * (slope_bias - mean)


@compiled
def hessian(reals, words, y, out):
    """∇²L(y) into `out`, `[2m + 1, 2m + 1]`."""
    m, jumps, order, room = _parts(reals, words)
    eta, first_level, last_level = reals[2], reals[4], reals[5]
    inverse = 1.0 / eta
    v, heights = reals[HEAD:], reals[HEAD + jumps :]
    a, u = y[1 : m + 1], y[m + 1 :]
    _sort(order, u)
    x, w, misfit, curvature = room[:m], room[m : 2 * m], room[2 * m : 3 * m], room[3 * m : 4 * m]
    residual_0, residual_1 = y[0] - first_level, y[0] - last_level
    for k in range(m):
        j = order[k]
        x[k], w[k] = _clip(u[j], eta), a[j]
        residual_0 += w[k] * _step(-x[k] * inverse)
        residual_1 += w[k] * _step((1.0 - x[k]) * inverse)
    out[0, 0] = 2.0
    for k in range(m):
        here, own, j = x[k], w[k], order[k]
        inside = -0.5 * eta < u[j] < 1.0 + 0.5 * eta
        left, right = -here * inverse, (here - 1.0) * inverse
        ramp_right, step_right, step_left = _ramp(right), _step(right), _step(left)
        row, column = j + 1, m + 1 + j
        single = 2.0 * eta * (_ramp(-right) - _ramp(left))
        out[0, row] = out[row, 0] = single
        seen = (1.0 - step_right - step_left) * y[0]
        down = -2.0 * own if inside else 0.0
        out[0, column] = out[column, 0] = down * (1.0 - step_right - step_left)
        bent = 0.0
        for l in range(m):
            i = order[l]
            other, weight = x[l], w[l]
            gap = abs(other - here)
            pair = 1.0 - max(here, other)
            under = 1.0 if l < k else 0.0
            overlap = 0.0
            if gap < eta:
                s = gap * inverse
                pair -= eta * _pair_excess(s)
                tail = _pair_tail(s)
                under = 1.0 - tail if l < k else tail
                overlap = _pair_density(s)
            pair += eta * (ramp_right + _ramp((other - 1.0) * inverse))
            under -= step_right
            if left > -0.5 and -other * inverse > -0.5:
                beside = -other * inverse
                pair -= eta * _beyond(left, beside, False, False)
                under -= _beyond(left, beside, True, False)
                overlap -= _beyond(left, beside, True, True)
            if right > -0.5 and (other - 1.0) * inverse > -0.5:
                beside = (other - 1.0) * inverse
                pair -= eta * _beyond(right, beside, False, False)
                under += _beyond(right, beside, True, False)
                overlap -= _beyond(right, beside, True, True)
            if not (inside and -0.5 * eta < u[i] < 1.0 + 0.5 * eta):
                overlap = 0.0
            overlap *= inverse
            out[row, i + 1] = 2.0 * pair
            out[i + 1, column] = out[column, i + 1] = down * under
            seen += weight * under
            bent += weight * overlap
            twice = 2.0 * own * overlap * weight
            out[column, m + 1 + i] = twice
        goal_seen = last_level * (1.0 - step_right) - first_level * step_left
        kink = residual_1 * _bump(right) - residual_0 * _bump(left)
        for n in range(jumps):
            z = (v[n] - here) * inverse
            if z > -0.5:
                goal_seen -= heights[n] * _step(z)
                kink += heights[n] * _bump(z)
        misfit[k] = seen - goal_seen if inside else 0.0
        curvature[k] = kink * inverse - bent if inside else 0.0
    for k in range(m):
        j = order[k]
        out[j + 1, m + 1 + j] -= 2.0 * misfit[k]
        out[m + 1 + j, j + 1] -= 2.0 * misfit[k]
        out[m + 1 + j, m + 1 + j] += 2.0 * w[k] * curvature[k]


# --- in slow time -----------------------------------------------------------------------------


@compiled
def velocity(reals, words, y, out):
    """dy/dτ into `out`."""
    gradient(reals, words, y, out)
    m, fast = words[0], -1.0 / reals[3]
    for i in range(m + 1):
        out[i] *= fast
    for i in range(m + 1, 2 * m + 1):
        out[i] = -out[i]


@compiled
def jacobian_columns(reals, words, y, out):
    """The Jacobian by columns, `out[j, i] = ∂(dy_i/dτ)/∂y_j`, as Fortran and SUNDIALS keep it."""
    hessian(reals, words, y, out)
    m, fast = words[0], -1.0 / reals[3]
    for j in range(2 * m + 1):
        for i in range(m + 1):
            out[j, i] *= fast
        for i in range(m + 1, 2 * m + 1):
            out[j, i] = -out[j, i]


class Flow:
    """The flow of one problem, as functions of Python."""

    def __init__(self, neurons: int, eta: float, epsilon: float) -> None:
        self.block = Block(neurons, eta, epsilon)
        self._numbers = self.block.reals, self.block.words

    def velocity(self, tau: float, y: np.ndarray) -> np.ndarray:
        """dy/dτ, `[2m + 1]`."""
        return _new_velocity(*self._numbers, y)

    def columns(self, tau: float, y: np.ndarray) -> np.ndarray:
        """The transposed Jacobian, `[2m + 1, 2m + 1]` in C order."""
        return _new_columns(*self._numbers, y)

    def jacobian(self, tau: float, y: np.ndarray) -> np.ndarray:
        """The Jacobian, `[2m + 1, 2m + 1]` in Fortran order."""
        return _new_columns(*self._numbers, y).T


@compiled
def _new_velocity(reals, words, y):
    out = np.empty(y.size)
    velocity(reals, words, y, out)
    return out


@compiled
def _new_columns(reals, words, y):
    out = np.empty((y.size, y.size))
    jacobian_columns(reals, words, y, out)
    return out
