"""The work that every peer does: SGD on the paper's univariate problem, one sample per step.

In the paper's symbols: the network f(x; a, u) = a_0 + Σ_j a_j σ((x − u_j)/η) meets a
piecewise-constant target with uniform label noise; a step moves a by h and u by εh against the
exact gradient of the squared residual, both at the old state. Nothing here imports JAX, so that
the process of a peer loads only what it measures.
"""

import dataclasses
from typing import Protocol

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

    def starts(self) -> np.ndarray:
        """The starting positions, sorted uniforms, `[seeds, neurons]`; weights start at zero."""
        draws = np.random.default_rng(2023).random((self.seeds, self.neurons))
        return np.sort(draws, axis=1)


class Run(Protocol):
    """An ensemble under way, built from a `Setting`.

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
