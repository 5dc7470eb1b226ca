"""Barboni, Peyré & Vialard (2025, arXiv 2504.18208): variable projection and ultra-fast diffusion.

A wide two-layer network f(x) = (1/M) Σ_j u_j φ(w_j, x) has features w_j, particles on a circle or a
torus (slow), and outer weights u_j (fast), which ridge regression eliminates:

    L(u, w) = (1/2λ) · mean_i (f(x_i) − y_i)² + (1/2M) Σ_j (u_j − b)²,   b = 0 (biased) or 1
    u*(w)   = (K + λ)⁻¹ (Φᵀy/N + λb),   K = ΦᵀΦ/(NM).

A feature moves by −M ∂L/∂w_j, the gradient of the first variation −½ (u*² − b²) of the reduced
loss. With labels of a network of the same kind, whose features have the density μ̄ and whose weights
are 1, u* tends to μ̄/μ as λ → 0 if the features tell all measures apart, and the density μ of the
features follows the ultra-fast diffusion ∂_t μ = −½ div(μ ∇(μ̄/μ)²), `UltraFastDiffusion`. ReLU
features do not see the odd Fourier orders from 3 on (docs/varpro.md).

The fast loss is λM·L, whose gradient in u is Φᵀ(f − y)/N + λ(u − b), so that a fast step of size 1
and ε = 2⁻¹⁰ are the published two-timescale gradient descent, and the slowest relaxation rate is λ:
the separation number is about ε/λ.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State
from tts_jax._random import step_words, typed_key
from tts_jax.fast import AbstractFastSolver, Blocks, Ridge, RidgeSystem, Solution
from tts_jax.geometry import AbstractGeometry, Particles, Sphere, Torus
from tts_jax.problems._circle import CircleData
from tts_jax.problems._energy_distance import circle_energy_distance, energy_distance
from tts_jax.problems._teachers import CircleTeacher, TorusTeacher


class AbstractFeatures(eqx.Module):
    """What a feature w computes of an input x, and where w lives.

    Attributes:
        dimension: that of x and of w.
    """

    dimension: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, w: Float[Array, "M d"], x: Float[Array, "n d"]) -> Float[Array, "n M"]:
        """φ(w_j, x_i)."""

    @abc.abstractmethod
    def geometry(self) -> AbstractGeometry:
        """The geometry of one feature."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count d"]:
        """Independent uniform features."""

    @abc.abstractmethod
    def distance(self, w: Float[Array, "M d"], other: Float[Array, "m d"]) -> Float[Array, ""]:
        """The energy distance of two sets of features."""


class Relu(AbstractFeatures):
    """φ(w, x) = max(0, w·x), w on the unit sphere of ℝ^d: for d = 2 the circle of the paper's §6.1.

    Attributes:
        dimension: d ≥ 2.
        tangential: whether a step follows the tangent of the sphere. The published code takes the
            whole gradient and normalises, which differs by the square of the step.
    """

    dimension: int = eqx.field(static=True, default=2)
    tangential: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if checks.positive_integer("dimension", self.dimension, "2 is the circle.") < 2:
            raise ValueError("Argument `dimension` must be at least 2, got 1. 2 is the circle.")

    def __call__(self, w: Float[Array, "M d"], x: Float[Array, "n d"]) -> Float[Array, "n M"]:
        return jax.nn.relu(x @ w.T)

    def geometry(self) -> AbstractGeometry:
        return Sphere(self.tangential)

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count d"]:
        return Sphere().project(jax.random.normal(key, (count, self.dimension)))

    def distance(self, w: Float[Array, "M d"], other: Float[Array, "m d"]) -> Float[Array, ""]:
        if self.dimension > 2:
            return energy_distance(w, other)
        return circle_energy_distance(*(jnp.arctan2(p[:, 1], p[:, 0]) for p in (w, other)))


