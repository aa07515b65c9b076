"""Functions for the inner loop of `xla_sequential`: fast, and vectorised.

Those of JAX treat cases that do not occur there, or are slow on CPUs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# exp on [-log(2) / 2, log(2) / 2] by Chebyshev interpolation; relative error
# below 3e-9.
_POLYNOMIAL = (
  1.0000000000,
  1.0000000377,
  0.5000000047,
  0.1666641544,
  0.0416663528,
  0.0083751328,
  0.0013941116,
)
# A float32 plus this is rounded to a whole number, which is in its lowest bits,
# with the bias of a float32's exponent, 127, added.
_ROUND = 1.5 * 2**23 + 127
_ROUND_BITS = 0x4B40007F  # Those of this constant.
_LOG2_E = 1.4426950408889634
# log(2) in two parts: products of the first with whole numbers are exact.
_LOG_2 = (0.693359375, -2.12194440e-4)


@jax.custom_jvp
def exp(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
  """The exponential, to two units in the last place of a float32.

  Below -87.7 it is 0, above 88.4 infinite. In float64 it is that of JAX.
  """
  if x.dtype != jnp.float32:
    return jnp.exp(x)
  x = jnp.clip(x, -88.03, 88.73)
  # Not `rounded - _ROUND`: a compiler may take that for x * _LOG2_E.
  rounded = jax.lax.bitcast_convert_type(x * _LOG2_E + _ROUND, jnp.int32)
  power = (rounded - _ROUND_BITS).astype(jnp.float32)
  x = x - power * _LOG_2[0] - power * _LOG_2[1]
  y = jnp.full_like(x, _POLYNOMIAL[-1])
  for coefficient in _POLYNOMIAL[-2::-1]:
    y = y * x + coefficient
  # 2 ** power: all but the whole number and the bias is shifted out.
  return y * jax.lax.bitcast_convert_type(rounded << 23, jnp.float32)


@exp.defjvp
def _exp_jvp(primals, tangents):
  y = exp(*primals)
  return y, y * tangents[0]


def softplus(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
  """log(1 + exp(x)), to the last digits also for very negative x.

  As `jax.nn.softplus`, but without log1p, which is slow on CPUs.
  """
  small = exp(-jnp.abs(x))
  # log1p(small) = 2 atanh(ratio) by its power series; ratio is at most 1 / 3.
  ratio = small / (2 + small)
  square = ratio * ratio
  terms = 8 if x.dtype == jnp.float32 else 17
  series = 0.0
  for i in reversed(range(terms)):
    series = series * square + 1 / (2 * i + 1)
  return jnp.maximum(x, 0) + 2 * ratio * series
