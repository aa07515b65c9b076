"""Starts the training job as a real process, small enough for tests."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_ROOT = pathlib.Path(__file__).parents[2]

# One layer of 16 channels on 32 pixels; 20 steps an epoch, each image once, and
# a checkpoint every 8 steps. Less is mixed than in the recipe: there is little
# time to learn.
TINY = (
  "--config=vim_tiny:smoke",
  "--config.data.image_size=32",
  "--config.data.repeats=1",
  "--config.mixup.probability=0.25",
  "--config.model.overrides.depth=1",
  "--config.model.overrides.embed_dim=16",
  "--config.batch_size=16",
  "--config.eval_batch_size=80",
  "--config.epochs=5.0",
  "--config.eval_every_epochs=1.0",
  "--config.checkpoint.every_epochs=0.4",
  "--config.log.every_steps=2",
)
TOTAL_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Job:
  """Where the processes find their data and share their compiled code.

  Attributes:
    scratch: A folder of the test session.
  """

  scratch: pathlib.Path

  def environment(self) -> dict[str, str]:
    """The processes' environment variables."""
    return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      # Compiling takes most of a tiny run; the processes are all the same.
      "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "TFDS_DATA_DIR": str(self.scratch / "data"),
    }

  def start(
    self,
    workdir: pathlib.Path,
    *arguments: str,
    config: Sequence[str] = TINY,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **options: Any,
  ) -> subprocess.Popen:
    """Starts a run, under the command `prefix` if there is one.

    (Limits are set by such a command and not by `preexec_fn`, for which Python
    would fork this process, with all of JAX's threads.)
    """
    return subprocess.Popen(
      [
        *prefix,
        sys.executable,
        "-m",
        "experiments.imagenet",
        *config,
        *(["--workdir", str(workdir)] if workdir is not None else []),
        *arguments,
      ],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      bufsize=1,
      env=self.environment() | dict(environment or {}),
      **options,
    )

  def run(
    self, workdir: pathlib.Path | None, *arguments: str, **options: Any
  ) -> tuple[int, str, str]:
    """Runs to the end; returns the exit code, stdout and stderr."""
    process = self.start(workdir, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen, step: int) -> None:
  """Reads the process's output until it tells of `step` or a later one."""
  for line in process.stdout:
    words = line.split()
    if words[:1] == ["step"] and int(words[1].partition("/")[0]) >= step:
      return
  raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Steps with a checkpoint, ascending."""
  names = [p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()]
  return sorted(int(n) for n in names if n.isdecimal())


def load(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint, by path."""
  path = workdir / "checkpoints" / str(step) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    names = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), names)
    args = ocp.args.PyTreeRestore(restore_args=as_numpy)
    tree = reader.restore(path, args=args)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_bits(
  got: dict[str, np.ndarray], want: dict[str, np.ndarray]
) -> None:
  """All arrays have the same names, shapes, dtypes and bytes."""
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert got[name].dtype == x.dtype
    assert got[name].shape == x.shape
    assert got[name].tobytes() == x.tobytes(), name


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl."""
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file under a folder, with its bytes."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in folder.rglob("*")
    if p.is_file()
  }
