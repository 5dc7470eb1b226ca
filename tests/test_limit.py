"""The two-timescale limits: against high precision, against the flow, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import JUMPS, VALUES
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp

import tts_jax as tts
from tts_jax.problems import _sharp


# --- sharp limit: ε → 0, then η → 0 -------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    far=st.floats(1e-4, 0.5),
    share=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1.0, 1 - 1e-12, 1 - 1e-7, 0.5, 1e-6])),
    height=st.floats(0.5, 5.0),
)
def test_hitting_time_against_the_integral_in_50_digits(far, share, height):
    near = far * share
    ours = float(_sharp.pair_hitting_time(jnp.asarray(near), jnp.asarray(far), jnp.asarray(height)))
    assert abs(ours - reference.hitting_time(near, far, height)) <= 1e-12
    assert near / height**2 - 1e-13 <= ours <= 4 * near / height**2 + 1e-13


def test_hitting_time_of_a_symmetric_pair():
    np.testing.assert_allclose(
        _sharp.pair_hitting_time(jnp.asarray(0.1), jnp.asarray(0.1), jnp.asarray(-2.0)),
        4 * 0.1 / 4,
        rtol=1e-15,
    )


@pytest.mark.parametrize("near", [0.05, 0.0999, 0.1 * (1 - 1e-9), 0.1, 1e-3])
def test_distances_against_an_ode_solver(near):
    """dl/dτ = −w² r²/(l+r)², dr/dτ = −w² l²/(l+r)², by DOP853 at 1e-13."""
    far, height = 0.1, 1.5
    end = float(_sharp.pair_hitting_time(jnp.asarray(near), jnp.asarray(far), jnp.asarray(height)))
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
    total = _sharp.pair_hitting_time(near, far, height)
    for share in (0.1, 0.5, 0.9, 0.999):
        r, d = _sharp.pair_distances(near, far, height**2 * share * total)
        left = _sharp.pair_hitting_time(r, d, height)
        np.testing.assert_allclose(left, (1 - share) * total, atol=1e-14)


def test_published_start(problem, published):
    """Known hitting times of the start from NumPy's seed 42, in the convention with ½."""
    slow = published["quick"]["checkpoints"]["0"]["u"][1:]
    tau = np.linspace(0, 0.05, 11)
    answer = tts.sharp_limit(problem, problem.state(slow=slow), tau=tau)
    assert answer.status == tts.Status.SUCCESS
    listed = [0.0032, 0.0051, 0.0064, 0.0175, 0.0563]
    np.testing.assert_allclose(np.sort(2 * answer.stats["hitting_time"]), listed, atol=6e-5)
    # and the published run at ε = 2e-5 ends on the neurons that the limit names
    final = published["two_timescale"]["checkpoints"]["100"]["u"][1:]
    limit = tts.sharp_limit(problem, problem.state(slow=slow), tau=[0.035]).slow[-1]
    assert np.max(np.abs(limit - np.array(final))) <= 1.2 * problem.eta


def test_finite_width_limit_tends_to_the_sharp_limit(target, separated):
    """‖limit_η − sharp‖ falls with η, while no neuron has hit yet and after all have."""
    tau = np.linspace(0, 0.004, 9)
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
    tau = [0.0, 0.002, 0.01]
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


