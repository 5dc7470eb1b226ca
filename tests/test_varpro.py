"""Variable projection: the published experiment in small, identities, and both ways to compute."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tts_jax as tts
from tts_jax import fast, regime


KEY = jax.random.key(0)
STEP = 2.0**-8


def of_teacher(width=128, samples=512, gamma=10.0, **options):
    return tts.VarPro.of_teacher(
        tts.CircleTeacher(gamma),
        key=KEY,
        samples=samples,
        teacher_width=512,
        width=width,
        **options,
    )


def points(count, seed=0):
    w = np.random.default_rng(seed).normal(size=(count, 2))
    return w / np.linalg.norm(w, axis=1, keepdims=True)


# --- the published experiment in small ------------------------------------------------------------


def run(problem, way="limit", end=8.0, records=17, **options):
    step = {"step_size": STEP} if way == "limit" else {"step_size": 1.0, "epsilon": STEP}
    state = problem.init(key=jax.random.key(1))
    tau = np.arange(records) * end / (records - 1)
    return tts.sgd(problem, key=KEY, state=state, regime=way, tau=tau, **step, **options)


@pytest.fixture(scope="module")
def unbiased():
    return run(of_teacher())


def ends(trajectory):
    return trajectory.loss[0, -1], trajectory.observables["teacher_distance"][0, -1]


def test_the_features_come_to_the_teacher(unbiased):
    """The criterion: distance at most .05 from some .45, the risk falls by a factor of 10⁴."""
    distance = unbiased.observables["teacher_distance"][0]
    assert distance[0] > 0.3
    assert distance[-1] <= 0.05
    assert unbiased.loss[0, -1] <= 1e-4 * unbiased.loss[0, 0]
    assert unbiased.status.tolist() == [0]
    assert np.all(unbiased.stats["residual"] < 1e-12)


def test_the_density_follows_the_ultra_fast_diffusion(unbiased):
    diffusion = tts.UltraFastDiffusion(tts.CircleTeacher(10.0), 256)
    densities = diffusion.solve(None, unbiased.tau).density
    angles = np.arctan2(unbiased.slow[0, ..., 1], unbiased.slow[0, ..., 0])
    far = [
        float(tts.circle_energy_distance(own, diffusion.theta, phi_weights=density))
        for own, density in zip(angles, densities, strict=True)
    ]
    assert max(far) <= 0.1


def test_the_bias_stays(unbiased):
    biased = run(of_teacher(prior=0.0))
    assert ends(biased)[1] >= 1.2 * ends(unbiased)[1]
    # ½(1 + χ²) tends to ½
    assert 0.45 < ends(biased)[0] < 0.5


def test_two_timescales_are_apart_where_the_separation_number_says_so(unbiased):
    """At λ = .1, ε/λ = .04, both agree; at λ = 1e-3, ε/λ = 4, descent is far behind."""
    wide = run(of_teacher(penalty=0.1)), run(of_teacher(penalty=0.1), "joint")
    assert ends(wide[1])[1] <= 1.05 * ends(wide[0])[1]
    joint = run(of_teacher(), "joint")
    assert ends(joint)[1] >= 2.0 * ends(unbiased)[1]
    problem = of_teacher(penalty=0.1)
    start = tts.State(wide[1].fast[0, 0], wide[1].slow[0, 0])
    number = tts.separation(problem, start, epsilon=STEP)
    speed = np.max(np.abs(problem.slow_field(*start)))
    np.testing.assert_allclose(number, STEP * speed / 0.1, rtol=1e-12)


# --- identities -----------------------------------------------------------------------------------

SHAPES = {
    "circle": {"features": tts.Relu()},
    "sphere": {"features": tts.Relu(3)},
    "torus": {"features": tts.Radial()},
    "plane": {"features": tts.Radial(wrapped=False)},
}


def small(shape, width=7, samples=30, **options):
    rng = np.random.default_rng(3)
    dimension = SHAPES[shape]["features"].dimension
    inputs, labels = rng.normal(size=(samples, dimension)), rng.normal(size=samples)
    options = SHAPES[shape] | {"penalty": 0.05, "chunk": 8} | options
    problem = tts.VarPro(inputs, labels, width=width, **options)
    return problem, problem.init(key=jax.random.key(5)).slow


@pytest.mark.parametrize(
    ("shape", "prior"), [("circle", 0.0), ("sphere", 1.0), ("torus", 0.0), ("plane", 1.0)]
)
def test_envelope_and_first_variation(shape, prior):
    """The velocity is that of the total derivative, and ½ ∇u*², at 1e-9."""
    problem, slow = small(shape, prior=prior)
    velocity = problem.reduced_field(slow)
    total = jax.jit(jax.grad(problem.reduced_loss))(slow)
    expected = problem.geometry.velocity(slow, -total)
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-9)
    weights = problem.critical(slow)
    misfit = problem.predict(weights, slow, problem.inputs) - problem.labels

    def squared(w):  # of u*(w) = b − mean φ(w, x)(f − y)/λ, anywhere on the space of features
        features = problem.features(w[None], problem.inputs)[:, 0]
        return (prior - jnp.mean(features * misfit) / problem.penalty) ** 2 / 2

    values = jax.vmap(squared)(slow)
    np.testing.assert_allclose(values, np.asarray(weights) ** 2 / 2, rtol=0, atol=1e-12)
    moved = problem.geometry.tangent(slow, jax.vmap(jax.grad(squared))(slow))
    np.testing.assert_allclose(velocity, moved, rtol=0, atol=1e-9)


def dense(problem):
    """The same problem without the sums that the circle allows."""
    return eqx.tree_at(lambda one: one._data, problem, None, is_leaf=lambda leaf: leaf is None)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [None, 9])
def test_the_circle_is_what_the_definition_says(sample):
    problem, slow = small("circle", samples=40, width=20)
    plain = dense(problem)
    rows = () if sample is None else (problem.inputs[:sample], problem.labels[:sample])
    one, other = (each.critical_solution(slow, rows) for each in (problem, plain))
    np.testing.assert_allclose(one.fast, other.fast, rtol=0, atol=1e-12)
    assert one.info["condition"] == pytest.approx(float(other.info["condition"]), rel=1e-9)
    weights = one.fast + 0.3
    for name in ("sample_loss", "sample_fast_loss"):
        first, second = (getattr(each, name)(weights, slow, rows) for each in (problem, plain))
        np.testing.assert_allclose(first, second, rtol=1e-12)
    slopes = (
        problem.sample_gradient(weights, slow, rows),
        plain.sample_gradient(weights, slow, rows),
    )
    np.testing.assert_allclose(slopes[0].fast, slopes[1].fast, rtol=0, atol=1e-12)
    np.testing.assert_allclose(slopes[0].slow, slopes[1].slow, rtol=0, atol=1e-12)


def test_steps_are_those_of_the_published_algorithm():
    """Ridge, whole gradient, normalisation, in plain NumPy; both regimes, and both priors."""
    for prior in (0.0, 1.0):
        problem, slow = small("circle", prior=prior, features=tts.Relu(tangential=False))
        x, y, w = problem.inputs, problem.labels, np.asarray(slow)
        n, m = y.size, len(w)
        for way in ("limit", "joint"):
            step = {"step_size": 0.01} if way == "limit" else {"step_size": 1.0, "epsilon": 0.01}
            done = tts.sgd(
                problem, key=KEY, state=problem.state(slow=slow), regime=way, tau=[0.2], **step
            )
            here, u = w, None
            for _ in range(20):
                features = np.maximum(x @ here.T, 0.0)
                solved = np.linalg.solve(
                    features.T @ features / (n * m) + 0.05 * np.eye(m),
                    features.T @ y / n + 0.05 * prior,
                )
                u = solved if u is None or way == "limit" else u
                r = features @ u / m - y
                slope = np.einsum("n,nm,m,nd->md", r, x @ here.T > 0, u, x) / (0.05 * n)
                u = u - (features.T @ r / n + 0.05 * (u - prior))
                here = here - 0.01 * slope
                here = here / np.linalg.norm(here, axis=1, keepdims=True)
            np.testing.assert_allclose(done.slow[0, 0], here, rtol=0, atol=1e-12)
            if way == "joint":
                np.testing.assert_allclose(done.fast[0, 0], u, rtol=0, atol=1e-11)


# --- the other dynamics ---------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_and_flow_tend_to_the_limit():
    problem, slow = small("circle", width=4, samples=25, penalty=0.5)
    problem = dense(problem)  # quicker to compile
    state, tau = problem.state(slow=slow), [0.1, 0.3]
    limit = tts.limit(problem, state, tau=tau, solver="tsit5", rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(np.sum(np.asarray(limit.slow) ** 2, axis=-1), 1.0, rtol=1e-14)
    far = [
        np.max(np.abs(tts.sgd(problem, key=KEY, state=state, tau=tau, **step).slow[0] - limit.slow))
        for step in ({"regime": "limit", "step_size": h} for h in (1e-2, 1e-3))
    ]
    assert 5 < far[0] / far[1] < 20
    options = {"solver": "tsit5", "rtol": 1e-7, "atol": 1e-7}
    far = [
        np.max(np.abs(tts.flow(problem, state, epsilon=e, tau=tau, **options).slow - limit.slow))
        for e in (1e-2, 1e-3)
    ]
    assert 4 < far[0] / far[1] < 20


def test_features_on_the_torus_come_nearer_to_the_teacher():
    problem = tts.VarPro.of_teacher(
        tts.TorusTeacher(100.0), key=KEY, samples=512, teacher_width=256, width=32, penalty=1e-2
    )
    done = run(problem, end=2.0, records=2)
    distance = done.observables["teacher_distance"][0]
    assert distance[1] < 0.6 * distance[0]
    assert done.loss[0, 1] < 0.1 * done.loss[0, 0]
    assert np.all(np.abs(done.slow) <= 2.0)


@pytest.mark.slow
def test_minibatches_with_a_running_mean():
    problem = of_teacher(width=32, batch=128, penalty=0.01)
    options = {"step_size": STEP, "tau": [0.0, 4.0], "state": problem.init(key=jax.random.key(1))}
    way = regime.Eliminated(memory=0.9)
    done = tts.sgd(problem, key=KEY, regime=way, seeds=2, **options)
    distance = done.observables["teacher_distance"]
    assert np.all(distance[:, 1] < 0.5 * distance[:, 0])
    assert np.any(done.slow[0] != done.slow[1])
    first = problem.sample(key=KEY, step=0)
    assert first[0].shape == (128, 2)
    assert len(np.unique(np.asarray(first[1]))) == 128


# --- what is singular, and what is large ----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "samples"), [("circle", 30), pytest.param("torus", 4, marks=pytest.mark.slow)]
)
def test_without_a_penalty_the_weights_are_those_nearest_to_the_prior(shape, samples):
    """λ = 0 with equal features, and with more features than data: finite, and it is told."""
    problem, slow = small(shape, penalty=0.0, samples=samples)
    slow = np.asarray(slow).copy()
    slow[3] = slow[2]
    found = problem.critical_solution(slow)
    phi = np.asarray(problem.features(jnp.asarray(slow), problem.inputs)) / problem.width
    expected = 1.0 + np.linalg.pinv(phi, rcond=1e-7) @ (problem.labels - phi @ np.ones(7))
    np.testing.assert_allclose(found.fast, expected, rtol=1e-6, atol=1e-6)
    if samples == 30:
        assert np.isinf(found.info["condition"])
    done = tts.sgd(
        problem, key=KEY, state=problem.state(slow=slow), regime="limit", step_size=1e-3, tau=[1e-2]
    )
    assert np.all(np.isfinite(done.slow))
    assert np.isfinite(done.loss[0, 0])


@pytest.mark.slow
def test_memory_is_bounded():
    """N = 1e5 and M = 4096: compiled, not run. The features alone would be 3.3 GB."""
    inputs, labels = np.zeros((100_000, 2)) + 0.5, np.zeros(100_000)
    slow = jax.ShapeDtypeStruct((4096, 2), np.float64)
    for features, bound in ((tts.Relu(), 0.1), (tts.Radial(), 1.6)):
        problem = tts.VarPro(inputs, labels, width=4096, features=features, chunk=2048)

        def step(w, problem=problem):
            return regime.Eliminated().step(
                problem, tts.State(jnp.zeros(4096), w), (), jnp.ones(()), None, "exact"
            )

        used = jax.jit(step).lower(slow).compile().memory_analysis()
        assert used.temp_size_in_bytes < bound * 1e9


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "Argument `penalty` must be zero or positive, got -1.0"),
        ({"labels": np.zeros(3)}, "Argument `labels` must have one number for each of the 5"),
        ({"inputs": np.zeros((5, 3))}, r"Argument `inputs` must have shape \[n, 2\]"),
        ({"inputs": np.full((5, 2), np.nan)}, "Argument `inputs` must be finite"),
        (
            {"teacher_features": np.zeros((0, 2))},
            r"Argument `teacher_features` must have shape \[n, 2\] with at least one",
        ),
        ({"width": 0}, "Argument `width` must be an integer of at least 1"),
        ({"prior": np.inf}, "Argument `prior` must be finite"),
        ({"batch": 6}, "Argument `batch` must be at most the 5 data, got 6"),
        ({"chunk": 0}, "Argument `chunk` must be an integer of at least 1"),
    ],
)
def test_bad_problems_are_refused(options, message):
    given = {"inputs": np.ones((5, 2)), "labels": np.zeros(5)} | options
    with pytest.raises(ValueError, match=message):
        tts.VarPro(given.pop("inputs"), given.pop("labels"), **given)


def test_bad_states_teachers_and_features_are_refused():
    problem, slow = small("circle")
    with pytest.raises(ValueError, match="Argument `slow` must hold points of the `Sphere`, got"):
        problem.state(slow=2.0 * np.asarray(slow))
    with pytest.raises(ValueError, match=r"Argument `slow` must have shape \[..., 7, 2\]"):
        problem.state(slow=np.asarray(slow)[:3])
    with pytest.raises(ValueError, match=r"Argument `fast` must have shape \(7,\)"):
        problem.state(slow=slow, fast=np.ones(3))
    start = tts.State(np.ones(7), 2.0 * np.asarray(slow))
    with pytest.raises(
        ValueError, match="Argument `state.slow` must lie on the problem's `Sphere`"
    ):
        tts.limit(problem, start, tau=[0.1])
    with pytest.raises(ValueError, match="gamma"):
        tts.CircleTeacher(-1.0)
    with pytest.raises(TypeError, match="Argument `teacher` must be a `CircleTeacher` or a"):
        tts.VarPro.of_teacher(np.ones((3, 2)), key=KEY)
    with pytest.raises(ValueError, match="Argument `teacher_width` must be an integer"):
        tts.VarPro.of_teacher(tts.CircleTeacher(), key=KEY, teacher_width=0)
    with pytest.raises(TypeError, match="Argument `features` must be an `AbstractFeatures`"):
        tts.VarPro(np.ones((5, 2)), np.zeros(5), features="relu")
    with pytest.raises(ValueError, match="Argument `dimension` must be at least 2"):
        tts.Relu(1)
    with pytest.raises(ValueError, match="Argument `scale` must be positive"):
        tts.Radial(scale=0.0)
    with pytest.raises(TypeError, match="`teacher_distance` needs the features of a teacher"):
        problem.teacher_distance(slow)
    assert isinstance(problem.fast_solver, fast.AbstractFastSolver)
