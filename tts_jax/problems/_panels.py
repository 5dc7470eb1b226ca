"""The integrals of any activation and any target by Gauss–Legendre quadrature on panels.

Exact for piecewise polynomials, that is the cubic step, the linear ramp and ReLU with a piecewise
constant or linear target; anything else is resolved to rounding where it is smooth between the
breaks that are known (`_quadrature`), and the error at a state is estimated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tts_jax import checks
from tts_jax.problems import _form, _quadrature
from tts_jax.problems._targets import AbstractTarget


FEW = 4  # Gauss nodes per panel that are visited at once


class Polynomials(NamedTuple):
    """A piecewise-polynomial activation.

    Attributes:
        breaks: where its pieces meet, in z.
        pieces: their coefficients from the constant on, `[breaks + 1, degree + 1]`.
    """

    breaks: tuple[float, ...]
    pieces: tuple[tuple[float, ...], ...]

    @property
    def degree(self) -> int:
        return len(self.pieces[0]) - 1

    def values(self, piece: Array, z: Array) -> tuple[Array, Array]:
        """σ(z) and σ′(z) on the given pieces."""
        table = np.asarray(self.pieces)
        coefficients = [jnp.asarray(column, z.dtype)[piece] for column in table.T]
        value, slope = coefficients[-1], jnp.zeros_like(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value, slope = value * z + coefficient, slope * z + value
        return jnp.broadcast_to(value, z.shape), jnp.broadcast_to(slope, z.shape)


POLYNOMIALS = {
    "cubic": Polynomials(
        (-0.5, 0.0, 0.5), ((0, 0, 0, 0), (0.5, 3, 6, 4), (0.5, 3, -6, 4), (1, 0, 0, 0))
    ),
    "ramp": Polynomials((-0.5, 0.5), ((0, 0), (0.5, 1), (1, 0))),
    "relu": Polynomials((0.0,), ((0, 0), (0, 1))),
}


class Resolved(NamedTuple):
    """An activation that is smooth on panels.

    Attributes:
        breaks: their ends, in z.
    """

    breaks: tuple[float, ...]


# Where panels of an activation may end, before any are halved, and how far they reach at most.
_FIRST = (0.0, 0.5, 1.0)
_REACH = 64.0


def resolved(function: Callable[[Array], Array], reach: float) -> Resolved | None:
    """The panels of an activation on |z| ≤ `reach`; None where it is not finite there."""
    edges = sorted({0.0, *_FIRST, *(-z for z in _FIRST), *(s * max(reach, 2.0) for s in (-1, 1))})
    inner = _quadrature.resolving_panels(function, edges, most=96)
    return None if inner is None else Resolved(inner)


def reach_of(eta: Any) -> float:
    """How far |z| gets on [0, 1], with a neuron just outside; beyond that panels are coarse."""
    return _REACH if checks.is_traced(eta) else min(1.5 / float(eta), _REACH)


class _Nodes(NamedTuple):
    """What one set of nodes sees: arrays `[panels]` and, of neurons, `[panels, m]`."""

    x: Array
    weight: Array
    rows: Array  # 1 and σ_j, `[panels, m+1]`
    bumps: Array  # σ′_j/η
    target: Array
    rise: Array  # f*′


class PanelForm(_form.Form):
    """Integrals by quadrature.

    Attributes:
        sigma: the activation.
        target: f*.
        eta: width η.
        shape: `Polynomials` or `Resolved`, which tells the panels of the activation.
        order: Gauss nodes per panel where the problem is not polynomial.
    """

    sigma: Callable[[Array], Array]
    target: AbstractTarget
    eta: Array
    shape: Polynomials | Resolved = eqx.field(static=True)
    order: int = eqx.field(static=True)

    @property
    def exact(self) -> bool:
        """Whether the integrals are exact to rounding."""
        return isinstance(self.shape, Polynomials) and self.target.degree is not None

    @property
    def count(self) -> int:
        """Gauss nodes per panel."""
        if isinstance(self.shape, Polynomials) and self.target.degree is not None:
            # exact for the square of the one of higher degree
            return max(self.shape.degree, self.target.degree) + 1
        return self.order

    # --- integrals ------------------------------------------------------------------------------

    def _features(self, slow: Array, x: Array, piece: Array | None = None) -> tuple[Array, Array]:
        """σ_j and σ′_j/η at x, with the neurons on a last axis."""
        z = (x[..., None] - slow) / self.eta
        if piece is not None and isinstance(self.shape, Polynomials):
            value, slope = self.shape.values(piece, z)
        else:
            value, slope = jax.jvp(self.sigma, (z,), (jnp.ones_like(z),))
        return value, slope / self.eta

    def _integrate(self, slow: Array, integrand: Callable[[_Nodes], Any], count: int) -> Any:
        """Sums over all nodes of what `integrand` makes of one set of them.

        Node k of all panels is one set. A few sets are visited at once, many one after the other,
        which takes little memory.
        """
        lines = self.target.lines()
        breaks = jnp.asarray(self.target.goals, slow.dtype)
        at = _quadrature.panels(slow, self.eta, self.shape.breaks, breaks, self.target.panels)
        x, weights = at.nodes(count)

        def visit(x: Array, weight: Array) -> Any:
            features, bumps = self._features(slow, x, at.own)
            if lines is None:
                target, rise = jax.jvp(self.target.elementwise, (x,), (jnp.ones_like(x),))
            else:
                rise = lines.slopes[at.fixed]
                target = lines.levels[at.fixed] + rise * (x - lines.starts[at.fixed])
            rows = jnp.concatenate([jnp.ones_like(features[:, :1]), features], axis=1)
            return integrand(_Nodes(x, weight, rows, bumps, target, rise))

        if count <= FEW:
            parts = jax.vmap(visit, in_axes=1)(x, weights)
            return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), parts)
        shapes = jax.eval_shape(visit, x[:, 0], weights[:, 0])
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total: Any, nodes: tuple[Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, visit(*nodes)), None

        return jax.lax.scan(add, start, (x.T, weights.T))[0]

    def _loss(self, fast: Array, slow: Array, count: int) -> Array:
        def squared(at: _Nodes) -> Array:
            return at.weight @ (at.rows @ fast - at.target) ** 2

        return self._integrate(slow, squared, count)

    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        return self._loss(fast, slow, self.count)

    def loss_error(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        """The larger distance from what half as many and twice as many more nodes find."""
        if self.exact:
            return super().loss_error(fast, slow)
        loss = self.loss(fast, slow)
        more = [self._loss(fast, slow, self.count + -(-self.count * k // 2)) for k in (1, 2)]
        return jnp.max(jnp.abs(jnp.stack(more) - loss))

    def fields(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> tuple[Float[Array, " m1"], Float[Array, " m"]]:
        def pulls(at: _Nodes) -> tuple[Array, Array]:
            misfit = at.weight * (at.rows @ fast - at.target)
            return misfit @ at.rows, misfit @ at.bumps

        weights, moves = self._integrate(slow, pulls, self.count)
        return -2.0 * weights, 2.0 * fast[1:] * moves

    def gram(self, slow: Float[Array, " m"]) -> tuple[Float[Array, "m1 m1"], Float[Array, " m1"]]:
        def products(at: _Nodes) -> tuple[Array, Array]:
            weighted = at.rows * at.weight[:, None]
            return weighted.T @ at.rows, at.target @ weighted

        return self._integrate(slow, products, self.count)

    def second(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> _form.Second:
        def products(at: _Nodes) -> _form.Second:
            bumps = at.bumps * at.weight[:, None]
            return _form.Second(
                gram=(at.rows * at.weight[:, None]).T @ at.rows,
                cross=bumps.T @ at.rows,
                overlap=bumps.T @ at.bumps,
                misfit=(at.rows @ fast - at.target) @ bumps,
                curvature=(at.rise - at.bumps @ fast[1:]) @ bumps,
            )

        inner = self._integrate(slow, products, self.count)
        ends = jnp.asarray([0.0, 1.0], slow.dtype)
        features, bumps = self._features(slow, ends)
        misfit = fast[0] + features @ fast[1:] - self.target.elementwise(ends)
        beside = self._features(slow, jnp.asarray(self.target.goals, slow.dtype))[1]
        edges = misfit[1] * bumps[1] - misfit[0] * bumps[0] + self.target.steps() @ beside
        return inner._replace(curvature=inner.curvature + edges)
