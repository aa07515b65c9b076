"""Batch normalisation with PyTorch's running statistics."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic


class BatchNorm(nn.Module):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias, per channel.

  Batch Normalization (https://arxiv.org/abs/1502.03167). In training, mean and
  variance are those of the batch, and the collection "batch_stats" moves a
  tenth of the way towards them; in evaluation they come from there. As in
  PyTorch the running variance follows the unbiased estimate, which Flax's own
  layer does not. Under `jax.jit` a batch that is sharded over devices counts as
  a whole.

  Attributes:
    epsilon: Added to the variance.
    momentum: How much of the old running statistics stays in a training step.
    dtype: Dtype of the result; None follows the input. Statistics and the
      normalisation itself are float32 at least.
    param_dtype: Dtype of the parameters.
  """

  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "*dims d"], *, train: bool = False
  ) -> Float[Array, "*dims d"]:
    """Normalises x over all axes but the last.

    Args:
      x: Any number of leading axes.
      train: Uses and records the batch's statistics; needs
        `mutable=["batch_stats"]` in `apply`.

    Raises:
      ValueError: In training, there is one value per channel.
    """
    d = x.shape[-1]
    dtype = basic.compute_dtype(self.dtype, x)
    wide = jnp.promote_types(dtype, jnp.float32)
    stored = jnp.promote_types(self.param_dtype, jnp.float32)
    scale = self.param("scale", nn.initializers.ones, (d,), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (d,), self.param_dtype)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,), stored)
    running_var = self.variable("batch_stats", "var", jnp.ones, (d,), stored)

    x = x.astype(wide)
    mean, var = running_mean.value.astype(wide), running_var.value.astype(wide)
    if train:
      count = math.prod(x.shape[:-1])
      if count == 1:
        raise ValueError(
          f"BatchNorm: training needs more than one value per channel, got "
          f"shape {x.shape}; enlarge the batch or the images."
        )
      axes = tuple(range(x.ndim - 1))
      mean = x.mean(axes)
      var = jnp.square(x - mean).mean(axes)
      if not self.is_initializing():
        unbiased = var * (count / (count - 1))
        running_mean.value = self._moved(running_mean.value, mean)
        running_var.value = self._moved(running_var.value, unbiased)
    factor = jax.lax.rsqrt(var + self.epsilon) * scale.astype(wide)
    return ((x - mean) * factor + bias.astype(wide)).astype(dtype)

  def _moved(
    self, old: Float[Array, "d"], new: Float[Array, "d"]
  ) -> Float[Array, "d"]:
    new = jax.lax.stop_gradient(new).astype(old.dtype)
    return self.momentum * old + (1 - self.momentum) * new
