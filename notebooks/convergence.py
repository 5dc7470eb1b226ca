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
# # What ε = 2e-5 really sees, and why runs fail
#
# Marion & Berthier (2023, arXiv 2304.09576) explain a network whose weights learn fast and whose
# neurons move slowly by two limits: $\varepsilon \to 0$, where the weights are always optimal, and
# then $\eta \to 0$, where the two neurons that flank a jump of the target run for it and the nearer
# one wins. Their experiment has $\varepsilon = 2\cdot 10^{-5}$. Is that small? And when a run ends
# with a jump missed, what went wrong?
#
# This article measures both, on random starts of the paper's problem. In short:
#
# 1. No, it is not small. The flow's neurons are about one width $\eta$ away from the limit's, and
#    the distance falls in proportion to $\varepsilon$ only some two orders of magnitude further
#    down. Where, is told by the smallest eigenvalue of the Gram matrix of the steps.
# 2. It does not matter for the outcome. The flow hits the jumps later than the limit, but it
#    hits the same ones.
# 3. Failures are late hits: the runs that miss a jump are those in which the sharp limit
#    reaches it after the end of the run. Given more time they recover it.

# %%
# %matplotlib inline
import os

import numpy as np

import tts_jax as tts
from tts_jax import plot
from tts_jax.experiments import convergence as study


# "full" takes some minutes; "small" is for a quick check that everything runs
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"
settings = study.Settings(
    starts=4 if SMALL else 32,
    late_starts=48 if SMALL else 512,
    epsilons=tuple(float(e) for e in np.logspace(-4, -9, 6 if SMALL else 11)),
    records=25 if SMALL else 40,
    tolerance=1e-8 if SMALL else 1e-9,
)
problem = settings.problem()

# %% [markdown]
# ## How fast are the fast weights?
#
# At fixed positions the loss is quadratic in the weights, with Hessian $2G$, $G_{ij} = \int
# \sigma_i\sigma_j$ the Gram matrix of the steps. Along an eigenvector with eigenvalue $\lambda$ the
# flow's weights approach $a^*(u)$ at the rate $2\lambda/\varepsilon$ in slow time. Two neurons at a
# gap below $\eta$ have nearly the same step, and $\lambda_{\min}$ falls with the square of the gap.
# The slowest mode needs the time $\varepsilon/2\lambda_{\min}$: beside it stands the time of
# the whole run, and the time in which a neuron crosses its own width at the highest speed $w^2$.

# %%
few = study.small_epsilon(settings)
relaxation = settings.epsilon / (2 * few.smallest.values)
crossing = settings.eta / np.max(np.abs(np.diff(settings.values))) ** 2
print(f"λ_min at the start, median                {np.median(few.smallest):.2g}")
print(f"slowest mode at ε = {settings.epsilon:g}, ε/2λ, median {np.median(relaxation):.2g}")
print(f"length of the run                         {settings.tau_end:.2g}")
print(f"time to cross one width, η/w²             {crossing:.2g}")
slower = np.mean(relaxation > crossing)
print(f"starts whose slowest mode is slower than a crossing: {slower:.0%}")

# %% [markdown]
# The weights can keep up with the neurons only where $\varepsilon/2\lambda_{\min} \ll \eta/w^2$,
# that is for $\varepsilon \ll \varepsilon_c = 2\lambda_{\min}\eta/w^2$. The paper's ε is far above:

# %%
critical = np.median(few.critical_epsilon.values[few.solved.values])
print(f"ε_c, median {critical:.2g}: the paper's ε is {settings.epsilon / critical:.0f} times that")

# %% [markdown]
# ## How far is the flow from its limit?
#
# The largest distance of any neuron at any time, in widths. One line per start; the grey band
# holds 80 % of the $\varepsilon_c$.

# %%
study.draw({"small_epsilon": few})

# %%
whole = few.whole.values[few.solved.values]
for epsilon, distance in zip(few.epsilon.values, np.median(whole, axis=0), strict=True):
    print(f"ε = {epsilon:.0e}: {distance:.1e} widths in the median start")
odd = np.argmax(whole[:, -1])
on_path = few.smallest_on_path.values[few.solved.values]
print(f"\nfarthest at the smallest ε: a start with λ_min = {on_path[odd]:.1e} on its way")
print(f"(median {np.median(on_path):.1e}), {whole[odd, -1]:.1e} widths away\n")
for row in study.slopes({"small_epsilon": few}):
    if row.points:
        print(f"{row.range}, {row.quantity}: slope {row.slope:.2f} [{row.low:.2f}, {row.high:.2f}]")

# %% [markdown]
# Far below $\varepsilon_c$ the order is one, as the theory of slow manifolds has it. Around it the
# distance falls more slowly. A start whose line lies apart has two neurons very close to each
# other, at the start or later: its $\lambda_{\min}$ is far below that of the others, and the range
# in which the order is one begins further down.
#
# ## The flow is late
#
# What does a distance of about a width mean? A neuron of the flow takes the same way, later. The
# times at which some neuron comes within η/10 of a jump, from `tts.hitting_times`, against those
# at which the sharp limit has one on the jump:

