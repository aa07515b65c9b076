"""Counting unreadable images."""

from collections.abc import Mapping

import numpy as np

from experiments.imagenet import errors


class Corrupt:
  """Counts unreadable images, each record once, and stops at the limit."""

  def __init__(self, limit: int, seen: Mapping[str, list[int]]):
    """Continues a count.

    Args:
      limit: How many different records may be unreadable.
      seen: Record ids by split, from `checkpoints.Record`.
    """
    self._limit = limit
    self._seen = {split: set(ids) for split, ids in seen.items()}

  def see(self, split: str, batch: Mapping[str, np.ndarray]) -> None:
    """Takes note of a batch; raises CorruptDataError beyond the limit."""
    ids = batch["index"][batch["corrupt"]]
    if not len(ids):
      return
    self._seen.setdefault(split, set()).update(ids.tolist())
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
