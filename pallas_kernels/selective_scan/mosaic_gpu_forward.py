"""The forward selective scan as a Mosaic GPU kernel.

A block owns 128 channels of one group and one batch row (and one chunk of the
sequence, see `mosaic_gpu_chunked`). A lane owns one channel with all its
states in registers and walks the tokens one after the other, so nothing but
the loads connects lanes. Tiles of tokens arrive in shared memory by TMA, the
next ones while this one is computed; y leaves the same way.

Ragged sizes cost no copies: TMA fills what it reads beyond the channels of a
group or the last token with zeros, and does not write there. Steps beyond the
last token are not run at all.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group, k chunks.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Final, NamedTuple, Protocol

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import tuning

Refs = Mapping[str, Any]

# States of earlier chunks in flight or in use.
_CHUNK_BUFFERS: Final = 4


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A forward scan, up to the arrays.

  Attributes:
    b: Batch size.
    l: Tokens.
    g: Groups of channels.
    e: Channels of a group.
    config: Tile sizes; `config.chunks` is the number of chunks.
    cell: How lanes hold states.
    softplus: Whether delta goes through softplus.
    reverse: Whether the scan goes from the last token to the first.
    checkpoint_tile: Tokens of a checkpoint tile, a divisor of `config.tile`; 0
      for no checkpoints.
    states_only: Whether to write `state` and `delta_sum` and nothing else.
    adjoint: Whether to run the derivative's recurrence: with dy for u, C for B
      and the scan's direction reversed, `state` is what a chunk adds to the
      gradient of the state before it. Goes with `states_only`.
    final_state: Whether to write `state`.
  """

  b: int
  l: int
  g: int
  e: int
  config: tuning.Config
  cell: Cell
  softplus: bool
  reverse: bool
  checkpoint_tile: int = 0
  states_only: bool = False
  adjoint: bool = False
  final_state: bool = True

  @property
  def tiles(self) -> int:
    return common.cdiv(self.l, self.config.tile)

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


def scan(
  inputs: Inputs, plan: Plan, interpret: common.Interpret | None = None
) -> Outputs:
  """Runs the kernel; `inputs.C` is needed unless `plan.states_only`."""
  arrays = _blocked(inputs, plan)
  out_type = _out_type(inputs, plan)
  names = (*arrays, *(name + "_out" for name in out_type))

  def body(*refs, **scratch):
    _kernel({**dict(zip(names, refs, strict=True)), **scratch}, plan)

  results = common.kernel(
    body,
    name="selective_scan_states" if plan.states_only else "selective_scan",
    out_type=list(out_type.values()),
    scratch_types=_scratch_types(arrays, out_type, plan),
    grid={"block": plan.b * plan.chunks * plan.g * plan.channel_blocks},
    interpret=interpret,
    lane_semantics=True,
  )(*arrays.values())
  return _unblocked(dict(zip(out_type, results, strict=True)), plan)


def _blocked(inputs: Inputs, plan: Plan) -> dict[str, jax.Array]:
  """The given inputs as the kernel indexes them.

  Sequences become (b, l, g, e), states (b * k, g, e, n): views. What has one
  entry per channel is padded to whole blocks: it is read without TMA.
  """
  b, l, g, e = plan.b, plan.l, plan.g, plan.e
  padding = plan.channel_blocks * plan.cell.lanes - e

  def by_channel(x):
    x = x.astype(jnp.float32).reshape(g, e, *x.shape[1:])
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

  arrays = {}
  for name, x in inputs._asdict().items():
    if x is None:
      continue
    if name in ("u", "delta", "z"):
      arrays[name] = x.reshape(b, l, g, e)
    elif name in ("B", "C"):
      arrays[name] = x
    elif name == "state":
      arrays[name] = x.reshape(b, g, e, *x.shape[2:])
    elif name in ("chunk_state", "chunk_delta_sum"):
      arrays[name] = x.reshape(b * plan.chunks, g, e, *x.shape[3:])
    else:
      # exp(delta A) is computed as a power of two.
      arrays[name] = by_channel(x * common.LOG2E if name == "A" else x)
  return arrays


