"""Geometries of a variable: where it may be, how it moves there, what its gradient weighs.

A geometry turns the force −∇_x L into the velocity of a variable and keeps the variable
where it belongs:

    velocity  v = scale · (orthogonal projection of −∇_x L onto the tangent space at x)
    step      x ← project(x + step)

`Euclidean` is what every problem has unless it says otherwise. `Particles` is for mean-field
problems, whose N particles stand for a measure: the velocity of a particle is the gradient of the
first variation of the loss, which is N times the gradient in that particle.

    @property
    def geometry(self):
        return geometry.Particles(geometry.Sphere())

A geometry acts on every array of its variable, unless a `Product` names one for each entry
of a dict.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from tts_jax import checks


class AbstractGeometry(eqx.Module):
    """A set on which a variable lives; points and vectors have the form of the variable."""

    @abc.abstractmethod
    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        """The nearest point of the set."""

    @abc.abstractmethod
    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        """The orthogonal projection of a vector onto the tangent space at a point of the set."""

    def velocity(self, point: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        """The velocity that a force −∇_x L causes at a point."""
        return self.tangent(point, force)

    def retract(self, point: PyTree[Array], step: PyTree[Array]) -> PyTree[Array]:
        """Where a step from a point of the set ends."""
        return self.project(jax.tree.map(jnp.add, point, step))

    def descend(
        self,
        point: PyTree[Array],
        slope: PyTree[Array],
        step_size: Float[ArrayLike, ""],
        temperature: Float[ArrayLike, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> PyTree[Array]:
        """A step of gradient descent, of Langevin dynamics where there is a temperature T: along
        the velocity that −slope causes and the noise √(2 T step_size)."""
        velocity = self.velocity(point, jax.tree.map(jnp.negative, slope))
        step = jax.tree.map(lambda v: step_size * v, velocity)
        if temperature is not None:
            assert key is not None
            size = jnp.sqrt(2.0 * jnp.asarray(temperature) * step_size)
            step = jax.tree.map(lambda v, z: v + size * z, step, self.noise(point, key))
        step = jax.tree.map(lambda v, x: v.astype(x.dtype), step, point)
        return self.retract(point, step)

    def distance(self, point: PyTree[Array]) -> Float[Array, ""]:
        """How far a point is from the set: the largest change of a coordinate by `project`."""
        near = self.project(point)
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b), initial=0.0), point, near)
        return jnp.max(jnp.stack(jax.tree.leaves(gaps)))

    def noise(self, point: PyTree[Array], key: PRNGKeyArray) -> PyTree[Array]:
        """A standard normal vector of the tangent space at a point."""
        leaves, tree = jax.tree.flatten(point)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.normal(one, leaf.shape, leaf.dtype)
            for one, leaf in zip(keys, leaves, strict=True)
        ]
        return self.tangent(point, jax.tree.unflatten(tree, drawn))


class Euclidean(AbstractGeometry):
    """All of space."""

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        return point

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        del point
        return vector


class Sphere(AbstractGeometry):
    """The unit sphere of the last axis: every row of `[..., d]` has norm 1.

    Attributes:
        tangential: whether a force is projected onto the tangent space. Some published codes take
            the whole step and normalise after it; the two differ by the square of the step.
    """

    tangential: bool = eqx.field(static=True, default=True)

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(
            lambda leaf: leaf / jnp.linalg.norm(leaf, axis=-1, keepdims=True), point
        )

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        def along(x: Array, v: Array) -> Array:
            return v - jnp.sum(x * v, axis=-1, keepdims=True) * x

        return jax.tree.map(along, point, vector)

    def velocity(self, point: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        return self.tangent(point, force) if self.tangential else force


class Torus(AbstractGeometry):
    """A box with periodic sides: every coordinate is in [−period/2, period/2).

    Attributes:
        period: the length of a side; a number, or one for each entry of the last axis.
    """

    period: Float[Array, "..."]

    def __init__(self, period: Float[ArrayLike, "..."]) -> None:
        """Build the torus.

        Raises:
            ValueError: a period that is not positive.
        """
        remedy = "It is the length of a side of the box, for example 4.0."
        self.period = checks.as_float(checks.positive("period", period, remedy))

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        def wrap(x: Array) -> Array:
            period = jnp.asarray(self.period, x.dtype)
            return x - period * jnp.floor(x / period + 0.5)

        return jax.tree.map(wrap, point)

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        del point
        return vector

    def distance(self, point: PyTree[Array]) -> Float[Array, ""]:
        """0 for any finite point: coordinates outside the box name points inside it."""
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(point)]
        return jnp.where(jnp.all(jnp.stack(finite)), 0.0, jnp.nan)


class Particles(AbstractGeometry):
    """N particles, the entries of the first axis, that stand for the measure (1/N) Σ_j δ_{x_j}.

    A loss of the measure has the first variation δL/δμ, and the Wasserstein gradient flow moves a
    particle at x_j by −∇(δL/δμ)(x_j) = −N ∂L/∂x_j.

    Attributes:
        of: the geometry of a particle.
    """

    of: AbstractGeometry = Euclidean()

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        return self.of.project(point)

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        return self.of.tangent(point, vector)

    def velocity(self, point: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        scaled = jax.tree.map(lambda leaf: leaf.shape[0] * leaf, force)
        return self.of.velocity(point, scaled)

    def distance(self, point: PyTree[Array]) -> Float[Array, ""]:
        return self.of.distance(point)


class Product(AbstractGeometry):
    """One geometry for each entry of a variable that is a dict.

    Attributes:
        parts: the geometries by the names of the entries.
    """

    parts: dict[str, AbstractGeometry]

    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        self._check(point)
        return {name: part.project(point[name]) for name, part in self.parts.items()}

    def tangent(self, point: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        self._check(point)
        return {name: part.tangent(point[name], vector[name]) for name, part in self.parts.items()}

    def velocity(self, point: PyTree[Array], force: PyTree[Array]) -> PyTree[Array]:
        self._check(point)
        return {name: part.velocity(point[name], force[name]) for name, part in self.parts.items()}

    def distance(self, point: PyTree[Array]) -> Float[Array, ""]:
        self._check(point)
        each = [part.distance(point[name]) for name, part in self.parts.items()]
        return jnp.max(jnp.stack(each))

    def _check(self, point: PyTree[Array]) -> None:
        if not isinstance(point, dict) or set(point) != set(self.parts):
            got = sorted(point) if isinstance(point, dict) else f"a {type(point).__name__}"
            raise ValueError(
                f"A `Product` of {sorted(self.parts)} needs a variable that is a dict of "
                f"these, got {got}. Name every entry of the variable."
            )
