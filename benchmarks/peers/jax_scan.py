"""SGD as one writes it first in JAX: `vmap` over seeds of a `lax.scan` over steps.

The loss of a sample is differentiated by `jax.grad`, the sample drawn by `jax.random` in the
loop; on the CPU XLA spreads operations over its own threads.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.setting import JUMPS, VALUES, Setting


class ScanRun:
    """All seeds in one compiled call of `chunk` steps."""

    chunk = 64

    def __init__(self, setting: Setting) -> None:
        self._wide = setting.dtype == "float64"
        with jax.enable_x64(self._wide):
            weights = jnp.zeros((setting.seeds, setting.neurons + 1), setting.dtype)
            positions = jnp.asarray(setting.starts(), setting.dtype)
            keys = jax.random.split(jax.random.key(1), setting.seeds)
            program = jax.jit(functools.partial(_advance, setting, self.chunk))
            started = time.perf_counter()
            self._carry = weights, positions, keys
            self._program = program.lower(self._carry).compile()
            self.compile_seconds = time.perf_counter() - started
        self.layout = f"1 x {setting.seeds} on 1"

    def advance(self, steps: int) -> None:
        """Take `steps` steps, a multiple of `chunk`."""
        with jax.enable_x64(self._wide):
            for _ in range(steps // self.chunk):
                self._carry = self._program(self._carry)
            jax.block_until_ready(self._carry)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions."""
        weights, positions, _ = self._carry
        return np.asarray(weights, np.float64), np.asarray(positions, np.float64)


def _advance(setting, steps, carry):
    dtype = jnp.dtype(setting.dtype)
    jumps = jnp.asarray(JUMPS, dtype)
    heights = jnp.asarray(np.diff(VALUES), dtype)

    def activation(z):
        tail = 4 * jnp.maximum(0.5 - jnp.abs(z), 0) ** 3
        return jnp.where(z > 0, 1 - tail, tail)

    def sample_loss(weights, positions, x, noise):
        network = weights[0] + weights[1:] @ activation((x - positions) / setting.eta)
        label = VALUES[0] + jnp.sum(jnp.where(x >= jumps, heights, 0)) + noise
        return (network - label) ** 2

    def one_step(carry, _):
        weights, positions, key = carry
        key, first, second = jax.random.split(key, 3)
        x = jax.random.uniform(first, dtype=dtype)
        noise = jax.random.uniform(second, dtype=dtype, minval=-setting.noise, maxval=setting.noise)
        slopes = jax.grad(sample_loss, argnums=(0, 1))(weights, positions, x, noise)
        weights = weights - setting.step_size * slopes[0]
        positions = positions - setting.step_size * setting.epsilon * slopes[1]
        return (weights, positions, key), None

    def one_seed(carry):
        return jax.lax.scan(one_step, carry, length=steps)[0]

    return jax.vmap(one_seed)(carry)
