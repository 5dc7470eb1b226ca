"""The flow's program for GPUs, run on this CPU: one thread after the other, memory of the host."""

import contextlib
import ctypes
import functools
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import llvmlite.binding as llvm
import numpy as np
import pytest
from conftest import JUMPS, VALUES
from llvmlite import ir

import tts_jax as tts
from tts_jax._simd import cuda
from tts_jax._simd.machine import compiled, has_fma
from tts_jax._simd.writer import Target
from tts_jax.problems import _banded_machine
from tts_jax.problems._banded_program import Program


TAU = np.array([0.0, 0.01, 0.035])


class Memory:
    """As `cuda.Memory`, filled with what must not be read."""

    def __enter__(self):
        self.held = []
        return self

    def __exit__(self, *_):
        self.held.clear()

    def reserve(self, size):
        self.held.append(np.full(size // 8 + 1, np.nan))
        return self.held[-1].ctypes.data

    def zeros(self, size):
        address = self.reserve(size)
        ctypes.memset(address, 0, size)
        return address

    def copy_of(self, array):
        address = self.reserve(array.nbytes)
        self.write(address, array)
        return address

    @staticmethod
    def write(address, array):
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    @staticmethod
    def read(address, array):
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


VOTE = r'@"llvm.nvvm.vote.any.sync"'


def program():
    """The text of the program, for this CPU: what a GPU knows becomes a global variable."""
    module = ir.Module("banded")
    module.triple = llvm.get_process_triple()
    Program(module, Target(1, fused=has_fma(), cuda=True))
    text = str(module).replace("ptx_kernel ", "").replace("convergent", "")
    sreg = r'"llvm\.nvvm\.read\.ptx\.sreg\.([a-z.]*)"'
    known = r'@"\1" = global i32 0 define i32 @"get.\1"() { %v = load i32, ptr @"\1" ret i32 %v }'
    text = re.sub(rf"declare i32 @{sreg}\(\)", known, text)
    return re.sub(f"@{sreg}", r'@"get.\1"', text)


def know(engine, name, value):
    address = engine.get_global_value_address(name)
    ctypes.c_int32.from_address(address).value = value


class Device:
    """As `cuda.Device`: threads run in turn, and a warp votes as its only thread does."""

    capability = (9, 0)

    def __init__(self):
        own = 'define i1 @"vote"(i32 %all, i1 %own) { ret i1 %own }'
        text = re.sub(rf"declare i1 {VOTE}\([^)]*\)", own, program())
        self.engine = compiled(re.sub(VOTE, '@"vote"', text))

    def free_memory(self):
        return 1 << 30

    @contextlib.contextmanager
    def current(self):
        yield

    def launch(self, kernel, blocks, threads, arguments):
        form = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))
        call = form(self.engine.get_function_address(kernel))
        know(self.engine, "ntid.x", threads)
        know(self.engine, "nctaid.x", blocks)
        for block in reversed(range(blocks)):
            for thread in range(threads):
                know(self.engine, "ctaid.x", block)
                know(self.engine, "tid.x", thread)
                call(*arguments)


class Warp(Device):
    """The threads of a warp side by side, each with a copy of the program; a vote waits for all.

    A GPU may wait for ever where threads of a warp vote at different places. Here that is told.
    """

    def __init__(self):
        vote = """@"ballot" = global ptr null
        define i1 @"vote"(i32 %place, i1 %own) convergent noinline {
            %asked = load ptr, ptr @"ballot"
            %one = zext i1 %own to i32
            %answer = call i32 %asked(i32 %place, i32 %one)
            %any = icmp ne i32 %answer, 0
            ret i1 %any
        }"""
        text = re.sub(rf"declare i1 {VOTE}\([^)]*\)", vote, program())
        places = itertools.count()
        text = re.sub(rf"{VOTE}\(i32 -1", lambda _: f'@"vote"(i32 {next(places)}', text)
        self.engines = [compiled(text, opt=0) for _ in range(cuda.WARP)]
        self.votes = 0

    def launch(self, kernel, blocks, threads, arguments):
        form = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))
        ballot = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        for block in range(blocks):
            met = threading.Barrier(threads)
            asked = [(0, 0)] * threads

            def vote(place, own, thread, met=met, asked=asked):
                asked[thread] = place, own
                try:
                    met.wait(20)
                    votes = list(asked)
                    met.wait(20)
                except threading.BrokenBarrierError:
                    return own  # on its own to the end, where it is told
                if len({place for place, _ in votes}) > 1:
                    met.abort()
                self.votes += thread == 0
                return int(any(own for _, own in votes))

            def run(thread, block=block, met=met, vote=vote):
                engine = self.engines[thread]
                for name, value in (("ntid", threads), ("nctaid", blocks), ("ctaid", block)):
                    know(engine, f"{name}.x", value)
                know(engine, "tid.x", thread)
                asks = ballot(functools.partial(vote, thread=thread))
                place = ctypes.c_void_p.from_address(engine.get_global_value_address("ballot"))
                place.value = ctypes.cast(asks, ctypes.c_void_p).value
                form(engine.get_function_address(kernel))(*arguments)
                met.wait(20)  # all end after the same vote

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, range(threads)))


