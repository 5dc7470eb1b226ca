"""Several processes, on one machine or many, through `jax.distributed`.

Every process computes on its own devices, on a CPU with all cores that it may run on: start one on
each node, or bind each to cores of its own (`srun --cpu-bind=cores`). What they exchange are
finished numbers. A process that dies takes the others with it: JAX ends them once its heartbeats
stay away.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree


_HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as dead
_SHUTDOWN_SECONDS = 60  # how long a process that ends waits for the others to end too


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of this job; before the first JAX operation.

    Under Slurm, Open MPI or Kubernetes the arguments are found by themselves.

    Arguments:
        coordinator: host and port of process 0.
        processes: their number.
        process_id: the number of this one, from 0.

    Raises:
        ValueError: no job was found and not all arguments are given.
        RuntimeError: the other processes could not be reached.
    """
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def is_first() -> bool:
    """Whether this is process 0, which speaks for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def my_rows(count: int) -> np.ndarray:
    """The rows of `count` that this process computes, `[ceil(count / processes)]`.

    Processes hold equally many rows one after another; the last row is repeated to fill up.
    """
    share = -(-count // jax.process_count())
    return np.minimum(np.arange(share) + share * jax.process_index(), count - 1)


def gather(tree: PyTree[np.ndarray], count: int) -> PyTree[np.ndarray]:
    """All `count` rows, in every process, from leaves that hold `my_rows(count)`."""
    if jax.process_count() == 1:
        return tree
    with jax.enable_x64(True):
        whole = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], whole)
