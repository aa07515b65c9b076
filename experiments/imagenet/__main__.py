"""Trains and evaluates an image classifier.

  python -m experiments.imagenet --config NAME --workdir DIR \\
      [--config.FIELD=VALUE ...]

NAME is one of: {names}.
A model's name is its published recipe; with `:smoke` after it, the same code
runs on generated images in about a minute. Fields are listed, with their
meaning, in experiments/imagenet/configs/_base.py; for instance
  --config.optimizer.peak_lr=3e-4 --config.model.overrides.dtype=bfloat16

The same command again continues a run that was interrupted, and prints the
result of one that is finished.

Exit codes:
   0  finished
   2  wrong command line or configuration
  65  bad data: non-finite loss, too many corrupt images, no sound checkpoint
  66  the data set is missing; the message says how to get it
  69  a package is missing; the message says which extra to install
  73  the workdir cannot be written, or another run is using it
  74  disk full, or another error of reading or writing
  75  interrupted (Ctrl-C, SIGTERM) after saving; run the same command again
  78  the workdir holds a run of another, incompatible configuration
  Any other code is a defect. A second Ctrl-C or SIGTERM ends the process at
  once, by the signal itself, without saving.
"""

import pathlib
import re
import sys

from experiments import config_names
from experiments.imagenet import errors
from vimjax import optional

_CONFIGS = pathlib.Path(__file__).parent / "configs"
_PACKAGES = (
  "absl",
  "grain",
  "ml_collections",
  "optax",
  "orbax.checkpoint",
  "tensorboardX",
  "tensorflow_datasets",
  "tqdm",
)


def _fail(message: object, code: errors.ExitCode) -> int:
  print(f"error: {message}", file=sys.stderr, flush=True)
  return code


def _parse(argv: list[str]) -> list[str]:
  """absl's flag parsing, with every mistake as one clean line."""
  from absl import flags

  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f"unexpected argument {rest[1]!r}")
    # ml_collections reports a file that it cannot load at the first access.
    _ = flags.FLAGS.config.seed
    return rest
  except (AttributeError, KeyError) as error:
    # Their text is quoted once or twice, depending on how deep the field is.
    text = str(error.args[0])
    name, near = re.search(r"\w+", text), re.search(r'mean "(\w+)"', text)
    message = f"the configuration has no field {name[0] if name else text!r}."
    if near:
      message += f" Did you mean {near[1]!r}?"
  except (flags.Error, OSError, TypeError) as error:
    message = str(error).strip()
    # A configuration's own error comes inside a printed traceback.
    if "Traceback" in message:
      message = message.splitlines()[-1]
  sys.exit(_fail(message, errors.ExitCode.USAGE))


def _main(argv: list[str]) -> int:
  del argv
  from absl import flags
  import jax

  from experiments.datasets import records
  from experiments.imagenet import train

  # Arrays go to the devices where the code says so, not by accident.
  jax.config.update("jax_transfer_guard_host_to_device", "disallow")
  try:
    train.train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
  except errors.RunError as error:
    return _fail(error, error.exit_code)
  except records.MissingDataError as error:
    return _fail(error, errors.ExitCode.NO_INPUT)
  except records.DataError as error:
    return _fail(error, errors.ExitCode.BAD_DATA)
  except OSError as error:
    return _fail(
      f"A file of the run or of its data cannot be read or written: {error}. "
      "If the disk is full, make room. Earlier checkpoints are untouched: run "
      "the same command again to go on.",
      errors.ExitCode.IO_ERROR,
    )
  return errors.ExitCode.FINISHED


def main() -> None:
  """Reads the command line and runs; ends the process."""
  if {"--help", "-help", "-h", "--helpfull"} & set(sys.argv):
    names = ", ".join(config_names.list_configs(_CONFIGS))
    print((__doc__ or "").format(names=names))
    sys.exit(errors.ExitCode.FINISHED)
  try:
    for package in _PACKAGES:
      optional.require(package, extra="train")
    # ml_collections reads sys.argv itself.
    sys.argv = config_names.resolve(sys.argv, _CONFIGS)
  except ModuleNotFoundError as error:
    sys.exit(_fail(error, errors.ExitCode.UNAVAILABLE))
  except config_names.UnknownConfigError as error:
    sys.exit(_fail(error, errors.ExitCode.USAGE))
  from absl import app, flags, logging
  from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "Name or path.")
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.mark_flags_as_required(["config", "workdir"])
  # Orbax and TFDS tell at length what goes well.
  logging.set_verbosity(logging.WARNING)
  app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    # Once training is set up, `interrupts.watch` sees the signal instead.
    sys.exit(_fail("interrupted while starting", errors.ExitCode.INTERRUPTED))
