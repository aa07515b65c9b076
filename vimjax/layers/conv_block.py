"""The convolutions of MambaVision: patch embedding, blocks, rows of these.

Axes: b batch, h and w rows and columns of a map, d channels.
"""

import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic, batch_norm

Rates = tuple[float | None, ...]


def conv3x3(features: int, *, strides: int = 1, **fields: Any) -> nn.Conv:
  """A 3x3 convolution with PyTorch's padding: one pixel on every side."""
  return nn.Conv(
    features,
    (3, 3),
    strides=strides,
    padding=1,
    kernel_init=basic.torch_linear(),
    **fields,
  )


class PatchEmbed(nn.Module):
  """Twice a 3x3 convolution of stride 2, batch norm and ReLU.

  Attributes:
    in_dim: Channels after the first convolution.
    dim: Channels after the second one.
    precision: Of the convolutions, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  in_dim: int
  dim: int
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b rows columns d"]:
    """Embeds images; a side of s pixels gives ceil(s / 4) rows or columns."""
    dtypes: dict[str, Any] = dict(
      dtype=basic.compute_dtype(self.dtype, x), param_dtype=self.param_dtype
    )
    for i, features in enumerate((self.in_dim, self.dim), start=1):
      x = conv3x3(
        features,
        strides=2,
        use_bias=False,
        precision=self.precision,
        name=f"conv{i}",
        **dtypes,
      )(x)
      norm = batch_norm.BatchNorm(epsilon=1e-4, name=f"norm{i}", **dtypes)
      x = nn.relu(norm(x, train=train))
    return x


class ConvBlock(nn.Module):
  """x + norm(conv(gelu(norm(conv(x))))) with batch norms and tanh GELU.

  Attributes:
    precision: Of the convolutions, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w d"],
    drop_rate: float | Array | None = None,
    # Positional: `nn.remat` cannot tell a static keyword argument.
    train: bool = False,
  ) -> Float[Array, "b h w d"]:
    """Runs the block; None as `drop_rate` means no drop path."""
    d = x.shape[-1]
    dtypes: dict[str, Any] = dict(
      dtype=basic.compute_dtype(self.dtype, x), param_dtype=self.param_dtype
    )
    fields: dict[str, Any] = dict(
      bias_init=basic.uniform(1 / math.sqrt(9 * d)),  # PyTorch's.
      precision=self.precision,
      **dtypes,
    )
    y = conv3x3(d, name="conv1", **fields)(x)
    y = batch_norm.BatchNorm(name="norm1", **dtypes)(y, train=train)
    y = nn.gelu(y, approximate=True)
    y = conv3x3(d, name="conv2", **fields)(y)
    y = batch_norm.BatchNorm(name="norm2", **dtypes)(y, train=train)
    return x + basic.DropPath(name="drop_path")(y, drop_rate)


class ConvStage(nn.Module):
  """A row of convolution blocks.

  Attributes:
    block: Fields of every `ConvBlock`.
    remat: Recompute blocks in the backward pass instead of storing them.
  """

  block: dict[str, Any]
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w d"], drop_rates: Rates, *, train: bool = False
  ) -> Float[Array, "b h w d"]:
    """Runs a block per drop-path rate."""
    block = ConvBlock
    if self.remat:
      block = nn.remat(ConvBlock, static_argnums=(3,))
    for i, rate in enumerate(drop_rates):
      x = block(name=f"blocks_{i}", **self.block)(x, rate, train)
    return x
