"""The selective scan by `jax.lax.associative_scan`, in chunks.

Runs anywhere. Within a chunk all steps are composed in parallel; chunks
follow each other, so that the states of one chunk at a time are in memory.
The derivative is JAX's own, with every chunk recomputed.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import partition
from pallas_kernels.selective_scan import arguments

# Tokens whose states are in memory at once. Longer ones cost memory, shorter
# ones parallelism: at 64 a Vim-Ti batch of 8 takes 13 MB per array of states.
_MAX_CHUNK = 64


def selective_scan(
  args: arguments.Arguments, options: arguments.Options
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`."""
  dtype = options.compute_dtype
  out_dtype = args.u.dtype
  args = jax.tree.map(lambda x: x.astype(dtype), args)
  b, l, d = args.u.shape
  g, n = args.B.shape[2:]
  e = d // g

  delta = args.delta
  if args.delta_bias is not None:
    delta = delta + args.delta_bias
  if options.delta_softplus:
    delta = jax.nn.softplus(delta)

  h = args.initial_state
  if h is None:
    h = partition.full((b, d, n), 0, dtype, like=args.u)
  tokens = (
    delta.reshape(b, l, g, e),
    (delta * args.u).reshape(b, l, g, e),
    args.B,
    args.C,
  )
  scan_chunk = functools.partial(
    _scan_chunk, args.A.reshape(g, e, n), reverse=options.reverse
  )
  h, y = jax.lax.scan(
    jax.checkpoint(scan_chunk),
    h.reshape(b, g, e, n),
    jax.tree.map(_split_in_chunks, tokens),
    reverse=options.reverse,
  )
  chunks, _, size = y.shape[:3]
  y = jnp.moveaxis(y, 0, 1).reshape(b, chunks * size, d)[:, :l]
  if args.D is not None:
    y = y + args.D * args.u
  if args.z is not None:
    y = y * jax.nn.silu(args.z)
  return y.astype(out_dtype), h.reshape(b, d, n)


def _split_in_chunks(x: jax.Array) -> jax.Array:
  """(b, l, ...) to (chunks, b, l / chunks, ...), zeros after the last token.

  A step of size zero leaves the state as it is, so padding needs no mask.
  """
  b, l = x.shape[:2]
  chunks = -(-l // _MAX_CHUNK)
  size = -(-l // chunks)
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, chunks * size - l)
  x = jnp.pad(x, padding).reshape(b, chunks, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _scan_chunk(A, h, tokens, *, reverse):
  """Advances h (b, g, e, n) by a chunk; returns it and y (b, l, g, e)."""
  delta, delta_u, B, C = tokens
  decay = jnp.exp(delta[..., None] * A)  # (b, l, g, e, n)
  inputs = delta_u[..., None] * B[:, :, :, None]
  total_decay, states = jax.lax.associative_scan(
    _compose, (decay, inputs), reverse=reverse, axis=1
  )
  states = states + total_decay * h[:, None]
  y = jnp.einsum(
    "blgen,blgn->blge", states, C, precision=jax.lax.Precision.HIGHEST
  )
  return states[:, 0 if reverse else -1], y


def _compose(earlier, later):
  """Two affine maps h -> decay * h + inputs, one after the other."""
  decay, inputs = earlier
  later_decay, later_inputs = later
  return later_decay * decay, later_decay * inputs + later_inputs
