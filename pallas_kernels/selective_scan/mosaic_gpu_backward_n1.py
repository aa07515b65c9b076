"""The backward pass of the selective scan on Mosaic GPU for one state, n = 1.

As in the forward kernel a lane owns one channel, or two neighbours, and their
state. Nothing but dB and dC is summed over anything, so a tile of tokens is
done in registers: forward from its checkpoint, then backward. What lanes
contribute to dB and dC goes to shared memory, where the warps add up the tokens
of a fetch in a fixed order. Memory traffic bounds this kernel.

b batch, l length, d channels, g groups, e = d // g channels of a group,
k chunks.
"""

from collections.abc import Mapping
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_n1_block,
  mosaic_gpu_backward_plan,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

Plan = mosaic_gpu_backward_plan.ScalarPlan

# A tile has a multiple of so many tokens, and maybe several checkpoints: warps
# add up dB and dC for eight tokens each, and copies get a few kilobytes.
TOKENS: Final = 16


def is_wide(e: int, dtype: Any) -> bool:
  """Whether two channels for each lane pay, with so many in a group.

  Not where half a block would have none, nor for float32, where they are loaded
  one by one and need too much memory.
  """
  blocks = common.cdiv(e, common.LANES)
  return common.cdiv(e, 2 * common.LANES) * 2 == blocks and dtype == "bfloat16"


def scan(
  inputs: mosaic_gpu_backward_plan.Inputs,
  plan: Plan,
  interpret: common.Interpret | None,
) -> mosaic_gpu_backward_plan.Outputs:
  """Runs the kernel and adds up what its blocks share."""
  arrays = _blocked(inputs, plan)
  out_type = _out_type(arrays, plan)
  names = (*arrays, *(name + "_out" for name in out_type))

  def body(*refs, **scratch):
    refs = {**dict(zip(names, refs, strict=True)), **scratch}
    plan.run(functools.partial(mosaic_gpu_backward_n1_block.run, refs))

  results = common.kernel(
    body,
    name=plan.name + "_backward",
    out_type=list(out_type.values()),
    scratch_types=mosaic_gpu_backward_n1_block.scratch_types(arrays, plan),
    grid={"block": plan.blocks},
    interpret=interpret,
    lane_semantics=True,
  )(*arrays.values())
  results = dict(zip(out_type, results, strict=True))
  return _unblocked(results, plan, inputs.B.shape[-1])


def _blocked(
  inputs: mosaic_gpu_backward_plan.Inputs, plan: Plan
) -> dict[str, jax.Array]:
  """The given inputs as the kernel indexes them; see `mosaic_gpu_backward`."""
  b, g, e = plan.b, plan.g, plan.e
  pad_e = plan.channel_blocks * plan.channels - e
  # One array, because copies have at least 128 bytes.
  arrays = {"rows": jnp.stack([inputs.B, inputs.C], axis=2)}
  for name, x in inputs._asdict().items():
    if x is None or name in ("B", "C"):
      continue
    if name in ("u", "delta", "z", "dy"):
      x = plan.view(x, name)
    elif name == "checkpoints":
      x = x.reshape(b, -1, g, e)
    else:
      # exp(delta A) is computed as a power of two.
      x = x * common.LOG2E if name == "A" else x
      x = x.astype(jnp.float32).reshape(-1, g, e)
      x = jnp.pad(x, ((0, 0), (0, 0), (0, pad_e)))
    arrays[name] = x
  return arrays


def _out_type(
  arrays: Mapping[str, Any], plan: Plan
) -> dict[str, jax.ShapeDtypeStruct]:
  b, g, k = plan.b, plan.g, plan.chunks
  blocks = plan.channel_blocks
  out = {}
  # Whole tiles of dB and dC, see `mosaic_gpu_walk`.
  tokens = common.cdiv(plan.l, plan.tile) * plan.tile
  for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dstate"):
    if name in ("u", "delta", "z"):
      if name in arrays:
        dtype = arrays[name].dtype
        out[name] = plan.result("d" + name, dtype, plan.tile, plan.channels)
    elif name in ("B", "C"):
      out[name] = jax.ShapeDtypeStruct((b, g * blocks, tokens), jnp.float32)
    elif name in arrays or name == "dstate":
      shape = (b * k, g, blocks * plan.channels)
      out[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return out


def _unblocked(
  results: dict[str, jax.Array], plan: Plan, tokens: int
) -> mosaic_gpu_backward_plan.Outputs:
  """The results with the shapes of `Outputs`, of so many tokens in B and C."""
  b, g, e = plan.b, plan.g, plan.e
  d = g * e
  fields = mosaic_gpu_backward_plan.Outputs._fields
  out: dict[str, Any] = dict.fromkeys(fields)
  for name, x in results.items():
    if name in ("u", "delta", "z"):
      x = plan.unview(x)
    elif name in ("B", "C"):
      x = x.reshape(b, g, plan.channel_blocks, -1)[..., :tokens].sum(2)
    elif name == "dstate":
      x = plan.first_chunk(x)[..., :e].reshape(b, d, 1)
    else:
      x = x.sum(0)[:, :e].reshape(d)
      x = x[:, None] if name == "A" else x
    out[name] = x
  return mosaic_gpu_backward_plan.Outputs(**out)