def _out_type(inputs: Inputs, plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  b, g, e = plan.b, plan.g, plan.e
  n = plan.cell.state_shape()[1:]
  out = {}
  if not plan.states_only:
    out["y"] = jax.ShapeDtypeStruct((b, plan.l, g, e), inputs.u.dtype)
  if plan.final_state:
    out["state"] = jax.ShapeDtypeStruct((b * plan.chunks, g, e, *n), "float32")
  if plan.states_only:
    out["delta_sum"] = jax.ShapeDtypeStruct((b * plan.chunks, g, e), "float32")
  if plan.checkpoint_tile:
    tiles = common.cdiv(plan.l, plan.checkpoint_tile)
    out["checkpoints"] = jax.ShapeDtypeStruct((b, tiles, g, e, *n), "float32")
  return out


def _unblocked(results: dict[str, jax.Array], plan: Plan) -> Outputs:
  """The results with the shapes of `Outputs`."""
  d = plan.g * plan.e
  out: dict[str, Any] = dict.fromkeys(Outputs._fields)
  for name, x in results.items():
    if name == "y":
      out[name] = x.reshape(plan.b, plan.l, d)
    else:
      n = plan.cell.state_shape()[1:] if name != "delta_sum" else ()
      out[name] = x.reshape(plan.b, -1, d, *n)
  return Outputs(**out)


def _scratch_types(
  arrays: Mapping[str, jax.Array], out_type: Mapping[str, Any], plan: Plan
) -> dict[str, Any]:
  tile, buffers = plan.config.tile, plan.config.buffers
  lanes = plan.cell.lanes
  scratch = {}
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
  scratch["arrived"] = plgpu.Barrier(
    num_arrivals=len(_streamed(arrays)), num_barriers=buffers
  )
  if "state" in arrays:
    scratch["state_arrived"] = plgpu.Barrier()
  if "chunk_state" in arrays:
    for name, shape in (
      ("chunk_state", plan.cell.state_shape()),
      ("chunk_delta_sum", (lanes,)),
    ):
      shape = (_CHUNK_BUFFERS, *shape)
      scratch[name + "_smem"] = plgpu.SMEM(shape, jnp.float32)
    scratch["chunk_arrived"] = plgpu.Barrier(
      num_arrivals=2, num_barriers=_CHUNK_BUFFERS
    )
  return scratch


def _streamed(names: Mapping[str, Any]) -> list[str]:
  """The inputs that come tile by tile."""
  return [name for name in ("u", "delta", "z", "B", "C") if name in names]


class _Place(NamedTuple):
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


def _place(plan: Plan) -> _Place:
  index = lax.axis_index("block")
  index, block = common.split_index(index, plan.channel_blocks)
  index, group = common.split_index(index, plan.g)
  row, chunk = common.split_index(index, plan.chunks)
  first = chunk * plan.tiles_per_chunk
  tiles = (
    plan.tiles
    if plan.chunks == 1
    else jnp.minimum(plan.tiles - first, plan.tiles_per_chunk)
  )
  channels = pl.ds(block * plan.cell.lanes, plan.cell.lanes)
  return _Place(row, chunk, group, channels, first, tiles)


def _kernel(refs: Refs, plan: Plan) -> None:
  """The program of a block."""
  config, cell = plan.config, plan.cell
  place = _place(plan)
  streamed = _streamed(refs)
  state_index = place.row * plan.chunks + place.chunk

  def tile_of(i):  # The i-th tile in scan order.
    return place.first_tile + (place.tiles - 1 - i if plan.reverse else i)

  def fetch(i, slot):
    tokens = pl.ds(tile_of(i) * config.tile, config.tile)
    for name in streamed:
      if name in ("B", "C"):
        source = refs[name].at[place.row, place.group, tokens]
      else:
        source = refs[name].at[place.row, tokens, place.group, place.channels]
      target = refs[name + "_smem"].at[slot]
      plgpu.copy_gmem_to_smem(source, target, refs["arrived"].at[slot])

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
      here, constants, plan, _tokens_in(plan, tile), (h, delta_sum)
    )
    # Orders what was written here before the copies below, and everyone's
    # reads of this slot before the next fetch into it.
    plgpu.commit_smem()
    if plan.checkpoint_tile:
      count = plan.checkpoints_per_tile
      _write_state(
        refs["state_smem"],
        refs["checkpoints_out"].at[place.row, pl.ds(tile * count, count)],
        place,
      )
    if "y_out" in refs:
      tokens = pl.ds(tile * config.tile, config.tile)
      target = refs["y_out"].at[place.row, tokens, place.group, place.channels]
      plgpu.copy_smem_to_gmem(here["y"], target)

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


