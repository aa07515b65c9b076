"""What a file of weights that you trained says of its model and its images.

Weights are meant for the model they were trained with, and chosen under one
preparation of the images. `describe` puts both into the metadata of a
safetensors file; the command lines of `vimjax` and `experiments.evaluate` then
need no more than the file and the name of the model.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any, Final

from vimjax import registry, variants
from vimjax.weights import checkpoint_files

_MODEL: Final = "model"
_FIELDS: Final = "model_fields"
_CLASSES: Final = "classes"
_PREPROCESSING: Final = "preprocessing"


def describe(
  name: str,
  *,
  fields: Mapping[str, Any],
  preprocessing: variants.Preprocessing,
  classes: Sequence[str] | None = None,
) -> dict[str, str]:
  """Metadata for `save_variables`.

  Args:
    name: One of `vimjax.list_models()`.
    fields: Those of the model that are not the published ones, for
      `create_model`; all but the number of classes and the image size, which
      the arrays and the preparation have.
    preprocessing: How the images were prepared.
    classes: Names of the classes, if they have any.
  """
  how = dataclasses.asdict(preprocessing)
  size = checkpoint_files.size_metadata(how.pop("size"))
  said = {_MODEL: name, **size, _PREPROCESSING: json.dumps(how)}
  if fields:
    said[_FIELDS] = json.dumps(dict(fields), sort_keys=True)
  if classes is not None:
    said[_CLASSES] = json.dumps(list(classes))
  return said


def model_fields(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
  """Fields for `create_model(name)`; none where the file is of another model.

  Raises:
    ValueError: They cannot be understood.
  """
  if metadata.get(_MODEL) != name:
    return {}
  return _fields(metadata, _FIELDS)


def class_names(metadata: Mapping[str, str]) -> list[str] | None:
  """Names of the classes, or None where the file has none.

  Raises:
    ValueError: They cannot be understood.
  """
  return _parsed(metadata, _CLASSES, list)


def preprocessing(
  metadata: Mapping[str, str],
  otherwise: variants.Preprocessing,
  *,
  image_size: int | None = None,
) -> variants.Preprocessing:
  """How the images for some weights are prepared.

  Args:
    metadata: Of the file.
    otherwise: Has what the file does not say.
    image_size: Instead of the file's, in pixels.

  Raises:
    ValueError: The file's cannot be understood, or its images are not square.
  """
  said = _fields(metadata, _PREPROCESSING)
  try:
    how = dataclasses.replace(otherwise, **said)
  except TypeError as error:
    raise _unknown(metadata, _PREPROCESSING) from error
  size = checkpoint_files.recorded_size(metadata)
  if image_size is None and size is not None:
    image_size, width = size
    if image_size != width:
      raise ValueError(
        f"these weights are for images of {image_size}x{width} pixels; choose "
        "a square one."
      )
  return dataclasses.replace(how, size=image_size or how.size)


def hint(metadata: Mapping[str, str]) -> str:
  """Whose weights these are, for a message; empty where nothing is known."""
  if _MODEL not in metadata:
    return ""
  fields = model_fields(metadata, metadata[_MODEL])
  call = [repr(metadata[_MODEL]), *(f"{k}={v!r}" for k, v in fields.items())]
  return f"The file is of vimjax.create_model({', '.join(call)})."


def _fields(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
  """What dataclasses are made of, whose sequences are tuples."""
  return registry.with_tuples(_parsed(metadata, key, dict) or {})


def _parsed(metadata: Mapping[str, str], key: str, kind: type) -> Any:
  if key not in metadata:
    return None
  try:
    value = json.loads(metadata[key])
  except ValueError as error:
    raise _unknown(metadata, key) from error
  if not isinstance(value, kind):
    raise _unknown(metadata, key)
  return value


def _unknown(metadata: Mapping[str, str], key: str) -> ValueError:
  text = metadata[key][:200]
  return ValueError(f"the file's header has an unknown {key!r}: {text}")
