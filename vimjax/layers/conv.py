"""Depthwise convolutions as sums of shifted products."""

import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic


class DepthwiseConv1d(nn.Module):
  """One filter per channel over the tokens: causal or centred.

  Written as a sum of shifted products: XLA fuses it into one loop, where the
  general convolution is several times slower on a CPU. Sums are float32, as in
  the CUDA kernel of the original (float64 for float64 inputs).

  Attributes:
    kernel_size: Taps k. Causal, row k - 1 of the kernel multiplies the current
      token.
    reverse: The mirror image, as if the tokens were in reverse order.
    centered: Each token sees as many tokens ahead as behind (one more ahead
      where k is even) instead of itself and those before it.
    use_bias: Adds a bias per channel.
    dtype: Dtype of the result; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  kernel_size: int
  reverse: bool = False
  centered: bool = False
  use_bias: bool = True
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Convolves x; tokens beyond the ends count as zero."""
    k, (_, l, d) = self.kernel_size, x.shape
    dtype = basic.compute_dtype(self.dtype, x)
    init = basic.uniform(1 / math.sqrt(k))  # PyTorch's; the fan-in is k.
    kernel = self.param("kernel", init, (k, d), self.param_dtype)
    behind = (k - 1) // 2 if self.centered else k - 1
    padding = (behind, k - 1 - behind)
    x = jnp.pad(x, ((0, 0), padding[:: -1 if self.reverse else 1], (0, 0)))
    accumulator = jnp.promote_types(dtype, jnp.float32)
    y = jnp.zeros((), accumulator)
    if self.use_bias:
      y = self.param("bias", init, (d,), self.param_dtype).astype(accumulator)
    for shift in range(k):
      tap = kernel[k - 1 - shift if self.reverse else shift]
      shifted = x[:, shift : shift + l].astype(accumulator)
      y = y + shifted * tap.astype(accumulator)
    return y.astype(dtype)


class DepthwiseConv2d(nn.Module):
  """One square filter per channel over an image, zeros beyond its edges.

  Written like `DepthwiseConv1d`, for the same reason, with float32 sums too.

  Attributes:
    kernel_size: Side k of the filters, odd.
    use_bias: Adds a bias per channel.
    dtype: Dtype of the result; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  kernel_size: int = 3
  use_bias: bool = False
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Convolves x; the result has its shape."""
    k, (_, h, w, d) = self.kernel_size, x.shape
    dtype = basic.compute_dtype(self.dtype, x)
    init = basic.uniform(1 / k)  # PyTorch's; the fan-in is k * k.
    kernel = self.param("kernel", init, (k, k, d), self.param_dtype)
    accumulator = jnp.promote_types(dtype, jnp.float32)
    y = jnp.zeros((), accumulator)
    if self.use_bias:
      y = self.param("bias", init, (d,), self.param_dtype).astype(accumulator)
    padding = (k // 2, k // 2)
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    for i in range(k):
      for j in range(k):
        shifted = x[:, i : i + h, j : j + w].astype(accumulator)
        y = y + shifted * kernel[i, j].astype(accumulator)
    return y.astype(dtype)
