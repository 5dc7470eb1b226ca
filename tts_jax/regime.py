"""Regimes of `sgd`: what the fast variable does while the slow one takes a step.

`Joint` is what one runs without thinking of two timescales; `Inner` gives the fast variable k steps
for each of the slow one; `Eliminated` is the discrete limit ε → 0, the fast variable on the
critical manifold at every step. All draw one sample per step of the slow variable, which the fast
variable and the gradient both see.
"""

import abc
from typing import TYPE_CHECKING

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tts_jax import checks
from tts_jax.fast import AbstractFastSolver


if TYPE_CHECKING:
    from tts_jax._problem import AbstractProblem, State


class AbstractRegime(eqx.Module):
    """One step of the fast variable, and the slope that the slow one then follows."""

    @property
    def random(self) -> bool:
        """Whether a step needs a key even where the fast variable has no noise."""
        return False

    @abc.abstractmethod
    def step(
        self,
        problem: "AbstractProblem",
        state: "State",
        sample: PyTree[Array],
        step_size: Float[Array, ""],
        key: PRNGKeyArray | None,
        gradient: str,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The new fast variable, and the slope of the loss in the old slow one.

        Args:
            problem: whose losses they are.
            state: the old state.
            sample: the sample of this step.
            step_size: that of the fast variable.
            key: for the noise of the fast variable, `None` where it has none and the regime is
                not `random`.
            gradient: the estimator, one of `problem.gradients`.
        """

    def recorded(
        self, problem: "AbstractProblem", state: "State"
    ) -> tuple[PyTree[Array], dict[str, Array]]:
        """The fast variable that is recorded with a state, and numbers about it."""
        del problem
        return state.fast, {}

    def ratio(self, epsilon: float) -> float:
        """The ratio of the speeds of the slow and the fast variable, 0 if y is eliminated."""
        return epsilon

    def factorises(self, problem: "AbstractProblem") -> bool:
        """Whether a step may factorise a matrix."""
        del problem
        return False


class Joint(AbstractRegime):
    """One step of the fast variable for each of the slow one, both from the old state."""

    def step(
        self,
        problem: "AbstractProblem",
        state: "State",
        sample: PyTree[Array],
        step_size: Float[Array, ""],
        key: PRNGKeyArray | None,
        gradient: str,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        slopes = problem.sample_gradient(*state, sample, gradient=gradient)
        return _descend(problem, state.fast, slopes[0], step_size, key), slopes[1]


class Inner(AbstractRegime):
    """`steps` steps of the fast variable for each of the slow one, which then sees the last.

    The ratio of the speeds is ε/steps.

    Attributes:
        steps: their number k.
        restart: whether the fast variable begins anew each time, from a new start of
            `problem.init`, instead of going on from where it was: the nested loop of a sampler.
    """

    steps: int = eqx.field(static=True)
    restart: bool = eqx.field(static=True, default=False)

    def factorises(self, problem: "AbstractProblem") -> bool:
        return self.restart  # `init` may do so

    @property
    def random(self) -> bool:
        return self.restart

    def __check_init__(self) -> None:
        remedy = "It is the number of steps of the fast variable for each of the slow one."
        checks.positive_integer("steps", self.steps, remedy)

    def step(
        self,
        problem: "AbstractProblem",
        state: "State",
        sample: PyTree[Array],
        step_size: Float[Array, ""],
        key: PRNGKeyArray | None,
        gradient: str,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        def inner(index: Array, fast: PyTree[Array]) -> PyTree[Array]:
            slope = problem.sample_gradient(fast, state.slow, sample, gradient=gradient)[0]
            mine = None if key is None else jax.random.fold_in(key, index)
            return _descend(problem, fast, slope, step_size, mine)

        start = state.fast
        if self.restart:
            assert key is not None  # `sgd` has checked
            start = problem.init(key=jax.random.fold_in(key, self.steps)).fast
            start = jax.tree.map(lambda new, old: new.astype(old.dtype), start, state.fast)
        fast = jax.lax.fori_loop(0, self.steps, inner, start)
        return fast, problem.sample_gradient(fast, state.slow, sample, gradient=gradient)[1]

    def ratio(self, epsilon: float) -> float:
        return epsilon / self.steps


class Eliminated(AbstractRegime):
    """The fast variable at y*(x): variable projection, the limit ε → 0 in steps.

    What is recorded with a slow variable is y*(x) at this x, of the fast loss without a sample,
    or the running mean where there is a `memory`.

    Attributes:
        solver: finds y*(x) for the sample; by default the problem's `fast_solver`. A closed form
            does not look at the sample.
        total: whether the slope is that of x ↦ L(y*(x), x), by differentiation of the solver. By
            default it is not where the problem's `envelope` says that y* may be held fixed; with
            label noise that the loss does not see, it must be.
        memory: the weight of the old fast variable in a running mean of y*, for minibatches.
    """

    solver: AbstractFastSolver | None = None
    total: bool | None = eqx.field(static=True, default=None)
    memory: float = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        if self.solver is not None:
            remedy = "Pass for example `fast.Ridge()`."
            checks.instance("solver", self.solver, AbstractFastSolver, remedy)
        if not 0.0 <= self.memory < 1.0:
            raise checks.argument_error(
                "memory", "be at least 0 and below 1", self.memory, "0 means none."
            )

    def step(
        self,
        problem: "AbstractProblem",
        state: "State",
        sample: PyTree[Array],
        step_size: Float[Array, ""],
        key: PRNGKeyArray | None,
        gradient: str,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        del step_size, key

        def found(slow: PyTree[Array]) -> PyTree[Array]:
            fast = self._solver(problem).solve(problem, slow, sample, state.fast).fast
            if not self.memory:
                return fast
            return jax.tree.map(
                lambda old, new: self.memory * old + (1.0 - self.memory) * new, state.fast, fast
            )

        total = not problem.envelope if self.total is None else self.total
        if not total:
            fast = found(state.slow)
            return fast, problem.sample_gradient(fast, state.slow, sample, gradient=gradient)[1]

        def loss(slow: PyTree[Array]) -> tuple[Array, PyTree[Array]]:
            fast = found(slow)
            return problem.sample_loss(fast, slow, sample), fast

        slope, fast = jax.grad(loss, has_aux=True)(state.slow)
        return fast, slope

    def recorded(
        self, problem: "AbstractProblem", state: "State"
    ) -> tuple[PyTree[Array], dict[str, Array]]:
        if self.memory:
            return state.fast, {}
        return self._solver(problem).solve(problem, state.slow, None, state.fast)

    def ratio(self, epsilon: float) -> float:
        del epsilon
        return 0.0

    def factorises(self, problem: "AbstractProblem") -> bool:
        return self._solver(problem).factorises

    def _solver(self, problem: "AbstractProblem") -> AbstractFastSolver:
        return problem.fast_solver if self.solver is None else self.solver


def regime_of(given: str | AbstractRegime) -> AbstractRegime:
    """The regime of a name, or itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither.
    """
    if isinstance(given, AbstractRegime):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"Argument `regime` must be 'joint', 'limit' or a regime of `tts_jax.regime`, got "
            f"{given!r}. Pass for example `regime.Inner(10)`."
        )
    remedy = "Or pass for example `regime.Inner(10)`."
    checks.one_of("regime", given, ("joint", "limit"), remedy)
    return Joint() if given == "joint" else Eliminated()


def _descend(
    problem: "AbstractProblem",
    fast: PyTree[Array],
    slope: PyTree[Array],
    step_size: Float[Array, ""],
    key: PRNGKeyArray | None,
) -> PyTree[Array]:
    heat = problem.temperature.fast
    return problem.fast_geometry.descend(fast, slope, step_size, heat, key)
