"""Where the tokens of a cross scan lie: the plans of its kernels.

To the kernels of the selective scan the four directions are four groups of
channels. What differs is the order of tokens. A *line* is a row of the image
for directions 0 and 2, a column for 1 and 3; a direction walks its lines one
after the other, and the state passes from the end of a line to the start of the
next. A tile is a part of a line: with TMA a box of (1, tokens, channels) of an
image (h, w, d) for rows, and of (tokens, 1, channels) for columns. So u, delta
and the results are read and written where they are, whatever the direction.
What reaches beyond the line is clipped by TMA, or has room (`mosaic_gpu_walk`),
and is not computed.

B, C and checkpoints, small, are kept line by line in the order of their
direction, each line with a multiple of `unit` tokens.

b batch, h and w rows and columns, k directions, d channels, n state size.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Self

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_n1,
  mosaic_gpu_backward_plan,
  mosaic_gpu_common,
  mosaic_gpu_forward_plan,
  mosaic_gpu_walk,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image(mosaic_gpu_walk.Walk):
  """A scan along the rows and the columns of an image, in both senses.

  As a `Walk` it has `g` = 4 groups, the directions, of `e` = d channels.
  Directions 2 and 3 are scanned against the order of the tokens in memory, and
  if `reverse` is set, 0 and 1 instead.

  Attributes:
    h: Rows of the image.
    w: Columns of the image.
    unit: Each line is stored as a multiple of so many tokens.
    chunks: Parts of an image that are scanned in parallel, of whole lines; see
      `chunks_for`.
  """

  name = "cross_selective_scan"

  h: int
  w: int
  unit: int
  chunks: int = 1

  def sequence_shape(self, name: str) -> tuple[int, ...]:
    # The directions share u and dy.
    directions = () if name in ("u", "dy") else (self.g,)
    return (self.b, self.h, self.w, *directions, self.e)

  def token_strides(self, e: int) -> tuple[int, ...]:
    return (self.g * e, self.w * self.g * e)

  def sequence_dtype(self, name: str, dtype: DTypeLike) -> DTypeLike:
    # Summed over the directions before it is rounded.
    return jnp.float32 if name in ("y", "du") else dtype

  def tile_count(self, size: int) -> int:
    per_row, per_column = self._tiles_per_line(size)
    return max(self.h * per_row, self.w * per_column)

  def chunk_tiles(
    self, size: int, per_chunk: int, group: Any, chunk: Any
  ) -> tuple[Any, Any]:
    del per_chunk  # Chunks end with a line, whatever the size of a tile.
    per_line = _choose(group, *self._tiles_per_line(size))
    lines = _choose(group, self.h, self.w)
    if self.chunks == 1:
      return jnp.int32(0), lines * per_line
    per_chunk = _choose(group, *self._lines_per_chunk())
    first = chunk * per_chunk
    return first * per_line, jnp.minimum(lines - first, per_chunk) * per_line

  def remaining(self, tile: Any, size: int, group: Any) -> Any:
    _, part = self._locate(tile, size, group)
    return _choose(group, self.w, self.h) - part * size

  def is_ragged(self, size: int) -> bool:
    return self.h % size != 0 or self.w % size != 0

  def stored_tile(self, tile: Any, size: int, group: Any) -> Any:
    line, part = self._locate(tile, size, group)
    row, column = stored_lengths(self.h, self.w, self.unit)
    return line * _choose(group, row // size, column // size) + part

  def windows(
    self, ref: Any, tile: Any, size: int, *, row: Any, group: Any, channels: Any
  ) -> mosaic_gpu_walk.Windows:
    line, part = self._locate(tile, size, group)
    tokens = pl.ds(part * size, size)
    directions = (group,) if len(ref.shape) == 5 else ()
    is_column = _is_column(group)
    return [
      (
        jnp.logical_not(is_column),
        ref.at[row, line, tokens, *directions, channels],
      ),
      (is_column, ref.at[row, tokens, line, *directions, channels]),
    ]

  def run(self, program: Callable[[Self], None]) -> None:
    # The program twice, so that each has its tokens in a fixed order.
    is_reverse = self.place().group >= 2
    for condition, reverse in (
      (jnp.logical_not(is_reverse), self.reverse),
      (is_reverse, not self.reverse),
    ):
      plan = dataclasses.replace(self, reverse=reverse)
      pl.when(condition)(functools.partial(program, plan))

  def place(self) -> Any:
    """That of the block which calls this."""
    raise NotImplementedError

  def most_tiles(self, size: int) -> int:
    """Tiles of `size` tokens that a chunk has, at most."""
    rows, columns = self._lines_per_chunk()
    per_row, per_column = self._tiles_per_line(size)
    return max(rows * per_row, columns * per_column)

  def _lines_per_chunk(self) -> tuple[int, int]:
    return (
      mosaic_gpu_common.cdiv(self.h, self.chunks),
      mosaic_gpu_common.cdiv(self.w, self.chunks),
    )

  def _tiles_per_line(self, size: int) -> tuple[int, int]:
    return (
      mosaic_gpu_common.cdiv(self.w, size),
      mosaic_gpu_common.cdiv(self.h, size),
    )

  def _locate(self, tile: Any, size: int, group: Any) -> tuple[Any, Any]:
    """The line of a tile, and which of its tiles it is."""
    in_row, in_column = (
      mosaic_gpu_common.split_index(tile, count)
      for count in self._tiles_per_line(size)
    )
    line = _choose(group, in_row[0], in_column[0])
    return line, _choose(group, in_row[1], in_column[1])


def _is_column(group: Any) -> Any:
  return lax.rem(group, jnp.int32(2)) == 1


def _choose(group: Any, of_rows: Any, of_columns: Any) -> Any:
  """What holds for the lines of a direction."""
  if isinstance(of_rows, int) and of_rows == of_columns:
    return of_rows
  # int32 spelled out, for the sake of programs that enable 64 bits.
  of_rows, of_columns = jnp.int32(of_rows), jnp.int32(of_columns)
  return jnp.where(_is_column(group), of_columns, of_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPlan(Image, mosaic_gpu_forward_plan.Plan):
  """A forward cross scan, up to the arrays."""

  @property
  def tiles_per_chunk(self) -> int:
    return self.most_tiles(self.config.tile)

  def place(self) -> mosaic_gpu_forward_plan.Place:
    return mosaic_gpu_forward_plan.Plan.place(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardPlan(Image, mosaic_gpu_backward_plan.Plan):
  """A backward cross scan with more than one state, up to the arrays."""

  def place(self) -> mosaic_gpu_backward_plan.Place:
    return mosaic_gpu_backward_plan.Plan.place(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardPlanN1(Image, mosaic_gpu_backward_n1.Plan):
  """A backward cross scan with one state, up to the arrays."""

  def place(self) -> mosaic_gpu_backward_plan.Place:
    return mosaic_gpu_backward_n1.Plan.place(self)


def chunks_for(h: int, w: int, wanted: int) -> int:
  """The most chunks up to `wanted` that all have a row and a column."""

  def fits(chunks):
    lines_of = mosaic_gpu_common.cdiv
    return all(lines_of(x, lines_of(x, chunks)) == chunks for x in (h, w))

  return max(chunks for chunks in range(1, wanted + 1) if fits(chunks))


def stored_lengths(h: int, w: int, unit: int) -> tuple[int, int]:
  """Tokens for which a row, and a column, have room in what is stored."""
  return -(-w // unit) * unit, -(-h // unit) * unit


def stored_tokens(h: int, w: int, unit: int) -> int:
  """Tokens that are stored for each direction."""
  row, column = stored_lengths(h, w, unit)
  return max(h * row, w * column)


def to_stored(
  x: Float[Array, "b h w k n"], unit: int
) -> Float[Array, "b k l n"]:
  """B or C as stored: in the order of each direction, lines padded."""
  b, h, w, k, n = x.shape
  row, column = stored_lengths(h, w, unit)
  tokens = stored_tokens(h, w, unit)

  def lines(x: jax.Array, length: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0)))
    x = x.reshape(b, -1, k // 2, n)
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)))

  rows = lines(x[:, :, :, 0::2], row)
  columns = lines(jnp.swapaxes(x[:, :, :, 1::2], 1, 2), column)
  both = jnp.stack([rows, columns], axis=3).reshape(b, tokens, k, n)
  return jnp.swapaxes(both, 1, 2)
