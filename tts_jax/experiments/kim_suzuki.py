"""Experiments on the features in context of Kim & Suzuki (2024, arXiv 2402.01258).

Particles learn the features of a teacher, with the attention eliminated at every step or trained
with them; from near a saddle, with its curvature; for finite prompts; and with births and deaths,
which are ours. Every case differs from `reduced` in a few numbers, so that figures share runs:

    data = compute(settings_of("kim_suzuki"), ("reduced", "joint_10"))

Symbols: N is the number of particles, n the length of a prompt, c the number of steps of the
attention for each of the particles, τ the slow time.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import plot, regime
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
    """How one run differs from the reduced flow in steps.

    Attributes:
        steps: c, `None` where the attention is eliminated.
        rate: the step size of the attention.
        prompt_length: n, `None` for the limit.
        sampled: whether prompts are drawn, in steps of a fifth.
        birth_death: the rate of births and deaths, `None` for none.
        offset: the distance of the start from a saddle, per coordinate; `None` for a random start.
        curvature: whether the smallest curvature is computed at some of the records.
    """

    steps: int | None = None
    rate: float = 0.5
    prompt_length: int | None = None
    sampled: bool = False
    birth_death: float | None = None
    offset: float | None = None
    curvature: bool = False


CASES: dict[str, Case] = {
    "reduced": Case(curvature=True),
    "joint_1": Case(steps=1, rate=0.05),
    "joint_10": Case(steps=10),
    "joint_100": Case(steps=100),
    "saddle_2": Case(offset=1e-2, curvature=True),
    "saddle_4": Case(offset=1e-4, curvature=True),
    "saddle_6": Case(offset=1e-6, curvature=True),
    "prompt_10": Case(prompt_length=10),
    "prompt_100": Case(prompt_length=100),
    "prompt_1000": Case(prompt_length=1000),
    "prompt_100_sampled": Case(prompt_length=100, sampled=True),
    "birth_death_tenth": Case(birth_death=0.1),
    "birth_death_1": Case(birth_death=1.0),
}


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiments.

    Attributes:
        dimension: d.
        features: k.
        particles: N.
        samples: number of inputs.
        time_step: slow time of a step.
        steps: of the runs from random starts.
        records: recorded times of these, evenly spaced from 0.
        saddle_step: slow time of a step near a saddle.
        saddle_steps: of the runs that start there.
        prompts: drawn per step, in the case that draws them.
        curvatures: records, evenly spaced, at which curvatures are computed.
        seeds: number of runs, each with a teacher and a start of its own.
        key: integer from which all random keys are made.
    """

    dimension: int = 10
    features: int = 3
    particles: int = 100
    samples: int = 1500
    time_step: float = 0.2
    steps: int = 2000
    records: int = 101
    saddle_step: float = 0.005
    saddle_steps: int = 500
    prompts: int = 100
    curvatures: int = 21
    seeds: int = 1
    key: int = 0

    def tau(self, case: Case) -> np.ndarray:
        """Recorded times, `[records]`."""
        if case.offset is None:
            steps, size = self.steps, self.time_step
        else:
            steps, size = self.saddle_steps, self.saddle_step
        return np.unique(np.rint(np.linspace(0, steps, self.records))) * size

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{len(methods)} runs of {seeds}, {self.steps} steps each"

    def problems(self, case: Case) -> list[tts.InContext]:
        """The problem of each seed, whose teacher and inputs depend on the seed only."""
        key = jax.random.fold_in(jax.random.key(self.key), 1)
        return [
            tts.InContext.of_teacher(
                key=jax.random.fold_in(key, seed),
                dimension=self.dimension,
                features=self.features,
                samples=self.samples,
                particles=self.particles,
                prompt_length=case.prompt_length,
                prompts=self.prompts if case.sampled else None,
                birth_death=case.birth_death,
            )
            for seed in range(self.seeds)
        ]


