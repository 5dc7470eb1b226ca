"""What is known in closed form about random initialisations, and the bounds of the theorem.

All times are slow times τ in this package's convention, L = ∫₀¹ (f − f*)² dx without the factor ½;
a time of the text of Marion & Berthier (2023, arXiv 2304.09576) is twice as long. Neurons start
independently and uniformly on [0, 1].

Three things are compared here (`tts-jax study initialisation` draws them):

- Theorem 1 of the paper, `neurons_bound` and `recovery_time_bound`: sufficient, and far from
  necessary.
- The probability that an initialisation is good, `good_start_probability`: exact for the numbers of
  neurons per piece and their spacing. The theorem's proof also wants every jump to have a clearly
  nearer neuron; that couples neighbouring pieces, and is not part of it.
- When a jump is recovered in the sharp limit. With one jump the distribution is closed,
  `hitting_time_cdf`. With several, jumps share neurons where a piece has few of them; then only
  simulation is left, `sample_hitting_times`.
"""

import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from tts_jax import checks
from tts_jax._precision import double_precision
from tts_jax._sharp_limit import sharp_limit
from tts_jax._trajectory import Trajectory
from tts_jax.problems import _sharp
from tts_jax.problems.univariate import PiecewiseConstant, Univariate


__all__ = [
    "good_start_probability",
    "hitting_time",
    "hitting_time_cdf",
    "neurons_bound",
    "recovery_time_bound",
    "sample_hitting_times",
]


def neurons_bound(target: PiecewiseConstant, delta: float) -> int:
    """The number of neurons that Theorem 1 asks for: m ≥ (6/Δv)(4 + log n + log(1/δ)).

    Args:
        target: n pieces, the shortest of length Δv.
        delta: the probability 0 < δ < 1 of failure that one accepts.

    Raises:
        ValueError: δ is out of range.
    """
    checks.positive("delta", delta, "Use for example 0.05.", single=True)
    if delta >= 1:
        raise checks.argument_error("delta", "be below 1", delta, "Use for example 0.05.")
    lengths = _lengths(target)
    return int(np.ceil(6.0 / lengths.min() * (4.0 + np.log(lengths.size) - np.log(delta))))


def recovery_time_bound(target: PiecewiseConstant) -> float:
    """The slow time τ = 3/Δf² by which Theorem 1 has the loss small, for small ε and η.

    Δf is the smallest height of a jump. The paper's T = 6/(ε Δf²) is a fast time with the ½ in the
    loss, hence εT/2 here. How small ε and η must be is not known in numbers.

    Raises:
        ValueError: the target has no jump.
    """
    heights = np.abs(np.asarray(target.heights))
    if heights.size == 0:
        raise ValueError("Argument `target` must have at least one jump, got none. Add a jump.")
    return float(3.0 / heights.min() ** 2)


def good_start_probability(
    target: PiecewiseConstant, neurons: int, *, at_least: int = 2, spacing: float = 0.0
) -> float:
    """P(every piece has `at_least` neurons, and nothing is closer than `spacing`), exactly.

    The spacing is that of neighbouring neurons of a piece and of neurons and jumps. Of n uniform
    points in a piece of length ℓ all n + 1 gaps are ≥ s with probability (1 − (n + 1)s/ℓ)₊ⁿ; a
    piece at an end of [0, 1] has n such gaps. The numbers of neurons are multinomial: as those of
    independent Poisson variables, given their sum, so that the probability is one coefficient of a
    product of series with positive terms, correct to about 1e-13 relative.

    Args:
        target: its pieces.
        neurons: m.
        at_least: neurons per piece: 2 where the dynamics of the jumps do not mix; the proof of
            Theorem 1 wants 6 (as recalled, not quoted).
        spacing: least distance s, in units of x.

    Raises:
        ValueError: an argument is out of range.
    """
    from scipy import special  # slow to import

    neurons = checks.positive_integer("neurons", neurons, "Use for example 20.")
    if isinstance(at_least, bool) or not isinstance(at_least, (int, np.integer)) or at_least < 0:
        remedy = "Use for example 2."
        raise checks.argument_error("at_least", "be an integer of at least 0", at_least, remedy)
    checks.nonnegative("spacing", spacing, "Use 0 for none.", single=True)
    lengths = _lengths(target)
    counts = np.arange(neurons + 1)
    total = np.ones(1)
    for piece, length in enumerate(lengths):
        ends = (piece == 0) + (piece == lengths.size - 1)
        free = np.maximum(length - (counts + 1 - ends) * spacing, 0.0)
        log_term = special.xlogy(counts, neurons * free) - special.gammaln(counts + 1)
        terms = np.exp(log_term - neurons * length)
        terms[:at_least] = 0.0
        total = np.convolve(total, terms)[: neurons + 1]
    if total.size <= neurons:
        return 0.0
    return float(
        total[neurons]
        / np.exp(special.xlogy(neurons, neurons) - special.gammaln(neurons + 1) - neurons)
    )


