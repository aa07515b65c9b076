"""Square windows of a feature map as independent token sequences."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def partition(
  x: Float[Array, "b h w d"], size: int
) -> Float[Array, "windows tokens d"]:
  """Cuts a map into windows of `size` x `size`, each row by row.

  A side that is no multiple of `size` is padded with zeros at its end.

  Returns:
    The windows of the first image row by row, then those of the second, ...
  """
  b, h, w, d = x.shape
  rows, columns = -(-h // size), -(-w // size)
  padding = (rows * size - h, columns * size - w)
  x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
  x = x.reshape(b, rows, size, columns, size, d).swapaxes(2, 3)
  return x.reshape(b * rows * columns, size * size, d)


def merge(
  windows: Float[Array, "windows tokens d"], size: int, shape: tuple[int, int]
) -> Float[Array, "b h w d"]:
  """The inverse of `partition` for maps of `shape`, (h, w), without padding."""
  h, w = shape
  rows, columns = -(-h // size), -(-w // size)
  # Sizes in full: -1 cannot be told in an empty batch.
  b, d = windows.shape[0] // (rows * columns), windows.shape[-1]
  x = windows.reshape(b, rows, columns, size, size, d).swapaxes(2, 3)
  return x.reshape(b, rows * size, columns * size, d)[:, :h, :w]
