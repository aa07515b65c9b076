"""Official state dicts to variables of our models."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any, Final

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from vimjax import registry
from vimjax.layers import checks, stack
from vimjax.models import deit as deit_model
from vimjax.models import mambavision as mambavision_model
from vimjax.models import vim as vim_model
from vimjax.models import vmamba as vmamba_model
from vimjax.weights import (
  deit,
  input_channels,
  mambavision,
  pos_embed,
  published,
  rules,
  vim,
  vmamba,
)

_LOG = logging.getLogger(__name__)
_StateDict = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How the checkpoints of one family are read.

  Attributes:
    rules: Official keys to our paths, for a model.
    ignored: Patterns of official keys without a place here, and why.
    adapt: Fits arrays to a model: other layouts, other image sizes.
    restore: Adds to an exported state dict what was ignored.
    stem: Official key of the convolution that reads the images.
    smallest_side: Side of a small image that a model takes.
    head: Official key of the classifier's weight, (classes, features), and all
      keys that a new classifier replaces.
  """

  rules: Callable[[Any], Sequence[rules.Rule]]
  ignored: Mapping[str, str]
  stem: str = "patch_embed.proj.weight"
  adapt: Callable[[Any, _StateDict, pos_embed.Origin], _StateDict] = (
    lambda _, arrays, __: arrays
  )
  restore: Callable[[_StateDict], _StateDict] = lambda arrays: arrays
  smallest_side: Callable[[Any], int] = lambda _: 32
  head: tuple[str, ...] = ("head.weight", "head.bias")


FAMILIES: Final[dict[type[nn.Module], Family]] = {
  vim_model.Vim: Family(
    rules=lambda _: vim.RULES,
    ignored=vim.IGNORED,
    adapt=vim.adapt,
    smallest_side=lambda model: model.patch_size,
  ),
  mambavision_model.MambaVision: Family(
    rules=lambda _: mambavision.RULES,
    ignored=mambavision.IGNORED,
    stem="patch_embed.conv_down.0.weight",
    restore=mambavision.restore,
  ),
  deit_model.DeiT: Family(
    rules=lambda _: deit.RULES,
    ignored=deit.IGNORED,
    adapt=deit.adapt,
    smallest_side=lambda model: model.patch_size,
  ),
  vmamba_model.VMamba: Family(
    rules=vmamba.rules_for,
    ignored=vmamba.IGNORED,
    stem="patch_embed.0.weight",
    adapt=vmamba.adapt,
    head=vmamba.HEAD,
  ),
}

# What wrappers put before every key: data parallelism, pre-training, and
# classes of the `transformers` package.
_PREFIXES: Final = ("module.", "encoder.", "model.")


def convert_state_dict(
  model_or_name: nn.Module | str,
  state_dict: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int] | None = None,
  rng: Array | None = None,
) -> dict[str, Any]:
  """Converts an official state dict to variables for `model.apply`.

  Every official key must be used once and every parameter filled once. A
  classifier of another size than the model's is replaced by a new one, a
  convolution that reads three channels is fitted to the model's `in_chans` (as
  in timm), and a positional embedding of another grid is resized, each with a
  log line. A state dict does not say of which grid it is: a square one is
  assumed if the number of patches allows, otherwise that of the model's own
  `image_size`.

  Args:
    model_or_name: A model, or a name for `create_model`. The variables have its
      layout, `scan_layers` included.
    state_dict: Official names to arrays (NumPy, or anything that `np.asarray`
      takes, such as CPU tensors). "module.", "encoder." or "model." before
      every key is dropped.
    image_size: The variables fit the model with this `image_size` instead.
      Without a positional embedding they are the same for all sizes.
    rng: Key for a new classifier, as from `jax.random.key`.

  Returns:
    {"params": ...} and, with batch norms, {"batch_stats": ...}, on the default
    device, parameters in the model's `param_dtype`.

  Raises:
    ValueError: Keys are missing, unexpected or of the wrong shape or dtype (one
      message has all of them, of very many the first), a new classifier is
      needed and `rng` is None, or the state dict is of another published model,
      which differs in the grid.
    TypeError: The model is of no family with official weights, `state_dict` is
      not a flat mapping of names to arrays, or `rng` is no key.
  """
  return convert(model_or_name, state_dict, image_size=image_size, rng=rng)


