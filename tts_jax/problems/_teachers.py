"""Teacher densities of Barboni, Peyré & Vialard (2025, arXiv 2504.18208): two modes each.

Both are made of one bump on the circle, ρ_γ(θ) = √(1+γ) / (2π (1 + γ sin²(θ/2))), of unit mass. It
is uniform for γ = 0 and tends to a Dirac as γ → ∞. If a is uniform on (−π/2, π/2), then
θ = 2 atan2(sin a, √(1+γ) cos a) has density ρ_γ.
"""

import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax._random import typed_key


def wrap(x: Float[Array, "..."], period: float) -> Float[Array, "..."]:
    """`x` moved by multiples of `period` into [−period/2, period/2)."""
    half = period / 2
    moved = jnp.mod(x + half, period) - half
    # what is barely below −period/2 is rounded up to a whole period
    return jnp.where(moved >= half, -half, moved)


def _bump(theta: Float[Array, "..."], gamma: Float[Array, ""]) -> Float[Array, "..."]:
    """ρ_γ(θ)."""
    return jnp.sqrt(1 + gamma) / (2 * jnp.pi * (1 + gamma * jnp.sin(theta / 2) ** 2))


@functools.partial(jax.jit, static_argnums=1)
def _bump_angles(
    key: PRNGKeyArray, shape: tuple[int, ...], gamma: Float[Array, ""]
) -> Float[Array, "..."]:
    """Samples of ρ_γ in [−π, π]; zeros for γ = ∞."""
    a = jnp.pi * (jax.random.uniform(key, shape, jnp.result_type(gamma)) - 0.5)
    return 2 * jnp.arctan2(jnp.sin(a), jnp.sqrt(1 + gamma) * jnp.cos(a))


def _check_gamma(gamma: Float[ArrayLike, ""]) -> Array:
    """γ ≥ 0 or infinite, as one float64 number."""
    if not checks.is_traced(gamma) and np.array_equal(np.asarray(gamma), np.inf):
        return checks.as_float(gamma)
    remedy = "It is 0 for the uniform density and infinite for Diracs; the paper uses 10 to 1000."
    return checks.as_float(checks.nonnegative("gamma", gamma, remedy, single=True))


def _check_spread(gamma: Float[Array, ""]) -> None:
    if not checks.is_traced(gamma) and np.isinf(gamma):
        raise ValueError(
            "Argument `gamma` must be finite for a density, got inf: the modes are Diracs. Use "
            "`sample`, or a large `gamma`."
        )


