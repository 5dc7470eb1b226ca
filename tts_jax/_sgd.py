"""SGD: what practitioners run, steps of size h for the fast and εh for the slow variable.

With one random sample ξ_k per step and both gradients at the old state,

    y ← y − h ∇_y ℓ(y, x; ξ_k)
    x ← x − εh ∇_x ℓ(y, x; ξ_k),          τ = εhk after k steps.

That is the regime `"joint"`; others let the fast variable take more steps, or eliminate it
(`regime`). Seeds run in lanes (`_lanes`, with an engine for each kind of processor) where the
problem offers them, else by a `vmap` over seeds, which takes any problem, regime, geometry, noise
and optax optimizer.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from tts_jax import _compat, _distributed, _separation, checks
from tts_jax._lanes import ENGINES, REPLAY_STEPS, Cell, LaneRun
from tts_jax._precision import double_precision
from tts_jax._problem import AbstractProblem, State, batch_shape, check_geometry, one_by_one
from tts_jax._random import key_words, seed_keys, step_words, typed_key
from tts_jax._trajectory import Status, Trajectory, of_states, raise_on_failure, record
from tts_jax.geometry import Euclidean
from tts_jax.regime import AbstractRegime, Eliminated, Joint, regime_of


_CALL_SECONDS = 0.5  # aimed duration of one compiled call: Ctrl-C and the progress bar wait for it
_FIRST_CALL = 512  # steps of the first call, before their speed is known
_MOST_STEPS = 1 << 30  # steps of one call at most
_LOSS_BATCH = 4096  # states whose population loss is computed in one call
_LOSSES_AT_ONCE = 256  # of them side by side on a device that is no CPU


def sgd(
    problem: AbstractProblem | Sequence[AbstractProblem],
    *,
    key: PRNGKeyArray | None = None,
    seeds: int | None = None,
    epsilon: float | None = None,
    step_size: float,
    tau: Float[ArrayLike, " T"],
    state: State | None = None,
    regime: str | AbstractRegime = "joint",
    gradient: str = "exact",
    dtype: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    samples: PyTree[ArrayLike] | None = None,
    engine: str = "auto",
    observe_every: int | None = None,
    progress: bool | None = None,
    throw: bool = False,
) -> Trajectory:
    """Run stochastic gradient descent from many seeds.

    The numbers of seed i depend on `key` and i only: not on the number of seeds, the number of
    devices, or how the run is cut into calls. In the lanes this holds bit by bit, on the
    general path up to rounding.

    Under several processes (`jax.distributed`) they share the seeds, and each of them gets the
    whole trajectory: all processes must then make the same call.

    Arguments:
        problem: any problem with `sample` and `sample_loss`; or a sequence with one problem per
            seed, alike but for their numbers, such as data sets of one size.
        key: random key; seed i uses two keys folded from it and i, one for its start and one
            for its stream of samples. Not needed when `state` and `samples` are given.
        seeds: number of seeds; by default that of the problems, `state` or `samples`, else 1.
        epsilon: ratio ε of the two step sizes; of a regime that eliminates the fast variable,
            `None`.
        step_size: step size h of the fast variable, or of the slow one where there is no ε.
        tau: slow times to record, `[T]`, strictly increasing and not negative. Each is moved
            to the nearest multiple of εh; the trajectory carries the moved times.
        state: the starts, leaves `[seeds, ...]`, or one unbatched start for all seeds. By
            default every seed draws its own by `problem.init`.
        regime: `"joint"`, one step of the fast variable for each of the slow one; `"limit"`, the
            fast variable eliminated at every step; or one of `tts_jax.regime` with its options,
            such as `regime.Inner(10)` or `regime.Eliminated(fast.Ridge())`.
        gradient: one of `problem.gradients`. `"exact"` is the gradient of the sample loss;
            `Univariate` adds `"box"`, the estimator of the published code: the indicator of
            |x − u_j| ≤ η/2, over η, in place of σ′((x − u_j)/η)/η. Both have the same
            integral over x and the same limit as η → 0.
        dtype: `float32` or `float64` of the steps. The lanes default to float32: positions are
            kept as offsets from the start, so that steps far below the spacing of float32
            numbers still add up. The general path keeps plain positions and defaults to float64.
        optimizer: an optax transformation that replaces the two-rate steps. It sees the tree
            `{"fast": ..., "slow": ...}` of gradients, as the problem's geometries have them
            (`optax.partition` gives the two blocks their own rules); `epsilon` and `step_size`
            then only define the clock τ = εhk.
        samples: a given stream in place of random samples, in the form of `problem.sample`
            with an axis for the steps in front, `[steps, ...]` for all seeds or
            `[seeds, steps, ...]`. For `Univariate`: `(x, noise)`.
        engine: what takes the steps. `"auto"` is the fastest that is available. Seeds in lanes:
            `"simd"`, our compiled loop for CPUs, from the extra `tts_jax[cpu]`; `"kernel"`, one
            thread per seed on NVIDIA GPUs of compute capability 9 or 10; `"unrolled"`, XLA on
            other GPUs; `"loop"`, XLA on CPUs. `"general"`: a `vmap` over seeds, the only one for
            a problem without `lanes` and with an `optimizer`. All take the same steps up to
            rounding.
        observe_every: also observe the run every so many steps, without keeping its states: loss,
            observables and the separation number ε_eff then are in `.series` of the answer.
        progress: show a progress bar with the remaining time.
        throw: raise if a seed fails, instead of returning its status.

    Returns:
        A trajectory with leaves `fast [seeds, T, ...]`, `slow [seeds, T, ...]`, the population
        loss `loss [seeds, T]` and `status [seeds]`, all float64. A seed that leaves the problem
        (its state would not be finite; in `Univariate`'s lanes: its residual leaves ±1e10) is
        frozen, has status `DIVERGED` and NaN from then on; its neighbours run on as if it were
        not there.

    Raises:
        ValueError: a bad argument; the message names it, its value and the remedy.
        TypeError: called under a JAX transformation, which cannot hold a loop of this length.
        RuntimeError: a seed failed and `throw` is set.
    """
    family = _Family.of(problem)
    problem = family.first
    given = family.problems, key, epsilon, step_size, tau, state, samples
    if checks.inside_trace() or checks.is_traced(given):
        raise TypeError(
            "`sgd` is a loop on the host and cannot be traced by `jit`, `vmap` or `grad`. Call "
            "it directly; it runs many seeds at once by `seeds=` or a batched `state=`."
        )
    regime = regime_of(regime)
    rates = _ratio(epsilon, regime), _rate("step_size", step_size)
    epsilon, step_size = rates
    steps = recorded_steps(tau, epsilon * step_size)
    checks.one_of("gradient", gradient, problem.gradients)
    if observe_every is not None:
        remedy = "It is a number of steps; leave it out to observe nothing."
        observe_every = checks.positive_integer("observe_every", observe_every, remedy)
    hot = any(one is not None for one in problem.temperature)
    if optimizer is not None and hot:
        raise ValueError(
            f"Argument `optimizer` must be left out for a problem with a `temperature`, got "
            f"{optimizer!r}. Langevin noise belongs to the two-rate steps."
        )
    if optimizer is not None and not isinstance(regime, Joint):
        raise ValueError(
            f"Argument `optimizer` must be left out with regime {type(regime).__name__}, got "
            f"{optimizer!r}. It moves both variables, as in the regime 'joint'."
        )
    if problem.samples_serve_once and not isinstance(regime, Joint):
        raise ValueError(
            f"Argument `regime` must be 'joint' for this {type(problem).__name__}, whose samples "
            f"serve one gradient each, got {type(regime).__name__}."
        )
    lanes = _in_lanes(problem, optimizer, regime, engine)
    dtype = _dtype(dtype, lanes)
    with wide():
        stream = None if samples is None else _Stream.read(problem, samples, steps[-1])
        seeds = _number_of_seeds(family, seeds, state, stream)
        noisy = hot or regime.random
        if key is None and (state is None or stream is None or noisy):
            missing = "starts" if state is None else "noise" if stream is not None else "samples"
            raise ValueError(
                f"Argument `key` must be a random key to draw the {missing}, got None. Pass for "
                f"example `key=jax.random.key(0)`, or give both `state` and `samples`."
            )
        stream_keys, start_keys = (None, None) if key is None else _seed_keys(key, seeds)
        if state is None:
            state = family.init(start_keys)
        state, mine = batched(problem, state, seeds), family
        check_geometry(problem, state)
        if jax.process_count() > 1:
            rows = _distributed.my_rows(seeds)
            mine = family.take(rows)
            state = State(*_rows(tuple(state), rows))
            stream_keys = None if stream_keys is None else stream_keys[rows]
            stream = None if stream is None else stream.take(rows)
            progress = progress and _distributed.is_first()
        options: dict[str, Any] = {
            "gradient": gradient,
            "dtype": dtype,
            "samples": None if stream is None else stream.values,
            "own_samples": stream is not None and stream.own,
        }
        if lanes:
            words = None if stream_keys is None else key_words(stream_keys)
            cells = []
            for one, rows in mine.cells():
                part = State(*_rows(tuple(state), rows))
                cells.append(Cell(one, part, _rows(words, rows), step_size, epsilon))
            run: LaneRun | GeneralRun = LaneRun(cells, engine=engine, **options)
        else:
            options |= {"step_size": step_size, "epsilon": epsilon, "optimizer": optimizer}
            run = GeneralRun(mine, state, stream_keys, regime=regime, **options)
        watch = None if observe_every is None else _Watch(mine, observe_every, rates, regime)
        records = _run(run, steps, progress, watch)
    notes = {"gradient": gradient, "dtype": np.dtype(dtype).name}
    notes |= {"engine": run.engine, "regime": type(regime).__name__}
    if key is not None:
        notes["key"] = str(np.asarray(jax.random.key_data(typed_key(key))).tolist())
    rates = (0.0 if isinstance(regime, Eliminated) else epsilon, step_size)
    times = np.asarray(steps, dtype=np.float64) * (epsilon * step_size)
    series = {} if watch is None else watch.series(seeds)
    trajectory = _answer(family, mine, records, seeds, times, steps, rates, notes, series)
    return raise_on_failure(trajectory) if throw else trajectory


# --- arguments ------------------------------------------------------------------------------


@contextmanager
def wide() -> Iterator[None]:
    """64-bit types, whatever the global setting, so that it does not change an answer."""
    with jax.enable_x64(True):
        yield


def _in_lanes(
    problem: AbstractProblem, optimizer: Any, regime: AbstractRegime, engine: Any
) -> bool:
    """Whether the run goes in lanes."""
    checks.one_of("engine", engine, (*ENGINES, "general"))
    reasons = {
        f"{type(problem).__name__} has no lanes": not problem.lanes,
        "an optimizer": optimizer is not None,
        f"the regime {type(regime).__name__}": not isinstance(regime, Joint),
        f"a {type(problem.geometry).__name__}": not isinstance(problem.geometry, Euclidean),
        f"a fast {type(problem.fast_geometry).__name__}": not isinstance(
            problem.fast_geometry, Euclidean
        ),
        "a temperature": any(one is not None for one in problem.temperature),
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    able = why is None
    if not able and engine not in ("auto", "general"):
        raise ValueError(
            f"Argument `engine` must be 'auto' or 'general' for {why}, got {engine!r}. Leave it "
            f"out."
        )
    return able and engine != "general"


def _ratio(epsilon: Any, regime: AbstractRegime) -> float:
    """ε, or 1 where there is none: then the step size is that of the slow variable."""
    if not isinstance(regime, Eliminated):
        return _rate("epsilon", epsilon)
    if epsilon is not None:
        raise ValueError(
            f"Argument `epsilon` must be left out in the regime 'limit', where it tends to 0, got "
            f"{epsilon!r}. There `step_size` is that of the slow variable."
        )
    return 1.0


def _rate(name: str, value: Any) -> float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"Argument `{name}` must be one number, got shape {np.shape(value)}. Call `sgd` once "
            f"per value."
        )
    return float(checks.positive(name, value, "Choose a positive, finite number."))


def recorded_steps(tau: ArrayLike, per_step: float) -> list[int]:
    """The step numbers nearest to the recorded times."""
    times = np.asarray(checks.increasing_times(tau), dtype=np.float64)
    ratios = np.rint(times / per_step)
    if ratios[-1] >= 2.0**53:
        raise checks.argument_error(
            "tau",
            "stay below 2^53 steps",
            times[-1],
            "Shorten the run, or raise `epsilon` or `step_size`.",
        )
    steps = ratios.astype(np.int64)
    same = np.flatnonzero(np.diff(steps) == 0)
    if same.size:
        first = int(same[0])
        raise ValueError(
            f"Argument `tau` must have at most one recorded time per step, got {times[first]} and "
            f"{times[first + 1]}, both at step {steps[first]}: one step is epsilon * step_size = "
            f"{per_step:.6g}. Record fewer times, or lower `step_size` or `epsilon`."
        )
    return [int(step) for step in steps]


def _dtype(dtype: Any, lanes: bool) -> np.dtype:
    if dtype is None:
        return np.dtype(np.float32 if lanes else np.float64)
    try:
        chosen = np.dtype(dtype).name
    except TypeError:
        chosen = "unknown"
    if chosen not in ("float32", "float64"):
        raise ValueError(
            f"Argument `dtype` must be float32 or float64, got {dtype!r}. Pass `jnp.float32` or "
            f"`jnp.float64`."
        )
    return np.dtype(chosen)


class _Family(NamedTuple):
    """The problem of all seeds, or one problem for each of them."""

    problems: tuple[AbstractProblem, ...]
    own: bool

    @staticmethod
    def of(problem: AbstractProblem | Sequence[AbstractProblem]) -> "_Family":
        """Check that several problems can run side by side."""
        own = isinstance(problem, Sequence)
        problems = tuple(map(_with_arrays, problem)) if own else (problem,)
        remedy = "Build for example `tts.Univariate`, or give a sequence of problems."
        if not problems:
            raise ValueError(f"Argument `problem` must hold at least one problem, got []. {remedy}")
        forms = []
        for one in problems:
            checks.instance("problem", one, AbstractProblem, remedy)
            leaves, tree = jax.tree.flatten(_abstract(one))
            forms.append((tree, leaves))
        for index, form in enumerate(forms):
            if form != forms[0]:
                raise ValueError(
                    f"Argument `problem` must hold problems that are alike but for their numbers, "
                    f"got one at index {index} that differs from the first in its type, its "
                    f"settings or the shape of its numbers. Run it by a call of its own."
                )
        return _Family(problems, own)

    @property
    def first(self) -> AbstractProblem:
        return self.problems[0]

    @property
    def axis(self) -> int | None:
        """The axis of seeds in `numbers`."""
        return 0 if self.own else None

    def take(self, rows: np.ndarray) -> "_Family":
        """The problems of the seeds `rows`."""
        return _Family(tuple(self.problems[row] for row in rows), True) if self.own else self

    def cells(self) -> list[tuple[AbstractProblem, slice]]:
        """Each problem with the seeds that it has."""
        if not self.own:
            return [(self.first, slice(None))]
        return [(one, slice(row, row + 1)) for row, one in enumerate(self.problems)]

    def numbers(self, dtype: Any) -> tuple[Any, Any]:
        """The numbers of the problem in `dtype`, `[seeds, ...]` if each has its own; the rest."""
        parts = [eqx.partition(_cast(one, np.dtype(dtype)), eqx.is_array) for one in self.problems]
        if not self.own:
            return parts[0]
        numbers = jax.tree.map(lambda *leaves: np.stack(leaves), *(part[0] for part in parts))
        return numbers, parts[0][1]

    def init(self, keys: PRNGKeyArray | None) -> State:
        """A start for each key, `[seeds, ...]`."""
        assert keys is not None  # `sgd` has checked
        numbers, static = self.numbers(np.float64)
        return _init_program(static, self.axis)(numbers, keys)


def _with_arrays(problem: Any) -> Any:
    """The problem with its floats as arrays, which may differ between seeds."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, float) else leaf, problem)


@functools.lru_cache(maxsize=32)
def _init_program(static: AbstractProblem, axis: int | None) -> Any:
    def one(numbers: Any, key: PRNGKeyArray) -> State:
        return eqx.combine(numbers, static).init(key=key)

    return jax.jit(jax.vmap(one, in_axes=(axis, 0)))


def _abstract(problem: AbstractProblem) -> Any:
    """The problem with shapes and dtypes in place of its numbers."""

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
        return leaf

    return jax.tree.map(abstract, problem)


def _rows(tree: PyTree[Array], rows: Any) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _number_of_seeds(
    family: _Family, seeds: int | None, state: State | None, stream: "_Stream | None"
) -> int:
    """The number of seeds on which `problem`, `seeds`, `state` and `samples` agree."""
    problem, found = family.first, {}
    if family.own:
        found["problem"] = len(family.problems)
    if seeds is not None:
        found["seeds"] = checks.positive_integer(
            "seeds", seeds, "It is the number of independent runs."
        )
    if state is not None:
        shape = batch_shape(problem, state)
        if len(shape) > 1 or 0 in shape:
            raise ValueError(
                f"Argument `state` must have no batch axis or one non-empty axis of seeds, got "
                f"batch axes {shape}. Reshape it to one axis."
            )
        if shape:
            found["state"] = shape[0]
        for name, leaf in (("fast", state.fast), ("slow", state.slow)):
            for array in jax.tree.leaves(leaf):
                checks.finite(f"state.{name}", array, "A start must be finite.")
    if stream is not None and stream.own:
        found["samples"] = stream.seeds
    if len(set(found.values())) > 1:
        got = ", ".join(f"{count} from `{name}`" for name, count in found.items())
        raise ValueError(
            f"Arguments {', '.join(f'`{name}`' for name in found)} must agree on the number of "
            f"seeds, got {got}. Leave `seeds` out to take it from the arrays."
        )
    return next(iter(found.values()), 1)


def _seed_keys(key: Any, seeds: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    key = typed_key(checks.random_key(key))
    if key.ndim:
        raise ValueError(
            f"Argument `key` must be a single key, got shape {key.shape}. One key serves all "
            f"seeds; give `seeds=` for their number."
        )
    return seed_keys(key, seeds)


def batched(problem: AbstractProblem, state: State, seeds: int) -> State:
    """The starts as float64 NumPy arrays `[seeds, ...]`."""

    def batch(one: jax.ShapeDtypeStruct, leaf: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(leaf, dtype=np.float64), (seeds, *one.shape))

    return State(*jax.tree.map(batch, tuple(problem.structure()), tuple(state)))


class _Stream(eqx.Module):
    """A given stream of samples: leaves `[steps, ...]`, or `[seeds, steps, ...]` if `own`."""

    values: PyTree[np.ndarray]
    own: bool = eqx.field(static=True)

    @property
    def seeds(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[0]

    def take(self, rows: np.ndarray) -> "_Stream":
        """The stream of the seeds `rows`."""
        if not self.own:
            return self
        return _Stream(jax.tree.map(lambda leaf: leaf[rows], self.values), True)

    @staticmethod
    def read(problem: AbstractProblem, samples: PyTree[ArrayLike], needed: int) -> "_Stream":
        """Check a stream against the form of `problem.sample` and the length of the run."""
        form = jax.eval_shape(lambda: problem.sample(key=jax.random.key(0), step=np.int64(0)))
        if isinstance(form, tuple) and isinstance(samples, list):
            samples = tuple(samples)
        if jax.tree.structure(form) != jax.tree.structure(samples):
            raise ValueError(
                f"Argument `samples` must have the structure of `problem.sample(...)`, "
                f"{jax.tree.structure(form)}, got {jax.tree.structure(samples)}."
            )
        values = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=np.float64), samples)
        leads = set()
        for one, leaf in zip(jax.tree.leaves(form), jax.tree.leaves(values), strict=True):
            extra = leaf.ndim - one.ndim
            if extra not in (1, 2) or leaf.shape[extra:] != one.shape:
                raise ValueError(
                    f"Argument `samples` must have leaves of shape [steps, ...] or [seeds, steps, "
                    f"...] with trailing axes {one.shape}, got shape {leaf.shape}."
                )
            leads.add(leaf.shape[:extra])
        if len(leads) != 1:
            raise ValueError(
                f"Argument `samples` must have the same leading axes in every leaf, got "
                f"{sorted(leads)}."
            )
        (lead,) = leads
        if lead[-1] < needed:
            raise ValueError(
                f"Argument `samples` must hold at least the {needed} steps up to the last "
                f"recorded time, got {lead[-1]}. Give a longer stream or a shorter `tau`."
            )
        for leaf in jax.tree.leaves(values):
            checks.finite("samples", leaf, "Every sample must be finite.")
        return _Stream(values, len(lead) == 2)


# --- the loop on the host -------------------------------------------------------------------


class Pace:
    """Advances a run in calls of about `seconds`, whatever a step costs."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._call = _FIRST_CALL

    def advance(self, run: "LaneRun | GeneralRun", most: int) -> int:
        """Advance `run` by the steps of one call, at most `most`, and wait for them.

        Returns:
            The number of steps.
        """
        part = min(self._call, most)
        started = time.perf_counter()
        run.advance(part)
        jax.block_until_ready(run.carry)
        seconds = time.perf_counter() - started
        if part == self._call:
            growth = min(self._seconds / max(seconds, 1e-9), 8.0)
            self._call = min(max(int(self._call * growth), _FIRST_CALL), _MOST_STEPS)
        return part


class _Watch:
    """What is observed of a run every `stride` steps."""

    def __init__(
        self,
        family: _Family,
        stride: int,
        rates: tuple[float, float],
        regime: AbstractRegime,
    ) -> None:
        self.stride = stride
        self._family, self._rates, self._regime = family, rates, regime
        self._seen: dict[int, dict[str, np.ndarray]] = {}

    def look(self, steps: int, state: State) -> None:
        """Observe the states `[seeds, ...]` after `steps` steps."""
        alive = finite_states(jax.tree.map(lambda leaf: leaf[:, None], state))[:, 0]
        fast, slow = tuple(state)
        family = self._family
        problem = family.problems if family.own else family.first
        found = dict(of_states(_observed, 1, problem, fast, slow))
        found["loss"] = _losses(family, *jax.tree.map(lambda leaf: leaf[:, None], (fast, slow)))[
            :, 0
        ]
        ratio = self._regime.ratio(self._rates[0])
        if ratio:
            found["epsilon_eff"] = ratio * of_states(_separation.ratio, 1, problem, fast, slow)

        def masked(leaf: Any) -> np.ndarray:
            leaf = np.asarray(leaf)
            return np.where(alive.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, np.nan)

        self._seen[steps] = jax.tree.map(masked, found)

    def series(self, seeds: int) -> dict[str, np.ndarray]:
        """All observations, `[seeds, K, ...]`, and their times `tau`, `[K]`."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *self._seen.values())
        tau = np.asarray(list(self._seen), np.float64) * (self._rates[0] * self._rates[1])
        return {"tau": tau, **_distributed.gather(stacked, seeds)}


def _observed(
    problem: AbstractProblem, fast: PyTree[Array], slow: PyTree[Array]
) -> dict[str, Array]:
    return problem.observables(fast, slow)


def _run(
    run: "LaneRun | GeneralRun", steps: Sequence[int], progress: bool | None, watch: _Watch | None
) -> list[tuple[State, dict[str, np.ndarray]]]:
    """Advance `run` and read it at each of `steps`, in calls of about `_CALL_SECONDS`.

    The states that are recorded come with what the regime knows about them.
    """
    records, pace = [], Pace(_CALL_SECONDS)
    stops = set(steps)
    if watch is not None:
        stops |= set(range(0, steps[-1] + 1, watch.stride))
    with _progress_bar(steps[-1], bool(progress)) as update:
        done, recorded = 0, set(steps)
        for target in sorted(stops):
            while done < target:
                part = pace.advance(run, target - done)
                done += part
                update(part)
            found = run.recorded() if isinstance(run, GeneralRun) else (run.read(), {})
            if watch is not None and done % watch.stride == 0:
                watch.look(done, found[0])
            if done in recorded:
                records.append(found)
    return records


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", unit_scale=True, desc="sgd", smoothing=0.1) as bar:
        yield bar.update


def _answer(
    family: _Family,
    mine: _Family,
    records: list[tuple[State, dict[str, np.ndarray]]],
    seeds: int,
    times: np.ndarray,
    steps: Sequence[int],
    rates: tuple[float, float],
    notes: dict[str, str],
    series: dict[str, np.ndarray],
) -> Trajectory:
    epsilon, step_size = rates
    state, info = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *records)
    alive = np.logical_and.accumulate(finite_states(state), axis=1)

    def masked(leaf: np.ndarray) -> np.ndarray:
        return np.where(alive.reshape(*alive.shape, *(1,) * (leaf.ndim - 2)), leaf, np.nan)

    fast, slow = jax.tree.map(masked, tuple(state))
    loss = masked(_losses(mine, fast, slow))
    status = np.where(alive[:, -1], int(Status.SUCCESS), int(Status.DIVERGED)).astype(np.int32)
    unsolved = alive[:, -1] & ~np.all(info.get("converged", True), axis=-1)
    status = np.where(unsolved, int(Status.SOLVER_FAILED), status).astype(np.int32)
    fast, slow, loss, status, info = _distributed.gather((fast, slow, loss, status, info), seeds)
    return _record(
        family,
        times,
        (fast, slow),
        loss,
        status,
        {"steps": np.full(seeds, steps[-1], dtype=np.int64), **info},
        {"epsilon": epsilon, "step_size": step_size},
        notes,
        series,
    )


