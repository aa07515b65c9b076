"""Writes large TFDS data sets as array_record files, without TensorFlow.

TFDS's own writer needs TensorFlow as soon as a split exceeds a gigabyte, when
it spills to disk to shuffle. Here each example goes at once to a shard chosen
by a hash of its key: one pass, no extra space, and every shard (so every slice
like "train[:10%]") is a random sample. Within a shard the order of the input
is kept.
"""

from collections.abc import Iterable
import hashlib
import os
import pathlib

from array_record.python import array_record_module
import tensorflow_datasets as tfds

# grain reads single records. JPEGs do not compress: storing them as they are
# halves the time of writing.
_OPTIONS = "group_size:1,uncompressed"


def write_split(
  builder: tfds.core.DatasetBuilder,
  directory: pathlib.Path,
  split: str,
  examples: Iterable[tuple[str, dict]],
  *,
  num_shards: int,
) -> tfds.core.SplitInfo:
  """Writes the files of one split.

  Args:
    builder: Gives the data set's name and features.
    directory: Existing folder that the files are written to.
    split: Name of the split.
    examples: Pairs of a key, unique in the split, and the example. Which shard
      an example goes to depends on its key alone.
    num_shards: Number of files. All are open at once, and each takes up to
      5 MB of memory.

  Returns:
    What `write_info` needs to know about the split.

  Raises:
    OSError: A file could not be written, as when the disk is full.
  """
  template = tfds.core.ShardedFileTemplate(
    data_dir=tfds.core.Path(directory),
    dataset_name=builder.name,
    split=split,
    filetype_suffix="array_record",
  )
  paths = [
    os.fspath(template.sharded_filepath(shard_index=i, num_shards=num_shards))
    for i in range(num_shards)
  ]
  lengths = [0] * num_shards
  num_bytes = 0
  writers = [array_record_module.ArrayRecordWriter(p, _OPTIONS) for p in paths]
  try:
    for key, example in examples:
      data = builder.info.features.serialize_example(example)
      shard = _hash(key) % num_shards
      _write(writers[shard], data)
      lengths[shard] += 1
      num_bytes += len(data)
  finally:
    _close(writers)
  return tfds.core.SplitInfo(
    name=split,
    shard_lengths=lengths,
    num_bytes=num_bytes,
    filename_template=template,
  )


def write_info(
  builder: tfds.core.DatasetBuilder,
  directory: pathlib.Path,
  splits: Iterable[tfds.core.SplitInfo],
) -> None:
  """Writes the metadata that makes TFDS take `directory` for a data set."""
  builder.info.set_splits(tfds.core.SplitDict(splits))
  builder.info.write_to_directory(directory)


def _hash(key: str) -> int:
  """The same on every machine, unlike Python's own."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def _write(writer, data: bytes) -> None:
  try:
    writer.write(data)
  except RuntimeError as error:  # The binding's form of an OSError.
    raise OSError(str(error)) from error


def _close(writers) -> None:
  """Closes all writers, then raises the first error, if any."""
  errors = []
  for writer in writers:
    try:
      writer.close()
    except RuntimeError as error:
      errors.append(error)
  if errors:
    raise OSError(str(errors[0])) from errors[0]
