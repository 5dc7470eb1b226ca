"""The sharp limit: the two-timescale limit ε → 0, and then the width of the steps η → 0."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import _compat, checks
from tts_jax._integrate import check_start
from tts_jax._precision import double_precision, require_double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._trajectory import Trajectory, raise_on_failure, record


@double_precision
def sharp_limit(
    problem: AbstractProblem, state: State, *, tau: Float[ArrayLike, " T"], throw: bool = False
) -> Trajectory:
    """The limit ε → 0 and then η → 0, event by event and exact to rounding.

    For `Univariate` see docs/sharp_limit.md: neurons that flank a jump alone obey a
    conservation law, and all their times are hypergeometric; what is coupled moves in Taylor
    steps between events whose times are roots of polynomials. Every start has an answer.

    Args:
        problem: a problem that defines `sharp`; `Univariate` does.
        state: the start, with any leading batch axes; only its slow part is used.
        tau: recorded slow times, `[T]`, strictly increasing, ≥ 0.
        throw: raise where the limit is not unique instead of returning a status.

    Returns:
        A `Trajectory`, whose loss is that of η → 0. Its `.events` list what happens at any time,
        also beyond the last recorded one; `.stats["hitting_time"]`, `[..., jumps]`, is the τ at
        which a neuron first comes to stay on each jump (infinite if never). A lane whose limit
        is not unique has the status `NOT_UNIQUE` and NaN after the time `.stats["reached"]`.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
        TypeError: the problem has no sharp limit.
        RuntimeError: traced with `jax_enable_x64` off; or a lane failed and `throw` is set.
    """
    require_double_precision("sharp_limit", problem, state, tau)
    checks.increasing_times(tau)
    check_start(problem, state)
    slow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), state.slow)
    tau = jnp.asarray(tau, jnp.float64)
    shape = batch_shape(problem, state)
    count = math.prod(shape)
    slow = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[len(shape) :]), slow)
    traced = checks.is_traced(slow, tau, problem) or checks.inside_trace()
    mesh = _compat.lane_mesh(jax.local_devices()[: 1 if traced else count])
    # idle lanes of the last device repeat the first ones
    padded = np.arange(-(-count // mesh.size) * mesh.size) % count
    slow = jax.tree.map(lambda leaf: leaf[padded], slow)
    answer = _on_devices(problem, slow, tau, mesh)
    answer = jax.tree.map(lambda leaf: leaf[:count].reshape(*shape, *leaf.shape[1:]), answer)
    names = (*(f"batch_{axis}" for axis in range(len(shape) - 1)), "seed")[: len(shape)]
    trajectory = record(problem, method="sharp_limit", tau=tau, batch_dims=names, **answer)
    return raise_on_failure(trajectory) if throw else trajectory


@eqx.filter_jit
def _on_devices(
    problem: AbstractProblem, slow: PyTree[Array], tau: Array, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    numbers, static = eqx.partition((problem, tau), eqx.is_array)

    def on_device(slow: PyTree[Array], numbers: Any) -> dict[str, Any]:
        problem, tau = eqx.combine(numbers, static)
        return problem.sharp(slow, tau)

    return _compat.over_devices(on_device, mesh, (True, False))(slow, numbers)
