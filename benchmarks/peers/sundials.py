"""SUNDIALS CVODE by its C interface, with callbacks in machine code.

The wheel `scikit-sundae` brings the shared libraries of SUNDIALS. They are called here by ctypes
from a Numba function, and call Numba's C callbacks back: no Python runs between the first and
the last recorded time. BDF, Newton with the exact Jacobian, a dense matrix; its factors are those
of SUNDIALS for small systems and LAPACK's (OpenBLAS, in the same wheel) for large ones.
"""

import ctypes
import functools
import importlib.util
import weakref
from ctypes import c_double, c_int, c_int32, c_long, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from benchmarks.peers import numba_flow
from benchmarks.peers.numba_flow import Block


LAPACK_SIZE = 120  # of the system, from which LAPACK's factors are the faster ones
_BDF, _NORMAL = 2, 1
_MOST_STEPS = 10_000_000

_index = c_int32  # of this build: `sunindextype`


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    """One of the libraries beside the package; RuntimeError without."""
    found = importlib.util.find_spec("sksundae")
    if found is None or found.origin is None:
        raise RuntimeError("scikit-sundae is not installed: `pip install scikit-sundae`")
    packages = Path(found.origin).parents[1]
    files = sorted(packages.glob(f"scikit_sundae.*/**/libsundials_{name}[-.]*"))
    files += sorted(packages.glob(f"sksundae/**/libsundials_{name}[-.]*"))
    if not files:
        raise RuntimeError(f"this build of scikit-sundae has no shared library sundials_{name}")
    # the package loads OpenBLAS and the rest in the order that they need each other
    importlib.import_module("sksundae.cvode")
    return ctypes.CDLL(str(files[0]))


