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
# # Your own problem in forty lines
#
# Fitting a sum of decaying exponentials is a classic that is linear in the amplitudes and badly
# nonlinear in the rates. Golub & Pereyra's *variable projection* (1973) eliminates the amplitudes:
# at every step they are the least-squares ones. That is the limit $\varepsilon \to 0$ of a
# two-timescale system, with the amplitudes $y$ fast and the logarithms of the rates $x$ slow:
#
# $$f(t; y, x) = \sum_{j=1}^m y_j\, e^{-r_j t}, \quad r_j = e^{x_j}, \qquad
# L(y, x) = \int_0^\infty \bigl(f(t; y, x) - f^*(t)\bigr)^2 e^{-t}\,dt .$$
#
# The target $f^*$ is such a sum itself. All integrals are of the kind
# $\int_0^\infty e^{-(1 + r + s)t}dt = 1/(1 + r + s)$, so that loss and critical manifold are exact.

# %%
# %matplotlib inline
import os
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import tts_jax as tts
from tts_jax import plot


# "full" takes seconds too; "small" is for a quick check that everything runs
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

# %% [markdown]
# ## The class
#
# Three methods for `flow` and `limit`: `init`, `loss` and `critical`. Two more for `sgd`: a sample
# is a time $t$ with the density $e^{-t}$, drawn from the seed's key and the number of the step and
# from nothing else.
#
# `lanes = True` promises that `sample_loss` also takes arrays that end in an axis of seeds. The
# sums over axis 0 are what keeps the promise: amplitudes are `[m]` or `[m, seeds]`, times are `[]`
# or `[seeds]`. All seeds then move together.


# %%
class Exponentials(tts.AbstractProblem):
    """A sum of exponentials with fast amplitudes [m] and slow log-rates [m]."""

    amplitudes: jax.Array
    rates: jax.Array

    lanes: ClassVar = True
    dims: ClassVar = {"fast": ("term",), "slow": ("term",), "rates": ("term",)}

    def init(self, *, key):
        slow = jnp.sort(jax.random.uniform(key, self.rates.shape, minval=-2.0, maxval=3.0))
        return tts.State(fast=jnp.zeros(self.rates.shape), slow=slow)

    def loss(self, fast, slow):
        signs = jnp.concatenate([fast, -self.amplitudes])
        return signs @ _gram(jnp.concatenate([jnp.exp(slow), self.rates])) @ signs

    def critical(self, slow):
        rates, m = jnp.exp(slow), slow.size
        gram = _gram(jnp.concatenate([rates, self.rates]))
        return jnp.linalg.solve(gram[:m, :m], gram[:m, m:] @ self.amplitudes)

    def observables(self, fast, slow):
        return {"rates": jnp.exp(slow)}

    def sample(self, *, key, step):
        return jax.random.exponential(jax.random.fold_in(key, step))

    def sample_loss(self, fast, slow, t):
        error = jnp.sum(fast * jnp.exp(-jnp.exp(slow) * t), axis=0)
        for amplitude, rate in zip(self.amplitudes, self.rates, strict=True):
            error = error - amplitude * jnp.exp(-rate * t)
        return error**2


def _gram(rates):
    return 1.0 / (1.0 + rates[:, None] + rates[None, :])


# %% [markdown]
# ## Four questions
#
# A target with a slow and a fast decay, and a start with both rates wrong. **Where does the limit
# go?**

# %%
problem = Exponentials(amplitudes=np.array([1.0, 1.0]), rates=np.array([0.3, 3.0]))
state = tts.State(fast=np.zeros(2), slow=np.log([1.0, 2.0]))
tau = np.linspace(0.0, 100.0, 201)

limit = tts.limit(problem, state, tau=tau)
print(limit.summary())
print("rates at the end of the limit:", np.round(limit.observables["rates"][-1], 4))
print("amplitudes:                   ", np.round(limit.fast[-1], 4))

# %% [markdown]
# To the target, slowly: two exponentials are nearly collinear, so that a wrong rate costs little.
#
# **Does the flow tend to the limit, and how fast?** The distance over the whole run, for a range of
# ε. All of them are one call: `epsilon` is an axis of the batch.

# %%
epsilons = np.logspace(0, -4, 5 if SMALL else 9)
flow = tts.flow(problem, state, epsilon=epsilons, tau=tau)
distance = np.abs(flow.slow - limit.slow).max(axis=(1, 2))
for epsilon, far in zip(epsilons, distance, strict=True):
    print(f"ε = {epsilon:.0e}: {far:.2e}")
few = epsilons <= 1e-2
slope = np.polyfit(np.log(epsilons[few]), np.log(distance[few]), 1)[0]
print(f"slope for ε ≤ 0.01: {slope:.2f}")

# %% [markdown]
# Order one, as it must be: the smallest eigenvalue of the Gram matrix stays away from zero here, so
# that the amplitudes relax in a time of order ε. Let the two rates approach each other and it would
# not.
#
# **Does SGD follow?** Each step sees one time $t$. The noise of single samples is large where the
# loss is, and vanishes at the solution, because the target can be fitted exactly.

# %%
sgd = tts.sgd(
    problem,
    key=jax.random.key(0),
    seeds=16 if SMALL else 128,
    state=state,
    epsilon=1e-2,
    step_size=0.1,
    tau=tau,
)
ax = plot.losses(
    {
        "sgd": (sgd.tau, sgd.loss),
        "flow": (tau, flow.loss[np.argmin(np.abs(epsilons - 1e-2))]),
        "limit": (tau, limit.loss),
    }
)
ax.set_title("ε = 0.01", loc="right")
ax.get_figure()

# %%
rates = np.median(sgd.observables["rates"][:, -1], axis=0)
print("rates at the end, median of the seeds:", np.round(rates, 3))

# %% [markdown]
# **Is a small ε worth it?** The loss at τ = 5:

# %%
at = np.searchsorted(tau, 5.0)
print(f"limit:     {limit.loss[at]:.2e}")
for epsilon, loss in zip(epsilons[::-1], flow.loss[::-1, at], strict=True):
    print(f"ε = {epsilon:.0e}: {loss:.2e}, at the fast time t = {5.0 / epsilon:.0f}")

# %% [markdown]
# Not here. Even in slow time a moderate ε does no worse than the limit, and in fast time, the one
# that counts for those who take steps of the size $h$, it is there $1/\varepsilon$ times earlier.
# The two-timescale regime is worth its price where the full landscape has traps that the reduced
# one has not, as for [the paper's network](reproducing_the_paper.ipynb). Here it is a way to
# understand the dynamics, not to speed them up.
#
# ## What came for free
#
# A trajectory knows the names of its axes, because the class has `dims`; files and statuses are
# those of every other problem. Derivatives go through flow and limit too, with respect to the
# start, to ε, and to the fields of the class.

# %%
sgd.to_xarray()
