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
# # Variable projection and ultra-fast diffusion
#
# A wide two-layer network $f(x) = \frac1M\sum_j u_j \max(0, w_j\cdot x)$ has its features $w_j$
# on the circle. They are slow; the outer weights $u_j$ are fast. Barboni, Peyré & Vialard (2025,
# [arXiv 2504.18208](https://arxiv.org/abs/2504.18208)) *project*: at every step the weights are
# those of ridge regression, so that only the features move. The loss is
#
# $$L(u, w) = \frac{1}{2\lambda N}\sum_i \bigl(f(x_i) - y_i\bigr)^2
# + \frac{1}{2M}\sum_j (u_j - b)^2 .$$
#
# The labels are those of a teacher, a network of the same kind with weights 1 whose features have
# the density $\bar\mu$. To learn it, the features must come to have the same density. How they
# do, the paper says, is a partial differential equation.

# %%
# %matplotlib inline
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import tts_jax as tts
from tts_jax import plot


# "small" takes longer steps and fewer records
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

WIDTH, SAMPLES = 128, 512
STEP = 2.0**-7 if SMALL else 2.0**-8  # slow time of a step
TAU = np.linspace(0.0, 8.0, 17 if SMALL else 65)
TEACHER = tts.CircleTeacher(10.0)


def problem_of(**options):
    return tts.VarPro.of_teacher(
        TEACHER,
        key=jax.random.key(0),
        samples=SAMPLES,
        teacher_width=SAMPLES,
        width=WIDTH,
        **options,
    )


def run_of(problem, regime="limit"):
    rates = {"step_size": STEP} if regime == "limit" else {"step_size": 1.0, "epsilon": STEP}
    state = problem.init(key=jax.random.key(1))
    return tts.sgd(problem, key=jax.random.key(2), state=state, regime=regime, tau=TAU, **rates)


# %% [markdown]
# ## One run
#
# $b = 1$, the *unbiased* penalty, and $\lambda = 10^{-3}$. `regime="limit"` eliminates the
# weights at every step; the solve takes time $O(M)$ on the circle. `teacher_distance` is the energy
# distance between the features and those of the teacher.

# %%
unbiased = run_of(problem_of())
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.semilogy(TAU, unbiased.loss[0], color=plot.COLORS[0])
left.set(xlabel="slow time t", ylabel="risk L")
right.semilogy(TAU, unbiased.observables["teacher_distance"][0], color=plot.COLORS[0])
right.set(xlabel="slow time t", ylabel="distance to the teacher")
fig.tight_layout()

# %%
distance = unbiased.observables["teacher_distance"][0]
print(f"risk     {unbiased.loss[0, 0]:.3f} -> {unbiased.loss[0, -1]:.1e}")
print(f"distance {distance[0]:.3f} -> {distance[-1]:.3f}")
print(f"largest entry of the gradient in u: {unbiased.stats['residual'].max():.0e}")

# %% [markdown]
# The risk all but vanishes. The distance does not: $M$ points cannot be nearer to the sample that
# the teacher is.
#
# ## The density
#
# As $\lambda \to 0$ the weight of a feature tends to $\bar\mu/\mu$, the ratio of the densities,
# and the density follows the ultra-fast diffusion
#
# $$\partial_t\mu = -\tfrac12\,\partial_\theta\bigl(\mu\,\partial_\theta(\bar\mu/\mu)^2\bigr)
# = -\partial_\theta\bigl(\bar\mu\,\partial_\theta(\bar\mu/\mu)\bigr).$$
#
# Here is its solution by finite volumes over a histogram of the features.

