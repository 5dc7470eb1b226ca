"""Takakura & Suzuki (ICML 2024, arXiv 2403.14917): mean-field networks from a kernel perspective.

A two-layer network f(x) = (1/N) Σ_i a_i h(x; w_i), h = tanh(u·x + b) with w = (u, b), has features
w_i, particles that stand for a measure μ (slow), and outer weights a_i (fast). With λ > 0, n data
and T tasks that share the features, whose means are taken,

    L(a, w) = (1/2n) |f − Y|² + (λλ_a/2N) |a|² + (λλ_w/2N) Σ_i |w_i|²
    a*(w)   = Hᵀ(S + nλλ_a)⁻¹ Y,   H_ji = h(x_j; w_i),   S = HHᵀ/N.

The outer weights are kernel ridge regression with the kernel k(x, x') = ∫ h(x; w) h(x'; w) dμ(w),
which the features learn. G(μ) = L(a*, μ) is convex in μ and has the first variation

    δG/δμ (w) = −(λλ_a/2) |a*(w)|²/T + (λλ_w/2) |w|².

Mean-field Langevin dynamics dw = −∇(δG/δμ) dt + √(2λ) dB descends G + λ·entropy from the Gaussian
measure N(0, I/λ_w). With label noise the outer weights of a step are fitted to Y + ε, while loss
and gradient see Y: on average this adds to G the degrees of freedom tr S(S + nλλ_a)⁻¹, times
σ̃²/6n for noise that is uniform on [−σ̃, σ̃].

The fast loss is NT·L, whose gradient in a is Hᵀ(f − Y)/n + λλ_a a: the slowest relaxation rate of
the outer weights is λλ_a if there are more of them than data.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import AbstractProblem, State, checks
from tts_jax.fast import Ridge, RidgeSystem
from tts_jax.geometry import Particles


def product_target(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """f(x) = x₁x₂, the target of the paper's experiments."""
    return x[:, 0] * x[:, 1]


