"""Geometries: what they project, where flows, limits and steps on them stay and go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tts_jax as tts
from tts_jax import fast, geometry


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
    with pytest.raises(ValueError, match=r"`Product` of \['k', 'w'\] needs a variable"):
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


# --- a fast variable on the sphere ---------------------------------------------------------------


class Compass(tts.AbstractProblem):
    """L = ½ y·A y − y·(x + shift) + ½|x|², y on the sphere."""

    matrix: jax.Array
    shift: jax.Array

    @property
    def fast_geometry(self):
        return SPHERE

    @property
    def fast_solver(self):
        return fast.Quadratic()

    def init(self, *, key):
        return tts.State(jnp.array([0.0, 0.0, 1.0]), jax.random.normal(key, (3,)))

    def loss(self, y, x):
        return y @ self.matrix @ y / 2 - y @ (x + self.shift) + x @ x / 2

    def sample(self, *, key, step):
        return ()

    def sample_loss(self, y, x, sample):
        return self.loss(y, x)


COMPASS = Compass(
    jnp.array([[1.0, 0.3, 0.0], [0.3, -0.5, 0.2], [0.0, 0.2, 0.4]]), jnp.array([0.3, -0.2, 0.1])
)
NEEDLE = tts.State(np.array([0.6, 0.0, -0.8]), np.array([0.4, 0.9, -1.1]))


def test_the_least_of_a_quadratic_on_the_sphere():
    grid = np.linspace(0.0, np.pi, 721), np.linspace(0.0, 2 * np.pi, 1441)
    polar, azimuth = (part.ravel() for part in np.meshgrid(*grid))
    every = np.stack(
        [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], axis=1
    )
    for seed in range(5):
        slow = 2.0 ** (1 - seed) * rows(seed, 3)
        found = COMPASS.critical_solution(slow)
        values = np.einsum("ni,ij,nj->n", every, COMPASS.matrix, every) / 2
        values -= every @ (slow + COMPASS.shift)
        best = every[np.argmin(values)]
        assert COMPASS.loss(found.fast, slow) <= np.min(values) + slow @ slow / 2
        np.testing.assert_allclose(found.fast, best, atol=0.01)
        np.testing.assert_allclose(jnp.linalg.norm(found.fast), 1.0, rtol=1e-15)
        assert found.info["residual"] < 1e-14


def test_its_condition_and_the_mirror_images():
    lowest = jnp.linalg.eigh(COMPASS.matrix)[1][:, 0]
    level = Compass(COMPASS.matrix, jnp.zeros(3)).critical_solution(jnp.zeros(3))
    assert np.isinf(level.info["condition"])
    np.testing.assert_allclose(abs(level.fast @ lowest), 1.0, rtol=1e-14)
    # a pull across the lowest eigenvector, too weak to reach length 1: two mirror images
    across = 0.1 * jnp.linalg.eigh(COMPASS.matrix)[1][:, 2]
    tilted = Compass(COMPASS.matrix, jnp.zeros(3)).critical_solution(across)
    assert np.isinf(tilted.info["condition"])
    assert tilted.info["residual"] < 1e-14
    values = np.linalg.eigvalsh(COMPASS.matrix)
    y, info = COMPASS.critical_solution(jnp.array([0.4, 0.9, -1.1]))
    pull = jnp.array([0.4, 0.9, -1.1]) + COMPASS.shift
    multiplier = y @ (pull - COMPASS.matrix @ y)
    expected = (values[-1] + multiplier) / (values[0] + multiplier)
    np.testing.assert_allclose(info["condition"], expected, rtol=1e-12)


@pytest.mark.parametrize("pull", [(0.0, 2.0, 1.0), (2.0, 0.0, 1.0), (0.6, 0.8, 3.0)])
def test_a_lowest_eigenvalue_with_several_eigenvectors(pull):
    """A = diag(0, 0, 1), where the pull may have no part along the first of them."""
    flat = Compass(jnp.diag(jnp.array([0.0, 0.0, 1.0])), jnp.zeros(3))
    found = flat.critical_solution(jnp.array(pull))
    along = np.array([*pull[:2], 0.0]) / np.hypot(*pull[:2])
    angle = np.linspace(-np.pi, np.pi, 200_001)
    values = np.sin(angle) ** 2 / 2 - np.hypot(*pull[:2]) * np.cos(angle) - pull[2] * np.sin(angle)
    best = angle[np.argmin(values)]
    expected = np.cos(best) * along + np.sin(best) * np.eye(3)[2]
    np.testing.assert_allclose(found.fast, expected, atol=1e-4)
    assert found.info["residual"] < 1e-14
    assert found.info["condition"] < 2.0


@pytest.mark.slow
def test_it_is_differentiable_twice():
    slow = jnp.asarray(NEEDLE.slow)

    def height(x):
        return jnp.sum(COMPASS.critical_solution(x).fast * jnp.array([1.0, 2.0, 3.0]))

    slope, bend = jax.grad(height)(slow), jax.hessian(height)(slow)
    for axis in range(3):
        move = 1e-5 * jnp.eye(3)[axis]
        numeric = (height(slow + move) - height(slow - move)) / 2e-5
        np.testing.assert_allclose(slope[axis], numeric, rtol=1e-7)
        numeric = (jax.grad(height)(slow + move) - jax.grad(height)(slow - move)) / 2e-5
        np.testing.assert_allclose(bend[axis], numeric, rtol=1e-6, atol=1e-9)


def test_a_mirror_image_has_derivatives():
    values, vectors = jnp.linalg.eigh(COMPASS.matrix)
    level = Compass(COMPASS.matrix, jnp.zeros(3))

    def height(size):
        fast, info = level.critical_solution(size * vectors[:, 2])
        return jnp.sum(fast * jnp.array([1.0, 2.0, 3.0])), info["condition"]

    slope, condition = jax.grad(height, has_aux=True)(0.1)
    assert np.isinf(condition)
    numeric = (height(0.1 + 1e-5)[0] - height(0.1 - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(slope, numeric, rtol=1e-7)


def test_the_sphere_in_single_precision():
    with jax.enable_x64(True):
        single = jax.tree.map(lambda leaf: leaf.astype(np.float32), COMPASS)

        class Single(Compass):
            def init(self, *, key):
                return jax.tree.map(lambda leaf: leaf.astype(np.float32), super().init(key=key))

        one = Single(single.matrix, single.shift)
        slow = jnp.asarray(NEEDLE.slow, np.float32)
        found = one.critical_solution(slow)
    assert found.fast.dtype == np.float32
    np.testing.assert_allclose(found.fast, COMPASS.critical(jnp.asarray(NEEDLE.slow)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.fast), 1.0, rtol=3e-7)


def test_an_optimizer_and_noise_stay_on_the_sphere_too():
    options = {"state": NEEDLE, "key": jax.random.key(0), "epsilon": 0.5, "step_size": 0.1}
    rates = optax.partition(
        {"fast": optax.sgd(0.1), "slow": optax.sgd(0.05)}, {"fast": "fast", "slow": "slow"}
    )
    plain = tts.sgd(COMPASS, tau=[0.5], **options)
    other = tts.sgd(COMPASS, tau=[0.5], optimizer=rates, **options)
    np.testing.assert_allclose(other.fast, plain.fast, rtol=1e-12)
    np.testing.assert_allclose(other.slow, plain.slow, rtol=1e-12)

    class Hot(Compass):
        @property
        def temperature(self):
            return tts.State(0.5, None)

    hot = tts.sgd(Hot(COMPASS.matrix, COMPASS.shift), tau=[0.5], **options)
    np.testing.assert_allclose(np.linalg.norm(hot.fast, axis=-1), 1.0, rtol=1e-14)
    assert np.max(np.abs(hot.fast - plain.fast)) > 0.05


def test_the_flow_of_a_fast_variable_on_the_sphere_tends_to_its_limit():
    tau = np.array([0.3, 1.0])
    limit = tts.limit(COMPASS, NEEDLE, tau=tau, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.sum(limit.fast**2, axis=1), 1.0, rtol=1e-14)
    far = []
    for epsilon in (1e-2, 1e-3):
        flow = tts.flow(COMPASS, NEEDLE, epsilon=epsilon, tau=tau, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.sum(flow.fast**2, axis=1), 1.0, rtol=1e-14)
        far.append(np.max(np.abs(flow.slow - limit.slow)))
    assert 8 < far[0] / far[1] < 12
    reduced = tts.sgd(
        COMPASS, state=NEEDLE, key=jax.random.key(0), regime="limit", step_size=1e-4, tau=tau
    )
    np.testing.assert_allclose(reduced.slow[0], limit.slow, atol=2e-4)


def test_its_steps_are_projected_gradient_descent():
    run = tts.sgd(
        COMPASS, state=NEEDLE, key=jax.random.key(0), epsilon=0.5, step_size=0.1, tau=[0.5]
    )
    y, x = NEEDLE
    for _ in range(10):
        slope = COMPASS.matrix @ y - x - COMPASS.shift
        moved = y - 0.1 * (slope - (slope @ y) * y)
        y, x = moved / jnp.linalg.norm(moved), x - 0.05 * (x - y)
    np.testing.assert_allclose(run.fast[0, 0], y, rtol=1e-13)
    np.testing.assert_allclose(run.slow[0, 0], x, rtol=1e-13)


def test_its_relaxation_rate_is_that_of_the_tangent_space():
    slow = jnp.asarray(NEEDLE.slow)
    y = COMPASS.critical(slow)
    multiplier = y @ (slow + COMPASS.shift - COMPASS.matrix @ y)
    across = np.linalg.svd(np.asarray(y)[None])[2][1:]
    inside = across @ (np.asarray(COMPASS.matrix) + float(multiplier) * np.eye(3)) @ across.T
    expected = np.linalg.eigvalsh(inside)[0]
    np.testing.assert_allclose(COMPASS.relaxation_rate(y, slow), expected, rtol=1e-12)


def test_fast_particles_relax_at_the_rate_of_their_velocity():
    class Cloud(tts.AbstractProblem):
        @property
        def fast_geometry(self):
            return geometry.Particles()

        def init(self, *, key):
            return tts.State(jnp.ones((5, 2)), jnp.zeros(2))

        def loss(self, y, x):
            return jnp.mean((y - x) ** 2 * jnp.array([1.0, 3.0]))

    problem = Cloud()
    state = problem.init(key=jax.random.key(0))
    speed = jax.jacfwd(lambda y: problem.fast_field(y, state.slow))(state.fast).reshape(10, 10)
    expected = np.min(np.linalg.eigvalsh(-speed))
    np.testing.assert_allclose(problem.relaxation_rate(*state), expected, rtol=1e-12)


def test_what_a_fast_variable_on_the_sphere_cannot_have():
    start = NEEDLE._replace(fast=2.0 * NEEDLE.fast)
    with pytest.raises(
        ValueError, match="Argument `state.fast` must lie on the problem's `Sphere`"
    ):
        tts.limit(COMPASS, start, tau=TAU)
    with pytest.raises(TypeError, match="`fast.Argmin` is for a fast variable in a geometry of"):
        fast.Argmin().solve(COMPASS, jnp.zeros(3))
    with pytest.raises(TypeError, match="`fast.GradientSteps` on a `Sphere` needs a `start`"):
        fast.GradientSteps(2, 0.1).solve(COMPASS, jnp.zeros(3))
