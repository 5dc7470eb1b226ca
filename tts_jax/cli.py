"""The command line: `tts-jax reproduce` computes the paper's figures and writes what they show,
`tts-jax animate` sets the same runs in motion, `tts-jax study` measures how the dynamics tend to
each other, `tts-jax phase` draws phase diagrams, `tts-jax sweep` runs a dynamics over a grid of
settings and `tts-jax resume` goes on with a sweep.

Each command is a function in `APP`; its docstring is its help. Arguments are checked before
anything is computed, data are written before anything is drawn. Exit codes: 0 everything was
made, 1 something could not be computed, drawn or written, 2 a bad argument, 130 interrupted, 143
terminated.
"""

import csv
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
import xarray
from tqdm import tqdm

from tts_jax import _compat, _distributed, checks
from tts_jax._checkpoint import Stopped, replacing, terminated_like_interrupted
from tts_jax._sweep import RESULT, Grid, resume as resume_run, sweep as start_run
from tts_jax._trajectory import Status, write_netcdf
from tts_jax._version import __version__
from tts_jax.experiments import SYSTEMS, System, system_of


if TYPE_CHECKING:
    from tts_jax._trajectory import Trajectory
    from tts_jax.experiments._figures import FigureSpec
    from tts_jax.experiments.marion_berthier import Outcome


_FIGURES = {name: about for one in SYSTEMS.values() for name, about in one.figures.items()}
if TYPE_CHECKING:
    FigureName = str
else:
    FigureName = tyro.extras.literal_type_from_choices((*_FIGURES, *SYSTEMS))
AnimationName = Literal["two_timescale", "same_rate", "varpro"]
StudyName = Literal["convergence", "initialisation"]
PlaneName = Literal["epsilon-neurons", "epsilon-eta", "epsilon-noise", "step-epsilon"]
Scale = Literal["quick", "paper"]

APP = tyro.extras.SubcommandApp()
_DESCRIPTION = """Two-timescale learning problems: stochastic gradient descent, the gradient flow
at finite ε, and the limit ε → 0, on one time axis.

`tts-jax --version` prints the version; `tts-jax <command> --help` explains a command."""


_COMPLETE = "files named above are complete."


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
    except Stopped as stopped:
        print(f"tts-jax: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"\ntts-jax: interrupted; {_COMPLETE}", file=sys.stderr)
        return 130


@APP.command
def reproduce(
    figure: Annotated[
        tyro.conf.Positional[FigureName],
        tyro.conf.arg(
            metavar="NAME",
            help=" ".join(
                f"Of {one.paper}, "
                + "; ".join(f"{name}: {about}" for name, about in one.figures.items())
                + f"; {system}: all of these."
                for system, one in SYSTEMS.items()
            ),
        ),
    ] = "all",
    *,
    scale: Annotated[
        Scale,
        tyro.conf.arg(
            help=" ".join(
                f"{system}, quick: {one.quick}; paper: {one.published}."
                for system, one in SYSTEMS.items()
            )
        ),
    ] = "quick",
    seeds: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="Number of independent runs. Seed 0 of figures 3 to 5 starts from the published "
            "positions; the sketches draw no other.",
            help_behavior_hint="(default: "
            + ". ".join(f"{system}: {one.seeds}" for system, one in SYSTEMS.items())
            + ")",
        ),
    ] = None,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder to write to, created if missing.")
    ] = Path("results"),
) -> int:
    """Reproduce the figures of published two-timescale systems.

    Writes a PNG, a PDF and the netCDF data behind each figure, and prints a table of final
    losses and recovered jumps. `tts_jax.load` reads the data. Figures 3 and 4 share one run of
    SGD, and so do figure6 and figure_2d.
    """
    if seeds is not None and seeds < 1:
        raise UsageError(
            f"Argument `--seeds` must be an integer of at least 1, got {seeds}. Leave it out for "
            f"the default."
        )
    _check_folder(out)

    system = SYSTEMS[figure] if figure in SYSTEMS else system_of(figure)
    specs, groups = system.specs(), {}
    for name in specs if figure in SYSTEMS else [figure]:
        groups.setdefault(specs[name].experiment, []).append(name)
    with terminated_like_interrupted(f"terminated; {_COMPLETE}"):
        report = _reproduced(system, groups, scale, seeds, out)
    report.show()
    return report.code


