"""The dynamics under `jit`, `vmap` and differentiation, and without 64-bit flags."""

import json
import os
import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from numpy.testing import assert_allclose, assert_array_equal

import tts_jax as tts


TARGET = tts.PiecewiseConstant([0.4, 0.7], [1.0, 3.0, 0.0])
PROBLEM = tts.Univariate(TARGET, neurons=4, eta=0.05)
POSITIONS = np.array([[0.2, 0.5, 0.6, 0.85], [0.15, 0.45, 0.55, 0.8], [0.3, 0.48, 0.62, 0.9]])
STARTS = PROBLEM.state(slow=POSITIONS)
START = PROBLEM.state(slow=POSITIONS[0])
EPSILONS = np.array([0.01, 0.05, 0.3])
TAU = np.array([0.0, 0.005, 0.02])


def explicit_flow(state=START, epsilon=0.05, problem=PROBLEM, **settings):
    return tts.flow(problem, state, epsilon=epsilon, tau=TAU, solver="tsit5", **settings)


# --- jit and vmap ---------------------------------------------------------------------------


def test_flow_under_jit_is_the_direct_call():
    direct = explicit_flow(epsilon=0.05).loss
    assert_allclose(jax.jit(lambda e: explicit_flow(epsilon=e).loss)(0.05), direct, rtol=1e-12)


def test_flow_mapped_over_epsilon_is_the_batched_call_and_the_loop():
    batched = explicit_flow(epsilon=EPSILONS)
    mapped = jax.vmap(lambda e: explicit_flow(epsilon=e))(EPSILONS)
    for lane, epsilon in enumerate(EPSILONS):
        alone = explicit_flow(epsilon=epsilon)
        for leaf in ("fast", "slow", "loss"):
            one = getattr(alone, leaf)
            assert_allclose(getattr(batched, leaf)[lane], one, rtol=1e-12, atol=1e-13)
            assert_allclose(getattr(mapped, leaf)[lane], one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "dynamics",
    [
        pytest.param(explicit_flow, id="flow"),
        pytest.param(lambda s: tts.limit(PROBLEM, s, tau=TAU, solver="tsit5"), id="limit"),
        pytest.param(
            lambda s: tts.sharp_limit(PROBLEM, s, tau=TAU),
            id="sharp_limit",
            marks=pytest.mark.slow,  # compiles three times
        ),
    ],
)
def test_each_dynamics_mapped_over_starts_is_the_batched_call_and_the_loop(dynamics):
    batched = dynamics(STARTS)
    assert batched.batch_dims == ("seed",)
    mapped = jax.vmap(dynamics)(STARTS)
    for lane, positions in enumerate(POSITIONS):
        alone = dynamics(PROBLEM.state(slow=positions))
        for leaf in ("fast", "slow", "loss"):
            one = getattr(alone, leaf)
            assert_allclose(getattr(batched, leaf)[lane], one, rtol=1e-11, atol=1e-12)
            assert_allclose(getattr(mapped, leaf)[lane], one, rtol=1e-11, atol=1e-12)


def test_problems_of_different_width_are_mapped_over():
    widths = jnp.array([0.03, 0.1])
    problems = jax.vmap(lambda eta: tts.Univariate(TARGET, neurons=4, eta=eta))(widths)
    mapped = jax.vmap(lambda problem: explicit_flow(problem=problem).loss)(problems)
    for lane, eta in enumerate(widths):
        alone = explicit_flow(problem=tts.Univariate(TARGET, neurons=4, eta=eta)).loss
        assert_allclose(mapped[lane], alone, rtol=1e-12)


def test_bound_methods_are_jitted_and_mapped_like_functions():
    direct = [PROBLEM.loss(start, slow) for start, slow in zip(*STARTS, strict=True)]
    assert_allclose(jax.vmap(PROBLEM.loss)(*STARTS), direct, rtol=1e-14)
    assert_allclose(jax.jit(PROBLEM.loss)(*START), direct[0], rtol=1e-14)
    gradient = jax.jit(jax.grad(PROBLEM.loss, argnums=(0, 1)))(*START)
    assert_allclose(gradient[0], -PROBLEM.fields(*START).fast, rtol=1e-12)


