"""Opens data sets that lie on disk as TFDS array_record files, without
TensorFlow, and turns TFDS's misleading errors into clear ones."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import sys
import tempfile

from array_record.python import array_record_module
import tensorflow_datasets as tfds

from experiments.datasets import records

_NO_DECODING = {"image": tfds.decode.SkipDecoding()}
# Shards are opened once to check them; the threads hide a network's delay.
_CHECK_THREADS = 16

BuilderFn = Callable[[str], tfds.core.DatasetBuilder]


def data_root(data_dir: str | None) -> pathlib.Path:
  """The TFDS folder: `data_dir`, else $TFDS_DATA_DIR, else the usual one."""
  root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(root).expanduser()


class _TfdsRecords:
  """A TFDS source as `Records`: encoded image bytes and a Python int."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int, /) -> records.Record:
    example = self._source[index]
    return {"image": example["image"], "label": int(example["label"])}


def open_split(
  make_builder: BuilderFn,
  split: str,
  data_dir: str | None,
  *,
  how_to_get: str | None = None,
) -> records.Split:
  """Opens one split of a TFDS data set for random access.

  Args:
    make_builder: Makes the builder, given the TFDS folder.
    split: A TFDS split expression, such as "train" or "train[:10%]".
    data_dir: TFDS folder; None as in `data_root`.
    how_to_get: Instructions for a data set that the user must prepare, with
      {root} for the TFDS folder; None prepares a missing one here and now.

  Returns:
    The split.

  Raises:
    MissingDataError: It is not there, and `how_to_get` was given.
    DataError: It is there but incomplete or damaged.
    OSError: It cannot be written, as when the disk is full; names the folder.
    ValueError: There is no such split, or it is empty.
  """
  root = data_root(data_dir)
  builder = builder_at(make_builder, root)
  if not is_prepared(builder):
    if how_to_get is not None:
      raise records.MissingDataError(_missing(builder, root, how_to_get))
    prepare(builder)
    builder = builder_at(make_builder, root)
  _check_split(builder, split)
  _check_shards(builder, split)
  source = builder.as_data_source(split=split, decoders=_NO_DECODING)
  names = builder.info.features["label"].names
  return records.Split(_TfdsRecords(source), tuple(names))


def builder_at(
  make_builder: BuilderFn, root: pathlib.Path
) -> tfds.core.DatasetBuilder:
  """Makes a builder; raises DataError where its folder cannot be read."""
  try:
    return make_builder(str(root))
  except Exception as error:
    # TFDS reads the folder here: JSON, protobuf and format errors, none of
    # which names the folder.
    raise records.DataError(
      f"The data set in {root} cannot be opened: {error}\n"
      "Only array_record files can be read. Prepare it in another folder "
      "(--config.data.dir), or, if this one is damaged, delete it and prepare "
      "it again."
    ) from error


def _missing(builder, root: pathlib.Path, how_to_get: str) -> str:
  lines = [
    f"The data set {builder.name!r} is not on this machine.",
    f"Looked for: {builder.data_dir} (TFDS array_record files)",
  ]
  parent = pathlib.Path(builder.data_dir).parent
  if others := sorted(p.name for p in parent.glob("*/")):
    lines.append(f"There is only: {', '.join(others)} in {parent}")
  lines.append(how_to_get.format(root=root))
  return "\n".join(lines)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether the data set's metadata, which is written last, is there."""
  # The builder's own method logs a warning when it is not.
  folder = pathlib.Path(builder.data_dir)
  return all(
    (folder / name).exists() for name in ("dataset_info.json", "features.json")
  )


def prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Writes a small data set into its folder, unless another process did.

  TFDS writes into a temporary folder and renames it when complete, so an
  interruption leaves no half set; the lock makes a second process wait.

  Args:
    builder: Makes its data without asking the user for anything.

  Raises:
    OSError: The folder cannot be written, or the disk is full; names it.
  """
  folder = pathlib.Path(builder.data_dir)
  with locked(folder):
    if is_prepared(builder):
      return
    # A folder without metadata would pass for data that is there already.
    shutil.rmtree(folder, ignore_errors=True)
    with (
      tempfile.TemporaryDirectory() as downloads,
      # TFDS announces itself on stdout, which belongs to the results.
      contextlib.redirect_stdout(io.StringIO()),
    ):
      tfds.disable_progress_bar()
      try:
        builder.download_and_prepare(
          download_dir=downloads, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
      except RuntimeError as error:  # array_record's form of an OSError.
        raise OSError(str(error)) from error


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a data set's folder, which need not exist.

  Args:
    folder: The folder of a version, `root/name/version`.

  Yields:
    Nothing; the lock is held inside the `with` block, and waited for before.

  Raises:
    OSError: What went wrong with a file, inside the block too; names `folder`.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        print(f"Waiting: another process prepares {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
      # The system releases it when the process ends, however it ends.
      yield
  except OSError as error:
    raise OSError(
      f"Cannot write the data set into {folder}: {error}. Look at free space "
      "and permissions, or choose another folder (--config.data.dir)."
    ) from error


def _check_split(builder: tfds.core.DatasetBuilder, split: str) -> None:
  try:
    count = builder.info.splits[split].num_examples
  except (ValueError, KeyError) as error:
    raise records.unknown_name(
      f"split of {builder.name}", split, builder.info.splits
    ) from error
  if not count:
    raise ValueError(f"The split {split!r} of {builder.name} is empty.")


def _check_shards(builder: tfds.core.DatasetBuilder, split: str) -> None:
  """Raises `DataError` unless every file of the split is whole."""
  shards = {
    str(instruction.filename): instruction.examples_in_shard
    for instruction in builder.info.splits[split].file_instructions
  }
  with futures.ThreadPoolExecutor(_CHECK_THREADS) as pool:
    faults = [f for f in pool.map(_fault, shards, shards.values()) if f]
  if faults:
    shown = "\n".join(f"  {fault}" for fault in faults[:5])
    raise records.DataError(
      f"{len(faults)} of {len(shards)} files of {builder.name} ({split}) are "
      f"missing or damaged:\n{shown}\n"
      f"Copy them again, or delete {builder.data_dir} and prepare it again."
    )


def _fault(filename: str, num_examples: int) -> str | None:
  """What is wrong with a shard; None if nothing is."""
  if not os.path.exists(filename):
    return f"{filename}: missing"
  try:
    reader = array_record_module.ArrayRecordReader(filename)
    found = reader.num_records()
    reader.close()
  except Exception as error:  # Its binding raises what absl::Status maps to.
    return f"{filename}: {error}"
  if found != num_examples:
    return f"{filename}: {found} records instead of {num_examples}"
  return None
