"""Arrays, sizes and register layouts of the forward kernel.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group, k chunks.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import mosaic_gpu_walk, tuning


class Inputs(NamedTuple):
  """What the kernels read; sizes as prepared by `mosaic_gpu`.

  With a state size of one, A is (d,), B and C are (b, g, l) with l padded to a
  multiple of 4, and states have no last dimension.

  Attributes:
    state: The state before the first token in scan order.
    chunk_state: The `Outputs.state` of a run with `Plan.states_only`.
    chunk_delta_sum: The `Outputs.delta_sum` of that run.
  """

  u: Float[Array, "b l d"]
  delta: Float[Array, "b l d"]
  A: Float[Array, "d n"]
  B: Float[Array, "b g l n"]
  C: Float[Array, "b g l n"] | None
  D: Float[Array, "d"] | None
  z: Float[Array, "b l d"] | None
  delta_bias: Float[Array, "d"] | None
  state: Float[Array, "b d n"] | None
  chunk_state: Float[Array, "b k d n"] | None = None
  chunk_delta_sum: Float[Array, "b k d"] | None = None


class Outputs(NamedTuple):
  """What the kernels write; None where it was not asked for.

  Attributes:
    y: The output, in the dtype of u.
    state: The state after the last token of each chunk, in scan order.
    delta_sum: The sum of all (biased, activated) delta of each chunk.
    checkpoints: The state with which the scan enters each tile of
      `checkpoint_tile` tokens, tiles in memory order.
  """

  y: Float[Array, "b l d"] | None
  state: Float[Array, "b k d n"] | None
  delta_sum: Float[Array, "b k d"] | None
  checkpoints: Float[Array, "b tiles d n"] | None


class Cell(Protocol):
  """How one lane holds its states: a `State` is a tuple of registers."""

  @property
  def lanes(self) -> int:
    """Channels of a block."""
    ...

  def row_shape(self, tokens: int) -> tuple[int, ...]:
    """Shape of B or C for a tile in shared memory."""
    ...

  def state_shape(self) -> tuple[int, ...]:
    """Shape of the states of a block in memory."""
    ...

  def zero_state(self) -> tuple[jax.Array, ...]: ...

  def load_state(self, ref: Any) -> tuple[jax.Array, ...]:
    """Reads states, or A, of `state_shape`."""
    ...

  def store_state(self, ref: Any, h: tuple[jax.Array, ...]) -> None: ...

  def channel_layout(self) -> Any:
    """The layout of one number for each channel."""
    ...

  def load_row(self, ref: Any, token: Any) -> tuple[jax.Array, ...]:
    """B or C of one token of a tile."""
    ...

  def advance(self, A, h, delta, delta_u, B) -> tuple[jax.Array, ...]:
    """exp2(delta A) h + delta u B."""
    ...

  def retreat(self, A, g, delta, dy, C) -> tuple[jax.Array, ...]:
    """exp2(delta A) (g + dy C): a step of the derivative."""
    ...

  def decay(self, A, h, delta, inner) -> tuple[jax.Array, ...]:
    """exp2(delta A) h + inner."""
    ...

  def read_out(self, h, C) -> jax.Array:
    """The sum of h C over the states."""
    ...


@dataclasses.dataclass(frozen=True)
class VectorCell:
  """n states in vectors of four registers; n is a multiple of 4."""

  n: int
  lanes: int = common.LANES

  def row_shape(self, tokens):
    return (tokens, self.n)

  def state_shape(self):
    return (self.lanes, self.n)

  def channel_layout(self):
    return common.channel_layout()

  def _columns(self):
    return [
      pl.ds(first, common.VECTOR) for first in range(0, self.n, common.VECTOR)
    ]

  def zero_state(self):
    shape = (self.lanes, common.VECTOR)
    return tuple(
      common.zeros(shape, common.state_layout()) for _ in self._columns()
    )

  def load_state(self, ref):
    layout = common.state_layout()
    return tuple(common.load(ref.at[:, c], layout) for c in self._columns())

  def store_state(self, ref, h):
    for columns, part in zip(self._columns(), h, strict=True):
      common.store(ref.at[:, columns], part)

  def load_row(self, ref, token):
    layout = common.row_layout()
    return tuple(common.load(ref.at[token, c], layout) for c in self._columns())

  def advance(self, A, h, delta, delta_u, B):
    delta = common.over_states(delta)
    delta_u = common.over_states(delta_u)
    return tuple(
      common.exp2(delta * a) * part + delta_u * common.over_channels(b)
      for a, part, b in zip(A, h, B, strict=True)
    )

  def retreat(self, A, g, delta, dy, C):
    delta, dy = common.over_states(delta), common.over_states(dy)
    return tuple(
      common.exp2(delta * a) * (part + dy * common.over_channels(c))
      for a, part, c in zip(A, g, C, strict=True)
    )

  def decay(self, A, h, delta, inner):
    delta = common.over_states(delta)
    return tuple(
      common.exp2(delta * a) * part + x
      for a, part, x in zip(A, h, inner, strict=True)
    )

  def read_out(self, h, C):
    # Vector by vector, so that all but the last three sums are fused.
    total = h[0] * common.over_channels(C[0])
    for part, c in zip(h[1:], C[1:], strict=True):
      total = total + part * common.over_channels(c)
    return jnp.sum(total, axis=1)


class Place(NamedTuple):
  """Which part of the problem a block works on.

  Attributes:
    row: Batch row.
    chunk: Chunk of the sequence.
    group: Group of channels.
    channels: Slice of the channels of the group.
    first_tile: First tile of the chunk, in memory order.
    tiles: Tiles of the chunk.
  """

  row: Any
  chunk: Any
  group: Any
  channels: Any
  first_tile: Any
  tiles: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(mosaic_gpu_walk.Walk):
  """A forward scan, up to the arrays.

  Attributes:
    config: Tile sizes; `config.chunks` is the number of chunks.
    cell: How lanes hold states.
    checkpoint_tile: Tokens of a checkpoint tile, a divisor of `config.tile`; 0
      for no checkpoints.
    states_only: Whether to write `state` and `delta_sum` and nothing else.
    adjoint: Whether to run the derivative's recurrence: with dy for u, C for B
      and the scan's direction reversed, `state` is what a chunk adds to the
      gradient of the state before it. Goes with `states_only`.
    final_state: Whether to write `state`.
  """

  config: tuning.Config
  cell: Cell
  checkpoint_tile: int = 0
  states_only: bool = False
  adjoint: bool = False
  final_state: bool = True

  @property
  def tiles(self) -> int:
    return self.tile_count(self.config.tile)

  @property
  def tiles_per_chunk(self) -> int:
    return common.cdiv(self.tiles, self.config.chunks)

  @property
  def chunks(self) -> int:
    """Chunks that have a tile; rounding can leave some without."""
    return common.cdiv(self.tiles, self.tiles_per_chunk)

  @property
  def checkpoints_per_tile(self) -> int:
    if not self.checkpoint_tile:
      return 0
    return self.config.tile // self.checkpoint_tile

  @property
  def channel_blocks(self) -> int:
    return common.cdiv(self.e, self.cell.lanes)

  def place(self) -> Place:
    """That of the block which calls this."""
    index, block = common.split_index(
      lax.axis_index("block"), self.channel_blocks
    )
    index, group = common.split_index(index, self.g)
    row, chunk = common.split_index(index, self.chunks)
    first, tiles = self.chunk_tiles(
      self.config.tile, self.tiles_per_chunk, group, chunk
    )
    channels = pl.ds(block * self.cell.lanes, self.cell.lanes)
    return Place(row, chunk, group, channels, first, tiles)
