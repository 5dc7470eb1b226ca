"""The banded engine: starts in SIMD lanes of CPUs or the threads of a GPU, compiled by LLVM."""

from typing import Any

import numpy as np

from tts_jax import _compat
from tts_jax._problem import quickly
from tts_jax._simd import cuda
from tts_jax._trajectory import Status
from tts_jax.problems import _banded_machine


WIDEST = 200  # neighbours that may overlap: for more, dense matrices are no slower
TOO_WIDE = 100  # status, inside, of a start where more do
RIDGE = 4.0  # of the reduced flow, in ulp of the trace of the Gram matrix, about
MEMORY = 1 << 26  # bytes of records that are held at a time, about
LEAST_CHUNK = 4096  # starts that are solved at a time, whatever their records take


def _visits(places: np.ndarray, eta: float) -> np.ndarray:
    """The order in which starts are taken up, `[starts]`, from positions `[starts, m]` in order.

    Lanes of a vector share the width of the band, the corrections at the ends of [0, 1] and the
    pairs of neighbours that are computed, so starts that are alike go side by side. Those with the
    widest band, which take longest, go first.
    """
    m = places.shape[1]
    band, close = np.zeros(len(places), int), places[:, 1:] - places[:, :-1] < eta
    for k in range(1, m):
        wide = np.any(places[:, k:] - places[:, :-k] < eta, axis=1)
        if not np.any(wide):
            break
        band[wide] = k
    at_end = np.any((places < eta / 2) | (places > 1 - eta / 2), axis=1)
    return np.lexsort((*close.T[::-1], at_end, -band))


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
    lanes: int | None = None,
    threads: int | None = None,
    on_gpu: bool = False,
) -> dict[str, Any]:
    """Solve the flow from starts `[starts, m+1]`, `[starts, m]` with ε `[starts]`.

    Where all ε are 0 it is the reduced flow. Neurons that coincide and have the same weight do so
    for ever, so they are one neuron with a count: rounding cannot part them.

    Returns:
        Fast and slow variable, loss and status as `flow` answers them, with `[starts]` in front
        (the first three of a GPU's work are JAX's arrays, where all is well),
        and the statistics steps, accepted, rejected, bandwidth, reached and dense: whether more
        neighbours overlapped than the band has room for, so that the start is not solved.
    """
    fast, slow, epsilon, tau = (np.asarray(x, float) for x in (fast, slow, epsilon, tau))
    total, m = slow.shape
    order = np.argsort(slow, axis=1, kind="stable")
    places = np.take_along_axis(slow, order, 1)
    weights = np.take_along_axis(fast[:, 1:], order, 1)
    if not np.any(epsilon):  # the weights at the start play no part
        weights = np.zeros_like(weights)
    new = np.ones((total, m), bool)
    new[:, 1:] = (np.diff(places) != 0) | (np.diff(weights) != 0)
    groups = np.cumsum(new, axis=1) - 1
    sizes = groups[:, -1] + 1
    setting: dict[str, Any] = dict(
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        lanes=lanes,
        threads=threads or _compat.cores(),
        on_gpu=on_gpu,
    )
    if np.all(new):
        given = [fast[:, :1], weights, places, np.ones((total, m)), order, epsilon]
        answer = _solve_groups(problem, given, tau, **setting)
    else:
        answer = _blank(total, tau.size, m)
        for size in np.unique(sizes):
            which = np.flatnonzero(sizes == size)
            count = np.zeros((which.size, size))
            np.add.at(count, (np.arange(which.size)[:, None], groups[which]), 1.0)
            first = np.nonzero(new[which])[1].reshape(which.size, size)
            joint = np.take_along_axis(weights[which], first, 1) * count
            joined = np.take_along_axis(places[which], first, 1)
            labels = np.tile(np.arange(size), (which.size, 1))
            given = [fast[which, :1], joint, joined, count, labels, epsilon[which]]
            part = _solve_groups(problem, given, tau, **setting)
            part = {name: np.asarray(value) for name, value in part.items()}
            # from groups in the order of their places to the neurons of the caller
            member = np.empty((which.size, m), int)
            np.put_along_axis(member, order[which], groups[which], 1)
            shares = np.take_along_axis(1.0 / count, member, 1)[:, None]
            member = np.broadcast_to(member[:, None], (which.size, tau.size, m))
            part["slow"] = np.take_along_axis(part["slow"], member, 2)
            joint = np.take_along_axis(part["fast"][..., 1:], member, 2) * shares
            part["fast"] = np.concatenate([part["fast"][..., :1], joint], 2)
            for name, value in part.items():
                answer[name][which] = value
    stats = {name: answer.pop(name) for name in ("steps", "accepted", "bandwidth", "reached")}
    condition = answer.pop("condition")
    if not np.any(epsilon):
        stats["condition"] = np.where((sizes < m)[:, None] & (condition > 0), np.inf, condition)
    stats["rejected"] = stats["steps"] - stats["accepted"]
    stats["dense"] = answer["status"] == TOO_WIDE
    answer["status"] = answer["status"].astype(np.int32)
    return {**answer, "stats": stats}


