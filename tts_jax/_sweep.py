"""The univariate problem over a grid of settings, by SGD, flow or limit, in runs that survive.

A cell is one point of the grid: ε, the number of neurons m, the width η, the step size h and the
label noise. The work is cut into units, a list of cells × a block of seeds. The cells of a unit of
SGD have the same number of neurons and the same step numbers; it runs in chunks of a few seconds,
and between chunks it can be saved, stopped and resumed. A unit of the flow or of the limit is one
cell, solved in one call. The folder of a run holds

    run.json                        the grid and its units
    unit-00000.npz                  the result of a finished unit, never written again
    unit-00001.checkpoint-0.npz     the state of a unit under way, and the state before it
    sweep.nc                        everything, at the end

The random keys of seed i depend on `Grid.key` and i only: in every cell seed i draws the same
uniform numbers for its start and its samples, so that cells differ by their settings alone, and
SGD, flow and limit start alike. They are those of `sgd(problem, key=jax.random.key(grid.key),
seeds=grid.seeds, ...)`, whose numbers are the same to the last bit. Neither units, chunks, threads,
devices, processes nor stops change a bit; engines differ by rounding, so that a run keeps to the
ones it began with.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import jax
import numpy as np

from tts_jax import _distributed, checks
from tts_jax._checkpoint import (
    Arrays,
    DamagedFileError,
    Stop,
    Stopped,
    Store,
    locked,
    read_arrays,
    say,
    stop_on_signals,
    write_arrays,
    write_text,
)
from tts_jax._flow import flow
from tts_jax._integrate import ENGINES as FLOW_ENGINES, EngineName, choose_engine
from tts_jax._lanes import ENGINES, Cell as LaneCell, LaneRun
from tts_jax._limit import limit
from tts_jax._problem import State
from tts_jax._random import Words, key_words, seed_keys
from tts_jax._sgd import Pace, batched, finite_states, population_loss, recorded_steps, wide
from tts_jax._trajectory import Status, Trajectory, write_netcdf
from tts_jax._version import __version__
from tts_jax.problems.univariate import PiecewiseConstant, Univariate


if TYPE_CHECKING:
    import xarray


T = TypeVar("T")

FORMAT = 2  # of the files of a run; raised when a change makes older runs unreadable
RESULT = "sweep.nc"

_RUN = "run.json"
_CHUNK_SECONDS = 2.0  # aimed duration of a chunk: checkpoints, Ctrl-C and progress wait for it
_LINE_SECONDS = 60.0  # between lines of progress where there is no terminal
_POLL_SECONDS = 0.2  # between looks at what the other processes have finished
_AXES = ("epsilon", "neurons", "eta", "step_size", "noise")
_ENGINES = {"sgd": ENGINES} | dict.fromkeys(("flow", "limit"), FLOW_ENGINES)
# what a dynamics does not depend on
_UNUSED = {"sgd": (), "flow": ("step_size", "noise"), "limit": ("epsilon", "step_size", "noise")}


# --- what is computed -----------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep; by default the paper's problem.

    Attributes:
        epsilon: ratios ε of the slow to the fast step size.
        neurons: numbers m of neurons.
        eta: widths η of a neuron's step, in units of x.
        step_size: step sizes h of the fast variable.
        noise: half-widths of the uniform label noise.
        dynamics: what moves the neurons. The flow takes a single step size and noise, which play
            no part, the limit also a single ε.
        seeds: number of independent runs in each cell of the grid.
        tau_end: last slow time.
        records: number of recorded times, evenly spaced from 0 to `tau_end`.
        gradient: estimator of SGD's sample gradient; `box` is that of the published code.
        dtype: number format of SGD's steps.
        engine: what takes the steps, as in `sgd`, `flow` and `limit`: by default the fastest that
            is available.
        key: integer from which all random keys are made.
        jumps: places of the target's jumps.
        values: levels of the target, one more than the jumps.
    """

    epsilon: tuple[float, ...] = (2e-5,)
    neurons: tuple[int, ...] = (20,)
    eta: tuple[float, ...] = (4e-3,)
    step_size: tuple[float, ...] = (1e-3,)
    noise: tuple[float, ...] = (1.0,)
    dynamics: Literal["sgd", "flow", "limit"] = "sgd"
    seeds: int = 32
    tau_end: float = 0.035
    records: int = 51
    gradient: Literal["exact", "box"] = "exact"
    dtype: Literal["float32", "float64"] = "float32"
    engine: Literal["auto", "cuda", "simd", "kernel", "unrolled", "loop", "diffrax"] = "auto"
    key: int = 0
    jumps: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8)
    values: tuple[float, ...] = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)

    def __post_init__(self) -> None:
        """Take single numbers and lists for tuples."""
        for name in (*_AXES, "jumps", "values"):
            given = np.atleast_1d(np.asarray(getattr(self, name))).tolist()
            exact = given if name == "neurons" else [float(value) for value in given]
            object.__setattr__(self, name, tuple(exact))

    def check(self) -> None:
        """Refuse bad settings.

        Raises:
            ValueError: the message names the setting, its value and the remedy.
        """
        for name in _AXES:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise checks.argument_error(
                    name, "hold at least one value, each once", values, "Drop repeated values."
                )
        checks.positive("epsilon", self.epsilon, "Choose positive, finite numbers.")
        checks.positive("step_size", self.step_size, "Choose positive, finite numbers.")
        checks.positive("tau_end", self.tau_end, "Choose a positive slow time.", single=True)
        checks.positive_integer("seeds", self.seeds, "It is the number of runs in each cell.")
        checks.positive_integer("records", self.records, "It is the number of recorded times.")
        checks.one_of("dynamics", self.dynamics, _ENGINES)
        for name in _UNUSED[self.dynamics]:
            if len(getattr(self, name)) > 1:
                remedy = f"The {self.dynamics} does not depend on it."
                raise checks.argument_error(name, "be one number", getattr(self, name), remedy)
        checks.one_of("gradient", self.gradient, Univariate.gradients)
        checks.one_of("dtype", self.dtype, ("float32", "float64"))
        checks.one_of("engine", self.engine, _ENGINES[self.dynamics])
        for cell in self.cells():
            self.problem(cell)
            if self.dynamics == "sgd":
                self.steps(cell)

    def cells(self) -> "list[Cell]":
        """The points of the grid, the last axis fastest."""
        return [Cell(*point) for point in itertools.product(*(getattr(self, a) for a in _AXES))]

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(len(getattr(self, axis)) for axis in _AXES)

    def problem(self, cell: "Cell") -> Univariate:
        """The learning problem of a cell."""
        target = PiecewiseConstant(jumps=self.jumps, values=self.values)
        return Univariate(target, neurons=cell.neurons, eta=cell.eta, noise=cell.noise)

    def starts(self, neurons: int) -> State:
        """The starts of all seeds, `[seeds, ...]`, in every cell of so many neurons."""
        return _seeds(self, neurons)[1]

    def tau(self) -> np.ndarray:
        """The slow times to record, `[records]`; SGD moves them to a cell's nearest steps."""
        if self.records == 1:
            return np.asarray([float(self.tau_end)])
        return np.linspace(0.0, self.tau_end, self.records)

    def steps(self, cell: "Cell") -> list[int]:
        """The step numbers that a cell of SGD records, `[records]`."""
        return recorded_steps(self.tau(), cell.epsilon * cell.step_size)

    def rounds(self, cell: "Cell") -> int:
        """What a cell costs a seed: its steps of SGD, or a single solve."""
        return self.steps(cell)[-1] if self.dynamics == "sgd" else 1


