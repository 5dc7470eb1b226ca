"""From the rows of a run to numbers that can be compared with a baseline.

A run is a JSON object `{"format": 1, "groups": {workload: {"machine", "quick", "rows"}}}`; the
committed baseline is such a run. Correctness is compared tightly and on every machine, times and
memory loosely and only on the baseline's own processor and number of cores.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from benchmarks.peers import (
    CPU_PEERS,
    FLOW_PEERS,
    GPU_FLOW_PEERS,
    GPU_PEERS,
    LIMIT_PEER,
    REFERENCE,
    SHARP_PEER,
)
from benchmarks.suite.measure import Row


FORMAT = 1
TIMED = ("ensembles", "neurons", "seeds")  # workloads whose rows hold times

Verdict = Literal["worse", "better", "same", "new", "other machine"]

_EVERY = (*CPU_PEERS, *GPU_PEERS, *FLOW_PEERS, *GPU_FLOW_PEERS, LIMIT_PEER, SHARP_PEER)
_OWN = {peer.name for peer in _EVERY if peer.own}

EQUAL_ERRORS = (1e-6, 1e-8)  # at which the solvers of the flow are compared


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number to compare.

    Attributes:
        key: name, unique within a run.
        value: the number.
        unit: its unit.
        better: which way is better; `"equal"` if any change is worse.
        tolerance: relative change that passes.
        portable: whether it can be compared between machines.
    """

    key: str
    value: float
    unit: str
    better: Literal["less", "more", "equal"]
    tolerance: float
    portable: bool = False

    def against(self, baseline: "Metric") -> Verdict:
        """What became of the baseline's number."""
        change = self.value - baseline.value
        if abs(change) <= self.tolerance * abs(baseline.value):
            return "same"
        if self.better == "equal":
            return "worse"
        return "better" if (change < 0) == (self.better == "less") else "worse"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A metric beside the baseline's."""

    key: str
    unit: str
    baseline: float | None
    current: float | None
    verdict: Verdict


# --- what the rows say ------------------------------------------------------------------------


def cells(rows: Iterable[Row]) -> Iterator[tuple[tuple[int, str, int], list[Row]]]:
    """The timed rows of each ensemble (seeds, dtype, neurons), in the order of the run."""

    def cell(row: Row) -> tuple[int, str, int]:
        return row["seeds"], row["dtype"], row["neurons"]

    for key, members in itertools.groupby(rows, cell):
        yield key, list(members)


def best(row: Row) -> float:
    """Nanoseconds per seed-step, the least of all rounds."""
    return min(row["ns"])


def ratios(row: Row, cell: list[Row]) -> list[float]:
    """The time of a peer over that of the reference in every round; empty without them."""
    reference = next((other for other in cell if other["peer"] == REFERENCE), None)
    if reference is None or reference["skipped"] or row["skipped"]:
        return []
    return [float(a / b) for a, b in zip(row["ns"], reference["ns"], strict=True)]


