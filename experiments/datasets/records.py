"""What every data set gives to the input pipeline, and how it fails."""

from collections.abc import Iterable
import dataclasses
import difflib
from typing import Protocol, TypedDict


class Record(TypedDict):
  """One example as it lies on disk.

  Attributes:
    image: An encoded file (JPEG, PNG, ...).
    label: Class number, counted from 0.
  """

  image: bytes
  label: int


class Records(Protocol):
  """Random access to the records of a split; can be pickled for workers."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Split:
  """An opened split.

  Attributes:
    records: Its examples; a record's position is its id.
    class_names: Name of each label; None where the data set has no names.
  """

  records: Records
  class_names: tuple[str, ...] | None


class DataError(RuntimeError):
  """The data on disk cannot be used; the message says what to do."""


class MissingDataError(DataError):
  """The data set is not on this machine; the message says how to get it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
  """A `ValueError` that names the nearest right name and all the others."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return ValueError(f"Unknown {kind} {name!r}.{hint} Choose from {known}.")
