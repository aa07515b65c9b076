"""Which published models a model, or a checkpoint, could be."""

from collections.abc import Mapping
from typing import Any, Final

from flax import linen as nn
import numpy as np

from vimjax import registry, variants

# Fields with which a model can still have the published weights.
_FREE: Final = frozenset(
  "num_classes in_chans image_size drop_path_rate pos_embed_resize scan_layers "
  "remat scan_implementation attention_implementation precision dtype "
  "param_dtype".split()
)


def checkpoint(
  model_or_name: nn.Module | str, caller: str
) -> variants.Pretrained:
  """The published checkpoint of a model.

  Raises:
    ValueError: Nothing was published, or several checkpoints fit; the message
      starts with `caller`.
  """
  if isinstance(model_or_name, str):
    names = [model_or_name]
  else:
    names = [n for n in registry.list_models() if _fits(n, model_or_name)]
  found = {n: registry.get_variant(n).pretrained for n in names}
  if len(found) > 1:
    raise ValueError(
      f"{caller}: the weights of {list(found)} all fit this model; give a "
      "name, or a file."
    )
  for pretrained in found.values():
    if pretrained is not None:
      return pretrained
  what = names[0] if names else "this model"
  raise ValueError(
    f"{caller}: no weights were published for {what}; pass a file."
  )


def sibling(model: Any, arrays: Mapping[str, np.ndarray]) -> str | None:
  """A published model that differs from this one only in its patches' stride.

  Args:
    model: Any model.
    arrays: A state dict in official names.

  Returns:
    The model of another stride whose positional embedding is as long as the
    one in `arrays`, if this model's own is not.
  """
  position = arrays.get("pos_embed")
  if "stride" not in registry.field_names(type(model)) or position is None:
    return None
  rows = position.shape[1] if position.ndim == 3 else 0
  if rows == _rows(model):
    return None
  for name in registry.list_models():
    if not _fits(name, model, _FREE | {"stride"}):
      continue
    other = registry.create_model(name)
    if other.stride != model.stride and rows == _rows(other):
      return name
  return None


def _rows(model: Any) -> int:
  """How many rows the positional embedding has."""
  h, w = model.grid(model.image_size)
  return h * w + (getattr(model, "class_token", "first") != "none")


def _fits(name: str, model: nn.Module, free: frozenset[str] = _FREE) -> bool:
  """Whether a published model differs only in fields that are free to."""
  variant = registry.get_variant(name)
  if variant.module is not type(model):
    return False
  published = registry.create_model(name)
  return all(
    getattr(published, field) == getattr(model, field)
    for field in registry.field_names(variant.module)
    if field not in free
  )
