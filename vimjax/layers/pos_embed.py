"""Learned positional embeddings on another grid than they were made for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

# The cubic convolution parameter of torch's "bicubic".
_A = -0.75


def _bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Weights of torch's bicubic interpolation along one axis.

  Pixel centres align as for align_corners=False, without antialiasing;
  samples beyond the edge repeat the edge.
  """
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(centre)
  matrix = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(centre - first - tap)
    near = ((_A + 2) * x - (_A + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * _A - 4 * _A
    column = np.clip(first + tap, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), column), np.where(x <= 1, near, far))
  return matrix


def resize_grid(
  grid: Float[Array, "h w d"], size: tuple[int, int]
) -> Float[Array, "new_h new_w d"]:
  """Resizes as torch's `interpolate(mode="bicubic", align_corners=False)`."""
  h, w, _ = grid.shape
  if (h, w) == size:
    return grid
  rows = jnp.asarray(_bicubic_matrix(h, size[0]), grid.dtype)
  columns = jnp.asarray(_bicubic_matrix(w, size[1]), grid.dtype)
  # Small, and worth full float32 on accelerators whose default is less.
  highest = jax.lax.Precision.HIGHEST
  grid = jnp.einsum("Hh,hwd->Hwd", rows, grid, precision=highest)
  return jnp.einsum("Ww,hwd->hWd", columns, grid, precision=highest)


def resize(
  pos_embed: Float[Array, "tokens d"],
  old: tuple[int, int],
  new: tuple[int, int],
  *,
  old_class_row: int | None,
  new_class_row: int | None,
) -> Float[Array, "new_tokens d"]:
  """Resizes the grid part; the class token's row keeps its value.

  Args:
    pos_embed: Rows in sequence order: h * w patches and perhaps a class token.
    old: (h, w) of the grid in `pos_embed`.
    new: (h, w) wanted.
    old_class_row: Row of the class token in `pos_embed`; None if there is none.
    new_class_row: Row that it gets in the result.
  """
  if old == new and old_class_row == new_class_row:
    return pos_embed
  patches = pos_embed
  if old_class_row is not None:
    patches = jnp.delete(pos_embed, old_class_row, axis=0)
  d = pos_embed.shape[-1]
  patches = resize_grid(patches.reshape(*old, d), new).reshape(-1, d)
  if old_class_row is None or new_class_row is None:
    return patches
  row = pos_embed[old_class_row]
  return jnp.insert(patches, new_class_row, row, axis=0)
