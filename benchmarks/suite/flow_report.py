"""The report of the flow's workloads: Markdown tables and work–precision diagrams."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import FLOW_PEERS, GPU_FLOW_PEERS, LIMIT_PEER, REFERENCE, SHARP_PEER
from benchmarks.suite.flow import GOOD_ERROR, SENSITIVE
from benchmarks.suite.measure import Row
from benchmarks.suite.metrics import (
    EQUAL_ERRORS,
    Comparison,
    batches,
    best,
    equal_error_ratios,
    follows,
    neuron_exponent,
    times_at,
)
from benchmarks.suite.report import comparison, digits, left_out, machines, save, table


_LABELS = {peer.name: peer.label for peer in (*FLOW_PEERS, *GPU_FLOW_PEERS, LIMIT_PEER, SHARP_PEER)}

_METHOD = f"""\
A solve is the gradient flow of the paper's univariate problem (η = 4e-3 unless stated) from one
random start with a = 0, recorded at 36 times. The error of a start is the maximum over times and
components of the distance to CVODE at a tolerance of 1e-14; that of a peer is the median over
its starts. Peers are compared at equal error, by interpolating log time in log error over their
tolerances, not at equal tolerance. CVODE, LSODA, BDF and Radau get the right-hand side and the
Jacobian compiled by Numba (`benchmarks/peers/numba_flow.py`); CVODE is called by its C interface,
so that no Python runs in a solve. Every peer has both cores: starts are spread over processes, one
per core and BLAS on one thread, or over the devices and threads of tts_jax. Slow peers solve the
first few starts alone. In a cell the peers are timed in rounds, one after the other; a time is the
least of all rounds, a ratio (×) the median of the ratios to `{REFERENCE}` within a round.
Compilation is apart. Absolute times of a shared machine vary by tenths; the ratios carry over
better.
"""


def markdown(run: dict[str, Any], comparisons: list[Comparison] | None, plot: str | None) -> str:
    """The report; `comparisons` with the baseline and the file name of the plot if there are."""
    groups = run["groups"]
    parts = ["# What the flow and its limits cost", _METHOD, machines(run)]
    if plot is not None:
        parts.append(f"![Work against precision, and against the number of neurons]({plot})")
    if comparisons is not None:
        parts.append(comparison(comparisons))
    for name, section in (
        ("flow", _flow),
        ("flow-neurons", _neurons),
        ("limit", _limit),
        ("sharp", _sharp),
        ("accuracy", _accuracy),
    ):
        if name in groups:
            parts.append(section(groups[name]["rows"]))
    parts.append(left_out(groups))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _label(peer: str) -> str:
    return _LABELS.get(peer, peer)


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _at_equal_errors(peers: dict[str, list[Row]], reference: str) -> str:
    """µs per solve at the errors that are compared, with the ratio to the reference."""
    lines = []
    for peer, rows in peers.items():
        cells = []
        for error in EQUAL_ERRORS:
            times = times_at(error, rows)
            within = equal_error_ratios(error, rows, peers.get(reference, []))
            text = digits(min(times) * 1e-3) if times else "–"
            if within and peer != reference:
                text += f" ({digits(float(np.median(within)))}×)"
            cells.append(text)
        lines.append((_label(peer), *cells))
    return table(("µs per solve", *(f"at error {error:g}" for error in EQUAL_ERRORS)), lines)


def _measured(peers: dict[str, list[Row]]) -> str:
    """Every tolerance: error and µs."""
    lines = []
    for peer, rows in peers.items():
        for row in rows:
            if row["skipped"]:
                continue
            failed = sum(row["failed"].values())
            lines.append(
                (
                    _label(peer),
                    f"{row['tolerance']:g}",
                    str(row["seeds"]),
                    _error(row.get("error")),
                    _error(row.get("worst")),
                    digits(best(row) * 1e-3),
                    _reasons(row["failed"]) if failed else "0",
                )
            )
    header = ("peer", "tolerance", "starts", "error", "largest", "µs per solve", "failed")
    return table(header, lines)


def _reasons(failed: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in failed.items())


def _flow(rows: list[Row]) -> str:
    text = "## Work against precision\n\nm = 20. The error is the median over starts."
    for (epsilon, end, _, _, single), peers in batches(rows).items():
        what = "a single start, with the error of the batch" if single else "batches"
        measured = {
            peer: found for peer, found in peers.items() if any(not row["skipped"] for row in found)
        }
        if measured:
            title = f"ε = {epsilon:g}, τ up to {end:g}, {what}:"
            text += f"\n\n{title}\n\n{_at_equal_errors(measured, REFERENCE)}"
            text += f"\n\n{_measured(measured)}"
    compiled: dict[str, float] = {}
    for row in rows:
        if not row["skipped"]:
            seconds = row["compile_seconds"]
            compiled[row["peer"]] = max(seconds, compiled.get(row["peer"], 0.0))
    lines = [(_label(peer), f"{seconds:.1f}") for peer, seconds in compiled.items()]
    return f"{text}\n\nCompilation (and the start of processes), at most:\n\n" + table(
        ("peer", "seconds"), lines
    )


def _neurons(rows: list[Row]) -> str:
    text = (
        "## Against the number of neurons\n\nε = 2e-5, τ up to 0.035. µs per solve at a tolerance "
        f"of 1e-8 with the error reached; in brackets the time over that of `{REFERENCE}` at the "
        "same error (≥ where that error is beyond what it was measured at, so that its time is a "
        "bound). Failed lanes are counted over all starts and tolerances."
    )
    for fixed_gap, title in ((True, "fixed gap/η, η = 0.08/m"), (False, "fixed η = 4e-3")):
        chosen = [row for row in rows if follows(row, fixed_gap)]
        if not chosen:
            continue
        counts = sorted({row["neurons"] for row in chosen})
        lines = []
        for peer in dict.fromkeys(row["peer"] for row in chosen):
            cells = [_against(peer, [r for r in chosen if r["neurons"] == m]) for m in counts]
            slope = neuron_exponent(chosen, peer, fixed_gap=fixed_gap)
            own = [row for row in chosen if row["peer"] == peer and not row["skipped"]]
            failed = sum(sum(row["failed"].values()) for row in own)
            tried = sum(row["seeds"] for row in own)
            cells += [f"{slope:.2f}" if slope is not None else "–", f"{failed} of {tried}"]
            lines.append((_label(peer), *cells))
        header = ("peer", *(f"m = {m}" for m in counts), "exponent of m at 1e-7", "failed")
        text += f"\n\n{title[0].upper()}{title[1:]}:\n\n" + table(header, lines)
    return text


def _against(peer: str, rows: list[Row]) -> str:
    """A peer's entry for one number of neurons."""
    own = [row for row in rows if row["peer"] == peer and not row["skipped"]]
    row = next((one for one in own if one["tolerance"] == 1e-8), None)
    if row is None:
        return "–"
    text = f"{digits(best(row) * 1e-3)} at {_error(row['error'])}"
    if peer == REFERENCE or not row["error"]:
        return text
    ours = [one for one in rows if one["peer"] == REFERENCE]
    within = equal_error_ratios(row["error"], [row], ours, at_most=True)
    if not within:
        return text
    bound = "" if times_at(row["error"], ours) else "≥ "
    return f"{text} ({bound}{digits(float(np.median(within)))}×)"


