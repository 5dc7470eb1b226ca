"""The figures of Marion & Berthier (2023, arXiv 2304.09576): settings, data, drawings.

An experiment is a function from settings to data (a dict of trajectories), a drawing is a
function from data to a Figure:

    data = two_timescale(scale="quick", seeds=16)
    figure = draw_figure3(data)

Data that were saved draw the same: `draw_figure3(load_data("results", "figure3"))`.
Paper symbols: ε is the ratio of the slow to the fast step size, h the fast step size, η the
width of a neuron's step, τ = εhk the slow time of step k.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import checks, plot
from tts_jax.experiments._figures import (
    Data,
    FigureSpec,
    OnResult,
    Scale,
    figure_data,
    settings_from,
)
from tts_jax.experiments._panels import (
    GRID,
    jumps_of,
    legend,
    nearest,
    number,
    one_seed,
    problem_of,
)
from tts_jax.experiments.sketches import draw_figure1, draw_figure2, draw_proof


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The numbers of one experiment.

    Attributes:
        epsilon: the timescale separations ε, one run each.
        step_size: step size h of the fast variable.
        tau_end: last slow time.
        seeds: number of independent runs per ε.
        records: number of recorded times, evenly spaced from 0 to `tau_end` unless `early` is set.
        snapshots: slow times whose networks are drawn.
        published_start: whether seed 0 starts from the published positions.
        neurons: number m of neurons.
        eta: width η of a neuron's step, in units of x.
        noise: half-width of the uniform label noise.
        jumps: jumps of the target.
        values: levels of the target, one more than the jumps.
        gradient: estimator of the sample gradient; `"box"` is that of the published code.
        key: integer from which all random keys are made.
        positions: where the neurons of seed 0 start, if neither there nor at random.
        early: if positive, the recorded times are evenly spaced in arcsinh(τ/`early`): densely up
            to about `early`, then by a constant factor.
    """

    epsilon: tuple[float, ...]
    step_size: float
    tau_end: float
    seeds: int
    records: int = 201
    snapshots: tuple[float, ...] = ()
    published_start: bool = True
    neurons: int = 20
    eta: float = 4e-3
    noise: float = 1.0
    jumps: tuple[float, ...] = tuple(float(place) for place in np.linspace(0.2, 0.8, 5))
    values: tuple[float, ...] = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)
    gradient: str = "box"
    key: int = 0
    positions: tuple[float, ...] = ()
    early: float = 0.0

    @property
    def steps(self) -> int:
        """SGD steps of one seed, over all ε."""
        return sum(round(self.tau_end / (epsilon * self.step_size)) for epsilon in self.epsilon)

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what `methods` have to do."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{seeds}, {self.steps:.4g} SGD steps each" if "sgd" in methods else seeds

    def problem(self) -> tts.Univariate:
        """The learning problem."""
        target = tts.PiecewiseConstant(jumps=self.jumps, values=self.values)
        return tts.Univariate(target, neurons=self.neurons, eta=self.eta, noise=self.noise)

    def tau(self) -> np.ndarray:
        """Recorded slow times, `[records]`."""
        if not self.early:
            return np.linspace(0.0, self.tau_end, self.records)
        even = np.linspace(0.0, np.arcsinh(self.tau_end / self.early), self.records)
        return np.append(self.early * np.sinh(even[:-1]), self.tau_end)

    def start(self) -> tts.State:
        """The starts, `[seeds, ...]`: zero weights, sorted uniform positions.

        Seed i draws its positions from a key folded from `key` and i; with `published_start`
        seed 0 has those of the published runs, NumPy's generator seeded with 42, or `positions`.
        """
        problem, key = self.problem(), jax.random.key(self.key)
        slow = np.stack(
            [
                np.asarray(problem.init(key=jax.random.fold_in(key, seed)).slow)
                for seed in range(self.seeds)
            ]
        ).astype(np.float64)
        if self.published_start:
            published = np.random.RandomState(42).rand(self.neurons)
            slow[0] = np.sort(self.positions or published)
        return problem.state(slow=slow)


