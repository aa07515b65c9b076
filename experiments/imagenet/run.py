"""What a configuration means: its checks, its model, its steps, its plan."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments.imagenet import (
  agreement,
  checkpoints,
  errors,
  input_pipeline,
  interrupts,
  optimizer,
  sharding,
  steps,
)
from experiments.imagenet import state as state_lib
import vimjax
from vimjax import optional, registry

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


def check_config(config: ml_collections.ConfigDict) -> None:
  """Rejects values that no run can have, before anything is written.

  Args:
    config: The run's configuration.

  Raises:
    errors.ConfigError: Names the field, what it must be and what it is.
    errors.MissingPackageError: A field needs a package that is not installed.
  """
  c = config
  try:
    sizes = sharding.axis_sizes(**c.mesh, devices=jax.device_count())
  except ValueError as error:
    raise errors.ConfigError(f"config.mesh: {error}") from error
  # Between these the images of a batch are divided.
  devices = sizes[sharding.DATA] * sizes[sharding.FSDP]
  dtype = c.model.overrides.dtype
  problems = [
    f"config.{name}={value!r} must be {wanted}."
    for name, value, wanted, holds in (
      ("batch_size", c.batch_size, "positive", c.batch_size > 0),
      ("eval_batch_size", c.eval_batch_size, "positive", c.eval_batch_size > 0),
      ("epochs", c.epochs, "positive", c.epochs > 0),
      (
        "ema_decay",
        c.ema_decay,
        "in [0, 1), and positive for eval_weights='ema'",
        0 <= c.ema_decay < 1 and (c.ema_decay or c.eval_weights != "ema"),
      ),
      (
        "eval_weights",
        c.eval_weights,
        "'model' or 'ema'",
        c.eval_weights in ("model", "ema"),
      ),
      (
        "accumulation_steps",
        c.accumulation_steps,
        f"positive, and dividing the batch into parts for {devices} devices",
        c.accumulation_steps > 0
        and c.batch_size % (devices * c.accumulation_steps) == 0,
      ),
      (
        "mixup.group_size",
        c.mixup.group_size,
        "even and a divisor of batch_size, or 0",
        not c.mixup.group_size
        or (
          c.mixup.group_size > 0
          and c.mixup.group_size % 2 == 0
          and c.batch_size % c.mixup.group_size == 0
        ),
      ),
      (
        "mesa.weight",
        c.mesa.weight,
        "0, or positive with an average (ema_decay)",
        c.mesa.weight == 0 or (c.mesa.weight > 0 and c.ema_decay > 0),
      ),
      (
        "non_finite",
        c.non_finite,
        "'stop' or 'skip'",
        c.non_finite in ("stop", "skip"),
      ),
      (
        "init_weights",
        c.init_weights,
        "'model' or 'ema'",
        c.init_weights in ("model", "ema"),
      ),
      ("data.repeats", c.data.repeats, "positive", c.data.repeats > 0),
      (
        "data.crop_interpolation",
        c.data.crop_interpolation,
        "'bicubic', 'bilinear' or 'random'",
        c.data.crop_interpolation in ("bicubic", "bilinear", "random"),
      ),
      ("data.mean", c.data.mean, "three numbers", len(c.data.mean) == 3),
      ("data.std", c.data.std, "three numbers", len(c.data.std) == 3),
      ("data.valid_split", c.data.valid_split, "given", c.data.valid_split),
      (
        "model.overrides.dtype",
        dtype,
        f"one of {sorted(DTYPES)}",
        dtype in DTYPES,
      ),
      ("log.every_steps", c.log.every_steps, ">= 1", c.log.every_steps >= 1),
      ("checkpoint.keep", c.checkpoint.keep, ">= 1", c.checkpoint.keep >= 1),
      *(
        (
          name,
          c[name],
          f"a multiple of the {devices} devices "
          "(config.mesh.data x config.mesh.fsdp) that share its images",
          c[name] % devices == 0,
        )
        for name in ("batch_size", "eval_batch_size")
      ),
    )
    if not holds
  ]
  if sizes[sharding.SEQUENCE] > 1 and not _splits_tokens(c):
    problems.append(
      f"config.mesh.sequence={c.mesh.sequence} must be 1 for "
      f"{c.model.name!r}: only Vim's layers can pass the state of their scan "
      "from device to device. config.mesh.fsdp and config.accumulation_steps "
      "save memory with every model."
    )
  if problems:
    raise errors.ConfigError("\n".join(problems))
  for name, wanted, package, extra in (
    ("checkpoint.export", c.checkpoint.export, "safetensors", "weights"),
    ("log.wandb", c.log.wandb, "wandb", "wandb"),
  ):
    if wanted:
      try:
        optional.require(package, extra=extra)
      except ModuleNotFoundError as error:
        raise errors.MissingPackageError(
          f"config.{name}={wanted!r}: {error}"
        ) from error


def _splits_tokens(config: ml_collections.ConfigDict) -> bool:
  """Whether the tokens of the model can be divided over devices."""
  if config.model.name not in vimjax.list_models():
    return True  # `make_model` has more to say about that.
  return vimjax.get_variant(config.model.name).module is vimjax.Vim


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
  fields["dtype"] = DTYPES[fields["dtype"]]
  return vimjax.create_model(config.model.name, **fields)


@dataclasses.dataclass(frozen=True)
class Run:
  """What stays the same during a run; see `prepare`."""

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  plan: Plan
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
  """
  try:
    plan = make_plan(config, input_pipeline.steps_per_epoch(config))
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
    model=model,
    tx=tx,
    train_step=steps.make_train_step(
      model, tx, schedule, config, mesh, total_steps=plan.total_steps
    ),
    eval_step=steps.make_eval_step(model, config, mesh),
    checkpoints=saved,
    poll=agreement.Poll(mesh, interrupt),
  )
