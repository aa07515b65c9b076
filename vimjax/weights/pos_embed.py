"""Fits an official positional embedding to a model for another image size."""

from collections.abc import Callable
import logging
import math

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

_LOG = logging.getLogger(__name__)

_Grid = tuple[int, int]


def fit(
  state_dict: dict[str, np.ndarray],
  old: _Grid,
  new: _Grid,
  *,
  class_token: bool,
  resize: Callable[[Array, _Grid, _Grid], Array],
) -> dict[str, np.ndarray]:
  """Resizes "pos_embed", (1, tokens, d), to a grid if it has another.

  Args:
    state_dict: Official keys and arrays.
    old: The checkpoint's rows and columns of patches, if its tokens are as many
      as that gives; otherwise its grid must be square.
    new: The model's.
    class_token: Whether one of the rows is a class token's.
    resize: Takes the rows, the old and the new grid.

  Raises:
    ValueError: The checkpoint's grid cannot be told.
  """
  position = state_dict.get("pos_embed")
  if position is None or position.ndim != 3:
    return state_dict  # A problem for the rules to report.
  patches = position.shape[1] - class_token
  if patches != old[0] * old[1]:
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
      raise ValueError(
        f"pos_embed has {patches} patches, the model needs {new[0]}x{new[1]}, "
        "and these are no square grid to resize. Convert with a model whose "
        "image_size is that of the checkpoint; it takes images of any size."
      )
    old = (side, side)
  if old == new:
    return state_dict
  _LOG.info("Resizing pos_embed from a grid of %s to %s.", old, new)
  resized = resize(jnp.asarray(position[0], jnp.float32), old, new)
  return {**state_dict, "pos_embed": np.asarray(resized)[None]}
