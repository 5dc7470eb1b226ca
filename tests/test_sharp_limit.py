"""The sharp limit: closed forms in high precision, events against SciPy and against finite η."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import sharp_reference
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp

import tts_jax as tts
from tts_jax import _sharp_limit
from tts_jax.problems import _sharp


# --- closed forms ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    far=st.floats(1e-4, 0.5),
    share=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1.0, 1 - 1e-12, 1 - 1e-7, 0.5, 1e-6])),
    height=st.floats(0.5, 5.0),
)
def test_hitting_time_against_the_integral_in_50_digits(far, share, height):
    near = far * share
    ours = float(_sharp.pair_hitting_time(*map(jnp.asarray, (near, far, height**2))))
    assert abs(ours - reference.hitting_time(near, far, height)) <= 1e-12
    assert near / height**2 - 1e-13 <= ours <= 4 * near / height**2 + 1e-13


def test_hitting_time_of_a_symmetric_pair():
    np.testing.assert_allclose(
        _sharp.pair_hitting_time(*map(jnp.asarray, (0.1, 0.1, 4.0))),
        4 * 0.1 / 4,
        rtol=1e-15,
    )


@pytest.mark.parametrize("near", [0.05, 0.0999, 0.1 * (1 - 1e-9), 0.1, 1e-3])
def test_distances_against_an_ode_solver(near):
    """dl/dτ = −w² r²/(l+r)², dr/dτ = −w² l²/(l+r)², by DOP853 at 1e-13."""
    far, height = 0.1, 1.5
    end = float(_sharp.pair_hitting_time(*map(jnp.asarray, (near, far, height**2))))
    times = np.linspace(0, 0.97 * end, 9)
    ours = _sharp.pair_distances(
        jnp.full(9, near), jnp.full(9, far), jnp.asarray(height**2 * times)
    )
    answer = solve_ivp(
        lambda t, y: -(height**2) * y[::-1] ** 2 / np.sum(y) ** 2,
        (0, times[-1]),
        [near, far],
        method="DOP853",
        t_eval=times,
        rtol=1e-13,
        atol=1e-15,
    ).y
    np.testing.assert_allclose(ours, answer, atol=1e-12)


def mp_trajectory(near, far, height, time):
    """Both distances at `time` in 40 digits by mpmath's Taylor-series ODE solver."""
    from mpmath import mp, mpf, odefun

    with mp.workdps(40):
        square = mpf(height) ** 2
        solution = odefun(
            lambda t, y: [
                -square * y[1] ** 2 / (y[0] + y[1]) ** 2,
                -square * y[0] ** 2 / (y[0] + y[1]) ** 2,
            ],
            0,
            [mpf(near), mpf(far)],
        )
        return [float(value) for value in solution(mpf(time))]


