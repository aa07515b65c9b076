"""Trains and evaluates an image classifier.

  python -m experiments.imagenet --config NAME --workdir DIR \\
      [--config.FIELD=VALUE ...]

In several processes, each with its devices, add to each
  --coordinator HOST:PORT --num_processes N --process_id I
with the address of process 0, or start them by SLURM or as a Kubernetes Job,
where they find each other. They share the DIR and all end with the same code.

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
  76  another process of the run ended or cannot be reached; start all again
      (134, SIGABRT, where JAX notices it first)
  78  the workdir holds a run of another, incompatible configuration
  Any other code is a defect. A second Ctrl-C or SIGTERM ends the process at
  once, by the signal itself, without saving.
"""

import os
import pathlib
import re
import sys
import traceback

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
  errors.tell(message)
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

  from experiments.imagenet import distributed, train

  # Arrays go to the devices where the code says so, not by accident.
  jax.config.update("jax_transfer_guard_host_to_device", "disallow")
  values = flags.FLAGS
  by_hand = distributed.Processes(
    values.coordinator, values.num_processes, values.process_id
  )
  watch = None
  try:
    processes = distributed.find(by_hand, os.environ)
    if processes is not None:
      watch = distributed.start(
        processes,
        connect_seconds=values.connect_seconds,
        heartbeat_seconds=values.heartbeat_seconds,
      )
    train.train_and_evaluate(values.config, values.workdir)
  except Exception as error:
    code, message = errors.exit_code(error), _message(error)
    if distributed.lost_peer(error):
      code, message = errors.ExitCode.PEER_LOST, _lost(error)
    if code is None:
      if watch is None:
        raise
      # A defect, but the other processes must not wait for this one.
      traceback.print_exc()
      watch.leave(1, message)
    _fail(message, code)
    if watch is not None:
      watch.leave(code, message)
    if code == errors.ExitCode.PEER_LOST:
      # Not connected to the others, for whom JAX would wait.
      os._exit(code)
    return code
  if watch is not None:
    watch.leave(errors.ExitCode.FINISHED, "finished")
  return errors.ExitCode.FINISHED


def _message(error: Exception) -> str:
  """What to say of an error that has an exit code."""
  if not isinstance(error, OSError):
    return str(error) or type(error).__name__
  return (
    f"A file of the run or of its data cannot be read or written: {error}. "
    "If the disk is full, make room. Earlier checkpoints are untouched: run "
    "the same command again to go on."
  )


def _lost(error: Exception) -> str:
  if isinstance(error, errors.PeerLostError):
    return str(error)
  line = str(error.__cause__ or error).strip().splitlines()[0]
  return (
    "Another process of this run has ended; its output says why. Start all "
    f"processes again to go on from the last checkpoint. ({line[:200]})"
  )


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

  from experiments.imagenet import quiet

  config_flags.DEFINE_config_file("config", None, "Name or path.")
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
  flags.DEFINE_integer("num_processes", None, "How many processes there are.")
  flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
  flags.DEFINE_integer(
    "connect_seconds", 300, "How long to wait for the other processes."
  )
  flags.DEFINE_integer(
    "heartbeat_seconds", 100, "After this silence a process counts as lost."
  )
  flags.mark_flags_as_required(["config", "workdir"])
  # Orbax and TFDS tell at length what goes well.
  logging.set_verbosity(logging.WARNING)
  quiet.install()
  app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    # Once training is set up, `interrupts.watch` sees the signal instead.
    sys.exit(_fail("interrupted while starting", errors.ExitCode.INTERRUPTED))
