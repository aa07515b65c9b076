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
from experiments.imagenet import stages, transforms

Batch = dict[str, np.ndarray]

# Batches kept ready: by each worker process, or by all threads together beyond
# those they work on.
_BUFFERED = 2
_MAX_THREADS = 16


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
  source = stages.TrainSource(split.records, tries=config.data.max_corrupt + 1)
  dataset = grain.MapDataset.source(source).seed(config.seed).shuffle()
  if config.data.repeats > 1:
    dataset = stages.Repeated(dataset, config)
  dataset = dataset[: steps * config.batch_size].repeat()
  # Augmentation comes before slicing: its seed is the global position.
  dataset = dataset.random_map(stages.make_augment(config))
  dataset = stages.HostSlice(dataset, config.batch_size, index, count)
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
  source = stages.EvalSource(
    _open(config, split).records,
    multiple=config.eval_batch_size,
    size=config.data.image_size,
    crop_fraction=config.data.crop_fraction,
    crop_mode=config.data.crop_mode,
  )
  dataset = grain.MapDataset.source(source)
  dataset = stages.HostSlice(dataset, config.eval_batch_size, index, count)
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
    stages.decode(_open(config, split).records, index)
  except Exception as error:  # As in `stages.TrainSource`.
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
