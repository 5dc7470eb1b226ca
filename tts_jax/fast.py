"""Fast solvers: the fast variable on the critical manifold, y*(x) = argmin_y g(y, x).

All have one protocol, `solve(problem, slow, sample=None, start=None)`, and answer a `Solution`:
the fast variable and what is known about it. With a `sample` they solve for the fast loss of that
sample, so that label noise or a minibatch is seen by the solve as by the gradient.

| solver | what g must be | what it asks of the problem |
|---|---|---|
| `ClosedForm` | anything | `critical(slow)` |
| `Quadratic` | quadratic in y, in all of space or on the unit sphere | `fast_loss` |
| `Ridge` | regularised least squares | `ridge(slow, sample)` |
| `Argmin` | smooth, strongly convex in y | `fast_loss` |
| `GradientSteps` | differentiable in y | `fast_loss` |

A problem names its solver by the property `fast_solver`; without a closed form, `critical` is by
it. `Ridge` and `Argmin` are for a fast variable in all of space. All but `ClosedForm` are
differentiable in the problem, the sample and x: `Argmin` by the implicit function theorem, the
others by their formulas.
"""

import abc
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import checks
from tts_jax.geometry import Euclidean, Sphere


if TYPE_CHECKING:
    from tts_jax._problem import AbstractProblem


class Solution(NamedTuple):
    """A point of the critical manifold.

    Attributes:
        fast: the fast variable y*(x).
        info: what is known about it, numbers by name: `residual`, the largest entry of ∇_y g in
            the tangent space (by `Ridge` of half the gradient of its squares); by solvers of
            linear systems also `condition`, the condition number of the system or an upper bound
            of it, infinite where the minimiser is not unique; by `Argmin` whether it `converged`.
    """

    fast: PyTree[Array]
    info: dict[str, Array]


class AbstractFastSolver(eqx.Module):
    """Finds the fast variable at a given slow one.

    Attributes:
        factorises: whether it may factorise a matrix; then `sgd` keeps to one CPU device, unless
            XLA's pool has threads enough for several (`PJRT_NPROC`).
    """

    factorises: ClassVar[bool] = True

    @abc.abstractmethod
    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        """The critical point at `slow`.

        Args:
            problem: what the fast loss belongs to.
            slow: one slow variable.
            sample: a sample to solve for; by default the fast loss itself.
            start: a fast variable to begin with, for solvers that iterate; by default zero.
        """


class ClosedForm(AbstractFastSolver):
    """The problem's own `critical`, which does not look at the sample."""

    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        del sample, start
        if not problem.closed_form:
            raise TypeError(
                f"`{type(problem).__name__}` does not define `critical`, so it has no closed form. "
                f"Use `fast.Quadratic()`, `fast.Ridge()` or `fast.Argmin()`."
            )
        fast = problem.critical(slow)
        return Solution(fast, {"residual": _residual(problem, slow, None, fast)})


class Quadratic(AbstractFastSolver):
    """The minimiser of a fast loss that is quadratic in y, of least norm where it is not unique.

    The Hessian ∇²_y g comes by automatic differentiation, in as many gradients as y has entries.
    Its eigenvalues below some ulp of the largest count as zero.

    Where the problem's `fast_geometry` is the unit sphere, y is one vector and (∇²_y g + μ) y = b,
    with the Lagrange multiplier μ above minus the smallest eigenvalue, which is where |y| = 1. The
    condition is that of this matrix; it is infinite where y and its mirror image in the lowest
    eigenvector do equally well. One of them is the answer, with its derivatives; where several
    eigenvectors are lowest these have none, and are 0.
    """

    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        del start
        _for_geometry(problem, self, (Euclidean, Sphere))
        zero, unravel = ravel_pytree(_zero(problem))
        gradient = jax.grad(lambda flat: objective(problem, slow, sample)(unravel(flat)))
        hessian = jax.jacfwd(gradient)(zero)
        if isinstance(problem.fast_geometry, Sphere):
            shape = jax.tree.map(lambda leaf: leaf.shape, problem.structure().fast)
            if shape != zero.shape:
                raise TypeError(
                    f"`fast.Quadratic` on the sphere is for a fast variable that is one vector, "
                    f"got {shape}. Use a solver of your own."
                )
            flat, condition = _on_sphere(hessian, gradient, zero)
            info = {"residual": _residual(problem, slow, sample, unravel(flat))}
            return Solution(unravel(flat), info | {"condition": condition})
        eigenvalues = jnp.linalg.eigvalsh(jax.lax.stop_gradient(hessian))
        fast = unravel(least_norm(hessian, lambda flat: -gradient(flat), zero))
        residual = _residual(problem, slow, sample, fast)
        return Solution(fast, {"residual": residual, "condition": condition_of(eigenvalues)})


