"""The univariate problem's sharp limit event by event: Taylor steps between exact events.

See docs/sharp_limit.md for the derivation. Between events the flow of the flanking neurons is
rational in their positions: with S the length of an interval, N = Σ w (u_R − v) over its jumps
and W = Σ w, the fit misses f* by G = N/S at its left end and by H = W − G at its right end;
u_L moves at the speed +G² and u_R at −H², and a neuron between two such intervals at the sum.
Taylor coefficients of all of it follow from one division and one square per interval, so a step
has order `ORDER`, its polynomial is the dense output, and an event is a root of a polynomial.

A line of neurons is an array of entries, sorted: a wall at 0, the groups of coincident neurons,
a wall at 1. The place of an entry is an integer: 2i in piece i, 2k + 1 on jump k. Neurons on a
jump are told from those beside it by it, and never by comparing floats.

Everything here is for one lane and is mapped over lanes; only `advance` sees all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tts_jax._trajectory import Event, Status


ORDER = 16  # of the Taylor steps
TOLERANCE = 1e-17  # of the last Taylor terms of a position
WINDOW = 32  # recorded times that one step may cover
ROUNDS = 3, 4, 8, 16, 5_000  # steps of all lanes together in each round
BLOCK = 32  # lanes that step together
TOUCHING = 1e-14  # a shorter interval around one jump has collapsed: both its ends are on it


class Jumps(NamedTuple):
    """The jumps of one lane; those of no height stand last, beyond every neuron."""

    place: Float[Array, " K"]
    height: Float[Array, " K"]
    real: Bool[Array, " K"]


class Line(NamedTuple):
    """The neurons of one lane as sorted entries."""

    position: Float[Array, " n"]
    place: Int[Array, " n"]  # 2i: in piece i; 2k + 1: on jump k
    mobility: Float[Array, " n"]  # 0: a wall; 1/k: k coincident neurons


class Log(NamedTuple):
    """Events so far; `count` may exceed the room, and what is beyond it is lost."""

    time: Float[Array, " E"]
    entry: Int[Array, " E"]
    jump: Int[Array, " E"]
    kind: Int[Array, " E"]
    count: Int[Array, ""]


class Lane(NamedTuple):
    """One lane under way."""

    time: Float[Array, ""]
    position: Float[Array, " n"]
    place: Int[Array, " n"]
    recorded: Int[Array, ""]  # recorded times that are done
    log: Log
    status: Int[Array, ""]
    active: Bool[Array, ""]


class Structure(NamedTuple):
    """Which entries and which other intervals each jump has beside it.

    A jump that no entry sits on lies inside one interval; jumps inside the same interval carry
    the same numbers. Indices of jumps are K where there is none.
    """

    left: Int[Array, " K"]  # entry at the left end: the last one left of the jump
    right: Int[Array, " K"]
    inside: Bool[Array, " K"]  # the jump lies inside an interval
    occupied: Bool[Array, " K"]  # some entry sits on it
    double: Bool[Array, " K"]  # more than one does
    lowest: Int[Array, " K"]  # first entry on the jump, or the left end
    highest: Int[Array, " K"]
    same: Bool[Array, "K K"]  # jumps inside the same interval
    first: Bool[Array, " K"]  # the jump is the first one inside its interval
    last: Bool[Array, " K"]
    before: Int[Array, " K"]  # a jump inside the interval left of entry `lowest`
    after: Int[Array, " K"]
    mobility_left: Float[Array, " K"]  # of the two ends; 0 also where they sit on a jump
    mobility_right: Float[Array, " K"]

    @property
    def single(self) -> Bool[Array, " K"]:
        """The jump is alone inside its interval."""
        return self.inside & self.first & self.last

    def coupled(self) -> Bool[Array, " K"]:
        """The jump is inside an interval whose motion has no closed form here.

        Closed forms exist for a single jump between two ends that no other interval pulls at,
        if they are equally mobile or one is a wall. An entry that sits on a jump is a wall if
        only one of its intervals holds a jump: its pull only falls.
        """
        none = self.before.shape[0]
        alone = (self.before == none) & (self.after == none)
        left, right = self.mobility_left, self.mobility_right
        even = (left == right) | (left == 0) | (right == 0)
        return self.inside & ~(self.single & alone & even)


def structure(place: Int[Array, " n"], mobility: Float[Array, " n"], jumps: Jumps) -> Structure:
    """What lies beside each jump."""
    count = jumps.place.shape[0]
    last_entry = place.shape[0] - 1
    code = 2 * jnp.arange(count, dtype=place.dtype) + 1
    left = jnp.sum(place[None, :] < code[:, None], axis=1) - 1
    right = jnp.sum(place[None, :] <= code[:, None], axis=1)
    occupied = (right - left > 1) & jumps.real
    inside = ~occupied & jumps.real
    lowest = jnp.where(occupied, left + 1, left)
    highest = jnp.where(occupied, right - 1, right)
    same = (left[:, None] == left[None, :]) & inside[:, None] & inside[None, :]
    index = jnp.arange(count)
    earlier = index[None, :] < index[:, None]
    first = inside & ~jnp.any(same & earlier, axis=1)
    last = inside & ~jnp.any(same & earlier.T, axis=1)
    ends_here = inside[None, :] & (right[None, :] == lowest[:, None]) & jumps.real[:, None]
    starts_here = inside[None, :] & (left[None, :] == highest[:, None]) & jumps.real[:, None]
    left, right = jnp.minimum(left, last_entry), jnp.minimum(right, last_entry)
    free = jnp.where(place % 2 == 0, mobility, 0.0)
    return Structure(
        left=left,
        right=right,
        inside=inside,
        occupied=occupied,
        double=occupied & (highest > lowest),
        lowest=jnp.minimum(lowest, last_entry),
        highest=jnp.minimum(highest, last_entry),
        same=same,
        first=first,
        last=last,
        before=jnp.min(jnp.where(ends_here, index, count), axis=1),
        after=jnp.min(jnp.where(starts_here, index, count), axis=1),
        mobility_left=jnp.where(inside, free[left], 0.0),
        mobility_right=jnp.where(inside, free[right], 0.0),
    )


class Misfit(NamedTuple):
    """Where the ends of each interval are, and how far the fit is from f* there."""

    left: Float[Array, " K"]
    right: Float[Array, " K"]
    length: Float[Array, " K"]
    total: Float[Array, " K"]  # W, the sum of the heights inside
    at_left: Float[Array, " K"]  # G = F − f* at the left end
    at_right: Float[Array, " K"]  # H = f* − F at the right end


def misfit(position: Float[Array, " n"], s: Structure, jumps: Jumps) -> Misfit:
    """`Misfit` of every jump's interval; without cancellation, and 0 where there is none."""
    left, right = position[s.left], position[s.right]
    length = jnp.where(s.inside, right - left, 1.0)
    safe = jnp.where(length > 0, length, 1.0)
    heights = jnp.where(s.same, jumps.height[None, :], 0.0)
    at_left = _sum(heights * (right[:, None] - jumps.place[None, :])) / safe
    at_right = _sum(heights * (jumps.place[None, :] - left[:, None])) / safe
    return Misfit(left, right, length, jnp.sum(heights, axis=1), at_left, at_right)


