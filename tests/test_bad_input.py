"""Bad input is refused at the boundary: the message names the argument, its value, the remedy."""

import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import tts_jax as tts


INF, NAN = float("inf"), float("nan")
TARGET = tts.PiecewiseConstant([0.4, 0.7], [1.0, 3.0, 0.0])
PROBLEM = tts.Univariate(TARGET, neurons=3, eta=0.05, noise=1.0)
START = PROBLEM.state(slow=[0.2, 0.5, 0.8])
TAU = [0.0, 0.01]


def target(jumps, values):
    return lambda: tts.PiecewiseConstant(jumps, values)


def univariate(**settings):
    return lambda: tts.Univariate(TARGET, **{"neurons": 3} | settings)


def state(**parts):
    return lambda: PROBLEM.state(**parts)


def flow(start=START, **settings):
    usual = {"epsilon": 1e-2, "tau": TAU, "solver": "tsit5"}
    return lambda: tts.flow(PROBLEM, start, **usual | settings)


def limit(start=START, **settings):
    return lambda: tts.limit(PROBLEM, start, **{"tau": TAU} | settings)


def sharp_limit(start=START, **settings):
    return lambda: tts.sharp_limit(PROBLEM, start, **{"tau": TAU} | settings)


def bare(fast_shape, slow_shape, fast=0.0, slow=0.5):
    return tts.State(np.full(fast_shape, fast), np.full(slow_shape, slow))


