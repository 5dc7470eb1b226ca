"""Seeds in SIMD lanes: the batch-last SGD engine.

A processor adds sixteen float32 numbers as fast as one. The engine therefore keeps the seeds of
an ensemble on the last axis and moves groups of `width` seeds through the steps together:

    for each group of lanes                     (groups are spread over the devices)
        for each block of `BLOCK` steps         draw the block's samples, [BLOCK, width]
            for each step of the block          one SGD step, arrays [..., width]

The inner loop then holds nothing but the step. What a step is belongs to the problem, which
answers `LaneProblem`. A lane never sees its neighbours, so a diverged seed stays alone, and the
numbers of a seed do not depend on how many there are.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from tts_jax import _compat
from tts_jax._problem import State
from tts_jax._random import Words


BLOCK = 16  # steps whose samples are drawn together
CACHE_BYTES = 32 * 1024  # what a group may touch; XLA also compiles such a loop as one function
REPLAY_STEPS = 8192  # steps of a given sample stream that one call takes along


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


@runtime_checkable
class LaneProblem(Protocol):
    """What a problem with `lanes = True` answers.

    `lane_start` and `lane_state` run on the host in NumPy float64, on states whose leaves end in
    the lanes. The others are traced: they are elementwise in the lanes (and, for samples, in the
    steps of a block), and take every number from `shared`, none from the problem.
    """

    def lane_start(
        self, state: State, *, step_size: float, epsilon: float, gradient: str, dtype: Any
    ) -> Lanes:
        """Lanes from states `[..., lanes]`."""
        ...

    def lane_sample(self, shared: Any, key: Words, step: Words) -> PyTree[Array]:
        """Samples from key words `[1, lanes]` and step words `[steps, 1]`: `[steps, lanes]`."""
        ...

    def lane_label(self, shared: Any, sample: PyTree[Array]) -> PyTree[Array]:
        """What `lane_step` needs of samples `[steps, lanes]`, drawn or given."""
        ...

    def lane_step(
        self, shared: Any, fixed: Any, carry: Any, point: PyTree[Array], *, gradient: str
    ) -> Any:
        """The carry after one step of every lane, with `point` of leaves `[lanes]`."""
        ...

    def lane_state(self, lanes: Lanes) -> State:
        """The float64 states `[..., lanes]`."""
        ...


def sum_rows(rows: Sequence[Float[Array, " W"]]) -> Float[Array, " W"]:
    """The sum of equally shaped arrays, pairwise.

    Written as additions because XLA's reduction over a leading axis is not vectorised over the
    trailing one.
    """
    rows = list(rows)
    while len(rows) > 1:
        pairs = [rows[i] + rows[i + 1] for i in range(0, len(rows) - 1, 2)]
        rows = pairs + rows[len(rows) - len(rows) % 2 :]
    return rows[0]


def lane_width(seeds: int, devices: int, platform: str, lane_bytes: int) -> int:
    """How many seeds share a group.

    A step of a group costs about the same up to 16 lanes and is proportional to the lanes
    above that, as long as everything it touches stays in the fastest cache. On a GPU all seeds
    of a device are one group.
    """
    share = -(-seeds // devices)
    if platform != "cpu":
        return -(-share // 128) * 128
    width = 16
    while width < share and 2 * width * lane_bytes <= CACHE_BYTES:
        width *= 2
    return width


class LaneRun:
    """An ensemble under way: `advance` it, `read` its states.

    `carry` (with `steps`) is all that changes; putting back a saved one resumes to the same bits.
    """

    def __init__(
        self,
        problem: LaneProblem,
        state: State,
        words: Words | None,
        *,
        step_size: float,
        epsilon: float,
        gradient: str,
        dtype: Any,
        samples: PyTree[np.ndarray] | None = None,
        own_samples: bool = False,
        devices: Sequence[Any] | None = None,
        width: int | None = None,
    ) -> None:
        """Prepare the lanes.

        Arguments:
            state: the starts, float64 leaves `[seeds, ...]`.
            words: the two key words of every seed's stream, `[seeds]` each; not needed with
                `samples`.
            samples: a given stream, leaves `[steps]`, or `[seeds, steps]` if `own_samples`.
            devices: where to run; all local devices by default.
            width: lanes per group; chosen by `lane_width` by default.
        """
        seeds = jax.tree.leaves(state)[0].shape[0]
        devices = list(jax.local_devices() if devices is None else devices)
        platform = devices[0].platform
        self._problem = problem
        self._dtype = np.dtype(dtype)
        self._gradient = gradient
        self._start = functools.partial(
            problem.lane_start,
            step_size=step_size,
            epsilon=epsilon,
            gradient=gradient,
            dtype=self._dtype,
        )
        self._width = width or lane_width(seeds, len(devices), platform, self._lane_bytes(state))
        groups = -(-seeds // self._width)
        self._mesh = _compat.lane_mesh(devices[: min(groups, len(devices))])
        self._groups = -(-groups // self._mesh.size) * self._mesh.size
        # idle lanes repeat the first seed
        self._seeds = seeds
        self._lane_of = np.zeros(self._groups * self._width, dtype=int)
        self._lane_of[:seeds] = np.arange(seeds)
        lanes = self._start(_lanes_last(state, self._lane_of))
        self._shared = lanes.shared
        self._fixed, self.carry = self._grouped((lanes.fixed, lanes.carry))
        self._fixed_host = lanes.fixed
        self._samples = samples
        self._own_samples = own_samples
        if words is not None:
            self._words = self._grouped(_lanes_last(words, self._lane_of))
        # the traced methods get their numbers through `shared`, so that a new value of a number
        # does not compile anew
        self._static = eqx.partition(problem, _is_number)[1]
        self._program = _program(self._mesh, platform)
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Take `steps` more steps; returns before they are done."""
        while steps > 0:
            part = steps if self._samples is None else min(steps, REPLAY_STEPS)
            arguments, options = self._arguments(part)
            self.carry = self._program(*arguments, **options)
            self.steps += part
            steps -= part

    def read(self) -> State:
        """The states, float64 leaves `[seeds, ...]`; waits for the steps under way."""
        carry = jax.tree.map(self._ungrouped, self.carry)
        state = self._problem.lane_state(Lanes(self._shared, self._fixed_host, carry))
        return jax.tree.map(lambda leaf: np.moveaxis(leaf, -1, 0)[: self._seeds], state)

    @property
    def layout(self) -> str:
        """Number and width of the groups, and of the devices that share them."""
        return f"{self._groups} x {self._width} on {self._mesh.size}"

    def lower(self) -> Any:
        """The compiled loop before compilation, for tests and benchmarks."""
        arguments, options = self._arguments(1)
        return self._program.lower(*arguments, **options)

    def _arguments(self, count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        replay = self._samples is not None
        source = self._stream(count) if replay else self._words
        step = np.uint32(self.steps >> 32), np.uint32(self.steps & 0xFFFFFFFF)
        arguments = (self._shared, *step, np.uint32(count), self._fixed, self.carry, source)
        options = {"problem": self._static, "gradient": self._gradient, "replay": replay}
        return arguments, options

    def _lane_bytes(self, state: State) -> int:
        """What one lane touches: its numbers and the samples of a block (two each)."""
        lanes = self._start(_lanes_last(state, np.zeros(1, dtype=int)))
        numbers = sum(np.size(leaf) for leaf in jax.tree.leaves((lanes.fixed, lanes.carry)))
        return (numbers + 2 * BLOCK) * self._dtype.itemsize

    def _grouped(self, tree: PyTree[np.ndarray]) -> PyTree[Array]:
        """Leaves `[..., lanes]` as `[groups, ..., width]`, on their devices."""

        def split(leaf: np.ndarray) -> np.ndarray:
            leaf = leaf.reshape(*leaf.shape[:-1], self._groups, self._width)
            return np.ascontiguousarray(np.moveaxis(leaf, -2, 0))

        return _compat.place(jax.tree.map(split, tree), self._mesh)

    def _ungrouped(self, leaf: Array) -> np.ndarray:
        joined = np.moveaxis(np.asarray(leaf), 0, -2)
        return joined.reshape(*joined.shape[:-2], self._groups * self._width)

    def _stream(self, count: int) -> PyTree[Array]:
        """The given samples of the next `count` steps, `[groups, REPLAY_STEPS, width]`."""
        steps = slice(self.steps, self.steps + count)

        def cut(leaf: np.ndarray) -> np.ndarray:
            part = leaf[self._lane_of, steps].T if self._own_samples else leaf[steps, None]
            padded = np.zeros((REPLAY_STEPS, self._lane_of.size), self._dtype)
            padded[:count] = part
            return padded

        return self._grouped(jax.tree.map(cut, self._samples))


def _lanes_last(tree: PyTree[np.ndarray], lane_of: np.ndarray) -> PyTree[np.ndarray]:
    """Leaves `[seeds, ...]` as `[..., lanes]`, lane i holding seed `lane_of[i]`."""
    return jax.tree.map(lambda leaf: np.moveaxis(np.asarray(leaf)[lane_of], 0, -1), tree)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, np.generic, jax.Array, float))


