"""The integrals of the univariate problem in closed form: cubic step, logistic, erf.

Products of features, and of a feature with f*, are differences of antiderivatives at the ends of
[0, 1], at the breaks of f*, and for pairs of neurons a function of where both stand to an end.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tts_jax.problems import _form, _plateau, _step
from tts_jax.problems._pairs import SMOOTH_STEPS, SmoothStep
from tts_jax.problems._targets import AbstractTarget, Lines, PiecewiseConstant


class Integrals(NamedTuple):
    """What loss, gradient and Hessian share at one set of positions.

    With index 0 for the bias: gram_ij = ∫σ_iσ_j, target_i = ∫f*σ_i, and with bumps σ′_j/η:
    cross_ji = ∫σ_i σ′_j/η, target_bump_j = ∫f*σ′_j/η.
    """

    gram: Float[Array, "m1 m1"]
    target: Float[Array, " m1"]
    cross: Float[Array, "m m1"]
    target_bump: Float[Array, " m"]


class ClosedForm(_form.Form):
    """Loss and fields from integrals in closed form.

    Attributes:
        target: f*, linear between its breaks.
        eta: width η.
    """

    target: AbstractTarget
    eta: Array

    @abc.abstractmethod
    def integrals(self, slow: Float[Array, " m"]) -> Integrals:
        """Integrals at given positions."""

    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        gram, target = self.gram(slow)
        return fast @ (gram @ fast - 2.0 * target) + _lines(self.target).mean_square()

    def normal(self, slow: Float[Array, " m"]) -> tuple[Array, Callable[[Array], Array]]:
        gram, target = self.gram(slow)
        return gram, lambda fast: target - gram @ fast

    def fields(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> tuple[Float[Array, " m1"], Float[Array, " m"]]:
        integrals = self.integrals(slow)
        misfit = integrals.cross @ fast - integrals.target_bump
        return 2.0 * (integrals.target - integrals.gram @ fast), 2.0 * fast[1:] * misfit


# --- logistic and erf -------------------------------------------------------------------------


class SmoothForm(ClosedForm):
    """A smooth step onto a target that is linear between its breaks.

    Attributes:
        name: of the step, a key of `SMOOTH_STEPS`.
    """

    name: str = eqx.field(static=True)

    @property
    def of(self) -> SmoothStep:
        return SMOOTH_STEPS[self.name]

    def _ends(self, slow: Array) -> Float[Array, "2 m"]:
        """z of the two ends of [0, 1]."""
        return (jnp.asarray([[0.0], [1.0]], slow.dtype) - slow) / self.eta

    def _pairs(self, function: Any, slow: Array) -> Float[Array, "m m"]:
        """The integral over [0, 1] of which `function` is the one over t < 0."""
        ends = self._ends(slow)
        return jnp.diff(function(ends[:, :, None], ends[:, None, :]), axis=0)[0]

    def _against(self, slow: Array, first: Any, second: Any) -> Array:
        """∫₀¹ f*(x) g((x − u_j)/η) dx/η of a g whose integral is `first`, and of that `second`."""
        lines, (left, right) = _lines(self.target), self._ends(slow)
        inner = (lines.breaks - slow[:, None]) / self.eta
        whole = lines.last * first(right) - lines.levels[0] * first(left)
        rest = lines.slopes[-1] * second(right) - lines.slopes[0] * second(left)
        rest -= second(inner) @ lines.bends
        return whole - first(inner) @ lines.heights - self.eta * rest

    def gram(self, slow: Float[Array, " m"]) -> tuple[Float[Array, "m1 m1"], Float[Array, " m1"]]:
        of = self.of
        single = self.eta * jnp.diff(of.ramp(self._ends(slow)), axis=0)[0]
        gram = _bordered(single, self.eta * self._pairs(of.mean, slow))
        target = self.eta * self._against(slow, of.ramp, of.bowl)
        return gram, jnp.concatenate([_lines(self.target).mean()[None], target])

    def integrals(self, slow: Float[Array, " m"]) -> Integrals:
        of = self.of
        own = jnp.diff(of.step(self._ends(slow)), axis=0)[0]
        cross = jnp.concatenate([own[:, None], self._pairs(of.cdf, slow)], axis=1)
        return Integrals(*self.gram(slow), cross, self._against(slow, of.step, of.ramp))

    def second(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> _form.Second:
        of, (left, right) = self.of, self._ends(slow)
        lines, integrals = _lines(self.target), self.integrals(slow)
        overlap = self._pairs(of.density, slow) / self.eta
        inner = (lines.breaks - slow[:, None]) / self.eta
        # ∫ f*′ σ′_j dx/η
        rise = lines.slopes[-1] * of.step(right) - lines.slopes[0] * of.step(left)
        rise += of.bump(inner) @ lines.heights / self.eta - of.step(inner) @ lines.bends
        features = [fast[0] + of.step(z) @ fast[1:] for z in (left, right)]
        first, last = features[0] - lines.levels[0], features[1] - lines.last
        ends = (last * of.bump(right) - first * of.bump(left)) / self.eta
        return _form.Second(
            integrals.gram,
            integrals.cross,
            overlap,
            integrals.cross @ fast - integrals.target_bump,
            ends + rise - overlap @ fast[1:],
        )


def _lines(target: AbstractTarget) -> Lines:
    lines = target.lines()
    assert lines is not None
    return lines


def _bordered(single: Float[Array, " m"], pair: Float[Array, "m m"]) -> Float[Array, "m1 m1"]:
    """The Gram matrix with the bias, whose feature is 1."""
    return jnp.block([[jnp.ones((1, 1), pair.dtype), single[None, :]], [single[:, None], pair]])


# --- the cubic step onto a piecewise-constant target ----------------------------------------------


class CubicForm(ClosedForm):
    """The cubic step onto a piecewise-constant target.

    Attributes:
        near: whether sums run over near neighbours only (`_plateau`), for many neurons.
    """

    target: PiecewiseConstant  # pyright: ignore[reportIncompatibleVariableOverride]
    near: bool = eqx.field(static=True)

    @property
    def numbers(self) -> _plateau.Numbers:
        target = self.target
        return _plateau.Numbers(*map(jnp.asarray, (self.eta, target.jumps, target.values)))

    def loss(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> Float[Array, ""]:
        if self.near:
            return _plateau.loss(fast, slow, self.numbers)
        return super().loss(fast, slow)

    def fields(
        self, fast: Float[Array, " m1"], slow: Float[Array, " m"]
    ) -> tuple[Float[Array, " m1"], Float[Array, " m"]]:
        if self.near:
            return _plateau.fields(fast, slow, self.numbers)
        return super().fields(fast, slow)

    def critical(self, slow: Float[Array, " m"]) -> Float[Array, " m1"]:
        """By Cholesky with a shift of a few ulp, taken out again by refinement."""
        if self.near:
            return _plateau.critical(slow, self.numbers)
        gram, target = self.gram(slow)
        factor = _form.shifted_cholesky(gram)
        solution = jax.scipy.linalg.cho_solve(factor, target)
        for _ in range(3):
            residual = target - gram @ solution
            solution = solution + jax.scipy.linalg.cho_solve(factor, residual)
        # steps that are equal on [0, 1] to rounding (the bias is one at −η/2) share their weight
        # evenly, and a step that is 0 there has none
        ends = -self.eta / 2, 1.0 + self.eta / 2
        places = jnp.clip(jnp.concatenate([ends[0] * jnp.ones(1), slow]), *ends)
        rounding = 64.0 * jnp.finfo(gram.dtype).eps
        same = (jnp.abs(places[:, None] - places[None, :]) <= rounding).astype(gram.dtype)
        shared = (same @ solution) / jnp.sum(same, axis=1)
        return jnp.where(places < ends[1], shared, 0.0)

    def condition(self, slow: Float[Array, " m"]) -> Float[Array, ""]:
        return _plateau.condition(slow, self.numbers) if self.near else super().condition(slow)

    def stiffness(self, slow: Float[Array, " m"]) -> tuple[Array, Array]:
        # at rest on a jump it is stiffer than at any start
        numbers = self.numbers
        single = _plateau.singles(_plateau.places(slow, numbers.eta), numbers)
        trace = 1.0 + jnp.sum(1.0 - single.start - numbers.eta * single.own)
        return trace, jnp.zeros_like(trace)

    def gram(self, slow: Float[Array, " m"]) -> tuple[Array, Array]:
        """(∫σ_iσ_j, ∫f*σ_i), `[m+1, m+1]` and `[m+1]`, index 0 for the bias."""
        eta = self.eta
        _, left, right = self._edges(slow)
        slow = jnp.clip(slow, -eta / 2, 1.0 + eta / 2)
        row, column = slow[:, None], slow[None, :]
        pair = 1.0 - (row + column) / 2 - eta * _step.gap_mean((row - column) / eta)
        pair -= eta * _if_any(left, _step.cut_mean, left[:, None], left[None, :])
        # beyond 1 the line formula counts σσ − 1 = (1−σ)(1−σ) − (1−σ) − (1−σ)
        pair += eta * _if_any(right, _right_excess, right[:, None], right[None, :])
        single = eta * (_step.ramp(-right) - _step.ramp(left))
        gram = _bordered(single, pair)
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        values = jnp.asarray(self.target.values)
        weighted = eta * (
            values[-1] * _step.ramp(-right)
            - values[0] * _step.ramp(left)
            - _step.ramp((jumps - slow[:, None]) / eta) @ heights
        )
        mean = jnp.sum(values * jnp.diff(jumps, prepend=0.0, append=1.0))
        return gram, jnp.concatenate([mean[None], weighted])

    def integrals(self, slow: Float[Array, " m"]) -> Integrals:
        eta = self.eta
        gram, target = self.gram(slow)
        inside, left, right = self._edges(slow)
        clipped = jnp.clip(slow, -eta / 2, 1.0 + eta / 2)
        cross = _step.gap_cdf((clipped[:, None] - clipped[None, :]) / eta)
        cross -= _if_any(left, _step.cut_cdf, left[:, None], left[None, :])
        cross -= _if_any(right, _right_excess_slope, right[:, None], right[None, :])
        own = _step.step(-right) - _step.step(left)
        cross = jnp.where(inside[:, None], jnp.concatenate([own[:, None], cross], axis=1), 0.0)
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        values = jnp.asarray(self.target.values)
        target_bump = (
            values[-1] * _step.step(-right)
            - values[0] * _step.step(left)
            - _step.step((jumps - slow[:, None]) / eta) @ heights
        )
        return Integrals(gram, target, cross, jnp.where(inside, target_bump, 0.0))

    def second(self, fast: Float[Array, " m1"], slow: Float[Array, " m"]) -> _form.Second:
        eta, weights = self.eta, fast[1:]
        integrals = self.integrals(slow)
        inside, left, right = self._edges(slow)
        # overlap_ij = ∫σ′_iσ′_j/η²
        overlap = _step.gap_density((slow[:, None] - slow[None, :]) / eta)
        overlap -= _if_any(left, _step.cut_density, left[:, None], left[None, :])
        overlap -= _if_any(right, _step.cut_density, right[:, None], right[None, :])
        overlap = jnp.where(inside[:, None] & inside[None, :], overlap, 0.0) / eta
        misfit = integrals.cross @ fast - integrals.target_bump
        # curvature_j = ∫(f − f*) σ″_j/η² dx, integrated by parts; the ends stay
        jumps, heights = jnp.asarray(self.target.jumps), jnp.asarray(self.target.heights)
        level = jnp.asarray(self.target.values)
        residual_0 = fast[0] + _step.step(left) @ weights - level[0]
        residual_1 = fast[0] + _step.step(-right) @ weights - level[-1]
        curvature = (
            residual_1 * _step.bump(right)
            - residual_0 * _step.bump(left)
            + _step.bump((jumps - slow[:, None]) / eta) @ heights
        ) / eta - overlap @ weights
        curvature = jnp.where(inside, curvature, 0.0)
        return _form.Second(integrals.gram, integrals.cross, overlap, misfit, curvature)

    def _edges(self, slow: Float[Array, " m"]) -> tuple[Array, Array, Array]:
        """Whether a step touches [0, 1], and its signed distances past 0 and past 1 in η.

        Positions are first moved to the nearest point of [−η/2, 1 + η/2], which changes
        nothing on [0, 1]; the distances are then at most ½, and above −½ for a straddling step.
        """
        reach = self.eta / 2
        inside = (slow > -reach) & (slow < 1.0 + reach)
        clipped = jnp.clip(slow, -reach, 1.0 + reach)
        return inside, -clipped / self.eta, (clipped - 1.0) / self.eta


def _right_excess(p: Array, q: Array) -> Array:
    return _step.ramp(p) + _step.ramp(q) - _step.cut_mean(p, q)


def _right_excess_slope(p: Array, q: Array) -> Array:
    return _step.step(p) - _step.cut_cdf(p, q)


def _if_any(edge: Float[Array, " m"], correction: Any, p: Array, q: Array) -> Array:
    """`correction(p, q)` when some step reaches past the edge, else zeros at no cost."""
    p, q = jnp.broadcast_arrays(p, q)
    return jax.lax.cond(jnp.any(edge > -0.5), correction, lambda p, q: jnp.zeros_like(p), p, q)
