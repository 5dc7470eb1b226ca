"""The process of one peer: answers requests, one JSON object per line, until its input ends.

    {"op": "hello"}                                    -> {"devices", "resident"}
    {"op": "build", "setting": {...}}                  -> {"layout", "compile_seconds"}
    {"op": "time", "seconds": s, "calls": n}           -> {"steps", "seconds"}, the fastest of n
    {"op": "start", "setting": {...}}                  -> {}, an ensemble at its start
    {"op": "advance", "steps": n}                      -> {}
    {"op": "read"}                                     -> {"weights", "positions"}
    {"op": "save", "path": "..."}                      -> {"reasons"}, an `Answer` in a file
    {"op": "memory"}                                   -> {"peak"}, bytes

An exception is answered by {"error": "..."}; the process then goes on.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks import setting as settings
from benchmarks.setting import Run


class Worker:
    """One peer and the ensemble that it has under way.

    Arguments:
        build: `"module:callable"` that makes the peer's `Run`.
        options: further keyword arguments of the callable.
        backend: JAX's, if the peer uses JAX.
        setting: the class of its settings.
    """

    def __init__(self, build: str, options: dict[str, Any], backend: str, setting: str) -> None:
        self._build, self._options, self._backend = build, options, backend
        self._setting = getattr(settings, setting)
        self._run: Run | None = None
        self._step_seconds = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        arguments = dict(request)
        return getattr(self, arguments.pop("op"))(**arguments)

    def hello(self) -> dict[str, Any]:
        """Import the peer; what it runs on."""
        self._load()
        devices = []
        if "jax" in sys.modules:
            import jax

            if self._options.get("configure"):  # before the backend starts
                from tts_jax import _compat

                _compat.configure_cpu()
            if jax.default_backend() != self._backend:
                raise RuntimeError(f"JAX runs on {jax.default_backend()}, not on {self._backend}")
            devices = [f"{device} ({device.device_kind})" for device in jax.local_devices()]
        return {"devices": devices, "resident": peak_bytes()}

    def build(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Start an ensemble and take a few steps."""
        self._run = None
        self._run = run = self._load()(self._setting(**setting), **self._options)
        steps, seconds = run.chunk, 0.0
        while True:
            seconds = self._timed(steps)
            if seconds > 0.01:
                break
            steps *= 2
        self._step_seconds = seconds / steps
        return {"layout": run.layout, "compile_seconds": run.compile_seconds}

    def time(self, seconds: float, calls: int) -> dict[str, Any]:
        """The fastest of `calls` calls that take about `seconds` together."""
        chunk = self._ensemble().chunk
        steps = chunk * max(1, round(seconds / calls / self._step_seconds / chunk))
        best = min(self._timed(steps) for _ in range(calls))
        self._step_seconds = best / steps
        return {"steps": steps, "seconds": best}

    def advance(self, steps: int) -> dict[str, Any]:
        """Take `steps` steps."""
        self._ensemble().advance(steps)
        return {}

    def start(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Start an ensemble and leave it at its start."""
        self._run = None
        self._run = self._load()(self._setting(**setting), **self._options)
        return {}

    def read(self) -> dict[str, Any]:
        """The states."""
        weights, positions = self._ensemble().read()
        return {"weights": weights.tolist(), "positions": positions.tolist()}

    def save(self, path: str) -> dict[str, Any]:
        """Write the answer of a flow."""
        fast, slow, reasons = self._ensemble().answer()
        np.savez(path, fast=fast, slow=slow)
        return {"reasons": reasons}

    def memory(self) -> dict[str, Any]:
        """The most memory that the process has had."""
        return {"peak": peak_bytes()}

    def _load(self) -> Any:
        module, name = self._build.split(":")
        return getattr(importlib.import_module(module), name)

    def _ensemble(self) -> Any:
        if self._run is None:
            raise RuntimeError("no ensemble was built")
        return self._run

    def _timed(self, steps: int) -> float:
        started = time.perf_counter()
        self._ensemble().advance(steps)
        return time.perf_counter() - started


def peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Serve requests; the peer is described by the first argument."""
    # what a peer prints must not mix with the replies
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:  # whatever a peer raises is its answer
            text = str(error).strip().splitlines()
            reply = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
