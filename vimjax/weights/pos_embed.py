"""Fits an official positional embedding to a model for another image size."""

import dataclasses
import logging
import math

import jax.numpy as jnp
import numpy as np

from vimjax.models import deit, vim

_LOG = logging.getLogger(__name__)

Size = int | tuple[int, int]
_Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Origin:
  """Which image size a checkpoint may be of.

  Attributes:
    image_sizes: Sizes, the likeliest first; None stands for any square grid.
    asked: Whether the caller asked for the new image size; if not, a resize is
      a warning.
  """

  image_sizes: tuple[Size | None, ...]
  asked: bool


def fit(
  model: vim.Vim | deit.DeiT,
  state_dict: dict[str, np.ndarray],
  origin: Origin,
  *,
  class_token: bool,
) -> dict[str, np.ndarray]:
  """Resizes "pos_embed", (1, tokens, d), if the model's grid is another.

  Args:
    model: Takes the result.
    state_dict: Official keys and arrays.
    origin: What the checkpoint may be of.
    class_token: Whether one of the rows is a class token's.

  Raises:
    ValueError: The checkpoint's grid cannot be told.
  """
  position = state_dict.get("pos_embed")
  if position is None or position.ndim != 3:
    return state_dict  # A problem for the rules to report.
  new = model.grid(model.image_size)
  old = _old_grid(model, position.shape[1] - class_token, origin)
  if old == new:
    return state_dict
  _LOG.log(
    logging.INFO if origin.asked else logging.WARNING,
    "Resizing pos_embed from a grid of %dx%d to %dx%d%s.",
    *(*old, *new),
    "" if origin.asked else "; pass image_size= if that is meant",
  )
  rows = jnp.asarray(position[0], jnp.float32)
  resized = model.resize_pos_embed(rows, old, new)
  return {**state_dict, "pos_embed": np.asarray(resized)[None]}


def _old_grid(
  model: vim.Vim | deit.DeiT, patches: int, origin: Origin
) -> _Grid:
  """The first of the possible grids that has as many patches."""
  side = math.isqrt(max(patches, 0))
  for size in origin.image_sizes:
    rows, columns = (side, side) if size is None else model.grid(size)
    if rows * columns == patches > 0:
      return rows, columns
  new = model.grid(model.image_size)
  raise ValueError(
    f"pos_embed has {patches} patches, the model needs {new[0]}x{new[1]}, and "
    "these are no square grid to resize. Convert with a model whose image_size "
    "is that of the checkpoint; it takes images of any size."
  )