def _reproduced(
    system: System, groups: dict[str, list[str]], scale: Scale, seeds: int | None, out: Path
) -> "_Report":
    """Compute, write and draw the figures, those that share an experiment together."""
    report = _Report()
    for experiment, names in groups.items():
        specs = {name: system.specs()[name] for name in names}
        home = next(one for one in system.homes() if experiment in one.SETTINGS)
        settings = home.settings_of(experiment, scale, seeds)
        methods = list(dict.fromkeys(m for spec in specs.values() for m in spec.methods))
        print(f"{', '.join(names)}: {settings.describe(methods)}")
        group = _Group(specs, out)
        try:
            compute = next(iter(specs.values())).compute
            compute(settings=settings, methods=methods, progress=True, on_result=group.keep)
        except Exception:
            report.failure(f"{', '.join(names)} could not be computed to the end")
        for name, data in group.data.items():
            group.draw(name, data, report)
        report.add(group)
    return report


@APP.command
def animate(
    experiment: Annotated[
        tyro.conf.Positional[AnimationName],
        tyro.conf.arg(
            metavar="[two_timescale|same_rate|varpro]",
            help="two_timescale: the run of figures 3 and 4, ε = 2e-5. same_rate: the run of "
            "figure 5, one learning rate for both layers, ε = 1. varpro: the run of "
            "varpro_density, features on the circle.",
        ),
    ] = "two_timescale",
    *,
    scale: Annotated[
        Scale,
        tyro.conf.arg(
            help="paper: the paper's step size 1e-5. quick: 1e-3 for two_timescale; same_rate is "
            "the same in both. For varpro as in reproduce."
        ),
    ] = "quick",
    seed: Annotated[
        int,
        tyro.conf.arg(
            metavar="I",
            help="Which of the figures' seeds to show; 0 starts from the published positions.",
        ),
    ] = 0,
    frames: Annotated[
        int,
        tyro.conf.arg(metavar="N", help="Number of frames, fewer where times are too far apart."),
    ] = 72,
    fps: Annotated[float, tyro.conf.arg(metavar="X", help="Frames per second, at most 50.")] = 12.0,
    dpi: Annotated[
        float, tyro.conf.arg(metavar="X", help="Dots per inch; the pictures are 9 by 4.7 inches.")
    ] = 100.0,
    fresh: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(
            help="Compute the run even where `--out` holds the figure's data of it. Theirs are "
            "recorded at even times, and show less of the beginning."
        ),
    ] = False,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder to write to, created if missing.")
    ] = Path("results"),
) -> int:
    """Animate SGD beside the gradient flow and the limit: networks and neurons; or, of varpro, the
    features and their density.

    Writes `DIR/animation_<experiment>.gif`, an MP4 beside it where ffmpeg is on the PATH, and the
    netCDF data `animation_<experiment>_<method>.nc` of what had to be computed. The time axis is
    linear at the beginning and logarithmic later on.
    """
    from tts_jax.experiments import animation

    try:
        animation.settings_of(experiment, scale, seed=seed, frames=frames)
        checks.positive("fps", fps, "Use for example 12.")
        checks.positive("dpi", dpi, "Use for example 100.")
        if fps > 50:
            raise checks.argument_error("fps", "be at most 50", fps, "GIFs know no more.")
    except ValueError as error:
        raise UsageError(str(error)) from error
    _check_folder(out)
    with terminated_like_interrupted(f"terminated; {_COMPLETE}"):
        return _animated(experiment, scale, seed, frames, fps, dpi, None if fresh else out, out)


