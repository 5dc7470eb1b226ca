"""The one answer of every dynamics: recorded times, states, losses and a status per lane."""

import enum
import functools
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from tts_jax._checkpoint import replacing
from tts_jax._problem import AbstractProblem, one_by_one, quickly
from tts_jax._version import __version__
from tts_jax.checks import is_traced


if TYPE_CHECKING:
    import xarray


# States that a GPU looks at together. Of larger arrays XLA tries other ways to compute a reduction,
# and may take minutes to compile one of them.
TOGETHER = 1 << 16


class Status(enum.IntEnum):
    """How a lane (one seed, one start, one ε) ended; 0 is success."""

    SUCCESS = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    SOLVER_FAILED = 3
    DIVERGED = 4
    NOT_UNIQUE = 5
    MAX_EVENTS = 6

    @property
    def advice(self) -> str:
        """What happened and what to change."""
        return _ADVICE[self]


class Event(enum.IntEnum):
    """What happens to a neuron at a time listed in `Trajectory.events`."""

    HIT = 0  # it reaches a jump and stays on it
    PASS = 1  # it reaches a jump and goes on beyond it
    LEAVE = 2  # it leaves a jump on which it sat


_ADVICE = {
    Status.SUCCESS: "The lane was computed to its last recorded time.",
    Status.MAX_STEPS: (
        "The solver reached its step limit. Raise `max_steps`, loosen `rtol`/`atol`, or choose "
        "a stiff solver (`solver='rodas5p'`) when ε is small."
    ),
    Status.STEP_TOO_SMALL: (
        "The step size fell below what the floating-point numbers resolve. Loosen `rtol`/`atol`; "
        "in float32 use float64."
    ),
    Status.SOLVER_FAILED: (
        "A step could not be solved (singular or non-finite stage system). Check the start for "
        "extreme values, or try `solver='kvaerno5'`."
    ),
    Status.DIVERGED: (
        "The state became infinite or NaN. For SGD lower `step_size`: stability needs "
        "step_size * (neurons + 1) below about 1, and epsilon * step_size small against "
        "eta**2 / jump**2."
    ),
    Status.NOT_UNIQUE: (
        "The sharp limit is not unique from some time on: a neuron on a jump is pushed off it "
        "equally to both sides, or both neurons that reached a jump together are pulled off it "
        "again. Move the start by a little, or use `limit` at a small `eta`."
    ),
    Status.MAX_EVENTS: (
        "The sharp limit has more events than the answer has room for. Go on with a second run "
        "from the last recorded positions, `problem.state(slow=...)`."
    ),
}


