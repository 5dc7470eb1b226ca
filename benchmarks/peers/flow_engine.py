"""This package's flow and limits, as its command line runs them."""

import inspect
import time
from typing import Any, Literal

import diffrax
import jax
import numpy as np

import tts_jax as tts
from benchmarks.setting import JUMPS, VALUES, Answer, FlowSetting
from tts_jax import _compat


_MOST_STEPS = 200_000
_WARM_TOLERANCE = 1e-3


class EngineRun:
    """`tts.flow`, `tts.limit` or `tts.sharp_limit` of all starts in one call.

    Arguments:
        configure: set XLA's flags and one device per core, as the command line does. Flags are
            read once per process, so the first run of a process decides.
        method: which.
        reference: go through Diffrax with the dense Jacobian.
        stock: a solver of Diffrax by the name of its class, with its own defaults.
        options: further arguments of the call.
    """

    chunk = 1

    def __init__(
        self,
        setting: FlowSetting,
        *,
        configure: bool = False,
        method: Literal["flow", "limit", "sharp_limit"] = "flow",
        reference: bool = False,
        stock: str | None = None,
        **options: Any,
    ) -> None:
        if configure:
            _compat.configure_cpu()
        self._call = getattr(tts, method)
        target = tts.PiecewiseConstant(jumps=JUMPS, values=VALUES)
        self._problem = tts.Univariate(target, neurons=setting.neurons, eta=setting.eta)
        self._state = self._problem.state(slow=setting.starts())
        self._options = {"tau": setting.tau(), **options}
        if stock is not None:
            self._options["solver"] = getattr(diffrax, stock)()
        known = inspect.signature(self._call).parameters
        if reference:
            self._options["solver"] = "rodas5p"
            if "engine" in known:
                self._options["engine"] = "diffrax"
        for name, value in (("epsilon", setting.epsilon), ("max_steps", _MOST_STEPS)):
            if name in known:
                self._options[name] = value
        self._tolerant = "rtol" in known
        self._last: Any = None
        started = time.perf_counter()
        self._solve(_WARM_TOLERANCE)
        self.compile_seconds = time.perf_counter() - started
        self._tolerance = setting.tolerance
        self.layout = f"{setting.seeds} starts in one call"

    def advance(self, steps: int) -> None:
        """Solve all starts `steps` times."""
        for _ in range(steps):
            self._solve(self._tolerance)

    def answer(self) -> Answer:
        """The last states."""
        status = np.ravel(self._last.status)
        reasons = ["" if one == 0 else tts.Status(int(one)).name for one in status]
        return Answer(np.asarray(self._last.fast), np.asarray(self._last.slow), reasons)

    def _solve(self, tolerance: float) -> None:
        steps = {"rtol": tolerance, "atol": tolerance} if self._tolerant else {}
        self._last = jax.block_until_ready(
            self._call(self._problem, self._state, **self._options, **steps)
        )
