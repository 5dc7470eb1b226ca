"""The banded engine on CPUs: starts in SIMD lanes, compiled by LLVM, spread over threads."""

import ctypes
import functools
from typing import Any

import numpy as np

from tts_jax import _compat
from tts_jax._simd import in_threads
from tts_jax._simd.memory import aligned
from tts_jax._trajectory import Status


FEW = 4  # up to this many starts per thread, the vectors are narrower
MEMORY = 1 << 26  # bytes of records that are held at a time, about


@functools.cache
def _entries(lanes: int) -> tuple[Any, dict[str, Any]]:
    """The compiled engine and its entry points, for vectors of `lanes`."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    from tts_jax._simd.machine import compiled
    from tts_jax.problems._banded_program import Program

    module = ir.Module("banded")
    module.triple = llvm.get_process_triple()
    Program(module, lanes)
    engine = compiled(str(module))
    kinds = {"advance": 1, "settle": 3, "finish": 3}
    entries = {
        name: ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * (count - 1))(
            engine.get_function_address(name)
        )
        for name, count in kinds.items()
    }
    return engine, entries


class _Work:
    """The memory of one thread, and the table of where everything is."""

    def __init__(self, lanes: int, neurons: int, stride: int, shared: dict[str, np.ndarray]) -> None:
        from tts_jax.problems._banded_program import LANE_INDICES, SLOTS, VECTORS

        sizes = {"m": neurons, "n": 2 * neurons + 1, "b": stride}
        counts = {name: eval(formula, {}, sizes) for name, formula in VECTORS.items()}
        own = {name: aligned((count * lanes,), np.dtype(float)) for name, count in counts.items()}
        own |= {name: np.zeros(lanes, np.int64) for name in LANE_INDICES}
        self.arrays = own | shared
        self.slots = SLOTS
        self.table = np.array([self.arrays[name].ctypes.data for name in SLOTS], np.int64)
        self.address = self.table.ctypes.data

    def point(self, name: str, array: np.ndarray) -> None:
        """Have a name stand for another array."""
        self.arrays[name] = array
        self.table[self.slots[name]] = array.ctypes.data


def solve(
    problem: Any,
    fast: np.ndarray,
    slow: np.ndarray,
    epsilon: np.ndarray,
    tau: np.ndarray,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    reduced: bool,
    lanes: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Solve starts `[starts, m+1]`, `[starts, m]` with ε `[starts]`, or the reduced flow.

    Returns:
        The answer of `flow`, with `[starts]` in front.
    """
    count, times, m = slow.shape[0], tau.shape[0], slow.shape[1]
    threads = min(threads or _compat.cores(), count)
    if lanes is None:
        lanes = 4 if count <= FEW * threads else 8
    answer = {
        "fast": np.full((count, times, m + 1), np.nan),
        "slow": np.full((count, times, m), np.nan),
        "loss": np.full((count, times), np.nan),
        "status": np.full(count, int(Status.SOLVER_FAILED), np.int64),
        "steps": np.zeros(count, np.int64),
        "accepted": np.zeros(count, np.int64),
        "bandwidth": np.zeros(count, np.int64),
        "reached": np.zeros(count),
    }
    chunk = max(64 * threads * lanes, MEMORY // (8 * times * (3 * m + 1)))
    for first in range(0, count, chunk):
        part = slice(first, first + chunk)
        _solve_chunk(
            problem,
            *(np.ascontiguousarray(x[part], float) for x in (fast, slow, epsilon)),
            np.asarray(tau, float),
            {name: value[part] for name, value in answer.items()},
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            reduced=reduced,
            lanes=lanes,
            threads=threads,
        )
    stats = {name: answer.pop(name) for name in ("steps", "accepted", "bandwidth", "reached")}
    stats["rejected"] = stats["steps"] - stats["accepted"]
    answer["status"] = answer["status"].astype(np.int32)
    return {**answer, "stats": stats}


def _solve_chunk(
    problem: Any,
    fast: np.ndarray,
    slow: np.ndarray,
    epsilon: np.ndarray,
    tau: np.ndarray,
    answer: dict[str, np.ndarray],
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    reduced: bool,
    lanes: int,
    threads: int,
) -> None:
    from tts_jax.problems._banded_program import NUMBERS, SIZES

    _, entries = _entries(lanes)
    count, m = slow.shape
    times, rows = tau.size, 2 * m + 1
    order = np.argsort(slow, axis=1, kind="stable")
    start = np.empty((count, rows))
    start[:, 1::2] = np.take_along_axis(slow, order, 1)
    start[:, 0] = fast[:, 0]
    start[:, 2::2] = fast[:, :1] + np.cumsum(np.take_along_axis(fast[:, 1:], order, 1), 1)
    order = order.astype(float)
    jumps, values = (np.asarray(part, float) for part in (problem.target.jumps, problem.target.values))
    lengths = np.diff(jumps, prepend=0.0, append=1.0)
    eta, end = float(problem.eta), float(tau[-1])
    numbers = {
        "eta": eta,
        "per_eta": 1.0 / eta,
        "rtol": rtol,
        "atol": atol,
        "end": end,
        "first": values[0],
        "last": values[-1],
        "total": values @ lengths,
        "square": values**2 @ lengths,
        "shift": 16.0 * np.finfo(float).eps * (m + 1),
        "per_scale": 1.0 / float(problem.slow_scale()),
        "fast_share": 0.0 if reduced else 1.0,
        "least_step": 1e-14 * end,
        "first_step": (1e-4 if reduced else 1e-2) * end,
    }
    widest = min(m, 200)
    sizes = {
        "neurons": m,
        "jumps": jumps.size,
        "times": times,
        "starts": count,
        "max_steps": max_steps,
        "reduced": int(reduced),
        "widest_band": widest,
        # then a neuron meets one jump at a time
        "apart": int(jumps.size > 0 and np.all(np.diff(jumps) > 1.01 * eta)),
    }
    reach = np.full((jumps.size, 2), (-np.inf, np.inf))
    reach[1:, 0], reach[:-1, 1] = jumps[:-1] + eta / 2, jumps[1:] - eta / 2
    recorded = np.zeros(count, np.int64)
    shared = {
        "numbers": np.array([numbers[name] for name in NUMBERS]),
        "sizes": np.array([sizes[name] for name in SIZES], np.int64),
        "jump": np.ascontiguousarray(jumps),
        "height": np.diff(values),
        "jump_before": values[:-1].copy(),
        "jump_filled": np.cumsum(values[:-1] * lengths[:-1]),
        "jump_low": reach[:, 0].copy(),
        "jump_high": reach[:, 1].copy(),
        "queue": np.zeros(1, np.int64),
        "tau": np.append(tau, np.inf),
        "start_state": start,
        "start_order": order,
        "start_epsilon": epsilon,
        "record_state": np.empty((count * times, rows)),
        "record_order": np.empty((count * times, m)),
        "loss": answer["loss"],
        "fast": answer["fast"],
        "slow": answer["slow"],
        "status": answer["status"],
        "step_count": answer["steps"],
        "accept_count": answer["accepted"],
        "bandwidth": answer["bandwidth"],
        "record_count": recorded,
        "reached": answer["reached"],
        "which": np.arange(count),
    }
    works = [_Work(lanes, m, 2 * widest + 3, shared) for _ in range(threads)]

    def split(entry: str, which: np.ndarray) -> None:
        """Spread a list of states over the threads."""
        groups = -(-which.size // lanes)
        edges = [lanes * (groups * k // threads) for k in range(threads)] + [which.size]
        for work in works:
            work.point("which", which)
        in_threads(
            [
                functools.partial(entries[entry], work.address, low, high)
                for work, low, high in zip(works, edges, edges[1:], strict=False)
                if low < high
            ]
        )

    if reduced:
        split("settle", np.arange(count))
    in_threads([functools.partial(entries["advance"], work.address) for work in works])
    written = np.arange(times) < recorded[:, None]
    split("finish", np.flatnonzero(written))
