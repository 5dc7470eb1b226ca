"""Marion & Berthier (2023, arXiv 2304.09576): a shallow network on a piecewise-constant target.

Paper symbols: the network f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η) on [0, 1] has outer weights
a (fast, with the bias a_0 first) and positions u (slow); η is the width of a step; the target f*
jumps by α_k at v_k. The loss is L = ∫₀¹ (f − f*)² dx without a factor ½, the convention of the
published code; times τ of the paper's text (with ½) are twice ours.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import _checks
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State
from tts_jax._random import typed_key
from tts_jax.problems import (
    _banded_simd,
    _plateau,
    _sharp,
    _step,
    _univariate_sgd,
)


# From so many neurons on, loss, gradient and a*(u) are summed over near neighbours (`_plateau`);
# with fewer all pairs are computed at once.
SORTED_FROM = 128


def _as_float(value: Any) -> Any:
    """A concrete number as a NumPy float64 array (it keeps its digits whatever x64 says)."""
    return jnp.asarray(value) if _checks.is_traced(value) else np.asarray(value, dtype=np.float64)


class PiecewiseConstant(eqx.Module):
    """A piecewise-constant target on [0, 1].

    Attributes:
        jumps: positions v_k of the jumps, `[jumps]`, strictly increasing inside (0, 1).
        values: the level of each piece from left to right, `[jumps + 1]`.
    """

    jumps: Float[Array, " jumps"]
    values: Float[Array, " pieces"]

    def __init__(
        self,
        jumps: Sequence[float] | Float[ArrayLike, " jumps"],
        values: Sequence[float] | Float[ArrayLike, " pieces"],
    ) -> None:
        """Build a target.

        Raises:
            ValueError: jumps unsorted, repeated, outside (0, 1) or not finite; values not
                finite or not one more than the jumps.
        """
        _checks.real("jumps", jumps, "Give the positions of the jumps inside (0, 1).")
        _checks.finite("values", values, "Give every piece a finite level.")
        self.jumps = _as_float(jumps)
        self.values = _as_float(values)
        if self.jumps.ndim != 1 or self.values.ndim != 1:
            raise ValueError(
                f"Arguments `jumps` and `values` must be vectors, got shapes "
                f"{self.jumps.shape} and {self.values.shape}. Use `[0.5]` for a single jump."
            )
        if self.values.shape[0] != self.jumps.shape[0] + 1:
            raise ValueError(
                f"Argument `values` must have one entry more than `jumps` (one per piece), got "
                f"{self.values.shape[0]} values for {self.jumps.shape[0]} jumps. Add or drop "
                f"levels."
            )
        if not _checks.is_traced(self.jumps):
            concrete = np.asarray(self.jumps)
            inside = np.all(np.isfinite(concrete) & (concrete > 0) & (concrete < 1))
            if not inside or np.any(np.diff(concrete) <= 0):
                raise _checks.argument_error(
                    "jumps",
                    "be strictly increasing and inside (0, 1)",
                    concrete,
                    "Sort the jumps, drop repeated ones and rescale the target to [0, 1].",
                )

    @property
    def heights(self) -> Float[Array, " jumps"]:
        """The signed jump heights α_k, `[jumps]`."""
        return self.values[1:] - self.values[:-1]

    @double_precision
    def __call__(self, x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """f*(x), right-continuous at the jumps; any shape of `x`."""
        piece = jnp.searchsorted(jnp.asarray(self.jumps), jnp.asarray(x), side="right")
        return jnp.asarray(self.values)[piece]


class _Integrals(eqx.Module):
    """What loss, gradient and Hessian share at one set of positions.

    With index 0 for the bias: gram_ij = ∫σ_iσ_j, target_i = ∫f*σ_i, and with bumps σ′_j/η:
    cross_ji = ∫σ_i σ′_j/η, target_bump_j = ∫f*σ′_j/η.
    """

    gram: Float[Array, "m1 m1"]
    target: Float[Array, " m1"]
    cross: Float[Array, "m m1"]
    target_bump: Float[Array, " m"]


class Univariate(AbstractProblem):
    """The univariate experiment: m steps of width η against a piecewise-constant target.

    Attributes:
        target: the target f*.
        neurons: their number m.
        eta: width η of each step, in units of x.
        noise: half-width of the uniform label noise that `sgd` adds; the population loss,
            `flow` and the limits do not see it.
    """

    target: PiecewiseConstant
    neurons: int = eqx.field(static=True)
    eta: Float[Array, ""]
    noise: Float[Array, ""]

    dims: ClassVar = {
        "fast": ("weight",),
        "slow": ("neuron",),
        "recovery": ("jump",),
        "values": ("piece",),
        "hitting_time": ("jump",),
    }
    gradients: ClassVar = _univariate_sgd.GRADIENTS
    flow_engines: ClassVar = ("simd", "loop")
    lanes: ClassVar = True
    lane_rows: ClassVar = True

    def __init__(
        self,
        target: PiecewiseConstant,
        *,
        neurons: int = 20,
        eta: Float[ArrayLike, ""] = 4e-3,
        noise: Float[ArrayLike, ""] = 0.0,
    ) -> None:
        """Build the problem.

        Raises:
            ValueError: `neurons` < 1, `eta` not positive, `noise` negative.
            TypeError: `target` is not a `PiecewiseConstant`.
        """
        remedy = "Build it with `tts.PiecewiseConstant(jumps, values)`."
        self.target = _checks.instance("target", target, PiecewiseConstant, remedy)
        self.neurons = _checks.positive_integer("neurons", neurons, "The paper uses 20.")
        self.eta = _as_float(_checks.positive("eta", eta, "The paper uses 4e-3.", single=True))
        remedy = "It is the half-width of the label noise; the paper uses 1."
        self.noise = _as_float(_checks.nonnegative("noise", noise, remedy, single=True))

    # --- states -----------------------------------------------------------------------------

    @double_precision
    def init(self, *, key: PRNGKeyArray) -> State:
        """The paper's start: zero weights, positions i.i.d. uniform on [0, 1] and sorted.

        Args:
            key: one random key, or an array of typed keys for a batch of starts.

        Returns:
            `State(fast=[..., m+1], slow=[..., m])`, with the axes of `key` in front.
        """
        key = typed_key(_checks.random_key(key))

        def draw(key: PRNGKeyArray) -> Array:
            return jnp.sort(jax.random.uniform(key, (self.neurons,)))

        for _ in range(key.ndim):
            draw = jax.vmap(draw)
        return State(jnp.zeros((*key.shape, self.neurons + 1)), draw(key))

    @double_precision
    def state(
        self, *, slow: Float[ArrayLike, "... m"], fast: Float[ArrayLike, "... m1"] | None = None
    ) -> State:
        """A state from given positions, `[..., m]`; weights `[..., m+1]` are zero unless given.

        Raises:
            ValueError: a wrong number of neurons, or positions or weights that are not finite.
        """
        _checks.finite("slow", slow, "Give every neuron a finite position.")
        if np.ndim(slow) < 1 or np.shape(slow)[-1] != self.neurons:
            raise ValueError(
                f"Argument `slow` must have the {self.neurons} neurons of the problem on its "
                f"last axis, got shape {np.shape(slow)}. Build the problem with "
                f"`neurons={np.shape(slow)[-1] if np.ndim(slow) else 1}` or pass other positions."
            )
        shape = (*np.shape(slow)[:-1], self.neurons + 1)
        if fast is not None:
            _checks.finite("fast", fast, "Give every weight a finite value.")
        if fast is not None and np.shape(fast) != shape:
            raise ValueError(
                f"Argument `fast` must have shape {shape} (the bias first, then one weight per "
                f"neuron), got {np.shape(fast)}. Leave it out for zero weights."
            )
        slow = jnp.asarray(slow, dtype=jnp.result_type(float))
        if fast is None:
            return State(jnp.zeros(shape, slow.dtype), slow)
        return State(jnp.asarray(fast, dtype=jnp.result_type(float)), slow)

    def structure(self) -> State:
        dtype = jnp.result_type(float)
        return State(
            jax.ShapeDtypeStruct((self.neurons + 1,), dtype),
            jax.ShapeDtypeStruct((self.neurons,), dtype),
        )

    # --- the network and its loss -----------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def predict(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"], x: Float[ArrayLike, "..."]
    ) -> Float[Array, "..."]:
        """The network f(x; a, u) at any shape of `x`."""
        fast, slow = self._vector("fast", fast), self._vector("slow", slow)
        x = jnp.asarray(x)
        return fast[0] + _step.step((x[..., None] - slow) / self.eta) @ fast[1:]

    @double_precision
    @eqx.filter_jit
    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The exact population loss ∫₀¹ (f − f*)² dx, for neurons anywhere on the line.

        For many neurons loss, `fields`, `critical` and `condition` take time and memory in
        proportion to m and to the number of neighbours closer than η.
        """
        fast, slow = self._vector("fast", fast), self._vector("slow", slow)
        if self.neurons >= SORTED_FROM:
            return _plateau.loss(fast, slow, self._numbers())
        gram, target = self._gram(slow)
        values, jumps = jnp.asarray(self.target.values), jnp.asarray(self.target.jumps)
        lengths = jnp.diff(jumps, prepend=0.0, append=1.0)
        return fast @ (gram @ fast - 2.0 * target) + jnp.sum(values**2 * lengths)

    @double_precision
    @eqx.filter_jit
    def fields(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> State:
        """−∂L/∂a, `[m+1]`, and −∂L/∂u, `[m]`, in closed form."""
        fast, slow = self._vector("fast", fast), self._vector("slow", slow)
        if self.neurons >= SORTED_FROM:
            return State(*_plateau.fields(fast, slow, self._numbers()))
        integrals = self._integrals(slow)
        misfit = integrals.cross @ fast - integrals.target_bump
        return State(2.0 * (integrals.target - integrals.gram @ fast), 2.0 * fast[1:] * misfit)

    def fast_field(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Array:
        return self.fields(fast, slow).fast

    def slow_field(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Array:
        return self.fields(fast, slow).slow

    @double_precision
    @eqx.filter_jit
    def hessian(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, "n n"]:
        """The Hessian of the loss in (a, u), `[2m+1, 2m+1]`, in closed form."""
        fast, slow = self._vector("fast", fast), self._vector("slow", slow)
        m, eta = self.neurons, self.eta
        weights = fast[1:]
        integrals = self._integrals(slow)
        inside, left, right = self._edges(slow)
        # overlap_ij = ∫σ′_iσ′_j/η²
        overlap = _step.gap_density((slow[:, None] - slow[None, :]) / eta)
        overlap -= _if_any(left, _step.cut_density, left[:, None], left[None, :])
        overlap -= _if_any(right, _step.cut_density, right[:, None], right[None, :])
        overlap = jnp.where(inside[:, None] & inside[None, :], overlap, 0.0) / eta
        misfit = integrals.cross @ fast - integrals.target_bump
        # curvature_j = ∫(f − f*) σ″_j/η² dx, integrated by parts; the ends stay
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        level = jnp.asarray(self.target.values)
        residual_0 = fast[0] + _step.step(left) @ weights - level[0]
        residual_1 = fast[0] + _step.step(-right) @ weights - level[-1]
        curvature = (
            residual_1 * _step.bump(right)
            - residual_0 * _step.bump(left)
            + _step.bump((jumps - slow[:, None]) / eta) @ heights
        ) / eta - overlap @ weights
        curvature = jnp.where(inside, curvature, 0.0)
        fast_slow = -2.0 * (integrals.cross * weights[:, None]).T
        fast_slow = fast_slow.at[jnp.arange(1, m + 1), jnp.arange(m)].add(-2.0 * misfit)
        slow_slow = 2.0 * weights[:, None] * overlap * weights[None, :]
        slow_slow += jnp.diag(2.0 * weights * curvature)
        return jnp.block([[2.0 * integrals.gram, fast_slow], [fast_slow.T, slow_slow]])

    def jacobian(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, "n n"]:
        """The Jacobian of `fields`: minus the Hessian of the loss."""
        return -self.hessian(fast, slow)

    # --- the critical manifold ----------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def critical(self, slow: Float[Array, " m"]) -> Float[Array, " m1"]:
        """The critical manifold a*(u) = argmin_a L(a, u), `[m+1]`.

        The normal equations G a = b are solved by Cholesky with a shift of a few ulp, taken
        out again by refinement. Where neurons coincide and the minimiser is not unique, this
        is the one of least norm, to which the fast flow from a = 0 converges. `condition`
        tells how well a* is determined: its relative error is about the machine epsilon times
        that number. With many neurons the factorisation is a band, unless more than some 127
        neighbours overlap.
        """
        slow = self._vector("slow", slow)
        if self.neurons >= SORTED_FROM:
            return _plateau.critical(slow, self._numbers())
        gram, target = self._gram(slow)
        factor = _shifted_cholesky(gram)
        solution = jax.scipy.linalg.cho_solve(factor, target)
        for _ in range(3):
            residual = target - gram @ solution
            solution = solution + jax.scipy.linalg.cho_solve(factor, residual)
        # steps that are equal on [0, 1] to rounding (the bias is one at −η/2) share their weight
        # evenly, and a step that is 0 there has none
        ends = -self.eta / 2, 1.0 + self.eta / 2
        places = jnp.clip(jnp.concatenate([ends[0] * jnp.ones(1), slow]), *ends)
        rounding = 64.0 * jnp.finfo(gram.dtype).eps
        same = (jnp.abs(places[:, None] - places[None, :]) <= rounding).astype(gram.dtype)
        shared = (same @ solution) / jnp.sum(same, axis=1)
        return jnp.where(places < ends[1], shared, 0.0)

    @double_precision
    @eqx.filter_jit
    def reduced_jacobian(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> Float[Array, "m m"]:
        split = self.neurons + 1
        hessian = self.hessian(fast, slow)
        cross = hessian[:split, split:]
        factor = _shifted_cholesky(hessian[:split, :split])
        return cross.T @ jax.scipy.linalg.cho_solve(factor, cross) - hessian[split:, split:]

    @double_precision
    @eqx.filter_jit
    def gram_eigenvalues(self, slow: Float[Array, " m"]) -> Float[Array, " m1"]:
        """The eigenvalues λ of the Gram matrix G(u), ascending, `[m+1]`.

        At fixed positions the flow's weights approach a*(u) along the eigenvectors at the rates
        2λ/ε in slow time τ, so that the slowest mode takes ε/(2λ_min). The smallest eigenvalue
        falls with the square of the gap between neurons that are closer than η; below about
        1e-15 of the largest it is rounding error and may be negative.
        """
        return jnp.linalg.eigvalsh(self._gram(self._vector("slow", slow))[0])

    @double_precision
    @eqx.filter_jit
    def condition(self, slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The condition number of the Gram matrix G(u); infinite where neurons coincide."""
        slow = self._vector("slow", slow)
        if self.neurons >= SORTED_FROM:
            return _plateau.condition(slow, self._numbers())
        eigenvalues = self.gram_eigenvalues(slow)
        smallest = eigenvalues[0]
        resolved = smallest > jnp.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
        ratio = eigenvalues[-1] / jnp.where(resolved, smallest, 1.0)
        return jnp.where(resolved | jnp.isnan(smallest), ratio, jnp.inf)

    def sharp(self, slow: Float[Array, "lanes m"], tau: Float[Array, " T"]) -> dict[str, Any]:
        """ε → 0 and then η → 0, event by event; see docs/sharp_limit.md."""
        jumps, values = jnp.asarray(self.target.jumps), jnp.asarray(self.target.values)
        return _sharp.sharp_trajectories(slow, tau, jumps, values)

    def fastest_rate(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"], epsilon: Array
    ) -> Float[Array, ""]:
        """Of the weights at most 2 tr G/ε; of a neuron at rest on a jump w some 10 w²/η."""
        del fast
        heights = jnp.asarray(self.target.heights)
        numbers = self._numbers()
        single = _plateau.singles(_plateau.places(slow, numbers.eta), numbers)
        trace = 1.0 + jnp.sum(1.0 - single.start - numbers.eta * single.own)
        weights = 2.0 * trace / epsilon
        return jnp.maximum(weights, 10.0 * jnp.max(heights**2, initial=0.0) / self.eta)

    def solve_flow(self, engine: str, state: State, epsilon: Any, tau: Any, **setting: Any) -> Any:
        if engine == "loop":
            from tts_jax.problems import _banded_loop  # slow to import

            return _banded_loop.solve(self, state, epsilon, tau, **setting)
        return _banded_simd.solve(self, *state, epsilon, tau, **setting)

    def slow_scale(self) -> Float[ArrayLike, ""]:
        # a few widths: below it, position errors are seen by the steps of near neighbours
        return 4.0 * self.eta

    def goal_radius(self) -> Float[ArrayLike, ""]:
        # a jump is recovered when a neuron is within one width of it
        return self.eta

    def reduced_observables(self, slow: Float[Array, " m"]) -> dict[str, Array]:
        return {"condition": self.condition(slow)}

    # --- observables --------------------------------------------------------------------------

    @double_precision
    def recovery(self, slow: Float[ArrayLike, "... m"]) -> Float[Array, "... jumps"]:
        """Distance from each jump to its nearest neuron, `[..., jumps]`, in units of x.

        A jump is recovered when this is at most η.
        """
        slow, jumps = jnp.asarray(slow), jnp.asarray(self.target.jumps)
        return jnp.min(jnp.abs(jumps[:, None] - slow[..., None, :]), axis=-1)

    def observables(self, fast: Array, slow: Float[Array, " m"]) -> dict[str, Array]:
        del fast
        return {"recovery": self.recovery(slow)}

    def coords(self) -> dict[str, Any]:
        return {
            "weight": np.arange(self.neurons + 1),
            "neuron": np.arange(1, self.neurons + 1),
            "jump": self.target.jumps,
        }

    def settings(self) -> dict[str, Any]:
        return {"eta": self.eta, "noise": self.noise, "values": self.target.values}

    # --- samples ------------------------------------------------------------------------------

    def sample(self, *, key: PRNGKeyArray, step: Any) -> tuple[Array, Array]:
        """One training sample (x, label noise) with x ~ U[0, 1), noise ~ U[−noise, noise)."""
        return _univariate_sgd.sample(self.noise, key=key, step=step)

    def sample_loss(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"], sample: tuple[Array, Array]
    ) -> Float[Array, ""]:
        """(f(x) − f*(x) − noise)²."""
        return _univariate_sgd.residual(self, fast, slow, sample) ** 2

    def sample_gradient(
        self,
        fast: Float[Array, " m1"],
        slow: Float[Array, " m"],
        sample: tuple[Array, Array],
        *,
        gradient: str = "exact",
    ) -> State:
        """The gradient of `sample_loss`; `"box"` is the estimator of the published code."""
        return _univariate_sgd.sample_gradient(self, fast, slow, sample, gradient=gradient)

    def lane_start(self, state: State, **options: Any) -> Any:
        return _univariate_sgd.lane_start(self, state, **options)

    def lane_sample(self, shared: Any, fixed: Any, key: Any, step: Any) -> tuple[Array, Array]:
        return _univariate_sgd.lane_sample(shared, fixed, key, step)

    def lane_label(self, shared: Any, sample: tuple[Array, Array]) -> tuple[Array, Array]:
        return _univariate_sgd.lane_label(shared, sample)

    def lane_step(self, shared: Any, fixed: Any, carry: Any, point: Any, *, gradient: str) -> Any:
        return _univariate_sgd.lane_step(shared, fixed, carry, point, gradient=gradient)

    def lane_state(self, lanes: Any) -> tuple[State, np.ndarray]:
        return _univariate_sgd.lane_state(lanes)

    # --- closed forms -------------------------------------------------------------------------

    def _vector(self, name: str, value: Float[ArrayLike, " n"]) -> Float[Array, " n"]:
        """One state's `fast` or `slow`, whose length is checked."""
        value, size = jnp.asarray(value), self.neurons + (name == "fast")
        if value.shape != (size,):
            raise ValueError(
                f"Argument `{name}` must have shape {(size,)}, got {value.shape}. For a batch of "
                f"states map over it with `jax.vmap`."
            )
        return value

    def _numbers(self) -> _plateau.Numbers:
        target = self.target
        return _plateau.Numbers(*map(jnp.asarray, (self.eta, target.jumps, target.values)))

    def _edges(self, slow: Float[Array, " m"]) -> tuple[Array, Array, Array]:
        """Whether a step touches [0, 1], and its signed distances past 0 and past 1 in η.

        Positions are first moved to the nearest point of [−η/2, 1 + η/2], which changes
        nothing on [0, 1]; the distances are then at most ½, and above −½ for a straddling step.
        """
        reach = self.eta / 2
        inside = (slow > -reach) & (slow < 1.0 + reach)
        clipped = jnp.clip(slow, -reach, 1.0 + reach)
        return inside, -clipped / self.eta, (clipped - 1.0) / self.eta

    def _gram(self, slow: Float[Array, " m"]) -> tuple[Array, Array]:
        """(∫σ_iσ_j, ∫f*σ_i), `[m+1, m+1]` and `[m+1]`, index 0 for the bias."""
        eta = self.eta
        _, left, right = self._edges(slow)
        slow = jnp.clip(slow, -eta / 2, 1.0 + eta / 2)
        row, column = slow[:, None], slow[None, :]
        pair = 1.0 - (row + column) / 2 - eta * _step.gap_mean((row - column) / eta)
        pair -= eta * _if_any(left, _step.cut_mean, left[:, None], left[None, :])
        # beyond 1 the line formula counts σσ − 1 = (1−σ)(1−σ) − (1−σ) − (1−σ)
        pair += eta * _if_any(right, _right_excess, right[:, None], right[None, :])
        single = eta * (_step.ramp(-right) - _step.ramp(left))
        gram = jnp.block([[jnp.ones((1, 1), pair.dtype), single[None, :]], [single[:, None], pair]])
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        values = jnp.asarray(self.target.values)
        weighted = eta * (
            values[-1] * _step.ramp(-right)
            - values[0] * _step.ramp(left)
            - _step.ramp((jumps - slow[:, None]) / eta) @ heights
        )
        mean = jnp.sum(values * jnp.diff(jumps, prepend=0.0, append=1.0))
        return gram, jnp.concatenate([mean[None], weighted])

    def _integrals(self, slow: Float[Array, " m"]) -> _Integrals:
        eta = self.eta
        gram, target = self._gram(slow)
        inside, left, right = self._edges(slow)
        clipped = jnp.clip(slow, -eta / 2, 1.0 + eta / 2)
        cross = _step.gap_cdf((clipped[:, None] - clipped[None, :]) / eta)
        cross -= _if_any(left, _step.cut_cdf, left[:, None], left[None, :])
        cross -= _if_any(right, _right_excess_slope, right[:, None], right[None, :])
        own = _step.step(-right) - _step.step(left)
        cross = jnp.where(inside[:, None], jnp.concatenate([own[:, None], cross], axis=1), 0.0)
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        values = jnp.asarray(self.target.values)
        target_bump = (
            values[-1] * _step.step(-right)
            - values[0] * _step.step(left)
            - _step.step((jumps - slow[:, None]) / eta) @ heights
        )
        return _Integrals(gram, target, cross, jnp.where(inside, target_bump, 0.0))


def _shifted_cholesky(matrix: Float[Array, "n n"]) -> tuple[Array, bool]:
    """The Cholesky factor of a Gram matrix shifted by a few ulp, so that it always exists."""
    shift = 8.0 * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    return jax.scipy.linalg.cho_factor(matrix + shift * jnp.eye(matrix.shape[0]))


def _right_excess(p: Array, q: Array) -> Array:
    return _step.ramp(p) + _step.ramp(q) - _step.cut_mean(p, q)


def _right_excess_slope(p: Array, q: Array) -> Array:
    return _step.step(p) - _step.cut_cdf(p, q)


def _if_any(edge: Float[Array, " m"], correction: Any, p: Array, q: Array) -> Array:
    """`correction(p, q)` when some step reaches past the edge, else zeros at no cost."""
    p, q = jnp.broadcast_arrays(p, q)
    return jax.lax.cond(jnp.any(edge > -0.5), correction, lambda p, q: jnp.zeros_like(p), p, q)
