"""The engines on a GPU that has the kernel: against the CPU and NumPy, and promises on seeds.

`make test-gpu` runs this file; without such a GPU its tests fail and say so.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import JUMPS, VALUES
from reference import numpy_sgd
from scipy.integrate import solve_ivp

import tts_jax as tts
from tts_jax import _kernel, _lanes, _random, _sgd


pytestmark = pytest.mark.gpu

LANE_ENGINES = ["kernel", "unrolled", "loop"]
RATES = {"epsilon": 0.05, "step_size": 0.02}
TARGET = {"jumps": JUMPS, "values": VALUES}
SEEDS = 300  # three groups of the kernel, the last with idle lanes


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """The GPU, which must be one that runs the kernel."""
    device = jax.local_devices()[0]
    reason = _kernel.obstacle(device, np.float32, 1)
    if reason is not None:
        pytest.fail(f"the GPU kernel does not run here: {reason}")
    return device


@contextlib.contextmanager
def on_cpu():
    """Let the package see the CPU alone."""
    (cpu, *_) = jax.devices("cpu")
    with pytest.MonkeyPatch.context() as patch, jax.default_device(cpu):
        patch.setattr(jax, "local_devices", lambda: [cpu])
        patch.setattr(jax, "default_backend", lambda: "cpu")
        yield


def paper(neurons=5, eta=0.2):
    target = tts.PiecewiseConstant(JUMPS, VALUES)
    return tts.Univariate(target, neurons=neurons, eta=eta, noise=1.0)


def lane_run(device, engine, *, neurons=5, seeds=SEEDS, dtype="float32", gradient="exact"):
    problem = paper(neurons)
    slow = np.sort(np.random.default_rng(0).random((seeds, neurons)), axis=1)
    state = tts.State(np.zeros((seeds, neurons + 1)), slow)
    streams, _ = _random.seed_keys(jax.random.key(1), seeds)
    cell = _lanes.Cell(problem, state, _random.key_words(streams), **RATES)
    options = {"gradient": gradient, "dtype": dtype, "devices": [device], "engine": engine}
    return _lanes.LaneRun([cell], **options)


def states_after(device, engine, parts, *, first=0, **options):
    """The states after steps `first`, ..., `first` + sum(parts) − 1, taken in parts."""
    run = lane_run(device, engine, **options)
    assert run.engine == engine
    run.steps = first
    for part in parts:
        run.advance(part)
    return run.read()


def rounding(dtype):
    """What the roundings of numbers of size 1 may come to."""
    return {"rtol": 0, "atol": 128 * np.finfo(dtype).eps}


def assert_same_bits(found, expected):
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)


# --- SGD: the same steps as elsewhere -----------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "dtype", "neurons", "gradient"),
    [
        ("kernel", "float32", 5, "exact"),
        ("kernel", "float32", 20, "exact"),
        ("kernel", "float32", 40, "exact"),
        ("kernel", "float64", 5, "exact"),
        ("kernel", "float64", 20, "exact"),
        ("kernel", "float32", 20, "box"),
        ("kernel", "float64", 5, "box"),
        ("unrolled", "float32", 20, "exact"),
        ("unrolled", "float64", 5, "box"),
    ],
)
def test_engines_take_the_steps_of_the_loop(engine, dtype, neurons, gradient, gpu):
    """On a CPU and on the GPU; the high word of the step number changes on the way."""
    options = {"first": 2**32 - 13, "dtype": dtype, "neurons": neurons, "gradient": gradient}
    found = states_after(gpu, engine, [40], **options)
    for device in (jax.devices("cpu")[0], gpu):
        expected = states_after(device, "loop", [40], **options)
        for left, right in zip(found, expected, strict=True):
            close = np.isclose(left, right, **rounding(dtype)).all(axis=1)
            # a seed whose sample is within rounding of an edge of the box goes its own way
            assert np.mean(close) >= (1.0 if gradient == "exact" else 0.98)
            assert np.max(np.abs(right)) > 0.5


@pytest.mark.parametrize("engine", LANE_ENGINES)
def test_many_steps_against_numpy(engine, gpu):
    """The published loop in NumPy, float64, on the samples of each seed."""
    steps, first = 1500, 2**32 - 700
    problem, run = paper(), lane_run(gpu, engine, seeds=3, dtype="float64")
    start = run.read()
    run.steps = first
    run.advance(steps)
    found = run.read()
    with on_cpu():
        streams, _ = _random.seed_keys(jax.random.key(1), 3)
        every_step = jnp.arange(first, first + steps)
        samples = jax.vmap(
            lambda key: jax.vmap(lambda step: problem.sample(key=key, step=step))(every_step)
        )(streams)
    x, noise = map(np.asarray, samples)
    for seed in range(3):
        expected = numpy_sgd(start.slow[seed], x[seed], noise[seed], eta=0.2, **RATES, **TARGET)
        np.testing.assert_allclose(found.fast[seed], expected[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.slow[seed], expected[1], rtol=0, atol=1e-9)
        assert np.max(np.abs(found.slow[seed] - start.slow[seed])) > 0.1


SETTINGS = {"key": jax.random.key(3), "tau": [0.0, 0.02, 0.1], **RATES}


def test_sgd_chooses_the_engine_and_answers_as_on_a_cpu(gpu):
    answer = tts.sgd(paper(), seeds=SEEDS, **SETTINGS)
    assert dict(answer.notes)["engine"] == "kernel"
    with on_cpu():
        expected = tts.sgd(paper(), seeds=SEEDS, **SETTINGS)
    assert dict(expected.notes)["engine"] in ("simd", "loop")
    for name in ("fast", "slow", "loss"):
        np.testing.assert_allclose(getattr(answer, name), getattr(expected, name), atol=1e-4)
    assert np.max(np.abs(answer.slow[:, -1] - answer.slow[:, 0])) > 0.01
    big = tts.sgd(paper(35), seeds=2, dtype="float64", **SETTINGS)
    assert dict(big.notes)["engine"] == "unrolled"


def test_given_samples_are_replayed_by_the_unrolled_loop(gpu):
    """Against the published loop in NumPy."""
    rng = np.random.default_rng(2)
    problem, starts = paper(), np.sort(rng.random((3, 5)), axis=1)
    x, noise = rng.random((3, 500)), 2 * rng.random((3, 500)) - 1
    for engine, used in (("auto", "unrolled"), ("general", "general")):
        answer = tts.sgd(
            problem,
            state=problem.state(slow=starts),
            samples=(x, noise),
            tau=[500 * 0.05 * 0.02],
            dtype="float64",
            engine=engine,
            **RATES,
        )
        assert dict(answer.notes)["engine"] == used
        for seed in range(3):
            fast, slow = numpy_sgd(starts[seed], x[seed], noise[seed], eta=0.2, **RATES, **TARGET)
            np.testing.assert_allclose(answer.fast[seed, 0], fast, rtol=0, atol=1e-10)
            np.testing.assert_allclose(answer.slow[seed, 0], slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_general_engine_takes_the_steps_of_the_lanes(dtype, gpu):
    options = SETTINGS | {"seeds": 40, "dtype": dtype}
    general = tts.sgd(paper(20), engine="general", **options)
    with on_cpu():
        expected = tts.sgd(paper(20), engine="general", **options)
    kernel = tts.sgd(paper(20), engine="kernel", **options)
    atol = 1e-4 if dtype == "float32" else 1e-12
    for other in (expected, kernel):
        np.testing.assert_allclose(general.fast, other.fast, rtol=0, atol=atol)
        np.testing.assert_allclose(general.slow, other.slow, rtol=0, atol=atol)
    assert np.max(np.abs(general.slow[:, -1] - general.slow[:, 0])) > 0.01


# --- SGD: promises on seeds ---------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["kernel", "unrolled"])
def test_seeds_do_not_depend_on_their_number_or_on_calls(engine, gpu, monkeypatch):
    options = SETTINGS | {"engine": engine}
    many = tts.sgd(paper(), seeds=SEEDS, **options)
    assert len(np.unique(np.asarray(many.slow[:, -1, 0]))) == SEEDS
    for seeds in (1, 130):
        few = tts.sgd(paper(), seeds=seeds, **options)
        assert_same_bits((few.fast, few.slow), (many.fast[:seeds], many.slow[:seeds]))
        np.testing.assert_allclose(few.loss, many.loss[:seeds], rtol=1e-12)
    monkeypatch.setattr(_sgd, "_CALL_SECONDS", 1e-6)
    monkeypatch.setattr(_sgd, "_FIRST_CALL", 37)
    parts = tts.sgd(paper(), seeds=SEEDS, **options)
    assert_same_bits((parts.fast, parts.slow), (many.fast, many.slow))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_run_resumes_to_the_same_bits(dtype, gpu):
    whole, first, second = (lane_run(gpu, "kernel", dtype=dtype) for _ in range(3))
    whole.advance(1000)
    first.advance(333)
    second.restore(first.save(), first.steps)
    second.advance(667)
    assert_same_bits(second.read(), whole.read())


@pytest.mark.parametrize("engine", ["kernel", "unrolled", "general"])
def test_a_diverging_seed_is_frozen_and_leaves_its_warp_alone(engine, gpu):
    problem, seeds = paper(), 40
    slow = np.sort(np.random.default_rng(2).random((seeds, 5)), axis=1)
    fast = np.zeros((seeds, 6))
    options = SETTINGS | {"engine": engine, "dtype": "float32"}
    good = tts.sgd(problem, state=tts.State(fast, slow), **options)
    assert np.all(good.success)
    fast[7] = 1e30
    bad = tts.sgd(problem, state=tts.State(fast, slow), **options)
    others = np.arange(seeds) != 7
    np.testing.assert_array_equal(bad.status, np.where(others, 0, tts.Status.DIVERGED))
    for name in ("fast", "slow", "loss"):
        found, expected = np.asarray(getattr(bad, name)), np.asarray(getattr(good, name))
        np.testing.assert_array_equal(found[others], expected[others])
        assert np.isnan(found[7, 1:]).all()


# --- flow and limits ----------------------------------------------------------------------------

TAU = np.linspace(0.0, 0.035, 8)
EPSILON = 2e-5


@pytest.fixture(scope="module")
def separate(problem):
    """64 starts of the paper's problem in which few neurons come to overlap."""
    rng = np.random.default_rng(1)
    return problem.state(slow=(np.arange(20) + 0.2 + 0.6 * rng.random((64, 20))) / 20)


