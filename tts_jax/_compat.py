"""What depends on the JAX release and the machine: flags, compiler options, devices, fences.

Everything here only makes things faster. Without it every answer is the same up to rounding.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree


# Compile a loop over small arrays as one function instead of one call per operation; keep its
# inner loops rolled, so that they vectorise; let one pass over the data write several results.
_LOOP_OPTIONS = (
    "xla_cpu_small_while_loop_byte_threshold=1000000000",
    "xla_cpu_disable_loop_unrolling",
    "xla_cpu_use_multi_output_fusion",
)


def cores() -> int:
    """The number of cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def configure_cpu() -> bool:
    """Make XLA fast on small loops and show one CPU device per core; for programs, not libraries.

    Acts on the whole process, and only before JAX's backend starts: call it before the first
    JAX operation. What the user has set in `XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`, `PJRT_NPROC` or
    `OPENBLAS_NUM_THREADS` stays. The library never calls this; the command line does.

    Returns:
        Whether the backend had not started yet, so that the settings count.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    own = getattr(jax.config, "jax_num_cpu_devices", -1)
    try:
        # JAX refuses a new number once the backend runs: the only public way to ask
        jax.config.update("jax_num_cpu_devices", own + 2)
    except RuntimeError:
        return False
    is_set = own != -1 or "xla_force_host_platform_device_count" in flags
    jax.config.update("jax_num_cpu_devices", own if is_set else cores())
    if "xla_backend_extra_options" not in flags:
        option = f"--xla_backend_extra_options={','.join(_LOOP_OPTIONS)}"
        os.environ["XLA_FLAGS"] = f"{flags} {option}".strip()
    if not any(name in os.environ for name in _POOL):
        os.environ[_POOL[0]] = str(4 * cores())
    # JAX's LAPACK, which is not loaded yet: its threads would spin beside those of the devices
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return True


# Environment variables of the number of threads in XLA's pool, by default one per core.
_POOL = ("PJRT_NPROC", "NPROC")


def can_factorise_together(devices: int) -> bool:
    """Whether several CPU devices may come upon matrix factorisations in loops at the same time.

    Each of them waits in a thread of one pool for other threads of it. Where the pool has no
    more threads than there are devices, all may wait for ever (jaxlib 0.10.2).
    """
    size = next((os.environ[name] for name in _POOL if name in os.environ), "")
    return size.isdecimal() and int(size) >= 2 * devices


def loops_run_inline() -> bool:
    """Whether `configure_cpu` has made XLA run loops in the thread that comes upon them.

    Then a loop that calls `eigh` may wait for ever if several CPU devices do so together
    (jaxlib 0.10.2).
    """
    return _LOOP_OPTIONS[0].partition("=")[0] in os.environ.get("XLA_FLAGS", "")


def loop_compiler_options(platform: str) -> dict[str, Any]:
    """Options for `jax.jit(compiler_options=...)` of the lane loops."""
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}


def small_array_options(platform: str) -> dict[str, Any]:
    """Options for `jax.jit(compiler_options=...)` of arithmetic on small arrays.

    Else XLA on a CPU leaves simple operations to a library, which makes one pass over memory for
    each of them.
    """
    wanted = {"xla_cpu_experimental_ynn_fusion_type": ""}
    on_cpu = platform == "cpu"
    return {name: value for name, value in wanted.items() if on_cpu and _takes(name, value)}


@functools.cache
def _takes(option: str, value: Any) -> bool:
    """Whether this release of XLA has a compiler option."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@jax.jit
def fenced_scale(
    which: Bool[Array, " lanes"],
    values: Float[Array, " lanes"],
    factor: Float[Array, " lanes"],
    inverse: Float[Array, " lanes"],
) -> Float[Array, " lanes"]:
    """`values * factor` where `which`, else 0, computed once however many consumers it has.

    XLA repeats cheap arithmetic inside each consumer: a residual would be summed again for
    every neuron. It does not repeat a division, so the scaling is written as one, by `inverse`,
    1 / `factor`. `_simd` takes the product.
    """
    del factor
    return lax.select(which, values, jnp.zeros_like(values)) / inverse


def lane_mesh(devices: Sequence[Any]) -> Mesh:
    """A one-axis mesh over `devices`."""
    return Mesh(np.asarray(devices), ("devices",))


def place(tree: PyTree, mesh: Mesh) -> PyTree[Array]:
    """Put every leaf on the devices of `mesh`, cut along its leading axis."""
    if mesh.size == 1:
        return jax.device_put(tree, mesh.devices.flat[0])
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("devices")))


def over_devices(function: Callable, mesh: Mesh, split: Sequence[Any]) -> Callable:
    """`function` on each device with its slice of the arguments marked in `split`.

    Marked arguments, or parts of them where `split` has the marks of these, and all results are
    cut along the leading axis of every leaf, whose size must be a multiple of the number of
    devices; the others are seen whole by every device.
    """
    if mesh.size == 1:
        return function
    specs = jax.tree.map(
        lambda cut: PartitionSpec("devices") if cut else PartitionSpec(), tuple(split)
    )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec("devices"),
        check_vma=False,
    )
