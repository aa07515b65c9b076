"""The selective scan of sequences whose tokens are split over devices.

Over its tokens a device multiplies the state that enters by a decay, the
exponential of A times the sum of its step sizes, and adds what its own tokens
bring. Two such steps in a row are one of the same kind (the decays multiply,
and the second decays what the first added), so all that devices need to tell
each other is one decay and one state: b d n numbers each, whatever the length.

Each device scans its tokens twice: from a zero state to find what they add, and
from the state that enters. Derivatives follow from those of the scan.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import arguments

_Scan = Callable[
  [arguments.Arguments, arguments.Options], tuple[jax.Array, jax.Array]
]


def selective_scan(
  args: arguments.Arguments,
  options: arguments.Options,
  scan: _Scan,
  axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """Returns this shard's y, and the final state of the whole sequence.

  Args:
    args: The arrays of this shard; all vary over `axes`.
    options: The choices of the call.
    scan: An implementation of the selective scan.
    axes: Manual mesh axes that split the tokens, slowest first.
  """
  _, added = scan(args._replace(D=None, z=None, initial_state=None), options)
  # One pair per shard, in the order of the tokens.
  added = jax.lax.all_gather(added, axes)
  decay = jax.lax.all_gather(_decay(args, options), axes)

  state = args.initial_state
  state = jnp.zeros_like(added[0]) if state is None else state
  state = state.astype(options.compute_dtype)
  count = added.shape[0]
  order = range(count)[:: -1 if options.reverse else 1]
  entering = [state] * count
  for shard in order:
    entering[shard] = state
    state = decay[shard] * state + added[shard]
  index = jax.lax.axis_index(axes)
  initial_state = jnp.stack(entering)[index]
  y, final = scan(args._replace(initial_state=initial_state), options)
  is_last = index == order[-1]
  # The sum gives it to all shards, in a form that JAX knows to be equal there.
  return y, jax.lax.psum(jnp.where(is_last, final, 0), axes)


def _decay(args: arguments.Arguments, options: arguments.Options) -> jax.Array:
  """What this shard's tokens multiply a state by, (b, d, n)."""
  delta = args.delta.astype(options.compute_dtype)
  if args.delta_bias is not None:
    delta = delta + args.delta_bias.astype(delta.dtype)
  if options.delta_softplus:
    delta = jax.nn.softplus(delta)
  A = args.A.astype(delta.dtype)
  return jnp.exp(delta.sum(1)[..., None] * A)


def pad(
  args: arguments.Arguments, options: arguments.Options, multiple: int
) -> arguments.Arguments:
  """Adds tokens that leave the state as it is, so that the length divides.

  They come last in memory; their outputs mean nothing.
  """
  extra = -args.u.shape[1] % multiple
  if not extra:
    return args
  padded = {
    name: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
    for name, x in args._asdict().items()
    if x is not None and "l" in arguments.LAYOUTS[name]
  }
  padded["delta"] = _no_steps(args, options, extra)
  return args._replace(**padded)


def _no_steps(
  args: arguments.Arguments, options: arguments.Options, extra: int
) -> jax.Array:
  """`delta` with `extra` tokens whose step size is zero."""
  b, _, d = args.delta.shape
  bias = 0 if args.delta_bias is None else args.delta_bias
  # The softplus of this is zero in float64, and in bfloat16.
  value = jnp.full((d,), -1e4) if options.delta_softplus else -bias
  rows = jnp.broadcast_to(value, (b, extra, d)).astype(args.delta.dtype)
  return jnp.concatenate([args.delta, rows], axis=1)
