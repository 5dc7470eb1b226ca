"""The plateau form of the univariate network: against the dense closed forms and 60 digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import JUMPS, VALUES
from hypothesis import given, settings, strategies as st

import tts_jax as tts
from tts_jax.problems import _plateau, _step, univariate


ETA = 0.05
# six neurons each, in every way in which they can be degenerate
POSITIONS = {
    "apart": [0.1, 0.25, 0.4, 0.55, 0.7, 0.9],
    "unsorted and overlapping": [0.7, 0.2, 0.72, 0.21, 0.25, 0.95],
    "coincident": [0.3, 0.3, 0.3, 0.31, 0.7, 0.7],
    "all within one width": [0.5, 0.51, 0.505, 0.52, 0.535, 0.54],
    "three astride of 0": [-0.02, 0.0, 0.01, 0.4, 0.6, 0.8],
    "three astride of 1": [0.2, 0.4, 0.6, 0.985, 1.0, 1.02],
    "both ends": [0.01, -0.01, 0.5, 0.99, 1.01, 0.52],
    "outside": [-0.3, -0.026, -0.1, 0.5, 1.026, 1.3],
    "at the reach of the ends": [-0.025, 1.025, 0.0, 1.0, 0.3, 0.6],
}


def build(positions, eta=ETA):
    target = tts.PiecewiseConstant(JUMPS, VALUES)
    problem = tts.Univariate(target, neurons=len(positions), eta=eta)
    weights = np.random.default_rng(3).normal(size=len(positions) + 1)
    return problem, problem.state(slow=positions, fast=weights)


def numbers(problem):
    target = problem.target
    return _plateau.Numbers(*map(jnp.asarray, (problem.eta, target.jumps, target.values)))


loss = jax.jit(_plateau.loss)
fields = jax.jit(_plateau.fields)
critical = jax.jit(_plateau.critical)
condition = jax.jit(_plateau.condition)


def product(fast, slow, numbers, direction):
    """The derivative of `fields` along `direction`, by forward mode."""
    split = fast.shape[0]
    tangents = direction[:split], direction[split:]
    moved = jax.jvp(lambda a, u: _plateau.fields(a, u, numbers), (fast, slow), tangents)[1]
    return jnp.concatenate(moved)


def transposed(fast, slow, numbers, direction):
    split = fast.shape[0]
    pull = jax.vjp(lambda a, u: _plateau.fields(a, u, numbers), fast, slow)[1]
    return jnp.concatenate(pull((direction[:split], direction[split:])))


product, transposed = jax.jit(product), jax.jit(transposed)
slope = jax.jit(jax.grad(_plateau.loss, argnums=(0, 1)))


@pytest.mark.parametrize("name", POSITIONS)
def test_loss_and_gradient_in_60_digits(name):
    problem, state = build(POSITIONS[name])
    exact, gradient, _ = reference.loss_derivatives(*state, JUMPS, VALUES, ETA, hessian=False)
    assert abs(loss(*state, numbers(problem)) - exact) <= 1e-12
    ours = np.concatenate(fields(*state, numbers(problem)))
    assert np.max(np.abs(ours + gradient)) <= 1e-12
    automatic = np.concatenate(slope(*state, numbers(problem)))
    assert np.max(np.abs(automatic - gradient)) <= 1e-12


@pytest.mark.parametrize("name", POSITIONS)
def test_both_modes_give_the_hessian_of_the_dense_form(name):
    problem, state = build(POSITIONS[name])
    hessian = np.asarray(problem.hessian(*state))
    direction = np.random.default_rng(4).normal(size=13)
    expected = -hessian @ direction
    bound = 1e-13 * np.max(np.abs(hessian)) * 13
    for way in (product, transposed):
        got = way(*map(jnp.asarray, state), numbers(problem), jnp.asarray(direction))
        assert np.max(np.abs(got - expected)) <= bound


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.floats(-0.1, 1.1), min_size=6, max_size=6),
    eta=st.sampled_from([0.01, 0.05, 0.3, 2.5]),
)
def test_any_positions_and_widths_agree_with_the_dense_form(positions, eta):
    problem, state = build(positions, eta)
    assert abs(loss(*state, numbers(problem)) - problem.loss(*state)) <= 1e-12
    expected = problem.fields(*state)
    for ours, theirs in zip(fields(*state, numbers(problem)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(positions=st.lists(st.floats(-0.1, 1.1), min_size=6, max_size=6))
def test_the_critical_manifold_has_no_slope_and_the_loss_of_the_dense_form(positions):
    problem, state = build(positions)
    ours = critical(state.slow, numbers(problem))
    size = np.max(np.abs(ours))
    assert np.max(np.abs(problem.fields(ours, state.slow).fast)) <= 1e-13 * max(1.0, size)
    dense = problem.critical(state.slow)
    scale = max(1.0, np.max(np.abs(dense)) ** 2)
    difference = problem.loss(ours, state.slow) - problem.loss(dense, state.slow)
    assert abs(difference) <= 1e-12 * scale


@pytest.mark.parametrize("name", ["coincident", "outside"])
def test_coincident_and_dead_neurons_share_their_weight(name):
    problem, state = build(POSITIONS[name])
    ours = critical(state.slow, numbers(problem))
    np.testing.assert_allclose(ours, problem.critical(state.slow), atol=1e-10)
    assert np.isinf(condition(state.slow, numbers(problem)))


def test_condition_number():
    for name in ("apart", "unsorted and overlapping", "three astride of 0"):
        problem, state = build(POSITIONS[name])
        expected = float(problem.condition(state.slow))
        got = float(condition(state.slow, numbers(problem)))
        assert abs(got / expected - 1) <= 1e-14 * expected + 1e-12


@pytest.mark.parametrize(
    ("function", "derivative"),
    [
        (_plateau.gap_overlap, lambda r: -_plateau.gap_tail(r)),
        (_plateau.gap_tail, lambda r: -_step.gap_density(r)),
        (_plateau.own_cut, lambda z: -_step.step(z) * (1 - _step.step(z))),
    ],
)
def test_each_function_is_an_antiderivative(function, derivative):
    points = jnp.linspace(-1.3, 1.3, 211) + 1e-3
    points = points[points < 0.5] if function is _plateau.own_cut else points
    difference = (function(points + 1e-6) - function(points - 1e-6)) / 2e-6
    np.testing.assert_allclose(difference, derivative(points), atol=2e-8)
    np.testing.assert_allclose(jax.grad(function)(0.0), derivative(jnp.zeros(())), atol=1e-15)


def test_gap_functions_are_those_of_the_step():
    r = jnp.linspace(-1.5, 1.5, 301)
    np.testing.assert_allclose(_plateau.gap_overlap(r), _step.gap_mean(r) - r / 2, atol=2e-16)
    np.testing.assert_allclose(_plateau.gap_tail(r), 1 - _step.gap_cdf(r), atol=3e-16)
    assert np.all(_plateau.gap_overlap(r[r >= 1]) == 0)
    assert np.all(_plateau.gap_tail(r[r >= 1]) == 0)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [2e-3, 0.3])
def test_many_neurons_take_the_sorted_form(monkeypatch, eta):
    """Against the dense form at m = 160, with 1 to 60 neighbours within η."""
    problem = tts.Univariate(tts.PiecewiseConstant(JUMPS, VALUES), neurons=160, eta=eta)
    slow = np.random.default_rng(5).permutation(problem.init(key=jax.random.key(2)).slow)
    fast = np.random.default_rng(6).normal(size=161)
    assert problem.neurons >= univariate.SORTED_FROM
    ours = problem.loss(fast, slow), problem.fields(fast, slow), problem.critical(slow)
    monkeypatch.setattr(univariate, "SORTED_FROM", 10_000)
    jax.clear_caches()
    dense = problem.loss(fast, slow), problem.fields(fast, slow), problem.critical(slow)
    jax.clear_caches()
    np.testing.assert_allclose(ours[0], dense[0], rtol=1e-12)
    np.testing.assert_allclose(ours[1].fast, dense[1].fast, atol=1e-12 * 160)
    np.testing.assert_allclose(ours[1].slow, dense[1].slow, atol=1e-12 * 160)
    # a* itself is only as well determined as the condition number allows
    losses = [problem.loss(a, slow) for a in (ours[2], dense[2])]
    assert abs(losses[0] - losses[1]) <= 1e-12 * max(1.0, np.max(np.abs(dense[2])) ** 2)
    if eta == 2e-3:
        np.testing.assert_allclose(ours[2], dense[2], atol=1e-5)
