"""Animations of network and neurons over slow time: SGD beside the gradient flow and the limit.

    data = compute("two_timescale", scale="quick")
    movie = draw(data)
    images = list(movie.images())
    plot.save_gif(images, "two_timescale.gif")

All methods share one time axis, even in arcsinh(τ/τ₀): the weights, which learn within τ ≈ ε, and
the neurons, which move a thousand times more slowly, are both seen at their pace. Frames are
evenly spaced on that axis. `"varpro"` shows the features of variable projection instead, and
their density beside the ultra-fast diffusion.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

import tts_jax as tts
from tts_jax import checks, plot
from tts_jax.experiments import marion_berthier, varpro
from tts_jax.experiments._figures import Data, OnResult, Scale
from tts_jax.experiments._panels import GRID, jumps_of, number, one_seed, problem_of, target_of
from tts_jax.experiments.marion_berthier import Settings


METHODS = ("sgd", "flow", "limit")
# the figures that show the same runs, and the functions that compute them
FIGURES = {"two_timescale": "figure4", "same_rate": "figure5", "varpro": "varpro_density"}
_COMPUTE = {
    "two_timescale": marion_berthier.two_timescale,
    "same_rate": marion_berthier.same_rate,
}
_EARLY = 5e-4  # the part of the run that has a linear time axis


def settings_of(
    experiment: str, scale: Scale = "quick", *, seed: int = 0, frames: int = 72
) -> Settings | varpro.Settings:
    """The settings of an experiment, with a record per frame and seeds up to `seed`.

    Raises:
        ValueError: an unknown experiment or scale, `seed` < 0, or `frames` < 2.
    """
    checks.one_of("experiment", experiment, FIGURES)
    remedy = "Seed 0 starts from the published positions."
    if checks.nonnegative("seed", seed, remedy, single=True) != int(seed):
        raise checks.argument_error("seed", "be an integer", seed, remedy)
    if checks.positive_integer("frames", frames, "Use for example 72.") < 2:
        raise checks.argument_error("frames", "be at least 2", frames, "Use for example 72.")
    if experiment == "varpro":
        usual = varpro.settings_of(experiment, scale)
        return replace(usual, records=2 * frames, seeds=max(usual.seeds, int(seed) + 1))
    settings = marion_berthier.settings_of(experiment, scale, int(seed) + 1)
    return replace(settings, records=frames, early=_EARLY * settings.tau_end)


def compute(
    experiment: str,
    scale: Scale = "quick",
    *,
    seed: int = 0,
    frames: int = 72,
    reuse: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_result: OnResult | None = None,
) -> Data:
    """The trajectories of an animation.

    Args:
        experiment: `"two_timescale"`, ε = 2e-5, `"same_rate"`, ε = 1, or `"varpro"`.
        scale: `"paper"` takes the paper's step size.
        seed: which start and samples; those of the figures with the same number.
        frames: number of recorded times.
        reuse: a folder; what `tts-jax reproduce` wrote there of the same runs is taken, with its
            times, instead of being computed.
        progress: show a progress bar of SGD.
        on_result: called with the name and trajectory of each method that is computed.

    Returns:
        `"sgd"`, `"flow"` and `"limit"`, of varpro `"base"`, with a batch axis of at least
        `seed` + 1 seeds.

    Raises:
        ValueError: a bad argument.
    """
    settings = settings_of(experiment, scale, seed=seed, frames=frames)
    if isinstance(settings, varpro.Settings):
        known = None if reuse is None else varpro.saved(reuse, FIGURES[experiment], settings)
        if known is not None:
            return {"base": known}
        return varpro.compute(settings, progress=progress, on_result=on_result)
    found = {} if reuse is None else saved(reuse, experiment, settings)
    if found:
        # the others at the same times
        drawn = marion_berthier.settings_of(experiment, scale)
        settings = replace(settings, records=drawn.records, early=0.0)
    missing = [name for name in METHODS if name not in found]
    computed = _COMPUTE[experiment](
        settings=settings, methods=missing, progress=progress, on_result=on_result
    )
    return {name: found[name] if name in found else computed[name] for name in METHODS}


def saved(folder: str | os.PathLike[str], experiment: str, settings: Settings) -> Data:
    """What `tts-jax reproduce` wrote of the runs that `settings` describe; empty without SGD."""
    found = {}
    for name in METHODS:
        path = Path(folder) / f"{FIGURES[experiment]}_{name}.nc"
        if not path.is_file():
            continue
        run = tts.load(path)
        if _same_run(run, settings):
            found[name] = run
    return found if "sgd" in found else {}


def _same_run(run: tts.Trajectory, settings: Settings) -> bool:
    expected = {"eta": settings.eta, "values": settings.values, "noise": settings.noise}
    if run.method != "limit":
        expected["epsilon"] = settings.epsilon[0]
    if run.method == "sgd":
        expected["step_size"] = settings.step_size
        if dict(run.notes).get("gradient") != settings.gradient:
            return False
    start = np.asarray(settings.start().slow)
    return (
        np.shape(run.slow)[0] >= settings.seeds
        and np.shape(run.slow)[-1] == settings.neurons
        and np.array_equal(jumps_of(run), settings.jumps)
        and all(np.array_equal(run.settings[name], value) for name, value in expected.items())
        and np.isclose(np.asarray(run.tau)[-1], settings.tau_end, rtol=1e-6)
        and np.allclose(np.asarray(run.slow)[: settings.seeds, 0], start, rtol=0.0, atol=1e-6)
    )


def pace(tau: np.ndarray, frames: int, early: float) -> np.ndarray:
    """Indices of recorded times, about `frames` and each once, evenly spaced in arcsinh(τ/early).

    Args:
        tau: recorded times, `[T]`, from 0 on.
        frames: number of times wanted; fewer where records are too far apart.
        early: τ₀.
    """
    places = np.arcsinh(tau / early)
    wanted = np.linspace(places[0], places[-1], frames)
    return np.unique(np.argmin(np.abs(places[:, None] - wanted), axis=0))


def draw(data: Mapping[str, tts.Trajectory], *, seed: int = 0, frames: int = 72) -> plot.Movie:
    """Networks above, neuron positions up to the present time below, a column per method.

    Of varpro the features of a seed left, and the density of those of all seeds right.

    Args:
        data: the answer of `compute`; a column for each method that is there.
        seed: which one to show.
        frames: frames at most, each at a recorded time.
    """
    if "base" in data:
        return varpro.movie(data["base"], seed=seed, frames=frames)
    names = [name for name in METHODS if name in data]
    tau = np.asarray(data[names[0]].tau, dtype=float)
    early = max(_EARLY * tau[-1], tau[1] if tau[1] > 2.0 * _EARLY * tau[-1] else 0.0)
    index = pace(tau, frames, early)
    with plot.theme():
        drawing = plot.figure(3.0 * len(names), 4.7)
        panels = drawing.subplots(2, len(names), sharex="row", sharey="row", squeeze=False)
        columns = [
            _Column(data[name], seed, index, *panels[:, column])
            for column, name in enumerate(names)
        ]
        for ax in panels[:, 1:].flat:
            ax.set_ylabel("")
        for ax in panels[1]:
            _time_axis(ax, early, tau[-1])
        clock = drawing.suptitle("", fontsize=10.0)

    def show(frame: int) -> None:
        clock.set_text(f"τ = {number(float(tau[index[frame]]))}")
        for column in columns:
            column.show(frame)

    show(0)
    return plot.Movie(drawing, int(index.size), show)


class _Column:
    """One method: its network with the neurons, and the paths of the neurons."""

    def __init__(
        self, trajectory: tts.Trajectory, seed: int, index: np.ndarray, above: Axes, below: Axes
    ) -> None:
        problem, style = problem_of(trajectory), plot.METHODS[trajectory.method]
        self.tau = np.asarray(trajectory.tau)[index]
        self.slow = one_seed(trajectory.slow, seed)[index]
        self.loss = np.atleast_2d(np.asarray(trajectory.loss))[seed, index]
        fast = one_seed(trajectory.fast, seed)[index]
        self.networks = [
            np.asarray(problem.predict(a, u, GRID)) for a, u in zip(fast, self.slow, strict=True)
        ]
        values = np.asarray(target_of(trajectory).values)
        jumps = jumps_of(trajectory)
        plot.network(
            {trajectory.method: (GRID, self.networks[0])},
            target=(jumps, values),
            neurons=self.slow[0],
            legend=False,
            ax=above,
        )
        low, high = min(0.0, float(values.min())), float(values.max())
        above.set_ylim(low - 0.1 * (high - low), high + 0.14 * (high - low))
        self.curve, *self.marks = above.get_lines()
        self.curve.set_linestyle("-")
        above.set_title(_title(trajectory, style.label), loc="left", color=style.color)
        self.said = above.set_title("", loc="right", fontsize=8.0)

        count = len(below.get_lines())
        curve = {trajectory.method: (self.tau, self.slow)}
        plot.positions(curve, jumps=jumps, legend=False, ax=below)
        self.paths = below.get_lines()[count + jumps.size :]
        for path in self.paths:
            path.set_linestyle("-")
        (self.now,) = below.plot(
            [], [], linestyle="none", marker="o", markersize=2.6, color=style.color, clip_on=True
        )

    def show(self, frame: int) -> None:
        self.curve.set_ydata(self.networks[frame])
        for mark, place in zip(self.marks, self.slow[frame], strict=True):
            mark.set_xdata([place, place])
        for path, places in zip(self.paths, self.slow.T, strict=True):
            path.set_data(self.tau[: frame + 1], places[: frame + 1])
        self.now.set_data(np.full(self.slow.shape[1], self.tau[frame]), self.slow[frame])
        self.said.set_text(f"loss {number(float(self.loss[frame]))}")


def _title(trajectory: tts.Trajectory, label: str) -> str:
    epsilon = trajectory.settings.get("epsilon")
    return label if epsilon is None else f"{label}, ε = {number(float(np.ravel(epsilon)[0]))}"


def _time_axis(ax: Axes, early: float, end: float) -> None:
    """τ on the scale arcsinh(τ/early), labelled at 0 and at powers of ten."""
    ax.set_xscale(
        "function",
        functions=(lambda tau: np.arcsinh(tau / early), lambda place: early * np.sinh(place)),
    )
    powers = np.arange(np.ceil(np.log10(2.0 * early)), np.floor(np.log10(end)) + 1).astype(int)
    ticks: Sequence[float] = [0.0, *(10.0**power for power in powers)]
    ax.set_xticks(ticks, ["0", *(f"$10^{{{power}}}$" for power in powers)])
    ax.set_xticks([], minor=True)
    ax.set_xlim(0.0, end)
    ax.set_xlabel("slow time τ")
