"""The machine code of the SGD kernel, without a GPU: instructions per step, registers, spills.

Compiles `_kernel.advance_groups` ahead of time for an H100 and reads what came out. It needs
JAX's CUDA wheels (`pip install "jax[cuda12]"`) and, on the path, `ptxas` and `nvdisasm` of a
CUDA toolkit; a machine with a GPU is not needed, and nothing is timed.

    python benchmarks/gpu_code.py
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


CASES = [("float32", 20), ("float32", 32), ("float32", 40), ("float32", 48), ("float32", 64)]
CASES += [("float64", 12), ("float64", 20)]
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.755
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
runtime_version { major: 12 minor: 9 }
device_description_str: "H100"
"""


def compile_kernel(dtype: str, neurons: int) -> None:
    """Compile for an H100; the compiler prints the PTX."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    import tts_jax as tts
    from tts_jax import _kernel, _lanes

    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=H100, topology="1x1x1"
    )
    target = tts.PiecewiseConstant([0.2, 0.35, 0.5, 0.65, 0.8], [1.0, 5.0, 1.0, 3.0, 1.0, 5.0])
    problem = tts.Univariate(target, neurons=neurons, eta=4e-3, noise=1.0)
    with jax.enable_x64(True):
        seeds = _kernel.WIDTH
        slow = np.tile(np.linspace(0.1, 0.9, neurons), (seeds, 1))
        state = tts.State(np.zeros((seeds, neurons + 1)), slow)
        words = np.zeros(seeds, np.uint32), np.zeros(seeds, np.uint32)
        cell = _lanes.Cell(problem, state, words, step_size=1e-5, epsilon=2e-5)
        options = {"gradient": "exact", "dtype": dtype, "width": seeds}
        run = _lanes.LaneRun([cell], engine="loop", **options)
        shared, lanes = run._shared, (run._fixed, run.carry, run._words)
        high, low, count = np.uint32(0), np.uint32(0), np.uint32(1)
        place = SingleDeviceSharding(topology.devices[0])
        described = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place),
            (shared, *lanes, (high, low), count),
        )
        program = functools.partial(_kernel.advance_groups, problem, gradient="exact")
        jax.jit(program).trace(*described).lower(lowering_platforms=("cuda",)).compile()


def read_code(ptx: str) -> dict[str, int]:
    """Registers, spilled bytes and the instructions of the loop, by `ptxas` and `nvdisasm`."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        assemble = ["ptxas", "-arch=sm_90a", "-v", str(source), "-o", str(binary)]
        report = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        show = ["nvdisasm", "-c", str(binary)]
        listing = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    labels, instructions = {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
    loop = []
    for at, code in enumerate(instructions):
        branch = re.search(r"BRA.*?(\.L_\w+)", code)
        if branch and labels[branch[1]] < at and at - labels[branch[1]] > len(loop):
            loop = instructions[labels[branch[1]] : at + 1]
    return {
        "instructions": len(loop),
        "local": sum(bool(re.search(r"\b(LDL|STL)\b", code)) for code in loop),
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "stack": int(re.search(r"(\d+) bytes stack frame", report)[1]),
    }


def main() -> None:
    columns = f"{'instructions':>13} {'to memory':>10} {'registers':>10} {'local bytes':>12}"
    print(f"{'dtype':>8} {'neurons':>8} {columns}")
    settings = {"MOSAIC_GPU_DUMP_PTX": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    for dtype, neurons in CASES:
        # in a process of its own, whose output is the compiler's
        command = [sys.executable, __file__, dtype, str(neurons)]
        child = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | settings, check=True
        )
        output = child.stdout + child.stderr
        begin = output.index(".version")
        found = read_code(output[begin : output.index("$L__func_end0:", begin)] + "}\n")
        print(
            f"{dtype:>8} {neurons:>8} {found['instructions']:>13} {found['local']:>10} "
            f"{found['registers']:>10} {found['stack']:>12}"
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        compile_kernel(sys.argv[1], int(sys.argv[2]))
    else:
        main()
