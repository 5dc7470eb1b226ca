"""This package's SGD engine, as its command line runs it or as an import finds it."""

import time
from typing import Any

import jax
import numpy as np

import tts_jax as tts
from benchmarks.setting import JUMPS, VALUES, Setting
from tts_jax import _compat, _random
from tts_jax._lanes import Cell, LaneRun


class EngineRun:
    """`tts_jax._lanes.LaneRun` on all cores or devices.

    Arguments:
        configure: set XLA's flags and one device per core, as the command line does. Flags are
            read once per process, so the first run of a process decides.
        options: further arguments of `LaneRun`.
    """

    chunk = 1

    def __init__(self, setting: Setting, *, configure: bool = False, **options: Any) -> None:
        if configure:
            _compat.configure_cpu()
        target = tts.PiecewiseConstant(jumps=JUMPS, values=VALUES)
        problem = tts.Univariate(
            target, neurons=setting.neurons, eta=setting.eta, noise=setting.noise
        )
        with jax.enable_x64(True):
            streams, _ = _random.seed_keys(jax.random.key(0), setting.seeds)
            words = _random.key_words(streams)
            fast = np.zeros((setting.seeds, setting.neurons + 1))
            state = tts.State(fast, setting.starts())
            cell = Cell(problem, state, words, setting.step_size, setting.epsilon)
            started = time.perf_counter()
            self._run = LaneRun([cell], gradient="exact", dtype=setting.dtype, **options)
            start = self._run.save()
            self._run.advance(1)
            jax.block_until_ready(self._run.carry)
            self.compile_seconds = time.perf_counter() - started
            self._run.restore(start, 0)
        self.layout = self._run.layout

    def advance(self, steps: int) -> None:
        """Take `steps` steps."""
        with jax.enable_x64(True):
            self._run.advance(steps)
            jax.block_until_ready(self._run.carry)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions."""
        with jax.enable_x64(True):
            return tuple(self._run.read())
