"""The convergence study: its fits on made data, its parts and its command at tiny settings."""

import csv
import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import cli
from tts_jax.experiments import _study, convergence as study


# Two jumps and six neurons: every part takes seconds.
TINY = study.Settings(
    starts=3,
    epsilons=(1e-4, 1e-6, 1e-7, 1e-8, 1e-9),
    widths=(4e-3, 2e-3, 1e-3),
    step_sizes=(4e-2, 2e-2, 1e-2),
    runs=64,
    late_starts=32,
    epsilon=1e-3,
    tau_end=0.05,
    long_end=0.1,
    records=12,
    tolerance=1e-8,
    neurons=6,
    eta=0.02,
    jumps=(0.3, 0.7),
    values=(1.0, 4.0, 1.0),
)


@pytest.fixture(scope="module")
def data():
    return {name: compute(TINY) for name, compute in study.PARTS.items()}


# --- fits on made data ----------------------------------------------------------------------


def test_a_power_law_is_fitted_exactly_whatever_the_constants():
    x, constants = np.logspace(-4, -1, 7), np.array([[1.0], [30.0], [1e-3]])
    row = study._slope("", "", 1.0, x, constants * x**0.75, np.ones((3, 7), bool))
    assert row.slope == pytest.approx(0.75, abs=1e-12)
    assert row.low == pytest.approx(0.75, abs=1e-10)
    assert row.high == pytest.approx(0.75, abs=1e-10)
    assert (row.samples, row.points) == (3, 21)


def test_points_that_are_masked_missing_or_alone_do_not_enter():
    x = np.logspace(-3, -1, 5)
    y = np.tile(x, (4, 1))
    y[0, 2:] = 1.0  # masked below
    y[1, 0] = np.nan
    y[2, 4] = 0.0
    y[3] = np.nan
    y[3, 1] = 5.0  # alone
    where = np.ones((4, 5), bool)
    where[0, 2:] = False
    row = study._slope("", "", 1.0, x, y, where)
    assert row.slope == pytest.approx(1.0, abs=1e-12)
    assert (row.samples, row.points) == (3, 2 + 4 + 4)


def test_without_points_there_is_no_slope_and_with_one_start_no_interval():
    x = np.logspace(-3, -1, 5)
    empty = study._slope("", "", 1.0, x, np.tile(x, (2, 1)), np.zeros((2, 5), bool))
    assert np.isnan([empty.slope, empty.low, empty.high]).all()
    one = study._slope("", "", 1.0, x, x[None] ** 2, np.ones((1, 5), bool))
    assert one.slope == pytest.approx(2.0)
    assert np.isnan([one.low, one.high]).all()


def test_intervals_hold_the_truth_in_about_95_percent_of_noisy_data():
    random, x = np.random.default_rng(3), np.logspace(-3, -1, 5)
    hit = 0
    for _ in range(400):
        # every start has an order of its own around 1
        order = 1.0 + 0.2 * random.standard_normal((12, 1))
        row = study._slope("", "", 1.0, x, x**order, np.ones((12, 5), bool))
        hit += row.low <= 1.0 <= row.high
    assert 0.91 <= hit / 400 <= 0.98


def test_the_distance_of_the_mean_has_no_bias_from_the_spread_of_the_runs():
    """Runs around a displacement of 0.1 h with unit spread: both distances are known."""
    random, h = np.random.default_rng(0), np.array([1.0, 2.0, 4.0])
    runs, times, neurons = 1600, 5, 4
    moved = random.standard_normal((3, runs, times, neurons)) + 0.1 * h[:, None, None, None]
    groups = [np.mean(moved[:, g :: study.GROUPS], axis=1) for g in range(study.GROUPS)]
    dataset = xarray.Dataset(
        {
            "distance": (("step_size", "run"), np.max(np.abs(moved), axis=(2, 3))),
            "group_bias": (("step_size", "group", "tau", "neuron"), np.stack(groups, axis=1)),
            "solved": (("step_size", "run"), np.ones((3, runs), bool)),
        },
        {"step_size": h},
    )
    found = study.step_distances(dataset)
    np.testing.assert_allclose(found["weak"][0], 0.1 * h, atol=0.02)
    np.testing.assert_allclose(found["strong"][0], np.max(np.abs(moved), axis=(2, 3)).mean(axis=1))
    strong, weak = study._step_slopes(dataset)
    assert weak.low <= 1.0 <= weak.high
    assert strong.points == weak.points == 3 * runs
    # without displacement there is nothing to resolve
    centred = dataset.assign(group_bias=dataset.group_bias - dataset.group_bias.mean("group"))
    assert np.isnan(study.step_distances(centred)["weak"][0]).all()


