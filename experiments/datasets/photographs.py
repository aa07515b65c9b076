"""Small colour crops of the two photographs inside the scikit-learn package.

Each photograph (china.jpg and flower.jpg, 640 x 427) is divided into 3 x 3
tiles; a class is a tile, and the task to say which tile a crop of 32 x 32
pixels is from: recognition of colours and textures. Every tile is cut into five
vertical strips, in turn for training, validation, training, test and training,
with pixels between them that no split has. So no pixel is in two splits, and
what is seen in training lies on both sides of what is tested.

This is a small task to see programs learn on, and no benchmark: some tiles look
alike (sky, dark leaves), and crops of a strip overlap, so that 468 images for
validation, and as many for test, cover 72 separate patches each. Differences
between models of a few percent mean nothing.
"""

from collections.abc import Iterator
import dataclasses
import io
from typing import ClassVar, Final

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import encoding
from vimjax import optional

PHOTOGRAPHS: Final = ("china", "flower")
CROP: Final = 32  # Pixels, as are all numbers here.
_TILES = 3  # Rows, and columns.
_TILE_HEIGHT, _TILE_WIDTH = 142, 210
# The split of each strip, from left to right; a strip is as wide as a crop.
_STRIPS = ("train", "validation", "train", "test", "train")
_PITCH = _TILE_WIDTH // len(_STRIPS)
# From crop to crop down a strip, and how many of them.
_STEP, _CROPS = 4, 26


@dataclasses.dataclass(frozen=True)
class Crop:
  """Where an image is from: `CROP` pixels square, from (top, left)."""

  photograph: str
  label: int
  top: int
  left: int


def class_names() -> list[str]:
  """Such as "china_0_2": the photograph, and row and column of the tile."""
  return [
    f"{photograph}_{row}_{column}"
    for photograph in PHOTOGRAPHS
    for row in range(_TILES)
    for column in range(_TILES)
  ]


def crops(split: str) -> Iterator[Crop]:
  """Every image of "train", "validation" or "test": 1404, 468 and 468."""
  for label, name in enumerate(class_names()):
    photograph, row, column = name.rsplit("_", 2)
    for strip, owner in enumerate(_STRIPS):
      if owner != split:
        continue
      left = int(column) * _TILE_WIDTH + strip * _PITCH
      for i in range(_CROPS):
        top = int(row) * _TILE_HEIGHT + i * _STEP
        yield Crop(photograph, label, top, left)


class SklearnPhotographs(tfds.core.GeneratorBasedBuilder):
  """2340 crops of two photographs in 18 classes, one for each tile."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(CROP, CROP, 3), encoding_format="png"
          ),
          "label": tfds.features.ClassLabel(names=class_names()),
          "top": np.int64,
          "left": np.int64,
        }
      ),
      homepage="https://scikit-learn.org/stable/datasets/loading_other_datasets.html",
      license="CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    sklearn = optional.require("sklearn.datasets", extra="train")
    photographs = {
      name: sklearn.load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS
    }
    return {
      split: self._generate_examples(photographs, split)
      for split in ("train", "validation", "test")
    }

  def _generate_examples(self, photographs, split):
    for i, crop in enumerate(crops(split)):
      rows = slice(crop.top, crop.top + CROP)
      columns = slice(crop.left, crop.left + CROP)
      pixels = photographs[crop.photograph][rows, columns]
      yield (
        i,
        {
          "image": io.BytesIO(encoding.encode(pixels, "PNG")),
          "label": crop.label,
          "top": crop.top,
          "left": crop.left,
        },
      )
