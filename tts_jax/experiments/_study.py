"""What studies share: labelled datasets that know the settings, their files, and intervals."""

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import xarray
from jaxtyping import Float, Int
from scipy.special import ndtri
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


# --- intervals ------------------------------------------------------------------------------


def wilson(
    counted: Int[np.ndarray, "..."] | int, total: int, confidence: float = 0.95
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Wilson's score interval of a probability from `counted` of `total` trials.

    Returns:
        Its lower and its upper end, `[...]`. Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209.
    """
    share = np.asarray(counted) / total
    square = ndtri(0.5 + confidence / 2.0) ** 2
    middle = (share + square / (2 * total)) / (1.0 + square / total)
    reach = square / total * (share * (1.0 - share) + square / (4 * total))
    reach = np.sqrt(reach) / (1.0 + square / total)
    # the ends are exact where all or none count
    low = np.where(share == 0.0, 0.0, middle - reach)
    return low, np.where(share == 1.0, 1.0, middle + reach)


def paired_difference(
    first: Int[np.ndarray, "..."] | int,
    second: Int[np.ndarray, "..."] | int,
    total: int,
    confidence: float = 0.95,
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The difference of two shares of the same `total` samples, and its interval.

    Args:
        first: samples that count for the first share only.
        second: samples that count for the second share only.
        total: their number.
        confidence: of the interval.

    Returns:
        The difference, its lower and its upper end, `[...]`: Wald's interval with half a sample
        added to each of the four outcomes, Agresti and Min (2005), Stat. Med. 24, 729.
    """
    more = np.asarray(first) - np.asarray(second)
    either = np.asarray(first) + np.asarray(second)
    middle = more / (total + 2)
    error = np.sqrt(either + 1.0 - more**2 / (total + 2)) / (total + 2)
    reach = ndtri(0.5 + confidence / 2.0) * error
    return more / total, np.maximum(middle - reach, -1.0), np.minimum(middle + reach, 1.0)
