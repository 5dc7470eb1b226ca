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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tts_jax._trajectory import Event, Status
from tts_jax.problems._sharp_events import (
    BLOCK,
    Ahead,
    Jumps,
    Lane,
    Line,
    Structure,
    advance,
    apart,
    push,
    put,
    structure,
)


def _psi_coefficients(terms: int = 80, degree: int = 17) -> np.ndarray:
    """Ψ on [0, 1/4] as a polynomial in 8y − 1: its Taylor series about 1/8.

    Summed from the one about 0, whose terms are positive; the rest is below 1e-17.
    """
    taylor = [1.0]
    for n in range(terms - 1):
        taylor.append(taylor[-1] * (n - 1 / 6) * (n - 1 / 2) / ((n + 5 / 6) * (n + 1)))
    return np.array(
        [
            math.fsum(taylor[n] * math.comb(n, k) * 8.0**-n for n in range(k, terms))
            for k in range(degree + 1)
        ]
    )


PSI = _psi_coefficients()
PSI_QUARTER = float(np.sum(PSI))
SCALE = 4.0 / np.sqrt(3.0)

PART = 1024  # lanes whose steps share their blocks


def _psi(y: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.polyval(jnp.asarray(PSI[::-1], y.dtype), 8.0 * y - 1.0)


def _invariant(near: Array, far: Array) -> tuple[Array, Array]:
    """(p, c) of a pair of distances; c³ without cancellation."""
    square = far * far + far * near + near * near
    return jnp.sqrt(square), jnp.cbrt((far - near) * square)


def _remaining(p: Array, c: Array) -> Array:
    """w² (T − τ) at p."""
    ratio = c / jnp.where(p > 0, p, 1.0)
    return SCALE * (p * _psi(ratio**6 / 4.0) - c * PSI_QUARTER)


def pair_hitting_time(
    near: Float[Array, "..."], far: Float[Array, "..."], rate: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Time T at which the nearer of two flanking neurons reaches the jump.

    Args:
        near: smaller initial distance R to the jump.
        far: larger initial distance D.
        rate: w² for a jump of height w, times the neurons' mobility; at 0 the time is infinite.
    """
    scaled = jnp.maximum(_remaining(*_invariant(near, far)), 0.0)
    return jnp.where(rate > 0, scaled / jnp.where(rate > 0, rate, 1.0), jnp.inf)


def pair_distances(
    near: Float[Array, "..."],
    far: Float[Array, "..."],
    scaled_time: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both distances (nearer, farther) at scaled time w²τ, by Newton's method in p.

    `_remaining` is convex in p, with a slope that rises from 2 to 4/√3; from the lesser of two
    bounds, the tangents at p = c and at infinity, three iterations reach rounding. A fourth one
    carries the derivatives.
    """
    p0, c = _invariant(near, far)
    left = _remaining(p0, c) - scaled_time
    left_or_zero = jnp.maximum(left, 0.0)
    fixed_c, fixed_left = lax.stop_gradient((c, left_or_zero))
    p = jnp.minimum(fixed_c + fixed_left / 2.0, fixed_left / SCALE + fixed_c * PSI_QUARTER)
    for count in range(4):
        if count == 3:
            fixed_c, fixed_left = c, left_or_zero
        cube = lax.stop_gradient((c / jnp.where(p > 0, p, 1.0)) ** 6)
        slope = 2.0 * jnp.sqrt((4.0 - cube) / 3.0)
        p = jnp.maximum(p - (_remaining(p, fixed_c) - fixed_left) / slope, fixed_c)
    safe = jnp.where(p > 0, p, 1.0)
    ratio = c / safe
    difference = c * ratio**2
    total = p * jnp.sqrt((4.0 - ratio**6) / 3.0)
    hit = left <= 0.0
    nearer = jnp.where(hit, 0.0, jnp.maximum((total - difference) / 2.0, 0.0))
    return nearer, jnp.where(hit, c, (total + difference) / 2.0)


def wall_hitting_time(
    distance: Float[Array, "..."], wall: Float[Array, "..."], rate: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Time at which a neuron at `distance` reaches a jump whose other side is a wall."""
    rate = rate * wall**2
    path = distance * (wall * wall + wall * distance + distance * distance / 3.0)
    return jnp.where(rate > 0, path / jnp.where(rate > 0, rate, 1.0), jnp.inf)


def wall_distance(
    distance: Float[Array, "..."], wall: Float[Array, "..."], scaled_time: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The distance to the jump at scaled time w²τ when the other side is a wall."""
    cube = (wall + distance) ** 3 - 3.0 * wall * wall * scaled_time
    return jnp.maximum(jnp.cbrt(jnp.maximum(cube, wall**3)) - wall, 0.0)


class Layout(NamedTuple):
    """How the sorted neurons of one lane became entries of a `Line`."""

    entry: Int[Array, " m"]  # of each neuron, in the caller's order
    size: Float[Array, " n"]  # neurons of each entry
    outside: Bool[Array, " m"]  # neurons beyond [0, 1], which never move
    neuron: Int[Array, " n"]  # the caller's index of an entry's (first) neuron; −1 for the walls


def _lay_out(
    slow: Float[Array, " m"], jumps: Float[Array, " K"], heights: Float[Array, " K"]
) -> tuple[Line, Jumps, Layout, Int[Array, " K"]]:
    """Entries and jumps of one lane, and the caller's index of each jump."""
    neurons = slow.shape[0]
    behind = jnp.argsort(heights == 0, stable=True)
    real = (heights != 0)[behind]
    places = jnp.where(real, jumps[behind], 2.0)
    order = jnp.argsort(slow, stable=True)
    ordered = slow[order]
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    entry = jnp.cumsum(new)  # from 1 on: 0 is a wall
    # the first neuron of each entry; behind the last one stand walls
    first = jnp.argsort(~new, stable=True)
    there = jnp.arange(neurons) < entry[-1]
    bounds = jnp.append(jnp.where(there, first, neurons), neurons)
    size = jnp.where(there, jnp.diff(bounds), 0).astype(slow.dtype)
    outside = (ordered < 0.0) | (ordered > 1.0)
    zero = jnp.zeros(1)
    mobility = jnp.where(there & ~outside[first], 1.0 / jnp.maximum(size, 1.0), 0.0)
    position = jnp.where(there, jnp.clip(ordered[first], 0.0, 1.0), 1.0)
    size, mobility = (jnp.concatenate([zero, x, zero]) for x in (size, mobility))
    position = jnp.concatenate([zero, position, jnp.ones(1)])
    neuron = jnp.where(there, order[first], -1).astype(jnp.int32)
    neuron = jnp.concatenate([jnp.full(1, -1, jnp.int32), neuron, jnp.full(1, -1, jnp.int32)])
    place = jnp.zeros(neurons + 2, jnp.int32)
    for k in range(jumps.shape[0]):
        place += (places[k] < position).astype(jnp.int32) + (places[k] <= position)
    layout = Layout(
        entry=entry[jnp.argsort(order)],
        size=size,
        outside=(slow < 0.0) | (slow > 1.0),
        neuron=neuron,
    )
    return (
        Line(position, place, mobility),
        Jumps(places, heights[behind], real),
        layout,
        behind,
    )


class Pairs(NamedTuple):
    """The closed forms that hold from some time on, one per jump."""

    near_left: Bool[Array, " K"]  # the left end is the nearer one
    pair: Bool[Array, " K"]  # both ends move
    wall: Bool[Array, " K"]  # one end moves
    wall_left: Bool[Array, " K"]
    left: Float[Array, " K"]  # distances at that time
    right: Float[Array, " K"]
    rate: Float[Array, " K"]  # w² times the mobility
    hitting: Float[Array, " K"]  # time from then on to the hit


def _pairs(position: Float[Array, " n"], s: Structure, jumps: Jumps) -> Pairs:
    decoupled = s.inside & ~s.coupled()
    left = jnp.where(decoupled, jumps.place - position[s.left], 1.0)
    right = jnp.where(decoupled, position[s.right] - jumps.place, 1.0)
    mobility = jnp.maximum(s.mobility_left, s.mobility_right)
    moves = decoupled & (mobility > 0)
    wall_left, wall_right = s.mobility_left == 0, s.mobility_right == 0
    pair, wall = moves & ~(wall_left | wall_right), moves & (wall_left | wall_right)
    rate = jumps.height**2 * mobility
    near, far = jnp.minimum(left, right), jnp.maximum(left, right)
    fixed, free = jnp.where(wall_left, left, right), jnp.where(wall_left, right, left)
    hitting = jnp.where(
        pair, pair_hitting_time(near, far, rate), wall_hitting_time(free, fixed, rate)
    )
    hitting = jnp.where(moves, hitting, jnp.inf)
    return Pairs(left <= right, pair, wall, wall_left, left, right, rate, hitting)


def _ends(p: Pairs, jumps: Jumps, time: Float[Array, " T"]) -> tuple[Array, Array]:
    """The ends `[K, T]` around each jump at the times `time` later, by the closed forms."""
    p, place = jax.tree.map(lambda leaf: leaf[:, None], (p, jumps.place))
    scaled = p.rate * time
    near, far = jnp.minimum(p.left, p.right), jnp.maximum(p.left, p.right)
    nearer, farther = pair_distances(near, far, scaled)
    fixed = jnp.where(p.wall_left, p.left, p.right)
    moved = wall_distance(jnp.where(p.wall_left, p.right, p.left), fixed, scaled)
    left = jnp.where(p.near_left, nearer, farther)
    right = jnp.where(p.near_left, farther, nearer)
    left, right = jnp.where(p.pair, left, moved), jnp.where(p.pair, right, moved)
    return place - left, place + right


def sharp_trajectories(
    slow: Float[Array, "lanes m"],
    tau: Float[Array, " T"],
    jumps: Float[Array, " jumps"],
    values: Float[Array, " pieces"],
    *,
    numeric: bool = False,
) -> dict[str, Any]:
    """Weights, positions, loss, status, statistics and events of a batch of starts.

    Args:
        slow: positions in any order.
        tau: recorded times.
        jumps: positions of the jumps.
        values: levels of the pieces.
        numeric: step through to the end instead of finishing by closed forms; for tests.
    """
    count = jumps.shape[0]
    if count == 0:  # nothing moves: as with a jump of no height
        jumps, values = jnp.full(1, 0.5), jnp.concatenate([values, values])
    room, lanes = capacity(jumps.shape[0]), slow.shape[0]

    def part(at: Array | int, slow: Array, answer: dict[str, Any] | None) -> dict[str, Any]:
        """The answer of some lanes, in `answer` from `at` on."""
        line, real, layout, behind = jax.vmap(_lay_out, (0, None, None))(
            slow, jumps, jnp.diff(values)
        )
        ahead = advance(line, real, tau, room, numeric)

        def block(first: Array | int, of: Any, answer: dict[str, Any] | None) -> dict[str, Any]:
            slow, line, real, layout, behind, ahead = of
            new = _finish(slow, line, real, layout, behind, ahead, tau, jumps, values, numeric)
            if answer is None:
                return new
            return jax.tree.map(
                lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, at + first, 0),
                answer,
                new,
            )

        return _in_blocks(block, (slow, line, real, layout, behind, ahead), BLOCK, answer)

    blank = _blank(slow, tau, jumps.shape[0]) if lanes > BLOCK else None
    answer = _in_blocks(part, slow, PART, blank)
    answer["stats"]["hitting_time"] = answer["stats"]["hitting_time"][:, :count]
    return answer


def _blank(slow: Float[Array, "lanes m"], tau: Array, jumps: int) -> dict[str, Any]:
    """Room for the answer."""
    lanes, neurons = slow.shape
    times, room = tau.shape[0], capacity(jumps)
    names = jnp.zeros((lanes, room), jnp.int32)
    return {
        "fast": jnp.zeros((lanes, times, neurons + 1)),
        "slow": jnp.zeros((lanes, times, neurons)),
        "loss": jnp.zeros((lanes, times)),
        "status": jnp.zeros(lanes, jnp.int32),
        "stats": {"hitting_time": jnp.zeros((lanes, jumps)), "reached": jnp.zeros(lanes)},
        "events": {
            "time": jnp.zeros((lanes, room)),
            **dict.fromkeys(("neuron", "jump", "kind"), names),
        },
    }


def _in_blocks(
    function: Callable[[Array | int, Any, Any], Any], lanes: Any, size: int, answer: Any
) -> Any:
    """`function(first, block, answer)` of blocks of at most `size` lanes, one after the other.

    Blocks of one size cover lanes without copies of any: the last one may overlap the one before.
    """
    count = jax.tree.leaves(lanes)[0].shape[0]
    if count <= size:
        return function(0, lanes, answer)

    def one(k: Array, answer: Any) -> Any:
        first = jnp.minimum(k * size, count - size)
        cut = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size), lanes)
        return function(first, cut, answer)

    return lax.fori_loop(0, -(-count // size), one, answer)


def _finish(
    slow: Float[Array, "lanes m"],
    line: Line,
    real: Jumps,
    layout: Layout,
    behind: Int[Array, "lanes K"],
    ahead: Ahead,
    tau: Array,
    jumps: Array,
    values: Array,
    numeric: bool,
) -> dict[str, Any]:
    """The answer of a block of lanes, from where their steps ended."""
    lane, records = ahead
    # each stage is computed once, whatever reads it
    count = jnp.min(lane.recorded)

    def closed(lane: Lane, line: Line, real: Jumps) -> tuple[Structure, Pairs]:
        return _closed(lane, line, real, numeric)

    s, pairs = apart(jax.vmap(closed), count, lane, line, real)
    late = jax.vmap(lambda time: jnp.maximum(tau - time, 0.0))(lane.time)
    ends = apart(jax.vmap(_ends), count, pairs, real, late)
    entries = apart(jax.vmap(_entries), count, lane, s, pairs, ends, records)
    level, loss = apart(jax.vmap(_levels, (0, None, None)), count, entries, jumps, values)
    fast = apart(jax.vmap(_weights), count, entries, level, layout)
    answer = jax.vmap(_events)(lane, s, pairs, real, layout, behind)
    ends_well = lane.status == int(Status.SUCCESS)
    index = jnp.arange(tau.shape[0])
    known = ends_well[:, None] | (index < lane.recorded[:, None]) | (tau <= lane.time[:, None])
    positions = jax.vmap(lambda e, of: e[of.entry])(entries, layout)
    positions = jnp.where(layout.outside[..., None], slow[..., None], positions)
    reached = jnp.where(ends_well, tau[-1], jnp.minimum(lane.time, tau[-1]))
    return answer | {
        "stats": answer["stats"] | {"reached": reached},
        "fast": jnp.where(known[:, None], fast, jnp.nan).swapaxes(1, 2),
        "slow": jnp.where(known[:, None], positions, jnp.nan).swapaxes(1, 2),
        "loss": jnp.where(known, loss, jnp.nan),
    }


def capacity(jumps: int) -> int:
    """The most events that are kept of one start."""
    return 6 * jumps + 2


def _closed(lane: Lane, line: Line, jumps: Jumps, numeric: bool) -> tuple[Structure, Pairs]:
    """The closed forms that finish one lane."""
    s = structure(lane.place, line.mobility, jumps)
    pairs = _pairs(lane.position, s, jumps)
    if numeric:
        never = jnp.zeros_like(pairs.pair)
        pairs = pairs._replace(
            pair=never, wall=never, hitting=jnp.full_like(pairs.hitting, jnp.inf)
        )
    return s, pairs


def _entries(
    lane: Lane, s: Structure, p: Pairs, ends: tuple[Array, Array], records: Float[Array, "n T"]
) -> Float[Array, "n T"]:
    """The entries of one lane at the recorded times, from its steps and its closed forms."""
    moves = p.pair | (p.wall & ~p.wall_left), p.pair | (p.wall & p.wall_left)
    late = put(ends, moves, s, lane.position)
    stepped = jnp.arange(records.shape[1]) < lane.recorded
    return jnp.where(stepped, records, late)


def _events(
    lane: Lane,
    s: Structure,
    p: Pairs,
    jumps: Jumps,
    layout: Layout,
    behind: Int[Array, " K"],
) -> dict[str, Any]:
    """Status, hitting times and events of one lane: those of its steps and its closed forms."""
    good = lane.status == int(Status.SUCCESS)
    when = jnp.isfinite(p.hitting) & good
    time = lane.time + p.hitting
    near = jnp.where(p.pair, p.near_left, ~p.wall_left)
    entry, other = jnp.where(near, s.left, s.right), jnp.where(near, s.right, s.left)
    together = when & p.pair & (p.left == p.right)
    index = jnp.arange(jumps.place.shape[0])
    kind = jnp.full_like(index, int(Event.HIT))
    log = push(lane.log, when, time, entry, index, kind)
    log = push(log, together, time, other, index, kind)
    room = log.time.shape[0]
    status = jnp.where(good & (log.count > room), int(Status.MAX_EVENTS), lane.status)
    good = status == int(Status.SUCCESS)
    order = jnp.argsort(log.time, stable=True)
    there = jnp.arange(room) < log.count
    jump = jnp.where(there, behind[log.jump[order]], -1).astype(jnp.int32)
    time, kind = log.time[order], log.kind[order]
    hits = (jump[:, None] == index) & (kind == int(Event.HIT))[:, None]
    hitting = jnp.min(jnp.where(hits, time[:, None], jnp.inf), axis=0)
    return {
        "status": status.astype(jnp.int32),
        "stats": {"hitting_time": jnp.where(good | jnp.isfinite(hitting), hitting, jnp.nan)},
        "events": {
            "time": time,
            "neuron": jnp.where(there, layout.neuron[log.entry[order]], -1),
            "jump": jump,
            "kind": kind,
        },
    }


def _levels(
    entries: Float[Array, "n T"],
    jumps: Float[Array, " jumps"],
    values: Float[Array, " pieces"],
) -> tuple[Float[Array, "n1 T"], Float[Array, " T"]]:
    """The mean of f* between entries, and the loss of the fit that takes these values."""
    low, high = entries[:-1], entries[1:]
    length = high - low
    # f* between two entries is measured from its first level on: exact where it is constant
    base = jnp.broadcast_to(values[0], low.shape)
    area = jnp.zeros_like(low)
    for k in range(jumps.shape[0]):
        base = jnp.where(jumps[k] <= low, values[k + 1], base)
        inside = (jumps[k] > low) & (jumps[k] < high)
        area += jnp.where(inside, (values[k + 1] - values[k]) * (high - jumps[k]), 0.0)
    offset = area / jnp.where(length > 0, length, 1.0)
    loss = jnp.zeros_like(low)
    for k in range(jumps.shape[0] + 1):
        from_ = jnp.maximum(low, jumps[k - 1]) if k else low
        to = jnp.minimum(high, jumps[k]) if k < jumps.shape[0] else high
        loss += jnp.maximum(to - from_, 0.0) * ((values[k] - base) - offset) ** 2
    return base + offset, jnp.sum(loss, axis=0)


def _weights(
    entries: Float[Array, "n T"], level: Float[Array, "n1 T"], layout: Layout
) -> Float[Array, "m1 T"]:
    """Weights of the fit that takes these values between entries.

    Neurons at the same place share a step evenly, which is the least norm. The bias is a step at
    0; steps at 1 have no weight.
    """
    valid = entries[1:] > entries[:-1]
    # inside (0, 1) at most two entries share a place, and the plateau between them has no length
    left = jnp.where(valid, level, jnp.roll(level, 1, axis=0))[:-1]
    right = jnp.where(valid, level, jnp.roll(level, -1, axis=0))[1:]
    size = layout.size[:, None]
    sharing = size[1:-1] + jnp.where(valid[:-1], 0.0, size[:-2])
    sharing += jnp.where(valid[1:], 0.0, size[2:])
    inner = (right - left) / jnp.maximum(sharing, 1.0)
    share = jnp.pad(inner, ((1, 1), (0, 0)))
    at_start = entries <= 0.0
    first = jnp.take_along_axis(level, jnp.argmax(valid, axis=0)[None], axis=0)
    bias = first / (1.0 + jnp.sum(jnp.where(at_start, size, 0.0), axis=0))
    share = jnp.where(at_start, bias, jnp.where(entries >= 1.0, 0.0, share))
    return jnp.concatenate([bias, share[layout.entry]])
