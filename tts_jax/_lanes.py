"""Seeds in lanes: SGD of an ensemble, batch-last.

A processor adds sixteen float32 numbers as fast as one. The seeds of an ensemble are therefore
the last axis of every array, and groups of lanes move through the steps together. What a step is
belongs to the problem, which answers `LaneProblem`; how it is run is an engine's business:

    simd        our compiled loop for CPUs (`_simd`), groups on threads
    kernel      one kernel on a GPU, a thread per lane (`_kernel`)
    unrolled    XLA on a GPU, several steps per round (`_kernel`)
    loop        XLA's loop over arrays, below, groups on devices

All draw the samples of a lane from its key and the step number, so a lane never sees its
neighbours: a diverged seed stays alone, and the numbers of a seed do not depend on how many
there are, on how the steps are cut into calls, or on who shares the groups.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from tts_jax import _compat, _kernel, _simd
from tts_jax._batch_last import Lanes, is_number
from tts_jax._problem import State
from tts_jax._random import Words


ENGINES = ("auto", "simd", "kernel", "unrolled", "loop")
BLOCK = 16  # steps whose samples are drawn together
REPLAY_STEPS = 8192  # steps of a given sample stream that one call takes along
CACHE_BYTES = 32 * 1024  # what a group may touch; XLA also compiles such a loop as one function


class Cell(NamedTuple):
    """Seeds that share a problem and its step sizes.

    Attributes:
        problem: the problem; one that answers `LaneProblem`.
        state: the starts, float64 leaves `[seeds, ...]`.
        words: the two key words of every seed's stream, `[seeds]` each; None where samples are
            given.
        step_size: step size h of the fast variable.
        epsilon: ratio ε of the two step sizes.
    """

    problem: Any
    state: State
    words: Words | None
    step_size: float
    epsilon: float


@runtime_checkable
class LaneProblem(Protocol):
    """What a problem with `lanes = True` answers; `AbstractProblem` has defaults.

    `lane_start` and `lane_state` run on the host in NumPy float64, on states whose leaves end in
    the lanes. The others are traced: they are elementwise in the lanes (and, for samples, in the
    steps of a block) but for `sum_rows`, and take every number from their arguments, none from
    the problem. `lane_step` freezes a lane that leaves the problem: its arrays change no more.
    """

    def lane_start(
        self, state: State, *, step_size: float, epsilon: float, gradient: str, dtype: Any
    ) -> Lanes:
        """Lanes from states `[..., lanes]`."""
        ...

    def lane_sample(self, shared: Any, fixed: Any, key: Words, step: Words) -> PyTree[Array]:
        """Samples, leaves `[..., lanes]` of one step or `[steps, ..., lanes]`.

        Key words are `[lanes]` or `[1, lanes]`; step words `[steps, lanes]`, `[steps, 1]`, or `[]`
        on a GPU.
        """
        ...

    def lane_label(self, shared: Any, sample: PyTree[Array]) -> PyTree[Array]:
        """What `lane_step` needs of samples, drawn or given, with the same leading steps."""
        ...

    def lane_step(
        self, shared: Any, fixed: Any, carry: Any, point: PyTree[Array], *, gradient: str
    ) -> Any:
        """The carry after one step of every lane, with `point` of leaves `[..., lanes]`.

        For a problem with `lane_rows = True`, in the GPU kernel a leaf `[m, lanes]` is a tuple of
        m rows `[lanes]`, and a leaf `[n]` of `shared` a tuple of n scalars: `each_row` and
        `sum_rows`, `len` and indexing serve both.
        """
        ...

    def lane_state(self, lanes: Lanes) -> tuple[State, np.ndarray]:
        """The float64 states `[..., lanes]`, and which lanes are alive, `[lanes]`."""
        ...


def lane_width(seeds: int, devices: int, platform: str, lane_bytes: int) -> int:
    """How many seeds share a group of XLA's loop.

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

    `carry` (with `steps`) is all that changes; `save` and `restore` carry a run over.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        gradient: str,
        dtype: Any,
        samples: PyTree[np.ndarray] | None = None,
        own_samples: bool = False,
        devices: Sequence[Any] | None = None,
        width: int | None = None,
        engine: str = "auto",
    ) -> None:
        """Prepare the lanes.

        Arguments:
            cells: ensembles that take the same numbers of steps, side by side. Their problems
                differ in numbers only, and agree on what lanes share.
            gradient: one of the problem's `gradients`.
            dtype: of the steps.
            samples: a given stream, leaves `[steps, ...]`, or `[seeds, steps, ...]` if
                `own_samples`.
            devices: where to run; all local devices by default, and all cores with `"simd"`.
            width: lanes per group; chosen by the engine by default.
            engine: one of `ENGINES`.

        Raises:
            ValueError: `engine` cannot run here, or the cells do not go together.
        """
        counts = [jax.tree.leaves(cell.state)[0].shape[0] for cell in cells]
        self._dtype = np.dtype(dtype)
        self._problem = cells[0].problem
        self._seeds = sum(counts)
        lanes = _joined([self._lanes(cell, gradient) for cell in cells])
        words = None
        if samples is None:
            every = [np.asarray(cell.words) for cell in cells]  # [2, seeds]
            words = tuple(np.concatenate(every, axis=-1))
        self._samples, self._own_samples = samples, own_samples
        # the traced methods get their numbers through the lanes, so that a new value of a number
        # does not compile anew
        static = eqx.partition(self._problem, is_number)[1]
        axes = {np.ndim(leaf) - 1 - own_samples for leaf in jax.tree.leaves(samples)}
        form = _Form(static, lanes, gradient, samples, self._seeds, bool(axes - {0}))
        self._engine = _engine(engine, form, devices, width)
        self._width, self._groups = self._engine.width, self._engine.groups
        # idle lanes repeat the first seed
        self._lane_of = np.zeros(self._groups * self._width, dtype=int)
        self._lane_of[: self._seeds] = np.arange(self._seeds)
        lanes = Lanes(lanes.shared, *jax.tree.map(self._spread, lanes[1:]))
        self._shared, self._fixed_host = lanes.shared, lanes.fixed
        self._fixed, self.carry = self._grouped(lanes[1:])
        if words is not None:
            self._words = self._grouped(jax.tree.map(self._spread, words))
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Take `steps` more steps; on a GPU it returns before they are done."""
        while steps > 0:
            part = steps if self._samples is None else min(steps, REPLAY_STEPS)
            source = self._words if self._samples is None else self._stream(part)
            self.carry = self._engine.advance(
                self._shared, self._fixed, self.carry, source, self.steps, part
            )
            self.steps += part
            steps -= part

    def read(self) -> State:
        """The states, float64 leaves `[seeds, ...]`, those of frozen lanes NaN."""
        carry = jax.tree.map(self._ungrouped, self.carry)
        state, alive = self._problem.lane_state(Lanes(self._shared, self._fixed_host, carry))
        return jax.tree.map(
            lambda leaf: np.moveaxis(np.where(alive, leaf, np.nan), -1, 0)[: self._seeds], state
        )

    def save(self) -> list[np.ndarray]:
        """The carry, leaves `[..., seeds]`: all that `restore` needs besides `steps`."""
        carry = jax.tree.map(self._ungrouped, self.carry)
        return [leaf[..., : self._seeds].copy() for leaf in jax.tree.leaves(carry)]

    def restore(self, saved: Sequence[np.ndarray], steps: int) -> None:
        """Go on from what `save` returned after `steps` steps, in this or any other layout.

        With the same engine it goes on to the same bits.
        """
        carry = jax.tree.unflatten(jax.tree.structure(self.carry), saved)
        self.carry = self._grouped(jax.tree.map(self._spread, carry))
        self.steps = steps

    @property
    def engine(self) -> str:
        """The engine that takes the steps."""
        return self._engine.name

    @property
    def layout(self) -> str:
        """Number and width of the groups, and of the threads or devices that share them."""
        return f"{self._groups} x {self._width} on {self._engine.shares}"

    def lower(self) -> Any:
        """XLA's loop before compilation, for tests and benchmarks."""
        source = self._words if self._samples is None else self._stream(1)
        return self._engine.lower(self._shared, self._fixed, self.carry, source, self.steps, 1)

    def _lanes(self, cell: Cell, gradient: str) -> Lanes:
        state = jax.tree.map(lambda leaf: np.moveaxis(np.asarray(leaf), 0, -1), cell.state)
        return cell.problem.lane_start(
            state,
            step_size=cell.step_size,
            epsilon=cell.epsilon,
            gradient=gradient,
            dtype=self._dtype,
        )

    def _spread(self, leaf: np.ndarray) -> np.ndarray:
        """Seeds in the last axis as lanes."""
        return np.asarray(leaf)[..., self._lane_of]

    def _grouped(self, tree: PyTree[np.ndarray]) -> PyTree[Array]:
        """Leaves `[..., lanes]` as `[groups, ..., width]`, where the engine wants them."""

        def split(leaf: np.ndarray) -> np.ndarray:
            leaf = leaf.reshape(*leaf.shape[:-1], self._groups, self._width)
            return np.ascontiguousarray(np.moveaxis(leaf, -2, 0))

        return self._engine.place(jax.tree.map(split, tree))

    def _ungrouped(self, leaf: Array) -> np.ndarray:
        joined = np.moveaxis(np.asarray(leaf), 0, -2)
        return joined.reshape(*joined.shape[:-2], self._groups * self._width)

    def _stream(self, count: int) -> PyTree[Array]:
        """The given samples of the next `count` steps, `[groups, REPLAY_STEPS, ..., width]`."""
        steps = slice(self.steps, self.steps + count)

        def cut(leaf: np.ndarray) -> np.ndarray:
            if self._own_samples:
                part = np.moveaxis(leaf[self._lane_of, steps], 0, -1)
            else:
                part = leaf[steps, ..., None]
            shape = (REPLAY_STEPS, *part.shape[1:-1], self._lane_of.size)
            padded = np.zeros(shape, self._dtype)
            padded[:count] = part
            return padded

        return self._grouped(jax.tree.map(cut, self._samples))


