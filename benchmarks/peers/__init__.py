"""The peers: different programs for the same work, measured side by side.

A peer is a class (or function) that makes a `Run` of a `Setting` (SGD) or of a `FlowSetting` (the
gradient flow), with the name of its module, so that listing peers imports none of them. Each runs
in a process of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to do the work.

    Attributes:
        name: short name, as in options and files.
        label: what it is, as in reports.
        build: `"module:callable"` that makes a `Run` of a setting.
        options: further keyword arguments of the callable.
        backend: `"cpu"` or `"gpu"`.
        own: whether it is this package.
        most_seeds: larger ensembles of SGD are left out because one step takes seconds; of a
            batch of flows, whose cost per start does not depend on its size, it solves the first
            ones.
        check_seeds: seeds of the equal-work check.
        setting: the class in `benchmarks.setting` that describes its work.
        tolerances: at which it solves the flow.
        most_neurons: larger networks are left out because one solve takes minutes.
        variables: environment variables of its process.
    """

    name: str
    label: str
    build: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    backend: str = "cpu"
    own: bool = False
    most_seeds: int = 1 << 20
    check_seeds: int = 256
    setting: str = "Setting"
    tolerances: tuple[float, ...] = ()
    most_neurons: int = 1 << 20
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of its process: JAX sees the backend that is measured.

        On a GPU it takes the memory that it needs, because the processes of a cell share it.
        """
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return {**self.variables, **({"JAX_PLATFORMS": "cpu"} if self.backend == "cpu" else own)}


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
    Peer(
        "gpu-torch-compile",
        "PyTorch on the GPU, torch.compile",
        _TORCH,
        {"device": "cuda", "compiled": True},
        backend="gpu",
    ),
    Peer("gpu-torch", "PyTorch on the GPU, eager", _TORCH, {"device": "cuda"}, backend="gpu"),
)


def _flow_peer(name: str, label: str, build: str, options: dict[str, Any], **more: Any) -> Peer:
    # one process or device per core: no threads of BLAS beside them
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return Peer(name, label, build, options, setting="FlowSetting", variables=single, **more)


_FLOW = "benchmarks.peers.flow_engine:EngineRun"
_STIFF = "benchmarks.peers.stiff:StiffRun"
_RUNGS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)

FLOW_PEERS = (
    _flow_peer(
        "engine",
        "tts_jax, `flow` as it comes",
        _FLOW,
        {"configure": True},
        own=True,
        tolerances=_RUNGS[1:7],
    ),
    _flow_peer(
        "xla",
        "tts_jax, `flow` in pure JAX",
        _FLOW,
        {"engine": "loop"},
        own=True,
        tolerances=_RUNGS[1:7],
    ),
    _flow_peer(
        "diffrax",
        "Diffrax with our Rodas5P and the dense Jacobian",
        _FLOW,
        {"configure": True, "reference": True},
        own=True,
        most_seeds=16,
        tolerances=(_RUNGS[1], *_RUNGS[3:6]),
        most_neurons=100,
    ),
    _flow_peer(
        "cvode",
        "SUNDIALS CVODE, BDF",
        _STIFF,
        {"method": "cvode"},
        most_seeds=64,
        tolerances=_RUNGS[2:],
    ),
    _flow_peer(
        "lsoda",
        "SciPy LSODA (`odeint`)",
        _STIFF,
        {"method": "lsoda"},
        most_seeds=32,
        tolerances=_RUNGS[2:],
        most_neurons=100,
    ),
    _flow_peer(
        "bdf",
        "SciPy BDF",
        _STIFF,
        {"method": "bdf"},
        most_seeds=8,
        tolerances=_RUNGS[3::2],
        most_neurons=100,
    ),
    _flow_peer(
        "radau",
        "SciPy Radau",
        _STIFF,
        {"method": "radau"},
        most_seeds=8,
        tolerances=_RUNGS[1:6:2],
        most_neurons=100,
    ),
    _flow_peer(
        "tsit5",
        "Diffrax Tsit5, explicit",
        _FLOW,
        {"configure": True, "solver": "tsit5"},
        most_seeds=16,
        tolerances=_RUNGS[1:7:2],
        most_neurons=20,
    ),
    _flow_peer(
        "kvaerno5",
        "Diffrax Kvaerno5, chord iterations to convergence",
        _FLOW,
        {"configure": True, "solver": "kvaerno5"},
        most_seeds=4,
        tolerances=_RUNGS[2:5],
        most_neurons=20,
    ),
    _flow_peer(
        "stock-kvaerno5",
        "Diffrax Kvaerno5 as it comes",
        _FLOW,
        {"configure": True, "stock": "Kvaerno5"},
        most_seeds=2,
        tolerances=_RUNGS[1:3],
        most_neurons=20,
    ),
)

# the other dynamics, in the workloads of that name
LIMIT_PEER = _flow_peer(
    "limit",
    "tts_jax, `limit`",
    _FLOW,
    {"configure": True, "method": "limit"},
    own=True,
    tolerances=_RUNGS[1:7],
)
SHARP_PEER = _flow_peer(
    "sharp-limit",
    "tts_jax, `sharp_limit`",
    _FLOW,
    {"method": "sharp_limit"},  # has threads of its own
    own=True,
)

# what errors are measured against: BDF formulas and code that nobody here wrote, at a tolerance
# a thousand times below what is compared
FLOW_REFERENCE = _flow_peer("cvode reference", "SUNDIALS CVODE", _STIFF, {"method": "cvode"})
LIMIT_REFERENCE = _flow_peer(
    "limit reference",
    "Diffrax with our Rodas5P and the dense Jacobian",
    _FLOW,
    {"configure": True, "method": "limit", "reference": True},
)

GPU_FLOW_PEERS = (
    _flow_peer(
        "gpu-xla",
        "tts_jax on the GPU, `flow` in pure JAX",
        _FLOW,
        {"engine": "loop"},
        backend="gpu",
        own=True,
        tolerances=_RUNGS[3:5],
    ),
)


def flow_peers_for(backend: str) -> tuple[Peer, ...]:
    """The peers of the flow, as `peers_for` those of SGD."""
    return FLOW_PEERS + GPU_FLOW_PEERS if backend == "gpu" else FLOW_PEERS


def peers_for(backend: str) -> tuple[Peer, ...]:
    """The peers of a machine whose `jax.default_backend()` is `backend`.

    The CPU's run everywhere; a GPU adds its own.
    """
    return CPU_PEERS + GPU_PEERS if backend == "gpu" else CPU_PEERS
