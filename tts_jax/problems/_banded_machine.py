"""Where the banded engine runs: threads of the CPU, or of a GPU."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from tts_jax._simd import cuda, in_threads
from tts_jax._simd.memory import aligned


FEW = 4  # up to this many starts per thread, the vectors are narrower
MANY = 300  # with more neurons, wide vectors do not fit the cache
# On a GPU: the neighbours that may overlap, for which every thread has room; registers of a
# thread; the share of the free memory that starts at work and their records may take.
WIDEST_CUDA, REGISTERS, MEMORY_SHARE = 32, 255, 0.8
EMPTY = ("record_state", "record_order", "which", "condition")  # at the start, shared arrays


class Machine(Protocol):
    """Threads that share one problem and its starts."""

    def run(self, entry: str, which: np.ndarray | None = None) -> None:
        """Have all threads call `advance`, or `settle` or `finish` for the listed states."""
        ...

    def fetch(self, *names: str) -> None:
        """Fill the host's arrays of these names with what was computed; a `cuda.Output` stays."""
        ...


@functools.lru_cache(maxsize=64)
def layout(lanes: int, neurons: int, stride: int) -> tuple[int, list[int]]:
    """Where the vectors of a thread begin, in numbers of one block, and the block's length."""
    from tts_jax.problems._banded_program import VECTORS

    sizes = {"m": neurons, "n": 2 * neurons + 1, "b": stride}
    counts = [eval(formula, {}, sizes) for formula in VECTORS.values()]
    *starts, length = np.cumsum([0, *counts]) * lanes
    return int(length), [int(start) for start in starts]


def _table(first: int, lanes_first: int, length: int, offsets: list[int], shared: list[int]) -> Any:
    """The addresses of the arrays in the order of `SLOTS`.

    Args:
        first: the address of the vectors, whose arrays begin at `offsets`, in numbers.
        lanes_first: the address of the indices of lanes, each of `length`.
        shared: the addresses of `SHARED`.
    """
    from tts_jax.problems._banded_program import LANE_INDICES

    indices = [lanes_first + 8 * length * k for k in range(len(LANE_INDICES))]
    return np.array([*(first + 8 * start for start in offsets), *indices, *shared], np.int64)


def _text(target: Any, triple: str) -> str:
    """The engine as LLVM reads it."""
    from llvmlite import ir

    from tts_jax.problems._banded_program import Program

    module = ir.Module("banded")
    module.triple = triple
    Program(module, target)
    return str(module)


# --- CPU ----------------------------------------------------------------------------------------


@functools.cache
def _entries(lanes: int) -> tuple[Any, dict[str, Any]]:
    """The compiled engine and its entry points, for vectors of `lanes`."""
    import llvmlite.binding as llvm

    from tts_jax._simd.machine import compiled
    from tts_jax._simd.writer import Target

    engine = compiled(_text(Target.cpu(lanes), llvm.get_process_triple()))
    kinds = {"advance": 1, "settle": 3, "finish": 3}
    entries = {
        name: ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * (count - 1))(
            engine.get_function_address(name)
        )
        for name, count in kinds.items()
    }
    return engine, entries


