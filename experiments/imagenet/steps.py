"""The two compiled steps, on a mesh of all devices.

Axis letters: b images of the whole batch, h and w pixels, k classes.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8
import ml_collections
import numpy as np
import optax

from experiments.imagenet import mixing, optimizer, sharding
from experiments.imagenet import state as state_lib

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
# What the key of mixing is folded with, apart from the numbers of the parts.
_MIX = 2**31


def _normalise(
  images: UInt8[Array, "b h w 3"], config: ml_collections.ConfigDict
) -> Float[Array, "b h w 3"]:
  mean = jnp.array(config.data.mean, jnp.float32)
  std = jnp.array(config.data.std, jnp.float32)
  return (images.astype(jnp.float32) / 255 - mean) / std


def _cross_entropy(
  logits: Float[Array, "b k"], targets: Float[Array, "b k"]
) -> Float[Array, "b"]:
  # float32: the log of a sum over 1000 classes is too much for bfloat16.
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def distillation(
  student: Float[Array, "b k"],
  teacher: Float[Array, "b k"],
  temperature: float,
) -> Float[Array, ""]:
  """Mean of KL(teacher || student) of logits divided by a temperature."""
  log_s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  log_t = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
  return (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optimizer.Schedule,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  *,
  total_steps: int = 0,
) -> Callable[[state_lib.State, Batch], tuple[state_lib.State, Metrics]]:
  """Compiles one step of training.

  With `config.accumulation_steps` the batch is worked through in as many parts,
  whose mean gradient makes one step: the same as at once but for rounding and
  the noise of drop path. Batch norms see a part at a time, each part continuing
  the running statistics of the one before. On several devices a part is spread
  over all of them, and its statistics are of the whole part.

  Args:
    model: Maps normalised images to logits.
    tx: From `optimizer.make_optimizer`.
    schedule: From `optimizer.make_schedule`; reported, not applied, here, at
      the optimiser's own count of steps, which leaves skipped ones out.
    config: The run's configuration.
    mesh: From `sharding.make_mesh`.
    total_steps: Of the run; `config.mesa.start` is a share of them.

  Returns:
    A function from the state, which it consumes, and a batch on the devices
    to the next state and the step's numbers: `loss` (label smoothing and
    distillation included), `accuracy` (the class with the largest share of a
    mixed image counts as right), `grad_norm` (before clipping), `update_norm`,
    `lr` and `finite`, which is false as soon as any of them is not a number.
  """
  mesa = config.mesa

  def loss_fn(
    params: Any,
    batch_stats: Any,
    state: state_lib.State,
    part: Any,
    key: jax.Array,
  ) -> tuple[Any, Any]:
    images, targets = part
    logits, batch_stats = _forward(model, params, batch_stats, images, key)
    loss = _cross_entropy(logits, targets).mean()

    def divergence() -> jax.Array:
      # The average only watches: no batch statistics, no gradient.
      teacher: Any = model.apply(state.variables("ema"), images)
      teacher = jax.lax.stop_gradient(teacher)
      return distillation(logits, teacher, mesa.temperature)

    if mesa.weight:
      begun = state.step >= round(mesa.start * total_steps)
      loss += (mesa.factor * mesa.weight) * jax.lax.cond(
        begun, divergence, lambda: jnp.zeros(())
      )
    right = (logits.argmax(-1) == targets.argmax(-1)).mean()
    return loss, (right, batch_stats)

  def gradients(state: state_lib.State, whole: Any, key: jax.Array) -> Any:
    """Loss, share of right answers, batch statistics and gradients."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    k = config.accumulation_steps
    if k == 1:
      (loss, (right, stats)), grads = grad_fn(
        state.params, state.batch_stats, state, whole, key
      )
      return loss, right, stats, grads

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
      sums, stats = carry
      part, i = inputs
      (loss, (right, stats)), grads = grad_fn(
        state.params, stats, state, part, jax.random.fold_in(key, i)
      )
      return (jax.tree.map(jnp.add, sums, (loss, right, grads)), stats), None

    none = jax.tree.map(jnp.zeros_like, state.params)
    zeros = (jnp.zeros(()), jnp.zeros(()), none)
    parts = jax.tree.map(lambda x: _parts(x, k, mesh), whole)
    (sums, stats), _ = jax.lax.scan(
      body, (zeros, state.batch_stats), (parts, jnp.arange(k))
    )
    loss, right, grads = jax.tree.map(lambda x: x / k, sums)
    return loss, right, stats, grads

  def train_step(
    state: state_lib.State, batch: Batch
  ) -> tuple[state_lib.State, Metrics]:
    # Folding in the step, not splitting: a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    images = _normalise(batch["image"], config)
    targets = mixing.soft_labels(
      batch["label"],
      config.model.overrides.num_classes,
      config.label_smoothing,
    )
    if mixing.is_on(config):
      images, targets = mixing.mix(
        images, targets, jax.random.fold_in(key, _MIX), config
      )
    whole = dataclasses.replace(
      state,
      params=sharding.put_together(state.params, mesh),
      ema_params=sharding.put_together(state.ema_params, mesh),
    )
    loss, accuracy, stats, grads = gradients(whole, (images, targets), key)
    grads = sharding.divide(grads, mesh)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average: Any = (state.ema_params, state.ema_batch_stats)
    if config.ema_decay:
      average = optax.incremental_update(
        (params, stats), average, 1 - config.ema_decay
      )
    metrics = {
      "loss": loss,
      "accuracy": accuracy,
      "grad_norm": optax.tree.norm(grads),
      # Its square overflows long before the parameters do, so a step that is
      # about to destroy them is seen before it is saved.
      "update_norm": optax.tree.norm(updates),
      "lr": schedule(optimizer.count(state.opt_state)),
    }
    metrics["finite"] = jnp.isfinite(sum(metrics.values()))
    new = dataclasses.replace(
      state,
      params=params,
      opt_state=opt_state,
      ema_params=average[0],
      batch_stats=stats,
      ema_batch_stats=average[1],
    )
    if config.non_finite == "skip":
      new = jax.tree.map(
        lambda x, old: jnp.where(metrics["finite"], x, old), new, state
      )
    return dataclasses.replace(new, step=state.step + 1), metrics

  placements: Any = sharding.replicated(mesh)
  if sharding.FSDP in mesh.shape:
    shapes = state_lib.state_shapes(model, tx, config, mesh)
    placements = (sharding.shardings(shapes, mesh), placements)
  return jax.jit(train_step, donate_argnums=0, out_shardings=placements)


