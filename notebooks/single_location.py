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
# # Single-location regression: does an attention layer find its token?
#
# In a prompt of $L$ tokens one, $X_0 \sim N(\sqrt{d/2}\,k^*, \gamma^2 I)$, holds the output
# $y = \langle X_0, v^*\rangle$; the others are noise. The attention layer
# $T(X) = \sum_l \operatorname{erf}(\lambda\langle X_l, k\rangle)\langle X_l, v\rangle$ with unit
# vectors $k$ and $v$ learns by projected gradient descent (Marion, Berthier, Biau & Boyer, ICLR
# 2025, [arXiv 2410.01537](https://arxiv.org/abs/2410.01537)). Five overlaps tell everything:
# $\kappa = \langle k, k^*\rangle$, $\nu = \langle v, v^*\rangle$, and three that are 0 on a
# manifold, $\theta = \langle v, k^*\rangle$, $\eta = \langle k, v^*\rangle$,
# $\rho = \langle k, v\rangle$.

# %%
# %matplotlib inline
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import tts_jax as tts
from tts_jax import plot


# "small" has fewer seeds
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"
SEEDS = 20 if SMALL else 100
TAU = np.linspace(0.0, 80.0, 81)


def found(run):
    kappa, nu = (run.observables[name][:, -1] for name in ("kappa", "nu"))
    return (np.abs(kappa) > 0.95) & (np.abs(nu) > 0.95) & (kappa * nu > 0)


# %% [markdown]
# ## From the manifold
#
# ε is the step size of $k$ over that of $v$; 1 is the published descent. Here are its 20,000 steps
# of size 4e-3 at $d = 400$. The dimension costs nothing: descent in $\mathbb{R}^d$ is closed in the
# five overlaps, and runs in them.

# %%
problem = tts.SingleLocation(gain=0.1, start="manifold")
options = {"key": jax.random.key(0), "seeds": SEEDS, "step_size": 4e-3, "tau": TAU}
run = tts.sgd(problem, epsilon=1.0, **options)
print(f"{found(run).sum()} of {SEEDS} found, distance to the manifold ", end="")
print(run.observables["manifold_distance"].max())

# %% [markdown]
# ## From the sphere
#
# Random unit vectors are near the manifold, but not on it, at $d = 400$ by some $1/\sqrt{d}$.

# %%
problem = tts.SingleLocation(gain=0.1)
joint = tts.sgd(problem, epsilon=1.0, **options)
lost = np.flatnonzero(~found(joint))
print(f"{found(joint).sum()} of {SEEDS} found; medians of the others:")
for name in ("kappa", "nu", "theta", "eta", "rho"):
    print(f"  |{name}| = {np.median(np.abs(joint.observables[name][lost, -1])):.3f}")

# %% [markdown]
# The others have swapped the roles: $k$ has gone to $v^*$. That is a minimum of the risk too.
#
# ## Two timescales
#
# $T$ is linear in $v$, so that $v$ is a natural fast variable. Its best value on the sphere is
# found in the regime `"limit"`.

# %%
limit = tts.sgd(problem, regime="limit", **options | {"step_size": 2e-2})
runs = {1.0: joint, 0.0: limit}
for epsilon in (2.0, 0.5, 0.25):
    size = 4e-3 / max(1.0, epsilon)
    runs[epsilon] = tts.sgd(problem, epsilon=epsilon, **options | {"step_size": size})
for epsilon in sorted(runs):
    print(f"ε = {epsilon:4}: {found(runs[epsilon]).mean():.0%} found")

# %%
seed = lost[0]
fig, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for ax, (title, one) in zip(panels, (("ε = 1", joint), ("limit", limit)), strict=True):
    for place, name in enumerate(("kappa", "nu", "theta", "eta")):
        values = np.abs(one.observables[name][seed])
        ax.plot(one.tau, values, color=plot.COLORS[place], label=f"|{name}|")
    ax.set(title=f"one start, {title}", xlabel="slow time τ")
panels[1].legend(fontsize="small")
fig.tight_layout()

# %% [markdown]
# With $v$ fast the same starts succeed. While $k$ is still far from everything, $v$ is already at
# $\pm v^*$, and $k$ has no reason to go there.
#
# ## The separation number
#
# It says how fast $v$ really is: ε times the speed of $k$ over the slowest rate of $v$. At the
# start $v$ relaxes slowly, so that ε = 1 is far from two timescales.

# %%
states = tts.State(limit.fast, limit.slow)
numbers = np.asarray(tts.separation(problem, states, epsilon=0.125))
for tau in (0, 1, 5, 20):
    print(f"τ = {TAU[tau]:4.1f}: median ε_eff = {np.median(numbers[:, tau]):.2g} at ε = 1/8")

# %% [markdown]
# ## The schedule
#
# The paper's remedy is another slow variable: a falling gain $\lambda_0/(1 + rt)$. In
# `ScheduledLocation` both $k$ and $v$ are fast and the gain is slow, with ε = r/α.

# %%
schedule = tts.ScheduledLocation(gain=1.0)
tau = np.linspace(0.0, 12.0, 61)
for epsilon in (0.4, 0.1):
    one = tts.sgd(schedule, epsilon=epsilon, **options | {"tau": tau})
    swapped = np.abs(one.observables["eta"][:, -1]) > 0.95
    print(f"ε = {epsilon}: {swapped.sum()} swapped, median |κ| = ", end="")
    print(f"{np.median(np.abs(one.observables['kappa'][:, -1])):.3f}")

# %% [markdown]
# The slower, the better; the published speed is 0.025. `tts-jax reproduce single_location` draws
# these figures for more seeds and speeds, and the basins of the starts.
