"""Multi-head self-attention, plain or by cuDNN's flash attention."""

import contextlib
from typing import Any, get_args, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import dispatch
from vimjax.layers import basic

Implementation = Literal["xla", "cudnn"]
_Heads = Float[Array, "b l heads size"]


def check_implementation(model: str, implementation: str | None) -> None:
  """Raises ValueError unless it is None or one of `Implementation`."""
  choices = get_args(Implementation)
  if implementation is not None and implementation not in choices:
    raise ValueError(
      f"{model}: attention_implementation must be None or one of "
      f"{list(choices)}, got {implementation!r}."
    )


class Attention(nn.Module):
  """softmax(Q K^T / sqrt(head size)) V of all tokens with all tokens.

  Attributes:
    num_heads: Heads; they share the channels evenly.
    implementation: Of `jax.nn.dot_product_attention`. "cudnn" is flash
      attention: an NVIDIA GPU, half precision and a head size that is a
      multiple of 8. None leaves the choice to JAX, which takes "xla".
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input. The softmax is float32 at
      least.
    param_dtype: Dtype of the parameters.
  """

  num_heads: int
  implementation: Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Attends along l; the result has the computation dtype.

    Raises:
      ValueError: The channels do not divide into the heads.
      UnsupportedError: `implementation` cannot run this here.
    """
    b, l, d = x.shape
    if d % self.num_heads:
      raise ValueError(
        f"Attention: {d} channels do not divide into num_heads="
        f"{self.num_heads}."
      )
    dense: dict[str, Any] = dict(
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      dtype=basic.compute_dtype(self.dtype, x),
      param_dtype=self.param_dtype,
    )
    qkv = nn.Dense(3 * d, name="qkv", **dense)(x)
    qkv = qkv.reshape(b, l, 3, self.num_heads, d // self.num_heads)
    q, k, v = (qkv[:, :, i] for i in range(3))  # (b, l, heads, head size)
    # Parameters can be made, and converted, where this could not run.
    implementation = None if self.is_initializing() else self.implementation
    if implementation == "cudnn" and (reason := _why_not_cudnn(q)):
      raise pallas_kernels.UnsupportedError(
        "Attention cannot run with attention_implementation='cudnn': "
        f"{reason}. Pass attention_implementation=None."
      )
    with _matmul_precision(self.precision):
      if implementation == "cudnn" and l % 2:
        y = _flash_of_odd_length(q, k, v)
      else:
        y = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    return nn.Dense(d, name="proj", **dense)(y.reshape(b, l, d))


@jax.custom_vjp
def _flash_of_odd_length(q: _Heads, k: _Heads, v: _Heads) -> _Heads:
  """Flash attention, whose gradient JAX has for even lengths only."""
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _flash_fwd(q: _Heads, k: _Heads, v: _Heads) -> tuple[_Heads, Any]:
  return jax.vjp(_flash_with_one_more, q, k, v)


def _flash_bwd(vjp: Any, dy: _Heads) -> tuple[_Heads, _Heads, _Heads]:
  return vjp(dy)


_flash_of_odd_length.defvjp(_flash_fwd, _flash_bwd)


def _flash_with_one_more(q: _Heads, k: _Heads, v: _Heads) -> _Heads:
  """The same with a token at the end that no other one sees."""
  b, l = q.shape[:2]
  q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full((b,), l, jnp.int32)
  y = jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return y[:, :l]


def _why_not_cudnn(q: Float[Array, "b l heads size"]) -> str | None:
  """A clause that says why flash attention cannot take these queries."""
  platform = dispatch.default_platform()
  if platform != "gpu":
    return f"needs an NVIDIA GPU, this runs on {platform!r}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"needs dtype bfloat16 or float16, got {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return (
      "needs a head size that is a multiple of 8 and at most 128, got "
      f"{q.shape[-1]}"
    )
  return None


def _matmul_precision(
  precision: basic.Precision,
) -> contextlib.AbstractContextManager[Any]:
  """Hands a precision to a function that has no argument for it."""
  if precision is None:
    return contextlib.nullcontext()
  if isinstance(precision, jax.lax.DotAlgorithmPreset):
    return jax.default_matmul_precision(precision.name)
  if precision in jax.lax.DotAlgorithmPreset.__members__:
    return jax.default_matmul_precision(precision)
  both = precision if isinstance(precision, tuple) else (precision,)
  # Of two, the finer one.
  finest = max((jax.lax.Precision(p) for p in both), key=lambda p: p.value)
  return jax.default_matmul_precision(finest.name.lower())
