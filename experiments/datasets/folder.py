"""A user's own images: a folder with a subfolder for each class.

Either the folder has parts, or its images are divided here:

    DIR/train/CLASS/...  DIR/val/CLASS/...  DIR/test/CLASS/...
    DIR/CLASS/...

It has parts if there is a "train" or "training" and either another part or
nothing else: "train" beside "car" and "bus" is a class. Of a folder without
parts, and of a training part without a validation part, one image in ten is
held out for validation. Names that start with a dot, and what macOS adds to
archives, do not count.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import os
import pathlib
from typing import Final

from experiments.datasets import records

_SUFFIXES: Final = frozenset(
  (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
)
# What a part is called on disk, in small or capital letters.
_PARTS: Final = {
  "train": "train",
  "training": "train",
  "validation": "validation",
  "val": "validation",
  "valid": "validation",
  "test": "test",
  "testing": "test",
}
# Without a validation part, one image in so many is for validation.
_HELD_OUT: Final = 10

_File = tuple[str, int]


class FolderRecords:
  """Reads the files of a split; a position is an id as long as none is added.

  Can be pickled for worker processes.
  """

  def __init__(self, files: Sequence[_File]):
    """Takes paths and their labels."""
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int, /) -> records.Record:
    path, label = self._files[index]
    return {"image": pathlib.Path(path).read_bytes(), "label": label}


def splits(folder: str | None) -> tuple[str, ...]:
  """The names of a folder's splits.

  Args:
    folder: The folder.

  Returns:
    "train" and "validation", with parts "test" if it is one of them, and
    without parts "all".

  Raises:
    MissingDataError: There is no such folder.
    DataError: It has a part, but none for training; or one of them twice.
  """
  return _names(_parts(_root(folder)))


def _names(parts: Mapping[str, pathlib.Path]) -> tuple[str, ...]:
  names = ("train", "validation")
  if not parts:
    return (*names, "all")
  return (*names, "test") if "test" in parts else names


def open_split(split: str, folder: str | None) -> records.Split:
  """Opens a split of a folder.

  Labels are the positions of the classes' names, sorted: by number where all
  are numbers (as in ImageNet-V2's archives), else as text. What is held out
  depends on the names of the files: about one in ten, the same whatever else
  the folder holds, but at least one in all, and not all.

  Args:
    split: One of `splits(folder)`.
    folder: The folder.

  Returns:
    The split.

  Raises:
    MissingDataError: There is no such folder, or no image in it.
    DataError: A class has no image; a part has classes that the training part
      has not; there is no part for training, or one of them twice; there is one
      image, and none could be held out; or, for "train", there is one class.
      Errors of the validation part are raised for "train", too.
    ValueError: There is no such split.
    OSError: A folder cannot be read.
  """
  root = _root(folder)
  parts = _parts(root)
  known = _names(parts)
  if split not in known:
    raise records.unknown_name(f"split of {root}", split, known)
  base = parts.get("train", root)
  names = _classes(base)
  files = _files(base, names)
  _check_classes(base, names, files, two=split == "train")
  # A run hears what is wrong with its validation part before its first epoch.
  other = "validation" if split == "train" else split
  if other in parts:
    others = _files(parts[other], names)
    files = files if split == "train" else others
  elif split != "all":
    held_out = _held_out(files, base)
    files = [f for f in files if (f in held_out) == (split == "validation")]
  return records.Split(FolderRecords(files), tuple(names))


def _root(folder: str | None) -> pathlib.Path:
  if not folder:
    raise records.MissingDataError(
      "Name the folder with your images: --config.data.folder=DIR, with a "
      "subfolder for each class."
    )
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise records.MissingDataError(f"There is no folder {root}.")
  return root


def _visible(name: str) -> bool:
  return not name.startswith(".") and name != "__MACOSX"


def _subfolders(folder: pathlib.Path) -> list[str]:
  return sorted(
    p.name for p in folder.iterdir() if _visible(p.name) and p.is_dir()
  )


def _parts(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """The parts of a folder; none, if its subfolders are classes."""
  names = _subfolders(root)
  found = [name for name in names if name.lower() in _PARTS]
  kinds = [_PARTS[name.lower()] for name in found]
  only_parts = len(found) == len(names)
  if "train" not in kinds:
    if not found or not only_parts:
      return {}
    raise records.DataError(
      f"{root} has {_listed(found)}, but no 'train', whose subfolders are the "
      "classes. Add it, or name the folder with the classes itself: "
      f"{root / found[0]}."
    )
  if len(set(kinds)) == 1 and not only_parts:
    return {}
  if len(set(kinds)) < len(kinds):
    raise records.DataError(
      f"{root} has {_listed(found)}, two of which are for the same; leave one."
    )
  return {kind: root / name for kind, name in zip(kinds, found, strict=True)}


def _classes(folder: pathlib.Path) -> list[str]:
  names = _subfolders(folder)
  if names and all(name.isdecimal() for name in names):
    return sorted(names, key=int)
  return names


def _check_classes(
  folder: pathlib.Path,
  names: Sequence[str],
  files: Sequence[_File],
  *,
  two: bool,
) -> None:
  """Raises DataError if a class is empty, or there are not `two`."""
  empty = sorted(set(range(len(names))) - {label for _, label in files})
  if empty:
    raise records.DataError(
      f"{folder} has subfolders without an image: "
      f"{_listed([names[label] for label in empty])}. Each subfolder is a "
      "class: add images or remove it."
    )
  if two and len(names) < 2:
    raise records.DataError(
      f"{folder} has one class, {names[0]!r}, and training needs two: a "
      "subfolder with images for each."
    )


def _listed(names: Sequence[str]) -> str:
  """The first names, in quotes."""
  more = f" and {len(names) - 10} more" if len(names) > 10 else ""
  return ", ".join(map(repr, names[:10])) + more


def _files(folder: pathlib.Path, classes: Sequence[str]) -> list[_File]:
  """Images with their labels, in an order that the file system cannot change.

  Raises:
    MissingDataError: There is none.
    DataError: There is a subfolder that is no class of the training part.
  """
  unknown = sorted(set(_classes(folder)) - set(classes))
  if unknown:
    raise records.DataError(
      f"{folder} has classes without training images: {_listed(unknown)}."
    )
  found = [
    (path, label)
    for label, name in enumerate(classes)
    for path in _images(folder / name)
  ]
  if not found:
    raise records.MissingDataError(
      f"There is no image in {folder}. It needs a subfolder for each class, "
      f"with files ending in {', '.join(sorted(_SUFFIXES))}."
    )
  return found


def _images(folder: pathlib.Path) -> Iterator[str]:
  for base, folders, files in os.walk(folder, onerror=_unless_missing):
    folders[:] = sorted(filter(_visible, folders))
    for file in sorted(filter(_visible, files)):
      if pathlib.Path(file).suffix.lower() in _SUFFIXES:
        yield os.path.join(base, file)


def _unless_missing(error: OSError) -> None:
  """A part need not have all classes; one that cannot be read is an error."""
  if not isinstance(error, FileNotFoundError):
    raise error


def _held_out(files: Sequence[_File], folder: pathlib.Path) -> set[_File]:
  """Those for validation.

  Raises:
    DataError: There is one image, which cannot be for both.
  """
  if len(files) < 2:
    raise records.DataError(
      f"{folder} has one image; to train on it and validate needs two or more."
    )
  digests = {file: _digest(file[0], folder) for file in files}
  ranked = sorted(files, key=digests.__getitem__)
  chosen = [f for f in ranked if digests[f][0] % _HELD_OUT == 0]
  return set((chosen or ranked[:1])[: len(files) - 1])


def _digest(path: str, folder: pathlib.Path) -> bytes:
  """Of a file's name, which need not be valid text."""
  name = pathlib.Path(path).relative_to(folder).as_posix()
  return hashlib.sha256(os.fsencode(name)).digest()
