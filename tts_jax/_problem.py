"""What a two-timescale learning problem answers: the one interface that every dynamics asks.

A fast variable y relaxes at rate 1, a slow variable x at rate ε. In slow time τ = εt

    ε dy/dτ = −∇_y g(y, x)          g: the fast loss
      dx/dτ =  V(y, x)              V = −∇_x L, L: the loss

`flow` solves this at finite ε, `limit` solves dx/dτ = V(y*(x), x) on the critical manifold
y*(x) = argmin_y g(y, x), and `sgd` takes steps h for y and εh for x on random samples; step
k sits at τ = εhk. Where x lives and how a force moves it is its geometry (`tts_jax.geometry`).
"""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from tts_jax import _batch_last, fast as fast_solvers
from tts_jax._batch_last import Lanes
from tts_jax._precision import double_precision
from tts_jax._random import Words
from tts_jax.checks import inside_trace, is_traced
from tts_jax.geometry import AbstractGeometry, Euclidean


_EUCLIDEAN = Euclidean()


class State(NamedTuple):
    """A point of the two-timescale dynamics.

    Attributes:
        fast: the fast variable y, an array or nested dicts of arrays.
        slow: the slow variable x, likewise.
    """

    fast: PyTree[Array]
    slow: PyTree[Array]


class AbstractProblem(eqx.Module):
    """A two-timescale learning problem.

    A subclass answers `init` and `loss`; that is enough for `flow` and `limit`. With `sample` and
    `sample_loss` it also runs under `sgd`. Everything else has a default by automatic
    differentiation that a subclass may replace: the critical manifold is found by `fast_solver`
    unless the class has a closed form `critical`.

    **Lanes.** A subclass that sets `lanes = True` promises that `sample_loss`, and its own
    `sample_gradient` if it has one, also accept every leaf of the state and of the sample with a
    trailing axis of lanes, and then return one loss per lane, `[lanes]`: no lane sees another.
    Elementwise arithmetic does, with sums over axis 0 (not over the last axis, not `@`). Then
    `sgd` moves the seeds together through its compiled loops (argument `engine`):

        class Line(AbstractProblem):
            lanes: ClassVar = True

            def sample(self, *, key, step):
                first, second = threefry2x32(key_words(key), step_words(step))
                return unit_uniform(first, "float32"), symmetric_uniform(second, "float32")

            def sample_loss(self, fast, slow, sample):
                x, noise = sample
                bumps = jnp.maximum(x - slow, 0)             # [d] or [d, lanes]
                return (jnp.sum(fast * bumps, axis=0) - x**2 - noise) ** 2

    Numbers of the problem, that is leaves that are floats or arrays, are then traced: a new value
    does not compile anew. The state is kept as an offset from its start, so that float32 adds up
    steps far below the spacing of its numbers. A seed whose state is not finite is frozen in it.
    A `sample` in elementwise arithmetic of words, as above by `tts_jax._random`, can also be
    compiled by `"simd"`; one that draws by `jax.random` runs in XLA's loop. Either way the sample
    is `sample(key=key, step=step)`, the key a Threefry key.
    """

    # Names of the axes of one state and of each observable, for labelled results.
    dims: ClassVar[dict[str, tuple[str, ...]]] = {"fast": ("fast_axis",), "slow": ("slow_axis",)}
    # The estimators of the sample gradient that `sgd(gradient=...)` may choose from.
    gradients: ClassVar[tuple[str, ...]] = ("exact",)
    # Whether `sample_loss` accepts lanes, or the problem answers `_lanes.LaneProblem` by itself.
    lanes: ClassVar[bool] = False

    @property
    def lane_rows(self) -> bool:
        """Whether its own lane methods also take rows as a tuple, as the GPU kernel passes them."""
        return False

    @property
    def flow_engines(self) -> tuple[str, ...]:
        """The engines besides Diffrax that `solve_flow` has for `flow` and `limit`, best first."""
        return ()

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

    @property
    def geometry(self) -> AbstractGeometry:
        """Where the slow variable lives, and how a force moves it."""
        return _EUCLIDEAN

    @property
    def fast_geometry(self) -> AbstractGeometry:
        """Where the fast variable lives, likewise; the critical manifold is then the minimum of g
        on it."""
        return _EUCLIDEAN

    @property
    def envelope(self) -> bool:
        """Whether ∇_y L vanishes on the critical manifold, as it does where g and L have the same
        minimiser in y. Then the reduced velocity is V(y*(x), x), by the envelope theorem; otherwise
        y*(x) is differentiated."""
        return True

    @property
    def closed_form(self) -> bool:
        """Whether the class defines `critical`."""
        return type(self).critical is not AbstractProblem.critical

    @property
    def fast_solver(self) -> fast_solvers.AbstractFastSolver:
        """How y*(x) is found: by default the class's own `critical`, or else Newton's method."""
        return fast_solvers.ClosedForm() if self.closed_form else fast_solvers.Argmin()

    @property
    def temperature(self) -> State:
        """The temperatures T of Langevin noise that `sgd` adds to either variable, or `None`.

        To the slow one √(2T) dB, in slow time and within the tangent space; to the fast one the
        same in fast time. `flow` is for problems without. `limit` is for a slow variable without;
        with a fast one at equilibrium, y*(x) is a law, and the class must define `reduced_field`,
        the velocity averaged over it.
        """
        return State(None, None)

    def fast_loss(self, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, ""]:
        """The fast loss g(y, x), whose gradient in y moves the fast variable: by default L."""
        return self.loss(fast, slow)

    @double_precision
    @eqx.filter_jit
    def critical(self, slow: PyTree[Array]) -> PyTree[Array]:
        """The critical manifold y*(x) = argmin_y g(y, x)."""
        return self.critical_solution(slow).fast

    def critical_solution(
        self, slow: PyTree[Array], sample: PyTree[Array] | None = None
    ) -> fast_solvers.Solution:
        """y*(x) with what `fast_solver` knows about it; of the fast loss of a sample if given."""
        return self.fast_solver.solve(self, slow, sample)

    def ridge(
        self, slow: PyTree[Array], sample: PyTree[Array] | None = None
    ) -> fast_solvers.RidgeSystem:
        """The least squares that define y*(x), for the solver `fast.Ridge`."""
        del slow, sample
        raise TypeError(
            f"`{type(self).__name__}` does not define `ridge(slow, sample)`, which `fast.Ridge` "
            f"solves. Define it, or use `fast.Quadratic` or `fast.Argmin`."
        )

    def fast_field(self, fast: PyTree[Array], slow: PyTree[Array]) -> PyTree[Array]:
        """The velocity of the fast variable in fast time t: −∇_y g(y, x) as its geometry has
        it."""
        force = jax.tree.map(jnp.negative, jax.grad(self.fast_loss, argnums=0)(fast, slow))
        return self.fast_geometry.velocity(fast, force)

    def slow_field(self, fast: PyTree[Array], slow: PyTree[Array]) -> PyTree[Array]:
        """V(y, x): the velocity of the slow variable in slow time τ, by default −∇_x L as its
        geometry has it."""
        force = jax.tree.map(jnp.negative, jax.grad(self.loss, argnums=1)(fast, slow))
        return self.geometry.velocity(slow, force)

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

    def relaxation_rate(self, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, ""]:
        """The slowest rate, in fast time, at which the fast variable relaxes: the smallest
        eigenvalue of ∇²_y g within its geometry, 0 where it is rounding."""
        flat, unravel = ravel_pytree(fast)
        place = self.fast_geometry
        if isinstance(place, Euclidean):
            hessian = jax.hessian(lambda y: self.fast_loss(unravel(y), slow))(flat)
        else:

            def along(step: Array) -> Array:
                return ravel_pytree(place.tangent(fast, unravel(step)))[0]

            def moved(step: Array) -> Array:
                return self.fast_loss(place.retract(fast, unravel(along(step))), slow)

            def speed(force: Array) -> Array:
                return ravel_pytree(place.velocity(fast, unravel(along(force))))[0]

            still = jnp.zeros_like(flat)
            weights, axes = jnp.linalg.eigh(jax.jacfwd(speed)(still))
            root = (axes * jnp.sqrt(jnp.maximum(weights, 0.0))) @ axes.T
            hessian = root @ jax.hessian(moved)(still) @ root
            # directions that lead out of the geometry do not count: above all others
            outward = jnp.eye(flat.size) - jax.jacfwd(along)(still)
            hessian += (1.0 + jnp.linalg.norm(hessian)) * outward
        values = jnp.linalg.eigvalsh(hessian)
        # what the largest eigenvalue's rounding hides counts as none
        hidden = flat.size * jnp.finfo(values.dtype).eps * jnp.abs(values[-1])
        return jnp.where(values[0] > hidden, values[0], 0.0)

    def slow_rate(self, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, ""]:
        """The rate, in slow time, at which the slow variable moves by `slow_scale`."""
        speeds = [jnp.max(jnp.abs(v)) for v in jax.tree.leaves(self.slow_field(fast, slow))]
        return jnp.max(jnp.stack(speeds)) / self.slow_scale()

    def reduced_loss(self, slow: PyTree[Array]) -> Float[Array, ""]:
        """The loss on the critical manifold, L(y*(x), x)."""
        return self.loss(self.critical(slow), slow)

    def reduced_field(self, slow: PyTree[Array]) -> PyTree[Array]:
        """The velocity of the reduced flow: V(y*(x), x) if `envelope`, else −∇ of `reduced_loss`
        as the geometry has it."""
        if self.envelope:
            return self.slow_field(self.critical(slow), slow)
        force = jax.tree.map(jnp.negative, jax.grad(self.reduced_loss)(slow))
        return self.geometry.velocity(slow, force)

    def reduced_jacobian(
        self, fast: PyTree[Array], slow: PyTree[Array]
    ) -> Float[Array, "n_slow n_slow"]:
        """The Jacobian of `reduced_field` at `fast` = y*(x), in flattened coordinates.

        By the implicit function theorem it is the Schur complement of the fast block of
        `jacobian`, for a fast variable that is stationary on the critical manifold.
        """
        own = type(self).reduced_field is not AbstractProblem.reduced_field
        if own or not (self.envelope and isinstance(self.fast_geometry, Euclidean)):
            flat, unravel = ravel_pytree(slow)
            return jax.jacfwd(lambda x: ravel_pytree(self.reduced_field(unravel(x)))[0])(flat)
        count = ravel_pytree(fast)[0].size
        jacobian = self.jacobian(fast, slow)
        response = jnp.linalg.solve(jacobian[:count, :count], jacobian[:count, count:])
        return jacobian[count:, count:] - jacobian[count:, :count] @ response

    def sharp(self, slow: PyTree[Array], tau: Float[Array, " T"]) -> dict[str, Any]:
        """What `sharp_limit` answers for starts `[lanes, ...]`: fast, slow, loss at `tau`; status,
        stats and events."""
        del slow, tau
        raise TypeError(
            f"`{type(self).__name__}` has no sharp limit: it does not define `sharp`. Use `limit`."
        )

    def solve_flow(
        self,
        engine: str,
        state: State,
        epsilon: Float[Array, " lanes"],
        tau: Float[Array, " T"],
        *,
        rtol: Any,
        atol: Any,
        max_steps: int,
    ) -> dict[str, Any]:
        """The flow, or where ε = 0 the reduced flow, by an engine that knows the structure.

        Args:
            engine: one of `flow_engines`; `"simd"` and `"cuda"` get NumPy arrays, never tracers.
            state: leaves with an axis of lanes in front.

        Returns:
            `fast`, `slow`, `loss`, `status` and the dict `stats`, with lanes in front; what was
            recorded before a lane failed stays, NaN after it. `stats` holds `steps`, `accepted`,
            `rejected` and `reached`; lanes that are marked in `dense`, if there, are for Diffrax.
        """
        del state, epsilon, tau, rtol, atol, max_steps
        raise ValueError(f"`{type(self).__name__}` has no engine {engine!r}.")

    def slow_scale(self) -> Float[ArrayLike, ""]:
        """The length of the slow variable that weighs like 1 of the fast one in step errors."""
        return 1.0

    def observables(self, fast: PyTree[Array], slow: PyTree[Array]) -> dict[str, Array]:
        """Named quantities recorded beside the loss; their axes are named in `dims`."""
        del fast, slow
        return {}

    def goal_radius(self) -> Float[ArrayLike, ""]:
        """The distance at which `hitting_times` counts a goal as hit, unless told otherwise."""
        raise TypeError(
            f"`{type(self).__name__}` does not define `goal_radius`, so `hitting_times` needs "
            f"its argument `radius`. Pass it, or define `goal_radius`."
        )

    def reduced_observables(self, slow: PyTree[Array]) -> dict[str, Array]:
        """Named quantities that `limit` records into `.stats`, such as a condition number: by
        default what `fast_solver` knows, if it is not the closed form."""
        return {} if self.closed_form else self.critical_solution(slow).info

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes, for labelled results: `dims`, and those that depend on the problem."""
        return self.dims

    def coords(self) -> dict[str, Any]:
        """Coordinates of the named axes, for labelled results."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The numbers that define the problem, stored with every result."""
        return {}

    def notes(self) -> dict[str, str]:
        """What defines the problem in words, stored with every result."""
        return {}

    def structure(self) -> State:
        """Shapes and dtypes of one unbatched state."""
        return jax.eval_shape(lambda key: self.init(key=key), jax.random.key(0))

    @property
    def samples_serve_once(self) -> bool:
        """Whether a sample is for one gradient only, as where it holds what is random about that
        gradient and not the data. Then `sgd` has the regime `"joint"` alone."""
        return False

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

    def sample_fast_loss(
        self, fast: PyTree[Array], slow: PyTree[Array], sample: PyTree[Array]
    ) -> Float[Array, ""]:
        """The fast loss of one training sample: by default `sample_loss`."""
        if type(self).fast_loss is not AbstractProblem.fast_loss:
            raise TypeError(
                f"`{type(self).__name__}` defines `fast_loss`, but not that of a sample, which "
                f"`sgd` descends. Define `sample_fast_loss(fast, slow, sample)`."
            )
        return self.sample_loss(fast, slow, sample)

    def sample_gradient(
        self,
        fast: PyTree[Array],
        slow: PyTree[Array],
        sample: PyTree[Array],
        *,
        gradient: str = "exact",
    ) -> State:
        """The gradients of `sample_fast_loss` in y and `sample_loss` in x, by the estimator
        `gradient`.

        With lanes they are those of the sums of their losses, which hold those of each.
        """
        del gradient

        def total(fast: PyTree[Array], slow: PyTree[Array]) -> Array:
            return jnp.sum(self.sample_loss(fast, slow, sample))

        kind = type(self)
        own = kind.sample_fast_loss is not AbstractProblem.sample_fast_loss
        if not own and kind.fast_loss is AbstractProblem.fast_loss:
            return State(*jax.grad(total, argnums=(0, 1))(fast, slow))

        def fast_total(fast: PyTree[Array]) -> Array:
            return jnp.sum(self.sample_fast_loss(fast, slow, sample))

        return State(jax.grad(fast_total)(fast), jax.grad(total, argnums=1)(fast, slow))

    # --- lanes: the defaults of `tts_jax._lanes.LaneProblem` ---

    def lane_start(
        self, state: State, *, step_size: float, epsilon: float, gradient: str, dtype: Any
    ) -> Lanes:
        """Lanes from float64 states `[..., lanes]`."""
        del gradient
        return _batch_last.lane_start(
            self, state, step_size=step_size, epsilon=epsilon, dtype=dtype
        )

    def lane_sample(self, shared: Any, fixed: Any, key: Words, step: Words) -> PyTree[Array]:
        """Samples of lanes and steps, leaves `[..., lanes]` or `[steps, ..., lanes]`."""
        return _batch_last.lane_sample(self, shared, fixed, key, step)

    def lane_label(self, shared: Any, sample: PyTree[Array]) -> PyTree[Array]:
        """What `lane_step` needs of samples."""
        del shared
        return sample

    def lane_step(
        self, shared: Any, fixed: Any, carry: Any, point: PyTree[Array], *, gradient: str
    ) -> Any:
        """One step of all lanes."""
        return _batch_last.lane_step(self, shared, fixed, carry, point, gradient=gradient)

    def lane_state(self, lanes: Lanes) -> tuple[State, np.ndarray]:
        """The float64 states `[..., lanes]`, and which lanes are alive, `[lanes]`."""
        return _batch_last.lane_state(lanes)


