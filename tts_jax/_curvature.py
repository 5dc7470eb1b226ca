"""The smallest curvature of the reduced loss, without its Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tts_jax import checks
from tts_jax._problem import AbstractProblem
from tts_jax.geometry import Euclidean, Particles


class Curvature(NamedTuple):
    """What `smallest_curvature` found.

    Attributes:
        value: the smallest eigenvalue, approached from above.
        residual: |Av − value · v|: some eigenvalue is that near to `value`.
        vector: v, of norm 1, in the form of the slow variable.
    """

    value: Float[Array, "..."]
    residual: Float[Array, "..."]
    vector: PyTree[Array]


def smallest_curvature(
    problem: AbstractProblem, slow: PyTree[Array], *, key: PRNGKeyArray, steps: int = 64
) -> Curvature:
    """The smallest eigenvalue of A, the Hessian of the loss on the critical manifold.

    For `Particles` it is N times the Hessian in the particles, the curvature in the Wasserstein
    geometry. In either geometry −A is the Jacobian of the reduced flow: from near a critical point
    the slow variable leaves along v at the rate −value. By the Lanczos method with full
    reorthogonalisation: `steps` products Av, each a directional derivative of
    `problem.reduced_field`, and `steps` vectors of the size of the slow variable.

    Args:
        problem: its slow variable is free (`Euclidean`), or particles that are (`Particles`).
        slow: slow variables with any leading batch axes, which are taken one after the other.
        key: for the first vector.
        steps: of the Lanczos method.

    Returns:
        A `Curvature` with the batch axes of `slow`. Where `residual` is too large, raise `steps`.

    Raises:
        ValueError: another geometry, `steps` < 1, or wrong shapes.
    """
    geometry = problem.geometry
    if not isinstance(getattr(geometry, "of", geometry), Euclidean):
        raise ValueError(
            f"Argument `problem` must have the geometry `Euclidean()` or `Particles()`, got "
            f"{geometry}: elsewhere the Jacobian of the reduced flow need not be symmetric."
        )
    steps = checks.positive_integer("steps", steps, "It is a number of products; use e.g. 64.")
    form = problem.structure().slow
    if jax.tree.structure(form) != jax.tree.structure(slow):
        raise ValueError(
            f"Argument `slow` must have the structure {jax.tree.structure(form)}, got "
            f"{jax.tree.structure(slow)}."
        )
    leaves, forms = jax.tree.leaves(slow), jax.tree.leaves(form)
    batch = np.shape(leaves[0])[: np.ndim(leaves[0]) - forms[0].ndim]
    for leaf, one in zip(leaves, forms, strict=True):
        if np.shape(leaf) != (*batch, *one.shape):
            raise ValueError(
                f"Argument `slow` must have leaves whose trailing axes are {one.shape} and whose "
                f"leading ones are alike, got shape {np.shape(leaf)}."
            )
    if isinstance(geometry, Particles) and len({one.shape[0] for one in forms}) > 1:
        raise ValueError(
            f"Argument `problem` must have the same number of particles in every entry of its slow "
            f"variable, got {[one.shape for one in forms]}."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((problem, slow))):
        return _curvatures(problem, slow, key, batch, steps)
    with jax.enable_x64(True):
        slow = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), slow)
        found = _curvatures(problem, slow, key, batch, steps)
        return jax.tree.map(np.asarray, found)


@eqx.filter_jit
def _curvatures(
    problem: AbstractProblem, slow: Any, key: PRNGKeyArray, batch: tuple[int, ...], steps: int
) -> Curvature:
    rank = len(batch)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[rank:]), slow)

    def one(slow: Any) -> Curvature:
        flat, unravel = ravel_pytree(slow)

        def force(flat: Array) -> Array:
            return -ravel_pytree(problem.reduced_field(unravel(flat)))[0]

        start = jax.random.normal(key, flat.shape, flat.dtype)
        value, residual, vector = _lanczos(jax.linearize(force, flat)[1], start, steps)
        return Curvature(value, residual, unravel(vector))

    found = jax.lax.map(one, rows)
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), found)


def _lanczos(
    product: Callable[[Array], Array], start: Float[Array, " n"], steps: int
) -> tuple[Array, Array, Array]:
    """The smallest Ritz value, the norm of its residual, and its vector."""
    steps = min(steps, start.size)
    basis = jnp.zeros((steps + 1, start.size), start.dtype)
    basis = basis.at[0].set(start / jnp.linalg.norm(start))

    def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, diagonal, beside = carry
        new = product(basis[at])
        diagonal = diagonal.at[at].set(new @ basis[at])
        largest = jnp.linalg.norm(new)
        for _ in range(2):  # the second time for what rounding leaves
            new = new - basis.T @ (basis @ new)
        size = jnp.linalg.norm(new)
        # where the space is invariant there is no next vector: zeros from there on
        ended = size <= 1e-13 * largest
        new = jnp.where(ended, 0.0, new / jnp.where(ended, 1.0, size))
        return basis.at[at + 1].set(new), diagonal, beside.at[at].set(jnp.where(ended, 0.0, size))

    zero = jnp.zeros(steps, start.dtype)
    basis, diagonal, beside = jax.lax.fori_loop(0, steps, step, (basis, zero, zero))
    # past an end the rows are no vectors: their values shall not be the smallest
    empty = jnp.sum(basis[:-1] ** 2, axis=1) == 0.0
    diagonal = jnp.where(empty, 1.0 + 2.0 * jnp.max(jnp.abs(diagonal)), diagonal)
    ritz = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(ritz)
    return values[0], jnp.abs(beside[-1] * vectors[-1, 0]), vectors[:, 0] @ basis[:-1]
