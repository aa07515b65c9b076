"""The mixer of MambaVision and the block around it, on tokens of windows.

MambaVision (https://arxiv.org/abs/2407.08083). Axes: b batch, l tokens of a
window, d channels, n state size.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from vimjax.layers import basic, conv, mlp, ssm


class MambaVisionMixer(nn.Module):
  """Mixes tokens by a scan over half of the channels (paper, figure 3).

  The other half only passes a convolution: it is not a gate.

  Attributes:
    state_size: Length n of the state per channel.
    conv_size: Taps of the depthwise convolutions, which are not causal.
    dt_rank: Rank of the step-size projection; None means ceil(d / 16).
    scan_implementation: See `pallas_kernels.selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  state_size: int = 8
  conv_size: int = 3
  dt_rank: int | None = None
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Mixes x along l; the result has the computation dtype."""
    d = x.shape[-1]
    dtypes: dict[str, Any] = dict(
      dtype=basic.compute_dtype(self.dtype, x), param_dtype=self.param_dtype
    )
    normal = nn.initializers.normal(0.02)
    dense: dict[str, Any] = dict(
      use_bias=False, kernel_init=normal, precision=self.precision, **dtypes
    )

    def convolve(v: Array, name: str) -> Array:
      return conv.DepthwiseConv1d(
        self.conv_size,
        centered=True,
        use_bias=False,
        activation=nn.silu,
        name=name,
        **dtypes,
      )(v)

    uz = nn.Dense(d, name="in_proj", **dense)(x)
    u, z = jnp.split(uz, 2, axis=-1)  # (b, l, d / 2) each
    y = ssm.SelectiveSSM(
      state_size=self.state_size,
      dt_rank=self.dt_rank or math.ceil(d / 16),
      kernel_init=normal,
      dt_bias_init=nn.initializers.zeros,
      # The official code adds it in the projection and again in the scan.
      dt_bias_scale=2.0,
      scan_implementation=self.scan_implementation,
      precision=self.precision,
      name="ssm",
      **dtypes,
    )(convolve(u, "conv_u"))
    y = jnp.concatenate([y, convolve(z, "conv_z")], axis=-1)
    return nn.Dense(d, name="out_proj", **dense)(y)


class Block(nn.Module):
  """x + g mix(norm(x)), then x + g mlp(norm(x)), on the tokens of windows.

  Attributes:
    mixer: Makes the module that mixes tokens, given its name.
    mlp_ratio: Hidden channels of the MLP per channel.
    layer_scale: Initial value of the factors g per channel; None: without.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; x itself keeps its own.
    param_dtype: Dtype of the parameters.
  """

  mixer: Callable[..., nn.Module]
  mlp_ratio: float = 4.0
  layer_scale: float | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], drop_rate: float | Array | None = None
  ) -> Float[Array, "b l d"]:
    """Runs the block; None as `drop_rate` means no drop path."""
    dtypes: dict[str, Any] = dict(
      dtype=basic.compute_dtype(self.dtype, x), param_dtype=self.param_dtype
    )
    branches = (
      self.mixer(name="mixer"),
      mlp.Mlp(
        int(self.mlp_ratio * x.shape[-1]),
        precision=self.precision,
        name="mlp",
        **dtypes,
      ),
    )
    for i, branch in enumerate(branches, start=1):
      norm = nn.LayerNorm(
        epsilon=1e-5, use_fast_variance=False, name=f"norm{i}", **dtypes
      )
      y = branch(norm(x)).astype(x.dtype)
      if self.layer_scale is not None:
        init = nn.initializers.constant(self.layer_scale)
        gamma = self.param(f"gamma{i}", init, x.shape[-1:], self.param_dtype)
        y = y * gamma.astype(x.dtype)
      x = x + basic.DropPath(name=f"drop_path{i}")(y, drop_rate)
    return x