class Radial(AbstractFeatures):
    """φ(w, x) = (2/s²) exp(−|w − x|/s), w on the torus ℝ^d / period·ℤ^d, as in the paper's App. B.

    Attributes:
        dimension: d.
        scale: the length s.
        period: the side of the torus; the distance is the shortest one.
        wrapped: the published code measures |w − x| in the plane, not on the torus, so that a
            feature jumps as it leaves the box; `False` does so.
    """

    dimension: int = eqx.field(static=True, default=2)
    scale: float = 0.5
    period: float = eqx.field(static=True, default=4.0)
    wrapped: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        checks.positive_integer("dimension", self.dimension, "The paper has 2.")
        checks.positive("scale", self.scale, "The paper has 0.5.", single=True)
        checks.positive("period", self.period, "The paper has 4.", single=True)

    def __call__(self, w: Float[Array, "M d"], x: Float[Array, "n d"]) -> Float[Array, "n M"]:
        square = jnp.zeros((x.shape[0], w.shape[0]), w.dtype)
        for axis in range(self.dimension):
            gap = x[:, axis, None] - w[:, axis]
            if self.wrapped:
                gap = Torus(self.period).project(gap)
            square += gap**2
        near = square > 0.0
        length = jnp.where(near, jnp.sqrt(jnp.where(near, square, 1.0)), 0.0)
        return 2.0 / self.scale**2 * jnp.exp(-length / self.scale)

    def geometry(self) -> AbstractGeometry:
        return Torus(self.period)

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count d"]:
        return self.period * (jax.random.uniform(key, (count, self.dimension)) - 0.5)

    def distance(self, w: Float[Array, "M d"], other: Float[Array, "m d"]) -> Float[Array, ""]:
        return energy_distance(w, other)


class CircleRidge(AbstractFastSolver):
    """The ridge solve of ReLU features on the circle in time O(M), whatever the number of data.

    By prefix sums over data sorted by angle, see `_circle`.
    """

    factorises: ClassVar[bool] = False

    def solve(
        self,
        problem: AbstractProblem,
        slow: Any,
        sample: Any = None,
        start: Any = None,
    ) -> Solution:
        del start
        assert isinstance(problem, VarPro)
        fast, info = problem._circle(sample).ridge(slow, problem.penalty, problem.prior)
        return Solution(fast, info._asdict())


