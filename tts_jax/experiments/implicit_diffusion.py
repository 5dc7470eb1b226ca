"""The experiment of Marion, Korba, Bartlett et al. (2024, arXiv 2402.05468), §5.1.

A Langevin sampler of six Gaussian modes is trained for a reward: by the single loop, one step of
the particles for each of the logits, by nested loops at the same number of particle steps, and by
the exact reduced flow that both approximate. Every case differs from a base in one or two
settings, so that figures share runs. Experiments and drawings go together as in `marion_berthier`:

    data = compute(settings_of("implicit_diffusion"), ("single", "limit"))
    figure = draw_weights(data)

Paper symbols: γ is the step of the particles, η that of the logits, β the weight of the
divergence KL(p_ref | π); ε = η/γ, and τ = η times the number of steps of the logits.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from tts_jax.experiments._panels import legend, median_band, nearest, setting


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How one run differs from the base.

    Attributes:
        dynamics: `"sgd"`, steps of particles and logits; `"exact"`, steps of the logits with exact
            samples; `"limit"`, the reduced flow.
        inner: steps of the particles for each of the logits.
        restart: whether the particles begin anew for each step of the logits.
        ratio: ε = η/γ; by default the base's.
        finer: the base's γ is divided by it.
        thinner: the base's number of particles is divided by it.
        penalised: whether there is the divergence.
        published: whether it has the released sign.
    """

    dynamics: str = "sgd"
    inner: int = 1
    restart: bool = False
    ratio: float | None = None
    finer: int = 1
    thinner: int = 1
    penalised: bool = False
    published: bool = False


RATIOS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 12.5, 50.0)
# the kinds of sweep: how much finer γ, how many fewer particles
SWEEPS = {"wide": (1, 1), "fine": (4, 1), "few": (4, 10)}


def _swept(kind: str, ratio: float) -> str:
    return f"{kind}_{ratio:g}"


CASES: dict[str, Case] = {
    "limit": Case("limit"),
    "exact": Case("exact"),
    "single": Case(),
    "nested": Case(inner=10),
    "nested_10": Case(inner=10, ratio=5.0),
    "nested_100": Case(inner=100, ratio=50.0),
    "restart_10": Case(inner=10, ratio=5.0, restart=True),
    "restart_100": Case(inner=100, ratio=50.0, restart=True),
    "penalised": Case(penalised=True),
    "penalised_limit": Case("limit", penalised=True),
    "released": Case(penalised=True, published=True),
    "released_limit": Case("limit", penalised=True, published=True),
}
CASES |= {
    _swept(kind, ratio): Case(ratio=ratio, finer=finer, thinner=thinner)
    for kind, (finer, thinner) in SWEEPS.items()
    for ratio in RATIOS
}


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiments.

    Attributes:
        particles: their number n.
        step_size: γ.
        ratio: ε = η/γ of the base.
        moves: steps of the particles in each run but those of a finer γ, which have more.
        penalty: β, where there is the divergence.
        seeds: number of runs.
        records: recorded times, evenly spaced from 0.
        key: integer from which all random keys are made.
    """

    particles: int = 1000
    step_size: float = 0.2
    ratio: float = 0.5
    moves: int = 5000
    penalty: float = 0.1
    seeds: int = 4
    records: int = 51
    key: int = 0

    @property
    def tau_end(self) -> float:
        """Where the base ends."""
        return self.moves * self.step_size * self.ratio

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return (
            f"{len(methods)} runs of {seeds}, {self.particles} particles moved {self.moves} times"
        )

    def problem(self, case: Case) -> tts.ImplicitDiffusion:
        """The problem of a case."""
        return tts.ImplicitDiffusion(
            particles=max(2, self.particles // case.thinner),
            penalty=self.penalty if case.penalised else 0.0,
            published_sign=case.published,
        )

    def epsilon(self, case: Case) -> float:
        """ε of a case."""
        return self.ratio if case.ratio is None else case.ratio

    def tau(self, case: Case) -> np.ndarray:
        """Recorded times of a case: to where as many moves of the particles bring it."""
        end = self.tau_end
        if case.dynamics == "sgd":
            speed = self.epsilon(case) / (self.ratio * case.inner)
            # with its ratio alone a run covers the same time by other numbers of steps
            end *= speed if case.inner > 1 else 1.0
        return np.linspace(0.0, end, self.records)


_QUICK = Settings(seeds=2)
_PAPER = Settings(seeds=8, records=101)
SETTINGS: dict[str, dict[str, Settings]] = {
    "implicit_diffusion": {"quick": _QUICK, "paper": _PAPER}
}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    methods: Sequence[str] = ("single", "limit"),
    *,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The runs of the given cases, by `each_case`.

    Returns:
        Case to trajectory, batch axis `[seeds]`, of the reduced flows none. Beside the problem's
        observables it has `gap`, E_π(θ) R less that of the reduced flow at the same τ.

    Raises:
        ValueError: an unknown case.
        RuntimeError: a reduced flow could not be computed to the end.
    """
    flows: dict[tuple[bool, bool], tts.Trajectory] = {}

    def one(case: Case) -> tts.Trajectory:
        kind = case.penalised, case.published
        if kind not in flows:
            flows[kind] = _reduced(settings, case)
        flow = flows[kind]
        run = flow if case.dynamics == "limit" else _run(settings, case, progress)
        ideal = np.interp(run.tau, flow.tau, np.asarray(flow.observables["expected_reward"]))
        gap = np.asarray(run.observables["expected_reward"]) - ideal
        return replace(
            run,
            observables=run.observables | {"gap": gap},
            settings=run.settings | {"inner": np.asarray(case.inner)},
        )

    return each_case(CASES, methods, one, on_result)


