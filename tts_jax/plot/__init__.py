"""Plots: arrays in, Axes out.

Every function takes `ax=None`, draws into the given Axes or into a new Figure of its own, and
returns the Axes. Nothing here uses `matplotlib.pyplot`, shows a window or changes the global
`rcParams`; `with theme():` gives the package's look to whatever is created inside.
"""

from tts_jax.plot._curves import losses, network, positions
from tts_jax.plot._movie import Movie, ffmpeg, save_gif, save_mp4
from tts_jax.plot._sketch import arrows, span
from tts_jax.plot._style import (
    COLORS,
    METHODS,
    TARGET_COLOR,
    Style,
    figure,
    panel_letters,
    save,
    theme,
)
from tts_jax.plot._summary import boxes


__all__ = [
    "COLORS",
    "METHODS",
    "TARGET_COLOR",
    "Movie",
    "Style",
    "arrows",
    "boxes",
    "ffmpeg",
    "figure",
    "losses",
    "network",
    "panel_letters",
    "positions",
    "save",
    "save_gif",
    "save_mp4",
    "span",
    "theme",
]
