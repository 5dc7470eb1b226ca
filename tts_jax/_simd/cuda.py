"""NVIDIA GPUs through their driver: kernels in LLVM's text, memory, launches.

LLVM writes the kernels in PTX, which the driver compiles for the GPU at hand; no toolkit is needed.
The work is done in the driver's primary context, which JAX uses too.
"""

import copy
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


WARP = 32  # threads that execute together
TRIPLE = "nvptx64-nvidia-cuda"  # LLVM's name of the target
_MAJOR, _MINOR = 75, 76  # attributes of a device, by the driver's numbers
_MAX_REGISTERS, _ERROR_LOG, _ERROR_LOG_BYTES = 0, 5, 6  # options of its compiler
_OLDEST = 7  # compute capability whose threads meet again after a branch by themselves


def gpu() -> Any:
    """The device of JAX's that kernels run on."""
    return jax.local_devices()[0]


def missing() -> str | None:
    """Why kernels cannot be run on JAX's device, if so."""
    if jax.default_backend() != "gpu":
        return f"JAX computes on {jax.default_backend()}, not on a GPU"
    capability = str(getattr(gpu(), "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    if not major.isdecimal() or int(major) < _OLDEST:
        return f"it needs an NVIDIA GPU of compute capability {_OLDEST} or newer, not {capability}"
    return _driver_missing()


@functools.cache
def _driver_missing() -> str | None:
    try:
        _driver()
    except OSError as error:
        return f"the driver of the GPU cannot be loaded ({error})"
    return None


@functools.cache
def _driver() -> ctypes.CDLL:
    names = ["nvcuda.dll"] if sys.platform == "win32" else ["libcuda.so.1", "libcuda.so"]
    for name in names[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(names[-1])


def _call(name: str, *arguments: Any) -> None:
    """One call of the driver.

    Raises:
        RuntimeError: it failed, with what the driver says.
    """
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        said = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(said))
        reason = said.value.decode() if said.value else f"error {code}"
        raise RuntimeError(f"The GPU's driver reports in {name}: {reason}.")


def ptx(text: str, capability: tuple[int, int]) -> str:
    """LLVM's text in PTX for GPUs of this compute capability."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_triple(TRIPLE)
    # newer GPUs run what is written for Hopper
    major, minor = min(capability, (9, 0))
    machine = target.create_target_machine(cpu=f"sm_{major}{minor}", features="+ptx78", opt=3)
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_assembly(module)


class Device:
    """One GPU.

    Attributes:
        capability: its compute capability.
    """

    def __init__(self, ordinal: int) -> None:
        _call("cuInit", 0)
        handle = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(handle), ordinal)
        self._context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

        def attribute(number: int) -> int:
            value = ctypes.c_int()
            _call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
            return value.value

        self.capability = attribute(_MAJOR), attribute(_MINOR)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it the GPU of this thread; what follows belongs inside."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def free_memory(self) -> int:
        """Bytes that can be reserved."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def load(self, text: str, name: str, *, registers: int) -> Any:
        """The kernel of this name in PTX, with at most so many registers of a thread.

        Raises:
            RuntimeError: the driver cannot compile it, with what it says.
        """
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(8192)
        options = (ctypes.c_int * 3)(_MAX_REGISTERS, _ERROR_LOG, _ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 3)(registers, ctypes.addressof(log), len(log))
        try:
            _call("cuModuleLoadDataEx", ctypes.byref(module), text.encode(), 3, options, values)
        except RuntimeError as error:
            raise RuntimeError(f"{error} {log.value.decode(errors='replace')}") from None
        kernel = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
        return kernel

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[int]) -> None:
        """Run a kernel of 64-bit arguments to its end."""
        words = [ctypes.c_int64(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        _call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, None, places, None)
        _call("cuCtxSynchronize")


class Output:
    """An array of JAX's, of NaN, that kernels write into.

    Attributes:
        array: the array; nobody else may have seen it before it is written.
        address: where it begins.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        with jax.default_device(gpu()):
            self.array = jnp.full(shape, np.nan, np.float64).block_until_ready()
        self.address = self.array.unsafe_buffer_pointer()

    def __getitem__(self, rows: slice) -> "Output":
        """Some of its rows."""
        part = copy.copy(self)
        size = self.array.nbytes // max(len(self.array), 1)
        part.address = self.address + (rows.start or 0) * size
        return part


class Memory:
    """Memory of the current GPU, which is given back at the end of a `with` block."""

    def __init__(self) -> None:
        self._held: list[ctypes.c_void_p] = []

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: Any) -> None:
        # if a kernel has failed, so does this: what is told is the first error
        for address in self._held:
            _driver().cuMemFree_v2(address)

    def reserve(self, size: int) -> int:
        """The address of `size` bytes, which hold anything."""
        address = ctypes.c_void_p()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 8)))
        self._held.append(address)
        return address.value or 0

    def zeros(self, size: int) -> int:
        """The address of `size` bytes, all 0."""
        address = self.reserve(size)
        _call("cuMemsetD8_v2", ctypes.c_void_p(address), ctypes.c_ubyte(0), ctypes.c_size_t(size))
        return address

    def copy_of(self, array: np.ndarray) -> int:
        """The address of a copy of a contiguous array."""
        address = self.reserve(array.nbytes)
        self.write(address, array)
        return address

    @staticmethod
    def write(address: int, array: np.ndarray) -> None:
        source = ctypes.c_void_p(array.ctypes.data)
        _call("cuMemcpyHtoD_v2", ctypes.c_void_p(address), source, ctypes.c_size_t(array.nbytes))

    @staticmethod
    def read(address: int, array: np.ndarray) -> None:
        """Fill a contiguous array."""
        goal = ctypes.c_void_p(array.ctypes.data)
        _call("cuMemcpyDtoH_v2", goal, ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes))
