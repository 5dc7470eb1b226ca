"""What a GPU does, beside what else one would write for it: some two minutes on the device.

    python -m benchmarks.gpu                             everything
    python -m benchmarks.gpu --out results/gpu           the same, with gpu.json and gpu.md
    python -m benchmarks.gpu --backend cpu --peers gpu-loop --seeds 1024

Peers, processes and rounds are those of `benchmarks.suite`: first equal work, then time. Those of a
cell are built side by side, and then timed in turns. A cell that would begin after `--seconds` is
left out.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import CPU_PEERS, GPU_PEERS, REFERENCE
from benchmarks.setting import JUMPS, VALUES, FlowSetting, Setting
from benchmarks.suite import machine, measure, report
from benchmarks.suite.measure import Row
from benchmarks.suite.metrics import cells


SEEDS = (16384, 50688, 262144, 1024)
EFFORT = measure.Effort(rounds=3, seconds=0.3, timeout=90.0, calls=1, together=True)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        measure: yields the rows of one cell after the other, given the command line's options.
        markdown: the rows in words.
    """

    measure: Callable[[argparse.Namespace], Iterator[list[Row]]]
    markdown: Callable[[list[Row]], str]


# --- SGD ----------------------------------------------------------------------------------------


def measure_sgd(given: argparse.Namespace) -> Iterator[list[Row]]:
    """Equal work in float32, then seed-steps of the paper's problem, m = 20."""
    peers = [peer for peer in GPU_PEERS if given.peers is None or peer.name in given.peers]
    peers = [dataclasses.replace(peer, backend=given.backend) for peer in peers]
    reference = next(peer for peer in CPU_PEERS if peer.name == REFERENCE)
    with measure.pool(EFFORT) as processes:
        _note("sgd: equal work")
        yield measure.check(processes, [reference, *peers], True, dtypes=("float32",))
        processes.drop(reference)
        for dtype in given.dtypes:
            for seeds in given.seeds:
                if time.monotonic() > given.deadline:
                    _note(f"sgd: no time left for {seeds} seeds in {dtype}")
                    continue
                _note(f"sgd: {seeds} seeds in {dtype}")
                yield measure.time_cell(processes, peers, Setting(seeds, dtype))


def sgd_markdown(rows: list[Row]) -> str:
    """Picoseconds per seed-step, and multiples of the first peer's time."""
    labels = {peer.name: peer.label for peer in GPU_PEERS}
    parts = [
        "## SGD",
        "m = 20, picoseconds per seed-step: the median of the rounds, and the median ratio to the "
        "first line within a round.",
    ]
    timed = [row for row in rows if "seeds" in row]
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        entries: dict[str, dict[int, str]] = {}
        for (seeds, _, _), cell in cells(row for row in timed if row["dtype"] == dtype):
            first = next((row["ns"] for row in cell if "ns" in row), None)
            for row in cell:
                if "ns" in row:
                    ratio = np.median(np.divide(row["ns"], first))
                    text = f"{report.digits(1e3 * np.median(row['ns']))} ({report.digits(ratio)}×)"
                    entries.setdefault(row["peer"], {})[seeds] = text
        columns = sorted({row["seeds"] for row in timed})
        lines = [
            [labels[peer], *(found.get(count, "–") for count in columns)]
            for peer, found in entries.items()
        ]
        header = [dtype, *(f"{count} seeds" for count in columns)]
        parts.append(report.table(header, lines))
    compiled: dict[str, float] = {}
    for row in timed:
        seconds = row.get("compile_seconds", 0.0)
        compiled[row["peer"]] = max(seconds, compiled.get(row["peer"], 0.0))
    told = (f"{peer} {seconds:.1f}" for peer, seconds in compiled.items())
    parts.append(f"Seconds of compilation, side by side and at most: {', '.join(told)}.")
    other = [f"{row['peer']}: {row['reason']}" for row in rows if row.get("reason")]
    parts.append("Equal work, float32: " + ("; ".join(other) or "all comparable") + ".")
    failed = dict.fromkeys(f"{row['peer']}: {row['skipped']}" for row in rows if row["skipped"])
    parts += [f"Left out: {'; '.join(failed)}."] if failed else []
    return "\n\n".join(parts)


# --- flow ---------------------------------------------------------------------------------------

ENGINES = ("cuda", "simd")  # the program on the GPU, and on the CPU beside it


