"""Random initialisations: the bounds of Theorem 1 against exact probabilities and simulation.

`tts-jax study initialisation` computes the parts, writes them and draws the figure:

- `good_starts`: the probability that every piece has 2, or 6, neurons, for each number m of
  neurons: exact, and counted in random draws.
- `recovery`: the probability that all jumps are recovered in the sharp limit by the theorem's time
  3/Δf², counted, against the theorem's guarantee 1 − n exp(4 − mΔv/6) for the flow.
- `hitting`: the distribution of the hitting time of a single jump, closed and sampled, and that of
  the recovery time of all jumps of the target.

Times τ are without the factor ½ of the paper's text.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import checks, plot, theory
from tts_jax.experiments import _study
from tts_jax.plot._style import BLUE, GREEN, ORANGE, PURPLE, VERMILLION


Data = Mapping[str, xarray.Dataset]

CONFIDENCE = 0.99


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the study computes.

    Attributes:
        starts: random starts of the sharp limit for each m.
        draws: random draws for each m whose neurons per piece are counted.
        neurons: numbers m of neurons that are counted.
        recovered: numbers m of neurons whose sharp limits are solved.
        delta: probability of failure at which the theorem's bound on m is marked.
        jump: position of the single jump.
        height: its height.
        jumps: positions of the target's jumps.
        values: its values.
    """

    starts: int = 2000
    draws: int = 100_000
    neurons: tuple[int, ...] = (8, 12, 16, 20, 30, 40, 60, 80, 120, 200, 352)
    recovered: tuple[int, ...] = (8, 12, 16, 20, 30, 40, 64)
    delta: float = 0.05
    jump: float = 0.35
    height: float = 2.0
    jumps: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8)
    values: tuple[float, ...] = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)

    def target(self) -> tts.PiecewiseConstant:
        """The target."""
        return tts.PiecewiseConstant(self.jumps, self.values)

    def describe(self) -> str:
        """One line for the terminal."""
        return f"{self.starts} starts, {self.draws} draws of each number of neurons"


SETTINGS = {
    "quick": Settings(),
    "paper": Settings(starts=20_000, draws=1_000_000),
}


