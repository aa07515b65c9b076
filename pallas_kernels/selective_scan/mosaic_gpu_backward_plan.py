"""Arrays, sizes and register layouts of the backward kernels."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import mosaic_gpu_walk


class Inputs(NamedTuple):
  """What the kernels read; sizes as prepared by `mosaic_gpu`.

  With one state B and C are (b, g, l), l padded to a multiple of 4.

  Attributes:
    checkpoints: The state with which the scan enters each tile, tiles in memory
      order.
    dy: The gradient of the output.
    dstate: The gradient of the state after the last token in scan order.
    chunk_dstate: What each chunk adds to the gradient of the state before it.
    chunk_delta_sum: The sum of all (biased, activated) delta of each chunk.
  """

  u: Float[Array, "b l d"]
  delta: Float[Array, "b l d"]
  A: Float[Array, "d n"]
  B: Float[Array, "b g l n"]
  C: Float[Array, "b g l n"]
  D: Float[Array, "d"] | None
  z: Float[Array, "b l d"] | None
  delta_bias: Float[Array, "d"] | None
  checkpoints: Float[Array, "b tiles d n"]
  dy: Float[Array, "b l d"]
  dstate: Float[Array, "b d n"] | None
  chunk_dstate: Float[Array, "b k d n"] | None = None
  chunk_delta_sum: Float[Array, "b k d"] | None = None


class Outputs(NamedTuple):
  """Gradients of the inputs of the scan; None where there was no input.

  Attributes:
    dstate: The gradient of the state before the first token in scan order.
  """

  u: Float[Array, "b l d"]
  delta: Float[Array, "b l d"]
  A: Float[Array, "d n"]
  B: Float[Array, "b g l n"]
  C: Float[Array, "b g l n"]
  D: Float[Array, "d"] | None
  z: Float[Array, "b l d"] | None
  delta_bias: Float[Array, "d"] | None
  dstate: Float[Array, "b d n"]


class Place(NamedTuple):
  """Which part of the problem a block works on.

  Attributes:
    row: Batch row.
    group: Group of channels.
    block: Block of the channels of the group.
    chunk: Chunk of the sequence.
    first_tile: First tile of the chunk, in memory order.
    tiles: Tiles of the chunk.
  """

  row: Any
  group: Any
  block: Any
  chunk: Any
  first_tile: Any
  tiles: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(mosaic_gpu_walk.Walk):
  """A backward scan, up to the arrays and the channels of a block.

  Attributes:
    tile: Tokens of a tile.
    tiles_per_chunk: Tiles that a block walks; the chunks of a sequence are
      walked in parallel.
  """

  tile: int
  tiles_per_chunk: int

  @property
  def channels(self) -> int:
    """Channels of a block."""
    raise NotImplementedError

  @property
  def channel_blocks(self) -> int:
    return common.cdiv(self.e, self.channels)

  @property
  def blocks(self) -> int:
    return self.b * self.chunks * self.g * self.channel_blocks

  @property
  def tiles(self) -> int:
    return self.tile_count(self.tile)

  @property
  def chunks(self) -> int:
    return common.cdiv(self.tiles, self.tiles_per_chunk)

  def place(self) -> Place:
    """That of the block which calls this; neighbours share a token."""
    index, block = common.split_index(
      lax.axis_index("block"), self.channel_blocks
    )
    index, group = common.split_index(index, self.g)
    row, chunk = common.split_index(index, self.chunks)
    first, tiles = self.chunk_tiles(
      self.tile, self.tiles_per_chunk, group, chunk
    )
    return Place(row, group, block, chunk, first, jnp.int32(tiles))

  def pass_chunks(self, place: Place, g: Any, load: Any, add: Any) -> Any:
    """The gradient after a chunk, from `g` after the last token.

    Every block does this for itself: fewer than a hundred steps, against a
    launch for a kernel of its own.

    Args:
      place: That of the block.
      g: A gradient of states.
      load: Gets what a chunk leaves, given the index of its row and itself.
      add: Called with `g` and that, gets `g` before the chunk.
    """
    if self.chunks == 1:
      return g
    after = place.chunk if self.reverse else self.chunks - 1 - place.chunk

    def fetch(j):  # The j-th chunk against the scan.
      chunk = j if self.reverse else self.chunks - 1 - j
      return load(place.row * self.chunks + chunk)

    def step(j, carry):
      g, this = carry
      # Ahead, to hide its latency; the last one is not used.
      following = fetch(jnp.minimum(j + 1, self.chunks - 1))
      return add(g, this), following

    zero = jnp.int32(0)
    g, _ = lax.fori_loop(zero, after, step, (g, fetch(zero)))
    return g

  def first_chunk(self, x: Any) -> Any:
    """Of (b * k, ...), the part of the first chunk in scan order."""
    x = x.reshape(self.b, self.chunks, *x.shape[1:])
    return x[:, self.chunks - 1 if self.reverse else 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Sizes):
  """A backward scan with more than one state, up to the arrays.

  Attributes:
    n: State size, a multiple of 4.
  """

  n: int

  # Tokens whose partial sums are added up together: one for each warp.
  group: ClassVar[int] = 4

  def __post_init__(self):
    if self.tile % self.group:
      raise ValueError(
        f"Config: `backward_tile` must be a multiple of {self.group}, got "
        f"{self.tile}."
      )
    if self.tile * self.vectors < 8:
      raise ValueError(
        "Config: `backward_tile` must be at least 8 for four states, because "
        f"copies have at least 128 bytes, got {self.tile}."
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
  def stored(self) -> int:
    """Tokens of a tile, in scan order, whose states go to shared memory.

    A lane has registers for those of the others, two numbers each.
    """
    return max(0, self.tile - 4 * self.group // self.inner)

  @property
  def state_shape(self) -> tuple[int, ...]:
    """The states of a block in memory."""
    return (self.rows, self.inner, self.vectors, common.VECTOR)

  @property
  def part_shape(self) -> tuple[int, ...]:
    """A register for each lane: one channel and four states."""
    return (self.rows, self.vectors, common.VECTOR)

  @property
  def group_shape(self) -> tuple[int, ...]:
    """A number for each channel of `group` tokens."""
    return (self.group * self.rows, self.inner)

  def part_layout(self) -> Any:
    """Of `part_shape`: lanes by rows and, fastest, by vectors of states."""
    rows, vectors, states = self.part_shape
    return layout(
      (rows, vectors, states),
      (rows // 4, vectors, states),
      (1, 1, states),
      warp=-9,
      lanes=(-6, -5),
    )

  def flat_layout(self, shape: tuple[int, ...]) -> Any:
    """Of `group_shape`, or (group, channels): spread over all lanes."""
    size = self.group * self.channels // common.LANES
    return plgpu.Layout.WG_STRIDED(shape, min(size, common.VECTOR))

  def rows_layout(self) -> Any:
    """Of (group, *part_shape): one token for each warp, rows to be summed."""
    shape = (self.group, *self.part_shape)
    rows = 32 // self.vectors
    return layout(
      shape,
      (1, rows, *shape[2:]),
      (1, 1, 1, common.VECTOR),
      warp=-12,
      lanes=(-7, -6),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalarPlan(Sizes):
  """A backward scan with one state, up to the arrays.

  Attributes:
    checkpoint_tile: Tokens between checkpoints; divides `tile`, the tokens that
      are fetched at once.
    wide: Whether a lane owns two channels.
  """

  checkpoint_tile: int
  wide: bool

  @property
  def channels(self) -> int:
    return common.LANES * (2 if self.wide else 1)

  def layout(self) -> Any:
    """Of (channels,)."""
    return plgpu.Layout.WG_STRIDED(
      (self.channels,), self.channels // common.LANES
    )

  def contributions_layout(self) -> Any:
    """Of (2 * tile, channels): tokens over warps, eight to a row of lanes."""
    return layout(
      (2 * self.tile, self.channels),
      (self.tile // 2, self.channels),
      (8, 16),
      (1, common.VECTOR),
      warp=-8,
      lanes=(-4, -3),
    )


def layout(*tiles: tuple[int, ...], warp: int, lanes: tuple[int, ...]) -> Any:
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
