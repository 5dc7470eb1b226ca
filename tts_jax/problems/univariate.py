"""Marion & Berthier (2023, arXiv 2304.09576): a shallow network on [0, 1].

Paper symbols: the network f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η) has outer weights a (fast, with
the bias a_0 first) and positions u (slow); η is the width of a step. The paper's target f* is
piecewise constant and jumps by α_k at v_k, its σ the cubic step of `_step`; both may be others. The
loss is L = ∫₀¹ (f − f*)² dx without a factor ½, the convention of the published code; times τ of
the paper's text (with ½) are twice ours.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State, quickly
from tts_jax._random import typed_key
from tts_jax.problems import (
    _activation,
    _banded_simd,
    _form,
    _panels,
    _quadrature,
    _sharp,
    _univariate_sgd,
)
from tts_jax.problems._closed import CubicForm, SmoothForm
from tts_jax.problems._pairs import SMOOTH_STEPS
from tts_jax.problems._targets import (
    AbstractTarget,
    PiecewiseConstant as PiecewiseConstant,
    as_target,
)


# From so many neurons on, loss, gradient and a*(u) are summed over near neighbours (`_plateau`);
# with fewer all pairs are computed at once.
SORTED_FROM = 128

# Steps from 0 to 1 that are symmetric about 0: they have a width, and a limit as it tends to 0.
STEPS = ("cubic", "ramp", "logistic", "erf")


class Univariate(AbstractProblem):
    """The univariate experiment: m steps of width η against a target on [0, 1].

    Attributes:
        target: the target f*: `PiecewiseConstant`, `PiecewiseLinear` or `Function`.
        activation: the name of σ; of a callable `"custom "` and its own name.
        sigma: σ itself, element-wise.
        neurons: their number m.
        eta: width η of each step, in units of x. Of ReLU, σ((x − u)/η) = max(0, x − u)/η, it is no
            width but a scale of the weights: the paper's ReLU experiment has η = 1.
        noise: half-width of the uniform label noise that `sgd` adds; the population loss,
            `flow` and the limits do not see it.
        order: Gauss nodes per panel, where integrals are found by quadrature.
    """

    target: AbstractTarget
    activation: str = eqx.field(static=True)
    sigma: Callable[[Array], Array]
    neurons: int = eqx.field(static=True)
    eta: Float[Array, ""]
    noise: Float[Array, ""]
    order: int = eqx.field(static=True)
    # the panels of σ, where integrals are found by quadrature
    _shape: _panels.Polynomials | _panels.Resolved | None = eqx.field(static=True)

    dims: ClassVar = {"fast": ("weight",), "slow": ("neuron",)}
    gradients: ClassVar = _univariate_sgd.GRADIENTS
    lanes: ClassVar = True

    def __init__(
        self,
        target: AbstractTarget | Callable[[Array], Array],
        *,
        activation: str | Callable[[Array], Array] = "cubic",
        neurons: int = 20,
        eta: Float[ArrayLike, ""] = 4e-3,
        noise: Float[ArrayLike, ""] = 0.0,
        order: int = _quadrature.NODES,
    ) -> None:
        """Build the problem.

        The integrals are exact, in closed form or by Gauss quadrature of polynomials, where σ is
        one of the named activations and f* piecewise constant or linear. Otherwise they are found
        by quadrature on panels that follow the neurons; `loss_error` tells how well. See
        docs/activations.md.

        Args:
            target: f*; any element-wise function of x that JAX can trace is wrapped into a
                `Function`, which may also be told where it is not smooth.
            activation: σ, `"cubic"`, `"ramp"`, `"logistic"`, `"erf"`, `"relu"`, or any continuous
                element-wise function of z = (x − u)/η that JAX can trace, smooth on |z| ≤ 64 but
                possibly at 0, ±½ and ±1. An `equinox.Module` shows its numbers to transformations;
                any other callable belongs to the form of the problem, so that a new function
                compiles anew.
            neurons: their number m.
            eta: width η.
            noise: half-width of the label noise.
            order: Gauss nodes per panel; the panels suit the default, and more nodes are for
                functions that are not smooth where they should be.

        Raises:
            ValueError: `neurons` or `order` < 1, `eta` not positive, `noise` negative, an unknown
                activation, or one (or a target) that is not element-wise or not finite.
            TypeError: `target` or `activation` is not what it should be, or cannot be traced.
        """
        self.target = as_target(target)
        function = _activation.activation_of(activation)
        named = isinstance(activation, str)
        if not named:
            remedy = "Pass an element-wise function of z written with `jax.numpy`, or a name."
            _quadrature.check_elementwise("activation", function, remedy)
        self.activation = activation if named else f"custom {_activation.name_of(activation)}"
        self.sigma = _quadrature.held(function)
        self.neurons = checks.positive_integer("neurons", neurons, "The paper uses 20.")
        self.eta = checks.as_float(checks.positive("eta", eta, "The paper uses 4e-3.", single=True))
        remedy = "It is the half-width of the label noise; the paper uses 1."
        self.noise = checks.as_float(checks.nonnegative("noise", noise, remedy, single=True))
        self.order = checks.positive_integer("order", order, "Leave it out.")
        self._shape = self._find_shape()

    def _find_shape(self) -> _panels.Polynomials | _panels.Resolved | None:
        if self.activation in _panels.POLYNOMIALS:
            return _panels.POLYNOMIALS[self.activation]
        if self.activation in SMOOTH_STEPS and self.target.degree is not None:
            return None
        reach = _panels.reach_of(self.eta)
        found = _panels.resolved(self.sigma, reach)
        if found is None:
            raise ValueError(
                f"Argument `activation` must be finite on |z| ≤ {reach:.3g}, got infinite or NaN "
                f"values of `{self.activation}`. Use a larger `eta`, or another activation."
            )
        return found

    @property
    def _of_paper(self) -> bool:
        """Whether it is the cubic step onto a piecewise-constant target."""
        return self.activation == "cubic" and isinstance(self.target, PiecewiseConstant)

    @property
    def _form(self) -> _form.Form:
        """How the integrals are found."""
        target, eta = self.target, jnp.asarray(self.eta)
        if self.activation == "cubic" and isinstance(target, PiecewiseConstant):
            return CubicForm(target, eta, near=self.neurons >= SORTED_FROM)
        if self._shape is None:
            return SmoothForm(target, eta, self.activation)
        return _panels.PanelForm(self.sigma, target, eta, self._shape, self.order)

    @property
    def flow_engines(self) -> tuple[str, ...]:
        """The engines on banded stages, for the cubic step onto a piecewise-constant target."""
        return ("cuda", "simd", "loop") if self._of_paper else ()

    @property
    def lane_rows(self) -> bool:
        return self._of_paper

    # --- states -----------------------------------------------------------------------------

    @double_precision
    def init(self, *, key: PRNGKeyArray) -> State:
        """The paper's start: zero weights, positions i.i.d. uniform on [0, 1] and sorted.

        Args:
            key: one random key, or an array of typed keys for a batch of starts.

        Returns:
            `State(fast=[..., m+1], slow=[..., m])`, with the axes of `key` in front.
        """
        key = typed_key(checks.random_key(key))

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
        checks.finite("slow", slow, "Give every neuron a finite position.")
        if np.ndim(slow) < 1 or np.shape(slow)[-1] != self.neurons:
            raise ValueError(
                f"Argument `slow` must have the {self.neurons} neurons of the problem on its "
                f"last axis, got shape {np.shape(slow)}. Build the problem with "
                f"`neurons={np.shape(slow)[-1] if np.ndim(slow) else 1}` or pass other positions."
            )
        shape = (*np.shape(slow)[:-1], self.neurons + 1)
        if fast is not None:
            checks.finite("fast", fast, "Give every weight a finite value.")
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
        return fast[0] + self.sigma((x[..., None] - slow) / self.eta) @ fast[1:]

    @double_precision
    @eqx.filter_jit
    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The population loss ∫₀¹ (f − f*)² dx, for neurons anywhere on the line.

        Exact to rounding unless activation or target has no closed form (`loss_error`). In the
        paper's setting loss, `fields`, `critical` and `condition` of many neurons take time and
        memory in proportion to m and to the number of neighbours closer than η.
        """
        return self._form.loss(self._vector("fast", fast), self._vector("slow", slow))

    @double_precision
    @eqx.filter_jit
    def loss_error(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The estimated error of `loss`: how far quadrature with more nodes is from it.

        0 where the integrals are exact, whose error is rounding.
        """
        return self._form.loss_error(self._vector("fast", fast), self._vector("slow", slow))

    @double_precision
    @eqx.filter_jit
    def fields(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> State:
        """−∂L/∂a, `[m+1]`, and −∂L/∂u, `[m]`, by the same integrals as the loss."""
        return State(*self._form.fields(self._vector("fast", fast), self._vector("slow", slow)))

    def fast_field(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Array:
        return self.fields(fast, slow).fast

    def slow_field(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Array:
        return self.fields(fast, slow).slow

    @double_precision
    @eqx.filter_jit
    def hessian(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, "n n"]:
        """The Hessian of the loss in (a, u), `[2m+1, 2m+1]`, by integrals too."""
        return self._form.hessian(self._vector("fast", fast), self._vector("slow", slow))

    def jacobian(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, "n n"]:
        """The Jacobian of `fields`: minus the Hessian of the loss."""
        return -self.hessian(fast, slow)

    # --- the critical manifold ----------------------------------------------------------------

    @double_precision
    @eqx.filter_jit
    def critical(self, slow: Float[Array, " m"]) -> Float[Array, " m1"]:
        """The critical manifold a*(u) = argmin_a L(a, u), `[m+1]`.

        The normal equations G a = b are solved and the solution refined. Where neurons coincide
        and the minimiser is not unique, this is the one of least norm, to which the fast flow
        from a = 0 converges. `condition` tells how well a* is determined: its relative error is
        about the machine epsilon times that number. In the paper's setting the factorisation of
        many neurons is a band, unless more than some 127 neighbours overlap.
        """
        return self._form.critical(self._vector("slow", slow))

    @double_precision
    @eqx.filter_jit
    def reduced_jacobian(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> Float[Array, "m m"]:
        split = self.neurons + 1
        hessian = self.hessian(fast, slow)
        cross = hessian[:split, split:]
        factor = _form.shifted_cholesky(hessian[:split, :split])
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
        return jnp.linalg.eigvalsh(self._form.gram(self._vector("slow", slow))[0])

    @double_precision
    @eqx.filter_jit
    def condition(self, slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The condition number of the Gram matrix G(u); infinite where neurons coincide."""
        return self._form.condition(self._vector("slow", slow))

    def sharp(self, slow: Float[Array, "lanes m"], tau: Float[Array, " T"]) -> dict[str, Any]:
        """ε → 0 and then η → 0, event by event; see docs/sharp_limit.md.

        It does not depend on which symmetric step from 0 to 1 tends to the sharp one.

        Raises:
            TypeError: the activation is not known to be such a step, or f* is not piecewise
                constant.
        """
        target = self.target
        if self.activation not in STEPS:
            raise TypeError(
                f"`sharp_limit` needs an activation that is a symmetric step from 0 to 1, one of "
                f"{', '.join(STEPS)}, got `{self.activation}`, which has no limit as η tends to 0 "
                f"or none that is known. Use `limit`."
            )
        if not isinstance(target, PiecewiseConstant):
            raise TypeError(
                f"`sharp_limit` needs a `PiecewiseConstant` target, got a `{type(target).__name__}`"
                f": its closed forms are for jumps. Use `limit` with a small `eta`."
            )
        return _sharp.sharp_trajectories(
            slow, tau, jnp.asarray(target.jumps), jnp.asarray(target.values)
        )

    def fastest_rate(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"], epsilon: Array
    ) -> Float[Array, ""]:
        """Of the weights at most 2 tr G/ε; of a neuron at rest on a jump w some 10 w²/η."""
        del fast
        trace, start = self._form.stiffness(slow)
        rest = 10.0 * jnp.max(self.target.steps() ** 2, initial=0.0) / self.eta
        return jnp.maximum(2.0 * trace / epsilon, jnp.maximum(start, rest))

    def solve_flow(self, engine: str, state: State, epsilon: Any, tau: Any, **setting: Any) -> Any:
        if engine == "loop":
            from tts_jax.problems import _banded_loop  # slow to import

            return _banded_loop.solve(self, state, epsilon, tau, **setting)
        return _banded_simd.solve(self, *state, epsilon, tau, **setting, on_gpu=engine == "cuda")

    def slow_scale(self) -> Float[ArrayLike, ""]:
        # a few widths: below it, position errors are seen by the steps of near neighbours
        scale = 4.0 * self.eta
        return scale if self._of_paper else jnp.minimum(scale, 1.0)

    def goal_radius(self) -> Float[ArrayLike, ""]:
        # a jump is recovered when a neuron is within one width of it
        self._require_goals()
        if self.activation == "relu":
            raise TypeError(
                "`hitting_times` needs its argument `radius` with the activation `relu`, which has "
                "no width that would tell when a knot is recovered. Pass for example `radius=0.01`."
            )
        return self.eta

    def reduced_observables(self, slow: Float[Array, " m"]) -> dict[str, Array]:
        return {"condition": self.condition(slow)}

    # --- observables --------------------------------------------------------------------------

    @double_precision
    def recovery(self, slow: Float[ArrayLike, "... m"]) -> Float[Array, "... goals"]:
        """Distance from each goal to its nearest neuron, `[..., goals]`, in units of x.

        The goals are the jumps of f*, or the knots inside (0, 1) where it bends, or its given
        breakpoints. A jump is recovered when this is at most η.

        Raises:
            TypeError: f* is a `Function` without breakpoints.
        """
        self._require_goals()
        slow, goals = jnp.asarray(slow), jnp.asarray(self.target.goals)
        return jnp.min(jnp.abs(goals[:, None] - slow[..., None, :]), axis=-1)

    def _require_goals(self) -> None:
        if not self.target.has_goals:
            raise TypeError(
                f"`{self.target.name}` has no places to recover: it is smooth. Use "
                f"`tts.Function(f, breakpoints=[...])` to name places where neurons should go."
            )

    def observables(self, fast: Array, slow: Float[Array, " m"]) -> dict[str, Array]:
        del fast
        return {"recovery": self.recovery(slow)} if self.target.has_goals else {}

    def axes(self) -> dict[str, tuple[str, ...]]:
        goal = (self.target.goal,)
        return self.dims | self.target.dims | {"recovery": goal, "hitting_time": goal}

    def coords(self) -> dict[str, Any]:
        return {
            "weight": np.arange(self.neurons + 1),
            "neuron": np.arange(1, self.neurons + 1),
            self.target.goal: self.target.goals,
        }

    def settings(self) -> dict[str, Any]:
        return {"eta": self.eta, "noise": self.noise, **quickly(self.target, "settings")}

    def notes(self) -> dict[str, str]:
        return {"activation": self.activation, "target": self.target.name}

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
        """The gradient of `sample_loss`; `"box"` is the estimator of the published code.

        Raises:
            ValueError: `"box"` for another activation than the cubic step.
        """
        return _univariate_sgd.sample_gradient(self, fast, slow, sample, gradient=gradient)

    def lane_start(self, state: State, **options: Any) -> Any:
        return _univariate_sgd.lane_start(self, state, **options)

    def lane_sample(self, shared: Any, fixed: Any, key: Any, step: Any) -> tuple[Array, Array]:
        return _univariate_sgd.lane_sample(shared, fixed, key, step)

    def lane_label(self, shared: Any, sample: tuple[Array, Array]) -> tuple[Array, Array]:
        return _univariate_sgd.lane_label(self, shared, sample)

    def lane_step(self, shared: Any, fixed: Any, carry: Any, point: Any, *, gradient: str) -> Any:
        return _univariate_sgd.lane_step(self, shared, fixed, carry, point, gradient=gradient)

    def lane_state(self, lanes: Any) -> tuple[State, np.ndarray]:
        return _univariate_sgd.lane_state(lanes)

    def _vector(self, name: str, value: Float[ArrayLike, " n"]) -> Float[Array, " n"]:
        """One state's `fast` or `slow`, whose length is checked."""
        value, size = jnp.asarray(value), self.neurons + (name == "fast")
        if value.shape != (size,):
            raise ValueError(
                f"Argument `{name}` must have shape {(size,)}, got {value.shape}. For a batch of "
                f"states map over it with `jax.vmap`."
            )
        return value
