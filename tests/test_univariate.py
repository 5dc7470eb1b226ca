"""The univariate problem: exact integrals, against 60-digit quadrature and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import JUMPS, VALUES
from hypothesis import given, settings, strategies as st

import tts_jax as tts
from tts_jax.problems import _step


RNG = np.random.default_rng(20230419)

# name: (positions, width, jumps, values); every way in which neurons can be degenerate
CONFIGURATIONS = {
    "random, paper's width": (RNG.uniform(size=7), 4e-3, JUMPS, VALUES),
    "random, wide": (RNG.uniform(size=6), 0.3, JUMPS, VALUES),
    "wider than the interval": (RNG.uniform(size=4), 2.5, JUMPS, VALUES),
    "coincident": (np.array([0.3, 0.3, 0.31, 0.7, 0.7]), 0.05, JUMPS, VALUES),
    "a gap of one ulp": (np.array([0.3, np.nextafter(0.3, 1), 0.6]), 0.05, JUMPS, VALUES),
    "neurons on jumps": (np.array([0.2, 0.35, 0.5, 0.65, 0.8]), 0.05, JUMPS, VALUES),
    "straddling 0": (np.array([-0.02, 0.0, 0.01, 0.4]), 0.05, JUMPS, VALUES),
    "straddling 1": (np.array([0.4, 0.99, 1.0, 1.02]), 0.05, JUMPS, VALUES),
    "coincident at the edges": (np.array([0.01, 0.01, 0.99, 0.99]), 0.05, [0.3], [0.0, 1.0]),
    "outside": (np.array([-0.3, -0.026, 0.5, 1.026, 1.3]), 0.05, JUMPS, VALUES),
    "just at the reach of an edge": (np.array([-0.025, 1.025, 0.1]), 0.05, [0.3], [0.0, 1.0]),
    "one neuron, one jump": (np.array([0.4]), 0.05, [0.3], [0.0, 1.0]),
    "one neuron on the one jump": (np.array([0.3]), 0.05, [0.3], [0.0, 1.0]),
    "no jump": (np.array([0.2, 0.6]), 0.05, [], [2.0]),
    "unsorted": (np.array([0.7, 0.2, 0.9, 0.21]), 0.05, JUMPS, VALUES),
}


def build(positions, eta, jumps, values):
    problem = tts.Univariate(tts.PiecewiseConstant(jumps, values), neurons=len(positions), eta=eta)
    weights = np.random.default_rng(len(positions)).normal(size=len(positions) + 1)
    return problem, problem.state(slow=positions, fast=weights)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_gradient_and_hessian_to_1e_12(name):
    problem, state = build(*CONFIGURATIONS[name])
    loss, gradient, hessian = reference.loss_derivatives(
        state.fast, state.slow, problem.target.jumps, problem.target.values, problem.eta
    )
    assert abs(problem.loss(*state) - loss) <= 1e-12
    fields = np.concatenate(problem.fields(*state))
    assert np.max(np.abs(fields + gradient)) <= 1e-12
    # second derivatives in u are of size a²/η: absolute where that is of order one
    ours = np.asarray(problem.hessian(*state))
    assert np.max(np.abs(ours - hessian)) <= 1e-12 * max(1.0, 0.1 / float(problem.eta))
    np.testing.assert_array_equal(problem.jacobian(*state), -ours)


@pytest.mark.parametrize(
    "name",
    [
        # every case compiles anew
        pytest.param(name, marks=[pytest.mark.slow] if place % 2 else [])
        for place, name in enumerate(CONFIGURATIONS)
    ],
)
def test_automatic_differentiation_agrees_with_the_closed_forms(name):
    problem, state = build(*CONFIGURATIONS[name])
    split = problem.neurons + 1

    def loss(point):
        return problem.loss(point[:split], point[split:])

    point = jnp.concatenate(state)
    scale = np.max(np.abs(problem.hessian(*state)))
    np.testing.assert_allclose(
        jax.grad(loss)(point), -np.concatenate(problem.fields(*state)), atol=1e-12
    )
    np.testing.assert_allclose(
        jax.hessian(loss)(point), problem.hessian(*state), atol=1e-13 * max(scale, 10.0)
    )


def test_paper_size_against_high_precision(problem, starts):
    """m = 20 at the paper's η: loss and gradient, on and off the critical manifold."""
    slow = np.asarray(starts.slow[0])
    for fast in (np.asarray(problem.critical(slow)), RNG.normal(size=21)):
        loss, gradient, _ = reference.loss_derivatives(
            fast, slow, JUMPS, VALUES, problem.eta, hessian=False
        )
        assert abs(problem.loss(fast, slow) - loss) <= 1e-12
        assert np.max(np.abs(np.concatenate(problem.fields(fast, slow)) + gradient)) <= 1e-12


