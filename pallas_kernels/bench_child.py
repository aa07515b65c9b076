"""Runs functions in another process, which may hang or die.

A GPU kernel that never ends cannot be interrupted, and after one that wrote
where it must not nothing works in its process any more. Whatever happens there,
the process that asked for it goes on, with a new one.
"""

from collections.abc import Callable
import contextlib
import multiprocessing
from typing import Any, Final

_START_SECONDS: Final = 120
_END_SECONDS: Final = 10


class ChildError(Exception):
  """A function did not return; the message says what became of it."""


class Child:
  """One process after the other; the next starts when it is needed.

  A context manager: the process ends with it.
  """

  def __init__(self):
    self._process: Any = None
    self._pipe: Any = None

  def __enter__(self) -> "Child":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def run(
    self, function: Callable[..., Any], *arguments: Any, seconds: float
  ) -> Any:
    """What `function(*arguments)` returns there.

    Args:
      function: Can be imported; it runs in the process of the call before,
        unless that failed.
      *arguments: What can be pickled, as its result can.
      seconds: How long it may take; starting a process comes on top.

    Raises:
      ChildError: It raised an exception, it took too long, or it took its
        process along.
    """
    try:
      if self._process is None:
        self._start()
      self._pipe.send((function, arguments))
      succeeded, value = self._answer(seconds)
    except (EOFError, OSError):
      reason = self._why_it_ended()
      self.close()
      raise ChildError(reason) from None
    except BaseException:  # Interrupted: its answer would come too late.
      self.close()
      raise
    if not succeeded:
      self.close()
      raise ChildError(value)
    return value

  def close(self) -> None:
    """Ends the process."""
    if self._process is not None:
      self._process.kill()
      self._process.join(_END_SECONDS)
      self._pipe.close()
      self._process = self._pipe = None

  def _start(self) -> None:
    # A fork of a process in which JAX has threads may hang.
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()
    self._answer(_START_SECONDS)

  def _answer(self, seconds: float) -> tuple[bool, Any]:
    if not self._pipe.poll(seconds):
      raise ChildError(f"timed out after {seconds:g} s")
    return self._pipe.recv()

  def _why_it_ended(self) -> str:
    self._process.join(_END_SECONDS)
    code = self._process.exitcode
    if code is None:
      return "stopped answering"
    return f"died: signal {-code}" if code < 0 else f"died: exit code {code}"


def _serve(pipe: Any) -> None:
  """Runs what comes until the other end is closed."""
  pipe.send((True, None))
  with contextlib.suppress(EOFError):
    while True:
      function, arguments = pipe.recv()
      try:
        answer = (True, function(*arguments))
      except Exception as error:
        answer = (False, f"{type(error).__name__}: {error}")
      pipe.send(answer)
