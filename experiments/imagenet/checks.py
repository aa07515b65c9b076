"""Values of a configuration that no run can have, found before it starts."""

from collections.abc import Iterator, Sequence
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import ml_collections

from experiments.imagenet import errors, sharding
import vimjax
from vimjax import optional

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Field, what it must be, and whether it is.
Rule = tuple[str, str, bool]


def check_config(config: ml_collections.ConfigDict) -> None:
  """Rejects values that no run can have, before anything is written.

  What depends on the data set or the model is found by `run.prepare`.

  Args:
    config: The run's configuration.

  Raises:
    errors.ConfigError: Names each field, what it must be and what it is.
    errors.MissingPackageError: A field needs a package that is not installed.
  """
  try:
    sizes = sharding.axis_sizes(**config.mesh, devices=jax.device_count())
  except ValueError as error:
    raise errors.ConfigError(f"config.mesh: {error}") from error
  # Between these the images of a batch are divided.
  devices = sizes[sharding.DATA] * sizes[sharding.FSDP]
  problems = [
    f"config.{name}={operator.attrgetter(name)(config)!r} must be {wanted}."
    for name, wanted, holds in itertools.chain(
      _batches(config, devices),
      _training(config),
      _data(config.data),
      _mixing(config),
      _optimizer(config.optimizer),
      _writing(config),
    )
    if not holds
  ]
  if sizes[sharding.SEQUENCE] > 1 and not _splits_tokens(config):
    problems.append(
      f"config.mesh.sequence={config.mesh.sequence} must be 1 for "
      f"{config.model.name!r}: only Vim's layers can pass the state of their "
      "scan from device to device. config.mesh.fsdp and "
      "config.accumulation_steps save memory with every model."
    )
  if problems:
    raise errors.ConfigError("\n".join(problems))
  _find_packages(config)


def _batches(c: ml_collections.ConfigDict, devices: int) -> Iterator[Rule]:
  yield "batch_size", "positive", c.batch_size > 0
  yield "eval_batch_size", "positive", c.eval_batch_size > 0
  for name in ("batch_size", "eval_batch_size"):
    wanted = (
      f"a multiple of the {devices} devices (config.mesh.data x "
      "config.mesh.fsdp) that share its images"
    )
    yield name, wanted, c[name] % devices == 0
  yield (
    "accumulation_steps",
    f"positive, and dividing the batch into parts for {devices} devices",
    c.accumulation_steps > 0
    and c.batch_size % (devices * c.accumulation_steps) == 0,
  )


def _training(c: ml_collections.ConfigDict) -> Iterator[Rule]:
  yield "epochs", "positive", _positive(c.epochs)
  yield "eval_every_epochs", "positive", c.eval_every_epochs > 0
  yield "label_smoothing", "in [0, 1)", 0 <= c.label_smoothing < 1
  yield (
    "ema_decay",
    "in [0, 1), and positive for eval_weights='ema'",
    0 <= c.ema_decay < 1 and bool(c.ema_decay or c.eval_weights != "ema"),
  )
  for name in ("eval_weights", "init_weights"):
    yield name, "'model' or 'ema'", c[name] in ("model", "ema")
  yield "non_finite", "'stop' or 'skip'", c.non_finite in ("stop", "skip")
  yield "max_skipped_steps", "0 or more", c.max_skipped_steps >= 0
  dtype = c.model.overrides.dtype
  yield "model.overrides.dtype", f"one of {sorted(DTYPES)}", dtype in DTYPES


