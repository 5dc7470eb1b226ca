"""Phase diagrams: how often all jumps are recovered by a slow time τ, in a plane of two settings.

`tts-jax phase PLANE` computes, writes and draws one. Every cell has the same seeds: seed i has the
same uniform numbers for its start and its samples in all cells, for SGD and for the flow.

    settings = settings_of("epsilon-neurons", "quick")
    dataset = compute(settings, "results/phase_epsilon-neurons")
    figure = draw(dataset)

A seed is recovered if at τ_end every jump has a neuron within η; one that diverged is not. Three
predictions stand beside what is counted, all of them for the same starts:

- The late-hit rule: all jumps are hit by τ_end in the sharp limit, ε → 0 and then η → 0. Exact for
  that limit, and a function of m and τ_end only.
- Of the flow at ε and η: the sharp limit has a neuron within η of every jump at τ_end − δ. The
  delay δ = ε/(2λ) is the time in which the weights come to resolve the shortest piece, of length
  Δv: many neurons have the Gram matrix of the kernel 1 − max(x, y), whose mode of half-wavelength
  Δv has the eigenvalue λ = m Δv²/π². A scaling estimate.
- Of SGD: the same, and no neuron is shaken off its jump. Let z be the distance of a neuron to its
  jump of height w in widths, l(z) = ∫(σ(y) − 1{y > −z})² dy and I = ∫σ′² = 9/5. The neuron moves in
  the potential w² η l(z), and its steps have the variance (4/3) ε h s² w² I/η in a unit of τ, where
  s²(z) = noise² + c(z) w², c(z) = 3 ∫(σ(y) − 1{y > −z})² σ′(y)² dy / I, is three times that of the
  residual. Its stationary density is exp(−∫κ l′ dz)/s², κ(z) = (5/6) η²/(ε h s²). The estimate is
  that of the flow times the product over the jumps of the mass in |z| ≤ 1. Fluctuations of the
  weights are not in it.

Times τ are without the factor ½ of the paper's text.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray
from contourpy import contour_generator
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

import tts_jax as tts
from tts_jax import checks, plot, theory
from tts_jax._sweep import Grid, sweep_on
from tts_jax._trajectory import Status
from tts_jax.experiments import _study
from tts_jax.plot._style import SKY, VERMILLION


PlaneName = Literal["epsilon-neurons", "epsilon-eta", "epsilon-noise", "step-epsilon"]

# the settings on the two axes, x first
PLANES: dict[str, tuple[str, str]] = {
    "epsilon-neurons": ("epsilon", "neurons"),
    "epsilon-eta": ("epsilon", "eta"),
    "epsilon-noise": ("epsilon", "noise"),
    "step-epsilon": ("step_size", "epsilon"),
}
DYNAMICS = ("sgd", "flow")
RULES = ("late_hit", "flow_estimate", "sgd_estimate")
CONFIDENCE = 0.95

_AXES = ("epsilon", "neurons", "eta", "step_size", "noise")
_ENDS = {
    "epsilon": (2e-5, 1e-1),
    "neurons": (5, 40),
    "eta": (5e-4, 4e-2),
    "step_size": (1e-4, 0.3),
    "noise": (0.3, 300.0),
}


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """A plane and its values; what is not on its axes has a single value.

    Attributes:
        plane: name of the plane, a key of `PLANES`.
        epsilon: timescale separations ε.
        neurons: numbers m of neurons.
        eta: widths η of a neuron's step, in units of x.
        step_size: step sizes h of SGD.
        noise: half-widths of SGD's uniform label noise.
        seeds: random starts in each cell.
        tau_end: slow time by which the jumps are to be recovered, by default the paper's.
        key: integer from which all random keys are made.
        jumps: positions of the target's jumps.
        values: its values.
    """

    plane: str
    epsilon: tuple[float, ...] = (2e-5,)
    neurons: tuple[int, ...] = (20,)
    eta: tuple[float, ...] = (4e-3,)
    step_size: tuple[float, ...] = (1e-4,)
    noise: tuple[float, ...] = (1.0,)
    seeds: int = 256
    tau_end: float = 0.035
    key: int = 0
    jumps: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8)
    values: tuple[float, ...] = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)

    @property
    def axes(self) -> tuple[str, str]:
        """The settings on the axes, x first."""
        return PLANES[self.plane]

    def check(self) -> None:
        """Refuse bad settings.

        Raises:
            ValueError: the message names the setting, its value and the remedy.
        """
        checks.one_of("plane", self.plane, PLANES)
        for name in _AXES:
            values = np.asarray(getattr(self, name))
            if name not in self.axes and values.size > 1:
                remedy = f"Only {' and '.join(self.axes)} have several in the plane {self.plane}."
                raise checks.argument_error(name, "be one number", values, remedy)
            if name in self.axes and (values.size < 2 or np.any(np.diff(values) <= 0)):
                remedy = "It is an axis of the plane."
                raise checks.argument_error(name, "be two or more, rising", values, remedy)
            if name in self.axes:  # axes are logarithmic
                checks.positive(name, values, "The axis is logarithmic.")
        for dynamics in DYNAMICS:
            self.grid(dynamics).check()

    def grid(self, dynamics: Literal["sgd", "flow"]) -> Grid:
        """The sweep behind a panel; the flow depends on neither step size nor noise."""
        values = {name: getattr(self, name) for name in _AXES}
        if dynamics == "flow":
            values |= {name: values[name][:1] for name in ("step_size", "noise")}
        return Grid(
            **values,
            dynamics=dynamics,
            seeds=self.seeds,
            tau_end=self.tau_end,
            records=1,
            key=self.key,
            jumps=self.jumps,
            values=self.values,
        )

    def target(self) -> tts.PiecewiseConstant:
        """The target."""
        return tts.PiecewiseConstant(self.jumps, self.values)

    def describe(self) -> str:
        """One line for the terminal."""
        x, y = (len(getattr(self, name)) for name in self.axes)
        return f"{x} × {y} cells of {self.seeds} seeds, τ = {self.tau_end:g}"


# cells along an axis, seeds, step size
SCALES: dict[str, tuple[int, int, float]] = {"quick": (6, 64, 1e-3), "paper": (12, 256, 1e-4)}


def settings_of(
    plane: str = "epsilon-neurons",
    scale: str = "quick",
    seeds: int | None = None,
    tau_end: float | None = None,
) -> Settings:
    """The settings of a plane at a scale, with another number of seeds or another time if given.

    Raises:
        ValueError: an unknown plane or scale, `seeds` < 1, or a bad `tau_end`.
    """
    checks.one_of("plane", plane, PLANES)
    count, usual, step_size = SCALES[checks.one_of("scale", scale, SCALES)]
    values: dict[str, Any] = {"step_size": (step_size,)}
    for name in PLANES[plane]:
        low, high = _ENDS[name]
        spread = np.geomspace(step_size if name == "step_size" else low, high, count)
        whole = name == "neurons"
        values[name] = tuple(round(v) if whole else float(f"{v:.3g}") for v in spread.tolist())
    if seeds is not None:
        checks.positive_integer("seeds", seeds, f"Its default is {usual}.")
    if tau_end is not None:
        checks.positive("tau_end", tau_end, "Its default is 0.035.", single=True)
        values["tau_end"] = float(tau_end)
    return Settings(plane, seeds=usual if seeds is None else seeds, **values)


# --- predictions ----------------------------------------------------------------------------


def delay(settings: Settings, epsilon: float, neurons: int) -> float:
    """δ = π² ε/(2 m Δv²), in units of τ: how late the weights follow (see the module)."""
    shortest = float(np.min(np.diff(settings.jumps, prepend=0.0, append=1.0)))
    return float(np.pi**2 * epsilon / (2.0 * neurons * shortest**2))


def stays(settings: Settings, epsilon: float, eta: float, step_size: float, noise: float) -> float:
    """Stationary probability that all jumps keep their neurons within η under SGD's noise.

    For the cubic step l′ = 1 − 8 (½ − z)³ up to z = ½ and 1 beyond (see the module).
    """
    square = np.diff(settings.values)[:, None] ** 2
    z, step = np.linspace(0.0, 0.5, 501, retstep=True)
    rest = 0.5 - z
    misfit = 9.0 / 44.0 + 144.0 * ((0.5**5 - rest**5) / 5.0 - (0.5**8 - rest**8))
    variance = noise**2 + misfit / 0.6 * square  # c(z) = 3 misfit / I
    kappa = (5.0 / 6.0) * eta**2 / (epsilon * step_size * variance)
    force = kappa * (1.0 - 8.0 * rest**3)
    fall = np.cumsum(0.5 * step * (force[:, 1:] + force[:, :-1]), axis=1)
    density = np.exp(-np.pad(fall, ((0, 0), (1, 0)))) / variance
    core = np.trapezoid(density, z, axis=1)
    # beyond z = ½ it falls exponentially
    rate, tail = kappa[:, -1], density[:, -1] / kappa[:, -1]
    return float(np.prod((core + tail * -np.expm1(-0.5 * rate)) / (core + tail)))


def predict(settings: Settings) -> dict[str, np.ndarray]:
    """What the sharp limit says of every start, and what SGD's noise does to it.

    Returns:
        `late_hit` and `in_time` `[y, x, seed]`, whether the late-hit rule and the estimate of the
        flow say recovered; `at_start` `[y, x, seed]`, whether the start is already; `stays`
        `[y, x]`; `sharp_status` `[neurons, seed]`.
    """
    target, grid = settings.target(), settings.grid("sgd")
    epsilons = np.array(sorted(settings.epsilon, reverse=True))
    first = 1e-9 * settings.tau_end * np.arange(1, epsilons.size + 1)  # times are to rise
    hits, near, starts, statuses = {}, {}, {}, []
    for neurons in settings.neurons:
        slow = np.asarray(grid.starts(neurons).slow, float)
        most = np.full((settings.seeds, max(settings.neurons)), np.nan)
        most[:, :neurons] = slow
        late = np.array([delay(settings, epsilon, neurons) for epsilon in epsilons])
        run = theory.padded_sharp_limit(target, most, np.maximum(settings.tau_end - late, first))
        hits[neurons] = np.max(np.asarray(run.stats["hitting_time"]), axis=-1)
        distance = np.max(np.asarray(run.observables["recovery"]), axis=-1)
        near |= {(neurons, e): distance[:, i] for i, e in enumerate(epsilons.tolist())}
        gap = np.abs(slow[..., None] - np.array(settings.jumps))
        starts[neurons] = np.max(np.min(gap, axis=1), axis=-1)
        statuses.append(np.asarray(run.status))

    def on_plane(value: Any) -> np.ndarray:
        x, y = settings.axes
        fixed = {name: getattr(settings, name)[0] for name in _AXES}
        rows = [
            [value(**(fixed | {x: at, y: level})) for at in getattr(settings, x)]
            for level in getattr(settings, y)
        ]
        return np.array(rows)

    return {
        "late_hit": on_plane(lambda neurons, **_: hits[neurons] <= settings.tau_end),
        "in_time": on_plane(lambda neurons, epsilon, eta, **_: near[neurons, epsilon] <= eta),
        "at_start": on_plane(lambda neurons, eta, **_: starts[neurons] <= eta),
        "stays": on_plane(lambda neurons, **others: stays(settings, **others)),
        "sharp_status": np.stack(statuses),
    }


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    folder: str | os.PathLike[str],
    *,
    checkpoint_every: float = 30.0,
    progress: bool = False,
) -> xarray.Dataset:
    """Compute a phase diagram, or what is missing of it in `folder`.

    SGD and the flow are two sweeps, in `folder/sgd` and `folder/flow`, with their checkpoints:
    whatever stops this call, the next one with the same settings goes on to the same bits.

    Returns:
        A dataset with the plane's axes y and x: `recovered [dynamics, y, x, seed]` and how many
        seeds `failed [dynamics, y, x]`; the share of recovered seeds `probability` with Wilson's
        95 % interval, `low` to `high`, `[dynamics, y, x]`; `predicted [rule, y, x]`, and by start
        `late_hit`, `in_time`, `at_start` `[y, x, seed]`; SGD's share minus the flow's,
        `difference`, with its 95 % interval for paired samples, `difference_low` to
        `difference_high`, `[y, x]`. Along an axis on which the flow does not depend its values
        repeat.

    Raises:
        ValueError: bad settings, or `folder` holds a run of other settings.
        OSError: `folder` cannot be written.
        Stopped: after SIGINT or SIGTERM.
    """
    settings.check()
    x, y = settings.axes
    dims = (y, x, "seed")
    shape = {name: len(getattr(settings, name)) for name in (y, x)} | {"seed": settings.seeds}
    recovered, failed = [], []
    for dynamics in DYNAMICS:
        run = sweep_on(
            settings.grid(dynamics),
            Path(folder) / dynamics,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        lost = run.status != int(Status.SUCCESS)
        found = (run.recovery.isel(tau=-1) <= run.eta).all("jump") & ~lost
        for answers, part in ((recovered, found), (failed, lost)):
            part = part.squeeze([name for name in _AXES if part.sizes[name] == 1], drop=True)
            missing = {name: shape[name] for name in dims if name not in part.dims}
            answers.append(part.expand_dims(missing).transpose(*dims).values)
    said = predict(settings)
    count = np.sum(recovered, axis=-1)
    low, high = _study.wilson(count, settings.seeds, CONFIDENCE)
    differs = _study.paired_difference(
        np.sum(recovered[0] & ~recovered[1], axis=-1),
        np.sum(recovered[1] & ~recovered[0], axis=-1),
        settings.seeds,
        CONFIDENCE,
    )
    in_time = said["in_time"].mean(-1)
    predicted = [said["late_hit"].mean(-1), in_time, in_time * said["stays"]]
    plane = dims[:2]
    return _study.dataset(
        settings,
        {
            "recovered": (("dynamics", *dims), np.stack(recovered)),
            "failed": (("dynamics", *plane), np.sum(failed, axis=-1)),
            "probability": (("dynamics", *plane), count / settings.seeds),
            "low": (("dynamics", *plane), low),
            "high": (("dynamics", *plane), high),
            "predicted": (("rule", *plane), np.stack(predicted)),
            **{name: (dims, said[name]) for name in ("late_hit", "in_time", "at_start")},
            "difference": (plane, differs[0]),
            "difference_low": (plane, differs[1]),
            "difference_high": (plane, differs[2]),
            "sharp_status": (("m", "seed"), said["sharp_status"]),
        },
        {
            "dynamics": list(DYNAMICS),
            "rule": list(RULES),
            x: list(getattr(settings, x)),
            y: list(getattr(settings, y)),
            "m": list(settings.neurons),
        },
    )


def load_data(folder: str | os.PathLike[str], plane: str) -> xarray.Dataset:
    """The phase diagram that `tts-jax phase` wrote to `folder`.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(folder) / f"phase_{plane}.nc"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no `{path}`. Write it with `tts-jax phase {plane} --out {folder}`."
        )
    with xarray.open_dataset(path, engine="h5netcdf") as opened:
        return opened.load()


