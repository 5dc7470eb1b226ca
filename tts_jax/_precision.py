"""Float64 without global flags: public calls enter JAX's local x64 context by themselves."""

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tts_jax.checks import inside_trace, is_traced


P = ParamSpec("P")
R = TypeVar("R")
_calls = threading.local()


def _to_host(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) and _is_real(leaf) else leaf


def _is_real(leaf: jax.Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def double_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` in float64 whenever it is called with concrete values.

    With `jax_enable_x64` on, nothing is changed. With it off, a top-level call runs inside
    `jax.enable_x64(True)` and its arrays come back as NumPy arrays, which keep their 64 bits
    outside that context (a float64 `jax.Array` would be cut to float32 by the next
    operation on it). Under a transformation the dtypes of the arguments decide.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if jax.config.read("jax_enable_x64") or is_traced(args, kwargs) or inside_trace():
            return function(*args, **kwargs)
        with jax.enable_x64(True):
            outer, _calls.on_host = on_host(), True
            try:
                return jax.tree.map(_to_host, function(*args, **kwargs))
            finally:
                _calls.on_host = outer

    return wrapper


def on_host() -> bool:
    """Whether the arrays of the call that runs will be NumPy's, so that none need be JAX's."""
    return getattr(_calls, "on_host", False)


def require_double_precision(who: str, *trees: Any) -> None:
    """Refuse to trace a stiff or exact solve in float32.

    Raises:
        RuntimeError: inside a transformation while `jax_enable_x64` is off.
    """
    if not jax.config.read("jax_enable_x64") and (is_traced(trees) or inside_trace()):
        raise RuntimeError(
            f"`{who}` needs float64, but it is being traced (inside `jit`, `vmap` or `grad`) "
            f"while `jax_enable_x64` is off, so its arrays would be float32. Call "
            f"`jax.config.update('jax_enable_x64', True)` at the start of your program, or "
            f"wrap the call of the transformed function in `with jax.enable_x64(True):`, or "
            f"call `{who}` directly: it takes batched states by itself."
        )