def _limit(rows: list[Row]) -> str:
    ((_, peers),) = batches(rows).items()
    peers = {peer: found for peer, found in peers.items() if any("ns" in row for row in found)}
    text = (
        f"## The limit against the flow\n\nm = 20, τ up to 0.035; `{REFERENCE}` is the flow at "
        "ε = 2e-5. Each error is against the same dynamics at a much smaller tolerance."
    )
    if not peers:
        return text
    text += f"\n\n{_at_equal_errors(peers, REFERENCE)}\n\n{_measured(peers)}"
    speeds = [
        f"{1 / np.median(within):.3g} times as fast at an error of {error:g}"
        for error in EQUAL_ERRORS
        if (
            within := equal_error_ratios(
                error, peers.get(LIMIT_PEER.name, []), peers.get(REFERENCE, [])
            )
        )
    ]
    return text + (f"\n\nBeside `flow`, `limit` is {' and '.join(speeds)}." if speeds else "")


def _sharp(rows: list[Row]) -> str:
    lines = [
        (
            str(row["seeds"]),
            f"{best(row) * row['seeds'] * 1e-9:.2f}",
            f"{row['compile_seconds']:.1f}",
            _reasons(row["failed"]) or "0",
        )
        for row in rows
        if not row["skipped"]
    ]
    header = ("starts", "seconds", "compilation, seconds", "failed")
    return "## The sharp limit\n\nm = 20, 100 times, random starts.\n\n" + table(header, lines)


