"""SGD in Numba: a loop per seed, and hand-vectorised with the seeds in SIMD lanes.

    python -m benchmarks.peers.numba_sgd [--kernel lanes] [--dtype float32] [--seeds 1024]

`plain` is the scalar loop over steps and neurons that one writes first, one seed after the other
and seeds spread over threads. `lanes` is the fastest way we know to write the step on a CPU:

- Seeds in the lanes of full-width vectors, a generator in every lane.
- One pass over the neurons per step: it applies the last step's update to a neuron and at once
  evaluates the neuron at the next sample. Weights lag by one step between passes.
- The cubic folded: w = c − min(|z|, c) with c = ∛4/2 and z in units of η/∛4, σ = w³ or 1 − w³.
- Two vectors take turns, so that one works while the other waits for its sum, as long as both
  fit the fastest cache.

A branch around neurons that no sample hits was slower, and so was evaluating a neuron twice
instead of keeping its σ and w².

Every seed has its own generator, SplitMix64 and xoshiro128++. Positions are kept as offsets from
the start, which makes float32 as accurate as in the engine.
"""

import argparse
import functools
import time
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import njit, prange

from benchmarks.peers._vectors import (
    absolute,
    load,
    minimum,
    rotate,
    shift,
    splat,
    store,
    to_real,
    where_less,
)
from benchmarks.setting import JUMPS, VALUES, Run, Setting


_CUBE_ROOT = float(np.cbrt(4.0))
_VECTOR_BYTES = 64
_BLOCK = 16  # steps whose samples are drawn together
_ROWS = 5  # vectors of a neuron: start, weight, offset, σ, w²
_HEAD = 2  # vectors before them: bias, pull
_L1_BYTES = 48 * 1024


def _prepare(threads: int) -> None:
    """Allow full-width vectors, which LLVM halves on some processors, and set the threads."""
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False
    numba.config.CPU_FEATURES = features.flatten()
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise RuntimeError(
            f"{threads} threads asked for, {numba.config.NUMBA_NUM_THREADS} cores given"
        )
    numba.set_num_threads(threads)


def _generators(shape: tuple[int, ...]) -> np.ndarray:
    """Random states of generators."""
    return np.random.default_rng(7).integers(0, 2**32, shape, dtype=np.uint32)


# --- one seed after the other -----------------------------------------------------------------


@functools.lru_cache
def _plain_kernel(dtype: str) -> Any:
    real = np.dtype(dtype).type
    half, zero, one, two, four = (real(value) for value in (0.5, 0, 1, 2, 4))
    unit = real(2.0**-32)
    # SplitMix64
    golden, mix, remix = (
        np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    )
    s27, s30, s31, s32 = (np.uint64(shift) for shift in (27, 30, 31, 32))
    jumps = np.asarray(JUMPS, dtype)
    heights = np.diff(np.asarray(VALUES)).astype(dtype)
    first = real(VALUES[0])

    @njit(fastmath=True)
    def one_seed(counter, start, weights, offsets, steps, eta, noise, step_size, kick):
        """`steps` steps of one seed, and its new counter; `kick` is 12 εh/η."""
        neurons = start.size
        features = np.empty_like(start)
        slopes = np.empty_like(start)
        for _ in range(steps):
            counter += golden
            bits = (counter ^ (counter >> s30)) * mix
            bits = (bits ^ (bits >> s27)) * remix
            bits ^= bits >> s31
            x = unit * real(np.uint32(bits >> s32))
            y = first + noise * (two * unit * real(np.uint32(bits)) - one)
            for k in range(jumps.size):
                if x >= jumps[k]:
                    y += heights[k]
            output = weights[0]
            for j in range(neurons):
                z = ((x - start[j]) - offsets[j]) / eta
                w = half - min(abs(z), half)
                slopes[j] = w * w
                tail = four * w * w * w
                features[j] = one - tail if z > zero else tail
                output += weights[j + 1] * features[j]
            residual = two * (output - y)
            weights[0] -= step_size * residual
            for j in range(neurons):
                offsets[j] += kick * residual * weights[j + 1] * slopes[j]
                weights[j + 1] -= step_size * residual * features[j]
        return counter

    @njit(parallel=True)
    def every_seed(counters, start, weights, offsets, steps, eta, noise, step_size, kick):
        for i in prange(start.shape[0]):
            state = start[i], weights[i], offsets[i]
            numbers = eta, noise, step_size, kick
            counters[i] = one_seed(counters[i], *state, steps, *numbers)

    return every_seed