def test_distances_against_high_precision():
    near, far, height = 0.03, 0.08, 2.0
    for time in (0.002, 0.006, 0.009):
        ours = _sharp.pair_distances(*map(jnp.asarray, (near, far, height**2 * time)))
        np.testing.assert_allclose(ours, mp_trajectory(near, far, height, time), atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(near=st.floats(1e-6, 1.0), time=st.floats(0.0, 2.0))
def test_the_cubic_invariant_is_conserved(near, time):
    far, height = 1.0, 1.0
    r, d = _sharp.pair_distances(*map(jnp.asarray, (near, far, height**2 * time)))
    assert abs((d**3 - r**3) - (far**3 - near**3)) <= 1e-13
    hit = time >= float(_sharp.pair_hitting_time(*map(jnp.asarray, (near, far, height))))
    assert (float(r) == 0.0) == hit


def test_state_and_time_fit_together():
    """From any point of the path the remaining time is what is left of the total."""
    near, far, height = jnp.asarray(0.04), jnp.asarray(0.05), jnp.asarray(3.0)
    total = _sharp.pair_hitting_time(near, far, height**2)
    for share in (0.1, 0.5, 0.9, 0.999):
        r, d = _sharp.pair_distances(near, far, height**2 * share * total)
        left = _sharp.pair_hitting_time(r, d, height**2)
        np.testing.assert_allclose(left, (1 - share) * total, atol=1e-14)


def test_published_start(problem, published):
    """Known hitting times of the start from NumPy's seed 42, in the convention with ½."""
    slow = published["quick"]["checkpoints"]["0"]["u"][1:]
    tau = np.append(np.linspace(0, 0.035, 5), 0.05)
    answer = tts.sharp_limit(problem, problem.state(slow=slow), tau=tau)
    assert answer.status == tts.Status.SUCCESS
    listed = [0.0032, 0.0051, 0.0064, 0.0175, 0.0563]
    np.testing.assert_allclose(np.sort(2 * answer.stats["hitting_time"]), listed, atol=6e-5)
    # and the published run at ε = 2e-5 ends on the neurons that the limit names
    final = published["two_timescale"]["checkpoints"]["100"]["u"][1:]
    assert np.max(np.abs(answer.slow[4] - np.array(final))) <= 1.2 * problem.eta


def test_finite_width_limit_tends_to_the_sharp_limit(target, separated):
    """‖limit_η − sharp‖ falls with η, while no neuron has hit yet and after all have."""
    tau = np.linspace(0, 0.004, 6)
    sharp = tts.sharp_limit(tts.Univariate(target, eta=1e-3), separated, tau=tau)
    assert sharp.success
    errors = []
    for eta in (4e-3, 2e-3, 1e-3, 5e-4):
        narrow = tts.limit(tts.Univariate(target, eta=eta), separated, tau=tau)
        errors.append(np.max(np.abs(narrow.slow - sharp.slow)) / eta)
    assert max(errors) <= 0.25
    assert errors[-1] * 5e-4 < 0.3 * errors[0] * 4e-3


def test_loss_and_weights_of_the_sharp_limit(problem, separated):
    """The weights are those of the exact least squares at a tiny width; so is the loss."""
    tau = np.linspace(0, 0.05, 6)
    sharp = tts.sharp_limit(problem, separated, tau=tau)
    tiny = tts.Univariate(problem.target, eta=1e-9)
    for k in range(6):
        # off the jumps, where a transition of any width would halve the step
        slow = sharp.slow[k] + 1e-8
        np.testing.assert_allclose(sharp.fast[k], tiny.critical(slow), atol=3e-5)
        np.testing.assert_allclose(sharp.loss[k], tiny.loss(sharp.fast[k], slow), atol=3e-6)
    assert np.all(np.diff(sharp.loss) <= 1e-15)
    assert sharp.loss[-1] == 0.0


def test_labels_follow_the_neurons(problem, separated):
    order = np.random.default_rng(1).permutation(20)
    tau = np.linspace(0, 0.01, 6)
    plain = tts.sharp_limit(problem, separated, tau=tau)
    mixed = tts.sharp_limit(problem, problem.state(slow=separated.slow[order]), tau=tau)
    np.testing.assert_array_equal(mixed.slow, plain.slow[:, order])
    np.testing.assert_array_equal(mixed.fast[:, 1:], plain.fast[:, 1:][:, order])


WALLS = [
    ([0.5, 0.9], [0.3], [0.0, 1.0]),  # nobody left of the jump: the interval's end holds the fit
    ([0.1, 0.2], [0.4], [0.0, 2.0]),  # nobody right of it
    ([-0.1, 0.5], [0.3], [0.0, 1.0]),  # a neuron outside counts as the end
]


@pytest.mark.parametrize(("positions", "jumps", "values"), WALLS)
def test_a_jump_with_neurons_on_one_side_only(positions, jumps, values):
    target = tts.PiecewiseConstant(jumps, values)
    sharp_problem = tts.Univariate(target, neurons=2, eta=2e-4)
    state = sharp_problem.state(slow=positions)
    tau = np.linspace(0, 0.1, 6)
    sharp = tts.sharp_limit(sharp_problem, state, tau=tau)
    finite = tts.limit(sharp_problem, state, tau=tau, rtol=1e-8, atol=1e-8)
    assert sharp.success
    np.testing.assert_allclose(sharp.slow, finite.slow, atol=1e-3)
    assert np.max(np.abs(sharp.slow[-1] - sharp.slow[0])) > 0.01


def test_a_neuron_on_a_jump_has_recovered_it(problem, separated):
    slow = np.sort(np.append(separated.slow[1:], 0.2))
    answer = tts.sharp_limit(problem, problem.state(slow=slow), tau=np.linspace(0, 0.1, 6))
    assert answer.success
    assert answer.stats["hitting_time"][0] == 0.0
    on = int(np.searchsorted(slow, 0.2))
    np.testing.assert_array_equal(answer.slow[:, on], 0.2)
    # and keeps its neighbour from being pulled
    np.testing.assert_array_equal(answer.slow[:, on - 1], slow[on - 1])


# --- any start: against SciPy ------------------------------------------------------------------

LANES, NEURONS, COUNT = 24, 6, 4
TAU = np.linspace(0.0, 0.3, 13)


@functools.cache
def compiled(numeric=False):
    """Starts `[24, 6]`, each with its own four jumps and five values."""

    def one(slow, jumps, values):
        tau = jnp.asarray(TAU)
        return _sharp.sharp_trajectories(slow[None], tau, jumps, values, numeric=numeric)

    mapped = jax.jit(jax.vmap(one))
    return lambda *args: jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], mapped(*args))