def test_equal_problems_hash_alike_and_others_do_not():
    def build(eta):
        return tts.Univariate(TARGET, neurons=4, eta=eta)

    assert hash(build(0.1)) == hash(build(0.1))
    assert build(0.1) == build(0.1)
    assert hash(build(0.1)) != hash(build(0.2))
    assert build(0.1) != build(0.2)


# --- differentiation ------------------------------------------------------------------------

PARAMETERS = {
    "positions": POSITIONS[0],
    "epsilon": np.array(0.05),
    "eta": np.array(0.05),
    "values": np.array([1.0, 3.0, 0.0]),
}
TIGHT = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 256}


def built(parameters):
    target = tts.PiecewiseConstant([0.4, 0.7], parameters["values"])
    problem = tts.Univariate(target, neurons=4, eta=parameters["eta"])
    return problem, problem.state(slow=parameters["positions"])


def last_flow_loss(parameters, **settings):
    run = tts.flow(*built(parameters), epsilon=parameters["epsilon"], tau=TAU, **TIGHT | settings)
    return run.loss[-1]


def last_limit_loss(parameters, **settings):
    return tts.limit(*built(parameters), tau=TAU, **TIGHT | settings).loss[-1]


def check_against_central_differences(value_and_slope, rtol, step=1e-5):
    """Check the derivative along one direction per parameter, the others standing still."""
    rng = np.random.default_rng(0)
    for name in PARAMETERS:
        direction = {
            other: rng.standard_normal(value.shape) * (other == name) * np.maximum(0.1, value)
            for other, value in PARAMETERS.items()
        }
        ends = [
            value_and_slope({n: v + side * direction[n] for n, v in PARAMETERS.items()}, direction)
            for side in (step, -step)
        ]
        expected = (ends[0][0] - ends[1][0]) / (2 * step)
        _, slope = value_and_slope(PARAMETERS, direction)
        assert_allclose(slope, expected, rtol=rtol, atol=1e-8, err_msg=name)


def check_reverse_mode(last_loss, rtol=1e-5):
    both = jax.jit(jax.value_and_grad(last_loss))

    def value_and_slope(parameters, direction):
        value, gradient = both(parameters)
        return value, sum(np.sum(gradient[n] * direction[n]) for n in direction)

    check_against_central_differences(value_and_slope, rtol)


def check_forward_mode(last_loss, rtol=1e-5):
    both = jax.jit(lambda p, direction: jax.jvp(last_loss, (p,), (direction,)))
    check_against_central_differences(both, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["rodas5p", "tsit5"])
@pytest.mark.parametrize("last_loss", [last_flow_loss, last_limit_loss])
def test_reverse_mode_agrees_with_central_differences(last_loss, solver):
    check_reverse_mode(lambda p: last_loss(p, solver=solver))


@pytest.mark.parametrize("last_loss", [last_flow_loss, last_limit_loss])
def test_forward_mode_agrees_with_central_differences(last_loss):
    settings = {"solver": "tsit5", "adjoint": diffrax.ForwardMode()}
    check_forward_mode(lambda p: last_loss(p, **settings))


@pytest.mark.slow  # compiles for minutes
def test_derivatives_of_hitting_times_agree_with_central_differences():
    def hitting_times(parameters):
        return tts.sharp_limit(*built(parameters), tau=TAU).stats["hitting_time"]

    assert np.all(np.isfinite(hitting_times(PARAMETERS)))
    check_forward_mode(hitting_times, rtol=1e-8)
    check_reverse_mode(lambda p: hitting_times(p) @ np.array([1.0, 2.0]), rtol=1e-8)


