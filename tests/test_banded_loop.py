"""The banded lane engine: against Diffrax on the dense form, alone and in company, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import JUMPS, VALUES

import tts_jax as tts
from tts_jax._problem import State
from tts_jax.problems import _banded_loop


TARGET = tts.PiecewiseConstant([0.4, 0.7], [1.0, 3.0, 0.0])
PROBLEM = tts.Univariate(TARGET, neurons=5, eta=0.05)
TAU = np.array([0.0, 0.002, 0.01, 0.03])
EPSILON = 0.01
# starts that are crossed, crowded, astride of the ends, coincident or outside
POSITIONS = np.array(
    [
        [0.2, 0.35, 0.5, 0.62, 0.85],
        [0.5, 0.1, 0.9, 0.3, 0.7],
        [0.5, 0.505, 0.51, 0.517, 0.524],
        [0.38, 0.41, 0.42, 0.43, 0.6],
        [-0.01, 0.012, 0.5, 0.995, 1.01],
        [0.3, 0.3, 0.5, 0.6, 0.6],
        [-0.2, 0.25, 0.5, 0.75, 1.4],
    ]
)
# the limit of starts whose weights are determined
FOR_LIMIT = POSITIONS[[0, 1, 3, 5, 6]]


@pytest.fixture(autouse=True, scope="module")
def few_lanes():
    """Fewer lanes than starts, so that lanes are taken from the queue."""
    before, _banded_loop.LANES_CPU = _banded_loop.LANES_CPU, 4
    yield
    _banded_loop.LANES_CPU = before


def starts(positions):
    return State(jnp.zeros((len(positions), 6)), jnp.asarray(positions))


def solve(state, epsilon, problem=PROBLEM, tol=1e-9, max_steps=20_000):
    epsilon = jnp.full(state.slow.shape[0], epsilon)
    tau = jnp.asarray(TAU)
    return _banded_loop.solve(problem, state, epsilon, tau, rtol=tol, atol=tol, max_steps=max_steps)


def agree(answer, expected, fast, slow):
    assert np.all(answer["status"] == 0)
    for name, bound in (("fast", fast), ("slow", slow), ("loss", slow)):
        difference = np.max(np.abs(answer[name] - getattr(expected, name)))
        assert difference <= bound, f"{name}: {difference}"


@pytest.mark.slow
def test_flow_of_hostile_starts():
    state = starts(POSITIONS)
    expected = tts.flow(
        PROBLEM, state, epsilon=EPSILON, tau=TAU, solver="rodas5p", rtol=1e-10, atol=1e-10
    )
    answer = solve(state, EPSILON)
    agree(answer, expected, fast=2e-8, slow=2e-8)
    # who needed more neighbours was done with more
    assert answer["stats"]["bandwidth"][2] == 4
    assert answer["stats"]["bandwidth"][0] == 2
    np.testing.assert_array_equal(answer["stats"]["reached"], TAU[-1])
    stats = answer["stats"]
    np.testing.assert_array_equal(stats["steps"], stats["accepted"] + stats["rejected"])


@pytest.mark.slow  # compiles for a minute
def test_limit():
    state = starts(FOR_LIMIT)
    expected = tts.limit(PROBLEM, state, tau=TAU, rtol=1e-10, atol=1e-10)
    # the weights of neurons 0.2 η apart follow their positions some 100 times amplified
    agree(solve(state, 0.0), expected, fast=1e-6, slow=1e-8)


@pytest.mark.slow
def test_a_lane_alone_and_in_company():
    state = starts(POSITIONS)
    together = solve(state, EPSILON)
    for lane in range(len(POSITIONS)):
        alone = solve(jax.tree.map(lambda x, i=lane: x[i : i + 1], state), EPSILON)
        assert alone["stats"]["steps"][0] == together["stats"]["steps"][lane]
        for name in ("fast", "slow", "loss"):
            np.testing.assert_allclose(alone[name][0], together[name][lane], atol=1e-12)


@pytest.mark.slow
def test_a_failure_keeps_what_was_computed():
    state = starts(POSITIONS[:2])
    whole = solve(state, EPSILON)
    cut = solve(state, EPSILON, max_steps=int(whole["stats"]["steps"][0]) // 2)
    assert cut["status"][0] == tts.Status.MAX_STEPS
    reached = float(cut["stats"]["reached"][0])
    assert 0 < reached < TAU[-1]
    before = TAU <= reached
    for name in ("fast", "slow", "loss"):
        np.testing.assert_array_equal(cut[name][0][before], whole[name][0][before])
        assert np.all(np.isnan(cut[name][0][~before]))


@pytest.mark.slow
def test_under_jit():
    state = starts(POSITIONS)
    traced = jax.jit(lambda state: solve(state, EPSILON))(state)
    direct = solve(state, EPSILON)
    for name in ("fast", "slow", "loss"):
        np.testing.assert_allclose(traced[name], direct[name], atol=1e-12)


@pytest.mark.slow
def test_twenty_neurons_within_one_width():
    """More neighbours than any band holds: the dense matrix takes over."""
    problem = tts.Univariate(tts.PiecewiseConstant(JUMPS, VALUES), neurons=20, eta=0.05)
    slow = np.linspace(0.48, 0.52, 20)[None]
    state = State(jnp.zeros((1, 21)), jnp.asarray(slow))
    expected = tts.flow(
        problem, state, epsilon=EPSILON, tau=TAU, solver="rodas5p", rtol=1e-10, atol=1e-10
    )
    answer = solve(state, EPSILON, problem)
    assert answer["stats"]["bandwidth"][0] == 19
    agree(answer, expected, fast=1e-7, slow=1e-8)


# --- derivatives ---------------------------------------------------------------------------------

PARAMETERS = {
    "values": np.array([1.0, 3.0, 0.0]),
    "eta": np.array(0.05),
    "slow": np.array([[0.3, 0.33, 0.8], [0.2, 0.5, 0.6]]),
    "epsilon": np.array([0.05, 0.0]),
    "times": np.array(1.0),
}


def last(parameters):
    """A number of the last states of a flow, in which two neurons overlap, and of a limit."""
    target = tts.PiecewiseConstant([0.4, 0.7], parameters["values"])
    problem = tts.Univariate(target, neurons=3, eta=parameters["eta"])
    state = State(jnp.zeros((2, 4)), parameters["slow"])
    answer = _banded_loop.solve(
        problem,
        state,
        parameters["epsilon"],
        jnp.array([0.0, 0.005, 0.02]) * parameters["times"],
        rtol=1e-9,
        atol=1e-9,
        max_steps=300,
    )
    return jnp.sum(answer["loss"][:, -1]) + jnp.sum(answer["slow"][:, -1] ** 2)


def directions():
    rng = np.random.default_rng(0)
    for name in PARAMETERS:
        direction = {n: rng.normal(size=v.shape) * (n == name) for n, v in PARAMETERS.items()}
        # the limit stays one
        direction["epsilon"] = direction["epsilon"] * np.array([1.0, 0.0])
        yield name, direction


def check_against_central_differences(slope):
    value = jax.jit(last)
    for name, direction in directions():
        ends = [
            float(value({n: v + side * direction[n] for n, v in PARAMETERS.items()}))
            for side in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(
            slope(direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_forward_mode():
    tangent = jax.jit(lambda p, d: jax.jvp(last, (p,), (d,))[1])
    check_against_central_differences(lambda direction: tangent(PARAMETERS, direction))


@pytest.mark.slow
def test_reverse_mode():
    gradient = jax.jit(jax.grad(last))(PARAMETERS)
    check_against_central_differences(
        lambda direction: sum(np.sum(gradient[n] * direction[n]) for n in direction)
    )
