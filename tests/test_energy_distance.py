"""The energy distance: against sums over all pairs, on tori, with weights, its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tts_jax.problems._energy_distance import circle_energy_distance, energy_distance
from tts_jax.problems._teachers import CircleTeacher


RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(37, 3)), RNG.normal(size=(50, 3)) + 0.3
P, Q = RNG.uniform(size=37), RNG.uniform(size=50)
THETA, PHI = RNG.uniform(-9, 9, 37), RNG.normal(size=50)


def squared(x, y, p=None, q=None, period=None):
    """D² by sums over all pairs."""
    p = np.full(len(x), 1 / len(x)) if p is None else p / p.sum()
    q = np.full(len(y), 1 / len(y)) if q is None else q / q.sum()

    def mean(a, wa, b, wb):
        away = np.abs(a[:, None] - b[None])
        if period is not None:
            away = np.minimum(away % period, period - away % period)
        return wa @ np.sqrt((away**2).sum(-1)) @ wb

    return 2 * mean(x, p, y, q) - mean(x, p, x, p) - mean(y, q, y, q)


def on_circle(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1024])
def test_matches_all_pairs_whatever_the_chunk(chunk):
    value = energy_distance(X, Y, x_weights=P, y_weights=Q, chunk=chunk)
    assert abs(value**2 - squared(X, Y, P, Q)) < 1e-14
    assert abs(energy_distance(X, Y, chunk=chunk) ** 2 - squared(X, Y)) < 1e-14


def test_equal_weights_are_the_default_and_scale_does_not_matter():
    plain = energy_distance(X, Y)
    np.testing.assert_allclose(
        energy_distance(X, Y, x_weights=np.full(37, 5), y_weights=np.full(50, 0.1)), plain, 1e-14
    )
    # a point of weight 2 is two points of weight 1
    doubled = energy_distance(np.concatenate([X, X[:1]]), Y)
    weights = np.ones(37)
    weights[0] = 2
    np.testing.assert_allclose(energy_distance(X, Y, x_weights=weights), doubled, rtol=1e-13)
    assert abs(doubled - plain) > 1e-4


@pytest.mark.parametrize("period", [4.0, np.array([4.0, 3.0, 5.0])])
def test_on_a_torus(period):
    value = energy_distance(4 * X, 5 * Y, period=period, x_weights=P)
    assert abs(value**2 - squared(4 * X, 5 * Y, P, period=period)) < 1e-14
    moved = 4 * X + period * RNG.integers(-2, 3, X.shape)
    np.testing.assert_allclose(
        energy_distance(moved, 5 * Y, period=period, x_weights=P), value, rtol=1e-12
    )
    assert abs(energy_distance(4 * X, 5 * Y, x_weights=P) - value) > 0.1


def test_across_the_seam():
    """Two points next to each other over the border of the torus, D² = 2 |x − y|."""
    value = energy_distance([[1.9, 0.0]], [[-1.9, 0.0]], period=4.0)
    np.testing.assert_allclose(value**2, 2 * 0.2, rtol=1e-13)


def test_symmetric_and_zero_for_equal_sets():
    np.testing.assert_allclose(energy_distance(X, Y), energy_distance(Y, X), rtol=1e-13)
    assert energy_distance(X, X[::-1]) < 1e-7  # its square is a rounding error
    assert circle_energy_distance(THETA, THETA[::-1]) < 1e-15
    assert circle_energy_distance(THETA, THETA + 2 * np.pi) < 1e-14


def test_many_points_without_the_matrix_of_pairs():
    x, y = CircleTeacher(10.0).sample(jax.random.key(0), 4096), RNG.uniform(-np.pi, np.pi, 4096)
    value = energy_distance(on_circle(x), on_circle(y))
    assert abs(value**2 - circle_energy_distance(x, y) ** 2) < 1e-12
    shapes = jax.eval_shape(energy_distance, jnp.zeros((100_000, 2)), jnp.zeros((4096, 2)))
    assert shapes.shape == ()
    compiled = jax.jit(energy_distance).lower(jnp.zeros((100_000, 2)), jnp.zeros((4096, 2)))
    memory = compiled.compile().memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 2**27


@pytest.mark.parametrize("weighted", [False, True])
def test_circle_matches_chords(weighted):
    weights = dict(theta_weights=P, phi_weights=Q) if weighted else {}
    value = circle_energy_distance(THETA, PHI, **weights)
    p, q = (P, Q) if weighted else (None, None)
    assert abs(value**2 - squared(on_circle(THETA), on_circle(PHI), p, q)) < 1e-14


def test_circle_against_a_density_on_a_grid():
    theta = -np.pi + 2 * np.pi / 512 * (np.arange(512) + 0.5)
    density = CircleTeacher(100.0)(theta)
    sample = np.asarray(CircleTeacher(100.0).sample(jax.random.key(1), 1000))
    value = circle_energy_distance(sample, theta, phi_weights=density)
    general = energy_distance(on_circle(sample), on_circle(theta), y_weights=density)
    assert abs(value**2 - general**2) < 1e-12
    assert 0 < value < 3 / np.sqrt(1000)


def test_circle_has_no_cancellation():
    """n points turned by δ: only the distances of a point to itself change at first order."""
    delta = np.array([1e-3, 1e-6, 1e-9])
    spread = np.sort(RNG.uniform(-3, 3, 9))
    values = np.array([circle_energy_distance(spread, spread + d) for d in delta])
    expected = 4 / 9 * np.sin(delta / 2)
    assert np.all(np.abs(values**2 / expected - 1) < [2e-2, 2e-5, 1e-6])
    jumps = circle_energy_distance([0.5], [0.5 + 1e-12])
    np.testing.assert_allclose(jumps, np.sqrt(4 * np.sin(5e-13)), rtol=1e-3)


def test_gradients_match_differences_and_are_finite_at_coincident_points():
    near, weights = jnp.asarray(Y[:37]), jnp.asarray(Q[:37])

    @jax.jit
    @jax.value_and_grad
    def distance(x, y, p):
        return energy_distance(x, y, x_weights=p, y_weights=weights, period=4.0)

    step = 1e-6 * RNG.normal(size=X.shape)
    _, gradient = distance(X, near, P)
    ends = [distance(X + s * step, near, P)[0] for s in (1, -1)]
    np.testing.assert_allclose(np.sum(gradient * step), (ends[0] - ends[1]) / 2, rtol=1e-5)
    shared = jnp.concatenate([near[:5], X[5:]])
    assert np.all(np.isfinite(distance(shared, near, P)[1]))
    assert np.all(np.isfinite(distance(near, near, weights)[1]))


def test_gradients_on_the_circle():
    distance = jax.jit(jax.value_and_grad(circle_energy_distance))
    turn = 1e-6 * RNG.normal(size=THETA.shape)
    _, slope = distance(THETA, PHI[:37])
    ends = [distance(THETA + s * turn, PHI[:37])[0] for s in (1, -1)]
    np.testing.assert_allclose(np.sum(slope * turn), (ends[0] - ends[1]) / 2, rtol=1e-5)
    assert np.all(np.isfinite(distance(THETA, THETA)[1]))


def test_under_jit_and_vmap():
    batch = jnp.stack([X, X + 1.0])
    values = jax.jit(jax.vmap(lambda x: energy_distance(x, Y)))(batch)
    np.testing.assert_allclose(values, [energy_distance(x, Y) for x in batch], rtol=1e-12)
    turned = jnp.stack([jnp.asarray(THETA), jnp.asarray(THETA) + 1.0])
    values = jax.jit(jax.vmap(lambda t: circle_energy_distance(t, PHI)))(turned)
    np.testing.assert_allclose(values, [circle_energy_distance(t, PHI) for t in turned], rtol=1e-12)


def test_double_precision_without_the_flag():
    with jax.enable_x64(False):
        value = energy_distance(X, Y)
        turned = circle_energy_distance(THETA, PHI)
    assert value.dtype == turned.dtype == np.float64
    np.testing.assert_allclose(value, energy_distance(X, Y), rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=X[0]), "`x` must be at least one point"),
        (dict(x=X[:0]), "`x` must be at least one point"),
        (dict(y=np.full((2, 3), np.nan)), "`y` must be finite"),
        (dict(y=Y[:, :2]), "same number of coordinates"),
        (dict(x_weights=P[:-1]), r"`x_weights` must have shape \(37,\)"),
        (dict(x_weights=-P), "`x_weights` must be zero or positive"),
        (dict(y_weights=np.zeros(50)), "`y_weights` must have a positive sum"),
        (dict(period=0.0), "`period` must be positive"),
        (dict(period=[4.0, 4.0]), r"`period` must be one number or have shape \(3,\)"),
        (dict(chunk=0), "`chunk` must be an integer of at least 1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        energy_distance(**(dict(x=X, y=Y) | arguments))


def test_bad_angles():
    with pytest.raises(ValueError, match="`theta` must be at least one point"):
        circle_energy_distance(X, PHI)
    with pytest.raises(ValueError, match="`phi` must be finite"):
        circle_energy_distance(THETA, [np.inf])
    with pytest.raises(ValueError, match="`phi_weights` must have shape"):
        circle_energy_distance(THETA, PHI, phi_weights=P)
