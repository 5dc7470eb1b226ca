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
# # Features in context
#
# A model reads a prompt of labelled inputs $(x_i, y_i)$ and then answers a query $x$. Every prompt
# has a regression task of its own, $y = v\cdot f^0(x)$, but all share $f^0$. Kim & Suzuki (2024,
# [arXiv 2402.01258](https://arxiv.org/abs/2402.01258)) let a network of $N$ particles $(a_j, w_j)$
# learn features below a linear attention $W$:
#
# $$h(x) = \frac1N\sum_j a_j\,s(w_j\cdot x), \qquad
# \hat y(x) = \frac1n\sum_i y_i\,h(x_i)^\top W\,h(x).$$
#
# For long prompts the best attention is $W^* = (\mathbb{E}\,hh^\top)^{-1}$: the fast variable has
# a closed form, and what is left is a loss of the features alone.

# %%
# %matplotlib inline
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import tts_jax as tts
from tts_jax import plot, regime


# "small" has fewer particles, inputs and steps
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

SIZES = {"dimension": 5, "samples": 400} if SMALL else {"dimension": 10, "samples": 1500}
PARTICLES = 50 if SMALL else 100
STEP = 0.2  # slow time of a step
TAU = np.arange(0, 801 if SMALL else 2001, 10) * STEP


def problem_of(**options):
    return tts.InContext.of_teacher(
        key=jax.random.key(0), features=3, particles=PARTICLES, **SIZES, **options
    )


problem = problem_of()
start = problem.init(key=jax.random.key(1))


def run_of(problem, way="limit", rate=None, state=start):
    rates = {"step_size": STEP} if rate is None else {"step_size": rate, "epsilon": STEP / rate}
    return tts.sgd(problem, key=jax.random.key(2), state=state, regime=way, tau=TAU, **rates)


# %% [markdown]
# ## Attention eliminated, and attention trained
#
# `regime="limit"` puts $W$ at $W^*$ in every step. `regime.Inner(c)` trains it, $c$ steps for each
# of the particles, from $W = I$.

# %%
reduced = run_of(problem)
joint = {
    c: run_of(problem, regime.Inner(c), rate) for c, rate in ((1, 0.05), (10, 0.5), (100, 0.5))
}
ax = plt.figure(figsize=(5.5, 3.2)).add_subplot()
ax.semilogy(TAU, reduced.loss[0], color=plot.COLORS[0], label="W eliminated")
for place, (c, run) in enumerate(joint.items(), start=1):
    ax.semilogy(TAU, run.loss[0], "--", color=plot.COLORS[place], label=f"c = {c}")
ax.set(xlabel="slow time τ", ylabel="loss L")
ax.legend(fontsize="small")
ax.get_figure().tight_layout()

# %%
late = TAU > TAU[-1] / 10
print(f"reduced: {reduced.loss[0, 0]:.3f} -> {reduced.loss[0, -1]:.1e}")
for c, run in joint.items():
    gap = np.max(np.abs(run.loss[0] - reduced.loss[0])[late])
    middle = tts.State(run.fast[:, 10], jax.tree.map(lambda leaf: leaf[:, 10], run.slow))
    rate = 0.05 if c == 1 else 0.5
    number = float(tts.separation(problem, middle, epsilon=STEP / rate / c)[0])
    print(f"c = {c:3}: largest gap {gap:.3f}, separation number {number:.1g} at τ = {TAU[10]:g}")

# %% [markdown]
# The slower $W$ is, the longer the joint runs wait where $L$ is near 1 or ½. The separation number
# there is far above 1: near a feature that is not found the attention has a direction that hardly
# relaxes, however many steps it takes.
#
# ## Saddles
#
# These are the saddles of the reduced loss. `saddle` makes one: two of three directions of $f^0$
# are learned, the third feature has nothing to do with $f^0$. The gradient vanishes there; the
# smallest curvature does not.

# %%
saddle = problem.saddle(key=jax.random.key(3))
found = tts.smallest_curvature(problem, saddle, key=jax.random.key(4))
print(f"loss {float(problem.reduced_loss(saddle)):.6f}, smallest curvature {found.value:.3f}")
print(f"residual of its eigenvector {found.residual:.0e}")

# %% [markdown]
# Start beside it, along this direction. The loss falls like $e^{2\lambda\tau}$ with the curvature
# $-\lambda$.

# %%
h = 0.02 / abs(found.value)
tau = h * np.arange(0, 1001, 10)
near = tts.State(start.fast, {name: saddle[name] + 1e-4 * found.vector[name] for name in saddle})
leaving = tts.sgd(problem, key=jax.random.key(2), state=near, regime="limit", step_size=h, tau=tau)
below = 0.5 - leaving.loss[0]
early = (below > 1e-7) & (below < 1e-3)
rate = np.polyfit(tau[early], np.log(below[early]), 1)[0]
print(f"fitted rate {rate:.3f}, 2λ = {-2 * found.value:.3f}")
ax = plt.figure(figsize=(5, 3)).add_subplot()
ax.semilogy(tau, np.maximum(below, 1e-12), color=plot.COLORS[0], label="½ − L")
line = below[early][0] * np.exp(-2 * found.value * (tau - tau[early][0]))
ax.semilogy(tau[line < 1], line[line < 1], ":", color=plot.TARGET_COLOR, label="2λ")
ax.set(xlabel="slow time τ")
ax.legend(fontsize="small")
ax.get_figure().tight_layout()

# %% [markdown]
# ## Prompts have an end
#
# With $n$ pairs in a prompt the mean over it is not the mean over inputs. The expected loss has a
# term of order $1/n$ more and is still quadratic in $W$. With `prompt_length=n` the attention is
# the best one for it.

# %%
slow = {name: leaf[0, -1] for name, leaf in reduced.slow.items()}
best = float(problem.reduced_loss(slow))
for n in (10, 100, 1000, 10_000):
    loss = float(problem_of(prompt_length=n).reduced_loss(slow))
    print(f"n = {n:6}: loss {loss:.2e}, n times what n = ∞ would spare {n * (loss - best):.2f}")

# %% [markdown]
# And here is a prompt, with a task that the model has not seen.

# %%
attention = problem.critical(slow)
task = np.array([1.0, -0.5, 0.3])
rows = np.random.default_rng(0).integers(len(problem.inputs), size=2000)
queries = slice(0, 300)
ax = plt.figure(figsize=(3.4, 3.2)).add_subplot()
for place, n in enumerate((20, 2000)):
    context = rows[:n]
    answer = problem.predict(
        attention,
        slow,
        problem.inputs[context],
        problem.targets[context] @ task,
        problem.inputs[queries],
    )
    label = problem.targets[queries] @ task
    ax.plot(label, answer, ".", ms=3, color=plot.COLORS[place], label=f"n = {n}")
    print(f"n = {n:4}: root mean square error {np.sqrt(np.mean((answer - label) ** 2)):.3f}")
ax.axline((0, 0), slope=1, color=plot.TARGET_COLOR, lw=0.8)
ax.set(xlabel="label of the query", ylabel="answer")
ax.legend(fontsize="small")
ax.get_figure().tight_layout()

# %% [markdown]
# `tts-jax reproduce kim_suzuki` draws more: the curvature on the way, training on prompts, and a
# variant of ours with births and deaths.