class Trajectory(eqx.Module):
    """Recorded states of one dynamics, for one lane or a batch of lanes.

    Attributes:
        tau: recorded slow times, `[T]`.
        fast: fast variable, `[..., T, *fast]` (`[..., T, m+1]` for `Univariate`).
        slow: slow variable, `[..., T, *slow]` (`[..., T, m]` for `Univariate`).
        loss: population loss, `[..., T]`.
        status: `Status` per lane, `[...]`; recorded values after a failure are NaN.
        stats: numbers about the solve per lane, each `[...]` or `[..., T]`.
        observables: named quantities of the problem, each `[..., T, *axes]`.
        coords: coordinates of the named axes, such as the `jump` positions.
        settings: the numbers that define the run (problem and method).
        method: `"flow"`, `"limit"`, `"sharp_limit"` or `"sgd"`.
        batch_dims: names of the leading axes.
        dims: names of the axes of one state, of the observables and of the statistics.
        notes: what else defines the run, in words: solver, engine, key, versions.
        events: what happened when, each `[..., event]` in order of time, for `sharp_limit`: `time`
            (infinite behind the last event), `neuron` (index in the caller's order), `jump` and
            `kind` (an `Event`; all three −1 behind the last). Empty for the other methods.
        series: what `sgd` observed between the recorded times (`observe_every`): its own `tau`,
            `[K]`, and by name `[seeds, K, *axes]` the `loss`, `epsilon_eff` and the observables.
            Empty if nothing was asked for.
    """

    tau: Float[Array, " T"]
    fast: PyTree[Array]
    slow: PyTree[Array]
    loss: Float[Array, "..."]
    status: Int[Array, "..."]
    stats: dict[str, Array]
    observables: dict[str, Array]
    coords: dict[str, Array]
    settings: dict[str, Any]
    method: str = eqx.field(static=True)
    batch_dims: tuple[str, ...] = eqx.field(static=True)
    dims: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True)
    notes: tuple[tuple[str, str], ...] = eqx.field(static=True)
    events: dict[str, Array] = eqx.field(default_factory=dict)
    series: dict[str, Array] = eqx.field(default_factory=dict)

    @property
    def success(self) -> Array:
        """Whether each lane reached its last recorded time, `[...]`."""
        return self.status == int(Status.SUCCESS)

    def summary(self) -> str:
        """One line per kind of ending: how many lanes, and what to do about the failed ones."""
        values, counts = np.unique(np.asarray(self.status), return_counts=True)
        total = int(np.size(self.status))
        return "\n".join(
            f"{count} of {total} lanes: {Status(value).name}. {Status(value).advice}"
            for value, count in zip(values, counts, strict=True)
        )

    def to_xarray(self) -> "xarray.Dataset":
        """The trajectory as a labelled dataset.

        Axes are named (`seed`, `epsilon`, `tau`, `neuron`, `jump`, ...), and the settings, the
        method, the versions and the key are attributes or scalar variables, so that the file
        tells how it was made.
        """
        import xarray

        fields = _named_leaves("fast", self.fast) | _named_leaves("slow", self.slow)
        fields |= {"loss": self.loss, "status": self.status}
        fields |= {f"stats.{name}": value for name, value in self.stats.items()}
        fields |= {f"events.{name}": value for name, value in self.events.items()}
        fields |= {f"series.{name}": value for name, value in self.series.items()}
        fields |= dict(self.observables)
        tau = np.asarray(self.tau)
        extra = tau.ndim - 1
        dims = dict(self.dims)
        batch = _batch_names(np.ndim(self.status), self.batch_dims)
        if extra:
            # a `vmap` around the dynamics batched the recorded times as well
            flat = tau.reshape(-1, tau.shape[-1])
            if not np.all(flat == flat[0]):
                raise ValueError(
                    "`to_xarray` needs the same recorded times in every lane; these differ "
                    f"along {batch[:extra]}. Convert the lanes one by one."
                )
            tau = flat[0]
        variables: dict[str, Any] = {}
        for name, value in fields.items():
            array = np.asarray(value)
            own = dims.get(name.removeprefix("stats.").removeprefix("series."), ())
            rest = array.ndim - len(batch)
            if name.startswith("events."):
                variables[name] = ((*batch, "event"), array)
                continue
            if name.startswith("series."):
                front = () if name == "series.tau" else batch
                more = array.ndim - len(front) - 1
                variables[name] = ((*front, "observation", *_axes(name, own, more)), array)
                continue
            # a statistic may have one value per lane, all others have one per recorded time
            per_lane = name.startswith("stats.") and own and rest == len(own)
            if rest and not per_lane:
                own = ("tau", *_axes(name, own, rest - 1))
            variables[name] = ((*batch, *own[:rest]), array)
        for name, value in self.settings.items():
            array = np.asarray(value)
            if name == "epsilon" and array.shape == np.shape(self.status):
                axes = batch
            else:
                axes = (*batch[:extra], *_axes(name, dims.get(name, ()), array.ndim - extra))
            variables[f"settings.{name}"] = (axes, array)
        coords: dict[str, Any] = {"tau": tau}
        for name, value in self.coords.items():
            array = np.asarray(value)
            coords[name] = array if array.ndim == 1 else array.reshape(-1, array.shape[-1])[0]
        if "epsilon" in batch:
            lanes = np.moveaxis(np.asarray(self.settings["epsilon"]), batch.index("epsilon"), 0)
            lanes = lanes.reshape(lanes.shape[0], -1)
            if np.all(lanes == lanes[:, :1]):
                coords["epsilon"] = lanes[:, 0]
        if "seed" in batch:
            coords["seed"] = np.arange(np.shape(self.status)[batch.index("seed")])
        dataset = xarray.Dataset(variables, coords)
        dataset.attrs = {
            "method": self.method,
            "batch_dims": json.dumps(self.batch_dims),
            "dims": json.dumps(self.dims),
            "tts_jax": __version__,
            **dict(self.notes),
        }
        return dataset

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write netCDF atomically: a killed write leaves no half file behind.

        Raises:
            OSError: the folder is missing or not writable; the message names it.
        """
        return write_netcdf(self.to_xarray(), path)


def _named_leaves(name: str, tree: PyTree[Array]) -> dict[str, Array]:
    if isinstance(tree, dict):
        parts: dict[str, Array] = {}
        for key, value in tree.items():
            parts |= _named_leaves(f"{name}.{key}", value)
        return parts
    if not hasattr(tree, "shape"):
        raise TypeError(
            f"`to_xarray` labels states that are arrays or nested dicts of arrays; `{name}` is "
            f"a {type(tree).__name__}."
        )
    return {name: tree}


def _axes(name: str, known: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The names of `count` axes: the known ones, or numbered ones."""
    return known if len(known) == count else tuple(f"{name}_{axis}" for axis in range(count))


