"""Small pieces that every family uses: initialisers, drop path, type names."""

import math
from typing import Any

from flax import linen as nn
from flax import typing as flax_typing
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

Dtype = jax.typing.DTypeLike
Precision = flax_typing.PrecisionLike
Initializer = nn.initializers.Initializer


def compute_dtype(dtype: Dtype | None, x: Array) -> jnp.dtype:
  """The dtype that a layer computes in: its own, else that of its input."""
  # float64 only where JAX computes in it: without, NumPy's would warn.
  return jax.dtypes.canonicalize_dtype(x.dtype if dtype is None else dtype)


def repeat_for_images(
  token: Float[Array, "d"], *, like: Float[Array, "b l d"]
) -> Float[Array, "b 1 d"]:
  """One token for every image, split over an explicit mesh as the images are.

  Args:
    token: What to repeat.
    like: The other tokens of the images.
  """
  rows = like[:, :1]
  repeated = jnp.zeros_like(rows) + token
  wanted = jax.typeof(rows).sharding
  if jax.typeof(repeated).sharding == wanted or not wanted.mesh.explicit_axes:
    return repeated
  # Under jit, with no mesh in context, zeros_like forgets how rows is split.
  return jax.sharding.reshard(repeated, wanted)


def uniform(bound: float) -> Initializer:
  """Draws from [-bound, bound)."""

  def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_linear(scale: float = 1.0) -> Initializer:
  """PyTorch's default for a kernel whose last axis is the output.

  That is (fan_in, fan_out) in linear layers, (h, w, in, out) in convolutions.

  U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which PyTorch writes as
  `kaiming_uniform_(a=sqrt(5))`.

  Args:
    scale: Multiplies the bound.
  """

  def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    fan_in = math.prod(shape[:-1])
    return uniform(scale / math.sqrt(fan_in))(key, shape, dtype)

  return init


class DropPath(nn.Module):
  """Stochastic depth: drops the whole of x for some images of a batch.

  Deep Networks with Stochastic Depth (https://arxiv.org/abs/1603.09382), with
  the survivors divided by 1 - rate so that the expectation stays. Takes its
  randomness from the rng named "drop_path".
  """

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *dims"], rate: float | Array | None
  ) -> Float[Array, "b *dims"]:
    """Applies the mask.

    Args:
      x: One branch of a residual block.
      rate: Probability of dropping, in [0, 1); None or 0 returns x as it is.
    """
    if rate is None or (isinstance(rate, float) and rate == 0.0):
      return x
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    mask = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
    return x * (mask / keep).astype(x.dtype)


def gelu(x: Array) -> Array:
  """x times the normal distribution function of x, the exact GELU.

  `jax.nn.gelu` takes it from erfc, which costs a CPU two branches and an array
  of constants. Here the relative error grows where the result vanishes.
  """
  half = jnp.asarray(0.5, x.dtype)
  return x * (half + half * jax.lax.erf(x * math.sqrt(0.5)))


def apart[T](x: T) -> T:
  """Returns x; on CPUs XLA does not fuse its consumers with its producers.

  A CPU takes up to 1.5 times as long for a norm and the matrix product that
  reads it as one fusion, and up to three times for a convolution and its norm.
  On a GPU fusions save memory traffic.
  """
  return jax.lax.optimization_barrier(x) if for_cpu() else x


def once[T](x: T) -> T:
  """Returns x, which XLA computes once, not again for each reader."""
  return jax.lax.optimization_barrier(x)


def for_cpu() -> bool:
  """Whether what is being traced is for a CPU."""
  return dispatch.default_platform() == "cpu"


def wide(dtype: Dtype) -> jnp.dtype:
  """The dtype for what must not be less than float32."""
  return jnp.promote_types(dtype, jnp.float32)


def layer_norm(name: str, dtype: Dtype, param_dtype: Dtype) -> nn.LayerNorm:
  """Over the channels; statistics are float32 at least whatever the dtype."""
  return nn.LayerNorm(
    epsilon=1e-5,
    use_fast_variance=False,  # The fast one cancels where the mean is large.
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )
