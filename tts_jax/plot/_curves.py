"""Curves: networks over x, losses over τ with seed bands, neuron positions over τ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tts_jax.plot._style import TARGET_COLOR, axes, method_style, theme


Curve = tuple[Any, Any]


def network(
    curves: Mapping[str, Curve],
    *,
    target: tuple[Any, Any] | None = None,
    neurons: Any = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw networks against the target, with the neuron positions as vertical dashed lines.

    Args:
        curves: name of a method to (x, f(x)), both `[points]`. `"sgd"`, `"flow"`, `"limit"`
            and `"sharp_limit"` have their own look; any other name becomes a label.
        target: the piecewise-constant target on [0, 1] as (jumps `[jumps]`, values
            `[jumps + 1]`).
        neurons: positions to mark, `[m]`, in the colour of the first curve.
        legend: whether to draw one, above the panel.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: a curve's x and values differ in shape or are not vectors.
    """
    with theme():
        ax = axes(ax)
        if target is not None:
            jumps, values = (np.asarray(part, dtype=float) for part in target)
            ax.stairs(
                values,
                np.concatenate([[0.0], jumps, [1.0]]),
                baseline=None,
                color=TARGET_COLOR,
                alpha=0.45,
                linewidth=3.5,
                label="target",
                zorder=2.0,
            )
        for index, (name, (x, values)) in enumerate(curves.items()):
            x, values = _vectors(name, x, values)
            style = method_style(name, index)
            ax.plot(
                x,
                values,
                color=style.color,
                linestyle=style.dashes,
                label=style.label,
                zorder=style.order,
                **_emphasis(index, len(curves)),
            )
        if neurons is not None:
            color = method_style(next(iter(curves), ""), 0).color
            marks = np.asarray(neurons, dtype=float)
            for index, place in enumerate(marks):
                ax.axvline(
                    place,
                    color=color,
                    linestyle=(0, (3, 2)),
                    linewidth=0.8,
                    alpha=0.55,
                    zorder=1.5,
                    label="neurons" if index == 0 else None,
                )
        ax.set_xlim(0.0, 1.0)
        ax.margins(y=0.08)
        ax.set_xlabel("input x")
        ax.set_ylabel("output f(x)")
        ax.grid(visible=False)
        if legend:
            legend_above(ax)
    return ax


