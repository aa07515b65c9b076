"""Sizes and register layouts of `mosaic_gpu_backward`."""

import dataclasses
from typing import Any, ClassVar

from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan import mosaic_gpu_common as common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A backward scan, up to the arrays.

  Attributes:
    b: Batch size.
    l: Tokens.
    g: Groups of channels.
    e: Channels of a group.
    n: State size, a multiple of 4.
    tile: Tokens of a tile, a multiple of `kept`.
    chunks: Parts of the sequence that are walked in parallel.
    softplus: Whether delta went through softplus.
    reverse: Whether the scan went from the last token to the first.
  """

  b: int
  l: int
  g: int
  e: int
  n: int
  tile: int
  chunks: int
  softplus: bool
  reverse: bool

  # Tokens whose partial sums are added up together: one for each warp.
  kept: ClassVar[int] = 4

  def __post_init__(self):
    if self.tile % self.kept:
      raise ValueError(
        f"Config: `backward_tile` must be a multiple of {self.kept}, got "
        f"{self.tile}."
      )

  @property
  def vectors(self) -> int:
    """Lanes that share the states of a channel: a power of two."""
    return 1 << (self.n // common.VECTOR - 1).bit_length()

  @property
  def rows(self) -> int:
    """Lanes that differ in their channels."""
    return common.LANES // self.vectors

  @property
  def inner(self) -> int:
    """Channels of a lane: as many as it has states, up to registers."""
    return min(self.vectors, 4)

  @property
  def channels(self) -> int:
    """Channels of a block."""
    return self.rows * self.inner

  @property
  def channel_blocks(self) -> int:
    return common.cdiv(self.e, self.channels)

  @property
  def tiles(self) -> int:
    return common.cdiv(self.l, self.tile)

  @property
  def tiles_per_chunk(self) -> int:
    return common.cdiv(self.tiles, self.chunks)

  @property
  def state_shape(self) -> tuple[int, ...]:
    """The states of a block in memory."""
    return (self.rows, self.inner, self.vectors, common.VECTOR)

  @property
  def part_shape(self) -> tuple[int, ...]:
    """A register for each lane: one channel and four states."""
    return (self.rows, self.vectors, common.VECTOR)

  @property
  def kept_shape(self) -> tuple[int, ...]:
    """A number for each channel of `kept` tokens."""
    return (self.kept * self.rows, self.inner)

  def part_layout(self) -> Any:
    """Of `part_shape`: lanes by rows and, fastest, by vectors of states."""
    rows, vectors, states = self.part_shape
    return _layout(
      (rows, vectors, states),
      (rows // 4, vectors, states),
      (1, 1, states),
      warp=-9,
      lanes=(-6, -5),
    )

  def flat_layout(self, shape: tuple[int, ...]) -> Any:
    """Of `kept_shape`, or (kept, channels): spread over all lanes."""
    size = self.kept * self.channels // common.LANES
    return plgpu.Layout.WG_STRIDED(shape, min(size, common.VECTOR))

  def rows_layout(self) -> Any:
    """Of (kept, *part_shape): one token for each warp, rows to be summed."""
    shape = (self.kept, *self.part_shape)
    rows = 32 // self.vectors
    return _layout(
      shape,
      (1, rows, *shape[2:]),
      (1, 1, 1, common.VECTOR),
      warp=-12,
      lanes=(-7, -6),
    )


def _layout(*tiles: tuple[int, ...], warp: int, lanes: tuple[int, ...]) -> Any:
  """A layout by successive tiling; the last dimension is one register."""
  layout = fragmented_array.TiledLayout(
    fragmented_array.Tiling(tiles),
    warp_dims=(warp,),
    lane_dims=lanes,
    vector_dim=-1,
    _check_canonical=False,
  ).canonicalize()
  return plgpu.Layout.TILED(
    layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
  )
