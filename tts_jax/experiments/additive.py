"""Figure 6 and the box plots of Marion & Berthier (2023, arXiv 2304.09576): d dimensions and ReLU.

Gradient descent on a finite data set with one learning rate for the outer weights and ε times it
for the positions. Every repeat has data and a start of its own; as published, what is descended is
the criterion ‖r‖₂/n, r the residual on the n points, and the number reported is its value before
the last step. Experiments and drawings go together as in `marion_berthier`:

    data = boxes_2d(seeds=20)
    figure = draw_figure6(data)

Both scales are the paper's. Paper symbols: ε is the ratio of the slow to the fast step size, η the
width of a neuron's step, h the fast step size, and epoch k sits at the slow time τ = εhk.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
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
from tts_jax.experiments._panels import legend
from tts_jax.experiments.marion_berthier import mark_missed


_GRID = (np.arange(400) + 0.5) / 400


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hinges:
    """The piecewise-linear target Σ_k s_k max(x − v_k, 0) of the ReLU experiment.

    Attributes:
        thresholds: the kinks v_k.
        heights: the changes of slope s_k.
    """

    thresholds: tuple[float, ...]
    heights: tuple[float, ...]

    def __call__(self, x: Any) -> Any:
        """Its values at any shape of `x`."""
        parts = [
            height * jnp.maximum(jnp.asarray(x) - place, 0.0)
            for place, height in zip(self.thresholds, self.heights, strict=True)
        ]
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Settings:
    """The numbers of one experiment; the defaults are those of the paper in two dimensions.

    Attributes:
        dimensions: number d of coordinates.
        samples: number n of data points, uniform on [0, 1]^d.
        seeds: number of repeats, each with data and a start of its own.
        epsilon: the timescale separations ε, one run each.
        epochs: the steps of each run; the last state recorded is that before the last step.
        step_size: step size h of the outer weights.
        neurons: number m of neurons per coordinate.
        eta: width η of a neuron's step, in units of x.
        activation: the activation by name.
        thresholds: where the target has a jump, or a kink for ReLU, in every coordinate.
        heights: the jump, or the change of slope, at each threshold.
        weight_scale: start weights are uniform on [0, weight_scale).
        records: number of recorded states, evenly spaced.
        key: integer from which all random keys are made.
    """

    dimensions: int = 2
    samples: int = 1000
    seeds: int = 20
    epsilon: tuple[float, ...] = (0.01, 1.0)
    epochs: tuple[int, ...] = (5000, 300)
    step_size: float = 1.0
    neurons: int = 10
    eta: float = 0.01
    activation: str = "cubic"
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
    heights: tuple[float, ...] = (1.0, 1.0, 1.0)
    weight_scale: float = 3.0
    records: int = 6
    key: int = 0

    @property
    def steps(self) -> int:
        """Epochs of one seed, over all ε."""
        return sum(self.epochs)

    def describe(self, methods: Sequence[str]) -> str:
        """One line on what there is to do."""
        del methods
        return f"{self.seeds} seeds, {self.steps:.4g} epochs each"

    def target(self) -> Callable[[Any], Any]:
        """The target of one coordinate: 0 on the left, then a jump or a kink per threshold."""
        if self.activation != "relu":
            return tts.PiecewiseConstant(self.thresholds, np.cumsum([0.0, *self.heights]))
        return Hinges(self.thresholds, self.heights)

    def problems(self) -> list[tts.Additive]:
        """The problem of each seed; seed i has the same data for every number of seeds."""
        options = {
            "dimensions": self.dimensions,
            "neurons": self.neurons,
            "eta": self.eta,
            "activation": self.activation,
            "samples": self.samples,
            "thresholds": self.thresholds,
            "weight_scale": self.weight_scale,
            "objective": "norm",
        }
        target, key = self.target(), jax.random.fold_in(jax.random.key(self.key), 1)
        return [
            tts.Additive(target, key=jax.random.fold_in(key, seed), **options)
            for seed in range(self.seeds)
        ]

    def tau(self, epsilon: float) -> np.ndarray:
        """Recorded slow times at ε, `[records]`, the last one before the last step."""
        last = self.epochs[self.epsilon.index(epsilon)]
        steps = np.minimum(np.rint(np.linspace(0, last, self.records)), last - 1)
        return epsilon * self.step_size * steps


_BOXES_2D = Settings()
_BOXES_10D = Settings(dimensions=10, samples=10_000)
_BOXES_RELU = Settings(dimensions=1, activation="relu", eta=1.0, heights=(1.0, -2.0, 3.0))
SETTINGS: dict[str, dict[str, Settings]] = {
    "additive_2d": {"quick": _BOXES_2D, "paper": _BOXES_2D},
    "additive_10d": {"quick": _BOXES_10D, "paper": _BOXES_10D},
    "additive_relu": {"quick": _BOXES_RELU, "paper": _BOXES_RELU},
}


settings_of = functools.partial(settings_from, SETTINGS)


# --- data -----------------------------------------------------------------------------------


def boxes_2d(scale: Scale = "quick", **options: Any) -> Data:
    """Figure 6 and its box plot: two coordinates, 1000 points, η = 0.01.

    Args:
        scale: `"quick"` or `"paper"`; both are the paper's.
        options: `seeds`, the number of repeats; `settings`, which takes the place of those of
            `scale`; `methods`, only `("sgd",)`; `progress`, whether to show a progress bar;
            `on_result`, called with the name and trajectory of each ε as soon as it is there.

    Returns:
        `"sgd_epsilon_<ε>"` to trajectory, batch axis `[seeds]`; its loss is the criterion.

    Raises:
        ValueError: a bad argument.
    """
    return _boxes("additive_2d", scale, **options)


def boxes_10d(scale: Scale = "quick", **options: Any) -> Data:
    """The box plot in ten dimensions, 10,000 points; arguments and result as in `boxes_2d`."""
    return _boxes("additive_10d", scale, **options)


def boxes_relu(scale: Scale = "quick", **options: Any) -> Data:
    """The box plot of ReLU neurons on the line; arguments and result as in `boxes_2d`."""
    return _boxes("additive_relu", scale, **options)


def _boxes(
    experiment: str,
    scale: str,
    *,
    seeds: int | None = None,
    settings: Settings | None = None,
    methods: Sequence[str] = ("sgd",),
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    for name in methods:
        checks.one_of("methods", name, ("sgd",))
    if settings is None:
        settings = settings_of(experiment, scale, seeds)
    elif seeds is not None:
        remedy = "Leave it out to take that of `settings`."
        settings = replace(settings, seeds=checks.positive_integer("seeds", seeds, remedy))
    problems, data = settings.problems(), {}
    for epsilon in settings.epsilon:
        name = f"sgd_epsilon_{epsilon:g}"
        data[name] = tts.sgd(
            problems,
            key=jax.random.key(settings.key),
            epsilon=epsilon,
            step_size=settings.step_size,
            tau=settings.tau(epsilon),
            dtype=jnp.float32,  # as published; the general path would take float64
            progress=progress,
        )
        if on_result is not None:
            on_result(name, data[name])
    return data


def published(experiment: str) -> dict[float, np.ndarray]:
    """The final criterion of the published repeats, `[20]` for each ε that they are known for.

    Read off the stored outputs of the published notebooks; those of ten dimensions lack ε = 0.01.
    """
    final = published_outcomes()["final"][checks.one_of("experiment", experiment, SETTINGS)]
    return {float(epsilon): np.asarray(values) for epsilon, values in final.items()}


def published_outcomes() -> dict[str, Any]:
    """What the published notebooks print, as in `published/additive.json`."""
    file = resources.files("tts_jax.experiments") / "published" / "additive.json"
    return json.loads(file.read_text(encoding="utf-8"))


# --- drawings -------------------------------------------------------------------------------


def draw_figure6(data: Mapping[str, tts.Trajectory], *, seed: int = 0) -> Figure:
    """The plane of one seed after training: target, network, and the positions of the neurons.

    Upper row: the target with the neurons of each coordinate as lines, as in the paper; lower row:
    the network. Thresholds without a neuron within η are marked at the upper and right edges.

    Args:
        data: the answer of `boxes_2d`.
        seed: the seed to draw.
    """
    runs = sorted(data.values(), key=_epsilon, reverse=True)
    with plot.theme():
        drawing = plot.figure(3.2 * len(runs) + 0.9, 6.3)
        rows = drawing.subplots(2, len(runs), sharex=True, sharey=True, squeeze=False)
        planes = [_planes(run, seed) for run in runs]
        scale = {"vmin": -0.5, "vmax": float(planes[0][0].max()) + 0.5, "cmap": "Blues"}
        scale |= {"origin": "lower", "extent": (0.0, 1.0, 0.0, 1.0)}
        images = []
        for column, run, pair in zip(rows.T, runs, planes, strict=True):
            for ax, values, name in zip(column, pair, ("target", "network"), strict=True):
                images.append(ax.imshow(values.T, **scale))
                _lines(ax, run, seed)
                ax.set_title(name)
                ax.label_outer()
                ax.grid(visible=False)
            column[0].set_title(f"ε = {_epsilon(run):g}", loc="right")
            column[1].set_xlabel("$x_1$")
        for ax in rows[:, 0]:
            ax.set_ylabel("$x_2$")
        bar = drawing.colorbar(images[0], ax=rows, shrink=0.5, pad=0.02)
        bar.set_label("target and network")
        legend(drawing, *rows.flat)
        plot.panel_letters(rows.flat)
    return drawing


def _planes(run: tts.Trajectory, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Target and network of a seed at the last time on a grid, `[x_1, x_2]`."""
    fast, slow = (np.asarray(part)[seed, -1] for part in (run.fast, run.slow))
    steps, values = (np.asarray(run.settings[name]) for name in ("thresholds", "values"))
    line = tts.Additive(
        lambda x: 0.0 * x,
        dimensions=1,
        neurons=fast.shape[1],
        eta=float(np.asarray(run.settings["eta"])),
        inputs=np.zeros((1, 1)),
    )
    target, network = [], []
    for coordinate in range(2):
        target.append(tts.PiecewiseConstant(steps[coordinate], values[coordinate])(_GRID))
        network.append(line.predict(fast[[coordinate]], slow[[coordinate]], _GRID[:, None]))
    return np.add.outer(*target), np.add.outer(*network)


