"""Figures 1 and 2 of Marion & Berthier (2023, arXiv 2304.09576) and the sketch of their proof.

The published ones are drawn from numbers placed by hand. These are states of the model: networks
are those of a flow or a limit, arrows are velocities, lengths are those of the target and of the
network drawn. Targets and positions at the start are the published ones.

Paper symbols: the target f* jumps at v_i between the levels f*_i; Δv is its shortest piece and Δf
its smallest jump in absolute value; u_j are the neurons, η their width, u_i^L and u_i^R the
neighbours of v_i, u_i^LL and u_i^RR the next ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import plot
from tts_jax.experiments._panels import (
    GRID,
    jumps_of,
    legend,
    nearest,
    number,
    one_seed,
    problem_of,
    target_of,
)


_FASTEST = 0.8  # the part of its way to the jump that the faster neuron's arrow covers


def draw_figure1(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """The notation: levels and jumps of the target, positions and width of the neurons, Δv, Δf.

    Args:
        data: needs `"flow"`, with weights that are still learning.
        times: the slow time of the network, by default the last.
    """
    flow = data["flow"]
    index = nearest(flow, *(times or np.asarray(flow.tau)[-1:]))
    fast, slow = one_seed(flow.fast)[index], one_seed(flow.slow)[index]
    problem = problem_of(flow)
    target = target_of(flow)
    jumps, values = np.asarray(target.jumps), np.asarray(target.values)
    eta = float(problem.eta)
    with plot.theme():
        drawing = plot.figure(5.6, 4.2)
        ax = drawing.subplots()
        _network(ax, flow, index, [f"u_{j + 1}" for j in range(slow.size)])

        edges = np.concatenate([[0.0], jumps, [1.0]])
        shortest = int(np.argmin(np.diff(edges)))
        above = values[shortest] + 0.05 * np.ptp(values)
        ends = (edges[shortest], above), (edges[shortest + 1], above)
        plot.span(*ends, r"$\Delta v$", side=-1.0, ax=ax)
        smallest = int(np.argmin(np.abs(np.diff(values))))
        beside = jumps[smallest] - 0.02
        plot.span((beside, values[smallest]), (beside, values[smallest + 1]), r"$\Delta f$", ax=ax)
        # the width of the neuron of largest weight, and that weight
        widest = int(np.argmax(np.abs(fast[1:])))
        ends = slow[widest] - eta / 2.0, slow[widest] + eta / 2.0
        low, high = (float(value) for value in problem.predict(fast, slow, np.array(ends)))
        style = plot.METHODS["flow"]
        above = high + 0.05 * np.ptp(values)
        ax.vlines(ends, (low, high), above, color=style.color, linestyle=":", lw=1.0)
        plot.span((ends[0], above), (ends[1], above), r"$\eta$", color=style.color, side=-1, ax=ax)
        beside = ends[1] + 0.03
        weight = f"$a_{widest + 1}$"
        plot.span((beside, low), (beside, high), weight, color=style.color, side=-1.0, ax=ax)
        _say(ax, flow, index)
        legend(drawing, ax)
    return drawing


def draw_figure2(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """The dynamics of the limit: at each jump its two neighbours approach it, until one is there.

    Left and middle: the network with optimal weights, what it misses of the target, and the
    velocities of the neurons. Right: the distances ℓ and r of the neighbours from their jump,
    with the time of the hit and the distance c = |ℓ³ − r³|^(1/3) of the other neuron's rest in
    closed form for η → 0 (docs/sharp_limit.md).

    Args:
        data: needs `"limit"`, from a start in which no two jumps have a neighbour in common.
        times: the two slow times of the networks, by default 0 and halfway between the hits.
    """
    limit = data["limit"]
    times = times or (0.0, float(np.mean(_hits(limit)[0])))
    with plot.theme():
        drawing = plot.figure(10.4, 3.7)
        panels = list(drawing.subplots(1, 3))
        for ax, tau in zip(panels[:2], times, strict=True):
            draw_dynamics(limit, tau, ax=ax)
        legend(drawing, panels[0])
        _distances(panels[2], limit)
        plot.panel_letters(panels)
    return drawing


def draw_proof(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """The proof's two phases at one jump, along the flow at small ε and a visible η.

    First the two neighbours of the jump approach it, outside the window of width η in which a
    neuron's step touches the jump; then one of them stays within η of it.

    Args:
        data: needs `"flow"`.
        times: the two slow times, by default a third of the way to the hit, and the last.
    """
    flow = data["flow"]
    (jump,), eta = jumps_of(flow), float(np.asarray(flow.settings["eta"]))
    if not times:
        near = one_seed(flow.observables["recovery"])[:, 0] <= eta / 2.0
        tau = np.asarray(flow.tau)
        times = (float(tau[np.argmax(near)]) / 3.0, float(tau[-1]))
    with plot.theme():
        drawing = plot.figure(8.2, 3.9)
        panels = list(drawing.subplots(1, 2, sharey=True))
        for ax, tau, half in zip(panels, times, (0.5, 1.0), strict=True):
            draw_dynamics(flow, tau, ax=ax)
            window = jump - half * eta, jump + half * eta
            for place in window:
                ax.axvline(place, color="black", linestyle=":", linewidth=1.0)
            low = ax.get_ylim()[0]
            height = low + 0.45 * (float(np.min(flow.settings["values"])) - low)
            name = r"$\eta$" if half == 0.5 else r"$2\eta$"
            plot.span((window[0], height), (window[1], height), name, color="black", ax=ax)
            ax.label_outer()
        legend(drawing, panels[0])
        plot.panel_letters(panels)
    return drawing


def draw_dynamics(trajectory: tts.Trajectory, tau: float, *, ax: Axes | None = None) -> Axes:
    """The network at a slow time, what it misses of the target, and where its neurons go.

    The arrows at a jump are in proportion to the velocities of its two neighbours; the longer one
    covers 80 % of the way to the jump.

    Args:
        trajectory: a flow or limit; seed 0 is drawn. Neighbours are those at its first time.
        tau: moved to the nearest recorded time.
        ax: where to draw; a new figure by default.
    """
    index = nearest(trajectory, tau)
    fast, slow = one_seed(trajectory.fast)[index], one_seed(trajectory.slow)[index]
    problem = problem_of(trajectory)
    start = one_seed(trajectory.slow)[0]
    with plot.theme():
        ax = plot.figure().subplots() if ax is None else ax
        _network(ax, trajectory, index, _names(start, jumps_of(trajectory)))
        ax.fill_between(
            GRID,
            np.asarray(problem.target(GRID)),
            np.asarray(problem.predict(fast, slow, GRID)),
            color="#9A9A9A",
            alpha=0.35,
            linewidth=0.0,
            label="misfit",
            zorder=1.8,
        )
        velocity = np.asarray(problem.slow_field(fast, slow))
        half = float(problem.eta) / 2.0
        for jump, pair in zip(
            jumps_of(trajectory), flanks(start, jumps_of(trajectory)), strict=True
        ):
            pair = np.array(pair)
            with np.errstate(divide="ignore", invalid="ignore"):
                clock = (jump - slow[pair]) / velocity[pair]
            # a neuron that has arrived no longer moves, and the other one stops
            if np.min(np.abs(jump - slow[pair])) > half:
                heights = problem.predict(fast, slow, slow[pair])
                moves = _FASTEST * np.min(clock[clock > 0.0]) * velocity[pair]
                plot.arrows(slow[pair], moves, heights, ax=ax)
        _say(ax, trajectory, index)
    return ax


def flanks(slow: np.ndarray, jumps: np.ndarray) -> list[tuple[int, int]]:
    """The neurons next to each jump, on the left and on the right, as indices into sorted `slow`.

    Raises:
        ValueError: no neuron on one side of a jump.
    """
    right = np.searchsorted(slow, jumps)
    if np.any(right == 0) or np.any(right == slow.size):
        raise ValueError(
            f"Argument `slow` must have a neuron on both sides of each jump, got {slow} for jumps "
            f"at {jumps}. Move or add neurons."
        )
    return [(int(r) - 1, int(r)) for r in right]


def _names(slow: np.ndarray, jumps: np.ndarray) -> list[str]:
    """u_j, or by the jump that a neuron stands next to; by i where there is one jump."""
    names = [f"u_{j + 1}" for j in range(slow.size)]
    for k, (left, right) in enumerate(flanks(slow, jumps)):
        which = "i" if jumps.size == 1 else str(k + 1)
        names[left], names[right] = f"u_{which}^L", f"u_{which}^R"
        if jumps.size == 1 and 0 < left and right + 1 < slow.size:
            names[left - 1], names[right + 1] = "u_i^{LL}", "u_i^{RR}"
    return names


def _network(ax: Axes, trajectory: tts.Trajectory, index: int, names: Sequence[str]) -> None:
    """A network against the target, with symbols in place of numbers on the axes."""
    fast, slow = one_seed(trajectory.fast)[index], one_seed(trajectory.slow)[index]
    problem = problem_of(trajectory)
    target = target_of(trajectory)
    jumps, values = np.asarray(target.jumps), np.asarray(target.values)
    style = plot.METHODS[trajectory.method]
    plot.network(
        {trajectory.method: (GRID, np.asarray(problem.predict(fast, slow, GRID)))},
        target=(jumps, values),
        legend=False,
        ax=ax,
    )
    ax.get_lines()[-1].set_linestyle("-")  # alone it needs no dashes
    low = min(0.0, float(values.min()))
    ax.set_ylim(low, float(values.max()) + 0.08 * float(np.ptp(values)))
    ax.vlines(
        slow, low, problem.predict(fast, slow, slow), color=style.color, linestyle=":", lw=1.0
    )
    tops = np.minimum(values[1:], values[:-1])
    ax.vlines(jumps, low, tops, color=plot.TARGET_COLOR, linestyle=":", lw=1.0)
    ax.set_xticks([0.0, *slow, 1.0], ["0", *(f"${name}$" for name in names), "1"])
    for label in ax.get_xticklabels()[1:-1]:
        label.set_color(style.color)
    above = ax.secondary_xaxis("top")
    which = ["i"] if jumps.size == 1 else [str(k + 1) for k in range(jumps.size)]
    above.set_xticks(jumps, [f"$v_{k}$" for k in which])
    above.spines["top"].set_visible(False)
    levels = ["{i-1}", "i"] if jumps.size == 1 else [str(k) for k in range(values.size)]
    ax.set_yticks(values, [f"$f^*_{level}$" for level in levels])


def _distances(ax: Axes, limit: tts.Trajectory) -> None:
    """Distances ℓ and r of the neighbours of each jump over τ, with its hit in closed form."""
    jumps, slow = jumps_of(limit), one_seed(limit.slow)
    hits, rests = _hits(limit)
    for k, (jump, pair) in enumerate(zip(jumps, flanks(slow[0], jumps), strict=True)):
        color = (plot.METHODS["sgd"], plot.METHODS["flow"])[k % 2].color
        for name, neuron, dashes in zip((r"\ell", "r"), pair, ("-", (0, (5, 1.5))), strict=True):
            gap = np.abs(slow[:, neuron] - jump)
            ax.plot(limit.tau, gap, color=color, linestyle=dashes, label=f"${name}_{k + 1}$")
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "fillstyle": "none"}
    for values, label in ((0.0 * hits, "η → 0"), (rests, None)):
        ax.plot(hits, values, color="black", label=label, zorder=4.0, clip_on=False, **dots)
    ax.set_xlim(0.0, float(np.asarray(limit.tau)[-1]))
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel("slow time τ")
    ax.set_ylabel("distance from the jump")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, columnspacing=0.8)


def _hits(limit: tts.Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """For η → 0: when a neuron reaches each jump, and the other one's distance from then on."""
    jumps, slow = jumps_of(limit), one_seed(limit.slow)[0]
    left, right = (np.array(side) for side in zip(*flanks(slow, jumps), strict=True))
    l, r = jumps - slow[left], slow[right] - jumps
    times = tts.theory.hitting_time(l, r, np.asarray(target_of(limit).heights))
    return np.asarray(times), np.cbrt(np.abs(l**3 - r**3))


def _say(ax: Axes, trajectory: tts.Trajectory, index: int) -> None:
    ax.set_title(f"τ = {number(float(np.asarray(trajectory.tau)[index]))}", loc="right")
