"""The peers: different programs for the same SGD, measured side by side.

A peer is a class (or function) that makes a `Run` of a `Setting`, with the name of its module,
so that listing peers imports none of them. Each runs in a process of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run the ensemble.

    Attributes:
        name: short name, as in options and files.
        label: what it is, as in reports.
        build: `"module:callable"` that makes a `Run` of a `Setting`.
        options: further keyword arguments of the callable.
        backend: `"cpu"` or `"gpu"`.
        own: whether it is this package.
        most_seeds: larger ensembles are left out because one step takes seconds.
        check_seeds: seeds of the equal-work check.
    """

    name: str
    label: str
    build: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    backend: str = "cpu"
    own: bool = False
    most_seeds: int = 1 << 20
    check_seeds: int = 256

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of its process: JAX sees the backend that is measured."""
        return {"JAX_PLATFORMS": "cpu"} if self.backend == "cpu" else {}


REFERENCE = "engine"  # times are given as multiples of this peer's

_ENGINE = "benchmarks.peers.engine:EngineRun"
_SCAN = "benchmarks.peers.jax_scan:ScanRun"
_TORCH = "benchmarks.peers.torch_sgd:TorchRun"

CPU_PEERS = (
    Peer(
        "engine",
        "tts_jax, as its command line runs it",
        _ENGINE,
        {"configure": True},
        own=True,
    ),
    Peer("library", "tts_jax, imported as a library", _ENGINE, own=True),
    Peer(
        "xla-loop",
        "tts_jax without llvmlite, from its command line",
        _ENGINE,
        {"configure": True, "engine": "loop"},
        own=True,
    ),
    Peer(
        "numba-lanes",
        "Numba, seeds in SIMD lanes by hand",
        "benchmarks.peers.numba_sgd:LaneRun",
    ),
    Peer("numba", "Numba, a loop per seed", "benchmarks.peers.numba_sgd:PlainRun"),
    Peer("jax-scan", "JAX, vmap of a lax.scan", _SCAN),
    Peer("torch-compile", "PyTorch, torch.compile", _TORCH, {"compiled": True}),
    Peer("torch", "PyTorch, eager over all seeds", _TORCH),
    Peer(
        "numpy",
        "NumPy, the published loop",
        "benchmarks.peers.published:PublishedRun",
        most_seeds=1024,
        check_seeds=64,
    ),
)

GPU_PEERS = (
    Peer(
        "gpu-kernel",
        "tts_jax on the GPU, one kernel",
        _ENGINE,
        {"engine": "kernel"},
        backend="gpu",
        own=True,
    ),
    Peer(
        "gpu-unrolled",
        "tts_jax on the GPU, XLA with unrolled steps",
        _ENGINE,
        {"engine": "unrolled"},
        backend="gpu",
        own=True,
    ),
    Peer(
        "gpu-loop",
        "tts_jax on the GPU, the loop of the CPU",
        _ENGINE,
        {"engine": "loop"},
        backend="gpu",
        own=True,
    ),
    Peer("gpu-jax-scan", "JAX on the GPU, vmap of a lax.scan", _SCAN, backend="gpu"),
    Peer("gpu-torch", "PyTorch on the GPU, eager", _TORCH, {"device": "cuda"}, backend="gpu"),
)


def peers_for(backend: str) -> tuple[Peer, ...]:
    """The peers of a machine whose `jax.default_backend()` is `backend`.

    The CPU's run everywhere; a GPU adds its own.
    """
    return CPU_PEERS + GPU_PEERS if backend == "gpu" else CPU_PEERS
