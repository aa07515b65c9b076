"""Variables of our models to official state dicts."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from vimjax.layers import stack
from vimjax.weights import convert, rules


def export_state_dict(
  model_or_name: nn.Module | str, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Converts variables to an official state dict.

  The exact inverse of `vimjax.convert_state_dict`: the same numbers in the
  official names, layouts and (for VMamba) the classification code's key layout.
  Counters that we do not keep, such as a batch norm's `num_batches_tracked`,
  are zero, which changes nothing with a fixed momentum.

  Args:
    model_or_name: The model of the variables, or a name for `create_model`.
    variables: {"params": ...} and, with batch norms, {"batch_stats": ...};
      layers may be stacked.

  Returns:
    Official names to NumPy arrays.

  Raises:
    ValueError: Variables are missing, unexpected or of the wrong shape; one
      message has all of them.
    TypeError: The model is of no family with official weights.
  """
  model, family = convert.resolve(model_or_name, "export_state_dict")
  arrays, problems = _invert(model, family, variables)
  wanted = convert.shapes(model, family)
  ours = convert.flatten(_unstacked(variables))
  problems += [
    f"missing {path} {leaf.shape}"
    for path, leaf in wanted.items()
    if path not in ours
  ]
  problems += [
    f"unexpected {path} {np.shape(ours[path])}"
    for path in ours
    if path not in wanted
  ]
  problems += [
    f"{path} has shape {np.shape(value)}, expected {wanted[path].shape}"
    for path, value in ours.items()
    if path in wanted and np.shape(value) != wanted[path].shape
  ]
  if problems:
    raise ValueError(
      f"These variables do not fit {type(model).__name__}:"
      + rules.listed(problems)
    )
  return arrays


def official_names(
  model: nn.Module, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """As `export_state_dict`, for variables of other shapes than the model's.

  Raises:
    ValueError: There are paths that no model of this family has.
  """
  model, family = convert.resolve(model, "official_names")
  arrays, problems = _invert(model, family, variables)
  if problems:
    raise ValueError(
      f"These are no variables of a {type(model).__name__}:"
      + rules.listed(problems)
    )
  return arrays


def _invert(
  model: Any, family: convert.Family, variables: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
  flat = convert.flatten(jax.device_get(_unstacked(variables)))
  arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
  official, problems = rules.invert(family.rules(model), arrays)
  return family.restore(official), problems


def _unstacked(variables: Mapping[str, Any]) -> dict[str, Any]:
  return stack.unstack_layers(variables)
