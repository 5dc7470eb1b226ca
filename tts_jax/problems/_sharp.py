"""The univariate problem's sharp limit, ε → 0 and then η → 0, in closed form.

Between two consecutive neurons the fit is the mean of f*, so only the two neurons that flank a
jump feel a force. With their distances l, r to a jump of height w, and times τ without the ½:

    dl/dτ = −w² r²/(l + r)²,   dr/dτ = −w² l²/(l + r)²,   excess loss = w² l r/(l + r).

With D the farther and R the nearer distance, c³ = D³ − R³ is conserved. Put p² = D² + DR + R²
and x = c²/p²; then D − R = c³/p², D + R = p √((4 − x³)/3), and p falls according to

    w² (T − τ) = (4/√3) [p Ψ(x³/4) − c Ψ(1/4)],   Ψ(y) = ₂F₁(−1/6, −1/2; 5/6; y),

from its start to c, where the nearer neuron hits the jump at time T and the farther one stops
at distance c. This holds to rounding from D = R (c = 0, T = 4D/w²) to R = 0. A jump whose one
side has no neuron in [0, 1] has a wall there, at fixed distance W to the end of the interval;
then (W + r)³ falls at the constant rate 3 w² W².
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tts_jax._trajectory import Status


def _series(count: int = 28) -> np.ndarray:
    """Taylor coefficients of Ψ; its argument is at most 1/4, so the rest is below 1e-17."""
    coefficients = [1.0]
    for n in range(count - 1):
        ratio = (n - 1 / 6) * (n - 1 / 2) / ((n + 5 / 6) * (n + 1))
        coefficients.append(coefficients[-1] * ratio)
    return np.array(coefficients)


_PSI = _series()
_SCALE = 4.0 / np.sqrt(3.0)


def _psi(y: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.polyval(jnp.asarray(_PSI[::-1], y.dtype), y)


_PSI_QUARTER = float(np.polyval(_PSI[::-1], 0.25))


def _invariant(near: Array, far: Array) -> tuple[Array, Array]:
    """(p, c) of a pair of distances; c³ without cancellation."""
    square = far * far + far * near + near * near
    return jnp.sqrt(square), jnp.cbrt((far - near) * square)


def _remaining(p: Array, c: Array) -> Array:
    """w² (T − τ) at p."""
    ratio = c / jnp.where(p > 0, p, 1.0)
    return _SCALE * (p * _psi(ratio**6 / 4.0) - c * _PSI_QUARTER)


def pair_hitting_time(
    near: Float[Array, "..."], far: Float[Array, "..."], height: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Time T at which the nearer of two flanking neurons reaches the jump.

    Args:
        near: smaller initial distance R to the jump.
        far: larger initial distance D.
        height: jump height w (any sign); the time is infinite where it is 0.
    """
    scaled = jnp.maximum(_remaining(*_invariant(near, far)), 0.0)
    square = height * height
    return jnp.where(square > 0, scaled / jnp.where(square > 0, square, 1.0), jnp.inf)


