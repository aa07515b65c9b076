"""Handwritten digits, 8x8, from the files inside the scikit-learn package."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import encoding
from vimjax import optional

# Every fifth image in package order is a test image; of the rest, every eighth
# of each class is a validation image. Neighbours in package order are by the
# same writer, so all three parts see all writers.
_TEST_STRIDE = 5
_VALIDATION_STRIDE = 8


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
  """Positions (in package order) of each split's images, ascending.

  Args:
    labels: The labels in package order, integers, shape (n,).

  Returns:
    "test": index % 5 == 0. "validation": of the others, per class, the first
    and then every eighth. "train": what is left.
  """
  index = np.arange(len(labels))
  test = index % _TEST_STRIDE == 0
  validation = np.zeros_like(test)
  for label in np.unique(labels):
    members = index[~test & (labels == label)]
    validation[members[::_VALIDATION_STRIDE]] = True
  return {
    "train": index[~test & ~validation],
    "validation": index[validation],
    "test": index[test],
  }


def _png(image: np.ndarray) -> bytes:
  """Encodes intensities 0 to 16 as a gray PNG with values 0 to 255."""
  gray = np.round(image * (255 / 16)).astype(np.uint8)
  return encoding.encode(gray, "PNG")


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """1797 digits by 43 writers: 1254 train, 183 validation, 360 test."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(num_classes=10),
          # Position in package order: records are shuffled when written.
          "package_index": np.int64,
        }
      ),
      homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    sklearn = optional.require("sklearn.datasets", extra="train")
    digits = sklearn.load_digits()
    return {
      split: self._generate_examples(digits.images, digits.target, indices)
      for split, indices in split_indices(digits.target).items()
    }

  def _generate_examples(self, images, labels, indices):
    for index in indices.tolist():
      yield (
        index,
        {
          "image": io.BytesIO(_png(images[index])),
          "label": int(labels[index]),
          "package_index": index,
        },
      )