def check_lanes(answer, expected, fast, slow):
    assert np.all(answer.success)
    # in the limit, weights of neurons that meet are not determined
    lanes = np.max(np.abs(expected.fast), axis=(1, 2)) < 10.0
    assert np.mean(lanes) > 0.9
    for name, atol in (("fast", fast), ("slow", slow), ("loss", slow)):
        found, wanted = (np.asarray(getattr(one, name))[lanes] for one in (answer, expected))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=name)
    assert np.max(np.abs(expected.slow[:, -1] - expected.slow[:, 0])) > 0.01


def test_flow_and_limit_by_the_loop(problem, separate, gpu):
    """Against the engine for CPUs, which is another program, and one lane against LSODA."""
    options = {"tau": TAU, "rtol": 1e-8, "atol": 1e-8}
    with on_cpu():
        flow = tts.flow(problem, separate, epsilon=EPSILON, engine="simd", **options)
        limit = tts.limit(problem, separate, engine="simd", **options)
    found = tts.flow(problem, separate, epsilon=EPSILON, engine="loop", **options)
    check_lanes(found, flow, fast=1e-7, slow=1e-8)
    reduced = tts.limit(problem, separate, engine="loop", **options)
    check_lanes(reduced, limit, fast=1e-5, slow=1e-8)
    scale = np.where(np.arange(41) < 21, 1 / EPSILON, 1.0)
    with on_cpu():
        field = jax.jit(lambda y: jnp.concatenate(problem.fields(y[:21], y[21:])))
        jacobian = jax.jit(lambda y: problem.jacobian(y[:21], y[21:]))
        expected = solve_ivp(
            lambda t, y: scale * np.asarray(field(y)),
            (0, TAU[-1]),
            np.concatenate([separate.fast[0], separate.slow[0]]),
            method="LSODA",
            t_eval=TAU,
            rtol=1e-12,
            atol=1e-12,
            jac=lambda t, y: scale[:, None] * np.asarray(jacobian(y)),
        )
    y = np.concatenate([found.fast[0], found.slow[0]], axis=1)
    np.testing.assert_allclose(y, expected.y.T, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def small():
    """Eight random starts of a problem of five neurons, times."""
    problem = paper(5, eta=0.05)
    starts = np.sort(np.random.default_rng(4).random((8, 5)), axis=1)
    return problem, problem.state(slow=starts), np.array([0.0, 0.002, 0.01, 0.03])


@pytest.mark.parametrize(
    ("neurons", "eta", "epsilon"),
    [(5, 4e-3, 0.1), (20, 4e-3, 2e-5), (20, 4e-3, 0.0), (40, 4e-2, 1e-3), (100, 4e-3, 2e-5)],
)
def test_cuda_has_the_bits_of_simd(neurons, eta, epsilon, gpu):
    """Random starts, some with neurons that coincide, lie on jumps or straddle an end."""
    problem = paper(neurons, eta=eta)
    slow = np.random.default_rng(3).random((300, neurons))
    slow[::7, 1] = slow[::7, 0]
    slow[::5, 2] = JUMPS[0]
    slow[::3, 3] = 1.0 - eta / 5
    options = {"tau": TAU, "rtol": 1e-6, "atol": 1e-6}
    method = tts.flow if epsilon else tts.limit
    options |= {"epsilon": epsilon} if epsilon else {}
    state = problem.state(slow=slow)
    found = method(problem, state, engine="cuda", **options)
    expected = method(problem, state, engine="simd", **options)
    assert np.all(expected.success)
    assert_same_bits(jax.tree.leaves(found), jax.tree.leaves(expected))
    assert found.slow.devices() == {gpu}


def test_cuda_leaves_wide_bands_to_the_cpu_and_tells_of_failures(gpu):
    problem = paper(40, eta=0.9)  # all neurons overlap
    state = problem.state(slow=np.random.default_rng(4).random((40, 40)))
    options = {"epsilon": 0.1, "tau": [0.0, 0.01, 0.02]}
    found, expected = (
        tts.flow(problem, state, engine=engine, **options) for engine in ("cuda", "simd")
    )
    assert np.all(found.success)
    assert np.max(found.stats["bandwidth"]) == 39
    assert_same_bits((found.fast, found.slow), (expected.fast, expected.slow))
    short = tts.flow(
        paper(20, 4e-3),
        paper(20, 4e-3).state(slow=np.random.default_rng(5).random((40, 20))),
        epsilon=2e-5,
        tau=TAU,
        engine="cuda",
        max_steps=60,
    )
    assert np.all(short.status == tts.Status.MAX_STEPS)
    reached = np.asarray(short.stats["reached"])
    np.testing.assert_array_equal(np.isfinite(short.loss), TAU <= reached[:, None])


def test_auto_takes_the_cores_beside_the_gpu(gpu):
    problem = paper(5, eta=0.05)
    slow = np.random.default_rng(4).random((10, 5))
    answer = tts.flow(problem, problem.state(slow=slow), epsilon=0.01, tau=[0.01])
    assert dict(answer.notes)["engine"] == "simd"


def test_flow_by_diffrax(small, gpu):
    problem, starts, tau = small
    settings = {"epsilon": 0.01, "tau": tau, "rtol": 1e-9, "atol": 1e-9}
    with on_cpu():
        expected = tts.flow(problem, starts, engine="simd", **settings)
    found = tts.flow(problem, starts, engine="diffrax", **settings)
    check_lanes(found, expected, fast=1e-7, slow=1e-7)


def test_sharp_limit(small, gpu):
    problem, starts, tau = small
    with on_cpu():
        expected = tts.sharp_limit(problem, starts, tau=tau)
    found = tts.sharp_limit(problem, starts, tau=tau)
    check_lanes(found, expected, fast=1e-12, slow=1e-12)
