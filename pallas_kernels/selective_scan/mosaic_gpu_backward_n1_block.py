"""The program of a block of `mosaic_gpu_backward_n1`."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.selective_scan import mosaic_gpu_backward_memory as memory
from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_plan,
  mosaic_gpu_walk,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

Refs = memory.Refs
Plan = mosaic_gpu_backward_plan.ScalarPlan

# Columns that keep the tokens of `contributions` in different memory banks.
_PADDING: Final = 16


def scratch_types(arrays: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
  """Shared memory of a block: two tiles of what comes, one of what goes."""
  tile = plan.tile
  scratch: dict[str, Any] = {}
  for name in memory.sequences(arrays):
    shape, dtype = (tile, plan.channels), arrays[name].dtype
    scratch[name + "_smem"] = plgpu.SMEM((2, *shape), dtype)
    if name != "dy":
      dtype = plan.sequence_dtype("d" + name, dtype)
      scratch[name + "_out_smem"] = plgpu.SMEM(shape, dtype)
  scratch["rows_smem"] = plgpu.SMEM((2, 2, tile), jnp.float32)
  scratch["rows_out_smem"] = plgpu.SMEM((2 * tile,), jnp.float32)
  checkpoints = tile // plan.checkpoint_tile
  shape = (2, checkpoints, plan.channels)
  scratch["checkpoints_smem"] = plgpu.SMEM(shape, jnp.float32)
  shape = (2 * tile, plan.channels + _PADDING)
  scratch["contributions"] = plgpu.SMEM(shape, jnp.float32)
  count = len(memory.sequences(arrays)) * plan.copies(tile) + 2
  scratch["arrived"] = plgpu.Barrier(num_arrivals=count, num_barriers=2)
  return scratch


class _Carry(NamedTuple):
  """The gradients of the state, A, D and the bias; None if not wanted."""

  g: jax.Array
  A: jax.Array
  D: jax.Array | None
  delta_bias: jax.Array | None


class _Token(NamedTuple):
  """What a token leaves for its derivative.

  Attributes:
    delta: Step size.
    slope: Derivative of the step size with respect to what came.
    u: Input.
    dy: Gradient of the output before the gate.
    decay: exp(delta A).
    decayed: exp(delta A) times the state before.
  """

  delta: jax.Array
  slope: jax.Array | None
  u: jax.Array
  dy: jax.Array
  decay: jax.Array
  decayed: jax.Array


def run(refs: Refs, plan: Plan) -> None:
  """Walks the tiles of a chunk against the scan."""
  _Block(refs, plan).run()


class _Block(memory.Tiles[Plan]):
  """The steps of a block."""

  def __init__(self, refs: Refs, plan: Plan):
    super().__init__(refs, plan)
    self.layout = plan.layout()
    self.log2_decay = self._of_row("A", 0)
    self.D = self._of_row("D", 0) if "D" in refs else None
    self.delta_bias = (
      self._of_row("delta_bias", 0) if "delta_bias" in refs else None
    )

  def run(self) -> None:
    """Walks the tiles of a chunk against the scan."""
    refs, plan, place = self.refs, self.plan, self.place
    for slot in range(2):
      pl.when(slot < place.tiles)(lambda slot=slot: self.fetch(jnp.int32(slot)))
    g = zero = common.zeros((plan.channels,), self.layout)
    if "dstate" in refs:
      g = self._of_row("dstate", place.row)
    g = plan.pass_chunks(place, g, self._load_chunk, self._add_chunk)
    carry = _Carry(
      g,
      zero,
      zero if "D" in refs else None,
      zero if "delta_bias" in refs else None,
    )
    carry = lax.fori_loop(jnp.int32(0), place.tiles, self.tile, carry)
    for name, x in carry._asdict().items():
      if x is not None:
        ref = refs[("dstate" if name == "g" else name) + "_out"]
        index = place.row * plan.chunks + place.chunk
        common.store(ref.at[index, place.group, self.channels], x)
    plgpu.wait_smem_to_gmem(0)

  def _load(self, ref):
    return common.load(ref, self.layout)

  def _of_row(self, name, row):
    ref = self.refs[name].at[row, self.place.group, self.channels]
    return self._load(ref)

  def _load_chunk(self, index):
    names = ("chunk_delta_sum", "chunk_dstate")
    return tuple(self._of_row(name, index) for name in names)

  def _add_chunk(self, g, left):
    delta_sum, inner = left
    return common.exp2(delta_sum * self.log2_decay) * g + inner

  def fetch(self, i) -> None:
    refs, plan, place = self.refs, self.plan, self.place
    slot, stored = lax.rem(i, jnp.int32(2)), self._stored_tile(i)
    tokens = pl.ds(stored * plan.tile, plan.tile)
    count = plan.tile // plan.checkpoint_tile
    sources = {name: self._windows(name, i) for name in memory.sequences(refs)}
    rows = refs["rows"].at[place.row, place.group, :, tokens]
    checkpoints = refs["checkpoints"].at[
      place.row, pl.ds(stored * count, count), place.group, self.channels
    ]
    sources |= {"rows": [(None, rows)], "checkpoints": [(None, checkpoints)]}
    for name, source in sources.items():
      target = refs[name + "_smem"].at[slot]
      mosaic_gpu_walk.copy_in(source, target, refs["arrived"].at[slot])

  def _write(self, i) -> None:
    refs, plan, place = self.refs, self.plan, self.place
    tokens = pl.ds(self._stored_tile(i) * plan.tile, plan.tile)
    for name in self._results():
      windows = self._windows(name + "_out", i)
      mosaic_gpu_walk.copy_out(refs[name + "_out_smem"], windows)
    row = place.group * plan.channel_blocks + place.block
    for j, name in enumerate("BC"):
      source = refs["rows_out_smem"].at[pl.ds(j * plan.tile, plan.tile)]
      target = refs[name + "_out"].at[place.row, row, tokens]
      plgpu.copy_smem_to_gmem(source, target)

  def _results(self):
    return [name for name in ("u", "delta", "z") if name in self.refs]

  def tile(self, i, carry: _Carry) -> _Carry:
    refs, plan, place = self.refs, self.plan, self.place
    slot = lax.rem(i, jnp.int32(2))
    remaining = plan.remaining(self._tile_of(i), plan.tile, place.group)
    plgpu.barrier_wait(refs["arrived"].at[slot])
    # The results of the tile before have left, so that they can be replaced.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    count = jnp.int32(plan.tile // plan.checkpoint_tile)
    if plan.is_ragged(plan.tile):
      # Only where there are tokens: other checkpoints may be anything.
      size = jnp.int32(plan.checkpoint_tile)
      count = jnp.minimum(count, lax.div(remaining + (size - 1), size))

    def part(j, carry):
      index = j if plan.reverse else count - 1 - j
      return self._part(index, slot, remaining, carry)

    carry = lax.fori_loop(jnp.int32(0), count, part, carry)
    plgpu.commit_smem()

    @pl.when(i + 2 < place.tiles)
    def _():
      self.fetch(i + 2)

    columns = pl.ds(0, plan.channels)
    x = refs["contributions"].at[:, columns]
    x = jnp.sum(common.load(x, plan.contributions_layout()), axis=1)
    common.store(refs["rows_out_smem"], x)
    # Orders what was written before the copies, and these reads before the
    # contributions of the next tile.
    plgpu.commit_smem()
    self._write(i)
    return carry

  def _part(self, index, slot, remaining, carry: _Carry) -> _Carry:
    """The tokens between two checkpoints."""
    size = self.plan.checkpoint_tile
    rows = [index * size + step for step in range(size)]
    if self.plan.reverse:
      rows = rows[::-1]
    h = self._load(self.refs["checkpoints_smem"].at[slot, index])
    tokens = []
    for row in rows:
      h, token = self._recompute(row, slot, remaining, h)
      tokens.append(token)
    for row, token in zip(reversed(rows), reversed(tokens), strict=True):
      carry = self._differentiate(row, slot, token, carry)
    return carry

  def _recompute(self, row, slot, remaining, h):
    """One step of the scan; dC, and dz, which take the state."""
    refs, plan = self.refs, self.plan

    def load(name):
      x = self._load(refs[name + "_smem"].at[slot, row])
      return plan.of_group(x, self.layout, self.channels, remaining - row)

    u, delta, dy = load("u"), load("delta"), load("dy")
    slope = gate = None
    if self.delta_bias is not None:
      delta = delta + self.delta_bias
    if plan.softplus:
      delta, slope = common.softplus_and_sigmoid(delta)
    if plan.is_ragged(plan.checkpoint_tile):
      # A token beyond the last leaves the state as it is, and has no gradient.
      valid = jnp.where(row < remaining, 1.0, 0.0)
      delta = delta * valid
      if self.delta_bias is not None:
        slope = (1.0 if slope is None else slope) * _spread(valid, delta)
    if "z" in refs:
      z = load("z")
      s = common.reciprocal(1.0 + common.exp2(z * -common.LOG2E))
      silu = z * s
      gate = dy * (s + silu * (1.0 - s))
      dy = dy * silu
    decay = common.exp2(delta * self.log2_decay)
    decayed = decay * h
    h = decayed + delta * u * refs["rows_smem"][slot, 0, row]
    self._contribute(row + plan.tile, dy * h)
    if gate is not None:
      y = h * refs["rows_smem"][slot, 1, row]
      if self.D is not None:
        y = y + self.D * u
      common.store(refs["z_out_smem"].at[row], y * gate)
    return h, _Token(delta, slope, u, dy, decay, decayed)

  def _differentiate(self, row, slot, token: _Token, carry: _Carry) -> _Carry:
    """One step against the scan."""
    refs = self.refs
    g = carry.g + token.dy * refs["rows_smem"][slot, 1, row]
    self._contribute(row, g * (token.delta * token.u))
    g_B = g * refs["rows_smem"][slot, 0, row]
    d_exponent = g * token.decayed
    du = token.delta * g_B
    ddelta = d_exponent * (self.log2_decay * (1 / common.LOG2E))
    ddelta = ddelta + token.u * g_B
    if token.slope is not None:
      ddelta = ddelta * token.slope
    D, delta_bias = carry.D, carry.delta_bias
    if self.D is not None and D is not None:
      du = du + self.D * token.dy
      D = D + token.dy * token.u
    if delta_bias is not None:
      delta_bias = delta_bias + ddelta
    common.store(refs["u_out_smem"].at[row], du)
    common.store(refs["delta_out_smem"].at[row], ddelta)
    A = carry.A + d_exponent * token.delta
    return _Carry(g * token.decay, A, D, delta_bias)

  def _contribute(self, row, x) -> None:
    """What channels add to dB, in the first rows, and dC."""
    columns = pl.ds(0, self.plan.channels)
    common.store(self.refs["contributions"].at[row, columns], x)


def _spread(scalar, like):
  """A scalar as an array."""
  return plgpu.layout_cast(
    jnp.broadcast_to(scalar, like.shape),
    plgpu.Layout.WG_STRIDED(like.shape, like.shape[0] // common.LANES),
  )