def _sum(terms: Float[Array, "K K"]) -> Float[Array, " K"]:
    """Sums of rows, 0 where they are only rounding."""
    total, size = jnp.sum(terms, axis=1), jnp.sum(jnp.abs(terms), axis=1)
    return jnp.where(jnp.abs(total) <= 4.0 * jnp.finfo(terms.dtype).eps * size, 0.0, total)


def _beside(values: Float[Array, "... K"], index: Int[Array, " K"]) -> Float[Array, "... K"]:
    """`values[..., index]`, 0 where the index is K."""
    count = index.shape[0]
    return jnp.where(index < count, values[..., jnp.minimum(index, count - 1)], 0.0)


def hold(
    at_left: Float[Array, " K"], at_right: Float[Array, " K"], s: Structure, jumps: Jumps
) -> tuple[Float[Array, " K"], Float[Array, " K"], Float[Array, " K"]]:
    """What keeps an entry on its jump: three numbers that are positive while it stays.

    In units of the jump's height w let X be the misfit right of the entry and Y the one left of
    it; the entry's weight is then a = w (1 + X + Y), and its velocities just beside the jump are
    w² (1 + X + Y)(1 + X − Y) on the left and −w² (1 + X + Y)(1 − X + Y) on the right.

    Returns:
        1 − X + Y, 1 + X − Y and 1 + X + Y.
    """
    height = jnp.where(jumps.real, jumps.height, 1.0)
    x = _beside(at_left, s.after) / height
    y = _beside(at_right, s.before) / height
    return 1.0 - x + y, 1.0 + x - y, 1.0 + x + y


class Motion(NamedTuple):
    """Taylor coefficients in (t − t₀)/scale, one row per order."""

    scale: Float[Array, ""]
    left: Float[Array, "orders K"]
    right: Float[Array, "orders K"]
    at_left: Float[Array, "order K"]


class Intervals(NamedTuple):
    """The intervals with jumps inside from left to right, at most K; the rest are empty.

    In this order those which share a moving end are neighbours.
    """

    of_jump: Int[Array, " K"]  # the interval that a jump is in
    left: Float[Array, " K"]
    right: Float[Array, " K"]
    length: Float[Array, " K"]
    total: Float[Array, " K"]
    at_left: Float[Array, " K"]
    at_right: Float[Array, " K"]
    mobility_left: Float[Array, " K"]  # times the scale
    mobility_right: Float[Array, " K"]
    from_before: Float[Array, " K"]  # the same where the interval before shares the end, or 0
    from_after: Float[Array, " K"]
    scale: Float[Array, ""]


