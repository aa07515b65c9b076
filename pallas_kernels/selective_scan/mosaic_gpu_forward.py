"""The forward selective scan as a Mosaic GPU kernel.

A block owns 128 channels of one group and one batch row (and one chunk of the
sequence, see `mosaic_gpu_chunked`). A lane owns one channel with all its
states in registers and walks the tokens one after the other, so nothing but
the loads connects lanes. Tiles of tokens arrive in shared memory by TMA, the
next ones while this one is computed; y leaves the same way.

Ragged sizes cost no copies of what is long: TMA fills what it reads beyond the
channels of a group or the last token with zeros, and does not write there.
Steps beyond the last token are not run at all. For widths that TMA cannot take
so, and results for which there is no TMA, see `mosaic_gpu_walk`.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group, k chunks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import (
  mosaic_gpu_forward_block,
  mosaic_gpu_forward_plan,
)

Inputs = mosaic_gpu_forward_plan.Inputs
Outputs = mosaic_gpu_forward_plan.Outputs
Cell = mosaic_gpu_forward_plan.Cell
VectorCell = mosaic_gpu_forward_plan.VectorCell
Plan = mosaic_gpu_forward_plan.Plan


def scan(
  inputs: Inputs, plan: Plan, interpret: common.Interpret | None = None
) -> Outputs:
  """Runs the kernel; `inputs.C` is needed unless `plan.states_only`."""
  arrays = _blocked(inputs, plan)
  out_type = _out_type(inputs, plan)
  names = (*arrays, *(name + "_out" for name in out_type))

  def body(*refs, **scratch):
    refs = {**dict(zip(names, refs, strict=True)), **scratch}
    plan.run(functools.partial(mosaic_gpu_forward_block.run, refs))

  results = common.kernel(
    body,
    name=plan.name + "_states" if plan.states_only else plan.name,
    out_type=list(out_type.values()),
    scratch_types=mosaic_gpu_forward_block.scratch_types(
      arrays, out_type, plan
    ),
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
  b, g, e = plan.b, plan.g, plan.e
  padding = plan.channel_blocks * plan.cell.lanes - e

  def by_channel(x):
    x = x.astype(jnp.float32).reshape(g, e, *x.shape[1:])
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

  arrays = {}
  for name, x in inputs._asdict().items():
    if x is None:
      continue
    if name in ("u", "delta", "z"):
      arrays[name] = plan.view(x, name)
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
  g, lanes = plan.g, plan.cell.lanes
  n = plan.cell.state_shape()[1:]
  # The states of a block are contiguous: whole blocks, see `mosaic_gpu_walk`.
  whole = (plan.b * plan.chunks, g, plan.channel_blocks * lanes)
  out = {}
  if not plan.states_only:
    out["y"] = plan.result("y", inputs.u.dtype, plan.config.tile, lanes)
  if plan.final_state:
    out["state"] = jax.ShapeDtypeStruct((*whole, *n), "float32")
  if plan.states_only:
    out["delta_sum"] = jax.ShapeDtypeStruct(whole, "float32")
  if plan.checkpoint_tile:
    tiles = common.cdiv(plan.l, plan.checkpoint_tile)
    shape = (plan.b, tiles, g, _checkpoint_channels(plan, tiles), *n)
    out["checkpoints"] = jax.ShapeDtypeStruct(shape, "float32")
  return out


def _checkpoint_channels(plan: Plan, tiles: int) -> int:
  """Channels of a group for which checkpoints have room."""
  lanes, count = plan.cell.lanes, plan.checkpoints_per_tile
  if count == 1:  # Contiguous, whatever the stride from one to the next.
    return plan.channel_blocks * lanes
  overhangs = plan.g > 1 or tiles % count != 0
  if plan.g * plan.e == lanes and overhangs:
    return plan.e + common.VECTOR  # Any other stride will do.
  return plan.e


def _unblocked(results: dict[str, jax.Array], plan: Plan) -> Outputs:
  """The results with the shapes of `Outputs`."""
  d = plan.g * plan.e
  out: dict[str, Any] = dict.fromkeys(Outputs._fields)
  for name, x in results.items():
    if name == "y":
      out[name] = plan.unview(x)
      continue
    n = plan.cell.state_shape()[1:] if name != "delta_sum" else ()
    x = x.reshape(plan.b, -1, plan.g, x.shape[x.ndim - 1 - len(n)], *n)
    out[name] = x[:, :, :, : plan.e].reshape(plan.b, -1, d, *n)
  return Outputs(**out)