def _animated(
    experiment: AnimationName,
    scale: Scale,
    seed: int,
    frames: int,
    fps: float,
    dpi: float,
    reuse: Path | None,
    out: Path,
) -> int:
    """Compute what is missing and write it, then draw, then write the GIF and the MP4."""
    from tts_jax import plot
    from tts_jax.experiments import animation

    report, files, stem = _Report(), [], out / f"animation_{experiment}"

    def keep(method: str, trajectory: "Trajectory") -> None:
        files.append(trajectory.save(Path(f"{stem}_{method}.nc")))
        print(f"  {method}: data in {files[-1]}")

    print(f"{experiment}: seed {seed}")
    try:
        data = animation.compute(
            experiment,
            scale,
            seed=seed,
            frames=frames,
            reuse=reuse,
            progress=True,
            on_result=keep,
        )
    except Exception:
        report.failure(f"{experiment} could not be computed to the end")
        return report.code
    computed = {path.stem.removeprefix(f"{stem.name}_") for path in files}
    if reused := [method for method in data if method not in computed]:
        print(f"  {', '.join(reused)}: data of {animation.FIGURES[experiment]} in {out}")
    try:
        movie = animation.draw(data, seed=seed, frames=frames)
        images = list(tqdm(movie.images(dpi), "  frames", movie.frames, leave=False))
    except Exception:
        report.failure(f"{experiment} could not be drawn; its data are in `{out}`")
        return report.code
    writers = {"gif": plot.save_gif, "mp4": plot.save_mp4}
    if plot.ffmpeg() is None:
        del writers["mp4"]
        print("  No MP4: there is no `ffmpeg` on the PATH.")
    for kind, write in writers.items():
        try:
            files.append(write(images, stem.with_suffix(f".{kind}"), fps=fps))
        except Exception:
            report.failure(f"the {kind.upper()} could not be written; its data are in `{out}`")
    print(f"\n{len(images)} frames, {len(images) / fps:.1f} s, ", end="")
    print("files: " + ", ".join(str(path) for path in files))
    return report.code


@APP.command
def study(
    subject: Annotated[
        tyro.conf.Positional[StudyName],
        tyro.conf.arg(
            metavar="[convergence|initialisation]",
            help="convergence: the flow against the limit as ε → 0, the limit against the sharp "
            "limit as η → 0, SGD against the flow as h → 0, and which failures are late hits. "
            "initialisation: the bounds of the paper's theorem on the number of neurons and on "
            "the time against exact probabilities and simulation.",
        ),
    ] = "convergence",
    *,
    scale: Annotated[
        Scale,
        tyro.conf.arg(
            help="quick: about two minutes on two cores. paper: more starts, draws, widths and "
            "step sizes."
        ),
    ] = "quick",
    seeds: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="Number of random starts; other numbers of runs change in proportion.",
            help_behavior_hint="(default: convergence 8, at scale paper 64; initialisation 2000 "
            "and 20000)",
        ),
    ] = None,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder to write to, created if missing.")
    ] = Path("results"),
) -> int:
    """Study the problem of Marion & Berthier (2023) beyond the paper.

    Writes the netCDF data, tables in CSV, a PNG and a PDF, and prints the tables. Of convergence:
    slopes with 95 % confidence intervals, and failures of the flow against what the limits predict.
    Of initialisation: probabilities with their intervals.
    """
    if seeds is not None and seeds < 1:
        raise UsageError(
            f"Argument `--seeds` must be an integer of at least 1, got {seeds}. Leave it out for "
            f"the default."
        )
    _check_folder(out)
    with terminated_like_interrupted(f"terminated; {_COMPLETE}"):
        return _studied(subject, scale, seeds, out)


