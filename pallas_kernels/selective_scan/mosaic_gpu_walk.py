"""Where the tokens of a scan lie in its arrays.

What has one number per token and channel (u, delta, z, y and the gradients of
these) moves between memory and the kernels through `Walk` alone, tile by tile,
so that a subclass may lay tokens out in another way than one after the other.

b batch, l length, d channels, g groups, e = d // g channels of a group.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, ClassVar, Self

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.selective_scan import mosaic_gpu_common as common

# Parts of an array, each with the condition under which it is the one that is
# meant; None if there is one only.
Windows = Sequence[tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """A scan over sequences of tokens, group by group; the base of all plans.

  Attributes:
    b: Batch size.
    l: Tokens of what is stored for all channels at once, B, C and checkpoints.
    g: Groups of channels.
    e: Channels of a group.
    softplus: Whether delta goes through softplus.
    reverse: Whether the scan goes from the last token to the first.
  """

  # Of the kernels, in profiles and in lowered programs.
  name: ClassVar[str] = "selective_scan"

  b: int
  l: int
  g: int
  e: int
  softplus: bool
  reverse: bool

  def sequence_shape(self, name: str) -> tuple[int, ...]:
    """Of u, delta, z, y, dy, du, ddelta or dz, as the kernels see it."""
    del name
    return (self.b, self.l, self.g, self.e)

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
  ) -> Windows:
    """A tile of a sequence, (size, channels)."""
    tokens = pl.ds(tile * size, size)
    return [(None, ref.at[row, tokens, group, channels])]

  def run(self, program: Callable[[Self], None]) -> None:
    """Runs the program of a block with the plan that this block has."""
    program(self)


def copy_in(windows: Windows, target: Any, barrier: Any) -> None:
  """Starts the copy to shared memory."""
  for condition, source in windows:
    copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier)
    _run_if(condition, copy)


def copy_out(source: Any, windows: Windows) -> None:
  """Starts the copy from shared memory."""
  for condition, target in windows:
    _run_if(
      condition, functools.partial(plgpu.copy_smem_to_gmem, source, target)
    )


def _run_if(condition: Any, function: Callable[[], None]) -> None:
  if condition is None:
    function()
  else:
    pl.when(condition)(function)
