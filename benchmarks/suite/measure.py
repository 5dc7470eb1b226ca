"""The workloads: what is measured, and how.

Every workload is a list of cells (an ensemble each); in a cell all peers are built, each in its
own process, and then timed in rounds, one after the other, beginning with another one each
round. A ratio of two peers is taken within a round, where the machine is the same for both. A
peer that is missing, refuses, crashes or takes too long is a row with the reason.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.peers import REFERENCE, Peer
from benchmarks.setting import FlowSetting, Setting
from benchmarks.suite import equal_work, machine
from benchmarks.suite.session import PeerError, Session


Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: rounds of a cell.
        seconds: seconds of one peer in a round.
        calls: calls of one peer in a round, of which the fastest counts.
        timeout: seconds that a peer may take for one answer.
        together: build all peers of a cell at the same time, where cores are many and the time is
            not; the seconds of compilation are then those of company.
    """

    rounds: int
    seconds: float
    timeout: float
    calls: int = 3
    together: bool = False


FULL = Effort(rounds=5, seconds=0.5, timeout=300.0)
QUICK = Effort(rounds=3, seconds=0.15, timeout=120.0)

FEW = (
    *("engine", "numba-lanes", "numba", "jax-scan"),
    *("gpu-kernel", "gpu-unrolled", "gpu-jax-scan"),
)


# --- processes --------------------------------------------------------------------------------


