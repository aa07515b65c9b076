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
from vimjax.layers import stack
from vimjax.models import vim as vim_model
from vimjax.weights import rules, vim

_LOG = logging.getLogger(__name__)
_StateDict = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How the checkpoints of one family are read.

  Attributes:
    rules: Official keys to our paths.
    ignored: Patterns of official keys without a place here, and why.
    adapt: Fits arrays that depend on the image size to a model, given what
      size they are probably of.
    head: Official key of the classifier's weight, (classes, features), and all
      keys that a new classifier replaces.
  """

  rules: Sequence[rules.Rule]
  ignored: Mapping[str, str]
  adapt: Callable[[Any, _StateDict, Any], _StateDict]
  head: tuple[str, ...] = ("head.weight", "head.bias")


FAMILIES: Final[dict[type[nn.Module], Family]] = {
  vim_model.Vim: Family(rules=vim.RULES, ignored=vim.IGNORED, adapt=vim.adapt),
}


def convert_state_dict(
  model_or_name: nn.Module | str,
  state_dict: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int] | None = None,
  rng: Array | None = None,
) -> dict[str, Any]:
  """Converts an official state dict to variables for `model.apply`.

  Every official key must be used once and every parameter filled once. A
  classifier of another size than the model's is replaced by a new one, and a
  positional embedding of another grid is resized, each with a log line.

  Args:
    model_or_name: A model, or a name for `create_model`. The variables have its
      layout, `scan_layers` included.
    state_dict: Official names to arrays (NumPy, or anything that `np.asarray`
      takes, such as CPU tensors). A common prefix "module." is dropped.
    image_size: The variables fit the model with this `image_size` instead.
    rng: Key for a new classifier, as from `jax.random.key`.

  Returns:
    {"params": ...}, on the default device, in the model's `param_dtype`.

  Raises:
    ValueError: Keys are missing, unexpected or of the wrong shape or dtype (one
      message has all of them), or a new classifier is needed and `rng` is None.
    TypeError: The model is of no family with official weights, or `state_dict`
      is not a flat mapping of arrays.
  """
  model = model_or_name
  if isinstance(model, str):
    model = registry.create_model(model)
  if type(model) not in FAMILIES:
    known = [module.__name__ for module in FAMILIES]
    raise TypeError(
      f"convert_state_dict: expected a name or one of {known}, got {model!r}."
    )
  family = FAMILIES[type(model)]
  made_for, scanned = model.image_size, model.scan_layers
  fields: dict[str, Any] = dict(scan_layers=False, parent=None)
  if image_size is not None:
    fields["image_size"] = image_size
  model = model.clone(**fields)

  arrays, problems = _arrays(state_dict), []
  try:
    arrays = family.adapt(model, arrays, made_for)
  except ValueError as error:
    problems.append(str(error))
  wanted, new_head = _flat_params(model), []
  change = _head_change(model, family, arrays)
  if change:
    new_head = _paths(family, family.head)
    arrays = {k: v for k, v in arrays.items() if k not in family.head}
    wanted = {k: v for k, v in wanted.items() if k not in new_head}
  if change and rng is None:
    problems.append(f"{change}; pass rng=jax.random.key(seed) for a new head")
  params, more = rules.apply(family.rules, family.ignored, arrays, wanted)
  problems += more
  if problems:
    raise ValueError(
      f"This state dict does not fit {type(model).__name__}:\n  "
      + "\n  ".join(problems)
    )
  flat = jax.tree.map(jnp.asarray, params)
  if change:
    _LOG.warning("New head: %s.", change)
    flat |= _initialise(model, new_head, rng)
  variables = {"params": traverse_util.unflatten_dict(flat, sep="/")}
  return stack.stack_layers(variables) if scanned else variables


def _arrays(state_dict: Mapping[str, Any]) -> _StateDict:
  """Checks the structure, drops a common "module." and makes NumPy arrays."""
  if not isinstance(state_dict, Mapping):
    raise TypeError(
      "convert_state_dict: state_dict must map official names to arrays, got "
      f"{type(state_dict)}."
    )
  nested = [k for k, v in state_dict.items() if isinstance(v, Mapping)]
  if nested:
    raise TypeError(
      f"convert_state_dict: {nested} are mappings, not arrays. Pass the state "
      f"dict inside, such as checkpoint[{nested[0]!r}]."
    )
  prefix = "module."
  cut = len(prefix) if all(k.startswith(prefix) for k in state_dict) else 0
  return {key[cut:]: np.asarray(value) for key, value in state_dict.items()}


def _flat_params(model: nn.Module) -> dict[str, Any]:
  """Our paths and what belongs there, without computing anything."""
  variables = jax.eval_shape(model.init, jax.random.key(0), _smallest(model))
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _smallest(model: Any) -> jax.ShapeDtypeStruct:
  # Parameters do not depend on the images' size.
  side = model.patch_size
  return jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)


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


def _paths(family: Family, keys: Sequence[str]) -> list[str]:
  """Our paths for official keys."""
  targets = (rule.target(key) for key in keys for rule in family.rules)
  return [path for path in targets if path]


def _initialise(
  model: Any, paths: Sequence[str], rng: Array | None
) -> dict[str, Array]:
  """Some parameters as the model itself initialises them."""

  @jax.jit  # So that XLA drops everything else.
  def init(key: Array | None) -> dict[str, Array]:
    image = jnp.zeros(_smallest(model).shape)
    params = model.init(key, image)["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return {path: flat[path] for path in paths}

  return init(rng)
