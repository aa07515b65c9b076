"""The training state: everything that a checkpoint restores."""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32
import ml_collections
import optax

from experiments.imagenet import sharding


@struct.dataclass
class State:
  """Everything that a checkpoint restores.

  Attributes:
    step: Steps taken so far.
    params: The model's parameters.
    opt_state: The optimiser's state.
    ema_params: Running average of `params`, or None.
    rng: Raw key that every step's randomness is derived from.
    batch_stats: Running statistics of batch norms, or None without any.
    ema_batch_stats: Their running average; as in timm, it follows the same
      rule as that of the parameters. None without batch norms or average.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  ema_params: Any
  rng: UInt32[Array, "2"]
  batch_stats: Any = None
  ema_batch_stats: Any = None

  def variables(self, weights: str = "model") -> dict[str, Any]:
    """What `model.apply` takes, of the "model" or of its average, "ema"."""
    params, stats = self.params, self.batch_stats
    if weights == "ema":
      params, stats = self.ema_params, self.ema_batch_stats
    return as_variables(params, stats)


def as_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
  """What `model.apply` takes."""
  if batch_stats is None:
    return {"params": params}
  return {"params": params, "batch_stats": batch_stats}


def state_shapes(
  model: nn.Module,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> State:
  """Shape, dtype and placement of every array of the state, for `restore`."""
  shapes = jax.eval_shape(lambda: _init(model, tx, config))
  return jax.tree.map(
    lambda x, placement: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=placement
    ),
    shapes,
    sharding.shardings(shapes, mesh),
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
    mesh: From `sharding.make_mesh`.

  Returns:
    The state of step 0. The average starts at the initial parameters.
  """

  def init() -> State:
    return _init(model, tx, config)

  placements = sharding.shardings(jax.eval_shape(init), mesh)
  return jax.jit(init, out_shardings=placements)()


def with_variables(
  state: State, variables: Any, mesh: jax.sharding.Mesh
) -> State:
  """A new run's state with other initial variables, the averages' too.

  Args:
    state: From `make_state`.
    variables: On the host, of the model's shapes.
    mesh: From `sharding.make_mesh`.
  """

  def put() -> tuple[Any, Any]:
    # Anew for the average: a training step consumes its arrays.
    placed = sharding.put(variables, mesh)
    return placed["params"], placed.get("batch_stats")

  params, stats = put()
  state = dataclasses.replace(state, params=params, batch_stats=stats)
  if state.ema_params is None:
    return state
  params, stats = put()
  return dataclasses.replace(state, ema_params=params, ema_batch_stats=stats)


def _init(
  model: nn.Module,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
) -> State:
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  size = config.data.image_size
  variables = model.init(init_key, jnp.zeros((1, size, size, 3)))
  params, stats = variables["params"], variables.get("batch_stats")
  average = (None, None)
  if config.ema_decay:
    average = jax.tree.map(jnp.array, (params, stats))
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema_params=average[0],
    rng=jax.random.key_data(run_key),
    batch_stats=stats,
    ema_batch_stats=average[1],
  )
