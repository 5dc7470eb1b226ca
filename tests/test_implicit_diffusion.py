"""Implicit diffusion: the published experiment, its identities, and the sampler by other means."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.sparse
import scipy.sparse.linalg

import tts_jax as tts
from benchmarks import implicit_diffusion as benchmark
from tts_jax import fast, regime


KEY = jax.random.key(0)
CENTERS = 4.0 * np.exp(1j * np.arange(6) * np.pi / 3).view(float).reshape(6, 2)
START = np.array([1.5, 0.0, 1.5, 0.0, 1.5, 0.0])
LOGITS = np.array([0.4, 1.1, -0.7, 0.2, -1.3, 0.5])


def softmax(theta):
    return np.exp(theta) / np.sum(np.exp(theta))


def problem_of(particles=50, **options):
    return tts.ImplicitDiffusion(particles=particles, **options)


# --- plain NumPy: one axis for the particles, then one for the coordinates ------------------------


def kernels(x):
    return np.exp(-np.sum((x[..., None, :] - CENTERS) ** 2, axis=-1) / 2)


def potential(x, theta):
    return -np.log(kernels(x) @ softmax(theta))


def potential_slopes(x, theta):
    """∇_x V and ∇_θ V, each by the derivative of the definition."""
    weighted = kernels(x) * softmax(theta)
    total = np.sum(weighted, axis=-1, keepdims=True)
    gap = CENTERS - x[..., None, :]
    in_x = -np.sum(weighted[..., None] * gap, axis=-2) / total
    return in_x, softmax(theta) - weighted / total


def reward(x, kind="hard"):
    bump = np.exp(-((x[..., 0] - 4) ** 2 + (x[..., 1] - 3.8) ** 2) / 20)
    if kind == "hard":
        return (x[..., 0] >= 0) * bump / 2.5
    return bump / (1 + np.exp(-x[..., 0] / 0.5)) / 0.7


@functools.lru_cache
def plane():
    """Gauss–Legendre points and weights on [−20, 20]², cut where the reward jumps: a rule of the
    test's own."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(-20.0, 20.0, 21)
    half = np.diff(edges)[:, None] / 2
    side = ((edges[:-1, None] + half) + half * nodes).ravel()
    each = (half * weights).ravel()
    points = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, np.outer(each, each).ravel()


def density(x, theta, std=1.0):
    square = np.sum((x[..., None, :] - CENTERS) ** 2, axis=-1) / std**2
    return np.exp(-square / 2) @ softmax(theta) / (2 * np.pi * std**2)


def slopes_by_quadrature(theta, penalty, std, kind="hard"):
    """Cov_π(R, ∇_θ V) + β (E_ref ∇_θ V − E_π ∇_θ V), and KL(p_ref | π)."""
    x, weights = plane()
    law, reference = weights * density(x, theta), weights * density(x, START, std)
    r, slope = reward(x, kind), potential_slopes(x, theta)[1]
    covariance = (law * r) @ slope - (law @ r) * (law @ slope)
    kept = reference > 0
    ratio = density(x, START, std)[kept] / density(x, theta)[kept]
    return (
        covariance + penalty * (reference @ slope - law @ slope),
        reference[kept] @ np.log(ratio),
    )


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_rewards_of_the_modes_are_integrals(kind):
    """By adaptive quadrature in the plane, cut at the jump of the hard reward; and the sheet's."""
    problem = problem_of(reward=kind)
    # one weight is 1 to rounding
    rewards = jax.vmap(problem.expected_reward)(800.0 * jnp.eye(6))
    for own, (c1, c2) in zip(rewards, CENTERS, strict=True):

        def integrand(y, x, c1=c1, c2=c2):
            bump = math.exp(-((x - 4.0) ** 2 + (y - 3.8) ** 2) / 20.0)
            seen = bump / 2.5 if kind == "hard" else bump / (1.0 + math.exp(-2.0 * x)) / 0.7
            return seen * math.exp(-((x - c1) ** 2 + (y - c2) ** 2) / 2.0) / (2.0 * math.pi)

        low = 0.0 if kind == "hard" else c1 - 8.0
        place = low, max(c1 + 8.0, 8.0), c2 - 8.0, c2 + 8.0
        found, _ = scipy.integrate.dblquad(integrand, *place, epsabs=1e-11, epsrel=1e-10)
        assert float(own) == pytest.approx(found, abs=1e-10)
    if kind == "hard":
        known = [0.189, 0.299, 0.0048, 0.0, 0.0004, 0.027]
        np.testing.assert_allclose(rewards, known, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reward": "smooth", "penalty": 0.3},
        {"penalty": 0.2, "reference_std": 2.0, "published_sign": True},
    ],
)
def test_the_gradient_is_a_covariance(options):
    """Sheet: the gradient identities hold to 1e-6 by quadrature; here they do to 1e-8."""
    problem = problem_of(**options)
    penalty = options.get("penalty", 0.0) * (-1 if problem.published_sign else 1)
    std = problem.reference_std
    x, weights = plane()
    field = jax.jit(problem.reduced_field)
    for theta in (LOGITS, START, 3 * LOGITS):
        slope, divergence = slopes_by_quadrature(theta, penalty, std, problem.reward)
        own = -np.asarray(field(theta))
        np.testing.assert_allclose(own, slope, rtol=0, atol=1e-8)
        assert float(problem.divergence(jnp.asarray(theta))) == pytest.approx(divergence, abs=1e-7)
        expected = -(weights * density(x, theta)) @ reward(x, problem.reward)
        expected += penalty * divergence
        assert float(problem.reduced_loss(jnp.asarray(theta))) == pytest.approx(expected, abs=1e-7)
    steps = 1e-5 * np.eye(6)
    differences = [(field(LOGITS + one) - field(LOGITS - one)) / 2e-5 for one in steps]
    jacobian = problem.reduced_jacobian(None, jnp.asarray(LOGITS))
    np.testing.assert_allclose(jacobian, np.transpose(differences), rtol=0, atol=1e-8)


