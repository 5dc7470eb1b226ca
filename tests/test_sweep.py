"""Sweeps: what they compute, and that neither stops nor broken disks change a bit of it."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import time

import children
import jax
import numpy as np
import pytest
import xarray

import tts_jax as tts
from tts_jax import _checkpoint, _sgd, _sweep, cli
from tts_jax._checkpoint import Stopped


GRID = tts.Grid(
    epsilon=(1e-3, 3e-3),
    neurons=(6,),
    eta=(0.02, 0.03),
    step_size=(1e-2,),
    noise=(1.0,),
    seeds=3,
    tau_end=0.2,
    records=4,
)


def flags(grid):
    """The command line's form of a grid."""
    words = []
    for name, value in dataclasses.asdict(grid).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def same(one, other):
    """Whether two datasets have the same bits."""
    names = {str(name) for name in one.variables}
    return names == {str(name) for name in other.variables} and all(
        one[name].dims == other[name].dims
        and one[name].values.tobytes() == other[name].values.tobytes()
        for name in names
    )


def result(folder):
    with xarray.open_dataset(folder / "sweep.nc", engine="h5netcdf") as opened:
        return opened.load()


@pytest.fixture(scope="module", autouse=True)
def backend():
    """Start the backend, so that the command line does not set up this process."""
    jax.devices()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep over `GRID` that nothing disturbed."""
    return tts.sweep(GRID, tmp_path_factory.mktemp("whole"))


def interrupt(monkeypatch, count, number=signal.SIGINT):
    """Send this process a signal during the `count`-th chunk."""
    calls, original = iter(range(1, 1 << 30)), _sweep.UnitRun.advance

    def advance(self):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(_sweep.UnitRun, "advance", advance)


# --- the numbers ------------------------------------------------------------------------------


def test_every_cell_is_that_of_sgd(whole):
    for epsilon, eta in itertools.product(GRID.epsilon, GRID.eta):
        target = tts.PiecewiseConstant(GRID.jumps, GRID.values)
        problem = tts.Univariate(target, neurons=6, eta=eta, noise=1.0)
        run = tts.sgd(
            problem,
            key=jax.random.key(0),
            seeds=3,
            epsilon=epsilon,
            step_size=1e-2,
            tau=np.linspace(0, 0.2, 4),
        )
        cell = whole.sel(epsilon=epsilon, eta=eta, neurons=6, step_size=1e-2, noise=1.0)
        for name, value in {
            "loss": run.loss,
            "recovery": run.observables["recovery"],
            "status": run.status,
            "fast": run.fast[:, -1],
            "slow": run.slow[:, -1],
            "tau_recorded": run.tau,
        }.items():
            np.testing.assert_array_equal(cell[name].values, np.asarray(value), err_msg=name)


def test_the_limit_over_a_grid(whole, tmp_path):
    """From the starts of SGD; the flow is in `test_phase.py`."""
    grid = dataclasses.replace(GRID, dynamics="limit", epsilon=(1e-3,))
    answer = tts.sweep(grid, tmp_path)
    assert (answer.attrs["method"], "dtype" in answer.attrs) == ("limit", False)
    for eta in grid.eta:
        target = tts.PiecewiseConstant(GRID.jumps, GRID.values)
        problem = tts.Univariate(target, neurons=6, eta=eta)
        start = problem.state(slow=grid.starts(6).slow)
        run = tts.limit(problem, start, tau=np.linspace(0, 0.2, 4))
        cell = answer.squeeze().sel(eta=eta)
        np.testing.assert_array_equal(cell.slow, run.slow[:, -1])
        np.testing.assert_array_equal(cell.loss, run.loss)
        first = whole.squeeze().sel(eta=eta, epsilon=1e-3).recovery.isel(tau=0)
        np.testing.assert_allclose(cell.recovery.isel(tau=0), first, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_cells_of_equal_neurons_and_steps_are_one_run(engine, tmp_path, monkeypatch):
    """Sixteen seeds in each of four cells: 64 lanes, with the bits of four calls of `sgd`."""
    grid = dataclasses.replace(
        GRID, epsilon=(1e-3,), eta=(0.02, 0.03), noise=(0.5, 1.0), seeds=16, engine=engine
    )
    started = []

    class Counting(_sweep.LaneRun):
        def __init__(self, cells, **options):
            started.append([cell.state.fast.shape[0] for cell in cells])
            super().__init__(cells, **options)

    monkeypatch.setattr(_sweep, "LaneRun", Counting)
    answer = tts.sweep(grid, tmp_path)
    assert started == [[16, 16, 16, 16]]
    tau = np.linspace(0, 0.2, 4)
    options = {"epsilon": 1e-3, "step_size": 1e-2, "tau": tau, "engine": engine}
    for eta, noise in itertools.product(grid.eta, grid.noise):
        target = tts.PiecewiseConstant(grid.jumps, grid.values)
        problem = tts.Univariate(target, neurons=6, eta=eta, noise=noise)
        run = tts.sgd(problem, key=jax.random.key(0), seeds=16, **options)
        cell = answer.sel(epsilon=1e-3, eta=eta, neurons=6, step_size=1e-2, noise=noise)
        np.testing.assert_array_equal(cell.fast, run.fast[:, -1])
        np.testing.assert_array_equal(cell.slow, run.slow[:, -1])
        np.testing.assert_array_equal(cell.loss, run.loss)


def test_the_file_holds_the_answer(tmp_path):
    answer = tts.sweep(GRID, tmp_path)
    assert same(answer, result(tmp_path))
    assert answer.loss.dims == ("epsilon", "neurons", "eta", "step_size", "noise", "seed", "tau")
    assert answer.attrs["key"] == 0
    assert answer.attrs["gradient"] == "exact"
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_seed_does_not_depend_on_the_grid(whole, tmp_path):
    alone = dataclasses.replace(GRID, epsilon=(3e-3,), eta=(0.03,), seeds=2)
    answer = tts.sweep(alone, tmp_path)
    cell = whole.sel(epsilon=[3e-3], eta=[0.03], seed=[0, 1])
    assert same(answer, cell)


def test_settings_are_single_numbers_or_lists():
    grid = tts.Grid(epsilon=1e-3, neurons=[5, 6], eta=np.array([0.1]))  # pyright: ignore
    assert (grid.epsilon, grid.neurons, grid.eta) == ((1e-3,), (5, 6), (0.1,))
    assert grid.shape == (1, 2, 1, 1, 1)


@pytest.mark.parametrize("calls", [(7, 7), (64, 1 << 30)])
def test_chunks_change_nothing(calls, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(_sgd, "_FIRST_CALL", calls[0])
    monkeypatch.setattr(_sgd, "_MOST_STEPS", calls[1])
    short = dataclasses.replace(GRID, tau_end=0.02)
    one = tts.sweep(short, tmp_path / "chunks")
    monkeypatch.undo()
    assert same(one, tts.sweep(short, tmp_path / "whole"))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_units_change_nothing(lanes, whole, tmp_path):
    assert same(tts.sweep(GRID, tmp_path, lanes=lanes), whole)


def test_diverged_seeds_are_marked_and_leave_the_others_alone(tmp_path):
    grid = dataclasses.replace(
        GRID, epsilon=(1e-4, 3e-4), neurons=(4, 6), eta=(0.02,), step_size=(1e-2, 30.0), tau_end=0.1
    )
    answer = tts.sweep(grid, tmp_path)
    bad = answer.sel(step_size=30.0)
    assert (bad.status == int(tts.Status.DIVERGED)).all()
    assert np.isnan(bad.loss.isel(tau=-1)).all()
    assert np.isnan(bad.fast).all()
    good = answer.sel(step_size=1e-2)
    assert (good.status == 0).all()
    assert np.isfinite(good.loss).all()
    # a cell has as many neurons as it has
    assert np.isnan(good.slow.sel(neurons=4, neuron=[5, 6])).all()
    assert np.isfinite(good.slow.sel(neurons=6)).all()
    assert np.isfinite(good.slow.sel(neurons=4, neuron=[1, 2, 3, 4])).all()


def test_units_cover_the_grid_once():
    grid = tts.Grid(
        epsilon=(1e-3, 1e-2), neurons=(5, 6), eta=(0.1, 0.2, 0.3), step_size=1e-2, seeds=7
    )
    cells = grid.cells()
    for most, shares in itertools.product((1, 3, 8, 20, 1000), (1, 3)):
        units = _sweep.plan(grid, most, shares)
        runs = [(c, s) for unit in units for c in unit.cells for s in range(unit.first, unit.last)]
        assert sorted(runs) == list(itertools.product(range(12), range(7)))
        assert max(unit.lanes for unit in units) <= most
        for unit in units:
            alike = {(cells[c].neurons, tuple(grid.steps(cells[c]))) for c in unit.cells}
            assert len(alike) == 1
    assert len(_sweep.plan(grid, 1000)) == 4


# --- stops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_stop_waits_for_a_checkpoint(count, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, count, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=f"tts-jax resume {tmp_path}") as stopped:
        tts.sweep(GRID, tmp_path, lanes=3)
    assert stopped.value.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert len(list(tmp_path.glob("*checkpoint*"))) == 1
    monkeypatch.undo()
    assert same(tts.resume(tmp_path), whole)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_exit_codes_and_messages(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    interrupt(monkeypatch, 3)
    assert cli.main(["sweep", "--out", str(folder), *flags(GRID)]) == 130
    assert f"tts-jax resume {folder}" in capsys.readouterr().err
    monkeypatch.undo()
    interrupt(monkeypatch, 3, signal.SIGTERM)
    assert cli.main(["resume", str(folder)]) == 143
    monkeypatch.undo()
    assert cli.main(["resume", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "0.003        6  0.03  0.01      1      3       0" in shown.out
    assert str(folder / "sweep.nc") in shown.out
    assert cli.main(["sweep", "--out", str(folder), *flags(GRID)]) == 2
    assert f"tts-jax resume {folder}" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_the_second_signal_stops_at_once(tmp_path):
    """By the kernel, also inside a long compiled call."""
    long = dataclasses.replace(GRID, epsilon=(1e-9,), eta=(0.02,), seeds=64)
    mark = tmp_path / "mark"
    child = children.start(
        [mark, "sweep", "--out", tmp_path / "run", *flags(long)],
        tmp_path,
        script=children.run_one_long_chunk,
    )
    wait(mark.exists, 60)
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGINT)
    wait(lambda: "a second signal stops at once" in (tmp_path / "child.log").read_text(), 10)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    assert children.finish(child, 10) == -signal.SIGINT


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_stop_between_other_threads_is_left_alone(whole, tmp_path):
    """Signals belong to the main thread; a sweep elsewhere just runs."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert same(pool.submit(tts.sweep, GRID, tmp_path).result(), whole)


