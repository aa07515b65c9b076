"""Keeps what a run says from drowning in the tracebacks of a failed write.

A checkpoint that cannot be written is one error with one message. Around it,
Orbax logs the same traceback from several threads, asyncio one for every array
that nobody waits for any more, and TensorStore another one where its event loop
is closed: hundreds of lines. Orbax's first lines stay, and so does everything
that is no failed write.
"""

import logging as python_logging
import sys

from absl import logging


def install() -> None:
  """Shortens what this process logs, and what it prints of lost errors."""
  logging.get_absl_handler().addFilter(_keep_short)
  before = sys.unraisablehook

  def unraisablehook(lost: "sys.UnraisableHookArgs") -> None:
    if str(lost.exc_value) != "Event loop is closed":
      before(lost)

  sys.unraisablehook = unraisablehook


def _keep_short(record: python_logging.LogRecord) -> bool:
  """A filter for log records: takes tracebacks of failed writes away."""
  error = record.exc_info[1] if record.exc_info else None
  # TensorStore's errors are ValueErrors; the text has the system's number.
  if not isinstance(error, OSError) and "os_error_code" not in str(error):
    return True
  record.exc_info = record.exc_text = None
  return record.name != "asyncio"
