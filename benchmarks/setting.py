"""The work that every peer does: SGD or the gradient flow on the paper's univariate problem.

In the paper's symbols: the network f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η) meets a
piecewise-constant target. A step of SGD, with uniform label noise, moves a by h and u by εh
against the exact gradient of the squared residual of one sample, both at the old state; the flow
ε da/dτ = −∂L/∂a, du/dτ = −∂L/∂u follows the loss L = ∫₀¹ (f − f*)² dx from a = 0. Nothing here
imports JAX, so that the process of a peer loads only what it measures.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol

import numpy as np


JUMPS = (0.2, 0.35, 0.5, 0.65, 0.8)
VALUES = (1.0, 5.0, 1.0, 3.0, 1.0, 5.0)
PAPER_STEPS = 175_000_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """One ensemble of SGD runs; the paper's numbers by default.

    Attributes:
        seeds: number of independent runs.
        dtype: `"float32"` or `"float64"`.
        neurons: m.
        threads: cores to use.
        eta: width η of a transition.
        epsilon: ratio ε of the step sizes.
        step_size: h.
        noise: half-width of the label noise.
    """

    seeds: int
    dtype: str = "float32"
    neurons: int = 20
    threads: int = 1
    eta: float = 4e-3
    epsilon: float = 2e-5
    step_size: float = 1e-5
    noise: float = 1.0

    columns: ClassVar = ("seeds", "dtype", "neurons")  # of a row of measurements
    divisible: ClassVar = False  # whether a slow peer may take the first seeds alone

    def starts(self) -> np.ndarray:
        """The starting positions, sorted uniforms, `[seeds, neurons]`; weights start at zero."""
        draws = np.random.default_rng(2023).random((self.seeds, self.neurons))
        return np.sort(draws, axis=1)


@dataclasses.dataclass(frozen=True)
class FlowSetting:
    """A batch of solves of the flow; the paper's numbers by default.

    Attributes:
        seeds: number of starts.
        tolerance: relative and absolute tolerance of a step.
        neurons: m.
        threads: cores to use.
        eta: width η of a transition.
        epsilon: timescale separation ε.
        end: last slow time τ.
        records: recorded times, evenly spaced from 0.
        mixed: the starts of `mixed_starts` instead of random ones.
        nudged: every position is moved to the next number of float64, up or down at random.
    """

    seeds: int
    tolerance: float = 1e-8
    neurons: int = 20
    threads: int = 1
    eta: float = 4e-3
    epsilon: float = 2e-5
    end: float = 0.035
    records: int = 36
    mixed: bool = False
    nudged: bool = False

    columns: ClassVar = ("seeds", "neurons", "eta", "epsilon", "end", "tolerance")
    divisible: ClassVar = True

    def tau(self) -> np.ndarray:
        """The recorded times, `[records]`."""
        return np.linspace(0.0, self.end, self.records)

    def starts(self) -> np.ndarray:
        """The starting positions, `[seeds, neurons]`; fewer seeds are the first of more."""
        if self.mixed:
            starts = mixed_starts(self.seeds, self.neurons, self.eta)[0]
        else:
            draws = np.random.default_rng(2023).random((self.seeds, self.neurons))
            starts = np.sort(draws, axis=1)
        if self.nudged:
            up = np.random.default_rng(2026).random(starts.shape) < 0.5
            starts = np.nextafter(starts, np.where(up, np.inf, -np.inf))
        return starts

    def states(self) -> np.ndarray:
        """The starting states (a, u) with a = 0, `[seeds, 2 neurons + 1]`."""
        starts = self.starts()
        return np.concatenate([np.zeros((self.seeds, self.neurons + 1)), starts], axis=1)


KINDS = ("random", "coincident", "close", "straddling", "on jumps", "crossing", "outside")


def mixed_starts(seeds: int, neurons: int, eta: float) -> tuple[np.ndarray, list[str]]:
    """Positions that are hard in one way or another, `[seeds, neurons]`, and the `KINDS` of each.

    About two thirds are random. In the others some neurons of a random start are moved, and the
    order is left as it comes: onto others (`coincident`), to within 1e-9 η to 1e-3 η of
    another (`close`), to within η/2 of an end, several on one side (`straddling`), exactly
    `on jumps`, to within 2η of one jump, where they overlap, overtake and cross (`crossing`), and
    up to 5η beyond the ends (`outside`). The first seeds of more are those of fewer.
    """
    starts = np.random.default_rng(2024).random((seeds, neurons))
    kinds = []
    special = KINDS[1:]
    for index, u in enumerate(starts):
        rng = np.random.default_rng([2025, index])
        kind = special[(index // 3) % len(special)] if index % 3 == 2 else KINDS[0]
        kinds.append(kind)
        count = int(rng.integers(2, 5)) if neurons >= 8 else 1
        moved = rng.permutation(neurons)[: 2 * count]
        first, second = moved[:count], moved[-count:]
        end = float(rng.integers(2))
        if kind == "random":
            u.sort()
        elif kind == "coincident":
            u[first] = u[second] if rng.random() < 0.5 else u[second[0]]
        elif kind == "close":
            u[first] = u[second] + eta * 10.0 ** rng.uniform(-9, -3, count)
        elif kind == "straddling":
            u[first] = end + eta * rng.uniform(-0.5, 0.5, count)
        elif kind == "on jumps":
            u[first] = rng.choice(JUMPS, count)
        elif kind == "crossing":
            u[first] = rng.choice(JUMPS) + eta * rng.uniform(-2, 2, count)
        else:
            u[first] = end + (2 * end - 1) * eta * rng.uniform(0, 5, count)
    return starts, kinds


class Answer(NamedTuple):
    """Solved starts: weights `[seeds, records, m + 1]`, positions `[seeds, records, m]`, reasons.

    A reason is empty, or says why the start failed.
    """

    fast: np.ndarray
    slow: np.ndarray
    reasons: list[str]


class Run(Protocol):
    """An ensemble under way, built from a `Setting` or a `FlowSetting`.

    A run of SGD is read as numbers; one of the flow, whose step solves the whole batch, has
    `answer() -> Answer` in place of `read`.

    Attributes:
        layout: how the seeds are laid out, in words.
        compile_seconds: time spent on compilation.
        chunk: `advance` takes multiples of this many steps.
    """

    layout: str
    compile_seconds: float
    chunk: int

    def advance(self, steps: int) -> None:
        """Take `steps` steps of every seed; returns when they are done."""
        ...

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights, bias first, `[seeds, neurons + 1]` and positions `[seeds, neurons]`."""
        ...
