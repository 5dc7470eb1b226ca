"""Several processes on this machine, joined through `jax.distributed`."""

import dataclasses
import os
import signal
import socket

import children
import numpy as np
import pytest
from test_sweep import GRID, flags, result, same, wait


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(index, address, processes=2):
    """The flags by which a process that is started by hand joins the others."""
    where = ["--coordinator", address, "--processes", processes, "--process-id", index]
    return ["--distributed", *where]


def start_job(arguments, folder, name, *, second=None, **options):
    """The command in two processes; `second` adds to the options of the second one."""
    address = f"127.0.0.1:{free_port()}"
    return [
        children.start(
            [*arguments, *join(index, address)], folder, name=f"{name}-{index}", **options, **more
        )
        for index, more in enumerate(({}, second or {}))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The sweep over `GRID` by one process."""
    folder = tmp_path_factory.mktemp("alone")
    child = children.start(["sweep", "--out", folder / "run", *flags(GRID)], folder)
    assert children.finish(child) == 0
    return folder, result(folder / "run")


def test_two_processes_share_a_sweep(alone, tmp_path):
    folder, whole = alone
    words = ["sweep", "--out", tmp_path / "run", *flags(GRID)]
    for child in start_job(words, folder, "job"):
        assert children.finish(child) == 0, (folder / "job-0.log").read_text()
    assert same(result(tmp_path / "run"), whole)
    assert len(list((tmp_path / "run").glob("unit-*.npz"))) >= 2
    # the first one speaks for all
    assert "recovered" in (folder / "job-0.log").read_text()
    assert "recovered" not in (folder / "job-1.log").read_text()


def test_a_dead_process_takes_the_others_along_and_one_goes_on(alone, tmp_path):
    """The other ends with an error; a resume with one process gives the same bits."""
    folder, whole = alone
    out = tmp_path / "run"
    words = ["sweep", "--out", out, *flags(GRID), "--lanes", 3, "--checkpoint-every", 0]
    die = {"die_at": ("replace", 2, "after")}
    first, second = start_job(words, folder, "dying", heartbeat=3, second=die)
    assert children.finish(second) == -signal.SIGKILL
    assert children.finish(first, 60) not in (0, None)
    assert not (out / "sweep.nc").exists()
    child = children.start(["resume", out], folder)
    assert children.finish(child) == 0
    assert same(result(out), whole)


def test_a_job_that_is_told_to_stop(tmp_path):
    """As Slurm does, with a signal to every process; each writes its checkpoint."""
    long = dataclasses.replace(GRID, epsilon=(1e-8, 2e-8), eta=(0.02,))
    words = ["sweep", "--out", tmp_path / "run", *flags(long), "--checkpoint-every", 0]
    job = start_job(words, tmp_path, "told", chunk=0.05)
    for index in (0, 1):
        pattern = f"unit-0000{index}.checkpoint*"
        wait(lambda pattern=pattern: list((tmp_path / "run").glob(pattern)), 40)
    for child in job:
        os.kill(child.pid, signal.SIGTERM)
    for index, child in enumerate(job):
        log = (tmp_path / f"told-{index}.log").read_text
        assert children.finish(child) == 143, log()
        assert f"tts-jax resume {tmp_path / 'run'}" in log()


def test_two_processes_share_the_seeds_of_sgd(alone, tmp_path):
    """Five seeds: the second process has one less, and still gets all."""
    folder, _ = alone
    address = f"127.0.0.1:{free_port()}"
    script = {"script": children.save_sgd}
    job = [
        children.start([tmp_path / f"{index}.npz", address, 2, index], folder, **script)
        for index in (0, 1)
    ]
    job.append(children.start([tmp_path / "alone.npz"], folder, **script))
    for child in job:
        assert children.finish(child) == 0, (folder / "child.log").read_text()
    with np.load(tmp_path / "alone.npz") as one:
        assert one["drawn.fast"].shape == (5, 3, 7)
        for index in (0, 1):
            with np.load(tmp_path / f"{index}.npz") as other:
                assert set(one.files) == set(other.files)
                for name in one.files:
                    np.testing.assert_array_equal(other[name], one[name], err_msg=name)


def test_a_job_that_is_not_there(tmp_path):
    words = ["sweep", "--out", tmp_path / "run", "--distributed", "--processes", "2"]
    child = children.start(words, tmp_path)
    assert children.finish(child) == 2
    assert "--coordinator HOST:PORT" in (tmp_path / "child.log").read_text()
