"""Checkpoint files: which arrays are in them, and our own safetensors form.

Our variables are stored under their paths, "params/head/kernel", which no
official name looks like; that is how `is_ours` tells the two apart.
"""

from collections.abc import Mapping
import contextlib
import os
import pathlib
import re
import tempfile
from typing import Any, Final, get_args, Literal

from flax import traverse_util
import jax
import numpy as np

from vimjax import optional
from vimjax.layers import checks
from vimjax.weights import pickle_values, torch_files

CheckpointError = pickle_values.CheckpointError
Weights = Literal["model", "ema"]

# Where a checkpoint has its state dict; the first that is there is taken.
_PLACES: Final[dict[str, tuple[str, ...]]] = {
  "model": ("model", "state_dict"),
  "ema": ("model_ema", "state_dict_ema"),
}
# Metadata: what a positional embedding is for, as "224x448", height first.
_SIZE: Final = "image_size"
_COLLECTIONS: Final = ("params/", "batch_stats/")
_ARRAYS: Final = (
  torch_files.Tensor,
  pickle_values.NumpyArray,
  np.ndarray,
  np.generic,
)


def read_state_dict(
  path: str | os.PathLike[str], weights: Weights = "model"
) -> dict[str, np.ndarray]:
  """Reads the arrays of a checkpoint, running nothing that is in it.

  Args:
    path: A .safetensors file, or a file of `torch.save` (.pth, .pth.tar, .bin);
      its content decides, not its name.
    weights: "model", or "ema" for the running average.

  Returns:
    Names to arrays, read-only where they are part of the mapped file.

  Raises:
    CheckpointError: The file is damaged, of another kind, or holds no such
      weights; the message lists what it has.
    OSError: The file cannot be read.
    ValueError: `weights` is neither.
  """
  if weights not in get_args(Weights):
    raise ValueError(f'weights must be "model" or "ema", got {weights!r}.')
  path = pathlib.Path(path)
  try:
    chosen = _select(_read(path), weights)
    return {key: _array(key, value) for key, value in chosen.items()}
  except CheckpointError as error:
    raise CheckpointError(f"{path}: {error}") from error


