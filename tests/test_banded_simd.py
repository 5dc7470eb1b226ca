"""The compiled banded engine of the flow and its limit, against Diffrax and high precision."""

import jax
import numpy as np
import pytest
import reference
from conftest import JUMPS, VALUES
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp

import tts_jax as tts
from tts_jax.problems import _banded_simd


pytest.importorskip("llvmlite")

ETA = 4e-3
TAU = np.linspace(0.0, 0.035, 8)

# positions that are hard in one way or another, 8 neurons
HARD = {
    "all within one width": 0.5 + ETA * np.linspace(-0.4, 0.4, 8),
    "on jumps": [0.2, 0.35, 0.5, 0.65, 0.8, 0.1, 0.3, 0.9],
    "straddling": [-0.0015, 0.0005, 0.0015, 0.3, 0.6, 0.9985, 1.0, 1.0019],
    "outside": [-0.3, -0.01, 0.2, 0.4, 0.6, 0.8, 1.01, 1.3],
    "unsorted": [0.9, 0.1, 0.7, 0.301, 0.3, 0.5, 0.2, 0.6],
    "both neurons of a jump on one side": [0.05, 0.1, 0.15, 0.19, 0.45, 0.55, 0.7, 0.95],
}
# Diffrax lets rounding part these, in an unstable direction
COINCIDENT = {
    "many": [0.1, 0.1, 0.3, 0.3, 0.3, 0.6, 0.7, 0.9],
    "pair at a jump": [0.1, 0.19, 0.19, 0.3, 0.45, 0.6, 0.7, 0.9],
}


def eight(target):
    return tts.Univariate(target, neurons=8, eta=ETA)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("epsilon", [2e-5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_flow_against_diffrax(target, name, epsilon):
    problem = eight(target)
    state = problem.state(slow=HARD[name])
    setting = dict(epsilon=epsilon, tau=TAU, rtol=1e-10, atol=1e-10)
    ours = tts.flow(problem, state, engine="simd", **setting)
    expected = tts.flow(problem, state, engine="diffrax", solver="rodas5p", **setting)
    assert ours.status == expected.status == 0
    assert dict(ours.notes)["engine"] == "simd"
    # where neurons meet, only the sum of their weights is determined so well
    np.testing.assert_allclose(ours.slow, expected.slow, atol=2e-9)
    np.testing.assert_allclose(ours.loss, expected.loss, atol=2e-9)
    for fast, other, slow in zip(ours.fast, expected.fast, ours.slow, strict=True):
        x = np.linspace(0, 1, 101)
        one, two = (problem.predict(weights, slow, x) for weights in (fast, other))
        np.testing.assert_allclose(one, two, atol=2e-6)


@pytest.mark.parametrize(
    "places",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ([0.42], [0.1999, 0.2001])),
        [0.3, 0.3],
    ],
)
def test_one_and_two_neurons(target, places):
    """Also two that coincide, which are one for the engine."""
    problem = tts.Univariate(target, neurons=len(places), eta=ETA)
    state = problem.state(slow=places)
    setting = dict(tau=TAU, rtol=1e-9, atol=1e-9)
    for ours, expected in (
        [
            tts.flow(problem, state, epsilon=1e-3, engine=engine, **setting)
            for engine in ("simd", "diffrax")
        ],
        [tts.limit(problem, state, engine=engine, **setting) for engine in ("simd", "diffrax")],
    ):
        assert ours.success
        if len(set(places)) == len(places):  # the Gram matrix is regular
            assert expected.success
            np.testing.assert_allclose(ours.slow, expected.slow, atol=2e-8)
            np.testing.assert_allclose(ours.loss, expected.loss, atol=2e-8)


@pytest.mark.parametrize("name", HARD)
def test_limit_against_diffrax(target, name):
    """Up to the time when neurons have met: then the weights are not determined any more."""
    problem = eight(target)
    state = problem.state(slow=HARD[name])
    setting = dict(tau=TAU[:3], rtol=1e-9, atol=1e-9)
    ours = tts.limit(problem, state, engine="simd", **setting)
    expected = tts.limit(problem, state, engine="diffrax", **setting)
    assert ours.status == 0
    good = np.isfinite(expected.loss)
    assert good[0]
    condition = np.asarray(expected.stats["condition"])
    good &= (condition < 1e9) | np.isinf(condition)
    np.testing.assert_allclose(ours.slow[good], expected.slow[good], atol=1e-7)
    np.testing.assert_allclose(ours.loss[good], expected.loss[good], atol=1e-7)


