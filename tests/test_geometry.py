"""Geometries: what they project, where flows, limits and steps on them stay and go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tts_jax as tts
from tts_jax import geometry


SPHERE, TORUS = geometry.Sphere(), geometry.Torus(4.0)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def rows(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def test_the_sphere():
    x, v = SPHERE.project(rows(0, 5, 3)), rows(1, 5, 3)
    np.testing.assert_allclose(jnp.sum(x**2, axis=1), 1.0, rtol=1e-15)
    along = SPHERE.tangent(x, v)
    np.testing.assert_allclose(jnp.sum(along * x, axis=1), 0.0, atol=1e-15)
    np.testing.assert_allclose(SPHERE.tangent(x, along), along, atol=1e-15)
    # a retraction: to first order in the step it is the step
    far = SPHERE.retract(x, 1e-4 * along) - x - 1e-4 * along
    assert np.max(np.abs(far)) < 1e-7
    np.testing.assert_array_equal(geometry.Sphere(tangential=False).velocity(x, v), v)
    assert SPHERE.distance(x) < 1e-15 < 0.5 < SPHERE.distance(x.at[2].multiply(2.0))


def test_the_torus():
    x = jnp.array([[1.9, -2.0], [2.0, 5.3], [-6.1, 0.0]])
    expected = np.array([[1.9, -2.0], [-2.0, 1.3], [1.9, 0.0]])
    np.testing.assert_allclose(TORUS.project(x), expected, atol=1e-15)
    np.testing.assert_allclose(geometry.Torus([4.0, 2.0]).project(x)[1], [-2.0, -0.7], atol=1e-15)
    assert TORUS.distance(x) == 0.0
    assert np.isnan(TORUS.distance(x.at[0, 0].set(jnp.nan)))


def test_particles_move_by_the_first_variation():
    x, v = SPHERE.project(rows(0, 5, 3)), rows(1, 5, 3)
    particles = geometry.Particles(SPHERE)
    np.testing.assert_allclose(particles.velocity(x, v), 5.0 * SPHERE.tangent(x, v), rtol=1e-14)
    np.testing.assert_array_equal(particles.project(3.0 * x), SPHERE.project(3.0 * x))


def test_a_product_has_a_geometry_for_each_entry():
    both = geometry.Product({"k": SPHERE, "w": geometry.Particles(TORUS)})
    x = {"k": SPHERE.project(rows(0, 3)), "w": rows(1, 7, 2)}
    v = {"k": rows(2, 3), "w": rows(3, 7, 2)}
    speed = both.velocity(x, v)
    np.testing.assert_array_equal(speed["k"], SPHERE.tangent(x["k"], v["k"]))
    np.testing.assert_array_equal(speed["w"], 7.0 * v["w"])
    moved = both.retract(x, v)
    np.testing.assert_allclose(jnp.sum(moved["k"] ** 2), 1.0, rtol=1e-15)
    assert np.all(np.abs(moved["w"]) <= 2.0)
    with pytest.raises(ValueError, match=r"`Product` of \['k', 'w'\] needs a slow variable"):
        both.project({"k": x["k"]})


@pytest.mark.parametrize("one", [SPHERE, geometry.Particles(SPHERE), geometry.Euclidean()])
def test_noise_is_standard_normal_in_the_tangent_space(one):
    x = SPHERE.project(rows(0, 40_000, 3))
    drawn = one.noise(x, jax.random.key(4))
    free = 3 if isinstance(one, geometry.Euclidean) else 2
    np.testing.assert_allclose(jnp.mean(jnp.sum(drawn**2, axis=1)), free, rtol=0.02)
    assert np.max(np.abs(one.tangent(x, drawn) - drawn)) < 1e-14


def test_a_period_must_be_positive():
    with pytest.raises(ValueError, match="Argument `period` must be positive"):
        geometry.Torus([4.0, -1.0])


class Pull(tts.AbstractProblem):
    """L = ½|y − x|² + ½ x·A x on the sphere: the limit is the power method in continuous time."""

    matrix: jax.Array

    @property
    def geometry(self):
        return SPHERE

    def init(self, *, key):
        return tts.State(jnp.zeros(3), SPHERE.project(jax.random.normal(key, (3,))))

    def loss(self, y, x):
        return (jnp.sum((y - x) ** 2) + x @ self.matrix @ x) / 2

    def critical(self, slow):
        return slow

    def sample(self, *, key, step):
        return ()

    def sample_loss(self, y, x, sample):
        return self.loss(y, x)


PULL = Pull(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
START = tts.State(np.zeros(3), np.asarray(SPHERE.project(jnp.array([0.2, 0.7, -1.0]))))
TAU = np.array([0.1, 0.5, 2.0])


def flowed(tau):
    """exp(−τA) x, normalised: the gradient flow of ½ x·A x on the sphere."""
    x = np.exp(-tau[:, None] * np.array([1.0, 2.0, 4.0])) * START.slow
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_limit_on_the_sphere_is_exact_and_stays():
    limit = tts.limit(PULL, START, tau=TAU, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(limit.slow, flowed(TAU), rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.sum(limit.slow**2, axis=1), 1.0, rtol=1e-14)


def test_a_flow_on_the_sphere_tends_to_the_limit():
    far = []
    for epsilon in (1e-2, 1e-3):
        flow = tts.flow(PULL, START, epsilon=epsilon, tau=TAU, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.sum(flow.slow**2, axis=1), 1.0, rtol=1e-14)
        far.append(np.max(np.abs(flow.slow - flowed(TAU))))
    assert 5 < far[0] / far[1] < 20


def test_steps_on_the_sphere_tend_to_the_limit_too():
    far = []
    for step in (1e-2, 1e-3):
        run = tts.sgd(
            PULL, state=START, key=jax.random.key(0), regime="limit", step_size=step, tau=TAU
        )
        np.testing.assert_allclose(np.sum(run.slow**2, axis=-1), 1.0, rtol=1e-14)
        far.append(np.max(np.abs(run.slow[0] - flowed(TAU))))
    assert 8 < far[0] / far[1] < 12


@pytest.mark.parametrize("dynamics", ["flow", "limit", "sgd"])
def test_a_start_off_the_sphere_is_refused(dynamics):
    more = {"flow": {"epsilon": 0.1}, "limit": {}, "sgd": {"epsilon": 0.1, "step_size": 0.1}}
    if dynamics == "sgd":
        more["sgd"]["key"] = jax.random.key(0)
    start = START._replace(slow=2.0 * START.slow)
    with pytest.raises(
        ValueError, match="Argument `state.slow` must lie on the problem's `Sphere`"
    ):
        getattr(tts, dynamics)(PULL, start, tau=TAU, **more[dynamics]) if dynamics != "sgd" else (
            tts.sgd(PULL, state=start, tau=TAU, **more["sgd"])
        )
