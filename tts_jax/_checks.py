"""Argument checks at the public boundary: one sentence naming the argument, its value, the remedy.

Checks look at concrete values only. A traced value (inside `jit`, `vmap`, `grad`) passes
through: its shape has been checked, its numbers cannot be.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(*trees: Any) -> bool:
    """Whether any leaf of `trees` is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def inside_trace() -> bool:
    """Whether this code runs while JAX traces a function (new arrays come out as tracers)."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _show(value: Any) -> str:
    array = np.asarray(value)
    return f"{array.item()!r}" if array.ndim == 0 else np.array2string(array, threshold=8)


def argument_error(name: str, must: str, value: Any, remedy: str) -> ValueError:
    """The one wording of every refused argument."""
    return ValueError(f"Argument `{name}` must {must}, got {_show(value)}. {remedy}")


def positive(name: str, value: Any, remedy: str) -> Any:
    """Refuse a concrete `value` that is not finite and > 0 everywhere."""
    if not is_traced(value):
        array = np.asarray(value, dtype=float)
        if array.size == 0 or not np.all(np.isfinite(array) & (array > 0)):
            raise argument_error(name, "be positive", value, remedy)
    return value


def nonnegative(name: str, value: Any, remedy: str) -> Any:
    """Refuse a concrete `value` that is not finite and >= 0 everywhere."""
    if not is_traced(value):
        array = np.asarray(value, dtype=float)
        if array.size == 0 or not np.all(np.isfinite(array) & (array >= 0)):
            raise argument_error(name, "be zero or positive", value, remedy)
    return value


def finite(name: str, value: Any, remedy: str) -> Any:
    """Refuse a concrete `value` with a NaN or an infinity in it."""
    if not is_traced(value):
        array = np.asarray(value, dtype=float)
        if not np.all(np.isfinite(array)):
            raise argument_error(name, "be finite", value, remedy)
    return value


def positive_integer(name: str, value: Any, remedy: str) -> int:
    """Refuse a `value` that is not an integer >= 1."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise argument_error(name, "be an integer of at least 1", value, remedy)
    return int(value)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Refuse a `value` that is not among `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"Argument `{name}` must be one of {choices}, got {value!r}.")
    return value


def increasing_times(tau: Any) -> Any:
    """Refuse recorded times that are not a strictly increasing vector of numbers >= 0."""
    if np.ndim(tau) != 1 or np.shape(tau)[0] == 0:
        raise ValueError(
            f"Argument `tau` must be a vector of at least one recorded time, got shape "
            f"{np.shape(tau)}. Pass for example `jnp.linspace(0, 0.035, 101)`."
        )
    if not is_traced(tau):
        array = np.asarray(tau, dtype=float)
        if not np.all(np.isfinite(array)) or array[0] < 0 or np.any(np.diff(array) <= 0):
            raise argument_error(
                "tau",
                "be finite, non-negative and strictly increasing",
                tau,
                "Sort the recorded times and drop repeated ones.",
            )
    return tau
