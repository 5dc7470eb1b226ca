"""Targets f* on [0, 1]: piecewise constant, piecewise linear, any function.

Each names its goals, the places where a neuron belongs: jumps, kinks, or breakpoints.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax.problems import _quadrature


class Lines(NamedTuple):
    """A target that is linear between breaks.

    Attributes:
        breaks: where it jumps or bends, `[breaks]`, increasing inside (0, 1).
        levels: f* at the left end of each piece, `[breaks + 1]`.
        slopes: of each piece, `[breaks + 1]`.
    """

    breaks: Float[Array, " breaks"]
    levels: Float[Array, " pieces"]
    slopes: Float[Array, " pieces"]

    @property
    def starts(self) -> Float[Array, " pieces"]:
        """Left ends of the pieces."""
        return jnp.concatenate([jnp.zeros_like(self.levels[:1]), self.breaks])

    @property
    def lengths(self) -> Float[Array, " pieces"]:
        """Lengths of the pieces."""
        return jnp.diff(self.starts, append=1.0)

    @property
    def last(self) -> Float[Array, ""]:
        """f*(1)."""
        return self.levels[-1] + self.slopes[-1] * self.lengths[-1]

    @property
    def heights(self) -> Float[Array, " breaks"]:
        """The jumps at the breaks."""
        before = self.levels[:-1] + self.slopes[:-1] * self.lengths[:-1]
        return self.levels[1:] - before

    @property
    def bends(self) -> Float[Array, " breaks"]:
        """The changes of slope at the breaks."""
        return jnp.diff(self.slopes)

    def mean(self) -> Float[Array, ""]:
        """∫₀¹ f*."""
        return jnp.sum(self.lengths * (self.levels + self.slopes * self.lengths / 2))

    def mean_square(self) -> Float[Array, ""]:
        """∫₀¹ f*²."""
        rise = self.slopes * self.lengths
        return jnp.sum(self.lengths * (self.levels**2 + self.levels * rise + rise**2 / 3))


class AbstractTarget(eqx.Module):
    """A target f* on [0, 1]."""

    # What its goals are called, one of them: the axis of `recovery`.
    goal: ClassVar[str]
    # Names of the axes of its settings.
    dims: ClassVar[dict[str, tuple[str, ...]]] = {}
    # The degree of its pieces between the goals, if they are polynomials.
    degree: ClassVar[int | None] = None

    @abc.abstractmethod
    def __call__(self, x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """f*(x) at any shape of `x`."""

    @property
    @abc.abstractmethod
    def goals(self) -> Float[Array, " goals"]:
        """The places where a neuron belongs, `[goals]`, increasing."""

    @abc.abstractmethod
    def elementwise(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """f*(x) by operations on single numbers alone, in the dtype of `x`."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The numbers that define it, stored with every result."""

    def lines(self) -> Lines | None:
        """Its linear pieces, if it has only such."""
        return None

    def steps(self) -> Float[Array, " goals"]:
        """How far f* jumps at its goals."""
        lines = self.lines()
        return jnp.zeros_like(self.goals) if lines is None else lines.heights

    @property
    def has_goals(self) -> bool:
        """Whether recovery means anything."""
        return True

    @property
    def panels(self) -> tuple[float, ...]:
        """Places besides the goals between which it is smooth enough for quadrature."""
        return ()

    @property
    def name(self) -> str:
        """How results are labelled."""
        return type(self).__name__


def _increasing(name: str, places: Any, remedy: str, *, ends: bool = False) -> None:
    """Refuse concrete places that do not increase inside (0, 1), or [0, 1] with the `ends`."""
    if checks.is_traced(places):
        return
    concrete = np.asarray(places)
    inside = (concrete >= 0) & (concrete <= 1) if ends else (concrete > 0) & (concrete < 1)
    if not np.all(np.isfinite(concrete) & inside) or np.any(np.diff(concrete) <= 0):
        where = "[0, 1]" if ends else "(0, 1)"
        raise checks.argument_error(
            name, f"be strictly increasing and inside {where}", concrete, remedy
        )


