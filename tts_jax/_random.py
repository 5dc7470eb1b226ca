"""Counter-based randomness: every draw of a seed is a pure function of its key and the step.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., 2011), the one behind
`jax.random`, written element by element so that it fuses into the loops that use it. A seed's
key gives the two key words, the 64-bit step number the two counter words, and out come two
words per step. Nothing else enters: not the number of seeds, the chunk, the device or the dtype
of the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]


def threefry2x32(key: Words, counter: Words) -> Words:
    """Threefry-2x32, 20 rounds, elementwise over words of any broadcastable shapes."""
    words = (*key, key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(turn)) | (y >> np.uint32(32 - turn))
            y = y ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def unit_uniform(word: UInt32[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """The 32-bit draw word/2³² in [0, 1); in float32 its rounding, which may be 1."""
    dtype = np.dtype(dtype)
    return word.astype(dtype) * dtype.type(2.0**-32)


def symmetric_uniform(word: UInt32[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """The same draw spread over [−1, 1); in float32 its rounding, which may be 1."""
    dtype = np.dtype(dtype)
    return word.astype(dtype) * dtype.type(2.0**-31) - dtype.type(1)


def step_words(step: Any) -> Words:
    """The (high, low) words of a step number.

    A Python or NumPy integer of up to 64 bits keeps all of them. A JAX integer keeps those of
    its dtype: with x64 off a traced step is 32 bits wide.
    """
    if not isinstance(step, jax.Array):
        step = int(step)
        return jnp.uint32(step >> 32), jnp.uint32(step & 0xFFFFFFFF)
    low = step.astype(jnp.uint32)
    if step.dtype.itemsize < 8:
        return jnp.zeros_like(low), low
    return (step >> 32).astype(jnp.uint32), low


def typed_key(key: Any) -> PRNGKeyArray:
    """`key` as a typed key; raw key words of the older interface are wrapped."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def key_words(key: PRNGKeyArray) -> Words:
    """The two key words of each key, `[...]`.

    A Threefry key has them; one of another generator, whose keys are longer, draws them.
    """
    data = jax.random.key_data(key)
    if data.shape[-1] != 2:
        flat = jax.vmap(lambda one: jax.random.bits(one, (2,), jnp.uint32))(key.reshape(-1))
        data = flat.reshape(*key.shape, 2)
    return data[..., 0], data[..., 1]


def seed_keys(key: PRNGKeyArray, seeds: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The keys of seeds 0, 1, ..., `[seeds]` each: of their sample streams and their starts.

    The keys of seed i depend on `key` and i only, not on how many seeds there are.
    """
    own = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(seeds))
    stream, start = (jax.vmap(lambda k, n=n: jax.random.fold_in(k, n))(own) for n in (0, 1))
    return stream, start
