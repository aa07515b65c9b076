"""The stages of the input pipeline: what happens to records, one by one."""

import dataclasses

import grain
import ml_collections
import numpy as np

from experiments.datasets import records
from experiments.imagenet import augment, transforms
from vimjax import preprocessing, variants

# "index" of the images that fill up the last evaluation batch.
PADDING = -1


class Repeated(grain.MapDataset):
  """Each image several times in a row, augmented anew: repeated augmentation.

  (arXiv:1901.09335, as in DeiT.) An epoch has as many images as without, so it
  sees a share of the data. The copies of an image go to different groups of
  mixup, which would mix it with itself: in the official code, to other GPUs.
  """

  _MUTATES_ELEMENT_SPEC = False

  def __init__(
    self, parent: grain.MapDataset, config: ml_collections.ConfigDict
  ):
    """Repeats `parent` as `config.data.repeats` says."""
    super().__init__(parent)
    self._repeats = config.data.repeats
    self._batch_size = config.batch_size
    self._groups = config.batch_size // (
      config.mixup.group_size or config.batch_size
    )

  def __len__(self) -> int:
    return len(self._parent)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, position = divmod(index, len(self))
    batch, position = divmod(position, self._batch_size)
    # Copies are neighbours in the order of (place in the group, group).
    group, place = divmod(position, self._batch_size // self._groups)
    drawn = batch * self._batch_size + place * self._groups + group
    return self._parent[epoch * len(self) + drawn // self._repeats]


class TrainSource:
  """Decoded records; the next readable one stands in for an unreadable one."""

  def __init__(self, source: records.Records, tries: int):
    """Reads `source`, looking at up to `tries` records after a bad one."""
    self._records = source
    # So many unreadable records in a row exceed the run's limit anyhow.
    self._tries = min(tries, len(source) - 1)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    for position in range(index, index + self._tries + 1):
      example = _try_decode(self._records, position % len(self))
      if example is not None:
        break
    else:
      example = {"image": np.zeros((1, 1, 3), np.uint8), "label": np.int32(0)}
      position = None
    return example | {
      "index": np.int64(index),
      "corrupt": np.bool_(position != index),
    }


def _try_decode(source: records.Records, index: int) -> dict | None:
  """A record with its image decoded; None if it is unreadable."""
  try:
    return decode(source, index)
  except Exception:
    # Damaged bytes make the libraries raise almost anything; a fault that is
    # not the record's shows as many unreadable records, which stop the run.
    return None


def decode(source: records.Records, index: int) -> dict:
  record = source[index]
  image = transforms.decode(record["image"])
  return {"image": image, "label": np.int32(record["label"])}


@dataclasses.dataclass(frozen=True)
class Augment:
  """The augmentation of one image, in timm's order.

  Attributes are the fields of `config.data` of the same names, parsed.
  """

  size: int
  area: tuple[float, float]
  ratio: tuple[float, float]
  flip: bool
  interpolations: tuple[int, ...]
  randaugment: augment.RandAugment | None
  color_jitter: float
  erase_probability: float
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, element: dict, rng: np.random.Generator) -> dict:
    which = 0
    if len(self.interpolations) > 1:
      which = rng.integers(len(self.interpolations))
    image = transforms.random_resized_crop(
      element["image"],
      rng,
      size=self.size,
      area=self.area,
      ratio=self.ratio,
      enlarge=self.interpolations[which],
    )
    if self.flip:
      image = transforms.random_flip(image, rng)
    if self.randaugment is not None:
      image = self.randaugment(image, rng)
    elif self.color_jitter:
      image = augment.color_jitter(image, self.color_jitter, rng)
    if self.erase_probability:
      image = augment.random_erase(
        image,
        rng,
        probability=self.erase_probability,
        mean=self.mean,
        std=self.std,
      )
    return element | {"image": image}


def make_augment(config: ml_collections.ConfigDict) -> Augment:
  """The augmentation that `config.data` describes."""
  data = config.data
  interpolations = tuple(augment.INTERPOLATIONS.values())
  if data.crop_interpolation != "random":
    interpolations = (augment.INTERPOLATIONS[data.crop_interpolation],)
  randaugment = None
  if data.randaugment:
    randaugment = augment.parse(data.randaugment, interpolations)
  return Augment(
    size=data.image_size,
    area=tuple(data.crop_area),
    ratio=tuple(data.crop_ratio),
    flip=data.flip,
    interpolations=interpolations,
    randaugment=randaugment,
    color_jitter=data.color_jitter,
    erase_probability=data.erase_probability,
    mean=tuple(data.mean),
    std=tuple(data.std),
  )


class EvalSource:
  """Preprocessed records, padded at the end to a multiple of the batch."""

  def __init__(
    self,
    source: records.Records,
    *,
    multiple: int,
    size: int,
    crop_fraction: float,
    crop_mode: variants.CropMode,
  ):
    """Reads `source`; the others are of `preprocessing.resize_and_crop`."""
    self._records = source
    self._length = -(-len(source) // multiple) * multiple
    self._size = size
    self._crop_fraction = crop_fraction
    self._crop_mode: variants.CropMode = crop_mode

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict:
    padding = index >= len(self._records)
    example = None if padding else self._load(index)
    readable = example is not None
    if example is None:
      image = np.zeros((self._size, self._size, 3), np.uint8)
      example = {"image": image, "label": np.int32(0)}
    return example | {
      "index": np.int64(PADDING if padding else index),
      "corrupt": np.bool_(not padding and not readable),
      "mask": np.bool_(readable),
    }

  def _load(self, index: int) -> dict | None:
    try:
      record = self._records[index]
      image = transforms.decode_pillow(record["image"])
    except Exception:  # As in `_try_decode`.
      return None
    image = preprocessing.resize_and_crop(
      image,
      size=self._size,
      crop_fraction=self._crop_fraction,
      crop_mode=self._crop_mode,
    )
    return {"image": np.asarray(image), "label": np.int32(record["label"])}


class HostSlice(grain.MapDataset):
  """One process's contiguous part of every global batch.

  (grain's own slicing, `ds[i::n]`, would deal the images out in turn, which
  does not agree with how a global array lies on the devices.)
  """

  _MUTATES_ELEMENT_SPEC = False

  def __init__(
    self, parent: grain.MapDataset, batch_size: int, index: int, count: int
  ):
    """Takes part `index` of `count` of every `batch_size` elements."""
    super().__init__(parent)
    if batch_size % count:
      raise ValueError(
        f"A batch of {batch_size} does not divide among {count} processes."
      )
    self.local_batch_size = batch_size // count
    self._batch_size = batch_size
    self._first = index * self.local_batch_size

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self.local_batch_size

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, offset = divmod(index, self.local_batch_size)
    return self._parent[batch * self._batch_size + self._first + offset]
