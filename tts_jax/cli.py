"""The command line: `tts-jax reproduce` computes the paper's figures and writes what they show.

Each command is a function in `APP`; its docstring is its help. Arguments are checked before
anything is computed, data are written before anything is drawn. Exit codes: 0 everything was
made, 1 something could not be computed, drawn or written, 2 a bad argument, 130 interrupted.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
import xarray

from tts_jax import _compat
from tts_jax._trajectory import write_netcdf
from tts_jax._version import __version__


if TYPE_CHECKING:
    from tts_jax._trajectory import Trajectory
    from tts_jax.experiments.marion_berthier import FigureSpec, Outcome


FigureName = Literal["figure3", "figure4", "figure5", "figure7", "all"]
Scale = Literal["quick", "paper"]

APP = tyro.extras.SubcommandApp()
_DESCRIPTION = """Two-timescale learning problems: stochastic gradient descent, the gradient flow
at finite ε, and the limit ε → 0, on one time axis.

`tts-jax --version` prints the version; `tts-jax <command> --help` explains a command."""


class UsageError(Exception):
    """A bad argument; the message names it, its value and the remedy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments`, by default those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: after `--help` (code 0) and for arguments that do not parse (code 2).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--version"], ["-V"]):
        print(f"tts-jax {__version__}")
        return 0
    _compat.configure_cpu()
    try:
        return APP.cli(prog="tts-jax", description=_DESCRIPTION, args=arguments or ["--help"])
    except UsageError as error:
        print(f"tts-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntts-jax: interrupted; files named above are complete.", file=sys.stderr)
        return 130


@APP.command
def reproduce(
    figure: Annotated[
        tyro.conf.Positional[FigureName],
        tyro.conf.arg(
            metavar="[figure3|figure4|figure5|figure7|all]",
            help="figure3: networks in the two-timescale regime, ε = 2e-5. figure4: the same run "
            "against the gradient flow and the limits. figure5: one learning rate for both "
            "layers, ε = 1. figure7: box plot of the final loss against ε. all: these four.",
        ),
    ] = "all",
    *,
    scale: Annotated[
        Scale,
        tyro.conf.arg(
            help="paper: the paper's step size 1e-5 throughout, which is 1.75e8 steps for figures "
            "3 and 4. quick: 1e-3 for these two, the published quick configuration; figures 5 "
            "and 7 are the same in both."
        ),
    ] = "quick",
    seeds: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="Number of independent runs. Seed 0 of figures 3 to 5 starts from the published "
            "positions.",
            help_behavior_hint="(default: 32, for figure7 64)",
        ),
    ] = None,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder to write to, created if missing.")
    ] = Path("results"),
) -> int:
    """Reproduce figures of Marion & Berthier (2023, arXiv 2304.09576).

    Writes a PNG, a PDF and the netCDF data behind each figure, and prints a table of final
    losses and recovered jumps. `tts_jax.load` reads the data. Figures 3 and 4 share one run of
    SGD.
    """
    if seeds is not None and seeds < 1:
        raise UsageError(
            f"Argument `--seeds` must be an integer of at least 1, got {seeds}. Leave it out for "
            f"the default."
        )
    _check_folder(out)

    from tts_jax.experiments import marion_berthier

    chosen = list(marion_berthier.FIGURES) if figure == "all" else [figure]
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(marion_berthier.FIGURES[name].experiment, []).append(name)
    report = _Report()
    for experiment, names in groups.items():
        specs = {name: marion_berthier.FIGURES[name] for name in names}
        settings = marion_berthier.settings_of(experiment, scale, seeds)
        print(f"{', '.join(names)}: {settings.seeds} seeds, {settings.steps:.4g} SGD steps each")
        group = _Group(specs, out)
        try:
            methods = list(dict.fromkeys(m for spec in specs.values() for m in spec.methods))
            compute = next(iter(specs.values())).compute
            compute(settings=settings, methods=methods, progress=True, on_result=group.keep)
        except Exception:
            report.failure(f"{', '.join(names)} could not be computed to the end")
        for name, data in group.data.items():
            group.draw(name, data, report)
        report.add(group)
    report.show()
    return report.code


def _check_folder(out: Path) -> None:
    """Create the folder and prove that netCDF can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".probe") as probe:
            write_netcdf(xarray.Dataset({"probe": 0.0}), Path(probe) / "probe.nc")
    except OSError as error:
        raise UsageError(
            f"Argument `--out` must be a folder that can be created and written, got `{out}` "
            f"({error.strerror or error}). Choose another folder, or change its permissions."
        ) from error


class _Group:
    """Figures that share data: what was computed and written for each of them."""

    def __init__(self, specs: "dict[str, FigureSpec]", out: Path) -> None:
        self.specs = specs
        self.out = out
        self.data: dict[str, dict[str, Trajectory]] = {name: {} for name in specs}
        self.seconds = dict.fromkeys(specs, 0.0)
        self.files: dict[str, list[Path]] = {name: [] for name in specs}
        self._clock = time.perf_counter()

    def keep(self, method: str, trajectory: "Trajectory") -> None:
        """Write a trajectory for each figure that shows it; its time counts for the first."""
        takers = [
            name
            for name, spec in self.specs.items()
            if method in spec.methods or method.partition("_epsilon_")[0] in spec.methods
        ]
        for name in takers:
            self.data[name][method] = trajectory
            self.files[name].append(trajectory.save(self.out / f"{name}_{method}.nc"))
        now = time.perf_counter()
        self.seconds[takers[0]] += now - self._clock
        print(f"  {method}: {now - self._clock:.1f} s, data in {_listed(self.out, takers, method)}")
        self._clock = now

    def draw(self, name: str, data: "dict[str, Trajectory]", report: "_Report") -> None:
        """Draw one figure to files; a failure is reported and leaves the data alone."""
        from tts_jax import plot

        if not data:
            return
        began = time.perf_counter()
        try:
            self.files[name] += plot.save(self.specs[name].draw(data), self.out / name)
        except Exception:
            report.failure(f"{name} could not be drawn; its data are in `{self.out}`")
        self.seconds[name] += time.perf_counter() - began


def _listed(out: Path, names: Sequence[str], method: str) -> str:
    return ", ".join(str(out / f"{name}_{method}.nc") for name in names)


@dataclass
class _Report:
    """What `reproduce` says at the end."""

    groups: list[_Group] = field(default_factory=list)
    code: int = 0

    def add(self, group: _Group) -> None:
        self.groups.append(group)

    def failure(self, message: str) -> None:
        """Report the exception being handled, and remember it in the exit code."""
        traceback.print_exc()
        print(f"tts-jax: error: {message}.", file=sys.stderr)
        self.code = 1

    def show(self) -> None:
        """Print one row per figure and ε, then the failed seeds and the files."""
        from tts_jax.experiments import marion_berthier

        rows, notes, files = [], [], []
        for group in self.groups:
            for name, data in group.data.items():
                runs = {method: marion_berthier.outcome(run) for method, run in data.items()}
                rows += _rows(name, runs, group.seconds[name])
                for method, run in data.items():
                    if runs[method].failed:
                        notes += [f"{name}, {method}: {line}" for line in _failed(run)]
                files += group.files[name]
        if not rows:
            return
        print()
        print(_table(_HEADER, rows))
        print("\nLosses are medians over the seeds that reached τ. A jump counts as recovered when")
        print("SGD has a neuron within η of it: mean number per seed, share of seeds with all.")
        if "figure3" in {row[0] for row in rows} and "figure4" in {row[0] for row in rows}:
            print("The seconds of figure4 do not count the SGD run that it shares with figure3.")
        for line in notes:
            print(line)
        print("\nFiles: " + ", ".join(str(path) for path in files))


_HEADER = (
    *("figure", "ε", "τ", "seeds", "failed"),
    *("loss SGD", "flow", "limit", "sharp limit", "jumps", "all", "seconds"),
)


def _rows(name: str, runs: "dict[str, Outcome]", seconds: float) -> list[tuple[str, ...]]:
    """A row for each SGD run of a figure, with the losses of the other methods beside it."""
    rows = []
    for method, run in runs.items():
        if not method.startswith("sgd"):
            continue
        others = [_loss(runs[other]) if other in runs else "-" for other in _OTHERS]
        found = f"{run.recovered:.2f} of {run.jumps}"
        time_spent = "" if rows else f"{seconds:.1f}"
        start = (name, f"{run.epsilon:g}", f"{run.tau:g}", f"{run.seeds}", f"{run.failed}")
        rows.append((*start, _loss(run), *others, found, f"{run.all_recovered:.0%}", time_spent))
    return rows


_OTHERS = ("flow", "limit", "sharp_limit")


def _loss(run: "Outcome") -> str:
    """The median loss, and of how many seeds where some failed."""
    ended = run.seeds - run.failed
    return f"{run.loss:.4g}" + ("" if run.failed == 0 else f" ({ended} of {run.seeds})")


def _failed(trajectory: "Trajectory") -> list[str]:
    lines = trajectory.summary().splitlines()
    return [line for line in lines if ": SUCCESS." not in line]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first one left- and the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([render(header), rule, *(render(row) for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