def flow_cells(quick: bool) -> list[tuple[str, FlowSetting]]:
    """The method and the batch of starts of every cell."""
    cells = [("flow", FlowSetting(starts, 1e-6)) for starts in (1024, 16384, 65536, 262144)]
    cells.insert(3, ("flow", FlowSetting(65536, 1e-6, records=1)))
    cells += [("flow", FlowSetting(65536, 1e-8)), ("limit", FlowSetting(65536, 1e-6))]
    cells.append(("flow", FlowSetting(8192, 1e-6, neurons=100, records=1)))
    if quick:
        return [(name, dataclasses.replace(cell, seeds=cell.seeds // 256)) for name, cell in cells]
    return cells


def measure_flow(given: argparse.Namespace) -> Iterator[list[Row]]:
    """Seconds of `flow` and `limit` from call to answer; and whether both have the same bits."""
    import jax

    import tts_jax as tts

    engines = [name for name in ENGINES if given.backend == "gpu" or name != "cuda"]
    places = {"cuda": jax.local_devices()[0], "simd": jax.local_devices(backend="cpu")[0]}
    target = tts.PiecewiseConstant(JUMPS, VALUES)
    for name, cell in flow_cells(given.backend == "cpu"):
        if time.monotonic() > given.deadline:
            _note(f"flow: no time left for {cell}")
            continue
        _note(f"flow: {cell.seeds} starts, {cell.neurons} neurons, {cell.records} times")
        problem = tts.Univariate(target, neurons=cell.neurons, eta=cell.eta)
        state = problem.state(slow=cell.starts())
        tau = np.linspace(0.0, cell.end, cell.records) if cell.records > 1 else [cell.end]
        options: dict[str, Any] = {"tau": tau, "rtol": cell.tolerance, "atol": cell.tolerance}
        options |= {"epsilon": cell.epsilon} if name == "flow" else {}
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        answers = {}
        for turn in range(3):
            if turn > 1 and sum(seconds[engines[0]]) > 2.5:
                break
            for engine in engines:
                start = time.perf_counter()
                # with JAX's arrays, the answer stays where it is computed
                with jax.enable_x64(True), jax.default_device(places[engine]):
                    answer = getattr(tts, name)(problem, state, engine=engine, **options)
                    jax.block_until_ready(answer)
                seconds[engine].append(time.perf_counter() - start)
                answers[engine] = answer
        one = answers[engines[0]]
        row = {
            "method": name,
            "steps": float(np.mean(np.asarray(one.stats["steps"]))),
            "failed": int(np.sum(~np.asarray(one.success))),
            "same": all(
                np.array_equal(np.asarray(one.slow), np.asarray(answer.slow), equal_nan=True)
                for answer in answers.values()
            ),
        }
        columns = ("seeds", "tolerance", "neurons", "records")
        row |= {column: getattr(cell, column) for column in columns}
        yield [
            {**row, "peer": engine, "first_call": first, "seconds": times}  # the first compiles
            for engine, (first, *times) in seconds.items()
        ]


def flow_markdown(rows: list[Row]) -> str:
    """Solves per second."""
    header = ["", "starts", "neurons", "times", "tolerance", "steps", "failed", "same bits"]
    header += [f'solves per second, `"{name}"`' for name in dict.fromkeys(r["peer"] for r in rows)]
    merged: dict[tuple[Any, ...], list[str]] = {}
    columns = ("seeds", "neurons", "records", "tolerance")
    for row in rows:
        cell = (row["method"], *(row[column] for column in columns))
        told = [row["method"], *(f"{row[column]:g}" for column in columns)]
        told += [f"{row['steps']:.0f}", str(row["failed"]), "yes" if row["same"] else "no"]
        line = merged.setdefault(cell, told)
        line.append(f"{row['seeds'] / np.median(row['seconds']):,.0f}")
    text = (
        "`flow` (ε = 2e-5, τ to 0.035) and `limit` from call to answer: "
        'the same program in the threads of the GPU (`"cuda"`) and on all cores of the CPU beside '
        'it (`"simd"`), with the answer in the memory of either. A tolerance of 1e-6 has a median '
        "error of 1e-6 ([flow_results.md](flow_results.md))."
    )
    return "\n\n".join(["## Flow and limit", text, report.table(header, merged.values())])


SECTIONS = {
    "sgd": Section(measure_sgd, sgd_markdown),
    "flow": Section(measure_flow, flow_markdown),
}


# --- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections and report."""
    given = _parse(arguments)
    run: dict[str, Any] = {"machine": machine.describe(given.backend), "sections": {}}
    run["machine"]["devices"] = machine.devices()
    for name in given.only:
        rows = run["sections"][name] = []
        for more in SECTIONS[name].measure(given):
            rows += more
            if given.out is not None:  # each cell at once, whatever becomes of the next
                _write(run, given.out)
    print(markdown(run))
    return 0


def _write(run: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(run), encoding="utf-8")


def markdown(run: dict[str, Any]) -> str:
    """The report of a run."""
    about = run["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items() if found)
    parts = [
        "# On a GPU",
        f"{', '.join(about['devices'])}; {about['processor']}, {about['cores']} cores; Python "
        f"{about['python']}, {versions}; {about['date']}.",
        *(SECTIONS[name].markdown(rows) for name, rows in run["sections"].items() if rows),
    ]
    return "\n\n".join(parts) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in GPU_PEERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "float64"), default=("float32", "float64")
    )
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no cell after these")
    parser.add_argument("--out", type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    given.deadline = time.monotonic() + given.seconds
    return given


def _note(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
