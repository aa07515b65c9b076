"""Counting unreadable images."""

from collections.abc import Mapping

import numpy as np

from experiments.imagenet import errors


class Corrupt:
  """Counts unreadable images, each record once, and stops at the limit.

  Attributes:
    has_new: Whether any were seen since the last `check`.
  """

  def __init__(self, limit: int, seen: Mapping[str, list[int]]):
    """Continues a count.

    Args:
      limit: How many different records may be unreadable.
      seen: Record ids by split, from `checkpoints.Record`.
    """
    self._limit = limit
    self._seen = {split: set(ids) for split, ids in seen.items()}
    self.has_new = False

  def see(self, split: str, batch: Mapping[str, np.ndarray]) -> None:
    """Takes note of a batch; `check` is for when all processes know of it."""
    ids = batch["index"][batch["corrupt"]]
    known = self._seen.setdefault(split, set()) if len(ids) else set()
    self.has_new |= not known.issuperset(ids.tolist())
    known.update(ids.tolist())

  def add(self, seen: Mapping[str, list[int]]) -> None:
    """Adds what another process has met, from its `by_split`."""
    for split, ids in seen.items():
      self._seen.setdefault(split, set()).update(ids)

  def check(self) -> None:
    """Raises CorruptDataError beyond the limit; nothing is new afterwards."""
    self.has_new = False
    if self.count > self._limit:
      raise errors.CorruptDataError(
        f"{self.count} images are unreadable, more than "
        f"config.data.max_corrupt={self._limit} ({self.describe()}). Repair "
        "the data, or raise the limit."
      )

  @property
  def count(self) -> int:
    """Different records, over all splits."""
    return sum(len(ids) for ids in self._seen.values())

  def by_split(self) -> dict[str, list[int]]:
    """Record ids by split, sorted."""
    return {split: sorted(ids) for split, ids in sorted(self._seen.items())}

  def describe(self) -> str:
    """The counts by split, with the first record ids of each."""
    return "; ".join(
      f"{split}: {len(ids)}, records {', '.join(map(str, ids[:5]))}"
      + (", ..." if len(ids) > 5 else "")
      for split, ids in self.by_split().items()
    )
