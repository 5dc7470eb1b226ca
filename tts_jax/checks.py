"""Argument checks at the public boundary: one sentence naming the argument, its value, the remedy.

    self.width = checks.positive_integer("width", width, "The paper has 2000.")
    self.eta = checks.as_float(checks.positive("eta", eta, "The paper has 4e-3.", single=True))

Checks look at concrete values only. A traced value (inside `jit`, `vmap`, `grad`) passes
through: its shape has been checked, its numbers cannot be.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def is_traced(*trees: Any) -> bool:
    """Whether any leaf of `trees` is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def inside_trace() -> bool:
    """Whether this code runs while JAX traces a function (new arrays come out as tracers)."""
    # the cheapest new array: every call asks this some times
    return isinstance(jax.lax.iota(np.int32, 1), jax.core.Tracer)


def as_float(value: Any) -> Any:
    """Concrete numbers as a NumPy float64 array (it keeps its digits whatever x64 says)."""
    return jnp.asarray(value) if is_traced(value) else np.asarray(value, dtype=np.float64)


def _show(value: Any) -> str:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        return repr(value)
    return f"{array.item()!r}" if array.ndim == 0 else np.array2string(array, threshold=8)


def argument_error(name: str, must: str, value: Any, remedy: str, bad: Any = None) -> ValueError:
    """The one wording of every refused argument; `bad` marks the refused entries of an array."""
    where = ""
    if bad is not None and np.ndim(bad) and np.any(bad):
        index = tuple(int(axis[0]) for axis in np.nonzero(bad))
        where = f" with {np.asarray(value)[index].item()!r} at index {list(index)}"
    return ValueError(f"Argument `{name}` must {must}, got {_show(value)}{where}. {remedy}")


def _numbers(name: str, value: Any, remedy: str) -> np.ndarray:
    """A concrete `value` as an array of floats."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise argument_error(name, "be an array of one shape", value, remedy) from None
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or np.issubdtype(array.dtype, np.integer)
    if array.size and not is_real:
        raise argument_error(name, "be made of real numbers", value, remedy)
    return array.astype(float)


def _single(name: str, value: Any, remedy: str) -> None:
    if is_traced(value) and np.ndim(value):
        raise ValueError(
            f"Argument `{name}` must be one number, got shape {np.shape(value)}. {remedy}"
        )
    if not is_traced(value) and _numbers(name, value, remedy).ndim:
        raise argument_error(name, "be one number", value, remedy)


def positive(name: str, value: Any, remedy: str, *, single: bool = False) -> Any:
    """Refuse a concrete `value` that is not finite and > 0 everywhere, or not one number."""
    if single:
        _single(name, value, remedy)
    if not is_traced(value):
        array = _numbers(name, value, remedy)
        good = np.isfinite(array) & (array > 0)
        if array.size == 0 or not np.all(good):
            raise argument_error(name, "be positive", value, remedy, ~good)
    return value


def nonnegative(name: str, value: Any, remedy: str, *, single: bool = False) -> Any:
    """Refuse a concrete `value` that is not finite and >= 0 everywhere, or not one number."""
    if single:
        _single(name, value, remedy)
    if not is_traced(value):
        array = _numbers(name, value, remedy)
        good = np.isfinite(array) & (array >= 0)
        if array.size == 0 or not np.all(good):
            raise argument_error(name, "be zero or positive", value, remedy, ~good)
    return value


def real(name: str, value: Any, remedy: str) -> Any:
    """Refuse a concrete `value` that is not made of real numbers."""
    if not is_traced(value):
        _numbers(name, value, remedy)
    return value


def finite(name: str, value: Any, remedy: str) -> Any:
    """Refuse a concrete `value` with a NaN or an infinity in it."""
    if not is_traced(value):
        good = np.isfinite(_numbers(name, value, remedy))
        if not np.all(good):
            raise argument_error(name, "be finite", value, remedy, ~good)
    return value


def integer(name: str, value: Any, least: int, remedy: str) -> int:
    """Refuse a `value` that is not an integer >= `least`."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise argument_error(name, f"be an integer of at least {least}", value, remedy)
    return int(value)


def positive_integer(name: str, value: Any, remedy: str) -> int:
    """Refuse a `value` that is not an integer >= 1."""
    return integer(name, value, 1, remedy)


def one_of(name: str, value: Any, allowed: Iterable[str], remedy: str = "") -> str:
    """Refuse a `value` that is not among `allowed`."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        advice = f" {remedy}" if remedy else ""
        raise ValueError(f"Argument `{name}` must be one of {choices}, got {value!r}.{advice}")
    return value


def random_key(key: Any) -> Any:
    """Refuse what is not a random key or an array of keys."""
    if not isinstance(key, jax.Array):
        raise ValueError(
            f"Argument `key` must be a random key, got {key!r}. Pass for example "
            f"`key=jax.random.key(0)`."
        )
    return key


def instance(name: str, value: Any, kind: type, remedy: str) -> Any:
    """Refuse a `value` that is not a `kind`."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        got = repr(value) if len(repr(value)) < 80 else f"a `{type(value).__name__}`"
        raise TypeError(
            f"Argument `{name}` must be {article} `{kind.__name__}`, got {got}. {remedy}"
        )
    return value


def increasing_times(
    tau: Any, name: str = "tau", example: str = "jnp.linspace(0, 0.035, 101)"
) -> Any:
    """Refuse recorded times that are not a strictly increasing vector of numbers >= 0."""
    if not is_traced(tau):
        _numbers(name, tau, f"Pass for example `{example}`.")
    if np.ndim(tau) != 1 or np.shape(tau)[0] == 0:
        raise ValueError(
            f"Argument `{name}` must be a vector of at least one recorded time, got shape "
            f"{np.shape(tau)}. Pass for example `{example}`."
        )
    if not is_traced(tau):
        array = np.asarray(tau, dtype=float)
        good = np.isfinite(array) & (array >= 0) & (np.diff(array, prepend=-np.inf) > 0)
        if not np.all(good):
            raise argument_error(
                name,
                "be finite, non-negative and strictly increasing",
                tau,
                "Sort the recorded times and drop repeated ones.",
                ~good,
            )
    return tau
