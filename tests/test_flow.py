"""The gradient flow at finite ε: against SciPy, against itself, and its structure."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import tts_jax as tts


# (ε, τ_max): the paper's two-timescale run, its box plot, and one unit of time at equal rates
CASES = [(2e-5, 0.035), (1e-2, 3.0), (1.0, 1.0)]


def lsoda(problem, fast, slow, epsilon, tau):
    """SciPy's LSODA at rtol = atol = 1e-12."""
    split = problem.neurons + 1
    scale = np.where(np.arange(2 * problem.neurons + 1) < split, 1 / epsilon, 1.0)
    field = jax.jit(lambda y: jnp.concatenate(problem.fields(y[:split], y[split:])))
    jacobian = jax.jit(lambda y: problem.jacobian(y[:split], y[split:]))
    answer = solve_ivp(
        lambda t, y: scale * np.asarray(field(y)),
        (0, tau[-1]),
        np.concatenate([fast, slow]),
        method="LSODA",
        t_eval=tau,
        rtol=1e-12,
        atol=1e-12,
        jac=lambda t, y: scale[:, None] * np.asarray(jacobian(y)),
    )
    assert answer.success
    return answer.y.T[:, :split], answer.y.T[:, split:]


def check_against_scipy(problem, states, epsilon, end):
    tau = np.linspace(0, end, 36)
    default = tts.flow(problem, states, epsilon=epsilon, tau=tau)
    tight = tts.flow(problem, states, epsilon=epsilon, tau=tau, rtol=1e-8, atol=1e-8)
    assert np.all(default.success)
    assert np.all(tight.success)
    for lane, start in enumerate(zip(*states, strict=True)):
        fast, slow = lsoda(problem, *start, epsilon, tau)
        for answer, bound in ((default, 1e-5), (tight, 1e-7)):
            assert np.max(np.abs(answer.fast[lane] - fast)) <= bound
            assert np.max(np.abs(answer.slow[lane] - slow)) <= bound


@pytest.mark.parametrize(("epsilon", "end"), CASES[:1])
def test_against_scipy_on_three_starts(problem, starts, epsilon, end):
    check_against_scipy(problem, jax.tree.map(lambda x: x[:3], starts), epsilon, end)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "end"), CASES)
def test_against_scipy_on_all_32_starts(problem, starts, epsilon, end):
    check_against_scipy(problem, starts, epsilon, end)


@pytest.mark.parametrize(
    "solver", [pytest.param("kvaerno5", marks=pytest.mark.slow), "tsit5", diffrax.Dopri8()]
)
def test_every_solver_gives_the_same_flow(solver):
    problem = tts.Univariate(tts.PiecewiseConstant([0.4], [0, 1]), neurons=3, eta=0.2)
    state = problem.state(slow=[0.1, 0.35, 0.7])
    setting = dict(epsilon=0.05, tau=np.linspace(0, 2, 9), rtol=1e-9, atol=1e-9)
    expected = tts.flow(problem, state, solver="rodas5p", **setting)
    answer = tts.flow(problem, state, solver=solver, **setting)
    np.testing.assert_allclose(answer.fast, expected.fast, atol=1e-7)
    np.testing.assert_allclose(answer.slow, expected.slow, atol=1e-7)


def test_at_most_150_steps_in_the_papers_regime(problem, starts):
    answer = tts.flow(
        problem, starts, epsilon=2e-5, tau=np.linspace(0, 0.035, 36), rtol=1e-6, atol=1e-6
    )
    assert np.all(answer.success)
    assert np.mean(answer.stats["steps"]) <= 150
    np.testing.assert_array_equal(
        answer.stats["steps"], answer.stats["accepted"] + answer.stats["rejected"]
    )


@pytest.mark.parametrize(("epsilon", "end"), CASES)
def test_loss_never_increases(problem, starts, epsilon, end):
    states = jax.tree.map(lambda x: x[:6], starts)
    answer = tts.flow(problem, states, epsilon=epsilon, tau=np.linspace(0, end, 501))
    assert np.all(np.diff(answer.loss, axis=-1) <= 1e-9)


