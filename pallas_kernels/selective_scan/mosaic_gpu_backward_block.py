"""The program of a block of `mosaic_gpu_backward`."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_memory,
  mosaic_gpu_backward_plan,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

Carry = mosaic_gpu_backward_memory.Carry
Refs = mosaic_gpu_backward_memory.Refs
State = mosaic_gpu_backward_memory.State


def run(refs: Refs, plan: mosaic_gpu_backward_plan.Plan) -> None:
  """Walks the tiles of a chunk against the scan."""
  block = _Block(refs, plan)
  zero = jnp.int32(0)
  block.fetch_sequences(zero)
  block.fetch_rows(zero)
  block.fetch_state(zero)
  carry = lax.fori_loop(
    zero, block.place.tiles, block.tile, block.first_carry()
  )
  block.write_sums(carry)
  plgpu.wait_smem_to_gmem(0)


class _Block(mosaic_gpu_backward_memory.Memory):
  """The steps of a block."""

  def tile(self, i, carry: Carry) -> Carry:
    refs, plan = self.refs, self.plan
    slot = lax.rem(i, jnp.int32(2))
    remaining = plan.remaining(self._tile_of(i), plan.tile, self.place.group)
    plgpu.barrier_wait(refs["sequences_arrived"])
    for row in range(0, plan.tile, plan.group):
      self._stage(row, remaining)
    plgpu.commit_smem()
    more = i + 1 < self.place.tiles

    @pl.when(more)
    def _():
      self.fetch_sequences(i + 1)
      self.fetch_rows(i + 1)

    plgpu.barrier_wait(refs["state_arrived"])
    plgpu.barrier_wait(refs["rows_arrived"].at[slot])
    h = self._load_parts(refs["state_smem"])
    # The results of the tile before have left, so that they can be replaced.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    groups = range(0, plan.tile, plan.group)
    saved = {}
    for first in groups:
      for step in range(first, first + plan.group):
        h, decayed, decay = self._recompute(step, slot, h)
        if step >= plan.stored:
          saved[step] = decayed, decay
          continue
        for part, x in enumerate(decayed):
          common.store(refs["decayed_smem"].at[step, part], x)
      if first == groups[-1]:
        plgpu.commit_smem()  # The checkpoint has been read.
        pl.when(more)(lambda: self.fetch_state(i + 1))
      else:
        common.sync_lanes()
      self._finish_recompute(first)
      common.sync_lanes()
    for first in reversed(groups):
      for step in reversed(range(first, first + plan.group)):
        carry = self._differentiate(step, slot, carry, saved.get(step))
      common.sync_lanes()
      sums = self._finish_differentiate(first, carry.sums)
      carry = carry._replace(sums=sums)
      if first:
        common.sync_lanes()
    plgpu.commit_smem()  # The results, for the copies.
    self.write_tile(i)
    return carry

  def _stage(self, row, remaining) -> None:
    """What a token and channel need, computed once for all states."""
    refs, plan = self.refs, self.plan
    shape = (plan.group, plan.channels)
    layout = plan.flat_layout(shape)

    def load(name):
      ref = refs[name + "_smem"].at[pl.ds(row, plan.group)]
      x = common.load(ref, layout)
      return plan.of_group(x, layout, self.channels, remaining - row)

    def store(name, x):
      common.store(refs[name + "_staged"].at[self._group_rows(row)], x)

    def reshape(x):
      return x.reshape(plan.group_shape)

    delta, u = reshape(load("delta")), reshape(load("u"))
    dy, slope = reshape(load("dy")), None
    if "delta_bias" in refs:
      delta = delta + self._constant("delta_bias")
    if plan.softplus:
      delta, slope = common.softplus_and_sigmoid(delta)
    if plan.is_ragged(plan.tile):
      # A token beyond the last leaves the state as it is, and has no gradient.
      token = lax.broadcasted_iota(jnp.int32, shape, 0)
      token = plgpu.layout_cast(token, layout) + row
      valid = reshape(jnp.where(token < remaining, 1.0, 0.0))
      delta = delta * valid
      slope = valid if slope is None else slope * valid
    if "slope_staged" in refs:
      store("slope", slope)
    if "z" in refs:
      z = reshape(load("z"))
      s = common.reciprocal(1.0 + common.exp2(z * -common.LOG2E))
      silu = z * s
      store("gate", dy * (s + silu * (1.0 - s)))
      dy = dy * silu
    store("delta", delta)
    store("delta_u", delta * u)
    store("dy", dy)
    store("u", u)

  def _group_rows(self, row):
    return pl.ds(row * self.plan.rows, self.plan.group * self.plan.rows)

  def _token(self, step, slot, names):
    """Values of a token, for each part of the state."""
    refs, plan = self.refs, self.plan
    row = self._row_of(step)

    def channels(name):
      rows = pl.ds(row * plan.rows, plan.rows)
      ref, layout = refs[name + "_staged"], self.layout.reduce((1, 2))
      # One after the other, so that the compiler makes them one wide load.
      parts = [common.load(ref.at[rows, i], layout) for i in range(plan.inner)]
      return [self._spread(x, (0,)) for x in parts]

    def states(name):
      layout = self.layout.reduce(0)
      x = common.load(refs[name + "_smem"].at[slot, row], layout)
      return self._spread(x, (1, 2))

    return [states(n) if n in "BC" else channels(n) for n in names]

  def _add_over_states(self, which, step, parts) -> None:
    plan = self.plan
    row = self._row_of(step) % plan.group
    rows = pl.ds(row * plan.rows, plan.rows)
    parts = [jnp.sum(x, axis=2) for x in parts]
    for part, x in enumerate(parts):
      ref = self.refs["over_states"].at[which, :, rows, part]
      common.store(ref.transpose((1, 0)), x)

  def _add_over_channels(self, step, parts) -> None:
    row = self._row_of(step) % self.plan.group
    common.store(self.refs["over_channels"].at[row], sum(parts[1:], parts[0]))

  def _recompute(self, step, slot, h: State):
    """One step of the scan; returns h, exp(delta A) h' and exp(delta A)."""
    delta, delta_u, dy, B, C = self._token(
      step, slot, ["delta", "delta_u", "dy", "B", "C"]
    )
    decay = [
      common.exp2(x * a) for x, a in zip(delta, self.log2_decay, strict=True)
    ]
    decayed = [x * y for x, y in zip(decay, h, strict=True)]
    h = [x + y * B for x, y in zip(decayed, delta_u, strict=True)]
    if "z" in self.refs:
      self._add_over_states(0, step, [x * C for x in h])
    self._add_over_channels(step, [x * y for x, y in zip(dy, h, strict=True)])
    return h, decayed, decay

  def _differentiate(self, step, slot, carry: Carry, saved) -> Carry:
    """One step against the scan."""
    parts = range(self.plan.inner)
    delta, delta_u, dy, B, C = self._token(
      step, slot, ["delta", "delta_u", "dy", "B", "C"]
    )
    if saved is None:
      ref = self.refs["decayed_smem"].at[step]
      decayed = [common.load(ref.at[i], self.layout) for i in parts]
      decay = [common.exp2(delta[i] * self.log2_decay[i]) for i in parts]
    else:
      decayed, decay = saved
    g = [carry.g[i] + dy[i] * C for i in parts]
    self._add_over_channels(step, [g[i] * delta_u[i] for i in parts])
    self._add_over_states(0, step, [g[i] * B for i in parts])
    d_exponent = [g[i] * decayed[i] for i in parts]
    self._add_over_states(
      1, step, [d_exponent[i] * self.log2_decay[i] for i in parts]
    )
    return carry._replace(
      g=[g[i] * decay[i] for i in parts],
      A=[carry.A[i] + d_exponent[i] * delta[i] for i in parts],
    )

  def _sum_over_channels(self, name, row) -> None:
    """Adds up the rows of `over_channels` into dB or dC."""
    plan = self.plan
    x = common.load(self.refs["over_channels"], plan.rows_layout())
    target = self.refs["rows_out_smem"].at["BC".index(name)]
    common.store(target.at[pl.ds(row, plan.group)], jnp.sum(x, axis=1))

  def _sum_over_states(self, which) -> jax.Array:
    plan = self.plan
    rows = pl.ds(0, plan.group * plan.rows)
    parts = [
      common.load(self.refs["over_states"].at[which, i, rows], self.flat)
      for i in range(plan.vectors)
    ]
    return functools.reduce(jnp.add, parts)

  def _first_row(self, step):
    """The first token of a group of steps, in memory order."""
    plan = self.plan
    return plan.tile - plan.group - step if plan.reverse else step

  def _staged(self, name, row) -> jax.Array:
    ref = self.refs[name + "_staged"].at[self._group_rows(row)]
    return common.load(ref, self.flat)

  def _write(self, name, row, x) -> None:
    plan = self.plan
    target = self.refs[name + "_out_smem"].at[pl.ds(row, plan.group)]
    common.store(target, x.reshape(plan.group, plan.channels))

  def _finish_recompute(self, step) -> None:
    """dC, and dz from y, for a group of tokens."""
    row = self._first_row(step)
    self._sum_over_channels("C", row)
    if "z" in self.refs:
      y = self._sum_over_states(0)
      if "D" in self.refs:
        y = y + self._constant("D") * self._staged("u", row)
      self._write("z", row, y * self._staged("gate", row))

  def _finish_differentiate(self, step, sums) -> tuple[jax.Array, ...]:
    """dB, du and d(delta) for a group of tokens; returns the new sums."""
    row = self._first_row(step)
    self._sum_over_channels("B", row)
    g_B = self._sum_over_states(0)
    u, dy = self._staged("u", row), self._staged("dy", row)
    du = self._staged("delta", row) * g_B
    if "D" in self.refs:
      du = du + self._constant("D") * dy
      sums = self._add_to_sum(sums, "D", dy * u)
    self._write("u", row, du)
    ddelta = self._sum_over_states(1) * (1 / common.LOG2E) + u * g_B
    if "slope_staged" in self.refs:
      ddelta = ddelta * self._staged("slope", row)
    self._write("delta", row, ddelta)
    if "delta_bias" in self.refs:
      sums = self._add_to_sum(sums, "delta_bias", ddelta)
    return sums