@double_precision
def hitting_time(
    left: Float[ArrayLike, "..."], right: Float[ArrayLike, "..."], height: Float[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """The τ at which the nearer of a jump's two neurons reaches it, in the sharp limit.

    With distances l < r it lies between l/w² and 4l/w² (docs/sharp_limit.md).

    Args:
        left: distance of the neuron on the left, > 0.
        right: distance of the neuron on the right, > 0.
        height: w.

    Raises:
        ValueError: a distance is negative or not finite.
    """
    remedy = "Distances are u − v and v − u."
    for name, value in (("left", left), ("right", right)):
        checks.nonnegative(name, value, remedy)
    left, right, rate = (jnp.asarray(x, jnp.float64) for x in (left, right, height))
    return _sharp.pair_hitting_time(
        jnp.minimum(left, right), jnp.maximum(left, right), jnp.square(rate)
    )


def hitting_time_cdf(
    tau: Float[ArrayLike, "..."], *, jump: float, height: float, neurons: int
) -> Float[np.ndarray, "..."]:
    """P(a single jump is hit by τ) for m uniform neurons, in the sharp limit.

    Let the distances of the two flanking neurons be s x and s (1 − x). Hitting times are
    homogeneous, T = s t(x)/w², and the density of (s, x) is m (m − 1)(1 − s)^(m−2) s. With
    G(S) = 1 − (1 − S)^(m−1) (1 + (m − 1) S), the integral over s < S,

        P(T ≤ τ) = ∫₀¹ G(min(w²τ/t(x), v/x, (1 − v)/(1 − x))) dx + walls,

    where a side without neurons, with probability (1 − v)^m or v^m, is a wall at the end of the
    interval. The integral is done by Gauss's rule between the places where the minimum changes.

    Args:
        tau: slow times, any shape.
        jump: position 0 < v < 1 of the only jump of the target.
        height: w.
        neurons: m.

    Raises:
        ValueError: an argument is out of range.
    """
    checks.nonnegative("tau", tau, "Slow times start at 0.")
    neurons = checks.positive_integer("neurons", neurons, "Use for example 20.")
    checks.positive("jump", jump, "Put it inside (0, 1).", single=True)
    if jump >= 1:
        raise checks.argument_error("jump", "be below 1", jump, "Put it inside (0, 1).")
    checks.real("height", height, "Use the difference of the two values.")
    scaled = np.asarray(tau, float) * float(height) ** 2
    return np.vectorize(lambda time: _cdf(time, float(jump), neurons), otypes=[float])(scaled)


def _cdf(time: float, jump: float, neurons: int) -> float:
    """The distribution function of w²T."""
    from scipy import optimize  # slow to import

    def reach(y: np.ndarray) -> np.ndarray:
        x = _share(y)
        return np.minimum(jump / np.maximum(x, 1e-300), (1.0 - jump) / np.maximum(1.0 - x, 1e-300))

    def early(y: np.ndarray) -> np.ndarray:
        return time - _pair_time(y) * reach(y)

    # both limits of s change smoothly between the places where they change roles
    grid = np.linspace(-1.0, 1.0, 257)
    signs = np.sign(early(grid))
    turns = [
        cast(float, optimize.brentq(early, grid[k], grid[k + 1], xtol=1e-15))
        for k in np.flatnonzero(signs[:-1] * signs[1:] < 0)
    ]
    breaks = np.unique([-1.0, 0.0, 1.0, np.cbrt(2.0 * jump - 1.0), *turns])
    edges = np.concatenate([np.linspace(a, b, 5)[:-1] for a, b in itertools.pairwise(breaks)])
    edges = np.append(edges, 1.0)
    half, middle = np.diff(edges) / 2.0, (edges[1:] + edges[:-1]) / 2.0
    nodes, weights = np.polynomial.legendre.leggauss(24)
    y = middle[:, None] + half[:, None] * nodes
    with np.errstate(divide="ignore"):
        most = np.minimum(np.minimum(time / _pair_time(y), reach(y)), 1.0)
    tail = (1.0 - most) ** (neurons - 1) * (1.0 + (neurons - 1) * most)
    total = float(np.sum(half[:, None] * weights * (1.0 - tail) * 1.5 * y * y))
    for wall, room in ((jump, 1.0 - jump), (1.0 - jump, jump)):
        # the side of length `wall` is empty
        path = min(np.cbrt(wall**3 + 3.0 * wall**2 * time) - wall, room)
        total += room**neurons - (room - path) ** neurons
    return min(total, 1.0)


def _share(y: np.ndarray) -> np.ndarray:
    """x = (1 + y³)/2: hitting times have a cube root at x = ½."""
    return 0.5 * (1.0 + y**3)


def _pair_time(y: np.ndarray) -> np.ndarray:
    """w²T of the distances x and 1 − x."""
    x = _share(np.asarray(y, float))
    near, far = np.minimum(x, 1.0 - x), np.maximum(x, 1.0 - x)
    square = far * far + far * near + near * near
    p, c = np.sqrt(square), np.abs(y) * np.cbrt(square)  # far − near = |y|³
    series = np.polynomial.polynomial.polyval(2.0 * (c / p) ** 6 - 1.0, _sharp.PSI)
    return np.maximum(_sharp.SCALE * (p * series - c * _sharp.PSI_QUARTER), 0.0)


@double_precision
def sample_hitting_times(
    target: PiecewiseConstant, neurons: int, *, key: PRNGKeyArray, count: int
) -> dict[str, Any]:
    """Hitting times of all jumps in the sharp limit from random starts.

    Args:
        target: any target.
        neurons: m.
        key: random key.
        count: number of starts.

    Returns:
        `hitting_time` `[count, jumps]`, infinite where a jump is never hit; `recovery_time`
        `[count]`, their maximum; `status` `[count]`.
    """
    checks.instance("target", target, PiecewiseConstant, "Build it with jumps and values.")
    checks.random_key(key)
    neurons = checks.positive_integer("neurons", neurons, "Use for example 20.")
    count = checks.positive_integer("count", count, "Use for example 1000.")
    slow = np.asarray(jax.random.uniform(key, (count, neurons), jnp.float64))
    run = padded_sharp_limit(target, slow, np.zeros(1))
    times = np.asarray(run.stats["hitting_time"])
    return {
        "hitting_time": times,
        "recovery_time": times.max(axis=-1, initial=0.0),
        "status": np.asarray(run.status),
    }


def padded_sharp_limit(
    target: PiecewiseConstant,
    slow: Float[np.ndarray, "starts m"],
    tau: Float[np.ndarray, " T"],
) -> Trajectory:
    """The sharp limit from starts whose missing neurons are NaN; few sizes are compiled."""
    size = max(16, 1 << (slow.shape[1] - 1).bit_length())
    # neurons beyond 1 play no part
    padded = np.full((slow.shape[0], size), 2.0)
    padded[:, : slow.shape[1]] = np.where(np.isnan(slow), 2.0, slow)
    problem = Univariate(target, neurons=size, eta=1e-3)
    return sharp_limit(problem, problem.state(slow=padded), tau=tau)


def _lengths(target: PiecewiseConstant) -> Float[np.ndarray, " pieces"]:
    checks.instance("target", target, PiecewiseConstant, "Build it with jumps and values.")
    return np.diff(np.asarray(target.jumps, float), prepend=0.0, append=1.0)
