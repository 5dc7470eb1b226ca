"""Summaries over seeds: box plots of final losses against ε."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tts_jax.plot._style import METHODS, VERMILLION, axes, theme


def boxes(
    groups: Mapping[float, Any],
    *,
    points: bool = True,
    beside: Mapping[float, Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one box per ε of the final losses of its seeds, on a logarithmic axis.

    A box spans the quartiles with a line at the median; whiskers reach the last seed within
    1.5 box lengths.

    Args:
        groups: ε to final losses `[seeds]`; values that are not finite are left out.
        points: whether to draw each seed as a dot beside its box.
        beside: ε to published final losses, drawn left of the box of this ε.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: no group, or a group without any finite value.
    """
    epsilons = sorted(groups)
    samples = []
    for epsilon in epsilons:
        values = np.asarray(groups[epsilon], dtype=float).ravel()
        values = values[np.isfinite(values)]
        if values.size == 0:
            raise ValueError(
                f"Argument `groups[{epsilon!r}]` must hold at least one finite loss, got none. "
                f"Leave this ε out, or lower the step size until its seeds converge."
            )
        samples.append(values)
    if not samples:
        raise ValueError("Argument `groups` must hold at least one ε, got none.")
    style = METHODS["sgd"]
    with theme():
        ax = axes(ax)
        places = np.arange(len(samples), dtype=float)
        ax.boxplot(
            samples,
            positions=places,
            widths=0.42,
            showfliers=not points,
            patch_artist=True,
            boxprops={"facecolor": style.color + "30", "edgecolor": style.color},
            medianprops={"color": style.color, "linewidth": 2.0},
            whiskerprops={"color": style.color},
            capprops={"color": style.color},
            flierprops={"marker": "o", "markersize": 3.0, "markeredgecolor": style.color},
        )
        if points:
            for place, values in zip(places, samples, strict=True):
                _dots(ax, place + 0.29, values, marker="o", color=style.color)
        label = "published"
        for place, epsilon in zip(places, epsilons, strict=True):
            if beside and epsilon in beside:
                values = np.asarray(beside[epsilon], dtype=float).ravel()
                _dots(ax, place - 0.41, values, marker="D", color=VERMILLION, label=label)
                label = None
        if beside:
            ax.legend()
        ax.set_xticks(places, [f"{epsilon:g}" for epsilon in epsilons])
        ax.set_xlim(-0.5, len(samples) - 0.35)
        ax.set_yscale("log")
        ax.set_xlabel("timescale separation ε")
        ax.set_ylabel("final loss, squared $L^2$ error")
        ax.grid(visible=False, axis="x")
    return ax


def _dots(ax: Axes, place: float, values: np.ndarray, **look: Any) -> None:
    """`values` right of `place`, spread by the golden ratio: even, and the same in every run."""
    spread = (np.arange(values.size) * 0.6180339887) % 1.0
    shared = {"linestyle": "none", "markersize": 2.4, "alpha": 0.45, "markeredgewidth": 0.0}
    ax.plot(place + 0.12 * spread, values, **shared, **look)
