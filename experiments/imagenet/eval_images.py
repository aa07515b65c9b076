"""How a run prepares the images it is measured on: as its model's were."""

from collections.abc import Callable
import functools
from typing import Any, Final, NamedTuple

import ml_collections
from ml_collections import config_dict

import vimjax
from vimjax import variants

# Fields of `config.data`, and what they are in `variants.Preprocessing`.
_FIELDS: Final = {
  "image_size": "size",
  "crop_fraction": "crop_fraction",
  "crop_mode": "crop_mode",
  "mean": "mean",
  "std": "std",
}


class _Op(NamedTuple):
  """What a `FieldReference` calls when it is read."""

  fn: Callable[..., Any]
  args: tuple[Any, ...]


def apply(
  config: ml_collections.ConfigDict, how: variants.Preprocessing
) -> None:
  """Sets the fields of `config.data`."""
  for field, attribute in _FIELDS.items():
    config.data[field] = getattr(how, attribute)


def follow_model(config: ml_collections.ConfigDict) -> None:
  """Lets the fields be those of the model, whichever will be chosen.

  A field that is set keeps its value.

  Args:
    config: A configuration; changed in place.
  """
  name = config.model.get_ref("name")
  for field, attribute in _FIELDS.items():
    config.data[field] = config_dict.FieldReference(
      config.data[field],
      op=_Op(functools.partial(_of_model, attribute), (name,)),
    )


def _of_model(attribute: str, otherwise: Any, name: str) -> Any:
  if name not in vimjax.list_models():
    return otherwise  # Whoever makes the model has more to say about that.
  return getattr(vimjax.get_variant(name).preprocessing, attribute)


def of(config: ml_collections.ConfigDict) -> variants.Preprocessing:
  """How a run prepares the images that it is measured on."""
  how = {attribute: config.data[field] for field, attribute in _FIELDS.items()}
  return variants.Preprocessing(**how)
