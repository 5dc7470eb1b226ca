"""The sharp limit by SciPy: neurons between jumps by DOP853, events by its root finder.

Independent of the package: the force is a (F_left + F_right − 2 f*(u)) with plain means F.
"""

import numpy as np
from scipy.integrate import solve_ivp


def means(u, place, jumps, values):
    """Level of the fit between all neighbours, walls at 0 and 1 included."""
    jumps, values = np.asarray(jumps), np.asarray(values)
    edges = np.concatenate([[0.0], u, [1.0]])
    codes = np.concatenate([[0], place, [2 * len(jumps)]])
    levels = []
    for k in range(len(edges) - 1):
        first, last = (codes[k] + 1) // 2, codes[k + 1] // 2
        cuts = np.concatenate([[edges[k]], jumps[first:last], [edges[k + 1]]])
        lengths, heights = np.diff(cuts), values[first : last + 1]
        total = cuts[-1] - cuts[0]
        # from the first level on, so that a plateau on one piece is exact
        level = heights[0]
        if total > 0:
            level = heights[0] + lengths[1:] @ (heights[1:] - heights[0]) / total
        levels.append(level)
    return np.array(levels)


def beside(u, place, i, jumps, values):
    """Velocity of neuron i just left and just right of the jump it sits on."""
    levels = means(u, place, jumps, values)
    k = place[i] // 2
    below, above = levels[i], levels[i + 1]
    return tuple((above - below) * (above + below - 2 * values[k + side]) for side in (0, 1))


def simulate(u, jumps, values, tau, mobility=None, rtol=1e-13):
    """Positions `[tau, neurons]` of sorted neurons in [0, 1], and (time, neuron, jump, what)."""
    u, tau = np.array(u, float), np.asarray(tau, float)
    mobility = np.ones(len(u)) if mobility is None else np.asarray(mobility)
    place = np.array([2 * np.sum(jumps < x) + np.any(jumps == x) for x in u])
    events, out, time = [], np.full((len(tau), len(u)), np.nan), 0.0
    for i in np.nonzero(place % 2)[0]:
        left, right = beside(u, place, i, jumps, values)
        if left > 0 > right or left == right == 0:
            events.append((0.0, i, place[i] // 2, "HIT"))
            continue
        side = np.sign(left) if left * right > 0 else np.sign(left + right)
        events.append((0.0, i, place[i] // 2, "LEAVE"))
        place[i] += int(side)

    def velocity(t, x):
        levels = means(x, place, jumps, values)
        free = np.where(place % 2 == 0, mobility, 0.0)
        here = np.asarray(values)[place // 2]
        return free * np.diff(levels) * (levels[1:] + levels[:-1] - 2 * here)

    def conditions():
        found = []
        for i, p in enumerate(place):
            if p % 2 == 0:
                if p > 0:
                    found.append((i, "left", lambda t, x, i=i, v=jumps[p // 2 - 1]: x[i] - v))
                if p < 2 * len(jumps):
                    found.append((i, "right", lambda t, x, i=i, v=jumps[p // 2]: v - x[i]))
            else:
                found.append(
                    (i, "out left", lambda t, x, i=i: beside(x, place, i, jumps, values)[0])
                )
                found.append(
                    (i, "out right", lambda t, x, i=i: -beside(x, place, i, jumps, values)[1])
                )
        for _, _, condition in found:
            condition.terminal, condition.direction = True, -1
        return found

    while time < tau[-1]:
        watched = conditions()
        rest = tau[(tau >= time) & np.isnan(out[:, 0])]
        solution = solve_ivp(
            velocity,
            (time, tau[-1]),
            u,
            method="DOP853",
            rtol=rtol,
            atol=1e-15,
            dense_output=True,
            events=[c for _, _, c in watched],
            max_step=tau[-1] / 20,
        )
        end = solution.t[-1]
        for t in rest[rest <= end]:
            out[np.searchsorted(tau, t)] = solution.sol(t) if end > time else u
        time, u = end, solution.y[:, -1].copy()
        for (i, what, _), times in zip(watched, solution.t_events, strict=True):
            if not len(times):
                continue
            if what in ("left", "right"):
                k = place[i] // 2 - (what == "left")
                u[i], place[i] = jumps[k], 2 * k + 1
                left, right = beside(u, place, i, jumps, values)
                if what == "right" and right > 0:
                    place[i] += 1
                elif what == "left" and left < 0:
                    place[i] -= 1
                events.append((time, i, k, "HIT" if place[i] % 2 else "PASS"))
            else:
                k = place[i] // 2
                place[i] += 1 if what == "out right" else -1
                events.append((time, i, k, "LEAVE"))
            break
        if solution.status == 0:
            break
    return out, events