class Cell(NamedTuple):
    """One point of a grid."""

    epsilon: float
    neurons: int
    eta: float
    step_size: float
    noise: float


class Unit(NamedTuple):
    """Some cells of a grid × the seeds `first` to `last − 1`, computed together."""

    cells: tuple[int, ...]
    first: int
    last: int

    @property
    def lanes(self) -> int:
        """The number of runs, cell by cell and in each cell seed by seed."""
        return len(self.cells) * (self.last - self.first)


def plan(grid: Grid, most: int, shares: int = 1) -> list[Unit]:
    """Cut a grid into units, the longest work first.

    A unit holds at most `most` lanes and at most the fair share of one of `shares` processes.
    """
    alike: dict[Any, list[int]] = {}
    costs: dict[Any, int] = {}
    for index, cell in enumerate(grid.cells()):
        group = (cell.neurons, *grid.steps(cell)) if grid.dynamics == "sgd" else cell
        alike.setdefault(group, []).append(index)
        costs[group] = cell.neurons * grid.rounds(cell)
    total = sum(costs[group] * len(cells) * grid.seeds for group, cells in alike.items())
    sized = []
    for group, cells in alike.items():
        limit = max(1, min(most, -(-total // (shares * max(costs[group], 1)))))
        together = min(max(1, limit // grid.seeds), len(cells))
        for some in _parts(len(cells), -(-len(cells) // together)):
            for block in _parts(grid.seeds, -(-grid.seeds // limit)):
                unit = Unit(tuple(cells[some]), block.start, block.stop)
                sized.append((costs[group] * unit.lanes, unit))
    return [unit for _, unit in sorted(sized, key=lambda pair: -pair[0])]


def _parts(count: int, parts: int) -> list[slice]:
    """`range(count)` in nearly equal slices."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


# --- the calls ------------------------------------------------------------------------------


def sweep(
    grid: Grid,
    out: str | os.PathLike[str],
    *,
    lanes: int | None = None,
    checkpoint_every: float = 30.0,
    progress: bool | None = None,
) -> "xarray.Dataset":
    """Run the univariate problem over a grid of settings, by SGD, flow or limit.

    Long runs can be stopped, or killed, and resumed: `resume(out)` goes on from the last
    checkpoint and ends with the same bits. While the call runs, Ctrl-C and SIGTERM wait for the
    running chunk of about two seconds and write a checkpoint. A full disk stops nothing: what
    cannot be written stays in memory and is tried again.

    Under several processes (`jax.distributed`) they share the units, on a folder that all of
    them see, and each gets the whole result.

    Arguments:
        grid: the settings; they are checked before anything is written.
        out: folder of the run, created if missing.
        lanes: seeds × cells that are computed together at most; by default 4096 on a CPU and
            131072 on other devices.
        checkpoint_every: seconds between checkpoints.
        progress: show progress and the remaining time of the whole grid.

    Returns:
        A dataset with axes `epsilon, neurons, eta, step_size, noise, seed` and variables
        `loss [..., tau]`, `recovery [..., tau, jump]` (distance from each jump to its nearest
        neuron; at most η when recovered), `status [...]`, the final state `fast [..., weight]`
        and `slow [..., neuron]`, and `tau_recorded [epsilon, step_size, tau]`, the multiples of
        εh that SGD moved `tau` to. Values of a failed seed are NaN, as are those of neurons that
        a cell does not have. It is also written to `sweep.nc` in `out`.

    Raises:
        ValueError: a bad argument, or `out` already holds a run.
        OSError: `out` cannot be written.
        Stopped: a `KeyboardInterrupt`, after SIGINT or SIGTERM; the run can be resumed.
    """
    grid.check()
    _check_seconds(checkpoint_every)
    folder = Path(out)
    if (folder / _RUN).exists():
        raise ValueError(
            f"Argument `out` must be a folder without a run, got `{folder}`, which holds one. "
            f"Continue that one with `tts-jax resume {folder}`, or choose another folder."
        )
    if lanes is None:
        lanes = 4096 if jax.local_devices()[0].platform == "cpu" else 131072
    lanes = checks.positive_integer("lanes", lanes, "It is the size of a unit of work.")
    units = plan(grid, lanes, jax.process_count())
    _distributed.barrier("the folder was looked at")
    folder.mkdir(parents=True, exist_ok=True)
    if _distributed.is_first():
        write_text(folder / _RUN, json.dumps(_description(grid, units), indent=1) + "\n")
    return _run(folder, grid, units, checkpoint_every, progress)


def resume(
    out: str | os.PathLike[str],
    *,
    checkpoint_every: float = 30.0,
    progress: bool | None = None,
) -> "xarray.Dataset":
    """Continue a sweep from its last checkpoints, to the bits of a run that never stopped.

    The number of devices and of processes may be another one. Arguments and result are those of
    `sweep`.

    Raises:
        ValueError: `out` holds no run, or one that this version cannot continue.
        OSError: `out` cannot be written.
        Stopped: a `KeyboardInterrupt`, after SIGINT or SIGTERM; the run can be resumed.
    """
    _check_seconds(checkpoint_every)
    folder = Path(out)
    grid, units = _read_description(folder)
    return _run(folder, grid, units, checkpoint_every, progress)


def sweep_on(
    grid: Grid,
    out: str | os.PathLike[str],
    *,
    checkpoint_every: float = 30.0,
    progress: bool | None = None,
) -> "xarray.Dataset":
    """`sweep`, or `resume` where `out` holds a run of the same grid.

    Raises:
        ValueError: as they do; or `out` holds a run of another grid.
        OSError: `out` cannot be written.
        Stopped: as they do.
    """
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "progress": progress}
    folder = Path(out)
    if not (folder / _RUN).exists():
        return sweep(grid, folder, **options)
    found, _ = _read_description(folder)
    for field in dataclasses.fields(Grid):
        here, there = getattr(grid, field.name), getattr(found, field.name)
        if here != there:
            raise ValueError(
                f"Argument `out` must be a folder without a run or with one of the same settings, "
                f"got `{folder}`, whose `{field.name}` is {there}, not {here}. Choose another "
                f"folder, or the settings of that run."
            )
    return resume(folder, **options)


def _check_seconds(checkpoint_every: float) -> None:
    remedy = "It is the time between checkpoints in seconds."
    checks.nonnegative("checkpoint_every", checkpoint_every, remedy, single=True)


def _description(grid: Grid, units: Sequence[Unit]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tts_jax": __version__,
        "jax": jax.__version__,
        "digest": _digest(grid, units),
        "grid": dataclasses.asdict(grid),
        "units": [[list(unit.cells), unit.first, unit.last] for unit in units],
    }


def _digest(grid: Grid, units: Sequence[Unit]) -> str:
    """What ties the files of a run to its settings."""
    text = json.dumps([FORMAT, dataclasses.asdict(grid), units])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_description(folder: Path) -> tuple[Grid, list[Unit]]:
    path = folder / _RUN
    if not path.is_file():
        raise ValueError(
            f"Argument `out` must be a folder with a run, got `{folder}`, which has no `{_RUN}`. "
            f"Start one with `tts-jax sweep --out {folder}`."
        )
    again = "Start the sweep anew in another folder."
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        made_by = written["format"], written["tts_jax"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` is damaged: {error!r}. {again}") from error
    if made_by != (FORMAT, __version__):
        raise ValueError(
            f"`{path}` was written by tts_jax {made_by[1]} (format {made_by[0]}), this is "
            f"{__version__} (format {FORMAT}). Continue it with that version. {again}"
        )
    try:
        grid = Grid(**written["grid"])
        grid.check()
        units = [Unit(tuple(cells), first, last) for cells, first, last in written["units"]]
        same = written["digest"] == _digest(grid, units)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` is damaged: {error}. {again}") from error
    if not same:
        raise ValueError(
            f"`{path}` was changed after the run began. Put the settings back, or start the "
            f"sweep anew in another folder."
        )
    if written["jax"] != jax.__version__:
        say(
            f"tts-jax: `{folder}` was begun with JAX {written['jax']}, this is "
            f"{jax.__version__}: results may differ by rounding from there on."
        )
    return grid, units


# --- a unit under way -----------------------------------------------------------------------


class UnitRun:
    """A unit of SGD under way: its lanes, and what was recorded so far.

    Attributes:
        steps: steps taken.
        alive: whether each lane was finite at every record so far, `[lanes]`.
    """

    def __init__(self, grid: Grid, unit: Unit) -> None:
        """Prepare the lanes at step 0."""
        cells = grid.cells()
        self._cells = [cells[index] for index in unit.cells]
        self._problems = [grid.problem(cell) for cell in self._cells]
        self._targets = grid.steps(self._cells[0])
        self._block = unit.last - unit.first
        self._run = self._start(grid, unit)
        self._pace = Pace(_CHUNK_SECONDS)
        self._count = 0
        neurons, records = self._cells[0].neurons, grid.records
        self._loss = np.full((unit.lanes, records), np.nan)
        self._recovery = np.full((unit.lanes, records, len(grid.jumps)), np.nan)
        self._fast = np.full((unit.lanes, neurons + 1), np.nan)
        self._slow = np.full((unit.lanes, neurons), np.nan)
        self.alive = np.ones(unit.lanes, dtype=bool)
        self.steps = 0

    def _start(self, grid: Grid, unit: Unit) -> LaneRun:
        """The lanes of the unit, cell after cell."""
        words, state = _seeds(grid, self._cells[0].neurons)
        block = slice(unit.first, unit.last)
        words, state = jax.tree.map(lambda leaf: leaf[block], (words, state))
        cells = [
            LaneCell(problem, state, words, cell.step_size, cell.epsilon)
            for problem, cell in zip(self._problems, self._cells, strict=True)
        ]
        with wide():
            return LaneRun(cells, gradient=grid.gradient, dtype=grid.dtype, engine=grid.engine)

    @property
    def engine(self) -> str:
        """The engine that takes the steps."""
        return self._run.engine

    @property
    def done(self) -> bool:
        """Whether everything is recorded, or no lane is left."""
        return self._count == len(self._targets) or not self.alive.any()

    def advance(self) -> int:
        """Run one chunk, or record where one ended.

        Returns:
            The steps that it took.
        """
        target = self._targets[self._count]
        part = 0
        if self.steps < target:
            part = _in_a_thread(lambda: self._pace.advance(self._run, target - self.steps))
            self.steps += part
        if self.steps == target:
            self._record()
        return part

    def _record(self) -> None:
        with wide():
            fast, slow = self._run.read()
        self.alive &= finite_states(State(fast[:, None], slow[:, None]))[:, 0]
        fast = np.where(self.alive[:, None], fast, np.nan)
        slow = np.where(self.alive[:, None], slow, np.nan)
        for index, problem in enumerate(self._problems):
            rows = slice(index * self._block, (index + 1) * self._block)
            loss = population_loss(problem, fast[rows, None], slow[rows, None])[:, 0]
            self._loss[rows, self._count] = np.where(self.alive[rows], loss, np.nan)
            self._recovery[rows, self._count] = problem.recovery(slow[rows])
        self._fast[:], self._slow[:] = fast, slow
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        """What a finished unit came to, `[lanes, ...]`."""
        status = np.where(self.alive, int(Status.SUCCESS), int(Status.DIVERGED))
        return {
            "engine": np.array(self.engine),
            "loss": self._loss,
            "recovery": self._recovery,
            "status": status.astype(np.int32),
            "fast": self._fast,
            "slow": self._slow,
        }

    def save(self) -> dict[str, np.ndarray]:
        """Everything that `restore` needs."""
        arrays = {
            "engine": np.array(self.engine),
            "steps": np.int64(self.steps),
            "count": np.int64(self._count),
            "alive": self.alive.copy(),
            "loss": self._loss[:, : self._count],
            "recovery": self._recovery[:, : self._count],
            "fast": self._fast.copy(),
            "slow": self._slow.copy(),
        }
        with wide():
            leaves = enumerate(self._run.save())
        return arrays | {f"carry-{index}": leaf for index, leaf in leaves}

    def restore(self, saved: Arrays) -> None:
        """Go on from what `save` returned."""
        self.steps, self._count = int(saved["steps"]), int(saved["count"])
        self.alive[:] = saved["alive"]
        self._loss[:, : self._count] = saved["loss"]
        self._recovery[:, : self._count] = saved["recovery"]
        self._fast[:], self._slow[:] = saved["fast"], saved["slow"]
        leaves = [saved[f"carry-{index}"] for index in range(len(jax.tree.leaves(self._run.carry)))]
        with wide():
            self._run.restore(leaves, self.steps)


class SolveRun:
    """A unit of the flow or of the limit: nothing at first, everything after `advance`."""

    def __init__(self, grid: Grid, unit: Unit) -> None:
        """Prepare the starts."""
        (index,) = unit.cells
        self._cell = grid.cells()[index]
        self._problem, self._tau = grid.problem(self._cell), grid.tau()
        _, state = _seeds(grid, self._cell.neurons)
        self._state = jax.tree.map(lambda leaf: leaf[unit.first : unit.last], state)
        self._dynamics = grid.dynamics
        engine = cast(EngineName, grid.engine)
        self.engine = choose_engine(engine, self._problem, self._state, own=True)
        self.steps = 0
        self._answer: Trajectory | None = None

    @property
    def done(self) -> bool:
        """Whether it is solved."""
        return self._answer is not None

    def advance(self) -> int:
        """Solve all starts.

        Returns:
            One, the solves of a lane.
        """
        options: dict[str, Any] = {"tau": self._tau, "engine": self.engine}

        def solve() -> Trajectory:
            if self._dynamics == "limit":
                return limit(self._problem, self._state, **options)
            return flow(self._problem, self._state, epsilon=self._cell.epsilon, **options)

        self._answer = _in_a_thread(solve)
        self.steps = 1
        return 1

    def result(self) -> dict[str, np.ndarray]:
        """What a solved unit came to, `[lanes, ...]`."""
        assert self._answer is not None
        found = self._answer
        arrays = {"loss": found.loss, "recovery": found.observables["recovery"]}
        arrays |= {"status": found.status, "fast": found.fast[:, -1], "slow": found.slow[:, -1]}
        return {"engine": np.array(self.engine)} | {k: np.asarray(v) for k, v in arrays.items()}

    def save(self) -> dict[str, np.ndarray]:
        """Nothing but the engine: a solve is not cut in parts."""
        return {"engine": np.array(self.engine), "steps": np.array(0)}

    def restore(self, saved: Arrays) -> None:
        """Nothing to do."""


def _under_way(grid: Grid, unit: Unit) -> UnitRun | SolveRun:
    return UnitRun(grid, unit) if grid.dynamics == "sgd" else SolveRun(grid, unit)


def _in_a_thread(function: Callable[[], T]) -> T:
    """The answer of `function`, computed in another thread.

    Python's signal handlers run in the main thread between its own instructions: a thread that
    only waits hears signals at once.
    """

    def call() -> T:
        with wide():
            return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@functools.lru_cache(maxsize=1)
def _seeds(grid: Grid, neurons: int) -> tuple[Words, State]:
    """Key words and starts of all seeds, `[seeds, ...]`; the same in cells of equal `neurons`."""
    cell = next(cell for cell in grid.cells() if cell.neurons == neurons)
    problem = grid.problem(cell)
    with wide():
        stream, start = seed_keys(jax.random.key(grid.key), grid.seeds)
        state = jax.vmap(lambda key: problem.init(key=key))(start)
        return key_words(stream), batched(problem, state, grid.seeds)


# --- the run --------------------------------------------------------------------------------


def _run(
    folder: Path,
    grid: Grid,
    units: Sequence[Unit],
    checkpoint_every: float,
    progress: bool | None,
) -> "xarray.Dataset":
    """Compute what is missing in `folder`, and put everything together."""
    with contextlib.ExitStack() as stack:
        if _distributed.is_first():
            try:
                stack.enter_context(locked(folder))
            except BlockingIOError:
                raise ValueError(
                    f"Argument `out` must be a folder that no other program writes to, got "
                    f"`{folder}`. Wait for that one to end, or stop it."
                ) from None
            for left in folder.glob(".*.part"):
                left.unlink(missing_ok=True)
        _distributed.barrier("the folder is ready")
        files = _Files(folder, _digest(grid, units))
        stop = stack.enter_context(stop_on_signals())
        mine = range(jax.process_index(), len(units), jax.process_count())
        _compute(grid, units, mine, files, stop, checkpoint_every, progress)
        _wait_for_others(files, len(units), stop)
        _distributed.barrier("all units are finished")
        dataset = _dataset(grid, units, files)
        if _distributed.is_first():
            files.store.put(RESULT, functools.partial(write_netcdf, dataset))
            trouble = files.settle()
            if trouble:
                say(f"tts-jax: {trouble}")
        _distributed.barrier("the result is written")
    return dataset


def _compute(
    grid: Grid,
    units: Sequence[Unit],
    mine: Sequence[int],
    files: "_Files",
    stop: Stop,
    checkpoint_every: float,
    progress: bool | None,
) -> None:
    """Compute the units of this process that have no result yet."""
    cells = grid.cells()
    work = {i: units[i].lanes * grid.rounds(cells[units[i].cells[0]]) for i in mine}
    missing = [index for index in mine if not files.is_finished(index)]
    finished = [index for index in mine if index not in missing]
    done = sum(work[index] for index in finished)
    neurons = {index: cells[units[index].cells[0]].neurons for index in mine}
    engines = {(neurons[index], str(files.result(index)["engine"])) for index in finished}
    shown = bool(progress) and _distributed.is_first()
    what = f"sweep, {grid.dynamics}", "seed-step" if grid.dynamics == "sgd" else "solve"
    with _progress(sum(work.values()), done, shown, *what) as update:
        last = time.monotonic()
        for index in missing:
            unit, lanes = _under_way(grid, units[index]), units[index].lanes
            saved = files.last_checkpoint(index)
            if saved is not None:
                engines.add((neurons[index], str(saved["engine"])))
            _check_engine(unit.engine, [name for m, name in engines if m == neurons[index]])
            if saved is not None:
                unit.restore(saved)
                update(unit.steps * lanes)
            while not unit.done:
                if stop.signal:
                    files.checkpoint(index, unit.save())
                    _leave(files, stop)
                update(unit.advance() * lanes)
                if time.monotonic() - last >= checkpoint_every and not unit.done:
                    files.checkpoint(index, unit.save())
                    last = time.monotonic()
            update(work[index] - unit.steps * lanes)
            files.finish(index, unit.result())


def _check_engine(here: str, found: Sequence[str]) -> None:
    """Refuse to go on with another engine than those `found` in the files of like units."""
    others = sorted(set(found) - {here})
    if others:
        raise ValueError(
            f"The run was computed by the engine {others[0]!r} so far, here it would be {here!r}, "
            f"whose results differ by rounding. Continue it on a machine like the first (on CPUs "
            f"'simd' needs llvmlite: `pip install 'tts_jax[cpu]'`), or start the sweep anew in "
            f"another folder."
        )


def _leave(files: "_Files", stop: Stop) -> None:
    """Leave a run that a signal stopped.

    Raises:
        Stopped: always.
    """
    advice = files.settle() or f"Go on with `tts-jax resume {files.store.folder}`."
    raise Stopped(f"stopped. {advice}", stop.signal)


def _wait_for_others(files: "_Files", count: int, stop: Stop) -> None:
    """Wait until the other processes have written their units; JAX ends the wait if one dies."""
    if jax.process_count() == 1:
        return
    trouble = files.settle()
    if trouble:
        raise OSError(trouble)
    while not files.all_written(count):
        if stop.signal:
            _leave(files, stop)
        time.sleep(_POLL_SECONDS)


class _Files:
    """The files of a run, by unit."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.store = Store(folder)
        self._digest = np.array(digest)
        self._kept: dict[int, Arrays] = {}

    def is_finished(self, index: int) -> bool:
        """Whether the result of a unit is there and whole; drops checkpoints that it outdates."""
        try:
            self.result(index)
        except FileNotFoundError:
            return False
        except DamagedFileError as error:
            say(f"tts-jax: {error} Its unit is computed again.")
            with contextlib.suppress(OSError):
                (self.store.folder / f"{_name(index)}.npz").unlink()
            return False
        self.store.drop_checkpoints(_name(index))
        return True

    def result(self, index: int) -> Arrays:
        """The result of a finished unit."""
        if index in self._kept:
            return self._kept[index]
        path = self.store.folder / f"{_name(index)}.npz"
        return self._checked(path, read_arrays(path))

    def finish(self, index: int, arrays: Arrays) -> None:
        """Write the result of a unit, which makes its checkpoints useless."""
        tagged = {**arrays, "digest": self._digest}
        path = f"{_name(index)}.npz"
        self.store.retry()
        if self.store.put(path, functools.partial(write_arrays, arrays=tagged)):
            self.store.drop_checkpoints(_name(index))
        else:
            self._kept[index] = arrays

    def checkpoint(self, index: int, arrays: Arrays) -> None:
        """Write the state of a unit under way."""
        self.store.checkpoint(_name(index), {**arrays, "digest": self._digest})

    def last_checkpoint(self, index: int) -> Arrays | None:
        """The state of a unit under way, if there is one."""
        saved = self.store.last_checkpoint(_name(index))
        return None if saved is None else self._checked(self.store.folder, saved)

    def all_written(self, count: int) -> bool:
        """Whether the folder holds the results of all units."""
        present = set(os.listdir(self.store.folder))
        return all(f"{_name(index)}.npz" in present for index in range(count))

    def settle(self) -> str:
        """Write what could not be written so far, if need be elsewhere.

        Returns:
            Where it is and how to go on, in words; empty if all is in the folder.
        """
        folder = self.store.folder
        try:
            spare = self.store.settle()
        except OSError as error:
            return f"Neither `{folder}` nor another folder can be written: {error}."
        if spare is None:
            return ""
        return (
            f"`{folder}` could not be written; what is missing there is in `{spare}`. Make room, "
            f"then `cp {spare}/* {folder}/` and `tts-jax resume {folder}`."
        )

    def _checked(self, path: Path, arrays: dict[str, np.ndarray]) -> Arrays:
        if str(arrays.pop("digest", None)) != str(self._digest):
            raise ValueError(
                f"`{path}` holds files of another run. Start the sweep anew in another folder."
            )
        return arrays


def _name(index: int) -> str:
    return f"unit-{index:05d}"


@contextmanager
def _progress(total: int, done: int, shown: bool, name: str, unit: str) -> Iterator[Any]:
    """Progress in units of work: a bar on a terminal, else a line now and then."""
    if not shown:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        yield _Lines(total, done, name, unit).update
        return
    from tqdm import tqdm

    options: dict[str, Any] = {"unit": unit, "unit_scale": True, "smoothing": 0.05}
    with tqdm(total=total, initial=done, desc=name, **options) as bar:
        yield bar.update


class _Lines:
    """Progress in lines."""

    def __init__(self, total: int, done: int, name: str, unit: str) -> None:
        self._total, self._done, self._first = total, done, done
        self._name, self._unit = name, unit
        self._began = self._last = time.monotonic()

    def update(self, count: int) -> None:
        """Count steps, and print a line if the last one is old."""
        self._done += count
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS or self._done == self._first:
            return
        self._last = now
        left = (now - self._began) * (self._total - self._done) / (self._done - self._first)
        share = self._done / max(self._total, 1)
        of = f"{self._total:.3g} {self._unit}s"
        say(f"{self._name}: {share:.1%} of {of}, about {left / 60:.1f} min left")


# --- the answer -----------------------------------------------------------------------------


def _dataset(grid: Grid, units: Sequence[Unit], files: _Files) -> "xarray.Dataset":
    import xarray

    lead = len(grid.cells()), grid.seeds
    most, jumps = max(grid.neurons), len(grid.jumps)
    engines = set()
    values = {
        "loss": np.full((*lead, grid.records), np.nan),
        "recovery": np.full((*lead, grid.records, jumps), np.nan),
        "status": np.zeros(lead, dtype=np.int32),
        "fast": np.full((*lead, most + 1), np.nan),
        "slow": np.full((*lead, most), np.nan),
    }
    own = {
        "loss": ("tau",),
        "recovery": ("tau", "jump"),
        "status": (),
        "fast": ("weight",),
        "slow": ("neuron",),
    }
    for index, unit in enumerate(units):
        result = files.result(index)
        engines.add(str(result["engine"]))
        for name, whole in values.items():
            parts = np.split(result[name], len(unit.cells))
            for cell, part in zip(unit.cells, parts, strict=True):
                # a cell with fewer neurons fills only its own
                whole[cell, unit.first : unit.last][tuple(map(slice, part.shape))] = part
    variables: dict[str, Any] = {
        name: ((*_AXES, "seed", *own[name]), array.reshape(*grid.shape, *array.shape[1:]))
        for name, array in values.items()
    }
    moved = np.broadcast_to(grid.tau(), (len(grid.epsilon), len(grid.step_size), grid.records))
    if grid.dynamics == "sgd":
        sizes = np.multiply.outer(grid.epsilon, grid.step_size)
        moved = np.array([[np.array(recorded_steps(grid.tau(), d)) * d for d in r] for r in sizes])
    variables["tau_recorded"] = (("epsilon", "step_size", "tau"), moved)
    coords = {axis: list(getattr(grid, axis)) for axis in _AXES} | {
        "seed": np.arange(grid.seeds),
        "tau": grid.tau(),
        "jump": list(grid.jumps),
        "weight": np.arange(most + 1),
        "neuron": np.arange(1, most + 1),
    }
    dataset = xarray.Dataset(variables, coords)
    steps = {"gradient": grid.gradient, "dtype": grid.dtype} if grid.dynamics == "sgd" else {}
    dataset.attrs = {
        "method": grid.dynamics,
        "problem": "Univariate",
        **steps,
        "engine": ", ".join(sorted(engines)),
        "key": grid.key,
        "values": list(grid.values),
        "tts_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    return dataset
