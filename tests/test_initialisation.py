"""The study of random initialisations: its parts, figure and command at tiny settings."""

import jax
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure

from tts_jax import cli, theory
from tts_jax.experiments import initialisation as study


TINY = study.Settings(starts=200, draws=4000, neurons=(12, 60), recovered=(8, 12))


@pytest.fixture(scope="module")
def data():
    return {name: compute(TINY) for name, compute in study.PARTS.items()}


@pytest.mark.slow
def test_exact_and_counted_probabilities_agree(data):
    dataset = data["good_starts"]
    for row in range(dataset.sizes["at_least"]):
        for column in range(dataset.sizes["neurons"]):
            low, high = study._interval(dataset.counted.values[row, column], TINY.draws)
            assert low - 1e-12 <= dataset.exact.values[row, column] <= high


@pytest.mark.slow
def test_recovery_grows_with_the_neurons(data):
    dataset = data["recovery"]
    assert np.all(dataset.status.values == 0)
    recovered = study._recovered(dataset)
    assert recovered[-1] > recovered[0]
    alone = theory.sample_hitting_times(
        TINY.target(), 12, key=jax.random.fold_in(jax.random.key(0), 12), count=TINY.starts
    )
    np.testing.assert_array_equal(dataset.recovery_time.sel(neurons=12), alone["recovery_time"])


def test_the_guarantee_is_the_bound_on_neurons():
    neurons = theory.neurons_bound(TINY.target(), 0.05)
    above, below = study._guaranteed(TINY, np.array([neurons, neurons - 1]))
    assert below < 0.95 <= above
    assert study._guaranteed(TINY, np.array([20]))[0] == 0.0


@pytest.mark.slow
def test_drawing_takes_whatever_parts_there_are(data):
    whole = study.draw(data)
    assert isinstance(whole, Figure)
    assert all(ax.has_data() for ax in whole.axes)
    study.draw({"hitting": data["hitting"]})
    with pytest.raises(ValueError, match="good_starts, recovery, hitting"):
        study.draw({})


@pytest.mark.slow
def test_the_command_writes_data_tables_and_figure(data, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(study.SETTINGS, "quick", TINY)
    for name, dataset in data.items():
        monkeypatch.setitem(study.PARTS, name, lambda settings, progress, d=dataset: d)
    assert cli.main(["study", "initialisation", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name, dataset in study.load_data(tmp_path).items():
        xarray.testing.assert_identical(dataset, data[name])
    assert "m ≥ 352" in said
    assert "every piece has 2 neurons" in said
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"initialisation.{suffix}").stat().st_size > 5000
    assert (tmp_path / "initialisation_probabilities.csv").exists()


def test_settings():
    half = study.settings_of("quick", 1000)
    assert (half.starts, half.draws) == (1000, 50_000)
    with pytest.raises(ValueError, match="`seeds` must be an integer of at least 1, got 0"):
        study.settings_of("quick", 0)
    with pytest.raises(FileNotFoundError, match="tts-jax study initialisation"):
        study.load_data("nowhere")