# --- damage and refusals ----------------------------------------------------------------------


def stopped_run(folder, monkeypatch, count=4):
    interrupt(monkeypatch, count)
    with pytest.raises(Stopped):
        tts.sweep(GRID, folder, lanes=3, checkpoint_every=0.0)
    monkeypatch.undo()
    found = sorted(folder.glob("*checkpoint*"))
    assert len(found) == 2
    return found


def test_a_damaged_checkpoint_falls_back_on_the_one_before(whole, tmp_path, monkeypatch, capfd):
    found = stopped_run(tmp_path, monkeypatch)
    newest = max(found, key=lambda path: int(_checkpoint.read_arrays(path)["steps"]))
    newest.write_bytes(newest.read_bytes()[:-100])
    assert same(tts.resume(tmp_path), whole)
    message = capfd.readouterr().err
    assert f"`{newest}` is damaged" in message
    assert "checkpoint before it is used" in message


def test_a_damaged_result_is_computed_again(whole, tmp_path, capfd):
    tts.sweep(GRID, tmp_path, lanes=3)
    path = tmp_path / "unit-00001.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert same(tts.resume(tmp_path), whole)
    assert f"`{path}` is damaged" in capfd.readouterr().err


def test_no_damage_goes_unnoticed(tmp_path):
    """Any single byte: the file is refused, or its content is what it was."""
    path = tmp_path / "file.npz"
    arrays = {"a": np.arange(5.0), "b": np.array("text"), "steps": np.int64(3)}
    _checkpoint.write_arrays(path, arrays)
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            read = _checkpoint.read_arrays(path)
        except _checkpoint.DamagedFileError:
            refused += 1
            continue
        assert {name: value.tobytes() for name, value in read.items()} == {
            name: np.asarray(value).tobytes() for name, value in arrays.items()
        }
    assert refused > len(content) // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(format=99), "format 99"),
        (lambda run: run.update(tts_jax="0.0.0"), "written by tts_jax 0.0.0"),
        (lambda run: run["grid"].update(eta=[0.5, 0.6]), "changed after the run began"),
        (lambda run: run["grid"].update(color="red"), "damaged"),
        (lambda run: run.pop("units"), "damaged"),
        (lambda run: run.pop("format"), "damaged"),
    ],
)
def test_resume_refuses_another_run(change, message, tmp_path, monkeypatch):
    stopped_run(tmp_path, monkeypatch)
    path = tmp_path / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        tts.resume(tmp_path)


