"""How a run can end: exit codes, and the errors that lead to them."""

import enum
import sys

from experiments.datasets import records


class ExitCode(enum.IntEnum):
  """Exit status of `python -m experiments.imagenet`.

  Numbers above 64 have the meaning that sysexits.h gives them. Anything else,
  with a traceback, is a defect of this program.
  """

  FINISHED = 0
  USAGE = 2  # Wrong command line or configuration.
  BAD_DATA = 65  # Non-finite loss, too many corrupt images, bad checkpoints.
  NO_INPUT = 66  # The data set is not there.
  UNAVAILABLE = 69  # A package of an extra is not installed.
  CANNOT_CREATE = 73  # The workdir cannot be used, or another run uses it.
  IO_ERROR = 74  # Disk full, or another error of reading or writing.
  INTERRUPTED = 75  # Stopped by a signal after saving: run it again.
  PEER_LOST = 76  # Another process of the run ended, or is out of reach.
  CONFIG_CONFLICT = 78  # The workdir belongs to another configuration.


class RunError(Exception):
  """A run that cannot go on, for a reason outside this program.

  The message is for the person who started the run: what happened, where, and
  what to do. `__main__` prints it without a traceback.
  """

  exit_code: ExitCode


class ConfigError(RunError):
  """The configuration asks for something impossible."""

  exit_code = ExitCode.USAGE


class MissingPackageError(RunError):
  """The configuration asks for something that an extra has to bring."""

  exit_code = ExitCode.UNAVAILABLE


class NonFiniteError(RunError):
  """A loss, gradient, update or parameter stopped being a finite number."""

  exit_code = ExitCode.BAD_DATA


class CorruptDataError(RunError):
  """More images were unreadable than `config.data.max_corrupt` allows."""

  exit_code = ExitCode.BAD_DATA


class CheckpointError(RunError):
  """There are checkpoints, and none of them is sound."""

  exit_code = ExitCode.BAD_DATA


class WorkdirError(RunError):
  """The working directory cannot be used."""

  exit_code = ExitCode.CANNOT_CREATE


class WriteError(RunError):
  """Something could not be written, most often because the disk is full."""

  exit_code = ExitCode.IO_ERROR


class InterruptedRunError(RunError):
  """A signal stopped the run; its state is saved."""

  exit_code = ExitCode.INTERRUPTED


class PeerLostError(RunError):
  """Another process of the run ended, or cannot be reached."""

  exit_code = ExitCode.PEER_LOST


class OtherProcessError(RunError):
  """What another process cannot go on for, this one cannot either."""

  def __init__(self, process: int, exit_code: int, message: str):
    """Repeats an error.

    Args:
      process: Where it happened.
      exit_code: What it ends that process with.
      message: What that process says.
    """
    super().__init__(f"Process {process}: {message}")
    self.exit_code = ExitCode(exit_code)


class ConflictError(RunError):
  """The working directory holds a run of an incompatible configuration."""

  exit_code = ExitCode.CONFIG_CONFLICT


def tell(message: object) -> None:
  """Says on standard error, in a line of its own, what ends a run."""
  # In one piece: other threads may be writing too.
  print(f"error: {message}\n", end="", file=sys.stderr, flush=True)


def exit_code(error: Exception) -> ExitCode | None:
  """What a run ends with after an error; None for a defect of this program."""
  match error:
    case RunError():
      return error.exit_code
    case records.MissingDataError():
      return ExitCode.NO_INPUT
    case records.DataError():
      return ExitCode.BAD_DATA
    case OSError():
      return ExitCode.IO_ERROR
  return None