def test_a_released_penalty_climbs_what_it_should_descend():
    """Two problems that differ in the sign only: a step of one lowers KL(p_ref | π), of the other
    raises it."""
    theta = jnp.asarray(LOGITS)
    changes = []
    for published in (False, True):
        one = problem_of(penalty=50.0, published_sign=published)
        moved = theta + 1e-4 * one.reduced_field(theta)
        changes.append(float(one.divergence(moved) - one.divergence(theta)))
    assert changes[0] < -1e-4
    assert changes[1] > 1e-4
    assert problem_of().divergence(jnp.asarray(START)) == pytest.approx(0.0, abs=1e-12)


def test_fields_are_those_of_the_definitions():
    """By NumPy's derivatives, and by differentiation of the potential."""
    problem = problem_of(particles=7, penalty=0.4, reference_batch=3, reference_std=2.0)
    x = 4.0 * np.random.default_rng(1).normal(size=(7, 2))
    state = tts.State(jnp.asarray(x.T), jnp.asarray(LOGITS))
    np.testing.assert_allclose(problem.potential(*state), potential(x, LOGITS), rtol=1e-12)
    np.testing.assert_allclose(problem.rewards(state.fast), reward(x), rtol=1e-12)
    in_x, in_theta = potential_slopes(x, LOGITS)
    sample = jax.jit(lambda step: problem.sample(key=KEY, step=step))(3)
    reference = np.asarray(sample.reference).T
    assert reference.shape == (3, 2)
    slopes = jax.jit(problem.sample_gradient)(*state, sample)
    np.testing.assert_allclose(slopes.fast, in_x.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        slopes.fast, jax.jit(jax.grad(problem.fast_loss))(*state), atol=1e-12
    )
    covariance = np.mean(reward(x)[:, None] * in_theta, axis=0)
    covariance -= np.mean(reward(x)) * np.mean(in_theta, axis=0)
    pull = np.mean(potential_slopes(reference, LOGITS)[1], axis=0) - np.mean(in_theta, axis=0)
    np.testing.assert_allclose(slopes.slow, covariance + 0.4 * pull, rtol=0, atol=1e-12)
    # the expectation over p_ref
    plain = problem_of(particles=7, penalty=0.4, reference_std=2.0)
    places, weights = plane()
    expected = (weights * density(places, START, 2.0)) @ potential_slopes(places, LOGITS)[1]
    pull = expected - np.mean(in_theta, axis=0)
    fields = jax.jit(plain.fields)(*state)
    np.testing.assert_allclose(fields.slow, -covariance - 0.4 * pull, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fields.fast, -in_x.T, rtol=0, atol=1e-12)


def test_the_sample_is_a_function_of_key_and_step():
    problem = problem_of(particles=40_000, reference_batch=40_000, reference_std=2.0)
    one, again, other = (problem.sample(key=KEY, step=step) for step in (5, 5, 6))
    for mine, same, new in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(mine, same)
        assert np.all(np.mean(mine != new) > 0.9)
    reference = np.asarray(one.reference)
    mean = softmax(START) @ CENTERS
    np.testing.assert_allclose(np.mean(reference, axis=1), mean, rtol=0, atol=0.1)
    assert np.mean(np.sum(reference**2, axis=0)) == pytest.approx(16.0 + 8.0, rel=0.02)


