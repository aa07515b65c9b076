"""Calls of the cross selective scan that real models make, at 224 pixels.

b batch, h and w rows and columns, k directions, d channels, n state size.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cross_selective_scan import arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """Shapes of one call.

  Attributes:
    b: Batch rows.
    h: Rows of the image.
    w: Columns of the image.
    d: Channels.
    n: States per channel.
    source: The model and layer that makes the call.
  """

  b: int
  h: int
  w: int
  d: int
  n: int
  source: str


def _stages(name: str, *, d: int, n: int) -> dict[str, ArgSpec]:
  """The four stages of a model with d inner channels in the first."""
  return {
    f"{name}_stage{i + 1}": ArgSpec(
      b=8,
      h=56 >> i,
      w=56 >> i,
      d=d << i,
      n=n,
      source=f"{name}, stage {i + 1}",
    )
    for i in range(4)
  }


# Small models make the same calls as tiny ones, in more layers.
ARG_SPECS: Final = {
  **_stages("vmamba_tiny_v0", d=192, n=16),
  **_stages("vmamba_base_v0", d=256, n=16),
  **_stages("vmamba_tiny_s2l5", d=192, n=1),
  **_stages("vmamba_base_s2l15", d=256, n=1),
  **_stages("vmamba_tiny_s1l8", d=96, n=1),
  **_stages("vmamba_base_s1l20", d=128, n=1),
}


def make_arguments(
  spec: ArgSpec, *, dtype: Any = jnp.float32, seed: int = 0
) -> dict[str, jax.Array]:
  """Random arrays for a call with `delta_softplus=True`, by argument name.

  Images have `dtype`, the parameters float32. Step sizes and decay rates are in
  the range that the models start from.
  """
  rng = np.random.default_rng(seed)
  k = arguments.DIRECTIONS
  sizes = dict(b=spec.b, h=spec.h, w=spec.w, k=k, d=spec.d, n=spec.n)
  arrays = {}
  for name, layout in arguments.LAYOUTS.items():
    shape = tuple(sizes[letter] for letter in layout)
    values = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    arrays[name] = values.astype(dtype) if "b" in layout else values
  arrays["A"] = -jnp.exp(arrays["A"])
  arrays["delta_bias"] = arrays["delta_bias"] - 3
  return arrays
