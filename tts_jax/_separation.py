"""The separation number: how far apart the two timescales of a run really are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from tts_jax import checks
from tts_jax._integrate import as_double, check_start
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape
from tts_jax._trajectory import over_lanes


@double_precision
def separation(
    problem: AbstractProblem, state: State, *, epsilon: Float[ArrayLike, "..."] = 1.0
) -> Float[Array, "..."]:
    """The separation number ε_eff = ε · (slow rate) / (relaxation rate) of states.

    ε alone does not say whether a run is near its two-timescale limit: the fast variable relaxes
    at the smallest eigenvalue of ∇²_y g, and the slow one moves at the rate |V| per
    `problem.slow_scale()`. Where ε_eff is far below 1 the fast variable is on the critical
    manifold before the slow one has moved; where it is not, `flow` and `sgd` differ from `limit`.

    Args:
        problem: the two-timescale problem.
        state: states, with any leading batch axes, such as those of a trajectory,
            `State(trajectory.fast, trajectory.slow)`.
        epsilon: ε > 0, a scalar or an array that broadcasts against the batch axes.

    Returns:
        ε_eff of every state; infinite where the fast variable has a direction that does not relax.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
    """
    checks.positive("epsilon", epsilon, "It is the ratio of the slow to the fast learning rate.")
    check_start(problem, state)
    state = jax.tree.map(as_double, state)
    rank = len(batch_shape(problem, state))
    return jnp.asarray(epsilon) * over_lanes(ratio, rank, problem, *state)


def ratio(problem: AbstractProblem, fast: PyTree[Array], slow: PyTree[Array]) -> Float[Array, ""]:
    """ε_eff/ε of one state."""
    rate = problem.relaxation_rate(fast, slow)
    relaxes = rate > 0.0
    speed = problem.slow_rate(fast, slow)
    return jnp.where(relaxes, speed / jnp.where(relaxes, rate, 1.0), jnp.inf)
