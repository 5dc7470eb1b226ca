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
# # Reproducing the paper
#
# Marion & Berthier, *Leveraging the two-timescale regime to demonstrate convergence of neural
# networks* (NeurIPS 2023, arXiv 2304.09576), claim that a shallow network whose outer weights learn
# much faster than its neurons move recovers a piecewise-constant target, and that at equal learning
# rates it does not. Their experiment is one run of each kind, and a box plot over ε.
#
# Here are the same experiments with many seeds each. The settings are those of the published
# configurations: five jumps, $m = 20$ neurons of width $\eta = 0.004$, label noise uniform on
# $[-1, 1]$, one sample per step. At the scale `"paper"` the two-timescale runs take the paper's
# $h = 10^{-5}$, 1.75e8 steps each; at `"quick"` $h = 10^{-3}$, which the published code has as its
# quick setting. Seed 0 starts from the published positions.
#
# Times are slow times $\tau = \varepsilon h k$ with the loss $\int(f - f^*)^2$. The paper's text
# has a ½ in the loss: its times are twice ours.

# %%
# %matplotlib inline
import os

import numpy as np

import tts_jax as tts
from tts_jax.experiments import marion_berthier as paper


SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"
SCALE, SEEDS = ("quick", 16) if SMALL else ("paper", 64)


def report(name, run):
    """One line: final loss, recovered jumps."""
    end = paper.outcome(run)
    print(
        f"{name:16} median loss {end.loss:.4f}, {end.recovered:.2f} of {end.jumps} jumps, "
        f"all in {end.all_recovered:.0%} of {end.seeds} seeds"
    )


# %% [markdown]
# ## Figures 3 and 4: two timescales
#
# $\varepsilon = 2\cdot 10^{-5}$, to $\tau = 0.035$. The paper compares SGD with the two-timescale
# limit; we put the gradient flow at the same ε between them.

# %%
slow = paper.two_timescale(SCALE, seeds=SEEDS, methods=("sgd", "flow", "limit"))
for name, run in slow.items():
    report(name, run)

# %%
paper.draw_figure4(slow)

# %% [markdown]
# (a, b) the network of seed 0, (c) its loss, (d) the loss of all seeds, (e) its neurons. As in the
# paper, the weights fit at once what the positions allow, then for each jump the nearer of its two
# neurons moves to it, and SGD stays near the limit.
#
# What one run does not show: not every seed is done by $\tau = 0.035$. Hitting times go like a
# distance over the squared height of the jump, and the sharp limit, $\eta \to 0$, has them in
# closed form event by event:

# %%
settings = paper.settings_of("two_timescale", SCALE, SEEDS)
sharp = tts.sharp_limit(settings.problem(), settings.start(), tau=np.array([settings.tau_end]))
last_hit = np.max(sharp.stats["hitting_time"], axis=-1)
slowest = np.abs(np.diff(settings.values))[np.argmax(sharp.stats["hitting_time"], axis=-1)]
print(f"the last jump to be hit is one of the small ones, w = ±2, in {np.sum(slowest == 2)} seeds")
recovered = np.all(slow["sgd"].observables["recovery"][:, -1] <= settings.eta, axis=-1)
in_time = last_hit <= settings.tau_end
print(f"last jump hit in time, by the formula: {in_time.sum()} of {SEEDS} seeds")
print(f"all jumps recovered by SGD:            {recovered.sum()} of {SEEDS} seeds")
print(f"both say the same of                   {np.sum(in_time == recovered)} of {SEEDS} seeds")

# %% [markdown]
# The loss of a recovered network is not zero: a step of width η cannot be a jump. With a neuron on
# every jump $\eta\sum_k w_k^2/28$ is left:

# %%
heights = np.diff(settings.values)
print(f"floor: {settings.eta * np.sum(heights**2) / 28:.4f}")
print(f"limit, seeds with all jumps: {np.median(slow['limit'].loss[in_time, -1]):.4f}")

# %% [markdown]
# ## Figure 5: one learning rate
#
# $\varepsilon = 1$, 1e6 steps at $h = 10^{-5}$, to $\tau = 10$: in slow time 286 times as long.

# %%
same = paper.same_rate(seeds=SEEDS)
for name, run in same.items():
    report(name, run)

# %%
paper.draw_figure5(same)

# %% [markdown]
# A jump is missed (triangles) although the run is long over: neurons moved before the weights could
# tell them where to, and came to rest elsewhere. The gradient flow misses jumps from most of these
# starts too: the noise of SGD makes it worse, but is not the reason.
#
# ## Figure 7: between the two
#
# The final loss at $\tau = 3$ for three ε, from the same starts with the same samples.

# %%
boxes = paper.epsilon_boxes(seeds=SEEDS)
for run in boxes.values():
    report(f"ε = {paper.outcome(run).epsilon:g}", run)

# %%
paper.draw_figure7(boxes)

# %% [markdown]
# ## What agrees, and what does not
#
# | claim | here |
# |---|---|
# | two timescales: neurons settle on the jumps | yes, where the last hit is in time |
# | SGD follows the limit | yes, up to its noise |
# | equal rates: some jump is missed | yes, on most seeds; a share of them recovers all |
# | the final loss falls with ε | yes, by more than an order of magnitude from ε = 1 to 0.01 |
# | ε = 2e-5 is the limit ε → 0 | in outcome; neurons are [a width away](convergence.ipynb) |
# | Theorem 1 explains the run | it asks for $m \ge 352$ at δ = 0.05; the experiment has 20 |
#
# One thing of the published code is not as in the text: its gradient in the positions has a box of
# width η in place of the derivative of the step. Both have the same mean as η → 0, but not the same
# noise. These figures use the box as published (`gradient="box"`); everywhere else the package's
# default is the true gradient.
#
# From the command line, `tts-jax reproduce all --scale paper` writes these figures and their data.