def finite_states(state: State) -> np.ndarray:
    """Whether everything in the states `[seeds, T]` is finite, `[seeds, T]`."""
    leaves = jax.tree.leaves(state)
    finite = np.ones(leaves[0].shape[:2], dtype=bool)
    for leaf in leaves:
        finite &= np.isfinite(leaf).reshape(*finite.shape, -1).all(axis=-1)
    return finite


def population_loss(
    problem: AbstractProblem, fast: PyTree[np.ndarray], slow: PyTree[np.ndarray]
) -> np.ndarray:
    """`problem.loss` of `[seeds, T]` states in float64."""
    return _losses(_Family((problem,), False), fast, slow)


def _losses(family: _Family, fast: PyTree[np.ndarray], slow: PyTree[np.ndarray]) -> np.ndarray:
    """The loss of each seed's problem at `[seeds, T]` states in float64.

    On CPUs one state after the other: a branch of the loss then costs only where it is taken,
    while `vmap` would take both. Elsewhere many at a time, always as many. Either way the value of
    a state does not depend on the others.
    """
    shape = jax.tree.leaves(fast)[0].shape[:2]
    if family.own:
        parts = [
            _losses(_Family((one,), False), *_rows((fast, slow), rows))
            for one, rows in family.cells()
        ]
        return np.concatenate(parts)
    total = math.prod(shape)
    flat = jax.tree.map(lambda leaf: leaf.reshape(total, *leaf.shape[2:]), (fast, slow))
    devices = jax.local_devices()
    mesh = _compat.lane_mesh(devices)
    at_once = 1 if devices[0].platform == "cpu" else _LOSSES_AT_ONCE
    batch = min(_LOSS_BATCH, 1 << (total - 1).bit_length())
    batch = -(-batch // (at_once * mesh.size)) * at_once * mesh.size
    with wide():
        numbers, static = family.numbers(np.float64)
        program = _loss_program(mesh, static, at_once)
        values = []
        for begin in range(0, total, batch):
            rows = np.minimum(np.arange(begin, begin + batch), total - 1)
            part = _rows(flat, rows)
            values.append(np.asarray(program(numbers, _compat.place(part, mesh))))
    return np.concatenate(values)[:total].reshape(shape)


@functools.lru_cache(maxsize=32)
def _loss_program(mesh: Mesh, static: AbstractProblem, at_once: int) -> Any:
    def losses(numbers: Any, states: PyTree[Array]) -> Array:
        problem = eqx.combine(numbers, static)
        # a batch of one would be a `vmap` too
        batch_size = at_once if at_once > 1 else None
        return lax.map(lambda state: problem.loss(*state), states, batch_size=batch_size)

    return jax.jit(_compat.over_devices(losses, mesh, (False, True)))


@double_precision
def _record(family, tau, state, loss, status, stats, settings, notes, series) -> Trajectory:
    arrays = jax.tree.map(jnp.asarray, (tau, *state, loss, status, stats, series))
    tau, fast, slow, loss, status, stats, series = arrays
    return record(
        family.problems if family.own else family.first,
        method="sgd",
        tau=tau,
        fast=fast,
        slow=slow,
        loss=loss,
        status=status,
        stats=stats,
        batch_dims=("seed",),
        settings=settings,
        notes=notes,
        series=series,
    )


# --- any problem, any optimizer -------------------------------------------------------------


class GeneralRun:
    """An ensemble under way for any problem and optimizer: `advance` it, `read` its states.

    `carry` (with `steps`) is all that changes; putting back a saved one resumes the run. A seed
    whose next state would not be finite is frozen.
    """

    engine = "general"

    def __init__(
        self,
        family: _Family,
        state: State,
        keys: PRNGKeyArray | None,
        *,
        step_size: float,
        epsilon: float,
        gradient: str,
        dtype: Any,
        optimizer: optax.GradientTransformation | None = None,
        regime: AbstractRegime,
        samples: PyTree[np.ndarray] | None = None,
        own_samples: bool = False,
        devices: Sequence[Any] | None = None,
    ) -> None:
        """Prepare the run; arguments as in `LaneRun`, with the `keys` of the streams, `[seeds]`."""
        self._seeds = jax.tree.leaves(state)[0].shape[0]
        devices = list(jax.local_devices() if devices is None else devices)
        if regime.factorises(family.first) and devices[0].platform == "cpu":
            if not _compat.can_factorise_together(len(devices)):
                devices = devices[:1]
        mesh = _compat.lane_mesh(devices[: min(self._seeds, len(devices))])
        count = -(-self._seeds // mesh.size) * mesh.size
        # idle rows repeat the first seed
        row_of = np.zeros(count, dtype=int)
        row_of[: self._seeds] = np.arange(self._seeds)
        self._dtype = np.dtype(dtype)
        self._samples, self._own_samples = samples, own_samples
        self._row_of = row_of
        self._mesh = mesh
        self._keys = None if keys is None else _compat.place(keys[row_of], mesh)
        self._rates = self._cast((step_size, epsilon * step_size))
        start = self._cast({"fast": state.fast, "slow": state.slow})
        start = jax.tree.map(lambda leaf: jnp.asarray(leaf[row_of]), start)
        memory = () if optimizer is None else jax.vmap(optimizer.init)(start)
        alive = jnp.ones(count, bool)
        self.carry = _compat.place((start, memory, alive), mesh)
        numbers, static = family.numbers(self._dtype)
        apart = one_by_one(family.first)
        self._numbers = _compat.place(_rows(numbers, row_of), mesh) if family.own else numbers
        # a regime may hold numbers: they are traced, as those of the problem
        self._regime, how = eqx.partition(regime, eqx.is_array)
        form = _Form(mesh, static, how, gradient, optimizer, samples is not None, own_samples)
        form = form._replace(own_problem=family.own, apart=apart, keyed=keys is not None)
        self._program = _general_program(form)
        self._reader = _recorded_program(form)
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Take `steps` more steps; returns before they are done."""
        while steps > 0:
            part = steps if self._samples is None else min(steps, REPLAY_STEPS)
            source = () if self._samples is None else self._stream(part)
            clock = np.int64(self.steps), np.int64(part)
            fixed = self._numbers, self._regime, self._rates
            self.carry = self._program(fixed, clock, self._keys, source, self.carry)
            self.steps += part
            steps -= part

    def recorded(self) -> tuple[State, dict[str, np.ndarray]]:
        """The states, float64 leaves `[seeds, ...]`, those of frozen seeds NaN; the numbers that
        the regime has about them, `[seeds]`."""
        fixed = self._numbers, self._regime, self._rates
        fast, info = self._reader(fixed, self.carry[0])
        alive = np.asarray(self.carry[2])

        def read(leaf: Array) -> np.ndarray:
            kept = alive.reshape(-1, *(1,) * (leaf.ndim - 1))
            return np.where(kept, np.asarray(leaf, dtype=np.float64), np.nan)[: self._seeds]

        state = State(jax.tree.map(read, fast), jax.tree.map(read, self.carry[0]["slow"]))
        return state, {name: np.asarray(leaf)[: self._seeds] for name, leaf in info.items()}

    def _cast(self, tree: PyTree) -> PyTree[np.ndarray]:
        return jax.tree.map(lambda leaf: np.asarray(leaf, dtype=self._dtype), tree)

    def _stream(self, count: int) -> PyTree[np.ndarray]:
        """The given samples of the next `count` steps, padded to `REPLAY_STEPS`."""
        axis = int(self._own_samples)
        steps = slice(self.steps, self.steps + count)

        def cut(leaf: np.ndarray) -> np.ndarray:
            part = leaf[self._row_of, steps] if self._own_samples else leaf[steps]
            spare = [(0, 0)] * part.ndim
            spare[axis] = (0, REPLAY_STEPS - count)
            return np.pad(part.astype(self._dtype), spare)

        stream = jax.tree.map(cut, self._samples)
        return _compat.place(stream, self._mesh) if self._own_samples else stream


def _cast(problem: AbstractProblem, dtype: np.dtype) -> AbstractProblem:
    """The problem with its real numbers in `dtype`, so that they do not widen a float32 state."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.asarray(leaf, dtype)
            return jnp.asarray(leaf)
        return leaf

    return jax.tree.map(cast, problem)


class _Form(NamedTuple):
    """What a program of `GeneralRun` is compiled for."""

    mesh: Mesh
    problem: AbstractProblem
    regime: AbstractRegime
    gradient: str
    optimizer: optax.GradientTransformation | None
    replay: bool
    own_samples: bool
    own_problem: bool = False
    apart: bool = False
    keyed: bool = True

    def over_seeds(self, one_seed: Any, split: tuple[Any, ...]) -> Any:
        """`one_seed(fixed, ...)` over the seeds of all devices: side by side under `vmap`, or one
        after the other if `apart`. `split` tells which arguments but the first have seeds."""
        own = (self.own_problem, False, False)
        split = (own, *split)
        axes = jax.tree.map(lambda has: 0 if has else None, split)

        def all_seeds(*arguments: Any) -> Any:
            if not self.apart:
                return jax.vmap(one_seed, in_axes=axes)(*arguments)
            flat, tree = jax.tree.flatten(arguments)
            marks = jax.tree.leaves(
                jax.tree.map(
                    lambda has, part: jax.tree.map(lambda leaf: has, part), split, arguments
                )
            )
            rows = [leaf for leaf, has in zip(flat, marks, strict=True) if has]

            def one(mine: list[Array]) -> Any:
                taken = iter(mine)
                leaves = [
                    next(taken) if has else leaf for leaf, has in zip(flat, marks, strict=True)
                ]
                return one_seed(*jax.tree.unflatten(tree, leaves))

            return lax.map(one, rows)

        return jax.jit(_compat.over_devices(all_seeds, self.mesh, split))


@functools.lru_cache(maxsize=32)
def _general_program(form: _Form) -> Any:
    """The compiled loop of `GeneralRun`; its trip count is an argument."""

    def one_seed(fixed, clock, key, source, carry):
        numbers, options, rates = fixed
        first, count = clock
        problem = eqx.combine(numbers, form.problem)
        regime = eqx.combine(options, form.regime)
        geometry, heat = problem.geometry, problem.temperature

        def one_step(index, carry):
            (point, memory, alive) = carry
            old = point, memory
            if form.replay:
                sample = jax.tree.map(lambda leaf: leaf[index], source)
            else:
                sample = problem.sample(key=key, step=first + index)
                sample = jax.tree.map(lambda leaf: _like(leaf, rates[0]), sample)
            state = State(point["fast"], point["slow"])
            if form.optimizer is None:
                # one key per step and variable, apart from those of the samples
                noise = (None, None)
                if form.keyed and (regime.random or any(one is not None for one in heat)):
                    noise = jax.random.split(_noise_key(key, first + index))
                fast, slope = regime.step(problem, state, sample, rates[0], noise[0], form.gradient)
                slow = geometry.descend(state.slow, slope, rates[1], heat.slow, noise[1])
                point = {"fast": _as(fast, state.fast), "slow": slow}
            else:
                slopes = problem.sample_gradient(*state, sample, gradient=form.gradient)
                places = {"fast": problem.fast_geometry, "slow": geometry}
                seen = {}
                for name, slope in zip(places, slopes, strict=True):
                    # as the geometry has it: along its tangent, of its scale
                    force = jax.tree.map(jnp.negative, slope)
                    velocity = places[name].velocity(point[name], force)
                    seen[name] = jax.tree.map(jnp.negative, velocity)
                steps, memory = form.optimizer.update(seen, memory, point)
                steps = _as(steps, point)
                point = {
                    name: place.retract(point[name], steps[name]) for name, place in places.items()
                }
            finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(point)]
            alive = functools.reduce(jnp.logical_and, finite, alive)
            kept = jax.tree.map(lambda new, old: jnp.where(alive, new, old), (point, memory), old)
            return (*kept, alive)

        return lax.fori_loop(jnp.zeros_like(count), count, one_step, carry)

    return form.over_seeds(one_seed, (False, form.keyed, form.replay and form.own_samples, True))


@functools.lru_cache(maxsize=32)
def _recorded_program(form: _Form) -> Any:
    """What the regime records with a point: the fast variable, and numbers about it."""

    def one_seed(fixed, point):
        numbers, options, _ = fixed
        problem = eqx.combine(numbers, form.problem)
        regime = eqx.combine(options, form.regime)
        return tuple(regime.recorded(problem, State(point["fast"], point["slow"])))

    return form.over_seeds(one_seed, (True,))


def _noise_key(key: PRNGKeyArray, step: Any) -> PRNGKeyArray:
    """The key of the noise of one step, apart from what `sample` may fold into it."""
    for word in (*step_words(step), 0x4C616E67):
        key = jax.random.fold_in(key, word)
    return key


def _as(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """`tree` in the dtypes of `like`."""
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, like)


def _like(leaf: Array, model: Array) -> Array:
    return leaf.astype(model.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