class PiecewiseConstant(AbstractTarget):
    """A piecewise-constant target on [0, 1].

    Attributes:
        jumps: positions v_k of the jumps, `[jumps]`, strictly increasing inside (0, 1).
        values: the level of each piece from left to right, `[jumps + 1]`.
    """

    jumps: Float[Array, " jumps"]
    values: Float[Array, " pieces"]

    goal: ClassVar = "jump"
    degree: ClassVar = 0
    dims: ClassVar = {"values": ("piece",)}

    def __init__(
        self,
        jumps: Sequence[float] | Float[ArrayLike, " jumps"],
        values: Sequence[float] | Float[ArrayLike, " pieces"],
    ) -> None:
        """Build a target.

        Raises:
            ValueError: jumps unsorted, repeated, outside (0, 1) or not finite; values not
                finite or not one more than the jumps.
        """
        checks.real("jumps", jumps, "Give the positions of the jumps inside (0, 1).")
        checks.finite("values", values, "Give every piece a finite level.")
        self.jumps = checks.as_float(jumps)
        self.values = checks.as_float(values)
        if self.jumps.ndim != 1 or self.values.ndim != 1:
            raise ValueError(
                f"Arguments `jumps` and `values` must be vectors, got shapes "
                f"{self.jumps.shape} and {self.values.shape}. Use `[0.5]` for a single jump."
            )
        if self.values.shape[0] != self.jumps.shape[0] + 1:
            raise ValueError(
                f"Argument `values` must have one entry more than `jumps` (one per piece), got "
                f"{self.values.shape[0]} values for {self.jumps.shape[0]} jumps. Add or drop "
                f"levels."
            )
        remedy = "Sort the jumps, drop repeated ones and rescale the target to [0, 1]."
        _increasing("jumps", self.jumps, remedy)

    @property
    def heights(self) -> Float[Array, " jumps"]:
        """The signed jump heights α_k, `[jumps]`."""
        return self.values[1:] - self.values[:-1]

    @double_precision
    def __call__(self, x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """f*(x), right-continuous at the jumps; any shape of `x`."""
        piece = jnp.searchsorted(jnp.asarray(self.jumps), jnp.asarray(x), side="right")
        return jnp.asarray(self.values)[piece]

    @property
    def goals(self) -> Float[Array, " jumps"]:
        return self.jumps

    def elementwise(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        level = jnp.broadcast_to(self.values[0], x.shape)
        for k in range(len(self.jumps)):
            level = jnp.where(x >= self.jumps[k], self.values[k + 1], level)
        return level

    def settings(self) -> dict[str, Any]:
        return {"values": self.values}

    def lines(self) -> Lines:
        values = jnp.asarray(self.values)
        return Lines(jnp.asarray(self.jumps), values, jnp.zeros_like(values))


class PiecewiseLinear(AbstractTarget):
    """A continuous piecewise-linear target on [0, 1], constant before its first knot and after
    its last.

    Its goals are the knots inside (0, 1), where it bends.

    Attributes:
        knots: positions v_k, `[knots]`, strictly increasing in [0, 1], ends included or not.
        values: f*(v_k), `[knots]`.
    """

    knots: Float[Array, " knots"]
    values: Float[Array, " knots"]
    # whether the first and the last knot are the ends of [0, 1]
    _ends: tuple[bool, bool] = eqx.field(static=True)

    goal: ClassVar = "knot"
    degree: ClassVar = 1
    dims: ClassVar = {"knots": ("vertex",), "values": ("vertex",)}

    def __init__(
        self,
        knots: Sequence[float] | Float[ArrayLike, " knots"],
        values: Sequence[float] | Float[ArrayLike, " knots"],
    ) -> None:
        """Build a target.

        Raises:
            ValueError: knots unsorted, repeated, outside [0, 1] or not finite; values not
                finite or not as many as the knots; no knot.
            TypeError: the knots are traced.
        """
        if checks.is_traced(knots):
            raise TypeError(
                "Argument `knots` must be concrete when `PiecewiseLinear` is built, got a traced "
                "array: which of them are the ends 0 and 1 is part of its form. Build it outside "
                "and replace the knots by `equinox.tree_at`."
            )
        checks.real("knots", knots, "Give the positions of the knots in [0, 1].")
        checks.finite("values", values, "Give every knot a finite value.")
        self.knots, self.values = checks.as_float(knots), checks.as_float(values)
        if self.knots.ndim != 1 or self.values.shape != self.knots.shape or not self.knots.size:
            raise ValueError(
                f"Arguments `knots` and `values` must be vectors of one length, at least 1, got "
                f"shapes {self.knots.shape} and {self.values.shape}. Give f* at every knot."
            )
        remedy = "Sort the knots, drop repeated ones and rescale the target to [0, 1]."
        _increasing("knots", self.knots, remedy, ends=True)
        self._ends = bool(self.knots[0] == 0), bool(self.knots[-1] == 1)

    @classmethod
    def from_kinks(
        cls,
        kinks: Sequence[float] | Float[ArrayLike, " kinks"],
        weights: Sequence[float] | Float[ArrayLike, " kinks"],
        *,
        start: float = 0.0,
        slope: float = 0.0,
    ) -> "PiecewiseLinear":
        """f*(x) = start + slope · x + Σ_k weights_k max(0, x − kinks_k), a network of ReLUs.

        The teacher of the paper's ReLU experiment is `from_kinks([0.3, 0.5, 0.7], [1, -2, 3])`.

        Raises:
            ValueError: kinks unsorted, repeated or outside (0, 1); weights not as many.
        """
        checks.real("kinks", kinks, "Give the positions of the kinks inside (0, 1).")
        checks.finite("weights", weights, "Give every kink a finite change of slope.")
        kinks, weights = np.asarray(kinks, float), np.asarray(weights, float)
        if kinks.ndim != 1 or weights.shape != kinks.shape:
            raise ValueError(
                f"Arguments `kinks` and `weights` must be vectors of one length, got shapes "
                f"{kinks.shape} and {weights.shape}. Give every kink its change of slope."
            )
        _increasing("kinks", kinks, "Sort the kinks, drop repeated and outer ones.")
        knots = np.concatenate([[0.0], kinks, [1.0]])
        bends = np.maximum(knots[:, None] - kinks, 0.0) @ weights
        return cls(knots, start + slope * knots + bends)

    @double_precision
    def __call__(self, x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """f*(x) at any shape of `x`."""
        return jnp.interp(jnp.asarray(x), jnp.asarray(self.knots), jnp.asarray(self.values))

    @property
    def goals(self) -> Float[Array, " goals"]:
        """The knots inside (0, 1), `[goals]`."""
        return self.knots[int(self._ends[0]) : len(self.knots) - int(self._ends[1])]

    def elementwise(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        level = jnp.broadcast_to(self.values[0], x.shape)
        for k in range(len(self.knots)):
            part = jnp.broadcast_to(self.values[k], x.shape)
            if k + 1 < len(self.knots):
                rise = self.values[k + 1] - self.values[k]
                part = part + rise / (self.knots[k + 1] - self.knots[k]) * (x - self.knots[k])
            level = jnp.where(x >= self.knots[k], part, level)
        return level

    def settings(self) -> dict[str, Any]:
        return {"knots": self.knots, "values": self.values}

    def lines(self) -> Lines:
        knots, values = jnp.asarray(self.knots), jnp.asarray(self.values)
        slopes = jnp.diff(values) / jnp.diff(knots)
        first, last = self._ends
        flat = jnp.zeros_like(values[:1])
        slopes = jnp.concatenate([*([] if first else [flat]), slopes, *([] if last else [flat])])
        levels = values[: len(slopes)] if first else jnp.concatenate([values[:1], values])
        return Lines(jnp.asarray(self.goals), levels[: len(slopes)], slopes)


class Function(AbstractTarget):
    """Any target f* on [0, 1], given by an element-wise function that JAX can trace.

    Attributes:
        function: f*. The numbers of an `equinox.Module` are seen by transformations; any other
            callable is part of the form: the same numbers in a new function compile anew.
        breakpoints: where f* or one of its derivatives jumps, `[breakpoints]`, strictly increasing
            inside (0, 1); they are its goals. Elsewhere f* is taken to be smooth.
    """

    function: Callable[[Array], Array]
    breakpoints: Float[Array, " breakpoints"]
    _panels: tuple[float, ...] = eqx.field(static=True)

    goal: ClassVar = "breakpoint"

    def __init__(
        self,
        function: Callable[[Array], Array],
        breakpoints: Sequence[float] | Float[ArrayLike, " breakpoints"] = (),
    ) -> None:
        """Wrap a function.

        Raises:
            TypeError: `function` is not callable, or JAX cannot trace it.
            ValueError: it is not element-wise or not finite on [0, 1]; breakpoints unsorted,
                repeated or outside (0, 1).
        """
        remedy = "Pass an element-wise function of x written with `jax.numpy`."
        _quadrature.check_elementwise("function", function, remedy)
        checks.real("breakpoints", breakpoints, "Give positions inside (0, 1).")
        self.breakpoints = checks.as_float(breakpoints)
        if self.breakpoints.ndim != 1:
            raise ValueError(
                f"Argument `breakpoints` must be a vector, got shape {self.breakpoints.shape}. "
                f"Use `[0.5]` for a single one."
            )
        _increasing("breakpoints", self.breakpoints, "Sort them and drop repeated ones.")
        self.function = _quadrature.held(function)
        fixed = () if checks.is_traced(self.breakpoints) else tuple(self.breakpoints.tolist())
        inner = _quadrature.resolving_panels(self.function, (0.0, *fixed, 1.0), most=512)
        if inner is None:
            raise ValueError(
                "Argument `function` must be finite on [0, 1], got infinite or NaN values. Give "
                "its poles up, or rescale the target to [0, 1]."
            )
        self._panels = tuple(x for x in inner if x not in fixed)

    @double_precision
    def __call__(self, x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """f*(x) at any shape of `x`."""
        return self.elementwise(jnp.asarray(x))

    @property
    def goals(self) -> Float[Array, " breakpoints"]:
        return self.breakpoints

    def elementwise(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.asarray(self.function(x)).astype(x.dtype)

    @property
    def panels(self) -> tuple[float, ...]:
        """Found at the construction, from values of f*."""
        return self._panels

    @property
    def has_goals(self) -> bool:
        return self.breakpoints.size > 0

    def steps(self) -> Float[Array, " breakpoints"]:
        """How far f* jumps at the breakpoints, from its values just beside them."""
        places = jax.lax.stop_gradient(jnp.asarray(self.breakpoints))
        after, before = (jnp.nextafter(places, jnp.full_like(places, end)) for end in (2.0, -1.0))
        return self.elementwise(after) - self.elementwise(before)

    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def name(self) -> str:
        inner = _quadrature.released(self.function)
        return f"Function({getattr(inner, '__name__', type(inner).__name__)})"


def as_target(target: Any) -> AbstractTarget:
    """A target, or a callable as one.

    Raises:
        TypeError: neither of them.
        ValueError: the callable is not element-wise.
    """
    if callable(target) and not isinstance(target, AbstractTarget):
        return Function(cast(Any, target))
    remedy = (
        "Build it with `tts.PiecewiseConstant(jumps, values)` or `tts.PiecewiseLinear(knots, "
        "values)`, or pass a function of x."
    )
    return checks.instance("target", target, AbstractTarget, remedy)
