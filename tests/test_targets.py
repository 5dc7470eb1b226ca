"""Dynamics, samples and refusals with other activations and targets than the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import tts_jax as tts


TEACHER = tts.PiecewiseLinear.from_kinks([0.3, 0.5, 0.7], [1.0, -2.0, 3.0])
JUMPS = tts.PiecewiseConstant([0.3, 0.6], [0.0, 1.0, -0.5])
SMOOTH = tts.Function(lambda x: jnp.sin(6 * x))
TAU = np.array([0.0, 0.05, 0.2])


# --- targets ----------------------------------------------------------------------------------


def test_piecewise_linear_targets():
    x = np.linspace(0, 1, 101)
    kinks = np.maximum(np.subtract.outer(x, [0.3, 0.5, 0.7]), 0) @ [1.0, -2.0, 3.0]
    np.testing.assert_allclose(TEACHER(x), kinks, atol=1e-15)
    np.testing.assert_array_equal(TEACHER.goals, [0.3, 0.5, 0.7])
    for knots in ([0, 0.4, 1], [0.2, 0.4], [0.4, 1], [1.0]):
        values = np.arange(len(knots)) ** 2 + 1.0
        target = tts.PiecewiseLinear(knots, values)
        np.testing.assert_allclose(target(x), np.interp(x, knots, values), rtol=1e-15)
        np.testing.assert_allclose(target.elementwise(jnp.asarray(x)), target(x), rtol=1e-14)
        np.testing.assert_array_equal(target.goals, [k for k in knots if 0 < k < 1])
        lines = target.lines()
        mean = np.trapezoid(np.interp(np.linspace(0, 1, 100001), knots, values), dx=1e-5)
        np.testing.assert_allclose(lines.mean(), mean, rtol=1e-9)
        np.testing.assert_allclose(lines.heights, 0.0, atol=1e-14)


def test_functions_know_their_jumps():
    target = tts.Function(lambda x: jnp.where(x < 0.4, x, 2.0), breakpoints=[0.4, 0.7])
    np.testing.assert_allclose(target.steps(), [1.6, 0.0], atol=1e-15)
    assert target(np.zeros((2, 3))).shape == (2, 3)
    assert tts.Univariate(jnp.cos).target.name == "Function(cos)"
    # a sine of 30 periods has more panels than one of one
    slow, fast = (tts.Function(lambda x, k=k: jnp.sin(6.28 * k * x)) for k in (1, 30))
    assert len(fast.panels) > 5 * len(slow.panels)


def test_recovery_is_the_distance_to_the_knots():
    problem = tts.Univariate(TEACHER, activation="relu", eta=1.0, neurons=3)
    np.testing.assert_allclose(problem.recovery([0.1, 0.45, 0.72]), [0.15, 0.05, 0.02], atol=1e-15)


# --- flow and limit -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relu():
    problem = tts.Univariate(TEACHER, activation="relu", eta=1.0, neurons=3, noise=0.5)
    return problem, problem.state(slow=[0.2, 0.45, 0.8], fast=[0.1, 1.0, -1.0, 2.0])


def test_flow_of_relu_against_lsoda(relu, tmp_path):
    problem, state = relu
    epsilon = 0.1
    run = tts.flow(problem, state, epsilon=epsilon, tau=TAU, rtol=1e-9, atol=1e-9)

    def velocity(_, y):
        fast, slow = y[:4], y[4:]
        edges = np.unique(np.clip([0.0, 0.3, 0.5, 0.7, 1.0, *slow], 0, 1))
        half = np.diff(edges)[:, None] / 2  # three-point Gauss, exact for these quadratics
        x = (edges[:-1, None] + half * (1 + np.array([-1, 0, 1]) * np.sqrt(0.6))).ravel()
        weights = (half * np.array([5, 8, 5]) / 9).ravel()
        rows = np.column_stack([np.ones_like(x), np.maximum(x[:, None] - slow, 0)])
        misfit = weights * (rows @ fast - np.interp(x, TEACHER.knots, TEACHER.values))
        return np.concatenate(
            [-2 * misfit @ rows / epsilon, 2 * fast[1:] * (misfit @ (x[:, None] > slow))]
        )

    exact = solve_ivp(
        velocity, (0, 0.2), np.concatenate(state), "LSODA", TAU, rtol=1e-12, atol=1e-13
    ).y.T
    assert np.all(run.success)
    np.testing.assert_allclose(np.concatenate([run.fast, run.slow], axis=1), exact, atol=1e-7)

    # the file tells what was solved
    loaded = tts.load(run.save(tmp_path / "relu.nc"))
    notes = dict(loaded.notes)
    assert (notes["activation"], notes["target"]) == ("relu", "PiecewiseLinear")
    np.testing.assert_array_equal(loaded.coords["knot"], [0.3, 0.5, 0.7])
    np.testing.assert_array_equal(loaded.settings["knots"], TEACHER.knots)
    assert run.to_xarray()["recovery"].dims == ("tau", "knot")


@pytest.mark.parametrize(
    ("activation", "solver"),
    [("ramp", "tsit5"), pytest.param("erf", "rodas5p", marks=pytest.mark.slow)],
)
def test_flow_tends_to_the_limit_at_first_order_in_epsilon(activation, solver):
    problem = tts.Univariate(JUMPS, activation=activation, eta=0.1, neurons=2)
    state = problem.state(slow=[0.2, 0.7])
    options = {"tau": [0.0, 0.1, 0.2], "rtol": 1e-9, "atol": 1e-9, "solver": solver}
    limit = tts.limit(problem, state, **options)
    assert np.all(limit.stats["condition"] < 1e4)
    epsilons = np.array([1e-3, 5e-4, 2.5e-4])
    flow = tts.flow(problem, state, epsilon=epsilons, **options)
    distance = np.max(np.abs(flow.slow - limit.slow), axis=(1, 2))
    slope = np.polyfit(np.log(epsilons), np.log(distance), 1)[0]
    assert abs(slope - 1) < 0.1
    assert np.max(np.abs(limit.slow[-1] - limit.slow[0])) > 0.02  # and it moves


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "activation", "eta"),
    [
        (TEACHER, "relu", 1.0),
        pytest.param(JUMPS, "logistic", 0.05, marks=pytest.mark.slow),
        pytest.param(SMOOTH, jnp.tanh, 0.2, marks=pytest.mark.slow),
    ],
)
def test_mean_sample_gradient_is_the_gradient(target, activation, eta):
    problem = tts.Univariate(target, activation=activation, eta=eta, neurons=3)
    fast, slow = np.array([0.3, 1.0, -0.5, 0.7]), np.array([0.25, 0.5, 0.81])
    grid = (np.arange(200_000) + 0.5) / 200_000  # the midpoint rule in place of chance

    @jax.jit
    def mean(x):
        def gradient(x):
            return problem.sample_gradient(fast, slow, (x, jnp.zeros(())))

        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(gradient)(x))

    ours, exact = mean(grid), problem.fields(fast, slow)
    np.testing.assert_allclose(ours.fast, -exact.fast, atol=2e-5)
    np.testing.assert_allclose(ours.slow, -exact.slow, atol=2e-5 / eta)


@pytest.mark.parametrize(
    ("target", "activation", "engine"),
    [
        (TEACHER, "relu", "simd"),
        pytest.param(JUMPS, "ramp", "simd", marks=pytest.mark.slow),
        pytest.param(SMOOTH, "relu", "loop", marks=pytest.mark.slow),
        (JUMPS, "erf", "loop"),
    ],
)
def test_lanes_take_the_steps_of_the_general_engine(target, activation, engine):
    pytest.importorskip("llvmlite")
    problem = tts.Univariate(target, activation=activation, eta=0.2, neurons=3, noise=0.5)
    state = problem.state(slow=[0.25, 0.5, 0.81])
    options = {"epsilon": 0.1, "step_size": 1e-3, "tau": [0.05], "dtype": np.float64}
    options |= {"key": jax.random.key(0), "seeds": 3, "state": state}
    lanes, general = (tts.sgd(problem, engine=e, **options) for e in ("auto", "general"))
    assert dict(lanes.notes)["engine"] == engine
    np.testing.assert_allclose(lanes.fast, general.fast, atol=1e-12)
    np.testing.assert_allclose(lanes.slow, general.slow, atol=1e-12)
    assert np.all(np.abs(lanes.slow - state.slow) > 1e-7)


@pytest.mark.slow
def test_hitting_times_of_knots(relu):
    problem, state = relu
    options = {"epsilon": 0.1, "tau_end": 1.0, "radius": 0.08}
    times = np.asarray(tts.hitting_times(problem, state, **options))
    assert times[1] == 0
    assert 0.1 < times[0] < times[2] < 1.0
    run = tts.flow(problem, state, epsilon=0.1, tau=times[[0, 2]])
    distances = np.asarray(run.observables["recovery"])[:, [0, 2]]
    np.testing.assert_allclose(np.diagonal(distances), 0.08, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["ramp", "logistic", "erf"])
def test_sharp_limit_is_that_of_any_step(activation):
    cubic, other = (
        tts.Univariate(JUMPS, activation=name, neurons=4) for name in ("cubic", activation)
    )
    state = cubic.state(slow=[0.2, 0.45, 0.55, 0.8])
    ours, same = (tts.sharp_limit(p, state, tau=[0.0, 0.02, 0.1]) for p in (other, cubic))
    np.testing.assert_array_equal(ours.slow, same.slow)


@pytest.mark.slow
def test_limit_of_ramps_tends_to_the_sharp_limit():
    narrow = tts.Univariate(JUMPS, activation="ramp", neurons=4, eta=1e-4)
    state = narrow.state(slow=[0.2, 0.45, 0.55, 0.8])
    limit, sharp = (f(narrow, state, tau=[0.0, 0.02]) for f in (tts.limit, tts.sharp_limit))
    np.testing.assert_allclose(limit.slow, sharp.slow, atol=1e-3)
    assert np.max(np.abs(sharp.slow[1] - sharp.slow[0])) > 3e-3


# --- refusals -----------------------------------------------------------------------------------

START = tts.State(np.zeros(4), np.array([0.2, 0.5, 0.8]))
RELU = tts.Univariate(TEACHER, activation="relu", eta=1.0, neurons=3)
LOGISTIC = tts.Univariate(JUMPS, activation="logistic", eta=0.05, neurons=3)
WAVE = tts.Univariate(SMOOTH, activation="ramp", eta=0.05, neurons=3)
SGD = {"key": jax.random.key(0), "epsilon": 0.1, "step_size": 1e-3, "tau": [0.01]}

REFUSED = {
    "unknown activation": (
        lambda: tts.Univariate(JUMPS, activation="sigmoid"),
        ValueError,
        "`activation` must be one of .*'logistic'.* got 'sigmoid'",
    ),
    "no activation": (lambda: tts.Univariate(JUMPS, activation=3), TypeError, "got 3"),
    "NumPy activation": (
        lambda: tts.Univariate(JUMPS, activation=lambda z: np.asarray(z) + 1),
        TypeError,
        "`activation` must be a function that JAX can trace.*jax.numpy",
    ),
    "activation of vectors": (
        lambda: tts.Univariate(JUMPS, activation=lambda z: jnp.sum(z)),
        ValueError,
        "`activation` must be element-wise",
    ),
    "infinite activation": (
        lambda: tts.Univariate(JUMPS, activation=lambda z: jnp.log(z)),
        ValueError,
        "`activation` must be finite",
    ),
    "infinite target": (
        lambda: tts.Function(lambda x: 1 / (x - x)),
        ValueError,
        "`function` must be finite",
    ),
    "unsorted breakpoints": (
        lambda: tts.Function(jnp.sin, breakpoints=[0.5, 0.2]),
        ValueError,
        r"`breakpoints` must .*got \[0.5 0.2\]",
    ),
    "unsorted knots": (
        lambda: tts.PiecewiseLinear([0.5, 0.2], [0, 1]),
        ValueError,
        r"`knots` must .*got \[0.5 0.2\]",
    ),
    "knot beyond 1": (lambda: tts.PiecewiseLinear([0.5, 1.2], [0, 1]), ValueError, "rescale"),
    "values of another length": (
        lambda: tts.PiecewiseLinear([0.2, 0.5], [0, 1, 2]),
        ValueError,
        r"\(2,\) and \(3,\). Give f",
    ),
    "kink at 0": (lambda: tts.PiecewiseLinear.from_kinks([0.0], [1]), ValueError, "`kinks`"),
    "no order": (lambda: tts.Univariate(jnp.sin, order=0), ValueError, "`order`"),
    "sharp limit of ReLU": (
        lambda: tts.sharp_limit(RELU, START, tau=[0.1]),
        TypeError,
        "symmetric step.*got `relu`.*Use `limit`",
    ),
    "sharp limit of a callable": (
        lambda: tts.sharp_limit(
            tts.Univariate(JUMPS, activation=jnp.tanh, neurons=3), START, tau=[1]
        ),
        TypeError,
        "got `custom tanh`",
    ),
    "sharp limit onto lines": (
        lambda: tts.sharp_limit(tts.Univariate(TEACHER, neurons=3), START, tau=[0.1]),
        TypeError,
        "needs a `PiecewiseConstant` target, got a `PiecewiseLinear`",
    ),
    "recovery without goals": (lambda: WAVE.recovery(START.slow), TypeError, "breakpoints="),
    "hits without goals": (
        lambda: tts.hitting_times(WAVE, START, tau_end=0.1),
        TypeError,
        "no places to recover",
    ),
    "hits without goals but a radius": (
        lambda: tts.hitting_times(WAVE, START, tau_end=0.1, radius=0.1),
        TypeError,
        "needs distances to goals",
    ),
    "hits of ReLU": (
        lambda: tts.hitting_times(RELU, START, tau_end=0.1),
        TypeError,
        "`radius` with the activation `relu`",
    ),
    "box of another step": (
        lambda: tts.sgd(LOGISTIC, state=START, gradient="box", **SGD),
        ValueError,
        "`gradient` must be 'exact' with the activation `logistic`",
    ),
    "banded engine": (
        lambda: tts.flow(LOGISTIC, START, epsilon=0.1, tau=[0.1], engine="loop"),
        ValueError,
        "`engine` is 'loop', which this `Univariate` does not have",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_give_a_reason(case):
    call, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        call()


def test_the_box_belongs_to_the_cubic_step_with_any_target():
    problem = tts.Univariate(TEACHER, eta=0.2, neurons=3)
    sample = (jnp.asarray(0.22), jnp.zeros(()))
    box = problem.sample_gradient(np.ones(4), START.slow, sample, gradient="box")
    exact = problem.sample_gradient(np.ones(4), START.slow, sample)
    z = (0.22 - 0.2) / 0.2
    np.testing.assert_allclose(box.slow[0] / exact.slow[0], 1 / (12 * (0.5 - z) ** 2), rtol=1e-12)
