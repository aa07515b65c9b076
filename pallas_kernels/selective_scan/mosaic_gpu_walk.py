"""Where the tokens of a scan lie in its arrays.

What has one number per token and channel (u, delta, z, y and the gradients of
these) moves between memory and the kernels through `Walk` alone, tile by tile,
so that a subclass may lay tokens out in another way than one after the other.

TMA moves a tile at once only if the channels of a group are whole 16-byte
units. Where they are not, what comes is seen as one row of numbers, which has
no strides to be aligned, and each token is copied by itself; more channels come
with it, which `Walk.of_group` takes out. What goes has room for whole units.

TMA fills what a copy reads beyond the array with zeros, and clips what it would
write there. But JAX turns a copy to memory into a plain one, cut at the end of
the whole array only, wherever the box of the copy is contiguous in the array
(dimensions of one element aside). So that no such box reaches beyond a
dimension, into what another block writes, results have room there, which is cut
off afterwards. The interpreter clips all boxes.

b batch, l length, d channels, g groups, e = d // g channels of a group.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.selective_scan import mosaic_gpu_common as common

# Parts of an array, each with the condition under which it is the one that is
# meant; None if there is one only.
Windows = Sequence[tuple[Any, Any]]


class Rows(NamedTuple):
  """Tokens of a sequence that is one row of numbers.

  Attributes:
    ref: The sequence.
    first: Where the first token begins.
    step: From there to the next.
    size: Numbers of each.
  """

  ref: Any
  first: Any
  step: int
  size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """A scan over sequences of tokens, group by group; the base of all plans.

  Attributes:
    b: Batch size.
    l: Tokens of what is stored for all channels at once, B, C and checkpoints.
    g: Groups of channels.
    e: Channels of a group, whole 16-byte units of them.
    softplus: Whether delta goes through softplus.
    reverse: Whether the scan goes from the last token to the first.
    width: Channels that a group has in the sequences which come, if not `e`.
  """

  # Of the kernels, in profiles and in lowered programs.
  name: ClassVar[str] = "selective_scan"

  b: int
  l: int
  g: int
  e: int
  softplus: bool
  reverse: bool
  width: int | None = None

  def view(self, x: jax.Array, name: str) -> jax.Array:
    """u, delta, z or dy as the kernels see it."""
    if self.width is None:
      return x.reshape(self.sequence_shape(name))
    x = x.reshape(-1)
    # A copy, but rarely: the size is a stride under `vmap`.
    unit = common.TMA_BYTES // x.dtype.itemsize
    return jnp.pad(x, (0, -x.size % unit)) if x.size % unit else x

  def unview(self, x: jax.Array) -> jax.Array:
    """y, du, ddelta or dz, as the kernels write it, as (b, l, d)."""
    e = self.width or self.e
    return x[..., :e].reshape(self.b, -1, self.g * e)

  def copies(self, size: int) -> int:
    """In how many copies a tile of a sequence comes."""
    return 1 if self.width is None else size

  def sequence_shape(self, name: str) -> tuple[int, ...]:
    """Of u, delta, z, y, dy, du, ddelta or dz, unless it is one row."""
    del name
    return (self.b, self.l, self.g, self.e)

  def result(
    self, name: str, dtype: DTypeLike, size: int, channels: int
  ) -> jax.ShapeDtypeStruct:
    """y, du, ddelta or dz as the kernels write it, with room where needed.

    Args:
      name: Which of them.
      dtype: That of u, delta or z.
      size: Tokens of a tile.
      channels: Of a block.
    """
    *shape, e = self.sequence_shape(name)
    dtype = jnp.dtype(self.sequence_dtype(name, dtype))
    if self.is_ragged(size) or self.e % channels:
      while channels in self.token_strides(e):
        e += common.TMA_BYTES // dtype.itemsize
    return jax.ShapeDtypeStruct((*shape, e), dtype)

  def token_strides(self, e: int) -> tuple[int, ...]:
    """From a token to the next in a result with `e` channels in a group."""
    return (self.g * e,)

  def sequence_dtype(self, name: str, dtype: DTypeLike) -> DTypeLike:
    """In which y is written if u has `dtype`, or du, ddelta, dz likewise."""
    del name
    return dtype

  def tile_count(self, size: int) -> int:
    """Tiles of `size` tokens that a group has, at most."""
    return common.cdiv(self.l, size)

  def chunk_tiles(
    self, size: int, per_chunk: int, group: Any, chunk: Any
  ) -> tuple[Any, Any]:
    """The first tile of a chunk, in memory order, and how many it has."""
    del group
    tiles = self.tile_count(size)
    if per_chunk >= tiles:
      return jnp.int32(0), tiles
    first = chunk * per_chunk
    return first, jnp.minimum(tiles - first, per_chunk)

  def remaining(self, tile: Any, size: int, group: Any) -> Any:
    """Tokens from the first of a tile on; less than `size` in a ragged one."""
    del group
    return self.l - tile * size

  def is_ragged(self, size: int) -> bool:
    """Whether a number of tokens may be no multiple of `size`."""
    return self.l % size != 0

  def stored_tile(self, tile: Any, size: int, group: Any) -> Any:
    """The place of a tile among all `l` tokens that are stored."""
    del size, group
    return tile

  def windows(
    self, ref: Any, tile: Any, size: int, *, row: Any, group: Any, channels: Any
  ) -> Windows | Rows:
    """A tile of a sequence, (size, channels)."""
    if self.width is not None and len(ref.shape) == 1:
      token = row * self.l + tile * size
      first = (token * self.g + group) * self.width + channels.start
      return Rows(ref, first, self.g * self.width, channels.size)
    tokens = pl.ds(tile * size, size)
    return [(None, ref.at[row, tokens, group, channels])]

  def of_group(
    self, x: jax.Array, layout: Any, channels: Any, left: Any = None
  ) -> jax.Array:
    """Zero for what came beside the tokens and channels of a group.

    Args:
      x: Of (channels,) or (tokens, channels).
      layout: The layout of `x`.
      channels: Those of the block.
      left: Tokens from the first of `x` on; None if there are enough.
    """
    if self.width is None:
      return x
    channel = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    channel = plgpu.layout_cast(channel, layout) + channels.start
    zeros, width = common.zeros(x.shape, layout), jnp.int32(self.width)
    if left is not None and x.ndim == 1:
      width = jnp.where(left > 0, width, 0)
    # No products: what came may be infinite.
    x = jnp.where(channel < width, x, zeros)
    if left is not None and x.ndim == 2:
      token = lax.broadcasted_iota(jnp.int32, x.shape, 0)
      x = jnp.where(plgpu.layout_cast(token, layout) < left, x, zeros)
    return x

  def run(self, program: Callable[[Self], None]) -> None:
    """Runs the program of a block with the plan that this block has."""
    program(self)


def width_of(u: jax.Array, A: jax.Array, g: int) -> int | None:
  """`Walk.width` for the channels of a sequence and those of a parameter."""
  return None if u.shape[2] == A.shape[0] else u.shape[2] // g


def copy_in(windows: Windows | Rows, target: Any, barrier: Any) -> None:
  """Starts the copy, or copies, to shared memory."""
  if isinstance(windows, Rows):
    _copy_rows(windows, target, barrier)
    return
  for condition, source in windows:
    copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier)
    _run_if(condition, copy)


def _copy_rows(rows: Rows, target: Any, barrier: Any) -> None:
  def copy(i, carry):
    numbers = pl.ds(rows.first + i * rows.step, rows.size)
    plgpu.copy_gmem_to_smem(rows.ref.at[numbers], target.at[i], barrier)
    return carry

  lax.fori_loop(jnp.int32(0), jnp.int32(target.shape[0]), copy, jnp.int32(0))


def copy_out(source: Any, windows: Windows | Rows) -> None:
  """Starts the copy from shared memory."""
  assert not isinstance(windows, Rows)  # Only what comes may be one row.
  for condition, target in windows:
    _run_if(
      condition, functools.partial(plgpu.copy_smem_to_gmem, source, target)
    )


def _run_if(condition: Any, function: Callable[[], None]) -> None:
  if condition is None:
    function()
  else:
    pl.when(condition)(function)
