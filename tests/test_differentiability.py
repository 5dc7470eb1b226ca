"""Derivatives of losses and hitting times through flow and limit, against central differences.

The reference is the five-point stencil, whose error falls with the fourth power of the step; it
is trusted only where two steps agree.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conftest import JUMPS, VALUES
from numpy.testing import assert_allclose
from test_hitting import decay, decay_start

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


def reference_slope(function, parameters, name, *, step, rtol):
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


BOTH = ("reverse", "forward")


def check(observed, parameters, names, *, modes=BOTH, step=5e-4, rtol=1e-6, **options):
    """Slopes along one direction in each of the named parameters."""
    unseen = UNSEEN.get(observed, set())
    slope = jax.jit(
        lambda p, d: jax.jvp(
            lambda p: OBSERVED[observed](p, **options, adjoint=diffrax.ForwardMode()), (p,), (d,)
        )[1]
    )
    gradient = None
    if "reverse" in modes:
        gradient = jax.jit(jax.grad(lambda p: OBSERVED[observed](p, **options)))(parameters)
    for name in names:
        expected = reference_slope(
            lambda p: OBSERVED[observed](p, **options), parameters, name, step=step, rtol=rtol
        )
        assert (abs(expected) <= 1e-10) == (name in unseen), name
        _, direction = along(parameters, name, 0.0)
        still = {other: np.zeros_like(value) for other, value in parameters.items()}
        if gradient is not None:
            got = np.sum(gradient[name] * direction)
            assert_allclose(got, expected, rtol=rtol, atol=1e-10, err_msg=f"reverse, {name}")
        if "forward" in modes:
            got = slope(parameters, still | {name: direction})
            assert_allclose(got, expected, rtol=rtol, atol=1e-10, err_msg=f"forward, {name}")


def test_forward_derivatives_of_the_loss_of_the_flow():
    check("loss of the flow", SMALL, SMALL, modes=["forward"], solver="tsit5")


@pytest.mark.slow
@pytest.mark.parametrize("observed", OBSERVED)
def test_derivatives_on_a_small_problem(observed):
    """Both modes in every parameter."""
    check(observed, SMALL, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("observed", OBSERVED)
def test_derivatives_on_the_papers_problem(observed):
    """Both modes in one direction of the positions."""
    ends = {"tau_end": 0.02} if "times" in observed else {"tau": (0.0005, 0.004, 0.02)}
    check(observed, PAPER, ["positions"], step=5e-5, rtol=1e-5, **ends)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("epsilon", [0.02, None])
def test_hitting_times_of_a_linear_problem_have_exact_derivatives(epsilon, mode):
    """Against the implicit function theorem on the matrix exponential."""
    problem = decay()
    numbers = problem, decay_start(problem), jnp.array(epsilon or 0.02)
    options = {"tau_end": 2.0, "records": 40, "rtol": 1e-10, "atol": 1e-10, "max_steps": 1024}

    def times(problem, start, given):
        chosen = None if epsilon is None else given
        adjoint = diffrax.ForwardMode() if mode == "forward" else None
        return tts.hitting_times(problem, start, epsilon=chosen, adjoint=adjoint, **options)

    def excess(numbers, tau, goal):
        problem, start, given = numbers
        if epsilon is None:
            slow = toy.limit(problem, start, tau[None])[0]
        else:
            slow = toy.flow(problem, start, given, tau[None])[0, 4:]
        return jnp.abs(slow - problem.goals)[goal] - problem.radius

    found = jax.jit(times)(*numbers)
    weights = jnp.array([1.0, -2.0])
    expected = jax.tree.map(jnp.zeros_like, numbers)
    for goal in range(2):
        assert abs(excess(numbers, found[goal], goal)) <= 1e-8
        above, speed = jax.grad(excess, argnums=(0, 1))(numbers, found[goal], goal)
        expected = jax.tree.map(
            lambda total, part, s=speed, w=weights[goal]: total - w * part / s, expected, above
        )
    if mode == "reverse":
        got = jax.jit(jax.grad(lambda n: times(*n) @ weights))(numbers)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert_allclose(one, other, rtol=1e-7, atol=1e-9)
        return
    tangent = jax.tree.map(
        lambda leaf: jnp.cos(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape), numbers
    )
    got = jax.jit(lambda n, d: jax.jvp(lambda n: times(*n) @ weights, (n,), (d,))[1])(
        numbers, tangent
    )
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(tangent), strict=True)
    assert_allclose(got, sum(jnp.sum(one * other) for one, other in pairs), rtol=1e-7)
