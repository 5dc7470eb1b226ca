"""What figures and animations ask of settings and trajectories, and the legend they share."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts


GRID = np.linspace(0.0, 1.0, 2001)


def problem_of(trajectory: tts.Trajectory) -> tts.Univariate:
    """The learning problem of a trajectory, also of one read from a file."""
    return tts.Univariate(
        target_of(trajectory),
        neurons=int(np.shape(trajectory.slow)[-1]),
        eta=float(np.asarray(trajectory.settings["eta"])),
        noise=float(np.asarray(trajectory.settings["noise"])),
    )


def target_of(trajectory: tts.Trajectory) -> tts.PiecewiseConstant:
    """The target of a trajectory."""
    return tts.PiecewiseConstant(jumps_of(trajectory), np.asarray(trajectory.settings["values"]))


def jumps_of(trajectory: tts.Trajectory) -> np.ndarray:
    """Positions of the jumps of the target, `[jumps]`."""
    return np.asarray(trajectory.coords["jump"], dtype=float)


def one_seed(values: Any, seed: int = 0) -> np.ndarray:
    """A seed of an array `[seeds, T, ...]`, or the whole of one without seeds, `[T, ...]`."""
    array = np.asarray(values)
    return array[seed] if array.ndim == 3 else array


def nearest(trajectory: tts.Trajectory, tau: float) -> int:
    """The index of the recorded time nearest to τ."""
    return int(np.argmin(np.abs(np.asarray(trajectory.tau) - tau)))


def setting(run: tts.Trajectory, name: str) -> float:
    """A number of the settings of a run, NaN if there is none of the name."""
    return float(np.ravel(np.asarray(run.settings.get(name, np.nan)))[0])


def median_band(
    ax: Axes,
    x: Any,
    values: Any,
    label: str,
    color: str,
    dashes: Any = "-",
    *,
    part: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """The median over seeds of `values [seeds, T]`, and the band between two of their quantiles, if
    there shall be one."""
    values, x = np.asarray(values), np.asarray(x)
    ax.plot(x, np.nanmedian(values, axis=0), color=color, ls=dashes, label=label)
    if part is not None and values.shape[0] > 1:
        low, high = np.nanquantile(values, part, axis=0)
        ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def legend(owner: Figure, *sources: Axes) -> None:
    """The entries of `sources`, each once, in one row above all panels of `owner`."""
    entries: dict[str, Any] = {}
    for source in sources:
        for handle, label in zip(*source.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries)
    owner.legend(list(entries.values()), labels, loc="outside upper center", ncols=len(labels))


def number(value: float) -> str:
    return f"{value:.3g}"