def _joined(every: Sequence[Lanes]) -> Lanes:
    """The lanes of all cells side by side."""
    shared = every[0].shared
    for other in every[1:]:
        same = jax.tree.map(np.array_equal, shared, other.shared)
        if not all(jax.tree.leaves(same)):
            raise ValueError("Cells of one run must agree on the numbers that lanes share.")
    rest = jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis=-1), *(one[1:] for one in every)
    )
    return Lanes(shared, *rest)


# --- engines --------------------------------------------------------------------------------


class _Form(NamedTuple):
    """What an engine is chosen and compiled for."""

    problem: Any  # without its numbers
    lanes: Lanes
    gradient: str
    samples: PyTree[np.ndarray] | None
    seeds: int
    sample_axes: bool = False  # whether one of the given samples is an array

    @property
    def dtype(self) -> np.dtype:
        return jax.tree.leaves(self.lanes.carry)[0].dtype

    @property
    def numbers(self) -> int:
        """How many numbers one lane keeps."""
        return sum(int(np.prod(leaf.shape[:-1])) for leaf in jax.tree.leaves(self.lanes[1:]))

    @property
    def lane_bytes(self) -> int:
        """What one lane touches: its numbers and the samples of a block (two each)."""
        return (self.numbers + 2 * BLOCK) * self.dtype.itemsize


