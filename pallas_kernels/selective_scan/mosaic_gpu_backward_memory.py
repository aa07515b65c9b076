"""What a block of `mosaic_gpu_backward` keeps, reads and writes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_plan,
  mosaic_gpu_walk,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

Refs = Mapping[str, Any]
State = list[jax.Array]  # A register vector for each channel of a lane.

_BANKS = 32  # Of shared memory, 4 bytes each.


def scratch_types(
  arrays: Mapping[str, Any], plan: mosaic_gpu_backward_plan.Plan
) -> dict[str, Any]:
  """Shared memory of a block.

  What is named after an input holds a tile of it as it came; `staged` holds,
  in float32, what tokens and channels have in common.
  """
  tile, group = plan.tile, plan.group
  row = (tile, plan.vectors, common.VECTOR)
  scratch: dict[str, Any] = {}
  for name in sequences(arrays):
    shape = (tile, plan.channels)
    dtype = arrays[name].dtype
    scratch[name + "_smem"] = plgpu.SMEM(shape, dtype)
    if name != "dy":
      dtype = plan.sequence_dtype("d" + name, dtype)
      scratch[name + "_out_smem"] = plgpu.SMEM(shape, dtype)
  for name in ("B", "C"):
    scratch[name + "_smem"] = plgpu.SMEM((2, *row), jnp.float32)
  # Together, because each of these starts at a multiple of 1024 bytes.
  scratch["rows_out_smem"] = plgpu.SMEM((2, *row), jnp.float32)
  if not _sums_in_registers(arrays):
    scratch["sums"] = plgpu.SMEM((2, *plan.group_shape), jnp.float32)
  scratch["state_smem"] = plgpu.SMEM(plan.state_shape, jnp.float32)
  staged = ["delta", "delta_u", "dy", "u"]
  is_ragged = plan.is_ragged(plan.tile)
  if plan.softplus or ("delta_bias" in arrays and is_ragged):
    staged.append("slope")
  if "z" in arrays:
    staged.append("gate")
  shape = (tile * plan.rows, plan.inner)
  for name in staged:
    scratch[name + "_staged"] = plgpu.SMEM(shape, jnp.float32)
  if plan.stored:
    shape = (plan.stored, plan.inner, *plan.part_shape)
    scratch["decayed_smem"] = plgpu.SMEM(shape, jnp.float32)
  scratch["over_channels"] = plgpu.SMEM((group, *plan.part_shape), jnp.float32)
  shape = (2, plan.vectors, group * plan.rows + _padding(plan), plan.inner)
  scratch["over_states"] = plgpu.SMEM(shape, jnp.float32)
  count = len(sequences(arrays)) * plan.copies(tile)
  scratch["sequences_arrived"] = plgpu.Barrier(num_arrivals=count)
  scratch["rows_arrived"] = plgpu.Barrier(num_arrivals=2, num_barriers=2)
  scratch["state_arrived"] = plgpu.Barrier()
  return scratch


def _padding(plan: mosaic_gpu_backward_plan.Plan) -> int:
  """Rows that keep the lanes of a channel in different memory banks."""
  if plan.vectors == 1:
    return 0
  return max(_BANKS // plan.vectors, common.VECTOR) // plan.inner


def sequences(names: Mapping[str, Any]) -> list[str]:
  """The inputs that come tile by tile, but for B and C."""
  return [name for name in ("u", "delta", "z", "dy") if name in names]


class Carry(NamedTuple):
  """What a block takes from tile to tile.

  Attributes:
    g: Gradient of the state.
    A: Gradient of A.
    sums: Those for D and the bias, if they are kept in registers.
  """

  g: State
  A: State
  sums: tuple[jax.Array, ...]


def _sums_in_registers(names: Mapping[str, Any]) -> bool:
  """Whether there are registers for sums, or, if not, shared memory.

  With float32 inputs shared memory decides how many blocks fit; with a gate,
  and where two channels are unpacked from one word, there are no registers.
  """
  return "z" not in names and names["u"].dtype == jnp.float32


class Tiles[Plan: mosaic_gpu_backward_plan.Sizes]:
  """The tiles of a block, on the refs of the kernel by name.

  Attributes:
    refs: Arrays, shared memory and barriers.
    plan: The scan.
    place: The part of it that the block works on.
    channels: Those of the group that the block has.
  """

  def __init__(self, refs: Refs, plan: Plan):
    self.refs, self.plan = refs, plan
    self.place = plan.place()
    self.channels = pl.ds(self.place.block * plan.channels, plan.channels)

  def _tile_of(self, i):
    """The i-th tile that is walked, in memory order."""
    ahead = i if self.plan.reverse else self.place.tiles - 1 - i
    return self.place.first_tile + ahead

  def _stored_tile(self, i):
    """Its place among all that are stored."""
    return self.plan.stored_tile(
      self._tile_of(i), self.plan.tile, self.place.group
    )

  def _windows(self, name, i):
    return self.plan.windows(
      self.refs[name],
      self._tile_of(i),
      self.plan.tile,
      row=self.place.row,
      group=self.place.group,
      channels=self.channels,
    )


class Memory(Tiles[mosaic_gpu_backward_plan.Plan]):
  """What a block reads and writes, for more than one state."""

  def __init__(self, refs: Refs, plan: mosaic_gpu_backward_plan.Plan):
    super().__init__(refs, plan)
    place = self.place
    self.layout = plan.part_layout()
    self.flat = plan.flat_layout(plan.group_shape)
    self.rows = pl.ds(place.block * plan.rows, plan.rows)
    # Where n is no power of two this reaches beyond it, which only copies may,
    # and only those whose start is not known when the kernel is traced.
    whole = plan.vectors * common.VECTOR == plan.n
    first = 0 if whole else lax.axis_index("block") * 0
    self.states = pl.ds(first, plan.vectors)
    self.log2_decay = self._load_parts(self._of_row("A", 0))

  def _constant(self, name):
    """D or the bias; read again each time, since registers are scarce."""
    ref = self.refs[name].at[self.place.group, self.place.block]
    return common.load(ref, self.flat)

  def _load_parts(self, ref) -> State:
    return [
      common.load(ref.at[:, i], self.layout) for i in range(self.plan.inner)
    ]

  def _row_of(self, step):
    """The token of a tile, in memory order, at a step of the scan."""
    return self.plan.tile - 1 - step if self.plan.reverse else step

  def _tokens(self, i):
    """The tokens of B and C."""
    return pl.ds(self._stored_tile(i) * self.plan.tile, self.plan.tile)

  def fetch_sequences(self, i) -> None:
    for name in sequences(self.refs):
      mosaic_gpu_walk.copy_in(
        self._windows(name, i),
        self.refs[name + "_smem"],
        self.refs["sequences_arrived"],
      )

  def fetch_rows(self, i) -> None:
    slot = lax.rem(i, jnp.int32(2))
    for name in ("B", "C"):
      row = self.place.row * self.plan.g + self.place.group
      source = self.refs[name].at[row, self._tokens(i), self.states]
      target = self.refs[name + "_smem"].at[slot]
      barrier = self.refs["rows_arrived"].at[slot]
      plgpu.copy_gmem_to_smem(source, target, barrier)

  def fetch_state(self, i) -> None:
    place, plan = self.place, self.plan
    tiles = common.cdiv(plan.l, plan.tile)
    index = (place.row * tiles + self._stored_tile(i)) * plan.g + place.group
    source = self.refs["checkpoints"].at[index, self.rows, :, self.states]
    barrier = self.refs["state_arrived"]
    plgpu.copy_gmem_to_smem(source, self.refs["state_smem"], barrier)

  def write_tile(self, i) -> None:
    place, plan = self.place, self.plan
    for name in ("u", "delta", "z"):
      if name in self.refs:
        source = self.refs[name + "_out_smem"]
        mosaic_gpu_walk.copy_out(source, self._windows(name + "_out", i))
    index = (place.row * plan.g + place.group) * plan.channel_blocks
    for name in ("B", "C"):
      target = self.refs[name + "_out"].at[
        index + place.block, self._tokens(i), self.states
      ]
      source = self.refs["rows_out_smem"].at["BC".index(name)]
      plgpu.copy_smem_to_gmem(source, target)

  def first_carry(self) -> Carry:
    plan = self.plan

    def zeros():
      shape = plan.part_shape
      return [common.zeros(shape, self.layout) for _ in range(plan.inner)]

    sums = [common.zeros(plan.group_shape, self.flat) for _ in self._sums()]
    if not _sums_in_registers(self.refs):
      for name in self._sums():
        common.store(self._sum(name), sums.pop())
    if "dstate" in self.refs:
      g = self._load_parts(self._of_row("dstate", self.place.row))
    else:
      g = zeros()
    g = plan.pass_chunks(self.place, g, self._load_chunk, self._add_chunk)
    return Carry(g, zeros(), tuple(sums))

  def _of_row(self, name, row):
    return self.refs[name].at[row, self.place.group, self.rows]

  def _load_chunk(self, index):
    delta_sum = self._of_row("chunk_delta_sum", index)
    layout = self.layout.reduce((1, 2))
    parts = [
      common.load(delta_sum.at[:, i], layout) for i in range(self.plan.inner)
    ]
    return parts, self._load_parts(self._of_row("chunk_dstate", index))

  def _add_chunk(self, g, left):
    delta_sum, inner = left
    return [
      common.exp2(self._spread(x, (0,)) * a) * part + y
      for x, a, part, y in zip(
        delta_sum, self.log2_decay, g, inner, strict=True
      )
    ]

  def _spread(self, x, dims):
    """Repeats an array along the other dimensions of a part of the state."""
    x = lax.broadcast_in_dim(x, self.plan.part_shape, dims)
    return plgpu.layout_cast(x, self.layout)

  def write_sums(self, carry: Carry) -> None:
    place = self.place
    index = place.row * self.plan.chunks + place.chunk
    for name, parts in (("A", carry.A), ("dstate", carry.g)):
      ref = self._of_row(name + "_out", index)
      for i, part in enumerate(parts):
        common.store(ref.at[:, i], part)
    for i, name in enumerate(self._sums()):
      ref = self.refs[name + "_out"].at[index, place.group, place.block]
      if carry.sums:
        common.store(ref, carry.sums[i])
      else:
        common.store(ref, common.load(self._sum(name), self.flat))

  def _sums(self):
    return [name for name in ("D", "delta_bias") if name in self.refs]

  def _sum(self, name):
    return self.refs["sums"].at[self._sums().index(name)]

  def _add_to_sum(self, sums, name, x) -> tuple[jax.Array, ...]:
    """`Carry.sums` with `x` added to that of D or the bias."""
    if not sums:
      total = common.load(self._sum(name), self.flat) + x
      common.store(self._sum(name), total)
      return sums
    i = self._sums().index(name)
    return (*sums[:i], sums[i] + x, *sums[i + 1 :])
