"""Derivatives of losses and hitting times through flow and limit, against central differences.

The reference is the five-point stencil, whose error falls with the fourth power of the step; it
is trusted only where two steps agree.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import JUMPS, VALUES
from numpy.testing import assert_allclose

import tts_jax as tts


SMALL = {
    "positions": np.array([0.21, 0.47, 0.58, 0.87]),
    "weights": np.array([0.5, 1.0, -0.5, 0.3, -1.2]),
    "values": np.array([1.0, 3.0, 0.0]),
    "jumps": np.array([0.4, 0.7]),
    "eta": np.array(0.05),
    "epsilon": np.array(0.01),
}
PAPER = {
    "positions": np.sort(np.random.RandomState(42).rand(20)),
    "weights": np.linspace(-0.1, 0.1, 21),
    "values": np.array(VALUES),
    "jumps": np.array(JUMPS),
    "eta": np.array(4e-3),
    "epsilon": np.array(2e-5),
}
TIGHT = {"rtol": 1e-11, "atol": 1e-11, "max_steps": 4096, "solver": "rodas5p"}
FORWARD = {"adjoint": diffrax.ForwardMode()}


def built(parameters):
    target = tts.PiecewiseConstant(parameters["jumps"], parameters["values"])
    neurons = parameters["positions"].shape[-1]
    problem = tts.Univariate(target, neurons=neurons, eta=parameters["eta"])
    return problem, problem.state(slow=parameters["positions"], fast=parameters["weights"])


def flow_losses(parameters, tau=(0.002, 0.02, 0.1), **options):
    epsilon = parameters["epsilon"]
    answer = tts.flow(*built(parameters), epsilon=epsilon, tau=np.array(tau), **TIGHT | options)
    return answer.loss @ jnp.arange(1.0, 1.0 + len(tau))


def limit_losses(parameters, tau=(0.0, 0.02, 0.1), **options):
    answer = tts.limit(*built(parameters), tau=np.array(tau), **TIGHT | options)
    return answer.loss @ jnp.arange(1.0, 1.0 + len(tau))


def weighted_sum(times):
    # those that are 0 or infinite have no derivative
    return jnp.where(jnp.isfinite(times), times, 0.0) @ jnp.arange(1.0, 1.0 + times.size)


def flow_times(parameters, tau_end=0.1, **options):
    epsilon = parameters["epsilon"]
    return weighted_sum(
        tts.hitting_times(
            *built(parameters), epsilon=epsilon, tau_end=tau_end, records=50, **TIGHT | options
        )
    )


def limit_times(parameters, tau_end=0.1, **options):
    return weighted_sum(
        tts.hitting_times(*built(parameters), tau_end=tau_end, records=50, **TIGHT | options)
    )


# --- the reference ------------------------------------------------------------------------------


def along(parameters, name, distance):
    """The parameters after a step in one of them, along a fixed direction of the size of it."""
    value = parameters[name]
    direction = np.random.default_rng(len(name)).standard_normal(value.shape)
    direction = direction * np.maximum(0.1 * (name != "epsilon"), np.abs(value))
    return parameters | {name: value + distance * direction}, direction


def central_difference(function, parameters, name, step):
    values = [float(function(along(parameters, name, k * step)[0])) for k in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


def reference_slope(function, parameters, name, step=1e-3, rtol=1e-6):
    wide, narrow = (central_difference(function, parameters, name, s) for s in (step, step / 2))
    assert_allclose(wide, narrow, rtol=rtol, atol=1e-10, err_msg=f"the reference for {name}")
    return narrow


# --- the checks ---------------------------------------------------------------------------------

OBSERVED = {
    "loss of the flow": flow_losses,
    "loss of the limit": limit_losses,
    "hitting times of the flow": flow_times,
    "hitting times of the limit": limit_times,
}
UNSEEN = {"loss of the limit": {"weights", "epsilon"}}
UNSEEN["hitting times of the limit"] = UNSEEN["loss of the limit"]


@pytest.mark.parametrize("observed", OBSERVED)
def test_derivatives_on_a_small_problem(observed):
    """Reverse and forward mode in every parameter."""
    function, unseen = OBSERVED[observed], UNSEEN.get(observed, set())
    gradient = jax.jit(jax.grad(function))(SMALL)
    slope = jax.jit(lambda p, d: jax.jvp(lambda p: function(p, **FORWARD), (p,), (d,))[1])
    for name in SMALL:
        expected = reference_slope(function, SMALL, name)
        assert (expected == 0.0) == (name in unseen), name
        _, direction = along(SMALL, name, 0.0)
        reverse = np.sum(gradient[name] * direction)
        still = {other: np.zeros_like(value) for other, value in SMALL.items()}
        forward = slope(SMALL, still | {name: direction})
        assert_allclose(reverse, expected, rtol=1e-6, atol=1e-10, err_msg=f"reverse, {name}")
        assert_allclose(forward, expected, rtol=1e-6, atol=1e-10, err_msg=f"forward, {name}")