@pytest.fixture(scope="module")
def device():
    return Device()


@pytest.fixture(scope="module")
def warp():
    return Warp()


@pytest.fixture
def gpu(device, monkeypatch):
    monkeypatch.setattr(cuda, "Memory", Memory)
    monkeypatch.setattr(_banded_machine, "_gpu", lambda: (device, "banded_flow"))
    monkeypatch.setattr(cuda, "missing", lambda: None)
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("neurons", "eta", "epsilon"), [(5, 4e-3, 0.1), (5, 4e-3, None), (8, 0.1, 0.1)]
)
def test_the_threads_of_a_warp_vote_together(neurons, eta, epsilon, warp, gpu):
    """Else a GPU could wait for ever. The second warp is not full."""
    gpu.setattr(_banded_machine, "_gpu", lambda: (warp, "banded_flow"))
    options = {"epsilon": epsilon} if epsilon else {}
    before = warp.votes
    found = compare(
        tts.flow if epsilon else tts.limit, neurons, eta, starts(40, neurons, eta), **options
    )
    assert np.all(found.success)
    assert warp.votes - before > 1000


def compare(method, neurons, eta, slow, **options):
    problem = tts.Univariate(tts.PiecewiseConstant(JUMPS, VALUES), neurons=neurons, eta=eta)
    state = problem.state(slow=slow)
    found, expected = (
        method(problem, state, tau=TAU, rtol=1e-6, atol=1e-6, engine=engine, **options)
        for engine in ("cuda", "simd")
    )
    assert dict(found.notes)["engine"] == "cuda"
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right)
    return found


def starts(count, neurons, eta):
    """Random starts, some with neurons that coincide, lie on jumps or straddle an end."""
    slow = np.random.default_rng(3).random((count, neurons))
    slow[::7, 1] = slow[::7, 0]
    slow[::5, 2] = JUMPS[0]
    slow[::3, 3] = 1.0 - eta / 5
    return slow


@pytest.mark.parametrize(
    ("neurons", "eta", "epsilon"),
    [(5, 4e-3, 0.1), (20, 4e-3, 2e-5), (20, 4e-3, None), (20, 4e-2, 1e-3)],
)
def test_threads_have_the_bits_of_vectors(neurons, eta, epsilon, gpu):
    """More starts than threads of a warp, and not a multiple of them."""
    options = {"epsilon": epsilon} if epsilon else {}
    found = compare(
        tts.flow if epsilon else tts.limit, neurons, eta, starts(70, neurons, eta), **options
    )
    assert np.all(found.success)


def test_what_the_memory_holds_at_a_time(gpu, device):
    """The starts of two warps, then the rest."""
    gpu.setattr(_banded_machine, "most_starts", lambda *_: 64)
    compare(tts.flow, 5, 4e-3, starts(70, 5, 4e-3), epsilon=0.1)
    gpu.undo()
    gpu.setattr(_banded_machine, "_gpu", lambda: (device, "banded_flow"))
    most = _banded_machine.most_starts(5, 13, 3)
    assert most % 32 == 0
    assert _banded_machine.most_starts(5, 13, 300) < most
    assert 0.5 < most * 8 * _banded_machine.layout(1, 5, 13)[0] / device.free_memory() < 0.8


def test_what_is_too_wide_is_left_to_the_cpu(gpu):
    gpu.setattr(_banded_machine, "WIDEST_CUDA", 3)
    found = compare(tts.flow, 12, 0.1, starts(8, 12, 0.1), epsilon=0.1)
    assert np.max(found.stats["bandwidth"]) > 3


def test_failures_have_a_status(gpu):
    found = compare(tts.flow, 20, 4e-3, starts(8, 20, 4e-3), epsilon=2e-5, max_steps=60)
    assert np.all(found.status == tts.Status.MAX_STEPS)
    assert np.all(np.isnan(found.loss[:, -1]) & np.isfinite(found.loss[:, 0]))


def test_the_kernel_is_written_for_every_gpu(monkeypatch):
    """In PTX, which names no instruction of the host's, and for Hopper at most."""
    for capability, target in (((8, 0), "sm_80"), ((12, 0), "sm_90")):
        text = _banded_machine.kernel_text(capability)
        assert f".target {target}" in text
        assert ".visible .entry banded_flow(" in text
        # a product and a sum are rounded together only where it is written so
        assert "fma.rn.f64" in text
        assert not re.search(r"\b(add|mul)\.f64", text)


def test_what_is_missing_is_told(monkeypatch):
    assert "JAX computes on cpu" in cuda.missing()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, reason in (("6.1", "compute capability 7"), ("gfx942", "not gfx942")):
        given = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(cuda, "gpu", lambda given=given: given)
        assert reason in cuda.missing()
    monkeypatch.setattr(cuda, "gpu", lambda: SimpleNamespace(compute_capability="9.0"))
    monkeypatch.setattr(cuda, "_driver", lambda: ctypes.CDLL("there-is-no-such-library"))
    cuda._driver_missing.cache_clear()
    assert "driver" in cuda.missing()
    cuda._driver_missing.cache_clear()