def convert(
  model_or_name: nn.Module | str,
  state_dict: Mapping[str, Any],
  *,
  image_size: pos_embed.Size | None = None,
  rng: Array | None = None,
  made_for: Sequence[pos_embed.Size | None] = (None,),
) -> dict[str, Any]:
  """As `convert_state_dict`, where more may be known about the state dict.

  Args:
    model_or_name: See `convert_state_dict`.
    state_dict: The same.
    image_size: The same.
    rng: The same.
    made_for: Image sizes that it may be of, see `pos_embed.Origin`. The model's
      own, then any square, follow.
  """
  model, family = resolve(model_or_name, "convert_state_dict")
  _check_key(rng)
  arrays = _arrays(state_dict)
  scanned = getattr(model, "scan_layers", False)
  origin = pos_embed.Origin(
    (*made_for, getattr(model, "image_size", None), None),
    asked=image_size is not None,
  )
  model, problems = resized(model, image_size), []
  try:
    arrays = _fitted(model, family, arrays, origin)
  except ValueError as error:
    problems.append(str(error))
  wanted, new_head = shapes(model, family), []
  change = _head_change(model, family, arrays)
  if change:
    new_head = _paths(family.rules(model), family.head)
    arrays = {k: v for k, v in arrays.items() if k not in family.head}
    wanted = {k: v for k, v in wanted.items() if k not in new_head}
  if change and rng is None:
    problems.append(f"{change}; pass rng=jax.random.key(seed) for a new head")
  params, more = rules.apply(
    family.rules(model), family.ignored, arrays, wanted
  )
  problems += more
  if problems:
    raise ValueError(
      f"This state dict does not fit {type(model).__name__}"
      f"{_other_family(model, family, arrays)}:{rules.listed(problems)}"
    )
  flat = jax.tree.map(jnp.asarray, params)
  if change:
    flat |= _initialise(model, family, new_head, rng)
    _LOG.warning("New head: %s.", change)
  variables = _unflat(flat)
  return stack.stack_layers(variables) if scanned else variables


def _other_family(model: Any, family: Family, arrays: _StateDict) -> str:
  """What the names are of, if they are hardly of this family."""
  if rules.share(family.rules(model), family.ignored, arrays) > 0.5:
    return ""
  for module, other in FAMILIES.items():
    known = other.rules(registry.any_model(module))
    if rules.share(known, other.ignored, arrays) > 0.9:
      return f"; it is of a {module.__name__}"
  return ""


def resolve(model_or_name: Any, caller: str) -> tuple[Any, Family]:
  """The model, and how checkpoints of its family are read.

  Raises:
    TypeError: There is no such family; the message starts with `caller`.
    ValueError: There is no model of that name.
  """
  model = model_or_name
  if isinstance(model, str):
    model = registry.create_model(model)
  if type(model) not in FAMILIES:
    known = [module.__name__ for module in FAMILIES]
    raise TypeError(
      f"{caller}: expected a name or one of {known}, got {model!r}."
    )
  return model.clone(parent=None), FAMILIES[type(model)]


def resized(model: Any, image_size: pos_embed.Size | None) -> Any:
  """The model for images of another size; itself where any size is alike.

  Raises:
    ValueError: That is no size.
  """
  if image_size is None:
    return model
  checks.image_size(type(model).__name__, image_size)
  if "image_size" not in registry.field_names(type(model)):
    return model
  return model.clone(image_size=image_size)