# %%
diffusion = tts.UltraFastDiffusion(TEACHER, 256)
solution = diffusion.solve(None, TAU)
angles = np.arctan2(unbiased.slow[0, ..., 1], unbiased.slow[0, ..., 0])
shown = [0, len(TAU) // 16, len(TAU) // 4, len(TAU) - 1]

fig, panels = plt.subplots(1, 4, figsize=(11, 2.6), sharey=True)
for ax, at in zip(panels, shown, strict=True):
    ax.hist(angles[at], 24, range=(-np.pi, np.pi), density=True, color=plot.COLORS[0], alpha=0.35)
    ax.plot(diffusion.theta, solution.density[at], color=plot.COLORS[1], label="diffusion")
    ax.plot(
        diffusion.theta, TEACHER(diffusion.theta), ":", color=plot.TARGET_COLOR, label="teacher"
    )
    ax.set(title=f"t = {TAU[at]:g}", xlabel="angle of a feature")
panels[0].set_ylabel("density")
panels[0].legend(fontsize="small")
fig.tight_layout()

# %%
apart = [
    float(tts.circle_energy_distance(own, diffusion.theta, phi_weights=density))
    for own, density in zip(angles, np.asarray(solution.density), strict=True)
]
print(
    f"distance of the features to the diffusion: {apart[0]:.3f} at t = 0, {max(apart):.3f} at most"
)

# %% [markdown]
# At $t = 0$ this distance is that of $M$ random points to the uniform density.
#
# Even with $\lambda \to 0$ and any number of features it would not quite vanish. ReLU features on
# the circle do not see the Fourier coefficients of orders 3, 5, 7, … of the density, so that the
# weights have none, while $\bar\mu/\mu$ has (see *Variable projection* in the documentation).
#
# ## How fast
#
# Near the teacher the diffusion is linear, and $\chi^2 = \int\bar\mu^2/\mu - 1$ decays like
# $e^{-2 g_1 t}$ with the spectral gap $g_1$ of $\bar\mu$.

# %%
late = TAU >= 4.0
rate = -np.polyfit(TAU[late], np.log(np.asarray(solution.chi2)[late]), 1)[0]
twice = 2.0 * float(diffusion.spectral_gap())
print(f"fitted rate of χ²: {rate:.4f}, twice the spectral gap: {twice:.4f}")

ax = plt.figure(figsize=(5, 3)).add_subplot()
ax.semilogy(TAU, solution.chi2, color=plot.COLORS[1], label="χ² of the diffusion")
reference = np.asarray(solution.chi2)[late][0] * np.exp(-twice * (TAU - TAU[late][0]))
ax.semilogy(TAU, reference, ":", color=plot.TARGET_COLOR, label="exp(−2 g₁ t)")
ax.semilogy(TAU, 2 * unbiased.loss[0], color=plot.COLORS[0], label="2L of the network")
ax.set(xlabel="slow time t", ylim=(1e-7, 2.0))
ax.legend(fontsize="small")
ax.get_figure().tight_layout()

# %% [markdown]
# $2L$ of the network would be $\chi^2$ if the weights were $\bar\mu/\mu$.
#
# ## Biased or unbiased
#
# With $b = 0$, plain ridge regression, the limit $\lambda \to 0$ is the same, and the risk tends
# to ½. At finite $\lambda$ the weights are drawn to 0 and not to the 1 that the teacher has, so
# that the features end beside the teacher's.

# %%
for penalty in (1e-1, 1e-3):
    for prior, name in ((1.0, "unbiased"), (0.0, "biased")):
        seen = run_of(problem_of(penalty=penalty, prior=prior))
        ends = seen.observables["teacher_distance"][0]
        print(f"λ = {penalty:g}, {name:8}: risk {seen.loss[0, -1]:.2g}, distance {ends[-1]:.3f}")

# %% [markdown]
# ## Two timescales
#
# Nobody needs a solve: gradient descent in both layers, with a step of size 1 for the weights and
# ε for the features, is variable projection as $\varepsilon \to 0$. Is ε small? The weights relax
# at the rate λ, so that the question is whether ε/λ is, and that is what `tts.separation`
# answers.

# %%
fig, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for ax, penalty in zip(panels, (1e-1, 1e-3), strict=True):
    problem = problem_of(penalty=penalty)
    runs = {"variable projection": run_of(problem), "two timescales": run_of(problem, "joint")}
    for place, (name, seen) in enumerate(runs.items()):
        distance = seen.observables["teacher_distance"][0]
        ax.semilogy(TAU, distance, ("-", "--")[place], color=plot.COLORS[place], label=name)
    start = problem.init(key=jax.random.key(1))
    number = float(tts.separation(problem, start, epsilon=STEP))
    ax.set(title=f"λ = {penalty:g}: ε/λ = {STEP / penalty:.2g}", xlabel="slow time t")
    print(f"λ = {penalty:g}: separation number {number:.2g} at the start, distances at the end:")
    print(
        {
            name: round(float(one.observables["teacher_distance"][0, -1]), 3)
            for name, one in runs.items()
        }
    )
panels[0].set_ylabel("distance to the teacher")
panels[0].legend(fontsize="small")
fig.tight_layout()

# %% [markdown]
# Where the number is far below 1 the two curves are one. Where it is not, the weights lag behind
# and the features follow the weights of an earlier network: the same ε, another problem.
#
# `tts-jax reproduce varpro` draws these figures for several seeds, `--scale paper` with the
# published settings.