def test_hits_are_counted():
    dataset = xarray.Dataset(
        {
            "flow": ("start", [True, False, False, True, False]),
            "limit": ("start", [True, True, False, False, False]),
            "hitting_time": (("start", "jump"), [[0.1], [0.2], [np.inf], [2.0], [np.nan]]),
            "sharp_status": ("start", [0, 0, 0, 0, int(tts.Status.NOT_UNIQUE)]),
        },
        attrs=_study.dataset(dataclasses.replace(TINY, tau_end=1.0), {}, {}).attrs,
    )
    timely, late, unknown, recovered, failed = study.hits(dataset)
    assert (timely.starts, timely.recovered, timely.failed) == (2, 1, 1)
    assert (timely.by_width, timely.by_epsilon) == (0, 1)  # start 1: the limit had recovered
    assert timely.margin == pytest.approx(np.log(5.0))
    assert (late.starts, late.recovered, late.failed) == (2, 1, 1)
    assert (late.by_width, late.by_epsilon) == (0, 1)  # start 3: the limit had failed
    assert late.margin == pytest.approx(np.log(2.0))
    assert (unknown.starts, unknown.recovered, unknown.failed) == (1, 0, 1)
    assert np.isnan(unknown.margin)
    assert (recovered.starts, recovered.recovered, recovered.by_epsilon) == (2, 1, 1)
    assert (failed.starts, failed.failed, failed.by_epsilon) == (3, 2, 1)


# --- the parts at tiny settings -----------------------------------------------------------------


@pytest.mark.slow
def test_slopes_are_those_of_the_theory(data):
    rows = {(row.quantity, row.range): row for row in study.slopes(data)}
    assert len(rows) >= 5 + 2 * 3 + 2
    asymptotic = rows["flow − limit, ε, after the layer", "ε ≤ ε_c/10"]
    assert abs(asymptotic.slope - 1.0) <= 0.15
    assert asymptotic.low <= asymptotic.slope <= asymptotic.high
    for time in ("before the first hit", "after the last", "all times"):
        row = rows[f"limit − sharp limit, η, {time}", "separated starts, η ≤ smallest gap"]
        assert abs(row.slope - 1.0) <= 0.15, time
        assert row.expected == 1.0
    strong = rows["SGD − flow, h, mean distance", "all h"]
    assert abs(strong.slope - 0.5) <= 0.2


@pytest.mark.slow
def test_the_layer_and_the_critical_epsilon_follow_from_the_gram_matrix(data):
    part = data["small_epsilon"]
    problem, starts = TINY.problem(), TINY.random_starts(TINY.starts, 0)
    for i, slow in enumerate(starts):
        # the Hessian of the loss in the weights is 2G
        count = TINY.neurons + 1
        hessian = problem.hessian(np.zeros(count), slow)[:count, :count]
        smallest = np.linalg.eigvalsh(hessian)[0] / 2.0
        assert part.smallest[i] == pytest.approx(smallest, rel=1e-8)
        assert part.smallest_on_path[i] <= part.smallest[i]
        np.testing.assert_allclose(part.layer[i], 5.0 * part.epsilon / (2.0 * smallest), rtol=1e-8)
        critical = 2.0 * float(part.smallest_on_path[i]) * 0.02 / 9.0
        assert part.critical_epsilon[i] == pytest.approx(critical)
    outside, inside, whole = (part[name].values for name in ("outside", "inside", "whole"))
    np.testing.assert_array_equal(np.fmax(outside, inside), whole)


@pytest.mark.slow
def test_distances_are_those_of_tight_solves(data):
    part, j = data["small_epsilon"], 2
    problem = TINY.problem()
    starts = problem.state(slow=TINY.random_starts(TINY.starts, 0))
    tau, tight = part.tau.values, {"rtol": 1e-10, "atol": 1e-10}
    flow = tts.flow(problem, starts, epsilon=TINY.epsilons[j], tau=tau, **tight)
    limit = tts.limit(problem, starts, tau=tau, **tight)
    distance = np.max(np.abs(flow.slow - limit.slow), axis=-1) / TINY.eta
    np.testing.assert_allclose(part.distance[:, j], distance, atol=1e-5)


@pytest.mark.slow
def test_late_hits_agree_with_tight_solves(data):
    part = data["late_hits"]
    problem, slow = TINY.problem(), part.slow.values
    starts, end = problem.state(slow=slow), np.array([TINY.tau_end])
    flow = tts.flow(problem, starts, epsilon=1e-3, tau=end, rtol=1e-9, atol=1e-9)
    nearest = np.min(np.abs(flow.slow[:, 0, None, :] - np.array(TINY.jumps)[:, None]), axis=-1)
    np.testing.assert_array_equal(part.flow, np.all(nearest <= TINY.eta, axis=-1))
    assert 0 < np.sum(part.flow.values) < 32
    counts = part.neurons_per_piece.values
    np.testing.assert_array_equal(counts.sum(axis=1), TINY.neurons)
    np.testing.assert_array_equal(counts[:, 0], np.sum(slow < 0.3, axis=1))
    rows = study.hits(part)
    assert sum(row.starts for row in rows[:3]) == sum(row.starts for row in rows[3:]) == 32