def choose_engine(
    engine: str, device: Any, dtype: Any, numbers: int, *, replay: bool, rows: bool = True
) -> str:
    """The engine that `engine`, one of `ENGINES`, stands for on `device`.

    Arguments:
        dtype: of the steps.
        numbers: how many numbers one lane keeps.
        replay: whether samples are given.
        rows: whether the lane methods take rows as tuples.

    Raises:
        ValueError: `engine` cannot run there.
    """
    on_cpu = device.platform == "cpu"
    obstacles = {
        "simd": _simd.missing() if on_cpu else "it is written for CPUs",
        "kernel": _kernel.obstacle(device, dtype, numbers, replay=replay, rows=rows),
    }
    if engine != "auto":
        if obstacles.get(engine) is not None:
            raise _refused(engine, obstacles[engine])
        return engine
    for fastest, obstacle in obstacles.items():
        if obstacle is None:
            return fastest
    return "loop" if on_cpu else "unrolled"


def _refused(engine: str, obstacle: Any) -> ValueError:
    return ValueError(
        f"Argument `engine` must not be {engine!r} here: {obstacle}. Leave it at 'auto' for the "
        f"fastest engine that can run."
    )


def _engine(engine: str, form: _Form, devices: Sequence[Any] | None, width: int | None) -> Any:
    every = list(jax.local_devices() if devices is None else devices)
    replay = form.samples is not None
    rows = form.problem.lane_rows
    name = choose_engine(engine, every[0], form.dtype, form.numbers, replay=replay, rows=rows)
    if name == "simd":
        try:
            return _SimdEngine(form, _compat.cores() if devices is None else len(devices), width)
        except _simd.Unsupported as error:
            if engine == "simd":
                raise _refused(engine, error) from error
            name = "loop"
    return _XlaEngine(name, form, every, width)