class MeanFieldKernel(AbstractProblem):
    """A two-layer network whose outer weights are kernel ridge regression, its features particles.

    `sgd(regime="limit", step_size=η)` is noisy gradient descent on the features: mean-field
    Langevin dynamics, with label noise if there is any. `flow` and `limit` are for problems
    without a temperature, so not for this one.

    Attributes:
        inputs: x_j, `[n, d]`.
        labels: y_j, `[n]`, or `[n, T]` for several tasks that share the features.
        width: the number N of features.
        entropy: λ > 0, the weight of the entropy, which is the temperature of the features.
        outer_decay: λ_a > 0; the ridge penalty is λλ_a.
        inner_decay: λ_w > 0; features start as N(0, I/λ_w).
        label_noise: σ̃ of the noise that each step of `sgd` adds to the labels that the outer
            weights see, uniform on [−σ̃, σ̃]; `None` for none. With it the gradient goes through the
            solve (`envelope`), as it must.
        activation: of h(x; w) = activation(u·x + b); twice differentiable and bounded by 1.
        clean_labels: f(x_j) without noise, in the form of `labels`, or `None`; `kernel_alignment`
            is the alignment with them.
        test_inputs: `[m, d]`, or `None`.
        test_labels: f at the test inputs, without noise; `test_error` is the mean square.
        directions: orthonormal rows `[k, d]`, or `None`; `parameter_alignment` is the part of the
            features that lies in their span.
    """

    inputs: Float[Array, "n d"]
    labels: Float[Array, "n ..."]
    width: int = eqx.field(static=True)
    entropy: Float[Array, ""]
    outer_decay: Float[Array, ""]
    inner_decay: Float[Array, ""]
    label_noise: Float[Array, ""] | None
    activation: Callable[[Array], Array] = eqx.field(static=True)
    clean_labels: Float[Array, "n ..."] | None
    test_inputs: Float[Array, "m d"] | None
    test_labels: Float[Array, "m ..."] | None
    directions: Float[Array, "k d"] | None

    def __init__(
        self,
        inputs: Float[ArrayLike, "n d"],
        labels: Float[ArrayLike, "n ..."],
        *,
        width: int = 2000,
        entropy: Float[ArrayLike, ""] = 0.004,
        outer_decay: Float[ArrayLike, ""] = 0.25,
        inner_decay: Float[ArrayLike, ""] = 0.25,
        label_noise: Float[ArrayLike, ""] | None = None,
        activation: Callable[[Array], Array] = jnp.tanh,
        clean_labels: Float[ArrayLike, "n ..."] | None = None,
        test_inputs: Float[ArrayLike, "m d"] | None = None,
        test_labels: Float[ArrayLike, "m ..."] | None = None,
        directions: Float[ArrayLike, "k d"] | None = None,
    ) -> None:
        """Build the problem; the numbers by default are the published ones.

        Raises:
            ValueError: shapes that do not go together, data that are not finite, λ, λ_a or λ_w that
                are not positive, `label_noise` < 0, `directions` that are not orthonormal.
        """
        self.inputs = _finite("inputs", inputs)
        if self.inputs.ndim != 2 or 0 in self.inputs.shape:
            raise ValueError(
                f"Argument `inputs` must have shape [n, d] with at least one row and one column, "
                f"got shape {self.inputs.shape}. Put one datum in each row."
            )
        count, dimension = self.inputs.shape
        self.labels = _finite("labels", labels)
        if self.labels.ndim not in (1, 2) or len(self.labels) != count or not self.labels.size:
            raise ValueError(
                f"Argument `labels` must have shape [n] or [n, T] with n = {count} as `inputs`, "
                f"got shape {self.labels.shape}. Give every input its label."
            )
        self.width = checks.positive_integer("width", width, "The paper has 2000.")
        self.entropy = _number("entropy", entropy, "The paper has 0.004.")
        self.outer_decay = _number("outer_decay", outer_decay, "The paper has 0.25.")
        self.inner_decay = _number("inner_decay", inner_decay, "The paper has 0.25.")
        self.label_noise = (
            None if label_noise is None else _number("label_noise", label_noise, "Or None.", True)
        )
        self.activation = activation
        self.clean_labels = _like(self.labels, "clean_labels", clean_labels, count)
        if (test_inputs is None) != (test_labels is None):
            raise ValueError(
                "Arguments `test_inputs` and `test_labels` must be given together, got only one. "
                "Give both, or neither."
            )
        self.test_inputs = None if test_inputs is None else _finite("test_inputs", test_inputs)
        tests = 0 if self.test_inputs is None else len(self.test_inputs)
        if self.test_inputs is not None and np.shape(self.test_inputs)[1:] != (dimension,):
            raise ValueError(
                f"Argument `test_inputs` must have shape [m, {dimension}], got shape "
                f"{self.test_inputs.shape}. It needs the dimension of `inputs`."
            )
        self.test_labels = _like(self.labels, "test_labels", test_labels, tests)
        self.directions = None if directions is None else _orthonormal(directions, dimension)

    @classmethod
    def of_target(
        cls,
        target: Callable[[np.ndarray], Any] = product_target,
        *,
        key: PRNGKeyArray,
        dimension: int = 15,
        samples: int = 300,
        noise: float = 1.0,
        tests: int = 1000,
        **options: Any,
    ) -> "MeanFieldKernel":
        """The published data: Gaussian inputs, labels f(x) with noise that is uniform on [−σ, σ].

        Args:
            target: f, from inputs `[n, d]` to `[n]` or, of several tasks, `[n, T]`.
            key: for inputs, noise and test inputs.
            dimension: d.
            samples: n.
            noise: σ ≥ 0.
            tests: the number of test inputs.
            options: further arguments of `MeanFieldKernel`.

        Raises:
            ValueError: a number that is out of range, or a target of the wrong shape.
        """
        for name, value in (("dimension", dimension), ("samples", samples), ("tests", tests)):
            remedy = "It is the number of columns or rows of the data."
            checks.positive_integer(name, value, remedy)
        noise = float(_number("noise", noise, "It is σ of the labels, 0 for none.", True))
        places, shift = jax.random.split(key)
        # float32 draws, so that the data do not depend on whether 64-bit types are on
        x = jax.random.normal(places, (samples + tests, dimension), jnp.float32)
        x = np.asarray(x, np.float64)
        f = np.asarray(target(x), np.float64)
        if f.ndim not in (1, 2) or len(f) != len(x):
            raise ValueError(
                f"Argument `target` must map inputs [n, d] to [n] or [n, T], got shape {f.shape} "
                f"for {x.shape}. Work on the last axis of the inputs."
            )
        clean = f[:samples]
        drawn = jax.random.uniform(shift, clean.shape, jnp.float32, -1.0, 1.0)
        return cls(
            x[:samples],
            clean + noise * np.asarray(drawn, np.float64),
            clean_labels=clean,
            test_inputs=x[samples:],
            test_labels=f[samples:],
            **options,
        )

    # --- states -----------------------------------------------------------------------------

    def init(self, *, key: PRNGKeyArray) -> State:
        """Independent features from N(0, I/λ_w) and their outer weights."""
        drawn = jax.random.normal(key, (self.width, self.inputs.shape[1] + 1), jnp.float32)
        slow = drawn.astype(jnp.result_type(float)) / jnp.sqrt(self.inner_decay)
        return State(self.critical(slow), slow)

    def state(self, *, slow: Float[ArrayLike, "N axis"]) -> State:
        """The state of given features `[N, d + 1]` with their outer weights.

        Raises:
            ValueError: the wrong shape, or numbers that are not finite.
        """
        given: Any = _finite("slow", slow)
        shape = (self.width, self.inputs.shape[1] + 1)
        if given.shape != shape:
            raise ValueError(
                f"Argument `slow` must have shape {shape}, one row (u, b) for each feature, got "
                f"{given.shape}."
            )
        return State(self.critical(given), given)

    @property
    def geometry(self) -> Particles:
        return Particles()

    @property
    def temperature(self) -> State:
        return State(None, self.entropy)

    @property
    def envelope(self) -> bool:
        """Whether the outer weights minimise the loss that is differentiated: not with noise."""
        return self.label_noise is None

    @property
    def fast_solver(self) -> Ridge:
        return Ridge()

    @property
    def tasks(self) -> int:
        """T."""
        return self.labels.shape[1] if self.labels.ndim == 2 else 1

    @property
    def penalty(self) -> Float[Array, ""]:
        """λλ_a, the ridge penalty."""
        return self.entropy * self.outer_decay

    # --- losses -------------------------------------------------------------------------------

    def features(self, slow: Float[Array, "N axis"], x: Float[Array, "n d"]) -> Float[Array, "n N"]:
        """H, the activations h(x_j; w_i) of features `[N, d + 1]`, the last entry of each its b."""
        return self.activation(x @ slow[:, :-1].T + slow[:, -1])

    def predict(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"], x: Float[Array, "n d"]
    ) -> Float[Array, "n ..."]:
        """The network f(x) at inputs `[n, d]`."""
        return self.features(slow, x) @ fast / self.width

    def loss(self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"]) -> Float[Array, ""]:
        """L on the labels that were given."""
        return self.sample_loss(fast, slow, ())

    def fast_loss(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"]
    ) -> Float[Array, ""]:
        """NT·L without its last term, which the outer weights do not see."""
        return self.sample_fast_loss(fast, slow, ())

    def sample(self, *, key: PRNGKeyArray, step: Any) -> tuple[Array, ...]:
        """The label noise of one step, in the form of `labels`; `()` if there is none."""
        if self.label_noise is None:
            return ()
        drawn = jax.random.uniform(jax.random.fold_in(key, step), self.labels.shape)
        return (self.label_noise * (2.0 * drawn - 1.0),)

    def sample_loss(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"], sample: tuple[Array, ...]
    ) -> Float[Array, ""]:
        """L: the label noise of a step is not in it."""
        del sample
        shrink = self.entropy * self.inner_decay / 2.0 * jnp.mean(jnp.sum(slow**2, axis=1))
        return self._ridge_loss(fast, slow, ()) + shrink

    def sample_fast_loss(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"], sample: tuple[Array, ...]
    ) -> Float[Array, ""]:
        """The fast loss with the label noise of a step."""
        return self.width * self.tasks * self._ridge_loss(fast, slow, sample)

    def ridge(
        self, slow: Float[Array, "N axis"], sample: tuple[Array, ...] | None = None
    ) -> RidgeSystem:
        """HᵀH/nN + λλ_a as least squares: features H/√(nN) and targets (Y + ε)·√(N/n)."""
        count = len(self.labels)
        matrix = self.features(slow, jnp.asarray(self.inputs)) / math.sqrt(count * self.width)
        return RidgeSystem(
            matrix, self._noisy(sample) * math.sqrt(self.width / count), self.penalty
        )

    def relaxation_rate(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"]
    ) -> Float[Array, ""]:
        """The smallest eigenvalue of HᵀH/nN + λλ_a: λλ_a if there are more features than data."""
        del fast
        if self.width > len(self.labels):
            return jnp.asarray(self.penalty)
        return self.penalty + jnp.linalg.eigvalsh(self.gram(slow))[0] / len(self.labels)

    def outer_weights(
        self, slow: Float[Array, "N axis"], points: Float[Array, "k axis"]
    ) -> Float[Array, "k ..."]:
        """a*(w) at any points w of the space of features, for the measure of the features `slow`.

        At its minimum L is stationary in a: a*(w) = Σ_j h(x_j; w) (y_j − f(x_j)) / nλλ_a.
        """
        inputs = jnp.asarray(self.inputs)
        misfit = self.labels - self.predict(self.critical(slow), slow, inputs)
        return self.features(points, inputs).T @ misfit / (len(self.labels) * self.penalty)

    def first_variation(
        self, slow: Float[Array, "N axis"], points: Float[Array, "k axis"]
    ) -> Float[Array, " k"]:
        """δG/δμ at points w, for the measure of the features `slow` (Takakura & Suzuki, §3.1)."""
        weights = self.outer_weights(slow, points).reshape(len(points), -1)
        pull = self.inner_decay * jnp.sum(jnp.asarray(points) ** 2, axis=1)
        return self.entropy / 2.0 * (pull - self.outer_decay * jnp.mean(weights**2, axis=1))

    # --- observables --------------------------------------------------------------------------

    def gram(self, slow: Float[Array, "N axis"]) -> Float[Array, "k k"]:
        """S = HHᵀ/N, or HᵀH/N if that is smaller: they share all eigenvalues but zeros."""
        matrix = self.features(slow, jnp.asarray(self.inputs))
        matrix = matrix.T if matrix.shape[0] > self.width else matrix
        return matrix @ matrix.T / self.width

    def degrees_of_freedom(self, slow: Float[Array, "N axis"]) -> Float[Array, ""]:
        """tr S(S + nλλ_a)⁻¹, the degrees of freedom of the kernel ridge regression."""
        values = jnp.maximum(jnp.linalg.eigvalsh(self.gram(slow)), 0.0)
        return jnp.sum(values / (values + len(self.labels) * self.penalty))

    def kernel_alignment(self, slow: Float[Array, "N axis"]) -> Float[Array, ""]:
        """fᵀSf/(|f|²|S|_F) with the labels without noise f, the mean over tasks; of f = 0 it is 0.

        Raises:
            TypeError: the problem has no `clean_labels`.
        """
        if self.clean_labels is None:
            raise TypeError(
                "`kernel_alignment` needs labels without noise. Pass `clean_labels=`, or build the "
                "problem by `MeanFieldKernel.of_target`."
            )
        f = jnp.asarray(self.clean_labels).reshape(len(self.labels), -1)
        seen = self.features(slow, jnp.asarray(self.inputs)).T @ f
        square = jnp.sum(f**2, axis=0)
        each = jnp.sum(seen**2, axis=0) / self.width / jnp.where(square > 0.0, square, 1.0)
        return jnp.mean(each) / jnp.linalg.norm(self.gram(slow))

    def parameter_alignment(self, slow: Float[Array, "N axis"]) -> Float[Array, ""]:
        """The mean over features of |Pu|²/|u|², P the projection onto the `directions`.

        Raises:
            TypeError: the problem has no `directions`.
        """
        if self.directions is None:
            raise TypeError("`parameter_alignment` needs directions. Pass `directions=`.")
        u = slow[:, :-1]
        along = u @ jnp.asarray(self.directions).T
        square = jnp.sum(u**2, axis=1)
        return jnp.mean(jnp.sum(along**2, axis=1) / jnp.where(square > 0.0, square, 1.0))

    def test_error(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"]
    ) -> Float[Array, ""]:
        """The mean square of network minus f over the test inputs.

        Raises:
            TypeError: the problem has no test data.
        """
        if self.test_inputs is None or self.test_labels is None:
            raise TypeError("`test_error` needs data. Pass `test_inputs=` and `test_labels=`.")
        network = self.predict(fast, slow, jnp.asarray(self.test_inputs))
        return jnp.mean((network - self.test_labels) ** 2)

    def observables(
        self, fast: Float[Array, "N ..."], slow: Float[Array, "N axis"]
    ) -> dict[str, Float[Array, ""]]:
        """Degrees of freedom and misfit; alignments and test error where their data are given."""
        network = self.predict(fast, slow, jnp.asarray(self.inputs))
        seen = {
            "misfit": jnp.mean((network - self.labels) ** 2),
            "degrees_of_freedom": self.degrees_of_freedom(slow),
        }
        if self.clean_labels is not None:
            seen["kernel_alignment"] = self.kernel_alignment(slow)
        if self.directions is not None:
            seen["parameter_alignment"] = self.parameter_alignment(slow)
        if self.test_inputs is not None:
            seen["test_error"] = self.test_error(fast, slow)
        return seen

    def axes(self) -> dict[str, tuple[str, ...]]:
        fast = ("feature", "task")[: self.labels.ndim]
        return {"fast": fast, "slow": ("feature", "axis")}

    def settings(self) -> dict[str, Any]:
        noise = 0.0 if self.label_noise is None else self.label_noise
        return {
            "entropy": self.entropy,
            "outer_decay": self.outer_decay,
            "inner_decay": self.inner_decay,
            "label_noise": np.asarray(noise),
            "data": np.asarray(len(self.labels)),
        }

    # --- shared -------------------------------------------------------------------------------

    def _noisy(self, sample: tuple[Array, ...] | None) -> Float[Array, "n ..."]:
        """The labels that the outer weights see."""
        return jnp.asarray(self.labels) + sample[0] if sample else jnp.asarray(self.labels)

    def _ridge_loss(self, fast: Array, slow: Array, sample: tuple[Array, ...]) -> Float[Array, ""]:
        misfit = self.predict(fast, slow, jnp.asarray(self.inputs)) - self._noisy(sample)
        return (jnp.mean(misfit**2) + self.penalty * jnp.mean(fast**2)) / 2.0


# --- arguments ----------------------------------------------------------------------------------


def _finite(name: str, value: Any) -> Any:
    return checks.as_float(checks.finite(name, value, "Clean the data."))


def _number(name: str, value: Any, remedy: str, zero: bool = False) -> Any:
    """One positive number, or also 0."""
    check = checks.nonnegative if zero else checks.positive
    return checks.as_float(check(name, value, remedy, single=True))


def _like(labels: Any, name: str, value: Any, count: int) -> Any:
    """Labels of `count` inputs in the form of `labels`, if any."""
    if value is None:
        return None
    array = _finite(name, value)
    shape = (count, *labels.shape[1:])
    if array.shape != shape or not count:
        raise ValueError(
            f"Argument `{name}` must have shape {shape}, one entry for each input and task of "
            f"`labels`, got shape {array.shape}."
        )
    return array


def _orthonormal(value: Any, dimension: int) -> Any:
    """Orthonormal rows."""
    rows = _finite("directions", value)
    if rows.ndim != 2 or rows.shape[1] != dimension or not 1 <= len(rows) <= dimension:
        raise ValueError(
            f"Argument `directions` must have shape [k, {dimension}] with 1 ≤ k ≤ {dimension}, got "
            f"shape {rows.shape}. Give one direction in each row."
        )
    if not isinstance(rows, Tracer):
        off = float(np.max(np.abs(rows @ rows.T - np.eye(len(rows)))))
        if off > 1e-6:
            raise ValueError(
                f"Argument `directions` must have orthonormal rows, got products that are off by "
                f"{off:.3g}. Use `np.linalg.qr(directions.T).Q.T`."
            )
    return rows
