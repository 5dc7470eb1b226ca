"""What a two-timescale learning problem answers: the one interface that every dynamics asks.

A fast variable y relaxes at rate 1, a slow variable x at rate ε. In slow time τ = εt

    ε dy/dτ = −∇_y g(y, x)          g: the fast loss
      dx/dτ =  V(y, x)              V = −∇_x L, L: the loss

`flow` solves this at finite ε, `limit` solves dx/dτ = V(y*(x), x) on the critical manifold
y*(x) = argmin_y g(y, x), and `sgd` takes steps h for y and εh for x on random samples; step
k sits at τ = εhk.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree


class State(NamedTuple):
    """A point of the two-timescale dynamics: the fast variable y and the slow variable x."""

    fast: PyTree[Array]
    slow: PyTree[Array]


class AbstractProblem(eqx.Module):
    """A two-timescale learning problem.

    A subclass answers `init`, `loss` and `critical`; that is enough for `flow` and `limit`.
    With `sample` and `sample_loss` it also runs under `sgd`. Everything else has a default
    by automatic differentiation that a subclass may replace by a closed form.
    """

    # Names of the axes of one state and of each observable, for labelled results.
    dims: ClassVar[dict[str, tuple[str, ...]]] = {"fast": ("fast_axis",), "slow": ("slow_axis",)}
    # The estimators of the sample gradient that `sgd(gradient=...)` may choose from.
    gradients: ClassVar[tuple[str, ...]] = ("exact",)
    # Whether the problem answers `tts_jax._lanes.LaneProblem`, for the batch-last engine.
    lanes: ClassVar[bool] = False

    def __hash__(self) -> int:
        # by value, so that a bound method is hashable and `jax.jit(problem.loss)` works
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, tuple(np.asarray(leaf).tobytes() for leaf in leaves)))

    @abc.abstractmethod
    def init(self, *, key: PRNGKeyArray) -> State:
        """A random unbatched start."""

    @abc.abstractmethod
    def loss(self, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, ""]:
        """The loss L(y, x) of one state."""

    @abc.abstractmethod
    def critical(self, slow: PyTree[Array]) -> PyTree[Array]:
        """The critical manifold y*(x) = argmin_y g(y, x)."""

    def fast_field(self, fast: PyTree[Array], slow: PyTree[Array]) -> PyTree[Array]:
        """−∇_y g(y, x): the velocity of the fast variable in fast time t."""
        return jax.tree.map(jnp.negative, jax.grad(self.loss, argnums=0)(fast, slow))

    def slow_field(self, fast: PyTree[Array], slow: PyTree[Array]) -> PyTree[Array]:
        """V(y, x): the velocity of the slow variable in slow time τ."""
        return jax.tree.map(jnp.negative, jax.grad(self.loss, argnums=1)(fast, slow))

    def fields(self, fast: PyTree[Array], slow: PyTree[Array]) -> State:
        """Both velocities; a problem that shares work between them replaces this one."""
        return State(self.fast_field(fast, slow), self.slow_field(fast, slow))

    def jacobian(self, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, "n n"]:
        """The Jacobian of `fields` in the flattened coordinates (fast, slow)."""
        flat, unravel = ravel_pytree(State(fast, slow))
        return jax.jacfwd(lambda y: ravel_pytree(self.fields(*unravel(y)))[0])(flat)

    def fastest_rate(
        self, fast: PyTree[Array], slow: PyTree[Array], epsilon: Array
    ) -> Float[Array, ""]:
        """About the fastest rate, in slow time, that the flow from this start will meet.

        `flow` compares it with τ to tell whether the problem is stiff. The default looks at the
        Jacobian at the start, on the critical manifold; a problem that stiffens on its way
        replaces it.
        """
        count = ravel_pytree(fast)[0].size
        jacobian = self.jacobian(self.critical(slow), slow)
        return jnp.linalg.norm(jacobian.at[:count].divide(epsilon), ord=2)

    def reduced_field(self, slow: PyTree[Array]) -> PyTree[Array]:
        """V(y*(x), x): the velocity of the reduced flow, by the envelope theorem."""
        return self.slow_field(self.critical(slow), slow)

    def reduced_jacobian(
        self, fast: PyTree[Array], slow: PyTree[Array]
    ) -> Float[Array, "n_slow n_slow"]:
        """The Jacobian of `reduced_field` at `fast` = y*(x), in flattened coordinates.

        By the implicit function theorem it is the Schur complement of the fast block of
        `jacobian`, for a fast variable that is stationary on the critical manifold.
        """
        count = ravel_pytree(fast)[0].size
        jacobian = self.jacobian(fast, slow)
        response = jnp.linalg.solve(jacobian[:count, :count], jacobian[:count, count:])
        return jacobian[count:, count:] - jacobian[count:, :count] @ response

    def sharp(self, slow: PyTree[Array], tau: Float[Array, " T"]) -> dict[str, Any]:
        """The closed form behind `sharp_limit`: fast, slow, loss, status and stats at `tau`."""
        del slow, tau
        raise TypeError(
            f"`{type(self).__name__}` has no sharp limit: it does not define `sharp`. Use `limit`."
        )

    def slow_scale(self) -> Float[ArrayLike, ""]:
        """The length of the slow variable that weighs like 1 of the fast one in step errors."""
        return 1.0

    def observables(self, fast: PyTree[Array], slow: PyTree[Array]) -> dict[str, Array]:
        """Named quantities recorded beside the loss; their axes are named in `dims`."""
        del fast, slow
        return {}

    def reduced_observables(self, slow: PyTree[Array]) -> dict[str, Array]:
        """Named quantities that `limit` records into `.stats`, such as a condition number."""
        del slow
        return {}

    def coords(self) -> dict[str, Any]:
        """Coordinates of the named axes, for labelled results."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The numbers that define the problem, stored with every result."""
        return {}

    def structure(self) -> State:
        """Shapes and dtypes of one unbatched state."""
        return jax.eval_shape(lambda key: self.init(key=key), jax.random.key(0))

    def sample(self, *, key: PRNGKeyArray, step: Any) -> PyTree[Array]:
        """One training sample: a pure function of the seed's key and the step number."""
        del key, step
        raise TypeError(
            f"`{type(self).__name__}` does not define `sample`, so `sgd` cannot draw training "
            f"samples. Define `sample(*, key, step)` and `sample_loss(fast, slow, sample)`."
        )

    def sample_loss(
        self, fast: PyTree[Array], slow: PyTree[Array], sample: PyTree[Array]
    ) -> Float[Array, ""]:
        """The loss of one training sample; its mean over samples is `loss` up to a constant."""
        del fast, slow, sample
        raise TypeError(
            f"`{type(self).__name__}` does not define `sample_loss`, which `sgd` differentiates. "
            f"Define `sample_loss(fast, slow, sample)`."
        )

    def sample_gradient(
        self,
        fast: PyTree[Array],
        slow: PyTree[Array],
        sample: PyTree[Array],
        *,
        gradient: str = "exact",
    ) -> State:
        """The gradient of `sample_loss` in both variables, by the estimator `gradient`."""
        del gradient
        return State(*jax.grad(self.sample_loss, argnums=(0, 1))(fast, slow, sample))


def batch_shape(problem: AbstractProblem, state: State) -> tuple[int, ...]:
    """The leading axes of `state` beyond those of one unbatched state.

    Raises:
        ValueError: a leaf has too few axes or the wrong trailing axes, or the leaves do not
            share their leading axes.
    """
    structure = problem.structure()
    if jax.tree.structure(structure) != jax.tree.structure(state):
        raise ValueError(
            f"Argument `state` must have the structure of `problem.init(...)`, "
            f"{jax.tree.structure(structure)}, got {jax.tree.structure(state)}. "
            f"Build it with `problem.state(...)` or `problem.init(key=...)`."
        )
    shapes = []
    for one, leaf in zip(jax.tree.leaves(structure), jax.tree.leaves(state), strict=True):
        split = jnp.ndim(leaf) - one.ndim
        if split < 0 or jnp.shape(leaf)[split:] != one.shape:
            raise ValueError(
                f"Argument `state` must have leaves whose trailing axes are {one.shape}, got "
                f"shape {jnp.shape(leaf)}. Put batch axes in front."
            )
        shapes.append(jnp.shape(leaf)[:split])
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"Argument `state` must have the same batch axes in every leaf, got {shapes}."
        )
    return shapes[0]