def sharp(starts, numeric=False):
    """Answers for (positions, jumps, values) of any size: one compiled function for all.

    Missing neurons stand beyond 1, missing jumps have no height.
    """
    rows = []
    for slow, jumps, values in [*starts, *[starts[0]] * (LANES - len(starts))]:
        spare = COUNT - len(jumps)
        more = jumps[-1] + (1 - jumps[-1]) * np.arange(1, spare + 1) / (spare + 1)
        rows.append(
            (
                np.concatenate([slow, np.full(NEURONS - len(slow), 2.0)]),
                np.concatenate([jumps, more]),
                np.concatenate([values, np.full(spare, values[-1])]),
            )
        )
    answer = compiled(numeric)(*(np.stack(column) for column in zip(*rows, strict=True)))
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], answer) for lane in range(len(starts))]


def listed(answer, end=np.inf):
    """Events as (time, neuron, jump, name) up to `end`."""
    fields = (answer["events"][name] for name in ("time", "neuron", "jump", "kind"))
    rows = zip(*fields, strict=True)
    return [(t, n, k, tts.Event(q).name) for t, n, k, q in rows if np.isfinite(t) and t <= end]


def random_starts(seed):
    rng = np.random.default_rng(seed)
    starts = []
    for _ in range(LANES):
        count, neurons = rng.integers(2, COUNT + 1), rng.integers(1, NEURONS + 1)
        jumps = np.sort(rng.uniform(0.05, 0.95, count))
        if np.min(np.diff(jumps)) > 1e-3:
            starts.append((np.sort(rng.random(neurons)), jumps, rng.normal(size=count + 1) * 2))
    return starts


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_random_starts_against_scipy(seed):
    """Pieces with no, one and several neurons; passes and departures among the events."""
    starts = random_starts(seed)
    kinds = set()
    for start, answer in zip(starts, sharp(starts), strict=True):
        assert answer["status"] == tts.Status.SUCCESS
        positions, events = sharp_reference.simulate(start[0], start[1], start[2], TAU)
        np.testing.assert_allclose(answer["slow"][:, : len(start[0])], positions, atol=3e-12)
        ours = listed(answer, TAU[-1])
        assert [event[1:] for event in ours] == [event[1:] for event in events]
        assert np.allclose([e[0] for e in ours], [e[0] for e in events], rtol=0, atol=3e-12)
        kinds |= {event[3] for event in ours}
    assert kinds >= {"HIT", "PASS"}


@pytest.mark.slow  # the random starts against SciPy compile the same less often
@pytest.mark.parametrize("seed", [3])
def test_steps_and_closed_forms_agree(seed):
    starts = random_starts(seed)
    for ours, steps in zip(sharp(starts), sharp(starts, numeric=True), strict=True):
        np.testing.assert_allclose(ours["slow"], steps["slow"], atol=1e-12)
        np.testing.assert_allclose(ours["loss"], steps["loss"], atol=1e-12)
        hitting = ours["stats"]["hitting_time"]
        np.testing.assert_allclose(hitting, steps["stats"]["hitting_time"], rtol=1e-11)


LEVELS = st.floats(-5, 5).map(lambda x: round(x, 3))
PLACES = st.floats(0, 1).map(lambda x: round(x, 4))


@settings(max_examples=25, deadline=None)
@given(
    jumps=st.lists(PLACES.filter(lambda x: 0 < x < 1), min_size=2, max_size=COUNT, unique=True),
    values=st.lists(LEVELS, min_size=COUNT + 1, max_size=COUNT + 1),
    slow=st.lists(PLACES, min_size=1, max_size=NEURONS),
)
def test_any_target_and_start(jumps, values, slow):
    """Order is kept, the loss never rises, and a NaN has a status; ties on a grid included."""
    start = np.array(slow), np.sort(jumps), np.array(values[: len(jumps) + 1])
    (answer,) = sharp([start])
    known = np.isfinite(answer["loss"])
    assert answer["status"] in (tts.Status.SUCCESS, tts.Status.NOT_UNIQUE)
    assert np.all(known) or answer["status"] == tts.Status.NOT_UNIQUE
    assert known[0]
    np.testing.assert_array_equal(known, answer["stats"]["reached"] >= TAU)
    positions, loss = answer["slow"][known], answer["loss"][known]
    assert np.all(np.diff(positions[:, np.argsort(answer["slow"][0], kind="stable")]) >= 0)
    assert np.all(np.diff(loss) <= 1e-13 * (1 + loss[0]))
    times = answer["events"]["time"]
    count = np.sum(np.isfinite(times))
    assert np.all(np.diff(times[:count]) >= 0)
    assert np.all((answer["events"]["kind"] >= 0) == np.isfinite(times))