def test_resume_refuses_files_of_another_run(tmp_path, monkeypatch):
    tts.sweep(GRID, tmp_path / "one")
    tts.sweep(dataclasses.replace(GRID, key=1), tmp_path / "other")
    stray = tmp_path / "other" / "unit-00000.npz"
    stray.replace(tmp_path / "one" / "unit-00000.npz")
    with pytest.raises(ValueError, match="files of another run"):
        tts.resume(tmp_path / "one")


def test_checkpoints_of_finished_units_are_removed(whole, tmp_path):
    """They stay behind when a run is killed at that moment."""
    tts.sweep(GRID, tmp_path, lanes=3)
    stale = tmp_path / "unit-00002.checkpoint-1.npz"
    stale.write_bytes((tmp_path / "unit-00002.npz").read_bytes())
    assert same(tts.resume(tmp_path), whole)
    assert not stale.exists()


@pytest.mark.parametrize("pattern", ["*checkpoint*", "unit-00000.npz"])
def test_resume_refuses_another_engine(pattern, tmp_path, monkeypatch):
    """Than that of its checkpoints, or of its finished units."""
    interrupt(monkeypatch, 12)
    with pytest.raises(Stopped):
        tts.sweep(GRID, tmp_path, lanes=3)
    monkeypatch.undo()
    here = str(_checkpoint.read_arrays(tmp_path / "unit-00000.npz")["engine"])
    for path in tmp_path.glob(pattern):
        arrays = _checkpoint.read_arrays(path)
        _checkpoint.write_arrays(path, arrays | {"engine": np.array("kernel")})
    if pattern == "unit-00000.npz":
        for path in tmp_path.glob("*checkpoint*"):
            path.unlink()
    with pytest.raises(ValueError, match=f"the engine 'kernel' so far, here it would be '{here}'"):
        tts.resume(tmp_path)


