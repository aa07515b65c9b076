"""Checks of what every model takes: batches of normalised RGB images."""

import jax.numpy as jnp
from jaxtyping import Array


def check(model: str, images: Array) -> None:
  """Raises ValueError unless `images` is a float (b, h, w, 3).

  Args:
    model: Name of the model, for the message.
    images: What the caller passed.
  """
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(
      f"{model}: images must have shape (batch, height, width, 3), got "
      f"{images.shape}."
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"{model}: images must be floating point, got {images.dtype}; scale the "
      "pixels to [0, 1] and normalise them (see vimjax.preprocess)."
    )


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
  """(h, w) of a size that may be one number for both."""
  h, w = (size, size) if isinstance(size, int) else size
  return h, w
