"""The program of a block of `mosaic_gpu_forward`."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, Final, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import (
  mosaic_gpu_forward_plan,
  mosaic_gpu_walk,
)

Plan = mosaic_gpu_forward_plan.Plan
Cell = mosaic_gpu_forward_plan.Cell
Place = mosaic_gpu_forward_plan.Place
Refs = Mapping[str, Any]

# States of earlier chunks in flight or in use: so many, or so many numbers.
_CHUNK_BUFFERS: Final = 4
_CHUNK_NUMBERS: Final = 2**14


def scratch_types(
  arrays: Mapping[str, jax.Array], out_type: Mapping[str, Any], plan: Plan
) -> dict[str, Any]:
  """Shared memory and barriers of a block."""
  tile, buffers = plan.config.tile, plan.config.buffers
  lanes = plan.cell.lanes
  scratch: dict[str, Any] = {}
  for name in _streamed(arrays):
    if name in ("B", "C"):
      shape, dtype = plan.cell.row_shape(tile), jnp.float32
    else:
      shape, dtype = (tile, lanes), arrays[name].dtype
    scratch[name + "_smem"] = plgpu.SMEM((buffers, *shape), dtype)
  if "y" in out_type:
    scratch["y_smem"] = plgpu.SMEM((2, tile, lanes), out_type["y"].dtype)
  if {"state", "checkpoints"} & {*arrays, *out_type}:
    shape = (plan.checkpoints_per_tile or 1, *plan.cell.state_shape())
    scratch["state_smem"] = plgpu.SMEM(shape, jnp.float32)
  if "delta_sum" in out_type:
    scratch["delta_sum_smem"] = plgpu.SMEM((lanes,), jnp.float32)
  arrivals = sum(
    1 if name in ("B", "C") else plan.copies(tile) for name in _streamed(arrays)
  )
  scratch["arrived"] = plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=buffers
  )
  if "state" in arrays:
    scratch["state_arrived"] = plgpu.Barrier()
  if "chunk_state" in arrays:
    for name, shape in (
      ("chunk_state", plan.cell.state_shape()),
      ("chunk_delta_sum", (lanes,)),
    ):
      shape = (_chunk_buffers(plan.cell), *shape)
      scratch[name + "_smem"] = plgpu.SMEM(shape, jnp.float32)
    scratch["chunk_arrived"] = plgpu.Barrier(
      num_arrivals=2, num_barriers=_chunk_buffers(plan.cell)
    )
  return scratch


def _streamed(names: Mapping[str, Any]) -> list[str]:
  """The inputs that come tile by tile."""
  return [name for name in ("u", "delta", "z", "B", "C") if name in names]


def run(refs: Refs, plan: Plan) -> None:
  """The program of a block."""
  config, cell = plan.config, plan.cell
  place = plan.place()
  streamed = _streamed(refs)
  state_index = place.row * plan.chunks + place.chunk

  def tile_of(i):  # The i-th tile in scan order.
    return place.first_tile + (place.tiles - 1 - i if plan.reverse else i)

  def windows(name, tile):
    return plan.windows(
      refs[name],
      tile,
      config.tile,
      row=place.row,
      group=place.group,
      channels=place.channels,
    )

  def fetch(i, slot):
    tile, barrier = tile_of(i), refs["arrived"].at[slot]
    first = plan.stored_tile(tile, config.tile, place.group) * config.tile
    for name in streamed:
      target = refs[name + "_smem"].at[slot]
      if name in ("B", "C"):
        tokens = pl.ds(first, target.shape[0])
        source = refs[name].at[place.row, place.group, tokens]
        plgpu.copy_gmem_to_smem(source, target, barrier)
      else:
        mosaic_gpu_walk.copy_in(windows(name, tile), target, barrier)

  for slot in range(min(config.buffers, plan.tiles_per_chunk)):
    pl.when(slot < place.tiles)(functools.partial(fetch, jnp.int32(slot), slot))

  if "state" in refs:
    source = refs["state"].at[place.row, place.group, place.channels]
    target = refs["state_smem"].at[0]
    plgpu.copy_gmem_to_smem(source, target, refs["state_arrived"])

  constants = _load_constants(refs, cell, place)
  h = cell.zero_state()
  if "state" in refs:
    plgpu.barrier_wait(refs["state_arrived"])
    h = cell.load_state(refs["state_smem"].at[0])
  if "chunk_state" in refs:
    h = _pass_chunks(refs, constants, plan, place, h)
  delta_sum = common.zeros((cell.lanes,), cell.channel_layout())

  def scan_tile(i, carry):
    h, delta_sum = carry
    slot = lax.rem(i, jnp.int32(config.buffers))
    out_slot = lax.rem(i, jnp.int32(2))
    tile = tile_of(i)
    if not plan.states_only:
      # What all tiles but the last one wrote has left shared memory.
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    plgpu.barrier_wait(refs["arrived"].at[slot])
    here = {name: refs[name + "_smem"].at[slot] for name in streamed}
    if "y_out" in refs:
      here["y"] = refs["y_smem"].at[out_slot]
    if plan.checkpoint_tile:
      here["checkpoints"] = refs["state_smem"]
    h, delta_sum = _scan_tile(
      here, constants, plan, _tokens_in(plan, tile, place), (h, delta_sum)
    )
    # Orders what was written here before the copies below, and everyone's
    # reads of this slot before the next fetch into it.
    plgpu.commit_smem()
    if plan.checkpoint_tile:
      count = plan.checkpoints_per_tile
      first = plan.stored_tile(tile, config.tile, place.group) * count
      _write_state(
        refs["state_smem"],
        refs["checkpoints_out"].at[place.row, pl.ds(first, count)],
        place,
      )
    if "y_out" in refs:
      mosaic_gpu_walk.copy_out(here["y"], windows("y_out", tile))

    @pl.when(i + config.buffers < place.tiles)
    def _():
      fetch(i + config.buffers, slot)

    return h, delta_sum

  h, delta_sum = _loop(place.tiles, scan_tile, (h, delta_sum))
  if plan.final_state:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    cell.store_state(refs["state_smem"].at[0], h)
  if "delta_sum_out" in refs:
    common.store(refs["delta_sum_smem"], delta_sum)
  if plan.final_state:
    plgpu.commit_smem()
    index = pl.ds(state_index, 1)
    _write_state(
      refs["state_smem"].at[pl.ds(0, 1)], refs["state_out"].at[index], place
    )
  if "delta_sum_out" in refs:
    target = refs["delta_sum_out"].at[state_index, place.group, place.channels]
    plgpu.copy_smem_to_gmem(refs["delta_sum_smem"], target)
  plgpu.wait_smem_to_gmem(0)


def _loop(steps: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
  """`carry` after so many steps; int32 also in programs that enable 64 bits."""
  return lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, carry)


def _chunk_buffers(cell: Cell) -> int:
  fitting = _CHUNK_NUMBERS // math.prod(cell.state_shape())
  return max(2, min(_CHUNK_BUFFERS, fitting))


def _pass_chunks(refs: Refs, constants: Any, plan: Plan, place: Place, h):
  """The state after the chunks before this one, from that before the first.

  Over a chunk the state decays by exp(A sum(delta)), a product of the decays
  of all its tokens. Every block does this for itself: fewer than a hundred
  steps, against a launch for a kernel of its own.
  """
  before = plan.chunks - 1 - place.chunk if plan.reverse else place.chunk
  buffers = _chunk_buffers(plan.cell)

  def fetch(j, slot):
    chunk = plan.chunks - 1 - j if plan.reverse else j
    index = place.row * plan.chunks + chunk
    for name in ("chunk_state", "chunk_delta_sum"):
      source = refs[name].at[index, place.group, place.channels]
      target = refs[name + "_smem"].at[slot]
      plgpu.copy_gmem_to_smem(source, target, refs["chunk_arrived"].at[slot])

  for slot in range(buffers):
    pl.when(slot < before)(functools.partial(fetch, jnp.int32(slot), slot))

  def step(j, h):
    slot = lax.rem(j, jnp.int32(buffers))
    plgpu.barrier_wait(refs["chunk_arrived"].at[slot])
    inner = plan.cell.load_state(refs["chunk_state_smem"].at[slot])
    delta_sum = common.load(
      refs["chunk_delta_sum_smem"].at[slot], plan.cell.channel_layout()
    )
    h = plan.cell.decay(constants.A, h, delta_sum, inner)
    plgpu.commit_smem()  # All have read the slot.

    @pl.when(j + buffers < before)
    def _():
      fetch(j + buffers, slot)

    return h

  return _loop(before, step, h)


def _write_state(source: Any, target: Any, place: Place) -> None:
  """Copies states, one or more along the first dimension."""
  target = target.at[:, place.group, place.channels]
  plgpu.copy_smem_to_gmem(source, target)


class _Constants(NamedTuple):
  """What a lane keeps in registers beside its state.

  Attributes:
    channels: Which channels of the group the block has.
  """

  channels: Any
  A: tuple[jax.Array, ...]
  D: jax.Array | None
  delta_bias: jax.Array | None


def _load_constants(refs: Refs, cell: Cell, place: Place) -> _Constants:
  def load(name):
    if name not in refs:
      return None
    ref = refs[name].at[place.group, place.channels]
    return common.load(ref, cell.channel_layout())

  A = cell.load_state(refs["A"].at[place.group, place.channels])
  return _Constants(place.channels, A, load("D"), load("delta_bias"))


def _tokens_in(plan: Plan, tile: Any, place: Place) -> Any:
  """Tokens of a tile that exist."""
  size = plan.config.tile
  if not plan.is_ragged(size):
    return size
  return jnp.minimum(plan.remaining(tile, size, place.group), size)


def _scan_tile(here: Refs, constants: _Constants, plan: Plan, count, carry):
  """Scans the `count` tokens of a tile; returns the new carry."""
  if not plan.checkpoint_tile:
    return _scan_tokens(here, constants, plan, 0, count, carry)
  size = plan.checkpoint_tile
  is_whole = isinstance(count, int)
  parts = (
    count // size if is_whole else lax.div(count + (size - 1), jnp.int32(size))
  )

  def scan_part(i, carry):
    part = parts - 1 - i if plan.reverse else i
    plan.cell.store_state(here["checkpoints"].at[part], carry[0])
    first = part * size
    tokens = size if is_whole else jnp.minimum(count - first, size)
    return _scan_tokens(here, constants, plan, first, tokens, carry)

  return _loop(parts, scan_part, carry)


def _scan_tokens(here, constants, plan, first, count, carry):
  """Scans `count` tokens of a tile, `first` the first in memory."""
  unroll = plan.config.unroll

  def several(size, offset):
    def step(i, carry):
      done = i * size + offset
      start = first + (count - 1 - done if plan.reverse else done)
      tokens = [start - k if plan.reverse else start + k for k in range(size)]
      return _scan_unrolled(here, constants, plan, tokens, carry)

    return step

  if isinstance(count, int):  # A multiple of `unroll`.
    return _loop(count // unroll, several(unroll, 0), carry)
  whole = lax.div(count, jnp.int32(unroll))
  carry = _loop(whole, several(unroll, 0), carry)
  if plan.is_ragged(unroll):
    rest = lax.bitwise_and(count, jnp.int32(unroll - 1))
    carry = _loop(rest, several(1, whole * unroll), carry)
  return carry


def _scan_unrolled(here, constants, plan, tokens, carry):
  """Scans these tokens of a tile, in this order."""
  h, delta_sum = carry
  cell = plan.cell
  layout = cell.channel_layout()

  # All loads first: they take tens of cycles, and nothing here waits for one.
  def rows(name):
    loaded = [common.load(here[name].at[t], layout) for t in tokens]
    return [plan.of_group(x, layout, constants.channels) for x in loaded]

  u, delta = rows("u"), rows("delta")
  z = rows("z") if "z" in here else None
  B = [cell.load_row(here["B"], t) for t in tokens]
  C = [cell.load_row(here["C"], t) for t in tokens] if "C" in here else []

  outputs = []
  for k in range(len(tokens)):
    step = delta[k]
    if constants.delta_bias is not None:
      step = step + constants.delta_bias
    if plan.softplus:
      step = common.softplus(step)
    if plan.adjoint:
      dy = u[k] if z is None else u[k] * common.silu(z[k])
      h = cell.retreat(constants.A, h, step, dy, B[k])
    else:
      h = cell.advance(constants.A, h, step, step * u[k], B[k])
    if plan.states_only:
      delta_sum = delta_sum + step
      continue
    y = cell.read_out(h, C[k])
    if constants.D is not None:
      y = y + constants.D * u[k]
    if z is not None:
      y = y * common.silu(z[k])
    outputs.append(y)
  for token, y in zip(tokens, outputs, strict=False):
    common.store(here["y"].at[token], y)
  return h, delta_sum
