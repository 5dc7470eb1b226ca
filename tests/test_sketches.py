"""The sketches: what they annotate is what the model says."""

import numpy as np
import pytest

import tts_jax as tts
from tts_jax import plot
from tts_jax.experiments import marion_berthier as mb, sketches


def computed(figure):
    spec = mb.FIGURES[figure]
    return spec.compute(settings=mb.settings_of(spec.experiment), methods=spec.methods)


@pytest.fixture(scope="module")
def data():
    return {figure: computed(figure) for figure in ("figure1", "figure2", "proof")}


def marks(ax):
    """The lines with heads at both ends of an Axes: label to (start, end)."""
    found, texts = {}, list(ax.texts)
    for line, name in zip(texts, texts[1:], strict=False):
        if line.arrow_patch is not None and line.arrow_patch.get_arrowstyle().arrow == "<->":
            found[name.get_text()] = np.array([line.xyann, line.xy])
    return found


def moves(ax):
    """The arrows along x of an Axes, `[arrows, (start, end)]`."""
    lines = [text for text in ax.texts if text.arrow_patch is not None]
    single = [text for text in lines if text.arrow_patch.get_arrowstyle().arrow == "-|>"]
    return np.array([[text.xyann[0], text.xy[0]] for text in single])


def test_notation_marks_the_lengths_of_target_and_network(data):
    (ax,) = sketches.draw_figure1(data["figure1"]).axes[:1]
    settings = mb.settings_of("notation")
    found = marks(ax)
    pieces = np.diff([0.0, *settings.jumps, 1.0])
    shortest = found[r"$\Delta v$"]
    assert np.diff(shortest[:, 0])[0] == pytest.approx(pieces.min(), abs=1e-12)
    assert shortest[0, 0] == pytest.approx(settings.jumps[-1])
    heights = np.abs(np.diff(settings.values))
    assert abs(np.diff(found[r"$\Delta f$"][:, 1])[0]) == pytest.approx(heights.min(), abs=1e-12)
    # the width of the neuron of largest weight, around its present position, and that weight
    flow = data["figure1"]["flow"]
    weights, places = np.asarray(flow.fast)[0, -1, 1:], np.asarray(flow.slow)[0, -1]
    j = int(np.argmax(np.abs(weights)))
    width = found[r"$\eta$"][:, 0]
    assert np.diff(width)[0] == pytest.approx(settings.eta, abs=1e-12)
    assert width.mean() == pytest.approx(places[j], abs=1e-12)
    assert np.diff(found[f"$a_{j + 1}$"][:, 1])[0] == pytest.approx(weights[j], abs=1e-9)


def test_arrows_are_velocities_and_dots_are_the_closed_form(data):
    drawing = sketches.draw_figure2(data["figure2"])
    limit = data["figure2"]["limit"]
    jumps = np.array(mb.settings_of("dynamics").jumps)
    first, second, distances = drawing.axes
    arrows = moves(first)
    assert len(arrows) == 4
    for jump, (left, right) in zip(jumps, arrows.reshape(2, 2, 2), strict=True):
        l, r = jump - left[0], right[0] - jump
        # du_L : du_R = r² : −l², up to the width of a step
        assert (left[1] - left[0]) * l**2 == pytest.approx(-(right[1] - right[0]) * r**2, rel=0.02)
        covered = max((left[1] - left[0]) / l, (right[0] - right[1]) / r)
        assert covered == pytest.approx(0.8, abs=1e-9)
    # between the hits only the second jump still moves its neurons
    assert np.all(np.abs(moves(second)[:, 0] - jumps[1]) < np.abs(moves(second)[:, 0] - jumps[0]))
    # the limit's neurons arrive when the closed form says
    hits = next(line for line in distances.lines if line.get_label() == "η → 0").get_xdata()
    near = np.array(
        [limit.tau[np.argmax(gap < 5e-4)] for gap in limit.observables["recovery"][0].T]
    )
    assert near == pytest.approx(hits, abs=0.02)


def test_proof_shows_both_phases_in_their_windows(data):
    drawing = sketches.draw_proof(data["proof"])
    settings = mb.settings_of("proof")
    before, after = drawing.axes
    (jump,) = settings.jumps
    for ax, name, width in ((before, r"$\eta$", 1.0), (after, r"$2\eta$", 2.0)):
        window = marks(ax)[name][:, 0]
        assert window.mean() == pytest.approx(jump)
        assert np.diff(window)[0] == pytest.approx(width * settings.eta)
    assert len(moves(before)) == 2
    assert len(moves(after)) == 0
    assert [label.get_text() for label in before.get_xticklabels()][2:6] == [
        "$u_i^{LL}$",
        "$u_i^L$",
        "$u_i^R$",
        "$u_i^{RR}$",
    ]


def test_a_sketch_draws_into_the_given_axes(data):
    ax = plot.figure().subplots()
    assert sketches.draw_dynamics(data["proof"]["flow"], 0.1, ax=ax) is ax
    assert plot.span((0.0, 0.5), (1.0, 0.5), "x", ax=ax) is ax
    assert plot.arrows([0.0], [0.0], [0.5], ax=ax) is ax
    with pytest.raises(ValueError, match="must share x or y"):
        plot.span((0.0, 0.5), (1.0, 0.6), "x")
    with pytest.raises(ValueError, match="on both sides of each jump"):
        sketches.flanks(np.array([0.6, 0.7]), np.array([0.5]))


def test_a_saved_sketch_draws_again(data, tmp_path):
    data["figure2"]["limit"].save(tmp_path / "figure2_limit.nc")
    again = mb.load_data(tmp_path, "figure2")
    drawn = [sketches.draw_figure2(values) for values in (data["figure2"], again)]
    assert np.array_equal(moves(drawn[0].axes[0]), moves(drawn[1].axes[0]))
    assert isinstance(again["limit"], tts.Trajectory)
