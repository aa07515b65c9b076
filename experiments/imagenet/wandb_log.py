"""Weights & Biases, where `config.log.wandb` names a project.

A run keeps its identity over restarts: it is in WORKDIR/wandb.json. Where the
data goes and whether at all is decided as ever, by WANDB_MODE and the like.
Whatever goes wrong there, the training goes on: metrics.jsonl has every number.
"""

from collections.abc import Callable, Mapping
import os
import pathlib
import secrets
from typing import Any, Final

from absl import logging
import numpy as np

from experiments.imagenet import rundir
from vimjax import optional

IDENTITY: Final = "wandb.json"
# Seconds that the end of a run waits for what is not uploaded yet; `wandb sync`
# sends the rest. (Their default waits for ever.)
_FINISH_TIMEOUT: Final = "60"


class WandbLog:
  """Sends numbers, texts and images; after the first failure, nothing."""

  def __init__(
    self, folder: pathlib.Path, project: str, config: Mapping[str, Any]
  ):
    """Starts or resumes the run.

    Args:
      folder: The run's folder.
      project: `config.log.wandb`.
      config: The whole configuration.

    Raises:
      ModuleNotFoundError: The package is missing; names the extra.
      OSError: The identity cannot be written.
    """
    self._wandb = optional.require("wandb", extra="wandb")
    self._run: Any = None
    self._has_failed = False
    identity = _identity(folder)
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_TIMEOUT)

    def start() -> None:
      self._run = self._wandb.init(
        project=project,
        id=identity,
        name=os.environ.get("WANDB_NAME", folder.name),
        resume="allow",
        dir=str(folder),
        config=dict(config),
      )
      # Not their own count of steps: it cannot go back to a checkpoint.
      self._run.define_metric("step")
      self._run.define_metric("*", step_metric="step")

    self._try(start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends numbers of a step."""
    self._try(lambda: self._run.log({"step": step, **values}))

  def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
    """Sends an image, uint8 (h, w, 3)."""
    self._try(
      lambda: self._run.log({"step": step, tag: self._wandb.Image(pixels)})
    )

  def close(self, *, failed: bool) -> None:
    """Ends the run for now; waits a minute for what is under way."""
    self._try(lambda: self._run.finish(exit_code=int(failed)))

  def _try(self, call: Callable[[], None]) -> None:
    if self._has_failed:
      return
    try:
      call()
    except Exception as error:  # Of any kind, from the network to the login.
      self._has_failed = True
      logging.warning(
        "Weights & Biases gets nothing from here on, and the run goes on: "
        "%s: %s",
        type(error).__name__,
        error,
      )


def _identity(folder: pathlib.Path) -> str:
  """The id of the run, drawn once."""
  known = rundir.read_json(folder / IDENTITY)
  if known is None:
    known = {"id": secrets.token_hex(4)}
    rundir.write_json(folder / IDENTITY, known)
  return known["id"]
