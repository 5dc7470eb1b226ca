"""Seeds on a GPU: one thread per seed, thousands of steps per kernel launch.

One SGD step of an ensemble is a handful of small array operations. Launched one by one, a GPU
would spend its time on the launches. Two forms of the lane loop avoid that; both call the same
`lane_sample`, `lane_label` and `lane_step` as the loop on a CPU.

`advance_groups` is one kernel, written in Pallas for its Mosaic GPU backend. A Pallas thread is
a warpgroup of 128 CUDA threads, and an array `[128]` one register of each: a group of 128 lanes
is one block, its state a tuple of rows `[128]` that stay in registers from the first step of a
launch to the last, and Threefry runs in the loop. Memory is touched at both ends only.

`advance_unrolled` is plain XLA for every other GPU and for given samples: the arrays of the lane
loop with `UNROLL` steps in the loop's body. XLA makes about two kernels of each step, and the
loop's condition, for which the host may wait, is asked once per body.

What bounds the kernel is the number of instructions. A float32 step of `Univariate` takes 114,
most of them Threefry, and 12 per neuron; `benchmarks/gpu_code.py` compiles it for an H100 and
counts:

    neurons                 20     32     40     48     64   float64: 12     20
    instructions per step  354    498    594    698   1009          339    486
    of these to memory       0      0      0      2    121            0      2
    registers per thread   143    202    247    255    255          193    255

A multiprocessor issues 128 instructions of threads per cycle, so at 1.7 GHz the 132 of an H100
cannot take more than 8e10 seed-steps a second at 20 neurons in float32; an H200 was measured at
6.8e10 (`benchmarks/gpu_results.md`). Three blocks then share
the registers of a multiprocessor: the device is full from 132 · 3 · 128 = 50,688 seeds on, and
fewer seeds take about the same time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, UInt32

from tts_jax._random import Words


WIDTH = 128  # lanes of a group of the kernel: the threads of a warpgroup
UNROLL = 16  # steps in the body of the XLA loop
MOST_WORDS = 200  # 32-bit words that a lane keeps, for a thread of 255 registers
_HARDWARE = (9, 10)  # compute capabilities (major) that this form of kernel compiles for


def obstacle(
    device: Any, dtype: Any, numbers: int, *, replay: bool = False, rows: bool = True
) -> str | None:
    """Why the kernel cannot move lanes on `device`, in one sentence; None if it can.

    Arguments:
        dtype: of the steps.
        numbers: floating-point numbers that a lane keeps, fixed and changing.
        replay: whether the samples are given.
        rows: whether the problem's lane methods take rows as tuples (`lane_rows`).
    """
    if device.platform != "gpu":
        return f"it is written for GPUs, and this device is a {device.platform.upper()}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    if not major.isdecimal() or int(major) not in _HARDWARE:
        return (
            f"it needs an NVIDIA GPU of the Hopper or data-centre Blackwell family (compute "
            f"capability 9 or 10), and this one has {capability}"
        )
    if not rows:
        return "the problem's lane methods do not take the rows of an array one by one"
    if replay:
        return "it draws its samples itself, and `samples` are given"
    words = numbers * (np.dtype(dtype).itemsize // 4)
    if words > MOST_WORDS:
        return (
            f"the numbers of one seed must fit the registers of a thread, at most {MOST_WORDS} "
            f"words of 32 bits, and these are {words}"
        )
    return None


# --- the loops ------------------------------------------------------------------------------


def advance_groups(
    problem: Any,
    shared: PyTree[Array],
    fixed: PyTree[Array],
    carry: PyTree[Array],
    words: Words,
    first: tuple[Any, Any],
    count: Any,
    *,
    gradient: str,
) -> PyTree[Array]:
    """`count` steps of groups of `WIDTH` lanes in one kernel launch.

    In the kernel a leaf `[groups, m, WIDTH]` is a tuple of m rows `[WIDTH]` of its group, a leaf
    `[groups, WIDTH]` one row; a leaf `[n]` of `shared` is a tuple of n scalars.

    Arguments:
        shared: numbers of all lanes, leaves `[]` or `[n]`, of one dtype.
        fixed, carry: leaves `[groups, WIDTH]` or `[groups, m, WIDTH]`.
        words: the two key words of every lane, `[groups, WIDTH]`.
        first: the number (high, low) of the first step.
        count: number of steps, below 2³¹.

    Returns:
        The new `carry`.
    """
    # imported late: it takes a fraction of a second, and few runs need it
    from jax.experimental.pallas import mosaic_gpu

    inputs, input_tree = jax.tree.flatten((fixed, carry, words))
    results, carry_tree = jax.tree.flatten(carry)
    numbers, shared_tree = jax.tree.flatten(shared)
    packed = jnp.concatenate([jnp.ravel(leaf) for leaf in numbers])
    counters = jnp.stack([jnp.asarray(word, np.uint32) for word in (*first, count)])

    def sgd_lanes(counter_ref, number_ref, *refs):
        group = lax.axis_index("group")
        rows = [_load(ref, group) for ref in refs[: len(inputs)]]
        fixed, carry, words = input_tree.unflatten(rows)
        shared = shared_tree.unflatten(_scalars(number_ref, [leaf.shape for leaf in numbers]))
        sample = _drawn(problem, shared, fixed, words, (counter_ref[0], counter_ref[1]))
        step = _stepper(problem, shared, fixed, sample, gradient=gradient)
        # a loop with int32 bounds becomes a counted loop
        count = counter_ref[2].astype(np.int32)
        carry = lax.fori_loop(np.int32(0), count, step, carry)
        for ref, row in zip(refs[len(inputs) :], carry_tree.flatten_up_to(carry), strict=True):
            _store(ref, group, row)

    run = mosaic_gpu.kernel(
        sgd_lanes,
        out_type=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in results],
        grid=(inputs[0].shape[0],),
        grid_names=("group",),
    )
    return carry_tree.unflatten(run(counters, packed, *inputs))


def advance_unrolled(
    problem: Any,
    shared: PyTree[Array],
    group: tuple[PyTree[Array], PyTree[Array], PyTree[Array]],
    first: tuple[Any, Any],
    count: Any,
    *,
    gradient: str,
    replay: bool,
) -> PyTree[Array]:
    """`count` steps of one group of any width as an XLA loop over `UNROLL` steps at a time.

    Arguments:
        group: fixed and carry, leaves `[..., W]`, and the source of samples: the key words, `[W]`
            each, or with `replay` the samples, leaves `[steps, W]`.
        first: the number (high, low) of the first step.
        count: number of steps.

    Returns:
        The new `carry`.
    """
    fixed, carry, source = group

    def given(index: Array) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, False), source)

    sample = given if replay else _drawn(problem, shared, fixed, source, first)
    step = _stepper(problem, shared, fixed, sample, gradient=gradient)

    def body(index: Array, carry: PyTree[Array]) -> PyTree[Array]:
        for offset in range(UNROLL):
            carry = step(index * np.uint32(UNROLL) + np.uint32(offset), carry)
        return carry

    count = jnp.asarray(count, np.uint32)
    whole = count // np.uint32(UNROLL)
    carry = lax.fori_loop(np.uint32(0), whole, body, carry)
    return lax.fori_loop(whole * np.uint32(UNROLL), count, step, carry)


def _drawn(problem: Any, shared: Any, fixed: Any, words: Words, first: tuple[Any, Any]) -> Callable:
    """The sample of every lane at step `first` + index, from its key words `[W]`."""
    high, low = first

    def sample(index: UInt32[Array, ""]) -> PyTree[Array]:
        step = low + index.astype(np.uint32)
        carried = jnp.where(step < low, high + np.uint32(1), high)
        return problem.lane_sample(shared, fixed, words, (carried, step))

    return sample


def _stepper(problem: Any, shared: Any, fixed: Any, sample: Callable, *, gradient: str) -> Callable:
    """The body of a loop over steps: (index, carry) to the next carry."""

    def step(index: Array, carry: PyTree[Array]) -> PyTree[Array]:
        point = problem.lane_label(shared, sample(index))
        return problem.lane_step(shared, fixed, carry, point, gradient=gradient)

    return step


def _scalars(ref: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The packed numbers of leaves `[]`, as scalars, and `[n]`, as tuples of scalars."""
    leaves, at = [], 0
    for shape in shapes:
        values = tuple(ref[at + k] for k in range(math.prod(shape)))
        leaves.append(values if shape else values[0])
        at += len(values)
    return leaves


def _load(ref: Any, group: Any) -> Any:
    """The rows of a group: one `[WIDTH]`, or a tuple of them."""
    if len(ref.shape) == 2:
        return ref[group]
    return tuple(ref[group, j] for j in range(ref.shape[1]))


def _store(ref: Any, group: Any, rows: Array | Sequence[Array]) -> None:
    """Write what `_load` reads."""
    if isinstance(rows, tuple):
        for j, row in enumerate(rows):
            ref[group, j] = row
    else:
        ref[group] = rows