_QUICK = Settings()
_PAPER = Settings(dimension=20, features=5, particles=500, samples=10_000)
SETTINGS: dict[str, dict[str, Settings]] = {"kim_suzuki": {"quick": _QUICK, "paper": _PAPER}}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    methods: Sequence[str] = ("reduced",),
    *,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The runs of the given cases, by `each_case`.

    Returns:
        Case to trajectory, batch axis `[seeds]`. Beside the problem's observables, `feature_loss`
        is the loss of the same features with infinite prompts and the attention eliminated;
        `curvature` the smallest one, NaN at the records where it was not computed.

    Raises:
        ValueError: an unknown case.
    """
    return each_case(CASES, methods, lambda case: _run(settings, case, progress), on_result)


def _run(settings: Settings, case: Case, progress: bool) -> tts.Trajectory:
    problems, key = settings.problems(case), jax.random.key(settings.key)
    starts = [_start(one, case, jax.random.fold_in(key, seed)) for seed, one in enumerate(problems)]
    step = settings.time_step if case.offset is None else settings.saddle_step
    how: dict[str, Any] = {"regime": "limit", "step_size": step}
    if case.steps is not None:
        how = {"regime": regime.Inner(case.steps), "step_size": case.rate}
        how |= {"epsilon": step / case.rate, "observe_every": max(1, settings.steps // 100)}
    if case.sampled:
        how["step_size"] = step / 5.0
    run = tts.sgd(
        problems,
        key=key,
        state=jax.tree.map(lambda *leaves: np.stack(leaves), *starts),
        tau=settings.tau(case),
        progress=progress,
        **how,
    )
    observables = {"feature_loss": _feature_loss(settings, case, run)}
    if case.curvature:
        observables["curvature"] = _curvature(settings, case, run)
    numbers = {
        "inner_steps": np.asarray(case.steps or 0),
        "offset": np.asarray(np.nan if case.offset is None else case.offset),
    }
    return replace(run, observables=run.observables | observables, settings=run.settings | numbers)


def _start(problem: tts.InContext, case: Case, key: Any) -> tts.State:
    start = problem.init(key=key)
    if case.offset is None:
        return start
    slow = problem.saddle(key=key)
    moved = {name: slow[name] + case.offset * np.asarray(start.slow[name]) for name in slow}
    return tts.State(start.fast, moved)


def _feature_loss(settings: Settings, case: Case, run: tts.Trajectory) -> np.ndarray:
    """`[seeds, T]`."""
    if case.steps is None and case.prompt_length is None:
        return np.asarray(run.loss)
    problems = settings.problems(replace(case, prompt_length=None, sampled=False))
    with jax.enable_x64(True):

        @jax.jit
        def along(problem: Any, slow: Any) -> Any:
            return jax.lax.map(problem.reduced_loss, slow)

        rows = []
        for seed, one in enumerate(problems):
            slow = jax.tree.map(lambda leaf, own=seed: jnp.asarray(leaf[own]), run.slow)
            rows.append(along(jax.tree.map(jnp.asarray, one), slow))
        return np.asarray(rows)


def _curvature(settings: Settings, case: Case, run: tts.Trajectory) -> np.ndarray:
    """`[seeds, T]`, NaN where it is not computed."""
    count = np.size(run.tau)
    chosen = np.unique(np.rint(np.linspace(0, count - 1, settings.curvatures)).astype(int))
    values = np.full((settings.seeds, count), np.nan)
    for seed, problem in enumerate(settings.problems(case)):
        slow = jax.tree.map(lambda leaf, own=seed: np.asarray(leaf)[own, chosen], run.slow)
        found = tts.smallest_curvature(problem, slow, key=jax.random.key(settings.key), steps=48)
        values[seed, chosen] = found.value
    return values


# --- numbers --------------------------------------------------------------------------------

# slow time after which a joint run is compared with the reduced one: 200 of 2000 steps
_TRANSIENT = 0.1


def gaps(run: tts.Trajectory, reduced: tts.Trajectory) -> np.ndarray:
    """|L − L of the reduced run| at the common records, `[seeds, T]`."""
    return np.abs(np.asarray(run.loss) - np.asarray(reduced.loss))


def largest_gap(run: tts.Trajectory, reduced: tts.Trajectory) -> np.ndarray:
    """The largest gap after the first tenth of the run, `[seeds]`."""
    tau = np.asarray(run.tau)
    return np.max(gaps(run, reduced)[:, tau > _TRANSIENT * tau[-1]], axis=1)


def table(name: str, data: Mapping[str, tts.Trajectory], seconds: float) -> Table:
    """What the runs of a figure came to: medians over the seeds that reached the end."""
    header = (
        *("figure", "run", "n", "c", "seeds", "failed"),
        *("loss at 0", "at the end", "of features", "largest gap", "curvature", "seconds"),
    )
    rows = []
    for case, run in data.items():
        good = np.asarray(run.success)

        def median(values: Any, good: np.ndarray = good) -> str:
            values = np.asarray(values)[good]
            return f"{np.median(values):.3g}" if values.size else "-"

        gap = curvature = "-"
        if case.startswith("joint") and "reduced" in data:
            gap = median(largest_gap(run, data["reduced"]))
        if "curvature" in run.observables:
            curvature = median(np.nanmin(run.observables["curvature"], axis=1))
        steps = int(setting(run, "inner_steps"))
        rows.append(
            (
                *(name, case, f"{setting(run, 'prompt_length'):g}", f"{steps or '-'}"),
                *(f"{good.size}", f"{np.sum(~good)}"),
                *(median(np.asarray(run.loss)[:, at]) for at in (0, -1)),
                median(np.asarray(run.observables["feature_loss"])[:, -1]),
                *(gap, curvature, "" if rows else f"{seconds:.1f}"),
            )
        )
    notes = (
        "Medians over the seeds that reached the end. The loss of the features is that for",
        "infinite prompts with the attention eliminated. The gap is the largest to the loss of the",
        "reduced run after the first tenth, the curvature the smallest on the way. Seconds are",
        "those of runs not shared with a figure above.",
    )
    return Table(header, rows, notes)


# --- drawings -------------------------------------------------------------------------------

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (3, 3)))


def _curves(ax: Axes, t: Any, values: Any, label: str, place: int) -> None:
    median_band(ax, t, values, label, plot.COLORS[place], _DASHES[place])


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    figure = plot.figure(3.1 * len(titles), 2.9)
    panels = list(np.ravel(figure.subplots(1, len(titles))))
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("slow time τ")
        ax.set_yscale("log")
    plot.panel_letters(panels)
    return figure, panels


_JOINT = ("joint_1", "joint_10", "joint_100")
_SADDLE = ("saddle_2", "saddle_4", "saddle_6")
_PROMPT = ("prompt_10", "prompt_100", "prompt_1000")
_BIRTHS = ("birth_death_tenth", "birth_death_1")


@plot.theme()
def draw_joint(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Joint training against the reduced flow: loss, gap and separation number."""
    titles = ("loss L", "gap to the reduced loss", "separation number")
    figure, (left, middle, right) = _panels(titles)
    reduced = data["reduced"]
    _curves(left, reduced.tau, reduced.loss, "W eliminated", 0)
    for place, case in enumerate(_JOINT, start=1):
        run = data[case]
        label = f"c = {int(setting(run, 'inner_steps'))}"
        _curves(left, run.tau, run.loss, label, place)
        _curves(middle, run.tau, gaps(run, reduced), label, place)
        _curves(right, run.series["tau"], run.series["epsilon_eff"], label, place)
    right.axhline(1.0, color=plot.TARGET_COLOR, lw=0.8)
    legend(figure, left)
    return figure


