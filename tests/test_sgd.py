"""SGD: against the published run, against itself on other engines, and its promises on seeds."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import JUMPS, VALUES
from reference import numpy_sgd

import tts_jax as tts
from tts_jax import _lanes, _random, _sgd
from tts_jax._problem import AbstractProblem, State


TARGET = {"jumps": JUMPS, "values": VALUES}


def paper(neurons=20, noise=1.0, eta=4e-3, kind=None):
    target = tts.PiecewiseConstant(jumps=JUMPS, values=VALUES)
    return (kind or tts.Univariate)(target, neurons=neurons, eta=eta, noise=noise)


class Plain(tts.Univariate):
    """The same problem without its lanes."""

    lanes: ClassVar = False


class Wells(AbstractProblem):
    """A tree-shaped problem: y_k relaxes to x_k + ξ, and x is pulled to 1 through y."""

    target: float = 1.0

    def init(self, *, key):
        return State({"y": jnp.zeros(2)}, {"x": jax.random.normal(key, (2,))})

    def loss(self, fast, slow):
        return jnp.sum((fast["y"] - slow["x"]) ** 2 + (fast["y"] - self.target) ** 2)

    def critical(self, slow):
        return {"y": (slow["x"] + self.target) / 2}

    def sample(self, *, key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (2,))

    def sample_loss(self, fast, slow, sample):
        return jnp.sum((fast["y"] - slow["x"] - sample) ** 2 + (fast["y"] - self.target) ** 2)


# --- the published run ----------------------------------------------------------------------

# At equal rates (same_lr) rounding errors grow by 10 every 25,000 steps or so: from step 400,000
# on the published code no longer agrees with itself on another machine, nor when it adds the
# neurons in another order. Its first three checkpoints are out of reach of that.
CHECKPOINTS = {"quick": ["0", "1", "10", "50", "100"], "same_lr": ["0", "1", "10"]}


def published_stream(steps):
    """The stream of NumPy's legacy generator at seed 42: positions, then (x, noise) pairs."""
    generator = np.random.RandomState(42)
    positions = np.sort(generator.rand(20))
    pairs = generator.rand(steps, 2)
    return positions, (pairs[:, 0], 2 * pairs[:, 1] - 1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_replays_the_published_run(name, published):
    """Every reachable checkpoint of the published code, on its own stream, in a and u."""
    run, config = published[name], published[name]["config"]
    checkpoints = [run["checkpoints"][index] for index in CHECKPOINTS[name]]
    steps = np.array([checkpoint["step"] for checkpoint in checkpoints])
    problem = paper()
    positions, samples = published_stream(steps[-1])
    answer = tts.sgd(
        problem,
        state=problem.state(slow=positions),
        samples=samples,
        epsilon=config["epsilon"],
        step_size=config["h"],
        tau=steps * config["epsilon"] * config["h"],
        gradient="box",
        dtype=jnp.float64,
    )
    assert answer.stats["steps"][0] == steps[-1]
    for record, checkpoint in enumerate(checkpoints):
        # the published bias is neuron 0, frozen at −η/2
        np.testing.assert_allclose(answer.fast[0, record], checkpoint["a"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(answer.slow[0, record], checkpoint["u"][1:], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_at_equal_rates_rounding_errors_grow_until_runs_part_ways(published):
    """Two engines that add the neurons in different orders, on the published `same_lr` stream."""
    config = published["same_lr"]["config"]
    steps = np.array([99_990, 499_950])
    positions, samples = published_stream(steps[-1])
    runs = []
    for kind in (tts.Univariate, Plain):
        problem = paper(kind=kind)
        runs.append(
            tts.sgd(
                problem,
                state=problem.state(slow=positions),
                samples=samples,
                epsilon=config["epsilon"],
                step_size=config["h"],
                tau=steps * config["epsilon"] * config["h"],
                gradient="box",
                dtype=jnp.float64,
            )
        )
    apart = np.max(np.abs(runs[0].slow - runs[1].slow), axis=(0, 2))
    assert apart[0] <= 1e-10
    assert apart[1] >= 1e-6


@pytest.mark.parametrize("gradient", ["exact", "box"])
@pytest.mark.parametrize("kind", [tts.Univariate, Plain])
def test_replays_own_streams_of_each_seed(gradient, kind):
    rates = {"epsilon": 1e-3, "step_size": 2e-2}
    problem = paper(neurons=7, eta=0.05, kind=kind)
    rng = np.random.default_rng(0)
    starts = np.sort(rng.random((3, 7)), axis=1)
    x, noise = rng.random((3, 700)), 2 * rng.random((3, 700)) - 1
    answer = tts.sgd(
        problem,
        state=problem.state(slow=starts),
        samples=(x, noise),
        tau=[700 * rates["epsilon"] * rates["step_size"]],
        gradient=gradient,
        dtype="float64",
        **rates,
    )
    for seed in range(3):
        weights, positions = numpy_sgd(
            starts[seed], x[seed], noise[seed], eta=0.05, gradient=gradient, **rates, **TARGET
        )
        np.testing.assert_allclose(answer.fast[seed, 0], weights, rtol=0, atol=1e-12)
        np.testing.assert_allclose(answer.slow[seed, 0], positions, rtol=0, atol=1e-12)


def test_a_stream_longer_than_one_call_continues(monkeypatch):
    problem = paper(neurons=5)
    rng = np.random.default_rng(1)
    samples = rng.random(300), 2 * rng.random(300) - 1
    settings = {"seeds": 2, "epsilon": 1e-2, "step_size": 1e-2, "dtype": jnp.float64}
    settings |= {"samples": samples, "tau": [1e-2, 3e-2], "key": jax.random.key(0)}
    whole = tts.sgd(problem, **settings)
    monkeypatch.setattr(_lanes, "REPLAY_STEPS", 64)
    jax.clear_caches()
    parts = tts.sgd(problem, **settings)
    np.testing.assert_array_equal(whole.fast, parts.fast)
    np.testing.assert_array_equal(whole.slow, parts.slow)


# --- engines agree --------------------------------------------------------------------------


QUICK = [(1, "simd", 3), (6, "simd", 3), (20, "simd", 3), (75, "simd", 40), (20, "loop", 3)]
REST = set(itertools.product((1, 6, 20, 75), ("simd", "loop"), (3, 40))) - set(QUICK)


@pytest.mark.parametrize("gradient", ["exact", "box"])
@pytest.mark.parametrize(
    ("neurons", "engine", "seeds"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(REST))],
)
def test_lanes_agree_with_the_general_path(gradient, neurons, engine, seeds):
    settings = {
        "key": jax.random.key(5),
        "seeds": seeds,
        "epsilon": 1e-3,
        "step_size": 1e-2 if neurons < 75 else 1e-3,
        "tau": [0.0, 1e-4, 1e-3],
        "gradient": gradient,
        "dtype": jnp.float64,
    }
    lanes = tts.sgd(paper(neurons, eta=0.05), engine=engine, **settings)
    general = tts.sgd(paper(neurons, eta=0.05, kind=Plain), **settings)
    assert dict(lanes.notes)["engine"] == engine
    assert dict(general.notes)["engine"] == "general"
    np.testing.assert_allclose(lanes.fast, general.fast, rtol=0, atol=1e-11)
    np.testing.assert_allclose(lanes.slow, general.slow, rtol=0, atol=1e-11)
    np.testing.assert_allclose(lanes.loss, general.loss, rtol=1e-9)
    assert np.max(np.abs(lanes.slow[:, -1] - lanes.slow[:, 0])) > 1e-4


def test_sample_gradient_is_the_gradient_of_the_sample_loss():
    problem = paper(eta=0.1)
    state = problem.init(key=jax.random.key(0))
    fast = jax.random.normal(jax.random.key(1), state.fast.shape)
    for step in range(20):
        sample = problem.sample(key=jax.random.key(2), step=step)
        closed = problem.sample_gradient(fast, state.slow, sample)
        auto = jax.grad(problem.sample_loss, argnums=(0, 1))(fast, state.slow, sample)
        np.testing.assert_allclose(closed.fast, auto[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(closed.slow, auto[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["exact", "box"])
def test_sample_gradient_is_unbiased(gradient):
    """Both estimators average to −`fields`; the box does where f − f* is flat over its width."""
    problem = paper(neurons=4, eta=0.01, noise=0.5)
    slow = jnp.array([0.1, 0.3, 0.42, 0.9])
    fast = jnp.array([1.0, 0.5, -0.4, 0.8, 0.3])
    count = 200_000
    points = (jnp.arange(count) + 0.5) / count
    samples = (points, jnp.where(jnp.arange(count) % 2, 0.5, -0.5))
    batch = jax.vmap(lambda s: problem.sample_gradient(fast, slow, s, gradient=gradient))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), batch(samples))
    fields = problem.fields(fast, slow)
    np.testing.assert_allclose(mean.fast, -fields.fast, atol=1e-4)
    np.testing.assert_allclose(mean.slow, -fields.slow, atol=2e-3)


def test_optax_partition_takes_the_same_steps():
    problem = paper(neurons=5, eta=0.05)
    settings = {"key": jax.random.key(1), "seeds": 2, "dtype": jnp.float64}
    settings |= {"epsilon": 1e-2, "step_size": 1e-2, "tau": [0.0, 5e-2]}
    plain = tts.sgd(problem, **settings)
    rules = {"fast": optax.sgd(1e-2), "slow": optax.sgd(1e-4)}
    optimizer = optax.partition(rules, {"fast": "fast", "slow": "slow"})
    other = tts.sgd(problem, optimizer=optimizer, **settings)
    np.testing.assert_allclose(plain.fast, other.fast, rtol=0, atol=1e-11)
    np.testing.assert_allclose(plain.slow, other.slow, rtol=0, atol=1e-11)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(1e-3, momentum=0.9)])
def test_stateful_optimizers_run(optimizer):
    problem = paper(neurons=8, eta=0.05)
    answer = tts.sgd(
        problem,
        key=jax.random.key(1),
        seeds=2,
        epsilon=1e-2,
        step_size=1e-2,
        tau=[0.0, 0.2],
        optimizer=optimizer,
    )
    assert np.all(np.asarray(answer.success))
    assert np.all(answer.loss[:, -1] < 0.5 * answer.loss[:, 0])


def test_any_problem_with_tree_states():
    answer = tts.sgd(
        Wells(), key=jax.random.key(0), seeds=5, epsilon=0.1, step_size=0.02, tau=[0.0, 1.0, 20.0]
    )
    assert answer.fast["y"].shape == (5, 3, 2)
    assert answer.slow["x"].shape == (5, 3, 2)
    assert answer.loss.shape == (5, 3)
    np.testing.assert_allclose(np.mean(answer.slow["x"][:, -1]), 1.0, atol=0.2)
    few = tts.sgd(
        Wells(), key=jax.random.key(0), seeds=2, epsilon=0.1, step_size=0.02, tau=[0.0, 1.0, 20.0]
    )
    np.testing.assert_allclose(few.slow["x"], answer.slow["x"][:2], rtol=1e-12)


# --- promises on seeds ----------------------------------------------------------------------


QUICK = {"epsilon": 2e-5, "step_size": 1e-3, "key": jax.random.key(3)}


def test_seeds_do_not_depend_on_their_number():
    tau = np.array([0.0, 500, 3000]) * 2e-8
    many = tts.sgd(paper(), seeds=100, tau=tau, **QUICK)
    assert many.fast.shape == (100, 3, 21)
    assert many.slow.shape == (100, 3, 20)
    for seeds in (1, 3, 40):
        few = tts.sgd(paper(), seeds=seeds, tau=tau, **QUICK)
        for name in ("fast", "slow", "loss"):
            np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:seeds])
    assert len(np.unique(np.asarray(many.slow[:, 0, 0]))) == 100