# How far a start may be from its geometry: some rounding of float32.
_NEAR = 1e-5


def check_geometry(problem: AbstractProblem, state: State) -> None:
    """Refuse a start with a variable that is not where its geometry has it.

    Raises:
        ValueError: a concrete variable off its geometry.
    """
    places = {"slow": ("geometry", problem.geometry)}
    places |= {"fast": ("fast_geometry", problem.fast_geometry)}
    for name, (attribute, place) in places.items():
        if isinstance(place, Euclidean) or is_traced(state) or inside_trace():
            continue
        far = float(place.distance(jax.tree.map(jnp.asarray, getattr(state, name))))
        if not far <= _NEAR:
            kind = type(getattr(place, "of", place)).__name__
            raise ValueError(
                f"Argument `state.{name}` must lie on the problem's `{kind}`, got a point "
                f"{far:.3g} away from it. Use `problem.{attribute}.project({name})`."
            )


# A problem with more numbers than this, in bytes, holds data that a single state passes over.
_LARGE = 1 << 16


def one_by_one(problem: AbstractProblem) -> bool:
    """Whether states of the problem are better looked at one after the other than together.

    On a CPU the data of a problem should stay in its cache, and what is computed from them for
    many states together would not.
    """
    sizes = [getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(problem)]
    return jax.default_backend() == "cpu" and sum(sizes) > _LARGE


def quickly(problem: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """`problem.method(...)`, without Equinox's bound method, which takes 20 µs to make.

    In a single solve of the flow, which takes some 1000 µs, a dozen of them are felt.
    """
    return getattr(type(problem), method)(problem, *args, **kwargs)


def batch_shape(problem: AbstractProblem, state: State) -> tuple[int, ...]:
    """The leading axes of `state` beyond those of one unbatched state.

    Raises:
        ValueError: a leaf has too few axes or the wrong trailing axes, or the leaves do not
            share their leading axes.
    """
    structure = quickly(problem, "structure")
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
