"""Independent references for the tests: no code is shared with the package."""

import mpmath
import numpy as np
from mpmath import mp, mpf


# 4-point Gauss-Legendre nodes, exact for the degree-6 pieces of (f - f*)^2
def _gauss4():
    with mp.workdps(60):
        inner = mp.sqrt(mpf(3) / 7 - mpf(2) / 7 * mp.sqrt(mpf(6) / 5))
        outer = mp.sqrt(mpf(3) / 7 + mpf(2) / 7 * mp.sqrt(mpf(6) / 5))
        heavy, light = (18 + mp.sqrt(30)) / 36, (18 - mp.sqrt(30)) / 36
        # negation rounds to the working precision, so it belongs in here too
        return [(-outer, light), (-inner, heavy), (inner, heavy), (outer, light)]


_GAUSS4 = _gauss4()


def step(z):
    half = mpf(1) / 2
    if z <= -half:
        return mpf(0)
    if z >= half:
        return mpf(1)
    return 4 * (z + half) ** 3 if z <= 0 else 1 - 4 * (half - z) ** 3


def loss(fast, slow, jumps, values, eta, dps=60):
    """The population loss by exact piecewise Gauss quadrature in `dps` digits."""
    with mp.workdps(dps):
        breaks = {mpf(0), mpf(1)} | {mpf(v) for v in jumps if 0 < v < 1}
        for u in slow:
            breaks |= {u + shift * eta for shift in (-mpf(1) / 2, mpf(0), mpf(1) / 2)}
        breaks = sorted(b for b in breaks if 0 <= b <= 1)
        total = mpf(0)
        for left, right in zip(breaks[:-1], breaks[1:], strict=True):
            half, middle = (right - left) / 2, (right + left) / 2
            level = values[sum(1 for v in jumps if v <= middle)]
            for node, weight in _GAUSS4:
                x = middle + half * node
                f = fast[0] + sum(
                    a * step((x - u) / eta) for a, u in zip(fast[1:], slow, strict=True)
                )
                total += half * weight * (f - level) ** 2
        return total


def to_mp(array):
    return [mpf(float(value)) for value in np.asarray(array)]


def loss_derivatives(fast, slow, jumps, values, eta, hessian=True):
    """Loss, gradient and Hessian in (a, u) by central differences in 60 digits.

    The step 1e-18 leaves a truncation error of about 1e-33 / eta^4, far below float64.
    """
    fast, slow, jumps, values = (to_mp(part) for part in (fast, slow, jumps, values))
    eta = mpf(float(eta))
    split = len(fast)
    point = fast + slow

    def value(y):
        return loss(y[:split], y[split:], jumps, values, eta)

    def moved(*moves):
        y = list(point)
        for index, by in moves:
            y[index] += by
        return value(y)

    with mp.workdps(60):
        h = mpf(10) ** -18
        size = len(point)
        base = value(point)
        plus = [moved((i, h)) for i in range(size)]
        minus = [moved((i, -h)) for i in range(size)]
        gradient = [(plus[i] - minus[i]) / (2 * h) for i in range(size)]
        matrix = None
        if hessian:
            matrix = np.zeros((size, size))
            for i in range(size):
                matrix[i, i] = float((plus[i] - 2 * base + minus[i]) / h**2)
                for j in range(i):
                    mixed = moved((i, h), (j, h)) - moved((i, h), (j, -h))
                    mixed += moved((i, -h), (j, -h)) - moved((i, -h), (j, h))
                    matrix[i, j] = matrix[j, i] = float(mixed / (4 * h**2))
        return float(base), np.array([float(g) for g in gradient]), matrix


def hitting_time(near, far, height):
    """Time for the nearer of two flanking neurons to reach a jump (no factor 1/2 in the loss).

    T = (1/D²) ∫₀^near (1 + x/(x³ + c)^{1/3})² dx, in 50 digits.
    """
    with mp.workdps(50):
        near, far, height = mpf(float(near)), mpf(float(far)), mpf(float(height))
        c = far**3 - near**3
        cut = min(near, mp.cbrt(c)) if c > 0 else near
        points = [mpf(0), cut, near] if 0 < cut < near else [mpf(0), near]
        integral = mpmath.quad(lambda x: (1 + x / mp.cbrt(x**3 + c)) ** 2, points)
        return integral / height**2


def numpy_sgd(positions, x, noise, *, jumps, values, epsilon, step_size, eta, gradient="exact"):
    """SGD of one seed in NumPy, float64: the published loop with either estimator."""
    weights, positions = np.zeros(len(positions) + 1), np.array(positions)
    for point, error in zip(x, noise, strict=True):
        z = (point - positions) / eta
        tail = 4 * np.maximum(0.5 - np.abs(z), 0) ** 3
        features = np.concatenate([[1.0], np.where(z > 0, 1 - tail, tail)])
        label = np.asarray(values)[np.searchsorted(jumps, point, side="right")] + error
        double = 2 * (features @ weights - label)
        bump = 12 * np.maximum(0.5 - np.abs(z), 0) ** 2 if gradient == "exact" else abs(z) <= 0.5
        moved = positions + epsilon * step_size * double * weights[1:] * bump / eta
        weights, positions = weights - step_size * double * features, moved
    return weights, positions
