"""A small compiler: the lane step as one loop of vector instructions, by LLVM.

XLA compiles a step of SGD into several loops over memory, one for each group of operations, and
on a CPU they cost about twice what the processor needs. This module takes the step from JAX as a
jaxpr, elementwise arithmetic on `[rows, lanes]`, `[lanes]` and scalars and sums over rows, and
writes it in LLVM's vector types, with all operations on a row in one pass:

    for each group of lanes                     (groups are spread over threads)
        for each block of `BLOCK` steps         draw the block's samples
            for each step of the block
                for each level                  a level ends where a sum over rows is needed
                    for each row                every operation of this level

The last level of a step and the first of the next are one pass: a row is updated and looked at
again while it is in registers. A few seeds are laid out the other way, the rows of one seed in
a vector (`FEW`).

The numbers of a lane do not depend on the layout: sums over rows always add `CHUNK` interleaved
partial sums, a product that only feeds one sum is rounded with it where the processor can, and
nothing else is reordered.

LLVM comes with the optional package `llvmlite`. A problem that uses an operation which is not
in `graph.OPERATIONS` is refused by `Unsupported`, and XLA's loop takes over.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tts_jax._simd import cuda
from tts_jax._simd.graph import CHUNK, Unsupported
from tts_jax._simd.memory import aligned_copy


__all__ = [
    "CHUNK",
    "FEW",
    "Unsupported",
    "aligned_copy",
    "cuda",
    "in_threads",
    "missing",
]

FEW = 2  # up to this many seeds per thread, rows are laid out in the vectors


@functools.cache  # looking for a package takes longer than some solves need
def missing() -> str | None:
    """Why this engine cannot be used on this machine, if so."""
    if importlib.util.find_spec("llvmlite") is None:
        return "the optional package llvmlite is not installed (`pip install 'tts_jax[cpu]'`)"
    return None


def in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run `tasks` side by side, one of them in this thread."""
    others = [_pool(len(tasks)).submit(task) for task in tasks[1:]]
    try:
        tasks[0]()
    finally:
        for other in others:
            other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lanes")
