"""Batches of images for training and evaluation, from any data set.

Training batch k depends on `config` and k alone: not on the step a run was
resumed at, nor on the number of worker processes, nor on the number of hosts,
each of which loads its contiguous slice of the global batch. So a resumed run
simply starts its stream at the step it stopped at.

Epochs line up with steps: an epoch is `num_examples // batch_size` steps, sees
each image at most once in an order of its own, and leaves out the
`num_examples % batch_size` images at the end of that order (others each time).
With repeated augmentation it sees fewer images, each `config.data.repeats`
times.

An unreadable image never raises here. The training stream puts the next
readable record in its place and the evaluation stream masks it; both set
"corrupt" and keep the unreadable record's own id in "index". Counting the
distinct ids and stopping at `config.data.max_corrupt` is up to the caller, to
whom `why_unreadable` gives the reason.
"""

from collections.abc import Iterator
import dataclasses
import multiprocessing
import os
import signal
import threading

from absl import flags
import grain
import jax
import ml_collections
import numpy as np

from experiments.datasets import records, registry
from experiments.imagenet import augment, transforms
from vimjax import preprocessing, variants

Batch = dict[str, np.ndarray]

# Batches kept ready: by each worker process, or by all threads together beyond
# those they work on.
_BUFFERED = 2
_MAX_THREADS = 16
# "index" of the images that fill up the last evaluation batch.
PADDING = -1


