"""The parts of the arrays that one loop of `xla_sequential` works on.

A block is one batch row and k of the groups of channels. In all arrays the
groups are the last axis but one.

b batch, n state size, g groups, e channels in a group, k groups in a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

# Bound on a block's state, so that it leaves room in a first-level cache for
# the token and what is computed from it. More rows at a time are slower too.
_STATE_BYTES = 24 * 1024


class Block(NamedTuple):
  """The place of a block.

  Attributes:
    row: The batch row.
    group: The first group.
    groups: How many there are.
  """

  row: Int[Array, ""]
  group: Int[Array, ""]
  groups: int


def for_each(
  state: Float[Array, "b n g e"],
  function: Callable[[Block, Any], Any],
  carry: Any,
) -> Any:
  """Runs carry = function(block, carry) for all blocks of the state."""
  b, n, g, e = state.shape
  if b == 0:
    return carry  # The body is traced all the same, and could slice nothing.
  fitting = max(1, _STATE_BYTES // (n * e * state.dtype.itemsize))
  groups = max(k for k in range(1, g + 1) if g % k == 0 and k <= fitting)
  columns = g // groups

  def body(i, carry):
    return function(Block(i // columns, i % columns * groups, groups), carry)

  return jax.lax.fori_loop(0, b * columns, body, carry)


def read(x: jax.Array, indices: tuple[Any, ...], block: Block) -> jax.Array:
  """x[indices] of the block's groups."""
  starts, sizes = _window(x, indices, block)
  return jax.lax.dynamic_slice(x, starts, sizes).reshape(sizes[len(indices) :])


def write(
  x: jax.Array, value: jax.Array, indices: tuple[Any, ...], block: Block
) -> jax.Array:
  """Returns x with x[indices] of the block's groups set, in the dtype of x."""
  starts, sizes = _window(x, indices, block)
  value = value.astype(x.dtype).reshape(sizes)
  return jax.lax.dynamic_update_slice(x, value, starts)


def _window(x, indices, block):
  rank = len(indices)
  middle = x.shape[rank:-2]
  starts = (*indices, *(0 for _ in middle), block.group, 0)
  return starts, (*(1 for _ in indices), *middle, block.groups, x.shape[-1])
