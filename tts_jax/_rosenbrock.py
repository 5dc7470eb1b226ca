"""Rodas5P as a Diffrax solver: a stiffly accurate Rosenbrock method of order 5.

Steinebach, "Construction of Rosenbrock–Wanner method Rodas5P and numerical benchmarks within
the Julia Differential Equations package", BIT 63:27 (2023). A step costs one Jacobian, one LU
factorisation and eight linear solves; no Newton iteration, so nothing fails to converge.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree


# In the variables k that spare the products with the Jacobian (Hairer & Wanner II, eq. IV.7.25):
# (I/(γh) − J) k_i = f(y + Σ_j A_ij k_j) + Σ_j C_ij k_j / h + h d_i ∂f/∂t,  y_1 = y + Σ_j b_j k_j.
GAMMA = 0.21193756319429014
_A5 = [-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256]
_A5 += [0.030198172008377946]
A = np.zeros((8, 8))
A[1, :1] = [3.0]
A[2, :2] = [2.849394379747939, 0.45842242204463923]
A[3, :3] = [-6.954028509809101, 2.489845061869568, -10.358996098473584]
A[4, :4] = [2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641]
A[5:, :5] = _A5
A[6, 5], A[7, 5], A[7, 6] = 1.0, 1.0, 1.0
B = np.array([*_A5, 1.0, 1.0, 1.0])
C = np.zeros((8, 8))
C[1, :1] = [-14.155112264123755]
C[2, :2] = [-17.97296035885952, -2.859693295451294]
C[3, :3] = [147.12150275711716, -1.41221402718213, 71.68940251302358]
C[4, :4] = [165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306]
C[5, :4] = [24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125]
C[5, 4] = -0.6610691825249471
C[6, :4] = [30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783]
C[6, 4:6] = [-19.097331116725623, -28.087943162872662]
C[7, :4] = [37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047]
C[7, 4:7] = [-40.06618937091002, -54.66780262877968, -9.48861652309627]
TIMES = np.array(
    [0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1, 1, 1]
)
D = np.array(
    [GAMMA, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734, 2.325825639765069]
    + [0.0, 0.0, 0.0]
)
# Dense output of order 4: y(θ) = (1−θ) y_0 + θ (y_1 + (1−θ)(h_0 + θ(h_1 + θ h_2))), h = H k.
H = np.array(
    [
        [25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204]
        + [0.524948541321073, 1.1241088310450404, 0.4272876194431874, -0.17202221070155493],
        [-9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796]
        + [20.176138334709044, 15.98066361424651, -6.789040303419874, -6.710236069923372],
        [11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643]
        + [-52.072871366152654, -59.78993625266729, -0.15582684282751913, 4.883087185713722],
    ]
)

_State: TypeAlias = None


class RosenbrockInterpolation(diffrax.AbstractLocalInterpolation):
    """The dense output of Rodas5P, of order 4."""

    t0: Any  # the type that Diffrax's base class leaves open
    t1: Any
    y0: PyTree[Array]
    y1: PyTree[Array]
    k: PyTree[Array]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> PyTree[Array]:
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        width = self.t1 - self.t0
        theta = jnp.where(width == 0, 0.0, (t0 - self.t0) / jnp.where(width == 0, 1.0, width))

        def blend(y0: Array, y1: Array, k: Array) -> Array:
            s = theta.astype(y0.dtype)
            correction = (1 - s) * (k[0] + s * (k[1] + s * k[2]))
            return (1 - s) * y0 + s * (y1 + correction)

        return jax.tree.map(blend, self.y0, self.y1, self.k)


class AbstractJacobian(eqx.Module):
    """A Jacobian J with a structure that makes its linear systems cheaper than dense ones."""

    @abc.abstractmethod
    def shifted_solver(
        self, shift: Float[Array, ""]
    ) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
        """The map b ↦ (shift·I − J)⁻¹ b; what a factorisation costs is paid here, once."""


def _shifted_solver(
    jacobian: Float[Array, "n n"] | AbstractJacobian, h: Float[Array, ""], like: Array
) -> Callable[[Array], Array]:
    """b ↦ (I/(γh) − J)⁻¹ b."""
    if isinstance(jacobian, AbstractJacobian):
        return jacobian.shifted_solver(1 / (GAMMA * h))
    shifted = jnp.eye(like.size, dtype=like.dtype) / (GAMMA * h) - jacobian
    factor = jax.scipy.linalg.lu_factor(shifted)
    return lambda right: jax.scipy.linalg.lu_solve(factor, right)


class Rodas5P(diffrax.AbstractAdaptiveSolver):
    """Rodas5P, an L-stable Rosenbrock method of order 5 with an embedded method of order 4.

    Use it in `diffrax.diffeqsolve` like any other solver, with an `ODETerm` and an adaptive
    step size controller. It suits stiff systems of up to a few hundred unknowns, at mild to
    high accuracy; of more where the Jacobian has a structure.

    Attributes:
        jacobian: `jacobian(t, y, args)` gives ∂f/∂y in the flattened coordinates of y, as an
            array `[n, n]` or as an `AbstractJacobian`, which brings its own linear solves; by
            automatic differentiation when it is `None`.
    """

    jacobian: Callable[[Any, PyTree[Array], Any], Float[Array, "n n"] | AbstractJacobian] | None = (
        None
    )

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = RosenbrockInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        del terms
        return 5

    def init(self, terms, t0, t1, y0, args) -> _State:
        del terms, t0, t1, y0, args

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        flat, unravel = ravel_pytree(y0)
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        h = (t1 - t0).astype(flat.dtype)

        def field(t: Array, y: Array) -> Array:
            return ravel_pytree(terms.vf(t, unravel(y), args))[0]

        if self.jacobian is None:
            jacobian = jax.jacfwd(lambda y: field(t0, y))(flat)
        else:
            jacobian = self.jacobian(t0, y0, args)
        # free for an autonomous field, whose derivative in t is a symbolic zero
        velocity, drift = jax.jvp(lambda t: field(t, flat), (t0,), (jnp.ones_like(t0),))
        solve = _shifted_solver(jacobian, h, flat)
        stages: list[Array] = []
        for i in range(8):
            if i:
                increment = sum(A[i, j] * stages[j] for j in range(i) if A[i, j])
                velocity = field(t0 + TIMES[i] * h, flat + increment)
            right = velocity + h * D[i] * drift
            if i:
                right = right + sum(C[i, j] * stages[j] for j in range(i)) / h
            stages.append(solve(right))
        k = jnp.stack(stages)
        y1 = flat + jnp.asarray(B, flat.dtype) @ k
        dense = jax.vmap(unravel)(jnp.asarray(H, flat.dtype) @ k)
        dense_info = dict(y0=y0, y1=unravel(y1), k=dense)
        return unravel(y1), unravel(stages[7]), dense_info, None, diffrax.RESULTS.successful
