"""Fast solvers: all find the same critical point, of the loss or of a sample, and differentiate."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import tts_jax as tts
from tts_jax import fast


class Fit(tts.AbstractProblem):
    """Ridge regression on features tanh(x·t + shift) of data t; the slow variable shapes them."""

    points: jax.Array
    targets: jax.Array
    penalty: jax.Array
    features: int
    power: int = 2

    solver: ClassVar = fast.Ridge()

    @property
    def fast_solver(self):
        return self.solver

    def init(self, *, key):
        return tts.State(jnp.zeros(self.features), jax.random.normal(key, (self.features,)))

    def design(self, slow, points):
        return jnp.tanh(slow * points[:, None] + jnp.arange(self.features) / 3)

    def misfit(self, y, x, points, targets):
        gaps = self.design(x, points) @ y - targets
        return jnp.sum(gaps**2) + self.penalty * jnp.sum((y - 0.5) ** self.power)

    def loss(self, y, x):
        return self.misfit(y, x, self.points, self.targets)

    def sample(self, *, key, step):
        return self.points[:4], self.targets[:4] + 1.0

    def sample_loss(self, y, x, sample):
        return self.misfit(y, x, *sample)

    def ridge(self, slow, sample=None):
        points, targets = (self.points, self.targets) if sample is None else sample
        return fast.RidgeSystem(self.design(slow, points), targets, self.penalty, 0.5)


class Blocked(Fit):
    """The same with the rows computed three at a time."""

    def ridge(self, slow, sample=None):
        points, targets = (self.points, self.targets) if sample is None else sample
        rows = fast.Blocks(lambda part: self.design(slow, part), points, 3)
        return fast.RidgeSystem(rows, targets, self.penalty, 0.5)


def fit(kind=Fit, features=3, points=10, penalty=0.1, **more):
    t = jnp.linspace(-1.0, 2.0, points)
    return kind(t, jnp.sin(3 * t), jnp.asarray(penalty), features, **more)


X = jnp.array([0.7, -1.2, 2.0])
SOLVERS = {
    "quadratic": fast.Quadratic(),
    "ridge": fast.Ridge(),
    "features": fast.Ridge("features"),
    "samples": fast.Ridge("samples"),
    "singular": fast.Ridge(singular=True),
    "newton": fast.Argmin(),
    "bfgs": fast.Argmin(optx.BFGS(rtol=1e-10, atol=1e-10)),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@eqx.filter_jit
def solve(solver, problem, slow, sample=None, start=None):
    return solver.solve(problem, slow, sample, start)


def normal_equations(problem, slow, points, targets):
    design = np.asarray(problem.design(slow, points))
    left = design.T @ design + float(problem.penalty) * np.eye(problem.features)
    return np.linalg.solve(left, design.T @ np.asarray(targets) + 0.5 * float(problem.penalty))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", [Fit, Blocked])
def test_all_find_the_minimiser(name, kind):
    problem = fit(kind)
    found = solve(SOLVERS[name], problem, X)
    expected = normal_equations(problem, X, problem.points, problem.targets)
    near = 1e-6 if name == "bfgs" else 1e-11
    np.testing.assert_allclose(found.fast, expected, rtol=0, atol=near)
    assert found.info["residual"] < (1e-5 if name == "bfgs" else 1e-12)
    assert bool(found.info.get("converged", True))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_what_is_solved_for(name):
    problem = fit()
    sample = problem.sample(key=None, step=0)
    found = solve(SOLVERS[name], problem, X, sample)
    near = 1e-6 if name == "bfgs" else 1e-11
    np.testing.assert_allclose(found.fast, normal_equations(problem, X, *sample), rtol=0, atol=near)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("quadratic", Fit), ("ridge", Blocked), ("samples", Fit), ("singular", Fit), ("newton", Fit)],
)
def test_derivatives_are_those_of_the_minimiser(name, kind):
    """The first and the second, in reverse and in forward mode, against differences."""
    problem, solver = fit(kind), SOLVERS[name]

    @jax.jit
    def first(slow):
        return jnp.sum(jnp.sin(solver.solve(problem, slow).fast))

    slope = jax.jit(jax.grad(first))
    bend = jax.jit(jax.jacfwd(jax.grad(first)))(X)
    step = 1e-5
    for row, away in enumerate(step * jnp.eye(3)):
        rough = (first(X + away) - first(X - away)) / (2 * step)
        np.testing.assert_allclose(slope(X)[row], rough, rtol=0, atol=1e-8)
        rough = (slope(X + away) - slope(X - away)) / (2 * step)
        np.testing.assert_allclose(bend[row], rough, rtol=0, atol=1e-7)


def test_the_condition_is_known_or_bounded():
    problem = fit()
    design = np.asarray(problem.design(X, problem.points))
    exact = np.linalg.cond(design.T @ design + 0.1 * np.eye(3))
    known = solve(fast.Quadratic(), problem, X).info["condition"]
    np.testing.assert_allclose(known, exact, rtol=1e-8)
    assert exact <= solve(fast.Ridge(), problem, X).info["condition"] < 10 * exact


@pytest.mark.parametrize("form", ["features", "samples"])
@pytest.mark.parametrize("points", [2, 10])
def test_without_a_penalty_it_is_the_point_nearest_to_the_prior(form, points):
    """Two equal columns, and fewer data than features: never NaN, of least norm."""

    class Twice(Fit):
        def design(self, slow, points):
            columns = super().design(slow, points)
            return columns.at[:, 2].set(columns[:, 1])

    twice, slow = fit(Twice, points=points, penalty=0.0), jnp.array([0.7, 0.7, 0.7])
    found = solve(fast.Ridge(form, singular=True), twice, slow)
    design = np.asarray(twice.design(slow, twice.points))
    expected = 0.5 + np.linalg.pinv(design, rcond=1e-9) @ (
        np.asarray(twice.targets) - design @ np.full(3, 0.5)
    )
    np.testing.assert_allclose(found.fast, expected, rtol=0, atol=1e-8)
    assert np.isinf(found.info["condition"]) or found.info["condition"] > 1e12 or form == "samples"


def test_gradient_steps_tend_to_the_minimiser():
    problem = fit()
    end = solve(fast.Ridge(), problem, X).fast
    start = jnp.ones(3)
    near, far = (
        solve(fast.GradientSteps(count, 0.02), problem, X, None, start) for count in (2000, 200)
    )
    assert np.max(np.abs(near.fast - end)) < 0.1 * np.max(np.abs(far.fast - end))
    one = solve(fast.GradientSteps(1, 0.02), problem, X, None, start).fast
    np.testing.assert_allclose(one, start - 0.02 * jax.grad(problem.loss)(start, X), rtol=1e-14)


def test_a_convex_loss_that_is_not_quadratic():
    problem = fit(power=4)
    found = solve(fast.Argmin(), problem, X)
    np.testing.assert_allclose(jax.grad(problem.loss)(found.fast, X), 0.0, atol=1e-10)
    assert bool(found.info["converged"])


def test_a_minimum_that_is_not_found_is_told_by_the_status():
    class Flat(Fit):
        solver: ClassVar = fast.Argmin(max_steps=1)

        def loss(self, y, x):
            return jnp.sum(jnp.cosh(3 * y - jnp.sum(x)))

    problem = fit(Flat)
    state = tts.State(np.ones(3), np.asarray(X))
    limit = tts.limit(problem, state, tau=[1e-6], max_steps=50, solver="tsit5")
    assert int(limit.status) == tts.Status.SOLVER_FAILED
    run = tts.sgd(
        problem, state=state, key=jax.random.key(0), regime="limit", step_size=1e-3, tau=[1e-3]
    )
    assert run.status.tolist() == [tts.Status.SOLVER_FAILED]


def test_a_problem_needs_no_critical_point_of_its_own():
    """`limit` by Newton's method, the default, is that by the ridge solve."""

    class Newton(Fit):
        @property
        def fast_solver(self):
            return tts.AbstractProblem.fast_solver.fget(self)

    state = tts.State(np.zeros(3), np.asarray(X))
    one, other = (
        tts.limit(fit(kind), state, tau=[0.01, 0.1], solver="tsit5") for kind in (Fit, Newton)
    )
    np.testing.assert_allclose(one.slow, other.slow, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.fast, other.fast, rtol=0, atol=1e-9)
    assert set(one.stats) >= {"residual", "condition"}
    assert set(other.stats) >= {"residual", "converged"}


def test_what_cannot_be_solved_is_refused():
    class Closed(Fit):
        solver: ClassVar = fast.ClosedForm()

    class Bare(Fit):
        def ridge(self, slow, sample=None):
            return tts.AbstractProblem.ridge(self, slow, sample)

    with pytest.raises(TypeError, match="does not define `critical`"):
        fit(Closed).critical(X)
    with pytest.raises(TypeError, match=r"does not define `ridge\(slow, sample\)`"):
        fit(Bare).critical(X)
    with pytest.raises(ValueError, match="Argument `form` must be one of"):
        fast.Ridge("rows")
    with pytest.raises(TypeError, match="Argument `solver` must be a root finder"):
        fast.Argmin(3)
    with pytest.raises(ValueError, match="Argument `count` must be an integer of at least 1"):
        fast.GradientSteps(0, 0.1)
    with pytest.raises(ValueError, match="Argument `step_size` must be positive"):
        fast.GradientSteps(3, 0.0)
