"""Activations σ(z) by name: element-wise functions that JAX differentiates exactly.

All steps rise from 0 to 1 and are symmetric about z = 0, σ(−z) = 1 − σ(z); a network divides by
the width η first, z = (x − u)/η.

| name | σ(z) |
|---|---|
| `cubic` | the cubic step of the published code: 0 below −½, 1 above ½, σ′(0) = 3 |
| `ramp` | the linear step max(0, min(1, z + ½)) |
| `logistic` | 1/(1 + e⁻ᶻ) |
| `erf` | (1 + erf z)/2 |
| `relu` | max(0, z); not a step |
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tts_jax import checks
from tts_jax.problems import _step


Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def ramp(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(0, min(1, z + ½))."""
    return jnp.clip(z + 0.5, 0.0, 1.0)


def erf(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """(1 + erf z)/2, accurate in the lower tail too."""
    return 0.5 * jax.scipy.special.erfc(-z)


ACTIVATIONS = MappingProxyType(
    {
        "cubic": _step.step,
        "ramp": ramp,
        "logistic": jax.nn.sigmoid,
        "erf": erf,
        "relu": jax.nn.relu,
    }
)


class Transition(NamedTuple):
    """Where σ is neither 0 nor a straight line: it is 0 left of `start`, and `level + slope z`
    right of `end`."""

    start: float
    end: float
    level: float
    slope: float


_UNBOUNDED = Transition(-math.inf, math.inf, 0.0, 0.0)
_TRANSITIONS = {
    "cubic": Transition(-0.5, 0.5, 1.0, 0.0),
    "ramp": Transition(-0.5, 0.5, 1.0, 0.0),
    "relu": Transition(0.0, 0.0, 0.0, 1.0),
}


def transition_of(activation: Any) -> Transition:
    """The transition of an activation, by its name; unbounded where none is known."""
    return _TRANSITIONS.get(activation, _UNBOUNDED) if isinstance(activation, str) else _UNBOUNDED


def derivative(activation: Activation, z: Float[Array, "..."]) -> Float[Array, "..."]:
    """σ′(z), element by element."""
    return jax.jvp(activation, (z,), (jnp.ones_like(z),))[1]


def activation_of(activation: str | Activation) -> Activation:
    """The function that a name, or a callable itself, stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(activation, str):
        return ACTIVATIONS[checks.one_of("activation", activation, tuple(ACTIVATIONS))]
    if not callable(activation):
        raise TypeError(
            f"Argument `activation` must be a name or a callable, got {activation!r}. Use one of "
            f"{', '.join(ACTIVATIONS)}, or an element-wise function of z."
        )
    return activation


def name_of(activation: Any) -> str:
    """The name under which results are labelled."""
    return activation if isinstance(activation, str) else getattr(activation, "__name__", "custom")
