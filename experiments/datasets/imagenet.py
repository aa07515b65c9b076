"""ImageNet-2012: the official TFDS data set, and how to read the tar files."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import io
import os
import pathlib
import re
import tarfile
from typing import Final, TypedDict

from PIL import Image
import tensorflow_datasets as tfds

from experiments.datasets import records

_GET: Final = """\
To get it:
  1. Register at https://image-net.org/download-images and download
     ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into one folder.
  2. python -m experiments.prepare_imagenet --tar_dir FOLDER --data_dir {root}
If it lies elsewhere: --config.data.dir=FOLDER, or set TFDS_DATA_DIR.
To train without ImageNet: `make demo`, which runs
  python -m experiments.imagenet --config digits --workdir DIR"""

# Two zero blocks end every tar file.
_END_OF_TAR = bytes(1024)
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

Progress = Callable[[int], object]


class Example(TypedDict):
  """A record of TFDS's imagenet2012 and imagenet_v2.

  Attributes:
    label: WordNet id, or number of the class.
  """

  image: bytes
  label: str | int
  file_name: str


@dataclasses.dataclass(frozen=True)
class Tar:
  """One of the official tar files.

  Attributes:
    name: File name.
    num_bytes: Its size; None where it is not known.
    num_images: How many images it holds.
    examples: Reads them from a path, reporting bytes done to a callback.
    url: Where to get it.
  """

  name: str
  num_bytes: int | None
  num_images: int
  examples: Callable[[pathlib.Path, Progress], Iterator[Example]]
  url: str


@dataclasses.dataclass(frozen=True)
class Source:
  """A TFDS data set and the official files that it is made of.

  Attributes:
    title: What to call it.
    make_builder: Makes TFDS's own builder, given the TFDS folder.
    tars: By split.
    how_to_get: Instructions, with {root} for the TFDS folder.
  """

  title: str
  make_builder: Callable[[str], tfds.core.DatasetBuilder]
  tars: Mapping[str, Tar]
  how_to_get: str


def make_builder(root: str) -> tfds.core.DatasetBuilder:
  """TFDS's own ImageNet-2012 builder, for array_record files under `root`."""
  return tfds.builder("imagenet2012", data_dir=root, file_format="array_record")


def wordnet_ids() -> list[str]:
  """The WordNet id of each class, by label."""
  return _lines("labels.txt")


def train_examples(path: pathlib.Path, progress: Progress) -> Iterator[Example]:
  """Reads the training tar, which holds one tar of images per class.

  Args:
    path: ILSVRC2012_img_train.tar, whole or with fewer classes or images.
    progress: Called with the number of bytes after each class.

  Yields:
    Examples in the order of the file.

  Raises:
    DataError: The file is truncated or no such tar; names it.
  """
  classes = set(wordnet_ids())
  for name, data in _members(path):
    label = name.removesuffix(".tar")
    if label not in classes:
      raise records.DataError(
        f"{path} holds {name!r}, which is none of ImageNet-2012's 1000 classes."
      )
    inner = io.BytesIO(data)
    for file_name, image in _tar_members(inner, f"{name} inside {path}"):
      yield {"image": fix(image), "label": label, "file_name": file_name}
    progress(len(data))


def validation_examples(
  path: pathlib.Path, progress: Progress
) -> Iterator[Example]:
  """Reads the validation tar; labels come from a list inside TFDS.

  Args:
    path: ILSVRC2012_img_val.tar, whole or with fewer images.
    progress: Called with the number of bytes after each image.

  Yields:
    Examples in the order of the file.

  Raises:
    DataError: The file is truncated or no such tar; names it.
  """
  labels = _lines("validation_labels.txt")
  for name, data in _members(path):
    match = _VALIDATION_NAME.fullmatch(name)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(labels):
      raise records.DataError(
        f"{path} holds {name!r}, which is no ImageNet-2012 validation image."
      )
    yield {"image": fix(data), "label": labels[number - 1], "file_name": name}
    progress(len(data))


_URL = "https://image-net.org/download-images"
SOURCE: Final = Source(
  title="ImageNet-2012",
  make_builder=make_builder,
  tars={
    "train": Tar(
      "ILSVRC2012_img_train.tar",
      147_897_477_120,
      1_281_167,
      train_examples,
      _URL,
    ),
    "validation": Tar(
      "ILSVRC2012_img_val.tar",
      6_744_924_160,
      50_000,
      validation_examples,
      _URL,
    ),
  },
  how_to_get=_GET,
)


def fix(data: bytes) -> bytes:
  """Makes an RGB JPEG of the one PNG and the CMYK JPEGs of the training set.

  Args:
    data: A file from the tar.

  Returns:
    `data` unless it is a PNG or in CMYK. What Pillow does not recognise is
    left as it is: training counts and skips unreadable images.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.format == "JPEG" and image.mode != "CMYK":
        return data
      file = io.BytesIO()
      image.convert("RGB").save(file, "JPEG", quality=100)
      return file.getvalue()
  except OSError:
    return data


def check_tar(tar: Tar, path: pathlib.Path, *, whole: bool) -> None:
  """Refuses a tar file that is missing or not whole.

  Args:
    tar: What it should be.
    path: The file.
    whole: Whether it must have the official size.

  Raises:
    MissingDataError: It is not there; says where to get it.
    DataError: It has another size, or lacks the end of a tar file.
  """
  if not path.is_file():
    raise records.MissingDataError(
      f"There is no {path.name} in {path.parent.absolute()}. Get it at "
      f"{tar.url} and put it there."
    )
  found = path.stat().st_size
  if whole and tar.num_bytes is not None and found != tar.num_bytes:
    raise records.DataError(
      f"{path} has {found:,} bytes; the official file has {tar.num_bytes:,}. "
      "Finish the download, or pass --subset if fewer images are intended."
    )
  if path.suffix != ".tar":
    return  # Compressed: its end shows when it is read.
  with open(path, "rb") as file:
    file.seek(max(0, found - len(_END_OF_TAR)))
    if file.read() != _END_OF_TAR:
      raise _truncated(str(path))


def _members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  with open(path, "rb") as file:
    yield from _tar_members(file, str(path))


def _tar_members(file, where: str) -> Iterator[tuple[str, bytes]]:
  """Base name and content of each file in an open tar file."""
  try:
    with tarfile.open(fileobj=file, mode="r:") as tar:
      for member in tar:
        content = tar.extractfile(member)
        if content is not None:  # None for folders.
          yield os.path.basename(member.name), content.read()
      # tarfile takes a broken header for the end, silently.
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of file marker")
  except tarfile.ReadError as error:
    raise _truncated(where) from error


def _truncated(where: str) -> records.DataError:
  return records.DataError(
    f"{where} is truncated or no tar file. Download it again."
  )


def _lines(name: str) -> list[str]:
  """Lines of a text file of TFDS's imagenet2012."""
  path = tfds.core.tfds_path(f"datasets/imagenet2012/{name}")
  return path.read_text().split()