def settings_of(scale: str = "quick", seeds: int | None = None) -> Settings:
    """The settings at a scale, with another number of starts if given; draws change alike.

    Raises:
        ValueError: an unknown scale, or `seeds` < 1.
    """
    settings = SETTINGS[checks.one_of("scale", scale, SETTINGS)]
    if seeds is None:
        return settings
    remedy = f"Its default is {settings.starts}."
    seeds = checks.positive_integer("seeds", seeds, remedy)
    return replace(settings, starts=seeds, draws=-(-settings.draws * seeds // settings.starts))


# --- data -----------------------------------------------------------------------------------


def good_starts(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """P(every piece has at least k neurons), exact and counted, for each m and k = 2, 6."""
    target, kinds = settings.target(), (2, 6)
    rng = np.random.default_rng(0)
    exact = np.empty((len(kinds), len(settings.neurons)))
    counted = np.zeros(exact.shape, int)
    lengths = np.diff(settings.jumps, prepend=0.0, append=1.0)
    for column, neurons in enumerate(_study.steps(settings.neurons, "draws", "m", progress)):
        fewest = rng.multinomial(neurons, lengths, size=settings.draws).min(axis=1)
        for row, least in enumerate(kinds):
            exact[row, column] = theory.good_start_probability(target, neurons, at_least=least)
            counted[row, column] = np.sum(fewest >= least)
    dims = ("at_least", "neurons")
    return _study.dataset(
        settings,
        {"exact": (dims, exact), "counted": (dims, counted)},
        {"at_least": list(kinds), "neurons": list(settings.neurons)},
    )


def recovery(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Recovery times of random starts in the sharp limit, for each m, infinite if never."""
    key = jax.random.key(0)
    samples = [
        theory.sample_hitting_times(
            settings.target(),
            neurons,
            key=jax.random.fold_in(key, neurons),
            count=settings.starts,
        )
        for neurons in _study.steps(settings.recovered, "starts", "m", progress)
    ]
    dims = ("neurons", "start")
    return _study.dataset(
        settings,
        {
            "recovery_time": (dims, np.stack([s["recovery_time"] for s in samples])),
            "status": (dims, np.stack([s["status"] for s in samples])),
        },
        {"neurons": list(settings.recovered)},
    )


def hitting(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Hitting times of a single jump: sampled, and the closed distribution on a grid of τ."""
    del progress
    neurons = 20
    step = tts.PiecewiseConstant([settings.jump], [0.0, settings.height])
    sample = theory.sample_hitting_times(
        step, neurons, key=jax.random.key(1), count=settings.starts
    )
    scale = 4.0 / settings.height**2
    tau = np.geomspace(1e-4, 1.0, 121) * scale
    options = {"jump": settings.jump, "height": settings.height, "neurons": neurons}
    return _study.dataset(
        settings,
        {
            "closed": ("tau", theory.hitting_time_cdf(tau, **options)),
            "hitting_time": ("start", sample["recovery_time"]),
            "status": ("start", sample["status"]),
        },
        {"tau": tau},
    )


PARTS: dict[str, Callable[..., xarray.Dataset]] = {
    "good_starts": good_starts,
    "recovery": recovery,
    "hitting": hitting,
}


def load_data(folder: str | os.PathLike[str]) -> dict[str, xarray.Dataset]:
    """The data that `tts-jax study initialisation` wrote to `folder`, as far as they are there.

    Raises:
        FileNotFoundError: the folder holds no data of the study.
    """
    return _study.load_data(folder, "initialisation", PARTS)


def _settings(dataset: xarray.Dataset) -> Settings:
    return _study.settings_in(dataset, Settings)


def _guaranteed(settings: Settings, neurons: np.ndarray) -> np.ndarray:
    """1 − δ for which Theorem 1's bound on m is met with equality, at least 0."""
    lengths = np.diff(settings.jumps, prepend=0.0, append=1.0)
    return np.maximum(1.0 - lengths.size * np.exp(4.0 - neurons * lengths.min() / 6.0), 0.0)


def _interval(counted: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    low, high = _study.wilson(counted, total, CONFIDENCE)
    return float(low), float(high)


def _recovered(dataset: xarray.Dataset) -> np.ndarray:
    """How many starts are recovered by the theorem's time, for each m."""
    time = theory.recovery_time_bound(_settings(dataset).target())
    return np.sum(dataset.recovery_time.values <= time, axis=1)


# --- tables ---------------------------------------------------------------------------------


def tables(data: Data) -> dict[str, list[tuple[str, ...]]]:
    """The numbers as rows of text, the first one the heading: `"probabilities"`."""
    rows: list[tuple[str, ...]] = [("event", "neurons", "exact", "counted", "low", "high", "of")]
    if "good_starts" in data:
        dataset = data["good_starts"]
        total = _settings(dataset).draws
        for row, least in enumerate(dataset.at_least.values):
            for column, neurons in enumerate(dataset.neurons.values):
                count = dataset.counted.values[row, column]
                shares = (dataset.exact.values[row, column], count / total)
                numbers = (*shares, *_interval(count, total))
                event = f"every piece has {least} neurons"
                rows.append((event, f"{neurons}", *(f"{x:.5f}" for x in numbers), f"{total}"))
    if "recovery" in data:
        dataset = data["recovery"]
        total = dataset.sizes["start"]
        for neurons, count in zip(dataset.neurons.values, _recovered(dataset), strict=True):
            numbers = (count / total, *_interval(count, total))
            texts = ("-", *(f"{x:.5f}" for x in numbers))
            rows.append(("recovered by 3/Δf²", f"{neurons}", *texts, f"{total}"))
    return {"probabilities": rows} if len(rows) > 1 else {}


def remarks(data: Data) -> list[str]:
    """What a reader of the tables needs to know."""
    lines = [f"low to high is Wilson's {100 * CONFIDENCE:.0f} % interval of what was counted."]
    for dataset in data.values():
        settings = _settings(dataset)
        target = settings.target()
        lines += [
            f"Theorem 1 asks for m ≥ {theory.neurons_bound(target, settings.delta)} at δ = "
            f"{settings.delta:g}, and gives the time τ = 3/Δf² = "
            f"{theory.recovery_time_bound(target):g}.",
        ]
        break
    failed = sum(int(np.sum(d.status.values != 0)) for d in data.values() if "status" in d)
    if any("status" in dataset for dataset in data.values()):
        lines.append(f"Sharp limits that are not unique or failed: {failed}.")
    return lines


# --- drawing --------------------------------------------------------------------------------


def draw(data: Data) -> Figure:
    """Probabilities against the number of neurons, and distributions of times.

    Args:
        data: names of parts to what they returned; parts that are missing are left out.

    Raises:
        ValueError: no part is there.
    """
    if not any(name in data for name in PARTS):
        raise ValueError(
            f"Argument `data` must hold one of {', '.join(PARTS)}, got {list(data)}. Compute one."
        )
    with plot.theme():
        drawing = plot.figure(8.6, 4.6)
        panels = list(np.ravel(drawing.subplots(1, 2)))
        _draw_probabilities(panels[0], data)
        _draw_times(panels[1], data)
        for ax in panels:
            if ax.has_data():
                ax.legend(loc="lower left", bbox_to_anchor=(-0.04, 1.0), fontsize=7.5)
        plot.panel_letters(panels)
    return drawing


def _draw_probabilities(ax: Axes, data: Data) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("number of neurons m")
    ax.set_ylabel("probability")
    ax.set_ylim(-0.03, 1.03)
    if "good_starts" in data:
        dataset = data["good_starts"]
        settings = _settings(dataset)
        grid = np.unique(np.geomspace(6, 400, 80).astype(int))
        for row, (least, color) in enumerate(zip((2, 6), (BLUE, ORANGE), strict=True)):
            curve = [
                theory.good_start_probability(settings.target(), int(m), at_least=least)
                for m in grid
            ]
            label = f"every piece has {least} neurons: exact, counted"
            ax.plot(grid, curve, color=color, ls="-" if least == 2 else (0, (5, 1.5)))
            counted = dataset.counted.values[row]
            _mark(ax, dataset.neurons.values, counted, settings.draws, color, "o", label)
    if "recovery" in data:
        dataset = data["recovery"]
        settings, count = _settings(dataset), _recovered(dataset)
        label = "all jumps recovered by 3/Δf², sharp limit"
        _mark(ax, dataset.neurons.values, count, dataset.sizes["start"], GREEN, "s", label)
        grid = np.geomspace(6, 500, 400)
        guaranteed = _guaranteed(settings, grid)
        ax.plot(
            grid, guaranteed, color=VERMILLION, ls=(0, (1, 1.2)), label="guarantee of Theorem 1"
        )


def _mark(
    ax: Axes, x: np.ndarray, counted: np.ndarray, total: int, color: str, marker: str, label: str
) -> None:
    """Shares with their intervals."""
    share = counted / total
    ends = np.array([_interval(count, total) for count in counted]).T
    ax.errorbar(
        x,
        share,
        np.abs(ends - share),
        color=color,
        ls="none",
        marker=marker,
        ms=3.5,
        lw=1.0,
        capsize=2.0,
        label=label,
    )


def _draw_times(ax: Axes, data: Data) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("slow time τ")
    ax.set_ylabel("probability of a hit by τ")
    ax.set_ylim(-0.03, 1.03)
    if "hitting" in data:
        dataset = data["hitting"]
        ax.plot(
            dataset.tau, dataset.closed, color="black", lw=2.4, alpha=0.35, label="one jump, exact"
        )
        _distribution(ax, dataset.hitting_time.values, BLUE, "-", "one jump, sampled, m = 20")
    if "recovery" in data:
        dataset = data["recovery"]
        chosen = dataset.neurons.values[:: max(1, dataset.sizes["neurons"] // 3)][:3]
        styles = ((ORANGE, (0, (5, 1.5))), (GREEN, (0, (6, 1.5, 1, 1.5))), (PURPLE, (0, (1, 1.2))))
        for neurons, (color, dashes) in zip(chosen, styles, strict=False):
            times = dataset.recovery_time.sel(neurons=neurons).values
            _distribution(ax, times, color, dashes, f"all jumps of the target, m = {neurons}")
        bound = theory.recovery_time_bound(_settings(dataset).target())
        ax.axvline(bound, color=VERMILLION, lw=1.0, label="3/Δf²")


def _distribution(ax: Axes, times: np.ndarray, color: str, dashes: Any, label: str) -> None:
    """The empirical distribution function; what is never hit stays out."""
    times = np.sort(times)
    level = np.arange(1, times.size + 1) / times.size
    known = np.isfinite(times)
    ax.step(times[known], level[known], where="post", color=color, ls=dashes, label=label)
