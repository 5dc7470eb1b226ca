"""Hitting times: against exact ones, where there are none, and refused arguments."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import brentq

import tts_jax as tts


class Drift(tts.AbstractProblem):
    """L = ½y² − Σx: y relaxes to 0 and every x moves on at speed 1."""

    goals: jax.Array
    radius: jax.Array

    dims: ClassVar = {"slow": ("goal",), "distance": ("goal",)}

    def init(self, *, key):
        return tts.State(jnp.ones(()), jax.random.uniform(key, self.goals.shape))

    def loss(self, fast, slow):
        return fast**2 / 2 - jnp.sum(slow)

    def critical(self, slow):
        return 0.0 * jnp.sum(slow)

    def observables(self, fast, slow):
        return {"distance": jnp.abs(slow - self.goals)}

    def goal_radius(self):
        return self.radius


class Decay(toy.Linear):
    """The linear problem, with a goal for each slow variable."""

    goals: jax.Array
    radius: jax.Array

    def observables(self, fast, slow):
        return {"recovery": jnp.abs(slow["p"] - self.goals)}

    def goal_radius(self):
        return self.radius


def decay():
    plain = toy.linear()
    return Decay(plain.matrix, plain.decay, jnp.array([0.6, -0.3]), jnp.array(0.1))


def decay_start(problem):
    return tts.State(problem.init(key=jax.random.key(3)).fast, {"p": jnp.array([1.5, -1.0])})


GOALS = np.array([0.5, 0.9])
DRIFT = Drift(jnp.asarray(GOALS), jnp.array(0.01))
START = tts.State(jnp.ones(()), jnp.array([0.2, 0.1]))
EXACT = np.array([0.29, 0.79])
DRIFTING = {"observable": "distance", "solver": "tsit5"}


def drift_times(start=START, tau_end=1.0, problem=DRIFT, **options):
    return tts.hitting_times(problem, start, tau_end=tau_end, **DRIFTING | options)


# --- exact times ----------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [pytest.param(None, marks=pytest.mark.slow), 0.1])
def test_a_drift_hits_when_it_must(epsilon):
    assert_allclose(drift_times(epsilon=epsilon), EXACT, atol=1e-12)
    assert_allclose(drift_times(epsilon=epsilon, radius=0.1), EXACT - 0.09, atol=1e-12)
    assert_allclose(drift_times(epsilon=epsilon, refinements=1), EXACT, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 0.02])
def test_times_of_a_linear_problem_are_those_of_the_matrix_exponential(epsilon):
    problem = decay()
    start = decay_start(problem)
    times = tts.hitting_times(problem, start, epsilon=epsilon, tau_end=2.0, rtol=1e-10, atol=1e-10)

    def excess(tau, goal):
        if epsilon is None:
            slow = toy.limit(problem, start, [tau])[0]
        else:
            slow = toy.flow(problem, start, epsilon, [tau])[0, 4:]
        # the slow variables come from outside, and pass
        return float((jnp.abs(slow) - jnp.abs(problem.goals))[goal] - problem.radius)

    exact = [brentq(excess, 1e-6, 1.0, args=(goal,), xtol=1e-14) for goal in range(2)]
    assert_allclose(times, exact, atol=1e-9)


def test_a_neuron_is_at_the_radius_then_and_not_before(problem, starts):
    some = jax.tree.map(lambda x: x[:3], starts)
    times = np.asarray(tts.hitting_times(problem, some, epsilon=2e-5, tau_end=0.035))
    assert times.shape == (3, 5)
    eta = float(problem.eta)
    for lane, own in enumerate(times):
        state = jax.tree.map(lambda x, lane=lane: x[lane], some)
        order = np.argsort(own)
        asked = np.unique(np.concatenate([np.linspace(0, 0.035, 51), own[np.isfinite(own)]]))
        run = tts.flow(problem, state, epsilon=2e-5, tau=asked)
        distance = np.asarray(run.observables["recovery"])
        for jump in order:
            if own[jump] == 0.0:
                assert distance[0, jump] <= eta
            elif np.isfinite(own[jump]):
                at = distance[np.searchsorted(asked, own[jump]), jump]
                assert at == pytest.approx(eta, rel=1e-7)
            assert np.all(distance[asked < own[jump], jump] > eta)


# --- batches and transformations ----------------------------------------------------------------


@pytest.mark.slow
def test_batches_epsilons_and_maps_give_the_single_times():
    slow = np.random.default_rng(0).uniform(0.0, 0.4, (19, 2))
    starts = tts.State(jnp.ones(19), jnp.asarray(slow))
    exact = GOALS - 0.01 - slow
    assert_allclose(drift_times(starts), exact, atol=1e-12)
    crossed = drift_times(
        tts.State(jnp.ones((19, 1)), jnp.asarray(slow[:, None])), epsilon=np.array([0.1, 0.2])
    )
    assert crossed.shape == (19, 2, 2)
    assert_allclose(crossed, np.stack([exact] * 2, axis=1), atol=1e-12)
    assert_allclose(drift_times(epsilon=np.array([0.1, 0.2])), [EXACT] * 2, atol=1e-12)
    mapped = jax.vmap(lambda x: drift_times(tts.State(jnp.ones(()), x)))(slow[:3])
    assert_allclose(mapped, exact[:3], atol=1e-12)
    assert_allclose(jax.jit(drift_times)(starts), exact, atol=1e-12)


@pytest.mark.slow
def test_problems_are_mapped_over():
    radii = np.array([0.01, 0.05])
    times = jax.vmap(lambda r: drift_times(problem=Drift(jnp.asarray(GOALS), r)))(radii)
    assert_allclose(times, GOALS - np.array([0.2, 0.1]) - radii[:, None], atol=1e-12)


def test_derivatives_of_a_drift_are_exact():
    def total(slow, goals, radius, epsilon):
        start = tts.State(jnp.ones(()), slow)
        return drift_times(start, problem=Drift(goals, radius), epsilon=epsilon) @ jnp.array([1, 2])

    numbers = START.slow, DRIFT.goals, DRIFT.radius, jnp.array(0.1)
    gradient = jax.grad(total, argnums=(0, 1, 2, 3))(*numbers)
    for got, exact in zip(gradient, ([-1, -2], [1, 2], -3, 0), strict=True):
        assert_allclose(got, exact, atol=1e-10)


# --- no hit ---------------------------------------------------------------------------------


def test_goals_at_hand_out_of_reach_and_too_late():
    start = tts.State(jnp.ones(()), jnp.array([0.505, 0.95]))  # within r; beyond the goal
    assert_array_equal(drift_times(start), [0.0, np.inf])
    assert_array_equal(np.isinf(drift_times(tau_end=0.5)), [False, True])
    gradient = jax.jacrev(lambda x: drift_times(tts.State(jnp.ones(()), x)))(start.slow)
    assert_array_equal(gradient, np.zeros((2, 2)))


def test_a_visit_between_two_records_is_not_seen():
    # the visit lasts 0.02
    assert np.isinf(drift_times(records=3)[0])
    assert_allclose(drift_times(records=60), EXACT, atol=1e-12)


@pytest.mark.slow
def test_a_lane_that_fails_has_nan_and_leaves_the_others_alone():
    problem = tts.Univariate(
        tts.PiecewiseConstant([0.4, 0.7], [1.0, 3.0, 0.0]), neurons=4, eta=0.05
    )
    start = problem.state(slow=[0.2, 0.5, 0.6, 0.85])
    options = {"tau_end": 0.1, "solver": "tsit5", "max_steps": 128}
    mixed = tts.hitting_times(problem, start, epsilon=np.array([0.1, 1e-6]), **options)
    alone = tts.hitting_times(problem, start, epsilon=0.1, **options)
    assert_array_equal(mixed[0], alone)
    assert np.all(np.isfinite(alone) | np.isinf(alone))
    assert np.all(np.isnan(mixed[1]))


# --- refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau_end": 0.0}, "`tau_end` must be positive, got 0.0"),
        ({"tau_end": [0.1, 0.2]}, "`tau_end` must be one number"),
        ({"radius": -1.0}, "`radius` must be positive, got -1.0"),
        ({"records": 0}, "`records` must be an integer of at least 1, got 0"),
        ({"refinements": 1.5}, "`refinements` must be an integer of at least 1, got 1.5"),
        ({"epsilon": 0.0}, "`epsilon` must be positive, got 0.0. Leave it out for the limit"),
        ({"observable": "recovery"}, "`observable` must be one of 'distance', got 'recovery'"),
        ({"rtol": -1.0}, "`rtol` must be positive"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        drift_times(**options)


def test_epsilons_that_do_not_broadcast_are_refused():
    starts = tts.State(jnp.ones(2), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"`epsilon` must broadcast.*\(2,\).*\(3,\)"):
        drift_times(starts, epsilon=np.ones(3))


def test_a_problem_without_goals_needs_a_radius():
    problem = toy.linear()
    with pytest.raises(TypeError, match="`Linear` does not define `goal_radius`.*`radius`"):
        tts.hitting_times(problem, problem.init(key=jax.random.key(0)), tau_end=1.0)
