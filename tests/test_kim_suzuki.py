"""Features in context: the published outcomes, identities, prompts, saddles, births and deaths."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import tts_jax as tts
from tts_jax import fast, geometry, regime
from tts_jax.problems.kim_suzuki import Prompts, WeightedParticles


KEY = jax.random.key(0)
DT = 0.2


def small(samples=60, particles=12, dimension=4, features=3, **options):
    return tts.InContext.of_teacher(
        key=KEY,
        dimension=dimension,
        features=features,
        samples=samples,
        particles=particles,
        **options,
    )


def start_of(problem, seed=1):
    return problem.init(key=jax.random.key(seed))


def plain(problem, slow):
    """h, S, S₀, heights in NumPy."""
    x, f = np.asarray(problem.inputs), np.asarray(problem.targets)
    a, w = np.asarray(slow["a"]), np.asarray(slow["w"])
    heights = 1.0 / (1.0 + np.exp(-(x @ w.T)))
    h = heights @ a / len(a)
    return x, f, heights, h, h.T @ h / len(x), f.T @ h / len(x)


def plain_velocity(problem, slow):
    """Velocities of the reduced flow as published: da/dτ, dw/dτ."""
    x, f, heights, h, gram, cross = plain(problem, slow)
    lift = cross @ np.linalg.inv(gram)
    z = f - h @ lift.T
    a = heights.T @ (z @ lift) / len(x)
    inside = (z @ lift @ np.asarray(slow["a"]).T) * heights * (1.0 - heights)
    return {"a": a, "w": inside.T @ x / len(x)}


# --- the published experiment ---------------------------------------------------------------------


def runs_of(problem, tau, rates):
    options = {"key": KEY, "state": start_of(problem), "tau": tau}
    reduced = tts.sgd(problem, regime="limit", step_size=DT, **options)
    joint = [
        tts.sgd(problem, regime=regime.Inner(c), step_size=h, epsilon=DT / h, **options)
        for c, h in rates
    ]
    return reduced, joint


@pytest.mark.slow
def test_outcomes_of_the_sheet():
    """L falls to 1e-3 of its start; the joint runs near the reduced one as W gets faster."""
    steps = np.arange(0, 2001, 20)
    reduced, joint = runs_of(
        tts.InContext.of_teacher(key=KEY), steps * DT, ((1, 0.05), (10, 0.5), (100, 0.5))
    )
    loss = reduced.loss[0]
    assert loss[-1] <= 1e-3 * loss[0]
    assert loss[5] < 2e-2  # step 100
    assert loss[25] < 2e-3  # step 500
    gaps = [np.max(np.abs(one.loss[0] - loss)[steps > 200]) for one in joint]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] <= 0.1
    assert all(one.loss[0, -1] < 2e-3 for one in joint)


@pytest.fixture(scope="module")
def trained():
    return runs_of(
        small(samples=300, particles=40), np.arange(0, 601, 10) * DT, ((1, 0.1), (50, 1))
    )


def test_the_loss_falls_and_fast_attention_follows(trained):
    reduced, joint = trained
    loss = reduced.loss[0]
    assert loss[-1] < 5e-3 * loss[0]
    assert np.all(np.diff(loss)[20:] < 0)
    assert np.all(reduced.stats["residual"] < 1e-13)
    gaps = [np.max(np.abs(one.loss[0] - loss)[20:]) for one in joint]
    assert gaps[1] < 0.3 * gaps[0]
    assert gaps[1] < 0.1


# --- identities -----------------------------------------------------------------------------------


def test_identities_of_the_reduction():
    problem = small()
    slow = start_of(problem).slow
    _, f, _, h, gram, cross = plain(problem, slow)
    found = problem.critical_solution(slow)
    np.testing.assert_allclose(found.fast, np.linalg.inv(gram), rtol=1e-9)
    left = np.trace(f.T @ f / len(f) - cross @ np.linalg.inv(gram) @ cross.T) / 2
    np.testing.assert_allclose(problem.reduced_loss(slow), left, rtol=0, atol=1e-12)
    np.testing.assert_allclose(f.T @ f / len(f), np.eye(3), atol=1e-12)
    at = np.random.default_rng(0).normal(size=(3, 3))
    direct = np.mean(np.sum((f - h @ (cross @ at).T) ** 2, axis=1)) / 2
    np.testing.assert_allclose(problem.loss(jnp.asarray(at), slow), direct, rtol=1e-12)
    slope = jax.grad(problem.loss)(found.fast, slow)
    np.testing.assert_allclose(slope, 0.0, atol=1e-10)
    # the first variation, N times the derivative in a particle, as a total derivative too
    velocity, expected = problem.reduced_field(slow), plain_velocity(problem, slow)
    total = jax.grad(problem.reduced_loss)(slow)
    for name in "aw":
        np.testing.assert_allclose(velocity[name], expected[name], rtol=0, atol=1e-10)
        np.testing.assert_allclose(-12 * total[name], expected[name], rtol=0, atol=1e-10)


def test_the_reduced_loss_does_not_see_a_basis_of_the_features():
    problem = small()
    slow = start_of(problem).slow
    basis = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    turned = slow | {"a": slow["a"] @ basis.T}
    np.testing.assert_allclose(
        problem.reduced_loss(turned), problem.reduced_loss(slow), rtol=0, atol=1e-10
    )


def test_steps_are_those_of_the_plain_algorithm():
    problem = small()
    state, options = start_of(problem), {"key": KEY, "tau": [8 * DT]}
    options["state"] = state
    slow = {name: np.asarray(value) for name, value in state.slow.items()}
    for _ in range(8):
        move = plain_velocity(problem, slow)
        slow = {name: slow[name] + DT * move[name] for name in "aw"}
    done = tts.sgd(problem, regime="limit", step_size=DT, **options)
    for name in "aw":
        np.testing.assert_allclose(done.slow[name][0, 0], slow[name], rtol=0, atol=1e-9)

    slow = {name: np.asarray(value) for name, value in state.slow.items()}
    at = np.eye(3)
    for _ in range(8):
        x, f, heights, h, gram, cross = plain(problem, slow)
        for _ in range(4):
            at = at - 0.5 * (cross.T @ cross @ at @ gram - cross.T @ cross)
        z = f - h @ (cross @ at).T
        # L depends on h through the query and through S₀
        pull = z @ cross @ at + f @ (z.T @ h / len(x)) @ at.T
        inside = (pull @ slow["a"].T) * heights * (1 - heights)
        move = {"a": heights.T @ pull / len(x), "w": inside.T @ x / len(x)}
        slow = {name: slow[name] + DT * move[name] for name in "aw"}
    done = tts.sgd(problem, regime=regime.Inner(4), step_size=0.5, epsilon=DT / 0.5, **options)
    np.testing.assert_allclose(done.fast[0, 0], at, rtol=0, atol=1e-10)
    for name in "aw":
        np.testing.assert_allclose(done.slow[name][0, 0], slow[name], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_flow_tends_to_the_limit_at_the_order_of_epsilon():
    problem = small(samples=30, particles=4, dimension=2, features=1)
    slow = start_of(problem).slow
    slow = slow | {"a": 4.0 * slow["a"]}  # the larger the features, the faster is W
    state = tts.State(problem.critical(slow), slow)
    options = {"tau": [0.5, 1.0], "solver": "tsit5", "rtol": 1e-9, "atol": 1e-9}
    limit = tts.limit(problem, state, **options)
    far = [
        np.max(np.abs(tts.flow(problem, state, epsilon=e, **options).slow["w"] - limit.slow["w"]))
        for e in (2e-3, 2e-4)
    ]
    assert 7 < far[0] / far[1] < 13
    assert far[0] > 1e-6


def test_the_relaxation_rate_is_the_smallest_eigenvalue_in_w():
    for problem in (small(), small(prompt_length=5)):
        slow = start_of(problem).slow
        hessian = jax.hessian(lambda flat, p=problem, s=slow: p.loss(flat.reshape(3, 3), s))(
            jnp.ones(9)
        )
        values = np.linalg.eigvalsh(hessian)
        rate = problem.relaxation_rate(jnp.eye(3), slow)
        np.testing.assert_allclose(rate, values[0], rtol=1e-6)
        condition = problem.critical_solution(slow).info["condition"]
        np.testing.assert_allclose(condition, values[-1] / values[0], rtol=1e-6)
    state = tts.State(jnp.eye(3), slow)
    speed = max(np.max(np.abs(v)) for v in problem.slow_field(*state).values())
    np.testing.assert_allclose(tts.separation(problem, state, epsilon=0.1), 0.1 * speed / rate)


# --- prompts --------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_prompts():
    """All contexts of 2 of 4 inputs, all queries, and tasks with E vvᵀ = I: no sampling."""
    problem = small(samples=4, particles=5, features=2, prompt_length=2, prompts=1)
    slow = start_of(problem).slow
    at = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2)))
    every = itertools.product(np.sqrt(2.0) * np.eye(2), *3 * [range(4)])
    tasks, *rows = (np.array(part) for part in zip(*every, strict=True))
    prompts = Prompts(tasks, np.stack(rows[:2], axis=1), rows[2])
    np.testing.assert_allclose(
        problem.sample_loss(at, slow, prompts), problem.loss(at, slow), rtol=1e-12
    )
    labels = problem.targets[prompts.context[7]] @ tasks[7]
    query = problem.inputs[prompts.query[7]]
    inputs = problem.inputs[prompts.context[7]]
    h = np.asarray(problem.features(slow, inputs))
    answer = np.mean(labels[:, None] * h, axis=0) @ at @ problem.features(slow, query)
    np.testing.assert_allclose(problem.predict(at, slow, inputs, labels, query), answer)
    one = Prompts(tasks[7:8], prompts.context[7:8], prompts.query[7:8])
    miss = answer - tasks[7] @ problem.targets[prompts.query[7]]
    np.testing.assert_allclose(problem.sample_loss(at, slow, one), miss**2 / 2, rtol=1e-12)


def test_attention_for_finite_prompts():
    slow = start_of(small()).slow
    problem = small(prompt_length=3)
    found = problem.critical_solution(slow)
    assert found.info["residual"] < 1e-14
    slope = jax.grad(problem.loss)(found.fast, slow)
    np.testing.assert_allclose(slope, 0.0, atol=1e-13)
    other = fast.Quadratic().solve(problem, slow).fast
    np.testing.assert_allclose(found.fast, other, rtol=1e-5)
    velocity = problem.reduced_field(slow)
    total = jax.grad(problem.reduced_loss)(slow)
    np.testing.assert_allclose(velocity["w"], -12 * total["w"], rtol=0, atol=1e-10)

    def left(length):
        one = small(prompt_length=length)
        return float(one.loss(one.critical_solution(slow).fast, slow))

    gaps = [left(length) - left(None) for length in (100, 1000)]
    assert gaps[1] > 0
    assert 9 < gaps[0] / gaps[1] < 11


def test_samples_are_prompts_of_the_inputs():
    problem = small(prompt_length=6, prompts=4000)
    drawn = problem.sample(key=KEY, step=3)
    assert drawn.context.shape == (4000, 6)
    assert np.all(np.bincount(drawn.context.ravel(), minlength=60) > 250)  # of 400
    assert np.all(np.bincount(drawn.query, minlength=60) > 20)  # of 67
    np.testing.assert_allclose(drawn.tasks.T @ drawn.tasks / 4000, np.eye(3), atol=0.1)
    np.testing.assert_array_equal(drawn.query, problem.sample(key=KEY, step=3).query)
    assert np.any(drawn.query != problem.sample(key=KEY, step=4).query)
    slow = start_of(problem).slow
    at = problem.critical(slow)
    means = [problem.sample_loss(at, slow, problem.sample(key=KEY, step=step)) for step in range(8)]
    error = np.std(means) / math.sqrt(8)
    assert abs(np.mean(means) - problem.loss(at, slow)) < 4 * error
    assert error < 0.05 * np.mean(means)


@pytest.mark.slow
def test_training_on_prompts():
    problem = small(samples=300, particles=40, prompt_length=50, prompts=50)
    options = {"state": start_of(problem), "step_size": 0.05, "tau": [0.0, 10.0], "seeds": 2}
    done = tts.sgd(problem, key=KEY, regime="limit", **options)
    assert np.all(done.loss[:, 1] < 0.75 * done.loss[:, 0])
    assert np.any(done.slow["w"][0, 1] != done.slow["w"][1, 1])


# --- what is singular -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, pytest.param(10, marks=pytest.mark.slow)])
def test_a_singular_gram_is_told(length):
    """Two equal features: W is finite and best, the velocity finite, the condition infinite."""
    problem = small(prompt_length=length)
    slow = start_of(problem).slow
    slow = slow | {"a": slow["a"].at[:, 2].set(slow["a"][:, 1])}
    found = problem.critical_solution(slow)
    assert np.isinf(found.info["condition"])
    assert np.isinf(found.info["gram_condition"])
    assert problem.relaxation_rate(found.fast, slow) == 0.0
    slope = jax.grad(problem.loss)(found.fast, slow)
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    done = tts.sgd(
        problem,
        key=KEY,
        state=tts.State(np.eye(3), slow),
        regime="limit",
        step_size=0.01,
        tau=[0.0, 0.1],
    )
    assert done.status.tolist() == [0]
    assert np.isinf(done.stats["condition"][0, 0])
    assert np.all(np.isfinite(done.slow["w"]))
    assert done.loss[0, 1] < done.loss[0, 0]


def test_too_long_steps_are_a_status():
    problem = small()
    done = tts.sgd(problem, key=KEY, step_size=1e4, epsilon=1.0, tau=[1e5, 1e6], seeds=2)
    assert np.all(done.status == int(tts.Status.DIVERGED))
    assert np.all(np.isnan(done.loss[:, -1]))


# --- curvature and saddles ------------------------------------------------------------------------


class Bowl(tts.AbstractProblem):
    """L = ½ (y − x₀)² + ½ xᵀ A x: curvature A."""

    matrix: jax.Array

    def init(self, *, key):
        return tts.State(jnp.zeros(()), jax.random.normal(key, (12,)))

    def loss(self, fast, slow):
        return (fast - slow[0]) ** 2 / 2 + slow @ self.matrix @ slow / 2


def test_the_smallest_curvature_is_that_of_the_dense_hessian():
    """By differences of the velocity in NumPy."""
    problem = small(samples=100, particles=24)
    slow = start_of(problem).slow
    found = tts.smallest_curvature(problem, slow, key=KEY)
    flat, unravel = ravel_pytree(slow)
    rows = np.eye(flat.size) * 1e-4

    def velocity(at):
        return np.asarray(ravel_pytree(plain_velocity(problem, unravel(jnp.asarray(at))))[0])

    near, far = (
        np.stack([velocity(flat + s * row) - velocity(flat - s * row) for row in rows]) / (2e-4 * s)
        for s in (1, 2)
    )
    hessian = (far - 4 * near) / 3
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    np.testing.assert_allclose(found.value, values[0], rtol=1e-6)
    assert found.residual < 1e-6 * abs(values[0])
    own = np.concatenate([np.ravel(found.vector[name]) for name in "aw"])
    np.testing.assert_allclose(abs(own @ vectors[:, 0]), 1.0, rtol=1e-6)


def test_the_smallest_curvature_of_few_different_values():
    """The Lanczos method ends early, after as many steps as there are values."""
    for values in (np.full(12, 2.0), np.repeat([1.5, 4.0], 6)):
        found = tts.smallest_curvature(Bowl(np.diag(values)), np.ones(12), key=KEY)
        np.testing.assert_allclose(found.value, values[0], rtol=1e-12)
        np.testing.assert_allclose(found.residual, 0.0, atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(found.vector), 1.0, rtol=1e-12)
        np.testing.assert_allclose(found.vector * values, found.vector * values[0], atol=1e-10)


def test_the_residual_of_the_curvature_bounds_its_error():
    values = np.linspace(-2.0, 3.0, 12)
    values[2] = 0.0
    bowl = Bowl(np.diag(values))
    found = tts.smallest_curvature(bowl, np.ones((2, 12)), key=KEY)  # more steps than dimensions
    np.testing.assert_allclose(found.value, -2.0, rtol=1e-12)
    np.testing.assert_allclose(found.residual, 0.0, atol=1e-12)
    np.testing.assert_allclose(np.abs(found.vector), np.tile(np.eye(12)[0], (2, 1)), atol=1e-10)
    rough = tts.smallest_curvature(bowl, np.ones(12), key=KEY, steps=4)
    assert rough.value > -2.0 + 1e-6
    assert np.min(np.abs(values - rough.value)) <= rough.residual < 2.0
    np.testing.assert_allclose(
        np.linalg.norm(values * rough.vector - rough.value * rough.vector), rough.residual
    )
    with jax.enable_x64(True):
        traced = jax.jit(lambda x: tts.smallest_curvature(bowl, x, key=KEY, steps=4).value)
        np.testing.assert_allclose(traced(jnp.ones(12)), rough.value, rtol=1e-10)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_saddle_is_critical_strict_and_left_at_its_rate(missing):
    problem = small(samples=100, particles=24)
    slow = problem.saddle(key=KEY, missing=missing)
    assert problem.reduced_loss(slow) == pytest.approx(missing / 2, abs=1e-12)
    for value in jax.tree.leaves(problem.reduced_field(slow)):
        np.testing.assert_allclose(value, 0.0, atol=1e-10)
    assert problem.critical_solution(slow).info["gram_condition"] < 1.01
    found = tts.smallest_curvature(problem, slow, key=KEY)
    # moving the weights of the missing features alone lowers L by ½ |E f⁰ δuᵀ|²
    heights = plain(problem, slow)[2]
    common = problem.targets[:, -missing:].T @ heights / 100
    assert found.value < -(np.linalg.norm(common, ord=2) ** 2) / 24 * 0.999
    if missing == 1:
        h = 1e-2 / abs(found.value)
        state = tts.State(
            np.eye(3), {name: slow[name] + 1e-6 * found.vector[name] for name in "aw"}
        )
        tau = h * np.array([0, 100, 400])
        done = tts.sgd(problem, key=KEY, state=state, regime="limit", step_size=h, tau=tau)
        gone = [
            math.sqrt(sum(np.sum((done.slow[name][0, at] - slow[name]) ** 2) for name in "aw"))
            for at in range(3)
        ]
        np.testing.assert_allclose(gone[1] / gone[0], 1.01**100, rtol=1e-3)
        np.testing.assert_allclose(gone[2] / gone[0], 1.01**400, rtol=1e-2)


# --- births and deaths ----------------------------------------------------------------------------


def weighted(rate=2.0, **options):
    problem = small(birth_death=rate, **options)
    slow = start_of(problem).slow
    weights = np.random.default_rng(3).dirichlet(np.ones(problem.particles))
    return problem, slow | {"log_weight": jnp.asarray(np.log(weights))}, weights


def test_weights_follow_the_first_variation():
    problem, slow, p = weighted()
    x, f, heights, *_ = plain(small(), slow)
    a = np.asarray(slow["a"])
    h = heights @ (p[:, None] * a)
    gram, cross = h.T @ h / len(x), f.T @ h / len(x)
    lift = cross @ np.linalg.inv(gram)
    z = f - h @ lift.T
    variation = -np.sum((heights.T @ (z @ lift) / len(x)) * a, axis=1)
    velocity = problem.reduced_field(slow)
    grown = -2.0 * (variation - p @ variation)
    np.testing.assert_allclose(velocity["log_weight"], grown, rtol=0, atol=1e-10)
    np.testing.assert_allclose(velocity["a"], heights.T @ (z @ lift) / len(x), rtol=0, atol=1e-10)
    # what the loss loses is what the metric says
    loses = jax.jvp(problem.reduced_loss, (slow,), (velocity,))[1]
    moved = sum(np.sum(np.asarray(velocity[name]) ** 2, axis=1) for name in "aw")
    spent = p @ (moved + 2.0 * (variation - p @ variation) ** 2)
    np.testing.assert_allclose(loses, -spent, rtol=1e-9)


def test_equal_weights_are_particles_and_the_dead_stay():
    problem, slow, _ = weighted(samples=30, particles=6, dimension=2)
    start = start_of(problem)
    equal = small(samples=30, particles=6, dimension=2)
    bare = {name: start.slow[name] for name in "aw"}
    mine, theirs = problem.reduced_field(start.slow), equal.reduced_field(bare)
    for name in "aw":
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-9)
    dead = slow | {"log_weight": slow["log_weight"].at[0].set(-1e4)}
    velocity = problem.reduced_field(dead)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(velocity))
    np.testing.assert_array_equal(velocity["w"][0], 0.0)


@pytest.mark.slow
def test_mass_is_kept():
    problem, slow, _ = weighted(samples=30, particles=6, dimension=2)
    state = tts.State(np.eye(3), slow)
    done = tts.sgd(problem, key=KEY, state=state, regime="limit", step_size=0.01, tau=[0.5])
    limit = tts.limit(problem, state, tau=[0.5], solver="tsit5", rtol=1e-7, atol=1e-9)
    for run, near in ((done, 1e-13), (limit, 1e-6)):
        weights = np.exp(np.ravel(run.slow["log_weight"]))
        np.testing.assert_allclose(np.sum(weights), 1.0, atol=near)
        number = np.ravel(run.observables["effective_particles"])[-1]
        np.testing.assert_allclose(number, np.sum(weights) ** 2 / np.sum(weights**2), rtol=1e-9)


@pytest.mark.slow
def test_births_and_deaths_speed_up_the_descent():
    ends = []
    for rate in (None, 0.1):
        problem = small(samples=300, particles=40, birth_death=rate)
        done = tts.sgd(
            problem,
            key=KEY,
            state=start_of(problem),
            regime="limit",
            step_size=0.1,
            tau=[0.0, 10.0],
        )
        ends.append(done.loss[0, 1])
    assert ends[1] < ends[0]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": np.ones((4, 2))}, "Argument `targets` must have one row for each of the 5"),
        ({"targets": np.ones(5)}, r"Argument `targets` must have shape \[rows, columns\]"),
        ({"inputs": np.full((5, 2), np.nan)}, "Argument `inputs` must be finite"),
        ({"targets": np.ones((5, 6))}, "Argument `inputs` must have at least 6 rows"),
        ({"particles": 1}, "Argument `particles` must be an integer of at least 2, got 1"),
        ({"prompt_length": 1}, "Argument `prompt_length` must be an integer of at least 2"),
        ({"prompt_length": 2.5}, "Argument `prompt_length` must be an integer of at least 2"),
        ({"prompt_length": 4, "prompts": 0}, "Argument `prompts` must be an integer of at least 1"),
        ({"prompts": 4}, "Argument `prompts` must be left out for infinite prompts, got 4"),
        ({"birth_death": -1.0}, "Argument `birth_death` must be positive and finite, got -1.0"),
        ({"teacher": np.ones((3, 2))}, r"Argument `teacher` must have shape \(2, 2\)"),
    ],
)
def test_bad_problems_are_refused(options, message):
    rng = np.random.default_rng(0)
    given = {"inputs": rng.normal(size=(5, 2)), "targets": rng.normal(size=(5, 2))} | options
    with pytest.raises(ValueError, match=message):
        tts.InContext(given.pop("inputs"), given.pop("targets"), **given)


def test_bad_teachers_states_and_saddles_are_refused():
    with pytest.raises(ValueError, match="Argument `dimension` must be an integer of at least 1"):
        tts.InContext.of_teacher(key=KEY, dimension=0)
    with pytest.raises(ValueError, match="Argument `samples` must be large enough for 3"):
        tts.InContext.of_teacher(key=KEY, samples=2)
    problem = small()
    state = start_of(problem)
    with pytest.raises(ValueError, match="Argument `state` must have leaves whose trailing axes"):
        tts.limit(problem, tts.State(np.eye(2), state.slow), tau=[1.0])
    without = tts.InContext(problem.inputs, problem.targets)
    with pytest.raises(ValueError, match="A `saddle` needs a teacher"):
        without.saddle(key=KEY)
    with pytest.raises(ValueError, match="Argument `missing` must be at most 3, got 4"):
        problem.saddle(key=KEY, missing=4)
    with pytest.raises(ValueError, match="A `saddle` needs at least 14 particles, got 12"):
        problem.saddle(key=KEY, missing=3)
    other = tts.InContext(problem.inputs, problem.targets**2, teacher=problem.teacher, particles=20)
    with pytest.raises(ValueError, match="A `saddle` needs targets that are mixtures"):
        other.saddle(key=KEY)
    with pytest.raises(ValueError, match="Argument `steps` must be an integer of at least 1"):
        tts.smallest_curvature(problem, state.slow, key=KEY, steps=0)
    with pytest.raises(ValueError, match="Argument `slow` must have leaves whose trailing axes"):
        tts.smallest_curvature(problem, state.slow | {"a": np.ones((12, 2))}, key=KEY)
    with pytest.raises(ValueError, match="Argument `slow` must have the structure"):
        tts.smallest_curvature(problem, state.slow["a"], key=KEY)
    weighted = small(birth_death=1.0)
    with pytest.raises(ValueError, match=r"must have the geometry `Euclidean\(\)` or"):
        tts.smallest_curvature(weighted, start_of(weighted).slow, key=KEY)
    assert isinstance(problem.geometry, geometry.Particles)
    assert isinstance(weighted.geometry, WeightedParticles)
