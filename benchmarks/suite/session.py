"""A conversation with the process of one peer."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer


_ROOT = Path(__file__).resolve().parents[2]


class PeerError(Exception):
    """A peer is missing, refused a request, crashed or took too long; the message says which."""


class Session:
    """The process of a peer, started at once; a context manager that ends it."""

    def __init__(self, peer: Peer) -> None:
        described = {
            "build": peer.build,
            "options": dict(peer.options),
            "backend": peer.backend,
            "setting": peer.setting,
        }
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.suite.worker", json.dumps(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **peer.environment},
            cwd=_ROOT,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, op: str, *, timeout: float = 300.0, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            PeerError: there is no answer, or it is an error.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except (OSError, ValueError):
            line = None
        except queue.Empty:
            self._process.kill()
            raise PeerError(f"no answer to `{op}` within {timeout:g} s") from None
        if line is None:
            raise PeerError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # a request that the dead process never took

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except ValueError:
            pass  # closed
        self._lines.put(None)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with code {code}" + (f": {lines[-1]}" if lines else "")