def test_energy_balance(problem, separated):
    """L(0) − L(τ) = ∫ (|∂_a L|²/ε + |∂_u L|²) dτ, by Simpson's rule after the fast transient."""
    epsilon = 1e-2
    tau = np.linspace(0, 0.2, 20001)
    answer = tts.flow(problem, separated, epsilon=epsilon, tau=tau, rtol=1e-9, atol=1e-9)
    fields = jax.vmap(problem.fields)(answer.fast, answer.slow)
    power = np.sum(fields.fast**2, axis=-1) / epsilon + np.sum(fields.slow**2, axis=-1)
    from scipy.integrate import simpson

    lost = answer.loss[0] - answer.loss[-1]
    np.testing.assert_allclose(simpson(power, x=tau), lost, rtol=1e-6)


def test_a_recovered_network_has_the_loss_floor_of_the_activation(problem, separated):
    """One neuron of the height of each jump on it: L = η Σ w² ∫(σ − 1_{z>0})² = η Σ w²/28."""
    answer = tts.flow(problem, separated, epsilon=2e-5, tau=[0.0, 0.1])
    heights = np.asarray(problem.target.heights)
    assert np.all(answer.observables["recovery"][-1] <= problem.eta)
    floor = float(problem.eta) * np.sum(heights**2) / 28
    assert 0.98 * floor <= answer.loss[-1] <= floor


@pytest.mark.slow
def test_observed_order_on_the_flow():
    """Constant steps on the gradient flow itself, with the closed-form Jacobian: order ≥ 4.5."""
    from tts_jax._flow import _slow_time_field, _slow_time_jacobian

    problem = tts.Univariate(tts.PiecewiseConstant([0.5], [0, 1]), neurons=1, eta=1.0)
    # the neuron overlaps the jump and stays on one side of it: the loss is a polynomial there
    state = problem.state(slow=[0.3], fast=[0.1, 0.7])

    @jax.jit
    def end(step):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_slow_time_field),
            tts.Rodas5P(jacobian=_slow_time_jacobian),
            0.0,
            0.3,
            step,
            state,
            args=(problem, jnp.asarray(0.2)),
            stepsize_controller=diffrax.ConstantStepSize(),
        ).ys

    exact = end(0.3 / 2000)
    steps = np.array([5, 10, 20, 40])
    errors = [
        max(float(np.max(np.abs(x - y))) for x, y in zip(end(0.3 / n), exact, strict=True))
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope >= 4.5


def test_lane_alone_and_in_a_batch(problem, starts):
    """Lanes keep their own steps: the answer of a lane does not depend on its company."""
    setting = dict(epsilon=2e-5, tau=[0.0, 0.01, 0.035])
    batch = tts.flow(problem, jax.tree.map(lambda x: x[:4], starts), **setting)
    for lane in range(4):
        alone = tts.flow(problem, jax.tree.map(lambda x, i=lane: x[i], starts), **setting)
        assert alone.stats["steps"] == batch.stats["steps"][lane]
        np.testing.assert_allclose(alone.slow, batch.slow[lane], atol=1e-12)


def test_auto_takes_the_explicit_solver_only_where_it_is_not_stiff(problem, separated):
    def chosen(epsilon, end):
        answer = tts.flow(problem, separated, epsilon=epsilon, tau=[end], engine="diffrax")
        return dict(answer.notes)["solver"]

    assert chosen(1.0, 0.05) == "tsit5"
    assert chosen(1.0, 10.0) == "rodas5p"
    assert chosen(2e-5, 0.035) == "rodas5p"


def test_progress_meter_reports(problem, separated, capsys):
    tts.flow(
        problem,
        separated,
        epsilon=1e-3,
        tau=[0.02],
        progress_meter=diffrax.TextProgressMeter(minimum_increase=0.2),
    )
    jax.effects_barrier()
    assert "100.00%" in capsys.readouterr().out
