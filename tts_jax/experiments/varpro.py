"""The experiments of Barboni, Peyré & Vialard (2025, arXiv 2504.18208) with ReLU features.

A student of M features on the circle learns a teacher whose features have the density μ_γ, by
variable projection or by two-timescale gradient descent; beside it stands the ultra-fast diffusion
that the density of the features follows as λ → 0. Every case differs from a base in one or two
numbers, so that figures share runs. Experiments and drawings go together as in `marion_berthier`:

    data = compute(settings_of("varpro"), ("base", "biased"))
    figure = draw_penalty(data)

Paper symbols: M is the width, λ the penalty, γ how sharp the teacher's modes are, b the prior of
the outer weights (1: unbiased), t the slow time, of which an epoch takes `time_step`.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import plot
from tts_jax.experiments._figures import (
    Data,
    FigureSpec,
    OnResult,
    Table,
    each_case,
    figure_data,
    settings_from,
)
from tts_jax.experiments._panels import legend, median_band, setting


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How one run differs from the base.

    Attributes:
        narrower: the base's width is divided by it.
        penalty: the base's λ is multiplied by it.
        gamma: the base's γ is multiplied by it.
        prior: b.
        regime: `"limit"` (variable projection) or `"joint"` (two timescales).
    """

    narrower: int = 1
    penalty: float = 1.0
    gamma: float = 1.0
    prior: float = 1.0
    regime: str = "limit"


CASES: dict[str, Case] = {
    "base": Case(),
    "narrow_2": Case(narrower=2),
    "narrow_8": Case(narrower=8),
    "narrow_32": Case(narrower=32),
    "biased": Case(prior=0.0),
    "penalty_10": Case(penalty=10.0),
    "penalty_100": Case(penalty=100.0),
    "penalty_tenth": Case(penalty=0.1),
    "biased_penalty_10": Case(penalty=10.0, prior=0.0),
    "biased_penalty_100": Case(penalty=100.0, prior=0.0),
    "gamma_tenth": Case(gamma=0.1),
    "gamma_10": Case(gamma=10.0),
    "two_timescale": Case(regime="joint"),
    "two_timescale_10": Case(penalty=10.0, regime="joint"),
    "two_timescale_100": Case(penalty=100.0, regime="joint"),
}


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiments.

    Attributes:
        samples: number N of data, Gaussian in the plane.
        teacher_width: features of the teacher.
        width: M of the base.
        penalty: λ of the base.
        gamma: γ of the base.
        time_step: slow time of one epoch, which is ε of the two-timescale runs.
        epochs: steps of each run.
        seeds: number of runs, each with data and a start of its own.
        records: recorded times, evenly spaced from 0.
        cells: of the diffusion.
        key: integer from which all random keys are made.
    """

    samples: int = 512
    teacher_width: int = 512
    width: int = 128
    penalty: float = 1e-3
    gamma: float = 10.0
    time_step: float = 2.0**-8
    epochs: int = 2048
    seeds: int = 4
    records: int = 65
    cells: int = 512
    key: int = 0

    @property
    def t(self) -> np.ndarray:
        """Recorded times, `[records]`."""
        steps = np.unique(np.rint(np.linspace(0, self.epochs, self.records)))
        return steps * self.time_step

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{len(methods)} runs of {seeds}, {self.epochs} epochs each"

    def diffusion(self, case: Case) -> tts.UltraFastDiffusion:
        """The limit λ → 0, M → ∞."""
        return tts.UltraFastDiffusion(tts.CircleTeacher(self.gamma * case.gamma), self.cells)

    def problems(self, case: Case) -> list[tts.VarPro]:
        """The problem of each seed, whose data depend on the seed and γ only."""
        teacher = tts.CircleTeacher(self.gamma * case.gamma)
        key = jax.random.fold_in(jax.random.key(self.key), 1)
        return [
            tts.VarPro.of_teacher(
                teacher,
                key=jax.random.fold_in(key, seed),
                samples=self.samples,
                teacher_width=self.teacher_width,
                width=max(1, self.width // case.narrower),
                penalty=self.penalty * case.penalty,
                prior=case.prior,
            )
            for seed in range(self.seeds)
        ]


_QUICK = Settings()
_PAPER = Settings(
    samples=4096,
    teacher_width=4096,
    width=1024,
    gamma=100.0,
    time_step=2.0**-10,
    epochs=32_000,
    seeds=2,
    records=126,
    cells=4096,
)
SETTINGS: dict[str, dict[str, Settings]] = {"varpro": {"quick": _QUICK, "paper": _PAPER}}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    methods: Sequence[str] = ("base",),
    *,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The runs of the given cases, by `each_case`.

    Returns:
        Case to trajectory, batch axis `[seeds]`, recorded at `settings.t`. Beside the problem's
        observables it has `diffusion_distance`, the energy distance of the features to the
        ultra-fast diffusion from the uniform density at the same time.

    Raises:
        ValueError: an unknown case.
    """
    densities: dict[float, np.ndarray] = {}

    def one(case: Case) -> tts.Trajectory:
        if case.gamma not in densities:
            densities[case.gamma] = diffused(settings, case)
        run = _run(settings, case, progress)
        distance = _distance(run.slow, settings.diffusion(case).theta, densities[case.gamma])
        return replace(
            run,
            observables=run.observables | {"diffusion_distance": distance},
            settings=run.settings | {"gamma": _gamma(settings, case)},
        )

    return each_case(CASES, methods, one, on_result)


def diffused(settings: Settings, case: Case) -> np.ndarray:
    """The density of the ultra-fast diffusion at `settings.t`, `[T, cells]`.

    Raises:
        RuntimeError: it could not be computed to the end.
    """
    solution = settings.diffusion(case).solve(None, settings.t)
    if not solution.success:
        status = tts.Status(int(solution.status))
        raise RuntimeError(f"the diffusion failed: {status.name}. {status.advice}")
    return np.asarray(solution.density)


def _gamma(settings: Settings, case: Case) -> np.ndarray:
    return np.asarray(settings.gamma * case.gamma)


def _run(settings: Settings, case: Case, progress: bool) -> tts.Trajectory:
    problems, key = settings.problems(case), jax.random.key(settings.key)
    starts = [one.init(key=jax.random.fold_in(key, row)) for row, one in enumerate(problems)]
    step: dict[str, Any] = {"step_size": settings.time_step}
    if case.regime == "joint":
        step = {"step_size": 1.0, "epsilon": settings.time_step}
    return tts.sgd(
        problems,
        key=key,
        state=jax.tree.map(lambda *leaves: np.stack(leaves), *starts),
        regime=case.regime,
        tau=settings.t,
        progress=progress,
        **step,
    )


def _distance(slow: Any, theta: np.ndarray, densities: np.ndarray) -> np.ndarray:
    """The energy distance of features `[seeds, T, M, 2]` to densities `[T, cells]`."""
    angles = np.arctan2(slow[..., 1], slow[..., 0])

    @jax.jit
    def one(points: Any, density: Any) -> Any:
        return tts.circle_energy_distance(points, theta, phi_weights=density)

    with jax.enable_x64(True):
        places = jnp.asarray(angles)
        rows = [
            [one(points, density) for points, density in zip(own, densities, strict=True)]
            for own in places
        ]
        return np.asarray(rows)


def saved(folder: str | os.PathLike[str], figure: str, settings: Settings) -> tts.Trajectory | None:
    """The base run that `tts-jax reproduce` wrote to `folder`, if it is that of the settings."""
    path = Path(folder) / f"{figure}_base.nc"
    if not path.is_file():
        return None
    run = tts.load(path)
    expected = {
        "penalty": settings.penalty,
        "gamma": settings.gamma,
        "step_size": settings.time_step,
        "data": settings.samples,
    }
    known = set(expected) <= set(run.settings)
    same = known and all(np.isclose(setting(run, name), value) for name, value in expected.items())
    seeds, width = np.shape(run.slow)[0], _width(run)
    long_enough = np.isclose(np.asarray(run.tau)[-1], settings.t[-1])
    good = same and width == settings.width and seeds >= settings.seeds and long_enough
    return run if good else None


# --- numbers --------------------------------------------------------------------------------


def _width(run: tts.Trajectory) -> int:
    return int(np.shape(run.slow)[-2])


def _is_joint(run: tts.Trajectory) -> bool:
    return setting(run, "epsilon") > 0


def separation(run: tts.Trajectory) -> float:
    """ε/λ of a two-timescale run, the separation number for features that move at the rate 1."""
    return setting(run, "epsilon") / setting(run, "penalty")


def table(name: str, data: Mapping[str, tts.Trajectory], seconds: float) -> Table:
    """What the runs of a figure came to: medians over the seeds that reached the end."""
    header = (
        *("figure", "run", "M", "λ", "γ", "b", "ε/λ", "seeds", "failed"),
        *("risk", "to teacher", "largest to diffusion", "seconds"),
    )
    rows = []
    for case, run in data.items():
        good = np.asarray(run.success)
        ends = [np.median(np.asarray(run.loss)[good, -1])] if good.any() else [np.nan]
        for seen, pick in (("teacher_distance", -1), ("diffusion_distance", slice(None))):
            values = np.asarray(run.observables[seen])[good][:, pick]
            ends.append(np.median(values.max(axis=1) if values.ndim == 2 else values))
        rows.append(
            (
                name,
                case,
                f"{_width(run)}",
                f"{setting(run, 'penalty'):g}",
                f"{setting(run, 'gamma'):g}",
                f"{setting(run, 'prior'):g}",
                f"{separation(run):.2g}" if _is_joint(run) else "-",
                f"{good.size}",
                f"{np.sum(~good)}",
                *(f"{end:.3g}" for end in ends),
                "" if rows else f"{seconds:.1f}",
            )
        )
    notes = (
        "Risk is L at the end, medians over the seeds that reached it; distances are energy",
        "distances of the features to those of the teacher at the end, and to the ultra-fast",
        "diffusion at the worst recorded time. Seconds are those of runs not shared with a figure",
        "above.",
    )
    return Table(header, rows, notes)


# --- drawings -------------------------------------------------------------------------------


def _curves(ax: Axes, run: tts.Trajectory, values: Any, label: str, place: int) -> None:
    dashes = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))[place]
    median_band(ax, run.tau, values, label, plot.COLORS[place], dashes)


def _panels(columns: int, titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    figure = plot.figure(3.1 * columns, 2.9)
    panels = list(np.ravel(figure.subplots(1, columns)))
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("slow time t")
        ax.set_yscale("log")
    if columns > 1:
        plot.panel_letters(panels)
    return figure, panels


@plot.theme()
def _compared(
    data: Mapping[str, tts.Trajectory], cases: Sequence[str], label: Callable[..., str]
) -> Figure:
    """Risk, distance to the teacher and distance to the diffusion of some cases."""
    titles = ("risk L", "distance to the teacher", "distance to the diffusion")
    figure, panels = _panels(3, titles)
    for place, case in enumerate(cases):
        run = data[case]
        seen = run.loss, run.observables["teacher_distance"], run.observables["diffusion_distance"]
        for ax, values in zip(panels, seen, strict=True):
            _curves(ax, run, values, label(run), place)
    legend(figure, panels[0])
    return figure


_WIDTHS = ("narrow_32", "narrow_8", "narrow_2", "base")
_PENALTIES = ("penalty_100", "penalty_10", "base", "penalty_tenth")
_BIASED = ("biased_penalty_100", "biased_penalty_10", "biased")
_GAMMAS = ("gamma_tenth", "base", "gamma_10")
_TWO = ("two_timescale_100", "two_timescale_10", "two_timescale")


def draw_widths(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Risk and distances against time for four widths, unbiased."""
    return _compared(data, _WIDTHS, lambda run: f"M = {_width(run)}")


def draw_gamma(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The same for three teachers: the sharper its modes, the slower."""
    return _compared(data, _GAMMAS, lambda run: f"γ = {setting(run, 'gamma'):g}")


@plot.theme()
def draw_penalty(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Distance to the teacher for several λ: unbiased left, biased right."""
    figure, panels = _panels(2, ("unbiased, b = 1", "biased, b = 0"))
    for ax, cases in zip(panels, (_PENALTIES, _BIASED), strict=True):
        for place, case in enumerate(cases):
            run = data[case]
            label = f"λ = {setting(run, 'penalty'):g}"
            _curves(ax, run, run.observables["teacher_distance"], label, place)
    panels[1].sharey(panels[0])
    panels[0].set_ylabel("distance to the teacher")
    legend(figure, panels[0])
    return figure


@plot.theme()
def draw_two_timescale(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Variable projection and two-timescale descent at three λ."""
    pairs = list(zip(_PENALTIES[:3], _TWO, strict=True))
    titles = [
        f"λ = {setting(data[joint], 'penalty'):g}, ε/λ = {separation(data[joint]):.2g}"
        for _, joint in pairs
    ]
    figure, panels = _panels(3, titles)
    for ax, pair in zip(panels, pairs, strict=True):
        for place, case in enumerate(pair):
            label = ("variable projection", "two timescales")[place]
            _curves(ax, data[case], data[case].observables["teacher_distance"], label, place)
        ax.sharey(panels[0])
    panels[0].set_ylabel("distance to the teacher")
    legend(figure, panels[0])
    return figure


def _teacher(run: tts.Trajectory) -> tts.CircleTeacher:
    return tts.CircleTeacher(setting(run, "gamma"))


def _density_axes(ax: Axes, highest: float) -> None:
    ax.set_xlim(-np.pi, np.pi)
    ax.set_ylim(0.0, 1.1 * highest)
    ax.set_xticks([-np.pi, 0.0, np.pi], ["−π", "0", "π"])
    ax.set_xlabel("angle of a feature")


def _histogram(slow: Any) -> tuple[np.ndarray, np.ndarray]:
    """Edges and the density of features `[..., 2]`, some 12 of them in a bin."""
    angles = np.arctan2(slow[..., 1], slow[..., 0]).ravel()
    bins = int(np.clip(angles.size // 12, 12, 96))
    density, edges = np.histogram(angles, bins, range=(-np.pi, np.pi), density=True)
    return edges, density


@plot.theme()
def draw_density(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The features of all seeds at four times, the diffusion, and the teacher."""
    run = data["base"]
    t, slow = np.asarray(run.tau), np.asarray(run.slow)
    parts = np.array([0.0, 0.05, 0.2, 1.0])
    shown = np.unique(np.argmin(np.abs(t[:, None] - parts * t[-1]), axis=0))
    diffusion = tts.UltraFastDiffusion(_teacher(run), 512)
    solution = diffusion.solve(None, t[shown])
    theta = np.asarray(diffusion.theta)
    goal = np.asarray(_teacher(run)(theta))
    figure = plot.figure(9.3, 2.6)
    panels = np.ravel(figure.subplots(1, shown.size, sharey=True))
    for ax, index, density in zip(panels, shown, np.asarray(solution.density), strict=True):
        edges, heights = _histogram(slow[:, index])
        ax.stairs(heights, edges, fill=True, color=plot.COLORS[0], alpha=0.35, label="features")
        ax.plot(theta, density, color=plot.COLORS[1], label="ultra-fast diffusion")
        ax.plot(theta, goal, color=plot.TARGET_COLOR, ls=(0, (1, 1.2)), label="teacher")
        ax.set_title(f"t = {t[index]:.3g}")
        _density_axes(ax, float(goal.max()))
    panels[0].set_ylabel("density")
    legend(figure, panels[0])
    return figure


@plot.theme()
def movie(run: tts.Trajectory, *, seed: int = 0, frames: int = 72) -> plot.Movie:
    """The features of all seeds on their way, with the diffusion at the same time.

    Times are evenly spaced in √t: the features move most at the beginning.

    Args:
        run: a run of `compute`.
        seed: whose features are shown as points.
        frames: their number at most; a frame needs a recorded time of its own.
    """
    t, slow = np.asarray(run.tau), np.asarray(run.slow)
    wanted = np.linspace(0.0, np.sqrt(t[-1]), frames) ** 2
    shown = np.unique(np.argmin(np.abs(t[:, None] - wanted), axis=0))
    diffusion = tts.UltraFastDiffusion(_teacher(run), 512)
    densities = np.asarray(diffusion.solve(None, t[shown]).density)
    theta, goal = np.asarray(diffusion.theta), np.asarray(_teacher(run)(diffusion.theta))
    figure = plot.figure(9.0, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    edges, heights = _histogram(slow[:, 0])
    bars = right.stairs(heights, edges, fill=True, color=plot.COLORS[0], alpha=0.35)
    bars.set_label("features")
    (line,) = right.plot(theta, densities[0], color=plot.COLORS[1], label="ultra-fast diffusion")
    right.plot(theta, goal, color=plot.TARGET_COLOR, ls=(0, (1, 1.2)), label="teacher")
    _density_axes(right, float(goal.max()))
    right.set_ylabel("density")
    (dots,) = left.plot([], [], ".", ms=4.0, alpha=0.5, color=plot.COLORS[0])
    left.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xlabel="w₁", ylabel="w₂")
    legend(figure, right)

    def show(frame: int) -> None:
        index = shown[frame]
        dots.set_data(slow[seed, index, :, 0], slow[seed, index, :, 1])
        bars.set_data(_histogram(slow[:, index])[1])
        line.set_ydata(densities[frame])
        left.set_title(f"t = {t[index]:.2f}")

    return plot.Movie(figure, len(shown), show)


def _spec(cases: Sequence[str], draw: Callable[..., Figure]) -> FigureSpec:
    return FigureSpec("varpro", compute, tuple(dict.fromkeys(cases)), draw, table)


FIGURES: dict[str, FigureSpec] = {
    "varpro_widths": _spec(_WIDTHS, draw_widths),
    "varpro_penalty": _spec((*_PENALTIES, *_BIASED), draw_penalty),
    "varpro_gamma": _spec(_GAMMAS, draw_gamma),
    "varpro_two_timescale": _spec((*_PENALTIES[:3], *_TWO), draw_two_timescale),
    "varpro_density": _spec(("base",), draw_density),
}

load_data = functools.partial(figure_data, FIGURES)
