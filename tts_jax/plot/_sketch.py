"""Marks for sketches: lengths between two points, and arrows along x."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tts_jax.plot._style import TARGET_COLOR, axes, theme


Point = tuple[float, float]


def span(
    start: Point,
    end: Point,
    label: str,
    *,
    color: str = TARGET_COLOR,
    side: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Mark the length between two points: a line with a head at both ends, and its name.

    Args:
        start: one point, (x, y) in the units of the axes.
        end: the other; the two share x or y.
        label: the name, written beside the middle.
        color: of line and name.
        side: 1 writes below a horizontal and left of a vertical line, −1 on the other side.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: the line is neither horizontal nor vertical.
    """
    if start[0] != end[0] and start[1] != end[1]:
        raise ValueError(
            f"Arguments `start` and `end` must share x or y, got {start} and {end}. Use a "
            f"horizontal or a vertical line."
        )
    flat = start[1] == end[1]
    with theme():
        ax = axes(ax)
        ax.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={"arrowstyle": "<->", "shrinkA": 0.0, "shrinkB": 0.0, "color": color},
            zorder=5.0,
        )
        ax.annotate(
            label,
            xy=((start[0] + end[0]) / 2.0, (start[1] + end[1]) / 2.0),
            xytext=(0.0, -4.0 * side) if flat else (-4.0 * side, 0.0),
            textcoords="offset points",
            ha="center" if flat else ("right" if side > 0 else "left"),
            va=("top" if side > 0 else "bottom") if flat else "center",
            color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            zorder=5.0,
        )
    return ax


def arrows(places: Any, moves: Any, heights: Any, *, ax: Axes | None = None) -> Axes:
    """Draw arrows along x.

    Args:
        places: their starts, `[arrows]`.
        moves: their signed lengths, `[arrows]`; those that are exactly 0 are left out.
        heights: their y, `[arrows]`.
        ax: where to draw; a new figure by default.
    """
    with theme():
        ax = axes(ax)
        for place, move, height in np.broadcast(places, moves, heights):
            if move:
                ax.annotate(
                    "",
                    xy=(place + move, height),
                    xytext=(place, height),
                    arrowprops={
                        "arrowstyle": "-|>,head_length=0.3,head_width=0.16",
                        "shrinkA": 0.0,
                        "shrinkB": 0.0,
                        "linewidth": 1.6,
                        "color": "black",
                    },
                    zorder=5.0,
                )
    return ax
