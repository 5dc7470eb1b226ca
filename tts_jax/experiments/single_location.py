"""The experiments of Marion, Berthier, Biau & Boyer (ICLR 2025, arXiv 2410.01537), and more.

`PUBLISHED` are the five of the paper: projected gradient descent from the manifold and from the
sphere, at a large, a small and a falling gain λ, and the last one on batches. `FAST` moves v faster
than k, `SCHEDULE` has other speeds of the schedule, and the basins start from a grid of (κ, ν).
Experiments and drawings go together as in `varpro`:

    data = compute(settings_of("single_location"), PUBLISHED)
    figure = draw_published(data)

A seed has *found* the solution if |κ| and |ν| are above 0.95 and of one sign, (k, v) ≈ ±(k*, v*).
Its roles are *swapped* if |η| is above 0.95 instead: k ≈ ±v*.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import plot
from tts_jax.experiments import _study
from tts_jax.experiments._figures import (
    Data,
    FigureSpec,
    OnResult,
    Table,
    each_case,
    figure_data,
    settings_from,
)
from tts_jax.experiments._panels import median_band


NEAR = 0.95


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        about: what it is, in a few words.
        gain: λ, of a schedule that at τ = 0.
        epsilon: ε; `None` eliminates v.
        step_size: h of the fast variable, of k where v is eliminated.
        end: the slow time at which it ends.
        start: of `SingleLocation`, or `"grid"`: a grid of (κ, ν) on the manifold, or `"around"`: a
            grid of small ones with random other overlaps.
        scheduled: whether λ falls like 1/(1 + τ).
        batch: whether steps are on batches of 5 prompts with d = 80 and noise 0.1.
        many: whether it has the seeds of a sweep.
    """

    about: str
    gain: float = 0.1
    epsilon: float | None = 1.0
    step_size: float = 4e-3
    end: float = 80.0
    start: str = "sphere"
    scheduled: bool = False
    batch: bool = False
    many: bool = False


def _fast(epsilon: float) -> Case:
    step = 4e-3 / max(1.0, epsilon)  # the larger of both steps is the published one
    return Case(f"ε = {epsilon:g}", epsilon=epsilon, step_size=step, many=True)


def _speed(epsilon: float) -> Case:
    return Case(f"ε = {epsilon:g}", 1.0, epsilon, end=12.0, scheduled=True, many=True)


CASES: dict[str, Case] = {
    "manifold": Case("from the manifold, λ = 0.1", start="manifold"),
    "large_gain": Case("from the sphere, λ = 0.9", 0.9, step_size=1e-3, end=120.0),
    "small_gain": Case("from the sphere, λ = 0.1"),
    "schedule": Case("from the sphere, falling λ", 1.0, 0.025, end=12.0, scheduled=True),
    "batches": Case(
        "batches, falling λ", 2.0, 0.1, step_size=1e-3, end=20.0, scheduled=True, batch=True
    ),
    "fast_4": _fast(4.0),
    "fast_2": _fast(2.0),
    "fast_1": _fast(1.0),
    "fast_half": _fast(0.5),
    "fast_quarter": _fast(0.25),
    "fast_eighth": _fast(0.125),
    "fast_limit": Case("v eliminated", epsilon=None, step_size=2e-2, many=True),
    "schedule_40": _speed(1.0),
    "schedule_16": _speed(0.4),
    "schedule_8": _speed(0.2),
    "schedule_4": _speed(0.1),
    "schedule_2": _speed(0.05),
    "schedule_1": _speed(0.025),
    "schedule_half": _speed(0.0125),
    "basins": Case("on the manifold", start="grid"),
    "basins_around": Case("around the manifold", start="around"),
}
PUBLISHED = ("manifold", "large_gain", "small_gain", "schedule", "batches")
FAST = tuple(name for name in CASES if name.startswith("fast_"))
SCHEDULE = tuple(name for name in CASES if name.startswith("schedule_"))
BASINS = ("basins", "basins_around")
ZOOM = 0.25  # κ and ν of the starts around the manifold