def intervals(s: Structure, m: Misfit) -> Intervals:
    """What the Taylor series start from; the scale is the least time in which one may close."""
    pull = s.mobility_left * (m.at_left**2 + _beside(m.at_right, s.before) ** 2)
    pull += s.mobility_right * (m.at_right**2 + _beside(m.at_left, s.after) ** 2)
    times = jnp.where(s.inside & (pull > 0), m.length / jnp.where(pull > 0, pull, 1.0), jnp.inf)
    scale = lax.stop_gradient(jnp.min(times))
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1.0)
    leaders = jnp.argsort(~s.first, stable=True)
    there = s.first[leaders]
    joined = there[1:] & there[:-1] & (s.right[leaders][:-1] == s.left[leaders][1:])
    joined = jnp.concatenate([jnp.zeros(1, bool), joined, jnp.zeros(1, bool)])

    def pick(values: Array, empty: float = 0.0) -> Array:
        return jnp.where(there, values[leaders], empty)

    mobility_left, mobility_right = scale * pick(s.mobility_left), scale * pick(s.mobility_right)
    return Intervals(
        of_jump=jnp.maximum(jnp.cumsum(s.first) - 1, 0),
        left=pick(m.left),
        right=pick(m.right),
        length=pick(m.length, 1.0),
        total=pick(m.total),
        at_left=pick(m.at_left),
        at_right=pick(m.at_right),
        mobility_left=mobility_left,
        mobility_right=mobility_right,
        from_before=jnp.where(joined[:-1], mobility_left, 0.0),
        from_after=jnp.where(joined[1:], mobility_right, 0.0),
        scale=scale,
    )


