"""State-space duality: the scan of Mamba-2 as matrix products over chunks.

b batch, l length, c chunks, q tokens in a chunk, m heads of p channels each,
n state size, k directions over an image of h rows and w columns.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax.layers import basic, cross_scan

# Tokens in a chunk. Within one the work grows with its square, as matrix
# products; between chunks runs a recurrence.
_MAX_CHUNK = 64


def ssd(
  x: Float[Array, "b l m p"],
  delta: Float[Array, "b l m"],
  A: Float[Array, "m"],
  B: Float[Array, "b l n"],
  C: Float[Array, "b l n"],
  *,
  reverse: bool = False,
  precision: basic.Precision = None,
) -> Float[Array, "b l m p"]:
  """Runs a state-space model with one decay per head and token.

  For every batch row and head, with a state of shape (p, n) that starts at 0:

    H[t] = exp(delta[t] A) H[t-1] + delta[t] x[t] B[t]^T
    y[t] = H[t] C[t]

  Mamba-2 (https://arxiv.org/abs/2405.21060), section 6, the block decomposition
  of the matrix that maps x to y. Decays and states are float32 at least; the
  matrix products take operands of `x`'s dtype and add up in float32.

  Args:
    x: The input.
    delta: Step sizes, positive.
    A: Decay rates, negative.
    B: How the input enters the state, shared by all heads.
    C: How the output reads the state, shared by all heads.
    reverse: Scans from the last token to the first, in place.
    precision: Of the matrix products, see `jax.lax.Precision`.

  Returns:
    y, float32 (float64 if `x` is).
  """
  l = x.shape[1]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  chunks = -(-l // _MAX_CHUNK)
  size = -(-l // chunks)

  def split(x):
    # A step of size zero leaves the state as it is: padding needs no mask.
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, chunks * size - l)
    return jnp.pad(x, padding).reshape(x.shape[0], chunks, size, *x.shape[2:])

  delta = delta.astype(wide)
  inputs = (x.astype(wide) * delta[..., None]).astype(x.dtype)
  run = functools.partial(_chunked, reverse=reverse, precision=precision)
  # Recomputed in the backward pass: the decays between all pairs of tokens of a
  # chunk, for every head, are by far the largest arrays.
  y = jax.checkpoint(run)(
    split(inputs), split(delta * A.astype(wide)), split(B), split(C)
  )
  # Sizes in full: -1 cannot be told in an empty batch.
  return y.reshape(x.shape[0], chunks * size, *x.shape[2:])[:, :l]


def _chunked(
  x: Float[Array, "b c q m p"],
  log_decay: Float[Array, "b c q m"],
  B: Float[Array, "b c q n"],
  C: Float[Array, "b c q n"],
  *,
  reverse: bool,
  precision: basic.Precision,
) -> Float[Array, "b c q m p"]:
  """The scan of x, already multiplied by the step sizes."""
  wide, narrow = log_decay.dtype, x.dtype
  einsum = functools.partial(
    jnp.einsum, precision=precision, preferred_element_type=wide
  )
  q = x.shape[2]
  # Sums of log decays from the edge of the chunk up to and with each token.
  since = jax.lax.cumsum(log_decay, axis=2, reverse=reverse)
  edge = 0 if reverse else -1
  total = since[:, :, edge]  # (b, c, m)

  # Within a chunk: token i sees token j through the decays after j, up to i.
  # Added up for each pair: differences of `since` would cancel.
  after = jnp.tril(jnp.ones((q, q), bool), -1)
  after = after.T if reverse else after
  pairs = jnp.where(after[..., None], log_decay[:, :, :, None], 0)
  pairs = jax.lax.cumsum(pairs, axis=2, reverse=reverse)  # (b, c, i, j, m)
  seen = after | jnp.eye(q, dtype=bool)
  decay = jnp.exp(jnp.where(seen[..., None], pairs, -jnp.inf))
  scores = einsum("bcin,bcjn->bcij", C, B)
  weights = (scores[..., None] * decay).astype(narrow)
  y = einsum("bcijm,bcjmp->bcimp", weights, x)

  # Between chunks: what each adds to the state, and the state that each enters.
  to_edge = jnp.exp(pairs[:, :, edge])[..., None]
  added = einsum(
    "bcjmp,bcjn->bcmpn", (x.astype(wide) * to_edge).astype(narrow), B
  )
  states = _states_before(added, jnp.exp(total), reverse=reverse)
  read = einsum("bcin,bcmpn->bcimp", C, states.astype(narrow))
  return y + read * jnp.exp(since)[..., None]


def _states_before(
  added: Float[Array, "b c m p n"],
  decay: Float[Array, "b c m"],
  *,
  reverse: bool,
) -> Float[Array, "b c m p n"]:
  """The state with which the scan enters each chunk."""

  def step(state, chunk):
    added, decay = chunk
    return decay[..., None, None] * state + added, state

  first = lambda x: jnp.moveaxis(x, 1, 0)
  _, states = jax.lax.scan(
    step,
    jnp.zeros_like(added[:, 0]),
    (first(added), first(decay)),
    reverse=reverse,
  )
  return jnp.moveaxis(states, 0, 1)


class CrossSSD(nn.Module):
  """Four Mamba-2 scans over an image: rows, columns, and both backwards.

  The mixer of VMamba's `m2` models: (dt, B, C) = x_proj u for each direction,
  delta = softplus(dt + dt_bias) for each head, y = sum over the directions of
  `ssd` and D u. Heads are `dt_rank` in number.

  Attributes:
    state_size: Length n of the state per channel.
    dt_rank: Heads m; must divide the channels.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  state_size: int
  dt_rank: int
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, u: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Mixes an image; the result has the computation dtype.

    Raises:
      ValueError: The heads do not divide the channels.
    """
    n, m, (b, h, w, d) = self.state_size, self.dt_rank, u.shape
    if d % m:
      raise ValueError(
        f"CrossSSD: dt_rank={m} heads must divide the {d} channels; choose "
        "another dt_rank."
      )
    dtype = basic.compute_dtype(self.dtype, u)
    wide = jnp.promote_types(dtype, jnp.float32)
    u = u.astype(dtype)
    x = cross_scan.DirectionalDense(
      m + 2 * n,
      precision=self.precision,
      dtype=dtype,
      param_dtype=self.param_dtype,
      name="x_proj",
    )(u)
    dt, B, C = jnp.split(x, (m, m + n), axis=-1)  # (b, h, w, k, m or n)
    k = x.shape[3]
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    start = nn.initializers.uniform(0.1)
    dt_bias = self.param("dt_bias", start, (k, m), self.param_dtype)
    A_log = self.param("A_log", zeros, (k, m), self.param_dtype)
    D = self.param("D", ones, (k, m, d // m), self.param_dtype)
    delta = jax.nn.softplus(dt.astype(wide) + dt_bias.astype(wide))
    A = -jnp.exp(A_log.astype(wide))
    heads = u.reshape(b, h, w, m, d // m)

    y = heads.astype(wide) * D.astype(wide).sum(0)
    for direction in range(k):
      turn = cross_scan.turn if direction % 2 else lambda x: x
      arrays = (heads, *(x[:, :, :, direction] for x in (delta, B, C)))
      tokens, steps, enter, read = (
        turn(x).reshape(b, h * w, *x.shape[3:]) for x in arrays
      )
      z = ssd(
        tokens,
        steps,
        A[direction],
        enter,
        read,
        reverse=direction >= 2,
        precision=self.precision,
      )
      y = y + turn(z.reshape(turn(heads).shape))
    return y.reshape(b, h, w, d).astype(dtype)
