"""Marion, Korba, Bartlett et al. (AISTATS 2025, arXiv 2402.05468), §5.1: implicit diffusion.

A sampler is trained while it samples. Particles x_i in the plane (fast) take Langevin steps with
the potential V(·, θ), whose stationary law π(θ) is a mixture of six unit Gaussians on a hexagon;
the logits θ (slow) of their weights climb the mean of a reward R that need not be smooth:

    V(x, θ) = −log Σ_i softmax(θ)_i exp(−|x − c_i|²/2),    c_i = 4 (cos 60°i, sin 60°i)
    F(θ)    = −E_π(θ) R + β KL(p_ref | π(θ)).

What eliminates the fast variable is not a minimiser but a law, y*(θ) = π(θ), and the gradient comes
from moments under it, with no derivative of R or of the sampler (the score function; eq. (7)):

    ∇F = Cov_π(R, ∇_θ V) + β (E_ref ∇_θ V − E_π ∇_θ V).

The fast loss is Σ_i V(x_i, θ) and the temperature 1, so that a fast step of size γ is the published
x ← x − γ ∇V + √(2γ) z, and ε = η/γ. `regime.Inner(1)`, which moves the particles first and takes
the gradient at the new ones, is the published single loop, `Inner(k)` the nested loop.

Arrays of particles have the axis of the particles last, `[2, n]`, over which the loops then run.
"""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import AbstractProblem, State, checks
from tts_jax.fast import AbstractFastSolver, Solution


_ANGLES = np.arange(6) * np.pi / 3
CENTERS = 4.0 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])  # [2, 6]
START = np.array([1.5, 0.0, 1.5, 0.0, 1.5, 0.0])

_REWARDS = ("hard", "smooth")
_PLACE, _SPREAD = (4.0, 3.8), 10.0  # of the reward: its middle and its variance
_SPACING = 0.2  # of the grids of integrals over the plane


class ImplicitSample(NamedTuple):
    """The random numbers of one step; a regime computes only those that it uses.

    Attributes:
        uniform: `[n]`, and
        normal: `[2, n]`, from which exact samples of π(θ) are made (`Equilibrium`).
        reference: samples of p_ref, `[2, reference_batch]`.
    """

    uniform: Float[Array, " n"]
    normal: Float[Array, "2 n"]
    reference: Float[Array, "2 m"]


class Equilibrium(AbstractFastSolver):
    """Exact samples of π(θ): a mode by the inverse of the distribution function, and a normal.

    The random numbers are those of the sample of the step, or, without one, fixed and evenly
    spread (`ImplicitDiffusion.critical`).
    """

    def solve(
        self,
        problem: AbstractProblem,
        slow: Any,
        sample: Any = None,
        start: Any = None,
    ) -> Solution:
        del start
        if not isinstance(problem, ImplicitDiffusion):
            raise TypeError(
                f"`Equilibrium` samples the stationary law of `ImplicitDiffusion`, got a "
                f"`{type(problem).__name__}`. Use another solver of `tts.fast`."
            )
        if sample is None:
            return Solution(problem.critical(slow), {})
        return Solution(problem.equilibrium(slow, sample.uniform, sample.normal), {})