@pytest.mark.parametrize("dynamics", ["flow", pytest.param("limit", marks=pytest.mark.slow)])
def test_gradients_through_the_stiff_solver_are_those_of_the_matrix_exponential(dynamics):
    problem, tau = toy.linear(), [0.3, 1.0]
    state = problem.init(key=jax.random.key(3))

    def solved(state, problem, epsilon):
        if dynamics == "flow":
            run = tts.flow(problem, state, epsilon=epsilon, tau=tau, **TIGHT | {"max_steps": 1024})
        else:
            run = tts.limit(problem, state, tau=tau, **TIGHT)
        return jnp.sum(run.slow["p"] ** 3)

    def exact(state, problem, epsilon):
        if dynamics == "flow":
            return jnp.sum(toy.flow(problem, state, epsilon, tau)[:, 4:] ** 3)
        return jnp.sum(toy.limit(problem, state, tau) ** 3)

    got, expected = (jax.grad(f, argnums=(0, 1, 2))(state, problem, 0.02) for f in (solved, exact))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(one, other, rtol=1e-7, atol=1e-9)


# --- lanes that fail ------------------------------------------------------------------------


def test_a_failing_lane_leaves_the_others_bit_identical():
    sound = explicit_flow(STARTS, epsilon=[0.3, 0.2, 0.1], max_steps=64)
    mixed = explicit_flow(STARTS, epsilon=[0.3, 1e-5, 0.1], max_steps=64)
    assert_array_equal(sound.status, [tts.Status.SUCCESS] * 3)
    assert_array_equal(mixed.status, [tts.Status.SUCCESS, tts.Status.MAX_STEPS, tts.Status.SUCCESS])
    for leaf in ("fast", "slow", "loss"):
        before, after = getattr(sound, leaf), getattr(mixed, leaf)
        assert_array_equal(after[::2], before[::2])
        assert np.all(np.isnan(after[1, -1]))
    assert np.all(np.isfinite(mixed.loss[1, 0]))
    assert mixed.stats["steps"][1] == 64


def test_throw_raises_with_advice():
    with pytest.raises(RuntimeError, match="2 of 3 lanes: MAX_STEPS.*Raise `max_steps`"):
        explicit_flow(STARTS, epsilon=[0.3, 1e-5, 1e-5], max_steps=64, throw=True)
    tie = tts.Univariate(tts.PiecewiseConstant([0.25, 0.5, 0.75], [0.0, 4.0, 3.0, 7.0]), neurons=1)
    with pytest.raises(RuntimeError, match="NOT_UNIQUE.*use `limit`"):
        tts.sharp_limit(tie, tie.state(slow=[0.5]), tau=TAU, throw=True)


def test_throw_returns_a_run_without_failures():
    run = explicit_flow(STARTS, epsilon=[0.3, 0.2, 0.1], max_steps=64, throw=True)
    assert np.all(run.success)


# --- without 64-bit flags -------------------------------------------------------------------

