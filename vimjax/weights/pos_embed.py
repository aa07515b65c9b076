"""Fits an official positional embedding to a model for another image size."""

from collections.abc import Callable
import logging
import math

import jax.numpy as jnp
import numpy as np

from vimjax.layers import pos_embed

_LOG = logging.getLogger(__name__)


def fit(
  state_dict: dict[str, np.ndarray],
  grid: tuple[int, int],
  class_row: Callable[[int], int | None],
) -> dict[str, np.ndarray]:
  """Resizes "pos_embed", (1, tokens, d), to a grid if it has another.

  Args:
    state_dict: Official keys and arrays.
    grid: Rows and columns of patches that the model is for.
    class_row: Row of the class token among so many patches, if there is one.

  Raises:
    ValueError: The checkpoint's grid cannot be told, as it is not square.
  """
  old, (h, w) = state_dict.get("pos_embed"), grid
  extra = class_row(h * w) is not None
  if old is None or old.ndim != 3 or old.shape[1] == h * w + extra:
    return state_dict
  patches = old.shape[1] - extra
  side = math.isqrt(max(patches, 0))
  if side == 0 or side * side != patches:
    raise ValueError(
      f"pos_embed has {old.shape[1]} rows, the model needs {h * w + extra} for "
      f"a grid of {h}x{w}, and {patches} patches are not a square grid. "
      "Convert with a model whose image_size is that of the checkpoint: it "
      "takes images of any size."
    )
  resized = pos_embed.resize(
    jnp.asarray(old[0], jnp.float32),
    (side, side),
    (h, w),
    old_class_row=class_row(patches),
    new_class_row=class_row(h * w),
  )
  _LOG.info("Resized pos_embed from %dx%d to %dx%d.", side, side, h, w)
  return {**state_dict, "pos_embed": np.asarray(resized)[None]}
