"""How a run can end: exit codes, and the errors that lead to them."""

import enum


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


class ConflictError(RunError):
  """The working directory holds a run of an incompatible configuration."""

  exit_code = ExitCode.CONFIG_CONFLICT