# %%
late = study.late_hits(settings)
covered = np.flatnonzero(late.sharp_status.values == 0)[: 4 if SMALL else 32]
chosen = problem.state(slow=late.slow.values[covered])
flow_times = tts.hitting_times(
    problem,
    chosen,
    epsilon=settings.epsilon,
    tau_end=settings.tau_end,
    radius=settings.eta / 10,
    records=100,
)
sharp_times = late.hitting_time.values[covered]
both = np.isfinite(flow_times) & np.isfinite(sharp_times) & (np.asarray(flow_times) > 0)
delay = (np.asarray(flow_times) - sharp_times)[both]
print(
    f"{both.sum()} hits: the flow's come {np.median(delay):.1e} after the sharp limit's (median),"
)
share, crossings = np.median(delay) / settings.tau_end, np.median(delay) / crossing
print(f"which is {share:.1%} of the run, or {crossings:.1f} crossings of a width")

# %%
drawing = plot.figure(4.2, 3.4)
with plot.theme():
    ax = drawing.subplots()
    end = settings.tau_end
    ax.plot([1e-5, end], [1e-5, end], color="#4D4D4D", linewidth=0.9, label="equal times")
    style = plot.METHODS["flow"]
    ax.plot(sharp_times[both], np.asarray(flow_times)[both], "o", color=style.color, ms=3.5)
    ax.set(xscale="log", yscale="log", xlabel="hitting time, sharp limit")
    ax.set_ylabel(f"hitting time, flow at ε = {settings.epsilon:g}")
    ax.legend()
ax.get_figure()

# %% [markdown]
# ## Failures are late hits
#
# A run succeeds when at its end every jump has a neuron within η. For every random start, the
# success of the flow against two predictions: that of the sharp limit, a formula, which says
# *failure* where the last jump is hit after the end of the run, and that of the limit at the
# same η.

# %%
print(f"flow recovers all jumps from {np.mean(late.flow):.0%} of {late.sizes['start']} starts\n")
for row in study.hits(late):
    said = f"{row.prediction}: {row.says}"
    print(f"{said:32} {row.starts:4} starts, flow recovers {row.recovered:4}, fails {row.failed:4}")
    if row.by_width or row.by_epsilon:
        print(f"{'':32} contradicted: {row.by_width} by the width, {row.by_epsilon} by ε")

# %% [markdown]
# Each start at its last hitting time, with the distance from the worst jump to its nearest neuron
# when the flow ends. Success is below the horizontal line, and the vertical line is the end of
# the run:

# %%
known = late.sharp_status.values == 0
last = np.max(late.hitting_time.values, axis=1)
worst = np.max(late.flow_distance.values, axis=1)
drawing = plot.figure(4.8, 3.4)
with plot.theme():
    ax = drawing.subplots()
    for where, name, marker in ((late.flow.values, "limit", "o"), (~late.flow.values, "flow", "X")):
        label = "all jumps recovered" if name == "limit" else "a jump missed"
        shown = known & where & np.isfinite(last)
        color = plot.METHODS[name].color
        ax.plot(last[shown], worst[shown], marker, color=color, ms=4, ls="none", label=label)
    ax.axvline(settings.tau_end, color="#4D4D4D", linewidth=1.0)
    ax.axhline(1.0, color="#4D4D4D", linewidth=1.0, linestyle=(0, (3, 2)))
    ax.set(yscale="log", xlabel="last hitting time, sharp limit")
    ax.set_ylabel("worst jump at the end, in widths")
    ax.legend(loc="center left")
ax.get_figure()

# %% [markdown]
# If failures are late hits, time heals them. The same starts, followed four times as long:

# %%
end = 4 * settings.tau_end
every = problem.state(slow=late.slow.values)
longer = tts.flow(problem, every, epsilon=settings.epsilon, tau=np.array([end]))
failed = ~late.flow.values
healed = failed & np.all(longer.observables["recovery"][:, -1] <= settings.eta, axis=-1)
print(f"starts that fail by τ = {settings.tau_end:g}: {failed.sum()}")
print(f"of these recovered by τ = {end:g}: {healed.sum()}")
crowded = np.min(late.neurons_per_piece.values, axis=1) < 2
share = np.mean(late.flow.values[crowded])
print(
    f"{crowded.sum()} starts have a piece with fewer than two neurons; {share:.0%} of these succeed"
)

# %% [markdown]
# Also a piece of the target with fewer than two neurons, which the published code refuses to start
# from, is no obstacle as such at a finite width.
#
# The whole study, with the other two limits ($\eta \to 0$ and the step size of SGD $h \to 0$),
# is `tts-jax study convergence` on the command line.
