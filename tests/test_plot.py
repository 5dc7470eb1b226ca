"""Plots: every function draws what it is given, where it is told, and leaves nothing behind."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tts_jax import plot


X = np.linspace(0.0, 1.0, 101)
TAU = np.linspace(0.0, 0.035, 11)
RNG = np.random.default_rng(0)
LOSS = np.exp(-100.0 * TAU) * (1.0 + RNG.random((7, TAU.size)))
TARGET = ([0.3, 0.7], [1.0, 5.0, 2.0])

DRAWINGS = {
    "network": lambda **kw: plot.network(
        {"sgd": (X, X), "my own": (X, X**2)}, target=TARGET, neurons=[0.1, 0.4], **kw
    ),
    "losses": lambda **kw: plot.losses({"sgd": (TAU, LOSS), "flow": (TAU, LOSS[0])}, **kw),
    "positions": lambda **kw: plot.positions(
        {"sgd": (TAU, RNG.random((TAU.size, 4)))}, jumps=[0.3, 0.7], **kw
    ),
    "boxes": lambda **kw: plot.boxes({1.0: LOSS[:, 0], 0.01: LOSS[:, -1]}, **kw),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_draws_into_the_given_axes_or_its_own(name, tmp_path):
    draw = DRAWINGS[name]
    before = dict(matplotlib.rcParams)
    given = Figure().subplots()
    assert draw(ax=given) is given
    own = draw()
    assert isinstance(own, Axes)
    assert own is not given
    assert own.has_data()
    assert own.get_xlabel()
    assert own.get_ylabel()
    for path in plot.save(own.figure, tmp_path / name):
        assert path.stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


def test_no_pyplot_figures_are_opened():
    code = (
        "import sys, numpy as np; from tts_jax import plot;"
        "plot.losses({'sgd': (np.arange(3.0), np.ones(3))}).figure.savefig(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, timeout=60)


def test_import_of_the_package_leaves_plotting_out():
    code = "import sys, tts_jax;assert not {'matplotlib', 'xarray', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_theme_is_local():
    before = dict(matplotlib.rcParams)

    def fail():
        with plot.theme():
            assert matplotlib.rcParams["savefig.dpi"] == 200.0
            raise RuntimeError("inside the theme")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert dict(matplotlib.rcParams) == before


def test_losses_draw_the_median_and_the_quantiles_of_the_usable_seeds():
    loss = np.array([[1.0, 1.0], [2.0, np.nan], [4.0, 3.0], [8.0, 0.0], [16.0, np.inf]])
    ax = plot.losses({"sgd": ([0.0, 1.0], loss)}, quantiles=(0.0, 1.0))
    lines = [np.asarray(line.get_ydata()) for line in ax.get_lines()]
    assert any(np.allclose(line, [4.0, 2.0]) for line in lines)
    assert any(np.allclose(line, [1.0, 1.0]) for line in lines)
    assert any(np.allclose(line, [16.0, 3.0]) for line in lines)
    assert ax.get_yscale() == "log"


def test_boxes_are_ordered_by_epsilon_and_drop_lost_seeds():
    ax = plot.boxes({1.0: [3.0, np.nan, 5.0], 0.1: [1.0, 2.0]})
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.1", "1"]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert sorted(len(line.get_ydata()) for line in dots) == [2, 2]


def test_methods_differ_in_colour_and_in_line_style():
    styles = plot.METHODS.values()
    assert len({style.color for style in styles}) == len(styles)
    assert len({str(style.dashes) for style in styles}) == len(styles)


def test_panel_letters():
    panels = Figure().subplots(1, 3)
    plot.panel_letters(panels)
    assert [ax.texts[0].get_text() for ax in panels] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plot.network({"sgd": (X, X[:-1])}), r"curves\['sgd'\].*\(101,\) and \(100,\)"),
        (lambda: plot.losses({"flow": (TAU, LOSS[:, :-1])}), r"curves\['flow'\].*\(7, 10\)"),
        (lambda: plot.losses({}, quantiles=(0.9, 0.1)), r"`quantiles`.*\(0.9, 0.1\)"),
        (lambda: plot.positions({"sgd": (TAU, TAU)}), r"curves\['sgd'\].*\[T, m\]"),
        (lambda: plot.boxes({}), "at least one ε"),
        (lambda: plot.boxes({0.1: [np.nan]}), r"groups\[0.1\].*finite"),
    ],
)
def test_bad_arrays_are_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