def test_loss_against_scipy_adaptive_quadrature(problem, starts):
    from scipy.integrate import quad

    fast, slow = RNG.normal(size=21), np.asarray(starts.slow[0])
    edges = np.concatenate([slow - 2e-3, slow, slow + 2e-3, JUMPS, [0.0, 1.0]])
    edges = np.unique(np.clip(edges, 0.0, 1.0))

    def squared(x):
        z = np.clip((x - slow) / 4e-3, -0.5, 0.5)
        features = np.where(z <= 0, 4 * (z + 0.5) ** 3, 1 - 4 * (0.5 - z) ** 3)
        level = VALUES[np.searchsorted(JUMPS, x, side="right")]
        return (fast[0] + features @ fast[1:] - level) ** 2

    total = sum(quad(squared, a, b)[0] for a, b in zip(edges[:-1], edges[1:], strict=True))
    assert abs(problem.loss(fast, slow) - total) <= 1e-12


def test_predict_is_the_published_network(problem, starts):
    """The bias of the published code is a neuron frozen at −η/2, whose step is 1 on [0, 1]."""
    fast, slow = RNG.normal(size=21), np.asarray(starts.slow[0])
    x = np.concatenate([np.linspace(0, 1, 101), slow])
    z = (x[:, None] - np.concatenate([[-2e-3], slow])) / 4e-3
    rising = np.clip(4 * (z + 0.5) ** 3, 0, 0.5) + np.clip(0.5 - 4 * (0.5 - z) ** 3, 0, 0.5)
    np.testing.assert_allclose(problem.predict(fast, slow, x), rising @ fast, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "derivative"),
    [
        (_step.ramp, _step.step),
        (_step.step, _step.bump),
        (_step.bump, _step.bump_slope),
        (_step.gap_mean, lambda r: _step.gap_cdf(r) - 0.5),
        (_step.gap_cdf, _step.gap_density),
        (_step.gap_density, _step.gap_density_slope),
    ],
)
def test_each_function_is_the_derivative_of_the_one_before(function, derivative):
    points = jnp.linspace(-1.3, 1.3, 211) + 1e-3
    h = 1e-6
    difference = (function(points + h) - function(points - h)) / (2 * h)
    np.testing.assert_allclose(difference, derivative(points), atol=2e-8)
    # and at the kink of |r|, where automatic differentiation of the formula would fail
    np.testing.assert_allclose(jax.grad(function)(0.0), derivative(jnp.zeros(())), atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.lists(st.floats(-0.2, 1.2), min_size=3, max_size=3),
    shift=st.permutations(range(3)),
)
def test_neurons_can_be_permuted(positions, shift):
    problem, state = build(np.array(positions), 0.1, JUMPS, VALUES)
    order = np.array(shift)
    fast = np.concatenate([state.fast[:1], state.fast[1:][order]])
    slow = state.slow[order]
    np.testing.assert_allclose(problem.loss(fast, slow), problem.loss(*state), atol=1e-12)
    np.testing.assert_allclose(
        problem.fields(fast, slow).slow, problem.fields(*state).slow[order], atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(positions=st.lists(st.floats(-0.2, 1.2), min_size=3, max_size=3))
def test_mirror_image_has_the_same_loss(positions):
    """x → 1 − x with reversed target: σ(−z) = 1 − σ(z) moves the weights into the bias."""
    problem, state = build(np.array(positions), 0.1, JUMPS, VALUES)
    target = tts.PiecewiseConstant(1 - np.array(JUMPS)[::-1], VALUES[::-1])
    mirrored = tts.Univariate(target, neurons=3, eta=0.1)
    fast = np.concatenate([[np.sum(state.fast)], -np.asarray(state.fast[1:])])
    np.testing.assert_allclose(
        mirrored.loss(fast, 1 - state.slow), problem.loss(*state), atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    positions=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
    level=st.floats(-3, 3),
    size=st.floats(0.1, 3),
)
def test_loss_scales_with_the_target(positions, level, size):
    problem, state = build(np.array(positions), 0.1, JUMPS, VALUES)
    target = tts.PiecewiseConstant(JUMPS, size * np.array(VALUES) + level)
    scaled = tts.Univariate(target, neurons=3, eta=0.1)
    fast = size * state.fast + level * np.eye(4)[0]
    np.testing.assert_allclose(
        scaled.loss(fast, state.slow), size**2 * problem.loss(*state), atol=1e-10
    )


# --- critical manifold ------------------------------------------------------------------------


def test_critical_manifold_is_stationary_and_minimal(problem, starts):
    for lane in range(8):
        slow = starts.slow[lane]
        fast = problem.critical(slow)
        assert np.max(np.abs(problem.fields(fast, slow).fast)) <= 1e-12
        nearby = fast + 1e-3 * RNG.normal(size=21)
        assert problem.loss(nearby, slow) > problem.loss(fast, slow)


def test_critical_manifold_of_coincident_neurons_has_least_norm():
    """The limit of the fast flow from a = 0 is the minimum-norm least-squares solution."""
    positions = np.array([-0.5, 0.3, 0.3, 0.7, 1.4])  # one left of [0, 1], one right of it
    problem, _ = build(positions, 0.05, JUMPS, VALUES)
    x, w = np.polynomial.legendre.leggauss(20)
    edges = np.unique(np.clip(np.concatenate([positions + s for s in (-0.025, 0, 0.025)]), 0, 1))
    edges = np.unique(np.concatenate([edges, JUMPS, [0, 1]]))
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    nodes, weights = (middle + half * x).ravel(), np.sqrt((half * w).ravel())
    features = np.column_stack([problem.predict(row, positions, nodes) for row in np.eye(6)])
    expected = np.linalg.lstsq(features * weights[:, None], problem.target(nodes) * weights)[0]
    np.testing.assert_allclose(problem.critical(positions), expected, atol=1e-10)
    assert np.isinf(problem.condition(positions))


def test_condition_number_grows_with_the_inverse_square_of_the_gap(problem, separated):
    def condition(gap):
        slow = separated.slow.at[1].set(separated.slow[0] + gap)
        return float(problem.condition(slow))

    ratio = condition(1e-3 * 4e-3) / condition(1e-2 * 4e-3)
    assert 90 < ratio < 110


def test_reduced_jacobian_is_the_derivative_of_the_reduced_field(problem, separated):
    slow = jnp.asarray(separated.slow).at[4].set(separated.slow[5] - 2e-3)
    ours = problem.reduced_jacobian(problem.critical(slow), slow)
    difference = np.column_stack(
        [
            (problem.reduced_field(slow + d) - problem.reduced_field(slow - d)) / 2e-7
            for d in 1e-7 * np.eye(20)
        ]
    )
    np.testing.assert_allclose(ours, difference, atol=1e-6 * np.max(np.abs(ours)))
    # and the general form of any problem, by the implicit function theorem
    general = tts.AbstractProblem.reduced_jacobian(problem, problem.critical(slow), slow)
    np.testing.assert_allclose(general, ours, atol=1e-9 * np.max(np.abs(ours)))


def test_recovery_is_the_distance_to_the_nearest_neuron(problem):
    slow = np.linspace(0.01, 0.99, 20)
    expected = [min(abs(v - u) for u in slow) for v in JUMPS]
    np.testing.assert_allclose(problem.recovery(slow), expected, rtol=1e-15)
    batch = np.stack([slow, slow + 1e-3])
    assert problem.recovery(batch).shape == (2, 5)


def test_init_is_sorted_uniform_and_depends_on_the_key_only(problem):
    state = problem.init(key=jax.random.key(5))
    assert np.all(np.diff(state.slow) > 0)
    assert np.all(state.fast == 0)
    np.testing.assert_array_equal(state.slow, problem.init(key=jax.random.key(5)).slow)
    keys = jax.random.split(jax.random.key(0), (5, 100))
    many = problem.init(key=keys).slow
    assert many.shape == (5, 100, 20)
    np.testing.assert_array_equal(many[2, 7], problem.init(key=keys[2, 7]).slow)
    np.testing.assert_array_equal(many[0], jax.vmap(lambda k: problem.init(key=k).slow)(keys[0]))
    from scipy.stats import kstest

    assert kstest(np.ravel(many), "uniform").pvalue > 1e-3


def test_float32_keeps_six_digits():
    """What float32 promises: the loss to a few 1e-6 of its largest term, here max f² = 25."""
    problem, state = build(*CONFIGURATIONS["random, wide"])
    exact = float(problem.loss(*state))

    def narrow(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    got = narrow(problem).loss(*narrow(state))
    assert got.dtype == jnp.float32
    assert abs(float(got) - exact) <= 25 * 64 * np.finfo(np.float32).eps
