"""Measure, compare with the baseline, report.

    python -m benchmarks.suite                       everything but whole commands, some minutes
    python -m benchmarks.suite --quick --gate        a smaller run; exit code 1 if it is worse
    python -m benchmarks.suite --only commands       the figures at the paper's scale
    python -m benchmarks.suite --replot              the report again, from the stored numbers
    python -m benchmarks.suite --update-baseline     measure, and commit the answer

Writes run.json, report.md and report.png into `--out`. The baseline is benchmarks/results.json,
with its report results.md and results.png beside it; `--update-baseline` puts the measured
workloads in place of the baseline's and leaves the others.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer, peers_for
from benchmarks.suite import machine, measure, metrics, report


HOME = Path(__file__).resolve().parents[1]
BASELINE = HOME / "results.json"
_DEFAULT = tuple(name for name in measure.WORKLOADS if name != "commands")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code is 1 if the gate found something worse, else 0."""
    given = _parse(arguments)
    baseline = _load(given.baseline)
    stored = given.out / "run.json"
    if given.replot:
        run = _load(stored)
        if run is None:
            print(f"There is no {stored}. Run without `--replot` first.", file=sys.stderr)
            return 2
    else:
        run = _measure(given)
        _write(stored, run)
    compared = None if baseline is None else metrics.compare(run, baseline)
    _report(run, compared, given.out, "report")
    if given.update_baseline:
        groups = {} if baseline is None else baseline["groups"]
        merged = {"format": metrics.FORMAT, "groups": {**groups, **run["groups"]}}
        _write(given.baseline, merged)
        _report(merged, None, given.baseline.parent, given.baseline.stem)
    print((given.out / "report.md").read_text(encoding="utf-8"))
    if not given.gate:
        return 0
    if compared is None:
        print(f"There is no baseline {given.baseline}: nothing to compare with.", file=sys.stderr)
        return 2
    return int(any(one.verdict == "worse" for one in compared))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer, shorter measurements")
    parser.add_argument(
        "--only", nargs="+", choices=measure.WORKLOADS, metavar="WORKLOAD", help="%(choices)s"
    )
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="these peers alone")
    parser.add_argument(
        "--backend",
        choices=("cpu", "gpu"),
        help="peers of this backend; by default that of JAX on this machine",
    )
    parser.add_argument("--gate", action="store_true", help="exit code 1 if worse than baseline")
    parser.add_argument("--update-baseline", action="store_true", help="make this the baseline")
    parser.add_argument("--replot", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), metavar="DIR")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    given = parser.parse_args(arguments)
    given.backend = given.backend or _backend()
    known = {peer.name: peer for peer in peers_for(given.backend)}
    for name in given.peers or ():
        if name not in known:
            parser.error(f"argument --peers: {name!r} is not one of {', '.join(known)}")
    given.peers = [known[name] for name in given.peers or known]
    return given


def _backend() -> str:
    """`jax.default_backend()`, asked in another process: this one stays off the GPU."""
    code = "import jax; print(jax.default_backend())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "gpu" if asked.stdout.strip() == "gpu" else "cpu"


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    names = list(given.only or _DEFAULT)
    if set(names) & set(metrics.TIMED) and "check" not in names:
        names = ["check", *names]  # equal work comes before time
    names.sort(key=list(measure.WORKLOADS).index)
    effort = measure.QUICK if given.quick else measure.FULL
    peers: list[Peer] = given.peers
    groups = {}
    for name in names:
        described = machine.describe(given.backend)
        print(f"{name} ...", file=sys.stderr, flush=True)
        with measure.pool(effort) as processes:
            rows = measure.WORKLOADS[name](processes, peers, given.quick)
            described["devices"] = {
                name: found for name, found in processes.devices.items() if found
            }
        groups[name] = {"machine": described, "quick": given.quick, "rows": rows}
    return {"format": metrics.FORMAT, "groups": groups}


def _load(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    if run.get("format") != metrics.FORMAT:
        raise SystemExit(f"{path} has format {run.get('format')}, not {metrics.FORMAT}.")
    return run


def _write(path: Path, run: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(run), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, dict):
        return {name: _rounded(leaf) for name, leaf in value.items()}
    if isinstance(value, list):
        return [_rounded(leaf) for leaf in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _report(
    run: dict[str, Any], compared: list[metrics.Comparison] | None, folder: Path, name: str
) -> None:
    picture = folder / f"{name}.png"
    drawn = report.plot(run, picture)
    text = report.markdown(run, compared, picture.name if drawn else None)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
