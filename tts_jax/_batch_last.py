"""Arrays that end in the lanes, and the answers to `LaneProblem` that any problem can give.

A problem that writes `sample_loss` so that every leaf may end in an axis of lanes needs nothing
more to run in them. The lanes do not see each other, so the gradient of the sum of their losses
holds the gradient of each, and one step of all is

    offset ← offset − rate · ∇ Σ_lanes ℓ(start + offset; sample)

with the rates h for the fast and εh for the slow variable. Offsets from the start keep float32
accurate: a step far below the spacing of float32 numbers near the start still adds up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from tts_jax._random import Words
from tts_jax._simd import CHUNK


_PROBE_LANES = 8191  # lanes on which a sample loss is tried: no problem has an axis of this size


class Lanes(NamedTuple):
    """An ensemble in lanes.

    Attributes:
        shared: numbers that all lanes share.
        fixed: arrays `[..., lanes]` that steps read.
        carry: arrays `[..., lanes]` that steps change.
    """

    shared: PyTree[Array]
    fixed: PyTree[Array]
    carry: PyTree[Array]


# --- rows -----------------------------------------------------------------------------------


def sum_rows(rows: Any) -> Float[Array, " W"]:
    """The sum over rows, an array `[rows, W]` or a tuple of `[W]`, as `CHUNK` partial sums.

    Written as additions because XLA's reduction over a leading axis is not vectorised over the
    trailing one. The derivative of an array gives every row the same.
    """
    # the GPU kernel, which alone has tuples, cannot hold a function with a derivative of its own
    return _row_sums(rows) if isinstance(rows, tuple) else _sum_array(rows)


@jax.jit
def _row_sums(rows: Any) -> Float[Array, " W"]:
    parts = [rows[k] for k in range(min(CHUNK, len(rows)))]
    for k in range(CHUNK, len(rows)):
        parts[k % CHUNK] = parts[k % CHUNK] + rows[k]
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        added = [a + b for a, b in zip(parts, parts[half:], strict=False)]
        parts = added + parts[len(added) : half]
    return parts[0]


@jax.custom_vjp
def _sum_array(rows: Float[Array, "m W"]) -> Float[Array, " W"]:
    return _row_sums(rows)


def _sum_forward(rows: Array) -> tuple[Array, Array]:
    return _row_sums(rows), rows


def _sum_backward(rows: Array, slope: Array) -> tuple[Array]:
    return (jnp.broadcast_to(slope, rows.shape),)


_sum_array.defvjp(_sum_forward, _sum_backward)


def each_row(function: Callable[..., Any], *rows: Any) -> Any:
    """`function` of rows that belong together, in either form that a state's rows have.

    On a CPU m rows are one array `[m, W]`, and `function` is called once; in the GPU kernel they
    are tuples of m arrays `[W]`, and it is called row by row. What it returns, one value or a
    tuple of values, has the same form.
    """
    if not isinstance(rows[0], tuple):
        return function(*rows)
    values = [function(*row) for row in zip(*rows, strict=True)]
    return tuple(zip(*values, strict=True)) if isinstance(values[0], tuple) else tuple(values)


# --- any problem ----------------------------------------------------------------------------


class Fixed(NamedTuple):
    """What a lane keeps through the run."""

    start: PyTree[Float[Array, "... W"]]  # the state that offsets refer to
    fast_rate: Float[Array, " W"]  # h
    slow_rate: Float[Array, " W"]  # εh


def is_number(leaf: Any) -> bool:
    """Whether a leaf of a problem is a number, or an array of them, that may change."""
    return isinstance(leaf, (np.ndarray, np.generic, jax.Array, float))


def lane_start(problem: Any, state: Any, *, step_size: float, epsilon: float, dtype: Any) -> Lanes:
    """Lanes from a float64 state `[..., lanes]`: the offsets from its rounding to `dtype`.

    Raises:
        ValueError: `sample_loss` does not take lanes.
    """

    def cast(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    _check(problem, state)
    lanes = jax.tree.leaves(state)[0].shape[-1]
    shared = jax.tree.map(cast, eqx.filter(problem, is_number))
    start = jax.tree.map(cast, state)
    offset = jax.tree.map(lambda leaf, near: cast(leaf - near.astype(np.float64)), state, start)
    rates: Any = (np.full(lanes, rate, dtype=dtype) for rate in (step_size, epsilon * step_size))
    return Lanes(shared, Fixed(start, *rates), offset)


def _check(problem: Any, state: Any) -> None:
    """Try `sample_loss` on lanes, without computing anything."""

    def widened(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, _PROBE_LANES), leaf.dtype)

    sample = jax.eval_shape(lambda: problem.sample(key=jax.random.key(0), step=np.int64(0)))
    sample = jax.tree.map(lambda leaf: widened(leaf, leaf.shape), sample)
    fast, slow = jax.tree.map(lambda leaf: widened(leaf, leaf.shape[:-1]), tuple(state))
    name = type(problem).__name__
    remedy = (
        f"Write it for leaves that end in an axis of lanes, for example with sums over axis 0, or "
        f"set `lanes = False` on `{name}`."
    )
    try:
        loss = jax.eval_shape(problem.sample_loss, fast, slow, sample)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"`{name}.sample_loss` must accept a trailing axis of lanes on every leaf, got an "
            f"error: {error}. {remedy}"
        ) from error
    if getattr(loss, "shape", None) != (_PROBE_LANES,):
        raise ValueError(
            f"`{name}.sample_loss` must return one loss per lane, shape [lanes], got shape "
            f"{getattr(loss, 'shape', None)} for {_PROBE_LANES} lanes. {remedy}"
        )


def lane_state(lanes: Lanes) -> tuple[Any, np.ndarray]:
    """The float64 state `[..., lanes]`, and which lanes are finite, `[lanes]`."""

    def finite(start: Any, offset: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(start) + np.asarray(offset)  # in the dtype of the steps
        return np.isfinite(value).reshape(-1, value.shape[-1]).all(axis=0)

    def value(start: Any, offset: Any) -> np.ndarray:
        return np.asarray(start, np.float64) + np.asarray(offset, np.float64)

    start = lanes.fixed.start
    alive = jax.tree.leaves(jax.tree.map(finite, start, lanes.carry))
    return jax.tree.map(value, start, lanes.carry), np.asarray(np.logical_and.reduce(alive))


def lane_sample(problem: Any, shared: Any, fixed: Fixed, key: Words, step: Words) -> PyTree[Array]:
    """`problem.sample` of every lane and step: leaves `[steps, ..., lanes]`.

    Key words are `[lanes]` or `[1, lanes]`; step words `[steps, lanes]` or `[steps, 1]`, or `[]`
    for leaves `[..., lanes]`.
    """
    problem, dtype = eqx.combine(shared, problem), fixed.fast_rate.dtype
    words = jnp.stack([word.reshape(word.shape[-1]) for word in key], axis=-1)
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    high, low = (jnp.asarray(word).astype(np.int64) for word in step)
    steps = (high << 32) | low

    def one(key: Any, step: Any) -> PyTree[Array]:
        sample = problem.sample(key=key, step=step)
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            sample,
        )

    if steps.ndim == 0:
        return jax.vmap(one, (0, None), -1)(keys, steps)
    if steps.shape[-1] == 1:
        return jax.vmap(jax.vmap(one, (0, None), -1), (None, 0))(keys, steps[:, 0])
    return jax.vmap(jax.vmap(one, (0, 0), -1), (None, 0))(keys, steps)


def lane_step(
    problem: Any, shared: Any, fixed: Fixed, carry: Any, point: PyTree[Array], *, gradient: str
) -> Any:
    """One step of all lanes, both gradients at the old state.

    A lane whose state is not finite is frozen in it.
    """
    problem = eqx.combine(shared, problem)
    values = jax.tree.map(jnp.add, fixed.start, carry)
    slopes = problem.sample_gradient(values[0], values[1], point, gradient=gradient)
    # 0 for what is finite, else NaN
    gaps = [leaf - leaf for leaf in jax.tree.leaves(values)]
    gap = sum(sum_rows(gap.reshape(-1, gap.shape[-1])) if gap.ndim > 1 else gap for gap in gaps)
    alive = gap == 0

    def move(rate: Array) -> Callable[[Array, Array], Array]:
        return lambda old, slope: jnp.where(alive, old - rate * slope, old)

    rates = fixed.fast_rate, fixed.slow_rate
    moved = (
        jax.tree.map(move(rate), old, slope)
        for rate, old, slope in zip(rates, carry, slopes, strict=True)
    )
    return type(carry)(*moved)
