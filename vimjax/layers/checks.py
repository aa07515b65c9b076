"""Messages for wrong fields and wrong images, the same for every family."""

from collections.abc import Sequence
import math
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


def depths(module: nn.Module, value: Any) -> None:
  """Raises ValueError unless they are positive integers, one or more."""
  if not _are_positive_integers(value) or not value:
    raise ValueError(
      f"{type(module).__name__}: depths must be positive integers, one per "
      f"stage, got {value!r}."
    )


def four_positive_integers(module: nn.Module, names: Sequence[str]) -> None:
  """Raises ValueError unless these fields are integers for four stages."""
  for name in names:
    value = getattr(module, name)
    if not _are_positive_integers(value) or len(value) != 4:
      raise ValueError(
        f"{type(module).__name__}: {name} must be four positive integers, got "
        f"{value!r}."
      )


def _are_positive_integers(value: Any) -> bool:
  return isinstance(value, Sequence) and all(
    isinstance(v, int) and v > 0 for v in value
  )


def positive(module: nn.Module, names: Sequence[str]) -> None:
  """Raises ValueError unless these fields are finite and above 0."""
  for name in names:
    value = getattr(module, name)
    if not _is_finite(value) or value <= 0:
      raise ValueError(
        f"{type(module).__name__}: {name} must be positive, got {value!r}."
      )


def not_negative(module: nn.Module, names: Sequence[str]) -> None:
  """Raises ValueError unless these fields are finite and at least 0."""
  for name in names:
    value = getattr(module, name)
    if not _is_finite(value) or value < 0:
      raise ValueError(
        f"{type(module).__name__}: {name} must not be negative, got {value!r}."
      )


def _is_finite(value: Any) -> bool:
  return isinstance(value, numbers.Real) and math.isfinite(value)


def one_of(module: nn.Module, name: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless the field has one of the values."""
  value = getattr(module, name)
  if value not in choices:
    raise ValueError(
      f"{type(module).__name__}: {name} must be one of {list(choices)}, got "
      f"{value!r}."
    )


def dtypes(module: nn.Module) -> None:
  """Raises ValueError unless both are floating point; `dtype` may be None."""
  for name in ("dtype", "param_dtype"):
    value = getattr(module, name)
    if name == "dtype" and value is None:
      continue
    if not _is_floating(value):
      raise ValueError(
        f"{type(module).__name__}: {name} must be a floating point type, such "
        f"as 'float32' or 'bfloat16', got {value!r}."
      )


def _is_floating(value: Any) -> bool:
  try:
    return value is not None and jnp.issubdtype(value, jnp.floating)
  except TypeError:
    return False


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
  sides = _two(size)
  if sides is None:
    raise ValueError(
      f"{type(module).__name__}: image_size must be an integer or (h, w), got "
      f"{size!r}."
    )
  return sides


def _two(size: Any) -> tuple[int, int] | None:
  sides = (size, size) if isinstance(size, numbers.Integral) else size
  if (
    not isinstance(sides, Sequence)
    or len(sides) != 2
    or not all(isinstance(side, numbers.Integral) for side in sides)
  ):
    return None
  return int(sides[0]), int(sides[1])


def image_size(owner: str, size: Any) -> tuple[int, int]:
  """(h, w) from a size of images, of which no pixel is asked.

  Raises:
    ValueError: It is no size; the message starts with `owner`.
  """
  sides = _two(size)
  if sides is None or min(sides) < 1:
    raise ValueError(
      f"{owner}: image_size must be a positive integer or (h, w), got {size!r}."
    )
  return sides


def images(module: Any, x: Any) -> None:
  """Raises unless x is an array of (b, h, w, in_chans) and floating point.

  Raises:
    TypeError: It is no array.
    ValueError: It has another shape or dtype.
  """
  channels = module.in_chans
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise TypeError(
      f"{type(module).__name__}: images must be an array of shape (batch, "
      f"height, width, {channels}), got a {type(x).__name__}; see jnp.asarray."
    )
  if x.ndim != 4 or x.shape[-1] != channels:
    raise ValueError(
      f"{type(module).__name__}: images must have shape (batch, height, width, "
      f"{channels}), got {x.shape}."
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{type(module).__name__}: images must be floating point, got {x.dtype}; "
      "scale the pixels to [0, 1] and normalise them (see vimjax.preprocess)."
    )


def smallest_side(module: nn.Module, x: Any, smallest: int) -> None:
  """Raises ValueError unless both sides of images have as many pixels."""
  h, w = x.shape[1:3]
  if min(h, w) < smallest:
    raise ValueError(
      f"{type(module).__name__}: an image of {h}x{w} pixels is smaller than "
      f"{smallest}x{smallest}; enlarge it."
    )
