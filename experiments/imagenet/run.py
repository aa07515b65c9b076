"""What a configuration means: its model, its steps, its plan."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import ml_collections
import optax

from experiments.datasets import records
from experiments.imagenet import (
  agreement,
  checkpoints,
  checks,
  errors,
  input_pipeline,
  interrupts,
  optimizer,
  stages,
  steps,
)
from experiments.imagenet import state as state_lib
import vimjax
from vimjax import registry


@dataclasses.dataclass(frozen=True)
class Plan:
  """What happens at which step.

  Attributes:
    steps_per_epoch: Steps in one pass over the training split.
    total_steps: Steps of the whole run.
    eval_every: Steps between evaluations on the validation split.
    checkpoint_every: Steps between checkpoints.
  """

  steps_per_epoch: int
  total_steps: int
  eval_every: int
  checkpoint_every: int

  def evaluates(self, step: int) -> bool:
    """Whether the validation split is evaluated after `step` steps."""
    return step > 0 and (
      step % self.eval_every == 0 or step == self.total_steps
    )

  def saves(self, step: int) -> bool:
    """Whether a checkpoint is due, whatever the evaluation says."""
    return step % self.checkpoint_every == 0 or step == self.total_steps


def make_plan(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Plan:
  """Turns the epochs of `config` into steps, each at least 1."""
  c = config

  def in_steps(epochs: float) -> int:
    return max(1, round(epochs * steps_per_epoch))

  return Plan(
    steps_per_epoch=steps_per_epoch,
    total_steps=in_steps(c.epochs),
    eval_every=in_steps(c.eval_every_epochs),
    checkpoint_every=in_steps(c.checkpoint.every_epochs),
  )


def fill_in(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of `config` with the number of classes, where that is the data's.

  Raises:
    errors.ConfigError: The data has no names of classes.
    records.DataError: The data is missing or damaged.
  """
  config = config.copy_and_resolve_references()
  if config.model.overrides.num_classes:
    return config
  try:
    names = input_pipeline.class_names(config)
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error
  if names is None:
    raise errors.ConfigError(
      f"config.model.overrides.num_classes=0: {config.data.name!r} does not "
      "say how many classes it has; give the number."
    )
  config.model.overrides.num_classes = len(names)
  return config


def make_model(config: ml_collections.ConfigDict) -> nn.Module:
  """The linen module that `config.model` describes.

  Args:
    config: The run's configuration. An image size of None is the data's.

  Returns:
    The module.

  Raises:
    TypeError: It has no field of that name.
    ValueError: There is no such model, or a value does not fit.
  """
  fields = {k: v for k, v in config.model.overrides.items() if v is not None}
  module = vimjax.get_variant(config.model.name).module
  if "image_size" in registry.field_names(module):
    fields.setdefault("image_size", config.data.image_size)
  fields["dtype"] = checks.DTYPES[fields["dtype"]]
  return vimjax.create_model(config.model.name, **fields)


@dataclasses.dataclass(frozen=True)
class Run:
  """What stays the same during a run; see `prepare`.

  Attributes that do not speak for themselves:
    examples: How many records each split has.
    class_names: Of the data's labels; None where they have none.
  """

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  plan: Plan
  examples: dict[str, int]
  class_names: list[str] | None
  model: nn.Module
  tx: optax.GradientTransformation
  train_step: Callable[
    [state_lib.State, steps.Batch], tuple[state_lib.State, Any]
  ]
  eval_step: Callable[[Any, steps.Batch], steps.Metrics]
  checkpoints: checkpoints.Checkpoints
  poll: agreement.Poll

  def eval_variables(self, state: state_lib.State) -> dict[str, Any]:
    """The variables that `config.eval_weights` chooses."""
    return state.variables(self.config.eval_weights)


def _count_examples(config: ml_collections.ConfigDict) -> dict[str, int]:
  """Opens every split: one may have a mistake, and be read hours from now."""
  data = config.data
  splits = filter(None, (data.train_split, data.valid_split, data.test_split))
  counts = {
    split: input_pipeline.num_examples(config, split) for split in splits
  }
  for split, count in counts.items():
    if not count:
      raise records.DataError(
        f"{data.name!r} ({split}) has no image to evaluate."
      )
  return counts


def prepare(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  saved: checkpoints.Checkpoints,
  interrupt: interrupts.Interrupt,
) -> Run:
  """Builds everything that the configuration describes.

  Args:
    config: The run's configuration.
    folder: The run's folder.
    mesh: From `sharding.make_mesh`.
    saved: The run's checkpoints.
    interrupt: From `interrupts.watch`.

  Returns:
    The run, with nothing computed yet.

  Raises:
    errors.ConfigError: A value does not fit the data set or the model.
    records.DataError: A split is missing, damaged or empty.
  """
  try:
    plan = make_plan(config, input_pipeline.steps_per_epoch(config))
    examples = _count_examples(config)
    # Reads config.data.randaugment.
    stages.make_augment(config)
    names = input_pipeline.class_names(config)
    classes = config.model.overrides.num_classes
    if names is not None and len(names) > classes:
      raise ValueError(
        f"config.model.overrides.num_classes={classes} is too small for "
        f"{config.data.name!r}, which has {len(names)} classes."
      )
    model = make_model(config)
    schedule = optimizer.make_schedule(config, plan.steps_per_epoch)
    tx = optimizer.make_optimizer(config, schedule)
    # Traces the model: a wrong image size is found here, not after the data.
    state_lib.state_shapes(model, tx, config, mesh)
  except (TypeError, ValueError) as error:
    logging.debug("configuration", exc_info=True)
    raise errors.ConfigError(str(error)) from error
  return Run(
    config=config,
    folder=folder,
    mesh=mesh,
    plan=plan,
    examples=examples,
    class_names=names,
    model=model,
    tx=tx,
    train_step=steps.make_train_step(
      model, tx, schedule, config, mesh, total_steps=plan.total_steps
    ),
    eval_step=steps.make_eval_step(model, config, mesh),
    checkpoints=saved,
    poll=agreement.Poll(mesh, interrupt),
  )
