"""The sharp limit: the two-timescale limit ε → 0, and then the width of the steps η → 0."""

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import _compat, checks
from tts_jax._integrate import check_start
from tts_jax._precision import double_precision, on_host, require_double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._simd.memory import aligned
from tts_jax._trajectory import Trajectory, raise_on_failure, record


PART = 512  # starts that a thread of a CPU takes at a time, at most


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
    if checks.is_traced(slow, tau, problem) or checks.inside_trace():
        answer = problem.sharp(slow, tau)
    else:
        answer = _in_parts(problem, slow, tau)
    answer = jax.tree.map(lambda leaf: leaf.reshape((*shape, *leaf.shape[1:])), answer)
    if not on_host():
        answer = jax.tree.map(jnp.asarray, answer)
    names = (*(f"batch_{axis}" for axis in range(len(shape) - 1)), "seed")[: len(shape)]
    trajectory = record(problem, method="sharp_limit", tau=tau, batch_dims=names, **answer)
    return raise_on_failure(trajectory) if throw else trajectory


def _in_parts(problem: AbstractProblem, slow: PyTree[Array], tau: Array) -> dict[str, Any]:
    """`problem.sharp` of all lanes: some at a time in each thread of a CPU, or once on each GPU.

    Parts of few sizes need few compilations, and are copied into the answer from the cache.
    """
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    slow = jax.tree.map(np.asarray, slow)  # so that nothing but the limit itself is compiled
    count = jax.tree.leaves(slow)[0].shape[0]
    size = min(1 << (count - 1).bit_length(), PART) if on_cpu else -(-count // len(devices))
    parts = range(0, count, size)
    workers = (devices[:1] * _compat.cores() if on_cpu else devices)[: len(parts)]
    numbers, static = eqx.partition(problem, eqx.is_array)

    def given(first: int, device: Any) -> tuple[Any, ...]:
        # spare lanes repeat the first ones
        rows = np.arange(first, first + size) % count
        return jax.device_put((numbers, jax.tree.map(lambda leaf: leaf[rows], slow), tau), device)

    programs = {}
    for device in set(workers):
        leaves, structure = jax.tree.flatten(given(0, device))
        shapes = tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves
        )
        programs[device] = _compiled(static, structure, shapes)
    program, form = programs[workers[0]]
    if len(parts) == 1:
        answer = program(*given(0, workers[0]))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], answer) if on_cpu else answer
    whole = jax.tree.map(lambda leaf: aligned((count, *leaf.shape[1:]), leaf.dtype), form)

    def solve(first: int, device: Any) -> None:
        with jax.enable_x64(True):  # a context of each thread
            part = programs[device][0](*given(first, device))

        def keep(all_lanes: np.ndarray, own: Array) -> None:
            all_lanes[first : first + size] = np.asarray(own)[: count - first]

        jax.tree.map(keep, whole, part)

    with ThreadPoolExecutor(len(workers), thread_name_prefix="lanes") as pool:
        list(pool.map(solve, parts, itertools.cycle(workers)))
    return whole


@functools.lru_cache(maxsize=64)
def _compiled(
    static: AbstractProblem, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[Callable[..., Any], Any]:
    """`problem.sharp`, and the form of its answer.

    Args:
        static: the problem without its arrays.
        structure: the tree of these arrays, the starts and the times.
        shapes: the forms of its leaves.
    """

    def sharp(numbers: Any, slow: PyTree[Array], tau: Array) -> dict[str, Any]:
        return eqx.combine(numbers, static).sharp(slow, tau)

    platform = next(iter(shapes[0].sharding.device_set)).platform
    options = _compat.small_array_options(platform)
    lowered = jax.jit(sharp, compiler_options=options).lower(*structure.unflatten(shapes))
    return lowered.compile(), lowered.out_info
