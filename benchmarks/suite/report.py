"""The report of a run: Markdown tables and a plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import CPU_PEERS, GPU_PEERS, REFERENCE
from benchmarks.setting import PAPER_STEPS
from benchmarks.suite.measure import Row
from benchmarks.suite.metrics import Comparison, best, cells, exponent, not_comparable, ratios


_LABELS = {peer.name: peer.label for peer in (*CPU_PEERS, *GPU_PEERS)}

_METHOD = f"""\
One SGD step is one sample per seed: the paper's univariate problem with m = 20 neurons,
η = 4e-3, ε = 2e-5, h = 1e-5, noise half-width 1 and the exact gradient. Every peer runs in a
process of its own on all cores (but for NumPy, which as published uses one). In a cell the peers
are timed in rounds, one after the other; a time is the least of all rounds, a ratio (×) the
median of the ratios to `{REFERENCE}` within a round. Compilation is apart. Absolute times of a
shared machine vary by tenths; the ratios carry over better.
"""


def markdown(run: dict[str, Any], comparisons: list[Comparison] | None, plot: str | None) -> str:
    """The report; `comparisons` with the baseline and the file name of the plot if there are."""
    groups = run["groups"]
    parts = ["# What SGD costs", _METHOD, machines(run)]
    if plot is not None:
        parts.append(f"![Time per seed-step of the peers]({plot})")
    if comparisons is not None:
        parts.append(comparison(comparisons))
    other_work = not_comparable(run)
    if "check" in groups:
        parts.append(_check(groups["check"]["rows"]))
    if "ensembles" in groups:
        parts.append(_ensembles(groups["ensembles"]["rows"], other_work))
    if "neurons" in groups:
        title = "## Against the number of neurons\n\n256 seeds, float32, ns per seed-step."
        parts.append(title + "\n\n" + _against("neurons", groups["neurons"]["rows"], other_work))
    if "seeds" in groups:
        title = "## Against the number of seeds\n\nm = 20, float32, ns per seed-step."
        parts.append(title + "\n\n" + _against("seeds", groups["seeds"]["rows"], other_work))
    if "memory" in groups:
        parts.append(_memory(groups["memory"]["rows"]))
    if "commands" in groups:
        parts.append(_commands(groups["commands"]["rows"]))
    parts.append(left_out(groups))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(figure: Any, path: Path) -> None:
    """The figure as a PNG of few colours, which is a third as large."""
    from PIL import Image

    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def machines(run: dict[str, Any]) -> str:
    """What each workload ran on."""
    merged: dict[str, list[str]] = {}
    for name, group in run["groups"].items():
        machine = group["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        line = (
            f"{machine['processor']}, {machine['cores']} cores, backend {machine['backend']}, "
            f"{machine['system']}, Python {machine['python']}, {versions}, {machine['date']}"
        )
        devices: dict[str, list[str]] = {}
        for peer, found in machine.get("devices", {}).items():
            devices.setdefault(", ".join(found), []).append(peer)
        if devices:
            line += "; JAX's devices: "
            line += "; ".join(f"{', '.join(peers)} {found}" for found, peers in devices.items())
        quick = ", quick" if group["quick"] else ""
        merged.setdefault(line, []).append(f"{name} (load {machine['load']}{quick})")
    return "\n".join(f"- {', '.join(names)}: {line}" for line, names in merged.items())


def comparison(comparisons: list[Comparison]) -> str:
    """What became better or worse than the baseline."""
    told = [one for one in comparisons if one.verdict in ("worse", "better")]
    counts = ", ".join(
        f"{sum(one.verdict == verdict for one in comparisons)} {verdict}"
        for verdict in ("worse", "better", "same", "new", "other machine")
    )
    text = f"## Against the baseline\n\n{counts}."
    if not told:
        return text
    rows = [
        (one.key, one.verdict, f"{one.baseline:.4g}", f"{one.current:.4g}", one.unit)
        for one in sorted(told, key=lambda one: one.verdict, reverse=True)
    ]
    return text + "\n\n" + table(("metric", "", "baseline", "now", "unit"), rows)


def _check(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["skipped"]:
            continue
        numbers = [
            f"{row[name][value]:.3g}" if row[name][value] is not None else "not finite"
            for name in ("loss", "move")
            for value in ("mean", "reference", "p")
        ]
        verdict = "equal" if row["comparable"] else f"**not comparable**: {row['reason']}"
        lines.append((_LABELS.get(row["peer"], row["peer"]), row["dtype"], *numbers, verdict))
    header = ("peer", "dtype", "mean loss", "reference", "p", "mean move / η", "reference", "p", "")
    return (
        "## Equal work\n\nFinal population loss and mean move of the positions of short ensembles "
        f"from equal starts, against `{REFERENCE}` (its first seeds where a peer has fewer); p of "
        "the two-sample Kolmogorov–Smirnov test.\n\n" + table(header, lines)
    )


def _time(row: Row, cell: list[Row], other_work: dict[tuple[str, str], str]) -> str:
    if row["skipped"]:
        return "–"
    text = digits(best(row))
    if (row["peer"], row["dtype"]) in other_work:
        return f"({text}, not comparable)"
    within = ratios(row, cell)
    if row["peer"] == REFERENCE or not within:
        return text
    return f"{text} ({digits(float(np.median(within)))}×)"


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ensembles(rows: list[Row], other_work: dict[tuple[str, str], str]) -> str:
    text = "## Seeds and precision\n\nns per seed-step (multiples of the time of `engine`)."
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        text += f"\n\n{dtype}:\n\n{_by_peer(own, 'seeds', other_work)}"
    compiled = [
        (
            _LABELS.get(peer, peer),
            f"{max(times):.1f}" if max(times) else "–",
        )
        for peer in dict.fromkeys(row["peer"] for row in rows)
        if (times := [r["compile_seconds"] for r in rows if r["peer"] == peer and "ns" in r])
    ]
    paper = [
        f"{cell[0]} seed{'s' if cell[0] > 1 else ''} in {cell[1]}: "
        f"{best(row) * cell[0] * PAPER_STEPS * 1e-9:,.0f} s"
        for cell, members in cells(rows)
        for row in members
        if row["peer"] == REFERENCE and not row["skipped"]
    ]
    spread = [
        max(within) / min(within) - 1
        for _, members in cells(rows)
        for row in members
        if row["peer"] != REFERENCE and (within := ratios(row, members))
    ]
    if spread:
        text += (
            f"\n\nBetween rounds a ratio spread by {np.median(spread):.0%} (median over all "
            f"entries), at most {max(spread):.0%}."
        )
    if paper:
        text += f"\n\nThe paper's 1.75e8 steps by `{REFERENCE}`: {'; '.join(paper)}."
    return text + "\n\nCompilation, at most:\n\n" + table(("peer", "seconds"), compiled)


def _by_peer(rows: list[Row], axis: str, other_work: dict[tuple[str, str], str]) -> str:
    places: dict[str, dict[int, str]] = {}
    for _, cell in cells(rows):
        for row in cell:
            places.setdefault(row["peer"], {})[row[axis]] = _time(row, cell, other_work)
    columns = list(dict.fromkeys(row[axis] for row in rows))
    lines = [
        [_LABELS.get(peer, peer), *(entries.get(column, "–") for column in columns)]
        for peer, entries in places.items()
    ]
    return table(
        ["peer", *(f"{column} {axis if column > 1 else axis[:-1]}" for column in columns)], lines
    )


def _against(axis: str, rows: list[Row], other_work: dict[tuple[str, str], str]) -> str:
    text = _by_peer(rows, axis, other_work)
    if axis != "neurons":
        return text
    slopes = [
        f"{_LABELS.get(peer, peer)}: {slope:.2f}"
        for peer in dict.fromkeys(row["peer"] for row in rows)
        if (slope := exponent(rows, peer, axis)) is not None
    ]
    return text + f"\n\nFitted exponent of the time in m: {'; '.join(slopes)}."


def _memory(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["skipped"] or row["peak"] is None:
            continue
        beyond = row["peak"] - row["imports"]
        lines.append(
            (
                _LABELS.get(row["peer"], row["peer"]),
                f"{row['imports'] / 2**20:,.0f}",
                f"{row['peak'] / 2**20:,.0f}",
                f"{beyond / row['seeds'] / 2**10:,.2f}",
            )
        )
    if not lines:
        return ""
    header = ("peer", "after imports, MiB", "peak, MiB", "difference per seed, KiB")
    title = f"## Memory\n\n{rows[0]['seeds']} seeds, float32, compilation included."
    return f"{title}\n\n{table(header, lines)}"


def _commands(rows: list[Row]) -> str:
    lines = [(f"`{row['command']}`", f"{row['seconds']:.1f}") for row in rows if not row["skipped"]]
    return "## Whole commands\n\n" + table(("command", "seconds"), lines) if lines else ""


def left_out(groups: dict[str, Any]) -> str:
    """Every row that was skipped, with the reason."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, group in groups.items():
        for row in group["rows"]:
            if row["skipped"]:
                place = " ".join(str(row[k]) for k in ("seeds", "dtype", "neurons") if k in row)
                who = row.get("peer") or row["command"]
                where = reasons.setdefault((who, row["skipped"]), {})
                where.setdefault(name, []).append(f"{name} {place}".strip())
    if not reasons:
        return ""
    lines = []
    for (who, why), where in reasons.items():
        places = [
            ", ".join(dict.fromkeys(found)) if len(found) < 4 else f"{name}, {len(found)} cells"
            for name, found in where.items()
        ]
        lines.append(f"- {who} ({', '.join(places)}): {why}")
    return "## Left out\n\n" + "\n".join(lines)


