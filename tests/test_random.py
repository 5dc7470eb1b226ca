"""The counter-based generator: known answers, jax.random's own, and independence of everything."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from tts_jax import _random


# the known-answer vectors published with the generator (Random123, threefry2x32, 20 rounds)
_KNOWN = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


def _words(pair):
    return tuple(jnp.uint32(word) for word in pair)


@pytest.mark.parametrize(("key", "counter", "expected"), _KNOWN)
def test_known_answers(key, counter, expected):
    first, second = _random.threefry2x32(_words(key), _words(counter))
    assert (int(first), int(second)) == expected


def test_agrees_with_jax():
    rng = np.random.default_rng(0)
    key = rng.integers(0, 2**32, 2, dtype=np.uint32)
    count = rng.integers(0, 2**32, 2 * 50, dtype=np.uint32)
    theirs = jax.extend.random.threefry_2x32(jnp.asarray(key), jnp.asarray(count))
    ours = _random.threefry2x32(_words(key), (jnp.asarray(count[:50]), jnp.asarray(count[50:])))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)
    # a key folded with a number is the block of that number
    folded = jax.random.key_data(jax.random.fold_in(jax.random.key(3), 77))
    own = _random.threefry2x32(_random.key_words(jax.random.key(3)), _random.step_words(77))
    np.testing.assert_array_equal(np.stack(own), folded)


def test_uniform_conversion_is_one_draw_in_both_precisions():
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1], np.uint32)
    rng = np.random.default_rng(1)
    words = np.concatenate([words, rng.integers(0, 2**32, 1000, dtype=np.uint32)])
    wide = np.asarray(_random.unit_uniform(jnp.asarray(words), jnp.float64))
    np.testing.assert_array_equal(wide, words / 2.0**32)
    narrow = np.asarray(_random.unit_uniform(jnp.asarray(words), jnp.float32))
    assert narrow.dtype == np.float32
    np.testing.assert_array_equal(narrow, wide.astype(np.float32))
    assert narrow.min() >= 0
    assert narrow.max() <= 1  # by rounding
    assert wide.max() < 1
    signed = np.asarray(_random.symmetric_uniform(jnp.asarray(words), jnp.float64))
    assert signed.min() >= -1
    assert signed.max() < 1


@pytest.mark.parametrize("step", [0, 5, 2**32 - 1, 2**32, 175_000_000, 2**45 + 3])
def test_step_words(step):
    high, low = _random.step_words(step)
    assert (int(high) << 32) + int(low) == step
    traced = jax.jit(_random.step_words)(np.int64(step))
    assert (int(traced[0]) << 32) + int(traced[1]) == step


def test_seed_keys_do_not_depend_on_the_number_of_seeds():
    few = _random.seed_keys(jax.random.key(0), 3)
    many = _random.seed_keys(jax.random.key(0), 100)
    data = [np.asarray(jax.random.key_data(keys)) for keys in (*few, *many)]
    np.testing.assert_array_equal(data[0], data[2][:3])
    np.testing.assert_array_equal(data[1], data[3][:3])
    assert len(np.unique(np.concatenate(data[2:]), axis=0)) == 200


def test_other_keys():
    raw = jax.random.PRNGKey(7)
    typed = _random.typed_key(raw)
    np.testing.assert_array_equal(_random.key_words(typed), raw)
    long = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    first, second = _random.key_words(long)
    assert first.shape == second.shape == (4,)
    assert len(np.unique(np.asarray(first))) == 4


def test_stream_is_uniform_and_unrelated_between_seeds():
    stream, _ = _random.seed_keys(jax.random.key(11), 2)
    words = tuple(word[:, None] for word in _random.key_words(stream))
    steps = jnp.arange(100_000, dtype=jnp.uint32)[None]
    first, second = _random.threefry2x32(words, (jnp.zeros_like(steps), steps))
    x = np.asarray(_random.unit_uniform(first, jnp.float64))
    noise = np.asarray(_random.symmetric_uniform(second, jnp.float64))
    # five standard errors
    assert abs(x.mean() - 0.5) < 5 / np.sqrt(12 * x.size)
    assert abs(noise.mean()) < 5 / np.sqrt(3 * noise.size)
    for one, other in ((x[0], x[1]), (x[0], noise[0]), (x[0, 1:], x[0, :-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(one.size)
    counts = np.histogram(x, bins=64, range=(0, 1))[0]
    assert np.sum((counts - x.size / 64) ** 2 / (x.size / 64)) < 63 + 5 * np.sqrt(2 * 63)
