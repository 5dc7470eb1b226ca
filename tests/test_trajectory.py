"""The one answer of every dynamics: labels, files, trees, summaries."""

import errno
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from numpy.testing import assert_allclose, assert_array_equal

import tts_jax as tts
from tts_jax import _trajectory


TARGET = tts.PiecewiseConstant([0.4, 0.7], [1.0, 3.0, 0.0])
PROBLEM = tts.Univariate(TARGET, neurons=4, eta=0.05, noise=1.0)
# as many starts as the target has pieces
STARTS = PROBLEM.state(
    slow=[[0.2, 0.5, 0.6, 0.85], [0.1, 0.2, 0.5, 0.9], [0.3, 0.48, 0.62, 0.9]],
)
EPSILONS = np.array([0.02, 0.3])
TAU = np.array([0.0, 0.01])


def flow(state=STARTS, epsilon=0.3, tau=TAU, **settings):
    return tts.flow(PROBLEM, state, epsilon=epsilon, tau=tau, solver="tsit5", **settings)


@pytest.fixture(scope="module")
def runs():
    return {
        "flow": flow(epsilon=EPSILONS[:, None]),
        "limit": tts.limit(PROBLEM, STARTS, tau=TAU),
        "sharp_limit": tts.sharp_limit(PROBLEM, STARTS, tau=TAU),
        "sgd": tts.sgd(
            PROBLEM, key=jax.random.key(0), seeds=3, epsilon=0.02, step_size=0.01, tau=TAU
        ),
    }


METHODS = ("flow", "limit", "sharp_limit", "sgd")