def train_batches(
  config: ml_collections.ConfigDict,
  *,
  start_step: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[Batch]:
  """The endless stream of augmented training batches.

  Args:
    config: The run's configuration (`configs._base`).
    start_step: Step whose batch comes first.
    process_index: Which slice of the global batch; None means this process's.
    process_count: Number of slices; None means that of the running program.

  Returns:
    An iterator over dicts of arrays for b = batch_size / process_count images
    of side s: "image" uint8 (b, s, s, 3), "label" int32 (b,), "index" int64
    (b,), the id of the record drawn, and "corrupt" bool (b,), whether that
    record was unreadable and another one stands in its place. Where it has a
    `close`, that ends its threads and processes at once.

  Raises:
    ValueError: The batch is larger than the data set, or does not divide
      among the processes; or there is no such data set or split.
    records.DataError: The data is missing or damaged; says what to do.
    OSError: The data cannot be written where it should be prepared.
  """
  index, count = _process(process_index, process_count)
  split = _open(config, config.data.train_split)
  steps = _steps_per_epoch(config, len(split.records))
  source = _TrainSource(split.records, tries=config.data.max_corrupt + 1)
  dataset = grain.MapDataset.source(source).seed(config.seed).shuffle()
  if config.data.repeats > 1:
    dataset = _Repeated(dataset, config)
  dataset = dataset[: steps * config.batch_size].repeat()
  # Augmentation comes before slicing: its seed is the global position.
  dataset = dataset.random_map(_augment(config))
  dataset = _HostSlice(dataset, config.batch_size, index, count)
  dataset = dataset.batch(dataset.local_batch_size, drop_remainder=True)
  return _iterate(dataset[start_step:], config.data.workers)


def eval_batches(
  config: ml_collections.ConfigDict,
  split: str,
  *,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[Batch]:
  """Every image of a split once, in order, the last batch padded.

  Args:
    config: The run's configuration.
    split: A split expression of `config.data.name`.
    process_index: As in `train_batches`.
    process_count: As in `train_batches`.

  Returns:
    An iterator over ceil(num_examples / eval_batch_size) dicts as in
    `train_batches`, images preprocessed as `vimjax.preprocessing` does, with
    "mask" bool (b,): False for padding (whose "index" is -1) and for
    unreadable images, which must not count.

  Raises:
    ValueError: As in `train_batches`.
    records.DataError: As in `train_batches`.
  """
  index, count = _process(process_index, process_count)
  source = _EvalSource(
    _open(config, split).records,
    multiple=config.eval_batch_size,
    size=config.data.image_size,
    crop_fraction=config.data.crop_fraction,
    crop_mode=config.data.crop_mode,
  )
  dataset = grain.MapDataset.source(source)
  dataset = _HostSlice(dataset, config.eval_batch_size, index, count)
  dataset = dataset.batch(dataset.local_batch_size, drop_remainder=True)
  return _iterate(dataset, config.data.workers)


def steps_per_epoch(config: ml_collections.ConfigDict) -> int:
  """Training steps in an epoch: whole batches in the training split.

  Args:
    config: The run's configuration.

  Returns:
    `num_examples // batch_size`, at least 1.

  Raises:
    ValueError: The batch is larger than the training split.
    records.DataError: As in `train_batches`.
  """
  return _steps_per_epoch(config, num_examples(config, config.data.train_split))


def num_examples(config: ml_collections.ConfigDict, split: str) -> int:
  """Number of records in a split; errors as in `eval_batches`."""
  return len(_open(config, split).records)


def class_names(
  config: ml_collections.ConfigDict, split: str | None = None
) -> list[str] | None:
  """Name of each label, or None; errors as in `train_batches`.

  Args:
    config: The run's configuration.
    split: Of which split; None means the training split.
  """
  names = _open(config, split or config.data.train_split).class_names
  return None if names is None else list(names)


def why_unreadable(
  config: ml_collections.ConfigDict, split: str, index: int
) -> str | None:
  """Says what is wrong with a record that a batch flagged as corrupt.

  Args:
    config: The run's configuration.
    split: The split that the batch came from.
    index: The record's id.

  Returns:
    The error that reading it gives, in a line; None if it can be read.
  """
  try:
    _decode(_open(config, split).records, index)
  except Exception as error:  # As in `_try_decode`.
    return f"{type(error).__name__}: {error}".partition("\n")[0]
  return None


def _open(config: ml_collections.ConfigDict, split: str) -> records.Split:
  data = config.data
  where = data.folder if data.name == "folder" else data.dir
  return registry.open_split(data.name, split, where)


def _steps_per_epoch(config: ml_collections.ConfigDict, count: int) -> int:
  if config.batch_size > count:
    raise ValueError(
      f"{config.batch_size=} is larger than the training data: "
      f"{config.data.name!r} ({config.data.train_split}) has {count} images."
    )
  return count // config.batch_size


def _process(index: int | None, count: int | None) -> tuple[int, int]:
  """Fills in which process this is, and of how many."""
  if index is None or count is None:
    return jax.process_index(), jax.process_count()
  return index, count


def _augment(config: ml_collections.ConfigDict) -> "_Augment":
  data = config.data
  interpolations = tuple(augment.INTERPOLATIONS.values())
  if data.crop_interpolation != "random":
    interpolations = (augment.INTERPOLATIONS[data.crop_interpolation],)
  randaugment = None
  if data.randaugment:
    randaugment = augment.parse(data.randaugment, interpolations)
  return _Augment(
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


class _Repeated(grain.MapDataset):
  """Each image several times in a row, augmented anew: repeated augmentation.

  (arXiv:1901.09335, as in DeiT.) An epoch has as many images as without, so it
  sees a share of the data. The copies of an image go to different groups of
  mixup, which would mix it with itself: in the official code, to other GPUs.
  """

  _MUTATES_ELEMENT_SPEC = False

  def __init__(
    self, parent: grain.MapDataset, config: ml_collections.ConfigDict
  ):
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


class _TrainSource:
  """Decoded records; the next readable one stands in for an unreadable one."""

  def __init__(self, source: records.Records, tries: int):
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
    return _decode(source, index)
  except Exception:
    # Damaged bytes make the libraries raise almost anything; a fault that is
    # not the record's shows as many unreadable records, which stop the run.
    return None


def _decode(source: records.Records, index: int) -> dict:
  record = source[index]
  image = transforms.decode(record["image"])
  return {"image": image, "label": np.int32(record["label"])}


@dataclasses.dataclass(frozen=True)
class _Augment:
  """The augmentation of one image, in timm's order."""

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


class _EvalSource:
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


class _HostSlice(grain.MapDataset):
  """One process's contiguous part of every global batch.

  (grain's own slicing, `ds[i::n]`, would deal the images out in turn, which
  does not agree with how a global array lies on the devices.)
  """

  _MUTATES_ELEMENT_SPEC = False

  def __init__(
    self, parent: grain.MapDataset, batch_size: int, index: int, count: int
  ):
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


def _iterate(dataset: grain.MapDataset, workers: int) -> Iterator[Batch]:
  """Loads ahead, in threads of this process or in worker processes.

  Batches are the elements here, so that workers share them out whole and
  their number cannot change what is in a batch.
  """
  if workers < 0:
    raise ValueError(f"config.data.workers must not be negative: {workers}")
  if workers:
    if not flags.FLAGS.is_parsed():
      # grain reads its own flags, which fails where absl's main did not run.
      flags.FLAGS.mark_as_parsed()
    # A worker's own thread would only add switching; it buffers by itself.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    processes = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=_BUFFERED
    )
    loader = dataset.to_iter_dataset(read).mp_prefetch(
      processes, worker_init_fn=_start_worker
    )
  else:
    transforms.one_thread()
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    read = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=threads + _BUFFERED
    )
    loader = dataset.to_iter_dataset(read)
  return iter(loader)


def _start_worker(index: int, count: int) -> None:
  """Makes a worker process live exactly as long as its run."""
  del index, count
  transforms.one_thread()
  # Signals often go to the whole group (Ctrl-C, job schedulers). What they mean
  # is for the main process to decide, which still needs batches to get to the
  # end of its step; grain stops its workers by other means.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  # After `kill -9` of the main process nobody would stop them.
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
