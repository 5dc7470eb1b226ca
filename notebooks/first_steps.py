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
# # First steps: four ways to move one network
#
# A shallow network with $m$ steps of width $\eta$,
#
# $$f(x; a, u) = a_0 + \sum_{j=1}^m a_j\, \sigma\big((x - u_j)/\eta\big),$$
#
# learns a piecewise-constant function on $[0, 1]$. Its outer weights $a$ learn fast, its
# positions $u$ slowly: one step of SGD moves $a$ by $h$ and $u$ by $\varepsilon h$ times their
# gradients. On the slow time $\tau = \varepsilon h k$ of step $k$ there are four ways to follow it:
#
# | | |
# |---|---|
# | `sgd` | what one runs in practice: random samples with label noise |
# | `flow` | small steps: the gradient flow at finite $\varepsilon$, a stiff differential equation |
# | `limit` | $\varepsilon \to 0$: the weights are always optimal, $a = a^*(u)$ |
# | `sharp_limit` | $\varepsilon \to 0$, then $\eta \to 0$: a formula, nothing is integrated |
#
# This is the setting of Marion & Berthier, *Leveraging the two-timescale regime to demonstrate
# convergence of neural networks* (2023, arXiv 2304.09576).

# %%
# %matplotlib inline
import os

import jax
import numpy as np

import tts_jax as tts
from tts_jax import plot


# "full" takes seconds; "small" is for a quick check that everything runs
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"
SEEDS = 8 if SMALL else 64
STEP_SIZE = 1e-2 if SMALL else 1e-3

# %% [markdown]
# ## The problem
#
# Five jumps, twenty neurons, steps of width 0.004, label noise uniform on $[-1, 1]$.

# %%
target = tts.PiecewiseConstant(jumps=[0.2, 0.35, 0.5, 0.65, 0.8], values=[1, 5, 1, 3, 1, 5])
problem = tts.Univariate(target, neurons=20, eta=4e-3, noise=1.0)
tau = np.linspace(0.0, 0.035, 201)
epsilon = 2e-5

# %% [markdown]
# A state is a pair `(fast, slow)`: the weights with the bias first, `[m + 1]`, and the positions,
# `[m]`. `problem.init(key=...)` draws one; here the positions are those of the published run.

# %%
state = problem.state(slow=np.sort(np.random.RandomState(42).rand(20)))
print("loss at the start:            ", float(problem.loss(state.fast, state.slow)))
best = problem.critical(state.slow)
print("with the best weights for it: ", float(problem.loss(best, state.slow)))

# %% [markdown]
# ## Flow and limits
#
# All dynamics answer with a `Trajectory`: recorded times, states, the exact population loss, and
# a status that says whether the solve reached the end.

# %%
flow = tts.flow(problem, state, epsilon=epsilon, tau=tau)
limit = tts.limit(problem, state, tau=tau)
sharp = tts.sharp_limit(problem, state, tau=tau)
for trajectory in (flow, limit, sharp):
    final = float(trajectory.loss[-1])
    print(f"{trajectory.method:12} final loss {final:.5f}   {trajectory.summary()}")

# %% [markdown]
# Where a neuron sits on each jump, a loss of $\eta \sum_k w_k^2 / 28$ remains, with $w_k$ the
# heights of the jumps: a step of width $\eta$ cannot be a jump. At $\eta \to 0$ nothing remains.

# %%
print("floor:", float(problem.eta * np.sum(np.asarray(target.heights) ** 2) / 28))

# %% [markdown]
# ## SGD
#
# Many seeds cost little more than one, and they all start from the same positions here, so that
# what differs between them is the samples alone.

# %%
sgd = tts.sgd(
    problem,
    key=jax.random.key(0),
    seeds=SEEDS,
    state=state,
    epsilon=epsilon,
    step_size=STEP_SIZE,
    tau=tau,
)
recovered = np.asarray(sgd.observables["recovery"])[:, -1] <= float(problem.eta)
print(f"median final loss of {SEEDS} seeds: {np.median(np.asarray(sgd.loss)[:, -1]):.5f}")
print(f"jumps with a neuron within η:  {recovered.sum(axis=1).mean():.2f} of 5 on average")

# %% [markdown]
# ## On one time axis
#
# The band holds 80 % of the SGD seeds.

# %%
ax = plot.losses(
    {
        "sgd": (sgd.tau, sgd.loss),
        "flow": (flow.tau, flow.loss),
        "limit": (limit.tau, limit.loss),
        "sharp_limit": (sharp.tau, sharp.loss),
    }
)
ax.set_ylim(3e-3, 20.0)
ax.get_figure()

# %% [markdown]
# The neurons next to a jump move towards it. The nearer one arrives and stays, the farther one
# stops; the others hardly move.

# %%
ax = plot.positions(
    {"sgd": (sgd.tau, sgd.slow[0]), "limit": (limit.tau, limit.slow)}, jumps=target.jumps
)
ax.get_figure()

# %% [markdown]
# And the network of the first seed at the end, with its neurons:

# %%
x = np.linspace(0.0, 1.0, 2001)
ax = plot.network(
    {"sgd": (x, problem.predict(sgd.fast[0, -1], sgd.slow[0, -1], x))},
    target=(target.jumps, target.values),
    neurons=sgd.slow[0, -1],
)
ax.get_figure()

# %% [markdown]
# ## What lasts
#
# `trajectory.to_xarray()` names every axis and `trajectory.save("run.nc")` writes netCDF that
# `tts_jax.load("run.nc")` reads back. The paper's figures with their data come from
# `tts-jax reproduce all` on the command line, or from Python:
#
# ```python
# from tts_jax.experiments import marion_berthier
# data = marion_berthier.two_timescale(scale="quick", seeds=16)
# marion_berthier.draw_figure4(data)
# ```

# %%
sgd.to_xarray()
