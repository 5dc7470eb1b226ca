"""Phase diagrams: counts against direct calls, predictions, intervals, stops, the command."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure
from scipy.stats import binom, binomtest

import tts_jax as tts
from tts_jax import _sweep, cli, theory
from tts_jax._checkpoint import Stopped
from tts_jax.experiments import _study, phase


TINY = phase.Settings(
    "epsilon-eta",
    epsilon=(1e-3, 3e-1),
    neurons=(6,),
    eta=(0.02, 0.3),
    step_size=(1e-2,),
    seeds=5,
    tau_end=0.4,
)


@pytest.fixture(scope="module", autouse=True)
def backend():
    """Start the backend, so that the command line does not set up this process."""
    jax.devices()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("phase")


@pytest.fixture(scope="module")
def diagram(folder):
    return phase.compute(TINY, folder / "phase_epsilon-eta")


# --- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_that_of_scipy(confidence):
    counted = np.array([[0, 1, 7], [20, 39, 40]])
    low, high = _study.wilson(counted, 40, confidence)
    for place, count in np.ndenumerate(counted):
        found = binomtest(int(count), 40).proportion_ci(confidence, "wilson")
        assert (low[place], high[place]) == pytest.approx((found.low, found.high), abs=1e-14)


@pytest.mark.parametrize(("first", "second"), [(0.15, 0.15), (0.1, 0.3), (0.45, 0.05)])
def test_the_paired_interval_covers_the_difference(first, second):
    """Its exact coverage at 40 samples, by summing over all outcomes."""
    total = 40
    more, fewer = np.meshgrid(np.arange(total + 1), np.arange(total + 1), indexing="ij")
    rest = np.maximum(total - more, 0)
    weight = binom.pmf(more, total, first) * binom.pmf(fewer, rest, second / (1 - first))
    assert weight.sum() == pytest.approx(1.0)
    difference, low, high = _study.paired_difference(more, fewer, total)
    assert np.sum(weight * difference) == pytest.approx(first - second)
    inside = (low <= first - second) & (first - second <= high)
    assert 0.94 < np.sum(weight[inside]) < 0.97
    assert _study.paired_difference(0, 0, total)[0] == 0.0


# --- what is counted --------------------------------------------------------------------------


def test_a_diagram_counts_what_direct_calls_give(diagram):
    for row, eta in enumerate(TINY.eta):
        problem = tts.Univariate(TINY.target(), neurons=6, eta=eta, noise=1.0)
        for column, epsilon in enumerate(TINY.epsilon):
            options = {"epsilon": epsilon, "tau": [TINY.tau_end]}
            key = jax.random.key(0)
            sgd = tts.sgd(problem, key=key, seeds=5, step_size=1e-2, **options)
            start = tts.sgd(problem, key=key, seeds=5, step_size=1e-2, epsilon=epsilon, tau=[0.0])
            flow = tts.flow(problem, tts.State(start.fast[:, 0], start.slow[:, 0]), **options)
            for name, run in (("sgd", sgd), ("flow", flow)):
                found = np.all(np.asarray(run.observables["recovery"])[:, 0] <= eta, axis=-1)
                cell = diagram.sel(dynamics=name).isel(eta=row, epsilon=column)
                np.testing.assert_array_equal(cell.recovered, found)
                assert cell.probability == found.mean()
            both = diagram.recovered.isel(eta=row, epsilon=column).values
            assert diagram.difference[row, column] == both[0].mean() - both[1].mean()


def test_an_easy_and_a_hopeless_cell(diagram):
    """Steps so wide that every start has a neuron within η; an ε at which nothing moves in time."""
    easy, hopeless = diagram.isel(eta=1, epsilon=1), diagram.isel(eta=0, epsilon=1)
    assert np.all(easy.probability == 1.0)
    assert np.all(easy.at_start)
    assert np.all(hopeless.probability == 0.0)
    assert np.all(hopeless.high < 0.5)
    assert not hopeless.predicted.sel(rule="flow_estimate")


def test_seeds_that_diverge_are_not_recovered(folder):
    settings = dataclasses.replace(
        TINY, plane="step-epsilon", epsilon=(5e-4, 1e-3), eta=(0.3,), step_size=(1e-2, 30.0)
    )
    dataset = phase.compute(settings, folder / "diverged")
    bad = dataset.sel(dynamics="sgd", step_size=30.0)
    assert np.all(bad.failed == settings.seeds)
    assert not np.any(bad.recovered)
    # the flow knows no step size
    flow = dataset.sel(dynamics="flow")
    assert np.all(flow.probability == 1.0)
    assert np.all(flow.failed == 0)
    drawing = phase.draw(dataset)
    assert "100" in {text.get_text() for text in drawing.axes[0].texts}
    assert "numbers: % diverged" in drawing.axes[0].get_title(loc="left")
    assert f"{4 // 2 * settings.seeds} runs of SGD (diverged)" in phase.remarks(dataset)[-1]


# --- predictions ------------------------------------------------------------------------------


def test_the_late_hit_rule_is_the_sharp_limit_of_the_same_starts(diagram):
    slow = np.asarray(TINY.grid("flow").starts(6).slow)
    late = phase.delay(TINY, 1e-3, 6)
    assert late == pytest.approx(np.pi**2 * 1e-3 / (2 * 6 * 0.15**2))
    tau = np.array([TINY.tau_end - late, TINY.tau_end])
    run = theory.padded_sharp_limit(TINY.target(), slow, tau)
    hit = np.all(np.asarray(run.stats["hitting_time"]) <= TINY.tau_end, axis=-1)
    assert 0 < hit.sum() < TINY.seeds
    assert np.all(diagram.late_hit == hit)
    assert np.all(diagram.predicted.sel(rule="late_hit") == hit.mean())
    near = np.max(np.asarray(run.observables["recovery"])[:, 0], axis=-1)
    expected = near <= np.array(TINY.eta)[:, None]
    np.testing.assert_array_equal(diagram.in_time.sel(epsilon=1e-3), expected)


def test_the_delay_is_that_of_the_gram_matrix():
    """Of many evenly spaced neurons, its modes are those of the kernel 1 − max(x, y)."""
    settings = phase.Settings("epsilon-neurons", jumps=(0.4,), values=(0.0, 1.0))
    neurons = 400
    places = (np.arange(neurons) + 0.5) / neurons
    values = np.linalg.eigvalsh(1.0 - np.maximum.outer(places, places))[::-1]
    # half-wavelength 0.4: mode number k with k − ½ = 1 / 0.4, that is k = 3
    assert phase.delay(settings, 1.0, neurons) == pytest.approx(0.5 / values[2], rel=1e-3)


def test_the_noise_estimate_is_the_stationary_mass():
    """Against plain sums over the definitions of the module."""
    settings = dataclasses.replace(TINY, jumps=(0.5,), values=(0.0, 2.0))
    y = np.linspace(-0.5, 0.5, 2001)
    step = np.where(y < 0, 4 * (y + 0.5) ** 3, 1 - 4 * (0.5 - y) ** 3)
    slope = 12 * (0.5 - np.abs(y)) ** 2
    total = np.trapezoid(slope**2, y)
    assert total == pytest.approx(9 / 5, rel=1e-5)
    z = np.linspace(0.0, 100.0, 100_001)
    misfit = (step - (y > -np.minimum(z, 0.5)[:501, None])) ** 2
    last = np.minimum(np.arange(z.size), 500)
    potential = np.trapezoid(misfit, y)[last] + np.maximum(z - 0.5, 0.0)
    own = 3 * np.trapezoid(misfit * slope**2, y)[last] / total
    for noise in (0.0, 3.0, 10.0, 30.0):
        variance = noise**2 + own * 4.0
        force = 1.5 / total * 0.02**2 / (3e-3 * 1e-3 * variance) * np.gradient(potential, z)
        density = np.exp(-np.cumsum(force) * z[1]) / variance
        mass = np.trapezoid(density[z <= 1.0], z[z <= 1.0]) / np.trapezoid(density, z)
        assert phase.stays(settings, 3e-3, 0.02, 1e-3, noise) == pytest.approx(mass, abs=3e-3)
    assert mass < 0.9


def test_where_a_share_falls_to_one_half():
    x = np.array([1.0, 10.0, 100.0])
    assert phase.boundary(x, np.array([1.0, 0.75, 0.25])) == pytest.approx(10**1.5)
    assert phase.boundary(x, np.array([0.9, 0.8, 0.7])) == np.inf
    assert np.isnan(phase.boundary(x, np.array([0.4, 0.8, 0.7])))


# --- stops and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "count"), [("UnitRun", 3), ("SolveRun", 2)])
def test_a_stopped_diagram_goes_on_to_the_same_bits(
    owner, count, diagram, tmp_path, monkeypatch, folder
):
    calls, unit = iter(range(1, 1 << 30)), getattr(_sweep, owner)
    original = unit.advance

    def advance(self):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(unit, "advance", advance)
    with pytest.raises(Stopped):
        phase.compute(TINY, tmp_path)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/unit-?????.npz")}
    assert kept or list(tmp_path.glob("sgd/*checkpoint*"))
    xarray.testing.assert_identical(phase.compute(TINY, tmp_path), diagram)
    # what was finished was not computed again
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_folder_with_other_settings_is_refused(diagram, folder):
    other = dataclasses.replace(TINY, tau_end=0.3)
    with pytest.raises(ValueError, match=r"whose `tau_end` is 0\.4, not 0\.3\. Choose another"):
        phase.compute(other, folder / "phase_epsilon-eta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plane": "noise-noise"}, "`plane` must be one of"),
        ({"neurons": (5, 6)}, "`neurons` must be one number"),
        ({"eta": (0.1,)}, "`eta` must be two or more, rising"),
        ({"epsilon": (0.1, 0.01)}, "`epsilon` must be two or more, rising"),
        ({"seeds": 0}, "`seeds` must be an integer"),
    ],
)
def test_bad_settings_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        phase.compute(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plane", phase.PLANES)
@pytest.mark.parametrize("scale", phase.SCALES)
def test_settings(plane, scale):
    settings = phase.settings_of(plane, scale, seeds=7, tau_end=0.1)
    settings.check()
    assert {len(getattr(settings, name)) for name in settings.axes} == {phase.SCALES[scale][0]}
    assert (settings.seeds, settings.tau_end) == (7, 0.1)


# --- figure and command -----------------------------------------------------------------------


def test_the_figure(diagram):
    drawing = phase.draw(diagram)
    assert isinstance(drawing, Figure)
    image = drawing.axes[0].collections[0]
    np.testing.assert_array_equal(image.get_array(), diagram.probability.values[0])
    # cells of a logarithmic axis meet halfway
    assert phase._edges(np.array([1.0, 100.0])) == pytest.approx([0.1, 10.0, 1000.0])
    (line,) = phase._contours(np.array([1.0, 100.0]), np.array([1.0, 2.0]), np.array([[1, 0]] * 2))
    assert line[0] == pytest.approx(10.0)
    assert (line[1].min(), line[1].max()) == pytest.approx((2**-0.5, 2**1.5))


def test_the_command(diagram, folder, monkeypatch, capsys):
    """It goes on with the finished runs of the fixture."""
    monkeypatch.setattr(phase, "settings_of", lambda *given: TINY)
    words = ["phase", "epsilon-eta", "--out", str(folder)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 × 2 cells of 5 seeds, τ = 0.4" in said
    assert "late-hit rule is right for" in said
    xarray.testing.assert_identical(phase.load_data(folder, "epsilon-eta"), diagram)
    rows = (folder / "phase_epsilon-eta_cells.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    assert len({row.count(",") for row in rows}) == 1
    assert (folder / "phase_epsilon-eta_boundaries.csv").exists()
    for suffix in ("png", "pdf"):
        assert (folder / f"phase_epsilon-eta.{suffix}").stat().st_size > 5000
    monkeypatch.setattr(phase, "settings_of", lambda *given: dataclasses.replace(TINY, key=1))
    assert cli.main(words) == 2
    assert "whose `key` is 0, not 1" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*words, "--seeds", "0"]) == 2
    assert "`seeds` must be an integer of at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="tts-jax phase step-epsilon"):
        phase.load_data(folder, "step-epsilon")
