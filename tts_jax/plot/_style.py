"""The look of every plot: theme, colours and line styles of the methods, figures and files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    """How one method looks in every plot.

    Attributes:
        label: its name in a legend.
        color: a colour of the Okabe-Ito palette, distinct for colour-blind readers.
        dashes: a Matplotlib line style; distinct without colour.
        order: drawing order, higher on top.
    """

    label: str
    color: str
    dashes: Any
    order: float


# Okabe & Ito, Color Universal Design (2008)
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
TARGET_COLOR = "#3B3B3B"
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

METHODS = {
    "sgd": Style("SGD", BLUE, "-", 3.0),
    "flow": Style("gradient flow", VERMILLION, (0, (5, 1.5)), 3.1),
    "limit": Style("limit ε → 0", GREEN, (0, (6, 1.5, 1, 1.5)), 3.2),
    "sharp_limit": Style("limit ε, η → 0", PURPLE, (0, (1, 1.2)), 3.3),
}
_OTHERS = (
    (ORANGE, "-"),
    (SKY, (0, (5, 1.5))),
    (PURPLE, (0, (6, 1.5, 1, 1.5))),
    (VERMILLION, (0, (1, 1.2))),
)

_THEME: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#4D4D4D",
    "axes.grid": True,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "figure.dpi": 110.0,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "butt",
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,
    "savefig.bbox": None,
    "savefig.dpi": 200.0,
    "savefig.facecolor": "white",
    "text.usetex": False,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
}


@contextmanager
def theme() -> Iterator[None]:
    """The package's look for figures created, drawn and saved inside the `with` block.

    The global `rcParams` are as before once the block is left.
    """
    with matplotlib.rc_context(_THEME):
        yield


def method_style(name: str, position: int) -> Style:
    """The style of a method, or one from the rest of the palette for any other name."""
    color, dashes = _OTHERS[position % len(_OTHERS)]
    return METHODS.get(name, Style(name, color, dashes, 3.0 + 0.01 * position))


def figure(width: float = 4.6, height: float = 3.2) -> Figure:
    """An empty figure of the given size in inches, laid out so that nothing is clipped.

    It belongs to its holder, not to pyplot: nothing has to be closed, no window opens.
    """
    with theme():
        return Figure(figsize=(width, height), layout="constrained")


def axes(ax: Axes | None) -> Axes:
    """`ax` itself, or the only Axes of a new figure."""
    return ax if ax is not None else figure().subplots()


def panel_letters(panels: Iterable[Axes]) -> None:
    """Write a, b, c, … in bold at the upper left corner outside each panel."""
    for index, ax in enumerate(panels):
        ax.annotate(
            chr(ord("a") + index),
            xy=(0.0, 1.0),
            xycoords="axes fraction",
            xytext=(-22.0, 5.0),
            textcoords="offset points",
            fontsize=10.0,
            fontweight="bold",
            annotation_clip=False,
        )


def save(
    drawing: Figure, stem: str | os.PathLike[str], *, formats: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Write `drawing` to `<stem>.<format>` for each format; PNG at 200 dots per inch.

    Returns:
        The files written.

    Raises:
        OSError: the folder is missing or not writable.
    """
    stem = Path(stem)
    paths = []
    for kind in formats:
        path = stem.with_name(f"{stem.name}.{kind}")
        with theme():
            drawing.savefig(path, format=kind, dpi=200)
        paths.append(path)
    return paths
