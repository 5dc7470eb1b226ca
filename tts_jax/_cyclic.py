"""Cyclic tridiagonal Jacobians: a periodic chain whose sites see their two neighbours."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tts_jax._rosenbrock import AbstractJacobian


class CyclicTridiagonal(AbstractJacobian):
    """(J x)_i = lower_i x_{i−1} + diagonal_i x_i + upper_i x_{i+1}, with indices modulo n.

    Attributes:
        lower: J_{i,i−1}, `[n]`; its first entry is the upper right corner.
        diagonal: J_{i,i}, `[n]`.
        upper: J_{i,i+1}, `[n]`; its last entry is the lower left corner.
        kernel: of a J whose columns sum to 0, so that J keeps Σ x, a vector w with J w = 0. Solves
            with σI − J then satisfy σ Σ x = Σ b to rounding. Without it the error of that sum
            grows with the condition number, for it is along w that σI − J is nearly singular.
    """

    lower: Float[Array, " n"]
    diagonal: Float[Array, " n"]
    upper: Float[Array, " n"]
    kernel: Float[Array, " n"] | None = None

    def __check_init__(self) -> None:
        shapes = self.lower.shape, self.diagonal.shape, self.upper.shape
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < 3:
            raise ValueError(
                f"`CyclicTridiagonal` needs three vectors of one length of at least 3, got shapes "
                f"{shapes}. Use a dense Jacobian for fewer unknowns."
            )

    def as_matrix(self) -> Float[Array, "n n"]:
        """J as a dense array."""
        n = self.diagonal.size
        i = jnp.arange(n)
        dense = jnp.zeros((n, n), self.diagonal.dtype).at[i, i].set(self.diagonal)
        return dense.at[i, i - 1].set(self.lower).at[i, (i + 1) % n].set(self.upper)

    def shifted_solver(
        self, shift: Float[Array, ""]
    ) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
        """b ↦ (shift·I − J)⁻¹ b in O(n), by Sherman–Morrison on a tridiagonal matrix.

        With d the diagonal and α, β the upper right and lower left corners of the shifted matrix,
        it is T + u vᵀ for u = (−d_0, 0, …, β) and v = (1, 0, …, −α/d_0).
        """
        d, lower, upper = shift - self.diagonal, -self.lower, -self.upper
        corner = lower[0] / d[0]
        below = lower.at[0].set(0.0)
        above = upper.at[-1].set(0.0)
        along = (d + jnp.zeros_like(d)).at[0].add(d[0]).at[-1].add(corner * upper[-1])

        def tridiagonal(b: Array) -> Array:
            return jax.lax.linalg.tridiagonal_solve(below, along, above, b[:, None])[:, 0]

        u = jnp.zeros_like(d).at[0].set(-d[0]).at[-1].set(upper[-1])
        image = tridiagonal(u)
        scale = 1 + image[0] - corner * image[-1]
        kernel = self.kernel

        def solve(b: Array) -> Array:
            x = tridiagonal(b)
            x = x - image * ((x[0] - corner * x[-1]) / scale)
            if kernel is None:
                return x
            return x + kernel * ((jnp.sum(b) / shift - jnp.sum(x)) / jnp.sum(kernel))

        return solve