def _data(c: ml_collections.ConfigDict) -> Iterator[Rule]:
  yield "data.valid_split", "given", bool(c.valid_split)
  yield "data.image_size", "positive", c.image_size > 0
  yield "data.crop_fraction", "in (0, 1]", 0 < c.crop_fraction <= 1
  modes = ("center", "squash")
  yield "data.crop_mode", "'center' or 'squash'", c.crop_mode in modes
  area = "two shares in (0, 1], the smaller first"
  yield "data.crop_area", area, _ascending(c.crop_area) and c.crop_area[1] <= 1
  ratio = "two positive numbers, the smaller first"
  yield "data.crop_ratio", ratio, _ascending(c.crop_ratio)
  filters = ("bicubic", "bilinear", "random")
  yield (
    "data.crop_interpolation",
    "'bicubic', 'bilinear' or 'random'",
    c.crop_interpolation in filters,
  )
  yield "data.color_jitter", "0 or more", c.color_jitter >= 0
  share = 0 <= c.erase_probability <= 1
  yield "data.erase_probability", "in [0, 1]", share
  yield "data.repeats", "positive", c.repeats > 0
  yield "data.mean", "three numbers", len(c.mean) == 3
  std = len(c.std) == 3 and min(c.std) > 0
  yield "data.std", "three positive numbers", std
  yield "data.workers", "0 or more", c.workers >= 0
  yield "data.max_corrupt", "0 or more", c.max_corrupt >= 0


def _mixing(c: ml_collections.ConfigDict) -> Iterator[Rule]:
  for name in ("mixup_alpha", "cutmix_alpha"):
    yield f"mixup.{name}", "0 or more", c.mixup[name] >= 0
  for name in ("probability", "switch_probability"):
    yield f"mixup.{name}", "in [0, 1]", 0 <= c.mixup[name] <= 1
  group = c.mixup.group_size
  yield (
    "mixup.group_size",
    "even and a divisor of batch_size, or 0",
    not group or (group > 0 and group % 2 == 0 and c.batch_size % group == 0),
  )
  yield (
    "mesa.weight",
    "0, or positive with an average (ema_decay)",
    c.mesa.weight == 0 or (c.mesa.weight > 0 and c.ema_decay > 0),
  )
  yield "mesa.temperature", "positive", c.mesa.temperature > 0
  yield "mesa.start", "in [0, 1]", 0 <= c.mesa.start <= 1


def _optimizer(c: ml_collections.ConfigDict) -> Iterator[Rule]:
  for name in (
    *("peak_lr", "warmup_lr", "final_lr", "warmup_epochs", "cooldown_epochs"),
    *("weight_decay", "clip_norm"),
  ):
    wanted = "a finite number, 0 or more"
    yield f"optimizer.{name}", wanted, c[name] >= 0 and math.isfinite(c[name])
  for name in ("b1", "b2"):
    yield f"optimizer.{name}", "in [0, 1)", 0 <= c[name] < 1
  yield "optimizer.eps", "positive", c.eps > 0
  yield "optimizer.layer_decay", "in (0, 1]", 0 < c.layer_decay <= 1


def _writing(c: ml_collections.ConfigDict) -> Iterator[Rule]:
  yield "log.every_steps", ">= 1", c.log.every_steps >= 1
  yield "checkpoint.keep", ">= 1", c.checkpoint.keep >= 1
  every = c.checkpoint.every_epochs > 0
  yield "checkpoint.every_epochs", "positive", every


def _positive(number: float) -> bool:
  return number > 0 and math.isfinite(number)


def _ascending(pair: Sequence[float]) -> bool:
  return len(pair) == 2 and 0 < pair[0] <= pair[1]


def _splits_tokens(config: ml_collections.ConfigDict) -> bool:
  """Whether the tokens of the model can be divided over devices."""
  if config.model.name not in vimjax.list_models():
    return True  # `run.make_model` has more to say about that.
  return vimjax.get_variant(config.model.name).module is vimjax.Vim


def _find_packages(config: ml_collections.ConfigDict) -> None:
  """Looks for what would otherwise be missed at the end of the training."""
  for name, wanted, package, extra in (
    ("checkpoint.export", config.checkpoint.export, "safetensors", "weights"),
    ("log.plots", config.log.plots, "matplotlib", "plot"),
    ("log.wandb", config.log.wandb, "wandb", "wandb"),
  ):
    if wanted:
      try:
        optional.require(package, extra=extra)
      except ModuleNotFoundError as error:
        raise errors.MissingPackageError(
          f"config.{name}={wanted!r}: {error}"
        ) from error
