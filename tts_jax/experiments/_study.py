"""What studies share: their data as labelled datasets that know the settings, and as files."""

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import xarray
from tqdm import tqdm

from tts_jax._version import __version__


T = TypeVar("T")


def steps(values: Sequence[T], what: str, unit: str, progress: bool) -> Iterator[T]:
    """`values` with a progress bar."""
    with tqdm(values, desc=f"  {what}", unit=unit, disable=not progress, leave=False) as bar:
        yield from bar


def dataset(settings: Any, variables: Mapping[str, Any], coords: Any) -> xarray.Dataset:
    """A dataset with the settings, a dataclass, and the versions as attributes."""
    notes = {"tts_jax": __version__, "jax": jax.__version__}
    notes |= {"python": platform.python_version()}
    attributes = {"settings": json.dumps(dataclasses.asdict(settings)), **notes}
    return xarray.Dataset(variables, coords, attributes)


def settings_in(dataset: xarray.Dataset, kind: type[T]) -> T:
    """The settings in a dataset's attributes."""
    numbers: dict[str, Any] = json.loads(dataset.attrs["settings"])
    for name, value in numbers.items():
        numbers[name] = tuple(value) if isinstance(value, list) else value
    return kind(**numbers)


def load_data(
    folder: str | os.PathLike[str], subject: str, parts: Iterable[str]
) -> dict[str, xarray.Dataset]:
    """The data that `tts-jax study` wrote to `folder`, as far as they are there.

    Raises:
        FileNotFoundError: the folder holds no data of the study.
    """
    data = {}
    for name in parts:
        path = Path(folder) / f"{subject}_{name}.nc"
        if path.is_file():
            with xarray.open_dataset(path, engine="h5netcdf") as opened:
                data[name] = opened.load()
    if not data:
        raise FileNotFoundError(
            f"There are no data `{subject}_*.nc` in `{folder}`. Write them with `tts-jax study "
            f"{subject} --out {folder}`."
        )
    return data
