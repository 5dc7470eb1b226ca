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
# # Implicit diffusion: a sampler that is trained while it samples
#
# The potential $V(x, \theta)$ has a stationary law $\pi(\theta) \propto e^{-V}$, and $\theta$
# shall be such that samples of it have a large reward $R$. Sampling takes many Langevin steps, so
# that a gradient step in $\theta$ for each full sampling is dear. Marion, Korba, Bartlett et al.
# (2024, [arXiv 2402.05468](https://arxiv.org/abs/2402.05468)) do both at once: *one* Langevin step
# of a batch of particles that is never begun anew, then *one* step of $\theta$.
#
# That is a two-timescale dynamics. The particles are fast, and what eliminates them is not a
# minimum but an equilibrium. Here are the six Gaussian modes of the paper's §5.1; the slow variable
# holds the logits of their weights.

# %%
# %matplotlib inline
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tts_jax as tts
from tts_jax import plot, regime


# "small" has fewer particles and runs
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

PARTICLES = 500 if SMALL else 1000
GAMMA, ETA = 0.2, 0.1  # steps of the particles and of the logits, as published
TAU = np.linspace(0.0, 500.0, 51)
KEY = jax.random.key(0)
problem = tts.ImplicitDiffusion(particles=PARTICLES)

# %% [markdown]
# ## One run
#
# `regime.Inner(1)` moves the particles once and takes the gradient at the new ones: the published
# single loop. `limit` is the exact reduced flow
# $\dot\theta = \nabla\,\mathbb{E}_{\pi(\theta)} R$, in which the reward of a mode is a closed
# form.

# %%
single = tts.sgd(
    problem, key=KEY, regime=regime.Inner(1), step_size=GAMMA, epsilon=ETA / GAMMA, tau=TAU
)
reduced = tts.limit(problem, problem.init(key=KEY), tau=TAU)

fig, panels = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
for ax, at in zip(panels, (0, 5, 20, 50), strict=True):
    ax.plot(*single.fast[0, at], ".", ms=2, alpha=0.4, color=plot.COLORS[0])
    ax.set(title=f"τ = {TAU[at]:g}", xlim=(-8, 8), ylim=(-8, 8), aspect="equal")
fig.tight_layout()

# %% [markdown]
# First they go to the mode at 0°, which has four times the weight of the best one, at 60°, at the
# start; then all of them move on.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
left.plot(TAU, single.observables["mean_reward"][0], color=plot.COLORS[5], label="particles")
left.plot(
    TAU, single.observables["expected_reward"][0], color=plot.COLORS[0], label="single loop, π(θ)"
)
left.plot(
    TAU, reduced.observables["expected_reward"], ":", color=plot.TARGET_COLOR, label="reduced flow"
)
left.set(xlabel="slow time τ", ylabel="reward")
left.legend(fontsize="small")
for mode, color in enumerate(plot.COLORS):
    right.semilogy(
        TAU, single.observables["weights"][0, :, mode], color=color, label=f"{60 * mode}°"
    )
    right.semilogy(TAU, reduced.observables["weights"][:, mode], ":", color=plot.TARGET_COLOR)
right.set(xlabel="slow time τ", ylabel="weight of the mode")
right.legend(fontsize="small", ncols=2)
fig.tight_layout()

# %%
print("E R at the end:", single.observables["expected_reward"][0, -1].round(4), "single loop,")
print("               ", reduced.observables["expected_reward"][-1].round(4), "reduced flow")

# %% [markdown]
# ## A gradient without a derivative
#
# $R$ jumps at $x_1 = 0$, and nobody differentiates the sampler. As $\nabla_\theta \log\pi$ is
# $-\nabla_\theta V$ up to its mean, the gradient of $-\mathbb{E}_\pi R$ is a covariance:
# $\mathrm{Cov}_\pi(R, \nabla_\theta V)$. Over the particles it is an estimate of the exact one.

# %%
theta = jnp.asarray(reduced.slow[5])
exact = problem.reduced_field(theta)
many = tts.ImplicitDiffusion(particles=200_000)
estimate = many.slow_field(many.critical(theta), theta)
for name, values in (("exact", exact), ("200,000 particles of π(θ)", estimate)):
    print(f"{name:26}", np.round(values, 5))

