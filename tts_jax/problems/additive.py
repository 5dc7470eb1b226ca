"""The additive network of Marion & Berthier (2023, arXiv 2304.09576) on a finite data set.

Paper symbols: the network f(x; a, u) = Σ_c Σ_j a_cj σ((x_c − u_cj)/η) on [0, 1]^d has for each
coordinate c its own outer weights a_c (fast) and positions u_c (slow); η is the width of a step. As
published it has no bias. The data are n points x_i with labels y_i = Σ_c f*(x_ic), and the residual
is r_i = f(x_i) − y_i. The published code descends the criterion ‖r‖₂/n, which is (L/n)^½ for the
mean square L = ‖r‖₂²/n.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State
from tts_jax._random import step_words, typed_key
from tts_jax.fast import least_norm
from tts_jax.problems._activation import (
    Activation,
    activation_of,
    derivative,
    name_of,
    transition_of,
)
from tts_jax.problems._ordered import Ordered, Placed
from tts_jax.problems.univariate import PiecewiseConstant, Univariate


Objective = Literal["squared", "norm"]
_Target = Callable[[Any], Any]


def _double(value: Any) -> Array:
    """Concrete numbers as a NumPy float64 array (they keep their digits whatever x64 says)."""
    return cast(Array, np.asarray(value, dtype=np.float64))


class Additive(AbstractProblem):
    """A sum of one-dimensional networks, one per coordinate, fitted to n data points.

    The problem holds its data. Runs with data of their own are made from several problems, one
    per seed: `tts.sgd([tts.Additive(..., key=key) for key in keys], ...)`.

    Attributes:
        targets: the univariate function f* of each coordinate; the labels are their sum.
        dimensions: the number d of coordinates.
        neurons: the number m of neurons of each coordinate.
        eta: width η of each step, in units of x.
        activation: σ by name, or an element-wise function.
        objective: what is descended, `"squared"`, ‖r‖₂²/n, or `"norm"`, ‖r‖₂/n.
        batch: points of one sample of `sgd`; None for all of them.
        weight_scale: start weights are uniform on [0, `weight_scale`).
        thresholds: the positions that neurons should find, `[d, thresholds]`.
        inputs: the data points, `[n, d]`.
        labels: their labels, `[n]`.
    """

    targets: tuple[_Target, ...]
    dimensions: int = eqx.field(static=True)
    neurons: int = eqx.field(static=True)
    eta: Float[Array, ""]
    activation: str | Activation = eqx.field(static=True)
    objective: Objective = eqx.field(static=True)
    batch: int | None = eqx.field(static=True)
    weight_scale: Float[Array, ""]
    thresholds: Float[Array, "d thresholds"]
    inputs: Float[Array, "n d"]
    labels: Float[Array, " n"]
    _data: Ordered

    dims: ClassVar = {
        "fast": ("coordinate", "neuron"),
        "slow": ("coordinate", "neuron"),
        "recovery": ("coordinate", "threshold"),
        "criterion": (),
        "thresholds": ("coordinate", "threshold"),
        "values": ("coordinate", "piece"),
    }

    def __init__(
        self,
        target: _Target | Sequence[_Target],
        *,
        dimensions: int = 2,
        neurons: int = 10,
        eta: Float[ArrayLike, ""] = 0.01,
        activation: str | Activation = "cubic",
        samples: int = 1000,
        key: PRNGKeyArray | None = None,
        inputs: Float[ArrayLike, "n d"] | None = None,
        labels: Float[ArrayLike, " n"] | None = None,
        thresholds: Float[ArrayLike, "..."] | None = None,
        objective: Objective = "squared",
        batch: int | None = None,
        weight_scale: Float[ArrayLike, ""] = 3.0,
    ) -> None:
        """Build the problem and its data set.

        Args:
            target: the univariate function f* of every coordinate, such as a `PiecewiseConstant`
                or an element-wise function of x; or a sequence of one per coordinate.
            dimensions: number d of coordinates; the paper uses 2 and 10, and 1 for ReLU.
            neurons: number m of neurons per coordinate; the paper uses 10.
            eta: width η of a step; the paper uses 0.01, and 1 for ReLU.
            activation: `"cubic"`, `"ramp"`, `"relu"`, `"logistic"`, `"erf"` or an element-wise
                function. With the first three a gradient costs in proportion to n d, with the
                others to n d m.
            samples: number n of data points, uniform on [0, 1]^d.
            key: random key that draws them.
            inputs: given data points in place of `samples` and `key`.
            labels: given labels, `[n]`, in place of the sum of the targets.
            thresholds: positions that neurons should find, `[thresholds]` for every coordinate or
                `[d, thresholds]`; by default the `jumps` of the target if it has them, else none.
            objective: what flow, limit and SGD descend. `"squared"`: the mean squared residual.
                `"norm"`: ‖r‖₂/n, as published; its flow is that of `"squared"` in another time,
                and its gradient does not vanish as r → 0. `limit` needs a residual that stays
                above 0 for it.
            batch: points drawn with replacement for one step of `sgd`; None, as published, takes
                all of them: gradient descent.
            weight_scale: start weights are uniform on [0, `weight_scale`), as published 3.

        Raises:
            ValueError: a number is out of range, a shape does not fit, or neither `key` nor
                `inputs` is given.
            TypeError: `target` or `activation` cannot be called.
        """
        self.dimensions = checks.positive_integer("dimensions", dimensions, "The paper uses 2.")
        self.neurons = checks.positive_integer("neurons", neurons, "The paper uses 10.")
        checks.positive("eta", eta, "The paper uses 0.01.", single=True)
        remedy = "It is the upper end of the start weights; the paper uses 3."
        checks.nonnegative("weight_scale", weight_scale, remedy, single=True)
        activation_of(activation)
        self.activation = activation
        checks.one_of("objective", objective, ("squared", "norm"))
        self.objective = objective
        if batch is not None:
            batch = checks.positive_integer("batch", batch, "Leave it out to take all points.")
            if objective == "norm":
                raise ValueError(
                    "Argument `batch` must be None with the objective 'norm', whose mean over "
                    f"samples is not that of the data, got {batch!r}. Use objective 'squared'."
                )
        self.batch = batch
        self.eta, self.weight_scale = _double(eta), _double(weight_scale)
        self.targets = _targets(target, self.dimensions)
        self.thresholds = _double(self._places(thresholds))
        if inputs is None:
            inputs = self._draw(samples, key)
        checks.finite("inputs", inputs, "Give every point finite coordinates.")
        self.inputs = _double(inputs)
        if self.inputs.ndim != 2 or self.inputs.shape[1] != self.dimensions or not self.inputs.size:
            raise ValueError(
                f"Argument `inputs` must have shape [n, {self.dimensions}] with n ≥ 1, one column "
                f"per coordinate, got {self.inputs.shape}. Transpose them, or set `dimensions`."
            )
        if labels is None:
            labels = self.target(self.inputs)
        checks.finite("labels", labels, "Give every point a finite label.")
        self.labels = _double(labels)
        if self.labels.shape != self.inputs.shape[:1]:
            raise ValueError(
                f"Argument `labels` must have one entry for each of the {self.inputs.shape[0]} "
                f"points, got shape {self.labels.shape}. Leave it out to take the target's values."
            )
        transition = transition_of(activation)
        reach = float(self.eta) * (transition.end - transition.start)
        self._data = Ordered(self.inputs, reach)

    def _draw(self, samples: int, key: PRNGKeyArray | None) -> np.ndarray:
        count = checks.positive_integer("samples", samples, "The paper uses 1000 and 10,000.")
        if key is None:
            raise ValueError(
                "Argument `key` must be a random key to draw the data points, got None. Pass for "
                "example `key=jax.random.key(0)`, or give the points by `inputs=`."
            )
        with jax.enable_x64(True):
            key = typed_key(checks.random_key(key))
            return np.asarray(jax.random.uniform(key, (count, self.dimensions), jnp.float64))

    def _places(self, thresholds: Float[ArrayLike, "..."] | None) -> np.ndarray:
        if thresholds is None:
            found = [np.asarray(getattr(one, "jumps", ()), np.float64) for one in self.targets]
            if len({one.shape for one in found}) != 1:
                raise ValueError(
                    f"Argument `thresholds` must be given where the targets have different "
                    f"numbers of jumps, got {[one.size for one in found]}. Pass `[d, thresholds]`."
                )
            return np.stack(found)
        checks.finite("thresholds", thresholds, "Give the positions that neurons should find.")
        places = np.asarray(thresholds, dtype=np.float64)
        shape = (self.dimensions, *places.shape[-1:])
        if places.ndim not in (1, 2) or (places.ndim == 2 and places.shape != shape):
            raise ValueError(
                f"Argument `thresholds` must have shape [thresholds] or [{self.dimensions}, "
                f"thresholds], got {places.shape}."
            )
        return np.broadcast_to(places, shape).copy()

    # --- states -----------------------------------------------------------------------------

    @double_precision
    def init(self, *, key: PRNGKeyArray) -> State:
        """The published start: positions uniform on [0, 1), weights on [0, `weight_scale`).

        Args:
            key: one random key, or an array of typed keys for a batch of starts.

        Returns:
            `State(fast=[..., d, m], slow=[..., d, m])`, with the axes of `key` in front.
        """
        key = typed_key(checks.random_key(key))
        shape = self.dimensions, self.neurons

        def draw(key: PRNGKeyArray) -> State:
            slow, fast = (jax.random.uniform(one, shape) for one in jax.random.split(key))
            return State(self.weight_scale * fast, slow)

        for _ in range(key.ndim):
            draw = jax.vmap(draw)
        return draw(key)

    @double_precision
    def state(
        self, *, slow: Float[ArrayLike, "... d m"], fast: Float[ArrayLike, "... d m"] | None = None
    ) -> State:
        """A state from given positions, `[..., d, m]`; weights are zero unless given.

        Raises:
            ValueError: positions or weights that are not finite or do not have this shape.
        """
        own = self.dimensions, self.neurons
        checks.finite("slow", slow, "Give every neuron a finite position.")
        if np.shape(slow)[-2:] != own:
            raise ValueError(
                f"Argument `slow` must end in the axes {own}, the coordinates and the neurons of "
                f"each, got shape {np.shape(slow)}."
            )
        slow = jnp.asarray(slow, dtype=jnp.result_type(float))
        if fast is None:
            return State(jnp.zeros_like(slow), slow)
        checks.finite("fast", fast, "Give every weight a finite value.")
        if np.shape(fast) != slow.shape:
            raise ValueError(
                f"Argument `fast` must have the shape {slow.shape} of `slow`, one weight per "
                f"neuron, got {np.shape(fast)}. Leave it out for zero weights."
            )
        return State(jnp.asarray(fast, dtype=slow.dtype), slow)

    def structure(self) -> State:
        one = jax.ShapeDtypeStruct((self.dimensions, self.neurons), jnp.result_type(float))
        return State(one, one)

    # --- the network and its loss -----------------------------------------------------------

    @double_precision
    def target(self, x: Float[ArrayLike, "... d"]) -> Float[Array, "..."]:
        """Σ_c f*(x_c) at points `[..., d]`."""
        x = jnp.asarray(x)
        columns = [jnp.asarray(one(x[..., index])) for index, one in enumerate(self.targets)]
        return sum(columns[1:], columns[0])

    @double_precision
    @eqx.filter_jit
    def predict(
        self, fast: Float[Array, "d m"], slow: Float[Array, "d m"], x: Float[ArrayLike, "... d"]
    ) -> Float[Array, "..."]:
        """The network f(x; a, u) at points `[..., d]`."""
        fast, slow, x = self._matrix("fast", fast), self._matrix("slow", slow), jnp.asarray(x)
        steps = activation_of(self.activation)((x[..., None] - slow) / self.eta)
        return jnp.sum(fast * steps, axis=(-2, -1))

    @double_precision
    @eqx.filter_jit
    def loss(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Float[Array, ""]:
        """The objective on the data: ‖r‖₂²/n, or ‖r‖₂/n with the objective `"norm"`."""
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        return self._outer(self._mean_square(self._residual(fast, slow, self._place(slow))))[0]

    @double_precision
    @eqx.filter_jit
    def criterion(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Float[Array, ""]:
        """The published criterion ‖r‖₂/n on the data, whatever the objective."""
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        mean = self._mean_square(self._residual(fast, slow, self._place(slow)))
        return jnp.sqrt(mean / self.labels.shape[0])

    @double_precision
    @eqx.filter_jit
    def population_loss(
        self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]
    ) -> Float[Array, ""]:
        """The exact mean square of f − f* over [0, 1]^d, the limit n → ∞ of `"squared"`.

        Coordinates are independent, so it is Σ_c Var(g_c) + (Σ_c E g_c)² for the misfit g_c of
        coordinate c, whose moments are losses of the univariate network with bias 0 and 1.

        Raises:
            ValueError: the activation is not `"cubic"`, or a target is not `PiecewiseConstant`.
        """
        exact = all(isinstance(one, PiecewiseConstant) for one in self.targets)
        if self.activation != "cubic" or not exact:
            raise ValueError(
                f"`population_loss` has a closed form for the activation 'cubic' and targets that "
                f"are `PiecewiseConstant`, got {name_of(self.activation)!r} and "
                f"{', '.join({type(one).__name__ for one in self.targets})}. Evaluate `loss` on a "
                f"larger data set."
            )
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        variance = mean = jnp.zeros((), fast.dtype)
        for target, weights, places in zip(self.targets, fast, slow, strict=True):
            one = Univariate(target, neurons=self.neurons, eta=self.eta)  # pyright: ignore[reportArgumentType]
            square, shifted = (
                one.loss(jnp.append(jnp.full(1, b), weights), places) for b in (0.0, 1.0)
            )
            first = (shifted - square - 1.0) / 2.0
            variance, mean = variance + square - first**2, mean + first
        return variance + mean**2

    @double_precision
    @eqx.filter_jit
    def fields(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> State:
        """−∂L/∂a and −∂L/∂u, `[d, m]` each, in time n d and the points within transitions."""
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        placed = self._place(slow)
        residual = self._residual(fast, slow, placed)
        _, rate, _ = self._outer(self._mean_square(residual))
        sums, bumps = self._data.projections(
            residual, slow, self._width(slow), placed, *self._shape()
        )
        scale = 2.0 * rate / residual.shape[0]
        return State(-scale * sums, scale * fast * bumps)

    def fast_field(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Array:
        return self.fields(fast, slow).fast

    def slow_field(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Array:
        return self.fields(fast, slow).slow

    @double_precision
    @eqx.filter_jit
    def jacobian(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Float[Array, "k k"]:
        """Minus the Hessian of the loss in the flattened (a, u), `[2dm, 2dm]`, in closed form."""
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        return -self._hessian(fast, slow)

    # --- the critical manifold --------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def critical(self, slow: Float[Array, "d m"]) -> Float[Array, "d m"]:
        """The critical manifold a*(u): least squares on the data, `[d, m]`.

        Neurons with no data between them have the same column, and one right of all data has none:
        a* is then the solution of least norm, to which the fast flow from a = 0 converges.
        Eigenvalues of the Gram matrix below some ulp of the largest count as zero; `gram_spectrum`
        tells how many, and how well the rest is determined.
        """
        slow = self._matrix("slow", slow)
        steps = self._design(slow)[0]
        gram, right = _grams(steps, jnp.asarray(self.labels, slow.dtype))
        weights = least_norm(gram, lambda at: right - gram @ at, jnp.zeros_like(right))
        return weights.reshape(slow.shape)

    @double_precision
    @eqx.filter_jit
    def reduced_jacobian(
        self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]
    ) -> Float[Array, "k k"]:
        fast, slow = self._matrix("fast", fast), self._matrix("slow", slow)
        hessian, count = self._hessian(fast, slow), fast.size
        cross = hessian[:count, count:]
        fast_block = hessian[:count, :count]
        response = least_norm(fast_block, lambda at: cross - fast_block @ at, jnp.zeros_like(cross))
        return cross.T @ response - hessian[count:, count:]

    @double_precision
    @eqx.filter_jit
    def gram_spectrum(self, slow: Float[Array, "d m"]) -> tuple[Array, Array]:
        """The condition number of the Gram matrix of the columns, and its numerical rank.

        The condition number is the ratio of the largest to the smallest eigenvalue, infinite where
        some count as zero; the rank is the number of the others, at most d m.
        """
        slow = self._matrix("slow", slow)
        gram, _ = _grams(self._design(slow)[0], jnp.asarray(self.labels, slow.dtype))
        values = jnp.linalg.eigvalsh(gram)
        kept = values > _cutoff(values)
        ratio = values[-1] / jnp.where(kept[0], values[0], 1.0)
        return jnp.where(kept[0], ratio, jnp.inf), jnp.sum(kept)

    def reduced_observables(self, slow: Float[Array, "d m"]) -> dict[str, Array]:
        condition, rank = self.gram_spectrum(slow)
        return {"condition": condition, "rank": rank}

    def slow_scale(self) -> Float[ArrayLike, ""]:
        # a few widths, as in `Univariate`; a ReLU has no width of its own
        return jnp.minimum(4.0 * self.eta, 1.0)

    def goal_radius(self) -> Float[ArrayLike, ""]:
        if self.activation == "relu":
            return super().goal_radius()
        return self.eta

    # --- observables ------------------------------------------------------------------------

    @double_precision
    def recovery(self, slow: Float[ArrayLike, "... d m"]) -> Float[Array, "... d thresholds"]:
        """Distance from each threshold to the nearest neuron of its coordinate, in units of x."""
        gaps = jnp.asarray(self.thresholds)[:, :, None] - jnp.asarray(slow)[..., :, None, :]
        return jnp.min(jnp.abs(gaps), axis=-1)

    def observables(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> dict[str, Array]:
        return {"recovery": self.recovery(slow), "criterion": self.criterion(fast, slow)}

    def coords(self) -> dict[str, Any]:
        return {
            "coordinate": np.arange(1, self.dimensions + 1),
            "neuron": np.arange(1, self.neurons + 1),
            "threshold": np.arange(1, self.thresholds.shape[1] + 1),
        }

    def settings(self) -> dict[str, Any]:
        steps = [one for one in self.targets if isinstance(one, PiecewiseConstant)]
        known = len(steps) == self.dimensions and len({one.values.shape for one in steps}) == 1
        return {
            **({"values": np.stack([one.values for one in steps])} if known else {}),
            "eta": self.eta,
            "samples": np.asarray(self.labels.shape[0]),
            "thresholds": self.thresholds,
            "weight_scale": self.weight_scale,
            "goal_radius": np.nan if self.activation == "relu" else self.eta,
        }

    # --- samples ----------------------------------------------------------------------------

    def sample(self, *, key: PRNGKeyArray, step: Any) -> tuple[Array, ...]:
        """The points and labels of one step, `[batch, d]` and `[batch]`; `()` for all of them."""
        if self.batch is None:
            return ()
        for word in step_words(step):
            key = jax.random.fold_in(key, word)
        rows = jax.random.randint(key, (self.batch,), 0, self.labels.shape[0])
        return jnp.asarray(self.inputs)[rows], jnp.asarray(self.labels)[rows]

    def sample_loss(
        self, fast: Float[Array, "d m"], slow: Float[Array, "d m"], sample: tuple[Array, ...]
    ) -> Float[Array, ""]:
        """The mean squared residual of the sample's points, or the loss if it is all of them."""
        if not sample:
            return self.loss(fast, slow)
        inputs, labels = sample
        return jnp.mean((self.predict(fast, slow, inputs) - labels) ** 2)

    def sample_gradient(
        self,
        fast: Float[Array, "d m"],
        slow: Float[Array, "d m"],
        sample: tuple[Array, ...],
        *,
        gradient: str = "exact",
    ) -> State:
        """The gradient of `sample_loss`; on all points by the closed form of `fields`."""
        if sample:
            return super().sample_gradient(fast, slow, sample, gradient=gradient)
        return State(*jax.tree.map(jnp.negative, tuple(self.fields(fast, slow))))

    # --- closed forms -----------------------------------------------------------------------

    def _matrix(self, name: str, value: Float[ArrayLike, "d m"]) -> Float[Array, "d m"]:
        """One state's `fast` or `slow`, whose shape is checked."""
        value, shape = jnp.asarray(value), (self.dimensions, self.neurons)
        if value.shape != shape:
            raise ValueError(
                f"Argument `{name}` must have shape {shape}, got {value.shape}. For a batch of "
                f"states map over it with `jax.vmap`."
            )
        return value

    def _shape(self) -> tuple[Activation, Any]:
        return activation_of(self.activation), transition_of(self.activation)

    def _width(self, slow: Array) -> Array:
        return jnp.asarray(self.eta, slow.dtype)

    def _place(self, slow: Float[Array, "d m"]) -> Placed:
        return self._data.place(slow, self._width(slow), transition_of(self.activation))

    def _residual(
        self, fast: Float[Array, "d m"], slow: Float[Array, "d m"], placed: Placed
    ) -> Float[Array, " n"]:
        network = self._data.network(fast, slow, self._width(slow), placed, *self._shape())
        return network - jnp.asarray(self.labels)

    @staticmethod
    def _mean_square(residual: Float[Array, " n"]) -> Float[Array, ""]:
        return jnp.mean(residual**2)

    def _outer(self, mean: Float[Array, ""]) -> tuple[Array, Array, Array]:
        """The objective as a function of the mean square, and its first two derivatives.

        That of the norm is not differentiable at 0; its gradient there is set to 0.
        """
        if self.objective == "squared":
            return mean, jnp.ones_like(mean), jnp.zeros_like(mean)
        zero = mean == 0
        value = jnp.sqrt(jnp.where(zero, 1.0, mean) / self.labels.shape[0])
        rate = jnp.where(zero, 0.0, value / (2.0 * jnp.where(zero, 1.0, mean)))
        bend = -rate / (2.0 * jnp.where(zero, 1.0, mean))
        return jnp.where(zero, 0.0, value), rate, bend

    def _design(self, slow: Float[Array, "d m"]) -> tuple[Array, Array, Array]:
        """σ, σ′/η and σ″/η² of every neuron at every point, `[n, d m]` each."""
        activation, eta = activation_of(self.activation), self._width(slow)
        z = (jnp.asarray(self.inputs, slow.dtype)[:, :, None] - slow) / eta
        z = z.reshape(z.shape[0], -1)
        bump = derivative(activation, z) / eta
        bend = derivative(lambda z: derivative(activation, z), z) / eta**2
        return activation(z), bump, bend

    def _hessian(self, fast: Float[Array, "d m"], slow: Float[Array, "d m"]) -> Array:
        steps, bumps, bends = self._design(slow)
        weights, count = fast.reshape(-1), self.labels.shape[0]
        residual = steps @ weights - jnp.asarray(self.labels, slow.dtype)
        _, rate, bend = self._outer(self._mean_square(residual))
        slopes = jnp.concatenate([steps, -weights * bumps], axis=1)
        mixed = jnp.diag(-(residual @ bumps))
        own = jnp.diag(weights * (residual @ bends))
        curvature = slopes.T @ slopes
        curvature += jnp.block([[jnp.zeros_like(own), mixed], [mixed, own]])
        gradient = 2.0 / count * (residual @ slopes)
        return (2.0 * rate / count) * curvature + bend * jnp.outer(gradient, gradient)


def _targets(target: _Target | Sequence[_Target], dimensions: int) -> tuple[_Target, ...]:
    several = isinstance(target, Sequence)
    targets = tuple(target) if several else (target,) * dimensions
    if not all(callable(one) for one in targets):
        raise TypeError(
            f"Argument `target` must be a `PiecewiseConstant`, an element-wise function, or a "
            f"sequence of them, got {target!r}."
        )
    if len(targets) != dimensions:
        raise ValueError(
            f"Argument `target` must have one function for each of the {dimensions} coordinates, "
            f"got {len(targets)}. Pass a single one to use it for all."
        )
    return targets


def _grams(steps: Float[Array, "n k"], labels: Float[Array, " n"]) -> tuple[Array, Array]:
    return steps.T @ steps / steps.shape[0], steps.T @ labels / steps.shape[0]


def _cutoff(eigenvalues: Float[Array, " k"]) -> Array:
    """What an eigenvalue of a Gram matrix must exceed to count as more than rounding."""
    size = eigenvalues.shape[0]
    return 4.0 * size * jnp.finfo(eigenvalues.dtype).eps * jnp.max(jnp.abs(eigenvalues))
