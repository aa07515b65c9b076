"""Where the numbers of a run go: metrics.jsonl, TensorBoard, the terminal."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from vimjax import optional


class Writer:
  """Writes lines of numbers to metrics.jsonl and TensorBoard.

  A line has `step`, `split` and the numbers; (step, split) is unique, also
  after a run was killed and went back to an earlier checkpoint. Every line is
  on disk when `write` returns, and a full disk raises OSError there: a writer
  in the background would lose lines and say nothing.
  """

  def __init__(
    self, folder: pathlib.Path, *, start_step: int, tensorboard: bool
  ):
    """Opens the files, dropping lines from beyond the restored step.

    Args:
      folder: The run's folder.
      start_step: The step that the run starts from or goes back to.
      tensorboard: Whether to write TensorBoard's files too.
    """
    # Only one process writes; the others compute the same numbers.
    self._file = None
    self._events = None
    self._kept: set[tuple[int, str]] = set()
    if jax.process_index():
      return
    path = folder / "metrics.jsonl"
    kept = [line for line in read(folder) if line["step"] <= start_step]
    self._kept = {(line["step"], line["split"]) for line in kept}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)
    self._file = open(path, "a", buffering=1)
    if tensorboard:
      self._events = _Events(folder / "tensorboard", start_step)

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Appends one line, unless the file has it from before a restart.

    Args:
      step: Steps taken.
      split: "train" or "valid".
      values: Name to number.
    """
    # An evaluation that a killed run had done but not saved is done again.
    if self._file is not None and (step, split) not in self._kept:
      line = {"step": step, "split": split, **values}
      self._file.write(json.dumps(line) + "\n")
    if self._events is not None:
      self._events.write(
        step, {f"{split}/{name}": value for name, value in values.items()}
      )

  def close(self) -> None:
    """Closes the files."""
    for file in (self._file, self._events):
      if file is not None:
        file.close()


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, without a last one cut off by a crash."""
  try:
    text = (folder / "metrics.jsonl").read_text()
  except FileNotFoundError:
    return []
  complete = text[: text.rfind("\n") + 1]
  return [json.loads(line) for line in complete.splitlines()]


class _Events:
  """TensorBoard's event file, written at once.

  tensorboardX's own SummaryWriter hands events to a thread over a bounded
  queue; when the disk is full the thread dies and the queue blocks for ever.
  """

  def __init__(self, folder: pathlib.Path, start_step: int):
    self._summary = optional.require("tensorboardX.summary", extra="train")
    self._event = optional.require(
      "tensorboardX.proto.event_pb2", extra="train"
    )
    writer = optional.require("tensorboardX.event_file_writer", extra="train")
    folder.mkdir(exist_ok=True)
    # The names that tensorboardX gives differ only from second to second.
    self._writer = writer.EventsWriter(
      str(folder / "events"), f".{time.time_ns()}"
    )
    if start_step:
      # Hides what a killed run wrote beyond this step.
      self._add(
        start_step + 1,
        session_log=self._event.SessionLog(
          status=self._event.SessionLog.SessionStatus.Value("START")
        ),
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._add(step, summary=self._summary.scalar(name, value))
    self._writer.flush()

  def _add(self, step: int, **content: Any) -> None:
    event = self._event.Event(step=step, wall_time=time.time(), **content)
    self._writer.write_event(event)

  def close(self) -> None:
    self._writer.close()


def say(text: str) -> None:
  """Prints a line for the person at the terminal, from one process only."""
  if not jax.process_index():
    print(text, flush=True)


class Progress:
  """A progress bar on a terminal, and plain lines anywhere else.

  Attributes:
    images_per_second: Of training, between the last two updates.
  """

  def __init__(
    self, *, step: int, total: int, batch_size: int, progress_bar: bool
  ):
    """Starts the clock.

    Args:
      step: The step that the run starts from.
      total: Steps of the whole run.
      batch_size: Images per step.
      progress_bar: False for plain lines on a terminal too.
    """
    self.images_per_second = 0.0
    self._total = total
    self._batch_size = batch_size
    self._step = step
    self._trained = 0
    self._seconds = 0.0
    self._clock = time.monotonic()
    self._bar = None
    if progress_bar and sys.stderr.isatty() and not jax.process_index():
      tqdm = optional.require("tqdm", extra="train")
      self._bar = tqdm.tqdm(
        total=total, initial=step, unit="step", dynamic_ncols=True
      )

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows where training is.

    Args:
      step: Steps taken.
      values: `loss` and `accuracy` of the latest steps.
    """
    now = time.monotonic()
    seconds = max(now - self._clock, 1e-9)
    trained = step - self._step
    self._clock, self._step = now, step
    self._trained += trained
    self._seconds += seconds
    self.images_per_second = trained * self._batch_size / seconds
    shown = (
      f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.4f}  "
      f"{self.images_per_second:,.0f} images/s"
    )
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update(trained)
      return
    left = (self._total - step) * self._seconds / max(self._trained, 1)
    say(f"step {step}/{self._total}  {shown}  {_duration(left)} left")

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time in the block out (evaluation, saving)."""
    start = time.monotonic()
    yield
    self._clock += time.monotonic() - start

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is None:
      say(text)
    else:
      self._bar.write(text)

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