def _settings(dataset: xarray.Dataset) -> Settings:
    return _study.settings_in(dataset, Settings)


# --- tables ---------------------------------------------------------------------------------

_SYMBOLS = {"epsilon": "ε", "neurons": "m", "eta": "η", "step_size": "h", "noise": "noise"}


def boundary(x: Float[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> float:
    """Where a share first falls below ½ along a logarithmic axis, by linear interpolation.

    Returns:
        The place; NaN if the share is below ½ from the start, infinite if it never is.
    """
    below = np.flatnonzero(probability < 0.5)
    if below.size == 0:
        return np.inf
    last = int(below[0])
    if last == 0:
        return np.nan
    two = slice(last - 1, last + 1)
    return float(np.exp(np.interp(-0.5, -probability[two], np.log(x[two]))))


def tables(dataset: xarray.Dataset) -> dict[str, list[tuple[str, ...]]]:
    """The numbers as rows of text: `"boundaries"`, a row for each y, and `"cells"`, all of them."""
    settings = _settings(dataset)
    x, y = settings.axes
    across, levels = dataset[x].values, dataset[y].values
    symbol, sides = _SYMBOLS[x], {"dynamics": DYNAMICS, "rule": RULES}
    columns = [("flow", "dynamics"), ("flow_estimate", "rule"), ("sgd", "dynamics")]
    columns += [("sgd_estimate", "rule")]
    share = {"dynamics": dataset.probability.values, "rule": dataset.predicted.values}
    rows: list[tuple[str, ...]] = [
        (_SYMBOLS[y], "late-hit rule", f"flow, {symbol} = {across[0]:g}", "SGD, same")
        + (f"flow: {symbol} at ½", "predicted", f"SGD: {symbol} at ½", "predicted")
    ]
    for row, level in enumerate(levels):
        ends = (share["rule"][0, row, 0], *share["dynamics"][::-1, row, 0])
        crossings = [
            boundary(across, share[kind][sides[kind].index(name), row]) for name, kind in columns
        ]
        texts = ["-" if np.isnan(c) else f"{c:.2g}" for c in crossings]
        texts = [f"> {across[-1]:g}" if text == "inf" else text for text in texts]
        rows.append((f"{level:g}", *(f"{end:.3f}" for end in ends), *texts))
    cells: list[tuple[str, ...]] = [
        (x, y, "seeds", *_cell_names("sgd"), *_cell_names("flow"), *RULES, "at_start")
        + ("difference", "difference_low", "difference_high")
    ]
    started = dataset.at_start.values.mean(-1)
    for row, level in enumerate(levels):
        for column, place in enumerate(across):
            numbers: list[Any] = [place, level, settings.seeds]
            for side in range(len(DYNAMICS)):
                cell = dataset.isel({"dynamics": side, y: row, x: column})
                numbers += [int(cell.recovered.sum()), cell.low, cell.high, int(cell.failed)]
            numbers += [*share["rule"][:, row, column], started[row, column]]
            cell = dataset.isel({y: row, x: column})
            numbers += [cell.difference, cell.difference_low, cell.difference_high]
            cells.append(tuple(f"{float(number):.6g}" for number in numbers))
    return {"boundaries": rows, "cells": cells}


def _cell_names(dynamics: str) -> tuple[str, ...]:
    return tuple(f"{dynamics}_{name}" for name in ("recovered", "low", "high", "failed"))


def remarks(dataset: xarray.Dataset) -> list[str]:
    """What a reader of the tables needs to know."""
    settings = _settings(dataset)
    x, _ = settings.axes
    slowest = min(settings.epsilon)
    lines = [
        f"Shares of {settings.seeds} starts with a neuron within η of every jump at τ = "
        f"{settings.tau_end:g}; 95 % intervals",
        f"(Wilson) are ±{_half_width(dataset):.1%} at most. {_SYMBOLS[x]} at ½: where the share "
        f"falls below ½; - where it never is above.",
    ]
    still = dataset.sel(epsilon=slowest)
    still = still.isel({name: 0 for name in ("step_size", "noise") if name in still.dims})
    where = "".join(
        f", {_SYMBOLS[name]} = {getattr(settings, name)[0]:g}"
        for name in ("step_size", "noise")
        if name in settings.axes
    )
    agree = still.recovered.values == still.late_hit.values
    of = agree[0].size
    lines.append(
        f"At ε = {slowest:g}{where} the late-hit rule is right for {np.sum(agree[0])} of {of} "
        f"starts of SGD and {np.sum(agree[1])} of the flow."
    )
    more = int(np.sum(dataset.difference_low.values > 0.0))
    fewer = int(np.sum(dataset.difference_high.values < 0.0))
    widest = np.unravel_index(
        np.argmax(np.abs(dataset.difference.values)), dataset.difference.shape
    )
    low, high = (float(dataset[f"difference_{end}"].values[widest]) for end in ("low", "high"))
    lines += [
        f"SGD recovers more than the flow in {more} of {dataset.difference.size} cells, fewer in "
        f"{fewer} (95 % intervals, same starts);",
        f"the largest difference of shares is {float(dataset.difference.values[widest]):+.3f} "
        f"({low:+.3f} to {high:+.3f}).",
    ]
    lost = dataset.failed.values.reshape(len(DYNAMICS), -1).sum(axis=1)
    unknown = int(np.sum(dataset.sharp_status.values != int(Status.SUCCESS)))
    lines.append(
        f"Not recovered because they failed: {lost[0]} runs of SGD (diverged), {lost[1]} of the "
        f"flow. Sharp limits that failed: {unknown}."
    )
    return lines


def _half_width(dataset: xarray.Dataset) -> float:
    return float(np.max(dataset.high.values - dataset.low.values) / 2.0)


# --- drawing --------------------------------------------------------------------------------

_LABELS = {
    "epsilon": "timescale separation ε",
    "neurons": "number of neurons m",
    "eta": "width η of a step",
    "step_size": "step size h",
    "noise": "half-width of the label noise",
}
_HALO = [withStroke(linewidth=2.6, foreground="white")]
_LINES: dict[str, dict[str, Any]] = {
    "counted": {"color": "black", "ls": "-", "lw": 1.5},
    "late_hit": {"color": VERMILLION, "ls": (0, (5, 1.5)), "lw": 1.8},
    "estimate": {"color": SKY, "ls": (0, (1, 1.1)), "lw": 2.0},
}


def draw(dataset: xarray.Dataset) -> Figure:
    """Heat maps of SGD and of the flow with the lines at which shares are ½.

    Dots are cells in which SGD's share differs from the flow's, numbers the percentage of seeds
    that failed, where there are any.
    """
    settings = _settings(dataset)
    with plot.theme():
        drawing = plot.figure(8.6, 4.5)
        panels = list(np.ravel(drawing.subplots(1, 2, sharey=True)))
        images = [_draw_share(ax, dataset, side) for side, ax in enumerate(panels)]
        marks = ["· differs from the flow"] * bool(np.any(_differs(dataset)))
        marks += ["numbers: % diverged"] * bool(np.any(dataset.failed.values[0]))
        panels[0].set_title("SGD" + (f"  ({', '.join(marks)})" if marks else ""))
        panels[1].set_title("gradient flow")
        panels[1].label_outer()
        bar = drawing.colorbar(images[0], ax=panels, pad=0.015, aspect=28)
        bar.set_label(
            f"share of {settings.seeds} starts recovered by τ = {settings.tau_end:g}\n"
            f"(95 % intervals: ±{_half_width(dataset):.1%} at most)"
        )
        late = dataset.predicted.values[RULES.index("late_hit")]
        labels = {
            "counted": "half of the starts: counted",
            "late_hit": "late-hit rule"
            + (f" ({late[0, 0]:.2f} everywhere)" * int(np.ptp(late) == 0.0)),
            "estimate": "estimate with delay, width and noise",
        }
        handles = [Line2D([], [], label=labels[name], **_LINES[name]) for name in labels]
        drawing.legend(handles=handles, loc="outside upper left", ncols=3)
        plot.panel_letters(panels)
    return drawing


def _draw_share(ax: Axes, dataset: xarray.Dataset, side: int) -> Any:
    x, y = _settings(dataset).axes
    across, levels = dataset[x].values.astype(float), dataset[y].values.astype(float)
    share = dataset.probability.values[side]
    ax.grid(False)
    image = ax.pcolormesh(
        _edges(across), _edges(levels), share, cmap="cividis", vmin=0.0, vmax=1.0, rasterized=True
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    if y == "neurons":
        ax.set_yticks(levels, [f"{level:g}" for level in levels])
        ax.minorticks_off()
    ax.set_xlabel(_LABELS[x])
    ax.set_ylabel(_LABELS[y])
    ax.set_xlim(*_edges(across)[[0, -1]].tolist())
    ax.set_ylim(*_edges(levels)[[0, -1]].tolist())
    estimate = dataset.predicted.values[RULES.index(f"{DYNAMICS[side]}_estimate")]
    late = dataset.predicted.values[RULES.index("late_hit")]
    for name, values in (("counted", share), ("late_hit", late), ("estimate", estimate)):
        for line in _contours(across, levels, values):
            ax.plot(*line, path_effects=_HALO, **_LINES[name])
    lost = dataset.failed.values[side] / dataset.sizes["seed"]
    for row, column in np.argwhere(lost > 0.0):
        percent = 100.0 * lost[row, column]
        text = "<1" if percent < 1.0 else f"{percent:.0f}"
        place = across[column], levels[row]
        ax.annotate(text, place, ha="center", va="center", fontsize=5.5, color="white")
    if side == 0:
        for row, column in np.argwhere(_differs(dataset) & (lost == 0.0)):
            color = "black" if share[row, column] > 0.6 else "white"
            ax.plot(across[column], levels[row], ".", color=color, ms=2.5, mew=0.0)
    return image


def _differs(dataset: xarray.Dataset) -> np.ndarray:
    """Where the interval of SGD's share minus the flow's leaves out 0."""
    return (dataset.difference_low.values > 0.0) | (dataset.difference_high.values < 0.0)


def _edges(centres: np.ndarray) -> np.ndarray:
    """The edges of cells on a logarithmic axis, halfway between their centres."""
    places = np.log(centres)
    middles = (places[1:] + places[:-1]) / 2.0
    return np.exp(
        np.concatenate([[2 * places[0] - middles[0]], middles, [2 * places[-1] - middles[-1]]])
    )


def _contours(x: np.ndarray, y: np.ndarray, share: np.ndarray) -> list[np.ndarray]:
    """Lines at which a share is ½, `[2, points]`, up to the edges of the outer cells."""
    places = [
        np.log(np.concatenate([_edges(axis)[:1], axis, _edges(axis)[-1:]])) for axis in (x, y)
    ]
    lines = contour_generator(*places, z=np.pad(share, 1, mode="edge")).lines(0.5)
    return [np.exp(np.asarray(line).T) for line in lines]
