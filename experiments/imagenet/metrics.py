"""Where the numbers of a run go: metrics.jsonl, TensorBoard, the terminal.

(And Weights & Biases, see `wandb_log.py`.)
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from experiments.imagenet import memory, wandb_log
from vimjax import optional

# Training images shown, in a square.
_SHOWN = 16


class Writer:
  """Writes lines of numbers to metrics.jsonl, TensorBoard and others.

  A line has `step`, `split` and the numbers; (step, split) is unique, also
  after a run was killed and went back to an earlier checkpoint. Every line is
  on disk when `write` returns, and a full disk raises OSError there: a writer
  in the background would lose lines and say nothing.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    start_step: int,
    tensorboard: bool,
    wandb: wandb_log.WandbLog | None = None,
  ):
    """Opens the files, dropping lines from beyond the restored step.

    Args:
      folder: The run's folder.
      start_step: The step that the run starts from or goes back to.
      tensorboard: Whether to write TensorBoard's files too.
      wandb: Gets the same; closed with this.
    """
    # Only one process writes; the others compute the same numbers.
    self._file = None
    self._events = None
    self._wandb = wandb
    self._kept: set[tuple[int, str]] = set()
    if jax.process_index():
      return
    path = folder / "metrics.jsonl"
    kept = [line for line in read(folder) if line["step"] <= start_step]
    self._kept = {(line["step"], line["split"]) for line in kept}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
      file.writelines(json.dumps(line) + "\n" for line in kept)
      file.flush()
      # Else a crash of the machine may leave the new name without the lines.
      os.fsync(file.fileno())
    os.replace(temporary, path)
    self._file = open(path, "a", buffering=1)
    if tensorboard:
      self._events = _Events(folder / "tensorboard", start_step)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    self.close(failed=kind is not None)

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Appends one line, unless the file has it from before a restart.

    Args:
      step: Steps taken.
      split: "train" or "valid".
      values: Name to number.
    """
    named = {f"{split}/{name}": value for name, value in values.items()}
    # An evaluation that a killed run had done but not saved is done again.
    if self._file is not None and (step, split) not in self._kept:
      line = {"step": step, "split": split, **values}
      self._file.write(json.dumps(line) + "\n")
      if self._wandb is not None:
        self._wandb.write(step, named)
    if self._events is not None:
      self._events.write(step, named)

  def text(self, step: int, name: str, text: str) -> None:
    """Shows a text, as it is, in TensorBoard."""
    if self._events is not None:
      self._events.text(step, name, text)

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """Shows images where images can be shown.

    Args:
      step: Steps taken.
      name: What they are.
      images: uint8 (b, h, w, 3); the first 16 are shown.
    """
    if self._events is None and self._wandb is None:
      return
    pixels = _grid(images[:_SHOWN])
    if self._events is not None:
      self._events.image(step, name, pixels)
    if self._wandb is not None:
      self._wandb.image(step, name, pixels)

  def close(self, *, failed: bool = False) -> None:
    """Closes the files; `failed` is what others are told of the run."""
    for file in (self._file, self._events):
      if file is not None:
        file.close()
    if self._wandb is not None:
      self._wandb.close(failed=failed)


def _grid(images: np.ndarray) -> np.ndarray:
  """Images (b, h, w, 3) beside and below each other, in about a square."""
  b, h, w, _ = images.shape
  columns = math.ceil(math.sqrt(b))
  rows = math.ceil(b / columns)
  grid = np.zeros((rows * columns, h, w, 3), np.uint8)
  grid[:b] = images
  grid = grid.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * h, columns * w, 3)


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, without what a crash has cut off or damaged.

  A last line without its end is left out; another that is none of ours is
  named in a warning, since no checkpoint depends on it.
  """
  path = folder / "metrics.jsonl"
  try:
    text = path.read_text(errors="replace")
  except FileNotFoundError:
    return []
  found = []
  for number, text_line in enumerate(text.split("\n")[:-1], 1):
    line = _parse(text_line)
    if line is None:
      logging.warning("Ignored line %d of %s, which is damaged", number, path)
    else:
      found.append(line)
  return found


def _parse(text: str) -> dict[str, Any] | None:
  try:
    line = json.loads(text)
  except ValueError:
    return None
  if not isinstance(line, dict) or not {"step", "split"} <= line.keys():
    return None
  return line


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

  def text(self, step: int, tag: str, text: str) -> None:
    # Shown as Markdown, where four spaces begin what is left as it is.
    lines = text.splitlines()
    indented = "\n".join(f"    {line}" for line in lines)
    self._add(step, summary=self._summary.text(tag, indented))
    self._writer.flush()

  def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
    self._add(step, summary=self._summary.image(tag, pixels, dataformats="HWC"))
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
  """A progress bar on a terminal, and plain lines anywhere else."""

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
    self._total = total
    self._batch_size = batch_size
    self._first = self._step = step
    self._updates = 0
    self._trained = 0
    self._seconds = 0.0
    self._waited = 0.0
    self._paused = 0.0
    self._clock = time.monotonic()
    self._bar = None
    if progress_bar and sys.stderr.isatty() and not jax.process_index():
      tqdm = optional.require("tqdm", extra="train")
      self._bar = tqdm.tqdm(
        total=total, initial=step, unit="step", dynamic_ncols=True
      )

  def update(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Shows where training is.

    Args:
      step: Steps taken.
      values: `loss` and `accuracy` of the latest steps.

    Returns:
      Of the time since the last update: `images_per_second`, and
      `input_wait`, the share in which the loop waited for the next batch. And
      `seconds_left`, and what `memory.usage` says.
    """
    now = time.monotonic()
    seconds = max(now - self._clock, 1e-9)
    trained = step - self._step
    out = {
      "images_per_second": trained * self._batch_size / seconds,
      "input_wait": min(self._waited / seconds, 1.0),
      "seconds_left": self._left(step, seconds, trained),
      **memory.usage(),
    }
    self._clock, self._step, self._waited = now, step, 0.0
    shown = (
      f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.4f}  "
      f"{out['images_per_second']:,.0f} images/s  "
      f"input wait {out['input_wait']:.0%}"
    )
    for name in ("peak_device_memory", "process_memory"):
      if name in out:
        shown += f"  {name.replace('_', ' ')} {out[name] / 2**30:.1f} GiB"
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update(trained)
    else:
      left = _duration(out["seconds_left"])
      say(f"step {step}/{self._total}  {shown}  {left} left")
    return out

  def _left(self, step: int, seconds: float, trained: int) -> float:
    """Seconds to the last step, if all goes on as on average."""
    self._updates += 1
    if self._updates <= 2:
      # The time to the first update is mostly spent compiling: it counts for
      # as long as there is no other.
      self._seconds, self._trained = 0.0, 0
    self._seconds += seconds
    self._trained += trained
    per_step = self._seconds / max(self._trained, 1)
    per_step += self._paused / max(step - self._first, 1)
    return (self._total - step) * per_step

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time in the block as waiting for the input."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time in the block (an evaluation) out of the speed."""
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    self._clock += seconds
    self._paused += seconds

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
