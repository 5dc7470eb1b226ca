"""Gauss–Legendre quadrature on panels that follow the neurons.

A product of two functions that are polynomials of degree `NODES` − 1 on panels of their own, up to
rounding, is integrated to rounding by `NODES` Gauss nodes on every piece of the common refinement.
The panels of an activation are fixed in units of z = (x − u)/η, so that they move with the neuron,
and those of a target in x. Both are found once, from values: where a function is not such a
polynomial its panel is cut in two. How well that went at a state is then measured there by other
numbers of nodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tts_jax import checks


NODES = 12  # Gauss nodes of a panel, unless a polynomial needs fewer
FINEST = 2.0**-20  # panels are not cut further, in units of the first ones' total length


# --- functions --------------------------------------------------------------------------------


class _Held(eqx.Module):
    """A callable as a part of the form of a problem, not of its numbers."""

    function: Callable[[Array], Array] = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.function(x)


def held(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`function` as a pytree: an `equinox.Module` shows its numbers, anything else has none."""
    return cast(Any, function) if isinstance(function, eqx.Module) else _Held(function)


def released(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The callable that was given to `held`."""
    return function.function if isinstance(function, _Held) else function


def check_elementwise(name: str, function: Any, remedy: str) -> None:
    """Refuse what JAX cannot trace, or what does not give one real number per number.

    Raises:
        TypeError: it is not callable or cannot be traced.
        ValueError: it is not element-wise.
    """
    if not callable(function):
        raise TypeError(f"Argument `{name}` must be callable, got {function!r}. {remedy}")
    dtype = jnp.result_type(float)
    for shape in ((), (3, 2)):
        try:
            value = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, dtype))
        except Exception as error:
            raise TypeError(
                f"Argument `{name}` must be a function that JAX can trace, got {function!r}, which "
                f"raises {type(error).__name__} for an array of shape {shape}. {remedy}"
            ) from error
        real = jnp.issubdtype(getattr(value, "dtype", np.dtype(object)), jnp.floating)
        if getattr(value, "shape", None) != shape or not real:
            raise ValueError(
                f"Argument `{name}` must be element-wise and real, got {function!r}, which turns "
                f"shape {shape} into {value}. {remedy}"
            )


# --- panels of a function ---------------------------------------------------------------------


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of [0, 1] that determine a polynomial, other points, and the values there."""
    known = (1.0 - np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)) / 2.0
    other = (np.arange(NODES + 5) + 0.5) / (NODES + 5)
    powers = np.polynomial.chebyshev.chebvander
    values = powers(2 * other - 1, NODES - 1) @ np.linalg.inv(powers(2 * known - 1, NODES - 1))
    return known, other, values


def resolving_panels(
    function: Callable[[Array], Array], edges: Sequence[float], *, most: int
) -> tuple[float, ...] | None:
    """Inner ends of the panels on which `function` is a polynomial of degree `NODES` − 1.

    Panels are halved until it is one up to rounding of its largest value, down to `FINEST` or until
    there are `most`.

    Args:
        function: element-wise; smooth but at `edges`.
        edges: ends of the first panels, increasing; the outer ones are the ends of the range.

    Returns:
        All inner ends, or None where the function is not finite. The numbers of a function that
        are traced are unknown: then the panels are eight equal ones between edges.
    """
    if checks.is_traced(function):
        inner = np.unique(np.concatenate([np.linspace(a, b, 9) for a, b in _pairs(edges)]))
        return tuple(inner[1:-1].tolist())
    known, other, values = _tables()
    points = np.concatenate([known, other])
    smallest = FINEST * (edges[-1] - edges[0])
    waiting, done, scale = _pairs(edges), [], 0.0
    while len(waiting):
        low, high = waiting[:, :1], waiting[:, 1:]
        found = _evaluate(function, low + (high - low) * points)
        if not np.all(np.isfinite(found)):
            return None
        scale = scale or float(np.max(np.abs(found)))
        errors = np.max(np.abs(found[:, NODES:] - found[:, :NODES] @ values.T), axis=1)
        rough = (errors > 32.0 * np.finfo(float).eps * scale) & (high - low > smallest)[:, 0]
        if len(waiting) + len(done) + np.sum(rough) > most:
            rough &= False
        done += waiting[~rough].tolist()
        low, high = waiting[rough, 0], waiting[rough, 1]
        middle = (low + high) / 2.0
        waiting = np.concatenate([np.stack(p, axis=1) for p in ((low, middle), (middle, high))])
    return tuple(sorted(low for low, _ in done)[1:])


def _pairs(edges: Sequence[float]) -> np.ndarray:
    return np.stack([np.asarray(edges[:-1], float), np.asarray(edges[1:], float)], axis=1)


def _evaluate(function: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """`function` in float64, also while JAX traces something else."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(function(jnp.asarray(x, jnp.float64)), np.float64)


# --- panels of a problem ----------------------------------------------------------------------


class Panels(NamedTuple):
    """The intervals into which the breaks of neurons and target cut [0, 1].

    The breaks may be anywhere and coincide: a panel may be empty. Which breaks lie to the left
    of a panel is told by their order, not by the numbers, so that the integral over an empty
    panel has the right derivatives too.

    Attributes:
        edges: ends of the panels, `[panels + 1]`, from 0 to 1.
        own: how many breaks of each neuron lie to the left, `[panels, m]`.
        fixed: how many breaks of the target lie to the left, `[panels]`.
    """

    edges: Float[Array, " ends"]
    own: Array
    fixed: Array

    def nodes(self, count: int) -> tuple[Float[Array, "panels n"], Float[Array, "panels n"]]:
        """Gauss–Legendre nodes and weights."""
        z, weights = np.polynomial.legendre.leggauss(count)
        half = jnp.diff(self.edges)[:, None] / 2
        x = self.edges[:-1, None] + half * (1.0 + jnp.asarray(z, half.dtype))
        return x, half * jnp.asarray(weights, half.dtype)


def panels(
    slow: Float[Array, " m"],
    eta: Array,
    offsets: Sequence[float],
    fixed: Float[Array, " breaks"],
    others: Sequence[float] = (),
) -> Panels:
    """Panels between the breaks u_j + η · offsets, `fixed` and `others`, inside [0, 1]."""
    moving = slow[:, None] + eta * jnp.asarray(offsets, slow.dtype)
    every = jnp.concatenate([moving.ravel(), fixed, jnp.asarray(others, slow.dtype)])
    order = jnp.argsort(jax.lax.stop_gradient(every))
    edges = jnp.clip(every[order], 0.0, 1.0)
    edges = jnp.concatenate([jnp.zeros(1, edges.dtype), edges, jnp.ones(1, edges.dtype)])
    place = jnp.argsort(order)
    panel = jnp.arange(edges.size - 1)
    own, rest = place[: moving.size].reshape(moving.shape), place[moving.size :]
    left = jnp.sum(own < panel[:, None, None], axis=-1)
    return Panels(edges, left, jnp.sum(rest[: fixed.size] < panel[:, None], axis=-1))