_TWO_TIMESCALE = Settings(
    epsilon=(2e-5,),
    step_size=1e-3,
    tau_end=0.035,
    seeds=32,
    snapshots=(0.0, 0.00035, 0.007, 0.035),
)
_SAME_RATE = Settings(
    epsilon=(1.0,), step_size=1e-5, tau_end=10.0, seeds=32, snapshots=(0.1, 1.0, 10.0)
)
# A step of h = 1e-4 would move a neuron by η/2 at once for ε = 0.01 and show that noise instead.
_EPSILON = Settings(
    epsilon=(0.01, 0.1, 1.0),
    step_size=1e-5,
    tau_end=3.0,
    seeds=64,
    records=31,
    published_start=False,
)
# Targets and positions of the published sketches; their weights are not taken over.
_NOTATION = Settings(
    epsilon=(0.1,),
    step_size=1e-3,
    tau_end=0.03,
    seeds=1,
    neurons=3,
    eta=0.1,
    noise=0.0,
    jumps=(0.35, 0.78),
    values=(0.1, 0.95, 0.65),
    positions=(0.2, 0.4, 0.65),
)
_DYNAMICS = replace(
    _NOTATION,
    epsilon=(1e-3,),
    tau_end=2.0,
    neurons=7,
    eta=1e-3,
    positions=(0.13, 0.22, 0.43, 0.52, 0.58, 0.7, 0.91),
)
_PROOF = replace(
    _DYNAMICS,
    epsilon=(0.01,),
    eta=0.05,
    jumps=(0.5,),
    values=(0.2, 0.9),
    positions=(0.13, 0.25, 0.37, 0.68, 0.75, 0.85, 0.91),
)
SETTINGS: dict[str, dict[str, Settings]] = {
    "notation": {"quick": _NOTATION, "paper": _NOTATION},
    "dynamics": {"quick": _DYNAMICS, "paper": _DYNAMICS},
    "proof": {"quick": _PROOF, "paper": _PROOF},
    "two_timescale": {"quick": _TWO_TIMESCALE, "paper": replace(_TWO_TIMESCALE, step_size=1e-5)},
    "same_rate": {"quick": _SAME_RATE, "paper": _SAME_RATE},
    "epsilon_boxes": {"quick": _EPSILON, "paper": _EPSILON},
}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def two_timescale(
    scale: Scale = "quick",
    *,
    seeds: int | None = None,
    settings: Settings | None = None,
    methods: Sequence[str] = ("sgd", "flow", "limit", "sharp_limit"),
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """Figures 3 and 4: the two-timescale regime, ε = 2e-5, by SGD and by what it should follow.

    Args:
        scale: `"paper"` takes the paper's step size, 1.75e8 steps; `"quick"` the published
            quick configuration, 1.75e6 steps.
        seeds: number of seeds; all methods start from the same positions.
        settings: takes the place of `scale`'s settings.
        methods: which of `"sgd"`, `"flow"`, `"limit"`, `"sharp_limit"` to compute.
        progress: show a progress bar of SGD.
        on_result: called with the name and trajectory of each method as soon as it is there.

    Returns:
        Method to trajectory, batch axis `[seeds]`.

    Raises:
        ValueError: a bad argument.
    """
    settings = _with_seeds(settings, seeds) or settings_of("two_timescale", scale, seeds)
    return _compare(settings, methods, progress, on_result)


def same_rate(
    scale: Scale = "quick",
    *,
    seeds: int | None = None,
    settings: Settings | None = None,
    methods: Sequence[str] = ("sgd", "flow"),
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """Figure 5: one learning rate for both layers, ε = 1, by SGD and by the gradient flow.

    Arguments, result and errors are those of `two_timescale`; both scales are the paper's.
    """
    settings = _with_seeds(settings, seeds) or settings_of("same_rate", scale, seeds)
    return _compare(settings, methods, progress, on_result)


def epsilon_boxes(
    scale: Scale = "quick",
    *,
    seeds: int | None = None,
    settings: Settings | None = None,
    methods: Sequence[str] = ("sgd",),
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """Figure 7: the final loss of SGD for several ε.

    Seed i has the same start and the same samples at every ε. Arguments and errors are those
    of `two_timescale`, with SGD the only method.

    Returns:
        `"sgd_epsilon_<ε>"` to trajectory, batch axis `[seeds]`.
    """
    for name in methods:
        checks.one_of("methods", name, ("sgd",))
    settings = _with_seeds(settings, seeds) or settings_of("epsilon_boxes", scale, seeds)
    data: Data = {}
    for epsilon in settings.epsilon:
        name = f"sgd_epsilon_{epsilon:g}"
        data[name] = _sgd(settings, epsilon, progress)
        if on_result is not None:
            on_result(name, data[name])
    return data


def sketch(
    scale: Scale = "quick",
    *,
    settings: Settings,
    methods: Sequence[str] = ("flow",),
    seeds: int | None = None,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """Figures 1 and 2 and the sketch of the proof: small networks with visible steps.

    Args:
        scale: of no account; the sketches have one.
        settings: `settings_of("notation")`, `settings_of("dynamics")` or `settings_of("proof")`.

    The other arguments, result and errors are those of `two_timescale`.
    """
    return _compare(_with_seeds(settings, seeds) or settings, methods, progress, on_result)


def _with_seeds(settings: Settings | None, seeds: int | None) -> Settings | None:
    if settings is None or seeds is None:
        return settings
    remedy = "Leave it out to take that of `settings`."
    return replace(settings, seeds=checks.positive_integer("seeds", seeds, remedy))


def _sgd(settings: Settings, epsilon: float, progress: bool) -> tts.Trajectory:
    return tts.sgd(
        settings.problem(),
        key=jax.random.key(settings.key),
        state=settings.start(),
        epsilon=epsilon,
        step_size=settings.step_size,
        tau=settings.tau(),
        gradient=settings.gradient,
        progress=progress,
    )


def _compare(
    settings: Settings, methods: Sequence[str], progress: bool, on_result: OnResult | None
) -> Data:
    """Each method from the same starts over the same slow times, at the only ε."""
    problem, start, tau = settings.problem(), settings.start(), settings.tau()
    (epsilon,) = settings.epsilon
    compute: dict[str, Callable[[], tts.Trajectory]] = {
        "sgd": lambda: _sgd(settings, epsilon, progress),
        "flow": lambda: tts.flow(problem, start, epsilon=epsilon, tau=tau),
        "limit": lambda: tts.limit(problem, start, tau=tau),
        "sharp_limit": lambda: tts.sharp_limit(problem, start, tau=tau),
    }
    for name in methods:
        checks.one_of("methods", name, compute)
    data: Data = {}
    # the others compile and solve beside SGD, which leaves cores idle where seeds are few
    pool = ThreadPoolExecutor(1)
    try:
        beside = {name: pool.submit(compute[name]) for name in methods if name != "sgd"}
        for name in methods:
            data[name] = beside[name].result() if name in beside else compute[name]()
            if on_result is not None:
                on_result(name, data[name])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return data


# --- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the seeds of one trajectory came to at its last time.

    Attributes:
        epsilon: ε of the run, 0 for a limit.
        tau: last slow time.
        seeds: number of seeds.
        failed: seeds that did not reach the last time.
        loss: median loss of the others, NaN if there are none.
        recovered: mean number of jumps with a neuron within η (or the problem's own radius), over
            the seeds that ended; NaN for a problem that has no radius.
        jumps: number of jumps of the target.
        all_recovered: share of the seeds that ended with every jump recovered.
    """

    epsilon: float
    tau: float
    seeds: int
    failed: int
    loss: float
    recovered: float
    jumps: int
    all_recovered: float


def outcome(trajectory: tts.Trajectory) -> Outcome:
    """Loss and recovered jumps at the last recorded time."""
    good = np.atleast_1d(np.asarray(trajectory.success))
    loss = np.atleast_2d(np.asarray(trajectory.loss))[:, -1]
    distance = np.asarray(trajectory.observables["recovery"])
    distance = np.take(distance, -1, axis=np.ndim(trajectory.status)).reshape(good.size, -1)
    settings = trajectory.settings
    radius = float(np.asarray(settings.get("goal_radius", settings["eta"])))
    found = distance <= radius
    some = bool(good.any())
    defined = some and not np.isnan(radius)
    return Outcome(
        epsilon=_epsilon(trajectory),
        tau=float(np.asarray(trajectory.tau)[-1]),
        seeds=int(good.size),
        failed=int(np.sum(~good)),
        loss=float(np.median(loss[good])) if some else float("nan"),
        recovered=float(np.mean(np.sum(found[good], axis=1))) if defined else float("nan"),
        jumps=int(distance.shape[1]),
        all_recovered=float(np.mean(np.all(found[good], axis=1))) if defined else float("nan"),
    )


def _epsilon(trajectory: tts.Trajectory) -> float:
    return float(np.ravel(np.asarray(trajectory.settings.get("epsilon", 0.0)))[0])


# --- drawings -------------------------------------------------------------------------------


def draw_figure3(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """The SGD network of seed 0 at four times, with its neurons, in the two-timescale regime.

    Args:
        data: the answer of `two_timescale`; needs `"sgd"`.
        times: the slow times to draw, by default those of the settings; each is moved to the
            nearest recorded time.
    """
    sgd = data["sgd"]
    with plot.theme():
        drawing = plot.figure(7.2, 4.9)
        panels = list(drawing.subplots(2, 2, sharex=True, sharey=True).flat)
        wanted = _spread(times or _TWO_TIMESCALE.snapshots, sgd, len(panels))
        for ax, tau in zip(panels, wanted, strict=True):
            _snapshot(ax, {"sgd": sgd}, tau, neurons=True)
            ax.label_outer()
        legend(drawing, panels[-1])
        plot.panel_letters(panels)
    return drawing


def draw_figure4(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """SGD against the gradient flow and the two-timescale limits.

    Left: networks of seed 0; middle: losses of seed 0 and of all seeds (median, and the band
    that holds 80 % of them); right: neuron trajectories of seed 0.

    Args:
        data: the answer of `two_timescale`; needs `"sgd"` and `"limit"`, draws the others
            where they are there.
        times: the two slow times of the networks.
    """
    with plot.theme():
        drawing = plot.figure(10.4, 5.2)
        panels = drawing.subplot_mosaic(
            [["early", "one", "path"], ["late", "all", "path"]], width_ratios=[1.0, 1.0, 1.15]
        )
        pair = {name: data[name] for name in ("sgd", "limit")}
        wanted = _spread(times or _TWO_TIMESCALE.snapshots[2:], data["sgd"], 2)
        for name, tau in zip(("early", "late"), wanted, strict=True):
            _snapshot(panels[name], pair, tau)

        order = [name for name in ("sgd", "flow", "limit", "sharp_limit") if name in data]
        ended = [name for name in order if bool(np.ravel(data[name].success)[0])]
        first = {name: _first_loss(data[name]) for name in ended}
        plot.losses(first, legend=False, ax=panels["one"])
        panels["one"].set_title("seed 0", loc="right")
        many = [name for name in order if name != "sharp_limit"]
        seeds = {name: _all_losses(data[name]) for name in many}
        plot.losses(seeds, legend=False, ax=panels["all"])
        panels["all"].set_title(_seeds_title(data["sgd"]), loc="right")
        _floor([panels["one"], panels["all"]], data)

        plot.positions(
            {name: (data[name].tau, one_seed(data[name].slow)) for name in pair},
            jumps=jumps_of(data["sgd"]),
            legend=False,
            ax=panels["path"],
        )
        panels["path"].set_title("neurons of seed 0, jumps of the target", loc="right")
        legend(drawing, panels["one"], panels["early"])
        plot.panel_letters([panels[name] for name in ("early", "late", "one", "all", "path")])
    return drawing


def draw_figure5(data: Mapping[str, tts.Trajectory], *, times: Sequence[float] = ()) -> Figure:
    """One learning rate for both layers: SGD networks of seed 0, and the loss of all seeds.

    Args:
        data: the answer of `same_rate`; needs `"sgd"`.
        times: the three slow times of the networks.
    """
    sgd = data["sgd"]
    with plot.theme():
        drawing = plot.figure(7.2, 5.2)
        panels = list(drawing.subplots(2, 2).flat)
        wanted = _spread(times or _SAME_RATE.snapshots, sgd, 3)
        for ax, tau in zip(panels, wanted, strict=False):
            _snapshot(ax, {"sgd": sgd}, tau, neurons=True)
        _mark_missed(panels[2], sgd)
        legend(drawing, panels[2])
        names = [name for name in ("sgd", "flow") if name in data]
        plot.losses({name: _all_losses(data[name]) for name in names}, legend=False, ax=panels[3])
        panels[3].set_title(_seeds_title(sgd), loc="right")
        panels[3].legend(loc="upper right")
        plot.panel_letters(panels)
    return drawing


def draw_figure7(data: Mapping[str, tts.Trajectory]) -> Figure:
    """The final loss of the seeds for each ε.

    Args:
        data: the answer of `epsilon_boxes`.
    """
    with plot.theme():
        drawing = plot.figure(4.4, 3.4)
        ax = drawing.subplots()
        runs = list(data.values())
        plot.boxes({_epsilon(run): np.asarray(run.loss)[..., -1] for run in runs}, ax=ax)
        seeds = max(int(np.size(run.status)) for run in runs)
        ax.set_title(f"SGD at τ = {number(float(np.asarray(runs[0].tau)[-1]))}, {seeds} seeds")
    return drawing


def _snapshot(
    ax: Axes, data: Mapping[str, tts.Trajectory], tau: float, *, neurons: bool = False
) -> None:
    """Networks of seed 0 at the recorded time nearest to τ, against the target."""
    curves, marks, shown = {}, None, tau
    for name, trajectory in data.items():
        index = nearest(trajectory, tau)
        fast, slow = one_seed(trajectory.fast)[index], one_seed(trajectory.slow)[index]
        curves[name] = (GRID, np.asarray(problem_of(trajectory).predict(fast, slow, GRID)))
        if marks is None:
            marks, shown = slow[np.isfinite(slow)], float(np.asarray(trajectory.tau)[index])
    reference = next(iter(data.values()))
    values = np.asarray(reference.settings["values"])
    plot.network(
        curves,
        target=(jumps_of(reference), values),
        neurons=marks if neurons else None,
        legend=False,
        ax=ax,
    )
    low, high = min(0.0, float(values.min())), float(values.max())
    ax.set_ylim(low - 0.1 * (high - low), high + 0.14 * (high - low))
    ax.set_title(f"τ = {number(shown)}", loc="right")


def _mark_missed(ax: Axes, trajectory: tts.Trajectory) -> None:
    """An arrowhead over each jump that seed 0 has not recovered at the last time."""
    distance = one_seed(trajectory.observables["recovery"])[-1]
    missed = ~(distance <= float(np.asarray(trajectory.settings["eta"])))
    mark_missed(ax, jumps_of(trajectory)[missed])


def mark_missed(ax: Axes, missed: np.ndarray, *, side: str = "top") -> None:
    """An arrowhead at the `"top"` or `"right"` side of the panel for each jump in `missed`."""
    edge = np.full(missed.size, 0.965)
    if missed.size:
        ax.plot(
            *((missed, edge) if side == "top" else (edge, missed)),
            transform=ax.get_xaxis_transform() if side == "top" else ax.get_yaxis_transform(),
            linestyle="none",
            marker="v" if side == "top" else "<",
            markersize=6.0,
            color=plot.METHODS["flow"].color,
            label="missed jump",
            zorder=4.0,
        )


def _floor(panels: Sequence[Axes], data: Mapping[str, tts.Trajectory]) -> None:
    """One loss axis for all panels; the loss of the sharp limit may fall to 0 below it."""
    losses = [np.ravel(data[name].loss) for name in ("sgd", "flow", "limit") if name in data]
    values = np.concatenate(losses)
    values = values[np.isfinite(values) & (values > 0.0)]
    if values.size:
        for ax in panels:
            ax.set_ylim(float(values.min()) / 1.5, float(values.max()) * 1.5)


def _first_loss(trajectory: tts.Trajectory) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(trajectory.tau), np.atleast_2d(np.asarray(trajectory.loss))[0]


def _all_losses(trajectory: tts.Trajectory) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(trajectory.tau), np.asarray(trajectory.loss)


def _seeds_title(trajectory: tts.Trajectory) -> str:
    seeds = int(np.size(trajectory.status))
    return f"{seeds} seeds: median and 80 % band" if seeds > 1 else "1 seed"


def _spread(times: Sequence[float], trajectory: tts.Trajectory, count: int) -> list[float]:
    """`times` if they fit the run, else as many times spread over it."""
    end = float(np.asarray(trajectory.tau)[-1])
    if len(times) == count and max(times) <= end * (1.0 + 1e-6):
        return list(times)
    return list(np.linspace(0.0, end, count))


# --- figures --------------------------------------------------------------------------------


FIGURES: dict[str, FigureSpec] = {
    "figure1": FigureSpec("notation", sketch, ("flow",), draw_figure1),
    "figure2": FigureSpec("dynamics", sketch, ("limit",), draw_figure2),
    "proof": FigureSpec("proof", sketch, ("flow",), draw_proof),
    "figure3": FigureSpec("two_timescale", two_timescale, ("sgd",), draw_figure3),
    "figure4": FigureSpec(
        "two_timescale",
        two_timescale,
        ("sgd", "flow", "limit", "sharp_limit"),
        draw_figure4,
    ),
    "figure5": FigureSpec("same_rate", same_rate, ("sgd", "flow"), draw_figure5),
    "figure7": FigureSpec("epsilon_boxes", epsilon_boxes, ("sgd",), draw_figure7),
}

load_data = functools.partial(figure_data, FIGURES)
