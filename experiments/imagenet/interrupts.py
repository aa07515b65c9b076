"""Ctrl-C and SIGTERM: finish the step, save, then stop."""

from collections.abc import Iterator
import contextlib
import os
import signal
import types

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
  """Remembers that a signal asked the run to stop.

  Attributes:
    received: The signal's name, or "" while there was none.
  """

  def __init__(self) -> None:
    self.received = ""

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    # Whoever asks twice wants no more waiting: the next signal ends the
    # process at once, even inside compiled code.
    for each in SIGNALS:
      signal.signal(each, signal.SIG_DFL)
    self.received = signal.Signals(number).name
    # os.write: print is not safe in a handler that interrupts a print.
    os.write(
      2,
      f"\n{self.received}: stopping after this step and saving; once more to "
      "quit at once.\n".encode(),
    )


@contextlib.contextmanager
def watch() -> Iterator[Interrupt]:
  """Turns the first SIGINT or SIGTERM inside the block into a request."""
  interrupt = Interrupt()
  previous = {s: signal.signal(s, interrupt._handle) for s in SIGNALS}
  try:
    yield interrupt
  finally:
    for each, handler in previous.items():
      signal.signal(each, handler)
