"""The command line in processes of its own, to be killed, starved and counted.

A server that has imported the package forks them before JAX's backend starts, so that a process
costs some tenths of a second. Compiled programs come from a folder that they share.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time

import psutil


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tts_jax.cli", "h5netcdf", "tqdm"])


def start(arguments, folder, *, name="child", **options):
    """Start `tts-jax <arguments>`; its output goes to `folder/name.log`."""
    log, cache = str(folder / f"{name}.log"), str(folder / "cache")
    given = ([str(argument) for argument in arguments], log, cache)
    process = CONTEXT.Process(target=_main, args=given, kwargs=options)
    process.start()
    return process


def finish(process, seconds=60):
    """Wait for a process and return its exit code."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("the process hangs")
    return process.exitcode


def kill_after(process, seconds):
    """SIGKILL a process after `seconds` of its own time, whatever else the machine does."""
    while process.is_alive():
        try:
            times = psutil.Process(process.pid).cpu_times()
        except psutil.NoSuchProcess:  # it has just ended
            break
        if times.user + times.system >= seconds:
            process.kill()
            break
        time.sleep(0.002)
    return finish(process)


@contextlib.contextmanager
def bound_by_permissions():
    """The permissions of files bind this thread, even if it is root's: without CAP_DAC_OVERRIDE."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, then high ones
    assert libc.capget(header, held) == 0
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~(1 << 1)
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def _main(
    arguments,
    log,
    cache,
    *,
    devices=1,
    threads=None,
    chunk=None,
    file_limit=None,
    die_at=None,
    heartbeat=None,
    script=None,
):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    import jax

    from tts_jax import _compat, _distributed, _sweep, cli

    tempfile.tempdir = os.path.dirname(log)  # what finds no room elsewhere
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_num_cpu_devices", devices)
    if threads is not None:
        _compat.cores = lambda: threads
    if chunk is not None:
        _sweep._CHUNK_SECONDS = chunk
    if heartbeat is not None:
        _distributed._HEARTBEAT_SECONDS = heartbeat
    if die_at is not None:
        _die_at(*die_at)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        code = cli.main(arguments) if script is None else script(*arguments)
    finally:  # what JAX does at exit; a forked process does not come there
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    with open(f"{log}.seconds", "w") as file:
        file.write(str(time.process_time()))
    sys.exit(code)


def _die_at(function, count, when):
    """SIGKILL this process before or after the `count`-th call of `os.<function>`."""
    original, calls = getattr(os, function), iter(range(1, 1 << 30))

    def counted(*args, **kwargs):
        last = next(calls) == count
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(os, function, counted)


# --- scripts that a process may run instead of the command line ---------------------------------


def save_sgd(path, *job):
    """Run `sgd` on five seeds, as one process of a job if `job` names one, and save its answer."""
    import jax
    import numpy as np

    import tts_jax as tts
    from tts_jax import _distributed

    if job:
        address, processes, index = job
        _distributed.initialize(address, int(processes), int(index))
    target = tts.PiecewiseConstant([0.3, 0.6], [0.0, 2.0, 1.0])
    problem = tts.Univariate(target, neurons=6, eta=0.02, noise=1.0)
    state = jax.vmap(lambda key: problem.init(key=key))(jax.random.split(jax.random.key(3), 5))
    rng = np.random.default_rng(0)
    samples = rng.random((5, 40)), rng.random((5, 40))
    options = {"epsilon": 1e-2, "step_size": 1e-2}
    key = jax.random.key(1)
    runs = {
        "drawn": tts.sgd(problem, key=key, seeds=5, tau=[0.0, 0.01, 0.02], **options),
        "given": tts.sgd(problem, state=state, samples=samples, tau=[4e-3], **options),
    }
    arrays = {}
    for name, run in runs.items():
        for field in ("fast", "slow", "loss", "status", "tau"):
            arrays[f"{name}.{field}"] = np.asarray(getattr(run, field))
    np.savez(path, **arrays)
    return 0


def record_memory(path, *arguments):
    """Run a sweep and save the resident memory in MiB after each checkpoint."""
    import numpy as np

    from tts_jax import cli
    from tts_jax._checkpoint import Store

    resident = _memory_after(Store, "checkpoint")
    code = cli.main(list(arguments))
    np.save(path, np.asarray(resident))
    return code


def record_memory_of_sgd(path, engine):
    """Save the resident memory in MiB after each of 10,000 short calls of one long run of `sgd`,
    and after each of 300 runs.
    """
    import jax
    import numpy as np

    import tts_jax as tts
    from tts_jax import _sgd

    problem = tts.Univariate(tts.PiecewiseConstant([0.5], [0.0, 1.0]), neurons=6, eta=0.02)
    options = {"epsilon": 1e-2, "step_size": 1e-2, "engine": engine, "seeds": 16}

    def run(steps):
        tts.sgd(problem, key=jax.random.key(0), tau=np.linspace(0, 1e-4 * steps, 5), **options)

    _sgd._CALL_SECONDS = 0.0  # every call is as short as it may be
    every_call = _memory_after(_sgd.Pace, "advance")
    run(10_000 * _sgd._FIRST_CALL)
    calls = list(every_call)
    runs = _memory_after(_sgd, "sgd")
    tts.sgd = _sgd.sgd
    for _ in range(300):
        run(100)
    np.savez(path, calls=calls, runs=runs)
    return 0


def _memory_after(owner, function):
    """A list that grows by the resident memory in MiB after each call of `owner.<function>`."""
    process, resident, original = psutil.Process(), [], getattr(owner, function)

    def counted(*args, **kwargs):
        answer = original(*args, **kwargs)
        resident.append(process.memory_info().rss / 2**20)
        return answer

    setattr(owner, function, counted)
    return resident


def print_layout(*arguments):
    """Run a sweep and print the layout of its lanes."""
    from tts_jax import _sweep, cli

    class Printing(_sweep.LaneRun):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            print(self.layout, flush=True)

    _sweep.LaneRun = Printing
    return cli.main(list(arguments))


def run_one_long_chunk(mark, *arguments):
    """Run a sweep whose first chunk takes many seconds; write the file `mark` when it begins."""
    from pathlib import Path

    from tts_jax import _sgd, _sweep, cli

    original = _sweep.UnitRun.advance

    def marked(self):
        if self.steps > 0 or self._count > 0:
            Path(mark).write_text("")
        return original(self)

    _sgd._FIRST_CALL = 1 << 29
    _sweep.UnitRun.advance = marked
    return cli.main(list(arguments))
