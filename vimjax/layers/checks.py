"""Messages for wrong fields and wrong images, the same for every family."""

from collections.abc import Sequence
import numbers
from typing import Any

from flax import linen as nn
import jax.numpy as jnp


def positive_integers(module: nn.Module, names: Sequence[str]) -> None:
  """Raises ValueError unless these fields are integers of at least 1."""
  for name in names:
    value = getattr(module, name)
    if not isinstance(value, numbers.Integral) or value < 1:
      raise ValueError(
        f"{type(module).__name__}: {name} must be a positive integer, got "
        f"{value!r}."
      )


def one_of(module: nn.Module, name: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless the field has one of the values."""
  value = getattr(module, name)
  if value not in choices:
    raise ValueError(
      f"{type(module).__name__}: {name} must be one of {list(choices)}, got "
      f"{value!r}."
    )


def probability(module: nn.Module, name: str) -> None:
  """Raises ValueError unless the field is in [0, 1)."""
  value = getattr(module, name)
  if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
    raise ValueError(
      f"{type(module).__name__}: {name} must be in [0, 1), got {value!r}."
    )


def pair(module: nn.Module, size: Any) -> tuple[int, int]:
  """(h, w) from an image size that is (h, w) or one integer.

  Raises:
    ValueError: It is neither.
  """
  sides = (size, size) if isinstance(size, numbers.Integral) else size
  if (
    not isinstance(sides, Sequence)
    or len(sides) != 2
    or not all(isinstance(side, numbers.Integral) for side in sides)
  ):
    raise ValueError(
      f"{type(module).__name__}: image_size must be an integer or (h, w), got "
      f"{size!r}."
    )
  return int(sides[0]), int(sides[1])


def images(module: nn.Module, x: Any) -> None:
  """Raises ValueError unless x is (b, h, w, 3) and floating point."""
  if x.ndim != 4 or x.shape[-1] != 3:
    raise ValueError(
      f"{type(module).__name__}: images must have shape (batch, height, width, "
      f"3), got {x.shape}."
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{type(module).__name__}: images must be floating point, got {x.dtype}; "
      "scale the pixels to [0, 1] and normalise them (see vimjax.preprocess)."
    )
