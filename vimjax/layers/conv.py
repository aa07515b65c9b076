"""Depthwise convolutions as sums of shifted products, with activations."""

from collections.abc import Callable, Sequence
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vimjax.layers import basic

Activation = Callable[[Array], Array]


class DepthwiseConv1d(nn.Module):
  """One filter per channel over the tokens: causal or centred.

  Written as a sum of shifted products: XLA fuses it into one loop, where the
  general convolution is several times slower on a CPU. Sums are float32, as in
  the CUDA kernel of the original (float64 for float64 inputs). For a gradient
  only x is kept; sum and activation are computed again.

  Attributes:
    kernel_size: Taps k. Causal, row k - 1 of the kernel multiplies the current
      token.
    reverse: The mirror image, as if the tokens were in reverse order.
    centered: Each token sees as many tokens ahead as behind (one more ahead
      where k is even) instead of itself and those before it.
    use_bias: Adds a bias per channel.
    activation: Applied to the sum, which has the dtype of the result; None for
      none.
    dtype: Dtype of the result; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  kernel_size: int
  reverse: bool = False
  centered: bool = False
  use_bias: bool = True
  activation: Activation | None = None
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
    bias = None
    if self.use_bias:
      bias = self.param("bias", init, (d,), self.param_dtype)

    @jax.checkpoint
    def convolve(x, kernel, bias):
      x = jnp.pad(x, ((0, 0), padding[:: -1 if self.reverse else 1], (0, 0)))
      taps = kernel[::-1] if self.reverse else kernel
      shifted = [x[:, i : i + l] for i in range(k)]
      return _sum(shifted, taps, bias, self.activation, dtype)

    return convolve(x, kernel, bias)


class DepthwiseConv2d(nn.Module):
  """One square filter per channel over an image, zeros beyond its edges.

  Written like `DepthwiseConv1d`, for the same reasons, with float32 sums too.

  Attributes:
    kernel_size: Side k of the filters, odd.
    use_bias: Adds a bias per channel.
    activation: Applied to the sum, which has the dtype of the result; None for
      none.
    dtype: Dtype of the result; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  kernel_size: int = 3
  use_bias: bool = False
  activation: Activation | None = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Convolves x; the result has its shape."""
    k, (_, h, w, d) = self.kernel_size, x.shape
    dtype = basic.compute_dtype(self.dtype, x)
    init = basic.uniform(1 / k)  # PyTorch's; the fan-in is k * k.
    kernel = self.param("kernel", init, (k, k, d), self.param_dtype)
    bias = None
    if self.use_bias:
      bias = self.param("bias", init, (d,), self.param_dtype)
    padding = (k // 2, k // 2)

    @jax.checkpoint
    def convolve(x, kernel, bias):
      x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
      shifted = [x[:, i : i + h, j : j + w] for i, j in np.ndindex(k, k)]
      taps = kernel.reshape(k * k, d)
      return _sum(shifted, taps, bias, self.activation, dtype)

    return convolve(x, kernel, bias)


def _sum(
  shifted: Sequence[Array],
  taps: Float[Array, "k d"],
  bias: Float[Array, "d"] | None,
  activation: Activation | None,
  dtype: jnp.dtype,
) -> Array:
  """activation(bias + sum of the products), in float32 at least."""
  wide = basic.wide(dtype)
  y = jnp.zeros((), wide) if bias is None else bias.astype(wide)
  for i, x in enumerate(shifted):
    y = y + x.astype(wide) * taps[i].astype(wide)
  y = y.astype(dtype)
  return y if activation is None else activation(y)