def _studied(subject: StudyName, scale: Scale, seeds: int | None, out: Path) -> int:
    """Compute and write the parts of a study, then its tables, then its figure."""
    from tts_jax import plot
    from tts_jax.experiments import convergence, initialisation

    study = {"convergence": convergence, "initialisation": initialisation}[subject]
    settings = study.settings_of(scale, seeds)
    report, data, files = _Report(), {}, []
    print(f"{subject}: {settings.describe()}")
    for name, compute in study.PARTS.items():
        began = time.perf_counter()
        try:
            dataset = compute(settings, progress=True)
        except Exception:
            report.failure(f"{name} could not be computed")
            continue
        data[name] = dataset
        files.append(write_netcdf(dataset, out / f"{subject}_{name}.nc"))
        print(f"  {name}: {time.perf_counter() - began:.1f} s, data in {files[-1]}")
    if data:
        for name, table in study.tables(data).items():
            files.append(_write_csv(table, out / f"{subject}_{name}.csv"))
            print(f"\n{_table(table[0], table[1:])}")
        for line in study.remarks(data):
            print(line)
        try:
            files += plot.save(study.draw(data), out / subject)
        except Exception:
            report.failure(f"{subject} could not be drawn; its data are in `{out}`")
        print("\nFiles: " + ", ".join(str(path) for path in files))
    return report.code


def _write_csv(rows: Sequence[Sequence[str]], path: Path) -> Path:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


_CheckpointEvery = Annotated[
    float, tyro.conf.arg(metavar="SECONDS", help="Time between checkpoints.")
]


@APP.command
def phase(
    plane: Annotated[
        tyro.conf.Positional[PlaneName],
        tyro.conf.arg(
            metavar="[epsilon-neurons|epsilon-eta|epsilon-noise|step-epsilon]",
            help="The settings on the axes: the timescale separation ε against the number of "
            "neurons, their width η or the label noise; the step size against ε.",
        ),
    ] = "epsilon-neurons",
    *,
    scale: Annotated[
        Scale,
        tyro.conf.arg(
            help="quick: 6 × 6 cells of 64 seeds, step size 1e-3. paper: 12 × 12 cells of 256 "
            "seeds, step size 1e-4; minutes on two cores."
        ),
    ] = "quick",
    seeds: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="Number of random starts in each cell.",
            help_behavior_hint="(default: 64, at scale paper 256)",
        ),
    ] = None,
    tau_end: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="TAU",
            help="Slow time by which all jumps are to be recovered.",
            help_behavior_hint="(default: 0.035, the paper's)",
        ),
    ] = None,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder to write to, created if missing.")
    ] = Path("results"),
    checkpoint_every: _CheckpointEvery = 30.0,
) -> int:
    """Phase diagram: how often SGD and the flow recover all jumps, in a plane of two settings.

    Writes `DIR/phase_PLANE.nc`, tables in CSV, a PNG and a PDF, and prints where the share of
    recovered starts falls to one half, beside what the sharp limit predicts.

    The runs and their checkpoints are in `DIR/phase_PLANE/`. After Ctrl-C, SIGTERM or a crash the
    same command goes on from the last one, to the same bits.
    """
    _check_folder(out)
    from tts_jax.experiments import phase as experiment

    try:
        settings = experiment.settings_of(plane, scale, seeds, tau_end)
        settings.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{plane}: {settings.describe()}")
    again = "The same command goes on with the whole diagram."
    began = time.perf_counter(), time.process_time()
    name = f"phase_{plane}"
    try:
        with terminated_like_interrupted("terminated."):
            dataset = experiment.compute(
                settings, out / name, checkpoint_every=checkpoint_every, progress=True
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        print(f"tts-jax: error: `{out}`: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        raise Stopped(f"{stopped} {again}", stopped.signal) from None
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"  {seconds[0]:.1f} s, {seconds[1]:.1f} s of processor time\n")
    return _phase_written(dataset, out / name)


def _phase_written(dataset: xarray.Dataset, stem: Path) -> int:
    """Write a phase diagram's data, tables and figure, and print what it came to."""
    from tts_jax import plot
    from tts_jax.experiments import phase as experiment

    report = _Report()
    files = [write_netcdf(dataset, stem.with_name(f"{stem.name}.nc"))]
    tables = experiment.tables(dataset)
    files += [_write_csv(rows, Path(f"{stem}_{name}.csv")) for name, rows in tables.items()]
    print(_table(tables["boundaries"][0], tables["boundaries"][1:]) + "\n")
    print("\n".join(experiment.remarks(dataset)))
    try:
        files += plot.save(experiment.draw(dataset), stem)
    except Exception:
        report.failure(f"{stem.name} could not be drawn; its data are in `{files[0]}`")
    print("\nFiles: " + ", ".join(str(path) for path in files))
    return report.code


@dataclass(frozen=True)
class Job:
    """Several processes that share the work, on one machine or many.

    Attributes:
        distributed: share the units of work with the other processes of this job, which all run
            this command on a folder that all of them see. Slurm, Open MPI and Kubernetes jobs
            are found by themselves.
        coordinator: host and port of process 0, where the processes are started by hand.
        processes: their number, where they are started by hand.
        process_id: number of this process, from 0, where they are started by hand.
    """

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        """Join the other processes."""
        by_hand = (self.coordinator, self.processes, self.process_id)
        if not self.distributed:
            if by_hand != (None, None, None):
                raise UsageError(
                    "Arguments `--coordinator`, `--processes` and `--process-id` must come with "
                    "`--distributed`, got them alone. Add it, or leave them out."
                )
            return
        try:
            _distributed.initialize(*by_hand)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"Argument `--distributed` must find the other processes, got: {error} Start them "
                f"with `srun` or `mpirun`, or give each `--coordinator HOST:PORT --processes N "
                f"--process-id I`."
            ) from error