def shapes(model: Any, family: Family) -> dict[str, jax.ShapeDtypeStruct]:
  """Our paths and what belongs there, with layers that are not stacked."""
  model = registry.with_scan_layers(model, False)
  side = family.smallest_side(model)
  image = jax.ShapeDtypeStruct((1, side, side, model.in_chans), jnp.float32)
  return flatten(jax.eval_shape(model.init, jax.random.key(0), image))


def _arrays(state_dict: Mapping[str, Any]) -> _StateDict:
  """Checks the structure, drops common prefixes and makes NumPy arrays."""
  if not isinstance(state_dict, Mapping):
    raise TypeError(
      "convert_state_dict: state_dict must map official names to arrays, got "
      f"{type(state_dict)}."
    )
  unnamed = [k for k in state_dict if not isinstance(k, str)]
  if unnamed:
    raise TypeError(
      "convert_state_dict: state_dict must map official names to arrays, got "
      f"the key {unnamed[0]!r}."
    )
  nested = [k for k, v in state_dict.items() if isinstance(v, Mapping)]
  if nested:
    raise TypeError(
      f"convert_state_dict: {nested} are mappings, not arrays. Pass the state "
      f"dict inside, such as checkpoint[{nested[0]!r}]."
    )
  arrays = {key: np.asarray(value) for key, value in state_dict.items()}
  while arrays:
    common = [p for p in _PREFIXES if all(key.startswith(p) for key in arrays)]
    if not common:
      break
    arrays = {k.removeprefix(common[0]): v for k, v in arrays.items()}
  return arrays


def _check_key(rng: Any) -> None:
  if rng is None:
    return
  dtype = getattr(rng, "dtype", None)
  typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  raw = dtype == jnp.uint32 and rng.shape == (2,)
  if not raw and not (typed and rng.shape == ()):
    raise TypeError(
      "convert_state_dict: rng must be one key, as from jax.random.key(0), got "
      f"{rng!r}."
    )


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Paths as in rules, where other collections than "params" come first."""
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(variables), sep="/")
  return {path.removeprefix("params/"): leaf for path, leaf in flat.items()}


def _unflat(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  paths = (
    path if path.startswith("batch_stats/") else f"params/{path}"
    for path in flat
  )
  return traverse_util.unflatten_dict(
    dict(zip(paths, flat.values(), strict=True)), sep="/"
  )


def _fitted(
  model: Any, family: Family, arrays: _StateDict, origin: pos_embed.Origin
) -> _StateDict:
  """Brings arrays to the model's layout and grid.

  Raises:
    ValueError: They cannot be, or seem to be of another model.
  """
  other = None if origin.asked else published.sibling(model, arrays)
  if other is not None:
    raise ValueError(
      f"pos_embed has the grid of {other!r}: choose that model, or pass "
      f"image_size={model.image_size} to resize it on purpose."
    )
  arrays = family.adapt(model, arrays, origin)
  return input_channels.adapt(arrays, family.stem, model.in_chans)


def _head_change(model: Any, family: Family, arrays: _StateDict) -> str | None:
  """What differs if the classifier has another size than the model's."""
  weight = arrays.get(family.head[0])
  if weight is None or weight.ndim != 2:
    return None  # A problem for the rules to report.
  if weight.shape[0] == model.num_classes:
    return None
  return (
    f"the state dict has {weight.shape[0]} classes, the model "
    f"{model.num_classes}"
  )


def _paths(known: Sequence[rules.Rule], keys: Sequence[str]) -> list[str]:
  """Our paths for official keys."""
  targets = (rule.target(key) for key in keys for rule in known)
  return [path for path in targets if path]


def _initialise(
  model: Any, family: Family, paths: Sequence[str], rng: Array | None
) -> dict[str, Array]:
  """Some parameters as the model itself initialises them."""
  side = family.smallest_side(model)

  @jax.jit  # So that XLA drops everything else.
  def init(key: Array | None) -> dict[str, Array]:
    flat = flatten(model.init(key, jnp.zeros((1, side, side, model.in_chans))))
    return {path: flat[path] for path in paths}

  return init(rng)
