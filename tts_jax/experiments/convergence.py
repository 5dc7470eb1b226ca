"""How fast SGD, the flow and the limits tend to each other: `tts-jax study convergence`.

Four parts, each a function from settings to a dataset:

- `small_epsilon`: neurons of `flow` at ε against those of `limit`;
- `small_width`: neurons of `limit` at width η against those of `sharp_limit`;
- `small_step`: neurons of `sgd` at step size h against those of `flow`;
- `late_hits`: which runs of the flow end without all jumps, and of which the sharp limit says so.

`slopes` fits orders of convergence with confidence intervals to the first three, `hits` counts the
last, `draw` draws:

    data = {name: compute(settings_of("quick")) for name, compute in PARTS.items()}
    figure = draw(data)

With λ the smallest eigenvalue of the Gram matrix of the steps, the slowest mode of the weights
relaxes at the rate 2λ/ε. Two numbers follow. The boundary layer, in which the weights leave their
start for a*(u), lasts some ε/(2λ). And a neuron moves at most at speed w², w the height of a jump,
so that it crosses its own width in a time η/w²: the weights can follow it only where ε is small
against ε_c = 2λη/w². Times τ are without the factor ½ of the paper's text.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
import xarray
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.special import stdtrit

import tts_jax as tts
from tts_jax import checks, plot
from tts_jax._trajectory import Status
from tts_jax.experiments import _study


Scale = Literal["quick", "paper"]
Data = Mapping[str, xarray.Dataset]

# The boundary layer counts as over once its slowest mode has fallen to e⁻⁵.
LAYER = 5.0
# ε is asymptotic below this share of ε_c and pre-asymptotic above its inverse.
SMALL = 0.1
# Groups of SGD runs, one of which at a time is left out to estimate errors.
GROUPS = 16


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The numbers of the study.

    Attributes:
        starts: number of starts of each kind for flow and limit.
        epsilons: timescale separations ε of `small_epsilon`.
        follows: ε above which neurons no longer follow the limit; no slope is fitted there.
        widths: widths η of `small_width`.
        step_sizes: step sizes h of `small_step`.
        runs: SGD runs per h, from one start.
        late_starts: number of starts of `late_hits`.
        epsilon: ε of `small_step` and `late_hits`, the paper's.
        tau_end: last slow time, the paper's.
        long_end: last slow time of `small_width`, by when nearly all hits are over.
        records: recorded times in each half of a time grid.
        tolerance: `rtol` and `atol` of all solves but those of `late_hits`.
        neurons: number m of neurons.
        eta: width η of a neuron's step where it is not varied, in units of x.
        noise: half-width of the uniform label noise.
        jumps: jumps of the target.
        values: levels of the target, one more than the jumps.
        key: integer from which all random keys are made.
    """

    starts: int = 8
    epsilons: tuple[float, ...] = tuple(float(e) for e in np.logspace(-2, -9, 15))
    follows: float = 1e-3
    widths: tuple[float, ...] = tuple(float(e) for e in np.geomspace(2e-2, 1e-4, 6))
    step_sizes: tuple[float, ...] = (1e-2, 5e-3, 2.5e-3, 1e-3)
    runs: int = 256
    late_starts: int = 256
    epsilon: float = 2e-5
    tau_end: float = 0.035
    long_end: float = 0.08
    records: int = 30
    tolerance: float = 1e-9
    neurons: int = 20
    eta: float = 4e-3
    noise: float = 1.0
    jumps: tuple[float, ...] = tuple(float(place) for place in np.linspace(0.2, 0.8, 5))
    values: tuple[float, ...] = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)
    key: int = 0

    def describe(self) -> str:
        """One line for the terminal."""
        return f"{self.starts} starts, {self.runs} runs of SGD per step size"

    def problem(self, eta: float | None = None) -> tts.Univariate:
        """The learning problem, by default at the width `eta` of the settings."""
        target = tts.PiecewiseConstant(jumps=self.jumps, values=self.values)
        width = self.eta if eta is None else eta
        return tts.Univariate(target, neurons=self.neurons, eta=width, noise=self.noise)

    def random_starts(self, count: int, stream: int) -> Float[np.ndarray, "count m"]:
        """Sorted uniform positions; start i depends on `key`, `stream` and i only."""
        key = jax.random.fold_in(jax.random.key(self.key), stream)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(count))
        return np.asarray(self.problem().init(key=keys).slow, dtype=np.float64)

    def separated_starts(self, count: int) -> Float[np.ndarray, "count m"]:
        """Positions on an even grid, each moved by up to a quarter of its spacing at random."""
        random = np.random.default_rng([self.key, 1])
        shift = random.uniform(-0.25, 0.25, (count, self.neurons))
        return (np.arange(self.neurons) + 0.5 + shift) / self.neurons

    def published_start(self) -> Float[np.ndarray, " m"]:
        """The positions of the published runs: NumPy's generator seeded with 42."""
        return np.sort(np.random.RandomState(42).rand(self.neurons))

    def tau(self, end: float) -> Float[np.ndarray, " T"]:
        """Recorded times: 0, geometric from 1e-9 and even up to `end`."""
        halves = np.geomspace(1e-9, end, self.records), np.linspace(0.0, end, self.records + 1)
        return np.unique(np.concatenate([*halves, [0.0]]))