def _seen(run: tts.Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, losses and −curvature of the first seed where it was computed."""
    curvature = np.asarray(run.observables["curvature"])[0]
    known = np.isfinite(curvature)
    return np.asarray(run.tau)[known], np.asarray(run.loss)[0, known], -curvature[known]


@plot.theme()
def draw_saddle(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Leaving a saddle at the rate of its curvature; curvature against time and loss; one seed."""
    titles = ("½ − L, from near a saddle", "−(smallest curvature)", "the same against L")
    figure, (left, middle, right) = _panels(titles)
    for place, case in enumerate(_SADDLE):
        run = data[case]
        label = f"offset {setting(run, 'offset'):.0e}".replace("e-0", "e-")
        tau, below = np.asarray(run.tau), 0.5 - np.asarray(run.loss)[0]
        left.plot(
            tau, np.where(below > 1e-13, below, np.nan), color=plot.COLORS[place], label=label
        )
        times, losses, curvature = _seen(run)
        middle.plot(times, np.where(curvature > 0, curvature, np.nan), color=plot.COLORS[place])
        right.plot(losses, curvature, "o", ms=3.0, color=plot.COLORS[place])
        if case == _SADDLE[-1]:  # e^{2 |λ| τ} through the middle of the exponential part
            at = int(np.argmin(np.abs(np.log(np.maximum(below, 1e-300) / 1e-6))))
            growth = 2.0 * curvature[0] * (tau - tau[at])
            line = below[at] * np.exp(np.clip(growth, -25.0, 25.0))
            shown = (line > 1e-13) & (line < 1.0)
            left.plot(
                tau[shown],
                line[shown],
                color=plot.TARGET_COLOR,
                ls=":",
                label="its rate",
            )
    left.set_ylim(1e-13, 1.0)
    _, losses, curvature = _seen(data["reduced"])
    right.plot(losses, curvature, "s", ms=3.0, color=plot.COLORS[3], label="random start")
    grid = np.array([losses.min(), 1.0])
    right.plot(grid, grid**2, color=plot.TARGET_COLOR, ls="--", lw=1.0, label="L²")
    right.set(xscale="log", xlabel="loss L")
    legend(figure, left, right)
    return figure


@plot.theme()
def draw_prompts(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Prompts of length n: losses against time, and the losses of the learned features."""
    titles = ("loss for prompts of length n", "the same features, n = ∞", "at the end")
    figure, (left, middle, right) = _panels(titles)
    cases = ("reduced", *_PROMPT, "prompt_100_sampled")
    for place, case in enumerate(cases):
        run = data[case]
        length = setting(run, "prompt_length")
        label = f"n = {'∞' if np.isinf(length) else f'{length:g}'}"
        label += ", prompts drawn" if case.endswith("sampled") else ""
        _curves(left, run.tau, run.loss, label, place)
        _curves(middle, run.tau, run.observables["feature_loss"], label, place)
    n = np.array([setting(data[case], "prompt_length") for case in _PROMPT])
    ends = {
        "L at length n": [np.median(np.asarray(data[case].loss)[:, -1]) for case in _PROMPT],
        "the features, n = ∞": [
            np.median(np.asarray(data[case].observables["feature_loss"])[:, -1]) for case in _PROMPT
        ],
    }
    for place, (label, values) in enumerate(ends.items()):
        right.plot(n, values, ("o-", "s--")[place], color=plot.COLORS[place + 1], label=label)
    first = next(iter(ends.values()))
    right.plot(n, first[-1] * n[-1] / n, ":", color=plot.TARGET_COLOR, label="1/n")
    right.axhline(np.median(np.asarray(data["reduced"].loss)[:, -1]), color=plot.COLORS[0], lw=1.0)
    right.set(xscale="log", xlabel="length n of a prompt")
    right.legend(fontsize="small")
    legend(figure, left)
    return figure


@plot.theme()
def draw_birth_death(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Births and deaths, our variant: loss, and how many particles still weigh."""
    figure, (left, right) = _panels(("loss L", "effective particles"))
    for place, case in enumerate(("reduced", *_BIRTHS)):
        run = data[case]
        rate = setting(run, "birth_death")
        label = f"rate {rate:g} (ours)" if rate else "equal weights"
        _curves(left, run.tau, run.loss, label, place)
        if rate:
            _curves(right, run.tau, run.observables["effective_particles"], label, place)
    legend(figure, left)
    return figure


def _spec(cases: Sequence[str], draw: Any) -> FigureSpec:
    return FigureSpec("kim_suzuki", compute, ("reduced", *cases), draw, table)


FIGURES: dict[str, FigureSpec] = {
    "kim_suzuki_joint": _spec(_JOINT, draw_joint),
    "kim_suzuki_saddle": _spec(_SADDLE, draw_saddle),
    "kim_suzuki_prompts": _spec((*_PROMPT, "prompt_100_sampled"), draw_prompts),
    "kim_suzuki_birth_death": _spec(_BIRTHS, draw_birth_death),
}

load_data = functools.partial(figure_data, FIGURES)