# --- any start: against finite η ------------------------------------------------------------------

CASES = {
    "one neuron between two jumps": ([0.1, 0.45, 0.9], [0.3, 0.6], [0, 1, -0.5]),
    "an empty piece": ([0.1, 0.2, 0.8], [0.3, 0.6], [0, 1, -0.5]),
    "a single neuron": ([0.42], [0.3, 0.6], [0, 1, -0.5]),
    "no neuron inside": ([-0.2, 1.3], [0.3, 0.6], [0, 1, -0.5]),
    "a jump is passed": ([0.2, 0.45], [0.3, 0.35, 0.7], [0, 0.3, 2, 0]),
    "a jump is left": ([0.1, 0.4, 0.9], [0.2, 0.4, 0.7], [0, 3, 2.5, -2]),
    "repelled from its jump": ([0.5, 0.9], [0.3, 0.5, 0.7], [0, 4, 3, 7]),
    "held on its jump": ([0.1, 0.5, 0.9], [0.3, 0.5, 0.7], [0, 1, 3, 4]),
    "coincident flanks": ([0.2, 0.2, 0.42], [0.3], [0, 1]),
    "at both ends": ([0.0, 0.5, 1.0], [0.3, 0.8], [0, 1, -0.5]),
    "three jumps between neighbours": ([0.1, 0.9], [0.3, 0.5, 0.7], [0, 1, -1, 2.5]),
    "all in one piece": ([0.02, 0.1, 0.15, 0.2], [0.3, 0.6, 0.8], [0, 2, 1, 3]),
}


@pytest.mark.parametrize(
    "name",
    [
        # every case compiles anew
        pytest.param(name, marks=[pytest.mark.slow] if place > 2 else [])
        for place, name in enumerate(CASES)
    ],
)
def test_the_limit_at_finite_width_tends_to_it(name):
    """At first order in η, through every event."""
    slow, jumps, values = CASES[name]
    (answer,) = sharp([CASES[name]])
    assert answer["status"] == tts.Status.SUCCESS
    errors = []
    for eta in (1e-3, 1e-4):
        narrow = tts.Univariate(tts.PiecewiseConstant(jumps, values), neurons=len(slow), eta=eta)
        run = tts.limit(narrow, narrow.state(slow=slow), tau=TAU[::4], rtol=1e-8, atol=1e-8)
        assert run.success
        errors.append(np.max(np.abs(run.slow - answer["slow"][::4, : len(slow)])))
    assert errors[0] <= 1e-3
    assert errors[1] <= 0.2 * errors[0] + 1e-7


def test_events_are_named():
    passed, left, held, unstable = sharp(
        [CASES[f"{name}"] for name in ("a jump is passed", "a jump is left", "held on its jump")]
        + [CASES["repelled from its jump"]]
    )
    assert [event[1:] for event in listed(passed)][:2] == [(0, 0, "PASS"), (0, 1, "HIT")]
    assert listed(left)[0] == (0.0, 1, 1, "LEAVE")
    assert listed(held)[0] == (0.0, 1, 1, "HIT")
    assert listed(unstable)[0] == (0.0, 0, 1, "LEAVE")
    # passing a jump does not recover it
    assert passed["stats"]["hitting_time"][0] == np.inf
    assert held["stats"]["hitting_time"][1] == 0.0


@pytest.mark.parametrize("numeric", [False, True])
def test_both_flanks_reach_a_jump_together(numeric):
    """T = 4 D/w², by the closed form and as an interval that collapses under the steps."""
    (answer,) = sharp([([0.625, 0.875], [0.75], [0.0, 2.0])], numeric)
    assert [event[1:] for event in listed(answer)] == [(0, 0, "HIT"), (1, 0, "HIT")]
    times = [event[0] for event in listed(answer)]
    np.testing.assert_allclose(times, 4 * 0.125 / 4, rtol=1e-14)
    np.testing.assert_array_equal(answer["slow"][-1, :2], 0.75)
    assert answer["loss"][-1] == 0.0
    assert answer["status"] == tts.Status.SUCCESS