class CircleTeacher(eqx.Module):
    """Two modes on the circle: 2/3 of the mass around 0 and 1/3 around 0.4π.

    μ̄_γ(θ) = (2/3) ρ_γ(θ) + (1/3) ρ_γ(θ − 0.4π) is the published 1/(1 + γ sin²(θ/2)) plus half the
    same at θ − 0.4π, normalised. It is a function of θ and can be given to `UltraFastDiffusion`.

    Attributes:
        gamma: γ, how sharp the modes are.
        modes: their places.
        weights: their masses.
    """

    gamma: Float[Array, ""]

    modes: ClassVar[tuple[float, float]] = (0.0, 0.4 * float(np.pi))
    weights: ClassVar[tuple[float, float]] = (2 / 3, 1 / 3)

    def __init__(self, gamma: Float[ArrayLike, ""] = 100.0) -> None:
        """Build a teacher.

        Raises:
            ValueError: `gamma` is negative, NaN, or not one number.
        """
        self.gamma = _check_gamma(gamma)

    @double_precision
    def __call__(self, theta: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The density per radian at `theta`, any shape, of mass 1 on the circle.

        Raises:
            ValueError: γ is infinite.
        """
        _check_spread(self.gamma)
        return _circle_density(jnp.asarray(theta), jnp.asarray(self.gamma))

    @double_precision
    def sample(self, key: PRNGKeyArray, count: int) -> Float[Array, " count"]:
        """Angles in [−π, π), `[count]`; numbers 1, 4, 7, … belong to the mode at 0.4π.

        As in the published code the modes are not drawn: of `count` samples exactly
        ⌊(count + 1)/3⌋ belong to the second. For γ = ∞ every sample sits on its mode.

        Raises:
            ValueError: `key` is no random key or `count` < 1.
        """
        count = checks.positive_integer("count", count, "The paper uses 4096.")
        angles = _bump_angles(typed_key(checks.random_key(key)), (count,), jnp.asarray(self.gamma))
        second = jnp.arange(count) % 3 == 1
        return wrap(angles + jnp.where(second, self.modes[1], self.modes[0]), 2 * np.pi)


class TorusTeacher(eqx.Module):
    """Two product modes on the torus R²/4Z², each of mass 1/2, around (−1, 0) and (1, 1).

    A coordinate x of a mode at c has the angle θ = π (x − c) in (−π, π), with density ρ_γ: a mode
    fills the square of side 2 around its centre, half the period of the torus. Outside these
    squares the density is 0.

    Attributes:
        gamma: γ, how sharp the modes are.
        modes: their centres.
        period: side of the torus.
    """

    gamma: Float[Array, ""]

    modes: ClassVar[tuple[tuple[float, float], ...]] = ((-1.0, 0.0), (1.0, 1.0))
    period: ClassVar[float] = 4.0

    def __init__(self, gamma: Float[ArrayLike, ""] = 100.0) -> None:
        """Build a teacher.

        Raises:
            ValueError: `gamma` is negative, NaN, or not one number.
        """
        self.gamma = _check_gamma(gamma)

    @double_precision
    def __call__(self, x: Float[ArrayLike, "... 2"]) -> Float[Array, "..."]:
        """The density per unit area at the points `x`, of mass 1 on the torus.

        Raises:
            ValueError: γ is infinite, or the points do not have two coordinates.
        """
        _check_spread(self.gamma)
        if np.ndim(x) == 0 or np.shape(x)[-1] != 2:
            raise ValueError(
                f"Argument `x` must be points with two coordinates, got shape {np.shape(x)}. Give "
                f"it shape `[..., 2]`."
            )
        return _torus_density(jnp.asarray(x), jnp.asarray(self.gamma))

    @double_precision
    def sample(self, key: PRNGKeyArray, count: int) -> Float[Array, "count 2"]:
        """Points in [−2, 2)², `[count, 2]`; even numbers belong to (−1, 0), odd ones to (1, 1).

        Raises:
            ValueError: `key` is no random key or `count` < 1.
        """
        count = checks.positive_integer("count", count, "The paper uses 4096.")
        angles = _bump_angles(
            typed_key(checks.random_key(key)), (count, 2), jnp.asarray(self.gamma)
        )
        centres = jnp.asarray(self.modes)[jnp.arange(count) % 2]
        return wrap(angles / np.pi + centres, self.period)


@jax.jit
def _circle_density(theta: Float[Array, "..."], gamma: Float[Array, ""]) -> Float[Array, "..."]:
    total = jnp.zeros(theta.shape)
    for weight, mode in zip(CircleTeacher.weights, CircleTeacher.modes, strict=True):
        total = total + weight * _bump(theta - mode, gamma)
    return total


@jax.jit
def _torus_density(x: Float[Array, "... 2"], gamma: Float[Array, ""]) -> Float[Array, "..."]:
    total = jnp.zeros(x.shape[:-1])
    for mode in TorusTeacher.modes:
        away = wrap(x - jnp.asarray(mode), TorusTeacher.period)
        inside = jnp.all(jnp.abs(away) < 1, axis=-1)
        product = jnp.prod(jnp.pi * _bump(jnp.pi * away, gamma), axis=-1)
        total = total + jnp.where(inside, product, 0.0) / len(TorusTeacher.modes)
    return total