@dataclass(frozen=True)
class Settings:
    """The numbers of the experiments.

    Attributes:
        seeds: runs of each of the published experiments.
        hurry: the schedule on batches falls so many times faster, in so many times fewer steps.
        many: runs of each of a sweep.
        grid: points of κ, and of ν, of the basins; half as many around the manifold.
        draws: starts around each of these.
        records: recorded times, evenly spaced from 0.
        key: integer from which all random keys are made.
    """

    seeds: int = 30
    hurry: float = 5.0
    many: int = 100
    grid: int = 28
    draws: int = 8
    records: int = 101
    key: int = 0

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        return f"{len(methods)} runs of {self.seeds} and more seeds"

    def problem(self, case: Case) -> tts.SingleLocation | tts.ScheduledLocation:
        """The problem of a case."""
        kind = tts.ScheduledLocation if case.scheduled else tts.SingleLocation
        start = "manifold" if case.start == "manifold" else "sphere"
        options: dict[str, Any] = {"gain": case.gain, "start": start}
        if case.batch:
            options |= {"batch": 5, "dimension": 80, "noise": 0.1}
        return kind(**options)


_QUICK = Settings()
_PAPER = Settings(hurry=1.0, many=400, grid=60, draws=24)
SETTINGS: dict[str, dict[str, Settings]] = {"single_location": {"quick": _QUICK, "paper": _PAPER}}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def compute(
    settings: Settings,
    methods: Sequence[str] = PUBLISHED,
    *,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The runs of the given cases, by `each_case`.

    Returns:
        Case to trajectory, batch axis `[seeds]`; that of the basins is the grid, κ first, then ν,
        then the starts around each point.

    Raises:
        ValueError: an unknown case.
    """
    return each_case(CASES, methods, lambda case: _run(settings, case, progress), on_result)


def _run(settings: Settings, case: Case, progress: bool) -> tts.Trajectory:
    problem = settings.problem(case)
    hurry = settings.hurry if case.batch else 1.0
    step: dict[str, Any] = {"step_size": case.step_size}
    if case.epsilon is None:
        step["regime"] = "limit"
    else:
        step["epsilon"] = hurry * case.epsilon
    if case.start in ("grid", "around"):
        step["state"] = _starts(settings, case)
    else:
        count = settings.many if case.many else settings.seeds
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(settings.key), row))
        with jax.enable_x64(True):
            step["state"] = jax.vmap(lambda key: problem.init(key=key))(keys(np.arange(count)))
        # a start is all that the manifold has of its own: programs are shared
        problem = settings.problem(replace(case, start="sphere"))
    per_step = case.step_size * step.get("epsilon", 1.0)
    steps = np.rint(np.linspace(0, case.end / per_step, settings.records))
    if case.start in ("grid", "around"):
        steps = steps[[0, -1]]
    tau = np.unique(steps) * per_step
    run = tts.sgd(problem, key=jax.random.key(settings.key), tau=tau, progress=progress, **step)
    draws = settings.draws if case.start == "around" else 1
    return replace(run, settings=run.settings | {"draws": np.asarray(draws)})


def _axis(count: int, end: float) -> np.ndarray:
    """The midpoints of `count` intervals of [−end, end]."""
    return ((np.arange(count) + 0.5) * 2.0 / count - 1.0) * end


def _starts(settings: Settings, case: Case) -> tts.State:
    around = case.start == "around"
    axis = _axis(settings.grid // 2, ZOOM) if around else _axis(settings.grid, 1.0)
    problem = settings.problem(case)
    assert isinstance(problem, tts.SingleLocation)
    kappa, nu = (part.ravel() for part in np.meshgrid(axis, axis, indexing="ij"))
    if not around:
        return problem.state(kappa=kappa, nu=nu)
    # what else k and v have is random in the space across k*, and v* respectively
    rng = np.random.default_rng(settings.key)
    shape = (axis.size**2, settings.draws, problem.dimension)
    kappa, nu = (np.repeat(part[:, None], settings.draws, axis=1) for part in (kappa, nu))
    rest = []
    for place in (0, 1):
        drawn = rng.normal(size=shape)
        drawn[..., place] = 0.0
        rest.append(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))
    k = np.sqrt(1.0 - kappa**2)[..., None] * rest[0]
    v = np.sqrt(1.0 - nu**2)[..., None] * rest[1]
    rho = np.sum(k * v, axis=-1) + kappa * v[..., 0] + nu * k[..., 1]
    seen = {"kappa": kappa, "nu": nu, "theta": v[..., 0], "eta": k[..., 1], "rho": rho}
    return problem.state(**{name: part.ravel() for name, part in seen.items()})


# --- numbers --------------------------------------------------------------------------------


def _end(run: tts.Trajectory, name: str) -> np.ndarray:
    return np.asarray(run.observables[name])[:, -1]


def found(run: tts.Trajectory) -> Bool[np.ndarray, " seeds"]:
    """Which seeds end at ±(k*, v*)."""
    kappa, nu = _end(run, "kappa"), _end(run, "nu")
    return (np.abs(kappa) > NEAR) & (np.abs(nu) > NEAR) & (kappa * nu > 0)


def swapped(run: tts.Trajectory) -> Bool[np.ndarray, " seeds"]:
    """Which seeds end with k at ±v*."""
    return np.abs(_end(run, "eta")) > NEAR


def table(name: str, data: Mapping[str, tts.Trajectory], seconds: float) -> Table:
    """What the runs of a figure came to: medians over the seeds that reached the end."""
    header = (
        *("figure", "run", "λ", "ε", "seeds", "failed", "found", "swapped"),
        *("|κ|", "|ν|", "distance", "risk", "seconds"),
    )
    rows = []
    for case, run in data.items():
        good = np.asarray(run.success)
        ends = [np.median(np.abs(_end(run, seen)[good])) for seen in ("kappa", "nu")]
        ends.append(np.median(_end(run, "manifold_distance")[good]))
        ends.append(np.median(np.asarray(run.loss)[good, -1]))
        epsilon = float(np.ravel(run.settings["epsilon"])[0])
        rows.append(
            (
                name,
                case,
                f"{CASES[case].gain:g}" + ("/(1+τ)" if CASES[case].scheduled else ""),
                f"{epsilon:g}",
                f"{good.size}",
                f"{np.sum(~good)}",
                f"{np.sum(found(run))}",
                f"{np.sum(swapped(run))}",
                *(f"{end:.3g}" for end in ends),
                "" if rows else f"{seconds:.1f}",
            )
        )
    notes = (
        f"Found: |κ| and |ν| above {NEAR:g} and of one sign. Swapped: |η| above {NEAR:g}. Medians",
        "over the seeds that reached the end; the distance is that to the manifold θ = η = ρ = 0.",
    )
    return Table(header, rows, notes)


# --- drawings -------------------------------------------------------------------------------


def _curves(
    ax: Axes, run: tts.Trajectory, values: Any, label: str, place: int, band: bool = True
) -> None:
    """The median over seeds, and the band of 95 % of them unless there are several kinds."""
    dashes = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))[place % 4]
    color = plot.COLORS[place % len(plot.COLORS)]
    median_band(ax, run.tau, values, label, color, dashes, part=(0.025, 0.975) if band else None)


def _each(ax: Axes, run: tts.Trajectory, values: Any, label: str, place: int, mixed: bool) -> None:
    """Median and band, or every seed where outcomes are mixed."""
    if not mixed:
        return _curves(ax, run, values, label, place)
    lines = ax.plot(run.tau, np.asarray(values).T, color=plot.COLORS[place], lw=0.7, alpha=0.6)
    lines[0].set_label(label)
    return None


def _plane(ax: Axes) -> None:
    ax.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal", xlabel="κ", ylabel="ν")
    ax.set_xticks([-1, 0, 1])
    ax.set_yticks([-1, 0, 1])


@plot.theme()
def draw_published(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The five published experiments: excess risk, |κ| and |ν|, the way in the plane of κ and ν,
    and the distance to the manifold."""
    cases = [name for name in PUBLISHED if name in data]
    figure = plot.figure(9.6, 2.1 * len(cases))
    rows = figure.subplots(len(cases), 4, squeeze=False)
    for (risk, aligned, plane, distance), name in zip(rows, cases, strict=True):
        run, case = data[name], CASES[name]
        good = found(run)
        mixed = 0 < good.sum() < good.size
        _curves(risk, run, run.loss, "excess risk", 0)
        risk.set_ylabel(case.about, fontsize="small")
        risk.set_ylim(bottom=0.0)
        for place, (seen, label) in enumerate((("kappa", "|κ|"), ("nu", "|ν|"))):
            _each(aligned, run, np.abs(run.observables[seen]), label, place, mixed)
        aligned.set_ylim(-0.03, 1.05)
        kappa, nu = (np.asarray(run.observables[seen]) for seen in ("kappa", "nu"))
        for seed, hit in enumerate(good):
            color = plot.COLORS[2] if hit else plot.COLORS[1]
            plane.plot(kappa[seed], nu[seed], color=color, lw=0.7, alpha=0.7)
            plane.plot(kappa[seed, -1], nu[seed, -1], ".", color=color, ms=5)
        for ax in (risk, aligned, distance):
            ax.set_xlim(0.0, np.asarray(run.tau)[-1])
        _plane(plane)
        plane.set_title(f"{good.sum()} of {good.size} found", fontsize="small")
        far = np.asarray(run.observables["manifold_distance"])
        if np.any(far > 0.0):
            _each(distance, run, np.maximum(far, 1e-12), "distance to the manifold", 0, mixed)
            distance.set_yscale("log")
            distance.set_ylim(1e-9, 3.0)
        else:
            distance.set_yticks([])
            distance.text(0.5, 0.5, "0 to the last bit", ha="center", transform=distance.transAxes)
    for ax, title in zip(rows[0], ("excess risk", "alignment", "", "distance to M"), strict=True):
        if title:
            ax.set_title(title)
    for ax in (*rows[-1][:2], rows[-1][3]):
        ax.set_xlabel("slow time τ")
    rows[0][1].legend(fontsize="small", loc="center right")
    return figure


def _shares(ax: Axes, runs: Sequence[tts.Trajectory], at: Any) -> None:
    """The shares of seeds that found the solution, and that swapped roles, with 95 % intervals."""
    total = np.asarray(runs[0].success).size
    hits, swaps = (np.array([np.sum(tell(run)) for run in runs]) for tell in (found, swapped))
    kinds = [("found", hits, 2), ("roles swapped", swaps, 1)]
    if np.any(hits + swaps < total):
        kinds.append(("neither at the end", total - hits - swaps, 0))
    for label, counted, color in kinds:
        low, high = _study.wilson(counted, total)
        share, color = counted / total, plot.COLORS[color]
        ax.errorbar(
            at,
            share,
            (share - low, high - share),
            fmt="o-",
            ms=4,
            capsize=2,
            color=color,
            label=label,
        )
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("share of the seeds")


@plot.theme()
def draw_fast(data: Mapping[str, tts.Trajectory]) -> Figure:
    """v faster than k, at λ = 0.1 from the sphere: outcomes against ε, and one seed at ε = 1 and
    with v eliminated."""
    names = [name for name in FAST if name in data]
    figure = plot.figure(9.3, 3.0)
    left, *ways = figure.subplots(1, 3)
    known = [CASES[name].epsilon for name in names]
    least = min(epsilon for epsilon in known if epsilon is not None)
    at = [least / 2 if epsilon is None else epsilon for epsilon in known]
    _shares(left, [data[name] for name in names], at)
    left.set_xscale("log", base=2)
    left.set_xlabel("ε, speed of k over that of v")
    left.set_xticks(at, ["limit" if one is None else f"{one:g}" for one in known])
    left.legend(fontsize="small")
    joint, limit = data["fast_1"], data["fast_limit"]
    apart = np.flatnonzero(swapped(joint) & found(limit))
    seed = int(apart[0]) if apart.size else 0
    for ax, run, title in zip(ways, (joint, limit), ("ε = 1", "v eliminated"), strict=True):
        for place, (seen, label) in enumerate(
            (("kappa", "|κ|"), ("nu", "|ν|"), ("theta", "|θ|"), ("eta", "|η|"))
        ):
            dashes = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))[place]
            values = np.abs(np.asarray(run.observables[seen])[seed])
            ax.plot(run.tau, values, color=plot.COLORS[place], ls=dashes, label=label)
        ax.set(ylim=(-0.03, 1.05), xlabel="slow time τ", title=f"one start, {title}")
    ways[-1].legend(fontsize="small", loc="center right")
    plot.panel_letters([left, *ways])
    return figure


