# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The same lines on a GPU
#
# A run of the paper is $\tau_{\max}/(\varepsilon h)$ steps after one another, $1.75 \cdot 10^8$ of
# them, and each step is some hundred operations. No single run can fill a GPU. Thousands of seeds
# can: this article asks how the cost of a step depends on their number, and on the processor that
# you run it on. The lines are the same on either.
#
# The outputs shown here are those of a CPU; what a GPU gave is told at the end.

# %%
# %matplotlib inline
import os
import time

import jax
import numpy as np

import tts_jax as tts


SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"
backend = jax.default_backend()
print(backend, [device.device_kind for device in jax.devices()])

# %% [markdown]
# ## One seed, many seeds
#
# `sgd(engine="auto")` picks what suits the processor: vectors of seeds on a CPU; on an NVIDIA GPU
# of compute capability 9 or 10 one kernel with a thread per seed, whose whole state stays in
# registers for as many steps as one launch takes; elsewhere XLA. We time the second of two equal
# runs, so that compilation does not count. All times below are per step and seed.

# %%
target = tts.PiecewiseConstant([0.2, 0.35, 0.5, 0.65, 0.8], [1, 5, 1, 3, 1, 5])
problem = tts.Univariate(target, neurons=20, eta=4e-3, noise=1.0)
EPSILON, STEP_SIZE = 2e-5, 1e-5


def run(seeds, steps, **options):
    tau = [0.0, steps * EPSILON * STEP_SIZE]
    return tts.sgd(
        problem, key=jax.random.key(0), seeds=seeds, epsilon=EPSILON, step_size=STEP_SIZE, tau=tau,
        gradient="box", progress=False, **options,
    )  # fmt: skip


def nanoseconds(seeds, steps, **options):
    run(seeds, steps, **options)
    began = time.perf_counter()
    run(seeds, steps, **options)
    return (time.perf_counter() - began) / (seeds * steps) * 1e9


work = 3e8 if SMALL else 3e9  # seed-steps of one measurement
counts = [1, 16, 256, 4096] if backend == "cpu" else [256, 4096, 65536, 262144]
print("seeds   ns per seed-step")
for seeds in counts:
    steps = int(min(max(work / seeds, 2000), 5e6))
    print(f"{seeds:6d}   {nanoseconds(seeds, steps):8.2f}")

# %% [markdown]
# On a CPU the cost is flat once the vectors are full. On a GPU a thread holds one seed, so that it
# falls until tens of thousands of seeds are in flight. For few seeds a CPU is the better machine.
#
# ## The same numbers?
#
# A seed draws its samples from its key and the number of the step, on any device. So two engines
# take the same steps and differ by rounding only. Here is the default engine against XLA's loop:

# %%
ours, loop = (run(64, 20_000, engine=engine) for engine in ("auto", "loop"))
moved = np.abs(ours.slow[:, -1] - ours.slow[:, 0]).max()
apart = np.abs(np.asarray(ours.slow[:, -1], float) - np.asarray(loop.slow[:, -1], float)).max()
print(f"positions moved by up to {moved:.1e}, the engines differ by up to {apart:.1e}")
assert apart < 1e-3 * problem.eta

# %% [markdown]
# ## On a GPU
#
# `python -m benchmarks.gpu` measured an NVIDIA H200. From 50,000 seeds on, the kernel takes 15
# picoseconds per seed and step in float32 and 32 in float64: $6.8 \cdot 10^{10}$ steps a second,
# where its 354 instructions per step allow $8 \cdot 10^{10}$. JAX's own `vmap` of a `lax.scan`
# takes 20 times as long there, PyTorch compiled 6 to 25 times.
#
# The flow gains less. `tts.flow(..., engine="cuda")` runs the CPU's program in a thread per start,
# with the same bits, and solves 42,000 starts a second, where the 16 cores beside that GPU solve
# 36,000: a start needs more memory than a thread has registers, and the GPU waits for it.
