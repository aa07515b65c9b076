"""The numbers of training steps: read late, averaged, and watched."""

import collections
from collections.abc import Mapping

from absl import logging
import jax
import numpy as np

from experiments.imagenet import corrupt as corrupt_lib
from experiments.imagenet import errors, metrics, steps
from experiments.imagenet import run as run_lib

# Steps that may be under way before the numbers of an earlier one are read:
# enough to keep the device busy, few enough to stop soon after a bad step.
_STEPS_IN_FLIGHT = 2


class Window:
  """Reads the numbers of the steps late, and logs their means.

  A mean is over the steps since the line before it, or since the start of
  this process.
  """

  def __init__(
    self,
    run: run_lib.Run,
    writer: metrics.Writer,
    progress: metrics.Progress,
    corrupt: corrupt_lib.Corrupt,
  ):
    """Starts without numbers.

    Args:
      run: From `run.prepare`.
      writer: Gets a line every `config.log.every_steps`.
      progress: Shows the same numbers.
      corrupt: Its count goes into the lines.
    """
    self._run = run
    self._writer = writer
    self._progress = progress
    self._corrupt = corrupt
    self._pending: collections.deque[tuple[int, steps.Metrics]]
    self._pending = collections.deque()
    self._values: list[dict[str, float]] = []
    # Steps that were not finite: in a row, and since the last line.
    self._in_a_row = 0
    self._skipped = 0

  def add(self, step: int, values: steps.Metrics) -> None:
    """Takes the numbers of a step, which may still be under way."""
    self._pending.append((step, values))
    while len(self._pending) > _STEPS_IN_FLIGHT:
      self._read(*self._pending.popleft())

  def drain(self) -> None:
    """Reads what is left; raises NonFiniteError, as `add` may."""
    while self._pending:
      self._read(*self._pending.popleft())

  def _read(self, step: int, values: steps.Metrics) -> None:
    numbers = {k: v.item() for k, v in jax.device_get(values).items()}
    if numbers.pop("finite"):
      self._in_a_row = 0
      self._values.append(numbers)
    else:
      self._skip(step, numbers)
    plan, every = self._run.plan, self._run.config.log.every_steps
    if step % every and step != plan.total_steps:
      return
    self._run.checkpoints.check()
    if not self._values:
      return
    means = {
      k: float(np.mean([v[k] for v in self._values])) for k in self._values[0]
    }
    means["lr"] = numbers["lr"]
    self._values.clear()
    speed = self._progress.update(step, means)
    self._writer.write(
      step,
      "train",
      {
        "epoch": step / plan.steps_per_epoch,
        **means,
        **speed,
        "corrupt": self._corrupt.count,
        "skipped": self._skipped,
      },
    )
    self._skipped = 0

  def _skip(self, step: int, numbers: Mapping[str, float]) -> None:
    """Takes note of a step that was not finite, or ends the run."""
    self._in_a_row += 1
    self._skipped += 1
    config = self._run.config
    if config.non_finite != "skip" or self._in_a_row > config.max_skipped_steps:
      raise non_finite(self._run, step, numbers)
    logging.warning("Skipped step %d, which is not finite: %s", step, numbers)


def non_finite(
  run: run_lib.Run, step: int, numbers: Mapping[str, float]
) -> errors.NonFiniteError:
  """The error of a run whose numbers stopped being finite at `step`."""
  shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
  saved = run.checkpoints.saved_steps()
  return errors.NonFiniteError(
    f"Step {step} is not finite ({shown}). Nothing was saved after "
    f"{f'step {saved[0]}' if saved else 'the start'}. A lower "
    "config.optimizer.peak_lr, a longer config.optimizer.warmup_epochs or "
    "config.optimizer.clip_norm=1.0 may help."
  )