def exponent(rows: Iterable[Row], peer: str, axis: str) -> float | None:
    """The slope of log time per seed-step in log `axis`; `None` with fewer than two points."""
    points = [(row[axis], best(row)) for row in rows if row["peer"] == peer and "ns" in row]
    if len(points) < 2:
        return None
    x, y = np.log(np.asarray(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def not_comparable(run: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(peer, dtype) that do other work than the reference, with the reason."""
    rows = run["groups"].get("check", {"rows": []})["rows"]
    found = {}
    for row in rows:
        if not row["skipped"] and not row["comparable"]:
            found[row["peer"], row["dtype"]] = row["reason"]
    return found


# --- work against precision -------------------------------------------------------------------


Batch = tuple[float, float, float, int, bool]  # ε, last τ, η, m, whether it is a single start


def batches(rows: Iterable[Row]) -> dict[Batch, dict[str, list[Row]]]:
    """Rows of the flow by batch, then by peer; one row a tolerance."""
    found: dict[Batch, dict[str, list[Row]]] = {}
    for row in rows:
        place = row["epsilon"], row["end"], row["eta"], row["neurons"], row["seeds"] == 1
        found.setdefault(place, {}).setdefault(row["peer"], []).append(row)
    return found


def times_at(error: float, rows: Iterable[Row], *, at_most: bool = False) -> list[float]:
    """Nanoseconds per solve at which a peer reaches `error`, in every round, by log-log
    interpolation over its tolerances; empty outside what was measured.

    With `at_most` an error above all measured ones gets the time of the largest, which is then a
    bound.
    """
    points = {row["error"]: row["ns"] for row in rows if "ns" in row and row.get("error")}
    known = sorted(points)
    if not known or error < known[0] or (error > known[-1] and not at_most):
        return []
    x = np.log(known)
    rounds = np.log([points[one] for one in known]).T
    return [float(np.exp(np.interp(np.log(error), x, y))) for y in rounds]


def equal_error_ratios(
    error: float, rows: Iterable[Row], reference: Iterable[Row], *, at_most: bool = False
) -> list[float]:
    """The time of a peer over that of the reference at equal error, in every round."""
    theirs, ours = times_at(error, rows), times_at(error, reference, at_most=at_most)
    return [a / b for a, b in zip(theirs, ours, strict=True)] if theirs and ours else []


def neuron_exponent(rows: Iterable[Row], peer: str, *, fixed_gap: bool) -> float | None:
    """The slope of log time per solve in log m at a tolerance of 1e-7, at fixed gap/η or η."""
    chosen = [row for row in rows if row["tolerance"] == 1e-7 and follows(row, fixed_gap)]
    return exponent(chosen, peer, "neurons")


def follows(row: Row, fixed_gap: bool) -> bool:
    """Whether a row of `flow-neurons` lies on the line of fixed gap/η, or of fixed η."""
    paper = 4e-3  # at m = 20, where the lines meet
    return bool(np.isclose(row["eta"], paper * 20 / row["neurons"] if fixed_gap else paper))


# --- metrics ----------------------------------------------------------------------------------


def metrics(run: dict[str, Any]) -> list[Metric]:
    """Everything of a run that a baseline can hold."""
    other_work = not_comparable(run)
    found: list[Metric] = []
    for name, group in run["groups"].items():
        rows = group["rows"]
        for row in rows:
            if row.get("peer") in _OWN:
                key = "/".join([name, *_place(row), row["peer"], "ran"])
                found.append(Metric(key, float(not row["skipped"]), "", "equal", 0.0, True))
        if name == "check":
            found.extend(_correctness(rows))
        elif name in TIMED:
            found.extend(_times(name, rows, other_work))
        elif name == "memory":
            found.extend(_memory(rows))
        elif name == "accuracy":
            found.extend(_accuracy(rows))
        elif name in ("flow", "flow-neurons", "limit", "sharp"):
            found.extend(_flows(name, rows))
        elif name == "commands":
            for row in rows:
                if not row["skipped"]:
                    key = f"commands/{row['command']}"
                    found.append(Metric(key, row["seconds"], "s", "less", 0.5))
    return found


def _place(row: Row) -> list[str]:
    units = {"dtype": "{}", "seeds": "{} seeds", "neurons": "{} neurons"}
    units |= {"eta": "eta {:g}", "epsilon": "epsilon {:g}", "end": "tau {:g}"}
    units |= {"tolerance": "tolerance {:g}"}
    return [unit.format(row[name]) for name, unit in units.items() if name in row]


def _correctness(rows: list[Row]) -> Iterator[Metric]:
    for row in rows:
        if row["skipped"]:
            continue
        key = f"check/{row['dtype']}/{row['peer']}"
        yield Metric(f"{key}/comparable", float(row["comparable"]), "", "equal", 0.0, True)
        if row["peer"] == REFERENCE:
            # the same streams everywhere: only rounding may differ
            for name in ("loss", "move"):
                value = row[name]["mean"]
                yield Metric(f"{key}/mean {name}", value, "", "equal", 0.01, True)


def _times(name: str, rows: list[Row], other_work: dict[tuple[str, str], str]) -> Iterator[Metric]:
    for _, cell in cells(rows):
        for row in cell:
            if row["skipped"] or (row["peer"], row["dtype"]) in other_work:
                continue
            key = "/".join([name, *_place(row), row["peer"]])
            if row["peer"] in _OWN:
                yield Metric(f"{key}/time", best(row), "ns", "less", 0.5)
            elif within := ratios(row, cell):
                median = float(np.median(within))
                yield Metric(f"{key}/ratio", median, "x", "more", 0.35)
    if name == "neurons":
        for peer in sorted(_OWN & {row["peer"] for row in rows}):
            if (slope := exponent(rows, peer, "neurons")) is not None:
                yield Metric(f"neurons/{peer}/exponent", slope, "", "less", 0.25)


def _memory(rows: list[Row]) -> Iterator[Metric]:
    for row in rows:
        if not row["skipped"] and row["peer"] in _OWN and row["peak"] is not None:
            key = "/".join(["memory", *_place(row), row["peer"]])
            yield Metric(key, row["peak"] / 2**20, "MiB", "less", 0.3)


def _accuracy(rows: list[Row]) -> Iterator[Metric]:
    for row in rows:
        if not row["skipped"]:
            key = "/".join(["accuracy", *_place(row), row["peer"]])
            if row["worst"] is not None:
                yield Metric(f"{key}/worst error", row["worst"], "", "less", 1.0, True)
            failed = sum(row["failed"].values())
            yield Metric(f"{key}/failed", float(failed), "starts", "less", 0.0, True)
            above = [one for one in row["above"] if not one["sensitive"]]
            yield Metric(f"{key}/above 1e-6", float(len(above)), "starts", "less", 0.0, True)


def _flows(name: str, rows: list[Row]) -> Iterator[Metric]:
    for row in rows:
        if row["skipped"] or row["peer"] not in _OWN:
            continue
        key = "/".join([name, *_place(row), row["peer"]])
        yield Metric(f"{key}/time", best(row), "ns", "less", 0.5)
        failed = sum(row["failed"].values())
        yield Metric(f"{key}/failed", float(failed), "starts", "less", 0.0, True)
        if row.get("error") and row["seeds"] > 1:
            yield Metric(f"{key}/error", row["error"], "", "less", 1.0, True)
    if name == "sharp":
        return
    for (epsilon, end, eta, count, single), peers in batches(rows).items():
        place = f"{name}/{count} neurons/eta {eta:g}/epsilon {epsilon:g}/tau {end:g}"
        place += "/single" if single else ""
        ours = peers.get(REFERENCE, [])
        for peer, theirs in peers.items():
            if peer == REFERENCE:
                continue
            for error, within in _ratios_of(name, theirs, ours):
                key = f"{place}/{peer}/ratio at error {error}"
                median = float(np.median(within))
                # of `limit` the time counts, of the others how much slower they are
                yield Metric(key, median, "x", "less" if name == "limit" else "more", 0.35)
    if name == "flow-neurons":
        for peer in sorted(_OWN & {row["peer"] for row in rows}):
            for fixed_gap, line in ((True, "gap/eta"), (False, "eta")):
                slope = neuron_exponent(rows, peer, fixed_gap=fixed_gap)
                if slope is not None:
                    key = f"{name}/{peer}/exponent at fixed {line}"
                    yield Metric(key, slope, "", "less", 0.25)


def _ratios_of(name: str, theirs: list[Row], ours: list[Row]) -> Iterator[tuple[str, list[float]]]:
    """Ratios at the errors that are compared, with a word for each error."""
    if name == "flow-neurons":
        if len(theirs) == 1 and theirs[0].get("error"):
            error = theirs[0]["error"]
            if within := equal_error_ratios(error, theirs, ours, at_most=True):
                yield "its own", within
        return
    for error in EQUAL_ERRORS:
        if within := equal_error_ratios(error, theirs, ours):
            yield f"{error:g}", within


# --- the gate ---------------------------------------------------------------------------------


def compare(run: dict[str, Any], baseline: dict[str, Any]) -> list[Comparison]:
    """Every metric of `run` beside that of `baseline`.

    What only the baseline has is passed over: a smaller run, or one without a peer's package, is
    not a worse one. Own rows that were skipped have the metric `ran` at 0.
    """
    old = {metric.key: metric for metric in metrics(baseline)}
    result = []
    for metric in metrics(run):
        known = old.get(metric.key)
        name = metric.key.partition("/")[0]
        verdict: Verdict = "new"
        if known is not None:
            same = _machine(run, name) == _machine(baseline, name)
            verdict = metric.against(known) if same or metric.portable else "other machine"
        before = None if known is None else known.value
        result.append(Comparison(metric.key, metric.unit, before, metric.value, verdict))
    return result


def _machine(run: dict[str, Any], group: str) -> tuple[Any, ...]:
    described = run["groups"][group]["machine"]
    return described["processor"], described["cores"], described["backend"]