@functools.cache
def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A C function, from whichever library has it."""
    for home in ("cvode", "core", "nvecserial", "sunmatrixdense", "sunlinsoldense"):
        if hasattr(_library(home), name):
            break
    else:
        home = "sunlinsollapackdense"
    return ctypes.CFUNCTYPE(result, *arguments)((name, _library(home)))


@functools.cache
def _compiled() -> tuple[Any, Any, Any]:
    """The two callbacks, and the loop over recorded times."""
    numbers = ctypes.POINTER(c_double)
    vector_data = _function("N_VGetArrayPointer", numbers, c_void_p)
    matrix_data = _function("SUNDenseMatrix_Data", numbers, c_void_p)
    advance = _function(
        "CVode", c_int, c_size_t, c_double, c_size_t, c_size_t, c_int
    )  # addresses as integers, which Numba passes on
    head = numba_flow.HEAD
    velocity, columns = numba_flow.velocity, numba_flow.jacobian_columns
    void, real = types.voidptr, types.float64

    @njit(inline="always")
    def block(data):
        words = carray(data, (2,), np.int64)
        m, jumps = words[0], words[1]
        count = head + 2 * jumps + 8 * (m + 1)
        return carray(data, (count,), np.float64), carray(data, (count,), np.int64), 2 * m + 1

    @cfunc(types.intc(real, void, void, void))
    def right_hand_side(tau, y, out, data):
        reals, words, size = block(data)
        y_ = carray(vector_data(y), (size,))
        out_ = carray(vector_data(out), (size,))
        velocity(reals, words, y_, out_)
        return 0

    @cfunc(types.intc(real, void, void, void, void, void, void, void))
    def jacobian(tau, y, field, matrix, data, room_1, room_2, room_3):
        reals, words, size = block(data)
        y_ = carray(vector_data(y), (size,))
        out = carray(matrix_data(matrix), (size, size))
        columns(reals, words, y_, out)
        return 0

    @njit(nogil=True)
    def record(memory, vector, reached, y, tau, out):
        for i in range(tau.size):
            if tau[i] > 0.0:
                flag = advance(memory, tau[i], vector, reached, _NORMAL)
                if flag < 0:
                    return flag
            out[i] = y
        return 0

    return right_hand_side, jacobian, record


class Cvode:
    """A CVODE solver of one problem at one tolerance.

    Arguments:
        lapack: whether LAPACK factors the matrix; by default it does for large systems.

    Raises:
        RuntimeError: the libraries are missing, or refuse.
    """

    def __init__(self, block: Block, tolerance: float, *, lapack: bool | None = None) -> None:
        self._block = block  # the solver holds its address
        self._callbacks = _compiled()
        self._y = np.zeros(block.size)
        self._reached = np.zeros(1)
        self._context = c_void_p()
        _call("SUNContext_Create", (c_int, 0), (c_void_p, ctypes.addressof(self._context)))
        # a failure is a return value; nothing is printed
        _call("SUNContext_ClearErrHandlers", (c_void_p, self._context))
        self._vector = _new(
            "N_VMake_Serial", (_index, block.size), (c_void_p, self._y.ctypes.data), self._context
        )
        size = (_index, block.size)
        self._matrix = _new("SUNDenseMatrix", size, size, self._context)
        if lapack is None:
            lapack = block.size >= LAPACK_SIZE
        name = "SUNLinSol_LapackDense" if lapack else "SUNLinSol_Dense"
        self._solver = _new(name, self._vector, self._matrix, self._context)
        self._memory = _new("CVodeCreate", (c_int, _BDF), self._context)
        parts = self._memory, self._solver, self._matrix, self._vector, self._context
        weakref.finalize(self, _free, *parts)
        field, jacobian, _ = self._callbacks
        start = (c_void_p, field.address), (c_double, 0.0), self._vector
        _call("CVodeInit", self._memory, *start)
        _call("CVodeSStolerances", self._memory, (c_double, tolerance), (c_double, tolerance))
        _call("CVodeSetUserData", self._memory, (c_void_p, block.reals.ctypes.data))
        _call("CVodeSetMaxNumSteps", self._memory, (c_long, _MOST_STEPS))
        _call("CVodeSetLinearSolver", self._memory, self._solver, self._matrix)
        _call("CVodeSetJacFn", self._memory, (c_void_p, jacobian.address))

    def __call__(self, start: np.ndarray, tau: np.ndarray) -> np.ndarray:
        """The states at `tau`, `[T, 2m + 1]`, NaN from where the solver failed."""
        self._y[:] = start
        _call("CVodeReInit", self._memory, (c_double, 0.0), self._vector)
        out = np.full((tau.size, start.size), np.nan)
        addresses = self._memory.value, self._vector.value, self._reached.ctypes.data
        self._callbacks[-1](*addresses, self._y, tau, out)
        return out

    def counts(self) -> dict[str, int]:
        """Steps, right-hand sides, Jacobians and factorisations of the last solve."""
        names = {
            "steps": "CVodeGetNumSteps",
            "fields": "CVodeGetNumRhsEvals",
            "jacobians": "CVodeGetNumJacEvals",
            "factors": "CVodeGetNumLinSolvSetups",
        }
        found = {}
        for name, function in names.items():
            count = c_long()
            _call(function, self._memory, (c_void_p, ctypes.addressof(count)))
            found[name] = count.value
        return found


def _free(
    memory: c_void_p, solver: c_void_p, matrix: c_void_p, vector: c_void_p, context: c_void_p
):
    _function("CVodeFree", None, c_void_p)(ctypes.addressof(memory))
    _call("SUNLinSolFree", solver)
    _function("SUNMatDestroy", None, c_void_p)(matrix)
    _function("N_VDestroy", None, c_void_p)(vector)
    _call("SUNContext_Free", (c_void_p, ctypes.addressof(context)))


def _new(name: str, *arguments: Any) -> c_void_p:
    """The object that a C function makes; arguments are pointers, or (C type, value)."""
    made = _apply(name, c_void_p, arguments)
    if not made:
        raise RuntimeError(f"SUNDIALS: {name} made nothing")
    return c_void_p(made)


def _call(name: str, *arguments: Any) -> None:
    flag = _apply(name, c_int, arguments)
    if flag != 0:
        raise RuntimeError(f"SUNDIALS: {name} returned {flag}")


def _apply(name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
    pairs = [one if isinstance(one, tuple) else (c_void_p, one) for one in arguments]
    return _function(name, result, *(kind for kind, _ in pairs))(*(value for _, value in pairs))
