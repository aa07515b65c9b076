"""Generated JPEGs shaped like ImageNet's: the data of smoke runs and tests."""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import encoding

_NUM_CLASSES = 10
_NUM_IMAGES = {"train": 320, "validation": 80, "test": 80}


def make_image(label: int, rng: np.random.Generator) -> np.ndarray:
  """Coloured stripes whose direction and hue tell the label, with noise.

  Args:
    label: Class, 0 to 9.
    rng: Draws the size, phase, stripe width and noise.

  Returns:
    uint8 (h, w, 3); the sides are 48 to 160 pixels.
  """
  h, w = rng.integers(48, 161, size=2)
  y, x = np.mgrid[:h, :w]
  angle = np.pi * label / _NUM_CLASSES
  width = rng.uniform(8, 16)
  phase = rng.uniform(0, 2 * np.pi)
  along = x * np.cos(angle) + y * np.sin(angle)
  stripes = np.sin(2 * np.pi * along / width + phase)
  hue = 2 * np.pi * label / _NUM_CLASSES
  colour = np.cos(hue + 2 * np.pi * np.arange(3) / 3)
  image = 128 + 50 * stripes[..., None] + 50 * colour
  image = image + rng.normal(0, 15, size=(h, w, 3))
  return np.clip(image, 0, 255).astype(np.uint8)


class VimjaxGenerated(tfds.core.GeneratorBasedBuilder):
  """480 striped JPEGs in ten classes, the same bytes on every preparation."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(num_classes=_NUM_CLASSES),
          "file_name": tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(split) for split in _NUM_IMAGES}

  def _generate_examples(self, split):
    stream = list(_NUM_IMAGES).index(split)
    for i in range(_NUM_IMAGES[split]):
      label = i % _NUM_CLASSES
      image = make_image(label, np.random.default_rng((stream, i)))
      name = f"{split}_{i:05d}.JPEG"
      jpeg = encoding.encode(image, "JPEG", quality=90)
      record = {"image": jpeg, "label": label, "file_name": name}
      yield name, record
