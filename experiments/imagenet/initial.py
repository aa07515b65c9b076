"""Weights that a run starts from: where they are, and whose they are."""

from collections.abc import Sequence
import hashlib
import json
import os
import pathlib
from typing import Any, Final

from flax import linen as nn
import jax
import ml_collections

from experiments.imagenet import errors, eval_images
import vimjax
from vimjax import variants
from vimjax.weights import checkpoint_files, download, trained

# `config.init_from` for what was published of a model: of the run's own, or
# after a colon of another.
PUBLISHED: Final = "published"
_LARGEST_HEADER: Final = 100_000_000
_IMAGENET_CLASSES: Final = 1000
# Fields of a model that say how it is computed or trained, not what it is, and
# two that the arrays and the images' size say.
_NOT_OF_WEIGHTS: Final = frozenset(
  (
    "attention_implementation",
    "drop_path_rate",
    "dtype",
    "image_size",
    "num_classes",
    "remat",
    "scan_implementation",
    "scan_layers",
  )
)


def load(
  config: ml_collections.ConfigDict, model: nn.Module
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads `config.init_from` into variables of the run's model.

  A head of another size is replaced by a new one, and a positional embedding of
  another grid is resized.

  Args:
    config: The run's configuration.
    model: Its model.

  Returns:
    The variables, on the host, and for config.json where they are from: `path`,
    `sha256`, `weights`, `license` and `commercial_use` (None: not known).

  Raises:
    errors.ConfigError: The file is not there, is damaged or does not fit; or
      its licence must be accepted, or a package is missing.
  """
  try:
    path, published = _find(config)
    variables = vimjax.load_pretrained(
      model,
      path,
      weights=config.init_weights,
      rng=jax.random.key(config.seed),
    )
    return jax.device_get(variables), {
      "path": str(path),
      "sha256": _sha256(path),
      "weights": config.init_weights,
      **_licence(path, published),
    }
  except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
    raise errors.ConfigError(
      f"config.init_from={config.init_from!r}: {error}"
    ) from error


def _find(
  config: ml_collections.ConfigDict,
) -> tuple[pathlib.Path, variants.Pretrained | None]:
  """The file, and the published weights that are in it or that it is like."""
  kind, _, name = config.init_from.partition(":")
  own = vimjax.get_variant(config.model.name)
  if kind != PUBLISHED:
    path = pathlib.Path(config.init_from).expanduser().resolve()
    return path, own.pretrained or _of_the_family(own)
  name = name or config.model.name
  published = vimjax.get_variant(name).pretrained
  if published is None:
    raise ValueError(f"no weights were published for {name}.")
  path = download.fetch(
    published,
    accept_license=config.accept_license,
    consent="--config.accept_license=True",
  )
  return path, published


def _of_the_family(own: variants.Variant) -> variants.Pretrained | None:
  others = (vimjax.get_variant(name) for name in vimjax.list_models())
  return next(
    (v.pretrained for v in others if v.module is own.module and v.pretrained),
    None,
  )


def _licence(
  path: pathlib.Path, published: variants.Pretrained | None
) -> dict[str, Any]:
  """What can be said of the licence of a file.

  Files with our names say so themselves, if anything; those with official names
  are taken for what their authors published.
  """
  metadata = _metadata(path)
  ours = checkpoint_files.is_ours(checkpoint_files.read_state_dict(path))
  if "license" in metadata:
    allowed = {"true": True, "false": False}
    return {
      "license": metadata["license"],
      "commercial_use": allowed.get(metadata.get("commercial_use", "")),
    }
  if ours or published is None:
    return {"license": None, "commercial_use": None}
  return {
    "license": published.license,
    "commercial_use": published.commercial_use,
  }


def _metadata(path: pathlib.Path) -> dict[str, str]:
  """The metadata of a safetensors file; of others, nothing."""
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if file.read(1) != b"{" or length > _LARGEST_HEADER:
      return {}
    return json.loads(b"{" + file.read(length - 1)).get("__metadata__", {})


def _sha256(path: str | os.PathLike[str]) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def metadata(
  config: ml_collections.ConfigDict,
  initial: dict[str, Any] | None,
  class_names: Sequence[str] | None = None,
) -> dict[str, str]:
  """What a file of the run's own weights says of itself.

  Args:
    config: The run's configuration.
    initial: From `load`, or None where the run started from nothing.
    class_names: Of the data. The names of ImageNet's classes are known, and
      names that are not those of all outputs say nothing of any.
  """
  overrides = config.model.overrides
  classes = overrides.num_classes
  if classes == _IMAGENET_CLASSES or len(class_names or ()) != classes:
    class_names = None
  said = trained.describe(
    config.model.name,
    fields={
      name: value
      for name, value in overrides.items()
      if value is not None and name not in _NOT_OF_WEIGHTS
    },
    preprocessing=eval_images.of(config),
    classes=class_names,
  )
  said["data"] = config.data.name
  if initial and initial["license"]:
    said["license"] = initial["license"]
    said["commercial_use"] = str(initial["commercial_use"]).lower()
  return said
