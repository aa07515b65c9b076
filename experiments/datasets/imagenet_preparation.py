"""Writes ImageNet as TFDS data sets, from the official tar files."""

from collections.abc import Iterator, Mapping
import pathlib
import shutil

import tensorflow_datasets as tfds
import tqdm

from experiments.datasets import imagenet, records, shard_writer, tfds_records

# About half a gigabyte each; all are open at once while writing.
_SHARD_BYTES = 580_000_000


def prepare(
  tar_dir: pathlib.Path,
  data_dir: str | None = None,
  *,
  source: imagenet.Source = imagenet.SOURCE,
  subset: bool = False,
) -> pathlib.Path:
  """Writes the data set, unless it is there already.

  Args:
    tar_dir: Folder of the tar files.
    data_dir: TFDS folder to write to; None means $TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    source: Which data set.
    subset: Accept tar files with fewer images than the official ones.

  Returns:
    The folder with the data, such as `data_dir/imagenet2012/<version>`.

  Raises:
    MissingDataError: A tar file is not there.
    DataError: A tar file is truncated or is something else, or there is other
      data where this one belongs.
    OSError: The disk is too small, or the folder cannot be written.
  """
  root = tfds_records.data_root(data_dir)
  builder = tfds_records.builder_at(source.make_builder, root)
  target = pathlib.Path(builder.data_dir)
  if tfds_records.is_prepared(builder):
    return target
  for tar in source.tars.values():
    imagenet.check_tar(tar, tar_dir / tar.name, whole=not subset)
  with tfds_records.locked(target):
    if tfds_records.is_prepared(builder):
      return target  # By a process that held the lock until now.
    # Under the lock, what is left here is from an interrupted preparation.
    partial = target.parent / f"incomplete.vimjax_{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
      _write(builder, source.tars, tar_dir, partial, subset=subset)
      partial.rename(target)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  return target


def _write(
  builder: tfds.core.DatasetBuilder,
  tars: Mapping[str, imagenet.Tar],
  tar_dir: pathlib.Path,
  directory: pathlib.Path,
  *,
  subset: bool,
) -> None:
  """Writes all splits and the metadata into an empty folder."""
  paths = {s: tar_dir / tar.name for s, tar in tars.items()}
  sizes = {s: path.stat().st_size for s, path in paths.items()}
  free = shutil.disk_usage(directory).free
  if free < sum(sizes.values()):
    raise OSError(
      f"it takes {sum(sizes.values()) / 1e9:.1f} GB, and only "
      f"{free / 1e9:.1f} GB are free"
    )
  splits = []
  for split, tar in tars.items():
    info = shard_writer.write_split(
      builder,
      directory,
      split,
      _examples(split, tar, paths[split], sizes[split]),
      num_shards=1 + sizes[split] // _SHARD_BYTES,
    )
    if not subset and info.num_examples != tar.num_images:
      raise records.DataError(
        f"{paths[split]} holds {info.num_examples:,} images instead of "
        f"{tar.num_images:,}. Download it again, or pass --subset."
      )
    splits.append(info)
  shard_writer.write_info(builder, directory, splits)


def _examples(
  split: str, tar: imagenet.Tar, path: pathlib.Path, size: int
) -> Iterator[tuple[str, dict]]:
  """Keys and examples of a tar file, with a progress bar."""
  with tqdm.tqdm(
    desc=split, total=size, unit="B", unit_scale=True, mininterval=1.0
  ) as bar:
    for example in tar.examples(path, bar.update):
      yield example["file_name"], dict(example)
    bar.update(size - bar.n)  # Headers and padding.