class Pool:
    """The processes of the peers, started when first needed and again after a crash.

    Attributes:
        effort: how much to measure.
        devices: JAX's devices in the process of each peer that has started.
    """

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.devices: dict[str, list[str]] = {}
        self._sessions: dict[str, Session] = {}
        self._missing: dict[str, str] = {}

    def ask(
        self, peer: Peer, op: str, *, timeout: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Ask a peer; `timeout` seconds, by default those of the effort.

        Raises:
            PeerError: it does not answer; one that could not start is not tried again.
        """
        if peer.name in self._missing:
            raise PeerError(self._missing[peer.name])
        session = self._sessions.get(peer.name)
        if session is None or not session.alive:
            self.drop(peer)
            session = self._sessions[peer.name] = Session(peer)
            try:
                hello = session.ask("hello", timeout=self.effort.timeout)
            except PeerError as error:
                self._missing[peer.name] = str(error)
                raise
            self.devices[peer.name] = hello["devices"]
        return session.ask(op, timeout=timeout or self.effort.timeout, **arguments)

    def each(self, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call `function` with each of the `arguments`, of a peer each; `together` at once."""
        threads = len(arguments) if self.effort.together else 1
        with ThreadPoolExecutor(max(threads, 1)) as executor:
            list(executor.map(lambda some: function(*some), arguments))

    @contextmanager
    def at(self, effort: Effort) -> Iterator[None]:
        """Another effort for a while."""
        usual, self.effort = self.effort, effort
        try:
            yield
        finally:
            self.effort = usual

    def drop(self, peer: Peer) -> None:
        """End the process of a peer."""
        session = self._sessions.pop(peer.name, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """End every process."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


@contextmanager
def pool(effort: Effort) -> Iterator[Pool]:
    """A pool whose processes end with the context."""
    processes = Pool(effort)
    try:
        yield processes
    finally:
        processes.close()


# --- time -------------------------------------------------------------------------------------


def time_cell(
    processes: Pool,
    peers: Iterable[Peer],
    setting: Setting | FlowSetting,
    after: Callable[[Peer, Row], None] | None = None,
) -> list[Row]:
    """One row per peer: nanoseconds per seed-step in every round, or why there are none.

    `after` may ask a peer that has been timed for more.
    """
    rows, built = [], []
    for peer in peers:
        own = setting
        if setting.divisible:
            own = dataclasses.replace(setting, seeds=min(setting.seeds, peer.most_seeds))
        row: Row = {"peer": peer.name, **{name: getattr(own, name) for name in own.columns}}
        row["skipped"] = None
        rows.append(row)
        if own.seeds > peer.most_seeds:
            row["skipped"] = f"a step of {setting.seeds} seeds takes too long"
            continue
        built.append((peer, row, own))

    def build(peer: Peer, row: Row, own: Setting | FlowSetting) -> None:
        with noting(row):
            row.update(processes.ask(peer, "build", setting=dataclasses.asdict(own)))
            row["ns"] = []

    processes.each(build, built)
    running = [(peer, row) for peer, row, _ in built]
    if processes.effort.together:  # how long a step takes alone is not known yet
        for peer, row in running:
            if row["skipped"] is None:
                with noting(row):
                    processes.ask(peer, "time", seconds=0.05, calls=1)
    for turn in range(processes.effort.rounds):
        running = [(peer, row) for peer, row in running if row["skipped"] is None]
        if turn:
            running = running[1:] + running[:1]
        for peer, row in running:
            with noting(row):
                effort = processes.effort
                timed = processes.ask(peer, "time", seconds=effort.seconds, calls=effort.calls)
                per_step = timed["seconds"] / timed["steps"]
                row["ns"].append(per_step / row["seeds"] * 1e9)
    for peer, row in running if after is not None else ():
        if row["skipped"] is None:
            with noting(row):
                after(peer, row)
    return rows


@contextmanager
def noting(row: Row) -> Iterator[None]:
    """Let the failure of a peer be the reason in its row."""
    try:
        yield
    except PeerError as error:
        row["skipped"] = str(error)
        row.pop("ns", None)


def ensembles(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """The paper's problem, m = 20: seeds and dtypes, all peers."""
    seeds = {"float32": (1, 64, 1024, 8192), "float64": (1, 64, 1024, 8192)}
    if quick:
        seeds = {"float32": (1, 64, 1024), "float64": (1024,)}
    return [
        row
        for dtype, counts in seeds.items()
        for count in counts
        for row in time_cell(processes, peers, _setting(count, dtype))
    ]


def neurons(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """The cost of a seed-step against the number of neurons, 256 seeds in float32."""
    return [
        row
        for count in ((20, 100) if quick else (20, 100, 300, 1000))
        for row in time_cell(
            processes,
            [peer for peer in peers if peer.name in FEW],
            _setting(256, "float32", neurons=count),
        )
    ]


def seeds(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """The cost of a seed-step against the number of seeds, float32."""
    return [
        row
        for power in ((6, 10, 14) if quick else range(6, 17))
        for row in time_cell(
            processes,
            [peer for peer in peers if peer.name in FEW],
            _setting(2**power, "float32"),
        )
    ]


def _setting(seeds: int, dtype: str, neurons: int = 20) -> Setting:
    return Setting(seeds, dtype, neurons, machine.cores())


# --- equal work, memory, commands -------------------------------------------------------------


def check(
    processes: Pool,
    peers: list[Peer],
    quick: bool,
    *,
    dtypes: Sequence[str] = ("float32", "float64"),
) -> list[Row]:
    """Whether every peer does the work of the reference."""
    del quick
    rows = []
    for dtype in dtypes:
        ensembles: dict[str, equal_work.Ensemble] = {}

        def run(peer: Peer, row: Row, found: dict[str, equal_work.Ensemble] = ensembles) -> None:
            with noting(row):
                found[peer.name] = _final_ensemble(processes, peer, row["dtype"])

        cell = [(peer, {"peer": peer.name, "dtype": dtype, "skipped": None}) for peer in peers]
        processes.each(run, cell)
        for peer, row in cell:
            rows.append(row)
            if row["skipped"] is None:
                with noting(row):
                    if REFERENCE not in ensembles:
                        raise PeerError(f"there is no `{REFERENCE}` to compare with")
                    row.update(equal_work.compare(ensembles[REFERENCE], ensembles[peer.name]))
    return rows


def _final_ensemble(processes: Pool, peer: Peer, dtype: str) -> equal_work.Ensemble:
    setting = equal_work.check_setting(peer.check_seeds, dtype, machine.cores())
    processes.ask(peer, "start", setting=dataclasses.asdict(setting))
    processes.ask(peer, "advance", steps=equal_work.STEPS)
    states = processes.ask(peer, "read")
    weights, positions = (np.asarray(states[name]) for name in ("weights", "positions"))
    return equal_work.Ensemble.of(setting, weights, positions)


def memory(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """The most memory of a fresh process that runs an ensemble, beyond that of its imports."""
    count = 8192 if quick else 65536
    rows = []
    for peer in peers:
        row: Row = {"peer": peer.name, "seeds": count, "dtype": "float32", "skipped": None}
        rows.append(row)
        if count > peer.most_seeds:
            row["skipped"] = f"a step of {count} seeds takes too long"
            continue
        timeout = processes.effort.timeout
        with noting(row), Session(peer) as session:
            row["imports"] = session.ask("hello", timeout=timeout)["resident"]
            setting = dataclasses.asdict(_setting(count, "float32"))
            session.ask("build", setting=setting, timeout=timeout)
            row["peak"] = session.ask("memory")["peak"]
    return rows


COMMANDS = (
    ("figure3", "--scale", "paper", "--seeds", "1"),
    ("figure3", "--scale", "paper", "--seeds", "64"),
    ("figure4", "--scale", "paper", "--seeds", "1"),
    ("figure4", "--scale", "paper", "--seeds", "64"),
    ("figure7", "--scale", "paper", "--seeds", "20"),
)
_COMMAND_LINE = "import sys; from tts_jax.cli import main; sys.exit(main())"
_QUICK_COMMANDS = (("figure3", "--scale", "quick", "--seeds", "4"),)


def commands(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """Whole commands, from start to written files."""
    del processes, peers
    rows = []
    for arguments in _QUICK_COMMANDS if quick else COMMANDS:
        row: Row = {"command": f"tts-jax reproduce {' '.join(arguments)}", "skipped": None}
        rows.append(row)
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, "-c", _COMMAND_LINE, "reproduce", *arguments, "--out", folder]
            started = time.perf_counter()
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            row["seconds"] = time.perf_counter() - started
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            del row["seconds"]
            row["skipped"] = f"exit code {done.returncode}" + (f": {lines[-1]}" if lines else "")
    return rows


Workload = Callable[[Pool, list[Peer], bool], list[Row]]

WORKLOADS: dict[str, Workload] = {
    "check": check,
    "ensembles": ensembles,
    "neurons": neurons,
    "seeds": seeds,
    "memory": memory,
    "commands": commands,
}
