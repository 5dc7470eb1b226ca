"""SGD against the flow, and its final loss against the published runs."""

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

import tts_jax as tts


def test_mean_of_sgd_tends_to_the_flow_at_first_order_in_the_step_size():
    """|E SGD_h − flow| falls like h (weak order 1 of Euler's method with sampling noise)."""
    target = tts.PiecewiseConstant([0.5], [0.0, 1.0])
    problem = tts.Univariate(target, neurons=2, eta=0.5, noise=0.5)
    state = problem.state(slow=[0.2, 0.65])
    epsilon, tau = 0.5, [1.0]
    flow = tts.flow(problem, state, epsilon=epsilon, tau=tau, rtol=1e-10, atol=1e-10)
    step_sizes, distances, noise = np.array([0.2, 0.1, 0.05]), [], []
    for h in step_sizes:
        runs = tts.sgd(
            problem,
            key=jax.random.key(1),
            seeds=400_000,
            state=state,
            epsilon=epsilon,
            step_size=h,
            tau=tau,
            dtype=np.float64,
        )
        assert np.all(runs.success)
        mean = np.concatenate([np.mean(runs.fast[:, 0], axis=0), np.mean(runs.slow[:, 0], axis=0)])
        spread = np.concatenate([np.std(runs.fast[:, 0], axis=0), np.std(runs.slow[:, 0], axis=0)])
        exact = np.concatenate([flow.fast[0], flow.slow[0]])
        distances.append(np.linalg.norm(mean - exact))
        noise.append(np.linalg.norm(spread) / np.sqrt(400_000))
    # the distances are resolved: many standard errors of the Monte Carlo mean
    assert np.all(np.array(distances) > 5 * np.array(noise))
    slope = np.polyfit(np.log(step_sizes), np.log(distances), 1)[0]
    assert abs(slope - 1) <= 0.25


def test_spread_of_sgd_falls_with_the_square_root_of_the_step_size():
    target = tts.PiecewiseConstant([0.5], [0.0, 1.0])
    problem = tts.Univariate(target, neurons=2, eta=0.5, noise=0.5)
    state = problem.state(slow=[0.2, 0.65])
    spreads = []
    for h in (0.08, 0.02):
        setting = dict(epsilon=0.5, step_size=h, tau=[1.0], dtype=np.float64)
        runs = tts.sgd(problem, key=jax.random.key(2), seeds=20_000, state=state, **setting)
        spreads.append(np.std(runs.slow[:, 0, 0]))
    assert 1.7 < spreads[0] / spreads[1] < 2.4


def final_losses(problem, epsilon, gradient):
    """Final loss of 64 own seeds in the published setting of the ε box plot."""
    runs = tts.sgd(
        problem,
        key=jax.random.key(0),
        seeds=64,
        epsilon=epsilon,
        step_size=1e-5,
        tau=[3.0],
        gradient=gradient,
    )
    assert np.all(runs.success)
    return runs.loss[:, 0]


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_final_loss_is_distributed_like_the_published_runs(problem, published, epsilon):
    """Against the 20 published runs, which used the box estimator: Kolmogorov–Smirnov."""
    theirs = published["epsilon_boxplot_final_loss"][str(epsilon)]
    assert ks_2samp(final_losses(problem, epsilon, "box"), theirs).pvalue > 0.01


def test_the_exact_gradient_jitters_more_than_the_box(problem):
    """At ε = 0.1 what is above the floor is noise of the positions, of variance ∝ ∫σ′² = 1.8."""
    floor = float(problem.eta) * np.sum(np.asarray(problem.target.heights) ** 2) / 28
    exact, box = (np.median(final_losses(problem, 0.1, name)) for name in ("exact", "box"))
    assert 1.4 < (exact - floor) / (box - floor) < 2.4