class PlainRun:
    """Seeds one after the other, on `threads` threads."""

    chunk = 1

    def __init__(self, setting: Setting) -> None:
        _prepare(setting.threads)
        real = np.dtype(setting.dtype).type
        started = time.perf_counter()
        self._kernel = _plain_kernel(setting.dtype)
        self._start = setting.starts().astype(real)
        self._weights = np.zeros((setting.seeds, setting.neurons + 1), real)
        self._offsets = np.zeros_like(self._start)
        kick = 12 * setting.epsilon * setting.step_size / setting.eta
        numbers = setting.eta, setting.noise, setting.step_size, kick
        self._numbers = tuple(real(number) for number in numbers)
        self._counters = _generators((setting.seeds, 2)).view(np.uint64)[:, 0]
        self.advance(0)
        self.compile_seconds = time.perf_counter() - started
        self.layout = f"{setting.seeds} x 1 on {setting.threads}"

    def advance(self, steps: int) -> None:
        """Take `steps` steps."""
        state = self._start, self._weights, self._offsets
        self._kernel(self._counters, *state, steps, *self._numbers)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions."""
        positions = self._start.astype(np.float64) + self._offsets.astype(np.float64)
        return self._weights.astype(np.float64), positions


# --- seeds in SIMD lanes ----------------------------------------------------------------------


@functools.lru_cache
def _lane_kernel(setting: Setting, lanes: int, vectors: int) -> Any:
    """The loop with every number of the problem a constant of the machine code."""
    real = np.dtype(setting.dtype).type
    dtype = numba.from_dtype(np.dtype(setting.dtype))
    neurons = setting.neurons
    size = (_HEAD + _ROWS * neurons) * lanes  # numbers of one vector of seeds
    row, head, samples = lanes, _HEAD * lanes, 2 * lanes
    neuron = _ROWS * lanes
    scale_ = real(_CUBE_ROOT / setting.eta)
    reach_ = real(_CUBE_ROOT / 2)
    kick_ = real(12 / _CUBE_ROOT * setting.epsilon / setting.eta**2)
    rate_ = real(2 * setting.step_size)
    unit_, spread_ = real(2.0**-32), real(2 * setting.noise * 2.0**-32)
    lowest_ = real(VALUES[0] - setting.noise)
    zero_, one_ = real(0), real(1)
    jumps = tuple(real(jump) for jump in JUMPS)
    heights = tuple(real(height) for height in np.diff(VALUES))
    pieces = len(jumps)

    @njit(inline="always")
    def word(a, b, c, d):
        """A draw of xoshiro128++ and its next state."""
        drawn = rotate(a + d, 7) + a
        shifted = shift(b, 9)
        c = c ^ a
        d = d ^ b
        b = b ^ c
        a = a ^ d
        return drawn, a, b, c ^ shifted, rotate(d, 11)

    @njit(error_model="numpy")
    def draw(states, points):
        """The samples (x, y) of the next `_BLOCK` steps."""
        zero, unit, spread = splat(zero_, lanes), splat(unit_, lanes), splat(spread_, lanes)
        lowest = splat(lowest_, lanes)
        for v in range(vectors):
            base = 4 * v * row
            a, b = load(states, base, lanes), load(states, base + row, lanes)
            c, d = load(states, base + 2 * row, lanes), load(states, base + 3 * row, lanes)
            for i in range(_BLOCK):
                first, a, b, c, d = word(a, b, c, d)
                second, a, b, c, d = word(a, b, c, d)
                x = to_real(first, dtype) * unit
                y = to_real(second, dtype) * spread + lowest
                for k in range(pieces):
                    y = y + where_less(x, splat(jumps[k], lanes), zero, splat(heights[k], lanes))
                place = (i * vectors + v) * samples
                store(points, place, x)
                store(points, place + row, y)
            store(states, base, a)
            store(states, base + row, b)
            store(states, base + 2 * row, c)
            store(states, base + 3 * row, d)

    @njit(error_model="numpy")
    def group(states, state, points, steps):
        """`steps` steps of `vectors` vectors of seeds."""
        zero, one = splat(zero_, lanes), splat(one_, lanes)
        scale, reach = splat(scale_, lanes), splat(reach_, lanes)
        kick, rate = splat(kick_, lanes), splat(rate_, lanes)
        for done in range(0, steps, _BLOCK):
            draw(states, points)
            for i in range(min(_BLOCK, steps - done)):
                for v in range(vectors):
                    base = v * size
                    place = (i * vectors + v) * samples
                    x, y = load(points, place, lanes), load(points, place + row, lanes)
                    pull = load(state, base + row, lanes)
                    push = kick * pull
                    bias = load(state, base, lanes) - pull
                    even, odd = bias - y, zero
                    for j in range(neurons):
                        at = base + head + j * neuron
                        weight = load(state, at + row, lanes)
                        offset = load(state, at + 2 * row, lanes)
                        feature = load(state, at + 3 * row, lanes)
                        square = load(state, at + 4 * row, lanes)
                        offset = offset + (push * weight) * square
                        weight = weight - pull * feature
                        z = (x - load(state, at, lanes)) * scale - offset
                        w = reach - minimum(absolute(z), reach)
                        square = w * w
                        tail = square * w
                        feature = where_less(zero, z, one - tail, tail)
                        store(state, at + row, weight)
                        store(state, at + 2 * row, offset)
                        store(state, at + 3 * row, feature)
                        store(state, at + 4 * row, square)
                        even, odd = odd, even + weight * feature
                    store(state, base, bias)
                    store(state, base + row, rate * (even + odd))

    @njit(parallel=True)
    def every_group(states, state, points, steps):
        for g in prange(state.shape[0]):
            group(states[g], state[g], points[numba.get_thread_id()], steps)

    return every_group, group


class LaneRun:
    """Seeds in SIMD lanes, groups of them spread over `threads` threads."""

    chunk = 1

    def __init__(self, setting: Setting, vectors: int | None = None) -> None:
        _prepare(setting.threads)
        self._setting = setting
        real = np.dtype(setting.dtype)
        lanes = _VECTOR_BYTES // real.itemsize
        size = (_HEAD + _ROWS * setting.neurons) * lanes
        if vectors is None:
            fits = 2 * size * real.itemsize <= _L1_BYTES
            vectors = 2 if fits and setting.seeds >= 2 * lanes * setting.threads else 1
        groups = -(-setting.seeds // (lanes * vectors))
        started = time.perf_counter()
        self._kernel, self._group = _lane_kernel(setting, lanes, vectors)
        self._state = _aligned((groups, vectors * size), real)
        start = np.resize(setting.starts(), (groups * vectors, lanes, setting.neurons))
        # neurons as [groups * vectors, neurons, _ROWS, lanes]
        self._neurons()[:, :, 0] = np.moveaxis(start, -1, 1)
        self._states = _aligned((groups, 4 * vectors * lanes), np.dtype(np.uint32))
        self._states[:] = _generators(self._states.shape)
        points = 2 * _BLOCK * vectors * lanes
        self._points = _aligned((numba.config.NUMBA_NUM_THREADS, points), real)
        self.advance(0)
        self.compile_seconds = time.perf_counter() - started
        self.layout = f"{groups} x {vectors * lanes} on {setting.threads}"

    def advance(self, steps: int) -> None:
        """Take `steps` steps."""
        self._kernel(self._states, self._state, self._points, steps)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and positions, with the last step's update applied."""
        seeds, setting = self._setting.seeds, self._setting
        rows = np.moveaxis(self._neurons().astype(np.float64), -1, 1)
        start, weight, offset, feature, square = np.moveaxis(
            rows.reshape(-1, setting.neurons, _ROWS), -1, 0
        )
        bias, pull = np.moveaxis(self._head().astype(np.float64), 1, 0).reshape(_HEAD, -1, 1)
        kick = 12 / _CUBE_ROOT * setting.epsilon / setting.eta**2
        offset = offset + kick * pull * weight * square
        weights = np.concatenate([bias - pull, weight - pull * feature], axis=1)
        return weights[:seeds], (start + offset * setting.eta / _CUBE_ROOT)[:seeds]

    def assembly(self) -> str:
        """The machine code of a group's loop."""
        return "\n".join(self._group.inspect_asm().values())

    def _rows(self) -> np.ndarray:
        rows = _HEAD + _ROWS * self._setting.neurons
        lanes = _VECTOR_BYTES // self._state.dtype.itemsize
        return self._state.reshape(-1, rows, lanes)

    def _head(self) -> np.ndarray:
        return self._rows()[:, :_HEAD]

    def _neurons(self) -> np.ndarray:
        rows = self._rows()[:, _HEAD:]
        return rows.reshape(rows.shape[0], self._setting.neurons, _ROWS, -1)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose rows start at multiples of 64 bytes (their length must be such a multiple)."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(count + _VECTOR_BYTES, np.uint8)
    skip = -raw.ctypes.data % _VECTOR_BYTES
    return raw[skip : skip + count].view(dtype).reshape(shape)


