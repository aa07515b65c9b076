"""The training state and the two compiled steps, on a mesh of all devices.

Axis letters: b images of the whole batch, h and w pixels, k classes.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8, UInt32
import ml_collections
import numpy as np
import optax

from experiments.imagenet import optimizer

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


@struct.dataclass
class State:
  """Everything that a checkpoint restores.

  Attributes:
    step: Steps taken so far.
    params: The model's parameters.
    opt_state: The optimiser's state.
    ema_params: Running average of `params`, or None.
    rng: Raw key that every step's randomness is derived from.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  ema_params: Any
  rng: UInt32[Array, "2"]


def make_mesh() -> jax.sharding.Mesh:
  """One axis, "data", over all devices."""
  # Auto: linen's own annotations and the compiler place what we do not.
  return jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The placement of the state: a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The placement of a batch: its first axis divided over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def state_shapes(
  model: nn.Module,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> State:
  """Shape, dtype and placement of every array of the state, for `restore`."""
  shapes = jax.eval_shape(lambda: _init(model, tx, config))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    shapes,
  )


def make_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> State:
  """A new state, created in its place on the mesh.

  Args:
    model: Maps normalised images to logits.
    tx: From `optimizer.make_optimizer`.
    config: The run's configuration; `seed` decides every number.
    mesh: From `make_mesh`.

  Returns:
    The state of step 0. The average starts at the initial parameters.
  """
  init = jax.jit(
    lambda: _init(model, tx, config), out_shardings=replicated(mesh)
  )
  return init()


def _init(
  model: nn.Module,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
) -> State:
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  size = config.data.image_size
  params = model.init(init_key, jnp.zeros((1, size, size, 3)))["params"]
  ema = jax.tree.map(jnp.array, params) if config.ema_decay else None
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema_params=ema,
    rng=jax.random.key_data(run_key),
  )


def _normalise(
  images: UInt8[Array, "b h w 3"], config: ml_collections.ConfigDict
) -> Float[Array, "b h w 3"]:
  mean = jnp.array(config.data.mean, jnp.float32)
  std = jnp.array(config.data.std, jnp.float32)
  return (images.astype(jnp.float32) / 255 - mean) / std


def _losses(
  logits: Float[Array, "b k"], labels: Int[Array, "b"], smoothing: float
) -> Float[Array, "b"]:
  # float32: the log of a sum over 1000 classes is too much for bfloat16.
  logits = logits.astype(jnp.float32)
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  return optax.softmax_cross_entropy(
    logits, optax.smooth_labels(targets, smoothing)
  )


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optimizer.Schedule,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """Compiles one step of training.

  Args:
    model: Maps normalised images to logits.
    tx: From `optimizer.make_optimizer`.
    schedule: From `optimizer.make_schedule`; reported, not applied, here.
    config: The run's configuration.
    mesh: From `make_mesh`.

  Returns:
    A function from the state, which it consumes, and a batch on the devices
    to the next state and the step's numbers: `loss` (label smoothing
    included), `accuracy`, `grad_norm` (before clipping), `update_norm`, `lr`
    and `finite`, which is false as soon as any of them is not a number.
  """

  def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
    logits: Any = model.apply(
      {"params": params},
      _normalise(batch["image"], config),
      train=True,
      rngs={"drop_path": key},
    )
    losses = _losses(logits, batch["label"], config.label_smoothing)
    return losses.mean(), (logits.argmax(-1) == batch["label"]).mean()

  def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
    # Folding in the step, not splitting: a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, batch, key
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema_params
    if ema is not None:
      ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
    metrics = {
      "loss": loss,
      "accuracy": accuracy,
      "grad_norm": optax.tree.norm(grads),
      # Its square overflows long before the parameters do, so a step that is
      # about to destroy them is seen before it is saved.
      "update_norm": optax.tree.norm(updates),
      "lr": schedule(state.step),
    }
    metrics["finite"] = jnp.isfinite(sum(metrics.values()))
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema_params=ema,
    )
    return state, metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(mesh))


def make_eval_step(
  model: nn.Module,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> Callable[[Any, Batch], Metrics]:
  """Compiles the evaluation of one batch.

  Args:
    model: Maps normalised images to logits.
    config: The run's configuration.
    mesh: From `make_mesh`.

  Returns:
    A function from parameters and a batch with a `mask` to sums over the
    images that the mask keeps: `loss` (without label smoothing), `correct`,
    `count`; and `predicted` (b,), the class chosen for every image.
  """

  def eval_step(params: Any, batch: Batch) -> Metrics:
    logits: Any = model.apply(
      {"params": params}, _normalise(batch["image"], config)
    )
    mask = batch["mask"]
    predicted = logits.argmax(-1)
    losses = _losses(logits, batch["label"], 0.0)
    return {
      "loss": jnp.where(mask, losses, 0.0).sum(),
      "correct": ((predicted == batch["label"]) & mask).sum(),
      "count": mask.sum(),
      "predicted": predicted,
    }

  return jax.jit(eval_step, out_shardings=replicated(mesh))


def evaluate(
  eval_step: Callable[[Any, Batch], Metrics],
  params: Any,
  batches: Iterator[Batch],
) -> dict[str, float]:
  """Means over all images of `batches`, each counted once.

  Args:
    eval_step: From `make_eval_step`.
    params: The model's parameters.
    batches: From `put_batches`.

  Returns:
    `loss`, `accuracy` and `examples`.

  Raises:
    ValueError: There was no image at all.
  """
  sums = {"loss": 0.0, "correct": 0, "count": 0}
  for batch in batches:
    out = jax.device_get(eval_step(params, batch))
    sums = {name: sums[name] + out[name].item() for name in sums}
  if not sums["count"]:
    raise ValueError("evaluate: no readable image in the split.")
  return {
    "loss": sums["loss"] / sums["count"],
    "accuracy": sums["correct"] / sums["count"],
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
    mesh: From `make_mesh`.

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
    out[name] = jax.make_array_from_process_local_data(batch_sharded(mesh), x)
  classes = config.model.overrides.num_classes
  low, high = batch["label"].min(), batch["label"].max()
  if low < 0 or high >= classes:
    raise ValueError(
      f"Labels must be in 0 to {classes - 1} "
      f"(config.model.overrides.num_classes={classes}), got {low} to {high}."
    )
  return out