def test_an_engine_that_cannot_run_here(tmp_path, capsys):
    """Without llvmlite, say: a run that asked for `simd` does not fall back on another engine."""
    words = ["sweep", "--out", str(tmp_path), *flags(dataclasses.replace(GRID, engine="kernel"))]
    assert cli.main(words) == 2
    assert "`engine` must not be 'kernel' here" in capsys.readouterr().err


def test_resume_refuses_what_is_not_json_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="tts-jax sweep"):
        tts.resume(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        tts.resume(tmp_path)


def test_two_programs_do_not_share_a_folder(tmp_path):
    tts.sweep(GRID, tmp_path)
    with (
        _checkpoint.locked(tmp_path),
        pytest.raises(ValueError, match="no other program writes"),
    ):
        tts.resume(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": (-1.0,)}, "`eta` must be positive"),
        ({"neurons": (0,)}, "`neurons` must"),
        ({"epsilon": (1e-3, 1e-3)}, "`epsilon` must hold at least one value, each once"),
        ({"noise": ()}, "`noise` must hold"),
        ({"step_size": (0.0,)}, "`step_size` must be positive"),
        ({"tau_end": -1.0}, "`tau_end` must be positive"),
        ({"tau_end": 1e-9}, "at most one recorded time per step"),
        ({"seeds": 0}, "`seeds` must be an integer"),
        ({"records": 0}, "`records` must be an integer"),
        ({"gradient": "none"}, "`gradient` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"engine": "steam"}, "`engine` must be one of"),
        ({"dynamics": "newton"}, "`dynamics` must be one of"),
        ({"dynamics": "flow", "engine": "kernel"}, "`engine` must be one of"),
        ({"dynamics": "flow", "noise": (0.0, 1.0)}, "`noise` must be one number"),
        ({"dynamics": "limit"}, "`epsilon` must be one number"),
        ({"jumps": (0.5,)}, "`values` must have one entry more"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path, capsys):
    grid = dataclasses.replace(GRID, **change)
    with pytest.raises(ValueError, match=message):
        tts.sweep(grid, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_arguments_of_the_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["sweep", *out, "--eta", "-1"]) == 2
    assert "`eta` must be positive" in capsys.readouterr().err
    assert cli.main(["sweep", *out, "--processes", "2"]) == 2
    assert "--distributed" in capsys.readouterr().err
    assert cli.main(["sweep", *out, "--lanes", "0"]) == 2
    assert "`lanes` must be an integer" in capsys.readouterr().err
    assert cli.main(["sweep", *out, "--checkpoint-every", "-1"]) == 2
    assert "`checkpoint_every` must be zero or positive" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    (tmp_path / "file").write_text("")
    assert cli.main(["sweep", "--out", str(tmp_path / "file")]) == 2
    assert "`--out` must be a folder" in capsys.readouterr().err


# --- disks ------------------------------------------------------------------------------------


def broken(function, working_again=1 << 30):
    """`os.<function>` that fails from now on for some calls, as on a full disk."""
    original, calls = getattr(os, function), iter(range(1 << 30))

    def fails(*args, **kwargs):
        if next(calls) < working_again:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return fails


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk_loses_nothing(function, whole, tmp_path, monkeypatch, capfd):
    """It fills up after the start, and has room again before the end."""
    original = _sweep.UnitRun.__init__

    def fill_up(self, *args, **kwargs):
        if not getattr(fill_up, "done", False):
            fill_up.done = True
            monkeypatch.setattr(os, function, broken(function, 7))
        original(self, *args, **kwargs)

    monkeypatch.setattr(_sweep.UnitRun, "__init__", fill_up)
    assert same(tts.sweep(GRID, tmp_path, lanes=3, checkpoint_every=0.0), whole)
    assert same(result(tmp_path), whole)
    message = capfd.readouterr().err
    assert message.count("cannot write") == 1
    assert "No space left" in message
    assert "MiB free" in message
    assert "can be written again" in message
    assert not list(tmp_path.glob(".*.part"))


def test_a_disk_that_stays_full(whole, tmp_path, monkeypatch, capfd):
    """The rest goes to another folder, from which the run is completed by hand."""
    folder, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(_checkpoint.tempfile, "mkdtemp", lambda prefix: str(spare))
    replace = os.replace

    def fails(source, target):
        if folder in target.parents and target.name not in ("run.json", "unit-00000.npz"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert same(tts.sweep(GRID, folder, lanes=3), whole)
    assert f"cp {spare}/* {folder}/" in capfd.readouterr().err
    assert same(result(spare), whole)
    assert cli.main(["resume", str(folder)]) == 1
    monkeypatch.undo()
    for path in spare.iterdir():
        path.replace(folder / path.name)
    assert same(tts.resume(folder), whole)


def test_a_stop_on_a_full_disk(whole, tmp_path, monkeypatch):
    """The checkpoint goes elsewhere; the one before stays whole."""
    folder, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(_checkpoint.tempfile, "mkdtemp", lambda prefix: str(spare))
    (before,) = stopped_run_once(folder, monkeypatch)
    content, steps = before.read_bytes(), int(_checkpoint.read_arrays(before)["steps"])
    monkeypatch.setattr(_checkpoint.tempfile, "mkdtemp", lambda prefix: str(spare))
    replace = os.replace

    def fails(source, target):
        if folder in target.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    interrupt(monkeypatch, 3)
    with pytest.raises(Stopped, match=str(spare)):
        tts.resume(folder)
    monkeypatch.undo()
    assert before.read_bytes() == content
    (rescued,) = spare.iterdir()
    assert int(_checkpoint.read_arrays(rescued)["steps"]) > steps
    rescued.replace(folder / rescued.name)
    assert same(tts.resume(folder), whole)


def stopped_run_once(folder, monkeypatch):
    interrupt(monkeypatch, 2)
    with pytest.raises(Stopped):
        tts.sweep(GRID, folder, lanes=3)
    monkeypatch.undo()
    return list(folder.glob("*checkpoint*"))


def test_a_folder_that_becomes_read_only(whole, tmp_path, monkeypatch):
    folder, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    stopped_run_once(folder, monkeypatch)
    monkeypatch.setattr(_checkpoint.tempfile, "mkdtemp", lambda prefix: str(spare))
    folder.chmod(0o555)
    try:
        with children.bound_by_permissions():
            with pytest.raises(PermissionError):
                (folder / "file").write_text("")
            assert same(tts.resume(folder), whole)
    finally:
        folder.chmod(0o755)
    assert same(result(spare), whole)


def test_progress(tmp_path, monkeypatch, capfd):
    """Lines where there is no terminal, a bar on one, and silence unless asked."""
    tts.sweep(GRID, tmp_path / "silent")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(_sweep, "_LINE_SECONDS", 0.0)
    tts.sweep(GRID, tmp_path / "lines", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert all("seed-steps, about" in line for line in lines)
    assert "100.0% of 1.6e+05" in lines[-1]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    tts.sweep(GRID, tmp_path / "bar", progress=True)
    assert "sweep, sgd: 100%" in capfd.readouterr().err


# --- other processes --------------------------------------------------------------------------

SMALL = dataclasses.replace(GRID, epsilon=(1e-4, 3e-4), tau_end=4.0)
RUN = ["--lanes", "3", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with an undisturbed run of `SMALL` by a process, and its processor time."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("first", "whole"):  # the first one compiles
        words = ["sweep", "--out", folder / name, *RUN, *flags(SMALL)]
        child = children.start(words, folder, name=name, chunk=0.02)
        assert children.finish(child) == 0, (folder / f"{name}.log").read_text()
    return folder, result(folder / "whole"), float((folder / "whole.log.seconds").read_text())


def resumed(folder, out):
    """Resume, or start if nothing was there yet, in a process; the result."""
    begun = (out / "run.json").exists()
    words = ["resume", out] if begun else ["sweep", "--out", out, *RUN, *flags(SMALL)]
    child = children.start([*words, "--checkpoint-every", "0"], folder, chunk=0.02)
    assert children.finish(child) == 0, (folder / "child.log").read_text()
    return result(out)


@pytest.mark.parametrize("trials", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(trials, workshop, tmp_path):
    """One in each part of the time that a run takes: start-up, computing, writing."""
    folder, whole, seconds = workshop
    rng, killed, states = np.random.default_rng(5), 0, []
    for trial in range(trials):
        out = tmp_path / f"{trial}"
        child = children.start(["sweep", "--out", out, *RUN, *flags(SMALL)], folder, chunk=0.02)
        moment = seconds * (trial + rng.random() * bool(trial)) / trials  # the first at once
        killed += children.kill_after(child, moment) == -signal.SIGKILL
        found = "".join(path.name for path in out.iterdir()) if out.exists() else ""
        states.append([part in found for part in ("run.json", "checkpoint", "unit-00001.npz")])
        assert same(resumed(folder, out), whole), f"killed in trial {trial}"
    assert killed >= trials * 0.7
    # some before anything was written, some after a checkpoint, some after a result
    states = np.array(states)
    assert trials < 20 or not states[:, 0].all()
    assert states[:, 1:].any()
    assert trials < 20 or states[:, 1:].any(axis=0).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", [("fsync", 5), ("replace", 1), ("replace", 4)])
def test_killed_while_writing(moment, when, workshop, tmp_path):
    folder, whole, _ = workshop
    out = tmp_path / "run"
    child = children.start(
        ["sweep", "--out", out, *RUN, *flags(SMALL)], folder, chunk=0.02, die_at=(*moment, when)
    )
    assert children.finish(child) == -signal.SIGKILL
    assert same(resumed(folder, out), whole)
    assert not list(out.glob(".*.part"))


def test_a_limit_on_file_sizes(workshop, tmp_path):
    """Small files can be written, the result cannot: it goes nowhere, and nothing is lost."""
    folder, whole, _ = workshop
    out = tmp_path / "run"
    child = children.start(
        ["sweep", "--out", out, *RUN, *flags(SMALL)],
        tmp_path,
        chunk=0.02,
        file_limit=result_size(folder) - 1,
    )
    assert children.finish(child) == 1
    message = (tmp_path / "child.log").read_text()
    assert "File too large" in message
    assert "another folder can be written" in message
    assert not (out / "sweep.nc").exists()
    assert same(resumed(folder, out), whole)


def result_size(folder):
    return (folder / "whole" / "sweep.nc").stat().st_size


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_threads_and_devices_change_nothing(engine, tmp_path):
    """A run that begins on two of them and ends on one is that of one."""
    if engine == "simd":
        pytest.importorskip("llvmlite")
    kind = "threads" if engine == "simd" else "devices"
    grid = dataclasses.replace(GRID, epsilon=(1e-3,), eta=(0.02,), seeds=40, engine=engine)
    words = ["sweep", *flags(grid), "--checkpoint-every", "0", "--out"]

    def run(words, name, number, code=0, **options):
        options |= {kind: number, "name": name, "script": children.print_layout}
        assert children.finish(children.start(words, tmp_path, **options)) == code
        assert f" on {number}\n" in (tmp_path / f"{name}.log").read_text()

    run([*words, tmp_path / "one"], "one", 1)
    killed = {"die_at": ("replace", 4, "after")}
    run([*words, tmp_path / "two"], "two", 2, -signal.SIGKILL, **killed)
    saved = [_checkpoint.read_arrays(path) for path in (tmp_path / "two").glob("*checkpoint*")]
    assert max(array["steps"] for array in saved) > 0
    run(["resume", tmp_path / "two"], "again", 1)
    assert same(result(tmp_path / "two"), result(tmp_path / "one"))
    assert result(tmp_path / "two").attrs["engine"] == engine


@pytest.mark.parametrize("records", [401, pytest.param(5001, marks=pytest.mark.slow)])
def test_memory_stays_flat(records, tmp_path):
    """Over as many chunks and checkpoints as there are records."""
    grid = dataclasses.replace(GRID, epsilon=(1e-3,), eta=(0.02,), records=records, tau_end=0.5)
    words = ["sweep", *flags(grid), "--checkpoint-every", "0", "--out", str(tmp_path / "run")]
    child = children.start(
        [str(tmp_path / "memory.npy"), *words], tmp_path, script=children.record_memory
    )
    assert children.finish(child, 300) == 0
    resident = np.load(tmp_path / "memory.npy")
    assert len(resident) >= records - 1
    # what is recorded grows, and a checkpoint holds some copies of it
    recorded = GRID.seeds * records * (1 + len(GRID.jumps)) * 8 / 2**20
    assert resident[-50:].mean() - resident[100:150].mean() < 1.0 + 3 * recorded


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "loop", "general"])
def test_memory_of_sgd_stays_flat(engine, tmp_path):
    path = tmp_path / "memory.npz"
    child = children.start([path, engine], tmp_path, script=children.record_memory_of_sgd)
    assert children.finish(child, 300) == 0, (tmp_path / "child.log").read_text()
    with np.load(path) as memory:
        calls, runs = memory["calls"], memory["runs"]
    assert len(calls) >= 10_000
    assert calls[-100:].mean() - calls[1000:1100].mean() < 1.0
    assert len(runs) == 300
    assert runs[-30:].mean() - runs[50:80].mean() < 1.0
