"""The cross selective scan as four selective scans.

Rows are scanned in the original layout, forwards and, by index, backwards.
Columns are scanned in the one transposed copy in the same two ways. Nothing is
flipped. The derivative follows from that of the selective scan.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cross_selective_scan import arguments
from pallas_kernels.selective_scan import arguments as scan_arguments

_Scan = Callable[
  [scan_arguments.Arguments, scan_arguments.Options],
  tuple[jax.Array, jax.Array],
]


# Compiled as a function of its own, so that the many equal layers of a model
# are traced once.
@functools.partial(jax.jit, static_argnames=("options", "scan"))
def cross_selective_scan(
  args: arguments.Arguments, options: arguments.Options, *, scan: _Scan
) -> jax.Array:
  """Returns y; see `pallas_kernels.cross_selective_scan`.

  Args:
    args: The arrays.
    options: The choices of the call.
    scan: An implementation of the selective scan.
  """
  # Widened so that the four results are rounded once, after they are added.
  u = args.u.astype(options.compute_dtype)
  wide = args._replace(u=u)
  swap = lambda x: jnp.swapaxes(x, 1, 2)
  turned = wide._replace(
    u=swap(u), delta=swap(args.delta), B=swap(args.B), C=swap(args.C)
  )
  y = _both_ways(wide, (0, 2), options, scan)
  y = y + swap(_both_ways(turned, (1, 3), options, scan))
  if args.D is not None:
    y = y + args.D.astype(options.compute_dtype).sum(0) * u
  return y.astype(args.u.dtype)


def _both_ways(
  args: arguments.Arguments,
  directions: tuple[int, int],
  options: arguments.Options,
  scan: _Scan,
) -> jax.Array:
  """Scans along the second and third dimension, forwards and backwards."""
  # Sizes in full: -1 cannot be told in an empty batch.
  b, h, w, _ = args.u.shape
  flat = lambda x: x.reshape(b, h * w, *x.shape[3:])
  results = []
  for k, reverse in zip(directions, (False, True), strict=True):
    y, _ = scan(
      scan_arguments.Arguments(
        u=flat(args.u),
        delta=flat(args.delta[:, :, :, k]),
        A=args.A[k],
        B=flat(args.B[:, :, :, k, None]),
        C=flat(args.C[:, :, :, k, None]),
        D=None,
        z=None,
        delta_bias=None if args.delta_bias is None else args.delta_bias[k],
        initial_state=None,
      ),
      scan_arguments.Options(
        delta_softplus=options.delta_softplus,
        reverse=reverse,
        compute_dtype=options.compute_dtype,
      ),
    )
    results.append(y)
  return (results[0] + results[1]).reshape(args.u.shape)