# --- the law in equilibrium -----------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_the_fast_solver_samples_the_stationary_law(given):
    """Weights, means, variances; the fixed points are spread more evenly than random ones."""
    problem = problem_of(particles=20_000)
    sample = problem.sample(key=KEY, step=0) if given else None
    x = np.asarray(problem.fast_solver.solve(problem, jnp.asarray(LOGITS), sample).fast).T
    near = 0.03 if given else 2e-3
    weights = softmax(LOGITS)
    # p(x) has the mean softmax(θ) under π(θ)
    posterior = softmax(LOGITS) - potential_slopes(x, LOGITS)[1]
    np.testing.assert_allclose(np.mean(posterior, axis=0), weights, rtol=0, atol=near / 3)
    np.testing.assert_allclose(np.mean(x, axis=0), weights @ CENTERS, rtol=0, atol=4 * near)
    second = CENTERS.T @ (weights[:, None] * CENTERS) + np.eye(2)
    np.testing.assert_allclose(x.T @ x / len(x), second, rtol=0, atol=12 * near)
    expected = float(problem.expected_reward(jnp.asarray(LOGITS)))
    assert np.mean(reward(x)) == pytest.approx(expected, abs=near / 3)


def test_langevin_steps_are_those_of_numpy():
    """Two steps of the particles from given noise, then the gradient at the new particles."""
    problem = problem_of(particles=6)
    state = problem.init(key=KEY)
    sample, key = problem.sample(key=KEY, step=0), jax.random.key(9)
    moved, slope = regime.Inner(2).step(problem, state, sample, jnp.asarray(0.2), key, "exact")
    x = np.asarray(state.fast).T
    for index in range(2):
        noise = problem.fast_geometry.noise(state.fast, jax.random.fold_in(key, index))
        x = x - 0.2 * potential_slopes(x, START)[0] + np.sqrt(0.4) * np.asarray(noise).T
    np.testing.assert_allclose(moved, x.T, rtol=0, atol=1e-12)
    in_theta = potential_slopes(x, START)[1]
    covariance = np.mean(reward(x)[:, None] * in_theta, axis=0)
    covariance -= np.mean(reward(x)) * np.mean(in_theta, axis=0)
    np.testing.assert_allclose(slope, covariance, rtol=0, atol=1e-12)


def test_the_stationary_law_is_stationary():
    """Slow at rest: particles in equilibrium stay so, and E x·∇V = d, up to the step's O(γ)."""
    problem = problem_of(particles=200)
    theta = np.array([0.5, 1.0, 0.0, 0.0, 0.0, 0.5])
    start = tts.State(problem.critical(jnp.asarray(theta)), theta)
    options = {"key": KEY, "state": start, "seeds": 2, "regime": regime.Inner(1)}
    tau = 2e-9 * np.arange(41)  # a hundred steps between records
    done = tts.sgd(problem, step_size=0.02, epsilon=1e-9, tau=tau, **options)
    np.testing.assert_allclose(done.slow[:, -1], 2 * [theta], rtol=0, atol=1e-7)
    x = np.moveaxis(np.asarray(done.fast), 2, -1)
    in_x, in_theta = potential_slopes(x[:, 1:], theta)
    np.testing.assert_allclose(np.mean(in_theta, axis=(0, 1, 2)), 0.0, atol=0.03)
    assert np.mean(np.sum(x[:, 1:] * in_x, axis=-1)) == pytest.approx(2.0, abs=0.15)
    assert np.mean(np.argmax(kernels(x[:, -1]), -1) != np.argmax(kernels(x[:, 0]), -1)) > 0.3


def test_the_relaxation_rate_is_the_spectral_gap():
    """An upper bound of that by finite volumes, at most 15% above."""
    problem = problem_of()
    answer = jax.jit(lambda theta: problem.relaxation_rate(None, theta))
    for theta in (START, LOGITS, np.array([0.0, 4.0, 0.0, 0.0, 0.0, 0.0])):
        gap, rate = spectral_gap(theta), float(answer(theta))
        assert gap < rate < 1.15 * gap
    state = problem.init(key=KEY)
    speed = np.max(np.abs(problem.slow_field(*state)))
    number = tts.separation(problem, state, epsilon=0.5)
    rate = problem.relaxation_rate(*state)
    assert float(number) == pytest.approx(0.5 * speed / float(rate), rel=1e-12)


