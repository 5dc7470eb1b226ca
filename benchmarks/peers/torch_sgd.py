"""SGD in PyTorch, all seeds in one tensor, the gradient written out; eager or compiled."""

import time

import numpy as np
import torch

from benchmarks.setting import JUMPS, VALUES, Setting


_UNROLL = 4  # steps of one compiled call


class TorchRun:
    """Tensors `[seeds, neurons]`, a Python loop over steps.

    Arguments:
        compiled: `torch.compile` a function of `_UNROLL` steps.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, setting: Setting, *, compiled: bool = False, device: str = "cpu") -> None:
        torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        self._device = torch.device(device)
        kind = {"dtype": getattr(torch, setting.dtype), "device": self._device}
        self._state = (
            torch.zeros(setting.seeds, 1, **kind),
            torch.zeros(setting.seeds, setting.neurons, **kind),
            torch.as_tensor(setting.starts(), **kind),
        )
        jumps = torch.tensor(JUMPS, **kind)
        heights = torch.tensor(np.diff(VALUES), **kind)
        rate = 2 * setting.step_size
        kick = 12 * setting.epsilon / setting.eta
        count = _UNROLL if compiled else 1

        def some_steps(bias, weights, positions):
            for _ in range(count):
                x = torch.rand(bias.shape, **kind)
                noise = setting.noise * (2 * torch.rand(bias.shape, **kind) - 1)
                label = VALUES[0] + torch.where(x >= jumps, heights, 0.0).sum(1, keepdim=True)
                z = (x - positions) / setting.eta
                w = (0.5 - z.abs()).clamp(min=0)
                square = w * w
                tail = 4 * w * square
                features = torch.where(z > 0, 1 - tail, tail)
                output = bias + (weights * features).sum(1, keepdim=True)
                pull = rate * (output - label - noise)
                bias = bias - pull
                positions = positions + kick * pull * weights * square
                weights = weights - pull * features
            return bias, weights, positions

        self.chunk = count
        if compiled:
            # another shape than before would be compiled for any shape, later ones not at all
            torch.compiler.reset()
            some_steps = torch.compile(some_steps, dynamic=False)
        self._some_steps = some_steps
        self.layout = f"1 x {setting.seeds} on {torch.get_num_threads()}"
        start = self._state
        started = time.perf_counter()
        self.advance(2 * count)  # twice: what a call returns may compile once more
        self.compile_seconds = time.perf_counter() - started if compiled else 0.0
        self._state = start

    def advance(self, steps: int) -> None:
        """Take `steps` steps, a multiple of `chunk`."""
        with torch.inference_mode():
            for _ in range(steps // self.chunk):
                self._state = self._some_steps(*self._state)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions."""
        bias, weights, positions = (leaf.double().cpu().numpy() for leaf in self._state)
        return np.concatenate([bias, weights], axis=1), positions