def _accuracy(rows: list[Row]) -> str:
    text = (
        "## Accuracy on hard starts\n\nε = 2e-5, τ up to 0.035, tolerance 1e-8: starts whose "
        "neurons coincide, lie close to each other, straddle the ends, sit on jumps, cross, or "
        "start outside [0, 1] (`mixed_starts` in `benchmarks/setting.py`). Some solutions are not "
        "determined in float64: neurons that coincide stay together in exact arithmetic, but the "
        "slightest distance between them may grow exponentially. The last columns are how far "
        "the reference moves at most when every position moves by one ulp, and for how many "
        f"starts that is more than {SENSITIVE:g}."
    )
    for row in rows:
        if row["skipped"]:
            continue
        lines = [
            (
                kind,
                str(found["starts"]),
                _error(found["median"]),
                _error(found["worst"]),
                str(found["unsolved"]),
                _error(found["ulp"]),
                str(found["sensitive"]),
            )
            for kind, found in row["kinds"].items()
        ]
        header = ("start", "number", "median error", "largest", "failed", "one ulp", "sensitive")
        text += f"\n\n{_label(row['peer'])}:\n\n{table(header, lines)}"
        excused = sum(one["sensitive"] for one in row["above"])
        text += (
            f"\n\nLargest error {_error(row['worst'])} but for the sensitive starts; above "
            f"{GOOD_ERROR:g} {len(row['above'])}, of which {excused} sensitive; failed: "
            f"{_reasons(row['failed']) or 'none'}."
        )
        if row["above"]:
            listed = sorted(row["above"], key=lambda one: (one["sensitive"], -one["error"]))[:10]
            text += "\n\n" + "\n".join(
                f"- start {one['start']} ({one['kind']}): {_error(one['error'])}, one ulp moves "
                f"the solution by {_error(one['ulp'])}"
                for one in listed
            )
    return text


# --- plot -------------------------------------------------------------------------------------


def plot(run: dict[str, Any], path: Path) -> bool:
    """Draw a run into a PNG; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [*_precision_panels(run), *_neuron_panels(run)]
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, 3.6 * lines + 0.9),
        squeeze=False,
        layout="constrained",
    )
    colors = {name: f"C{index}" if index < 10 else "k" for index, name in enumerate(_LABELS)}
    drawn: dict[str, Any] = {}
    for ax, (title, axis, curves) in zip(axes.flat, panels, strict=False):
        for peer, points in curves.items():
            mine = peer in (REFERENCE, "xla")
            (drawn[peer],) = ax.plot(
                *zip(*sorted(points), strict=True),
                "o-" if mine else "s--",
                ms=3.5,
                lw=1.8 if mine else 1.1,
                color=colors[peer],
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(axis)
        ax.set_ylabel("µs per solve")
        ax.grid(alpha=0.25, lw=0.5)
        if axis.startswith("neurons"):
            counts = sorted({x for points in curves.values() for x, _ in points})
            ax.set_xticks(counts, labels=counts)
            ax.minorticks_off()
        else:
            ax.invert_xaxis()  # better to the right
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    handles = [drawn[name] for name in _LABELS if name in drawn]
    names = [name for name in _LABELS if name in drawn]
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False
    )
    save(figure, path)
    plt.close(figure)
    return True


_Panel = tuple[str, str, dict[str, list[tuple[float, float]]]]


def _precision_panels(run: dict[str, Any]) -> Iterable[_Panel]:
    rows = run["groups"].get("flow", {"rows": []})["rows"]
    for (epsilon, end, _, _, single), peers in batches(rows).items():
        curves = _points(peers, "error")
        if curves:
            starts = "one start" if single else "batches"
            yield f"ε = {epsilon:g}, τ ≤ {end:g}, m = 20, {starts}", "median error", curves


def _neuron_panels(run: dict[str, Any]) -> Iterable[_Panel]:
    rows = run["groups"].get("flow-neurons", {"rows": []})["rows"]
    for fixed_gap, title in ((True, "fixed gap/η"), (False, "fixed η")):
        peers: dict[str, list[Row]] = {}
        for row in rows:
            if follows(row, fixed_gap) and row["tolerance"] == 1e-8:
                peers.setdefault(row["peer"], []).append(row)
        curves = _points(peers, "neurons")
        if any(len(points) > 1 for points in curves.values()):
            yield f"ε = 2e-5, tolerance 1e-8, {title}", "neurons m", curves


def _points(peers: dict[str, list[Row]], axis: str) -> dict[str, list[tuple[float, float]]]:
    curves = {
        peer: [(row[axis], best(row) * 1e-3) for row in rows if "ns" in row and row.get(axis)]
        for peer, rows in peers.items()
    }
    return {peer: points for peer, points in curves.items() if points}
