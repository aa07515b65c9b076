"""ImageNet-V2: 10,000 images collected anew like ImageNet's validation set.

(arXiv:1902.10811.) Three variants, by how often people chose the label; which
of them a number is of must be said with it.
"""

from collections.abc import Iterator
import gzip
import os
import pathlib
import tarfile
from typing import Final
import zlib

import tensorflow_datasets as tfds

from experiments.datasets import imagenet, records

NAME: Final = "imagenet_v2"
# The one that "ImageNet-V2" without more means in papers.
DEFAULT: Final = "matched-frequency"
_URL: Final = "https://huggingface.co/datasets/vaishaal/ImageNetV2"
_ARCHIVES: Final = {
  "matched-frequency": "imagenetv2-matched-frequency.tar.gz",
  "threshold-0.7": "imagenetv2-threshold0.7.tar.gz",
  "topimages": "imagenetv2-top-images.tar.gz",
}
_GET: Final = """\
To get it:
  1. Download {archive} into a folder, from
     {url}
  2. python -m experiments.prepare_imagenet --v2 {variant} --tar_dir FOLDER \
--data_dir {{root}}
If it lies elsewhere: --data_dir FOLDER, or set TFDS_DATA_DIR. The archive's
folders can also be evaluated as they are: --data UNPACKED_FOLDER"""


def examples(
  path: pathlib.Path, progress: imagenet.Progress
) -> Iterator[imagenet.Example]:
  """Reads an archive, whose folders are named by the number of the class.

  Args:
    path: The archive, whole or with fewer images.
    progress: Called with the number of bytes read.

  Yields:
    Examples in the order of the file.

  Raises:
    DataError: The file is truncated or no such archive; names it.
  """
  done = 0
  with open(path, "rb") as file:
    try:
      unpacked = gzip.open(file)
      with tarfile.open(fileobj=unpacked, mode="r|") as tar:
        for member in tar:
          if member.isfile():
            label, name = _parse(path, member.name)
            content = tar.extractfile(member)
            data = content.read() if content is not None else b""
            yield {
              "image": imagenet.fix(data),
              "label": label,
              "file_name": f"{label}/{name}",
            }
            progress(file.tell() - done)
            done = file.tell()
      unpacked.read()  # Padding, and the checksum behind it.
    except (EOFError, gzip.BadGzipFile, tarfile.ReadError, zlib.error) as error:
      raise records.DataError(
        f"{path} is truncated or no archive of ImageNet-V2. Download it again."
      ) from error


def _parse(path: pathlib.Path, member: str) -> tuple[int, str]:
  folder, name = os.path.split(member)
  number = os.path.basename(folder)
  if not number.isdecimal() or int(number) >= 1000:
    raise records.DataError(
      f"{path} holds {member!r}, which is in no folder of a class, 0 to 999."
    )
  return int(number), name


def _source(variant: str) -> imagenet.Source:
  def make_builder(root: str) -> tfds.core.DatasetBuilder:
    return tfds.builder(
      f"{NAME}/{variant}", data_dir=root, file_format="array_record"
    )

  archive = _ARCHIVES[variant]
  return imagenet.Source(
    title=f"ImageNet-V2 ({variant})",
    make_builder=make_builder,
    tars={"test": imagenet.Tar(archive, None, 10_000, examples, _URL)},
    how_to_get=_GET.format(archive=archive, url=_URL, variant=variant),
  )


# By variant, as TFDS names them.
SOURCES: Final = {variant: _source(variant) for variant in _ARCHIVES}