def same(one, other):
    """Equal structure and equal bits, dtypes included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


# --- trees ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_trajectory_is_a_tree_of_arrays(runs, method):
    leaves, structure = jax.tree.flatten(runs[method])
    assert all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves)
    same(jax.tree.unflatten(structure, leaves), runs[method])
    same(jax.jit(lambda run: run)(runs[method]), runs[method])


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_back_every_bit(runs, method, tmp_path):
    run = runs[method]
    path = run.save(tmp_path / "run.nc")
    loaded = tts.load(path)
    same(loaded, run)
    assert loaded.method == method
    assert (loaded.batch_dims, loaded.dims, loaded.notes) == (run.batch_dims, run.dims, run.notes)
    assert dict(loaded.notes)["problem"] == "Univariate"
    assert os.listdir(tmp_path) == ["run.nc"]
    assert loaded.summary() == run.summary()


def test_a_loaded_state_starts_another_run(runs, tmp_path):
    loaded = tts.load(runs["sgd"].save(tmp_path / "run.nc"))
    run = flow(tts.State(loaded.fast[:, -1], loaded.slow[:, -1]))
    assert_allclose(run.loss[:, 0], loaded.loss[:, -1], rtol=1e-12)
    assert run.batch_dims == ("seed",)


def break_off(monkeypatch, error):
    """Let every write end in the middle with `error`."""

    def half(self, content):
        with open(self, "wb") as handle:
            handle.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)


def test_a_full_disk_leaves_the_old_file_and_is_named(runs, tmp_path, monkeypatch):
    path = runs["limit"].save(tmp_path / "run.nc")
    before = path.read_bytes()
    break_off(monkeypatch, OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(OSError, match="No space left. Choose a folder") as failed:
        runs["flow"].save(path)
    assert f"`{path}`" in str(failed.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.nc"]


def test_an_interrupted_write_leaves_the_old_file(runs, tmp_path, monkeypatch):
    path = runs["limit"].save(tmp_path / "run.nc")
    before = path.read_bytes()
    break_off(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runs["flow"].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.nc"]


def test_a_rename_that_fails_leaves_the_old_file(runs, tmp_path, monkeypatch):
    path = runs["limit"].save(tmp_path / "run.nc")
    before = path.read_bytes()

    def refuse(*paths):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="Permission denied. Choose a folder"):
        runs["flow"].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.nc"]


# --- labels ---------------------------------------------------------------------------------

STATE_DIMS = {
    "fast": ("tau", "weight"),
    "slow": ("tau", "neuron"),
    "loss": ("tau",),
    "recovery": ("tau", "jump"),
    "status": (),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_dimension_is_named(runs, method):
    labelled = runs[method].to_xarray()
    batch = ("epsilon", "seed") if method == "flow" else ("seed",)
    assert runs[method].batch_dims == batch
    for name, dims in STATE_DIMS.items():
        assert labelled[name].dims == (*batch, *dims), name
    assert labelled["settings.values"].dims == ("piece",)
    assert labelled["settings.eta"].dims == ()
    assert_array_equal(labelled["tau"], TAU)
    assert_array_equal(labelled["neuron"], [1, 2, 3, 4])
    assert_array_equal(labelled["weight"], [0, 1, 2, 3, 4])
    assert_array_equal(labelled["jump"], [0.4, 0.7])
    assert_array_equal(labelled["seed"], [0, 1, 2])
    assert labelled.attrs["method"] == method
    assert {"tts_jax", "jax", "python", "problem"} <= set(labelled.attrs)


def test_statistics_are_labelled_by_what_they_are_about(runs):
    assert runs["flow"].to_xarray()["stats.steps"].dims == ("epsilon", "seed")
    assert runs["limit"].to_xarray()["stats.condition"].dims == ("seed", "tau")
    assert runs["sharp_limit"].to_xarray()["stats.hitting_time"].dims == ("seed", "jump")


def test_events_are_labelled_and_other_methods_have_none(runs):
    events = runs["sharp_limit"].events
    assert set(events) == {"time", "neuron", "jump", "kind"}
    labelled = runs["sharp_limit"].to_xarray()
    for name, value in events.items():
        assert labelled[f"events.{name}"].dims == ("seed", "event")
        assert_array_equal(labelled[f"events.{name}"], value)
    assert np.any(np.isfinite(events["time"]))
    assert all(runs[method].events == {} for method in METHODS if method != "sharp_limit")


def test_crossed_epsilons_and_starts_are_selected_by_label(runs):
    run = runs["flow"]
    labelled = run.to_xarray()
    assert_array_equal(labelled["epsilon"], EPSILONS)
    assert_array_equal(labelled["loss"].sel(epsilon=0.3, seed=1, tau=0.01), run.loss[1, 1, 1])
    assert labelled["settings.epsilon"].dims == ("epsilon", "seed")
    assert "key" in runs["sgd"].to_xarray().attrs


@pytest.mark.parametrize(
    ("starts", "epsilons", "names"),
    [
        ((), (), ()),
        ((), (2,), ("epsilon",)),
        ((), (1,), ("epsilon",)),
        ((3,), (), ("seed",)),
        ((1,), (), ("seed",)),
        ((3,), (3,), ("seed",)),
        ((3,), (2, 1), ("epsilon", "seed")),
        ((3, 1), (2,), ("seed", "epsilon")),
        ((2, 3), (), ("batch_0", "seed")),
    ],
)
def test_names_of_the_batch_axes(starts, epsilons, names):
    problem = toy.linear()
    start = problem.init(key=jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*starts, *leaf.shape)), start)
    epsilon = 0.5 * (1 + np.arange(np.prod(epsilons, dtype=int))).reshape(epsilons)
    run = tts.flow(problem, state, epsilon=epsilon, tau=[0.0], solver="tsit5")
    assert run.batch_dims == names
    labelled = run.to_xarray()
    assert labelled["loss"].dims == (*names, "tau")
    if "epsilon" in names:
        assert_array_equal(labelled["epsilon"], epsilon.ravel())


def test_epsilons_that_differ_between_starts_give_no_coordinate():
    run = flow(PROBLEM.state(slow=np.full((3, 1, 4), 0.5)), 1.0 + np.eye(3)[:, :2], tau=[0.0])
    assert run.batch_dims == ("seed", "epsilon")
    labelled = run.to_xarray()
    assert "epsilon" not in labelled.coords
    assert_array_equal(labelled["settings.epsilon"], 1.0 + np.eye(3)[:, :2])


def test_labels_after_a_users_vmap(tmp_path):
    run = jax.vmap(lambda epsilon: flow(epsilon=epsilon))(EPSILONS)
    labelled = run.to_xarray()
    assert labelled["loss"].dims == ("batch_0", "seed", "tau")
    assert labelled["settings.epsilon"].dims == ("batch_0",)
    assert labelled["settings.values"].dims == ("batch_0", "piece")
    assert_array_equal(labelled["tau"], TAU)
    same(tts.load(run.save(tmp_path / "run.nc")).loss, run.loss)


def test_recorded_times_that_differ_between_lanes_are_not_labelled():
    run = jax.vmap(lambda end: flow(tau=jnp.stack([0.0, end])))(jnp.array([0.01, 0.02]))
    with pytest.raises(ValueError, match="the same recorded times in every lane.*one by one"):
        run.to_xarray()


# --- summary --------------------------------------------------------------------------------


def test_summary_counts_lanes_and_says_what_to_do(runs):
    assert runs["limit"].summary().startswith("3 of 3 lanes: SUCCESS.")
    assert runs["sharp_limit"].summary().startswith("3 of 3 lanes: SUCCESS.")
    # a neuron on a jump that pushes it off equally to both sides
    target = tts.PiecewiseConstant([0.25, 0.5, 0.75], [0.0, 4.0, 3.0, 7.0])
    tie = tts.Univariate(target, neurons=1)
    run = tts.sharp_limit(tie, tie.state(slow=[[0.4], [0.5], [0.6]]), tau=TAU)
    lines = run.summary().splitlines()
    assert lines[0].startswith("2 of 3 lanes: SUCCESS.")
    assert lines[1].startswith("1 of 3 lanes: NOT_UNIQUE.")
    assert "Move the start" in lines[1]
    assert_array_equal(run.success, [True, False, True])
    assert_array_equal(np.isfinite(run.loss), [[True, True], [True, False], [True, True]])


@pytest.mark.parametrize("status", tts.Status)
def test_every_status_has_advice(status):
    assert status.advice.endswith(".")
    assert len(status.advice) > 30


# --- any problem ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    problem = toy.linear()
    keys = jax.random.split(jax.random.key(5), 2)
    return problem, jax.vmap(lambda key: problem.init(key=key))(keys)


@pytest.mark.parametrize("solver", ["rodas5p", "tsit5"])
def test_flow_of_a_problem_of_dicts_is_a_matrix_exponential(linear, solver):
    problem, states = linear
    tau, tight = [0.05, 0.3, 1.0], {"rtol": 1e-10, "atol": 1e-10}
    run = tts.flow(problem, states, epsilon=[0.02, 0.5], tau=tau, solver=solver, **tight)
    for lane, epsilon in enumerate((0.02, 0.5)):
        start = jax.tree.map(lambda leaf, lane=lane: leaf[lane], states)
        expected = toy.flow(problem, start, epsilon, tau)
        assert_allclose(run.fast["a"][lane], expected[:, :3], rtol=1e-7, atol=1e-9)
        assert_allclose(run.fast["b"][lane], expected[:, 3], rtol=1e-7, atol=1e-9)
        assert_allclose(run.slow["p"][lane], expected[:, 4:], rtol=1e-7, atol=1e-9)


def test_limit_of_a_problem_of_dicts_is_an_exponential(linear):
    problem, states = linear
    start = jax.tree.map(lambda leaf: leaf[0], states)
    tau = [0.0, 0.3, 1.0]
    run = tts.limit(problem, start, tau=tau, rtol=1e-10, atol=1e-10)
    expected = toy.limit(problem, start, tau)
    assert_allclose(run.slow["p"], expected, rtol=1e-8)
    assert_allclose(run.fast["a"], expected @ problem.matrix.T, rtol=1e-8)
    assert_allclose(run.loss, expected**2 @ problem.decay / 2, rtol=1e-8)


def test_a_problem_of_dicts_is_labelled_and_filed(linear, tmp_path):
    problem, states = linear
    run = tts.flow(problem, states, epsilon=0.5, tau=[0.1, 0.2], solver="tsit5")
    labelled = run.to_xarray()
    assert labelled["fast.a"].dims == ("seed", "tau", "row")
    assert labelled["fast.b"].dims == ("seed", "tau")
    assert labelled["slow.p"].dims == ("seed", "tau", "column")
    # a vector of as many numbers as there are starts is no batch of settings
    assert labelled["settings.decay"].dims == ("column",)
    same(tts.load(run.save(tmp_path / "run.nc")), run)


def test_a_problem_without_a_sharp_limit_says_so(linear):
    problem, states = linear
    with pytest.raises(TypeError, match="`Linear` has no sharp limit.*Use `limit`"):
        tts.sharp_limit(problem, states, tau=[0.1])


def test_a_gpu_looks_at_so_many_states_at_a_time(linear, monkeypatch):
    """XLA takes minutes to compile a reduction over a large array for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_trajectory, "TOGETHER", 7)
    problem, *_ = linear
    slow = np.random.default_rng(0).random((4, 5))
    fast = {"a": slow[..., None] * [1.0, 2.0]}

    def total(problem, fast, slow):
        return {"sum": slow + jnp.sum(fast["a"], axis=-1), "pair": fast["a"]}

    found = _trajectory.over_lanes(total, 2, problem, fast, slow)
    assert_allclose(found["sum"], 4 * slow, rtol=1e-15)
    assert_array_equal(found["pair"], fast["a"])
    text = _trajectory.over_lanes.lower(total, 2, problem, fast, slow).as_text()
    assert "tensor<7x2xf64>" in text
    assert "while" in text
