"""The small compiler by itself: graphs of a step against the same operations one by one."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

import tts_jax as tts
from tts_jax import _simd
from tts_jax._batch_last import Lanes, sum_rows
from tts_jax._simd import Unsupported, aligned_copy


pytest.importorskip("llvmlite")

from tts_jax._simd import graph, kernel, machine, operations


@pytest.fixture(autouse=True)
def unfused(monkeypatch):
    """Round every product, as one operation after the other does."""
    monkeypatch.setattr(kernel, "has_fma", lambda: False)


class Step:
    """A problem made of its step; a sample is a word of (key, step)."""

    def __init__(self, step, label=None):
        self.step, self.label = step, label or (lambda shared, word: word)

    def lane_sample(self, shared, fixed, key, step):
        return (key[0] ^ (step[1] * np.uint32(2654435761))) + key[1] + step[0]

    def lane_label(self, shared, sample):
        return self.label(shared, sample)

    def lane_step(self, shared, fixed, carry, point, *, gradient):
        return self.step(shared, fixed, carry, point)


def compiled(problem, lanes, width):
    turns = 2 if width > 16 else 1
    return kernel.lane_kernel(
        problem, lanes, None, steps=0, block=16, width=width // turns, turns=turns, gradient="exact"
    )


def both(step, shared, fixed, carry, *, width, first=0, count=5, label=None, parts=1):
    """The carry after `count` steps, compiled and one operation after the other."""
    lanes = jax.tree.leaves(carry)[0].shape[-1]
    groups = lanes // width
    problem = Step(step, label)
    rng = np.random.default_rng(lanes)
    words = tuple(rng.integers(0, 2**32, lanes, np.uint32) for _ in range(2))

    def grouped(leaf):
        split = np.asarray(leaf).reshape(*leaf.shape[:-1], groups, width)
        return aligned_copy(np.moveaxis(split, -2, 0))

    made = jax.tree.map(grouped, (fixed, carry, words))
    run = compiled(problem, Lanes(shared, fixed, carry), width)
    arrays = [*map(np.asarray, jax.tree.leaves(shared)), *jax.tree.leaves(made)]
    bounds = [groups * part // parts for part in range(parts + 1)]
    tasks = [
        lambda a=a, b=b: run(arrays, a, b, first, count)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    _simd.in_threads(tasks)
    found = jax.tree.map(
        lambda leaf: np.moveaxis(leaf, 0, -2).reshape(*leaf.shape[1:-1], lanes), made[1]
    )
    fixed, expected = jax.tree.map(jnp.asarray, (fixed, carry))  # NumPy rounds powers otherwise
    for number in range(first, first + count):
        high_low = jnp.uint32(number >> 32), jnp.uint32(number & 0xFFFFFFFF)
        sample = problem.lane_sample(shared, fixed, tuple(map(jnp.asarray, words)), high_low)
        point = problem.lane_label(shared, sample)
        expected = problem.lane_step(shared, fixed, expected, point, gradient="exact")
    return found, jax.tree.map(np.asarray, expected)


def check(found, expected):
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, np.broadcast_to(right, left.shape))


def unit(word, dtype):
    return word.astype(dtype) * np.dtype(dtype).type(2.0**-32)


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


# --- random graphs --------------------------------------------------------------------------

UNARY = {
    "abs": jnp.abs,
    "neg": jnp.negative,
    "root": lambda x: jnp.sqrt(jnp.abs(x)),
    "sign": jnp.sign,
    "square": jnp.square,
    "cube": lambda x: x**3,
}
BINARY = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": lambda x, y: x / (1 + jnp.abs(y)),
    "min": jnp.minimum,
    "max": jnp.maximum,
    "lt": lambda x, y: jnp.where(x < y, x, y + 1),
    "ge": lambda x, y: jnp.where(jnp.logical_and(x >= y, y > 0), y, x),
    "or": lambda x, y: jnp.where(jnp.logical_or(x != y, x <= 0), x * y, y),
}
OPERATION = st.tuples(
    st.sampled_from([*UNARY, *BINARY, "sum", "sum"]), st.integers(0, 99), st.integers(0, 99)
)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.lists(OPERATION, min_size=3, max_size=10),
    st.sampled_from([1, 16, 32]),
    st.sampled_from([1, 2, 3, 5, 20, 65]),
    st.sampled_from([np.float32, np.float64]),
)
def test_any_graph_agrees_with_its_operations(program, width, rows, dtype):
    def step(shared, fixed, carry, point):
        pool = [carry[0], carry[1], fixed[0], fixed[1], unit(point, dtype)]
        for name, first, second in program:
            x, y = pool[first % len(pool)], pool[second % len(pool)]
            if name == "sum":
                pool.append(sum_rows(x) if x.ndim > 1 else x + y if y.ndim == 1 else sum_rows(y))
            else:
                pool.append(UNARY[name](x) if name in UNARY else BINARY[name](x, y))
            pool[-1] = pool[-1] / (1 + jnp.abs(pool[-1]))
        wide = [value for value in pool if value.ndim > 1]
        thin = [value for value in pool if value.ndim == 1]
        return wide[-1] + pool[-1], thin[-1]

    rng = np.random.default_rng(rows)
    lanes = max(width, 2) * 2
    carry = normal(rng, rows, lanes, dtype=dtype), normal(rng, lanes, dtype=dtype)
    fixed = normal(rng, rows, lanes, dtype=dtype), normal(rng, lanes, dtype=dtype)
    tolerance = 16 * float(np.finfo(dtype).eps)  # three steps; products are rounded with sums
    for left, right in zip(*both(step, (), fixed, carry, width=width, count=3), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


# --- forms of a step ------------------------------------------------------------------------

WIDTHS = pytest.mark.parametrize("width", [1, 16])


@WIDTHS
@pytest.mark.parametrize(("rows", "count"), [(2, 1), (5, 15), (20, 16), (65, 37)])
def test_counts_that_are_no_multiple_of_the_block(width, rows, count):
    """Two sums, the second of what the first gives; the step number passes 2³²."""

    def step(shared, fixed, carry, point):
        (x,) = carry
        mean = sum_rows(x * fixed[0]) * np.float32(0.1)
        spread = sum_rows((x - mean) * (x - mean)) * np.float32(0.1)
        return (x * np.float32(0.5) + unit(point, np.float32) * spread - mean,)

    rng = np.random.default_rng(1)
    fixed = (normal(rng, rows, 32, dtype=np.float32),)
    carry = (normal(rng, rows, 32, dtype=np.float32),)
    check(*both(step, (), fixed, carry, width=width, count=count, first=2**32 - 9))


@WIDTHS
def test_results_may_be_inputs_swapped_constants_and_lanes(width):
    def step(shared, fixed, carry, point):
        a, b, c, d, p, q = carry
        wide = jnp.broadcast_to(p + 1, c.shape)
        return b, a, wide, jnp.full_like(d, 0.25), q, p

    rng = np.random.default_rng(2)
    wide = [normal(rng, 5, 32, dtype=np.float64) for _ in range(4)]
    thin = [normal(rng, 32, dtype=np.float64) for _ in range(2)]
    for count in (1, 2, 3):
        check(*both(step, (), (), (*wide, *thin), width=width, count=count))


@WIDTHS
def test_sums_over_different_numbers_of_rows(width):
    def step(shared, fixed, carry, point):
        a, b = carry
        first, second = sum_rows(a), sum_rows(b)
        return a * np.float64(0.5) + second, b * np.float64(0.25) - first * shared[1]

    rng = np.random.default_rng(3)
    carry = normal(rng, 3, 32, dtype=np.float64), normal(rng, 70, 32, dtype=np.float64)
    check(*both(step, np.array([2.0, 0.125]), (), carry, width=width))


@WIDTHS
def test_not_a_number_wins_in_extremes(width):
    def step(shared, fixed, carry, point):
        a, b = carry
        return jnp.minimum(a, b), jnp.maximum(jnp.maximum(a, b), 0.5)

    rng = np.random.default_rng(4)
    a, b = normal(rng, 4, 32, dtype=np.float32), normal(rng, 4, 32, dtype=np.float32)
    a[0, ::3], b[1, ::5], a[2, 1], b[2, 2] = np.nan, np.nan, np.inf, -np.inf
    found, expected = both(step, (), (), (a, b), width=width, count=1)
    check(found, expected)
    assert np.isnan(found[0]).any()


@WIDTHS
def test_words_and_conversions(width):
    def step(shared, fixed, carry, point):
        word, signed, real = carry
        mixed = ((word << 7) | (word >> 25)) ^ (point * np.uint32(3) - word)
        signed = -jnp.maximum(signed, mixed.astype(np.int32)) >> 3
        wide = (mixed.astype(np.uint64) << 32) | ~word.astype(np.uint64)
        real = wide.astype(np.float64) * 2.0**-64 + signed.astype(np.float64)
        return jnp.minimum(mixed, word) & (wide >> 5).astype(np.uint32), signed, real + (word > 9)

    rng = np.random.default_rng(5)
    words = rng.integers(0, 2**32, (3, 32), np.uint32)
    carry = words, words.view(np.int32) // 2, normal(rng, 3, 32, dtype=np.float64)
    check(*both(step, (), (), carry, width=width))


@pytest.mark.parametrize("width", [1, 16])
def test_threads_share_groups_without_changing_bits(width):
    def step(shared, fixed, carry, point):
        return (carry[0] + sum_rows(carry[0]) * unit(point, np.float32),)

    carry = (normal(np.random.default_rng(6), 5, 96, dtype=np.float32),)
    for parts in (1, 2, 3):
        check(*both(step, (), (), carry, width=width, parts=parts))


@WIDTHS
def test_fused_products_are_rounded_once(width, monkeypatch):
    """x·y + z with exact cancellation of the rounded product; all of it where nothing is fused."""
    monkeypatch.undo()

    def step(shared, fixed, carry, point):
        return (fixed[0] * fixed[0] - fixed[1],)

    x = np.full((4, 32), 1 + 2.0**-12, np.float32)
    carry = (np.zeros((4, 32), np.float32),)
    found, _ = both(step, (), (x, x * x), carry, width=width, count=1)
    exact = x.astype(np.float64) ** 2 - (x * x).astype(np.float64)
    assert np.all(exact != 0)
    np.testing.assert_array_equal(found[0], exact.astype(np.float32) if machine.has_fma() else 0.0)


# --- refusals -------------------------------------------------------------------------------


def test_every_operation_has_an_emitter():
    assert set(operations.EMITTERS) == graph.OPERATIONS


@pytest.mark.parametrize(
    ("step", "label", "message"),
    [
        (lambda s, f, c, p: (jnp.exp(c[0]),), None, "operation exp is not one of abs, add"),
        (lambda s, f, c, p: (c[0][::-1],), None, "operation rev"),
        (lambda s, f, c, p: (c[0] * s[:, None],), None, "without lanes"),
        (lambda s, f, c, p: (c[0] * c[0].sum(),), None, "operation reduce_sum"),
        (lambda s, f, c, p: c, lambda s, p: p > 5, "arrays of booleans"),
        (lambda s, f, c, p: c, lambda s, p: jnp.stack([p, p], 1), "operation stack|concat"),
        (lambda s, f, c, p: (*c, c[0]), None, "structure of its carry"),
    ],
)
def test_says_what_it_refuses(step, label, message):
    carry = (np.zeros((3, 16), np.float32),)
    lanes = Lanes(np.zeros(3, np.float32), (), carry)
    with pytest.raises(Unsupported, match=message):
        compiled(Step(step, label), lanes, 16)


def test_without_the_compiler_the_loop_takes_over(monkeypatch, request):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llvmlite" else found(name)
    )
    _simd.missing.cache_clear()
    request.addfinalizer(_simd.missing.cache_clear)
    assert "pip install 'tts_jax[cpu]'" in _simd.missing()
    problem = tts.Univariate(tts.PiecewiseConstant([0.5], [0.0, 1.0]), neurons=2)
    options = {"key": jax.random.key(0), "epsilon": 0.1, "step_size": 0.1, "tau": [0.01]}
    assert dict(tts.sgd(problem, **options).notes)["engine"] == "loop"
    with pytest.raises(ValueError, match="'simd' here: the optional package llvmlite"):
        tts.sgd(problem, engine="simd", **options)