@APP.command
def sweep(
    grid: tyro.conf.OmitArgPrefixes[Grid],
    job: tyro.conf.OmitArgPrefixes[Job],
    *,
    out: Annotated[
        Path, tyro.conf.arg(metavar="DIR", help="Folder of the run, created if missing.")
    ],
    lanes: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="Seeds times cells that are computed together at most.",
            help_behavior_hint="(default: 4096 on a CPU, else 131072)",
        ),
    ] = None,
    checkpoint_every: _CheckpointEvery = 30.0,
) -> int:
    """Run the univariate problem over a grid of settings, by SGD, flow or limit.

    The grid is the product of the values of `--epsilon`, `--neurons`, `--eta`, `--step-size` and
    `--noise`, each one or more numbers. In every cell seed i draws the same numbers, so that runs
    by another `--dynamics` start alike. Writes `DIR/sweep.nc` and prints a row per cell.

    Ctrl-C and SIGTERM wait for a checkpoint; `tts-jax resume DIR` goes on from the last one, also
    after a crash, to the same bits.

    A process uses all cores that it may run on. To share the work among several, start one on
    each node, or bind each to cores of its own. Under Slurm, four processes of 64 cores:

    srun --ntasks=4 --cpus-per-task=64 --cpu-bind=cores tts-jax sweep --distributed --out DIR ...
    """
    try:
        grid.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    _check_folder(out)
    job.join()
    return _swept(out, lambda: start_run(grid, out, lanes=lanes, **_long_run(checkpoint_every)))


@APP.command
def resume(
    out: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR", help="Folder of the run.")
    ],
    job: tyro.conf.OmitArgPrefixes[Job],
    *,
    checkpoint_every: _CheckpointEvery = 30.0,
) -> int:
    """Go on with a sweep that was stopped or killed, from its last checkpoint.

    The result has the same bits as that of a run that never stopped. The number of devices and
    of processes may be another one.
    """
    job.join()
    return _swept(out, lambda: resume_run(out, **_long_run(checkpoint_every)))