def lane_run(problem, state, words, *, step_size=1e-3, epsilon=1e-3, gradient="exact", **options):
    cell = _lanes.Cell(problem, state, words, step_size, epsilon)
    return _lanes.LaneRun([cell], gradient=gradient, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("engine", "narrow"), [("simd", 1), ("loop", 16)])
def test_the_width_of_a_group_changes_nothing(dtype, engine, narrow):
    problem = paper()
    state = jax.vmap(lambda key: problem.init(key=key))(jax.random.split(jax.random.key(0), 20))
    state = jax.tree.map(np.asarray, state)
    words = _random.key_words(jax.random.split(jax.random.key(1), 20))
    ends = []
    for width in (narrow, 16, 32, 64, 128):
        run = lane_run(problem, state, words, dtype=dtype, width=width, engine=engine)
        run.advance(1500)
        ends.append(run.read())
    for end in ends[1:]:
        np.testing.assert_array_equal(end.fast, ends[0].fast)
        np.testing.assert_array_equal(end.slow, ends[0].slow)


def test_calls_of_any_length_give_the_same_numbers(monkeypatch):
    tau = np.array([5000]) * 2e-8
    whole = tts.sgd(paper(), seeds=2, tau=tau, **QUICK)
    monkeypatch.setattr(_sgd, "_CALL_SECONDS", 1e-6)
    for first in (37, 512, 4096):
        monkeypatch.setattr(_sgd, "_FIRST_CALL", first)
        parts = tts.sgd(paper(), seeds=2, tau=tau, **QUICK)
        np.testing.assert_array_equal(whole.fast, parts.fast)
        np.testing.assert_array_equal(whole.slow, parts.slow)
    more = tts.sgd(paper(), seeds=2, tau=np.arange(1, 51) * 100 * 2e-8, **QUICK)
    np.testing.assert_array_equal(whole.slow[:, -1], more.slow[:, -1])


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_a_saved_carry_resumes_to_the_same_bits(engine):
    problem = paper()
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], problem.init(key=jax.random.key(0)))
    words = _random.key_words(jax.random.split(jax.random.key(1), 1))
    whole, first, second = (
        lane_run(problem, state, words, dtype=np.float32, engine=engine) for _ in range(3)
    )
    whole.advance(1000)
    first.advance(333)
    second.carry, second.steps = jax.tree.map(np.asarray, first.carry), first.steps
    second.advance(667)
    np.testing.assert_array_equal(whole.read().slow, second.read().slow)


