"""SGD lanes on a GPU, as far as a CPU can tell: the kernel interpreted and lowered for CUDA.

Interpret mode runs the traced kernel with a simulated GPU memory; lowering runs Mosaic GPU's rules
for every operation and stops before LLVM, which needs CUDA's jaxlib.
"""

import contextlib
import functools
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.mlir import ir

import tts_jax as tts
from tts_jax import _kernel, _lanes, _random, _sgd


# JAX 0.10 has no public name for it
interpret_params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

CPU = SimpleNamespace(platform="cpu")
HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
BLACKWELL = SimpleNamespace(platform="gpu", compute_capability="10.0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Compile anew in every test, with a short body of the unrolled loop."""
    monkeypatch.setattr(_kernel, "UNROLL", 3)
    _lanes._program.cache_clear()
    yield
    _lanes._program.cache_clear()


@pytest.fixture
def simulated(monkeypatch):
    """A context in which the kernel runs on a simulated GPU."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(_kernel, "obstacle", lambda *_, **__: None)
            with interpret_params.force_gpu_interpret_mode():
                yield

    return context


@pytest.fixture
def wide():
    """64-bit types in every thread: the simulated memory has threads of its own."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def paper(neurons):
    target = tts.PiecewiseConstant(jumps=[0.2, 0.5, 0.8], values=[1.0, 5.0, 1.0, 3.0])
    return tts.Univariate(target, neurons=neurons, eta=0.2, noise=1.0)


def lane_run(engine, *, neurons=5, seeds=130, gradient="exact", dtype=np.float32, **options):
    problem = paper(neurons)
    rng = np.random.default_rng(0)
    state = tts.State(np.zeros((seeds, neurons + 1)), np.sort(rng.random((seeds, neurons))))
    words = _random.key_words(jax.random.split(jax.random.key(1), seeds))
    options |= {"gradient": gradient, "dtype": dtype, "devices": jax.local_devices()[:1]}
    cell = _lanes.Cell(problem, state, words, step_size=0.02, epsilon=0.05)
    return _lanes.LaneRun([cell], engine=engine, **options)


def states_after(engine, first, parts, **options):
    """The states after steps `first`, ..., `first` + sum(parts) − 1, taken in parts."""
    with jax.enable_x64(True):
        run = lane_run(engine, **options)
        assert run.engine == engine
        run.steps = first
        for part in parts:
            run.advance(part)
        return run.read()


def check_close(found, expected, dtype):
    """Equal up to a few roundings of numbers of size 1 (most processors: to the bit)."""
    for left, right in zip(found, expected, strict=True):
        assert np.max(np.abs(right)) > 0.5
        np.testing.assert_allclose(left, right, rtol=0, atol=32 * np.finfo(dtype).eps)


# --- the forms of the loop agree ------------------------------------------------------------

AROUND_32_BITS = 2**32 - 13  # the high word of the step number changes on the way


@pytest.mark.parametrize(("gradient", "first"), [("exact", AROUND_32_BITS), ("box", 0)])
def test_the_kernel_takes_the_steps_of_the_loop(gradient, first, simulated):
    expected = states_after("loop", first, [31], gradient=gradient)
    with simulated():
        found = states_after("kernel", first, [31], gradient=gradient)
        parts = states_after("kernel", first, [7, 1, 23], gradient=gradient)
    check_close(found, expected, np.float32)
    np.testing.assert_array_equal(parts.fast, found.fast)
    np.testing.assert_array_equal(parts.slow, found.slow)


def test_the_kernel_takes_the_steps_of_the_loop_in_float64(simulated, wide):
    options = {"neurons": 2, "seeds": 3, "dtype": np.float64}
    expected = states_after("loop", AROUND_32_BITS, [31], **options)
    with simulated():
        found = states_after("kernel", AROUND_32_BITS, [31], **options)
    check_close(found, expected, np.float64)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [[31], [7, 1, 23]])
def test_the_unrolled_loop_takes_the_steps_of_the_loop(dtype, parts):
    options = {"dtype": dtype, "seeds": 20, "width": 16, "gradient": "box"}
    expected = states_after("loop", AROUND_32_BITS, [31], **options)
    found = states_after("unrolled", AROUND_32_BITS, parts, **options)
    check_close(found, expected, dtype)


def test_the_unrolled_loop_replays_samples():
    rng = np.random.default_rng(2)
    samples = rng.random((20, 40)), rng.random((20, 40))
    options = {"samples": samples, "own_samples": True, "dtype": np.float64, "seeds": 20}
    expected = states_after("loop", 0, [40], **options)
    found = states_after("unrolled", 0, [13, 27], **options)
    check_close(found, expected, np.float64)