# %% [markdown]
# ## When is it two timescales?
#
# The ratio of the steps, $\varepsilon = \eta/\gamma = 0.5$, is not small. What counts is whether
# the particles keep up with $\theta$, and they are slow in one respect only: changing over from
# mode to mode. `relaxation_rate` is (an upper bound of) the spectral gap of the Langevin dynamics,
# and `tts.separation` the speed of $\theta$ over it.

# %%
states = tts.State(reduced.fast, reduced.slow)
gap = [float(problem.relaxation_rate(None, jnp.asarray(slow))) for slow in reduced.slow[::10]]
print("spectral gap along the flow:", np.round(gap, 3))
number = np.asarray(tts.separation(problem, states))
print(
    "ε_eff/ε at most",
    number.max().round(2),
    "so that it comes to 1 at ε =",
    (1 / number.max()).round(2),
)

# %% [markdown]
# Beyond this ratio the single loop should leave the reduced flow. A finer $\gamma$ keeps the law of
# the discrete sampler near $\pi$, so that only the lag is left.

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(
    TAU, reduced.observables["expected_reward"], ":", color=plot.TARGET_COLOR, label="reduced flow"
)
for color, epsilon in zip(plot.COLORS, (0.25, 1.0, 4.0), strict=False):
    run = tts.sgd(
        problem, key=KEY, regime=regime.Inner(1), step_size=0.05, epsilon=epsilon, tau=TAU
    )
    values = run.observables["expected_reward"][0]
    ax.plot(TAU, values, color=color, label=f"ε = {epsilon:g}")
    far = np.max(np.abs(values - reduced.observables["expected_reward"]))
    print(f"ε = {epsilon:4g}: at most {far:.3f} from the reduced flow")
ax.set(xlabel="slow time τ", ylabel="expected reward")
ax.legend(fontsize="small")
fig.tight_layout()

# %% [markdown]
# Too fast a $\theta$ empties the other modes before the particles have seen that one of them
# is better, and without particles there the gradient does not know.
#
# ## Nested loops
#
# `regime.Inner(k)` moves the particles $k$ times for each step of $\theta$, `restart=True` from a
# new start each time, as one who samples anew would. All have the same number of particle
# steps, and η · k, so that they also come as far in τ.

# %%
for label, steps, restart in (
    ("single loop", 1, False),
    ("10 steps each", 10, False),
    ("10 steps each, begun anew", 10, True),
):
    run = tts.sgd(
        problem,
        key=KEY,
        seeds=2,
        regime=regime.Inner(steps, restart=restart),
        step_size=GAMMA,
        epsilon=steps * ETA / GAMMA,
        tau=[500.0],
    )
    print(f"{label:26}", run.observables["expected_reward"][:, -1].round(3))

# %% [markdown]
# Ten steps from the origin do not reach the equilibrium, whose relaxation takes some $1/0.04$ units
# of time, 125 steps. The particles of the loop that goes on are there already.
#
# ## The sign of the penalty
#
# $\mathrm{KL}(p_{\mathrm{ref}}\,|\,\pi(\theta))$ keeps $\pi$ near a reference. Its gradient is
# $\mathbb{E}_{\mathrm{ref}}\nabla_\theta V - \mathbb{E}_\pi\nabla_\theta V$; the published code
# adds it to $\theta$ where it should subtract it. Its default weight is 0, which hides that.

# %%
for sign in (False, True):
    penalised = tts.ImplicitDiffusion(particles=PARTICLES, penalty=0.1, published_sign=sign)
    end = tts.limit(penalised, penalised.init(key=KEY), tau=[300.0])
    print(
        "as released" if sign else "subtracted ",
        f"KL = {end.observables['divergence'][0]:.2f},",
        f"E R = {end.observables['expected_reward'][0]:.3f},",
        f"largest weight at {60 * int(np.argmax(end.observables['weights'][0]))}°",
    )

# %% [markdown]
# `tts-jax reproduce implicit_diffusion` draws all of this for several seeds and more ratios.