UNCOVERED = {
    "one neuron between two jumps": ([0.1, 0.275, 0.4, 0.45, 0.55, 0.6, 0.7, 0.75, 0.9, 0.95],),
    "no neuron between two jumps": ([0.1, 0.15, 0.4, 0.45, 0.55, 0.6, 0.7, 0.75, 0.9, 0.95],),
    "a flank on another jump": ([0.1, 0.2, 0.37, 0.4, 0.45, 0.5, 0.55, 0.7, 0.75, 0.9],),
    "coincident flanks": ([0.1, 0.1, 0.25, 0.3, 0.4, 0.45, 0.55, 0.6, 0.7, 0.75, 0.9, 0.95],),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_starts_beyond_the_closed_form_get_a_status_and_no_curve(target, name):
    (positions,) = UNCOVERED[name]
    problem = tts.Univariate(target, neurons=len(positions))
    answer = tts.sharp_limit(problem, problem.state(slow=positions), tau=[0.0, 0.01])
    assert answer.status == tts.Status.NOT_COVERED
    assert np.all(np.isnan(answer.slow[1:]))
    assert np.all(np.isnan(answer.loss))
    assert "two neurons in every piece" in answer.summary()
    with pytest.raises(RuntimeError, match="NOT_COVERED"):
        tts.sharp_limit(problem, problem.state(slow=positions), tau=[0.01], throw=True)


def test_a_neuron_on_a_jump_has_recovered_it(target):
    slow = [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.55, 0.6, 0.7, 0.75, 0.9, 0.95]
    problem = tts.Univariate(target, neurons=12)
    answer = tts.sharp_limit(problem, problem.state(slow=slow), tau=[0.0, 0.001, 0.1])
    assert answer.success
    assert answer.stats["hitting_time"][0] == 0.0
    np.testing.assert_array_equal(answer.slow[:, :2], np.tile(slow[:2], (3, 1)))


# --- limit at finite η --------------------------------------------------------------------------


def test_limit_against_scipy(problem, separated):
    tau = np.linspace(0, 0.035, 15)
    answer = tts.limit(problem, separated, tau=tau, rtol=1e-8, atol=1e-8)
    field = jax.jit(problem.reduced_field)
    expected = solve_ivp(
        lambda t, u: np.asarray(field(u)),
        (0, tau[-1]),
        np.asarray(separated.slow),
        method="LSODA",
        t_eval=tau,
        rtol=1e-12,
        atol=1e-12,
    ).y.T
    np.testing.assert_allclose(answer.slow, expected, atol=1e-8)


def test_both_solvers_of_the_limit_agree(problem, starts):
    states = jax.tree.map(lambda x: x[:4], starts)
    tau = np.linspace(0, 0.035, 8)
    stiff = tts.limit(problem, states, tau=tau, rtol=1e-8, atol=1e-8)
    explicit = tts.limit(problem, states, tau=tau, rtol=1e-8, atol=1e-8, solver="tsit5")
    assert np.all(stiff.success)
    np.testing.assert_allclose(explicit.slow, stiff.slow, atol=1e-6)


def test_limit_stays_on_the_critical_manifold_and_loss_never_increases(problem, starts):
    states = jax.tree.map(lambda x: x[:6], starts)
    answer = tts.limit(problem, states, tau=np.linspace(0, 0.035, 201))
    assert np.all(answer.success)
    assert np.all(np.diff(answer.loss, axis=-1) <= 1e-9)
    fields = jax.vmap(jax.vmap(problem.fields))(answer.fast, answer.slow)
    condition = np.asarray(answer.stats["condition"])
    assert condition.shape == (6, 201)
    assert np.max(np.abs(fields.fast)) <= 1e-10


def test_flow_tends_to_the_limit_at_first_order_in_epsilon(problem, separated):
    tau = np.array([0.0, 0.002, 0.004, 0.008])
    tolerance = dict(rtol=1e-10, atol=1e-10)
    limit = tts.limit(problem, separated, tau=tau, **tolerance)
    epsilons = np.logspace(-6, -8, 5)
    flows = tts.flow(problem, separated, epsilon=epsilons, tau=tau, solver="rodas5p", **tolerance)
    assert np.all(flows.success)
    distance = np.max(np.abs(flows.slow - limit.slow), axis=(1, 2))
    slope = np.polyfit(np.log(epsilons), np.log(distance), 1)[0]
    assert abs(slope - 1) <= 0.1


def test_limit_of_coincident_neurons(target):
    """Two neurons on one spot share their weight and stay together."""
    problem = tts.Univariate(target, neurons=4)
    answer = tts.limit(
        problem, problem.state(slow=[0.15, 0.15, 0.4, 0.9]), tau=np.linspace(0, 0.01, 5)
    )
    assert answer.success
    np.testing.assert_allclose(answer.slow[:, 0], answer.slow[:, 1], atol=1e-9)
    np.testing.assert_allclose(answer.fast[:, 1], answer.fast[:, 2], atol=1e-9)
    assert np.all(np.isinf(answer.stats["condition"]))


def test_values_and_jumps_enter_by_their_difference_only(target, separated):
    """Adding a constant to the target moves the bias and nothing else."""
    tau = [0.0, 0.005]
    plain = tts.limit(tts.Univariate(target), separated, tau=tau)
    lifted = tts.PiecewiseConstant(JUMPS, np.array(VALUES) + 2.0)
    answer = tts.limit(tts.Univariate(lifted), separated, tau=tau)
    np.testing.assert_allclose(answer.slow, plain.slow, atol=1e-9)
    np.testing.assert_allclose(answer.fast[:, 0], plain.fast[:, 0] + 2.0, atol=1e-9)