def _long_run(checkpoint_every: float) -> dict[str, Any]:
    return {"checkpoint_every": checkpoint_every, "progress": True}


def _swept(out: Path, compute: Callable[[], xarray.Dataset]) -> int:
    """Compute a sweep and print what it came to."""
    try:
        dataset = compute()
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        print(f"tts-jax: error: `{out}`: {error}", file=sys.stderr)
        return 1
    if not _distributed.is_first():
        return 0
    print(_table(_CELL_HEADER, _cell_rows(dataset)))
    print("\nLosses at the last τ over the seeds that reached it: median, and the band that holds")
    print("80 % of them. A jump counts as recovered when a neuron is within η of it.")
    for status in map(Status, np.unique(dataset.status)):
        if status != Status.SUCCESS:
            print(f"{status.name}: {status.advice}")
    if not (out / RESULT).exists():
        return 1
    print(f"\nFile: {out / RESULT}")
    return 0


_CELL_HEADER = (
    *("ε", "neurons", "η", "h", "noise", "seeds", "failed"),
    *("loss", "80 % band", "jumps", "all"),
)


def _cell_rows(dataset: xarray.Dataset) -> list[tuple[str, ...]]:
    """A row for each cell of the grid."""
    axes = ("epsilon", "neurons", "eta", "step_size", "noise")
    cells = dataset.stack(cell=axes)
    rows = []
    for index, point in enumerate(cells.cell.values):
        cell = cells.isel(cell=index, tau=-1)
        good = cell.status.values == int(Status.SUCCESS)
        found = (cell.recovery.transpose("seed", "jump").values <= point[2])[good]
        row = [*(f"{value:g}" for value in point), f"{good.size}", f"{np.sum(~good)}"]
        if good.any():
            low, median, high = np.quantile(cell.loss.values[good], (0.1, 0.5, 0.9))
            row += [f"{median:.4g}", f"{low:.3g} to {high:.3g}"]
            row += [f"{found.sum(axis=1).mean():.2f} of {found.shape[1]}"]
            row += [f"{found.all(axis=1).mean():.0%}"]
        else:
            row += ["-"] * 4
        rows.append(tuple(row))
    return rows


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
        own: dict[tuple[str, ...], tuple[list[Any], Sequence[str]]] = {}
        for group in self.groups:
            for name, data in group.data.items():
                if (build := group.specs[name].table) is not None:
                    table = build(name, data, group.seconds[name])
                    own.setdefault(tuple(table.header), ([], table.notes))[0].extend(table.rows)
                else:
                    runs = {method: marion_berthier.outcome(run) for method, run in data.items()}
                    rows += _rows(name, runs, group.seconds[name])
                for method, run in data.items():
                    if not np.all(run.success):
                        notes += [f"{name}, {method}: {line}" for line in _failed(run)]
                files += group.files[name]
        for header, (lines, below) in own.items():
            if lines:
                print(f"\n{_table(header, lines)}\n\n" + "\n".join(below))
        if rows:
            print()
            print(_table(_HEADER, rows))
            print("\nLosses are medians over the seeds that reached τ. A jump counts as recovered")
            print("when SGD has a neuron within η of it: mean number per seed, share of seeds with")
            print("all.")
        if "figure3" in {row[0] for row in rows} and "figure4" in {row[0] for row in rows}:
            print("The seconds of figure4 do not count the SGD run that it shares with figure3.")
        for line in notes:
            print(line)
        if files:
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
        found, every = f"{run.recovered:.2f} of {run.jumps}", f"{run.all_recovered:.0%}"
        if np.isnan(run.recovered):
            found = every = "-"
        time_spent = "" if rows else f"{seconds:.1f}"
        start = (name, f"{run.epsilon:g}", f"{run.tau:g}", f"{run.seeds}", f"{run.failed}")
        rows.append((*start, _loss(run), *others, found, every, time_spent))
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
