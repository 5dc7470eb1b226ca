"""Barboni, Peyré & Vialard (2025, arXiv 2504.18208): features of a student in the limit λ → 0.

A student whose outer weights are optimal (VarPro) and whose ridge λ vanishes has risk
½ ∫ μ̄²/μ, where μ̄ is the teacher's density of features and μ the student's. The Wasserstein
gradient flow of that risk is the weighted ultra-fast diffusion

    ∂_t μ = −½ ∂_θ(μ ∂_θ (μ̄/μ)²) = −∂_θ(μ̄ ∂_θ g),   g = μ̄/μ,

here on the circle of circumference 2π. It keeps the mass, and χ²(μ̄|μ) = ∫ μ̄²/μ − 1 decays; near
μ̄, as exp(−2 g_1 t), where g_1 is the spectral gap of h ↦ −(1/μ̄)(μ̄ h′)′.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from tts_jax import checks
from tts_jax._cyclic import CyclicTridiagonal
from tts_jax._integrate import as_double, solution_status
from tts_jax._precision import double_precision, require_double_precision
from tts_jax._rosenbrock import Rodas5P
from tts_jax._trajectory import Status


Density = Callable[[Array], ArrayLike]

# Gauss–Legendre nodes per cell, for the cell averages of a function.
_NODES = 5
# Vectors of the subspace iteration for the spectral gap, and its limit on iterations.
_SUBSPACE = 8
_ITERATIONS = 500


class DiffusionSolution(eqx.Module):
    """Recorded densities of one run of `UltraFastDiffusion.solve`.

    Attributes:
        t: recorded times, `[T]`.
        theta: cell centres in [−π, π), `[cells]`.
        density: cell averages of μ per radian, of mass 1, `[T, cells]`; NaN after a failure.
        chi2: χ²(μ̄|μ), `[T]`.
        status: a `Status`.
        steps: steps of the solver, rejected ones included.
    """

    t: Float[Array, " T"]
    theta: Float[Array, " cells"]
    density: Float[Array, "T cells"]
    chi2: Float[Array, " T"]
    status: Int[Array, ""]
    steps: Int[Array, ""]

    @property
    def success(self) -> Array:
        """Whether the last recorded time was reached."""
        return self.status == int(Status.SUCCESS)


class UltraFastDiffusion(eqx.Module):
    """The weighted ultra-fast diffusion to a teacher density on the circle.

    Finite volumes on equal cells of width Δ: cell averages μ_i change by the differences of the
    fluxes F_{i+1/2} = μ̄_{i+1/2} (g_{i+1} − g_i)/Δ, g_i = μ̄_i/μ_i, of second order in Δ. Mass is
    kept to rounding, and the teacher's cell averages are the steady state.

    Attributes:
        target: cell averages of μ̄ per radian, of mass 1, `[cells]`.
        faces: μ̄ at the right edges of the cells, `[cells]`.
    """

    target: Float[Array, " cells"]
    faces: Float[Array, " cells"]

    def __init__(
        self, teacher: Density | Float[ArrayLike, " cells"], cells: int | None = None
    ) -> None:
        """Build the problem.

        Args:
            teacher: μ̄ > 0, a function of θ in [−π, π] that takes arrays, such as `CircleTeacher`,
                or cell averages on equal cells from −π on; of any mass.
            cells: their number, at least 4; 512 by default, or that of the given averages.

        Raises:
            ValueError: μ̄ is not finite and positive, or `cells` is not what it should be.
        """
        if cells is not None:
            cells = _check_cells(cells)
        if not callable(teacher):
            shape = np.shape(teacher)
            if len(shape) != 1 or (cells is not None and shape != (cells,)):
                wanted = "a vector" if cells is None else f"of shape ({cells},)"
                raise ValueError(
                    f"Argument `teacher` must be a function or {wanted}, got shape {shape}. Give "
                    f"the averages over the cells and leave `cells` out."
                )
            cells = _check_cells(shape[0])
        self.target, self.faces = _discretise(teacher, cells or 512)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.target.shape[-1]

    @property
    def width(self) -> float:
        """Δ, the width of a cell."""
        return 2 * np.pi / self.cells

    @property
    def theta(self) -> Float[np.ndarray, " cells"]:
        """Cell centres, `[cells]`."""
        return -np.pi + self.width * (np.arange(self.cells) + 0.5)

    def velocity(self, density: Float[Array, " cells"]) -> Float[Array, " cells"]:
        """∂_t μ of the discrete equation; NaN where μ is not positive."""
        ratio = self.target / jnp.where(density > 0, density, jnp.nan)
        flux = self.faces * (jnp.roll(ratio, -1) - ratio) / self.width
        return -(flux - jnp.roll(flux, 1)) / self.width

    def jacobian(self, density: Float[Array, " cells"]) -> CyclicTridiagonal:
        """The derivative of `velocity` in μ."""
        slope = self.target / density**2  # −∂g/∂μ
        right = self.faces / self.width**2
        left = jnp.roll(right, 1)
        return CyclicTridiagonal(
            lower=left * jnp.roll(slope, 1),
            diagonal=-(left + right) * slope,
            upper=right * jnp.roll(slope, -1),
            kernel=1 / slope,
        )

    @double_precision
    def chi2(self, density: Float[ArrayLike, "... cells"]) -> Float[Array, "..."]:
        """χ²(μ̄|μ) = ∫ (μ̄ − μ)²/μ of densities of mass 1, `[..., cells]`, without cancellation."""
        density = jnp.asarray(density)
        return self.width * jnp.sum((self.target - density) ** 2 / density, axis=-1)

    @double_precision
    def solve(
        self,
        density: Density | Float[ArrayLike, " cells"] | None,
        t: Float[ArrayLike, " T"],
        *,
        rtol: float = 1e-8,
        atol: float = 1e-10,
        max_steps: int = 10_000,
        solver: diffrax.AbstractSolver | None = None,
    ) -> DiffusionSolution:
        """Integrate from time 0 and record at the times `t`.

        The error of a step is at most `atol + rtol μ` in every cell. Distances μ/μ̄ − 1 below
        `rtol`, and with them χ² below `rtol`², are not resolved.

        Args:
            density: μ at time 0, a positive function of θ or cell averages, of any mass; uniform
                for `None`.
            t: recorded times, `[T]`, strictly increasing and ≥ 0.
            rtol: relative tolerance of a step.
            atol: absolute tolerance of a step, per radian.
            max_steps: limit on the steps of the solver.
            solver: a stiff Diffrax solver; by default Rodas5P, with linear solves in O(cells).

        Raises:
            ValueError: a density that is not positive, times that do not increase, tolerances or
                `max_steps` out of range.
            RuntimeError: called inside a transformation in float32.
        """
        require_double_precision("UltraFastDiffusion.solve", self, density, t)
        start = self._start(density)
        checks.increasing_times(t, "t", "jnp.linspace(0, 30, 101)")
        checks.positive("rtol", rtol, "Use for example 1e-8.", single=True)
        checks.positive("atol", atol, "Use for example 1e-10.", single=True)
        max_steps = checks.positive_integer("max_steps", max_steps, "Use e.g. 10_000.")
        if solver is None:
            solver = Rodas5P(jacobian=_jacobian)
        remedy = "Pass for example `diffrax.Kvaerno5()`, or leave it out."
        checks.instance("solver", solver, diffrax.AbstractSolver, remedy)
        run = as_double(t), as_double(rtol), as_double(atol)
        return _solve(self, start, *run, solver, max_steps)

    @double_precision
    def spectral_gap(self) -> Float[Array, ""]:
        """The smallest non-zero eigenvalue of h ↦ −(1/μ̄)(μ̄ h′)′ on the circle.

        That of the finite-volume operator to rounding, which is the decay rate of `solve` and
        differs from that of the equation by O(Δ²).
        """
        return _spectral_gap(self.target, self.faces)

    @double_precision
    def at(
        self, theta: Float[ArrayLike, "..."], density: Float[ArrayLike, " cells"]
    ) -> Float[Array, "..."]:
        """A density at angles of any shape, linear between the cell centres.

        Raises:
            ValueError: `density` does not have one value per cell.
        """
        density = jnp.asarray(self._check_averages("density", density))
        place = (jnp.asarray(theta) + jnp.pi) / self.width - 0.5
        left = jnp.floor(place)
        index = left.astype(int)
        share = place - left
        below, above = density[index % self.cells], density[(index + 1) % self.cells]
        return (1 - share) * below + share * above

    @double_precision
    def quantiles(
        self, levels: Float[ArrayLike, "..."], density: Float[ArrayLike, " cells"]
    ) -> Float[Array, "..."]:
        """Angles below which, counted from −π, the shares `levels` of the mass lie.

        `quantiles((numpy.arange(M) + 0.5) / M, density)` are M particles that stand for a density,
        taken as constant in each cell.

        Raises:
            ValueError: `density` does not have one positive value per cell, or a level is outside
                [0, 1].
        """
        checks.positive("density", self._check_averages("density", density), _POSITIVE)
        checks.nonnegative("levels", levels, "Give shares of the mass in [0, 1].")
        if not checks.is_traced(levels) and np.any(np.asarray(levels) > 1):
            raise checks.argument_error(
                "levels", "be at most 1", levels, "Give shares of the mass in [0, 1]."
            )
        mass = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.asarray(density))])
        edges = -jnp.pi + self.width * jnp.arange(self.cells + 1)
        return jnp.interp(jnp.asarray(levels), mass / mass[-1], edges)

    def _check_averages(self, name: str, value: Any) -> Any:
        if np.shape(value) != (self.cells,):
            raise ValueError(
                f"Argument `{name}` must have one value per cell, shape ({self.cells},), got shape "
                f"{np.shape(value)}. Give the averages over the cells around `theta`."
            )
        return value

    def _start(self, density: Density | Float[ArrayLike, " cells"] | None) -> Array:
        """The initial cell averages, of mass 1."""
        if density is None:
            return jnp.full(self.cells, 1 / (2 * np.pi), jnp.float64)
        if not callable(density):
            self._check_averages("density", density)
        averages, _ = _averages("density", density, self.cells)
        return averages


_POSITIVE = "Densities must be finite and positive everywhere on the circle."


def _check_cells(cells: Any) -> int:
    cells = checks.positive_integer("cells", cells, "Use for example 512.")
    if cells < 4:
        raise checks.argument_error("cells", "be at least 4", cells, "Use for example 512.")
    return cells


def _averages(
    name: str, density: Density | Float[ArrayLike, " cells"], cells: int
) -> tuple[Float[Array, " cells"], Float[Array, ""]]:
    """Cell averages per radian of mass 1, and the mass by which they were divided."""
    width = 2 * np.pi / cells
    if callable(density):
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        centres = -np.pi + width * (np.arange(cells) + 0.5)
        values = _values(name, density, centres[:, None] + nodes * width / 2)
        averages = values @ jnp.asarray(weights / 2)
    else:
        averages = as_double(checks.positive(name, density, _POSITIVE))
    mass = width * jnp.sum(averages)
    return averages / mass, mass


def _values(name: str, density: Density, theta: Float[np.ndarray, "..."]) -> Array:
    """Positive values of a function at `theta`."""
    values = density(jnp.asarray(theta))
    if np.shape(values) != theta.shape:
        raise ValueError(
            f"Argument `{name}` must be an element-wise function, got shape {np.shape(values)} for "
            f"angles of shape {theta.shape}. Write it with `jax.numpy` functions."
        )
    return jnp.asarray(checks.positive(name, values, _POSITIVE))


@double_precision
def _discretise(
    teacher: Density | Float[ArrayLike, " cells"], cells: int
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """Cell averages of the teacher and its values at the right edges."""
    target, mass = _averages("teacher", teacher, cells)
    if callable(teacher):
        edges = -np.pi + 2 * np.pi / cells * np.arange(1, cells + 1)
        return target, _values("teacher", teacher, edges) / mass
    return target, (target + jnp.roll(target, -1)) / 2


def _field(t: Any, density: Array, problem: UltraFastDiffusion) -> Array:
    del t
    return problem.velocity(density)


def _jacobian(t: Any, density: Array, problem: UltraFastDiffusion) -> CyclicTridiagonal:
    del t
    return problem.jacobian(density)


def _largest(error: Float[Array, " cells"]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(error))


@eqx.filter_jit
def _solve(
    problem: UltraFastDiffusion,
    start: Float[Array, " cells"],
    t: Float[Array, " T"],
    rtol: Float[Array, ""],
    atol: Float[Array, ""],
    solver: diffrax.AbstractSolver,
    max_steps: int,
) -> DiffusionSolution:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        t0=0.0,
        t1=t[-1],
        dt0=None,
        y0=start,
        args=problem,
        saveat=diffrax.SaveAt(ts=t),
        stepsize_controller=diffrax.PIDController(rtol, atol, norm=_largest),
        max_steps=max_steps,
        throw=False,
    )
    density = jnp.asarray(solution.ys)
    density = jnp.where(jnp.isfinite(density), density, jnp.nan)
    return DiffusionSolution(
        t=jnp.asarray(t),
        theta=jnp.asarray(problem.theta),
        density=density,
        chi2=problem.chi2(density),
        status=solution_status(solution, density),
        steps=solution.stats["num_steps"],
    )


@jax.jit
def _spectral_gap(
    target: Float[Array, " cells"], faces: Float[Array, " cells"]
) -> Float[Array, ""]:
    """Subspace iteration with the inverse, symmetric in √μ̄ h; a solve is two sums along the circle.

    Rayleigh–Ritz values of a few vectors converge fast whether or not the gap is a multiple
    eigenvalue, as it is for a uniform μ̄.
    """
    cells = target.size
    width = 2 * jnp.pi / cells
    root = jnp.sqrt(target)[:, None]
    block = min(_SUBSPACE, cells - 1)

    def solve(q: Float[Array, "cells block"]) -> Float[Array, "cells block"]:
        source = root * q
        source = source - target[:, None] * jnp.mean(source, axis=0) / jnp.mean(target)
        flux = -width * jnp.cumsum(source, axis=0)
        flux = flux - jnp.sum(flux / faces[:, None], axis=0) / jnp.sum(1 / faces)
        slopes = width * flux / faces[:, None]
        h = jnp.cumsum(jnp.roll(slopes, 1, axis=0), axis=0)
        h = h - jnp.sum(target[:, None] * h, axis=0) / jnp.sum(target)
        return root * h

    def cond(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, new, old, count = carry
        return (count < _ITERATIONS) & (jnp.abs(new - old) > 1e-15 * new)

    def body(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        q, old, _, count = carry
        q, _ = jnp.linalg.qr(q)
        image = solve(q)
        ritz = q.T @ image
        values, vectors = jnp.linalg.eigh((ritz + ritz.T) / 2)
        return image @ vectors, values[-1], old, count + 1

    angles = -jnp.pi + width * (jnp.arange(cells) + 0.5)
    waves = jnp.arange(block) // 2 + 1
    phases = jnp.where(jnp.arange(block) % 2 == 0, 0.0, jnp.pi / 2)
    start = root * jnp.cos(angles[:, None] * waves - phases)
    zero = jnp.zeros((), target.dtype)
    carry = body((start, zero, zero, jnp.zeros((), int)))
    _, value, _, _ = jax.lax.while_loop(cond, body, carry)
    return 1 / value