def _pass_chunks(refs: Refs, constants: Any, plan: Plan, place: _Place, h):
  """The state after the chunks before this one, from that before the first.

  Over a chunk the state decays by exp(A sum(delta)), a product of the decays
  of all its tokens. Every block does this for itself: fewer than a hundred
  steps, against a launch for a kernel of its own.
  """
  before = plan.chunks - 1 - place.chunk if plan.reverse else place.chunk

  def fetch(j, slot):
    chunk = plan.chunks - 1 - j if plan.reverse else j
    index = place.row * plan.chunks + chunk
    for name in ("chunk_state", "chunk_delta_sum"):
      source = refs[name].at[index, place.group, place.channels]
      target = refs[name + "_smem"].at[slot]
      plgpu.copy_gmem_to_smem(source, target, refs["chunk_arrived"].at[slot])

  for slot in range(_CHUNK_BUFFERS):
    pl.when(slot < before)(functools.partial(fetch, jnp.int32(slot), slot))

  def step(j, h):
    slot = lax.rem(j, jnp.int32(_CHUNK_BUFFERS))
    plgpu.barrier_wait(refs["chunk_arrived"].at[slot])
    inner = plan.cell.load_state(refs["chunk_state_smem"].at[slot])
    delta_sum = common.load(
      refs["chunk_delta_sum_smem"].at[slot], plan.cell.channel_layout()
    )
    h = plan.cell.decay(constants.A, h, delta_sum, inner)
    plgpu.commit_smem()  # All have read the slot.

    @pl.when(j + _CHUNK_BUFFERS < before)
    def _():
      fetch(j + _CHUNK_BUFFERS, slot)

    return h

  return _loop(before, step, h)


def _write_state(source: Any, target: Any, place: _Place) -> None:
  """Copies states, one or more along the first dimension."""
  target = target.at[:, place.group, place.channels]
  plgpu.copy_smem_to_gmem(source, target)


class _Constants(NamedTuple):
  """What a lane keeps in registers beside its state."""

  A: tuple[jax.Array, ...]
  D: jax.Array | None
  delta_bias: jax.Array | None


def _load_constants(refs: Refs, cell: Cell, place: _Place) -> _Constants:
  def load(name):
    if name not in refs:
      return None
    ref = refs[name].at[place.group, place.channels]
    return common.load(ref, cell.channel_layout())

  A = cell.load_state(refs["A"].at[place.group, place.channels])
  return _Constants(A, load("D"), load("delta_bias"))


def _tokens_in(plan: Plan, tile: Any) -> Any:
  """Tokens of a tile that exist."""
  if plan.l % plan.config.tile == 0:
    return plan.config.tile
  return jnp.minimum(plan.l - tile * plan.config.tile, plan.config.tile)


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
  if plan.l % unroll:
    rest = count - whole * unroll
    carry = _loop(rest, several(1, whole * unroll), carry)
  return carry


def _scan_unrolled(here, constants, plan, tokens, carry):
  """Scans these tokens of a tile, in this order."""
  h, delta_sum = carry
  cell = plan.cell
  layout = cell.channel_layout()

  # All loads first: they take tens of cycles, and nothing here waits for one.
  def rows(name):
    return [common.load(here[name].at[t], layout) for t in tokens]

  u, delta = rows("u"), rows("delta")
  z = rows("z") if "z" in here else None
  B = [cell.load_row(here["B"], t) for t in tokens]
  C = [cell.load_row(here["C"], t) for t in tokens] if "C" in here else None

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