def _blank(starts: int, times: int, neurons: int, *, on_gpu: bool = False) -> dict[str, Any]:
    """Room for the answer; records on the host hold anything."""
    records = cuda.Output if on_gpu else np.empty
    return {
        "fast": records((starts, times, neurons + 1)),
        "slow": records((starts, times, neurons)),
        "loss": records((starts, times)),
        "condition": np.empty((starts, times)),
        "status": np.full(starts, int(Status.SOLVER_FAILED), np.int64),
        "steps": np.zeros(starts, np.int64),
        "accepted": np.zeros(starts, np.int64),
        "bandwidth": np.zeros(starts, np.int64),
        "reached": np.zeros(starts),
    }


def _solve_groups(
    problem: Any, given: list[np.ndarray], tau: np.ndarray, *, on_gpu: bool, **setting: Any
) -> dict[str, Any]:
    """Solve starts with one number of groups, some thousand at a time.

    Args:
        given: the bias, `[starts, 1]`; joint weights, places in order, numbers of neurons and
            labels of the groups, `[starts, groups]`; ε, `[starts]`.

    Returns:
        The answer, whose axis of neurons follows the labels.
    """
    starts, groups = given[1].shape
    answer = _blank(starts, tau.size, groups, on_gpu=on_gpu)
    chunk = max(LEAST_CHUNK, MEMORY // (8 * tau.size * (5 * groups + 4)))
    if on_gpu:
        stride = 2 * _widest(groups, on_gpu) + 3
        chunk = _banded_machine.most_starts(groups, stride, tau.size)

    def solve_some(which: Any, part: dict[str, Any], on_gpu: bool) -> None:
        own = [np.ascontiguousarray(x[which], float) for x in given]
        _solve_chunk(problem, own, tau, part, on_gpu=on_gpu, **setting)

    for begin in range(0, starts, chunk):
        cut = slice(begin, begin + chunk)
        solve_some(cut, {name: value[cut] for name, value in answer.items()}, on_gpu)
    answer = {
        name: value.array if isinstance(value, cuda.Output) else value
        for name, value in answer.items()
    }
    beyond = np.flatnonzero(answer["status"] == TOO_WIDE)
    if on_gpu and beyond.size:  # a thread of the GPU has less room
        answer = {name: np.array(value) for name, value in answer.items()}
        part = _blank(beyond.size, tau.size, groups)
        solve_some(beyond, part, False)
        for name, value in part.items():
            answer[name][beyond] = value
    return answer


def _widest(neurons: int, on_gpu: bool) -> int:
    """A band of this many neighbours or more is refused; one of one at least has room."""
    return min(max(neurons, 2), _banded_machine.WIDEST_CUDA if on_gpu else WIDEST)


def _solve_chunk(
    problem: Any,
    given: list[np.ndarray],
    tau: np.ndarray,
    answer: dict[str, Any],
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    lanes: int | None,
    threads: int,
    on_gpu: bool,
) -> None:
    """Solve starts, given as in `_solve_groups`, into `answer`."""
    from tts_jax.problems._banded_program import NUMBERS, SIZES

    bias, weights, places, count, labels, epsilon = given
    starts, m = places.shape
    times, rows, reduced = tau.size, 2 * m + 1, not np.any(epsilon)
    start = np.empty((starts, rows))
    start[:, 1::2] = places
    start[:, 0] = bias[:, 0]
    start[:, 2::2] = bias + np.cumsum(weights, axis=1)
    jumps, values = (
        np.asarray(part, float) for part in (problem.target.jumps, problem.target.values)
    )
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
        "ridge": RIDGE * np.finfo(float).eps * (m + 1) if reduced else 0.0,
        "per_scale": 1.0 / float(quickly(problem, "slow_scale")),
        "fast_share": 0.0 if reduced else 1.0,
        "least_step": 1e-14 * end,
        "first_step": (1e-4 if reduced else 1e-2) * end,
    }
    widest = _widest(m, on_gpu)
    stride = 2 * widest + 3
    sizes = {
        "neurons": m,
        "jumps": jumps.size,
        "times": times,
        "starts": starts,
        "max_steps": max_steps,
        "reduced": int(reduced),
        "widest_band": widest,
        "too_wide": TOO_WIDE,
        "length": _banded_machine.layout(1, m, stride)[0],
        # then a neuron meets one jump at a time
        "apart": int(jumps.size > 0 and np.all(np.diff(jumps) > 1.01 * eta)),
    }
    reach = np.full((jumps.size, 2), (-np.inf, np.inf))
    cell = reach.copy()
    reach[1:, 0], reach[:-1, 1] = jumps[:-1] + eta / 2, jumps[1:] - eta / 2
    cell[1:, 0] = cell[:-1, 1] = (jumps[:-1] + jumps[1:]) / 2
    recorded = np.zeros(starts, np.int64)
    shared = {
        "numbers": np.array([numbers[name] for name in NUMBERS]),
        "sizes": np.array([sizes[name] for name in SIZES], np.int64),
        "jump": np.ascontiguousarray(jumps),
        "height": np.diff(values),
        "jump_before": values[:-1].copy(),
        "jump_filled": np.cumsum(values[:-1] * lengths[:-1]),
        "jump_low": reach[:, 0].copy(),
        "jump_high": reach[:, 1].copy(),
        "jump_low_cell": cell[:, 0].copy(),
        "jump_high_cell": cell[:, 1].copy(),
        "queue": np.zeros(1, np.int64),
        "tau": np.append(tau, np.inf),
        "start_state": start,
        "start_order": labels,
        "start_share": 1.0 / count,
        "start_epsilon": epsilon,
        "record_state": np.empty((starts * times, rows)),
        "record_order": np.empty((starts * times, m)),
        "loss": answer["loss"],
        "fast": answer["fast"],
        "slow": answer["slow"],
        "condition": answer["condition"],
        "status": answer["status"],
        "step_count": answer["steps"],
        "accept_count": answer["accepted"],
        "bandwidth": answer["bandwidth"],
        "record_count": recorded,
        "reached": answer["reached"],
        "which": np.empty(starts * times, np.int64),
        "visits": _visits(places, eta),
    }
    where: dict[str, Any] = {"lanes": lanes, "threads": threads, "on_gpu": on_gpu}
    with _banded_machine.machine(starts, m, stride, shared, **where) as machine:
        if reduced:
            machine.run("settle", np.arange(starts))
        machine.run("advance")
        machine.fetch(
            "record_count", "status", "step_count", "accept_count", "bandwidth", "reached"
        )
        written = np.arange(times) < recorded[:, None]
        machine.run("finish", np.flatnonzero(written))
        machine.fetch("loss", "fast", "slow", *["condition"] * reduced)
    if not np.all(written):
        for name in ("loss", "fast", "slow", "condition"):
            if isinstance(answer[name], np.ndarray):
                answer[name][~written] = np.nan
