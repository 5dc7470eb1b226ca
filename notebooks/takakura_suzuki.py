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
# # Mean-field networks as kernels
#
# A two-layer network $f(x) = \frac1N\sum_i a_i \tanh(u_i\cdot x + b_i)$ has features
# $w_i = (u_i, b_i)$, which are slow, and outer weights $a_i$, which are fast. Takakura & Suzuki
# (2024, [arXiv 2403.14917](https://arxiv.org/abs/2403.14917)) eliminate the outer weights by kernel
# ridge regression at every step, and let the features follow a noisy gradient: mean-field Langevin
# dynamics. What is learnt, then, is a kernel
#
# $$k(x, x') = \int h(x; w)\,h(x'; w)\,d\mu(w).$$
#
# The target is $f(x) = x_1 x_2$. The labels have noise that is uniform on $[-\sigma, \sigma]$.

# %%
# %matplotlib inline
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import tts_jax as tts
from tts_jax import fast, plot


# "small" takes fewer data, features and steps
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

DIMENSION, SAMPLES, WIDTH, STEPS = (5, 100, 100, 600) if SMALL else (5, 150, 150, 1500)
STEP = 0.2


def problems_of(seeds=3, **options):
    return [
        tts.MeanFieldKernel.of_target(
            key=jax.random.key(seed),
            dimension=DIMENSION,
            samples=SAMPLES,
            width=WIDTH,
            directions=np.eye(DIMENSION)[:2],
            **options,
        )
        for seed in range(seeds)
    ]


def run_of(**options):
    return tts.sgd(
        problems_of(**options),
        key=jax.random.key(0),
        regime="limit",
        step_size=STEP,
        tau=[0.0, STEP * STEPS],
        observe_every=STEPS // 20,
        dtype="float32",
    )


# %% [markdown]
# ## The kernel aligns
#
# `sgd` takes one problem per seed, so that every seed has data of its own. `regime="limit"`
# eliminates the outer weights; `observe_every` records observables on the way. The kernel
# alignment is $f^\top S f/(\lvert f\rvert^2\lVert S\rVert_F)$ with the kernel matrix $S$ of the
# data; the degrees of freedom are $d = \operatorname{tr} S(S + n\lambda\lambda_a)^{-1}$.

# %%
runs = {sigma: run_of(noise=sigma) for sigma in (0.0, 1.0, 2.0)}
fig, panels = plt.subplots(1, 3, figsize=(10, 3))
names = ("kernel_alignment", "degrees_of_freedom", "test_error")
for ax, name in zip(panels, names, strict=True):
    for place, (sigma, run) in enumerate(runs.items()):
        mean = np.mean(run.series[name], axis=0)
        ax.plot(run.series["tau"], mean, color=plot.COLORS[place], label=f"σ = {sigma:g}")
    ax.set(title=name.replace("_", " "), xlabel="slow time t")
panels[0].legend(fontsize="small")
fig.tight_layout()

# %%
for sigma, run in runs.items():
    alignment = run.observables["kernel_alignment"]
    growth = np.mean(alignment[:, 1] / alignment[:, 0])
    freedom = np.mean(run.observables["degrees_of_freedom"][:, 1])
    print(f"σ = {sigma:g}: alignment grows {growth:.2f}-fold, {freedom:.1f} degrees of freedom")

# %% [markdown]
# Noise in the data costs degrees of freedom: the features that fit it make the kernel richer.
#
# ## The first variation
#
# The loss with the outer weights eliminated, $G(\mu)$, has the first variation
#
# $$\frac{\delta G}{\delta\mu}(w) = -\frac{\lambda\lambda_a}{2}\,a^*(w)^2
# + \frac{\lambda\lambda_w}{2}\,\lvert w\rvert^2 ,$$
#
# whose negative gradient is the velocity of a feature. It is $N$ times the gradient of $G$ in this
# feature, which automatic differentiation finds through the ridge solve:

# %%
with jax.enable_x64(True):
    problem = problems_of()[0]
    slow = problem.init(key=jax.random.key(1)).slow
    total = -WIDTH * jax.grad(problem.reduced_loss)(slow)
    closed = -jax.grad(lambda points: problem.first_variation(slow, points).sum())(slow)
    print(f"largest difference: {np.max(np.abs(total - closed)):.0e}")

# %% [markdown]
# ## Label noise
#
# Fit the outer weights to $Y + \varepsilon$, with ε uniform on $[-\tilde\sigma, \tilde\sigma]^n$
# and drawn anew in every step, but descend the loss of $Y$. Its mean is
# $G + \tilde\sigma^2 d/6n$: label noise is a price on degrees of freedom.

# %%
with jax.enable_x64(True):
    noisy = problems_of(label_noise=1.0)[0]

    def loss_of(step):
        sample = noisy.sample(key=jax.random.key(2), step=step)
        weights = fast.Ridge().solve(noisy, slow, sample).fast
        return noisy.sample_loss(weights, slow, sample)

    losses = jax.jit(lambda steps: jax.lax.map(loss_of, steps))(np.arange(10_000))
    clean = noisy.reduced_loss(slow)
    added = noisy.degrees_of_freedom(slow) / (6 * SAMPLES)
    error = np.std(losses) / np.sqrt(len(losses))
    print(f"mean of G_ε − G: {np.mean(losses) - clean:.5f} ± {error:.5f}; expected {added:.5f}")

# %% [markdown]
# The outer weights now minimise another loss than the one that is descended, so that the gradient
# must go through the solve. The problem knows (`envelope` is false), and `regime="limit"` does so.

# %%
loud = {None: runs[1.0]} | {sigma: run_of(noise=1.0, label_noise=sigma) for sigma in (1.0, 2.0)}
fig, panels = plt.subplots(1, 2, figsize=(8, 3))
for ax, name in zip(panels, ("degrees_of_freedom", "test_error"), strict=True):
    for place, (sigma, run) in enumerate(loud.items()):
        mean = np.mean(run.series[name], axis=0)
        label = f"label noise {sigma or 0:g}"
        ax.plot(run.series["tau"], mean, color=plot.COLORS[place], label=label)
    ax.set(title=name.replace("_", " "), xlabel="slow time t")
panels[0].legend(fontsize="small")
fig.tight_layout()

# %%
for sigma, run in loud.items():
    freedom = np.mean(run.observables["degrees_of_freedom"][:, 1])
    print(f"label noise {sigma or 0:g}: {freedom:.1f} degrees of freedom at the end")

# %% [markdown]
# `tts-jax reproduce takakura_suzuki` makes the figures; `--scale paper` has the published size. The
# mathematics is in *Mean-field networks as kernels* of the documentation.
