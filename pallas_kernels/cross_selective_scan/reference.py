"""The cross selective scan as its definition reads.

Each direction has its list of tokens; the sequence is gathered, scanned by the
reference of the selective scan, and scattered back. Kept simple on purpose and
never optimised: the other implementations are tested against it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cross_selective_scan import arguments
from pallas_kernels.selective_scan import arguments as scan_arguments
from pallas_kernels.selective_scan import reference


def cross_selective_scan(
  args: arguments.Arguments, options: arguments.Options
) -> jax.Array:
  """Returns y; see `pallas_kernels.cross_selective_scan`."""
  b, h, w, d = args.u.shape
  flat = lambda x: x.reshape(b, h * w, *x.shape[3:])
  u = flat(args.u.astype(options.compute_dtype))
  total = jnp.zeros_like(u)
  for k, order in enumerate(orders(h, w)):
    sequence = lambda x, k=k, order=order: flat(x)[:, order, k]
    y, _ = reference.selective_scan(
      scan_arguments.Arguments(
        u=u[:, order],
        delta=sequence(args.delta),
        A=args.A[k],
        B=sequence(args.B)[:, :, None],
        C=sequence(args.C)[:, :, None],
        D=None if args.D is None else args.D[k],
        z=None,
        delta_bias=None if args.delta_bias is None else args.delta_bias[k],
        initial_state=None,
      ),
      scan_arguments.Options(
        delta_softplus=options.delta_softplus,
        reverse=False,
        compute_dtype=options.compute_dtype,
      ),
    )
    total = total + y[:, np.argsort(order)]
  return total.astype(args.u.dtype).reshape(b, h, w, d)


def orders(h: int, w: int) -> np.ndarray:
  """For each direction the positions row * w + column in scan order, (k, l)."""
  rows = np.arange(h * w)
  columns = rows.reshape(h, w).T.reshape(-1)
  return np.stack([rows, columns, rows[::-1], columns[::-1]])