# call, argument, what the message says about the value, remedy
REFUSED = {
    # the target
    "unsorted jumps": (target([0.5, 0.2], [1, 2, 3]), "jumps", "[0.5 0.2]", "Sort the jumps"),
    "repeated jumps": (target([0.5, 0.5], [1, 2, 3]), "jumps", "[0.5 0.5]", "drop repeated"),
    "jump beyond 1": (target([0.5, 1.2], [1, 2, 3]), "jumps", "[0.5 1.2]", "rescale the target"),
    "jump at 0": (target([0.0, 0.5], [1, 2, 3]), "jumps", "[0.  0.5]", "rescale the target"),
    "jump at 1": (target([0.5, 1.0], [1, 2, 3]), "jumps", "[0.5 1. ]", "rescale the target"),
    "negative jump": (target([-0.1], [1, 2]), "jumps", "[-0.1]", "rescale the target"),
    "NaN jump": (target([NAN], [1, 2]), "jumps", "[nan]", "inside (0, 1)"),
    "jumps of words": (target(["left"], [1, 2]), "jumps", "['left']", "Give the positions"),
    "scalar jump": (target(0.5, [1, 2]), "jumps", "()", "Use `[0.5]`"),
    "two axes of jumps": (target([[0.5]], [1, 2]), "jumps", "(1, 1)", "Use `[0.5]`"),
    "too many values": (target([0.5], [1, 2, 3]), "values", "3 values for 1", "drop levels"),
    "too few values": (target([0.5], [1]), "values", "1 values for 1 jumps", "Add"),
    "NaN value": (target([0.5], [1, NAN]), "values", "nan at index [1]", "finite level"),
    "infinite value": (target([0.5], [INF, 1]), "values", "inf at index [0]", "finite level"),
    "ragged values": (target([0.5], [[1], [2, 3]]), "values", "[[1], [2, 3]]", "finite level"),
    # the problem
    "no neurons": (univariate(neurons=0), "neurons", "got 0", "The paper uses 20"),
    "negative neurons": (univariate(neurons=-2), "neurons", "got -2", "The paper uses 20"),
    "fractional neurons": (univariate(neurons=2.5), "neurons", "got 2.5", "The paper uses 20"),
    "zero eta": (univariate(eta=0.0), "eta", "got 0.0", "The paper uses 4e-3"),
    "negative eta": (univariate(eta=-0.1), "eta", "got -0.1", "The paper uses 4e-3"),
    "NaN eta": (univariate(eta=NAN), "eta", "got nan", "The paper uses 4e-3"),
    "infinite eta": (univariate(eta=INF), "eta", "got inf", "The paper uses 4e-3"),
    "several eta": (univariate(eta=[0.1, 0.2]), "eta", "[0.1 0.2]", "The paper uses 4e-3"),
    "eta of text": (univariate(eta="4e-3"), "eta", "got '4e-3'", "The paper uses 4e-3"),
    "no eta": (univariate(eta=None), "eta", "got None", "The paper uses 4e-3"),
    "negative noise": (univariate(noise=-1), "noise", "got -1", "the half-width"),
    "NaN noise": (univariate(noise=NAN), "noise", "got nan", "the half-width"),
    # states
    "NaN position": (state(slow=[0.1, NAN, 0.3]), "slow", "nan at index [1]", "finite position"),
    "too few positions": (state(slow=[0.1, 0.2]), "slow", "shape (2,)", "`neurons=2`"),
    "scalar position": (state(slow=0.1), "slow", "shape ()", "pass other positions"),
    "complex position": (state(slow=[0.1, 0.2, 1j]), "slow", "1.j", "finite position"),
    "ragged positions": (state(slow=[[0.1], [0.2, 0.3]]), "slow", "[[0.1]", "finite position"),
    "too few weights": (state(slow=[0.1] * 3, fast=[0.0] * 3), "fast", "(3,)", "Leave it out"),
    "infinite weight": (
        state(slow=[0.1] * 3, fast=[0.0, 0.0, INF, 0.0]),
        "fast",
        "inf at index [2]",
        "finite value",
    ),
    "integer key": (lambda: PROBLEM.init(key=0), "key", "got 0", "jax.random.key(0)"),
    "loss of a batch": (
        lambda: PROBLEM.loss(np.zeros((2, 4)), np.zeros((2, 3))),
        "fast",
        "(2, 4)",
        "jax.vmap",
    ),
    "loss of too few": (lambda: PROBLEM.loss(np.zeros(4), [0.1]), "slow", "(1,)", "shape (3,)"),
    # ε
    "zero epsilon": (flow(epsilon=0.0), "epsilon", "got 0.0", "for ε = 0 use `limit`"),
    "negative epsilon": (flow(epsilon=-1e-3), "epsilon", "got -0.001", "use `limit`"),
    "NaN epsilon": (flow(epsilon=NAN), "epsilon", "got nan", "ε is the ratio"),
    "infinite epsilon": (flow(epsilon=INF), "epsilon", "got inf", "ε is the ratio"),
    "text epsilon": (flow(epsilon="1e-5"), "epsilon", "got '1e-5'", "ε is the ratio"),
    "empty epsilon": (flow(epsilon=[]), "epsilon", "got []", "ε is the ratio"),
    "one bad epsilon of many": (
        flow(epsilon=np.where(np.arange(100) == 41, -2.0, 1.0)),
        "epsilon",
        "-2.0 at index [41]",
        "ε is the ratio",
    ),
    "epsilon that does not broadcast": (
        flow(bare((2, 4), (2, 3)), epsilon=[1e-2] * 3),
        "epsilon",
        "shape (3,)",
        "cross it with the starts",
    ),
    # recorded times
    "no tau": (flow(tau=[]), "tau", "shape (0,)", "jnp.linspace"),
    "scalar tau": (limit(tau=0.1), "tau", "shape ()", "jnp.linspace"),
    "two axes of tau": (sharp_limit(tau=[[0.0, 0.1]]), "tau", "shape (1, 2)", "jnp.linspace"),
    "negative tau": (flow(tau=[-0.1, 0.1]), "tau", "-0.1 at index [0]", "Sort the recorded"),
    "NaN tau": (limit(tau=[0.0, NAN]), "tau", "nan at index [1]", "Sort the recorded"),
    "infinite tau": (flow(tau=[0.0, INF]), "tau", "inf at index [1]", "Sort the recorded"),
    "decreasing tau": (limit(tau=[0, 2, 1]), "tau", "1 at index [2]", "Sort the recorded"),
    "repeated tau": (sharp_limit(tau=[0, 1, 1]), "tau", "[0 1 1]", "drop repeated ones"),
    "tau of None": (flow(tau=None), "tau", "got None", "jnp.linspace"),
    # solver settings
    "unknown solver": (flow(solver="euler"), "solver", "got 'euler'", "'rodas5p', 'kvaerno5'"),
    "solver class": (flow(solver=diffrax.Tsit5), "solver", "Tsit5", "Or pass a Diffrax solver"),
    "unknown limit solver": (limit(solver="fast"), "solver", "got 'fast'", "'rodas5p', 'tsit5'"),
    "unknown engine": (flow(engine="fast"), "engine", "got 'fast'", "Or leave it out"),
    "negative rtol": (flow(rtol=-1e-3), "rtol", "got -0.001", "Use for example 1e-7"),
    "several rtol": (flow(rtol=[1e-3, 1e-4]), "rtol", "[0.001  0.0001]", "Use for example"),
    "zero atol": (limit(atol=0.0), "atol", "got 0.0", "Use for example 1e-7"),
    "zero max_steps": (flow(max_steps=0), "max_steps", "got 0", "Use e.g. 20_000"),
    "no max_steps": (limit(max_steps=None), "max_steps", "got None", "Use e.g. 20_000"),
    # starts of a dynamics
    "wrong shape": (flow(bare(3, 3)), "state", "shape (3,)", "Put batch axes in front"),
    "swapped parts": (flow(tts.State(START.slow, START.fast)), "state", "(3,)", "axes are (4,)"),
    "wrong structure": (
        limit(tts.State({"a": START.fast}, START.slow)),
        "state",
        "{'a': *}",
        "`problem.state(...)`",
    ),
    "batch axes that differ": (
        flow(bare((2, 4), (5, 3))),
        "state",
        "[(2,), (5,)]",
        "the same batch axes",
    ),
    "no lanes": (flow(bare((0, 4), (0, 3))), "state", "(0,)", "Build it with"),
    "infinite weights": (flow(bare(4, 3, INF)), "state.fast", "inf at", "Start from finite"),
    "NaN positions": (sharp_limit(bare(4, 3, 0.0, NAN)), "state.slow", "nan at", "Start from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_value_is_refused_with_its_name_and_a_remedy(case):
    call, argument, value, remedy = REFUSED[case]
    with pytest.raises(ValueError, match=f"`{re.escape(argument)}`") as refused:
        call()
    assert value in str(refused.value)
    assert remedy in str(refused.value)


WRONG_KIND = {
    "target": (lambda: tts.Univariate([1, 2]), "target", "[1, 2]", "tts.PiecewiseConstant("),
    "problem": (
        lambda: tts.flow(TARGET, START, epsilon=1e-2, tau=TAU),
        "problem",
        "PiecewiseConstant(",
        "tts.Univariate",
    ),
    "no state": (flow(None), "state", "got None", "`problem.init(key=...)`"),
    "plain tuple": (limit((1, 2)), "state", "got (1, 2)", "`problem.state(...)`"),
    "array": (sharp_limit(START.slow), "state", "got", "`problem.state(...)`"),
    "adjoint": (flow(adjoint="forward"), "adjoint", "'forward'", "diffrax.ForwardMode()"),
    "meter": (flow(progress_meter=True), "progress_meter", "True", "diffrax.TqdmProgressMeter()"),
}


@pytest.mark.parametrize("case", WRONG_KIND)
def test_a_wrong_kind_of_argument_is_refused_with_a_remedy(case):
    call, argument, value, remedy = WRONG_KIND[case]
    with pytest.raises(TypeError, match=f"`{argument}`") as refused:
        call()
    assert value in str(refused.value)
    assert remedy in str(refused.value)


def test_a_long_array_in_a_message_is_cut_but_its_bad_entry_is_shown():
    tau = np.linspace(0.0, 1.0, 10_000)
    tau[1234] = NAN
    with pytest.raises(ValueError, match=r"nan at index \[1234\]") as refused:
        flow(tau=tau)()
    assert len(str(refused.value)) < 300


def test_numpy_and_jax_numbers_of_every_width_are_accepted():
    for number in (np.float32(0.5), np.int8(1), jnp.bfloat16(0.5), jnp.float16(0.5), 1):
        assert tts.Univariate(TARGET, neurons=3, eta=number).eta.dtype == np.float64


@pytest.mark.parametrize("dynamics", [tts.limit, tts.sharp_limit])
def test_shapes_are_checked_under_a_transformation(dynamics):
    with pytest.raises(ValueError, match="`state` must have leaves whose trailing axes are"):
        jax.jit(lambda u: dynamics(PROBLEM, tts.State(u, u), tau=TAU).loss)(jnp.zeros(3))
    with pytest.raises(ValueError, match="`tau` must be a vector"):
        jax.jit(lambda tau: dynamics(PROBLEM, START, tau=tau).loss)(0.1)
    with pytest.raises(ValueError, match="`eta` must be one number, got shape"):
        jax.jit(lambda eta: tts.Univariate(TARGET, eta=eta).eta)(jnp.ones(2))


# --- files ----------------------------------------------------------------------------------


def test_loading_a_missing_file_names_it(tmp_path):
    missing = tmp_path / "missing.nc"
    with pytest.raises(FileNotFoundError, match="written by `Trajectory.save`") as refused:
        tts.load(missing)
    assert f"`{missing}`" in str(refused.value)


def test_loading_a_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"`{tmp_path}`")):
        tts.load(tmp_path)


def test_loading_a_netcdf_that_is_no_trajectory_is_refused(tmp_path):
    path = tmp_path / "other.nc"
    xarray.Dataset({"x": 1.0}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match="not a trajectory.*written by `Trajectory.save`"):
        tts.load(path)


def test_loading_a_file_that_is_no_netcdf_is_refused(tmp_path):
    path = tmp_path / "notes.nc"
    path.write_text("dear diary")
    with pytest.raises(ValueError, match="damaged or not netCDF.*written by") as refused:
        tts.load(path)
    assert f"`{path}`" in str(refused.value)


def test_loading_half_a_file_is_refused(tmp_path):
    path = limit()().save(tmp_path / "run.nc")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or not netCDF"):
        tts.load(path)


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_saving_into_no_folder_names_the_path(folder, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "run.nc"
    with pytest.raises(OSError, match="Choose a folder that exists, is writable") as refused:
        limit()().save(path)
    assert f"`{path}`" in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
