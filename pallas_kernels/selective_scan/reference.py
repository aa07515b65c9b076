"""The selective scan as its definition reads, one token after the other.

Kept simple on purpose and never optimised: the other implementations are
tested against it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import partition
from pallas_kernels.selective_scan import arguments


def selective_scan(
  args: arguments.Arguments, options: arguments.Options
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`."""
  dtype = options.compute_dtype
  out_dtype = args.u.dtype
  args = jax.tree.map(lambda x: x.astype(dtype), args)
  b, _, d = args.u.shape
  g, n = args.B.shape[2:]

  delta = args.delta
  if args.delta_bias is not None:
    delta = delta + args.delta_bias
  if options.delta_softplus:
    delta = jax.nn.softplus(delta)

  def step(h, token):
    u, delta, B, C = token
    B = jnp.repeat(B, d // g, axis=1)  # (b, d, n)
    C = jnp.repeat(C, d // g, axis=1)
    h = jnp.exp(delta[..., None] * args.A) * h + (delta * u)[..., None] * B
    return h, (h * C).sum(-1)

  h = args.initial_state
  if h is None:
    h = partition.full((b, d, n), 0, dtype, like=args.u)
  tokens = (args.u, delta, args.B, args.C)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  h, y = jax.lax.scan(step, h, tokens, reverse=options.reverse)
  y = jnp.moveaxis(y, 0, 1)
  if args.D is not None:
    y = y + args.D * args.u
  if args.z is not None:
    y = y * jax.nn.silu(args.z)
  return y.astype(out_dtype), h
