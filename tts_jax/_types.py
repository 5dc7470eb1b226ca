"""The array type of the public interface: JAX arrays, and NumPy arrays outside x64 mode."""

from typing import TypeAlias

import jax
import numpy as np


Array: TypeAlias = jax.Array | np.ndarray
