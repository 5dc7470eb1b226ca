"""The two-timescale limit at finite width: against SciPy, between solvers, against the flow."""

import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import JUMPS, VALUES
from scipy.integrate import solve_ivp

import tts_jax as tts


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


@pytest.mark.slow
def test_it_ends_under_the_settings_of_the_command_line():
    """Several CPU devices whose loops run inline: `eigh` in them has waited for ever."""
    program = """
        import jax, numpy as np
        from tts_jax import _compat
        assert _compat.configure_cpu()
        import tts_jax as tts
        problem = tts.Univariate(tts.PiecewiseConstant([0.3, 0.6], [0.0, 2.0, 1.0]), neurons=6)
        state = problem.init(key=jax.random.split(jax.random.key(0), 4))
        print(tts.limit(problem, state, tau=[0.01], engine="diffrax").status.tolist())
    """
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    told = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=200
    )
    assert told.stdout.strip() == "[0, 0, 0, 0]"