@plot.theme()
def draw_schedule(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The falling gain as a slow drift: outcomes, and the way, for several speeds."""
    names = [name for name in SCHEDULE if name in data]
    figure = plot.figure(9.3, 3.0)
    left, risk, distance = figure.subplots(1, 3)
    at = [CASES[name].epsilon for name in names]
    _shares(left, [data[name] for name in names], at)
    left.set_xscale("log")
    left.set_xlabel("ε, speed of the schedule")
    left.axvline(0.025, color="0.7", lw=0.8, zorder=0)
    left.legend(fontsize="small")
    for place, name in enumerate(names[::-2]):
        run = data[name]
        _curves(risk, run, np.abs(run.observables["kappa"]), CASES[name].about, place, False)
        far = np.maximum(np.asarray(run.observables["manifold_distance"]), 1e-12)
        _curves(distance, run, far, CASES[name].about, place, False)
    risk.set(ylim=(-0.03, 1.05), xlabel="slow time τ, λ = 1/(1 + τ)", title="|κ|, median")
    distance.set(yscale="log", ylim=(1e-9, 3.0), xlabel="slow time τ, λ = 1/(1 + τ)")
    distance.set_title("distance to the manifold, median")
    risk.legend(fontsize="small", loc="lower right")
    plot.panel_letters([left, risk, distance])
    return figure


@plot.theme()
def draw_basins(data: Mapping[str, tts.Trajectory]) -> Figure:
    """Where starts at (κ, ν) end on the manifold, and how many around it find the solution."""
    figure = plot.figure(8.2, 3.6)
    left, right = figure.subplots(1, 2)
    for ax, name, end in ((left, "basins", 1.0), (right, "basins_around", ZOOM)):
        run = data[name]
        hit, side = found(run), np.sign(_end(run, "kappa"))
        draws = 1 if name == "basins" else int(run.settings["draws"])
        count = int(np.sqrt(hit.size // draws))
        edges = np.linspace(-end, end, count + 1)
        if name == "basins":
            value, colors, ends = hit * side, "RdBu", (-1.4, 1.4)
        else:
            value, colors, ends = hit, "viridis", (0.0, 1.0)
        value = value.reshape(count, count, draws).mean(axis=-1)
        mesh = ax.pcolormesh(edges, edges, value.T, cmap=colors, vmin=ends[0], vmax=ends[1])
        mesh.set_rasterized(True)
        ticks = np.linspace(-end, end, 5)
        ax.set(xticks=ticks, yticks=ticks, aspect="equal")
        ax.set(xlabel="κ at τ = 0", ylabel="ν at τ = 0")
    left.set_title("on the manifold")
    right.set_title("around the manifold")
    figure.colorbar(mesh, ax=right, label="share that finds the solution", shrink=0.8)
    _field(left, data["basins"])
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for sign, text in ((1, "to (1, 1)"), (-1, "to (−1, −1)")):
        left.text(0.55 * sign, 0.55 * sign, text, ha="center", va="center", bbox=box)
    plot.panel_letters([left, right])
    return figure


def _field(ax: Axes, run: tts.Trajectory) -> None:
    """The velocity on the manifold, in the plane of κ and ν, all arrows of one length."""
    problem = tts.SingleLocation(gain=float(np.ravel(run.settings["gain"])[0]))
    axis = _axis(9, 1.0)
    kappa, nu = (part.ravel() for part in np.meshgrid(axis, axis))
    with jax.enable_x64(True):
        velocity = jax.vmap(problem.fields)(*problem.state(kappa=kappa, nu=nu))
    along = np.stack([np.asarray(velocity.slow)[:, 0], np.asarray(velocity.fast)[:, 1]])
    along = along / np.maximum(np.linalg.norm(along, axis=0), 1e-300)
    ax.quiver(kappa, nu, *along, color="0.15", angles="xy", scale=13, width=0.006, alpha=0.8)


def _spec(cases: Sequence[str], draw: Callable[..., Figure]) -> FigureSpec:
    return FigureSpec("single_location", compute, tuple(cases), draw, table)


FIGURES: dict[str, FigureSpec] = {
    "single_location_published": _spec(PUBLISHED, draw_published),
    "single_location_fast": _spec(FAST, draw_fast),
    "single_location_schedule": _spec(SCHEDULE, draw_schedule),
    "single_location_basins": _spec(BASINS, draw_basins),
}

load_data = functools.partial(figure_data, FIGURES)