# --- plot -------------------------------------------------------------------------------------


def plot(run: dict[str, Any], path: Path) -> bool:
    """Draw a run into a PNG; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [name for name in ("ensembles", "seeds", "neurons") if run["groups"].get(name)]
    panels = [name for name in panels if any("ns" in row for row in _rows(run, name))]
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    other_work = not_comparable(run)
    colors = {name: f"C{index}" for index, name in enumerate(_LABELS)}
    for ax, name in zip(axes[0], panels, strict=True):
        rows = [row for row in _rows(run, name) if "ns" in row]
        rows = [row for row in rows if (row["peer"], row["dtype"]) not in other_work]
        if name == "ensembles":
            _bars(ax, rows, colors)
        else:
            _curves(ax, rows, name, colors)
    save(figure, path)
    plt.close(figure)
    return True


def _rows(run: dict[str, Any], name: str) -> list[Row]:
    return run["groups"][name]["rows"]


def _bars(ax: Any, rows: list[Row], colors: dict[str, str]) -> None:
    """One bar per peer for the ensemble of 1024 seeds (or the largest), a mark for float64."""
    counts = {row["seeds"] for row in rows}
    count = 1024 if 1024 in counts else max(counts)
    rows = [row for row in rows if row["seeds"] == count]
    names = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    for row in rows:
        place = names.index(row["peer"])
        if row["dtype"] == "float32":
            ax.barh(place, best(row), color=colors[row["peer"]], height=0.7)
            ax.text(best(row), place, f" {digits(best(row))}", va="center", fontsize=8)
        else:
            ax.plot(best(row), place - 0.28, "k|", ms=9)
    ax.plot([], [], "k|", label="float64")
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    ax.margins(x=0.15)
    ax.set_xlabel("ns per seed-step")
    ax.set_title(f"{count} seeds, m = 20, float32", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def _curves(ax: Any, rows: list[Row], axis: str, colors: dict[str, str]) -> None:
    for name in dict.fromkeys(row["peer"] for row in rows):
        points = [(row[axis], best(row)) for row in rows if row["peer"] == name]
        ax.plot(*zip(*points, strict=True), "o-", ms=3.5, color=colors[name], label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    counts = sorted({row[axis] for row in rows})
    ax.set_xticks(counts[:: 1 + len(counts) // 6], labels=counts[:: 1 + len(counts) // 6])
    ax.minorticks_off()
    ax.set_xlabel("neurons m" if axis == "neurons" else "seeds")
    ax.set_ylabel("ns per seed-step")
    ax.set_title("256 seeds" if axis == "neurons" else "m = 20", fontsize=10)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
