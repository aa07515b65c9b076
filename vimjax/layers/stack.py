"""A stack of equal layers: unrolled or scanned, rematerialised or not."""

from collections.abc import Mapping
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_UNROLLED = re.compile(r"layers_(\d+)")
_STACKED = "layers"


def run_layers(
  layer: type[nn.Module],
  fields: Mapping[str, Any],
  x: Float[Array, "*dims"],
  drop_rates: Float[np.ndarray, "depth"] | None,
  *,
  depth: int,
  scan: bool,
  remat: bool,
) -> Float[Array, "*dims"]:
  """Runs x through `depth` layers; call it inside a compact method.

  Args:
    layer: Module class; an instance maps (x, drop rate) to x.
    fields: What to build each layer with.
    x: Input of the first layer.
    drop_rates: Drop-path rate of each layer, or None for no drop path.
    depth: How many layers.
    scan: One `nn.scan` over parameters stacked under "layers" (short to
      compile) instead of `depth` calls with parameters "layers_0", ...
    remat: Keep only each layer's input for the gradient, recompute the rest.
  """
  if remat:
    # In a scan the loop itself already keeps XLA from merging the two runs.
    layer = nn.remat(layer, prevent_cse=not scan)
  if not scan:
    for i in range(depth):
      rate = None if drop_rates is None else float(drop_rates[i])
      x = layer(name=f"{_STACKED}_{i}", **fields)(x, rate)
    return x
  scanned = nn.scan(
    lambda module, x, rate: (module(x, rate), None),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "drop_path": True},
    length=depth,
  )
  rates = None if drop_rates is None else jnp.asarray(drop_rates, jnp.float32)
  x, _ = scanned(layer(name=_STACKED, **fields), x, rates)
  return x


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Converts variables of a model to those of its `scan_layers=True` form.

  Wherever a mapping holds "layers_0", "layers_1", ..., these become one
  "layers" whose leaves have a leading layer axis. Works on whole variables, on
  parameters alone, and on whatever has their structure.

  Args:
    variables: Nested mappings of arrays, as `model.init` returns them.

  Returns:
    A new tree; `unstack_layers` is its exact inverse.

  Raises:
    ValueError: Layer numbers have a gap, layers differ in structure or shape,
      or both forms are present.
  """
  tree, layers = {}, {}
  for key, value in variables.items():
    value = stack_layers(value) if isinstance(value, Mapping) else value
    match = _UNROLLED.fullmatch(key)
    if match:
      layers[int(match[1])] = value
    else:
      tree[key] = value
  if not layers:
    return tree
  if _STACKED in tree:
    raise ValueError('stack_layers: both "layers" and "layers_0" are present.')
  if sorted(layers) != list(range(len(layers))):
    raise ValueError(
      f"stack_layers: expected layers 0 to {len(layers) - 1}, got "
      f"{sorted(layers)}."
    )
  try:
    tree[_STACKED] = jax.tree.map(
      _stack, layers[0], *(layers[i] for i in range(1, len(layers)))
    )
  except (ValueError, TypeError) as error:
    raise ValueError(f"stack_layers: the layers differ: {error}") from error
  return tree


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `stack_layers`: "layers" becomes "layers_0", ...

  Raises:
    ValueError: Leaves under "layers" have unequal leading axes.
  """
  tree = {}
  for key, value in variables.items():
    if not isinstance(value, Mapping):
      tree[key] = value
      continue
    value = unstack_layers(value)
    if key != _STACKED:
      tree[key] = value
      continue
    depths = {leaf.shape[0] for leaf in jax.tree.leaves(value)}
    if len(depths) != 1:
      raise ValueError(
        f"unstack_layers: leading axes of one stack differ: {sorted(depths)}."
      )
    for i in range(depths.pop()):
      tree[f"{_STACKED}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
  return tree


def _stack(*leaves: Any) -> Any:
  """Stacks on the host where the leaves are there, else on the device."""
  on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return np.stack(leaves) if on_host else jnp.stack(leaves)
