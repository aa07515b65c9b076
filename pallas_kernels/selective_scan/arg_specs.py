"""Calls of the selective scan that real models make, for tests and benchmarks.

b batch, l length, d channels, n state size, g groups of channels.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """Shapes and options of one call.

  Attributes:
    b: Batch rows.
    l: Tokens.
    d: Channels.
    n: States per channel.
    g: Groups of channels that share B and C.
    gate: Whether the call has `z`.
    source: The model and layer that makes the call.
  """

  b: int
  l: int
  d: int
  n: int
  g: int = 1
  gate: bool = False
  source: str


ARG_SPECS: Final = {
  "vim_tiny_224": ArgSpec(
    b=8, l=197, d=384, n=16, source="Vim-Ti, one direction of a layer, 224 px"
  ),
  "vim_tiny_1248": ArgSpec(
    b=1, l=6085, d=384, n=16, source="Vim-Ti, one direction, 1248 px"
  ),
  "vmamba_tiny_stage1": ArgSpec(
    b=4, l=56 * 56, d=4 * 96, n=1, g=4, source="VMamba-T s1l8, first stage"
  ),
  "mambavision_tiny_stage3": ArgSpec(
    b=8, l=14 * 14, d=160, n=8, source="MambaVision-T, third stage, one window"
  ),
}


def make_arguments(
  spec: ArgSpec, *, dtype: Any = jnp.float32, seed: int = 0
) -> dict[str, jax.Array]:
  """Random arrays for a call with `delta_softplus=True`, by argument name.

  The sequences have `dtype`, the parameters float32. Step sizes and decay
  rates are in the range that the models start from.
  """
  rng = np.random.default_rng(seed)
  b, l, d, n, g = spec.b, spec.l, spec.d, spec.n, spec.g
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  arrays = {
    "u": normal(b, l, d).astype(dtype),
    "delta": normal(b, l, d).astype(dtype),
    "A": -jnp.exp(normal(d, n)),
    "B": normal(b, l, g, n).astype(dtype),
    "C": normal(b, l, g, n).astype(dtype),
    "D": normal(d),
    "delta_bias": normal(d) - 3,
  }
  if spec.gate:
    arrays["z"] = normal(b, l, d).astype(dtype)
  return arrays
