"""The workloads of the gradient flow and its limits: work against precision.

A cell is a batch of starts at one tolerance; in it the peers are timed in turns, as in
`measure`, and each one's error is measured: the maximum over recorded times and components of
the distance to a reference, the median over starts. Peers are compared at equal error, not at
equal tolerance. The reference is CVODE at a tolerance of 1e-14, which shares nothing with the
engines that are judged by it.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import (
    FLOW_REFERENCE,
    LIMIT_PEER,
    LIMIT_REFERENCE,
    REFERENCE,
    SHARP_PEER,
    Peer,
)
from benchmarks.setting import Answer, FlowSetting, mixed_starts
from benchmarks.suite import machine
from benchmarks.suite.measure import Effort, Pool, Row, Workload, noting, time_cell
from benchmarks.suite.session import PeerError


FULL = Effort(rounds=3, seconds=0.2, timeout=180.0, calls=1)
QUICK = Effort(rounds=2, seconds=0.1, timeout=120.0, calls=1)

CASES = ((2e-5, 0.035), (1e-2, 0.3), (1.0, 1.0), (1.0, 0.1))  # (ε, τ_max)
_SLOWEST = ("kvaerno5", "stock-kvaerno5")  # in the first case only
_SHORT = ("engine", "diffrax", "tsit5", "cvode", "lsoda")  # in the last case
_QUICK_RUNGS = (1e-5, 1e-7, 1e-9, 1e-11)
_FEW = ("engine", "xla", "diffrax", "cvode", "lsoda")
_REFERENCE_TIMEOUT = 600.0
GOOD_ERROR = 1e-6  # what `accuracy` asks of a tolerance of 1e-8
SENSITIVE = 1e-7  # a start is, if one ulp of its positions moves the solution further


# --- errors -----------------------------------------------------------------------------------


def solve(processes: Pool, peer: Peer, setting: FlowSetting) -> Answer:
    """The answer of a peer, untimed."""
    ask = dict(timeout=_REFERENCE_TIMEOUT)
    processes.ask(peer, "start", setting=dataclasses.asdict(setting), **ask)
    processes.ask(peer, "advance", steps=1, **ask)
    return _read(processes, peer)


def _read(processes: Pool, peer: Peer) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.npz"
        reasons = processes.ask(peer, "save", path=str(path))["reasons"]
        with np.load(path) as stored:
            return Answer(stored["fast"], stored["slow"], reasons)


def errors(answer: Answer, reference: Answer) -> np.ndarray:
    """The maximum error of every start that both have solved, `[starts]`; NaN where one failed."""
    count = min(len(answer.reasons), len(reference.reasons))
    fast = np.abs(answer.fast[:count] - reference.fast[:count]).max((1, 2))
    slow = np.abs(answer.slow[:count] - reference.slow[:count]).max((1, 2))
    found = np.maximum(fast, slow)
    failed = [
        bool(a or b) for a, b in zip(answer.reasons[:count], reference.reasons[:count], strict=True)
    ]
    return np.where(failed, np.nan, found)


def failures(answer: Answer) -> dict[str, int]:
    """How many starts failed for each reason."""
    told = [reason for reason in answer.reasons if reason]
    return {reason: told.count(reason) for reason in dict.fromkeys(told)}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _judge(processes: Pool, reference: Answer) -> Callable[[Peer, Row], None]:
    """Puts errors and failures into the row of a peer that has just been timed."""

    def judge(peer: Peer, row: Row) -> None:
        answer = _read(processes, peer)
        found = errors(answer, reference)
        solved = found[np.isfinite(found)]
        row["error"] = _number(np.median(solved)) if solved.size else None
        row["worst"] = _number(np.max(solved)) if solved.size else None
        row["failed"] = failures(answer)

    return judge


def _curves(
    processes: Pool,
    peers: Iterable[Peer],
    setting: FlowSetting,
    reference: Answer,
    tolerances: Iterable[float] | None = None,
) -> list[Row]:
    """All peers at all their tolerances, or at those of them that are given."""
    peers = list(peers)
    every = sorted({one for peer in peers for one in peer.tolerances}, reverse=True)
    rows = []
    for tolerance in every if tolerances is None else tolerances:
        cell = dataclasses.replace(setting, tolerance=tolerance)
        members = [peer for peer in peers if tolerance in peer.tolerances]
        found = time_cell(processes, members, cell, _judge(processes, reference))
        # who took too long does not try a smaller tolerance
        slow = {row["peer"] for row in found if "no answer" in (row["skipped"] or "")}
        peers = [peer for peer in peers if peer.name not in slow]
        rows += found
    return rows


def _reference(
    processes: Pool, setting: FlowSetting, tolerance: float = 1e-14, peer: Peer = FLOW_REFERENCE
) -> Answer:
    answer = solve(processes, peer, dataclasses.replace(setting, tolerance=tolerance))
    processes.drop(peer)
    return answer


def _without_reference(peers: Iterable[Peer], setting: FlowSetting, error: PeerError) -> list[Row]:
    """A row per peer that says why there is nothing to measure an error against."""
    place = {name: getattr(setting, name) for name in setting.columns}
    reason = f"no reference: {error}"
    return [{"peer": peer.name, **place, "skipped": reason} for peer in peers]


# --- workloads --------------------------------------------------------------------------------


def flow(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """Work against precision, m = 20: batches at three ε, and single solves at the first.

    In the last case τ is short: there stability asks few steps of an explicit solver.
    """
    rows = []
    for case, (epsilon, end) in enumerate(CASES[:1] if quick else CASES):
        setting = _setting(32 if quick else 1024, epsilon=epsilon, end=end)
        members = [
            dataclasses.replace(peer, most_seeds=4) if quick and not peer.own else peer
            for peer in peers
            if peer.backend == "cpu"
            and not (peer.name in _SLOWEST and (case or quick))
            and not (peer.name == "tsit5" and epsilon < 1e-3)  # 10,000 steps at any tolerance
            and (peer.name in _SHORT or case < len(CASES) - 1)
        ]
        try:
            reference = _reference(processes, setting)
        except PeerError as error:
            rows += _without_reference(members, setting, error)
            continue
        rungs = _QUICK_RUNGS if quick else None
        batch = _curves(processes, members, setting, reference, rungs)
        rows += batch
        if case == 0:
            rows += _single(processes, members, setting, reference, batch, rungs)
            many = dataclasses.replace(setting, seeds=65_536)
            gpus = [peer for peer in peers if peer.backend == "gpu"]
            rows += _curves(processes, gpus, many, reference)
    return rows


def _single(
    processes: Pool,
    peers: list[Peer],
    setting: FlowSetting,
    reference: Answer,
    batch: list[Row],
    rungs: Iterable[float] | None,
) -> list[Row]:
    """One start, timed alone; its error is the batch's, because one start's says little."""
    few = [peer for peer in peers if peer.name in _FEW]
    one = dataclasses.replace(setting, seeds=1)
    rows = _curves(processes, few, one, reference, rungs)
    known = {
        (row["peer"], row["tolerance"]): {name: row.get(name) for name in ("error", "worst")}
        for row in batch
    }
    for row in rows:
        if row["skipped"] is None:
            row |= known.get((row["peer"], row["tolerance"]), {"error": None, "worst": None})
    return rows


def neurons(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """The cost of a solve against m, at fixed η and at η = 0.08/m, which keeps gap/η.

    Beyond 100 neurons the reference is CVODE at 1e-11, on few starts: 1e-14 would take minutes.
    """
    rows = []
    plan = {20: 64, 100: 16} if quick else {20: 1024, 100: 256, 300: 64, 1000: 32}
    rungs = (1e-7, 1e-8) if quick else (1e-6, 1e-7, 1e-8, 1e-9)
    for count, starts in plan.items():
        members = [
            _shrunk(peer, count, rungs)
            for peer in peers
            if peer.name in _FEW and count <= peer.most_neurons
        ]
        # at m = 20 both are the same
        for eta in dict.fromkeys((0.08 / count, 4e-3)):
            setting = _setting(starts, neurons=count, eta=eta)
            known = dataclasses.replace(setting, seeds=max(2, 320 // count))
            try:
                reference = _reference(processes, known, 1e-14 if count <= 100 else 1e-11)
            except PeerError as error:
                rows += _without_reference(members, setting, error)
                continue
            effort = dataclasses.replace(processes.effort, rounds=1 if count > 100 else 2)
            with processes.at(effort):
                rows += _curves(processes, members, setting, reference)
    return rows


def _shrunk(peer: Peer, neurons: int, rungs: Iterable[float]) -> Peer:
    """A peer with fewer starts for more neurons, and with one tolerance if it is not ours.

    The time of our own engines is interpolated at the error that the other reaches.
    """
    tolerances = tuple(one for one in rungs if one in peer.tolerances)
    if not peer.own:
        tolerances = (1e-8,)
    starts = peer.most_seeds
    if starts <= 1024:
        starts = max(2, starts * 20 // neurons)
    return dataclasses.replace(peer, tolerances=tolerances, most_seeds=starts)


def limit(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """`limit` against `flow` at ε = 2e-5, each against its own reference.

    That of `limit` is Diffrax with the dense Jacobian, at 1e-10: a*(u) is no better determined.
    """
    engine = [peer for peer in peers if peer.name == REFERENCE]
    rows = []
    setting = _setting(16 if quick else 1024)
    first = dataclasses.replace(setting, seeds=8 if quick else 32)
    try:
        ends = _reference(processes, first)
        reduced = _reference(processes, first, 1e-10, LIMIT_REFERENCE)
    except PeerError as error:
        return _without_reference([*engine, LIMIT_PEER], setting, error)
    judges = {LIMIT_PEER.name: _judge(processes, reduced)}
    for peer in engine:
        judges[peer.name] = _judge(processes, ends)
    for tolerance in _QUICK_RUNGS if quick else LIMIT_PEER.tolerances:
        cell = dataclasses.replace(setting, tolerance=tolerance)
        rows += time_cell(
            processes, [*engine, LIMIT_PEER], cell, lambda peer, row: judges[peer.name](peer, row)
        )
    return rows


def sharp(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """`sharp_limit` of 10,000 random starts at 100 times."""
    del peers
    setting = dataclasses.replace(_setting(1000 if quick else 10_000), records=100)

    def count_failures(peer: Peer, row: Row) -> None:
        row["failed"] = failures(_read(processes, peer))

    return time_cell(processes, [SHARP_PEER], setting, count_failures)


def accuracy(processes: Pool, peers: list[Peer], quick: bool) -> list[Row]:
    """Errors at a tolerance of 1e-8 on starts that are hard, untimed.

    Some are harder than float64: neurons that coincide stay together in exact arithmetic, but
    where a jump lies between their neighbours the slightest distance grows exponentially. Beside
    every error stands how far the reference moves when each position moves by one ulp.
    """
    setting = dataclasses.replace(_setting(96 if quick else 1024), mixed=True)
    mine = [peer for peer in peers if peer.own and peer.backend == "cpu"]
    try:
        reference = _reference(processes, setting)
        nudged = _reference(processes, dataclasses.replace(setting, nudged=True))
        ulp = errors(nudged, reference)
    except PeerError as error:
        return _without_reference(mine, setting, error)
    kinds = np.asarray(mixed_starts(setting.seeds, setting.neurons, setting.eta)[1])
    rows = []
    for peer in mine:
        row: Row = {"peer": peer.name, **{k: getattr(setting, k) for k in setting.columns}}
        row["skipped"] = None
        rows.append(row)
        with noting(row):
            answer = solve(processes, peer, setting)
            row.update(_by_kind(kinds, errors(answer, reference), ulp))
            row["failed"] = failures(answer)
    return rows


def _by_kind(kinds: np.ndarray, found: np.ndarray, ulp: np.ndarray) -> dict[str, Any]:
    """Errors of all starts and of each kind; `ulp` is how far one ulp moves each solution."""
    sensitive = ~(ulp <= SENSITIVE)
    table = {}
    for kind in dict.fromkeys(kinds):
        own = kinds == kind
        solved = found[own & np.isfinite(found)]
        table[str(kind)] = {
            "starts": int(own.sum()),
            "unsolved": int((own & ~np.isfinite(found)).sum()),
            "median": _number(np.median(solved)) if solved.size else None,
            "worst": _number(np.max(solved)) if solved.size else None,
            "sensitive": int((own & sensitive).sum()),
            "ulp": _number(np.max(ulp[own])),
        }
    above = [
        {
            "start": int(index),
            "kind": str(kinds[index]),
            "error": float(found[index]),
            "ulp": _number(ulp[index]),
            "sensitive": bool(sensitive[index]),
        }
        for index in np.flatnonzero(found > GOOD_ERROR)
    ]
    sure = found[np.isfinite(found) & ~sensitive]
    return {"kinds": table, "worst": _number(np.max(sure)) if sure.size else None, "above": above}


def _setting(seeds: int, **more: Any) -> FlowSetting:
    return FlowSetting(seeds, threads=machine.cores(), **more)


WORKLOADS: dict[str, Workload] = {
    "accuracy": accuracy,
    "flow": flow,
    "flow-neurons": neurons,
    "limit": limit,
    "sharp": sharp,
}