SETTINGS: dict[str, Settings] = {
    "quick": Settings(),
    "paper": Settings(
        starts=64,
        widths=tuple(float(e) for e in np.geomspace(2e-2, 1e-4, 12)),
        step_sizes=(1e-2, 5e-3, 2.5e-3, 1e-3, 5e-4, 2.5e-4, 1e-4),
        runs=1024,
        late_starts=1024,
    ),
}


def settings_of(scale: str = "quick", seeds: int | None = None) -> Settings:
    """The settings at a scale, with another number of random starts if given.

    SGD runs and the starts of `late_hits` change in proportion.

    Raises:
        ValueError: an unknown scale, or `seeds` < 1.
    """
    settings = SETTINGS[checks.one_of("scale", scale, SETTINGS)]
    if seeds is None:
        return settings
    remedy = f"Its default is {settings.starts}."
    seeds = checks.positive_integer("seeds", seeds, remedy)

    def scaled(count: int) -> int:
        return max(GROUPS, round(count * seeds / settings.starts))

    return replace(
        settings,
        starts=seeds,
        runs=scaled(settings.runs),
        late_starts=scaled(settings.late_starts),
    )


# --- data -----------------------------------------------------------------------------------


def small_epsilon(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Distance of the neurons of the flow to those of the limit, in widths η, for each ε.

    Both start from zero weights at random positions.

    Returns:
        `distance [start, epsilon, tau]`, the largest over the neurons; `outside` and `inside`
        `[start, epsilon]`, its largest value after and during the boundary layer (NaN where no
        recorded time is there), `whole`, over all times; `smallest`, λ at the start, and
        `smallest_on_path`, its smallest value along the limit, `[start]`; `critical_epsilon`
        `[start]`, ε_c from the latter; `solved [start]`, whether the limit and all flows reached
        the last time.
    """
    problem, tau = settings.problem(), settings.tau(settings.tau_end)
    start = problem.state(slow=settings.random_starts(settings.starts, 0))
    tolerances: dict[str, Any] = {"rtol": settings.tolerance, "atol": settings.tolerance}
    limit = tts.limit(problem, start, tau=tau, **tolerances)
    solved, distances = np.asarray(limit.success), []
    for epsilon in _study.steps(settings.epsilons, "flow against limit", "ε", progress):
        flow = tts.flow(problem, start, epsilon=epsilon, tau=tau, **tolerances)
        solved = solved & np.asarray(flow.success)
        gap = np.abs(np.asarray(flow.slow) - np.asarray(limit.slow))
        distances.append(np.max(gap, axis=-1) / settings.eta)
    smallest = _smallest_eigenvalues(problem, np.asarray(limit.slow))
    on_path = np.min(smallest, axis=-1)
    epsilons = np.array(settings.epsilons)
    distance = np.stack(distances, axis=1)
    layer = LAYER * epsilons / (2.0 * np.maximum(smallest[:, :1], np.finfo(float).tiny))
    late = tau > layer[..., None]
    return _study.dataset(
        settings,
        {
            "distance": (("start", "epsilon", "tau"), distance),
            "outside": (("start", "epsilon"), _largest(distance, late)),
            "inside": (("start", "epsilon"), _largest(distance, ~late & (tau > 0.0))),
            "whole": (("start", "epsilon"), np.max(distance, axis=-1)),
            "layer": (("start", "epsilon"), layer),
            "smallest": (("start",), smallest[:, 0]),
            "smallest_on_path": (("start",), on_path),
            "critical_epsilon": (("start",), _critical_epsilon(settings, on_path)),
            "solved": (("start",), solved),
        },
        {"epsilon": epsilons, "tau": tau},
    )


def small_width(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Distance of the neurons of the limit at width η to those of the sharp limit.

    From well separated starts and from random ones; of these as many as the settings say are
    taken among those that the sharp limit covers.

    Returns:
        `before`, `after` and `whole` `[kind, start, eta]`, the largest distance over the neurons
        and the times before the first hit (up to 0.8 of its time), after the last one (from 1.1
        of its time), and all times, in units of x; `gap [kind, start]`, the smallest distance
        between two neurons or between a neuron and a jump at the start; `hitting_time
        [kind, start, jump]` of the sharp limit; `solved [kind, start, eta]`.
    """
    tau = settings.tau(settings.long_end)
    widths = np.array(settings.widths)
    kinds = {
        "separated": settings.separated_starts(settings.starts),
        "random": settings.random_starts(8 * settings.starts, 2),
    }
    names = ("before", "after", "whole", "solved", "gap", "hitting_time")
    answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for kind in kinds:
        problem = settings.problem()
        every = problem.state(slow=kinds[kind])
        covered = np.asarray(tts.sharp_limit(problem, every, tau=tau).success)
        slow = kinds[kind][covered][: settings.starts]
        if len(slow) < settings.starts:
            raise RuntimeError(
                f"The sharp limit covers {len(slow)} of {len(covered)} {kind} starts, and "
                f"{settings.starts} are needed. Choose fewer starts or another `key`."
            )
        sharp = tts.sharp_limit(problem, problem.state(slow=slow), tau=tau)
        hits = np.asarray(sharp.stats["hitting_time"])
        first = np.min(np.where(hits > 0.0, hits, np.inf), axis=-1, keepdims=True)
        last = np.max(np.where(np.isfinite(hits), hits, 0.0), axis=-1, keepdims=True)
        distances, solved = [], []
        for eta in _study.steps(
            settings.widths, f"limit against sharp limit, {kind} starts", "η", progress
        ):
            narrow = settings.problem(eta)
            limit = tts.limit(
                narrow,
                narrow.state(slow=slow),
                tau=tau,
                rtol=settings.tolerance,
                atol=settings.tolerance,
            )
            gap = np.abs(np.asarray(limit.slow) - np.asarray(sharp.slow))
            distances.append(np.max(gap, axis=-1))
            solved.append(np.asarray(limit.success))
        distance = np.stack(distances, axis=1)
        answers["before"].append(_largest(distance, (tau < 0.8 * first)[:, None]))
        answers["after"].append(_largest(distance, (tau > 1.1 * last)[:, None]))
        answers["whole"].append(np.max(distance, axis=-1))
        answers["solved"].append(np.stack(solved, axis=1))
        answers["gap"].append(_smallest_gap(settings, slow))
        answers["hitting_time"].append(hits)
    axes = ("kind", "start", "eta")
    dims = dict.fromkeys(("before", "after", "whole", "solved"), axes)
    dims |= {"gap": axes[:2], "hitting_time": (*axes[:2], "jump")}
    variables = {name: (dims[name], np.stack(values)) for name, values in answers.items()}
    coords = {"kind": list(kinds), "eta": widths, "jump": np.array(settings.jumps)}
    return _study.dataset(settings, variables, coords)


def small_step(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Distance of the neurons of SGD to those of the flow, in widths η, for each step size h.

    All runs start from the published positions with zero weights; SGD runs in float64 with the
    exact sample gradient.

    Returns:
        `distance [step_size, run]`, the largest over neurons and times; `group_bias
        [step_size, group, tau, neuron]`, the mean displacement from the flow over a group of runs
        (run i is in group i mod `GROUPS`); `solved [step_size, run]`, whether the run reached
        the last time.
    """
    problem = settings.problem()
    start = problem.state(slow=settings.published_start())
    tau = np.linspace(0.0, settings.tau_end, 36)
    tolerance, epsilon = settings.tolerance, settings.epsilon
    distances, biases, solved = [], [], []
    for h in _study.steps(settings.step_sizes, "SGD against flow", "h", progress):
        sgd = tts.sgd(
            problem,
            key=jax.random.fold_in(jax.random.key(settings.key), 3),
            seeds=settings.runs,
            state=start,
            epsilon=epsilon,
            step_size=h,
            tau=tau,
            dtype=np.float64,
            progress=False,
        )
        # SGD moves the recorded times to its steps
        flow = tts.flow(
            problem, start, epsilon=epsilon, tau=sgd.tau, rtol=tolerance, atol=tolerance
        )
        moved = (np.asarray(sgd.slow) - np.asarray(flow.slow)) / settings.eta
        distances.append(np.max(np.abs(moved), axis=(1, 2)))
        solved.append(np.asarray(sgd.success) & np.all(np.asarray(flow.success)))
        biases.append([np.mean(moved[group::GROUPS], axis=0) for group in range(GROUPS)])
    return _study.dataset(
        settings,
        {
            "distance": (("step_size", "run"), np.stack(distances)),
            "group_bias": (("step_size", "group", "tau", "neuron"), np.array(biases)),
            "solved": (("step_size", "run"), np.stack(solved)),
        },
        {"step_size": np.array(settings.step_sizes), "tau": tau},
    )


def late_hits(settings: Settings, *, progress: bool = False) -> xarray.Dataset:
    """Random starts: do flow and limit have a neuron within η of every jump at the last time?

    Returns:
        `flow` and `limit` `[start]`, whether all jumps are recovered; `flow_distance` and
        `limit_distance` `[start, jump]`, in widths; `hitting_time [start, jump]` of the sharp
        limit, NaN where it does not cover the start; `flow_status`, `limit_status`,
        `sharp_status` `[start]`; `neurons_per_piece [start, piece]` at the start.
    """
    problem, end = settings.problem(), np.array([settings.tau_end])
    slow = settings.random_starts(settings.late_starts, 4)
    start = problem.state(slow=slow)
    calls: dict[str, Callable[[], tts.Trajectory]] = {
        "flow": lambda: tts.flow(problem, start, epsilon=settings.epsilon, tau=end),
        "limit": lambda: tts.limit(problem, start, tau=end),
        "sharp": lambda: tts.sharp_limit(problem, start, tau=end),
    }
    runs = {}
    for name in _study.steps(list(calls), "late hits", "method", progress):
        runs[name] = calls[name]()
    variables: dict[str, Any] = {}
    for name, run in runs.items():
        variables[f"{name}_status"] = (("start",), np.asarray(run.status))
        if name != "sharp":
            distance = np.asarray(run.observables["recovery"])[:, -1] / settings.eta
            variables[name] = (("start",), np.all(distance <= 1.0, axis=-1))
            variables[f"{name}_distance"] = (("start", "jump"), distance)
    hits = np.asarray(runs["sharp"].stats["hitting_time"])
    piece = np.searchsorted(np.array(settings.jumps), slow)
    counts = np.sum(piece[..., None] == np.arange(len(settings.values)), axis=1)
    variables["hitting_time"] = (("start", "jump"), hits)
    variables["neurons_per_piece"] = (("start", "piece"), counts)
    variables["slow"] = (("start", "neuron"), slow)
    return _study.dataset(settings, variables, {"jump": np.array(settings.jumps)})


PARTS: dict[str, Callable[..., xarray.Dataset]] = {
    "small_epsilon": small_epsilon,
    "small_width": small_width,
    "small_step": small_step,
    "late_hits": late_hits,
}


def load_data(folder: str | os.PathLike[str]) -> dict[str, xarray.Dataset]:
    """The data that `tts-jax study convergence` wrote to `folder`, as far as they are there.

    Raises:
        FileNotFoundError: the folder holds no data of the study.
    """
    return _study.load_data(folder, "convergence", PARTS)


def _settings(dataset: xarray.Dataset) -> Settings:
    return _study.settings_in(dataset, Settings)


def _smallest_eigenvalues(
    problem: tts.Univariate, slow: Float[np.ndarray, "start T m"]
) -> Float[np.ndarray, "start T"]:
    """λ of the Gram matrix at every position, NaN where there is none."""
    with jax.enable_x64(True):
        every = jax.vmap(lambda slow: problem.gram_eigenvalues(slow)[0])
        values = jax.jit(every)(slow.reshape(-1, slow.shape[-1]))
    return np.asarray(values, dtype=np.float64).reshape(slow.shape[:2])


def _critical_epsilon(settings: Settings, smallest: np.ndarray) -> np.ndarray:
    """ε_c = 2λη/w² with the highest jump w; not negative where λ is rounding error."""
    highest = np.max(np.abs(np.diff(settings.values)))
    return 2.0 * np.maximum(smallest, 0.0) * settings.eta / highest**2


def _smallest_gap(settings: Settings, slow: np.ndarray) -> np.ndarray:
    neighbours = np.min(np.diff(slow, axis=-1), axis=-1)
    jumps = np.abs(slow[..., None] - np.array(settings.jumps))
    return np.minimum(neighbours, np.min(jumps, axis=(-2, -1)))


def _largest(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The largest value over the last axis among those marked, NaN where none is marked."""
    where = np.broadcast_to(where, values.shape)
    largest = np.max(np.where(where, values, -np.inf), axis=-1)
    return np.where(np.any(where, axis=-1), largest, np.nan)


# --- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """A fitted order of convergence: the slope of log distance against log parameter.

    Attributes:
        quantity: which distance, against which parameter, where.
        range: which part of the data.
        expected: the order in theory, NaN where there is none.
        slope: the fitted one, NaN where the data do not allow a fit.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        samples: independent starts, or groups of SGD runs, that enter.
        points: distances that enter.
    """

    quantity: str
    range: str
    expected: float
    slope: float
    low: float
    high: float
    samples: int
    points: int


def slopes(data: Data) -> list[Slope]:
    """All fitted orders of convergence of the parts that `data` holds.

    Starts have a common slope and constants of their own, fitted by least squares. Intervals are
    Student's t intervals with the jackknife standard error: one start, or one of `GROUPS` groups
    of SGD runs, is left out at a time.
    """
    rows: list[Slope] = []
    if "small_epsilon" in data:
        rows += _epsilon_slopes(data["small_epsilon"])
    if "small_width" in data:
        rows += _width_slopes(data["small_width"])
    if "small_step" in data:
        rows += _step_slopes(data["small_step"])
    return rows


def _epsilon_slopes(dataset: xarray.Dataset) -> list[Slope]:
    epsilon, critical = dataset.epsilon.values, dataset.critical_epsilon.values[:, None]
    limit = _settings(dataset).follows
    follows = epsilon <= limit
    solved = dataset.solved.values[:, None]
    apart = solved & ~_merging(dataset)[:, None]
    small, large = epsilon <= SMALL * critical, epsilon >= critical / SMALL
    merging = solved & ~apart & (epsilon <= 1e-6)
    cases = [
        ("after the layer", "outside", "ε ≤ ε_c/10", apart & small, 1.0),
        ("in the layer", "inside", "ε ≤ ε_c/10", apart & small, 1.0),
        ("all times", "whole", "ε_c/10 < ε < 10 ε_c", apart & ~small & ~large, np.nan),
        ("all times", "whole", f"10 ε_c ≤ ε ≤ {limit:g}", apart & large & follows, np.nan),
        ("all times", "whole", "neurons that merge, ε ≤ 1e-6", merging, np.nan),
    ]
    return [
        _slope(f"flow − limit, ε, {time}", part, expected, epsilon, dataset[name].values, where)
        for time, name, part, where, expected in cases
    ]


def _merging(dataset: xarray.Dataset) -> Bool[np.ndarray, " start"]:
    """Starts whose λ falls below a tenth on the way: neurons that come together."""
    return dataset.smallest_on_path.values < 0.1 * dataset.smallest.values


def _width_slopes(dataset: xarray.Dataset) -> list[Slope]:
    rows = []
    times = {"before": "before the first hit", "after": "after the last", "whole": "all times"}
    for kind in dataset.kind.values:
        part = dataset.sel(kind=kind)
        narrow = part.eta.values <= part.gap.values[:, None]
        ranges = {"η ≤ smallest gap": (narrow, 1.0), "η > smallest gap": (~narrow, np.nan)}
        for label, (where, expected) in ranges.items():
            if not where.any():
                continue
            for name, time in times.items():
                rows.append(
                    _slope(
                        f"limit − sharp limit, η, {time}",
                        f"{kind} starts, {label}",
                        expected,
                        part.eta.values,
                        part[name].values,
                        where & part.solved.values,
                    )
                )
    return rows


def _slope(
    quantity: str,
    name: str,
    expected: float,
    parameter: Float[np.ndarray, " n"],
    distance: Float[np.ndarray, "start n"],
    where: Bool[np.ndarray, "start n"],
) -> Slope:
    """The common slope of all starts, each with a constant of its own."""
    where = where & np.isfinite(distance) & (distance > 0.0)
    where = where & (np.sum(where, axis=1, keepdims=True) >= 2)
    used = np.any(where, axis=1)
    count = np.maximum(np.sum(where, axis=1, keepdims=True), 1)

    def centred(values: np.ndarray) -> np.ndarray:
        values = np.where(where, values, 0.0)
        return np.where(where, values - np.sum(values, axis=1, keepdims=True) / count, 0.0)

    x = centred(np.broadcast_to(np.log(parameter), where.shape))
    y = centred(np.log(np.where(where, distance, 1.0)))
    above, below = np.sum(x * y, axis=1)[used], np.sum(x * x, axis=1)[used]
    slope = np.sum(above) / np.sum(below) if used.any() else np.nan
    without = np.full(above.size, np.nan)
    if above.size > 1:
        without = (np.sum(above) - above) / (np.sum(below) - below)
    low, high = _interval(slope, without)
    return Slope(quantity, name, expected, slope, low, high, int(used.sum()), int(where.sum()))


def _interval(value: float, without: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """95 % interval from the values with one of n samples left out."""
    count = without.size
    if count < 2 or not np.all(np.isfinite(without)):
        return np.nan, np.nan
    error = np.sqrt((count - 1) / count * np.sum((without - np.mean(without)) ** 2))
    reach = float(stdtrit(count - 1, 0.975)) * error
    return value - reach, value + reach


def step_distances(dataset: xarray.Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Strong and weak distance of SGD to the flow for each h, in widths.

    `"strong"` is the mean over the runs of the largest distance over neurons and times. `"weak"`
    is the distance of the mean run, root mean square over neurons and times, from an estimate
    of its square that has no bias: what the spread of the runs adds to it is subtracted.

    Returns:
        Name to (value `[step_size]`, value with one group left out `[step_size, group]`); the
        weak distance is NaN where it is not resolved, below twice its standard error.
    """
    distance = np.where(dataset.solved.values, dataset.distance.values, np.nan)
    groups = np.arange(distance.shape[1]) % GROUPS
    kept = np.arange(GROUPS)[:, None] != np.arange(GROUPS)
    strong = np.nanmean(distance, axis=1)
    fewer = np.stack([np.nanmean(distance[:, groups != g], axis=1) for g in range(GROUPS)], axis=1)
    bias = dataset.group_bias.values

    def square(bias: np.ndarray) -> np.ndarray:
        count = bias.shape[1]
        spread = np.sum(np.var(bias, axis=1, ddof=1), axis=(-2, -1)) / count
        total = np.sum(np.mean(bias, axis=1) ** 2, axis=(-2, -1))
        return (total - spread) / np.prod(bias.shape[2:])

    whole = square(bias)
    parts = np.stack([square(bias[:, keep]) for keep in kept], axis=1)
    error = np.sqrt((GROUPS - 1) * np.var(parts, axis=1))
    resolved = whole > 2.0 * error
    weak = np.sqrt(np.where(resolved, whole, np.nan))
    rest = np.sqrt(np.where(resolved[:, None] & (parts > 0.0), parts, np.nan))
    return {"strong": (strong, fewer), "weak": (weak, rest)}


def _step_slopes(dataset: xarray.Dataset) -> list[Slope]:
    h = np.log(dataset.step_size.values)
    rows = []
    names = {
        "strong": ("SGD − flow, h, mean distance", 0.5),
        "weak": ("SGD − flow, h, distance of the mean", 1.0),
    }
    for kind, (value, without) in step_distances(dataset).items():
        quantity, expected = names[kind]
        known = np.isfinite(value)
        slope, low, high = np.nan, np.nan, np.nan
        if known.sum() >= 2:
            slope = float(np.polyfit(h[known], np.log(value[known]), 1)[0])
            rest = np.polyfit(h[known], np.log(without[known]), 1)[0]
            low, high = _interval(slope, rest)
        label = "all h" if known.all() else "h where it is resolved"
        runs = int(known.sum()) * dataset.sizes["run"]
        rows.append(Slope(quantity, label, expected, slope, low, high, GROUPS, runs))
    return rows


@dataclass(frozen=True)
class Hits:
    """How often a prediction of failure met the flow.

    Attributes:
        prediction: what predicts.
        says: what it says of these starts.
        starts: their number.
        recovered: of them, runs of the flow that end with every jump recovered.
        failed: runs of the flow that do not.
        by_width: of those that contradict the prediction, how many have a limit at width η that
            sides with the flow: the finite width makes the difference.
        by_epsilon: the others, where the limit sides with the prediction: the finite ε does.
        margin: median of |log(T/τ_end)| over the contradictions, T the last hit of the sharp limit.
    """

    prediction: str
    says: str
    starts: int
    recovered: int
    failed: int
    by_width: int
    by_epsilon: int
    margin: float


def hits(dataset: xarray.Dataset) -> list[Hits]:
    """Success of the flow against two predictions: the sharp limit's last hit, and the limit."""
    end = _settings(dataset).tau_end
    flow, limit = dataset.flow.values, dataset.limit.values
    last = np.max(dataset.hitting_time.values, axis=-1)
    covered = (dataset.sharp_status.values == int(Status.SUCCESS)) & ~np.isnan(last)
    late = covered & (last > end)
    sharp = "sharp limit"
    cases = [
        (sharp, "all hits in time", covered & ~late, True),
        (sharp, "a late hit", late, False),
        (sharp, "not covered", ~covered, None),
        ("limit", "recovered", limit, True),
        ("limit", "failed", ~limit, False),
    ]
    rows = []
    for prediction, says, where, success in cases:
        against = where & (flow != success) if success is not None else np.zeros_like(where)
        measured = against & covered & np.isfinite(last) & (last > 0.0)
        margin = np.abs(np.log(last[measured] / end))
        rows.append(
            Hits(
                prediction,
                says,
                int(where.sum()),
                int((where & flow).sum()),
                int((where & ~flow).sum()),
                int((against & (limit == flow)).sum()),
                int((against & (limit != flow)).sum()),
                float(np.median(margin)) if margin.size else np.nan,
            )
        )
    return rows


_SLOPE_HEADER: tuple[str, ...] = (
    *("distance, parameter, where", "range", "expected"),
    *("slope", "low", "high", "samples", "points"),
)
_HITS_HEADER: tuple[str, ...] = (
    *("prediction", "says", "starts", "flow recovers", "flow fails"),
    *("width decides", "ε decides", "median |log T/τ|"),
)


def tables(data: Data) -> dict[str, list[tuple[str, ...]]]:
    """The numbers as rows of text, the first one the heading: `"slopes"` and `"late_hits"`."""
    answer: dict[str, list[tuple[str, ...]]] = {}
    fitted = slopes(data)
    if fitted:
        rows = [_SLOPE_HEADER]
        for row in fitted:
            numbers = (row.expected, row.slope, row.low, row.high)
            texts = ["-" if np.isnan(number) else f"{number:.3f}" for number in numbers]
            rows.append((row.quantity, row.range, *texts, f"{row.samples}", f"{row.points}"))
        answer["slopes"] = rows
    if "late_hits" in data:
        rows = [_HITS_HEADER]
        for row in hits(data["late_hits"]):
            counts = (row.starts, row.recovered, row.failed, row.by_width, row.by_epsilon)
            margin = "-" if np.isnan(row.margin) else f"{row.margin:.2g}"
            rows.append((row.prediction, row.says, *(f"{count}" for count in counts), margin))
        answer["late_hits"] = rows
    return answer


def remarks(data: Data) -> list[str]:
    """What a reader of the tables needs to know, and which solves failed."""
    lines = []
    if any(name in data for name in ("small_epsilon", "small_width", "small_step")):
        lines += [
            "Slopes of log distance against log parameter; low to high is the 95 % confidence",
            "interval (Student's t, jackknife over starts or over groups of SGD runs).",
        ]
    if "small_epsilon" in data:
        dataset = data["small_epsilon"]
        settings, failed = _settings(dataset), int(np.sum(~dataset.solved.values))
        critical = dataset.critical_epsilon.values
        critical = critical[np.isfinite(critical)]
        layer = LAYER * settings.epsilon / (2.0 * dataset.smallest.values)
        lines += [
            f"ε_c = 2λη/w² has the median {np.median(critical):.2g}; at the paper's ε = "
            f"{settings.epsilon:g} the boundary layer",
            f"lasts {np.median(layer):.2g} in the median, and the run {settings.tau_end:g}.",
            f"Neurons merge in {int(np.sum(_merging(dataset)))} of {dataset.sizes['start']} starts;"
            f" {failed} starts were left out because a solve failed.",
        ]
    if "small_width" in data:
        failed = int(np.sum(~data["small_width"].solved.values))
        lines.append(f"{failed} of {data['small_width'].solved.size} limits at width η failed.")
    if "late_hits" in data:
        dataset = data["late_hits"]
        names = ("flow", "limit")
        failed = [int(np.sum(dataset[f"{name}_status"].values != 0)) for name in names]
        lines += [
            "A late hit is one that the sharp limit puts after the last time. Width or ε decides:",
            "where flow and prediction differ, the limit at width η sides with the flow, or not.",
            f"Solves of the flow and of the limit that failed: {failed[0]} and {failed[1]}.",
        ]
    return lines


# --- drawing --------------------------------------------------------------------------------

_COLORS = {name: style.color for name, style in plot.METHODS.items()}
_SKY, _ORANGE, _GREY = "#56B4E9", "#E69F00", "#4D4D4D"


def draw(data: Data) -> Figure:
    """The three distances against ε, η and h on logarithmic axes.

    Args:
        data: names of parts to what they returned; each of `small_epsilon`, `small_width` and
            `small_step` that is there gets a panel.

    Raises:
        ValueError: none of the three is there.
    """
    draws = {"small_epsilon": _draw_epsilon, "small_width": _draw_width}
    draws |= {"small_step": _draw_step}
    present = [name for name in draws if name in data]
    if not present:
        raise ValueError(
            f"Argument `data` must hold one of {', '.join(draws)}, got {list(data)}. Compute one."
        )
    with plot.theme():
        drawing = plot.figure(3.6 * len(present) + 0.3 * (len(present) == 1), 4.4)
        panels = list(np.ravel(drawing.subplots(1, len(present))))
        for ax, name in zip(panels, present, strict=True):
            ax.set_xscale("log")
            ax.set_yscale("log")
            draws[name](ax, data[name])
            ax.legend(loc="lower left", bbox_to_anchor=(-0.04, 1.0), fontsize=7.5)
        if len(panels) > 1:
            plot.panel_letters(panels)
    return drawing


def _draw_epsilon(ax: Axes, dataset: xarray.Dataset) -> None:
    settings, epsilon = _settings(dataset), dataset.epsilon.values
    solved, merging = dataset.solved.values, _merging(dataset)
    critical = dataset.critical_epsilon.values[solved & ~merging]
    if critical.size:
        low, high = np.quantile(critical, (0.1, 0.9))
        ax.axvspan(low, high, color=_GREY, alpha=0.13, linewidth=0.0, zorder=0.5)
        ax.axvline(
            float(np.median(critical)),
            color=_GREY,
            linewidth=1.0,
            linestyle=(0, (1, 1.2)),
            label=r"$\varepsilon_c = 2\lambda_{\min}\eta/w^2$, median and 80 % band",
        )
    for group, color, label in (
        (solved & ~merging, _COLORS["flow"], "one start"),
        (solved & merging, _COLORS["sharp_limit"], "one start whose neurons merge"),
    ):
        lines = ax.plot(epsilon, dataset.whole.values[group].T, color=color, lw=0.6, alpha=0.45)
        if lines:
            lines[0].set_label(label)
    apart = solved & ~merging
    for name, style, label in (
        ("outside", "-", "median, after the boundary layer"),
        ("inside", (0, (4, 1.5)), "median, in the boundary layer"),
    ):
        values = dataset[name].values[apart]
        # the median start, where most of them have times there
        enough = np.sum(np.isfinite(values), axis=0) > values.shape[0] / 2
        if enough.any():
            middle = np.full(epsilon.size, np.nan)
            middle[enough] = np.nanmedian(values[:, enough], axis=0)
            color = "black" if name == "outside" else _COLORS["sgd"]
            ax.plot(epsilon, middle, color=color, lw=1.8, ls=style, label=label, zorder=4)
    ax.axvline(
        settings.epsilon,
        color=_COLORS["limit"],
        linewidth=1.2,
        label=f"the paper's ε = {settings.epsilon:g}",
    )
    reference = np.nanmedian(dataset.whole.values[apart][:, -1]) if apart.any() else np.nan
    _guide(ax, epsilon[-1], 1e3 * epsilon[-1], 0.4 * reference, 1.0)
    ax.xaxis.set_major_locator(LogLocator(numticks=9))
    ax.set_xlabel("timescale separation ε")
    ax.set_ylabel("distance flow − limit, in widths η")


def _draw_width(ax: Axes, dataset: xarray.Dataset) -> None:
    eta = dataset.eta.values
    looks = {"separated": (_COLORS["sharp_limit"], "o"), "random": (_ORANGE, "s")}
    for kind in dataset.kind.values:
        part = dataset.sel(kind=kind)
        color, marker = looks[str(kind)]
        whole = np.where(part.solved.values, part.whole.values, np.nan)
        ax.plot(eta, whole.T, color=color, linewidth=0.5, alpha=0.4)
        for name, style, label in (
            ("before", (0, (4, 1.5)), "before the first hit"),
            ("after", "-", "after the last"),
        ):
            values = np.where(part.solved.values, part[name].values, np.nan)
            enough = np.any(np.isfinite(values), axis=0)
            if enough.any():
                middle = np.full(eta.size, np.nan)
                middle[enough] = np.nanmedian(values[:, enough], axis=0)
                text = f"{kind} starts, {label}"
                ax.plot(eta, middle, color=color, ls=style, marker=marker, ms=3.5, label=text)
    smallest = np.min(np.nanmedian(dataset["before"].values[..., -1], axis=1))
    _guide(ax, eta[-1], 30 * eta[-1], 0.6 * smallest, 1.0)
    ax.set_xlabel("width η of a step")
    ax.set_ylabel("distance limit − sharp limit")


def _draw_step(ax: Axes, dataset: xarray.Dataset) -> None:
    h, settings = dataset.step_size.values, _settings(dataset)
    runs = f"{dataset.sizes['run']} runs at ε = {settings.epsilon:g}"
    labels = {"strong": f"mean distance of {runs}", "weak": "distance of the mean run"}
    looks = {"strong": (_COLORS["sgd"], "o", "-"), "weak": (_SKY, "s", (0, (4, 1.5)))}
    for name, (value, without) in step_distances(dataset).items():
        color, marker, dashes = looks[name]
        ends = np.array([_interval(v, w) for v, w in zip(value, without, strict=True)])
        low = np.maximum(value - ends[:, 0], 0.0)
        low = np.minimum(low, 0.9 * value)
        bars = np.nan_to_num(np.stack([low, ends[:, 1] - value]))
        ax.errorbar(
            h,
            value,
            bars,
            color=color,
            ls=dashes,
            marker=marker,
            ms=4,
            capsize=2,
            label=labels[name],
        )
        known = np.isfinite(value)
        if known.any():
            order = 0.5 if name == "strong" else 1.0
            smallest = int(np.argmin(np.where(known, h, np.inf)))
            _guide(ax, h[smallest], h.max(), 0.6 * value[smallest], order)
    ax.set_xlabel("step size h")
    ax.set_ylabel("distance SGD − flow, in widths η")


def _guide(ax: Axes, low: float, high: float, value: float, order: float) -> None:
    """A thin line of the given slope through (low, value), labelled with the slope."""
    if not (np.isfinite(value) and value > 0.0):
        return
    ends = np.array([low, high])
    heights = value * (ends / low) ** order
    ax.plot(ends, heights, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.0)
    text = "slope 1" if order == 1.0 else f"slope {order:g}"
    ax.annotate(
        text,
        (float(np.sqrt(low * high)), float(np.sqrt(heights[0] * heights[1]))),
        xytext=(4, -8),
        textcoords="offset points",
        fontsize=7.0,
        color=_GREY,
    )
