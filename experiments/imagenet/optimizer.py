"""Learning-rate schedules, optimisers, and which parameters decay.

Everything here is a pure function of the configuration and of the shapes of
the parameters.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# `nn.scan` keeps the parameters of all layers under this name, with one more
# leading axis than a single layer has.
STACKED = "layers"
# Decayed neither in the official code of Vim nor in that of VMamba, although
# they have two axes or more.
NEVER_DECAYED = ("pos_embed", "class_token")
_SCAN_PARAMETERS = ("A_log", "D", "dt_bias")
_NUMBERED = re.compile(r"(stages|layers|blocks|downsample)_(\d+)")
# timm's default.
_LAMB_CLIP_NORM = 1.0


def make_schedule(
  config: ml_collections.ConfigDict, steps_per_epoch: int
) -> Schedule:
  """The learning rate as a function of the step, counted from 0.

  Linear warm-up from `warmup_lr`, then `config.optimizer.schedule` until
  `cooldown_epochs` before the end, from where the rate stays. As in timm, the
  cosine counts from step 0, or with `warmup_prefix` from the end of the
  warm-up; with `schedule_unit="epoch"` the rate changes between epochs only.

  Args:
    config: The run's configuration.
    steps_per_epoch: Steps in one pass over the training split.

  Returns:
    A function from step to rate (float32).

  Raises:
    ValueError: The schedule or its unit has no such name, or warm-up and
      cool-down leave nothing for the schedule.
  """
  c = config.optimizer
  if c.schedule not in SCHEDULES:
    raise ValueError(
      f"config.optimizer.schedule: unknown name {c.schedule!r}; expected one "
      f"of {sorted(SCHEDULES)}."
    )
  if c.schedule_unit not in ("epoch", "step"):
    raise ValueError(
      "config.optimizer.schedule_unit must be 'epoch' or 'step', got "
      f"{c.schedule_unit!r}."
    )
  decayed = SCHEDULES[c.schedule]
  start = c.warmup_epochs if c.warmup_prefix else 0.0
  length = config.epochs - c.cooldown_epochs - start
  if length <= 0:
    raise ValueError(
      f"config.epochs={config.epochs} leaves no time beside the cool-down of "
      f"{c.cooldown_epochs} epochs and a warm-up of {start}."
    )

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    epoch = jnp.asarray(step) / steps_per_epoch
    if c.schedule_unit == "epoch":
      # An integer division: a rounded quotient could fall one epoch short.
      epoch = jnp.asarray(step) // steps_per_epoch
    warm = c.warmup_lr + (c.peak_lr - c.warmup_lr) * epoch / max(
      c.warmup_epochs, 1e-9
    )
    rate = decayed(c, (epoch - start) / length)
    return jnp.where(epoch < c.warmup_epochs, warm, rate).astype(jnp.float32)

  return schedule


def _cosine(c: ml_collections.ConfigDict, done: jax.Array) -> jax.Array:
  done = jnp.minimum(done, 1.0)
  span = c.peak_lr - c.final_lr
  return c.final_lr + 0.5 * span * (1 + jnp.cos(jnp.pi * done))


def _constant(c: ml_collections.ConfigDict, done: jax.Array) -> jax.Array:
  return jnp.full_like(done, c.peak_lr)


SCHEDULES = {"cosine": _cosine, "constant": _constant}


def decay_mask(params: Any, *, scan_parameters: bool = True) -> Any:
  """Says for every parameter whether weight decay applies to it.

  What the official code of all families really does: it asks for the number of
  axes of its own arrays (and for names ending in ".bias", positional embeddings
  and class tokens), not for the attributes that its models set. So A_log
  decays, VMamba's dt_bias, which has an axis of directions, does too, and D
  decays in VMamba's "ssd" mixer alone. Parameters stacked by `nn.scan` are
  judged without their layer axis, so that both layouts of one model decay
  alike.

  Args:
    params: A tree of arrays or of their shapes.
    scan_parameters: False exempts A_log, D and dt_bias everywhere, as the
      authors of Mamba intended.

  Returns:
    The same tree with booleans.
  """

  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    names = [key.key for key in path]
    ndim = leaf.ndim - (STACKED in names)
    if names[-1] in _SCAN_PARAMETERS and not scan_parameters:
      return False
    if names[-1] == "D":
      # Ours has an axis of directions where the official array is flat.
      return ndim > 2
    return ndim > 1 and names[-1] != "bias" and names[-1] not in NEVER_DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, decay: float) -> Any:
  """Factors of the learning rate that fall from the head to the stem.

  decay ** (n + 1 - i), where i is 0 for what comes before the first of the n
  layers, i for layer i, counted from 1 through all stages, and n + 1 for the
  last norm and the head (BEiT, https://arxiv.org/abs/2106.08254, as in timm). A
  down-sampling between stages goes with the layer before it.

  Args:
    params: A tree of arrays or of their shapes.
    decay: Factor from one layer to the one before it.

  Returns:
    The same tree with floats, or for parameters that `nn.scan` stacks arrays
    that broadcast over all but the layer axis.
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  depths: dict[int, int] = {}
  for path, leaf in paths:
    stage, layer = _place(path)
    if layer == STACKED:
      depths[stage] = leaf.shape[0]
    elif isinstance(layer, int):
      depths[stage] = max(depths.get(stage, 0), layer + 1)
  total = sum(depths.values())

  def scale(path: tuple[Any, ...], leaf: Any) -> Any:
    stage, layer = _place(path)
    before = sum(depth for s, depth in depths.items() if s < stage)
    if layer == STACKED:
      index = before + 1 + np.arange(depths[stage])
      index = index.reshape(-1, *[1] * (leaf.ndim - 1))
      return (decay ** (total + 1.0 - index)).astype(np.float32)
    if isinstance(layer, int):
      return decay ** (total - before - layer)
    if layer == "downsample":
      return decay ** (total + 1 - before - depths[stage])
    return decay ** (0 if path[0].key in ("norm", "head") else total + 1)

  return jax.tree_util.tree_map_with_path(scale, params)


def _place(path: tuple[Any, ...]) -> tuple[int, int | str]:
  """Stage, and number of the layer there, or what else the parameter is of."""
  stage = 0
  for key in path:
    if key.key == STACKED:
      return stage, STACKED
    match = _NUMBERED.fullmatch(key.key)
    if match is None:
      break
    kind, number = match[1], int(match[2])
    if kind != "stages":
      return (number, kind) if kind == "downsample" else (stage, number)
    stage = number
  return stage, ""


def _adamw(
  c: ml_collections.ConfigDict, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
  return optax.chain(
    optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
    optax.add_decayed_weights(c.weight_decay, mask),
  )


def _lamb(
  c: ml_collections.ConfigDict, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """timm's LAMB (https://arxiv.org/abs/1904.00962).

  Unlike `optax.lamb` it clips the gradients' global norm to 1, and parameters
  without weight decay take no trust ratio.
  """
  trust = mask if c.weight_decay else lambda params: jax.tree.map(_no, params)
  return optax.chain(
    optax.clip_by_global_norm(_LAMB_CLIP_NORM),
    optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
    optax.add_decayed_weights(c.weight_decay, mask),
    _scale_by_trust_ratio(trust),
  )


def _no(leaf: Any) -> bool:
  del leaf
  return False


def _scale_by_trust_ratio(
  mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
  """Multiplies updates by |parameter| / |update|, per array and layer."""

  def scale(path: Any, update: Any, param: Any, trusted: bool) -> Any:
    if not trusted:
      return update
    stacked = any(key.key == STACKED for key in path)
    axes = tuple(range(int(stacked), param.ndim))
    norms = [
      jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
      for x in (param, update)
    ]
    usable = (norms[0] > 0) & (norms[1] > 0)
    safe = jnp.where(usable, norms[1], 1.0)
    return update * jnp.where(usable, norms[0] / safe, 1.0)

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(
      scale, updates, params, mask(params)
    )
  )


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Multiplies updates by `layer_scales`; nothing at all for 1."""

  def update(updates: Any, params: Any) -> Any:
    del params
    if decay == 1:
      return updates
    scales = layer_scales(updates, decay)
    return jax.tree.map(lambda u, s: u * s, updates, scales)

  return optax.stateless(update)


OPTIMIZERS = {"adamw": _adamw, "lamb": _lamb}


def count(opt_state: Any) -> jax.Array:
  """How many updates an optimiser of `make_optimizer` has made."""
  # The state of the last of its parts, `optax.scale_by_learning_rate`.
  return opt_state[-1].count


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: Schedule
) -> optax.GradientTransformation:
  """Builds the optimiser of `config`, gradient clipping included.

  Args:
    config: The run's configuration.
    schedule: From `make_schedule`.

  Returns:
    The transformation. The structure of its state does not depend on
    `clip_norm`, so that a run can be resumed with another value.

  Raises:
    ValueError: The optimiser has no such name.
  """
  c = config.optimizer
  if c.name not in OPTIMIZERS:
    raise ValueError(
      f"config.optimizer.name: unknown name {c.name!r}; expected one of "
      f"{sorted(OPTIMIZERS)}."
    )
  clip = optax.identity()
  if c.clip_norm > 0:
    clip = optax.clip_by_global_norm(c.clip_norm)
  mask = functools.partial(decay_mask, scan_parameters=c.decay_scan_parameters)
  return optax.chain(
    clip,
    OPTIMIZERS[c.name](c, mask),
    _scale_by_layer(c.layer_decay),
    optax.scale_by_learning_rate(schedule),
  )
