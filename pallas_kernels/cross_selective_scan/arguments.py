"""Arguments of the cross selective scan: what is accepted, and their layouts.

b batch, h and w rows and columns, k directions, d channels, n state size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

DIRECTIONS = 4


class Arguments(NamedTuple):
  """The arrays that an implementation receives, checked."""

  u: Float[Array, "b h w d"]
  delta: Float[Array, "b h w k d"]
  A: Float[Array, "k d n"]
  B: Float[Array, "b h w k n"]
  C: Float[Array, "b h w k n"]
  D: Float[Array, "k d"] | None
  delta_bias: Float[Array, "k d"] | None


class Options(NamedTuple):
  """The choices of a call that are known when it is traced.

  Attributes:
    delta_softplus: Whether softplus is applied to delta, after its bias.
    compute_dtype: float64 if `u` is float64, else float32.
  """

  delta_softplus: bool
  compute_dtype: DTypeLike


# One letter per dimension, as `partition.per_shard` reads them.
LAYOUTS = {
  "u": "bhwd",
  "delta": "bhwkd",
  "A": "kdn",
  "B": "bhwkn",
  "C": "bhwkn",
  "D": "kd",
  "delta_bias": "kd",
}

_FORMS = {
  name: "(" + ", ".join(layout) + ")" for name, layout in LAYOUTS.items()
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check(**arrays: Any) -> Arguments:
  """Checks shapes and dtypes.

  Args:
    **arrays: The fields of `Arguments`, as the caller of the scan gave them.

  Raises:
    TypeError: Something is no array, or not of a real floating-point dtype.
    ValueError: A shape is wrong.
  """
  checked: Any = {name: _as_array(name, x) for name, x in arrays.items()}
  args = Arguments(**checked)
  _check_rank("u", args.u)
  _check_rank("A", args.A)
  b, h, w, d = args.u.shape
  sizes = dict(b=b, h=h, w=w, d=d, k=DIRECTIONS, n=args.A.shape[2])
  empty = [letter for letter in "hwdn" if sizes[letter] == 0]
  if empty:
    raise ValueError(
      "cross_selective_scan: `u` needs at least one row, column and channel "
      f"and `A` at least one state, got shapes {args.u.shape} and "
      f"{args.A.shape}."
    )
  for name, x in args._asdict().items():
    shape = tuple(sizes[letter] for letter in LAYOUTS[name])
    if x is not None and x.shape != shape:
      raise ValueError(
        f"cross_selective_scan: `{name}` must have shape {_FORMS[name]} = "
        f"{shape} to match `u` and `A` and {DIRECTIONS} directions, got "
        f"{x.shape}."
      )
  return args


def _as_array(name: str, x: Any) -> jax.Array | None:
  if x is None and name in ("D", "delta_bias"):
    return None
  if not (hasattr(x, "shape") and hasattr(x, "dtype")):
    raise TypeError(
      f"cross_selective_scan: `{name}` must be an array, got "
      f"{type(x).__name__}."
    )
  if jnp.dtype(x.dtype).name not in _DTYPES:
    raise TypeError(
      f"cross_selective_scan: `{name}` must have one of the dtypes "
      f"{', '.join(_DTYPES)}, got {x.dtype}; convert it first."
    )
  return jnp.asarray(x)


def _check_rank(name: str, x: jax.Array) -> None:
  if x.ndim != len(LAYOUTS[name]):
    raise ValueError(
      f"cross_selective_scan: `{name}` must have shape {_FORMS[name]}, got "
      f"{x.shape}."
    )
