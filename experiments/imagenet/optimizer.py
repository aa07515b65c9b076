"""Learning-rate schedules, optimisers, and which parameters decay.

Everything here is a pure function of the configuration and of the shapes of
the parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# `nn.scan` keeps the parameters of all layers under this name, with one more
# leading axis than a single layer has.
STACKED = "layers"
# Decayed neither in the official code of Vim nor in that of VMamba, although
# they have two axes or more.
NEVER_DECAYED = ("pos_embed", "class_token")


def make_schedule(
  config: ml_collections.ConfigDict, steps_per_epoch: int
) -> Schedule:
  """The learning rate as a function of the step, counted from 0.

  Linear warm-up from `warmup_lr`, then `config.optimizer.schedule`. As in
  timm, the cosine counts from step 0 and not from the end of the warm-up, and
  with `schedule_unit="epoch"` the rate changes between epochs only.

  Args:
    config: The run's configuration.
    steps_per_epoch: Steps in one pass over the training split.

  Returns:
    A function from step to rate (float32).

  Raises:
    ValueError: The schedule or its unit has no such name.
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

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    epoch = jnp.asarray(step) / steps_per_epoch
    if c.schedule_unit == "epoch":
      # An integer division: a rounded quotient could fall one epoch short.
      epoch = jnp.asarray(step) // steps_per_epoch
    warm = c.warmup_lr + (c.peak_lr - c.warmup_lr) * epoch / max(
      c.warmup_epochs, 1e-9
    )
    rate = decayed(c, epoch / config.epochs)
    return jnp.where(epoch < c.warmup_epochs, warm, rate).astype(jnp.float32)

  return schedule


def _cosine(c: ml_collections.ConfigDict, done: jax.Array) -> jax.Array:
  done = jnp.minimum(done, 1.0)
  span = c.peak_lr - c.final_lr
  return c.final_lr + 0.5 * span * (1 + jnp.cos(jnp.pi * done))


def _constant(c: ml_collections.ConfigDict, done: jax.Array) -> jax.Array:
  return jnp.full_like(done, c.peak_lr)


SCHEDULES = {"cosine": _cosine, "constant": _constant}


def decay_mask(params: Any) -> Any:
  """Says for every parameter whether weight decay applies to it.

  Matrices and larger arrays decay (A_log among them, as in the official
  code); vectors, biases, positional embeddings and class tokens do not.
  Parameters stacked by `nn.scan` are judged without their layer axis, so that
  both layouts of one model decay alike.

  Args:
    params: A tree of arrays or of their shapes.

  Returns:
    The same tree with booleans.
  """

  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    names = [key.key for key in path]
    ndim = leaf.ndim - (STACKED in names)
    return ndim > 1 and names[-1] != "bias" and names[-1] not in NEVER_DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def _adamw(
  c: ml_collections.ConfigDict, schedule: Schedule
) -> optax.GradientTransformation:
  return optax.adamw(
    schedule,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mask=decay_mask,
  )


OPTIMIZERS = {"adamw": _adamw}


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
  return optax.chain(clip, OPTIMIZERS[c.name](c, schedule))