def _forward(
  model: nn.Module, params: Any, batch_stats: Any, images: Any, key: jax.Array
) -> tuple[Any, Any]:
  """Logits of a training step, and the new batch statistics, if any."""
  rngs = {"drop_path": key}
  variables = state_lib.as_variables(params, batch_stats)
  if batch_stats is None:
    return model.apply(variables, images, train=True, rngs=rngs), None
  out: Any = model.apply(
    variables, images, train=True, rngs=rngs, mutable=["batch_stats"]
  )
  return out[0], out[1]["batch_stats"]


def _parts(
  x: Shaped[Array, "b ..."], k: int, mesh: jax.sharding.Mesh
) -> Shaped[Array, "k m ..."]:
  """Deals a batch out to k parts in turn, so that nothing changes device."""
  x = x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(
    x, sharding.batch_sharded(mesh, axis=1)
  )


def make_eval_step(
  model: nn.Module,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> Callable[[Any, Batch], Metrics]:
  """Compiles the evaluation of one batch.

  Args:
    model: Maps normalised images to logits.
    config: The run's configuration.
    mesh: From `sharding.make_mesh`.

  Returns:
    A function from variables and a batch with a `mask` to sums over the images
    that the mask keeps: `loss` (without label smoothing), `correct`, `correct5`
    (the label is among the five highest logits), `count`; and `predicted` (b,),
    the class chosen for every image.
  """

  def eval_step(variables: Any, batch: Batch) -> Metrics:
    variables = sharding.put_together(variables, mesh)
    logits: Any = model.apply(variables, _normalise(batch["image"], config))
    mask, labels = batch["mask"], batch["label"]
    predicted = logits.argmax(-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    losses = _cross_entropy(logits, one_hot)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Not "logits > own": a NaN must count as higher.
    higher = (~(logits <= own)).sum(-1)
    return {
      "loss": jnp.where(mask, losses, 0.0).sum(),
      "correct": ((predicted == labels) & mask).sum(),
      "correct5": ((higher < 5) & mask).sum(),
      "count": mask.sum(),
      "predicted": predicted,
    }

  return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
  eval_step: Callable[[Any, Batch], Metrics],
  variables: Any,
  batches: Iterator[Batch],
) -> dict[str, float]:
  """Means over all images of `batches`, each counted once.

  Args:
    eval_step: From `make_eval_step`.
    variables: From `state.State.variables`.
    batches: From `put_batch`.

  Returns:
    `loss`, `accuracy`, `top5_accuracy` and `examples`.

  Raises:
    ValueError: There was no image at all.
  """
  sums = {"loss": 0.0, "correct": 0, "correct5": 0, "count": 0}
  for batch in batches:
    out = jax.device_get(eval_step(variables, batch))
    sums = {name: sums[name] + out[name].item() for name in sums}
  if not sums["count"]:
    raise ValueError("evaluate: no readable image in the split.")
  return {
    "loss": sums["loss"] / sums["count"],
    "accuracy": sums["correct"] / sums["count"],
    "top5_accuracy": sums["correct5"] / sums["count"],
    "examples": sums["count"],
  }


def put_batch(
  batch: Mapping[str, np.ndarray],
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> Batch:
  """Checks this host's part of a batch and puts it on the devices.

  Args:
    batch: `image` (b, s, s, 3) uint8, `label` (b,) int32, and for evaluation
      `mask` (b,) bool; other entries stay on the host.
    config: The run's configuration.
    mesh: From `sharding.make_mesh`.

  Returns:
    Global arrays, divided over the devices by image.

  Raises:
    ValueError: A shape, a dtype or a label is not what the model expects.
  """
  size = config.data.image_size
  b = len(batch["label"])
  wanted = {
    "image": ((b, size, size, 3), np.uint8),
    "label": ((b,), np.int32),
    "mask": ((b,), np.bool_),
  }
  placement = sharding.batch_sharded(mesh)
  _, parts = sharding.batch_slice(mesh)
  out = {}
  for name, (shape, dtype) in wanted.items():
    if name not in batch:
      continue
    x = batch[name]
    if x.shape != shape or x.dtype != dtype:
      raise ValueError(
        f"Batch entry {name!r} must be {np.dtype(dtype)} of shape {shape}, "
        f"got {x.dtype} of shape {x.shape}."
      )
    shape = (parts * b, *x.shape[1:])
    out[name] = sharding.from_local(x, placement, shape)
  classes = config.model.overrides.num_classes
  low, high = batch["label"].min(), batch["label"].max()
  if low < 0 or high >= classes:
    raise ValueError(
      f"Labels must be in 0 to {classes - 1} "
      f"(config.model.overrides.num_classes={classes}), got {low} to {high}."
    )
  return out