def test_a_tie_is_reported_and_what_was_known_is_kept():
    tie, sound = sharp(
        [([0.5], [0.25, 0.5, 0.75], [0.0, 4.0, 3.0, 7.0]), CASES["a jump is passed"]]
    )
    assert tie["status"] == tts.Status.NOT_UNIQUE
    assert np.isfinite(tie["loss"][0])
    assert np.all(np.isnan(tie["loss"][1:]))
    assert np.all(np.isnan(tie["slow"][1:]))
    assert sound["status"] == tts.Status.SUCCESS
    assert (tie["stats"]["reached"], sound["stats"]["reached"]) == (0.0, TAU[-1])
    assert "not unique" in tts.Status.NOT_UNIQUE.advice


def test_a_lane_alone_has_the_answer_of_the_batch():
    starts = random_starts(4)
    together = sharp(starts)
    for lane in (0, 5, 11):
        (alone,) = sharp([starts[lane]])
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together[lane]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


def test_many_starts_are_solved_in_parts(monkeypatch):
    """By threads, the last part with spare lanes; in each, blocks that overlap."""
    monkeypatch.setattr(_sharp_limit, "PART", 64)
    monkeypatch.setattr(_sharp, "PART", 50)
    monkeypatch.setattr(_sharp, "BLOCK", 32)
    rng = np.random.default_rng(6)
    slow = rng.random((3, 50, NEURONS))
    jumps, values = np.array([0.2, 0.35, 0.6, 0.9])[:COUNT], np.array([1.0, 3, -1, 2, 0.5])
    problem = tts.Univariate(tts.PiecewiseConstant(jumps, values), neurons=NEURONS)
    run = tts.sharp_limit(problem, problem.state(slow=slow), tau=TAU)
    assert all(isinstance(leaf, jax.Array) for leaf in (run.slow, run.status, run.events["time"]))
    assert run.slow.shape == (3, 50, len(TAU), NEURONS)
    flat = slow.reshape(-1, NEURONS)
    expected = [sharp([(u, jumps, values) for u in flat[k : k + LANES]]) for k in range(0, 150, 24)]
    expected = [one for some in expected for one in some]
    for name, ours in (("slow", run.slow), ("fast", run.fast), ("loss", run.loss)):
        theirs = np.reshape([one[name] for one in expected], ours.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
    hits = np.reshape([one["stats"]["hitting_time"] for one in expected], (3, 50, -1))
    np.testing.assert_allclose(run.stats["hitting_time"], hits, rtol=1e-12)


# --- derivatives ----------------------------------------------------------------------------------


def outputs(slow, jumps, values, tau):
    """Losses, positions and hitting times."""
    target = tts.PiecewiseConstant(jumps, values)
    problem = tts.Univariate(target, neurons=4)
    run = tts.sharp_limit(problem, problem.state(slow=slow), tau=tau)
    return jnp.concatenate(
        [run.loss, run.slow.ravel(), run.stats["hitting_time"], run.events["time"][:3]]
    )


# one neuron between the first two jumps, and a hit before the last time
AT = (
    np.array([0.1, 0.45, 0.7, 0.9]),
    np.array([0.3, 0.6, 0.8]),
    np.array([0.0, 2.0, -1.0, 1.3]),
    np.array([0.001, 0.01, 0.02, 0.05]),
)


@pytest.mark.slow  # two minutes to compile
def test_derivatives_along_directions_agree_with_central_differences():
    """Forward mode, by positions, jumps, values and times at once."""
    value = jax.jit(outputs)
    along = jax.jit(lambda at, direction: jax.jvp(outputs, at, direction))
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = tuple(rng.normal(size=part.shape) for part in AT)
        ends = [
            value(*(x + h * v for x, v in zip(AT, direction, strict=True))) for h in (1e-6, -1e-6)
        ]
        here, slope = along(AT, direction)
        assert np.all(np.isfinite(here))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=3e-6, atol=3e-6)


@pytest.mark.slow  # long to compile
def test_derivatives_in_reverse_mode_are_those_of_forward_mode():
    everything = (0, 1, 2, 3)
    one, other = (jax.jit(mode(outputs, everything))(*AT) for mode in (jax.jacrev, jax.jacfwd))
    for reverse, forward in zip(one, other, strict=True):
        np.testing.assert_allclose(reverse, forward, rtol=1e-9, atol=1e-9)
