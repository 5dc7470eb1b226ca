"""Activations and targets of the univariate problem, against quadrature that shares no code."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp
from scipy.integrate import quad
from scipy.special import erfc, expit

import tts_jax as tts
from tts_jax.problems import _pairs


# --- an independent reference -----------------------------------------------------------------

SIGMA = {
    "cubic": lambda z: np.where(
        z < 0, 4 * np.clip(z + 0.5, 0, 1) ** 3, 1 - 4 * np.clip(0.5 - z, 0, 1) ** 3
    ),
    "ramp": lambda z: np.clip(z + 0.5, 0, 1),
    "logistic": expit,
    "erf": lambda z: erfc(-z) / 2,
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
}
TARGETS = {
    "constant": (
        tts.PiecewiseConstant([0.2, 0.55, 0.8], [1.0, -2.0, 0.5, 3.0]),
        lambda x: np.array([1.0, -2.0, 0.5, 3.0])[np.searchsorted([0.2, 0.55, 0.8], x, "right")],
        [0.2, 0.55, 0.8],
    ),
    "linear": (  # the teacher of the paper's ReLU experiment
        tts.PiecewiseLinear.from_kinks([0.3, 0.5, 0.7], [1.0, -2.0, 3.0]),
        lambda x: np.maximum(x - 0.3, 0) - 2 * np.maximum(x - 0.5, 0) + 3 * np.maximum(x - 0.7, 0),
        [0.3, 0.5, 0.7],
    ),
    "function": (
        tts.Function(lambda x: jnp.sin(7 * x) + jnp.where(x < 0.4, 0.0, x), breakpoints=[0.4]),
        lambda x: np.sin(7 * x) + np.where(x < 0.4, 0.0, x),
        [0.4],
    ),
}
# coincident, straddling an end, outside, a gap of one ulp, crossing order
SLOW = np.array(
    [
        [0.31, 0.31, 0.62, 0.65, 0.9],
        [-0.013, 0.008, 0.33, 0.992, 1.017],
        [-0.7, 0.11, 0.47, 1.06, 1.9],
        [0.61, np.nextafter(0.61, 1), 0.24, 0.71, 0.05],
    ]
)
FAST = np.random.default_rng(3).normal(size=(4, 6))
WIDTH = {"relu": 1.0, "logistic": 0.03, "erf": 0.05, "tanh": 0.05}


@functools.cache
def build(name, kind, neurons=5):
    activation = {"tanh": jnp.tanh}.get(name, name)
    width = WIDTH.get(name, 0.11)
    return tts.Univariate(TARGETS[kind][0], activation=activation, neurons=neurons, eta=width)


def nodes(slow, eta, breaks, count=20):
    """Fine composite Gauss nodes and weights that respect every kink and transition."""
    moves = eta * np.array([-20, -8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8, 20])
    edges = np.concatenate([np.add.outer(slow, moves).ravel(), breaks, np.linspace(0, 1, 9)])
    edges = np.unique(np.clip(edges, 0, 1))
    z, weights = np.polynomial.legendre.leggauss(count)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + z)).ravel(), (half * weights).ravel()


def reference_loss(name, kind, fast, slow, eta):
    _, target, breaks = TARGETS[kind]
    x, weights = nodes(slow, eta, breaks)
    f = fast[0] + SIGMA[name]((x[:, None] - slow) / eta) @ fast[1:]
    return weights @ (f - target(x)) ** 2


def losses(problem):
    """(loss, its estimated error) of all states."""
    both = jax.jit(lambda a, u: (problem.loss(a, u), problem.loss_error(a, u)))
    return np.transpose([both(*state) for state in zip(FAST, SLOW, strict=True)])


# every case compiles anew: each way to compute, and the rest as slow tests
USUAL = {
    "cubic": ["linear"],
    "ramp": ["constant"],
    "logistic": ["constant"],
    "erf": ["linear", "function"],
    "relu": ["constant", "linear"],
    "tanh": ["constant"],
}


def pairs(usual):
    """All pairs of activation and target, those slow that are not usual."""
    every = itertools.product(SIGMA, TARGETS)
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(*pair, marks=marks[pair[1] in usual.get(pair[0], [])]) for pair in every]


@pytest.mark.parametrize(("name", "kind"), pairs(USUAL))
def test_loss(name, kind):
    problem = build(name, kind)
    loss, error = losses(problem)
    expected = [
        reference_loss(name, kind, a, u, float(problem.eta))
        for a, u in zip(FAST, SLOW, strict=True)
    ]
    np.testing.assert_allclose(loss, expected, rtol=2e-13)
    assert np.all(error <= 1e-12 * (1 + loss))
    if name != "tanh" and kind != "function":
        assert np.all(error == 0)


@pytest.mark.slow
def test_loss_against_scipy_adaptive_quadrature():
    problem = build("logistic", "constant")
    fast, slow, breaks = (
        FAST[1],
        SLOW[1],
        np.unique(np.clip([*SLOW[1], *TARGETS["constant"][2]], 0, 1)),
    )

    def squared(x):
        f = fast[0] + expit((x - slow) / 0.03) @ fast[1:]
        return (f - TARGETS["constant"][1](x)) ** 2

    edges = [0.0, *breaks[(breaks > 0) & (breaks < 1)], 1.0]
    total = sum(quad(squared, a, b, epsabs=1e-14)[0] for a, b in itertools.pairwise(edges))
    assert abs(problem.loss(fast, slow) - total) <= 1e-12


@pytest.mark.parametrize("name", ["logistic", "erf"])
def test_integrals_of_smooth_steps_in_20_digits(name):
    """S₁, S₂, P, Q and R, where formulas change, cancel, or have a removable singularity."""
    step, bump = {
        "logistic": (
            lambda z: 1 / (1 + mp.exp(-z)),
            lambda z: 1 / (1 + mp.exp(-z)) / (1 + mp.exp(z)),
        ),
        "erf": (lambda z: mp.erfc(-z) / 2, lambda z: mp.exp(-z * z) / mp.sqrt(mp.pi)),
    }[name]
    of = _pairs.SMOOTH_STEPS[name]
    points = [(0, 0), (0, 1), (-1, 0), (1, -1), (-6, 4), (3, 4.9999), (30, 28)]
    with mp.workdps(20):
        for p, q in points:
            cuts = {-50.0, 0.0, *(min(0.0, max(-50.0, s - c)) for c in (p, q) for s in (-9, 0, 9))}
            factors = (step, step), (bump, step), (bump, bump)
            exact = [
                mp.quad(lambda t, f=f, g=g, p=p, q=q: f(t + p) * g(t + q), sorted(cuts))
                for f, g in factors
            ]
            ours = [float(g(*map(jnp.asarray, (1.0 * p, 1.0 * q)))) for g in of[4:]]
            np.testing.assert_allclose(ours, [float(e) for e in exact], rtol=1e-14, atol=2e-15)
        for z in (-0.7, 0.0, 25.0):
            cuts = [-60.0, -20.0, -5.0, *([0.0] if z > 0 else []), z]
            first = mpmath.quad(step, cuts)
            second = mpmath.quad(lambda t, z=z: (z - t) * step(t), cuts)
            np.testing.assert_allclose(of.ramp(z), float(first), rtol=1e-14, atol=1e-16)
            np.testing.assert_allclose(of.bowl(z), float(second), rtol=1e-14, atol=1e-15)


SMOOTH_AND_NOT = {"relu": ["linear"], "logistic": ["constant"]}


@pytest.mark.parametrize(("name", "kind"), pairs(SMOOTH_AND_NOT))
def test_gradient_and_hessian(name, kind):
    """Integrals, automatic differentiation and differences of the reference agree."""
    problem = build(name, kind)

    @jax.jit
    def everything(point):
        def gradient(point):
            return jax.grad(lambda y: problem.loss(y[:6], y[6:]))(point)

        fields = jnp.concatenate(problem.fields(point[:6], point[6:]))
        return (
            fields,
            gradient(point),
            problem.hessian(point[:6], point[6:]),
            jax.jacfwd(gradient)(point),
        )

    for fast, slow in zip(FAST, SLOW, strict=True):
        point = np.concatenate([fast, slow])
        fields, gradient, hessian, automatic = map(np.asarray, everything(point))
        np.testing.assert_allclose(gradient, -fields, atol=1e-12 * (1 + np.abs(fields).max()))
        np.testing.assert_allclose(automatic, hessian, atol=1e-11 * (1 + np.abs(hessian).max()))
        h = 1e-5
        differences = [
            (
                reference_loss(name, kind, *np.split(point + h * e, [6]), float(problem.eta))
                - reference_loss(name, kind, *np.split(point - h * e, [6]), float(problem.eta))
            )
            / (2 * h)
            for e in np.eye(11)
        ]
        np.testing.assert_allclose(-fields, differences, atol=3e-5 * (1 + np.abs(fields).max()))


@pytest.mark.parametrize(("name", "kind"), pairs(SMOOTH_AND_NOT))
def test_critical_manifold(name, kind):
    problem = build(name, kind)
    for slow in SLOW:
        fast = np.asarray(problem.critical(slow))
        assert np.max(np.abs(problem.fields(fast, slow).fast)) <= 1e-10
        moved = fast + 1e-3 * np.random.default_rng(0).normal(size=6)
        assert problem.loss(moved, slow) > problem.loss(fast, slow)
    # coincident neurons share their weight: least norm
    fast = np.asarray(problem.critical(SLOW[0]))
    np.testing.assert_allclose(fast[1], fast[2], rtol=1e-8)
    assert np.isinf(problem.condition(SLOW[0]))
    assert 1 < problem.condition(SLOW[3] + np.arange(5) * 0.05) < 1e9


def test_derivatives_of_the_critical_manifold():
    problem, slow = build("relu", "linear"), np.array([0.1, 0.27, 0.45, 0.66, 0.86])
    moved = jax.jit(problem.critical)
    difference = [(moved(slow + e) - moved(slow - e)) / 2e-6 for e in 1e-6 * np.eye(5)]
    ours = jax.jit(jax.jacrev(problem.critical))(slow)
    np.testing.assert_allclose(ours, np.transpose(difference), atol=1e-6 * np.max(np.abs(ours)))


def test_estimated_error_is_honest():
    """A kink that quadrature is not told of: errors fall with the order, as their estimates do."""
    fast, slow = np.array([0.3, 1.0, -0.5]), np.array([0.2, 0.6])
    both = jax.jit(lambda problem: (problem.loss(fast, slow), problem.loss_error(fast, slow)))

    def exact(kink):
        def squared(t):
            z = np.clip((t - slow) / 0.3 + 0.5, 0, 1)
            return (fast[0] + z @ fast[1:] - np.sqrt(abs(t - kink))) ** 2

        edges = sorted([0, 0.05, 0.35, 0.45, 0.75, kink, 1])
        return sum(quad(squared, a, b, epsabs=1e-12)[0] for a, b in itertools.pairwise(edges))

    kinks = np.array([0.137, 0.21, 0.3333, 0.49, 0.56, 0.666, 0.789, 0.93])
    true, totals = np.array([exact(kink) for kink in kinks]), []
    for order in (4, 16):
        loss, estimates = np.transpose([both(hidden(order, kink)) for kink in kinks])
        errors = np.abs(loss - true)
        assert np.all(errors <= 5 * estimates)
        assert np.all(estimates <= 100 * errors)
        totals.append([np.sum(errors), np.sum(estimates)])
    assert np.all(np.array(totals[1]) < 0.4 * np.array(totals[0]))


class Root(eqx.Module):
    """√|x − kink|, whose kink is a number of the problem."""

    kink: jax.Array

    def __call__(self, x):
        return jnp.sqrt(jnp.abs(x - self.kink))


def hidden(order, kink):
    target = tts.Function(Root(np.asarray(0.0)))
    target = eqx.tree_at(lambda t: t.function.kink, target, np.asarray(kink))
    return tts.Univariate(target, activation="ramp", neurons=2, eta=0.3, order=order)
