"""Saving and restoring a run with Orbax.

A run keeps its newest checkpoints and the one with the best validation
accuracy, each in `checkpoints/STEP`. What `Checkpoints.restore` does:

1. It tries the steps from the newest to the oldest, and takes the first that
   is sound: readable, of the expected shapes, and with the checksums that were
   saved beside it. (Orbax itself returns changed bytes without a complaint.)
2. Each step that it passes over is named in a warning, with the reason.
   Nothing is deleted: once a sound step is found, the newer, damaged ones are
   moved to `checkpoints_damaged`, where they are not in the way of saving the
   same steps again.
3. If there are steps but none is sound, it raises and moves nothing. Only a
   run without any checkpoint starts from the beginning.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import gc
import json
import logging as python_logging
import pathlib
import sys
import time
from typing import Any
import zlib

from absl import logging
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32
import orbax.checkpoint as ocp

from experiments.imagenet import agreement, distributed, errors
from experiments.imagenet import state as state_lib


@dataclasses.dataclass
class Record:
  """What a run remembers beside its arrays.

  Attributes:
    step: Steps taken.
    evaluated_step: The last step that was evaluated on the validation split.
    best_step: The step with the best validation accuracy so far.
    best_accuracy: That accuracy, 0 to 1.
    best_loss: The validation loss there, which decides between equals.
    corrupt: Ids of the unreadable records met so far, sorted, by split.
    examples: How many records each split has.
    initial: Where the weights that the run started from are from, and their
      licence; see `initial.load`. None: it started from nothing.
  """

  step: int = 0
  evaluated_step: int | None = None
  best_step: int | None = None
  best_accuracy: float = 0.0
  best_loss: float = 0.0
  corrupt: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  examples: dict[str, int] = dataclasses.field(default_factory=dict)
  initial: dict[str, Any] | None = None


@jax.jit
def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """Sum of the bits, each word times an odd number of its own (mod 2**32).

  Any change of a single word changes the sum. It is computed where the array
  lies, in integers, so it does not depend on how the array is sharded.
  """
  word = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint8
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  index = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(bits.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index * jnp.uint32(size) + iota
  return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def checksums(state: state_lib.State, record: Record) -> dict[str, int]:
  """One number per part of a checkpoint; equal exactly if the bits are."""
  sums = {"record": zlib.crc32(_dumps(record).encode())}
  for field in dataclasses.fields(state):
    leaves = jax.tree.leaves(getattr(state, field.name))
    total = 0
    for value in jax.device_get([_checksum(x) for x in leaves]):
      # Not a plain sum: two exchanged arrays must be noticed as well.
      total = (total * 31 + int(value)) % 2**32
    sums[field.name] = total
  return sums


def _dumps(record: Record) -> str:
  return json.dumps(dataclasses.asdict(record), sort_keys=True)


class _Keep:
  """Orbax preservation policy: the newest `keep` steps and the best one."""

  def __init__(self, keep: int):
    self.keep = keep
    self.best_step: int | None = None

  def should_preserve(
    self,
    checkpoints: Sequence[Any],
    *,
    context: Any,
  ) -> Sequence[bool]:
    del context
    newest = [info.step for info in checkpoints][-self.keep :]
    return [
      info.step in newest or info.step == self.best_step for info in checkpoints
    ]


class Checkpoints:
  """The checkpoints of one run; saves in the background.

  Use it as a context manager: leaving it waits for the last save.

  Attributes:
    folder: Where the step folders are.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int):
    """Opens `workdir`/checkpoints, creating nothing yet.

    Args:
      workdir: The run's folder.
      keep: How many of the newest checkpoints to keep, at least 1.
    """
    self.folder = workdir / "checkpoints"
    self._damaged = workdir / "checkpoints_damaged"
    self._policy = _Keep(keep)
    self._manager: ocp.CheckpointManager | None = None
    self._saved_step: int | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    if self._manager is None or distributed.lost_peer(error):
      return
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    except Exception as write_error:
      # The first error is the one to report; Orbax repeats it on closing.
      if error is None:
        raise self._write_error() from write_error

  def saved_steps(self) -> list[int]:
    """The steps that have a folder, sound or not, newest first."""
    if not self.folder.is_dir():
      return []
    names = [p.name for p in self.folder.iterdir() if p.is_dir()]
    return sorted((int(n) for n in names if n.isdecimal()), reverse=True)

  def restore(
    self, shapes: state_lib.State
  ) -> tuple[state_lib.State, Record] | None:
    """Restores the newest sound checkpoint, as the module's docstring says.

    Args:
      shapes: From `state.state_shapes`.

    Returns:
      The state and its record, or None if there is no checkpoint at all.

    Raises:
      errors.CheckpointError: There are checkpoints, and none is sound.
    """
    damaged = {}
    for step in agreement.gather(self.saved_steps())[0]:
      restored = self.restore_step(step, shapes)
      if isinstance(restored, str):
        damaged[step] = restored
        logging.warning("Skipped checkpoint %d: %s", step, restored)
        continue
      state, record = restored
      self._set_aside(damaged)
      self._policy.best_step = record.best_step
      self._saved_step = step
      return state, record
    if damaged:
      listed = "; ".join(f"step {k}: {v}" for k, v in damaged.items())
      raise errors.CheckpointError(
        f"None of the checkpoints in {self.folder} can be read ({listed}). "
        "Nothing was changed. Repair them, or choose another --workdir to "
        "start from the beginning."
      )
    return None

  def restore_step(
    self, step: int, shapes: state_lib.State
  ) -> tuple[state_lib.State, Record] | str:
    """Restores one checkpoint, if it is what was saved.

    Args:
      step: Which one.
      shapes: From `state.state_shapes`.

    Returns:
      The state and its record; or the reason why the checkpoint is not sound.
    """
    out, reason = None, None
    with _quiet():
      try:
        out = self._read(step, shapes)
      except Exception as error:  # Orbax has many kinds for damaged files.
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
      if out is None:
        # What is left of the failed reads must go before the silence ends.
        time.sleep(0.5)
        gc.collect()
    reasons = [x for x in agreement.gather(reason) if x is not None]
    if reasons or out is None:
      return reasons[0]
    state, record, wanted = out
    found = checksums(state, record)
    wrong = [name for name in found if found[name] != wanted.get(name)]
    if wrong or record.step != step:
      return f"its content was changed since it was saved ({', '.join(wrong)})"
    return state, record

  def _read(
    self, step: int, shapes: state_lib.State
  ) -> tuple[state_lib.State, Record, dict[str, int]]:
    """This process's part of the arrays, the record, and the checksums."""
    # Alone, so that a process that cannot read keeps no other one waiting.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    reader = ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      ),
      multiprocessing_options=alone,
    )
    with reader:
      out = reader.restore(
        self.folder / str(step),
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(shapes),
          meta=ocp.args.JsonRestore(),
        ),
      )
    meta = out["meta"]
    return out["state"], Record(**meta["record"]), meta["checksums"]

  def save(self, state: state_lib.State, record: Record) -> None:
    """Starts saving; returns once the arrays are copied off the devices.

    Args:
      state: Finite; the caller checks.
      record: Its `step` names the checkpoint, its `best_step` is kept.

    Raises:
      errors.WriteError: This or the previous checkpoint cannot be written.
    """
    if record.step == self._saved_step:
      return
    meta = {
      "record": dataclasses.asdict(record),
      "checksums": checksums(state, record),
    }
    self._policy.best_step = record.best_step
    try:
      saved = self._open().save(
        record.step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
        force=True,
      )
    except Exception as error:
      raise self._write_error() from error
    if not saved:
      raise self._write_error()
    self._saved_step = record.step

  def check(self) -> None:
    """Raises WriteError if a save in the background has failed."""
    if self._manager is not None:
      try:
        self._manager.check_for_errors()
      except Exception as error:
        raise self._write_error() from error

  def wait(self) -> None:
    """Waits until everything is on disk; raises WriteError like `check`."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        raise self._write_error() from error

  def _open(self) -> ocp.CheckpointManager:
    # Late, because Orbax counts every folder it finds now as a checkpoint.
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self.folder,
        item_names=("state", "meta"),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._policy, cleanup_tmp_directories=True
        ),
      )
    return self._manager

  def _write_error(self) -> errors.WriteError:
    return errors.WriteError(
      f"Could not write a checkpoint to {self.folder}; is the disk full? "
      "Earlier checkpoints are untouched: make room and run the same command "
      "again."
    )

  def _set_aside(self, damaged: dict[int, str]) -> None:
    if not damaged or jax.process_index():
      return
    self._damaged.mkdir(exist_ok=True)
    for step in damaged:
      target = self._damaged / str(step)
      n = 1
      while target.exists():
        n += 1
        target = self._damaged / f"{step}_{n}"
      (self.folder / str(step)).rename(target)
      logging.warning("Moved damaged checkpoint %d to %s", step, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Leaves the error that Orbax raises, without the pages that follow it.

  At the first array that it cannot read, Orbax closes its event loop under the
  reads of all others, each of which then complains to asyncio's log and to
  `sys.unraisablehook`.
  """
  log = python_logging.getLogger("asyncio")
  level, hook = log.level, sys.unraisablehook
  log.setLevel(python_logging.CRITICAL + 1)
  sys.unraisablehook = lambda info: logging.debug(
    "while restoring: %s", info.exc_value
  )
  try:
    yield
  finally:
    log.setLevel(level)
    sys.unraisablehook = hook
