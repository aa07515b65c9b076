"""Arguments of the selective scan: what is accepted, and its normal form.

b batch, l length, d channels, n state size, g groups of channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Arguments(NamedTuple):
  """The arrays that an implementation receives, checked and of full rank."""

  u: Float[Array, "b l d"]
  delta: Float[Array, "b l d"]
  A: Float[Array, "d n"]
  B: Float[Array, "b l g n"]
  C: Float[Array, "b l g n"]
  D: Float[Array, "d"] | None
  z: Float[Array, "b l d"] | None
  delta_bias: Float[Array, "d"] | None
  initial_state: Float[Array, "b d n"] | None


class Options(NamedTuple):
  """The choices of a call that are known when it is traced.

  Attributes:
    delta_softplus: Whether softplus is applied to delta, after its bias.
    reverse: Whether the scan goes from the last token to the first.
    compute_dtype: float64 if `u` is float64, else float32; the dtype of the
      final state.
  """

  delta_softplus: bool
  reverse: bool
  compute_dtype: DTypeLike


# One letter per dimension, as `partition.per_shard` reads them.
LAYOUTS = {
  "u": "bld",
  "delta": "bld",
  "A": "dn",
  "B": "blgn",
  "C": "blgn",
  "D": "d",
  "z": "bld",
  "delta_bias": "d",
  "initial_state": "bdn",
}
STATE_LAYOUT = "bdn"

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def normalise(**arrays: Any) -> Arguments:
  """Checks shapes and dtypes; returns arrays with B and C (b, l, g, n).

  Args:
    **arrays: The fields of `Arguments`, as the caller of the scan gave them.

  Raises:
    TypeError: Something is no array, or not of a real floating-point dtype.
    ValueError: A shape is wrong.
  """
  checked: Any = {name: _as_array(name, x) for name, x in arrays.items()}
  args = Arguments(**checked)
  _check_rank("u", args.u, "(b, l, d)", 3)
  _check_rank("A", args.A, "(d, n)", 2)
  b, l, d = args.u.shape
  n = args.A.shape[1]
  if l == 0:
    raise ValueError(
      f"selective_scan: `u` has no tokens, got shape {args.u.shape}; "
      "the length (second dimension) must be at least 1."
    )
  if d == 0 or n == 0:
    raise ValueError(
      "selective_scan: `u` needs at least one channel and `A` at least one "
      f"state, got shapes {args.u.shape} and {args.A.shape}."
    )
  _check_shape("A", args.A, (d, n), "`u`")
  for name in ("delta", "z"):
    _check_shape(name, getattr(args, name), (b, l, d), "`u`")
  for name in ("D", "delta_bias"):
    _check_shape(name, getattr(args, name), (d,), "the channels of `u`")
  _check_shape("initial_state", args.initial_state, (b, d, n), "`u` and `A`")
  B = _with_groups("B", args.B, (b, l, d, n))
  C = _with_groups("C", args.C, (b, l, d, n))
  if B.shape != C.shape:
    raise ValueError(
      "selective_scan: `B` and `C` must have the same number of groups, got "
      f"shapes {args.B.shape} and {args.C.shape}."
    )
  return args._replace(B=B, C=C)


def _as_array(name: str, x: Any) -> jax.Array | None:
  if x is None and name in ("D", "z", "delta_bias", "initial_state"):
    return None
  if not (hasattr(x, "shape") and hasattr(x, "dtype")):
    raise TypeError(
      f"selective_scan: `{name}` must be an array, got {type(x).__name__}."
    )
  if jnp.dtype(x.dtype).name not in _DTYPES:
    raise TypeError(
      f"selective_scan: `{name}` must have one of the dtypes "
      f"{', '.join(_DTYPES)}, got {x.dtype}; convert it first."
    )
  return jnp.asarray(x)


def _check_rank(name: str, x: jax.Array, form: str, rank: int) -> None:
  if x.ndim != rank:
    raise ValueError(
      f"selective_scan: `{name}` must have shape {form}, got {x.shape}."
    )


def _check_shape(
  name: str, x: jax.Array | None, shape: tuple[int, ...], other: str
) -> None:
  if x is None or x.shape == shape:
    return
  hint = ""
  if len(shape) == 3 and sorted(x.shape) == sorted(shape):
    hint = " Sequences are channel-last (b, l, d), states (b, d, n)."
  raise ValueError(
    f"selective_scan: `{name}` must have shape {shape} to match {other}, "
    f"got {x.shape}.{hint}"
  )


def _with_groups(
  name: str, x: jax.Array, sizes: tuple[int, int, int, int]
) -> jax.Array:
  """`B` or `C` with its dimension of groups."""
  b, l, d, n = sizes
  if x.shape == (b, l, n):
    return x[:, :, None, :]
  if x.ndim != 4 or x.shape[:2] != (b, l) or x.shape[3] != n:
    raise ValueError(
      f"selective_scan: `{name}` must have shape {(b, l, n)} or "
      f"({b}, {l}, groups, {n}) to match `u` and `A`, got {x.shape}."
    )
  g = x.shape[2]
  if g == 0 or d % g:
    raise ValueError(
      f"selective_scan: the {g} groups of `{name}`, shape {x.shape}, must "
      f"divide the {d} channels of `u`."
    )
  return x
