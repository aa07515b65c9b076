"""Vim's token mixer: one selective scan in each direction.

b batch, l tokens, d channels, e inner channels (expand * d).
"""

import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from vimjax.layers import basic, conv, ssm


class BidirectionalMixer(nn.Module):
  """Mixes tokens by one scan in each direction.

  Vision Mamba (https://arxiv.org/abs/2401.09417), algorithm 1.

  Both directions share the input and output projections and the gate. The
  backward one convolves and scans from the last token to the first in place;
  nothing is flipped.

  Attributes:
    depth: Layers of the model; the output projection starts 1/sqrt(depth)
      times as large as PyTorch's default.
    state_size: Length n of the state per channel.
    expand: Inner channels per channel.
    conv_size: Taps of the depthwise convolutions.
    dt_rank: Rank of the step-size projection.
    scan_implementation: See `pallas_kernels.selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  depth: int
  state_size: int
  expand: int
  conv_size: int
  dt_rank: int
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Mixes x along l; the result has the computation dtype."""
    d, e = x.shape[-1], self.expand * x.shape[-1]
    dtype = basic.compute_dtype(self.dtype, x)
    shared: dict[str, Any] = dict(dtype=dtype, param_dtype=self.param_dtype)
    dense: dict[str, Any] = dict(
      use_bias=False, precision=self.precision, **shared
    )

    xz = nn.Dense(
      2 * e, kernel_init=basic.torch_linear(), name="in_proj", **dense
    )(x)
    u, z = jnp.split(xz, 2, axis=-1)  # (b, l, e) each
    mixed = []
    for direction in ("forward", "backward"):
      reverse = direction == "backward"
      v = conv.DepthwiseConv1d(
        self.conv_size,
        reverse,
        activation=nn.silu,
        name=f"{direction}_conv",
        **shared,
      )(u)
      y = ssm.SelectiveSSM(
        state_size=self.state_size,
        dt_rank=self.dt_rank,
        reverse=reverse,
        # The official code starts the backward bias at zero.
        dt_bias_init=nn.initializers.zeros if reverse else ssm.step_bias(),
        scan_implementation=self.scan_implementation,
        precision=self.precision,
        name=f"{direction}_ssm",
        **shared,
      )(v)
      mixed.append(y)
    # The directions have the same gate: once on the mean, not once on each.
    y = 0.5 * (mixed[0] + mixed[1]) * nn.silu(z)
    small = basic.torch_linear(1 / math.sqrt(self.depth))
    return nn.Dense(d, kernel_init=small, name="out_proj", **dense)(y)
