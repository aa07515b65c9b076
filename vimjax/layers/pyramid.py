"""Stems and downsampling between the stages of VMamba.

Axes: b batch, h and w rows and columns, i and j those of the result, c and d
channels, f twice as many.
"""

import math
from typing import Final, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic

Stem = Literal["overlapping", "patches"]
Downsample = Literal["conv", "patch_merging"]


class OverlappingStem(nn.Module):
  """Two 3x3 convolutions of stride 2, each with its norm: 4 pixels a cell.

  Odd sides are rounded up.

  Attributes:
    features: Channels of the result; half as many in between.
    precision: Of the convolutions, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolutions.
    param_dtype: Dtype of the parameters.
  """

  features: int
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    """Embeds images; the result is float32 at least."""
    shared = (self.precision, self.dtype, self.param_dtype)
    x = _conv(self.features // 2, 3, 2, x.shape[-1], "conv1", *shared)(x)
    norm = basic.layer_norm("norm1", self.dtype, self.param_dtype)
    x = norm(basic.apart(x))
    x = basic.gelu(x)
    x = _conv(self.features, 3, 2, x.shape[-1], "conv2", *shared)(
      basic.apart(x)
    )
    x = basic.apart(x)
    return basic.layer_norm("norm2", basic.wide(x.dtype), self.param_dtype)(x)


class PatchStem(nn.Module):
  """A linear map of 4x4 patches, and a norm.

  Pixels beyond the last whole patch are dropped.

  Attributes:
    features: Channels of the result.
    precision: Of the convolution, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolution.
    param_dtype: Dtype of the parameters.
  """

  features: int
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    """Embeds images; the result is float32 at least."""
    shared = (self.precision, self.dtype, self.param_dtype)
    x = _conv(self.features, 4, 4, x.shape[-1], "conv1", *shared)(x)
    return basic.layer_norm("norm1", basic.wide(x.dtype), self.param_dtype)(x)


class ConvDownsample(nn.Module):
  """A 3x3 convolution of stride 2 to twice the channels, and a norm.

  Odd sides are rounded up.

  Attributes:
    precision: Of the convolution, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolution.
    param_dtype: Dtype of the parameters.
  """

  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j f"]:
    """Halves both sides; the result is float32 at least."""
    d = x.shape[-1]
    shared = (self.precision, self.dtype, self.param_dtype)
    y = _conv(2 * d, 3, 2, d, "conv", *shared)(basic.apart(x))
    y = basic.apart(y)
    return basic.layer_norm("norm", basic.wide(y.dtype), self.param_dtype)(y)


class PatchMerging(nn.Module):
  """Norm and linear map of 2x2 neighbours side by side, as in Swin.

  Odd sides are rounded up: a row or column of zeros is added before the norm.

  Attributes:
    precision: Of the matrix product, see `jax.lax.Precision`.
    dtype: Computation dtype of the matrix product.
    param_dtype: Dtype of the parameters.
  """

  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j f"]:
    """Halves both sides; the result is float32 at least."""
    _, h, w, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    corners = ((0, 0), (1, 0), (0, 1), (1, 1))
    y = jnp.concatenate([x[:, i::2, j::2] for i, j in corners], axis=-1)
    y = basic.layer_norm("norm", self.dtype, self.param_dtype)(y)
    y = nn.Dense(
      2 * d,
      use_bias=False,
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="reduction",
    )(y)
    return y.astype(basic.wide(y.dtype))


STEMS: Final = {"overlapping": OverlappingStem, "patches": PatchStem}
DOWNSAMPLES: Final = {"conv": ConvDownsample, "patch_merging": PatchMerging}


def _conv(
  features: int,
  size: int,
  stride: int,
  inputs: int,
  name: str,
  precision: basic.Precision,
  dtype: basic.Dtype,
  param_dtype: basic.Dtype,
) -> nn.Conv:
  """A square convolution with PyTorch's padding and initialisation."""
  padding = (size - 1) // 2 if size % 2 else 0
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=padding,
    kernel_init=basic.torch_linear(),
    bias_init=basic.uniform(1 / (size * math.sqrt(inputs))),
    precision=precision,
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )
