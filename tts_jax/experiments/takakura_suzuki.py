"""The experiments of Takakura & Suzuki (2024, arXiv 2403.14917) on f(x) = x₁x₂.

Mean-field Langevin dynamics of the features of a two-layer network whose outer weights are kernel
ridge regression, for several sizes of the noise in the data (the paper's Figure 1) and of the label
noise (Figure 2). Experiments and drawings go together as in `marion_berthier`:

    data = compute(settings_of("takakura_suzuki"), ("noise_1", "label_noise_1"))
    figure = draw_label_noise(data)

Paper symbols: σ is `noise`, that of the data; σ̃ is `label_noise`, drawn anew in every step; n is
`samples`, N `width`, η `step_size`. The paper does not state n, and its σ and σ̃ cannot be read.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
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
from tts_jax.experiments._panels import legend, setting


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        noise: σ.
        label_noise: σ̃, or `None` for none.
    """

    noise: float = 1.0
    label_noise: float | None = None


CASES: dict[str, Case] = {
    "noise_0": Case(0.0),
    "noise_1": Case(1.0),
    "noise_2": Case(2.0),
    "label_noise_1": Case(1.0, 1.0),
    "label_noise_2": Case(1.0, 2.0),
}


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiments.

    Attributes:
        dimension: d.
        samples: n.
        width: N.
        steps: of each run.
        step_size: η.
        entropy: λ.
        decay: λ_a = λ_w.
        seeds: number of runs, each with data and a start of its own.
        tests: test inputs of each.
        records: recorded times, evenly spaced from 0.
        key: integer from which all random keys are made.
    """

    dimension: int = 5
    samples: int = 150
    width: int = 150
    steps: int = 1500
    step_size: float = 0.2
    entropy: float = 0.004
    decay: float = 0.25
    seeds: int = 3
    tests: int = 1000
    records: int = 31
    key: int = 0

    @property
    def tau(self) -> np.ndarray:
        """Recorded times, `[records]`."""
        steps = np.unique(np.rint(np.linspace(0, self.steps, self.records)))
        return steps * self.step_size

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{len(methods)} runs of {seeds}, {self.steps} steps each"

    def problems(self, case: Case) -> list[tts.MeanFieldKernel]:
        """The problem of each seed; the inputs depend on the seed only."""
        key = jax.random.fold_in(jax.random.key(self.key), 1)
        return [
            tts.MeanFieldKernel.of_target(
                key=jax.random.fold_in(key, seed),
                dimension=self.dimension,
                samples=self.samples,
                tests=self.tests,
                noise=case.noise,
                width=self.width,
                entropy=self.entropy,
                outer_decay=self.decay,
                inner_decay=self.decay,
                label_noise=case.label_noise,
                directions=np.eye(self.dimension)[:2],
            )
            for seed in range(self.seeds)
        ]


_QUICK = Settings()
_PAPER = Settings(dimension=15, samples=300, width=2000, steps=10_000, seeds=5, records=51)
SETTINGS: dict[str, dict[str, Settings]] = {"takakura_suzuki": {"quick": _QUICK, "paper": _PAPER}}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    methods: Sequence[str] = ("noise_1",),
    *,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The runs of the given cases, in float32, by `each_case`.

    Returns:
        Case to trajectory, batch axis `[seeds]`: start and end, and in `.series` the observables
        at `settings.tau`.

    Raises:
        ValueError: an unknown case.
    """
    return each_case(CASES, methods, lambda case: _run(settings, case, progress), on_result)


def _run(settings: Settings, case: Case, progress: bool) -> tts.Trajectory:
    return tts.sgd(
        settings.problems(case),
        key=jax.random.key(settings.key),
        regime="limit",
        step_size=settings.step_size,
        tau=settings.tau[[0, -1]],
        dtype="float32",
        observe_every=max(1, settings.steps // (settings.records - 1)),
        progress=progress,
    )


# --- numbers --------------------------------------------------------------------------------


def table(name: str, data: Mapping[str, tts.Trajectory], seconds: float) -> Table:
    """What the runs of a figure came to: means over the seeds that reached the end."""
    header = ("figure", "run", "N", "n", "σ̃", "seeds", "failed")
    header += ("kernel alignment", "degrees of freedom", "test error", "seconds")
    rows = []
    for case, run in data.items():
        good = np.asarray(run.success)
        changes = []
        for seen in ("kernel_alignment", "degrees_of_freedom", "test_error"):
            values = np.asarray(run.observables[seen])[good]
            ends = values.mean(axis=0) if good.any() else np.full(2, np.nan)
            changes.append(f"{ends[0]:.3g} → {ends[-1]:.3g}")
        rows.append(
            (
                name,
                case,
                f"{np.shape(run.slow)[-2]}",
                f"{setting(run, 'data'):g}",
                f"{setting(run, 'label_noise'):g}",
                f"{good.size}",
                f"{np.sum(~good)}",
                *changes,
                "" if rows else f"{seconds:.1f}",
            )
        )
    notes = (
        "From the start to the end, means over the seeds that reached it. σ̃ is the label noise of",
        "a step. Seconds are those of runs not shared with a figure above.",
    )
    return Table(header, rows, notes)


# --- drawings -------------------------------------------------------------------------------


def _curves(ax: Axes, run: tts.Trajectory, seen: str, label: str, place: int) -> None:
    """The mean over seeds of an observable, and the band of its standard error."""
    dashes = ("-", (0, (5, 1.5)), (0, (1, 1.2)))[place]
    values, t = np.asarray(run.series[seen]), np.asarray(run.series["tau"])
    values, color = values[np.asarray(run.success)], plot.COLORS[place]
    mean = values.mean(axis=0)
    ax.plot(t, mean, color=color, ls=dashes, label=label)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        ax.fill_between(t, mean - error, mean + error, color=color, alpha=0.15, lw=0)


_TITLES = {
    "kernel_alignment": "kernel alignment",
    "parameter_alignment": "features in the plane of x₁, x₂",
    "degrees_of_freedom": "degrees of freedom",
    "test_error": "test error",
}


@plot.theme()
def _compared(
    data: Mapping[str, tts.Trajectory], labels: Mapping[str, str], shown: Sequence[str]
) -> Figure:
    """Some observables of some cases against time."""
    figure = plot.figure(3.1 * len(shown), 2.9)
    panels = list(np.ravel(figure.subplots(1, len(shown))))
    for ax, seen in zip(panels, shown, strict=True):
        for place, (case, label) in enumerate(labels.items()):
            _curves(ax, data[case], seen, label, place)
        ax.set_title(_TITLES[seen])
        ax.set_xlabel("slow time t")
    plot.panel_letters(panels)
    legend(figure, panels[0])
    return figure


_NOISE = {case: f"σ = {CASES[case].noise:g}" for case in ("noise_0", "noise_1", "noise_2")}
_LABEL_NOISE = {
    case: f"label noise {CASES[case].label_noise or 0:g}"
    for case in ("noise_1", "label_noise_1", "label_noise_2")
}


def draw_alignment(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Alignments and degrees of freedom against time for data with more or less noise."""
    shown = ("kernel_alignment", "parameter_alignment", "degrees_of_freedom")
    return _compared(data, _NOISE, shown)


def draw_label_noise(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Degrees of freedom, test error and kernel alignment against time, with label noise."""
    shown = ("degrees_of_freedom", "test_error", "kernel_alignment")
    return _compared(data, _LABEL_NOISE, shown)


def _spec(cases: Mapping[str, str], draw: Callable[..., Any]) -> FigureSpec:
    return FigureSpec("takakura_suzuki", compute, tuple(cases), draw, table)


FIGURES: dict[str, FigureSpec] = {
    "takakura_suzuki_alignment": _spec(_NOISE, draw_alignment),
    "takakura_suzuki_label_noise": _spec(_LABEL_NOISE, draw_label_noise),
}

load_data = functools.partial(figure_data, FIGURES)