class ImplicitDiffusion(AbstractProblem):
    """A Langevin sampler of a mixture of six Gaussians whose weights climb a reward.

    `sgd(regime=regime.Inner(1))` with `step_size` γ = 0.2 and `epsilon` η/γ = 0.5 is the published
    single loop; `limit` the exact gradient flow of F, whose integrals are closed forms or
    quadratures; `sgd(regime="limit")` takes steps with exact samples of π(θ). `flow` is not for
    Langevin dynamics.

    Attributes:
        particles: their number n, published 1000.
        reward: `"hard"`, R(x) = 1[x₁ ≥ 0] exp(−|x − (4, 3.8)|²/20)/2.5, as published, or
            `"smooth"`, with the sigmoid of 2x₁ in place of the indicator, over 0.7.
        penalty: β ≥ 0, the weight of KL(p_ref | π(θ)).
        reference_std: standard deviation of the modes of p_ref, which have the weights
            softmax(1.5, 0, 1.5, 0, 1.5, 0). 1 is that of π(θ); the published sampler has 2.
        reference_batch: samples of p_ref per step, published 1; 0 takes its expectation by
            quadrature.
        published_sign: the published code adds the gradient of the penalty where it should
            subtract it, and so climbs KL(p_ref | π(θ)); `True` does so.
    """

    particles: int = eqx.field(static=True, default=1000)
    reward: str = eqx.field(static=True, default="hard")
    penalty: Float[ArrayLike, ""] = 0.0
    reference_std: float = eqx.field(static=True, default=1.0)
    reference_batch: int = eqx.field(static=True, default=0)
    published_sign: bool = eqx.field(static=True, default=False)

    dims: ClassVar = {
        "fast": ("axis", "particle"),
        "slow": ("mode",),
        "weights": ("mode",),
    }

    def __check_init__(self) -> None:
        """Refuse settings that make no problem.

        Raises:
            ValueError: `particles` < 2, an unknown `reward`, `penalty` < 0, `reference_std` out of
                its range or `reference_batch` < 0.
        """
        checks.integer(
            "particles", self.particles, 2, "A covariance needs two; the paper has 1000."
        )
        checks.integer("reference_batch", self.reference_batch, 0, "0 is the exact expectation.")
        checks.one_of("reward", self.reward, _REWARDS, "The paper's figures have 'hard'.")
        remedy = "For the published sign use `published_sign=True`."
        checks.nonnegative("penalty", self.penalty, remedy, single=True)
        if not 0.2 <= self.reference_std <= 2.0:
            raise ValueError(
                f"Argument `reference_std` must be from 0.2 to 2, got {self.reference_std!r}. 1 "
                f"is that of the modes; the published sampler has 2."
            )

    # --- states -------------------------------------------------------------------------------

    def init(self, *, key: PRNGKeyArray) -> State:
        """Standard normal particles and the published logits (1.5, 0, 1.5, 0, 1.5, 0)."""
        fast = jax.random.normal(key, (2, self.particles))
        return State(fast, _like(START, fast))

    @property
    def temperature(self) -> State:
        return State(1.0, None)

    @property
    def fast_solver(self) -> Equilibrium:
        return Equilibrium()

    def critical(self, slow: Float[Array, " 6"]) -> Float[Array, "2 n"]:
        """n points that stand for π(θ): what `limit` records.

        Their modes are those of evenly spaced uniforms, so that a mode has n softmax(θ)_i of them
        up to one, and their normals come from a Kronecker sequence. The points play no
        part in the reduced flow.
        """
        dtype = jnp.result_type(slow)
        index = jnp.arange(self.particles)
        # inverse powers of the plastic number, times 2³²: multiples spread evenly over the square
        steps = np.array([[0xC13FA9A9], [0x91E10DA6]], np.uint32)
        words = steps * (index + 1).astype(jnp.uint32)
        places = words.astype(dtype) * 2.0**-32
        normal = jax.scipy.special.ndtri(jnp.clip(places, 1e-6, 1.0 - 1e-6))
        return self.equilibrium(slow, (index.astype(dtype) + 0.5) / self.particles, normal)

    def equilibrium(
        self,
        slow: Float[Array, " 6"],
        uniform: Float[Array, " n"],
        normal: Float[Array, "2 n"],
    ) -> Float[Array, "2 n"]:
        """Points of π(θ), made of uniform and normal random numbers."""
        below = jnp.cumsum(jax.nn.softmax(slow))[:-1]
        mode = jnp.sum(uniform >= below[:, None], axis=0)
        return _like(CENTERS, normal)[:, mode] + normal

    # --- potential, reward, penalty -----------------------------------------------------------

    def potential(self, x: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Float[Array, " n"]:
        """V(x_i, θ)."""
        square = jnp.sum((x[:, None, :] - _like(CENTERS, x)[:, :, None]) ** 2, axis=0)
        return -jax.nn.logsumexp(jax.nn.log_softmax(slow)[:, None] - square / 2.0, axis=0)

    def posterior(self, x: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Float[Array, "6 n"]:
        """The probability of each mode given x_i.

        It has both gradients: ∇_x V = x − Σ_i p_i(x) c_i and ∇_θ V = softmax(θ) − p(x).
        """
        # the centres have one length, which drops out as |x|² does
        return jax.nn.softmax(slow[:, None] + _like(CENTERS.T, x) @ x, axis=0)

    def rewards(self, x: Float[Array, "2 n"]) -> Float[Array, " n"]:
        """R(x_i)."""
        first, second = x
        square = (first - _PLACE[0]) ** 2 + (second - _PLACE[1]) ** 2
        bump = jnp.exp(-square / (2.0 * _SPREAD))
        if self.reward == "hard":
            return jnp.where(first >= 0.0, bump, 0.0) / 2.5
        return jax.nn.sigmoid(2.0 * first) * bump / 0.7

    def expected_reward(self, slow: Float[Array, " 6"]) -> Float[Array, ""]:
        """E_π(θ) R = Σ_i softmax(θ)_i r_i with the rewards r_i of the modes, to rounding."""
        return jax.nn.softmax(slow) @ _like(mode_rewards(self.reward), slow)

    def divergence(self, slow: Float[Array, " 6"]) -> Float[Array, ""]:
        """KL(p_ref | π(θ)), by the trapezoidal rule."""
        weights, mixture = self._on_grid(slow)
        constant = _reference(self.reference_std).constant
        return constant - jnp.sum(weights * jnp.log(mixture))

    @property
    def signed_penalty(self) -> Array:
        """β, or −β with the published sign."""
        penalty = jnp.asarray(self.penalty)
        return -penalty if self.published_sign else penalty

    # --- the dynamics -------------------------------------------------------------------------

    def loss(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Float[Array, ""]:
        """−mean R(x_i) + β KL(p_ref | π(θ)), with −β for the published sign.

        The particles stand for π(θ), so that the derivative in θ of this expression is not that of
        F: `slow_field` has the score-function gradient.
        """
        loss = -jnp.mean(self.rewards(fast))
        return loss + self.signed_penalty * self.divergence(slow) if self._penalised else loss

    def fast_loss(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Float[Array, ""]:
        """Σ_i V(x_i, θ)."""
        return jnp.sum(self.potential(fast, slow))

    def fast_field(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Array:
        """−∇_x V at every particle: the drift of the Langevin dynamics."""
        return _like(CENTERS, fast) @ self.posterior(fast, slow) - fast

    def slow_field(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> Array:
        """Minus the score-function gradient, with moments over the particles for E_π."""
        return -self._slope(self.posterior(fast, slow), fast, slow, None)

    def fields(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> State:
        return State(self.fast_field(fast, slow), self.slow_field(fast, slow))

    def sample(self, *, key: PRNGKeyArray, step: Any) -> ImplicitSample:
        """The random numbers of one step, of `key` and `step`."""
        one, two, three, four = jax.random.split(jax.random.fold_in(key, step), 4)
        weights = jax.nn.softmax(jnp.asarray(START))
        mode = jax.random.choice(three, weights.size, (self.reference_batch,), p=weights)
        spread = self.reference_std * jax.random.normal(four, (2, self.reference_batch))
        return ImplicitSample(
            jax.random.uniform(one, (self.particles,)),
            jax.random.normal(two, (2, self.particles)),
            _like(CENTERS, spread)[:, mode] + spread,
        )

    def sample_loss(
        self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"], sample: ImplicitSample
    ) -> Float[Array, ""]:
        """`loss`: what is random is in the particles."""
        del sample
        return self.loss(fast, slow)

    def sample_fast_loss(
        self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"], sample: ImplicitSample
    ) -> Float[Array, ""]:
        """Σ_i V(x_i, θ)."""
        del sample
        return self.fast_loss(fast, slow)

    def sample_gradient(
        self,
        fast: Float[Array, "2 n"],
        slow: Float[Array, " 6"],
        sample: ImplicitSample,
        *,
        gradient: str = "exact",
    ) -> State:
        """∇_x V at every particle, and the score-function gradient in θ."""
        del gradient
        posterior = self.posterior(fast, slow)
        drift = fast - _like(CENTERS, fast) @ posterior
        return State(drift, self._slope(posterior, fast, slow, sample.reference))

    def _slope(
        self,
        posterior: Float[Array, "6 n"],
        fast: Float[Array, "2 n"],
        slow: Float[Array, " 6"],
        reference: Float[Array, "2 m"] | None,
    ) -> Float[Array, " 6"]:
        # softmax(θ), the constant part of ∇_θ V, drops out of the covariance and of the difference
        rewards = self.rewards(fast)
        slope = posterior @ (jnp.mean(rewards) - rewards) / self.particles
        if not self._penalised:
            return slope
        pull = jnp.mean(posterior, axis=1) - self._expected_posterior(slow, reference)
        return slope + self.signed_penalty.astype(slope.dtype) * pull

    def _expected_posterior(
        self, slow: Float[Array, " 6"], reference: Float[Array, "2 m"] | None
    ) -> Float[Array, " 6"]:
        """E_ref p(x), over the samples of a step if there are any."""
        if reference is not None and self.reference_batch:
            return jnp.mean(self.posterior(reference, slow), axis=1)
        weights, mixture = self._on_grid(slow)
        first, second = _like(_reference(self.reference_std).factors, slow)
        return jax.nn.softmax(slow) * jnp.sum(first @ (weights / mixture) * second, axis=1)

    def _on_grid(self, slow: Float[Array, " 6"]) -> tuple[Float[Array, "k k"], Float[Array, "k k"]]:
        """The weights of an integral over p_ref, and Σ_i softmax(θ)_i exp(x·c_i)."""
        grid = _reference(self.reference_std)
        weights, factors = (_like(part, slow) for part in grid[:2])
        mixture = (jax.nn.softmax(slow)[:, None] * factors[0]).T @ factors[1]
        return weights, jnp.where(weights > 0.0, mixture, 1.0)

    @property
    def _penalised(self) -> bool:
        return isinstance(self.penalty, jax.Array) or bool(np.any(np.asarray(self.penalty) != 0))

    # --- the limit ----------------------------------------------------------------------------

    def reduced_loss(self, slow: Float[Array, " 6"]) -> Float[Array, ""]:
        """F(θ), exactly."""
        loss = -self.expected_reward(slow)
        return loss + self.signed_penalty * self.divergence(slow) if self._penalised else loss

    def reduced_field(self, slow: Float[Array, " 6"]) -> Float[Array, " 6"]:
        """−∇F(θ)."""
        return -jax.grad(self.reduced_loss)(slow)

    def reduced_jacobian(
        self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]
    ) -> Float[Array, "6 6"]:
        del fast
        return jax.jacfwd(self.reduced_field)(slow)

    def reduced_observables(self, slow: Float[Array, " 6"]) -> dict[str, Array]:
        return {"reduced_loss": self.reduced_loss(slow)}

    def relaxation_rate(
        self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]
    ) -> Float[Array, ""]:
        """About the spectral gap of the Langevin dynamics in π(θ), which is how slowly
        particles change over from mode to mode.

        The gap is the least E_π |∇f|² over functions f of variance 1. Here f is a combination of
        x and of the posteriors at the temperatures 1 and 2, so that the answer is an upper
        bound, some percent above.
        """
        del fast
        return _spectral_gap(slow)

    # --- what is recorded ---------------------------------------------------------------------

    def observables(self, fast: Float[Array, "2 n"], slow: Float[Array, " 6"]) -> dict[str, Array]:
        """The mean reward of the particles, E_π R and KL(p_ref | π) of θ, the weights."""
        return {
            "mean_reward": jnp.mean(self.rewards(fast)),
            "expected_reward": self.expected_reward(slow),
            "divergence": jax.custom_batching.sequential_vmap(self.divergence)(slow),
            "weights": jax.nn.softmax(slow),
        }

    def coords(self) -> dict[str, Any]:
        return {"mode": np.rint(np.degrees(_ANGLES))}

    def settings(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            "reference_std": self.reference_std,
            "reference_batch": self.reference_batch,
            "published_sign": self.published_sign,
        }

    def notes(self) -> dict[str, str]:
        return {"reward": self.reward}


# --- integrals ------------------------------------------------------------------------------------


def mode_rewards(reward: str) -> Float[np.ndarray, " 6"]:
    """r_i = E R(c_i + z) of the modes, z standard normal.

    R is a product of functions of x₁ and x₂. The second integral is Gaussian; so is the
    first of the hard reward, of a normal cut off at 0; that of the smooth one is by the trapezoidal
    rule, whose error is about exp(−π²/spacing) by the poles of the sigmoid at ±iπ/2.
    """
    total = 1.0 + _SPREAD  # variances of the mode and of the reward
    middle, shared = np.reshape(_PLACE, (2, 1)), _SPREAD / total
    bumps = np.prod(np.sqrt(shared) * np.exp(-((CENTERS - middle) ** 2) / (2.0 * total)), axis=0)
    # of x₁, mode and reward together are a multiple of a normal of this mean and variance
    mean = (_SPREAD * CENTERS[0] + middle[0]) / total
    if reward == "hard":
        inside = [0.5 * math.erfc(-m / math.sqrt(2.0 * shared)) for m in mean]
        return bumps * np.array(inside) / 2.5
    z = np.arange(-10.0, 10.0 + 0.05, 0.1)
    normal = np.exp(-(z**2) / 2.0) * 0.1 / math.sqrt(2.0 * math.pi)
    at = mean[:, None] + math.sqrt(shared) * z
    return bumps * ((1.0 / (1.0 + np.exp(-2.0 * at))) @ normal) / 0.7


class _Grid(NamedTuple):
    """A grid for integrals over p_ref.

    Attributes:
        weights: `[k, k]`, 0 where there is next to nothing.
        factors: exp(x c) of both coordinates and the six centres, `[2, 6, k]`.
        constant: what of KL(p_ref | π(θ)) does not depend on θ.
    """

    weights: np.ndarray
    factors: np.ndarray
    constant: float


@functools.lru_cache(maxsize=16)
def _reference(std: float) -> _Grid:
    spacing = min(_SPACING, std / 4.0)
    steps = math.ceil((4.0 + 8.5 * std) / spacing)
    side = spacing * np.arange(-steps, steps + 1)
    gaussians = np.exp(-((side - CENTERS[:, :, None]) ** 2) / (2.0 * std**2))
    mixture = np.exp(START) / np.sum(np.exp(START)) / (2.0 * math.pi * std**2)
    density = (mixture[:, None] * gaussians[0]).T @ gaussians[1]
    weights = density * spacing**2
    weights[weights < 1e-17] = 0.0
    log = np.log(density, where=weights > 0.0, out=np.zeros_like(density))
    # V = |x|²/2 + 8 − log Σ_i softmax(θ)_i exp(x·c_i), the centres being 4 long
    square = (side[:, None] ** 2 + side**2) / 2.0 + 8.0
    constant = float(np.sum(weights * (log + square))) + math.log(2.0 * math.pi)
    return _Grid(weights, np.exp(side * CENTERS[:, :, None]), constant)


@jax.custom_batching.sequential_vmap
def _spectral_gap(slow: Float[Array, " 6"]) -> Float[Array, ""]:
    """What `relaxation_rate` answers; one state after the other, for the sake of memory."""
    side = np.arange(-10.0, 10.0 + _SPACING / 2, _SPACING)
    x = _like(np.stack(np.meshgrid(side, side)).reshape(2, -1), slow)
    centers = _like(CENTERS, slow)
    logits = slow[:, None] + centers.T @ x
    square = jnp.sum(x**2, axis=0) / 2.0
    density = jnp.exp(jax.nn.logsumexp(logits, axis=0) - square)
    density = density / jnp.sum(density)
    flat = jnp.broadcast_to(jnp.eye(2, dtype=x.dtype)[:, :, None], (2, 2, x.shape[1]))
    values, slopes = [x], [flat]
    for cool in (0.5, 1.0):
        p = jax.nn.softmax(cool * logits, axis=0)
        values.append(p)
        slopes.append(cool * p * (centers[:, :, None] - (centers @ p)[:, None]))
    value, slope = jnp.concatenate(values), jnp.concatenate(slopes, axis=1)
    value = value - (value @ density)[:, None]
    scale = jnp.sqrt(value**2 @ density)[:, None]
    value, slope = value / scale, slope / scale
    variance = (value * density) @ value.T
    energy = jnp.sum((slope * density) @ jnp.swapaxes(slope, 1, 2), axis=0)
    # combinations of next to no variance are constants up to rounding
    eigenvalues, vectors = jnp.linalg.eigh(variance)
    kept = eigenvalues > jnp.sqrt(jnp.finfo(eigenvalues.dtype).eps)
    vectors = vectors * jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, eigenvalues, 1.0)), 0.0)
    energy = vectors.T @ energy @ vectors + jnp.diag(jnp.where(kept, 0.0, 1e3))
    return jnp.linalg.eigvalsh(energy)[0]


def _like(constant: Any, array: Any) -> Array:
    """A constant in the precision in which JAX takes the array."""
    return jnp.asarray(constant, jnp.result_type(array))