def _batch_names(count: int, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all leading axes: those of the call, behind any that a `vmap` put in front."""
    return tuple(f"batch_{axis}" for axis in range(count - len(known))) + known


def write_netcdf(dataset: "xarray.Dataset", path: str | os.PathLike[str]) -> Path:
    """Write `dataset` to `path` through a temporary file, fsync and rename.

    Raises:
        OSError: the folder is missing or not writable.
    """
    path = Path(path)
    try:
        # in memory first: HDF5 crashes the process when a file cannot be completed
        content = dataset.to_netcdf(engine="h5netcdf")
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise type(error)(
            f"Cannot write `{path}`: {error.strerror or error}. Choose a folder that exists, is "
            f"writable and has space left."
        ) from error
    return path


def load(path: str | os.PathLike[str]) -> Trajectory:
    """Read a trajectory that `Trajectory.save` wrote; arrays come back as NumPy float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a trajectory.
    """
    import xarray

    remedy = "Pass a file written by `Trajectory.save`."
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file `{path}`. {remedy}")
    try:
        with xarray.open_dataset(path, engine="h5netcdf") as opened:
            dataset = opened.load()
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"`{path}` is damaged or not netCDF: {error}. {remedy}") from error
    if not {"method", "dims", "batch_dims"} <= set(dataset.attrs):
        raise ValueError(
            f"`{path}` is netCDF but not a trajectory: its attributes lack `method`, `dims` or "
            f"`batch_dims`. {remedy}"
        )
    dims = tuple((name, tuple(axes)) for name, axes in json.loads(dataset.attrs["dims"]))
    groups: dict[str, Any] = {"fast": {}, "slow": {}, "stats": {}, "settings": {}, "events": {}}
    groups["series"] = {}
    observables = {}
    for name, variable in dataset.data_vars.items():
        head, _, tail = str(name).partition(".")
        if head in groups:
            _insert(groups, [head, *tail.split(".")] if tail else [head], variable.values)
        elif name not in ("loss", "status"):
            observables[str(name)] = variable.values
    axes = {axis for _, names in dims for axis in names}
    values: dict[str, Any] = {name: dataset[name].values for name in ("tau", "loss", "status")}
    reserved = {"method", "batch_dims", "dims", "tts_jax"}
    return Trajectory(
        tau=values["tau"],
        fast=groups["fast"],
        slow=groups["slow"],
        loss=values["loss"],
        status=values["status"],
        stats=groups["stats"],
        observables=observables,
        coords={str(k): v.values for k, v in dataset.coords.items() if k in axes},
        settings=groups["settings"],
        method=dataset.attrs["method"],
        batch_dims=tuple(json.loads(dataset.attrs["batch_dims"])),
        dims=dims,
        notes=tuple((k, str(v)) for k, v in dataset.attrs.items() if k not in reserved),
        events=groups["events"],
        series=groups["series"],
    )


def _insert(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def record(
    problem: AbstractProblem | Sequence[AbstractProblem],
    *,
    method: str,
    tau: Array,
    fast: PyTree[Array],
    slow: PyTree[Array],
    loss: Array,
    status: Array,
    stats: dict[str, Array],
    batch_dims: tuple[str, ...] = (),
    settings: dict[str, Any] | None = None,
    notes: dict[str, str] | None = None,
    events: dict[str, Array] | None = None,
    series: dict[str, Array] | None = None,
) -> Trajectory:
    """Assemble the answer of one dynamics; observables are computed from the states.

    Of several problems each has one entry of the first axis of the states; the names and
    settings are those of the first.
    """
    observables = of_states(_observables, jnp.ndim(loss), problem, fast, slow)
    problem = problem if isinstance(problem, AbstractProblem) else problem[0]
    return Trajectory(
        tau=jnp.asarray(tau),
        fast=fast,
        slow=slow,
        loss=loss,
        status=status,
        stats=stats,
        observables=observables,
        coords=quickly(problem, "coords"),
        settings={
            name: value if is_traced(value) else np.asarray(value)
            for name, value in (quickly(problem, "settings") | (settings or {})).items()
        },
        method=method,
        batch_dims=batch_dims,
        dims=tuple(quickly(problem, "axes").items()),
        notes=(
            ("problem", type(problem).__name__),
            *quickly(problem, "notes").items(),
            ("jax", jax.__version__),
            ("python", platform.python_version()),
            *(notes or {}).items(),
        ),
        events=events or {},
        series=series or {},
    )


def raise_on_failure(trajectory: Trajectory) -> Trajectory:
    """Raise for the first kind of failed lane; used where a caller asked `throw=True`.

    Raises:
        RuntimeError: some lane's status is not success.
    """
    if not is_traced(trajectory.status) and not np.all(np.asarray(trajectory.success)):
        raise RuntimeError(trajectory.summary())
    return trajectory


def _observables(
    problem: AbstractProblem, fast: PyTree[Array], slow: PyTree[Array]
) -> dict[str, Array]:
    return problem.observables(fast, slow)


@eqx.filter_jit
def over_lanes(
    function: Callable[..., Any], leading: int, problem: AbstractProblem, *states: PyTree[Array]
) -> Any:
    """`function(problem, *states)` mapped over the first `leading` axes of the states."""
    mapped = functools.partial(function, problem)
    lanes = jnp.shape(jax.tree.leaves(states)[0])[:leading]
    if jax.default_backend() != "cpu" and math.prod(lanes) > TOGETHER:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[leading:]), states)
        found = jax.lax.map(lambda state: mapped(*state), flat, batch_size=TOGETHER)
        return jax.tree.map(lambda leaf: leaf.reshape(*lanes, *leaf.shape[1:]), found)
    for _ in lanes:
        mapped = _each(mapped) if one_by_one(problem) else jax.vmap(mapped)
    return mapped(*states)


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` mapped over the first axis of its arguments, one entry after the other."""
    return lambda *states: jax.lax.map(lambda state: function(*state), states)


def of_states(
    function: Callable[..., Any],
    leading: int,
    problem: AbstractProblem | Sequence[AbstractProblem],
    *states: PyTree[Array],
) -> Any:
    """`function(problem, *states)` over the first `leading` axes of the states.

    Of several problems each has one entry of the first axis.
    """
    if isinstance(problem, AbstractProblem):
        return over_lanes(function, leading, problem, *states)
    each = [
        over_lanes(function, leading - 1, one, *_row(states, row))
        for row, one in enumerate(problem)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _row(tree: PyTree[Array], row: int) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[row], tree)