def test_loss_and_start_are_exact(target):
    """The recorded loss is that of the recorded state, in 60 digits."""
    problem = eight(target)
    states = problem.state(slow=np.array([HARD["straddling"], HARD["unsorted"]]))
    answer = tts.flow(problem, states, epsilon=2e-5, tau=TAU, engine="simd")
    np.testing.assert_array_equal(answer.slow[:, 0], states.slow)
    np.testing.assert_array_equal(answer.fast[:, 0], 0.0)
    for lane in range(2):
        for k in (0, 3, 7):
            parts = (answer.fast[lane, k], answer.slow[lane, k], JUMPS, VALUES)
            exact = reference.loss(*map(reference.to_mp, parts), reference.mpf(ETA))
            assert abs(float(exact) - answer.loss[lane, k]) <= 1e-12


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    jumps=st.just(4),
    eta=st.sampled_from([0.3, 0.05, 4e-3]),
)
def test_any_target_and_width_against_diffrax(seed, jumps, eta):
    """Also where jumps are closer than η and all neurons overlap."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.uniform(0.05, 0.95, jumps))
    target = tts.PiecewiseConstant(places, rng.normal(size=jumps + 1))
    problem = tts.Univariate(target, neurons=6, eta=eta)
    state = problem.state(slow=rng.uniform(-0.1, 1.1, 6), fast=rng.normal(size=7))
    setting = dict(epsilon=1e-2, tau=[0.0, 0.02, 0.1], rtol=1e-10, atol=1e-10)
    ours = tts.flow(problem, state, engine="simd", **setting)
    expected = tts.flow(problem, state, engine="diffrax", solver="rodas5p", **setting)
    assert ours.status == expected.status == 0
    np.testing.assert_allclose(ours.slow, expected.slow, atol=1e-7)
    np.testing.assert_allclose(ours.loss, expected.loss, atol=1e-8)


def test_a_lane_has_the_same_bits_in_any_company(problem, starts):
    """Alone, among 32, in vectors of 4 or 8, on one or two threads, narrow or wide bands."""
    crowd = np.array(starts.slow)
    crowd[5] = 0.5 + ETA * np.linspace(-0.4, 0.4, 20)  # needs the full band
    fast = np.zeros((32, 21))
    for epsilon in (2e-5, 0.0):
        setting = dict(rtol=1e-6, atol=1e-6, max_steps=20_000)
        every = np.full(32, epsilon)
        whole = _banded_simd.solve(problem, fast, crowd, every, TAU, **setting)
        for lanes, threads in ((4, 1), (8, 2)):
            again = _banded_simd.solve(
                problem, fast, crowd, every, TAU, lanes=lanes, threads=threads, **setting
            )
            jax.tree.map(np.testing.assert_array_equal, again, whole)
        for lane in (0, 5, 6):
            part = slice(lane, lane + 1)
            alone = _banded_simd.solve(
                problem, fast[part], crowd[part], every[part], TAU, **setting
            )
            jax.tree.map(lambda x, y, i=part: np.testing.assert_array_equal(x, y[i]), alone, whole)


@pytest.mark.parametrize("name", COINCIDENT)
def test_coincident_neurons_against_scipy_on_their_common_places(target, name):
    """The field of all neurons, restricted to states in which groups of them coincide."""
    problem = eight(target)
    slow, epsilon = np.array(COINCIDENT[name]), 2e-5
    places, member = np.unique(slow, return_inverse=True)
    first = np.searchsorted(slow, places)
    count = places.size

    def field(tau, y):
        weights = np.concatenate([y[:1], y[1 : count + 1][member]])
        velocity = problem.fields(weights, y[count + 1 :][member])
        fast = np.asarray(velocity.fast)
        return np.concatenate([fast[:1], fast[1:][first], epsilon * velocity.slow[first]]) / epsilon

    start = np.concatenate([np.zeros(count + 1), places])
    expected = solve_ivp(
        field, (0, TAU[-1]), start, method="LSODA", t_eval=TAU, rtol=1e-10, atol=1e-10
    ).y.T
    state = problem.state(slow=slow)
    answer = tts.flow(problem, state, epsilon=epsilon, tau=TAU, engine="simd", rtol=1e-9, atol=1e-9)
    assert answer.status == 0
    np.testing.assert_allclose(answer.slow, expected[:, count + 1 :][:, member], atol=1e-8)
    np.testing.assert_allclose(answer.fast[:, 1:], expected[:, 1 : count + 1][:, member], atol=1e-5)
    reduced = tts.limit(problem, state, tau=TAU, engine="simd")
    assert reduced.status == 0
    for one, other in zip(*np.nonzero(member[:, None] == member), strict=True):
        np.testing.assert_array_equal(reduced.slow[:, one], reduced.slow[:, other])
        np.testing.assert_array_equal(reduced.fast[:, one + 1], reduced.fast[:, other + 1])


def test_neurons_that_meet_come_to_rest_in_the_limit(problem):
    """A start whose neurons merge at a jump: without the ridge their distance falls for ever."""
    slow = [0.11035786, 0.13508937, 0.19349805, 0.22278518, 0.2816614, 0.35399588, 0.36165213]
    slow += [0.38151448, 0.38288378, 0.38549292, 0.42146341, 0.43738734, 0.52133545, 0.57775262]
    slow += [0.65001399, 0.79783327, 0.79903002, 0.80344308, 0.90702953, 0.92269033]
    answer = tts.limit(
        problem, problem.state(slow=slow), tau=np.linspace(0, 0.1, 11), engine="simd"
    )
    assert answer.status == 0
    gaps = np.min(np.diff(np.sort(answer.slow, axis=1), axis=1), axis=1)
    assert 1e-5 * ETA < gaps[-1] < 1e-2 * ETA
    assert np.all(np.diff(answer.loss) <= 1e-9)


@pytest.mark.parametrize("engine", ["simd", pytest.param("diffrax", marks=pytest.mark.slow)])
def test_a_failed_lane_keeps_what_was_computed(problem, starts, engine):
    states = jax.tree.map(lambda x: x[:3], starts)
    tau = np.linspace(0, 0.035, 36)
    setting = dict(epsilon=2e-5, tau=tau, engine=engine)
    full = tts.flow(problem, states, **setting)
    cut = tts.flow(problem, states, max_steps=90, **setting)
    np.testing.assert_array_equal(cut.status, tts.Status.MAX_STEPS)
    for lane in range(3):
        reached = float(cut.stats["reached"][lane])
        assert 0 < reached < 0.035
        before = tau <= reached
        assert before.sum() >= 2
        np.testing.assert_allclose(cut.slow[lane, before], full.slow[lane, before], atol=1e-12)
        np.testing.assert_allclose(cut.loss[lane, before], full.loss[lane, before], atol=1e-12)
        assert np.all(np.isnan(cut.slow[lane, ~before]))
        assert np.all(np.isnan(cut.loss[lane, ~before]))
    np.testing.assert_array_equal(full.stats["reached"], 0.035)


def test_more_overlap_than_the_band_has_room_for_is_left_to_diffrax(target, monkeypatch):
    monkeypatch.setattr(_banded_simd, "WIDEST", 4)
    problem = eight(target)
    slow = np.array([HARD["all within one width"], np.linspace(0.05, 0.95, 8)])
    setting = dict(epsilon=1e-2, tau=[0.0, 1e-3], rtol=1e-9, atol=1e-9)
    answer = tts.flow(problem, problem.state(slow=slow), engine="simd", **setting)
    np.testing.assert_array_equal(answer.stats["dense"], [True, False])
    assert np.all(answer.success)
    monkeypatch.undo()
    expected = tts.flow(problem, problem.state(slow=slow), engine="simd", **setting)
    assert not np.any(expected.stats["dense"])
    np.testing.assert_array_equal(expected.stats["bandwidth"], [7, 0])
    np.testing.assert_allclose(answer.slow, expected.slow, atol=1e-8)
    np.testing.assert_allclose(answer.fast, expected.fast, atol=1e-5)


def test_work_grows_in_proportion_to_the_neurons(target):
    """At m = 1000 no lane fails, and the steps are counted: no stall."""
    problem = tts.Univariate(target, neurons=1000, eta=8e-5)
    slow = np.sort(np.random.default_rng(0).random((2, 1000)), axis=1)
    answer = tts.flow(problem, problem.state(slow=slow), epsilon=2e-5, tau=[0.0, 0.005])
    assert np.all(answer.success)
    assert np.max(answer.stats["steps"]) < 1000
    assert np.max(answer.stats["bandwidth"]) < 10


def test_engines_that_cannot_be_used_are_refused(problem, separated):
    setting = dict(epsilon=1e-2, tau=[0.1])
    with pytest.raises(ValueError, match="`engine` must be one of 'auto', 'cuda', 'simd'"):
        tts.flow(problem, separated, engine="fast", **setting)
    with pytest.raises(ValueError, match="'diffrax' together with `solver`"):
        tts.flow(problem, separated, engine="simd", solver="tsit5", **setting)
    for method, own in ((tts.flow, setting), (tts.limit, {"tau": [0.1]})):
        with pytest.raises(ValueError, match="'cuda', but JAX computes on cpu.*Leave `engine` out"):
            method(problem, separated, engine="cuda", **own)
    other = tts.Univariate(problem.target, neurons=20, eta=problem.eta, activation="ramp")
    with pytest.raises(ValueError, match="'cuda', which this `Univariate` does not have"):
        tts.flow(other, separated, engine="cuda", **setting)
    with pytest.raises(ValueError, match="inside a transformation"):
        jax.jit(lambda s: tts.flow(problem, s, engine="simd", **setting).loss)(separated)
