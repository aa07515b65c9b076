"""The two-layer network of transformer blocks."""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic


class Mlp(nn.Module):
  """fc2(gelu(fc1(x))) with the exact GELU, per token.

  Attributes:
    hidden_dim: Channels between the two layers.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  hidden_dim: int
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*dims d"]) -> Float[Array, "*dims d"]:
    """Runs both layers; the result has the computation dtype."""
    dense: dict[str, Any] = dict(
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      dtype=basic.compute_dtype(self.dtype, x),
      param_dtype=self.param_dtype,
    )
    y = nn.Dense(self.hidden_dim, name="fc1", **dense)(x)
    y = basic.gelu(y)
    return nn.Dense(x.shape[-1], name="fc2", **dense)(y)