class VarPro(AbstractProblem):
    """A two-layer network whose outer weights are fast and whose features are slow particles.

    `limit` and `sgd(regime="limit")` are variable projection, as a flow and in steps; `flow` and
    `sgd(regime="joint")` the two-timescale gradient descent, with `step_size=1` as published.

    Attributes:
        inputs: x_i, `[N, d]`.
        labels: y_i, `[N]`.
        width: the number M of features.
        penalty: λ ≥ 0. Without one, L is half the mean-square misfit, and u* is the
            interpolation, or best fit, nearest to b.
        prior: b, what the weights are drawn to.
        features: φ, `Relu` or `Radial`.
        teacher_features: those of the teacher, `[m, d]`, or `None`; `teacher_distance` is the
            distance to them.
        batch: data per step of `sgd`; `None` takes all of them.
        chunk: data whose features are in memory together. It is bounded by about
            8·(chunk·M + 3M²) bytes per seed: 0.5 GB at M = 4096. ReLU features on the circle need
            O(N + M).
    """

    inputs: Float[Array, "N d"]
    labels: Float[Array, " N"]
    width: int = eqx.field(static=True)
    penalty: Float[Array, ""]
    prior: Float[Array, ""]
    features: AbstractFeatures
    teacher_features: Float[Array, "m d"] | None
    batch: int | None = eqx.field(static=True)
    chunk: int = eqx.field(static=True)
    _singular: bool = eqx.field(static=True)
    _data: CircleData | None

    dims: ClassVar = {"fast": ("feature",), "slow": ("feature", "axis")}

    @double_precision
    def __init__(
        self,
        inputs: Float[ArrayLike, "N d"],
        labels: Float[ArrayLike, " N"],
        *,
        width: int = 1024,
        penalty: Float[ArrayLike, ""] = 1e-3,
        prior: Float[ArrayLike, ""] = 1.0,
        features: AbstractFeatures | None = None,
        teacher_features: Float[ArrayLike, "m d"] | None = None,
        batch: int | None = None,
        chunk: int = 4096,
    ) -> None:
        """Build the problem.

        Raises:
            ValueError: shapes that do not go together, data that are not finite, `penalty` < 0, an
                empty teacher.
            TypeError: `features` are none.
        """
        self.features = Relu() if features is None else features
        remedy = "Use `tts.Relu()` or `tts.Radial()`."
        checks.instance("features", self.features, AbstractFeatures, remedy)
        self.inputs = _points("inputs", inputs, self.features.dimension)
        checks.finite("labels", labels, "Give every input a finite label.")
        if np.shape(labels) != self.inputs.shape[:1]:
            raise ValueError(
                f"Argument `labels` must have one number for each of the {self.inputs.shape[0]} "
                f"inputs, got shape {np.shape(labels)}."
            )
        self.labels = checks.as_float(labels)
        self.width = checks.positive_integer("width", width, "The paper uses up to 1024.")
        remedy = "It is the weight λ of the regularisation; the paper uses 1e-4 to 1e-1."
        self.penalty = checks.as_float(checks.nonnegative("penalty", penalty, remedy, single=True))
        self._singular = not checks.is_traced(penalty) and float(np.asarray(penalty)) < 1e-14
        checks.finite("prior", prior, "1 is the unbiased, 0 the biased regularisation.")
        self.prior = checks.as_float(prior)
        self.teacher_features = (
            None
            if teacher_features is None
            else _points("teacher_features", teacher_features, self.features.dimension)
        )
        self.batch = batch
        if batch is not None:
            count = self.inputs.shape[0]
            if checks.positive_integer("batch", batch, "Or leave it out.") > count:
                raise ValueError(
                    f"Argument `batch` must be at most the {count} data, got {batch}. Leave it out "
                    f"to use all of them."
                )
        self.chunk = checks.positive_integer("chunk", chunk, "Leave it out.")
        on_circle = isinstance(self.features, Relu) and self.features.dimension == 2
        self._data = CircleData.of(self.inputs, self.labels) if on_circle else None

    @classmethod
    def of_teacher(
        cls,
        teacher: CircleTeacher | TorusTeacher,
        *,
        key: PRNGKeyArray,
        samples: int = 4096,
        teacher_width: int = 4096,
        features: AbstractFeatures | None = None,
        **options: Any,
    ) -> "VarPro":
        """The published data: Gaussian inputs, labelled by a network of `teacher_width` features
        with weights 1.

        Args:
            teacher: the distribution of these features; at γ = ∞ they are at its modes.
            key: for the inputs and the features.
            samples: N.
            teacher_width: the number of the teacher's features.
            features: φ; by default those of the teacher's space, `Relu` or `Radial`.
            options: further arguments of `VarPro`.
        """
        if not isinstance(teacher, (CircleTeacher, TorusTeacher)):
            raise TypeError(
                f"Argument `teacher` must be a `CircleTeacher` or a `TorusTeacher`, got "
                f"{teacher!r}. Use for example `tts.CircleTeacher(100.0)`."
            )
        checks.positive_integer("samples", samples, "The paper uses 4096.")
        checks.positive_integer("teacher_width", teacher_width, "The paper uses 4096.")
        if features is None:
            features = Relu() if isinstance(teacher, CircleTeacher) else Radial()
        key = typed_key(checks.random_key(key))
        theirs, inputs, labels = _published(teacher, key, samples, teacher_width, features)
        return cls(inputs, labels, features=features, teacher_features=theirs, **options)

    # --- states -----------------------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def init(self, *, key: PRNGKeyArray) -> State:
        """Independent uniform features and their u*, as published."""
        slow = self.features.draw(typed_key(checks.random_key(key)), self.width)
        return State(self.critical(slow), slow)

    @double_precision
    def state(
        self, *, slow: Float[ArrayLike, "... M d"], fast: Float[ArrayLike, "... M"] | None = None
    ) -> State:
        """A state from given features `[..., M, d]`; weights `[..., M]` are u* unless given.

        Raises:
            ValueError: wrong shapes, numbers that are not finite, features off their geometry.
        """
        shape = (self.width, self.features.dimension)
        checks.finite("slow", slow, "Give every feature a finite place.")
        if np.ndim(slow) < 2 or np.shape(slow)[-2:] != shape:
            raise ValueError(
                f"Argument `slow` must have shape [..., {shape[0]}, {shape[1]}], one row for each "
                f"feature, got {np.shape(slow)}."
            )
        slow = jnp.asarray(slow, jnp.result_type(float))
        if not checks.is_traced(slow):
            far = float(self.geometry.distance(slow))
            if far > 1e-6:
                raise ValueError(
                    f"Argument `slow` must hold points of the `{type(self.geometry.of).__name__}`, "
                    f"got one that is {far:.3g} away. Use `problem.geometry.project(slow)`."
                )
        if fast is None:
            solve = self.critical
            for _ in range(slow.ndim - 2):
                solve = jax.vmap(solve)
            return State(solve(slow), slow)
        checks.finite("fast", fast, "Give every weight a finite value.")
        if np.shape(fast) != slow.shape[:-1]:
            raise ValueError(
                f"Argument `fast` must have shape {slow.shape[:-1]}, one weight for each feature, "
                f"got {np.shape(fast)}. Leave it out for u*."
            )
        return State(jnp.asarray(fast, slow.dtype), slow)

    def structure(self) -> State:
        dtype = jnp.result_type(float)
        fast = jax.ShapeDtypeStruct((self.width,), dtype)
        return State(fast, jax.ShapeDtypeStruct((self.width, self.features.dimension), dtype))

    @property
    def geometry(self) -> Particles:
        return Particles(self.features.geometry())

    @property
    def fast_solver(self) -> AbstractFastSolver:
        if self._data is None or self._singular:
            return Ridge(singular=self._singular)
        return CircleRidge()

    # --- losses -------------------------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def predict(
        self, fast: Float[Array, " M"], slow: Float[Array, "M d"], x: Float[ArrayLike, "n d"]
    ) -> Float[Array, " n"]:
        """The network f(x) at inputs `[n, d]`."""
        x = jnp.asarray(x, jnp.result_type(float))
        return self._matrix(slow, x).apply(fast) / self.width

    @double_precision
    @eqx.filter_jit
    def misfit(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> Float[Array, ""]:
        """The mean square of f − y over the data."""
        return self._mean_square(fast, slow, ())

    @double_precision
    @eqx.filter_jit
    def loss(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> Float[Array, ""]:
        """L, the misfit over 2λ and the distance of the weights from b."""
        return self.sample_loss(fast, slow, ())

    def fast_loss(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> Float[Array, ""]:
        """λM·L, whose fast flow relaxes at the eigenvalues of K + λ."""
        return self.sample_fast_loss(fast, slow, ())

    def sample(self, *, key: PRNGKeyArray, step: Any) -> tuple[Array, ...]:
        """The inputs and labels of one step; `()` for all of them."""
        if self.batch is None:
            return ()
        for word in step_words(step):
            key = jax.random.fold_in(key, word)
        rows = jax.random.choice(key, self.inputs.shape[0], (self.batch,), replace=False)
        return jnp.asarray(self.inputs)[rows], jnp.asarray(self.labels)[rows]

    def sample_loss(
        self, fast: Float[Array, " M"], slow: Float[Array, "M d"], sample: tuple[Array, ...]
    ) -> Float[Array, ""]:
        """L on the data of a step."""
        misfit = self._mean_square(fast, slow, sample) / 2.0
        if self._singular:
            return misfit
        return misfit / self.penalty + jnp.mean((fast - self.prior) ** 2) / 2.0

    def sample_fast_loss(
        self, fast: Float[Array, " M"], slow: Float[Array, "M d"], sample: tuple[Array, ...]
    ) -> Float[Array, ""]:
        """λM·L on the data of a step."""
        misfit = self._mean_square(fast, slow, sample) / 2.0
        return self.width * misfit + self.penalty * jnp.sum((fast - self.prior) ** 2) / 2.0

    @double_precision
    @eqx.filter_jit
    def fields(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> State:
        """The velocities −Φᵀ(f − y)/N − λ(u − b) and −M ∂L/∂w."""
        slopes = self.sample_gradient(fast, slow, ())
        force = jax.tree.map(jnp.negative, slopes)
        return State(force.fast, self.geometry.velocity(slow, force.slow))

    def fast_field(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> Array:
        return self.fields(fast, slow).fast

    def slow_field(self, fast: Float[Array, " M"], slow: Float[Array, "M d"]) -> Array:
        return self.fields(fast, slow).slow

    def sample_gradient(
        self,
        fast: Float[Array, " M"],
        slow: Float[Array, "M d"],
        sample: tuple[Array, ...],
        *,
        gradient: str = "exact",
    ) -> State:
        """∂(λM·L)/∂u and ∂L/∂w on the data of a step."""
        if self._data is None:
            return super().sample_gradient(fast, slow, sample, gradient=gradient)
        # Σ r x over the data that a feature sees gives both slopes
        force = self._circle(sample).force(fast, slow)
        outer = jnp.sum(force * slow, axis=1) + self.penalty * (fast - self.prior)
        weight = 1.0 if self._singular else self.penalty
        return State(outer, fast[:, None] * force / (weight * self.width))

    def ridge(self, slow: Float[Array, "M d"], sample: Any = None) -> RidgeSystem:
        """K + λ as least squares: features Φ/√(NM) and targets y·√(M/N)."""
        inputs, labels = self._used(sample)
        count = inputs.shape[0]
        matrix = self._matrix(slow, inputs)
        scale = 1.0 / np.sqrt(count * self.width)
        scaled = eqx.tree_at(lambda one: one.block.scale, matrix, scale)
        return RidgeSystem(scaled, labels * np.sqrt(self.width / count), self.penalty, self.prior)

    def relaxation_rate(self, fast: Any, slow: Any) -> Float[Array, ""]:
        """λ, a lower bound of the smallest eigenvalue of K + λ that wide networks attain."""
        del fast, slow
        return jnp.asarray(self.penalty)

    # --- observables --------------------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def teacher_distance(self, slow: Float[Array, "M d"]) -> Float[Array, ""]:
        """The energy distance √(2E|X−Y| − E|X−X′| − E|Y−Y′|) of the features to the teacher's.

        Raises:
            TypeError: the problem has no teacher.
        """
        if self.teacher_features is None:
            raise TypeError(
                "`teacher_distance` needs the features of a teacher. Pass `teacher_features=`, or "
                "build the problem by `VarPro.of_teacher`."
            )
        return self.features.distance(slow, jnp.asarray(self.teacher_features))

    def observables(
        self, fast: Float[Array, " M"], slow: Float[Array, "M d"]
    ) -> dict[str, Float[Array, ""]]:
        seen = {"misfit": self.misfit(fast, slow)}
        return (
            seen
            if self.teacher_features is None
            else seen | {"teacher_distance": self.teacher_distance(slow)}
        )

    def settings(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            "prior": self.prior,
            "data": np.asarray(self.inputs.shape[0]),
        }

    def notes(self) -> dict[str, str]:
        return {"features": type(self.features).__name__}

    # --- data ---------------------------------------------------------------------------------

    def _used(self, sample: Any) -> tuple[Array, Array]:
        """The inputs and labels of a sample, or all of them."""
        if sample is None or not jax.tree.leaves(sample):
            return jnp.asarray(self.inputs), jnp.asarray(self.labels)
        return sample

    def _circle(self, sample: Any) -> CircleData:
        """The sorted data of a sample, or of all."""
        assert self._data is not None
        if sample is None or not jax.tree.leaves(sample):
            return self._data
        return CircleData.of(*sample)

    def _matrix(self, slow: Float[Array, "M d"], inputs: Float[Array, "n d"]) -> Blocks:
        return Blocks(_Rows(self.features, slow, 1.0), inputs, self.chunk)

    def _mean_square(self, fast: Array, slow: Array, sample: Any) -> Float[Array, ""]:
        if self._data is not None:
            return self._circle(sample).mean_square(fast, slow)
        inputs, labels = self._used(sample)
        network = self._matrix(slow, inputs).apply(fast) / self.width
        return jnp.mean((network - labels) ** 2)


class _Rows(eqx.Module):
    """Rows of scale · Φ."""

    features: AbstractFeatures
    slow: Float[Array, "M d"]
    scale: Float[ArrayLike, ""]

    def __call__(self, inputs: Float[Array, "n d"]) -> Float[Array, "n M"]:
        return self.features(self.slow, inputs) * self.scale


@double_precision
def _published(
    teacher: CircleTeacher | TorusTeacher,
    key: PRNGKeyArray,
    samples: int,
    width: int,
    features: AbstractFeatures,
) -> tuple[Array, Array, Array]:
    """Features of the teacher, inputs and labels."""
    places, points = jax.random.split(key)
    theirs = jnp.asarray(teacher.sample(places, width))
    if theirs.ndim == 1:  # angles
        theirs = jnp.stack([jnp.cos(theirs), jnp.sin(theirs)], axis=1)
    inputs = jax.random.normal(points, (samples, features.dimension))
    labels = Blocks(_Rows(features, theirs, 1.0 / width), inputs).apply(jnp.ones(width))
    return theirs, inputs, labels


def _points(name: str, value: Any, dimension: int) -> Float[Array, "n d"]:
    """Points `[n, d]`, at least one and finite."""
    checks.finite(name, value, "Give finite coordinates.")
    if np.ndim(value) != 2 or np.shape(value)[1] != dimension or np.shape(value)[0] == 0:
        raise ValueError(
            f"Argument `{name}` must have shape [n, {dimension}] with at least one row, as the "
            f"features have it, got shape {np.shape(value)}."
        )
    return checks.as_float(value)
