"""Variables from checkpoint files: `load_pretrained`."""

from collections.abc import Mapping
import os
import re
from typing import Any, Final

from flax import linen as nn
from jaxtyping import Array

from vimjax import registry, variants
from vimjax.weights import checkpoint_files, convert, download, export

# Fields with which a model can still have the published weights.
_FREE: Final = frozenset(
  "num_classes image_size drop_path_rate pos_embed_resize scan_layers remat "
  "scan_implementation attention_implementation precision dtype "
  "param_dtype".split()
)


def load_pretrained(
  model_or_name: nn.Module | str,
  path: str | os.PathLike[str] | None = None,
  *,
  weights: checkpoint_files.Weights = "model",
  image_size: int | tuple[int, int] | None = None,
  rng: Array | None = None,
  accept_license: bool = False,
) -> dict[str, Any]:
  """Loads a checkpoint as variables for `model.apply`.

  Reads safetensors files and those of PyTorch (.pth, .pth.tar; zip and legacy
  form) without PyTorch, and without running what is in them. Official state
  dicts are converted as by `vimjax.convert_state_dict`; files of `python -m
  vimjax.convert` and `vimjax.save_variables` hold our variables already.

  Args:
    model_or_name: A model, or a name for `create_model`.
    path: The file. None downloads the published one into the user's cache, and
      prints its licence.
    weights: "model", or "ema" for the running average of a checkpoint that has
      one.
    image_size: The variables fit the model with this `image_size`: positional
      embeddings are resized.
    rng: Key for a new classifier, for a model of another `num_classes`.
    accept_license: Needed to download weights that may not be used
      commercially (MambaVision's).

  Returns:
    {"params": ...} and, with batch norms, {"batch_stats": ...}.

  Raises:
    ValueError: The file does not fit the model (one message has all problems),
      is damaged or holds other things (`CheckpointError`, a ValueError), or a
      licence must be accepted.
    TypeError: `model_or_name` is neither.
    OSError: The file cannot be read or downloaded.
    ModuleNotFoundError: The extra `weights` is needed and not installed.
  """
  model, _ = convert.resolve(model_or_name, "load_pretrained")
  if path is None:
    published = _published(model_or_name)
    path = download.fetch(published, accept_license=accept_license)
  try:
    return convert.convert_state_dict(
      model,
      read_official(model, path, weights),
      image_size=image_size,
      rng=rng,
    )
  except checkpoint_files.CheckpointError:
    raise
  except ValueError as error:
    raise ValueError(f"{os.fspath(path)}: {error}") from error


def read_official(
  model: nn.Module,
  path: str | os.PathLike[str],
  weights: checkpoint_files.Weights = "model",
) -> Mapping[str, Any]:
  """The state dict of a file in official names, ours turned back.

  Raises:
    ValueError: It cannot be read (`CheckpointError`), or is of another family.
  """
  state_dict = checkpoint_files.read_state_dict(path, weights)
  if not checkpoint_files.is_ours(state_dict):
    return state_dict
  return export.official_names(model, checkpoint_files.unflatten(state_dict))


def class_count(state_dict: Mapping[str, Any]) -> int | None:
  """How many classes an official state dict has, if that can be told."""
  heads = [k for k in state_dict if re.fullmatch(r"(.*\.)?head\.weight", k)]
  return int(state_dict[heads[0]].shape[0]) if len(heads) == 1 else None


def _published(model_or_name: nn.Module | str) -> variants.Pretrained:
  """What to download for a model.

  Raises:
    ValueError: Nothing was published, or several checkpoints fit.
  """
  if isinstance(model_or_name, str):
    names = [model_or_name]
  else:
    names = [n for n in registry.list_models() if _fits(n, model_or_name)]
  found = {n: registry.get_variant(n).pretrained for n in names}
  if len(found) > 1:
    raise ValueError(
      f"load_pretrained: the weights of {list(found)} all fit this model; give "
      "a name, or the path of a file."
    )
  for pretrained in found.values():
    if pretrained is not None:
      return pretrained
  what = names[0] if names else "this model"
  raise ValueError(
    f"load_pretrained: no weights were published for {what}; pass the path of "
    "a file."
  )


def _fits(name: str, model: nn.Module) -> bool:
  variant = registry.get_variant(name)
  if variant.module is not type(model):
    return False
  published = registry.create_model(name)
  return all(
    getattr(published, field) == getattr(model, field)
    for field in registry.field_names(variant.module)
    if field not in _FREE
  )
