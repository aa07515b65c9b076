"""The cross selective scan as four selective scans.

All of them read and write in image order: the loop over time steps through the
columns by index, `associative_scan` runs on a transposed copy. Nothing is
flipped. The derivative follows from that of the selective scan.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.cross_selective_scan import arguments
from pallas_kernels.selective_scan import arguments as scan_arguments
from pallas_kernels.selective_scan import xla_associative


class Scan(Protocol):
  """A selective scan of an image that is stored row by row."""

  def __call__(
    self,
    args: scan_arguments.Arguments,
    options: scan_arguments.Options,
    *,
    columns: int | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Scans by columns, of which there are so many; None scans by rows."""
    ...


# Compiled as a function of its own, so that the many equal layers of a model
# are traced once.
@functools.partial(jax.jit, static_argnames=("options", "scan"))
def cross_selective_scan(
  args: arguments.Arguments, options: arguments.Options, *, scan: Scan
) -> jax.Array:
  """Returns y; see `pallas_kernels.cross_selective_scan`.

  Args:
    args: The arrays.
    options: The choices of the call.
    scan: An implementation of the selective scan.
  """
  # Sizes in full: -1 cannot be told in an empty batch.
  b, h, w, d = args.u.shape
  flat = lambda x: x.reshape(b, h * w, *x.shape[3:])
  # Widened so that the four results are rounded once, after they are added.
  u = flat(args.u.astype(options.compute_dtype))
  y = jnp.zeros((), u.dtype)
  if args.D is not None:
    y = args.D.astype(u.dtype).sum(0) * u
  for k in range(arguments.DIRECTIONS):
    out, _ = scan(
      scan_arguments.Arguments(
        u=u,
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
        reverse=k >= 2,
        compute_dtype=options.compute_dtype,
      ),
      columns=w if k % 2 else None,
    )
    y = y + out
  return y.reshape(b, h, w, d).astype(args.u.dtype)


def associative_scan(
  args: scan_arguments.Arguments,
  options: scan_arguments.Options,
  *,
  columns: int | None,
) -> tuple[jax.Array, jax.Array]:
  """`xla_associative.selective_scan` as a `Scan`."""
  if columns is None:
    return xla_associative.selective_scan(args, options)
  l = args.u.shape[1]

  def turn(x, rows):
    x = x.reshape(x.shape[0], rows, l // rows, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], l, *x.shape[3:])

  by_token = {
    name: turn(x, l // columns)
    for name, x in args._asdict().items()
    if x is not None and name in ("u", "delta", "B", "C", "z")
  }
  y, state = xla_associative.selective_scan(args._replace(**by_token), options)
  return turn(y, columns), state
