"""Measure, compare with the baseline, report.

    python -m benchmarks.suite                       SGD: all but whole commands, some minutes
    python -m benchmarks.suite flow                  the gradient flow and its limits, some minutes
    python -m benchmarks.suite --quick --gate        a smaller run; exit code 1 if it is worse
    python -m benchmarks.suite --only commands       the figures at the paper's scale
    python -m benchmarks.suite --only flow limit     two workloads of the flow
    python -m benchmarks.suite --replot              the report again, from the stored numbers
    python -m benchmarks.suite --update-baseline     measure, and commit the answer

Writes run.json after each workload, and report.md and report.png at the end, into `--out`
(flow_run.json and so on for the flow). The baseline is benchmarks/results.json, or
flow_results.json, with its report beside it; `--update-baseline` puts the measured workloads in
place of the baseline's and leaves the others.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer, flow_peers_for, peers_for
from benchmarks.suite import flow, flow_report, machine, measure, metrics, report


HOME = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: SGD, or the flow and its limits.

    Attributes:
        workloads: by name, in the order that they run in.
        usual: those that run unless others are asked for.
        prefix: of the files of a run and of the baseline.
        full: how much to measure.
        quick: the same for a smaller run.
        peers: the peers of a backend.
        markdown: the report of a run.
        plot: the picture of a run.
    """

    workloads: Mapping[str, measure.Workload]
    usual: tuple[str, ...]
    prefix: str
    full: measure.Effort
    quick: measure.Effort
    peers: Callable[[str], tuple[Peer, ...]]
    markdown: Callable[..., str]
    plot: Callable[..., bool]

    @property
    def baseline(self) -> Path:
        """The committed results."""
        return HOME / f"{self.prefix}results.json"


SUBJECTS = {
    "sgd": Subject(
        measure.WORKLOADS,
        tuple(name for name in measure.WORKLOADS if name != "commands"),
        "",
        measure.FULL,
        measure.QUICK,
        peers_for,
        report.markdown,
        report.plot,
    ),
    "flow": Subject(
        flow.WORKLOADS,
        tuple(flow.WORKLOADS),
        "flow_",
        flow.FULL,
        flow.QUICK,
        flow_peers_for,
        flow_report.markdown,
        flow_report.plot,
    ),
}
_WORKLOADS = {name: subject for subject, s in SUBJECTS.items() for name in s.workloads}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code is 1 if the gate found something worse, else 0."""
    given = _parse(arguments)
    baseline = _load(given.baseline)
    subject: Subject = given.subject
    stored = given.out / f"{subject.prefix}run.json"
    if given.replot:
        run = _load(stored)
        if run is None:
            print(f"There is no {stored}. Run without `--replot` first.", file=sys.stderr)
            return 2
    else:
        run = {"format": metrics.FORMAT, "groups": {}}
        for name, group in _measured(given):  # a workload may take many minutes: keep each at once
            run["groups"][name] = group
            _write(stored, run)
            if given.update_baseline:
                _write(given.baseline, _merged(baseline, run))
    compared = None if baseline is None else metrics.compare(run, baseline)
    _report(subject, run, compared, given.out, f"{subject.prefix}report")
    if given.update_baseline:
        merged = _merged(baseline, run)
        _write(given.baseline, merged)
        _report(subject, merged, None, given.baseline.parent, given.baseline.stem)
    print((given.out / f"{subject.prefix}report.md").read_text(encoding="utf-8"))
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
    parser.add_argument(
        "subject", nargs="?", choices=SUBJECTS, help="by default that of `--only`, or else sgd"
    )
    parser.add_argument("--quick", action="store_true", help="fewer, shorter measurements")
    parser.add_argument(
        "--only", nargs="+", choices=_WORKLOADS, metavar="WORKLOAD", help="%(choices)s"
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
    parser.add_argument("--baseline", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    asked = {given.subject} - {None} | {_WORKLOADS[name] for name in given.only or ()}
    if len(asked) > 1:
        parser.error("argument --only: workloads of SGD and of the flow run one after the other")
    given.subject = SUBJECTS[asked.pop() if asked else "sgd"]
    given.baseline = given.baseline or given.subject.baseline
    given.backend = given.backend or _backend()
    known = {peer.name: peer for peer in given.subject.peers(given.backend)}
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


def _merged(baseline: dict[str, Any] | None, run: dict[str, Any]) -> dict[str, Any]:
    """The baseline with the measured workloads in place of its own."""
    groups = {} if baseline is None else baseline["groups"]
    return {"format": metrics.FORMAT, "groups": {**groups, **run["groups"]}}


def _measured(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each workload's name and results, as soon as it has run."""
    subject: Subject = given.subject
    names = list(given.only or subject.usual)
    if set(names) & set(metrics.TIMED) and "check" not in names:
        names = ["check", *names]  # equal work comes before time
    names.sort(key=list(subject.workloads).index)
    effort = subject.quick if given.quick else subject.full
    peers: list[Peer] = given.peers
    for name in names:
        described = machine.describe(given.backend)
        print(f"{name} ...", file=sys.stderr, flush=True)
        with measure.pool(effort) as processes:
            rows = subject.workloads[name](processes, peers, given.quick)
            described["devices"] = {
                name: found for name, found in processes.devices.items() if found
            }
        yield name, {"machine": described, "quick": given.quick, "rows": rows}


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
    subject: Subject,
    run: dict[str, Any],
    compared: list[metrics.Comparison] | None,
    folder: Path,
    name: str,
) -> None:
    picture = folder / f"{name}.png"
    drawn = subject.plot(run, picture)
    text = subject.markdown(run, compared, picture.name if drawn else None)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
