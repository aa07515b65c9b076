"""VMamba's mixer of images, its blocks, and rows of these.

VMamba (https://arxiv.org/abs/2401.10166). Axes: b batch, h and w rows and
columns of a feature map, d channels, e inner channels (expand * d), n state
size.
"""

import math
from typing import Any, Final, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

import pallas_kernels
from vimjax.layers import basic, conv, cross_scan, mlp, ssd, stack

Mixer = Literal["selective_scan", "ssd"]
Activation = Literal["silu", "gelu"]

_ACTIVATIONS: Final = {
  "silu": nn.silu,
  "gelu": basic.gelu,
}


class SS2D(nn.Module):
  """2-D selective scan: projection, depthwise convolution, scan, projection.

  Paper, figure 3.

  Attributes:
    mixer: What scans: "selective_scan" (Mamba) or "ssd" (Mamba-2).
    state_size: Length n of the state per channel.
    expand: Inner channels per channel.
    dt_rank: Rank of the step-size projection, or heads of "ssd"; None means
      ceil(d / 16).
    gate: Multiply the result by the activation of a second projection.
    conv_size: Side of the depthwise convolution's filters, odd.
    conv_bias: Whether that convolution has a bias.
    activation: After the convolution, and of the gate.
    scan_implementation: See `pallas_kernels.cross_selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  mixer: Mixer = "selective_scan"
  state_size: int = 1
  expand: float = 1.0
  dt_rank: int | None = None
  gate: bool = False
  conv_size: int = 3
  conv_bias: bool = False
  activation: Activation = "silu"
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Mixes an image; the result has the computation dtype."""
    d = x.shape[-1]
    e = int(self.expand * d)
    dtype = basic.compute_dtype(self.dtype, x)
    dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=self.param_dtype)
    dense: dict[str, Any] = dict(
      use_bias=False,
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      **dtypes,
    )
    activate = _ACTIVATIONS[self.activation]

    u = nn.Dense(2 * e if self.gate else e, name="in_proj", **dense)(x)
    z = None
    if self.gate:
      u, z = jnp.split(u, 2, axis=-1)  # (b, h, w, e) each
    u = conv.DepthwiseConv2d(
      self.conv_size, self.conv_bias, activate, name="conv", **dtypes
    )(u)
    y = self._scan(u, self.dt_rank or math.ceil(d / 16), dtypes)
    y = basic.layer_norm("out_norm", **dtypes)(basic.apart(y))
    y = basic.apart(y)
    if z is not None:
      y = y * activate(z)
    return nn.Dense(d, name="out_proj", **dense)(y)

  def _scan(
    self, u: Float[Array, "b h w e"], rank: int, dtypes: dict[str, Any]
  ) -> Float[Array, "b h w e"]:
    fields: dict[str, Any] = dict(
      state_size=self.state_size,
      dt_rank=rank,
      precision=self.precision,
      name="ssm",
      **dtypes,
    )
    if self.mixer == "ssd":
      return ssd.CrossSSD(**fields)(u)
    return cross_scan.CrossSelectiveSSM(
      scan_implementation=self.scan_implementation, **fields
    )(u)


class Block(nn.Module):
  """x + drop_path(SS2D(norm(x))), then the same with an MLP; x in float32.

  Attributes:
    mixer: Fields of the `SS2D`.
    mlp_ratio: Hidden channels of the MLP per channel; 0 leaves it out.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype of both branches.
    param_dtype: Dtype of the parameters.
  """

  mixer: dict[str, Any]
  mlp_ratio: float
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w d"], drop_rate: float | Array | None = None
  ) -> Float[Array, "b h w d"]:
    """Runs the block; None as `drop_rate` means no drop path."""
    shared: dict[str, Any] = dict(
      precision=self.precision, dtype=self.dtype, param_dtype=self.param_dtype
    )
    dtypes: dict[str, Any] = dict(
      dtype=self.dtype, param_dtype=self.param_dtype
    )
    y = basic.layer_norm("norm", **dtypes)(x)
    y = SS2D(**self.mixer, name="mixer", **shared)(basic.apart(y))
    y = basic.DropPath(name="drop_path")(y, drop_rate)
    x = x + y.astype(x.dtype)
    if self.mlp_ratio == 0:
      return x
    y = basic.layer_norm("mlp_norm", **dtypes)(x)
    hidden = int(self.mlp_ratio * x.shape[-1])
    y = mlp.Mlp(hidden, name="mlp", **shared)(basic.apart(y))
    y = basic.DropPath(name="mlp_drop_path")(y, drop_rate)
    return x + y.astype(x.dtype)


class BlockStack(nn.Module):
  """The blocks of one stage, at one resolution.

  Attributes:
    depth: How many.
    block: Fields of each `Block`.
    drop_rates: Drop-path rate of each, or None for no drop path.
    scan_layers: Run them as one `nn.scan` over stacked parameters.
    remat: Recompute each block in the backward pass.
  """

  depth: int
  block: dict[str, Any]
  drop_rates: tuple[float, ...] | None
  scan_layers: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Runs the blocks in turn."""
    rates = None if self.drop_rates is None else np.asarray(self.drop_rates)
    return stack.run_layers(
      Block,
      self.block,
      x,
      rates,
      depth=self.depth,
      scan=self.scan_layers,
      remat=self.remat,
    )
