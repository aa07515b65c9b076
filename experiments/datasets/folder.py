"""A user's own images: a folder with a subfolder for each class.

Either the folder has one part per split, or its images are divided here:

    DIR/train/CLASS/...  DIR/val/CLASS/...  (and perhaps DIR/test/CLASS/...)
    DIR/CLASS/...
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
from typing import Final

from experiments.datasets import records

_SUFFIXES: Final = frozenset(
  (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
)
# What a split is called on disk; the first is ours.
_PARTS: Final = {
  "train": ("train", "training"),
  "validation": ("validation", "val", "valid"),
  "test": ("test",),
}
# Without parts, one image in so many is for validation.
_HELD_OUT: Final = 10


class FolderRecords:
  """Reads the files of a split; a position is an id as long as none is added.

  Can be pickled for worker processes.
  """

  def __init__(self, files: Sequence[tuple[str, int]]):
    """Takes paths and their labels."""
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int, /) -> records.Record:
    path, label = self._files[index]
    return {"image": pathlib.Path(path).read_bytes(), "label": label}


def open_split(split: str, folder: str | None) -> records.Split:
  """Opens a split of a folder.

  Labels are the positions of the classes' names, sorted: by number where all
  are numbers (as in ImageNet-V2's archives), else as text. A folder without
  parts is divided by the names of its files: of ten images about one is for
  validation, the same whatever else the folder holds.

  Args:
    split: "train", "validation", "test", or "all" for a folder without parts.
    folder: The folder.

  Returns:
    The split.

  Raises:
    MissingDataError: There is no such folder, or no image in it.
    ValueError: There is no such split.
  """
  if not folder:
    raise records.MissingDataError(
      "Name the folder with your images: --config.data.folder=DIR, with a "
      "subfolder for each class."
    )
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise records.MissingDataError(f"There is no folder {root}.")
  parts = {
    name: root / there
    for name, possible in _PARTS.items()
    for there in reversed(possible)
    if (root / there).is_dir()
  }
  if "train" in parts and "validation" in parts:
    if split not in parts:
      raise records.unknown_name(f"split of {root}", split, parts)
    names = _classes(parts["train"])
    files = _files(parts[split], names)
  else:
    known = ("train", "validation", "all")
    if split not in known:
      raise records.unknown_name(f"split of {root}", split, known)
    names = _classes(root)
    files = _files(root, names)
    if split != "all":
      wanted = split == "validation"
      files = [f for f in files if _is_held_out(f[0], root) == wanted]
  if not files:
    raise records.MissingDataError(
      f"There is no image for {split!r} in {root}. It needs a subfolder for "
      f"each class, with files ending in {', '.join(sorted(_SUFFIXES))}."
    )
  return records.Split(FolderRecords(files), tuple(names))


def _classes(folder: pathlib.Path) -> list[str]:
  names = [p.name for p in folder.iterdir() if p.is_dir()]
  names = [name for name in names if not name.startswith(".")]
  if names and all(name.isdecimal() for name in names):
    return sorted(names, key=int)
  return sorted(names)


def _files(
  folder: pathlib.Path, classes: Sequence[str]
) -> list[tuple[str, int]]:
  """Images with their labels, in an order that the file system cannot change.

  Raises:
    ValueError: There is a subfolder that is no class of the training part.
  """
  unknown = sorted(set(_classes(folder)) - set(classes))
  if unknown:
    raise ValueError(
      f"{folder} has classes without training images: {unknown[:10]}."
    )
  found = []
  for label, name in enumerate(classes):
    for base, folders, files in os.walk(folder / name):
      folders.sort()
      found += [
        (os.path.join(base, file), label)
        for file in sorted(files)
        if pathlib.Path(file).suffix.lower() in _SUFFIXES
      ]
  return found


def _is_held_out(path: str, root: pathlib.Path) -> bool:
  name = pathlib.Path(path).relative_to(root).as_posix()
  return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT == 0