@pytest.mark.parametrize("engine", ["simd", "loop"])
def test_step_numbers_beyond_32_bits(engine):
    problem = paper(neurons=3)
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], problem.init(key=jax.random.key(0)))
    key = jax.random.key(9)
    words = tuple(word[None] for word in _random.key_words(key))
    rates = {"step_size": 1e-2, "epsilon": 1e-2}
    run = lane_run(problem, state, words, dtype=np.float64, engine=engine, **rates)
    run.steps = 2**32 - 7
    run.advance(20)
    x, noise = zip(
        *[problem.sample(key=key, step=step) for step in range(2**32 - 7, 2**32 + 13)],
        strict=True,
    )
    rates = {"epsilon": 1e-2, "step_size": 1e-2, "eta": 4e-3}
    weights, _ = numpy_sgd(state.slow[0], np.array(x), np.array(noise), **rates, **TARGET)
    np.testing.assert_allclose(run.read().fast[0], weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", [tts.Univariate, Plain])
def test_a_diverged_seed_never_touches_its_neighbours(dtype, kind):
    problem = paper(neurons=4, kind=kind)
    rng = np.random.default_rng(2)
    slow = np.sort(rng.random((5, 4)), axis=1)
    fast = np.zeros((5, 5))
    fast[2] = float(np.finfo(dtype).max) ** 0.8
    samples = rng.random((5, 400)), 2 * rng.random((5, 400)) - 1
    settings = {"epsilon": 1e-2, "step_size": 1e-2, "tau": [0.0, 1e-2, 4e-2], "dtype": dtype}
    answer = tts.sgd(problem, state=State(fast, slow), samples=samples, **settings)
    np.testing.assert_array_equal(answer.status, [0, 0, tts.Status.DIVERGED, 0, 0])
    assert np.all(np.isnan(answer.fast[2, 1:]))
    assert np.all(np.isnan(answer.loss[2, 1:]))
    assert np.all(np.isfinite(answer.fast[2, 0]))
    keep = np.array([0, 1, 3, 4])
    alone = tts.sgd(
        problem,
        state=State(fast[keep], slow[keep]),
        samples=tuple(leaf[keep] for leaf in samples),
        **settings,
    )
    np.testing.assert_array_equal(answer.fast[keep], alone.fast)
    np.testing.assert_array_equal(answer.slow[keep], alone.slow)
    with pytest.raises(RuntimeError, match=r"1 of 5 lanes: DIVERGED.*step_size"):
        tts.sgd(problem, state=State(fast, slow), samples=samples, throw=True, **settings)


def test_too_large_a_step_is_reported():
    answer = tts.sgd(
        paper(), seeds=2, key=jax.random.key(0), epsilon=1e-3, step_size=0.5, tau=[0.0, 1.0]
    )
    assert np.all(np.asarray(answer.status) == tts.Status.DIVERGED)


_TWO_DEVICES = """
    import json, sys
    import numpy as np
    from tts_jax import _compat
    started = _compat.configure_cpu() if {configure} else None
    import jax, jax.numpy as jnp, tts_jax as tts
    kind = type("Plain", (tts.Univariate,), {{"lanes": False}}) if {plain} else tts.Univariate
    target = tts.PiecewiseConstant(jumps={jumps}, values={values})
    answer = tts.sgd(kind(target, neurons=20, noise=1.0), seeds={seeds}, key=jax.random.key(3),
                     epsilon=2e-5, step_size=1e-3, tau=[0.0, 1e-5], dtype="float32")
    print(json.dumps(dict(devices=jax.local_device_count(), started=started,
                          again=_compat.configure_cpu(), fast=np.asarray(answer.fast).tolist(),
                          slow=np.asarray(answer.slow).tolist())))
"""


def _in_new_process(*, plain=False, configure=False, seeds=5, **environment):
    code = textwrap.dedent(_TWO_DEVICES).format(
        plain=plain, configure=configure, jumps=JUMPS, values=VALUES, seeds=seeds
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("plain", [False, True])
def test_devices_share_the_seeds_and_change_nothing(plain):
    seeds = 5 if plain else 20  # more than one group of lanes
    one = _in_new_process(plain=plain, seeds=seeds, JAX_NUM_CPU_DEVICES="1")
    two = _in_new_process(plain=plain, seeds=seeds, JAX_NUM_CPU_DEVICES="2")
    assert (one["devices"], two["devices"]) == (1, 2)
    atol = 1e-6 if plain else 0.0
    np.testing.assert_allclose(two["fast"], one["fast"], rtol=0, atol=atol)
    np.testing.assert_allclose(two["slow"], one["slow"], rtol=0, atol=atol)


def test_configure_cpu():
    default = _in_new_process(configure=True)
    assert default["started"] is True
    assert default["again"] is False
    assert default["devices"] == len(os.sched_getaffinity(0))
    target = tts.PiecewiseConstant(jumps=JUMPS, values=VALUES)
    problem = tts.Univariate(target, neurons=20, noise=1.0)
    plain = tts.sgd(problem, seeds=5, tau=[0.0, 1e-5], **QUICK)
    np.testing.assert_allclose(default["fast"], plain.fast, rtol=0, atol=1e-5)
    for own in (
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        {
            "JAX_NUM_CPU_DEVICES": "3",
            "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_slp_vectorizer",
        },
    ):
        kept = _in_new_process(configure=True, **own)
        assert kept["started"] is True
        assert kept["devices"] == 3


def test_float32_keeps_up_with_float64():
    """Offsets keep float32 within a small part of η where plain positions would drift."""
    settings = {"seeds": 4, "tau": [0.0, 200_000 * 2e-8], **QUICK}
    narrow = tts.sgd(paper(), **settings)
    wide = tts.sgd(paper(), dtype=jnp.float64, **settings)
    assert dict(narrow.notes)["dtype"] == "float32"
    assert np.max(np.abs(narrow.slow - wide.slow)) < 1e-3 * 4e-3
    assert np.max(np.abs(narrow.fast - wide.fast)) < 1e-3
    assert np.max(np.abs(wide.slow[:, 1] - wide.slow[:, 0])) > 0.2 * 4e-3


def test_x64_setting_does_not_matter():
    settings = {"seeds": 2, "tau": [0.0, 1e-5], **QUICK}
    on = tts.sgd(paper(), **settings)
    with jax.enable_x64(False):
        off = tts.sgd(paper(), **settings)
    for name in ("tau", "fast", "slow", "loss"):
        assert getattr(off, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(on, name), getattr(off, name))


# --- the answer -----------------------------------------------------------------------------


def test_recorded_times_are_steps():
    answer = tts.sgd(paper(), seeds=2, tau=[0.0, 1.26e-6, 4e-6], **QUICK)
    np.testing.assert_allclose(answer.tau, np.array([0, 63, 200]) * 2e-8, rtol=1e-15)
    assert answer.method == "sgd"
    assert answer.batch_dims == ("seed",)
    np.testing.assert_array_equal(answer.stats["steps"], [200, 200])
    loss = jax.vmap(jax.vmap(paper().loss))(answer.fast, answer.slow)
    np.testing.assert_allclose(answer.loss, loss, rtol=1e-12)
    assert answer.observables["recovery"].shape == (2, 3, 5)
    dataset = answer.to_xarray()
    assert dict(dataset.sizes)["seed"] == 2
    assert dataset.attrs["gradient"] == "exact"


def test_losses_of_many_records_are_computed_in_parts(monkeypatch):
    settings = {"seeds": 3, "tau": np.arange(5) * 2e-7, **QUICK}
    whole = tts.sgd(paper(), **settings)
    monkeypatch.setattr(_sgd, "_LOSS_BATCH", 4)
    parts = tts.sgd(paper(), **settings)
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-13)


def test_starts():
    problem = paper()
    answer = tts.sgd(problem, seeds=3, tau=[0.0], **QUICK)
    _, keys = _random.seed_keys(QUICK["key"], 3)
    for seed in range(3):
        start = problem.init(key=keys[seed])
        np.testing.assert_array_equal(answer.fast[seed, 0], start.fast)
        np.testing.assert_allclose(answer.slow[seed, 0], start.slow, rtol=1e-14)
    shared = tts.sgd(problem, state=start, seeds=4, tau=[0.0, 2e-6], **QUICK)
    np.testing.assert_allclose(shared.slow[:, 0], np.tile(start.slow, (4, 1)), rtol=1e-14)
    assert len(np.unique(np.asarray(shared.fast[:, 1, 0]))) == 4


def test_progress_bar(capsys):
    tts.sgd(paper(), seeds=1, tau=[0.0, 2e-5], progress=True, **QUICK)
    assert "sgd: 100%" in capsys.readouterr().err
    tts.sgd(paper(), seeds=1, tau=[0.0, 2e-5], **QUICK)
    assert capsys.readouterr().err == ""


def test_other_settings_do_not_compile_anew():
    problem = paper(neurons=9)
    tts.sgd(problem, seeds=2, tau=[1e-6], engine="loop", **QUICK)
    tts.sgd(problem, seeds=2, tau=[1e-6], engine="simd", **QUICK)
    target = tts.PiecewiseConstant(jumps=[0.1, 0.2, 0.3, 0.4, 0.5], values=[0, 1, 0, 1, 0, 1])
    other = tts.Univariate(target, neurons=9, eta=1e-2, noise=0.5)
    program = _lanes._program(_sgd._compat.lane_mesh(jax.local_devices()[:1]), "cpu", "loop")
    before = program._cache_size(), _lanes._simd_kernel.cache_info().misses
    settings = QUICK | {"epsilon": 1e-3, "step_size": 1e-2}
    for engine in ("loop", "simd"):
        tts.sgd(other, seeds=2, tau=[1e-4, 1e-3], engine=engine, **settings)
    assert (program._cache_size(), _lanes._simd_kernel.cache_info().misses) == before


def test_the_compiled_step_computes_nothing_twice():
    """Fails when a JAX release undoes the fences of `_compat`."""
    problem = paper()
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], problem.init(key=jax.random.key(0)))
    words = _random.key_words(jax.random.split(jax.random.key(1), 1))
    run = lane_run(problem, state, words, dtype=np.float32, engine="loop")
    text = run.lower().compile().as_text()
    divisions = [line for line in text.splitlines() if " divide(" in line and "f32[" in line]
    assert len(divisions) == 1
    # the rotations of one Threefry block, for word 0 and again for word 1
    turns = [line for line in text.splitlines() if " shift-left(" in line]
    assert len(turns) <= 40


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": -0.1}, r"Argument `step_size` must be positive, got -0\.1"),
        ({"step_size": 0.0}, "Argument `step_size` must be positive"),
        ({"epsilon": float("nan")}, "Argument `epsilon` must be positive"),
        ({"epsilon": [1e-2, 1e-3]}, "Argument `epsilon` must be one number"),
        ({"tau": [0.1, 0.1]}, "Argument `tau` must .* increasing"),
        ({"tau": [0.2, 0.1]}, "Argument `tau` must .* increasing"),
        ({"tau": [-0.1, 0.1]}, "Argument `tau` must"),
        ({"tau": [0.0, float("nan")]}, "Argument `tau` must"),
        ({"tau": []}, "Argument `tau` must"),
        ({"tau": [0.0, 1e-9]}, "both at step 0: one step is"),
        ({"gradient": "sharp"}, "Argument `gradient` must be one of 'exact', 'box'"),
        ({"dtype": "float16"}, "Argument `dtype` must be float32 or float64"),
        ({"dtype": "quux"}, "Argument `dtype` must be float32 or float64"),
        ({"seeds": 0}, "Argument `seeds` must be an integer of at least 1"),
        ({"seeds": 2.5}, "Argument `seeds` must be an integer of at least 1"),
        ({"key": None}, "Argument `key` must be a random key to draw the starts"),
        ({"key": 0}, "Argument `key` must be a random key, got 0"),
        ({"key": jax.random.split(jax.random.key(0))}, "Argument `key` must be a single key"),
        ({"state": State(np.zeros(3), np.zeros(20))}, "Argument `state` must"),
        ({"state": State(np.zeros((2, 2, 21)), np.zeros((2, 2, 20)))}, "Argument `state` must"),
        ({"state": State(np.zeros((3, 21)), np.zeros((3, 20)))}, "agree on the number of seeds"),
        ({"state": State(np.zeros(21), np.full(20, np.nan))}, r"Argument `state\.slow` must be"),
        ({"samples": (np.zeros(10), np.zeros(10))}, "`samples` must hold at least the 100 steps"),
        ({"samples": np.zeros(100)}, "Argument `samples` must have the structure"),
        ({"samples": (np.zeros((5, 100)), np.zeros((5, 100)))}, "agree on the number of seeds"),
        ({"samples": (np.zeros(100), np.zeros(101))}, "same leading axes"),
        ({"samples": (np.full(100, np.nan), np.zeros(100))}, "Argument `samples` must be finite"),
    ],
)
def test_bad_arguments(change, message):
    settings = {"seeds": 2, "key": jax.random.key(0), "tau": [0.0, 1e-4]}
    settings |= {"epsilon": 1e-3, "step_size": 1e-3} | change
    with pytest.raises(ValueError, match=message):
        tts.sgd(paper(), **settings)


def test_key_is_needed_only_for_what_is_drawn():
    problem = paper()
    settings = {"epsilon": 1e-3, "step_size": 1e-3, "tau": [1e-5]}
    start, samples = problem.state(slow=np.linspace(0.1, 0.9, 20)), (np.full(10, 0.5), np.zeros(10))
    tts.sgd(problem, state=start, samples=samples, **settings)
    with pytest.raises(ValueError, match="to draw the samples"):
        tts.sgd(problem, state=start, **settings)
    with pytest.raises(ValueError, match="to draw the starts"):
        tts.sgd(problem, samples=samples, **settings)


def test_a_problem_without_samples_is_refused():
    class Silent(Wells):
        sample = AbstractProblem.sample

    with pytest.raises(TypeError, match="`Silent` does not define `sample`"):
        tts.sgd(Silent(), key=jax.random.key(0), epsilon=0.1, step_size=0.1, tau=[1.0])


def test_sgd_refuses_to_be_traced():
    with pytest.raises(TypeError, match="loop on the host"):
        jax.jit(lambda eps: tts.sgd(paper(), tau=[1e-4], **(QUICK | {"epsilon": eps})).loss)(1e-3)
