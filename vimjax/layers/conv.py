"""Depthwise convolutions as sums of shifted products."""

import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic


class DepthwiseConv1d(nn.Module):
  """One filter per channel over the tokens, causal in either direction.

  Written as a sum of shifted products: XLA fuses it into one loop, where the
  general convolution is several times slower on a CPU. Sums are float32, as in
  the CUDA kernel of the original (float64 for float64 inputs).

  Attributes:
    kernel_size: Taps k. Row k - 1 of the kernel multiplies the current token.
    reverse: Each token sees itself and those after it instead of before it.
    dtype: Dtype of the result; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  kernel_size: int
  reverse: bool = False
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Convolves x; tokens beyond the ends count as zero."""
    k, (_, l, d) = self.kernel_size, x.shape
    dtype = basic.compute_dtype(self.dtype, x)
    init = basic.uniform(1 / math.sqrt(k))  # PyTorch's; the fan-in is k.
    kernel = self.param("kernel", init, (k, d), self.param_dtype)
    bias = self.param("bias", init, (d,), self.param_dtype)
    padding = (0, k - 1) if self.reverse else (k - 1, 0)
    x = jnp.pad(x, ((0, 0), padding, (0, 0)))
    accumulator = jnp.promote_types(dtype, jnp.float32)
    y = bias.astype(accumulator)
    for shift in range(k):
      tap = kernel[k - 1 - shift if self.reverse else shift]
      shifted = x[:, shift : shift + l].astype(accumulator)
      y = y + shifted * tap.astype(accumulator)
    return y.astype(dtype)