def losses(
    curves: Mapping[str, Curve],
    *,
    quantiles: tuple[float, float] = (0.1, 0.9),
    labels: Mapping[str, str] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw losses over slow time on a logarithmic axis: the median of the seeds, and a band.

    Args:
        curves: name of a method to (τ `[T]`, loss `[T]` or `[seeds, T]`). Values that are not
            finite or not positive are left out.
        quantiles: the band of seeds around the median; drawn where there are several seeds.
        labels: legend texts that replace the methods' own.
        legend: whether to draw one, above the panel.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: a loss has another number of times than its τ, or `quantiles` is not an
            increasing pair in [0, 1].
    """
    low, high = quantiles
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(
            f"Argument `quantiles` must be an increasing pair in [0, 1], got {quantiles}. Use "
            f"for example (0.1, 0.9)."
        )
    with theme():
        ax = axes(ax)
        for index, (name, (tau, loss)) in enumerate(curves.items()):
            tau, rows = np.asarray(tau, dtype=float), np.atleast_2d(np.asarray(loss, dtype=float))
            if tau.ndim != 1 or rows.ndim != 2 or rows.shape[1] != tau.size:
                raise ValueError(
                    f"Argument `curves[{name!r}]` must be τ [T] and a loss [T] or [seeds, T], got "
                    f"shapes {tau.shape} and {np.shape(loss)}."
                )
            style = method_style(name, index)
            bottom, middle, top = _quantiles(rows, (low, 0.5, high))
            if rows.shape[0] > 1:
                ax.fill_between(
                    tau,
                    bottom,
                    top,
                    color=style.color,
                    alpha=0.13,
                    linewidth=0.0,
                    zorder=style.order - 1.0,
                )
                for edge in (bottom, top):
                    ax.plot(
                        tau,
                        edge,
                        color=style.color,
                        linestyle=style.dashes,
                        linewidth=0.6,
                        alpha=0.7,
                        zorder=style.order - 0.5,
                    )
            ax.plot(
                tau,
                middle,
                color=style.color,
                linestyle=style.dashes,
                label=(labels or {}).get(name, style.label),
                zorder=style.order,
            )
        ax.set_yscale("log")
        _span(ax, [tau for tau, _ in curves.values()])
        ax.set_xlabel("slow time τ")
        ax.set_ylabel("loss, squared $L^2$ error")
        if legend:
            legend_above(ax)
    return ax


def positions(
    curves: Mapping[str, Curve],
    *,
    jumps: Any = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw neuron trajectories over slow time, with the jumps as horizontal lines.

    Args:
        curves: name of a method to (τ `[T]`, positions `[T, m]`).
        jumps: positions of the jumps of the target, `[jumps]`.
        legend: whether to draw one, above the panel.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: positions are not `[T, m]` with the T of their τ.
    """
    with theme():
        ax = axes(ax)
        for index, place in enumerate(np.asarray([] if jumps is None else jumps, dtype=float)):
            ax.axhline(
                place,
                color=TARGET_COLOR,
                alpha=0.45,
                linewidth=2.5,
                zorder=1.5,
                label="jumps of the target" if index == 0 else None,
            )
        for index, (name, (tau, places)) in enumerate(curves.items()):
            tau, places = np.asarray(tau, dtype=float), np.asarray(places, dtype=float)
            if tau.ndim != 1 or places.ndim != 2 or places.shape[0] != tau.size:
                raise ValueError(
                    f"Argument `curves[{name!r}]` must be τ [T] and positions [T, m], got shapes "
                    f"{tau.shape} and {places.shape}."
                )
            style = method_style(name, index)
            lines = ax.plot(
                tau,
                places,
                color=style.color,
                linestyle=style.dashes,
                zorder=style.order,
                **_emphasis(index, len(curves)),
            )
            lines[0].set_label(style.label)
        _span(ax, [tau for tau, _ in curves.values()])
        ax.set_ylim(0.0, 1.0)
        ax.set_xlabel("slow time τ")
        ax.set_ylabel("neuron position")
        ax.grid(visible=False)
        if legend:
            legend_above(ax)
    return ax


def legend_above(ax: Axes, columns: int = 2) -> None:
    """A legend above the panel, where it hides no data."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            borderaxespad=0.2,
            columnspacing=1.2,
        )


def _emphasis(index: int, count: int) -> dict[str, Any]:
    """Curves that agree lie on each other: the first of several is wide and pale, the rest thin."""
    if index == 0 and count > 1:
        return {"linewidth": 2.6, "alpha": 0.55}
    return {"linewidth": 1.3}


def _vectors(name: str, x: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    x, values = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != values.shape:
        raise ValueError(
            f"Argument `curves[{name!r}]` must be two vectors of one length, got shapes "
            f"{x.shape} and {values.shape}."
        )
    return x, values


def _span(ax: Axes, times: Sequence[Any]) -> None:
    """Show τ from 0 to the last time of any curve."""
    end = max((float(np.asarray(tau)[-1]) for tau in times if np.size(tau)), default=0.0)
    if end > 0.0:
        ax.set_xlim(0.0, end)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def _quantiles(rows: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Quantiles over the seeds of the usable values, `[levels, T]`; NaN where there are none."""
    answer = np.full((len(levels), rows.shape[1]), np.nan)
    for column in range(rows.shape[1]):
        values = rows[:, column]
        values = values[np.isfinite(values) & (values > 0.0)]
        if values.size:
            answer[:, column] = np.quantile(values, levels)
    return answer
