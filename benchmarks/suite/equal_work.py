"""Whether two programs do the same SGD: equality in distribution of short ensembles.

Peers draw from different generators, so their runs agree in distribution only. From the same
starts and with larger steps, so that something is learnt and the positions move, two numbers of
every seed are compared: its population loss and how far its positions moved. Either must pass a
two-sample Kolmogorov–Smirnov test at level 0.01, and its means must agree within four standard
errors. Generators are seeded, so a peer passes or fails the same way every time.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.setting import JUMPS, VALUES, Setting


STEPS = 1024
LEVEL = 0.01
STANDARD_ERRORS = 4.0
_GRID = 4000


def check_setting(seeds: int, dtype: str, threads: int) -> Setting:
    """The ensemble of the check: large steps and much noise, so that every term shows.

    Half the noise, a step size 25 % off, or the box in place of σ′ then fail clearly.
    """
    return Setting(seeds, dtype, threads=threads, step_size=2e-2, epsilon=2e-4, noise=3.0)


def population_loss(setting: Setting, weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """∫₀¹ (f − f*)² dx of every seed by the midpoint rule, `[seeds]`."""
    x = (np.arange(_GRID) + 0.5) / _GRID
    target = np.asarray(VALUES)[np.searchsorted(JUMPS, x, side="right")]
    losses = []
    for a, u in zip(weights, positions, strict=True):
        z = (x - u[:, None]) / setting.eta
        tail = 4 * np.maximum(0.5 - np.abs(z), 0) ** 3
        network = a[0] + a[1:] @ np.where(z > 0, 1 - tail, tail)
        losses.append(np.mean((network - target) ** 2))
    return np.asarray(losses)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """What is compared: the loss and the mean move of the positions, in η, of every seed."""

    loss: np.ndarray
    move: np.ndarray

    @staticmethod
    def of(setting: Setting, weights: np.ndarray, positions: np.ndarray) -> "Ensemble":
        """The numbers of final states."""
        loss = population_loss(setting, weights, positions)
        moved = np.abs(positions - setting.starts())
        return Ensemble(loss, moved.mean(axis=1) / setting.eta)


def compare(reference: Ensemble, peer: Ensemble) -> dict[str, Any]:
    """Whether `peer` does the work of `reference`, with the numbers that say so.

    If `peer` has fewer seeds, it is compared with the first ones of `reference`.
    """
    answer: dict[str, Any] = {"comparable": True, "reason": None}
    for name in ("loss", "move"):
        theirs = getattr(peer, name)
        ours = getattr(reference, name)[: theirs.size]
        reason = None
        if not np.all(np.isfinite(theirs)):
            reason = f"{name} is not finite"
            answer[name] = {"mean": None, "reference": float(ours.mean()), "p": 0.0}
        else:
            p = float(stats.ks_2samp(ours, theirs).pvalue)
            gap = abs(theirs.mean() - ours.mean())
            error = np.sqrt((theirs.var() + ours.var()) / theirs.size)
            means = float(theirs.mean()), float(ours.mean())
            answer[name] = {"mean": means[0], "reference": means[1], "p": p}
            if p <= LEVEL:
                reason = f"{name} differs in distribution (p = {p:.1g})"
            elif gap > STANDARD_ERRORS * error:
                reason = f"mean {name} is {means[0]:.4g}, not {means[1]:.4g}"
        if reason is not None:
            answer.update(comparable=False, reason=reason)
    return answer
