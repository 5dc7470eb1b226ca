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
# # Phase diagrams: how often are all jumps found?
#
# A single run tells little: whether a network of $m$ neurons finds every jump of its target depends
# on where the neurons start. So we ask for a probability, over random starts, that every jump has
# a neuron within $\eta$ at a given slow time, and how it depends on the timescale separation
# $\varepsilon$ and on $m$. The paper has one cell of this plane, $\varepsilon = 2 \cdot 10^{-5}$
# and $m = 20$. Here are more, for SGD and for the gradient flow from the same starts.

# %%
# %matplotlib inline
import os
import tempfile

import numpy as np
from IPython.display import display

from tts_jax.experiments import phase


# "full" is `tts-jax phase epsilon-neurons --scale paper`, some ten minutes on two cores
SMALL = os.environ.get("TTS_JAX_NOTEBOOK_SCALE", "full") == "small"

if SMALL:
    settings = phase.Settings(
        "epsilon-neurons",
        epsilon=(1e-4, 5.6e-4, 3.2e-3, 1.8e-2, 1e-1),
        neurons=(5, 10, 20, 40),
        step_size=(1e-3,),
        seeds=128,
    )
else:
    settings = phase.settings_of("epsilon-neurons", "paper")
print(settings.describe())

# %% [markdown]
# ## Counting
#
# Both dynamics are sweeps with checkpoints. The folder holds what is finished, and the same call
# goes on from there after a crash, so in earnest you would give a folder that stays.

# %%
with tempfile.TemporaryDirectory() as folder:
    dataset = phase.compute(settings, folder)
dataset.probability.sel(dynamics="flow").to_pandas().round(3)

# %% [markdown]
# A share of $n$ starts comes with Wilson's interval, which holds its meaning near 0 and 1.

# %%
cell = dataset.sel(dynamics="sgd").isel(epsilon=0, neurons=-1)
print(
    f"SGD, smallest ε, most neurons: {float(cell.probability):.3f}, "
    f"95 % interval {float(cell.low):.3f} to {float(cell.high):.3f}"
)

# %% [markdown]
# ## Drawing
#
# Solid lines: where half of the starts are recovered. Dashed: where the **late-hit rule** says so.
# A start is recovered by $\tau$ when every jump has been hit by then in the sharp limit
# ($\varepsilon \to 0$, then $\eta \to 0$), whose hitting times have a closed form. Dotted: the
# same with a delay, the time that the weights need before they resolve the shortest piece of the
# target.

# %%
display(phase.draw(dataset))

# %% [markdown]
# ## Predicted?
#
# The late-hit rule does not know $\varepsilon$, and it is a statement about single starts, not only
# about their share. At small $\varepsilon$ it should be right start by start:

# %%
for index, epsilon in enumerate(settings.epsilon):
    at = dataset.isel(epsilon=index)
    right = {
        name: float(np.mean(at.recovered.sel(dynamics=name).values == at.late_hit.values))
        for name in ("sgd", "flow")
    }
    print(f"ε = {epsilon:.1e}: right for {right['sgd']:.1%} (SGD), {right['flow']:.1%} (flow)")

smallest = dataset.isel(epsilon=0)
agreement = np.mean(smallest.recovered.values == smallest.late_hit.values)
assert agreement > 0.9

# %% [markdown]
# So at small $\varepsilon$ failures are *late hits*: the network is on its way and time is up. At
# large $\varepsilon$ the rule fails, because the weights lag behind and neurons feel the forces of
# another target. Does noise matter? SGD and the flow start from the same positions, so their
# difference has a paired interval:

# %%
for line in phase.remarks(dataset):
    print(line)

# %% [markdown]
# The other planes, $\varepsilon$ against $\eta$, against the label noise, and the step size against
# $\varepsilon$, are `tts-jax phase epsilon-eta`, `epsilon-noise` and `step-epsilon`; what they
# show is in the documentation, *Phase diagrams*.