def spectral_gap(theta, cells=72, end=9.0):
    """The second eigenvalue of the generator by finite volumes, symmetrised by √π."""
    width = 2 * end / cells
    side = -end + width * (np.arange(cells) + 0.5)
    x = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    law, index = density(x, theta), np.arange(cells**2).reshape(cells, cells)
    matrix = scipy.sparse.csr_matrix((cells**2, cells**2))
    for axis in (0, 1):
        one = np.take(index, range(cells - 1), axis).ravel()
        two = np.take(index, range(1, cells), axis).ravel()
        middle = (x.reshape(-1, 2)[one] + x.reshape(-1, 2)[two]) / 2
        flow = density(middle, theta) / width**2
        size = np.sqrt(law.ravel())
        off = scipy.sparse.coo_matrix(
            (-flow / (size[one] * size[two]), (one, two)), shape=matrix.shape
        )
        here = np.bincount(one, flow, cells**2) + np.bincount(two, flow, cells**2)
        matrix = matrix + off + off.T + scipy.sparse.diags(here / law.ravel())
    values = scipy.sparse.linalg.eigsh(
        matrix.tocsc(), k=2, sigma=-1e-3, which="LM", return_eigenvectors=False
    )
    return np.max(values)


# --- the published experiment ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reduced():
    """The exact reduced flow to τ = 500."""
    problem = problem_of()
    state = tts.State(np.zeros((2, 50)), START)
    return tts.limit(problem, state, tau=np.linspace(0.0, 500.0, 51), throw=True)


def test_the_reduced_flow_climbs_to_the_best_mode(reduced):
    """Sheet: E R = .2947 and softmax .974 at τ = 500; the loss falls at the rate |∇F|²."""
    assert reduced.observables["expected_reward"][-1] == pytest.approx(0.2947, abs=5e-4)
    assert reduced.observables["weights"][-1, 1] == pytest.approx(0.974, abs=5e-4)
    loss = reduced.stats["reduced_loss"]
    assert np.all(np.diff(loss) < 0)
    problem = problem_of()
    squares = [float(jnp.sum(problem.reduced_field(x) ** 2)) for x in reduced.slow]
    decay = scipy.integrate.simpson(squares, x=reduced.tau)
    assert float(loss[0] - loss[-1]) == pytest.approx(decay, rel=1e-3)
    # the recorded particles are those of the weights
    counted = np.asarray(reduced.observables["mean_reward"])
    np.testing.assert_allclose(counted, reduced.observables["expected_reward"], rtol=0, atol=0.02)


SINGLE = {"regime": regime.Inner(1), "step_size": 0.2, "epsilon": 0.5}


@pytest.fixture(scope="module")
def published():
    """n = 200, 5000 steps of γ = .2 and η = .1: the last hundred recorded; two seeds."""
    tau = np.concatenate([[10.0], 0.1 * np.arange(4901, 5001)])
    return tts.sgd(problem_of(200), key=KEY, seeds=2, tau=tau, **SINGLE)


def test_the_single_loop_follows_the_reduced_flow(published, reduced):
    """Criteria of the sheet: reward at least .28, at most .01 from the reduced flow, mode 60°."""
    seen = published.observables
    assert np.all(np.mean(seen["mean_reward"][:, 1:], axis=1) >= 0.28)
    gap = seen["expected_reward"][:, -1] - reduced.observables["expected_reward"][-1]
    assert np.all(np.abs(gap) <= 0.01)
    assert np.all(np.argmax(seen["weights"][:, -1], axis=1) == 1)
    assert published.coords["mode"][1] == 60.0
    assert published.status.tolist() == [0, 0]
    np.testing.assert_allclose(published.loss, -seen["mean_reward"], rtol=1e-12)