def pair_distances(
    near: Float[Array, "..."],
    far: Float[Array, "..."],
    scaled_time: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both distances (nearer, farther) at scaled time w²τ, by Newton's method in p.

    `_remaining` is nearly linear in p, with slope between 2 and 4/√3, so that six iterations
    from below reach rounding everywhere.
    """
    p0, c = _invariant(near, far)
    left = _remaining(p0, c) - scaled_time
    left_or_zero = jnp.maximum(left, 0.0)
    p = c + left_or_zero / _SCALE
    for _ in range(6):
        cube = (c / jnp.where(p > 0, p, 1.0)) ** 6
        slope = 2.0 * jnp.sqrt((4.0 - cube) / 3.0)
        p = jnp.maximum(p - (_remaining(p, c) - left_or_zero) / slope, c)
    safe = jnp.where(p > 0, p, 1.0)
    difference = c * (c / safe) ** 2
    total = p * jnp.sqrt((4.0 - (c / safe) ** 6) / 3.0)
    hit = left <= 0.0
    nearer = jnp.where(hit, 0.0, jnp.maximum((total - difference) / 2.0, 0.0))
    return nearer, jnp.where(hit, c, (total + difference) / 2.0)


def wall_hitting_time(
    distance: Float[Array, "..."], wall: Float[Array, "..."], height: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Time at which a neuron at `distance` reaches a jump whose other side is a wall."""
    rate = (height * wall) ** 2
    path = distance * (wall * wall + wall * distance + distance * distance / 3.0)
    return jnp.where(rate > 0, path / jnp.where(rate > 0, rate, 1.0), jnp.inf)


def wall_distance(
    distance: Float[Array, "..."], wall: Float[Array, "..."], scaled_time: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The distance to the jump at scaled time w²τ when the other side is a wall."""
    cube = (wall + distance) ** 3 - 3.0 * wall * wall * scaled_time
    return jnp.maximum(jnp.cbrt(jnp.maximum(cube, wall**3)) - wall, 0.0)


def sharp_trajectory(
    slow: Float[Array, " m"],
    tau: Float[Array, " T"],
    jumps: Float[Array, " jumps"],
    values: Float[Array, " pieces"],
) -> tuple[Float[Array, "T m1"], Float[Array, "T m"], Float[Array, " T"], Array, Array]:
    """Weights, positions, loss, status and hitting times of one start.

    Covered are starts in which every neuron flanks at most one jump; any other start gets the
    status `NOT_COVERED` and NaN after τ = 0.
    """
    heights = jnp.diff(values)
    order = jnp.argsort(slow)
    sorted_slow = slow[order]
    neurons = slow.shape[0]
    first = jnp.searchsorted(sorted_slow, jumps, side="left")
    past = jnp.searchsorted(sorted_slow, jumps, side="right")
    on_jump = past > first
    padded = jnp.concatenate([-jnp.ones(1), sorted_slow, 2.0 * jnp.ones(1)])
    # neuron `first − 1` is the left flank; shifted by the padding its place is `first`
    flank_left, flank_right = padded[first], padded[past + 1]
    wall_left, wall_right = flank_left < 0.0, flank_right > 1.0
    left = jumps - jnp.maximum(flank_left, 0.0)
    right = jnp.minimum(flank_right, 1.0) - jumps
    covered = _covered(padded, first, past, on_jump, wall_left, wall_right)

    pair = ~(on_jump | wall_left | wall_right)
    near, far = jnp.minimum(left, right), jnp.maximum(left, right)
    one_wall = (wall_left ^ wall_right) & ~on_jump
    wall, free = jnp.where(wall_left, left, right), jnp.where(wall_left, right, left)
    hitting = jnp.where(
        pair,
        pair_hitting_time(near, far, heights),
        jnp.where(one_wall, wall_hitting_time(free, wall, heights), jnp.inf),
    )
    hitting = jnp.where(on_jump, 0.0, hitting)

    def at(time: Array) -> tuple[Array, Array, Array]:
        scaled = heights**2 * time
        nearer, farther = pair_distances(near, far, scaled)
        moved = wall_distance(free, wall, scaled)
        left_is_near = left <= right
        new_left = jnp.where(pair, jnp.where(left_is_near, nearer, farther), left)
        new_right = jnp.where(pair, jnp.where(left_is_near, farther, nearer), right)
        new_left = jnp.where(one_wall & wall_right, moved, new_left)
        new_right = jnp.where(one_wall & wall_left, moved, new_right)
        place = padded
        move_left, move_right = ~(on_jump | wall_left), ~(on_jump | wall_right)
        spare = neurons + 2  # writes of walls land beyond the end and are dropped
        place = place.at[jnp.where(move_left, first, spare)].set(jumps - new_left, mode="drop")
        place = place.at[jnp.where(move_right, past + 1, spare)].set(jumps + new_right, mode="drop")
        total = new_left + new_right
        excess = heights**2 * new_left * new_right / jnp.where(total > 0, total, 1.0)
        loss = jnp.sum(jnp.where(on_jump, 0.0, excess))
        moved_slow = place[1:-1]
        levels = _plateaus(moved_slow, jumps, values)
        weights = jnp.zeros_like(slow).at[order].set(jnp.diff(levels))
        positions = jnp.zeros_like(slow).at[order].set(moved_slow)
        return jnp.concatenate([levels[:1], weights]), positions, loss

    fast, positions, loss = jax.vmap(at)(tau)
    known = covered | (tau == 0.0)
    fast = jnp.where(known[:, None], fast, jnp.nan)
    positions = jnp.where(known[:, None], positions, jnp.nan)
    loss = jnp.where(covered, loss, jnp.nan)
    status = jnp.where(covered, int(Status.SUCCESS), int(Status.NOT_COVERED)).astype(jnp.int32)
    return fast, positions, loss, status, jnp.where(covered, hitting, jnp.nan)


def _covered(
    padded: Array, first: Array, past: Array, on_jump: Array, wall_left: Array, wall_right: Array
) -> Bool[Array, ""]:
    """Whether every neuron flanks at most one jump, and flanks it alone."""
    # the neurons of each jump, as places in `padded`: those on it, or else its two flanks
    lowest = jnp.where(on_jump, first + 1, first)
    highest = jnp.where(on_jump, past, past + 1)
    apart = jnp.all(highest[:-1] < lowest[1:])
    # coincident neurons share a force in a way that depends on η
    twin_left = (padded[jnp.maximum(first - 1, 0)] == padded[first]) & (first > 0)
    last = padded.shape[0] - 1
    twin_right = (padded[jnp.minimum(past + 2, last)] == padded[past + 1]) & (past + 1 < last)
    twins = (twin_left & ~wall_left) | (twin_right & ~wall_right)
    return apart & ~jnp.any(twins & ~on_jump)


def _plateaus(
    sorted_slow: Float[Array, " m"], jumps: Float[Array, " jumps"], values: Float[Array, " pieces"]
) -> Float[Array, " m1"]:
    """Level of the fit between neighbouring neurons: the mean of f*.

    A plateau of no length takes the level that gives the weights of least norm: evenly spaced
    between its neighbours, with 0 before the bias and no step beyond the last.
    """
    edges = jnp.concatenate([jnp.zeros(1), jnp.clip(sorted_slow, 0.0, 1.0), jnp.ones(1)])
    lengths = jnp.diff(edges)
    # the integral of f* over a plateau, piece by piece: no cancellation for short ones
    starts = jnp.concatenate([jnp.zeros(1), jumps])
    ends = jnp.concatenate([jumps, jnp.ones(1)])
    shared = jnp.minimum(edges[1:, None], ends) - jnp.maximum(edges[:-1, None], starts)
    area = jnp.maximum(shared, 0.0) @ values
    valid = lengths > 0
    levels = jnp.where(valid, area / jnp.where(valid, lengths, 1.0), 0.0)
    count = levels.shape[0]
    index = jnp.arange(count)
    before = jax.lax.cummax(jnp.where(valid, index, -1))
    after = jax.lax.cummin(jnp.where(valid, index, count), reverse=True)
    low = jnp.where(before >= 0, levels[jnp.maximum(before, 0)], 0.0)
    high = jnp.where(after < count, levels[jnp.minimum(after, count - 1)], low)
    share = (index - before) / jnp.maximum(after - before, 1)
    return jnp.where(valid, levels, low + share * (high - low))