def main() -> None:
    """Time one ensemble."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kernel", choices=("plain", "lanes"), default="lanes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seeds", type=int, default=1024)
    parser.add_argument("--neurons", type=int, default=20)
    parser.add_argument("--vectors", type=int, help="vectors of seeds that take turns")
    parser.add_argument("--asm", action="store_true", help="count the vector instructions")
    given = parser.parse_args()
    setting = Setting(given.seeds, given.dtype, given.neurons, given.threads)
    lanes = given.kernel == "lanes"
    run: Run = LaneRun(setting, given.vectors) if lanes else PlainRun(setting)
    steps, best = 256, np.inf
    for _ in range(40):
        started = time.perf_counter()
        run.advance(steps)
        best = min(best, (time.perf_counter() - started) / steps)
        steps = max(256, int(0.05 / best))
    print(
        f"{given.kernel} {given.dtype} m={given.neurons} seeds={given.seeds} "
        f"threads={given.threads} ({run.layout}): {best * 1e9 / given.seeds:.3f} ns per "
        f"seed-step, compiled in {run.compile_seconds:.1f} s"
    )
    if given.asm and isinstance(run, LaneRun):
        lines = [line.split() for line in run.assembly().splitlines() if "zmm" in line]
        print(f"{len(lines)} instructions on 512-bit registers")


if __name__ == "__main__":
    main()
