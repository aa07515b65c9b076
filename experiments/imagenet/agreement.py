"""What the processes of a run decide together.

A process that goes its own way leaves the others waiting in the next collective
operation. So whatever can differ between them (a signal, an unreadable image, a
file, an error) is exchanged before anything depends on it. With one process
every function here is free.
"""

import collections
from collections.abc import Callable
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from experiments.datasets import records
from experiments.imagenet import corrupt as corrupt_lib
from experiments.imagenet import errors, interrupts, sharding

# Steps that may be under way before a vote of an earlier one is counted: the
# votes travel with the steps, and nobody waits for them.
_LAG = 2
# Texts are exchanged in multiples of so many bytes, to compile few programs.
_BLOCK = 1024


def gather(value: Any) -> list[Any]:
  """The values of all processes, in their order.

  Args:
    value: Anything that JSON can hold; with several processes its tuples come
      back as lists.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  with jax.transfer_guard("allow"):
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(-(-sizes.max() // _BLOCK) * _BLOCK, np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def together[T](work: Callable[[], T]) -> T:
  """Returns what `work` does in this process, if it succeeds in all.

  Raises:
    errors.OtherProcessError: It failed in another one.
    Exception: What `work` raised here.
  """
  if jax.process_count() == 1:
    return work()
  result, failure = None, None
  try:
    result = work()
  except (errors.RunError, records.DataError, OSError) as error:
    failure = error
  said = None
  if failure is not None:
    said = (errors.exit_code(failure), str(failure))
  answers = gather(said)
  if failure is not None:
    raise failure
  for i, answer in enumerate(answers):
    if answer is not None:
      raise errors.OtherProcessError(i, *answer)
  return result  # pyrefly: ignore[bad-return]


def on_first[T](work: Callable[[], T]) -> T:
  """Returns to every process what `work` returns in the first; as `gather`."""
  first = not jax.process_index()
  result = together(lambda: work() if first else None)
  return gather(result)[0]


def check_equal(values: dict[str, Any]) -> None:
  """Raises ConfigError, with the names, if processes have other values."""
  everyone = gather(values)
  for i, others in enumerate(everyone):
    differing = [k for k in values if others.get(k) != everyone[0].get(k)]
    if differing:
      listed = "; ".join(
        f"{k}: {everyone[0].get(k)!r} in process 0, {others.get(k)!r} in "
        f"process {i}"
        for k in differing
      )
      raise errors.ConfigError(
        f"The processes of this run were not started alike ({listed})."
      )


class Poll:
  """Signals and unreadable images that any process met, known to all."""

  def __init__(self, mesh: jax.sharding.Mesh, interrupt: interrupts.Interrupt):
    """Starts without votes.

    Args:
      mesh: From `sharding.make_mesh`.
      interrupt: Of this process.
    """
    self._stop = ""
    self._interrupt = interrupt
    self._pending: collections.deque[jax.Array] = collections.deque()
    self._placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._most = jax.jit(
      lambda x: x.max(0), out_shardings=sharding.replicated(mesh)
    )

  @property
  def stop(self) -> str:
    """The signal that all processes stop for; "" while there is none."""
    if jax.process_count() == 1:
      return self._interrupt.received
    return self._stop

  def take(self, corrupt: corrupt_lib.Corrupt) -> None:
    """Votes; all processes call it once per batch.

    Args:
      corrupt: What this process has met.

    Raises:
      errors.CorruptDataError: In all processes, when there are too many.
    """
    signals = ("", *(s.name for s in interrupts.SIGNALS))
    vote = [signals.index(self._interrupt.received), corrupt.has_new]
    if jax.process_count() == 1:
      self._count(np.array(vote), corrupt)
      return
    votes = np.tile(np.array(vote, np.int32), (jax.local_device_count(), 1))
    shape = (jax.device_count(), len(vote))
    cast = sharding.from_local(votes, self._placement, shape)
    self._pending.append(self._most(cast))
    if len(self._pending) > _LAG:
      self._count(jax.device_get(self._pending.popleft()), corrupt)

  def drain(self, corrupt: corrupt_lib.Corrupt) -> None:
    """Counts what is left; errors as in `take`."""
    while self._pending:
      self._count(jax.device_get(self._pending.popleft()), corrupt)

  def _count(self, votes: np.ndarray, corrupt: corrupt_lib.Corrupt) -> None:
    signal, new = votes.tolist()
    if signal:
      self._stop = interrupts.SIGNALS[signal - 1].name
    if new:
      for seen in gather(corrupt.by_split()):
        corrupt.add(seen)
      corrupt.check()