class Blocks(eqx.Module):
    """A tall matrix whose rows are computed by blocks, never all at once.

    Attributes:
        block: `block(rows)`, the rows `[size, k]` of the matrix that belong to `rows`.
        data: what the rows are computed from: arrays `[n, ...]`.
        size: rows of one block.
    """

    block: Callable[[PyTree[Array]], Float[Array, "size k"]]
    data: PyTree[Array]
    size: int = eqx.field(static=True, default=4096)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(n, k)` of the matrix."""
        count = jax.tree.leaves(self.data)[0].shape[0]
        return count, self._form.shape[1]

    @property
    def dtype(self) -> Any:
        """The type of its numbers."""
        return self._form.dtype

    def apply(self, vector: Float[Array, "k ..."]) -> Float[Array, "n ..."]:
        """A y."""
        count = self.shape[0]

        @jax.checkpoint
        def one(part: Any) -> Array:  # for a gradient too, one block at a time
            return self.block(part[0]) @ vector

        parts = jax.lax.map(one, self._parts(None))
        return parts.reshape(-1, *parts.shape[2:])[:count]

    def transposed(self, vector: Float[Array, "n ..."]) -> Float[Array, "k ..."]:
        """Aᵀ r."""

        @jax.checkpoint
        def add(total: Array, part: Any) -> tuple[Array, None]:
            rows, mine = part
            return total + self.block(rows).T @ mine, None

        zero = jnp.zeros((self.shape[1], *vector.shape[1:]), self.dtype)
        return jax.lax.scan(add, zero, self._parts(vector))[0]

    def gram(self) -> Float[Array, "k k"]:
        """AᵀA."""

        def add(total: Array, part: Any) -> tuple[Array, None]:
            rows, inside = part
            block = self.block(rows) * inside[:, None]
            return total + block.T @ block, None

        width = self.shape[1]
        inside = jnp.ones(self.shape[0], self.dtype)
        return jax.lax.scan(add, jnp.zeros((width, width), self.dtype), self._parts(inside))[0]

    def whole(self) -> Float[Array, "n k"]:
        """A itself."""
        return self.apply(jnp.eye(self.shape[1], dtype=self.dtype))

    @property
    def _form(self) -> jax.ShapeDtypeStruct:
        first = jax.tree.map(lambda leaf: leaf[:1], self.data)
        return jax.eval_shape(self.block, first)

    def _parts(self, vector: Array | None) -> Any:
        """The data and entries of `vector` by blocks; the last one is filled up with zeros."""
        count = jax.tree.leaves(self.data)[0].shape[0]
        size = min(self.size, count)
        blocks = -(-count // size)

        def cut(leaf: Array, fill: bool) -> Array:
            spare = blocks * size - count
            # rows that fill up repeat the first, so that a block is computed from real data
            more = jnp.broadcast_to(leaf[:1], (spare, *leaf.shape[1:]))
            more = more if fill else jnp.zeros_like(more)
            return jnp.concatenate([leaf, more]).reshape(blocks, size, *leaf.shape[1:])

        data = jax.tree.map(lambda leaf: cut(jnp.asarray(leaf), True), self.data)
        return data, None if vector is None else cut(vector, False)


class RidgeSystem(NamedTuple):
    """Regularised least squares: min over y of |A y − t|² + penalty · |y − prior|².

    Attributes:
        features: A, `[n, k]`: an array, or `Blocks` of its rows where it is too large for one.
        targets: t, `[n]`, or `[n, tasks]` for several y with the same features.
        penalty: a number ≥ 0.
        prior: what y is drawn to: a number or an array of the form of y.
    """

    features: Float[Array, "n k"] | Blocks
    targets: Float[Array, "n ..."]
    penalty: Float[ArrayLike, ""]
    prior: Float[ArrayLike, "..."] = 0.0


class Ridge(AbstractFastSolver):
    """Regularised least squares, in the space of features or of samples, whichever is smaller.

    It asks the problem for `ridge(slow, sample)`, a `RidgeSystem`.

    Attributes:
        form: `"features"`: k equations, (AᵀA + penalty) y = Aᵀt + penalty · prior; `"samples"`: n
            equations; `"auto"`: the fewer.
        singular: whether the penalty may be zero. Then the minimiser of least distance to the
            prior is found by eigenvectors, some ten times the work of a Cholesky factor.
    """

    form: Literal["auto", "features", "samples"] = eqx.field(static=True, default="auto")
    singular: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        checks.one_of("form", self.form, ("auto", "features", "samples"), "Or leave it out.")

    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        del start
        _for_geometry(problem, self, (Euclidean,))
        features, targets, penalty, prior = problem.ridge(slow, sample)
        count, size = features.shape
        dtype = features.dtype
        by_samples = self.form == "samples" or (self.form == "auto" and count < size)
        if isinstance(features, Blocks):
            apply, transposed = features.apply, features.transposed
            whole = features.whole() if by_samples else None
        else:
            matrix = whole = features

            def apply(vector: Array) -> Array:
                return matrix @ vector

            def transposed(vector: Array) -> Array:
                return matrix.T @ vector

        if by_samples:
            assert whole is not None
            gram = whole @ whole.T
        else:
            gram = features.gram() if isinstance(features, Blocks) else features.T @ features
        gram = gram + penalty * jnp.eye(gram.shape[0], dtype=dtype)
        prior = jnp.broadcast_to(jnp.asarray(prior, dtype), (size, *targets.shape[1:]))
        misfit = targets - apply(prior)

        def pull(move: Array) -> Array:
            if by_samples:
                return misfit - apply(transposed(move)) - penalty * move
            return transposed(misfit - apply(move)) - penalty * move

        zero = jnp.zeros((gram.shape[0], *targets.shape[1:]), dtype)
        solve = least_norm if self.singular else cholesky_solve
        move = solve(gram, pull, zero)
        move = transposed(move) if by_samples else move
        gradient = penalty * move - transposed(misfit - apply(move))
        if self.singular:
            condition = condition_of(jnp.linalg.eigvalsh(jax.lax.stop_gradient(gram)))
        else:  # the largest eigenvalue is at most the trace of what has no penalty, and the penalty
            condition = jnp.trace(gram) / penalty - (gram.shape[0] - 1)
        info = {"residual": jnp.max(jnp.abs(gradient)), "condition": condition}
        return Solution(prior + move, info)


class Argmin(AbstractFastSolver):
    """The minimiser of any smooth, strongly convex fast loss, by Optimistix.

    Derivatives are those of the implicit function theorem, so that they do not depend on how the
    minimum was found. Where it was not found, `info["converged"]` says so.

    Attributes:
        solver: an `optimistix.AbstractRootFinder`, which solves ∇_y g = 0, or an
            `optimistix.AbstractMinimiser`; by default Newton's method.
        max_steps: its step limit.
    """

    solver: Any = optx.Newton(rtol=1e-12, atol=1e-12)
    max_steps: int = eqx.field(static=True, default=256)

    def __check_init__(self) -> None:
        kinds = (optx.AbstractRootFinder, optx.AbstractMinimiser)
        if not isinstance(self.solver, kinds):
            raise TypeError(
                f"Argument `solver` must be a root finder or a minimiser of Optimistix, got "
                f"{self.solver!r}. Pass for example `optimistix.BFGS(rtol=1e-9, atol=1e-9)`."
            )
        checks.positive_integer("max_steps", self.max_steps, "Use e.g. 256.")

    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        _for_geometry(problem, self, (Euclidean,))
        start = _zero(problem) if start is None else start

        def loss(fast: PyTree[Array], args: Any) -> Array:
            problem, slow, sample = args
            return objective(problem, slow, sample)(fast)

        options: dict[str, Any] = {"max_steps": self.max_steps, "throw": False}
        args = (problem, slow, sample)
        if isinstance(self.solver, optx.AbstractMinimiser):
            found = optx.minimise(loss, self.solver, start, args, **options)
        else:
            found = optx.root_find(jax.grad(loss), self.solver, start, args, **options)
        residual = _residual(problem, slow, sample, found.value)
        converged = found.result == optx.RESULTS.successful
        return Solution(found.value, {"residual": residual, "converged": converged})


class GradientSteps(AbstractFastSolver):
    """`count` steps of gradient descent in y from the start: not the minimiser, but towards it.

    They stay where the problem's `fast_geometry` has them, and need a start there; from zero they
    begin in all of space only.

    Attributes:
        count: the number of steps.
        step_size: their size, in fast time.
    """

    factorises: ClassVar[bool] = False

    count: int = eqx.field(static=True)
    step_size: Float[Array, ""]

    def __init__(self, count: int, step_size: Float[ArrayLike, ""]) -> None:
        """Build the solver.

        Raises:
            ValueError: `count` is no integer ≥ 1 or `step_size` not positive.
        """
        self.count = checks.positive_integer("count", count, "It is the number of steps.")
        remedy = "It is the step size of the fast variable."
        self.step_size = checks.positive("step_size", step_size, remedy, single=True)

    def solve(
        self,
        problem: "AbstractProblem",
        slow: PyTree[Array],
        sample: PyTree[Array] | None = None,
        start: PyTree[Array] | None = None,
    ) -> Solution:
        place = problem.fast_geometry
        if start is None:
            start = _zero(problem)
            if not isinstance(place, Euclidean):
                raise TypeError(
                    f"`fast.GradientSteps` on a `{type(place).__name__}` needs a `start`, got None."
                )
        gradient = jax.grad(objective(problem, slow, sample))

        def step(_: Any, fast: PyTree[Array]) -> PyTree[Array]:
            return place.descend(fast, gradient(fast), self.step_size)

        fast = jax.lax.fori_loop(0, self.count, step, start)
        return Solution(fast, {"residual": _residual(problem, slow, sample, fast)})


# --- shared by the solvers, and by problems that have closed forms -------------------------------

SOLVES = 3  # the first one and two corrections


def objective(
    problem: "AbstractProblem", slow: PyTree[Array], sample: PyTree[Array] | None
) -> Callable[[PyTree[Array]], Array]:
    """The fast loss at `slow` as a function of y, of the sample if there is one."""
    if sample is None:
        return lambda fast: problem.fast_loss(fast, slow)
    return lambda fast: problem.sample_fast_loss(fast, slow, sample)


def least_norm(
    gram: Float[Array, "k k"], pull: Callable[[Array], Array], zero: Float[Array, "k ..."]
) -> Float[Array, "k ..."]:
    """The zero of `pull`, affine with the symmetric matrix −`gram`; where not unique, the least.

    By eigenvectors, without what rounding hides, and corrections by `pull`. Each of these also
    yields one more order of derivatives, so that the first two are those of the solution, and no
    eigenvector is differentiated. The inverse fades out below 100 ulp of the largest eigenvalue,
    so that columns may become equal without a jump in the solution, and ends at 8: below there is
    only rounding.
    """
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    ulp = jnp.finfo(gram.dtype).eps * values[-1]
    faded, hidden = 100.0 * ulp, 8.0 * ulp
    inverse = jnp.where(values > hidden, values / (values**2 + faded**2), 0.0)
    return _corrected(lambda right: vectors @ (inverse * (vectors.T @ right).T).T, pull, zero)


def cholesky_solve(
    gram: Float[Array, "k k"], pull: Callable[[Array], Array], zero: Float[Array, "k ..."]
) -> Float[Array, "k ..."]:
    """The same for a positive definite matrix, by its Cholesky factor."""
    factor = jax.scipy.linalg.cho_factor(jax.lax.stop_gradient(gram))
    return _corrected(lambda right: jax.scipy.linalg.cho_solve(factor, right), pull, zero)


def _corrected(
    solve: Callable[[Array], Array], pull: Callable[[Array], Array], zero: Array
) -> Array:
    return jax.lax.fori_loop(0, SOLVES, lambda _, at: at + solve(pull(at)), zero)


def condition_of(eigenvalues: Float[Array, " k"]) -> Float[Array, ""]:
    """Largest over smallest of ascending eigenvalues; infinite where the smallest is rounding."""
    smallest = eigenvalues[0]
    resolved = smallest > jnp.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    ratio = eigenvalues[-1] / jnp.where(resolved, smallest, 1.0)
    return jnp.where(resolved | jnp.isnan(smallest), ratio, jnp.inf)


def _on_sphere(
    hessian: Float[Array, "k k"], gradient: Callable[[Array], Array], zero: Float[Array, " k"]
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """The minimiser of a quadratic function on the unit sphere, and the condition number.

    By the eigenvectors of the Hessian H: |(H + μ)⁻¹b| = 1 has one solution above minus the lowest
    eigenvalue, to which Newton's method for 1/|y| = 1 rises from a lower bound. Then corrections as
    in `least_norm`, of y and μ together, which also yield the derivatives.
    """
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(hessian))
    pull = vectors.T @ jax.lax.stop_gradient(-gradient(zero))
    gaps = values - values[0]
    tiny = jnp.finfo(hessian.dtype).eps * (jnp.abs(values).max() + jnp.linalg.norm(pull))

    def parts(shift: Array) -> Array:
        below = gaps + shift
        return jnp.where(below > tiny, pull / jnp.where(below > tiny, below, 1.0), 0.0)

    def rise(_: Any, shift: Array) -> Array:
        below = gaps + shift
        y = parts(shift)
        length = jnp.linalg.norm(y)
        slope = jnp.sum(y**2 / jnp.where(below > tiny, below, 1.0))
        move = (length - 1.0) * length**2 / jnp.where(slope > 0.0, slope, 1.0)
        return jnp.maximum(shift + jnp.where(slope > 0.0, move, 0.0), 0.0)

    # no entry is longer than 1; the lowest eigenvalue may have several of them
    lower = jnp.maximum(jnp.max(jnp.abs(pull) - gaps), 0.0)
    shift = jax.lax.fori_loop(0, 64, rise, lower)
    open_end = shift <= tiny  # what is missing to length 1 then is along the lowest eigenvector
    y = parts(shift)
    missing = jnp.sqrt(jnp.maximum(1.0 - jnp.sum(y**2), 0.0))
    y = y.at[0].add(jnp.where(open_end, missing, 0.0))
    y = vectors @ (y / jnp.linalg.norm(y))
    condition = jnp.where(open_end, jnp.inf, 1.0 + gaps[-1] / jnp.where(open_end, 1.0, shift))
    flat = jnp.append(y, shift - values[0])
    # bordered by y the matrix is regular, unless it is singular across y
    across = jnp.sum(gaps + shift <= tiny) > 1
    corner = jnp.zeros((1, 1), y.dtype)
    known = jnp.block([[jax.lax.stop_gradient(hessian), y[:, None]], [y[None], corner]])
    known = known.at[jnp.arange(y.size), jnp.arange(y.size)].add(flat[-1])
    lost = across | (open_end & (missing < 1e-3))
    bordered = jnp.where(lost, jnp.eye(y.size + 1, dtype=y.dtype), known)
    bordered = jax.lax.stop_gradient(bordered)

    def wrong(at: Array) -> Array:
        y, multiplier = at[:-1], at[-1]
        return -jnp.append(gradient(y) + multiplier * y, (y @ y - 1.0) / 2.0)

    factor = jax.scipy.linalg.lu_factor(bordered)
    keep = jnp.where(lost, 0.0, 1.0).astype(y.dtype)
    solve = functools.partial(jax.scipy.linalg.lu_solve, factor)
    flat = jax.lax.stop_gradient(flat)
    flat = _corrected(lambda right: keep * solve(right), wrong, flat)
    y = flat[:-1]
    return y / jnp.linalg.norm(y), condition


def _for_geometry(
    problem: "AbstractProblem", solver: AbstractFastSolver, kinds: tuple[type, ...]
) -> None:
    """Refuse a problem whose fast variable lives elsewhere."""
    place = problem.fast_geometry
    if not isinstance(place, kinds):
        raise TypeError(
            f"`fast.{type(solver).__name__}` is for a fast variable in a geometry of "
            f"{[kind.__name__ for kind in kinds]}, got a `{type(place).__name__}`. Use "
            f"`fast.GradientSteps` with a start, or a solver of your own."
        )


def _zero(problem: "AbstractProblem") -> PyTree[Array]:
    form = problem.structure().fast
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


def _residual(
    problem: "AbstractProblem",
    slow: PyTree[Array],
    sample: PyTree[Array] | None,
    fast: PyTree[Array],
) -> Array:
    slopes = jax.grad(objective(problem, slow, sample))(fast)
    slopes = jax.tree.leaves(problem.fast_geometry.tangent(fast, slopes))
    return jnp.max(jnp.stack([jnp.max(jnp.abs(slope), initial=0.0) for slope in slopes]))