def _reduced(settings: Settings, case: Case) -> tts.Trajectory:
    """The reduced flow, densely recorded; particles play no part in it."""
    problem = replace(settings.problem(case), particles=min(200, settings.particles))
    start = problem.init(key=jax.random.key(settings.key))
    return tts.limit(problem, start, tau=np.linspace(0.0, settings.tau_end, 501), throw=True)


def _run(settings: Settings, case: Case, progress: bool) -> tts.Trajectory:
    epsilon, step_size = settings.epsilon(case), settings.step_size / case.finer
    given: dict[str, Any] = {"step_size": step_size, "epsilon": epsilon}
    if case.dynamics == "exact":
        given = {"regime": "limit", "step_size": step_size * epsilon}
    elif case.restart:
        given |= {"regime": tts.regime.Inner(case.inner, restart=True)}
    else:
        given |= {"regime": tts.regime.Inner(case.inner)}
    if case == Case():
        given |= {"observe_every": max(1, settings.moves // 50)}
    return tts.sgd(
        settings.problem(case),
        key=jax.random.key(settings.key),
        seeds=settings.seeds,
        tau=settings.tau(case),
        dtype=np.float32,  # as published
        progress=progress,
        **given,
    )


# --- numbers --------------------------------------------------------------------------------


def _moves(run: tts.Trajectory) -> np.ndarray:
    """How often the particles had moved at the recorded times."""
    step = setting(run, "epsilon") * setting(run, "step_size")
    return np.asarray(run.tau) / step * setting(run, "inner")


def _seen(run: tts.Trajectory, name: str) -> np.ndarray:
    """An observable `[seeds, T, ...]`, of a run without seeds as one of one."""
    values = np.asarray(run.observables[name])
    return values if np.ndim(run.status) else values[None]


def largest_gap(run: tts.Trajectory) -> np.ndarray:
    """The largest distance of E_π(θ) R to that of the reduced flow, `[seeds]`."""
    return np.max(np.abs(_seen(run, "gap")), axis=1)


def leaving_ratio(flow: tts.Trajectory) -> float:
    """The ratio ε whose separation number comes to 1 at the worst time of a reduced flow."""
    problem = tts.ImplicitDiffusion(particles=int(np.shape(flow.fast)[-1]))
    every = slice(None, None, max(1, len(np.asarray(flow.tau)) // 50))
    state = tts.State(np.asarray(flow.fast)[every], np.asarray(flow.slow)[every])
    return 1.0 / float(np.max(tts.separation(problem, state)))


def table(name: str, data: Mapping[str, tts.Trajectory], seconds: float) -> Table:
    """What the runs of a figure came to: medians over the seeds that reached the end."""
    header = (
        *("figure", "run", "n", "γ", "η", "k", "β", "seeds", "failed"),
        *("reward", "E R", "at 60°", "KL", "largest gap", "seconds"),
    )
    rows = []
    for case, run in data.items():
        good = np.atleast_1d(np.asarray(run.success))
        names = ("mean_reward", "expected_reward", "weights", "divergence")
        ends = [_seen(run, one)[good][:, -1] for one in names]
        ends[2] = ends[2][..., 1]
        ends.append(largest_gap(run)[good])
        steps = run.method == "sgd" and setting(run, "epsilon") > 0
        rows.append(
            (
                name,
                case,
                f"{np.shape(run.fast)[-1]}",
                f"{setting(run, 'step_size'):g}" if steps else "-",
                f"{setting(run, 'epsilon') * setting(run, 'step_size'):g}" if steps else "-",
                f"{setting(run, 'inner'):g}" if steps else "-",
                f"{setting(run, 'penalty'):g}",
                f"{good.size}",
                f"{np.sum(~good)}",
                *(f"{np.median(end):.3g}" if end.size else "nan" for end in ends),
                "" if rows else f"{seconds:.1f}",
            )
        )
    notes = (
        "Reward is the mean over the particles at the end, E R that of π(θ), exact, KL that of",
        "p_ref to π(θ); medians over the seeds that reached the end. The largest gap is that of",
        "E R to the reduced flow over the recorded times. Seconds are those of runs not shared",
        "with a figure above.",
    )
    return Table(header, rows, notes)


# --- drawings -------------------------------------------------------------------------------

_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))


_BUDGET = {
    "single": "single loop",
    "nested": "10 inner steps, η",
    "nested_10": "10 inner steps, 10 η",
    "nested_100": "100 inner steps, 100 η",
    "restart_10": "10 from anew, 10 η",
    "restart_100": "100 from anew, 100 η",
}


@plot.theme()
def draw_budget(data: Mapping[str, tts.Trajectory]) -> Figure:
    """E_π(θ) R against the number of particle steps, and against τ beside the reduced flow."""
    figure = plot.figure(8.4, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (case, label) in enumerate(_BUDGET.items()):
        run = data[case]
        dashes = _DASHES[place % 4] if place < 4 else "-"
        values, color = _seen(run, "expected_reward"), plot.COLORS[place]
        median_band(left, _moves(run), values, label, color, dashes)
        median_band(right, run.tau, values, label, color, dashes)
    limit = data["limit"]
    values = _seen(limit, "expected_reward")
    median_band(right, limit.tau, values, "reduced flow", plot.TARGET_COLOR, (0, (1, 1.2)))
    left.set(xlabel="steps of the particles", ylabel="expected reward of π(θ)")
    right.set(xlabel="slow time τ")
    plot.panel_letters([left, right])
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


@plot.theme()
def draw_weights(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Rewards and weights of the modes against τ: single loop, exact samples, reduced flow."""
    figure = plot.figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    single, limit = data["single"], data["limit"]
    particles = _seen(single, "mean_reward")
    median_band(left, single.tau, particles, "particles", plot.COLORS[5])
    for place, (case, label) in enumerate(
        {"single": "single loop", "exact": "exact samples"}.items()
    ):
        run = data[case]
        values = _seen(run, "expected_reward")
        median_band(left, run.tau, values, label, plot.COLORS[place], _DASHES[place])
    values = _seen(limit, "expected_reward")
    median_band(left, limit.tau, values, "reduced flow", plot.TARGET_COLOR, (0, (1, 1.2)))
    left.set(xlabel="slow time τ", ylabel="reward")
    left.legend(loc="lower right")
    for mode, color in enumerate(plot.COLORS):
        values = _seen(single, "weights")[..., mode]
        median_band(right, single.tau, values, f"{60 * mode}°", color)
        flow = _seen(limit, "weights")[0, :, mode]
        right.plot(limit.tau, flow, color=plot.TARGET_COLOR, ls=(0, (1, 1.2)), lw=1.0)
    right.set(xlabel="slow time τ", ylabel="weight of the mode", yscale="log")
    right.legend(ncols=3, loc="lower left")
    plot.panel_letters([left, right])
    return figure


@plot.theme()
def draw_particles(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The particles of seed 0 at four times, the density of π(θ), and where the reward is."""
    run = data["single"]
    side = np.linspace(-8.0, 8.0, 121)
    x = jnp.asarray(np.stack(np.meshgrid(side, side)).reshape(2, -1))
    problem = tts.ImplicitDiffusion()
    reward = np.asarray(problem.rewards(x)).reshape(side.size, side.size)
    end = np.asarray(run.tau)[-1]
    shown = [nearest(run, part * end) for part in (0.0, 0.1, 0.4, 1.0)]
    figure = plot.figure(9.3, 2.9)
    panels = list(np.ravel(figure.subplots(1, 4, sharey=True)))
    for ax, at in zip(panels, shown, strict=True):
        potential = problem.potential(x, jnp.asarray(run.slow)[0, at])
        density = np.exp(-np.asarray(potential)).reshape(side.size, side.size)
        ax.contourf(side, side, reward, levels=10, cmap="Greys", alpha=0.45, zorder=0)
        points = np.asarray(run.fast)[0, at]
        ax.plot(points[0], points[1], ".", ms=2.0, alpha=0.5, color=plot.COLORS[0])
        levels = np.array([1e-3, 1e-2, 1e-1, 0.5])
        ax.contour(side, side, density, levels=levels, colors=plot.COLORS[1], linewidths=0.9)
        ax.set(xlim=(-8, 8), ylim=(-8, 8), aspect="equal", xlabel="x₁")
        ax.set_title(f"τ = {np.asarray(run.tau)[at]:.3g}")
        ax.grid(visible=False)
    panels[0].set_ylabel("x₂")
    return figure


@plot.theme()
def draw_ratio(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Distance to the reduced flow against η/γ, and E_π(θ) R against τ at some ratios."""
    figure = plot.figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    for place, kind in enumerate(SWEEPS):
        runs = [data[_swept(kind, ratio)] for ratio in RATIOS]
        gaps = np.stack([largest_gap(run) for run in runs], axis=1)
        label = f"γ = {setting(runs[0], 'step_size'):g}, n = {np.shape(runs[0].fast)[-1]}"
        median_band(left, RATIOS, gaps, label, plot.COLORS[place], _DASHES[place])
    leaves = leaving_ratio(data["limit"])
    left.axvline(leaves, color=plot.TARGET_COLOR, lw=0.8, ls=(0, (5, 1.5)))
    left.text(1.08 * leaves, left.get_ylim()[0], "ε_eff = 1", va="bottom", fontsize=8)
    first = np.median(largest_gap(data[_swept("fine", RATIOS[0])]))
    slope = np.array(RATIOS[:4])
    left.plot(
        slope, first * slope / slope[0], color=plot.TARGET_COLOR, ls=(0, (1, 1.2)), label="∝ ε"
    )
    left.set(xlabel="ratio of the steps, ε = η/γ", ylabel="largest gap", xscale="log", yscale="log")
    left.legend(loc="lower right")
    for place, ratio in enumerate((0.1, 0.5, 1.0, 2.5, 50.0)):
        run = data[_swept("fine", ratio)]
        values = _seen(run, "expected_reward")
        median_band(right, run.tau, values, f"ε = {ratio:g}", plot.COLORS[place])
    limit = data["limit"]
    values = _seen(limit, "expected_reward")
    median_band(right, limit.tau, values, "reduced flow", plot.TARGET_COLOR, (0, (1, 1.2)))
    step = setting(data[_swept("fine", 0.1)], "step_size")
    right.set(xlabel="slow time τ", ylabel="expected reward of π(θ)", title=f"γ = {step:g}")
    right.legend(loc="upper left")
    plot.panel_letters([left, right])
    return figure


@plot.theme()
def draw_penalty(data: Mapping[str, tts.Trajectory]) -> Figure:
    """KL(p_ref | π) and E_π(θ) R against τ with both signs, beside the reduced flows."""
    figure = plot.figure(8.4, 3.2)
    panels = list(figure.subplots(1, 2))
    for ax, name in zip(panels, ("divergence", "expected_reward"), strict=True):
        for place, (case, label) in enumerate(
            {"penalised": "subtracted", "released": "as released"}.items()
        ):
            run, flow, color = data[case], data[f"{case}_limit"], plot.COLORS[place]
            median_band(ax, run.tau, _seen(run, name), label, color)
            median_band(
                ax, flow.tau, _seen(flow, name), f"{label}, reduced flow", color, (0, (1, 1.2))
            )
        ax.set_xlabel("slow time τ")
    panels[0].set_ylabel("KL(p_ref | π)")
    panels[1].set_ylabel("expected reward of π(θ)")
    plot.panel_letters(panels)
    legend(figure, panels[0])
    return figure


def _spec(cases: Sequence[str], draw: Callable[..., Figure]) -> FigureSpec:
    return FigureSpec("implicit_diffusion", compute, tuple(cases), draw, table)


_RATIOS = tuple(_swept(kind, ratio) for kind in SWEEPS for ratio in RATIOS)
_SIGNS = ("penalised", "penalised_limit", "released", "released_limit")

FIGURES: dict[str, FigureSpec] = {
    "implicit_diffusion_budget": _spec((*_BUDGET, "limit"), draw_budget),
    "implicit_diffusion_weights": _spec(("single", "exact", "limit"), draw_weights),
    "implicit_diffusion_particles": _spec(("single",), draw_particles),
    "implicit_diffusion_ratio": _spec((*_RATIOS, "limit"), draw_ratio),
    "implicit_diffusion_penalty": _spec(_SIGNS, draw_penalty),
}

load_data = functools.partial(figure_data, FIGURES)