class Threads:
    """Threads of the CPU, each with vectors of `lanes`."""

    def __init__(
        self,
        starts: int,
        neurons: int,
        stride: int,
        shared: dict[str, np.ndarray],
        *,
        lanes: int | None,
        threads: int,
    ) -> None:
        from tts_jax._simd.machine import vector_lanes
        from tts_jax.problems._banded_program import LANE_INDICES, SHARED, SLOTS

        threads = min(threads, starts)
        if lanes is None:
            few = starts <= FEW * threads or neurons > MANY
            lanes = 4 if few else max(vector_lanes(np.dtype(float)), 4)
        self._lanes, self._entries, self._shared = lanes, _entries(lanes)[1], shared
        self._which = SLOTS["which"]
        length, offsets = layout(lanes, neurons, stride)
        addresses = [shared[name].ctypes.data for name in SHARED]
        self._vectors = [aligned((length,), np.dtype(float)) for _ in range(threads)]
        self._indices = np.zeros((threads, len(LANE_INDICES), lanes), np.int64)
        self._tables = [
            _table(own.ctypes.data, row.ctypes.data, lanes, offsets, addresses)
            for own, row in zip(self._vectors, self._indices, strict=True)
        ]

    def run(self, entry: str, which: np.ndarray | None = None) -> None:
        call, tables = self._entries[entry], self._tables
        if which is None:
            in_threads([functools.partial(call, table.ctypes.data) for table in tables])
            return
        groups, threads = -(-which.size // self._lanes), len(tables)
        edges = [self._lanes * (groups * k // threads) for k in range(threads)] + [which.size]
        tasks = []
        for table, low, high in zip(tables, edges, edges[1:], strict=False):
            table[self._which] = which.ctypes.data
            if low < high:
                tasks.append(functools.partial(call, table.ctypes.data, low, high))
        in_threads(tasks)

    def fetch(self, *names: str) -> None:
        del names  # the arrays are the host's own


# --- GPU ----------------------------------------------------------------------------------------


@functools.cache
def kernel_text(capability: tuple[int, int]) -> str:
    """The engine in PTX for GPUs of this compute capability."""
    from tts_jax._simd.writer import Target

    return cuda.ptx(_text(Target(1, fused=True, cuda=True), cuda.TRIPLE), capability)


@functools.cache
def _gpu() -> tuple[cuda.Device, Any]:
    """JAX's GPU and the engine's kernel on it."""
    device = cuda.Device(cuda.gpu().local_hardware_id or 0)
    text = kernel_text(device.capability)
    with device.current():
        return device, device.load(text, "banded_flow", registers=REGISTERS)


def most_starts(neurons: int, stride: int, times: int) -> int:
    """How many starts the memory of the GPU holds at a time."""
    from tts_jax.problems._banded_program import LANE_INDICES

    numbers = layout(1, neurons, stride)[0] + len(LANE_INDICES)
    numbers += times * (3 * neurons + 4) + 6 * neurons  # records, and what is given
    device, _ = _gpu()
    with device.current():
        starts = int(MEMORY_SHARE * device.free_memory()) // (8 * numbers)
    return max(starts // cuda.WARP, 1) * cuda.WARP


class Grid:
    """Threads of the current GPU, each with one lane and its memory, which `memory` holds."""

    def __init__(
        self,
        starts: int,
        neurons: int,
        stride: int,
        shared: dict[str, np.ndarray],
        memory: cuda.Memory,
    ) -> None:
        from tts_jax.problems._banded_program import LANE_INDICES, SHARED

        self._device, self._kernel = _gpu()
        self._shared, self._memory = shared, memory
        length, offsets = layout(1, neurons, stride)
        # a block is one warp, so that a few starts are spread over all multiprocessors
        self._blocks = -(-starts // cuda.WARP)
        threads = self._blocks * cuda.WARP

        def placed(name: str, array: Any) -> int:
            if isinstance(array, cuda.Output):
                return array.address
            return memory.reserve(array.nbytes) if name in EMPTY else memory.copy_of(array)

        self._addresses = {name: placed(name, array) for name, array in shared.items()}
        table = _table(
            memory.zeros(8 * length * threads),
            memory.zeros(8 * len(LANE_INDICES) * threads),
            threads,
            [offset * cuda.WARP for offset in offsets],  # the arrays of a warp are interleaved
            [self._addresses[name] for name in SHARED],
        )
        self._table = memory.copy_of(table)

    def run(self, entry: str, which: np.ndarray | None = None) -> None:
        from tts_jax.problems._banded_program import ENTRIES

        if which is not None:
            self._memory.write(self._addresses["which"], which)
        arguments = [self._table, ENTRIES.index(entry), 0 if which is None else which.size]
        self._device.launch(self._kernel, self._blocks, cuda.WARP, arguments)

    def fetch(self, *names: str) -> None:
        for name in names:
            if isinstance(self._shared[name], np.ndarray):
                self._memory.read(self._addresses[name], self._shared[name])


@contextmanager
def machine(
    starts: int,
    neurons: int,
    stride: int,
    shared: dict[str, np.ndarray],
    *,
    lanes: int | None,
    threads: int,
    on_gpu: bool,
) -> Iterator[Machine]:
    """Threads of the CPU with vectors of `lanes`, or those of JAX's GPU."""
    if not on_gpu:
        yield Threads(starts, neurons, stride, shared, lanes=lanes, threads=threads)
        return
    with _gpu()[0].current(), cuda.Memory() as memory:
        yield Grid(starts, neurons, stride, shared, memory)
