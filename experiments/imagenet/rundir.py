"""The working directory of a run: one process, one configuration, one result.

WORKDIR/
  config.json      the resolved configuration; git revision, versions and
                   devices; where initial weights are from and their licence;
                   and from which step on each of these was another
  checkpoints/     see `checkpoints.py`
  metrics.jsonl    one line per logged step and split
  tensorboard/     the same numbers, the configuration and some images
  wandb.json       the run's identity at Weights & Biases, if it is there
  result.json      written once, when the run is finished
  weights.safetensors  the best weights, if asked for
  *.png            learning curves and predictions, if asked for
"""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

from absl import logging
import jax
import ml_collections

from experiments.imagenet import errors
from vimjax import version

# A checkpoint has no meaning under another value of these: they decide which
# arrays there are, or which images come next.
FIXED = (
  "batch_size",
  "data.name",
  "data.train_split",
  "data.folder",
  "data.image_size",
  "data.repeats",
  "ema_decay",
  "init_from",
  "init_weights",
  "model",
  "optimizer.name",
  "seed",
)
# Fields of the model that a run may change on the way.
FREE = (
  "model.overrides.drop_path_rate",
  "model.overrides.dtype",
  "model.overrides.remat",
  "model.overrides.scan_implementation",
)
CONFIG = "config.json"
RESULT = "result.json"
# What the numbers of a run depend on, down to how images are decoded.
_PACKAGES = (
  "flax",
  "grain",
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "numpy",
  "opencv-python-headless",
  "optax",
  "orbax-checkpoint",
  "pillow",
  "simplejpeg",
)


@contextlib.contextmanager
def claim(workdir: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Creates the folder and keeps other processes out of it.

  Args:
    workdir: The folder; a relative path is resolved.

  Yields:
    Its absolute path.

  Raises:
    errors.WorkdirError: It cannot be created or written, or another process
      is training in it.
  """
  folder = pathlib.Path(workdir).expanduser().resolve()
  if jax.process_index():
    yield folder
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a+")
  except OSError as error:
    raise errors.WorkdirError(
      f"Cannot use --workdir {folder}: {error.strerror or error}. Choose a "
      "folder that can be written."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      lock.seek(0)
      owner = lock.read().strip() or "unknown"
      raise errors.WorkdirError(
        f"Another run (process {owner}) is writing to {folder}. Wait for it, "
        "or choose another --workdir."
      ) from error
    except OSError as error:
      # Some network file systems know no locks. Training there is possible.
      logging.warning(
        "Cannot lock %s (%s): nothing will keep a second run out of it",
        folder,
        error.strerror or error,
      )
    # The lock goes away with the process, however it dies; the number is for
    # the message above.
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    yield folder


def check_shared(folder: pathlib.Path) -> None:
  """Raises WorkdirError if this process does not see what the first made."""
  if not (folder / ".lock").exists():
    raise errors.WorkdirError(
      f"{folder} is not there on {platform.node()}: --workdir must be on a "
      "file system that all processes share."
    )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that is either complete or not there."""
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w") as file:
    json.dump(value, file, indent=2)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def read_json(path: pathlib.Path) -> Any:
  """The content of a file, or None if it does not exist or is damaged."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    logging.warning("Ignored %s, which is not JSON: %s", path, error)
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Field by field, nested names joined by dots, as JSON would hold them."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      value = list(value) if isinstance(value, tuple) else value
      flat[prefix + name] = value
  return flat


def compare_config(
  folder: pathlib.Path, config: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
  """What differs from the configuration that the folder was made with.

  Args:
    folder: The run's folder.
    config: The configuration now.

  Returns:
    (then, now) of every field that differs; empty for a new folder.

  Raises:
    errors.ConflictError: A field differs that the checkpoints depend on.
  """
  recorded = read_json(folder / CONFIG)
  if recorded is None:
    return {}
  then, now = flatten(recorded["config"]), flatten(config.to_dict())
  # Fields that one version has and another lacks do not differ.
  changed = {
    name: (then[name], now[name])
    for name in sorted(then.keys() & now.keys())
    if then[name] != now[name]
  }
  conflicts = [name for name in changed if _is_fixed(name)]
  if conflicts:
    listed = "\n".join(
      f"  config.{name}: {changed[name][0]!r} then, {changed[name][1]!r} now"
      for name in conflicts
    )
    raise errors.ConflictError(
      f"{folder} holds a run of another configuration, which cannot be "
      f"continued with this one:\n{listed}\nUse the same values, or choose "
      "another --workdir."
    )
  return changed


def _is_fixed(name: str) -> bool:
  parts = name.split(".")
  prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
  return name not in FREE and not prefixes.isdisjoint(FIXED)


def record_config(
  folder: pathlib.Path,
  config: ml_collections.ConfigDict,
  *,
  step: int,
  changed: Mapping[str, tuple[Any, Any]],
  initial: Mapping[str, Any] | None = None,
) -> None:
  """Writes config.json, and logs and keeps what has changed.

  Args:
    folder: The run's folder.
    config: The configuration now.
    step: The step from which on it holds.
    changed: From `compare_config`.
    initial: What is known of the run's initial weights.
  """
  if jax.process_index():
    return
  now = environment()
  recorded = read_json(folder / CONFIG)
  if recorded is None:
    recorded = {"config": {}, "changes": [], "sessions": []}
  else:
    _warn_of(recorded, now)
  recorded["initial_weights"] = initial
  for name, (then, value) in changed.items():
    logging.warning("config.%s changed from %r to %r", name, then, value)
    recorded["changes"].append(
      {"step": step, "field": name, "from": then, "to": value}
    )
  recorded.setdefault("sessions", []).append(
    {"step": step, "started": _now(), **now}
  )
  recorded["config"] = config.to_dict()
  write_json(folder / CONFIG, recorded | now)


def environment() -> dict[str, Any]:
  """What a run's numbers depend on beside its configuration and its data."""
  return {
    "git_revision": _git_revision(),
    "versions": {
      "python": platform.python_version(),
      "vimjax": version.__version__,
      **{name: found for name in _PACKAGES if (found := _version(name))},
    },
    "devices": [f"{jax.device_count()} x {jax.devices()[0].device_kind}"],
    "processes": jax.process_count(),
    "platform": jax.devices()[0].client.platform_version,
  }


def _warn_of(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Says where the run goes on with other code or on other devices."""
  then, now = flatten(recorded), flatten(now)
  for name, value in now.items():
    if name in then and then[name] != value:
      logging.warning(
        "%s was %r and is %r: the run may go on with other rounding than it "
        "would have",
        name,
        then[name],
        value,
      )


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_revision() -> str | None:
  """The commit of this code, with "+" if files differ; None without git."""
  folder = pathlib.Path(__file__).parent
  try:
    revision, changes = (
      subprocess.run(
        ["git", "-C", str(folder), *command],
        capture_output=True,
        text=True,
        check=True,
      ).stdout.strip()
      for command in (
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
      )
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return revision + ("+" if changes else "")


def discard_result(folder: pathlib.Path) -> None:
  """Removes a result that no longer stands for what the folder holds."""
  if not jax.process_index():
    (folder / RESULT).unlink(missing_ok=True)
