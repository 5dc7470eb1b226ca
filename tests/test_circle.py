"""Sums over planar data of ReLU neurons, against those over the data one by one."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tts_jax.problems._circle import BLOCK, CircleData


def circle(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def teacher(rng, gamma, count):
    """Neurons that gather at the angles 0 and 0.4 π for a large γ."""
    turn = rng.uniform(0, 2 * np.pi, count)
    angles = 2 * np.arctan2(np.sin(turn), np.sqrt(1 + gamma) * np.cos(turn))
    angles[::3] += 0.4 * np.pi
    return circle(angles)


def uniform(rng, count):
    return circle(rng.uniform(0, 2 * np.pi, count))


def features(x, w):
    # in one order of rounding, so that exactly orthogonal pairs are 0
    return np.maximum(x[:, :1] * w[:, 0] + x[:, 1:] * w[:, 1], 0)


def brute(x, y, w, u):
    """K, Φᵀy/n, r, and Σ_{i: w_j·x_i > 0} r_i x_i/n."""
    phi = features(x, w)
    n, m = phi.shape
    misfit = phi @ u / m - y
    return phi.T @ phi / (n * m), phi.T @ y / n, misfit, ((phi > 0) * misfit[:, None]).T @ x / n


SMALL = 7, 5
AXES = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
DIAGONALS = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


def cases():
    """Most of one shape, so that they share what is compiled."""
    rng = np.random.default_rng(3)
    n, m = 60, 40
    normal, some, one = rng.normal(size=(n, 2)), uniform(rng, m), uniform(rng, m // 2)
    yield "random", normal, some
    yield "coincident", normal, np.repeat(some[:4], m // 4, axis=0)
    yield "opposite", normal, np.concatenate([one, -one])
    yield "clustered", normal, circle(1.0 + 1e-9 * rng.normal(size=m))
    yield "clustered at 0", normal, circle(1e-9 * rng.normal(size=m))
    yield "clustered at π", normal, circle(np.pi + 1e-16 * rng.normal(size=m))
    yield "axes", normal, np.tile(AXES, (m // 4, 1))
    yield "on boundaries", np.concatenate([AXES, DIAGONALS, normal[8:]]), np.tile(AXES, (10, 1))
    yield (
        "only on boundaries",
        np.tile(AXES, (15, 1)),
        np.tile(np.vstack([AXES, DIAGONALS]), (5, 1)),
    )
    yield (
        "negative zeros",
        np.where(np.tile(AXES, (15, 1)) == 0, -0.0, 1.0),
        -np.tile(AXES, (10, 1)),
    )
    yield "diagonals", np.tile(DIAGONALS, (15, 1)), np.tile(np.vstack([AXES, DIAGONALS]), (5, 1))
    yield "duplicates", np.repeat(normal[:4], 15, axis=0), some
    yield "zero data", np.concatenate([np.zeros((3, 2)), normal[5:], np.zeros((2, 2))]), some
    yield "only zero data", np.zeros((n, 2)), some
    yield "one side", np.abs(normal), circle(rng.uniform(0, 1.5, m))
    yield "one line", np.outer(rng.normal(size=n), [0.6, 0.8]), some
    yield "one direction", np.tile([0.6, 0.8], (n, 1)), some
    yield "data in one cell", circle(2.0 + 1e-7 * rng.normal(size=n)), some
    yield "lengths", normal * 10.0 ** rng.uniform(-3, 1, (n, 1)), some
    yield "no unit vectors", normal, some * rng.uniform(0, 3, (m, 1))
    yield "zero neurons", normal, np.concatenate([np.zeros((BLOCK + 1, 2)), some[BLOCK + 1 :]])
    yield "more neurons than data", normal[:5], uniform(rng, 5 * BLOCK + 3)
    for n, m in [(1, 1), SMALL]:
        yield f"{n} data, {m} neurons", rng.normal(size=(n, 2)), uniform(rng, m)


CASES = [pytest.param(x, w, id=name) for name, x, w in cases()]


# most of the time of these tests is the compiler's
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quickly
def everything(x, y, w, u, penalty, prior):
    neurons = CircleData.of(x, y).at(w)
    sums = neurons.gram(), neurons.right(), neurons.matvec(u), neurons.force(u)
    return sums, neurons.mean_square(u), neurons.residuals(u), neurons.ridge(penalty, prior)


def check(x, y, w, u, penalty, prior):
    sums, mean_square, residuals, solved = everything(x, y, w, u, penalty, prior)
    gram, right, misfit, force = brute(x, y, w, u)
    size = max(1.0, np.mean(np.sum(x**2, axis=1))) * max(1.0, np.max(np.sum(w**2, axis=1)))
    for ours, reference in zip(sums, (gram, right, gram @ u, force), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-15 * size)
    np.testing.assert_allclose(mean_square, np.mean(misfit**2), rtol=0, atol=5e-15 * size)
    np.testing.assert_allclose(residuals, misfit, rtol=0, atol=5e-15 * size)
    check_ridge(gram, right, penalty, prior, solved, size)


def check_ridge(gram, right, penalty, prior, solved, size):
    u, info = solved
    matrix, right = gram + penalty * np.eye(len(gram)), right + penalty * prior
    # half-planes that hold next to nothing are differences of sums of this size
    norm, eps = max(np.linalg.norm(matrix, 2), size / 10), np.finfo(float).eps
    residual = right - matrix @ u
    scale = norm * np.linalg.norm(u)
    assert np.linalg.norm(residual) <= 10 * eps * scale
    exact = np.linalg.solve(matrix, right)
    assert np.linalg.norm(u - exact) <= 10 * eps * norm / penalty * np.linalg.norm(exact)
    np.testing.assert_allclose(info.condition, np.trace(gram) / penalty + 1, rtol=1e-12)
    assert abs(info.residual - np.abs(residual).max()) <= 10 * eps * scale


@pytest.mark.parametrize("penalty", [1e-6, 1e-4, 1e-1])
@pytest.mark.parametrize(("x", "w"), CASES)
def test_sums_are_those_over_the_data(x, w, penalty):
    rng = np.random.default_rng(0)
    check(x, rng.normal(size=len(x)), w, rng.normal(size=len(w)), penalty, 1.0)


@pytest.mark.parametrize("penalty", [1e-8, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("gamma", [0, 10, 1000, 1e8])
def test_the_size_of_the_experiments(gamma, penalty):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1024, 2))
    y = features(x, teacher(rng, 100, 512)).mean(axis=1)
    check(x, y, teacher(rng, gamma, 512), np.ones(512), penalty, 0.0)


def test_info_tells_of_a_bad_solution():
    """A singular matrix and a λ far below rounding."""
    rng = np.random.default_rng(4)
    x, w = np.repeat(rng.normal(size=(4, 2)), 15, axis=0), uniform(rng, 40)
    info = everything(x, rng.normal(size=60), w, np.ones(40), 1e-25, 1.0)[-1][1]
    assert not info.residual < 1e-15
    assert info.condition > 1e20


def test_residuals_tell_of_a_close_fit():
    """The mean square is exact to rounding of mean y², the residuals to rounding of y."""
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(60, 2)), uniform(rng, 40)
    u = rng.normal(size=40)
    small = 1e-7 * rng.normal(size=60)
    y = features(x, w) @ u / 40 - small
    _, mean_square, residuals, _ = everything(x, y, w, u, 1e-3, 1.0)
    np.testing.assert_allclose(residuals, small, rtol=0, atol=1e-15)
    np.testing.assert_allclose(mean_square, np.mean(small**2), rtol=0, atol=1e-15)


def smooth_case():
    rng = np.random.default_rng(6)
    x, w, direction = rng.normal(size=(60, 2)), rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    return x, rng.normal(size=60), w, rng.normal(size=40), direction


@quickly
def derivatives(x, y, w, weights, direction):
    """What automatic differentiation makes of the solution and of the loss, at λ = 0.01."""
    data, penalty = CircleData.of(x, y), 1e-2

    def value(w, penalty, prior):
        return weights @ data.at(w).ridge(penalty, prior)[0]

    def loss(w, u):
        return data.at(w).mean_square(u) / (2 * penalty) + jnp.mean((u - 1.0) ** 2) / 2

    first, second = jax.jvp(
        lambda w: jax.grad(value, (0, 1, 2))(w, penalty, 1.0), (w,), (direction,)
    )
    neurons = data.at(w)
    u, vjp = jax.vjp(lambda w: data.at(w).ridge(penalty, 1.0)[0], w)
    at_w, at_u = jax.grad(loss, (0, 1))(w, u)
    forward = jax.jvp(lambda w: value(w, penalty, 1.0), (w,), (direction,))[1]
    force = u[:, None] * neurons.force(u) / (penalty * len(w))
    return first, second[0], forward, force, at_w, at_w + vjp(at_u)[0]


def test_derivatives_of_the_solution():
    """Against differences, and the first two in w against those of a dense solve."""
    x, y, w, weights, direction = smooth_case()
    first, second, forward = derivatives(x, y, w, weights, direction)[:3]

    def value(h):
        at = w + h * direction, np.ones(len(w)), 1e-2 + 0.3 * h, 1.0 + 0.2 * h
        return weights @ everything(x, y, *at)[-1][0]

    given = np.sum(first[0] * direction) + 0.3 * first[1] + 0.2 * first[2]
    np.testing.assert_allclose(given, (value(1e-6) - value(-1e-6)) / 2e-6, rtol=1e-7)
    np.testing.assert_allclose(forward, np.sum(first[0] * direction), rtol=1e-10)

    def dense(w):
        phi = jnp.maximum(x @ w.T, 0)
        matrix = phi.T @ phi / phi.size + 1e-2 * jnp.eye(len(w))
        return weights @ jnp.linalg.solve(matrix, phi.T @ y / len(x) + 1e-2)

    expected = quickly(lambda w: jax.jvp(jax.grad(dense), (w,), (direction,)))(w)
    for own, reference in zip((first[0], second), expected, strict=True):
        np.testing.assert_allclose(own, reference, rtol=0, atol=1e-10 * np.abs(reference).max())


def test_the_force_is_the_slow_gradient():
    """u_j force_j/(λ m) is ∂L/∂w_j at frozen u, and the derivative of L at the ridge solution."""
    force, frozen, reduced = derivatives(*smooth_case())[3:]
    np.testing.assert_allclose(frozen, force, rtol=0, atol=1e-13)
    np.testing.assert_allclose(reduced, force, rtol=0, atol=1e-12)


def test_the_short_forms(monkeypatch):
    """The methods of the data are those of the neurons that they take."""
    data = CircleData(*[None] * 6)
    monkeypatch.setattr(CircleData, "at", lambda self, w: Recorder(w))
    assert data.gram("w") == ("w", "gram")
    assert data.right("w") == ("w", "right")
    assert data.matvec("w", "u") == ("w", "matvec", "u")
    assert data.force("u", "w") == ("w", "force", "u")
    assert data.mean_square("u", "w") == ("w", "mean_square", "u")
    assert data.residuals("u", "w") == ("w", "residuals", "u")
    assert data.ridge("w", 0.1, 0.5, 2) == ("w", "ridge", 0.1, 0.5, 2)


class Recorder:
    def __init__(self, w):
        self.w = w

    def __getattr__(self, name):
        return lambda *args: (self.w, name, *args)


def test_seeds_together_are_seeds_apart():
    """With data of their own, of which other numbers are in either class, and with shared ones."""
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(3, 60, 2)), rng.normal(size=(3, 60))
    x[1, :, 0] = np.abs(x[1, :, 0])
    w, u = np.stack([uniform(rng, 40) for _ in range(3)]), rng.normal(size=(3, 40))

    @quickly
    def together(x, y, w, u):
        own = jax.vmap(everything.__wrapped__, (0, 0, 0, 0, None, None))(x, y, w, u, 1e-3, 1.0)
        data = CircleData.of(x[0], y[0])
        return own, jax.vmap(lambda w: data.at(w).ridge(1e-3, 1.0)[0])(w)

    own, shared = together(x, y, w, u)
    for seed in range(3):
        apart = everything(x[seed], y[seed], w[seed], u[seed], 1e-3, 1.0)
        for leaf, single in zip(jax.tree.leaves(own), jax.tree.leaves(apart), strict=True):
            np.testing.assert_allclose(leaf[seed], single, rtol=1e-10, atol=1e-13)
        apart = everything(x[0], y[0], w[seed], u[seed], 1e-3, 1.0)[-1][0]
        np.testing.assert_allclose(shared[seed], apart, rtol=1e-10, atol=1e-13)


vectors = st.tuples(*[st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0])] * 2)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    x=st.lists(vectors, min_size=SMALL[0], max_size=SMALL[0]),
    w=st.lists(vectors, min_size=SMALL[1], max_size=SMALL[1]),
    seed=st.integers(0, 99),
)
def test_small_exact_cases(x, w, seed):
    """Where every product is exact and many data lie on boundaries."""
    x, w = np.array(x), np.array(w)
    rng = np.random.default_rng(seed)
    y, u = rng.integers(-3, 4, len(x)) / 2, rng.integers(-3, 4, len(w)) / 2
    check(x, y, w, u, 1e-3, 1.0)
