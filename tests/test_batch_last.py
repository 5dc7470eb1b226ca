"""Any problem in lanes: its sample loss written batch-last, on every engine."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tts_jax as tts
from tts_jax import _batch_last, _kernel, _lanes, _sgd
from tts_jax._random import key_words, step_words, symmetric_uniform, threefry2x32, unit_uniform


class Hinges(tts.AbstractProblem):
    """Σ_k y_k max(x − u_k, 0)² + b fits `level`·x² + noise on [0, 1]; fast {y, b}, slow u."""

    level: float = 1.0
    noise: float = 0.5
    count: int = eqx.field(static=True, default=5)

    lanes: ClassVar = True

    def init(self, *, key):
        slow = jnp.sort(jax.random.uniform(key, (self.count,)))
        return tts.State({"y": jnp.zeros(self.count), "b": jnp.zeros(())}, slow)

    def fit(self, fast, slow, x):
        ramps = jnp.maximum(x - slow, 0)
        return jnp.sum(fast["y"] * ramps**2, axis=0) + fast["b"]

    def loss(self, fast, slow):
        x = (jnp.arange(100) + 0.5) / 100
        fits = jax.vmap(lambda one: self.fit(fast, slow, one))(x)
        return jnp.mean((fits - self.level * x**2) ** 2)

    def critical(self, slow):
        return {"y": jnp.zeros_like(slow), "b": jnp.zeros(())}

    def sample(self, *, key, step):
        first, second = threefry2x32(key_words(key), step_words(step))
        return {"x": unit_uniform(first, "float64"), "e": symmetric_uniform(second, "float64")}

    def sample_loss(self, fast, slow, sample):
        label = self.level * sample["x"] ** 2 + self.noise * sample["e"]
        return (self.fit(fast, slow, sample["x"]) - label) ** 2


class RowSums(Hinges):
    """The same with the sum that XLA vectorises."""

    def fit(self, fast, slow, x):
        ramps = jnp.maximum(x - slow, 0)
        return _batch_last.sum_rows(fast["y"] * ramps**2) + fast["b"]


class Normal(Hinges):
    """The same with draws of `jax.random`."""

    def sample(self, *, key, step):
        x, e = jax.random.normal(jax.random.fold_in(key, step), (2,))
        return {"x": x, "e": e}


class Planes(tts.AbstractProblem):
    """Regression on x in R^d: y · (x − u) fits `slopes` · x; a sample is (x [d], noise)."""

    slopes: jax.Array

    lanes: ClassVar = True

    def init(self, *, key):
        slow = jax.random.normal(key, self.slopes.shape) / 4
        return tts.State(jnp.zeros(self.slopes.shape), slow)

    def loss(self, fast, slow):
        return jnp.sum((fast - self.slopes) ** 2) / 3 + jnp.sum(fast * slow) ** 2

    def critical(self, slow):
        return self.slopes

    def sample(self, *, key, step):
        high, low = key_words(key)
        counter = step_words(step)
        words = [
            threefry2x32((high, low ^ np.uint32(k)), counter)[0]
            for k in range(len(self.slopes) + 1)
        ]
        draws = [symmetric_uniform(word, "float64") for word in words]
        return jnp.stack(draws[1:]), draws[0]

    def sample_loss(self, fast, slow, sample):
        x, noise = sample
        label = sum(self.slopes[k] * x[k] for k in range(len(x))) + noise
        return (jnp.sum(fast * (x - slow), axis=0) - label) ** 2


def planes(size=3):
    return Planes(np.linspace(-1.0, 1.0, size))


SETTINGS = {"epsilon": 0.02, "step_size": 0.05, "key": jax.random.key(11)}


def run(problem, engine, *, seeds=5, steps=(0, 7, 400), dtype="float64", **options):
    settings = SETTINGS | options
    tau = np.array(steps) * settings["epsilon"] * settings["step_size"]
    return tts.sgd(problem, engine=engine, seeds=seeds, tau=tau, dtype=dtype, **settings)


def engine_of(answer):
    return dict(answer.notes)["engine"]


def check_same(left, right, **tolerance):
    for one, other in zip(
        jax.tree.leaves((left.fast, left.slow)),
        jax.tree.leaves((right.fast, right.slow)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.fixture(autouse=True)
def short_body(monkeypatch):
    """A short body of the unrolled loop, which compiles soon."""
    monkeypatch.setattr(_kernel, "UNROLL", 2)


# --- engines agree --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "kind", "dtype"),
    [
        ("loop", Hinges, "float32"),
        ("loop", RowSums, "float64"),
        ("loop", Normal, "float32"),
        ("unrolled", Normal, "float64"),
        ("unrolled", RowSums, "float32"),
    ],
)
def test_xla_loops_take_the_steps_of_the_general_path(kind, engine, dtype):
    general = run(kind(), "general", dtype=dtype)
    lanes = run(kind(), engine, dtype=dtype)
    assert engine_of(lanes) == engine
    check_same(lanes, general, atol=1e-12 if dtype == "float64" else 2e-5)
    assert np.max(np.abs(lanes.slow[:, -1] - lanes.slow[:, 0])) > 1e-3
    assert np.all(np.asarray(lanes.success))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [Hinges, RowSums])
@pytest.mark.parametrize("seeds", [3, 40])  # rows in the vectors, lanes in the vectors
def test_our_compiler_takes_the_steps_of_the_general_path(kind, seeds, dtype):
    general = run(kind(), "general", dtype=dtype, seeds=seeds)
    lanes = run(kind(), "simd", dtype=dtype, seeds=seeds)
    assert engine_of(lanes) == "simd"
    check_same(lanes, general, atol=1e-12 if dtype == "float64" else 2e-5)


@pytest.mark.parametrize("problem", [Normal(), planes(3)])
def test_what_our_compiler_refuses_runs_in_the_loop(problem):
    lanes = run(problem, "auto")
    assert engine_of(lanes) == "loop"
    check_same(lanes, run(problem, "general"), atol=1e-12)
    with pytest.raises(ValueError, match="'simd' here: .*Leave it at 'auto'"):
        run(problem, "simd")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("problem", [Hinges(), planes(2)])
def test_given_samples(problem, own):
    rng = np.random.default_rng(0)
    lead = (5, 400) if own else (400,)
    form = jax.eval_shape(lambda: problem.sample(key=jax.random.key(0), step=np.int64(0)))
    samples = jax.tree.map(lambda leaf: rng.random((*lead, *leaf.shape)), form)
    check_same(
        run(problem, "auto", samples=samples),
        run(problem, "general", samples=samples),
        atol=1e-12,
    )


def test_the_sample_of_a_lane_is_that_of_the_problem():
    problem, seeds, steps = planes(2), 3, [0, 5, 2**32 + 1]
    keys = jax.random.split(jax.random.key(4), seeds)
    state = tts.State(np.zeros((2, seeds)), np.zeros((2, seeds)))
    options = {"step_size": 0.1, "epsilon": 0.1, "gradient": "exact", "dtype": np.float64}
    lanes = problem.lane_start(state, **options)
    key = tuple(word[None] for word in key_words(keys))
    high, low = (
        np.array(words, np.uint32)[:, None] for words in zip(*map(step_words, steps), strict=True)
    )
    x, noise = problem.lane_sample(lanes.shared, lanes.fixed, key, (high, low))
    assert (x.shape, noise.shape) == ((3, 2, seeds), (3, seeds))
    for row, step in enumerate(steps):
        for lane in range(seeds):
            one = problem.sample(key=keys[lane], step=step)
            np.testing.assert_array_equal(x[row, :, lane], one[0])
            np.testing.assert_array_equal(noise[row, lane], one[1])


# --- promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["simd", "loop"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neither_width_nor_seeds_change_a_bit(engine, dtype):
    problem, keys = RowSums(), jax.random.split(jax.random.key(2), 40)
    state = jax.tree.map(np.asarray, jax.vmap(lambda key: problem.init(key=key))(keys))
    words = np.asarray(key_words(keys))
    ends = []
    for seeds, width in [(40, 16), (40, 64), (7, 1 if engine == "simd" else 16)]:
        first = jax.tree.map(lambda leaf, seeds=seeds: leaf[:seeds], state)
        cell = _lanes.Cell(problem, first, tuple(words[:, :seeds]), 0.05, 0.02)
        options = {"gradient": "exact", "dtype": dtype, "engine": engine, "width": width}
        lanes = _lanes.LaneRun([cell], **options)
        lanes.advance(100)
        ends.append(jax.tree.leaves(lanes.read()))
    for other in ends[1:]:
        for left, right in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(left[: len(right)], right)
    assert not np.array_equal(ends[0][2], state.slow)


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_a_diverged_lane_is_frozen_and_its_neighbours_run_on(engine):
    problem = Hinges()
    state = tts.State({"y": np.zeros((4, 5)), "b": np.zeros(4)}, np.full((4, 5), 0.3))
    broken = tts.State({"y": np.zeros((4, 5)), "b": np.array([0, 0, 3e38, 0])}, state.slow)
    whole = run(problem, engine, seeds=4, state=state, dtype="float32", step_size=0.9)
    ends = run(problem, engine, seeds=4, state=broken, dtype="float32", step_size=0.9)
    np.testing.assert_array_equal(ends.status, [0, 0, tts.Status.DIVERGED, 0])
    assert np.isnan(ends.slow[2, -1]).all()
    assert np.isfinite(ends.slow[2, 0]).all()
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(ends.slow[others], whole.slow[others])
    words = tuple(np.asarray(key_words(jax.random.split(jax.random.key(0), 4))))
    cell = _lanes.Cell(problem, broken, words, 0.9, 0.02)
    lanes = _lanes.LaneRun([cell], gradient="exact", dtype=np.float32, engine=engine)
    lanes.advance(10)
    before = lanes.save()
    lanes.advance(10)
    for old, new in zip(before, lanes.save(), strict=True):
        np.testing.assert_array_equal(old[..., 2], new[..., 2])
        assert not np.array_equal(old[..., 0], new[..., 0])


class Drift(Hinges):
    """A constant slope of 1 in every variable."""

    def sample_loss(self, fast, slow, sample):
        return jnp.sum(fast["y"] + slow, axis=0) + fast["b"] + 0 * sample["x"]


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_steps_below_the_spacing_of_float32_add_up(engine):
    """1000 steps of 2⁻³⁰ from 1, where float32 numbers are 2⁻²³ apart."""
    state = tts.State({"y": np.ones(5), "b": np.ones(())}, np.ones(5))
    settings = {"step_size": 0.5, "epsilon": 2.0**-29, "state": state, "steps": (1000,)}
    end = run(Drift(), engine, dtype="float32", **settings)
    np.testing.assert_allclose(end.slow[:, -1] - 1, -1000 * 2.0**-30, rtol=1e-6)


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_a_new_value_of_a_number_does_not_compile_anew(engine):
    first = run(Hinges(level=1.0, noise=0.5), engine)
    program = _lanes._program(_sgd._compat.lane_mesh(jax.local_devices()[:1]), "cpu", "loop")
    before = program._cache_size(), _lanes._simd_kernel.cache_info().misses
    second = run(Hinges(level=2.0, noise=0.1), engine, epsilon=0.03, step_size=0.04)
    assert (program._cache_size(), _lanes._simd_kernel.cache_info().misses) == before
    expected = run(Hinges(level=2.0, noise=0.1), "general", epsilon=0.03, step_size=0.04)
    check_same(second, expected, atol=1e-12)
    assert not np.array_equal(first.slow, second.slow)


class Doubled(Hinges):
    """A second estimator, twice the gradient."""

    gradients: ClassVar = ("exact", "double")

    def sample_gradient(self, fast, slow, sample, *, gradient="exact"):
        slopes = super().sample_gradient(fast, slow, sample)
        return jax.tree.map(lambda leaf: leaf * (2 if gradient == "double" else 1), slopes)


def test_estimators_of_the_problem():
    double = run(Doubled(), "simd", gradient="double")
    check_same(double, run(Doubled(), "general", gradient="double"), atol=1e-12)
    assert not np.array_equal(double.slow, run(Doubled(), "simd").slow)
    with pytest.raises(ValueError, match="`gradient` must be one of 'exact', 'double'"):
        run(Doubled(), "simd", gradient="box")


def test_sums_over_rows_have_a_derivative():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)))
    weight = jnp.arange(3.0)
    slope = jax.grad(lambda rows: jnp.sum(weight * _batch_last.sum_rows(rows)))(rows)
    np.testing.assert_array_equal(slope, np.broadcast_to(weight, (7, 3)))
    np.testing.assert_allclose(_batch_last.sum_rows(rows), rows.sum(0), rtol=1e-14)
    np.testing.assert_array_equal(_batch_last.sum_rows(tuple(rows)), _batch_last.sum_rows(rows))


# --- refusals -------------------------------------------------------------------------------


class Whole(Hinges):
    def sample_loss(self, fast, slow, sample):
        return jnp.sum(fast["y"] * slow)


class Matrix(Hinges):
    def sample_loss(self, fast, slow, sample):
        return jnp.ones(self.count) @ fast["y"] + jnp.ones(self.count) * slow


@pytest.mark.parametrize(
    ("kind", "words"), [(Whole, r"shape \[lanes\], got shape \(\)"), (Matrix, "got an error")]
)
def test_a_sample_loss_that_takes_no_lanes_is_refused(kind, words):
    with pytest.raises(ValueError, match=f"`{kind.__name__}.sample_loss` must .*{words}"):
        run(kind(), "auto")


def test_the_kernel_of_a_gpu_needs_rows():
    hopper = type("Device", (), {"platform": "gpu", "compute_capability": "9.0"})
    options = {"dtype": "float32", "numbers": 20, "replay": False}
    assert _lanes.choose_engine("auto", hopper, rows=True, **options) == "kernel"
    assert _lanes.choose_engine("auto", hopper, rows=False, **options) == "unrolled"
    with pytest.raises(ValueError, match="rows of an array one by one"):
        _lanes.choose_engine("kernel", hopper, rows=False, **options)
    assert not Hinges().lane_rows
    assert tts.Univariate.lane_rows