class _SimdEngine:
    """Our compiled loop (`_simd`), groups shared by threads."""

    name = "simd"

    def __init__(self, form: _Form, threads: int, width: int | None) -> None:
        from tts_jax._simd.machine import vector_lanes

        # two machine vectors at a time, so that one is at work while the other waits
        pair = 2 * vector_lanes(form.dtype)
        self.width = width or self._width(form, threads, pair)
        self.groups = -(-form.seeds // self.width)
        self.shares = min(threads, self.groups)
        vector = pair if self.width % pair == 0 else self.width
        shape = vector, self.width // vector
        if form.sample_axes:
            raise _simd.Unsupported("given samples that are arrays")
        self._kernel = _simd_kernel(
            form.problem, _shapes(form.lanes), form.gradient, _given(form.samples), *shape
        )

    @staticmethod
    def _width(form: _Form, threads: int, pair: int) -> int:
        """One seed per group while there are few, else as many as there are and the cache holds.

        More than one vector's worth is cheaper per seed up to two pairs, which take turns.
        """
        share = -(-form.seeds // threads)
        if share <= _simd.FEW:
            return 1
        width = pair // 2
        while width < min(share, 2 * pair) and 2 * width * form.lane_bytes <= CACHE_BYTES:
            width *= 2
        return width

    def place(self, tree: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        return jax.tree.map(_simd.aligned_copy, tree)

    def advance(self, shared, fixed, carry, source, step, count) -> PyTree[np.ndarray]:
        carry = self.place(carry)
        arrays = jax.tree.leaves((shared, fixed, carry, source))
        bounds = [self.groups * share // self.shares for share in range(self.shares + 1)]
        _simd.in_threads(
            [
                functools.partial(self._kernel, arrays, first, last, step, count)
                for first, last in itertools.pairwise(bounds)
            ]
        )
        return carry


def _shapes(lanes: Lanes) -> tuple[Any, ...]:
    """The form of lanes, hashable and without the number of lanes."""
    leaves, tree = jax.tree.flatten(lanes)
    shared = len(jax.tree.leaves(lanes.shared))
    shapes = [leaf.shape if k < shared else leaf.shape[:-1] for k, leaf in enumerate(leaves)]
    return tree, tuple(shapes), tuple(np.dtype(leaf.dtype) for leaf in leaves), shared


def _given(samples: PyTree[np.ndarray] | None) -> Any:
    """The form of given samples, hashable: their tree and how many steps a call holds."""
    return None if samples is None else (jax.tree.structure(samples), REPLAY_STEPS)


@functools.lru_cache(maxsize=64)
def _simd_kernel(problem: Any, form: Any, gradient: str, given: Any, width: int, turns: int) -> Any:
    from tts_jax._simd.kernel import lane_kernel

    tree, shapes, dtypes, shared = form
    leaves = [
        jax.ShapeDtypeStruct(shape if k < shared else (*shape, 1), dtype)
        for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    sample, steps = None, 0
    if given is not None:  # they come in the dtype of the run
        sample = jax.tree.unflatten(given[0], [dtypes[-1]] * given[0].num_leaves)
        steps = given[1]
    with jax.enable_x64(True):
        return lane_kernel(
            problem,
            jax.tree.unflatten(tree, leaves),
            sample,
            steps=steps,
            block=2 * BLOCK,
            width=width,
            turns=turns,
            gradient=gradient,
        )


class _XlaEngine:
    """Programs of XLA, groups shared by devices: the loop below and the two of `_kernel`."""

    def __init__(self, name: str, form: _Form, devices: Sequence[Any], width: int | None) -> None:
        self.name, platform = name, devices[0].platform
        if name == "kernel":
            width = _kernel.WIDTH
        self.width = width or lane_width(form.seeds, len(devices), platform, form.lane_bytes)
        groups = -(-form.seeds // self.width)
        self._mesh = _compat.lane_mesh(devices[: min(groups, len(devices))])
        self.shares = self._mesh.size
        self.groups = -(-groups // self.shares) * self.shares
        self._program = _program(self._mesh, platform, name)
        self._options = {
            "problem": form.problem,
            "gradient": form.gradient,
            "replay": form.samples is not None,
        }

    def place(self, tree: PyTree[np.ndarray]) -> PyTree[Array]:
        return _compat.place(tree, self._mesh)

    def advance(self, shared, fixed, carry, source, step, count) -> PyTree[Array]:
        return self._program(
            *self._arguments(shared, fixed, carry, source, step, count), **self._options
        )

    def lower(self, shared, fixed, carry, source, step, count) -> Any:
        return self._program.lower(
            *self._arguments(shared, fixed, carry, source, step, count), **self._options
        )

    def _arguments(self, shared, fixed, carry, source, step, count) -> tuple[Any, ...]:
        words = np.uint32(step >> 32), np.uint32(step & 0xFFFFFFFF)
        return (shared, *words, np.uint32(count), fixed, carry, source)


@functools.lru_cache(maxsize=32)
def _program(mesh: jax.sharding.Mesh, platform: str, engine: str) -> Any:
    """The compiled loop of `engine` on one set of devices; its trip count is an argument."""

    @functools.partial(
        jax.jit,
        static_argnames=("problem", "gradient", "replay"),
        compiler_options=_compat.loop_compiler_options(platform),
    )
    def program(shared, high, low, count, fixed, carry, source, *, problem, gradient, replay):
        def every_group(shared, high, low, count, fixed, carry, source):
            first = high, low
            if engine == "kernel":
                return _kernel.advance_groups(
                    problem, shared, fixed, carry, source, first, count, gradient=gradient
                )

            def one_group(group):
                options = {"gradient": gradient, "replay": replay}
                advance = _kernel.advance_unrolled if engine == "unrolled" else _advance_group
                return advance(problem, shared, group, first, count, **options)

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
        return problem.lane_sample(shared, fixed, key, (highs[:, None], lows[:, None]))

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
