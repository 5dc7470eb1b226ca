"""Arrays that vectors can be loaded from."""

import numpy as np


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy that starts at a multiple of 64 bytes."""
    copy = aligned(np.shape(array), np.asarray(array).dtype)
    copy[...] = array
    return copy


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(shape)
