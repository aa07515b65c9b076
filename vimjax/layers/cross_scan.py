"""The state-space layer of VMamba, along the four directions of an image.

b batch, h and w rows and columns, d channels, n state size, k = 4 directions:
rows, columns, rows backwards, columns backwards. All arrays stay in image
order, so that projections are the same products for every direction.
"""

import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from vimjax.layers import basic, ssm

DIRECTIONS = 4


def turn(x: Float[Array, "b h w *dims"]) -> Float[Array, "b w h *dims"]:
  """Rows for columns."""
  return jnp.swapaxes(x, 1, 2)


class DirectionalDense(nn.Module):
  """A linear layer of its own for each direction, without bias.

  Attributes:
    features: Outputs per direction.
    precision: Of the matrix product, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  features: int
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w i"] | Float[Array, "b h w k i"]
  ) -> Float[Array, "b h w k o"]:
    """Applies it to one input for all directions, or to one for each."""
    size = x.shape[-1]
    dtype = basic.compute_dtype(self.dtype, x)
    kernel = self.param(
      "kernel",
      basic.uniform(1 / math.sqrt(size)),  # PyTorch's, per direction.
      (DIRECTIONS, size, self.features),
      self.param_dtype,
    )
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if x.ndim == 4:
      return jnp.einsum("bhwi,kio->bhwko", x, kernel, precision=self.precision)
    if not basic.for_cpu():
      return jnp.einsum("bhwki,kio->bhwko", x, kernel, precision=self.precision)
    # A product for each direction: the batched one comes channels first on a
    # CPU, and had to be transposed.
    each = [
      jnp.dot(x[:, :, :, k], kernel[k], precision=self.precision)
      for k in range(DIRECTIONS)
    ]
    return jnp.stack(each, axis=3)


class CrossSelectiveSSM(nn.Module):
  """Four selective state-space layers over an image, added up.

  VMamba (https://arxiv.org/abs/2401.10166), section 4.2: for each direction
  (dt, B, C) = x_proj u and delta = softplus(dt_proj dt + dt_bias), then
  y = cross_selective_scan(u, delta, A, B, C, D) with A = -exp(A_log). The
  recurrence runs in float32 whatever the dtype.

  Attributes:
    state_size: Length n of the hidden state per channel.
    dt_rank: Rank of the step-size projection.
    scan_implementation: See `pallas_kernels.cross_selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  state_size: int
  dt_rank: int
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, u: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Mixes an image; the result has the computation dtype."""
    n, r, k, d = self.state_size, self.dt_rank, DIRECTIONS, u.shape[-1]
    dtype = basic.compute_dtype(self.dtype, u)
    u = basic.once(u.astype(dtype))
    dense: dict[str, Any] = dict(
      precision=self.precision, dtype=dtype, param_dtype=self.param_dtype
    )
    x = DirectionalDense(r + 2 * n, name="x_proj", **dense)(u)
    dt, B, C = jnp.split(x, (r, r + n), axis=-1)  # (b, h, w, k, r or n)
    delta = DirectionalDense(d, name="dt_proj", **dense)(dt)
    # The bias joins inside the scan, in float32, not rounded to `dtype`.
    dt_bias = self.param("dt_bias", ssm.step_bias(), (k, d), self.param_dtype)
    A_log = self.param("A_log", ssm.log_range, (k, d, n), self.param_dtype)
    D = self.param("D", nn.initializers.ones, (k, d), self.param_dtype)
    return pallas_kernels.cross_selective_scan(
      u,
      delta,
      -jnp.exp(A_log.astype(jnp.promote_types(dtype, jnp.float32))),
      B,
      C,
      D,
      delta_bias=dt_bias,
      delta_softplus=True,
      implementation=self.scan_implementation,
    )
