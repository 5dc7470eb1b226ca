"""Rodas5P on its own: order conditions, observed order, dense output, stiff accuracy."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tts_jax import Rodas5P
from tts_jax._rosenbrock import GAMMA, TIMES, A, B, C, D


def untransformed():
    """(α, γ, b) of k_i = h f(y + Σ α_ij k_j) + h J Σ γ_ij k_j from the tableau in use."""
    gamma = np.linalg.inv(np.eye(8) / GAMMA - C)
    return A @ gamma, gamma, B @ gamma


def test_order_conditions_up_to_five():
    """Hairer & Wanner II, Table IV.7.1, for the trees of order 1 to 5."""
    alpha, gamma, b = untransformed()
    beta = alpha + gamma
    a, e = alpha.sum(1), np.ones(8)
    beta_sum = beta @ e
    conditions = {
        "1": (b @ e, 1),
        "2": (b @ beta_sum, 1 / 2),
        "3a": (b @ a**2, 1 / 3),
        "3b": (b @ beta @ beta_sum, 1 / 6),
        "4a": (b @ a**3, 1 / 4),
        "4b": (b @ (a * (alpha @ beta_sum)), 1 / 8),
        "4c": (b @ beta @ a**2, 1 / 12),
        "4d": (b @ beta @ beta @ beta_sum, 1 / 24),
        "5a": (b @ a**4, 1 / 5),
        "5b": (b @ (a**2 * (alpha @ beta_sum)), 1 / 10),
        "5c": (b @ (alpha @ beta_sum) ** 2, 1 / 20),
        "5d": (b @ (a * (alpha @ a**2)), 1 / 15),
        "5e": (b @ (a * (alpha @ beta @ beta_sum)), 1 / 30),
        "5f": (b @ beta @ a**3, 1 / 20),
        "5g": (b @ beta @ (a * (alpha @ beta_sum)), 1 / 40),
        "5h": (b @ beta @ beta @ a**2, 1 / 60),
        "5i": (b @ beta @ beta @ beta @ beta_sum, 1 / 120),
    }
    for name, (value, expected) in conditions.items():
        assert abs(value - expected) < 5e-13, name


def test_embedded_method_has_order_four():
    alpha, gamma, _ = untransformed()
    weights = B.copy()
    weights[7] = 0.0  # the error estimate is the last stage
    b = weights @ gamma
    beta_sum = (alpha + gamma).sum(1)
    a = alpha.sum(1)
    beta = alpha + gamma
    pairs = [(b.sum(), 1), (b @ beta_sum, 1 / 2), (b @ a**2, 1 / 3), (b @ beta @ beta_sum, 1 / 6)]
    pairs += [(b @ a**3, 1 / 4), (b @ (a * (alpha @ beta_sum)), 1 / 8)]
    pairs += [(b @ beta @ a**2, 1 / 12), (b @ beta @ beta @ beta_sum, 1 / 24)]
    for value, expected in pairs:
        assert abs(value - expected) < 5e-13
    assert abs(b @ a**4 - 1 / 5) > 1e-4  # and not five


def test_consistent_times_and_time_derivative_weights():
    alpha, gamma, _ = untransformed()
    np.testing.assert_allclose(alpha.sum(1), TIMES, atol=1e-12)
    np.testing.assert_allclose(gamma.sum(1), D, atol=1e-12)


def test_stiffly_accurate_and_l_stable():
    """R(z) → 0 as z → −∞ and |R| ≤ 1 on the negative real axis and the imaginary axis."""
    alpha, gamma, b = untransformed()
    beta = alpha + gamma

    def stability(z):
        return 1 + z * b @ np.linalg.solve(np.eye(8) - z * beta, np.ones(8))

    assert abs(stability(-1e8)) < 1e-6
    reals = -np.logspace(-3, 8, 200)
    assert max(abs(stability(z)) for z in reals) <= 1 + 1e-12
    imaginary = 1j * np.logspace(-2, 4, 200)
    assert max(abs(stability(z)) for z in imaginary) <= 1 + 1e-9


def pendulum(t, y, args):
    """A smooth, nonlinear, non-autonomous system."""
    del args
    return jnp.stack(
        [-y[0] * y[1] + jnp.cos(3 * t), y[0] ** 2 - y[1] * jnp.sin(t) + 0.3 * y[0] * t]
    )


def solve(solver, steps, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(pendulum),
        solver,
        0.0,
        2.0,
        2.0 / steps,
        jnp.array([1.0, 0.5]),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0, 2, 37)),
        stepsize_controller=diffrax.ConstantStepSize(),
        max_steps=100_000,
        **options,
    ).ys


@pytest.fixture(scope="module")
def exact():
    return solve(diffrax.Dopri8(), 4000)


def observed_order(errors, steps):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_observed_order_of_the_solution_and_of_the_dense_output(exact):
    steps = np.array([10, 20, 40, 80])
    solutions = [solve(Rodas5P(), int(n)) for n in steps]
    ends = [np.max(np.abs(y[-1] - exact[-1])) for y in solutions]
    everywhere = [np.max(np.abs(y - exact)) for y in solutions]
    assert observed_order(ends, steps) >= 4.5
    assert observed_order(everywhere, steps) >= 4.0


def test_given_jacobian_and_pytree_states_change_nothing(exact):
    del exact

    def jacobian(t, y, args):
        return jax.jacfwd(lambda z: pendulum(t, z, args))(y)

    np.testing.assert_allclose(
        solve(Rodas5P(jacobian=jacobian), 20), solve(Rodas5P(), 20), atol=1e-13
    )

    def split(t, y, args):
        out = pendulum(t, jnp.stack([y["a"], y["b"][0]]), args)
        return {"a": out[0], "b": out[1:]}

    answer = diffrax.diffeqsolve(
        diffrax.ODETerm(split),
        Rodas5P(),
        0.0,
        2.0,
        0.1,
        {"a": jnp.array(1.0), "b": jnp.array([0.5])},
    ).ys
    np.testing.assert_allclose(answer["a"][-1], solve(Rodas5P(), 20)[-1, 0], atol=1e-13)


def test_stiff_linear_system_with_large_steps():
    """y′ = −λ(y − cos t) − sin t: the solution cos t, for λ = 1e8 and 20 steps."""

    def field(t, y, args):
        del args
        return -1e8 * (y - jnp.cos(t)) - jnp.sin(t)

    answer = diffrax.diffeqsolve(
        diffrax.ODETerm(field), Rodas5P(), 0.0, 2.0, 0.1, jnp.array([1.0])
    ).ys
    np.testing.assert_allclose(answer[-1], np.cos(2.0), atol=1e-8)


def test_adaptive_tolerance_is_met_on_van_der_pol():
    """μ = 1e3, against SciPy's Radau at 1e-11."""
    from scipy.integrate import solve_ivp

    def field(t, y, args):
        del t, args
        return jnp.stack([y[1], 1e3 * ((1 - y[0] ** 2) * y[1]) - y[0]])

    expected = solve_ivp(
        lambda t, y: np.array([y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]]),
        (0, 500),
        [2.0, 0.0],
        method="Radau",
        rtol=1e-11,
        atol=1e-13,
    ).y[0, -1]
    for tolerance in (1e-5, 1e-7, 1e-9):
        answer = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            Rodas5P(),
            0.0,
            500.0,
            None,
            jnp.array([2.0, 0.0]),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=1e-3 * tolerance),
        )
        assert abs(answer.ys[-1, 0] - expected) <= 20 * tolerance