def _lines(ax: Axes, run: tts.Trajectory, seed: int) -> None:
    """Thresholds and neurons of both coordinates as lines, thresholds without a neuron marked."""
    slow = np.asarray(run.slow)[seed, -1]
    steps = np.asarray(run.settings["thresholds"])
    missed = np.asarray(run.observables["recovery"])[seed, -1] > np.asarray(run.settings["eta"])
    target, neuron = {"color": "#3B3B3B", "lw": 0.8}, {"color": "#E69F00", "lw": 1.4, "ls": "--"}
    for coordinate, line in enumerate((ax.axvline, ax.axhline)):
        for place in steps[coordinate]:
            line(place, **target, zorder=2.0)
        inside = slow[coordinate][(slow[coordinate] >= 0.0) & (slow[coordinate] <= 1.0)]
        for place in inside:
            line(place, **neuron, zorder=2.1)
    ax.plot([], [], **target, label="jump of the target")
    ax.plot([], [], **neuron, label="neuron")
    for coordinate, side in enumerate(("top", "right")):
        mark_missed(ax, steps[coordinate][missed[coordinate]], side=side)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.0)


def draw_boxes(data: Mapping[str, tts.Trajectory], *, experiment: str, what: str) -> Figure:
    """The final criterion of the seeds for each ε, with the published repeats beside.

    Args:
        data: the answer of an experiment of this module.
        experiment: its name in `SETTINGS`.
        what: the title.
    """
    with plot.theme():
        drawing = plot.figure(4.4, 3.4)
        ax = drawing.subplots()
        runs = list(data.values())
        ends = {_epsilon(run): np.asarray(run.observables["criterion"])[..., -1] for run in runs}
        known = published(experiment)
        plot.boxes(ends, beside={e: known[e] for e in ends if e in known}, ax=ax)
        ax.set_ylabel("final criterion $\\Vert r\\Vert_2/n$")
        seeds = max(int(np.size(run.status)) for run in runs)
        ax.set_title(f"{what}, {seeds} seeds")
    return drawing


def _epsilon(run: tts.Trajectory) -> float:
    return float(np.ravel(np.asarray(run.settings["epsilon"]))[0])


# --- figures --------------------------------------------------------------------------------


def _spec(experiment: str, compute: Callable[..., Data], title: str) -> FigureSpec:
    draw = functools.partial(draw_boxes, experiment=experiment, what=title)
    return FigureSpec(experiment, compute, ("sgd",), draw)


FIGURES: dict[str, FigureSpec] = {
    "figure6": FigureSpec("additive_2d", boxes_2d, ("sgd",), draw_figure6),
    "figure_2d": _spec("additive_2d", boxes_2d, "2-D"),
    "figure_10d": _spec("additive_10d", boxes_10d, "10-D"),
    "figure_relu": _spec("additive_relu", boxes_relu, "ReLU"),
}

load_data = functools.partial(figure_data, FIGURES)
