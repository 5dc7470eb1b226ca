"""Regimes of `sgd`, the noise of its steps, and what it observes."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tts_jax as tts
from tts_jax import fast, geometry, regime


class Spring(tts.AbstractProblem):
    """L = ½|y − x|² + ½k|x|²: y* = x, so that the limit is x exp(−kτ)."""

    stiffness: float = 0.5
    heat: tuple = (None, None)

    dims: ClassVar = {"fast": ("coordinate",), "slow": ("coordinate",), "gap": ("coordinate",)}

    @property
    def temperature(self):
        return tts.State(*self.heat)

    def init(self, *, key):
        return tts.State(jnp.zeros(2), jax.random.normal(key, (2,)))

    def loss(self, y, x):
        return (jnp.sum((y - x) ** 2) + self.stiffness * jnp.sum(x**2)) / 2

    def critical(self, slow):
        return slow

    def observables(self, fast, slow):
        return {"gap": fast - slow}

    def sample(self, *, key, step):
        return ()

    def sample_loss(self, y, x, sample):
        return self.loss(y, x)


class Shaken(Spring):
    """Label noise that the solve and the gradient see: y fits x + ξ, and L is on clean labels."""

    critical: ClassVar = tts.AbstractProblem.critical

    @property
    def envelope(self):
        return False

    @property
    def fast_solver(self):
        return fast.Quadratic()

    def sample(self, *, key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (2,))

    def sample_loss(self, y, x, sample):
        return jnp.sum(y**2 * x**2) / 2

    def sample_fast_loss(self, y, x, sample):
        return jnp.sum((y - x - sample) ** 2) / 2


START = tts.State(np.array([1.0, -2.0]), np.array([0.5, 1.5]))
KEY = jax.random.key(3)


def run(problem=None, **options):
    settings = {"key": KEY, "state": START, "tau": [0.5], "step_size": 0.05} | options
    return tts.sgd(Spring() if problem is None else problem, **settings)


def by_hand(step, steps):
    y, x = START
    for _ in range(steps):
        y, x = step(y, x)
    return y, x


def test_joint_steps_are_two_rate_gradient_descent():
    done = run(epsilon=0.1, regime="joint")
    y, x = by_hand(
        lambda y, x: (y - 0.05 * (y - x), x - 0.005 * (x - y + 0.5 * x)), int(round(0.5 / 0.005))
    )
    np.testing.assert_allclose(done.fast[0, 0], y, rtol=1e-12)
    np.testing.assert_allclose(done.slow[0, 0], x, rtol=1e-12)
    assert dict(done.notes)["regime"] == "Joint"


def test_inner_steps_come_before_the_slow_one():
    done = run(epsilon=0.1, regime=regime.Inner(3))

    def step(y, x):
        for _ in range(3):
            y = y - 0.05 * (y - x)
        return y, x - 0.005 * (x - y + 0.5 * x)

    y, x = by_hand(step, 100)
    np.testing.assert_allclose(done.fast[0, 0], y, rtol=1e-12)
    np.testing.assert_allclose(done.slow[0, 0], x, rtol=1e-12)


def test_inner_steps_may_begin_anew_each_time():
    anew = regime.Inner(3, restart=True)
    done = run(epsilon=0.1, regime=anew)

    def step(y, x):
        y = np.zeros(2)  # as in `init`
        for _ in range(3):
            y = y - 0.05 * (y - x)
        return y, x - 0.005 * (x - y + 0.5 * x)

    y, x = by_hand(step, 100)
    np.testing.assert_allclose(done.fast[0, 0], y, rtol=1e-12)
    np.testing.assert_allclose(done.slow[0, 0], x, rtol=1e-12)
    with pytest.raises(ValueError, match="Argument `key` must be a random key"):
        run(Shaken(), epsilon=0.1, regime=anew, key=None, samples=np.zeros((100, 2)))


class Averaged(Spring):
    """The same with a fast variable at the temperature ½, whose law has the mean x."""

    heat: tuple = (0.5, None)

    def reduced_field(self, slow):
        return -self.stiffness * slow


def test_a_limit_may_average_over_the_noise_of_the_fast_variable():
    limit = tts.limit(Averaged(), START, tau=[0.5, 1.0], rtol=1e-9, atol=1e-9)
    expected = START.slow * np.exp(-0.5 * np.array([[0.5], [1.0]]))
    np.testing.assert_allclose(limit.slow, expected, rtol=1e-8)
    for dynamics, problem in (
        (tts.limit, Spring(heat=(0.5, None))),
        (tts.limit, Averaged(heat=(0.5, 0.1))),
        (functools.partial(tts.flow, epsilon=0.1), Averaged()),
    ):
        with pytest.raises(TypeError, match="is for problems without noise"):
            dynamics(problem, START, tau=[0.5])


def test_the_limit_eliminates_the_fast_variable():
    done = run(regime="limit", step_size=0.005)
    expected = START.slow * (1 - 0.5 * 0.005) ** 100
    np.testing.assert_allclose(done.slow[0, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(done.fast, done.slow, rtol=1e-15)
    assert float(done.settings["epsilon"]) == 0.0


def test_more_inner_steps_come_nearer_to_the_limit():
    limit = run(regime="limit", step_size=0.005).slow
    far = [
        np.max(np.abs(run(epsilon=0.1, regime=regime.Inner(k)).slow - limit)) for k in (1, 10, 100)
    ]
    assert far[0] > 5 * far[1] > 10 * far[2]


def test_the_solver_of_the_limit_may_be_chosen():
    problem = Spring()
    limit = run(problem, regime="limit", step_size=0.005)
    for solver in (fast.Quadratic(), fast.Argmin(), fast.GradientSteps(60, 0.5)):
        other = run(problem, regime=regime.Eliminated(solver), step_size=0.005)
        np.testing.assert_allclose(other.slow, limit.slow, rtol=1e-12)
        assert np.all(other.stats["residual"] < 1e-12)


def test_a_running_mean_forgets():
    done = run(regime=regime.Eliminated(memory=0.8), step_size=0.005)

    def step(y, x):
        y = 0.8 * y + 0.2 * x
        return y, x - 0.005 * (x - y + 0.5 * x)

    y, x = by_hand(step, 100)
    np.testing.assert_allclose(done.fast[0, 0], y, rtol=1e-12)
    np.testing.assert_allclose(done.slow[0, 0], x, rtol=1e-12)


def test_label_noise_is_seen_by_the_solve_and_differentiated():
    """y = x + ξ of the step, and the slope is that of ½(x + ξ)²x², with ξ held."""
    done = run(Shaken(), regime="limit", step_size=0.01, tau=[0.05], samples=SHAKES)
    x = START.slow
    for shake in SHAKES[:5]:
        y = x + shake
        x = x - 0.01 * (y * x**2 + y**2 * x)
    np.testing.assert_allclose(done.slow[0, 0], x, rtol=1e-12)
    held = regime.Eliminated(total=False)
    done = run(Shaken(), regime=held, step_size=0.01, tau=[0.01], samples=SHAKES)
    y = START.slow + SHAKES[0]
    np.testing.assert_allclose(done.slow[0, 0], START.slow - 0.01 * y**2 * START.slow, rtol=1e-12)


SHAKES = np.asarray(np.random.default_rng(0).normal(size=(10, 2)))


def test_langevin_noise_has_its_temperature():
    """x of dx = −x dτ + √(2T) dB comes to variance T; so does y about x in fast time."""
    cold = Spring(stiffness=1.0, heat=(None, 0.3))
    done = run(cold, regime="limit", step_size=0.02, tau=[6.0], seeds=4000, state=None)
    # of the Euler scheme: T/(1 − h/2)
    np.testing.assert_allclose(np.var(done.slow), 0.3 / 0.99, rtol=0.06)
    assert abs(np.mean(done.slow)) < 0.03
    warm = Spring(stiffness=1.0, heat=(0.2, None))
    done = run(warm, epsilon=1e-6, step_size=0.1, tau=[2e-5], seeds=4000)
    np.testing.assert_allclose(np.var(done.fast - done.slow), 0.2 / 0.95, rtol=0.06)


def test_noise_depends_on_the_seed_and_the_step_only():
    hot = Spring(heat=(0.1, 0.2))
    options = {"epsilon": 0.1, "state": None, "regime": regime.Inner(2)}
    many = run(hot, seeds=3, tau=[0.1, 0.5], **options)
    one = run(hot, seeds=1, tau=[0.5], **options)
    np.testing.assert_allclose(one.slow[0, 0], many.slow[0, 1], rtol=1e-12)
    assert np.ptp(many.slow[:, 1], axis=0).min() > 0.01


@pytest.mark.parametrize("dynamics", [tts.flow, tts.limit])
def test_flows_are_without_noise(dynamics):
    more = {"epsilon": 0.1} if dynamics is tts.flow else {}
    with pytest.raises(TypeError, match="is for problems without noise"):
        dynamics(Spring(heat=(None, 0.1)), START, tau=[0.1], **more)


def test_it_observes_between_the_recorded_times(tmp_path):
    problem = Spring()
    seen = run(problem, epsilon=0.1, observe_every=25, seeds=3, state=None)
    plain = run(problem, epsilon=0.1, tau=np.arange(5) * 0.125, seeds=3, state=None)
    np.testing.assert_allclose(seen.series["tau"], plain.tau, rtol=1e-14)
    np.testing.assert_allclose(seen.series["loss"], plain.loss, rtol=1e-13)
    np.testing.assert_allclose(seen.series["gap"], plain.observables["gap"], rtol=1e-13)
    assert seen.fast.shape == (3, 1, 2)
    # the force on x over the rate 1 of y, times ε
    force = np.max(np.abs(plain.fast - 1.5 * plain.slow), axis=-1)
    np.testing.assert_allclose(seen.series["epsilon_eff"], 0.1 * force, rtol=1e-12)
    back = tts.load(seen.save(tmp_path / "run.nc"))
    assert set(back.series) == set(seen.series)
    np.testing.assert_array_equal(back.series["gap"], seen.series["gap"])
    assert seen.to_xarray()["series.gap"].dims == ("seed", "observation", "coordinate")


def test_lanes_are_observed_as_well():
    problem = tts.Univariate(tts.PiecewiseConstant([0.5], [0.0, 1.0]), neurons=4, eta=0.05)
    options = {"key": KEY, "seeds": 3, "epsilon": 0.01, "step_size": 0.01, "tau": [0.004]}
    seen = tts.sgd(problem, engine="loop", observe_every=10, **options)
    state = tts.State(seen.fast[:, -1], seen.slow[:, -1])
    np.testing.assert_allclose(seen.series["recovery"][:, -1], problem.recovery(state.slow))
    separation = tts.separation(problem, state, epsilon=0.01)
    np.testing.assert_allclose(seen.series["epsilon_eff"][:, -1], separation, rtol=1e-9)
    eigenvalues = [problem.gram_eigenvalues(slow)[0] for slow in state.slow]
    speed = [np.max(np.abs(problem.slow_field(*one))) for one in zip(*state, strict=True)]
    expected = 0.01 * np.array(speed) / (4 * 0.05) / (2 * np.array(eigenvalues))
    np.testing.assert_allclose(separation, expected, rtol=1e-6)


def test_a_direction_that_does_not_relax_is_not_separated():
    class Flat(Spring):
        def loss(self, y, x):
            return (y[0] - x[0]) ** 2 + jnp.sum(x**2)

    assert np.isinf(tts.separation(Flat(), START, epsilon=0.1))


def test_a_direction_that_relaxes_only_by_rounding_is_not_separated():
    class Nearly(Spring):
        def loss(self, y, x):
            return jnp.sum((jnp.sum(y) - x) ** 2) + jnp.sum(x**2) + 1e-18 * jnp.sum(y**2)

    assert np.isinf(tts.separation(Nearly(), START, epsilon=0.1))


def test_an_optimizer_sees_the_slope_as_the_geometry_has_it():
    """Plain descent with the step sizes of the two blocks is what `sgd` does by itself."""

    class Circling(Spring):
        @property
        def geometry(self):
            return geometry.Particles(geometry.Sphere())

        def init(self, *, key):
            return tts.State(jnp.zeros((3, 2)), self.geometry.project(jnp.ones((3, 2))))

        def loss(self, y, x):
            return jnp.sum((y - x) ** 2 * jnp.array([1.0, 3.0])) / 2

    rates = optax.partition(
        {"fast": optax.sgd(0.05), "slow": optax.sgd(0.005)}, {"fast": "fast", "slow": "slow"}
    )
    options = {"epsilon": 0.1, "state": None, "seeds": 1}
    one, other = run(Circling(), **options), run(Circling(), optimizer=rates, **options)
    np.testing.assert_allclose(other.slow, one.slow, rtol=1e-12)
    np.testing.assert_allclose(other.fast, one.fast, rtol=1e-12)
    assert np.ptp(one.slow) > 0.01


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="Argument `epsilon` must be left out in the regime"):
        run(regime="limit", epsilon=0.1)
    with pytest.raises(ValueError, match="Argument `epsilon` must be"):
        run()
    with pytest.raises(ValueError, match="Argument `regime` must be one of 'joint', 'limit'"):
        run(regime="inner")
    with pytest.raises(TypeError, match="Argument `regime` must be 'joint', 'limit' or a regime"):
        run(regime=3)
    with pytest.raises(ValueError, match="Argument `steps` must be an integer of at least 1"):
        regime.Inner(0)
    with pytest.raises(ValueError, match="Argument `memory` must be at least 0 and below 1"):
        regime.Eliminated(memory=1.0)
    with pytest.raises(TypeError, match="Argument `solver` must be an `AbstractFastSolver`"):
        regime.Eliminated("ridge")
    with pytest.raises(ValueError, match="Argument `optimizer` must be left out with regime"):
        run(regime="limit", optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="Argument `optimizer` must be left out for a problem"):
        run(Spring(heat=(None, 0.1)), epsilon=0.1, optimizer=optax.sgd(0.1))

    class Half(Spring):
        def fast_loss(self, y, x):
            return 2.0 * self.loss(y, x)

    with pytest.raises(TypeError, match="defines `fast_loss`, but not that of a sample"):
        run(Half(), epsilon=0.1)
    with pytest.raises(ValueError, match="Argument `observe_every` must be an integer"):
        run(epsilon=0.1, observe_every=0)
    with pytest.raises(ValueError, match="Argument `key` must be a random key to draw the noise"):
        run(Shaken(heat=(None, 0.1)), epsilon=0.1, key=None, samples=np.zeros((100, 2)))
    problem = tts.Univariate(tts.PiecewiseConstant([0.5], [0.0, 1.0]), neurons=4, eta=0.05)
    with pytest.raises(ValueError, match="must be 'auto' or 'general' for the regime Eliminated"):
        tts.sgd(problem, key=KEY, regime="limit", step_size=0.1, tau=[0.1], engine="loop")
