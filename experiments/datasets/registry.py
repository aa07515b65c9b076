"""The table of data sets: what `config.data.name` can be."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Final

import tensorflow_datasets as tfds

from experiments.datasets import (
  digits,
  folder,
  generated,
  imagenet,
  imagenet_v2,
  photographs,
  records,
  tfds_records,
)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set that can be trained on.

  Attributes:
    description: What it is, in a line.
    open_split: Opens a split, given its name and the folder of the data (None
      means the usual one). Prepares the data first where that needs nothing
      from the user; else raises `MissingDataError` with instructions.
  """

  description: str
  open_split: Callable[[str, str | None], records.Split]


def _tfds(
  make_builder: tfds_records.BuilderFn, how_to_get: str | None = None
) -> Callable[[str, str | None], records.Split]:
  return functools.partial(
    tfds_records.open_split, make_builder, how_to_get=how_to_get
  )


def _from_tars(
  source: imagenet.Source,
) -> Callable[[str, str | None], records.Split]:
  return _tfds(source.make_builder, source.how_to_get)


def _array_record(
  builder: type[tfds.core.DatasetBuilder],
) -> tfds_records.BuilderFn:
  return lambda root: builder(data_dir=root, file_format="array_record")


DATASETS: Final[dict[str, Dataset]] = {
  "imagenet2012": Dataset(
    "ILSVRC 2012: 1,281,167 train and 50,000 validation images",
    _from_tars(imagenet.SOURCE),
  ),
  imagenet_v2.NAME: Dataset(
    f"ImageNet-V2, {imagenet_v2.DEFAULT}: 10,000 test images",
    _from_tars(imagenet_v2.SOURCES[imagenet_v2.DEFAULT]),
  ),
  **{
    f"{imagenet_v2.NAME}/{variant}": Dataset(
      f"ImageNet-V2, {variant}: 10,000 test images", _from_tars(source)
    )
    for variant, source in imagenet_v2.SOURCES.items()
  },
  "digits": Dataset(
    "1,797 handwritten digits, from inside scikit-learn",
    _tfds(_array_record(digits.SklearnDigits)),
  ),
  "photographs": Dataset(
    "2,340 small crops of two photographs, from inside scikit-learn",
    _tfds(_array_record(photographs.SklearnPhotographs)),
  ),
  "folder": Dataset(
    "your own images: a folder with a subfolder for each class",
    folder.open_split,
  ),
  "generated": Dataset(
    "480 generated JPEGs shaped like ImageNet's, for smoke runs",
    _tfds(_array_record(generated.VimjaxGenerated)),
  ),
}


def open_split(
  name: str, split: str, data_dir: str | None = None
) -> records.Split:
  """Opens a split of a data set in the table.

  Args:
    name: A key of `DATASETS`.
    split: Name of a split (for TFDS data, any split expression).
    data_dir: Folder of the data; None means $TFDS_DATA_DIR, else
      ~/tensorflow_datasets ("folder" has no such place).

  Returns:
    The split.

  Raises:
    ValueError: There is no such data set or split.
    MissingDataError: The data must be fetched by the user; says how.
    DataError: The data is incomplete or damaged.
    OSError: The data cannot be written where it should be prepared.
  """
  if name not in DATASETS:
    raise records.unknown_name("data set", name, DATASETS)
  return DATASETS[name].open_split(split, data_dir)
