"""Files that survive a crash, and a stop that waits for a good moment.

A file is written under another name, forced to the disk and then renamed, so that its name
always holds a whole file. A checkpoint is written to two such files in turn: while one is being
replaced, and when it turns out to be damaged, the other still holds the state before.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import numpy as np


Arrays = Mapping[str, np.ndarray]


class DamagedFileError(Exception):
    """A file that is not what was written."""


class Stopped(KeyboardInterrupt):
    """A run that a signal stopped, after its state was saved; the message tells how to go on.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def say(text: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


# --- files ----------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without error.

    Raises:
        OSError: the file cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb"):
            pass
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write named arrays atomically, as an npz file with a check sum of its content."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays, **{_SUM: np.array(_check_sum(arrays))})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises:
        DamagedFileError: the content is not what was written.
        FileNotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        whole = str(arrays.pop(_SUM)) == _check_sum(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise DamagedFileError(f"`{path}` is damaged: {error}.") from error
    if not whole:
        raise DamagedFileError(f"`{path}` is damaged: its check sum does not fit.")
    return arrays


_SUM = "sha256"


def _check_sum(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second program out of `folder`; the lock ends with the process, however it ends.

    Raises:
        BlockingIOError: another program holds the folder.
        OSError: the folder cannot be written.
    """
    with open(folder / ".lock", "a") as handle:
        _lock(handle)
        yield


def _lock(handle: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


class Store:
    """The files of a run. What cannot be written stays in memory and is tried again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unwritten: dict[str, Callable[[Path], object]] = {}
        self._warned = False
        self._next_slot: dict[str, int] = {}

    def put(self, name: str, write: Callable[[Path], object]) -> bool:
        """Write a file by `write(path)`; if that fails, warn and keep it for `retry`."""
        try:
            write(self.folder / name)
        except OSError as error:
            self._unwritten[name] = write
            self._warn(self.folder / name, error)
            return False
        self._unwritten.pop(name, None)
        if self._warned and not self._unwritten:
            self._warned = False
            say(f"tts-jax: `{self.folder}` can be written again; nothing was lost.")
        return True

    def retry(self) -> None:
        """Try once more to write what could not be written."""
        for name, write in list(self._unwritten.items()):
            if not self.put(name, write):
                return

    def settle(self) -> Path | None:
        """Write what is left, if need be into another folder.

        Returns:
            That folder, or None if everything is where it belongs.

        Raises:
            OSError: the other folder cannot be written either.
        """
        self.retry()
        if not self._unwritten:
            return None
        spare = Path(tempfile.mkdtemp(prefix="tts-jax-"))
        for name, write in self._unwritten.items():
            write(spare / name)
        return spare

    def checkpoint(self, name: str, arrays: Arrays) -> bool:
        """Write a checkpoint over the older one of its two files; tries the unwritten first."""
        self.retry()
        slot = self._next_slot.get(name, 0)
        done = self.put(_slot(name, slot), lambda path: write_arrays(path, arrays))
        if done:
            self._next_slot[name] = 1 - slot
        return done

    def last_checkpoint(self, name: str) -> dict[str, np.ndarray] | None:
        """The newest whole checkpoint, the one with the highest `"steps"`; None without one."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for slot in (0, 1):
            with contextlib.suppress(FileNotFoundError):
                try:
                    found[slot] = read_arrays(self.folder / _slot(name, slot))
                except DamagedFileError as error:
                    say(f"tts-jax: {error} The checkpoint before it is used.")
        if not found:
            return None
        newest = max(found, key=lambda slot: int(found[slot]["steps"]))
        self._next_slot[name] = 1 - newest
        return found[newest]

    def drop_checkpoints(self, name: str) -> None:
        """Remove both files of a checkpoint that is not needed any more."""
        for slot in (0, 1):
            self._unwritten.pop(_slot(name, slot), None)
            with contextlib.suppress(OSError):
                (self.folder / _slot(name, slot)).unlink(missing_ok=True)

    def _warn(self, path: Path, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        try:
            free = f"{shutil.disk_usage(self.folder).free / 2**20:.1f} MiB free"
        except OSError:
            free = "free space unknown"
        say(
            f"tts-jax: cannot write `{path}`: {error.strerror or error} ({free}). The run goes "
            f"on and keeps its results in memory; they are written as soon as that works. Make "
            f"room, or make the folder writable."
        )


def _slot(name: str, slot: int) -> str:
    return f"{name}.checkpoint-{slot}.npz"


# --- stopping -------------------------------------------------------------------------------

_STOPPING = b"\ntts-jax: stopping after a checkpoint, in seconds; a second signal stops at once.\n"


class Stop:
    """Whether a signal asked the run to stop.

    Attributes:
        signal: the number of that signal, 0 if none came.
    """

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """While open, SIGINT (Ctrl-C) and SIGTERM only ask to stop; a second one stops at once.

    Signals reach the main thread only; elsewhere nothing is changed.
    """
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        stop.signal = number
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)
        # not `print`, which the signal may have interrupted
        os.write(2, _STOPPING)

    try:
        before = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def terminated_like_interrupted(message: str) -> Iterator[None]:
    """While open, SIGTERM raises `Stopped(message)`, as Ctrl-C raises `KeyboardInterrupt`.

    A second one stops at once. Signals reach the main thread only; elsewhere nothing is changed.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(message, number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