@functools.lru_cache(maxsize=32)
def _program(mesh: jax.sharding.Mesh, platform: str) -> Any:
    """The compiled loop for one set of devices; its trip count is an argument."""

    @functools.partial(
        jax.jit,
        static_argnames=("problem", "gradient", "replay"),
        compiler_options=_compat.loop_compiler_options(platform),
    )
    def program(shared, high, low, count, fixed, carry, source, *, problem, gradient, replay):
        def every_group(shared, high, low, count, fixed, carry, source):
            def one_group(group):
                options = {"gradient": gradient, "replay": replay}
                return _advance_group(problem, shared, group, (high, low), count, **options)

            return lax.map(one_group, (fixed, carry, source))

        split = (False, False, False, False, True, True, True)
        run = _compat.over_devices(every_group, mesh, split)
        return run(shared, high, low, count, fixed, carry, source)

    return program


def _advance_group(problem, shared, group, first, count, *, gradient, replay):
    """`count` steps of one group (fixed, carry, source), from step number (high, low)."""
    fixed, carry, source = group
    high, low = first
    zero, block = np.uint32(0), np.uint32(BLOCK)

    def draw(done):
        if replay:
            return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, done, BLOCK), source)
        lows = low + done + lax.iota(np.uint32, BLOCK)
        highs = high + (lows < low).astype(np.uint32)
        key = tuple(word[None] for word in source)
        return problem.lane_sample(shared, key, (highs[:, None], lows[:, None]))

    def one_block(index, carry):
        done = index * block
        points = problem.lane_label(shared, draw(done))

        def one_step(step, carry):
            point = jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, step, keepdims=False), points
            )
            return problem.lane_step(shared, fixed, carry, point, gradient=gradient)

        return lax.fori_loop(zero, jnp.minimum(block, count - done), one_step, carry)

    return lax.fori_loop(zero, (count + block - np.uint32(1)) // block, one_block, carry)
