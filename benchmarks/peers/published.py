"""The published algorithm: NumPy, an interpreted loop over steps, one seed after the other.

A step is written as in the authors' code (the bias as a neuron at −η/2 whose position is frozen,
the residual evaluated for each of the two gradients) but for the gradient in u, which is the
exact one that all peers take, σ′ in place of the published box.
"""

import numpy as np

from benchmarks.setting import JUMPS, VALUES, Setting


class PublishedRun:
    """Seeds one after the other, on one core."""

    compile_seconds = 0.0
    chunk = 1

    def __init__(self, setting: Setting) -> None:
        real = np.dtype(setting.dtype).type
        self._setting = setting
        bias = np.full((setting.seeds, 1), -setting.eta / 2)
        self._positions = np.concatenate([bias, setting.starts()], axis=1).astype(real)
        self._weights = np.zeros_like(self._positions)
        self._rngs = [np.random.RandomState(seed) for seed in range(setting.seeds)]
        self.layout = f"{setting.seeds} x 1 on 1"

    def advance(self, steps: int) -> None:
        """Take `steps` steps."""
        for weights, positions, rng in zip(self._weights, self._positions, self._rngs, strict=True):
            _advance(self._setting, weights, positions, rng, steps)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions."""
        return self._weights.astype(np.float64), self._positions[:, 1:].astype(np.float64)


def _activation(z: np.ndarray) -> np.ndarray:
    left = np.minimum(np.maximum(4 * (z + 0.5) ** 3, 0), 0.5)
    return left + np.minimum(np.maximum(0.5 - 4 * (0.5 - z) ** 3, 0), 0.5)


def _derivative(z: np.ndarray) -> np.ndarray:
    return 12 * np.maximum(0.5 - np.abs(z), 0) ** 2


def _advance(setting, weights, positions, rng, steps):
    """Move one seed's `weights` and `positions` in place."""
    eta, step_size = setting.eta, setting.step_size
    # in the dtype of the run, so that float32 does not widen
    width = 2 * positions.dtype.type(1e-8)
    target_positions = np.concatenate([[-width], JUMPS]).astype(positions.dtype)
    target_weights = np.diff(VALUES, prepend=0.0).astype(positions.dtype)
    moving = np.ones_like(positions)
    moving[0] = 0

    def error(x, noise):
        label = np.dot(_activation((x - target_positions) / width), target_weights) + noise
        return label - np.dot(_activation((x - positions) / eta), weights)

    for _ in range(steps):
        x = positions.dtype.type(rng.rand())
        noise = setting.noise * positions.dtype.type(2 * rng.rand() - 1)
        z = (x - positions) / eta
        slope_weights = -2 * error(x, noise) * _activation(z)
        slope_positions = 2 * error(x, noise) * weights * moving * _derivative(z) / eta
        weights -= step_size * slope_weights
        positions -= step_size * setting.epsilon * slope_positions