def test_a_diverging_seed_leaves_its_warp_alone(simulated):
    """Weights beyond the range of float32 in one lane of the kernel."""
    with jax.enable_x64(True), simulated():
        whole, broken = lane_run("kernel"), lane_run("kernel")
        carry = broken.carry
        broken.carry = carry._replace(bias=carry.bias.at[0, 7].set(3e38))
        for run in (whole, broken):
            run.advance(20)
        good, bad = whole.read(), broken.read()
    others = np.arange(130) != 7
    assert not np.isfinite(bad.fast[7]).any()
    assert not np.asarray(broken.carry.limit)[0, 7] > 0  # frozen
    np.testing.assert_array_equal(bad.fast[others], good.fast[others])
    np.testing.assert_array_equal(bad.slow[others], good.slow[others])


def test_sgd_gives_one_answer_by_every_engine(simulated):
    settings = {"key": jax.random.key(3), "seeds": 3, "epsilon": 0.05, "step_size": 0.02}
    settings |= {"tau": [0.0, 0.02, 0.05], "dtype": jnp.float32}
    loop = tts.sgd(paper(4), engine="loop", **settings)
    with simulated():
        kernel = tts.sgd(paper(4), engine="kernel", **settings)
    unrolled = tts.sgd(paper(4), engine="unrolled", **settings)
    general = tts.sgd(paper(4), engine="general", **settings)
    for other in (kernel, unrolled, general):
        np.testing.assert_allclose(other.fast, loop.fast, rtol=0, atol=1e-5)
        np.testing.assert_allclose(other.slow, loop.slow, rtol=0, atol=1e-5)
    assert np.max(np.abs(loop.slow[:, -1] - loop.slow[:, 0])) > 1e-3
    assert dict(general.notes)["engine"] == "general"


def test_a_step_of_rows_is_the_step_of_their_array():
    problem = paper(3)
    rng = np.random.default_rng(4)
    start = tts.State(rng.standard_normal((4, 8)), rng.random((3, 8)))
    lanes = problem.lane_start(
        start, step_size=0.1, epsilon=0.1, gradient="exact", dtype=np.float32
    )
    point = rng.random(8, dtype=np.float32), rng.random(8, dtype=np.float32)
    arrays = jax.tree.map(jnp.asarray, (lanes.fixed, lanes.carry))
    rows = jax.tree.map(lambda leaf: tuple(leaf) if leaf.ndim == 2 else leaf, arrays)
    whole = problem.lane_step(lanes.shared, *arrays, point, gradient="exact")
    split = problem.lane_step(lanes.shared, *rows, point, gradient="exact")
    assert isinstance(split.weights, tuple)
    for left, right in zip(whole, split, strict=True):
        np.testing.assert_array_equal(left, jnp.stack(right) if isinstance(right, tuple) else right)


# --- the kernel lowered for CUDA ------------------------------------------------------------


def operations(operation):
    """How often each operation occurs inside `operation`."""
    names = Counter()

    def visit(inner):
        names[inner.name.removeprefix("stable_mosaic_gpu.")] += 1
        return ir.WalkResult.ADVANCE

    operation.walk(visit)
    return names


def first_inside(operation, name):
    found = []

    def visit(inner):
        if inner.name.removeprefix("stable_mosaic_gpu.") == name:
            found.append(inner)
        return ir.WalkResult.ADVANCE

    operation.walk(visit)
    return found[0]


@pytest.mark.parametrize(
    ("dtype", "neurons"), [(np.float32, 20), (np.float32, 48), ("float64", 20)]
)
def test_the_whole_loop_is_one_kernel_with_its_state_in_registers(dtype, neurons):
    with jax.enable_x64(True):
        run = lane_run("loop", neurons=neurons, seeds=256, width=_kernel.WIDTH, dtype=dtype)
        shared, fixed, carry, words = run._shared, run._fixed, run.carry, run._words
        high, low, count = np.uint32(0), np.uint32(5), np.uint32(100)
        program = jax.jit(
            functools.partial(_kernel.advance_groups, paper(neurons), gradient="exact")
        )
        traced = program.trace(shared, fixed, carry, words, (high, low), count)
        lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    outside = operations(lowered.operation)
    assert outside["stablehlo.while"] == 0
    assert outside["stablehlo.custom_call"] == 1
    call = first_inside(lowered.operation, "stablehlo.custom_call")
    assert call.attributes["call_target_name"].value == "mosaic_gpu_v2"
    with lowered.context as context:
        context.allow_unregistered_dialects = True
        kernel = ir.Module.parse(call.attributes["mhlo.backend_config"]["module"].value_bytes)
        assert operations(kernel.operation)["scf.for"] == 1
        loop = first_inside(kernel.operation, "scf.for")
        inside = operations(loop)
        assert len(loop.results) == 2 * neurons + 2  # what a step changes, one register each
        assert {str(result.type) for result in loop.results} == {
            f"vector<1x{'f64' if dtype == 'float64' else 'f32'}>"
        }
        assert inside["arith.shli"] == inside["arith.shrui"] == 20  # the rotations of Threefry
        assert inside["arith.uitofp"] == 2  # its words are unsigned
        assert inside["arith.divf"] == 1
        memory = {name for name in inside if name.endswith((".load", ".store", ".barrier"))}
        assert not memory