# A newcomer's lines; `answers` is what they got.
NEWCOMER = """
import jax, json, tempfile, pathlib, numpy as np
import tts_jax as tts

target = tts.PiecewiseConstant(jumps=[0.4, 0.7], values=[1, 3, 0])
problem = tts.Univariate(target, neurons=4, eta=0.05)
state = problem.init(key=jax.random.key(1))
given = problem.state(slow=[0.2, 0.5, 0.6, 0.85])
tau = [0.0, 0.005, 0.02]
runs = {
    "flow": tts.flow(problem, given, epsilon=0.05, tau=tau),
    "limit": tts.limit(problem, given, tau=tau),
    "sharp_limit": tts.sharp_limit(problem, given, tau=tau),
    "sgd": tts.sgd(problem, key=jax.random.key(0), seeds=3, epsilon=0.05, step_size=0.01, tau=tau),
}
answers = {
    "start": state.slow,
    "loss": problem.loss(state.fast, state.slow),
    "recovery": problem.recovery(state.slow),
    "critical": problem.critical(state.slow),
    "predict": problem.predict(*given, [0.1, 0.7]),
    "continued": problem.loss(runs["flow"].fast[-1], runs["flow"].slow[-1]),
}
for name, run in runs.items():
    parts = {"fast": run.fast, "slow": run.slow, "loss": run.loss, "tau": run.tau}
    answers |= {f"{name} {part}": value for part, value in parts.items()}
    labelled = run.to_xarray()
    with tempfile.TemporaryDirectory() as folder:
        loaded = tts.load(run.save(pathlib.Path(folder) / "run.nc"))
    answers |= {f"{name} labelled": labelled["loss"].values, f"{name} loaded": loaded.loss}
"""
REPORT = """
answers["float32 loss"] = jax.jit(problem.loss)(*given)
assert answers["float32 loss"].dtype == np.float32
assert jax.jit(lambda a, u: problem.loss(a, u))(*given) == answers["float32 loss"]
answers["float32 slope"] = jax.jit(jax.grad(problem.loss, argnums=0))(*given)
problems = jax.vmap(lambda eta: tts.Univariate(target, neurons=4, eta=eta))(np.array([0.05, 0.1]))

def explicit(state, epsilon=0.05):
    return tts.flow(problem, state, epsilon=epsilon, tau=tau, solver="tsit5").loss

attempts = {
    "flow: jit": lambda: jax.jit(explicit)(given),
    "flow: jit closure": lambda: jax.jit(lambda: explicit(given))(),
    "flow: vmap": lambda: jax.vmap(lambda e: explicit(given, e))(np.array([0.05, 0.1])),
    "flow: grad": lambda: jax.grad(lambda e: explicit(given, e)[-1])(0.05),
    "flow: vmap over problems": lambda: jax.vmap(
        lambda one: tts.flow(one, given, epsilon=0.05, tau=tau).loss
    )(problems),
    "limit: jit": lambda: jax.jit(lambda s: tts.limit(problem, s, tau=tau).loss)(given),
    "limit: vmap over problems": lambda: jax.vmap(
        lambda one: tts.limit(one, given, tau=tau).loss
    )(problems),
    "sharp_limit: jit": lambda: jax.jit(lambda s: tts.sharp_limit(problem, s, tau=tau).loss)(given),
    "sharp_limit: vmap over problems": lambda: jax.vmap(
        lambda one: tts.sharp_limit(one, given, tau=tau).loss
    )(problems),
}
refused = {}
for name, attempt in attempts.items():
    try:
        refused[name] = f"answered {attempt()}"
    except RuntimeError as error:
        refused[name] = str(error)
with jax.enable_x64(True):
    for name in ("flow: jit", "sharp_limit: jit"):
        answers[f"remedy {name}"] = attempts[name]()
print(json.dumps({
    "x64": jax.config.jax_enable_x64,
    "refused": refused,
    "dtypes": {name: str(value.dtype) for name, value in answers.items()},
    "answers": {name: np.asarray(value, float).tolist() for name, value in answers.items()},
}))
"""


@pytest.fixture(scope="module")
def newcomer():
    """What a newcomer sees in a process without flags, any warning being an error."""
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-W", "error", "-c", NEWCOMER + REPORT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def expected():
    names = {}
    exec(NEWCOMER, names)
    return names["answers"]


def test_without_flags_answers_are_float64_and_those_with_the_flag(newcomer, expected):
    for name, value in expected.items():
        assert newcomer["dtypes"][name] == "float64", name
        assert_allclose(newcomer["answers"][name], value, rtol=1e-13, atol=1e-14, err_msg=name)
    assert newcomer["x64"] is False


def test_without_flags_a_traced_solve_is_refused_with_the_remedy(newcomer):
    for name, message in newcomer["refused"].items():
        who = name.partition(":")[0]
        assert message.startswith(f"`{who}` needs float64"), f"{name}: {message}"
        assert "jax.config.update('jax_enable_x64', True)" in message
        assert "with jax.enable_x64(True):" in message


def test_without_flags_the_remedy_works(newcomer, expected):
    explicit = tts.flow(PROBLEM, START, epsilon=0.05, tau=TAU, solver="tsit5").loss
    for name, value in (
        ("flow: jit", explicit),
        ("sharp_limit: jit", expected["sharp_limit loss"]),
    ):
        assert newcomer["dtypes"][f"remedy {name}"] == "float64"
        assert_allclose(newcomer["answers"][f"remedy {name}"], value, rtol=1e-12)


def test_without_flags_the_loss_in_a_users_jit_is_right_to_float32(newcomer):
    answers = newcomer["answers"]
    assert_allclose(answers["float32 loss"], PROBLEM.loss(*START), rtol=1e-5)
    slope = -PROBLEM.fields(*START).fast
    assert_allclose(answers["float32 slope"], slope, rtol=1e-5, atol=1e-5)
