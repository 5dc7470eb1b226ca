"""What the experiments of all papers share: figures and their data, settings by scale, cases."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from matplotlib.figure import Figure

import tts_jax as tts
from tts_jax import checks


Scale = Literal["quick", "paper"]
Data = dict[str, tts.Trajectory]
OnResult = Callable[[str, tts.Trajectory], None]


@dataclass(frozen=True)
class FigureSpec:
    """How one figure comes about.

    Attributes:
        experiment: name of its settings in `SETTINGS`; figures that share one share its data.
        compute: the function that computes the data.
        methods: the methods that the drawing needs.
        draw: the function from data to Figure.
        table: what its data came to, from its name, its data and the seconds that they took; by
            default losses and recovered jumps.
    """

    experiment: str
    compute: Callable[..., Data]
    methods: tuple[str, ...]
    draw: Callable[[Mapping[str, tts.Trajectory]], Figure]
    table: Callable[[str, Mapping[str, tts.Trajectory], float], "Table"] | None = None


class Table(NamedTuple):
    """A table for the terminal.

    Attributes:
        header: names of the columns.
        rows: their entries.
        notes: lines below it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


Settings = TypeVar("Settings")


def settings_from(
    table: Mapping[str, Mapping[str, Settings]],
    experiment: str,
    scale: str = "quick",
    seeds: int | None = None,
) -> Settings:
    """The entry of an experiment and a scale, with another number of seeds if given.

    Raises:
        ValueError: an unknown experiment or scale, or `seeds` < 1.
    """
    checks.one_of("experiment", experiment, table)
    settings: Any = table[experiment][checks.one_of("scale", scale, table[experiment])]
    if seeds is None:
        return settings
    remedy = f"Its default is {settings.seeds}."
    return replace(settings, seeds=checks.positive_integer("seeds", seeds, remedy))


Case = TypeVar("Case")


def each_case(
    cases: Mapping[str, Case],
    methods: Sequence[str],
    run: Callable[[Case], tts.Trajectory],
    on_result: OnResult | None = None,
) -> Data:
    """The runs of an experiment that is a table of cases, by their names.

    Args:
        cases: the table.
        methods: the names that are wanted.
        run: the run of a case.
        on_result: called with the name and trajectory of each as soon as it is there.

    Raises:
        ValueError: an unknown case.
    """
    for name in methods:
        checks.one_of("methods", name, cases)
    data: Data = {}
    for name in methods:
        data[name] = run(cases[name])
        if on_result is not None:
            on_result(name, data[name])
    return data


def figure_data(
    figures: Mapping[str, FigureSpec], folder: str | os.PathLike[str], figure: str
) -> Data:
    """The data behind a figure that `tts-jax reproduce` wrote to `folder`.

    Raises:
        ValueError: an unknown figure.
        FileNotFoundError: the folder holds no data of that figure.
    """
    stem = f"{checks.one_of('figure', figure, figures)}_"
    files = sorted(Path(folder).glob(f"{stem}*.nc"))
    if not files:
        raise FileNotFoundError(
            f"There are no data `{stem}*.nc` in `{folder}`. Write them with `tts-jax reproduce "
            f"{figure} --out {folder}`."
        )
    return {path.name.removeprefix(stem).removesuffix(".nc"): tts.load(path) for path in files}