def test_starts_do_not_depend_on_their_number():
    few, many = TINY.random_starts(3, 0), TINY.random_starts(6, 0)
    np.testing.assert_array_equal(few, many[:3])
    assert not np.array_equal(few, TINY.random_starts(3, 4))
    separated = study.Settings().separated_starts(50)
    assert np.min(np.diff(separated, axis=1)) >= 0.5 / 20


def test_the_number_of_seeds_scales_the_rest():
    settings = study.settings_of("quick", 16)
    assert (settings.starts, settings.runs, settings.late_starts) == (16, 512, 512)
    few = study.settings_of("paper", 1)
    assert few.runs == few.late_starts == study.GROUPS
    with pytest.raises(ValueError, match="`seeds` must be an integer of at least 1, got 0"):
        study.settings_of("quick", 0)
    with pytest.raises(ValueError, match="`scale` must be one of 'quick', 'paper'"):
        study.settings_of("huge")


@pytest.mark.slow
def test_too_few_covered_starts_are_refused(monkeypatch):
    whole = tts.sharp_limit

    def tied(*args, **options):
        answer = whole(*args, **options)
        status = np.full(np.shape(answer.status), int(tts.Status.NOT_UNIQUE))
        return eqx.tree_at(lambda trajectory: trajectory.status, answer, status)

    monkeypatch.setattr(tts, "sharp_limit", tied)
    with pytest.raises(RuntimeError, match="Choose fewer starts"):
        study.small_width(dataclasses.replace(TINY, widths=(1e-3,)))


@pytest.mark.slow
def test_drawing_takes_whatever_parts_there_are(data):
    whole = study.draw(data)
    assert isinstance(whole, Figure)
    assert all(ax.has_data() for ax in whole.axes)
    assert len(whole.axes) == 3
    (ax,) = study.draw({"small_step": data["small_step"]}).axes
    assert ax.get_xlabel() == "step size h"
    with pytest.raises(ValueError, match="small_epsilon, small_width, small_step"):
        study.draw({"late_hits": data["late_hits"]})


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, data):
    """The command at tiny settings, with the parts that were computed before."""
    jax.devices()  # the backend of this process stays as it is
    monkeypatch.setitem(study.SETTINGS, "quick", TINY)
    for name, dataset in data.items():
        monkeypatch.setitem(study.PARTS, name, lambda settings, progress, d=dataset: d)


@pytest.mark.slow
def test_the_command_writes_data_tables_and_figure(tiny, data, capsys, tmp_path):
    out = tmp_path / "new"
    assert cli.main(["study", "convergence", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name, dataset in study.load_data(out).items():
        xarray.testing.assert_identical(dataset, data[name])
        assert f"convergence_{name}.nc" in said
    for name, rows in study.tables(data).items():
        with (out / f"convergence_{name}.csv").open(encoding="utf-8") as file:
            assert [tuple(row) for row in csv.reader(file)] == rows
        assert all(row[0] in said and row[1] in said for row in rows)
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "convergence.pdf").read_bytes().startswith(b"%PDF")
    assert "95 %" in said
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others(tiny, capsys, monkeypatch, tmp_path):
    def broken(settings, progress):
        raise RuntimeError("singular")

    monkeypatch.setitem(study.PARTS, "small_width", broken)
    assert cli.main(["study", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "singular" in said.err
    assert "small_width could not be computed" in said.err
    assert set(study.load_data(tmp_path)) == set(study.PARTS) - {"small_width"}
    assert (tmp_path / "convergence.png").exists()
    assert (tmp_path / "convergence_slopes.csv").exists()


@pytest.mark.slow
def test_a_drawing_that_fails_leaves_data_and_tables(tiny, capsys, monkeypatch, tmp_path):
    def broken(data):
        raise RuntimeError("no ink")

    monkeypatch.setattr(study, "draw", broken)
    assert cli.main(["study", "--out", str(tmp_path)]) == 1
    assert "could not be drawn" in capsys.readouterr().err
    assert set(study.load_data(tmp_path)) == set(study.PARTS)
    assert (tmp_path / "convergence_late_hits.csv").exists()


def refuse_to_compute(monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("a computation was started")

    for name in study.PARTS:
        monkeypatch.setitem(study.PARTS, name, started)


@pytest.mark.parametrize("arguments", [["sgd"], ["--scale", "huge"], ["--seeds", "many"]])
def test_arguments_that_do_not_parse(arguments, capsys, monkeypatch):
    refuse_to_compute(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *arguments])
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_bad_values_are_refused(capsys, monkeypatch, tmp_path):
    refuse_to_compute(monkeypatch)
    assert cli.main(["study", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "`--seeds` must be an integer of at least 1, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["study", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "Choose another folder" in capsys.readouterr().err


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in ("convergence", "--scale", "quick", "paper", "--seeds", "--out"):
        assert word in said
    for word in ("default: results", "default: quick", "default: convergence 8"):
        assert word in said


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tts-jax study convergence"):
        study.load_data(tmp_path)