# --- which engine ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "numbers", "replay", "words"),
    [
        (CPU, "float32", 62, False, "this device is a CPU"),
        (SimpleNamespace(platform="tpu"), "float32", 62, False, "this device is a TPU"),
        (SimpleNamespace(platform="gpu", compute_capability="8.9"), "float32", 62, False, "8.9"),
        (SimpleNamespace(platform="gpu", compute_capability="12.0"), "float32", 62, False, "12.0"),
        (SimpleNamespace(platform="gpu", compute_capability="gfx942"), "float32", 62, False, "gfx"),
        (SimpleNamespace(platform="gpu"), "float32", 62, False, "unknown"),
        (HOPPER, "float32", 62, True, "`samples` are given"),
        (HOPPER, "float32", 201, False, "and these are 201"),
        (HOPPER, "float64", 101, False, "and these are 202"),
    ],
)
def test_says_why_the_kernel_cannot_run(device, dtype, numbers, replay, words):
    reason = _kernel.obstacle(device, dtype, numbers, replay=replay)
    assert reason is not None
    assert words in reason
    with pytest.raises(ValueError, match="must not be 'kernel' here: .*Leave it at 'auto'"):
        _lanes.choose_engine("kernel", device, dtype, numbers, replay=replay)


@pytest.mark.parametrize("device", [HOPPER, BLACKWELL])
@pytest.mark.parametrize(("dtype", "numbers"), [("float32", 200), ("float64", 100)])
def test_the_kernel_runs_on_its_hardware(device, dtype, numbers):
    assert _kernel.obstacle(device, dtype, numbers) is None


def test_chooses_the_fastest_engine():
    choose = functools.partial(_lanes.choose_engine, dtype="float32", replay=False)
    ampere = SimpleNamespace(platform="gpu", compute_capability="8.0")
    assert choose("auto", CPU, numbers=62) == "simd"
    assert choose("auto", HOPPER, numbers=62) == "kernel"
    assert choose("auto", HOPPER, numbers=1000) == "unrolled"
    assert choose("auto", ampere, numbers=62) == "unrolled"
    assert choose("loop", HOPPER, numbers=62) == "loop"


def test_groups_of_the_kernel_are_as_wide_as_a_warpgroup(simulated):
    with simulated():
        assert lane_run("kernel", seeds=200).layout == "2 x 128 on 1"


def test_losses_are_computed_side_by_side_on_a_gpu(monkeypatch):
    """As many as on a GPU, on a CPU: the same losses, whoever else is there."""
    problem = paper(4)
    slow = np.sort(np.random.default_rng(5).random((7, 3, 4)))
    fast = np.random.default_rng(6).standard_normal((7, 3, 5))
    alone = _sgd.population_loss(problem, fast, slow)
    program = _sgd._loss_program

    def together(mesh, static, at_once):
        assert at_once == 1
        return program(mesh, static, 4)

    monkeypatch.setattr(_sgd, "_loss_program", together)
    found = _sgd.population_loss(problem, fast, slow)
    np.testing.assert_allclose(found, alone, rtol=1e-13)


def test_sgd_refuses_an_engine_that_cannot_run():
    settings = {"key": jax.random.key(0), "epsilon": 0.1, "step_size": 0.1, "tau": [0.1]}
    with pytest.raises(ValueError, match="`engine` must be one of .*'general'.*got 'gpu'"):
        tts.sgd(paper(2), engine="gpu", **settings)
    with pytest.raises(ValueError, match="'kernel' here: .* a CPU. Leave it at 'auto'"):
        tts.sgd(paper(2), engine="kernel", **settings)
    with pytest.raises(ValueError, match="for an optimizer, got 'loop'"):
        tts.sgd(paper(2), engine="loop", optimizer=optax.sgd(0.1), **settings)