@pytest.mark.slow
def test_exact_samples_follow_the_reduced_flow(reduced):
    """The regime 'limit': the discrete limit ε → 0, whose steps have no lag but noise."""
    problem = problem_of(400)
    done = tts.sgd(
        problem, key=KEY, regime="limit", seeds=2, step_size=0.5, tau=[100.0, 200.0, 500.0]
    )
    at = np.array([10, 20, 50])
    far = done.observables["expected_reward"] - reduced.observables["expected_reward"][at]
    assert np.all(np.abs(far[:, [0, 2]]) < 0.01)
    assert np.all(np.abs(far) < 0.04)
    # what is recorded is critical(θ)
    np.testing.assert_allclose(done.fast[0, 1], problem.critical(done.slow[0, 1]), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("published_sign", [False, True])
def test_the_penalty_with_both_signs(published_sign):
    """Sheet, n = 500, 3000 steps, β = .1: KL .71 and E R .219 if it is subtracted, KL 12.1 and
    a collapse to the mode at 0° as released."""
    problem = problem_of(500, penalty=0.1, published_sign=published_sign)
    done = tts.sgd(problem, key=KEY, seeds=2, tau=[300.0], **SINGLE)
    seen = done.observables
    if published_sign:
        assert np.all(np.abs(seen["divergence"] - 12.0) < 0.3)
        assert np.all(seen["weights"][..., 0] > 0.999)
        np.testing.assert_allclose(seen["expected_reward"], 0.1886, rtol=0, atol=1e-3)
    else:
        assert np.all(np.abs(seen["divergence"] - 0.7) < 0.1)
        np.testing.assert_allclose(seen["expected_reward"], 0.217, rtol=0, atol=0.01)
        assert np.all(np.argmax(seen["weights"], axis=-1) == 1)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 1}, "Argument `particles` must be an integer of at least 2, got 1"),
        ({"particles": 10.0}, "Argument `particles` must be an integer"),
        ({"reward": "soft"}, "Argument `reward` must be one of 'hard', 'smooth', got 'soft'"),
        (
            {"penalty": -0.1},
            r"Argument `penalty` must be zero or positive, got -0.1.*published_sign",
        ),
        ({"penalty": np.inf}, "Argument `penalty` must be zero or positive"),
        ({"penalty": [0.1, 0.2]}, "Argument `penalty` must be one number"),
        ({"reference_std": 0.0}, "Argument `reference_std` must be from 0.2 to 2, got 0.0"),
        ({"reference_batch": -1}, "Argument `reference_batch` must be an integer of at least 0"),
    ],
)
def test_bad_problems_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tts.ImplicitDiffusion(**options)


def test_bad_states_and_dynamics_are_refused():
    problem = problem_of(5)
    with pytest.raises(TypeError, match="`flow` is for problems without noise"):
        tts.flow(problem, problem.init(key=KEY), epsilon=0.1, tau=[0.1])
    with pytest.raises(ValueError, match="state"):
        tts.sgd(problem, key=KEY, tau=[0.1], state=tts.State(np.zeros((5, 2)), START), **SINGLE)
    with pytest.raises(TypeError, match="`Equilibrium` samples the stationary law of"):
        problem.fast_solver.solve(tts.Univariate.__new__(tts.Univariate), START)
    assert isinstance(problem.fast_solver, fast.AbstractFastSolver)


def test_steps_too_long_for_the_sampler_are_a_status():
    """γ > 2 is unstable in a unit Gaussian; a seed that is lost leaves its status."""
    problem = problem_of(200)
    options = {"key": KEY, "seeds": 2, "regime": regime.Inner(1), "epsilon": 1e-3}
    lost = tts.sgd(problem, step_size=2.5, tau=[0.5, 25.0], **options)
    assert lost.status.tolist() == 2 * [int(tts.Status.DIVERGED)]
    assert np.all(np.isfinite(lost.fast[:, 0]))
    assert np.all(np.isnan(lost.fast[:, 1]))


# --- the benchmark --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_compares_equal_runs(monkeypatch, capsys):
    """Both processes at a tiny size; and what is not equal is no comparison."""
    small = ["--particles", "10", "--steps", "5", "--check", "7"]
    assert benchmark.main(small) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[-3:]] == [
        "published",
        "published,",
        "ours",
    ]
    answer = {"fast": [[0.0]], "slow": [0.0], "times": {}}
    other = answer | {"slow": [2e-8]}
    monkeypatch.setattr(benchmark, "apart", lambda way, *_: answer if way == "ours" else other)
    assert benchmark.main(small) == 1
    assert "not equal" in capsys.readouterr().err


def test_seeds_may_have_penalties_of_their_own():
    problems = [tts.ImplicitDiffusion(particles=20, penalty=penalty) for penalty in (0.0, 0.4)]
    options = {"step_size": 0.2, "epsilon": 0.5, "tau": [1.0], "regime": tts.regime.Inner(1)}
    runs = tts.sgd(problems, key=jax.random.key(0), **options)
    alone = tts.sgd(problems[0], key=jax.random.key(0), seeds=2, **options)
    np.testing.assert_allclose(runs.slow[0], alone.slow[0], rtol=1e-12)
    assert np.max(np.abs(runs.slow[1] - alone.slow[1])) > 1e-3
