"""How images are prepared for evaluation: as a model's were, or as a run says.

Weights are chosen under one preparation, and are to be measured under the same:
a file of a run's weights says which it was.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
from typing import Any, Final, NamedTuple

import ml_collections
from ml_collections import config_dict

import vimjax
from vimjax import variants
from vimjax.weights import checkpoint_files

# Fields of `config.data`, and what they are in `variants.Preprocessing`.
_FIELDS: Final = {
  "image_size": "size",
  "crop_fraction": "crop_fraction",
  "crop_mode": "crop_mode",
  "mean": "mean",
  "std": "std",
}
# Where a file's header has all but the size, which vimjax knows how to write.
_KEY: Final = "preprocessing"


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


def metadata(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What `recorded` reads from a file of a run's weights.

  Args:
    config: The run's configuration.
  """
  fields = {
    attribute: config.data[field]
    for field, attribute in _FIELDS.items()
    if attribute != "size"
  }
  size = checkpoint_files.size_metadata(config.data.image_size)
  return {**size, _KEY: json.dumps(fields)}


def recorded(
  metadata: Mapping[str, str],
  otherwise: variants.Preprocessing,
  *,
  image_size: int | None = None,
) -> variants.Preprocessing:
  """What a file of weights says of their preparation.

  Args:
    metadata: Of the file.
    otherwise: Has what the file does not say.
    image_size: Instead of the file's, in pixels.

  Returns:
    The preparation that the weights were chosen under.

  Raises:
    ValueError: It cannot be understood, or the images are not square.
  """
  try:
    said: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in json.loads(metadata.get(_KEY, "{}")).items()
    }
    how = dataclasses.replace(otherwise, **said)
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f"the file's header has an unknown {_KEY!r}: {metadata[_KEY]}"
    ) from error
  size = checkpoint_files.recorded_size(metadata)
  if image_size is None and size is not None:
    image_size, width = size
    if image_size != width:
      raise ValueError(
        f"these weights are for images of {image_size}x{width} pixels; choose "
        "a square: --image_size=N."
      )
  return dataclasses.replace(how, size=image_size or how.size)
