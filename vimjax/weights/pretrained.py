"""Variables from checkpoint files: `load_pretrained`."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import math
import os
import re
from typing import Any

from flax import linen as nn
from jaxtyping import Array
import numpy as np

from vimjax import registry, variants
from vimjax.weights import (
  checkpoint_files,
  convert,
  download,
  export,
  published,
  trained,
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
      embeddings are resized. Files written with an image size are resized from
      that, others as by `vimjax.convert_state_dict`, ours preferably from the
      model's own.
    rng: Key for a new classifier, for a model of another `num_classes`.
    accept_license: Needed to download weights that may not be used
      commercially (MambaVision's).

  Returns:
    {"params": ...} and, with batch norms, {"batch_stats": ...}.

  Raises:
    ValueError: The file does not fit the model (one message has all problems,
      of very many the first), is damaged or holds other things
      (`CheckpointError`, a ValueError), is of another published model, or its
      licence must be accepted.
    TypeError: `model_or_name` is neither, or `rng` is no key.
    OSError: The file cannot be read or downloaded.
    ModuleNotFoundError: The extra `weights` is needed and not installed.
  """
  model, _ = convert.resolve(model_or_name, "load_pretrained")
  if path is None:
    path = download.fetch(
      published.checkpoint(model_or_name, "load_pretrained"),
      accept_license=accept_license,
    )
  with naming(path):
    found = read(model, path, weights)
    return found.convert_for(model, image_size=image_size, rng=rng)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Puts the file's name before messages about what does not fit a model."""
  try:
    yield
  except checkpoint_files.CheckpointError:
    raise  # It has the name.
  except ValueError as error:
    raise ValueError(f"{os.fspath(path)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds.

  Attributes:
    state_dict: Official names to arrays.
    variables: Ours, if it is these that the file has.
    metadata: What a safetensors file says about itself.
  """

  state_dict: Mapping[str, Any]
  variables: Mapping[str, Any] | None
  metadata: Mapping[str, str]

  @property
  def made_for(self) -> tuple[Any, ...]:
    """Image sizes that it may be of, before a model's own; None: a square."""
    recorded = checkpoint_files.recorded_size(self.metadata)
    if recorded is not None:
      return (recorded,)
    return (None,) if self.variables is None else ()

  def model(self, name: str, **fields: Any) -> Any:
    """The model of that name, with what this checkpoint says of it.

    That is the size of the classifier, and the fields that a run of
    `experiments` recorded; others can be given.
    """
    fields = {**_recorded_fields(self.metadata, name), **fields}
    heads = [
      key
      for key in self.state_dict
      if re.fullmatch(r"(.*\.)?head\.weight", key)
    ]
    if len(heads) == 1 and np.ndim(self.state_dict[heads[0]]) == 2:
      fields["num_classes"] = self.state_dict[heads[0]].shape[0]
    return registry.create_model(name, **fields)

  def convert_for(
    self,
    model: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    rng: Array | None = None,
  ) -> dict[str, Any]:
    """Variables for a model; see `load_pretrained`."""
    with _saying_whose(self.metadata):
      return convert.convert(
        model,
        self.state_dict,
        image_size=image_size,
        rng=rng,
        made_for=self.made_for,
      )

  def preprocessing(
    self, name: str, *, image_size: int | None = None
  ) -> variants.Preprocessing:
    """How images for these weights are prepared.

    As the file says, if it is of a run of `experiments`; else as the published
    ones of the model, of the size that the positional embedding is for if these
    are variables of ours.

    Args:
      name: Of the model.
      image_size: Instead of theirs, in pixels.

    Raises:
      ValueError: What the file says cannot be understood.
    """
    usual = registry.get_variant(name).preprocessing
    side = self._side_of_grid(self.model(name)) or usual.size
    usual = dataclasses.replace(usual, size=side)
    return trained.preprocessing(self.metadata, usual, image_size=image_size)

  def _side_of_grid(self, model: Any) -> int | None:
    """Of the images that the positional embedding in a file of ours is for."""
    position = self.state_dict.get("pos_embed")
    if self.variables is None or position is None:
      return None
    patches = np.shape(position)[-2]
    patches -= getattr(model, "class_token", "first") != "none"
    side = math.isqrt(patches)
    if side * side != patches:
      return None
    stride = getattr(model, "stride", model.patch_size)
    return (side - 1) * stride + model.patch_size


def read(
  model_or_name: nn.Module | str,
  path: str | os.PathLike[str],
  weights: checkpoint_files.Weights = "model",
) -> Checkpoint:
  """Reads a file of official names or of ours.

  Args:
    model_or_name: A model of the family, or a name; of the model of that name
      the file may say more.
    path: The file.
    weights: See `load_pretrained`.

  Raises:
    ValueError: It cannot be read (`CheckpointError`), or is of another family.
    OSError: It cannot be read.
  """
  state_dict = checkpoint_files.read_state_dict(path, weights)
  metadata = checkpoint_files.read_metadata(path)
  if not checkpoint_files.is_ours(state_dict):
    return Checkpoint(state_dict, None, metadata)
  variables = checkpoint_files.unflatten(state_dict)
  model = model_or_name
  if isinstance(model, str):
    fields = _recorded_fields(metadata, model)
    model = registry.create_model(model, **fields)
  with _saying_whose(metadata):
    official = export.official_names(model, variables)
  return Checkpoint(official, variables, metadata)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a command line needs to use a file of weights.

  Attributes:
    model: That of the file, for its image size.
    variables: For the model.
    preprocessing: How images for it are prepared.
    class_names: Of its classes, if the file says them.
    metadata: What the file says about itself.
  """

  model: Any
  variables: dict[str, Any]
  preprocessing: variants.Preprocessing
  class_names: list[str] | None
  metadata: Mapping[str, str]


def load(
  name: str,
  path: str | os.PathLike[str],
  weights: checkpoint_files.Weights = "model",
  *,
  image_size: int | None = None,
  scan_layers: bool = False,
  **fields: Any,
) -> Loaded:
  """Reads a file as one of the model of that name, and follows what it says.

  Args:
    name: One of `vimjax.list_models()`.
    path: The file.
    weights: See `load_pretrained`.
    image_size: Instead of the weights' own, in pixels.
    scan_layers: Whether the model scans its layers, if it has the choice.
    **fields: Of the model, instead of the file's.

  Raises:
    ValueError: It cannot be read, or does not fit; the message has its name.
    OSError: It cannot be read.
  """
  with naming(path):
    found = read(name, path, weights)
    how = found.preprocessing(name, image_size=image_size)
    model = convert.resized(found.model(name, **fields), how.size)
    model = registry.with_scan_layers(model, scan_layers)
    return Loaded(
      model=model,
      variables=found.convert_for(model, image_size=image_size),
      preprocessing=how,
      class_names=trained.class_names(found.metadata),
      metadata=found.metadata,
    )


def _recorded_fields(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
  """Fields that a file says its model has, all of them known here."""
  fields = trained.model_fields(metadata, name)
  known = registry.field_names(registry.get_variant(name).module)
  unknown = sorted(set(fields) - set(known))
  if unknown:
    raise ValueError(
      f"the file says that its {name} has the fields {unknown}, which are "
      "unknown here; a newer version of vimjax may have written it."
    )
  return fields


@contextlib.contextmanager
def _saying_whose(metadata: Mapping[str, str]) -> Iterator[None]:
  """Puts what a file says of its model behind messages about what is wrong."""
  try:
    yield
  except ValueError as error:
    hint = trained.hint(metadata)
    raise ValueError(f"{error}\n{hint}" if hint else str(error)) from error
