"""A look inside models: what a pixel, a token or a feature depends on."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vimjax import registry
from vimjax.layers import attention, cross_scan, ssd, ssm, windows
from vimjax.models import deit, mambavision, vim

_SCANS = (ssm.SelectiveSSM, cross_scan.CrossSelectiveSSM, ssd.CrossSSD)
_Path = tuple[str, ...]


def effective_receptive_field(
  model: nn.Module, variables: Any, images: Float[Array, "b h w c"]
) -> Float[Array, "h w"]:
  """How much the middle of the last feature map depends on each pixel.

  The protocol of VMamba (https://arxiv.org/abs/2401.10166, figure 5): the
  gradient of the positive parts of the central features by the pixels, its
  positive part summed over channels and averaged over images.

  Args:
    model: A model of this package.
    variables: Its variables.
    images: Normalised images.

  Returns:
    Float32, not negative. For a picture, VMamba's authors take the power 0.2
    and divide by the largest value.
  """

  def centre(images):
    maps: Any = model.apply(variables, images, method="features")
    last = maps[-1] if isinstance(maps, tuple) else maps
    h, w = last.shape[1:3]
    return nn.relu(last[:, h // 2, w // 2].astype(jnp.float32)).sum()

  gradient = jax.jit(jax.grad(centre))(images)
  return nn.relu(gradient).sum(-1).mean(0).astype(jnp.float32)


def feature_pca(
  features: Float[Array, "b h w d"], components: int = 3
) -> Float[np.ndarray, "b h w c"]:
  """The main directions of a feature map, for instance as colours.

  Args:
    features: One map, of one or more images that share the directions.
    components: How many directions c.

  Returns:
    Projections on the principal components, each scaled to [0, 1] between its
    2nd and its 98th percentile.

  Raises:
    ValueError: There are fewer channels or tokens than components.
  """
  flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
  if components > min(flat.shape):
    raise ValueError(
      f"feature_pca: {flat.shape[0]} tokens of {flat.shape[1]} channels have "
      f"no {components} principal components."
    )
  flat = flat - flat.mean(0)
  _, _, directions = np.linalg.svd(flat, full_matrices=False)
  projected = flat @ directions[:components].T
  low, high = np.percentile(projected, (2, 98), axis=0)
  scaled = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
  return scaled.reshape(*features.shape[:3], components)


@dataclasses.dataclass(frozen=True)
class MixingLayer:
  """A layer that moves information between tokens.

  Attributes:
    path: Of the module that holds what mixes.
    parts: Paths of what mixes; the scans of both directions are two.
    shape: Of the input of each part: (b, l, d), (windows, l, d) or (b, h, w,
      d).
    grid: Rows and columns of the tokens, without a class token.
    window: Side of the windows that do not see each other, if there are any.
  """

  path: _Path
  parts: tuple[_Path, ...]
  shape: tuple[int, ...]
  grid: tuple[int, int]
  window: int | None = None


def mixing_layers(
  model: nn.Module, variables: Any, images: Float[Array, "b h w c"]
) -> list[MixingLayer]:
  """The layers whose `token_attention` can be asked for, in their order."""
  found: dict[_Path, MixingLayer] = {}
  stage: dict[str, Any] = {}

  def intercept(function, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__":
      return function(*args, **kwargs)
    if isinstance(module, mambavision.WindowStage):
      stage.update(grid=args[0].shape[1:3], window=module.window_size)
    if isinstance(module, (*_SCANS, attention.Attention)):
      path, shape = module.path, args[0].shape
      is_scan = isinstance(module, _SCANS)
      owner = path[:-1] if is_scan else path
      where = dict(stage)
      if not where:
        where["grid"] = shape[1:3] if len(shape) == 4 else _grid(model, images)
      parts = found[owner].parts if owner in found else ()
      found[owner] = MixingLayer(owner, (*parts, path), shape, **where)
    return function(*args, **kwargs)

  with nn.intercept_methods(intercept):
    jax.eval_shape(
      registry.with_scan_layers(model, False).apply, variables, images
    )
  return list(found.values())


def token_attention(
  model: nn.Module,
  variables: Any,
  images: Float[Array, "b h w c"],
  *,
  layer: int = -1,
  token: tuple[int, int] | None = None,
) -> Float[Array, "b rows columns"]:
  """How much the output of a layer at one token takes from each token.

  A selective scan is linear in its input once its step sizes, B and C are
  known: y_i = sum_j M_ij u_j, with a matrix M per channel that is the implicit
  attention of Mamba (Ali et al., https://arxiv.org/abs/2403.01590). This is
  the mean over the channels of |M_ij|, added up over the directions of a
  layer, without ever forming M; for softmax attention the mean of the weights
  over the heads.

  Args:
    model: A model of this package.
    variables: Its variables, with layers that are not stacked.
    images: Normalised images.
    layer: Index among `mixing_layers`; negative ones count from the end.
    token: Row and column of token i. None is the class token where there is
      one, otherwise the middle.

  Returns:
    One map per image, not negative.

  Raises:
    ValueError: There is no such layer or token.
  """
  layers = mixing_layers(model, variables, images)
  if not -len(layers) <= layer < len(layers):
    raise ValueError(
      f"token_attention: layer must be from {-len(layers)} to "
      f"{len(layers) - 1}, got {layer}."
    )
  chosen = layers[layer]
  rows, columns = chosen.grid
  if token is not None and not (
    0 <= token[0] < rows and 0 <= token[1] < columns
  ):
    raise ValueError(
      f"token_attention: token must lie in a grid of {rows}x{columns}, got "
      f"{token}."
    )
  index = _index(model, chosen, token)
  maps = jax.jit(
    lambda variables, images: _maps(model, variables, images, chosen, index)
  )(variables, images)
  return _to_grid(model, chosen, maps, images.shape[0])


def _grid(model: Any, images: Array) -> tuple[int, int]:
  return model.grid((images.shape[1], images.shape[2]))


def _class_row(model: Any, grid: tuple[int, int]) -> int | None:
  """Where the class token is among the tokens."""
  if isinstance(model, deit.DeiT):
    return 0
  patches = grid[0] * grid[1]
  return model.class_row(patches) if isinstance(model, vim.Vim) else None


def _index(
  model: nn.Module, layer: MixingLayer, token: tuple[int, int] | None
) -> tuple[Any, ...]:
  """Index of a token in the output of a layer, for all images."""
  class_row = _class_row(model, layer.grid)
  if token is None and class_row is not None:
    return (slice(None), class_row)
  row, column = token or (layer.grid[0] // 2, layer.grid[1] // 2)
  if len(layer.shape) == 4:
    return (slice(None), row, column)
  if layer.window is not None:
    size = layer.window
    columns = -(-layer.grid[1] // size)
    each = columns * -(-layer.grid[0] // size)
    first = (row // size) * columns + column // size
    return (slice(first, None, each), row % size * size + column % size)
  place = row * layer.grid[1] + column
  return (slice(None), place + (class_row is not None and place >= class_row))


def _maps(
  model: Any,
  variables: Any,
  images: Array,
  layer: MixingLayer,
  index: tuple[Any, ...],
) -> Array:
  """What the token takes from all tokens, in the layer's own shape."""

  def outputs(offsets: Sequence[Array]) -> tuple[Array, Array | None]:
    total: list[Array] = []
    weights: list[Array] = []
    heads: dict[_Path, int] = {}

    def intercept(function, args, kwargs, context):
      if context.method_name != "__call__":
        return function(*args, **kwargs)
      module, path = context.module, context.module.path
      if path in layer.parts and isinstance(module, _SCANS):
        y = function(args[0] + offsets[layer.parts.index(path)])
        total.append(y[index].astype(jnp.float32).sum())
        return y
      if path in layer.parts:
        heads[path] = module.num_heads
      elif path[:-1] in layer.parts and path[-1] == "x_proj":
        # Step sizes, B and C stay what they are.
        return function(jax.lax.stop_gradient(args[0]))
      result = function(*args, **kwargs)
      if path[:-1] in heads and path[-1] == "qkv":
        weights.append(_softmax_weights(result, heads[path[:-1]], index))
      return result

    with nn.intercept_methods(intercept):
      registry.with_scan_layers(model, False).apply(variables, images)
    return sum(total, jnp.zeros(())), weights[0] if weights else None

  dtype = jnp.dtype(model.dtype or images.dtype)
  zeros = [jnp.zeros(layer.shape, dtype) for _ in layer.parts]
  gradients, weights = jax.grad(outputs, has_aux=True)(zeros)
  if weights is not None:
    return weights
  sizes = [jnp.abs(g.astype(jnp.float32)).mean(-1) for g in gradients]
  return jnp.stack(sizes).sum(0)


def _softmax_weights(
  qkv: Float[Array, "b l d3"], heads: int, index: tuple[Any, ...]
) -> Float[Array, "b l"]:
  """Mean over the heads of a token's attention weights; 0 for other windows."""
  b, l, d3 = qkv.shape
  size = d3 // 3 // heads
  wide = qkv.astype(jnp.float32).reshape(b, l, 3, heads, size)
  q, k = wide[index][:, 0], wide[index[0], :, 1]
  scores = jnp.einsum("bhs,blhs->bhl", q, k) / jnp.sqrt(size)
  weights = jax.nn.softmax(scores, axis=-1).mean(1)
  return jnp.zeros((b, l)).at[index[0]].set(weights)


def _to_grid(
  model: nn.Module, layer: MixingLayer, maps: Array, b: int
) -> Float[Array, "b rows columns"]:
  """A map per image from a layer's own arrangement of tokens."""
  if len(layer.shape) == 4:
    return maps
  if layer.window is not None:
    return windows.merge(maps[..., None], layer.window, layer.grid)[..., 0]
  class_row = _class_row(model, layer.grid)
  if class_row is not None:
    maps = jnp.delete(maps, class_row, axis=1)
  return maps.reshape(b, *layer.grid)
