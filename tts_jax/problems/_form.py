"""What the univariate problem computes from integrals, whichever way these are found.

With the features σ_0 = 1 (bias) and σ_j(x) = σ((x − u_j)/η), f = Σ a_j σ_j and r = f − f*, the loss
is L = ∫₀¹ r², and its derivatives are

    ∂L/∂a_i = 2 ∫ r σ_i,    ∂L/∂u_j = −2 a_j ∫ r σ′_j/η,
    ∂²L/∂a_i∂a_k = 2 ∫ σ_iσ_k,    ∂²L/∂a_i∂u_j = −2 a_j ∫ σ_iσ′_j/η − 2 δ_ij ∫ r σ′_j/η,
    ∂²L/∂u_i∂u_j = 2 a_ia_j ∫ σ′_iσ′_j/η² + 2 δ_ij a_j ∫ r σ″_j/η²,

the last integral by parts, so that σ may have kinks: [r σ′_j/η] at the ends minus ∫ r′ σ′_j/η, with
the jumps of f* in r′.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tts_jax.fast import condition_of, least_norm


class Second(NamedTuple):
    """The integrals of the second derivatives at one state.

    Attributes:
        gram: ∫σ_iσ_k, `[m+1, m+1]`.
        cross: ∫σ_i σ′_j/η at `[j, i]`, `[m, m+1]`.
        overlap: ∫σ′_iσ′_j/η², `[m, m]`.
        misfit: ∫ r σ′_j/η, `[m]`.
        curvature: ∫ r σ″_j/η², `[m]`.
    """

    gram: Float[Array, "m1 m1"]
    cross: Float[Array, "m m1"]
    overlap: Float[Array, "m m"]
    misfit: Float[Array, " m"]
    curvature: Float[Array, " m"]


class Form(eqx.Module):
    """How the integrals of one kind of activation and target are found."""

    @abc.abstractmethod
    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """∫₀¹ (f − f*)²."""

    @abc.abstractmethod
    def fields(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> tuple[Float[Array, " m1"], Float[Array, " m"]]:
        """−∂L/∂a and −∂L/∂u."""

    @abc.abstractmethod
    def gram(self, slow: Float[Array, " m"]) -> tuple[Float[Array, "m1 m1"], Float[Array, " m1"]]:
        """∫σ_iσ_k and ∫f*σ_i, index 0 for the bias."""

    def normal(self, slow: Float[Array, " m"]) -> tuple[Array, Callable[[Array], Array]]:
        """G, and −½ ∂L/∂a as a function of a, which is b − G a as accurate as can be."""
        return self.gram(slow)[0], lambda fast: self.fields(fast, slow)[0] / 2.0

    @abc.abstractmethod
    def second(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Second:
        """The integrals of the second derivatives."""

    def loss_error(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The estimated error of the loss beyond rounding: 0 where integrals are exact."""
        del slow
        return jnp.zeros((), fast.dtype)

    def hessian(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, "n n"]:
        """The Hessian of the loss in (a, u)."""
        weights, m = fast[1:], slow.size
        of = self.second(fast, slow)
        fast_slow = -2.0 * (of.cross * weights[:, None]).T
        fast_slow = fast_slow.at[jnp.arange(1, m + 1), jnp.arange(m)].add(-2.0 * of.misfit)
        slow_slow = 2.0 * weights[:, None] * of.overlap * weights[None, :]
        slow_slow += jnp.diag(2.0 * weights * of.curvature)
        return jnp.block([[2.0 * of.gram, fast_slow], [fast_slow.T, slow_slow]])

    def critical(self, slow: Float[Array, " m"]) -> Float[Array, " m1"]:
        """argmin_a L(a, u), of least norm where that is not unique.

        By the eigenvectors of G, without what rounding hides, and corrections by the gradient.
        """
        gram, pull = self.normal(slow)
        return least_norm(gram, pull, jnp.zeros(slow.size + 1, gram.dtype))

    def condition(self, slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The condition number of G; infinite where rounding hides the smallest eigenvalue."""
        return condition_of(jnp.linalg.eigvalsh(self.gram(slow)[0]))

    def stiffness(self, slow: Float[Array, " m"]) -> tuple[Array, Array]:
        """The trace of G, and how fast the positions may relax at a*(u)."""
        hessian, split = self.hessian(self.critical(slow), slow), slow.size + 1
        trace = jnp.trace(hessian[:split, :split]) / 2.0
        return trace, jnp.linalg.norm(hessian[split:, split:], ord=2)


def shifted_cholesky(matrix: Float[Array, "n n"]) -> tuple[Array, bool]:
    """The Cholesky factor of a Gram matrix shifted by a few ulp, so that it always exists."""
    shift = 8.0 * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    return jax.scipy.linalg.cho_factor(matrix + shift * jnp.eye(matrix.shape[0]))