def motion(start: Intervals) -> tuple[list[Array], list[Array], list[Array]]:
    """The Taylor series of the ends and of G of all intervals, an array `[K]` per order."""
    zero = jnp.zeros(1)
    mobility_left, mobility_right = start.mobility_left, start.mobility_right
    from_before, from_after = start.from_before, start.from_after
    total, g, h = start.total, start.at_left, start.at_right
    inverse = 1.0 / jnp.where(start.length > 0, start.length, 1.0)
    left, right, gap = [start.left], [start.right], [start.length]
    at_left = [g]
    for n in range(ORDER):
        if n == 0:
            pull_left, pull_right = g**2, h**2
        else:
            quotient = total * right[n]
            for i in range(1, n + 1):
                quotient = quotient - gap[i] * at_left[n - i]
            at_left.append(quotient * inverse)
            square = jnp.zeros_like(inverse)
            for i in range(1, (n + 1) // 2):
                square = square + at_left[i] * at_left[n - i]
            square = 2.0 * square
            if n % 2 == 0:
                square = square + at_left[n // 2] ** 2
            pull_left = 2.0 * g * at_left[n] + square
            pull_right = -2.0 * h * at_left[n] + square
        before = jnp.concatenate([zero, pull_right[:-1]])
        after = jnp.concatenate([pull_left[1:], zero])
        left.append((mobility_left * pull_left - from_before * before) / (n + 1))
        right.append((from_after * after - mobility_right * pull_right) / (n + 1))
        gap.append(right[n + 1] - left[n + 1])
    return left, right, at_left


def _per_jump(series: Motion, of_jump: Int[Array, " K"], s: Structure, m: Misfit) -> Motion:
    """The series with a column per jump instead."""

    def spread(columns: Array) -> Array:
        return jnp.where(s.inside, columns[:, of_jump], 0.0)

    left, right = spread(series.left), spread(series.right)
    return Motion(
        series.scale, left.at[0].set(m.left), right.at[0].set(m.right), spread(series.at_left)
    )


def _horner(coefficients: Array, x: Array) -> Array:
    value = coefficients[-1]
    for n in range(coefficients.shape[0] - 2, -1, -1):
        value = value * x + coefficients[n]
    return value


def _with_slope(coefficients: Array, x: Array) -> tuple[Array, Array]:
    value, slope = coefficients[-1], jnp.zeros_like(coefficients[-1])
    for n in range(coefficients.shape[0] - 2, -1, -1):
        slope = slope * x + value
        value = value * x + coefficients[n]
    return value, slope


def _derivative(coefficients: Array) -> Array:
    order = jnp.arange(1.0, coefficients.shape[0])
    return coefficients[1:] * order.reshape(-1, *(1,) * (coefficients.ndim - 1))


def _reach(m: Motion) -> Float[Array, ""]:
    """How far the series hold, in units of the scale."""
    reach = jnp.asarray(jnp.inf)
    for n in (ORDER - 1, ORDER):
        term = jnp.maximum(jnp.max(jnp.abs(m.left[n])), jnp.max(jnp.abs(m.right[n])))
        bound = jnp.exp(jnp.log(TOLERANCE / jnp.where(term > 0, term, 1.0)) / n)
        reach = jnp.minimum(reach, jnp.where(term > 0, bound, jnp.inf))
    return reach


def _candidates(s: Structure, m: Motion, mis: Misfit, jumps: Jumps) -> Float[Array, "orders 5 K"]:
    """Polynomials that are positive until an event.

    Rows: the left end of an interval is left of the first jump inside; the right end is right of
    the last one; and the three of `hold` for entries on a jump. An entry that shares its jump
    with another one leaves at once to the side where the fit misses f*.
    """
    one = jnp.ones_like(jumps.place)
    zero = jnp.zeros_like(one)
    left_moves = s.first & (s.mobility_left > 0)
    right_moves = s.last & (s.mobility_right > 0)
    none = jumps.place.shape[0]
    held = s.occupied & ((s.before < none) | (s.after < none)) & ~s.double
    leaves_right = s.double & (s.after < none)
    leaves_left = s.double & (s.before < none)
    height = jnp.where(jumps.real, jumps.height, 1.0)
    xs = _beside(m.at_left, s.after) / height
    ys = _beside(jnp.concatenate([mis.at_right[None], -m.at_left[1:]]), s.before) / height
    rows = []
    for n in range(ORDER + 1):
        x, y = (xs[n], ys[n]) if n < ORDER else (zero, zero)
        start = one if n == 0 else zero
        going = -one if n <= 1 else zero
        stays_right = jnp.where(held, start - x + y, jnp.where(leaves_right, going, start))
        stays_left = jnp.where(held, start + x - y, jnp.where(leaves_left, going, start))
        weight = jnp.where(held, start + x + y, start)
        from_left = -m.left[n] if n else jumps.place - m.left[n]
        from_right = m.right[n] if n else m.right[n] - jumps.place
        from_left = jnp.where(left_moves, from_left, start)
        from_right = jnp.where(right_moves, from_right, start)
        rows.append(jnp.stack([from_left, from_right, stays_right, stays_left, weight]))
    return jnp.stack(rows)


def _turning_point(polynomials: Array, reach: Array) -> Array:
    """The end of the step: before any candidate that approaches zero turns round again."""
    slopes = -_derivative(polynomials)
    end = _horner(slopes, reach)
    start = slopes[0]
    turns = (start > 0) & (end < 0)
    x = jnp.where(turns, reach * start / jnp.where(turns, start - end, 1.0), reach)
    x = _newton(slopes, (jnp.zeros_like(start), jnp.full_like(start, reach), x), 2)[2]
    # when the turn is at the very start nothing can be hit before it
    late = turns & (x > 1e-8 * reach)
    return jnp.min(jnp.where(late, x, reach))


def _first_root(polynomials: Array, end: Array) -> tuple[Array, Array]:
    """The first zero of a candidate in (0, end]: (which, where); `which` is −1 without any."""
    value = _horner(polynomials, end)
    start, slope = polynomials[0], polynomials[1]
    crosses = (value <= 0) & ((start > 0) | (slope < 0))
    x = jnp.where(crosses, end * start / jnp.where(crosses, start - value, 1.0), end)
    bracket = jnp.zeros_like(start), jnp.full_like(start, end), x
    x = _newton(polynomials, bracket, 4)[2]
    x = jnp.where(start <= 0, 0.0, x)
    x = jnp.where(crosses, x, jnp.inf).reshape(-1)
    which = jnp.argmin(x)
    found = jnp.isfinite(x[which])
    # the one that is first again, to the last bit also where it is flat
    chosen = polynomials.reshape(polynomials.shape[0], -1)[:, which]
    best = jnp.where(found, x[which], end)
    best = jnp.where(best > 0, _newton(chosen, (jnp.zeros_like(end), end, best), 4)[2], best)
    return jnp.where(found, which, -1), best


def _newton(
    polynomials: Array, bracket: tuple[Array, Array, Array], count: int
) -> tuple[Array, Array, Array]:
    """Newton's method for falling polynomials, by bisection where it leaves its bracket."""

    def improve(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, x = carry
        value, slope = _with_slope(polynomials, x)
        low, high = jnp.where(value > 0, x, low), jnp.where(value > 0, high, x)
        new = x - value / jnp.where(slope != 0, slope, 1.0)
        return low, high, jnp.where((new >= low) & (new <= high), new, 0.5 * (low + high))

    return lax.fori_loop(0, count, improve, bracket)


def push(log: Log, when: Array, time: Array, entry: Array, jump: Array, kind: Array) -> Log:
    """Append the events marked in `when`, `[any]`, with `time` `[any]` or `[]`."""
    room = jnp.arange(log.time.shape[0])
    time = jnp.broadcast_to(time, when.shape)
    for i in range(when.shape[0]):
        here = when[i] & (room == log.count)
        log = Log(
            jnp.where(here, time[i], log.time),
            jnp.where(here, entry[i], log.entry).astype(log.entry.dtype),
            jnp.where(here, jump[i], log.jump).astype(log.jump.dtype),
            jnp.where(here, kind[i], log.kind).astype(log.kind.dtype),
            log.count + when[i].astype(log.count.dtype),
        )
    return log


def put(
    ends: tuple[Float[Array, "K ..."], Float[Array, "K ..."]],
    moves: tuple[Bool[Array, " K"], Bool[Array, " K"]],
    s: Structure,
    position: Float[Array, " n"],
) -> Float[Array, "n ..."]:
    """`position` with the ends of intervals where they have moved to, by gathering."""
    entries, count = jnp.arange(position.shape[0]), s.left.shape[0]
    index = jnp.arange(count)
    left = jnp.max(jnp.where((s.left == entries[:, None]) & moves[0], index, -1), axis=1)
    right = jnp.max(jnp.where((s.right == entries[:, None]) & moves[1], index, -1), axis=1)
    slot = jnp.maximum(jnp.where(left >= 0, left, count + right), 0)
    moved = jnp.concatenate(ends)[slot]
    still = (-1, *(1,) * (moved.ndim - 1))
    there = (left >= 0) | (right >= 0)
    return jnp.where(there.reshape(still), moved, position.reshape(still))


def start(line: Line, jumps: Jumps, room: int, everything: bool) -> Lane:
    """Settle the entries that start on a jump: they stay (an event `HIT` at τ = 0) or leave."""
    s = structure(line.place, line.mobility, jumps)
    m = misfit(line.position, s, jumps)
    stays_right, stays_left, weight = hold(m.at_left, m.at_right, s, jumps)
    # velocities beside the jump, in units of w²; inside it the mean of both decides
    sure = (weight > 0) & (stays_right >= 0) & (stays_left >= 0) | (weight == 0)
    side = jnp.where(weight > 0, jnp.sign(stays_left - stays_right), 0.0)
    side = jnp.where(weight < 0, -jnp.sign(stays_left - stays_right), side).astype(jnp.int32)
    side = jnp.where(s.occupied & ~sure, side, 0)
    tie = s.occupied & ~sure & (side == 0)
    entries = jnp.arange(line.place.shape[0])
    shift = jnp.where(s.lowest == entries[:, None], side, 0)
    place = line.place + jnp.sum(shift, axis=1, dtype=line.place.dtype)
    log = Log(
        jnp.full(room, jnp.inf),
        jnp.full(room, -1, jnp.int32),
        jnp.full(room, -1, jnp.int32),
        jnp.full(room, -1, jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    count = jumps.place.shape[0]
    kind = jnp.where(side == 0, int(Event.HIT), int(Event.LEAVE))
    log = push(log, s.occupied & ~tie, jnp.zeros(()), s.lowest, jnp.arange(count), kind)
    status = jnp.where(jnp.any(tie), int(Status.NOT_UNIQUE), int(Status.SUCCESS))
    finite = jnp.all(jnp.isfinite(line.position)) & jnp.all(jnp.isfinite(jumps.height))
    status = jnp.where(finite, status, int(Status.SOLVER_FAILED)).astype(jnp.int32)
    moving = everything | jnp.any(structure(place, line.mobility, jumps).coupled())
    return Lane(
        jnp.zeros(()),
        line.position,
        place,
        jnp.zeros((), jnp.int32),
        log,
        status,
        (status == int(Status.SUCCESS)) & moving,
    )


def _busy(s: Structure, m: Motion, everything: bool) -> Bool[Array, ""]:
    """Whether something moves that has no closed form, or an entry is about to leave."""
    none = s.before.shape[0]
    moves = (m.left[1] != 0) | (m.right[1] != 0)
    leaves = s.double & ((s.before < none) | (s.after < none))
    numeric = s.inside if everything else s.coupled()
    return jnp.any((numeric & moves) | leaves)


class Outlook(NamedTuple):
    """All that a step knows about the motion ahead."""

    structure: Structure
    misfit: Misfit
    motion: Motion
    candidates: Float[Array, "orders 5 K"]
    reach: Float[Array, ""]


# where `vmap` finds the lanes: behind the orders
_MOTION_AXES: Any = Motion(*cast(Any, (0, 1, 1, 1)))
_OUTLOOK_AXES: Any = Outlook(*cast(Any, (0, 0, _MOTION_AXES, 1, 0)))


def _here(
    lane: Lane, mobility: Float[Array, " n"], jumps: Jumps
) -> tuple[Structure, Misfit, Intervals]:
    s = structure(lane.place, mobility, jumps)
    mis = misfit(lane.position, s, jumps)
    return s, mis, intervals(s, mis)


def _outlook(s: Structure, mis: Misfit, at: Intervals, series: Motion, jumps: Jumps) -> Outlook:
    columns = _per_jump(series, at.of_jump, s, mis)
    return Outlook(s, mis, columns, _candidates(s, columns, mis, jumps), _reach(series))


def look(count: Array, lane: Lane, mobility: Float[Array, "lanes n"], jumps: Jumps) -> Outlook:
    """The Taylor series from where all lanes are."""
    s, mis, at = apart(jax.vmap(_here), count, lane, mobility, jumps)
    series = Motion(at.scale, *map(jnp.stack, apart(jax.vmap(motion), count, at)))
    outlook = jax.vmap(_outlook, (0, 0, 0, _MOTION_AXES, 0), _OUTLOOK_AXES)
    return apart(outlook, count, s, mis, at, series, jumps)


def step(
    lane: Lane,
    outlook: Outlook,
    mobility: Float[Array, " n"],
    jumps: Jumps,
    tau: Float[Array, " T_padded"],
    everything: bool,
) -> tuple[Lane, Float[Array, "n W"]]:
    """One Taylor step of one lane, up to the next event at most; and what it records."""
    count = jumps.place.shape[0]
    s, mis, series, polynomials, reach = outlook
    active = lane.active & _busy(s, series, everything)

    # how far
    window = lax.dynamic_slice(tau, (lane.recorded,), (WINDOW + 1,))
    reach = jnp.minimum(reach, (window[WINDOW] - lane.time) / series.scale)
    reach = jnp.maximum(reach, 0.0)
    fixed = lax.stop_gradient(polynomials)
    touching = s.single & (mis.length <= TOUCHING)
    touching &= (s.mobility_left > 0) & (s.mobility_right > 0)
    touches = jnp.any(touching)
    limit = lax.stop_gradient(reach)
    limit = jnp.where(jnp.isfinite(limit), limit, 1.0)
    end = jnp.where(touches | ~active, 0.0, _turning_point(fixed, limit))
    which, x = _first_root(fixed, end)
    which = jnp.where(touches | ~active, -1, which)
    happens = which >= 0
    # the root as a differentiable function of the coefficients
    row, k = jnp.maximum(which, 0) // count, jnp.maximum(which, 0) % count
    chosen = polynomials[:, row, k]
    x = lax.stop_gradient(jnp.where(happens, x, end))
    value, slope = _with_slope(chosen, x)
    slope = lax.stop_gradient(slope)
    exact = x - jnp.where(slope != 0, value / jnp.where(slope != 0, slope, 1.0), 0.0)
    # in value the root stays where it was found
    x = jnp.where(happens, x + (exact - lax.stop_gradient(exact)), x)

    # record, then move
    def at(x: Array) -> Array:
        several = (..., *(None,) * x.ndim)
        ends = _horner(series.left[several], x), _horner(series.right[several], x)
        return put(ends, (s.inside, s.inside), s, lane.position)

    time = lane.time + x * series.scale
    inner = (window[:WINDOW] - lane.time) / series.scale
    done = (window[:WINDOW] <= time) & active
    records = at(jnp.where(done, inner, 0.0))
    position = at(x)

    # what the event does
    hits_from_left = happens & (row == 0)
    hits_from_right = happens & (row == 1)
    hits = hits_from_left | hits_from_right
    entry = jnp.where(row == 0, s.left[k], jnp.where(row == 1, s.right[k], s.highest[k]))
    entry = jnp.where(row == 3, s.lowest[k], entry)
    its = jnp.arange(lane.place.shape[0]) == entry
    position = jnp.where(hits & its, jumps.place[k], position)
    hit_place = jnp.where(hits & its, (2 * k + 1).astype(lane.place.dtype), lane.place)
    there = structure(hit_place, mobility, jumps)
    after = misfit(position, there, jumps)
    stays_right, stays_left, weight = hold(after.at_left, after.at_right, there, jumps)
    passes_right = hits_from_left & (weight[k] * stays_right[k] < 0)
    passes_left = hits_from_right & (weight[k] * stays_left[k] < 0)
    # an entry whose weight vanishes goes the way opposite to the drift of its balance point
    drift = fixed[:, 3, k] - fixed[:, 2, k]
    speed = _horner(_derivative(drift), x)
    vanishes = happens & (row == 4)
    to_right = passes_right | (happens & (row == 2)) | (vanishes & (speed < 0))
    to_left = passes_left | (happens & (row == 3)) | (vanishes & (speed > 0))
    tie = vanishes & (speed == 0)
    shift = to_right.astype(lane.place.dtype) - to_left.astype(lane.place.dtype)
    place = hit_place + jnp.where(its, shift, 0)
    kind = jnp.where(
        hits,
        jnp.where(to_right | to_left, int(Event.PASS), int(Event.HIT)),
        int(Event.LEAVE),
    )

    # an interval that has collapsed: both ends are on its jump, and two events happen at once
    closes = s.single[k] & (s.mobility_left[k] > 0) & (s.mobility_right[k] > 0)
    width = _horner(series.right[:, k] - series.left[:, k], x)
    closes &= hits & (width <= TOUCHING)
    j = jnp.where(touches, jnp.argmax(touching), k)
    both = jnp.stack([s.left[j], s.right[j]])
    touches = (touches & active) | closes
    collapsed = touches & jnp.any(jnp.arange(place.shape[0])[:, None] == both, axis=1)
    place = jnp.where(collapsed, (2 * j + 1).astype(place.dtype), place)
    position = jnp.where(collapsed, jumps.place[j], position)
    tie |= touches & (s.before[j] < count) & (s.after[j] < count)

    when = jnp.stack([(happens & ~tie) | touches, touches])
    log = push(
        lane.log,
        when,
        time,
        jnp.where(touches, both, jnp.stack([entry, entry])),
        jnp.where(touches, j, k) * jnp.ones(2, jnp.int32),
        jnp.where(touches, int(Event.HIT), kind) * jnp.ones(2, jnp.int32),
    )
    room = log.time.shape[0]
    status = jnp.where(tie, int(Status.NOT_UNIQUE), lane.status)
    status = jnp.where(log.count > room, int(Status.MAX_EVENTS), status).astype(lane.status.dtype)
    new = Lane(
        time,
        position,
        place,
        lane.recorded + jnp.sum(done, dtype=jnp.int32),
        log,
        status,
        active & (status == int(Status.SUCCESS)),
    )
    new = jax.tree.map(
        lambda new, old: jnp.where(active, new, old), new, lane._replace(active=active)
    )
    return new, records


def apart(function: Callable[..., Any], count: Array, *args: Any) -> Any:
    """`function(*args)`, kept apart from what reads its results; differentiable like it.

    XLA would repeat what it takes to be cheap, such as the recurrences of the Taylor series, inside
    every reader. It does not look through a loop whose one round it cannot foresee; `count` is
    any number that is not negative.
    """

    @jax.custom_jvp
    def value(count: Array, args: Any) -> Any:
        empty = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *args)
        )
        rounds = jnp.minimum(count, 0) + 1
        _, result = lax.while_loop(
            lambda carry: carry[0] < rounds,
            lambda carry: (carry[0] + 1, function(*args)),
            (jnp.zeros_like(rounds), empty),
        )
        return result

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return value(*primals), jax.jvp(function, primals[1], tangents[1])[1]

    return value(count, args)


class Ahead(NamedTuple):
    """Lanes as they are when their steps end, `[lanes, ...]`, and their positions before that.

    Records of later times are arbitrary.
    """

    lane: Lane
    records: Float[Array, "lanes n T"]


def run(
    line: Line,
    jumps: Jumps,
    tau: Float[Array, " T"],
    room: int,
    everything: bool,
) -> Ahead:
    """All lanes, leaves `[lanes, ...]`, until every one has a closed form, rests or fails.

    Lanes step in blocks, and a block takes as long as its slowest lane. So it stops after some
    steps, and those lanes that are not done fill fewer blocks for the next, longer round.
    """
    lanes, entries = line.position.shape
    size = min(lanes, BLOCK)
    blocks = -(-lanes // size)
    padded = jnp.concatenate([tau, jnp.full(WINDOW + 1, jnp.inf)])
    # idle lanes of the last block repeat the first ones
    line, jumps = jax.tree.map(lambda leaf: leaf[np.arange(blocks * size) % lanes], (line, jumps))
    lane = jax.vmap(start, (0, 0, None, None))(line, jumps, room, everything)
    records = jnp.zeros((blocks * size, entries, tau.shape[0] + WINDOW))

    def block(
        limit: Array, rows: Array, of: tuple[Lane, Line, Jumps], records: Array
    ) -> tuple[Lane, Array]:
        """Steps of one block, whose lanes record in these rows."""
        lane, line, jumps = of

        def go_on(carry: tuple[Array, Lane, Array]) -> Array:
            return jnp.any(carry[1].active) & (carry[0] < limit)

        def body(carry: tuple[Array, Lane, Array]) -> tuple[Array, Lane, Array]:
            count, lane, records = carry
            outlook = look(count, lane, line.mobility, jumps)
            new, windows = jax.vmap(step, (0, _OUTLOOK_AXES, 0, 0, None, None))(
                lane, outlook, line.mobility, jumps, padded, everything
            )

            # what stands behind the recorded times that are done is written over later
            def write(i: Array, records: Array) -> Array:
                return lax.dynamic_update_slice(
                    records, windows[i][None], (rows[i], 0 * i, lane.recorded[i].astype(i.dtype))
                )

            return count + 1, new, lax.fori_loop(0, size, write, records)

        return lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), lane, records))[1:]

    def one_round(carry: Any, limit: Array) -> tuple[Any, None]:
        rows, everyone, records = carry
        order = jnp.argsort(~everyone[0].active, stable=True)
        rows, everyone = jax.tree.map(lambda leaf: leaf[order], (rows, everyone))

        def one_block(k: Array, carry: tuple[Lane, Array]) -> tuple[Lane, Array]:
            lane, records = carry
            own_rows, own = jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, k * size, size),
                (rows, (lane, *everyone[1:])),
            )
            new, records = block(limit, own_rows, own, records)
            lane = jax.tree.map(
                lambda leaf, own: lax.dynamic_update_slice_in_dim(leaf, own, k * size, 0), lane, new
            )
            return lane, records

        # lanes that are done stand last, and are left alone
        busy = -(-jnp.sum(everyone[0].active, dtype=rows.dtype) // size)
        lane, records = lax.fori_loop(0 * busy, busy, one_block, (everyone[0], records))
        return (rows, (lane, *everyone[1:]), records), None

    carry = jnp.arange(blocks * size), (lane, line, jumps), records
    limits = ROUNDS if blocks > 1 else ROUNDS[-1:]
    (rows, everyone, records), _ = lax.scan(one_round, carry, jnp.asarray(limits, jnp.int32))
    back = jnp.argsort(rows)[:lanes]
    lane, records = jax.tree.map(lambda leaf: leaf[back], everyone[0]), records[:lanes]
    status = jnp.where(lane.active, int(Status.SOLVER_FAILED), lane.status)
    return Ahead(lane._replace(status=status.astype(jnp.int32)), records[..., : tau.shape[0]])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def advance(
    line: Line, jumps: Jumps, tau: Float[Array, " T"], room: int, everything: bool
) -> Ahead:
    """`run`, differentiable in both modes with respect to positions, jumps, heights and τ.

    A lane has few inputs, so its derivative is the whole Jacobian, in forward mode: the Taylor
    steps and the events are differentiable functions of their start.
    """
    return run(line, jumps, tau, room, everything)


@advance.defjvp
def _advance_jvp(room: int, everything: bool, primals: Any, tangents: Any) -> tuple[Ahead, Ahead]:
    line, jumps, tau = primals
    line_dot, jumps_dot, tau_dot = tangents
    lanes, entries = line.position.shape
    count = jumps.place.shape[1]
    size = min(lanes, BLOCK)
    basis = jnp.eye(entries + 2 * count + 1)

    def block(of: tuple[Line, Jumps, Array]) -> Any:
        line, jumps, move = of

        def floats(position: Array, place: Array, height: Array, tau: Array) -> Any:
            moved = jumps._replace(place=place, height=height)
            lane, records = run(line._replace(position=position), moved, tau, room, everything)
            return (lane.time, lane.position, lane.log.time), records

        def along(direction: Array) -> Any:
            parts = jnp.split(direction, [entries, entries + count, entries + 2 * count])
            parts = [jnp.broadcast_to(part, (size, part.shape[0])) for part in parts[:3]]
            # each record depends on its own time only, so that one direction serves all
            at = line.position, jumps.place, jumps.height, tau
            return jax.jvp(floats, at, (*parts, jnp.full_like(tau, direction[-1])))[1]

        def apply(jacobian: Array) -> Array:
            return jnp.einsum("dl...,ld->l...", jacobian[:-1], move)

        states, records = jax.vmap(along)(basis)
        return (*map(apply, states), apply(records) + records[-1] * tau_dot)

    move = jnp.concatenate([line_dot.position, jumps_dot.place, jumps_dot.height], axis=1)
    blocks = -(-lanes // size)
    cut = jax.tree.map(
        lambda leaf: leaf[np.arange(blocks * size) % lanes].reshape(blocks, size, *leaf.shape[1:]),
        (line, jumps, move),
    )
    dots = block(jax.tree.map(lambda leaf: leaf[0], cut)) if blocks == 1 else None
    if dots is None:
        dots = lax.map(block, cut)
        dots = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:lanes], dots)
    time, position, log_time, moved = dots
    value = advance(line, jumps, tau, room, everything)
    still = jax.tree.map(_no_tangent, value)
    log = still.lane.log._replace(time=log_time)
    lane = still.lane._replace(time=time, position=position, log=log)
    return value, Ahead(lane, moved)


def _no_tangent(leaf: Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
