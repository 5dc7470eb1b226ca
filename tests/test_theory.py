"""Closed forms of random initialisations against exact sums, quadrature and simulation."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy import integrate, stats

import tts_jax as tts
from tts_jax import theory


TARGETS = {
    "paper": ([0.2, 0.35, 0.5, 0.65, 0.8], [1, 5, 1, 3, 1, 5]),
    "uneven": ([0.07, 0.5, 0.9], [0, 1, -1, 2]),
    "one jump": ([0.3], [0, 2]),
}


def named(name):
    return tts.PiecewiseConstant(*TARGETS[name])


# --- Theorem 1 ------------------------------------------------------------------------------------


def test_bounds_of_the_theorem(target):
    assert theory.neurons_bound(target, 0.05) == 352
    assert theory.recovery_time_bound(target) == 3.0 / 2.0**2


def test_the_bound_on_neurons_is_sufficient_for_six_in_each_piece(target):
    delta = 0.05
    neurons = theory.neurons_bound(target, delta)
    assert theory.good_start_probability(target, neurons, at_least=6) >= 1.0 - delta


@pytest.mark.slow  # 80 neurons are long to compile
def test_the_time_bound_holds_where_every_jump_has_its_own_two_neurons(target):
    sample = theory.sample_hitting_times(target, 80, key=jax.random.key(0), count=500)
    assert np.mean(sample["recovery_time"] <= theory.recovery_time_bound(target)) >= 0.999


# --- good starts ----------------------------------------------------------------------------------


def test_good_starts_against_the_multinomial_sum():
    lengths = np.array([0.3, 0.5, 0.2])
    steps = tts.PiecewiseConstant([0.3, 0.8], [0, 1, 0])
    for neurons, at_least, spacing in ((5, 1, 0.0), (7, 2, 0.0), (6, 0, 0.01), (7, 2, 0.02)):
        expected = 0.0
        for counts in itertools.product(range(neurons + 1), repeat=3):
            if sum(counts) != neurons or min(counts) < at_least:
                continue
            term = float(math.factorial(neurons))
            for count, length, gaps in zip(counts, lengths, (0, 1, 0), strict=True):
                free = max(length - (count + gaps) * spacing, 0.0)
                term *= free**count / math.factorial(count)
            expected += term
        got = theory.good_start_probability(steps, neurons, at_least=at_least, spacing=spacing)
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "neurons", "at_least", "spacing"),
    [
        ("paper", 12, 1, 0.0),
        ("paper", 20, 2, 0.0),
        ("paper", 20, 2, 1e-3),
        ("paper", 40, 2, 0.0),
        ("paper", 60, 6, 0.0),
        ("paper", 10, 1, 5e-3),
        ("uneven", 20, 1, 0.0),
        ("uneven", 40, 2, 0.0),
        ("uneven", 30, 2, 4e-4),
        ("one jump", 6, 2, 0.01),
    ],
)
def test_good_starts_against_simulation(name, neurons, at_least, spacing):
    """The exact value lies in the 99.9 % interval of a million draws."""
    goal, draws, good = named(name), 1_000_000, 0
    jumps = np.asarray(goal.jumps)
    rng = np.random.default_rng([neurons, at_least])
    for _ in range(10):
        u = np.sort(rng.random((draws // 10, neurons)), axis=1)
        place = np.searchsorted(jumps, u.ravel()).reshape(u.shape)
        fine = np.ones(u.shape[0], bool)
        for piece in range(jumps.size + 1):
            fine &= np.sum(place == piece, axis=1) >= at_least
        if spacing:
            same = np.diff(place, axis=1) == 0
            fine &= np.all((np.diff(u, axis=1) >= spacing) | ~same, axis=1)
            for jump in jumps:
                fine &= np.min(np.abs(u - jump), axis=1) >= spacing
        good += int(np.sum(fine))
    interval = stats.binomtest(good, draws).proportion_ci(0.999, "wilson")
    exact = theory.good_start_probability(goal, neurons, at_least=at_least, spacing=spacing)
    assert interval.low <= exact <= interval.high


def test_good_starts_at_the_edges(target):
    assert theory.good_start_probability(target, 1, at_least=0) == pytest.approx(1.0, rel=1e-13)
    assert theory.good_start_probability(target, 5, at_least=1) == 0.0
    assert theory.good_start_probability(target, 20, spacing=0.2) == 0.0
    assert theory.good_start_probability(target, 5000) == pytest.approx(1.0, rel=1e-10)
    grown = [theory.good_start_probability(target, m) for m in range(12, 60, 4)]
    assert np.all(np.diff(grown) > 0)


# --- hitting times --------------------------------------------------------------------------------


def test_hitting_time_against_quadrature():
    for left, right, height in ((0.1, 0.3, 2.0), (0.05, 0.051, -1.0), (0.2, 0.2, 4.0)):
        near, far = min(left, right), max(left, right)
        cube = far**3 - near**3
        expected = integrate.quad(lambda x, c=cube: (1 + x / np.cbrt(x**3 + c)) ** 2, 0, near)[0]
        got = theory.hitting_time(left, right, height)
        assert got == pytest.approx(expected / height**2, rel=1e-9)
        assert near / height**2 <= got <= 4 * near / height**2 * (1 + 1e-12)


@pytest.mark.parametrize(
    # every number of neurons compiles anew
    "neurons",
    [10, *(pytest.param(m, marks=pytest.mark.slow) for m in (1, 2, 3, 50))],
)
@pytest.mark.parametrize("jump", [pytest.param(0.5, marks=pytest.mark.slow), 0.12])
def test_distribution_of_the_hitting_time_against_simulation(neurons, jump):
    step, count = tts.PiecewiseConstant([jump], [0.0, 2.0]), 20_000
    sample = theory.sample_hitting_times(step, neurons, key=jax.random.key(neurons), count=count)
    assert np.all(sample["status"] == 0)

    def cdf(tau):
        return theory.hitting_time_cdf(tau, jump=jump, height=2.0, neurons=neurons)

    some = sample["recovery_time"][:1000]
    assert stats.kstest(some, cdf).pvalue > 1e-3
    tau = np.quantile(sample["recovery_time"], [0.05, 0.5, 0.95, 0.999])
    seen = np.mean(sample["recovery_time"][:, None] <= tau, axis=0)
    exact = cdf(tau)
    assert np.all(np.abs(seen - exact) <= 4.0 * np.sqrt(exact * (1 - exact) / count) + 1e-4)


def test_distribution_of_the_hitting_time_is_one():
    tau = np.linspace(0.0, 2.0, 41)
    values = theory.hitting_time_cdf(tau, jump=0.3, height=1.0, neurons=8)
    assert values.shape == tau.shape
    assert values[0] == 0.0
    assert np.all(np.diff(values) >= -1e-12)
    assert theory.hitting_time_cdf(1e9, jump=0.3, height=1.0, neurons=8) == pytest.approx(
        1, abs=1e-10
    )
    # the same jump seen from the other side
    mirrored = theory.hitting_time_cdf(tau, jump=0.7, height=-1.0, neurons=8)
    np.testing.assert_allclose(values, mirrored, atol=1e-11)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: theory.neurons_bound(t, 1.5), "delta"),
        (lambda t: theory.neurons_bound(t, 0.0), "delta"),
        (lambda t: theory.good_start_probability(t, 0), "neurons"),
        (lambda t: theory.good_start_probability(t, 20, at_least=-1), "at_least"),
        (lambda t: theory.good_start_probability(t, 20, spacing=-0.1), "spacing"),
        (lambda t: theory.hitting_time(-0.1, 0.2, 1.0), "left"),
        (lambda t: theory.hitting_time_cdf(0.1, jump=1.2, height=1.0, neurons=5), "jump"),
        (lambda t: theory.hitting_time_cdf(-0.1, jump=0.2, height=1.0, neurons=5), "tau"),
        (lambda t: theory.sample_hitting_times(t, 5, key=jax.random.key(0), count=0), "count"),
    ],
)
def test_bad_arguments_are_named(target, call, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call(target)


def test_a_target_without_jumps_has_no_time():
    with pytest.raises(ValueError, match="`target`"):
        theory.recovery_time_bound(tts.PiecewiseConstant([], [1.0]))