def _array(key: str, value: Any) -> np.ndarray:
  try:
    return np.asarray(value)
  except (ValueError, MemoryError) as error:  # CheckpointError is one.
    raise CheckpointError(f"{_label(key)}: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """What a safetensors file says about itself; nothing for other files.

  Raises:
    CheckpointError: The file is damaged.
    OSError: The file cannot be read.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    if file.read(9)[8:] != b"{":
      return {}
  safetensors = optional.require("safetensors", extra="weights")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise CheckpointError(
      f"{path}: The safetensors file is damaged: {error}"
    ) from None


def recorded_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
  """The image size that `save_variables` wrote, (h, w), if there is one."""
  sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", metadata.get(_SIZE, ""))
  return (int(sides[1]), int(sides[2])) if sides else None


def size_metadata(image_size: int | tuple[int, int]) -> dict[str, str]:
  """What `recorded_size` reads.

  Raises:
    ValueError: It is no size.
  """
  h, w = checks.image_size("save_variables", image_size)
  return {_SIZE: f"{h}x{w}"}


def _read(path: pathlib.Path) -> Any:
  with path.open("rb") as file:
    head = file.read(64)
  if head.startswith(b"version https://git-lfs"):
    raise CheckpointError(
      "This is the placeholder of a file in Git LFS; fetch it with `git lfs "
      "pull`, or download it."
    )
  if head[8:9] != b"{":
    return torch_files.read(path)
  safetensors = optional.require("safetensors", extra="weights")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return {key: _tensor(file, key) for key in file.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise CheckpointError(f"The safetensors file is damaged: {error}") from None


def _tensor(file: Any, key: str) -> np.ndarray:
  try:
    return file.get_tensor(key)
  except (AttributeError, KeyError, TypeError) as error:
    # As its NumPy side fails for float8 and smaller types.
    dtype = file.get_slice(key).get_dtype()
    raise CheckpointError(
      f"{_label(key)} has dtype {dtype}, which cannot be read here; convert it "
      "to float32 or bfloat16."
    ) from error


def _select(tree: Any, weights: Weights) -> dict[str, Any]:
  """The state dict inside a checkpoint."""
  if isinstance(tree, pickle_values.Opaque | pickle_values.Name):
    raise CheckpointError(
      f"It holds {tree}, whose class is needed to read it; save its "
      "state_dict() instead."
    )
  if not isinstance(tree, Mapping) or not tree:
    raise CheckpointError(f"It holds {_describe(tree)}, expected a state dict.")
  for place in _PLACES[weights]:
    if isinstance(tree.get(place), Mapping):
      return _only_arrays(tree[place])
  for place in _PLACES[weights]:
    if isinstance(tree.get(place), pickle_values.Opaque | pickle_values.Name):
      raise CheckpointError(
        f"Its {place!r} is a pickled object, {_describe(tree[place])}, whose "
        "class is needed to read it; save its state_dict() instead."
      )
  bare = any(isinstance(value, _ARRAYS) for value in tree.values())
  if bare and weights == "model":
    return _only_arrays(tree)
  listed = [f"{_label(key)}: {_describe(value)}" for key, value in tree.items()]
  if bare:
    listed = [f"a state dict of {_describe(tree)}, without an average"]
  more = [f"and {len(listed) - 20} more"] if len(listed) > 20 else []
  raise CheckpointError(
    f"It has no {' or '.join(map(repr, _PLACES[weights]))} "
    f"(weights={weights!r}). It has:\n  " + "\n  ".join(listed[:20] + more)
  )


def _only_arrays(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
  others = [
    f"{_label(key)}: {_describe(value)}"
    for key, value in state_dict.items()
    if not isinstance(key, str) or not isinstance(value, _ARRAYS)
  ]
  if others or not state_dict:
    raise CheckpointError(
      "Its state dict is empty, or has what is no array: "
      + ", ".join(others[:10])
    )
  return dict(state_dict)


def _label(key: Any) -> str:
  return key[:80] if isinstance(key, str) else f"({type(key).__name__})"


def _describe(value: Any) -> str:
  if isinstance(value, pickle_values.Opaque | pickle_values.Name):
    return repr(value)
  if isinstance(value, _ARRAYS):
    return f"array {tuple(value.shape)}"
  if isinstance(value, Mapping):
    arrays = sum(isinstance(leaf, _ARRAYS) for leaf in value.values())
    return f"{len(value)} entries, {arrays} of them arrays"
  return type(value).__name__


def is_ours(state_dict: Mapping[str, Any]) -> bool:
  """Whether these are flattened variables of ours, not official names."""
  return all(key.startswith(_COLLECTIONS) for key in state_dict)


def unflatten(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Variables from their paths."""
  return traverse_util.unflatten_dict(dict(state_dict), sep="/")


def save_variables(
  path: str | os.PathLike[str],
  variables: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int] | None = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes variables to a safetensors file that `load_pretrained` reads.

  A file of that name is replaced once the new one is complete.

  Args:
    path: Where to.
    variables: {"params": ...} and, with batch norms, {"batch_stats": ...}.
    image_size: That of the model, kept in the file's header: with it a
      positional embedding that is not square loads into models for other image
      sizes, too.
    metadata: Kept in the file's header, such as {"model": "vim_tiny"}.

  Raises:
    ValueError: `variables` has no "params", or has collections that
      `load_pretrained` would not read; or `image_size` is no size.
    OSError: The file cannot be written.
  """
  if not {"params"} <= set(variables) <= {"params", "batch_stats"}:
    raise ValueError(
      'save_variables: expected {"params": ...} and perhaps "batch_stats", got '
      f"{list(variables)}."
    )
  metadata = dict(metadata or {})
  if image_size is not None:
    metadata |= size_metadata(image_size)
  flat = traverse_util.flatten_dict(dict(variables), sep="/")
  write_safetensors(pathlib.Path(path), jax.device_get(flat), metadata)


def write_safetensors(
  path: pathlib.Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
  """Writes arrays of any layout; replaces `path` once all is written."""
  numpy = optional.require("safetensors.numpy", extra="weights")
  # Its writer takes the bytes as they lie, transposed arrays included.
  rows = {k: np.array(v, order="C", copy=None) for k, v in arrays.items()}
  with replacing(path) as temporary:
    numpy.save_file(rows, temporary, metadata=dict(metadata))


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Any:
  """A temporary file beside `path` that takes its place if all goes well."""
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  os.close(handle)
  temporary = pathlib.Path(name)
  try:
    yield temporary
    # mkstemp makes private files; this one is to be like any other.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
