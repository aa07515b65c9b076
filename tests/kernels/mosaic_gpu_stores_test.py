"""Stores of the Mosaic GPU kernels stay within what their block may write.

JAX stores a box that is contiguous in its array by a plain copy, cut at the end
of the whole array only; what reaches beyond an inner dimension lands in the
next row. The interpreter clips every dimension, and would not notice. So the
boxes of lowered kernels are checked.
"""

import jax
from jax.experimental.mosaic.gpu import launch_context, utils
import jax.numpy as jnp
from jaxlib.mlir import ir
import pytest

from pallas_kernels.cross_selective_scan import arguments as cross_arguments
from pallas_kernels.cross_selective_scan import mosaic_gpu as cross_mosaic_gpu
from pallas_kernels.selective_scan import (
  arg_specs,
  arguments,
  mosaic_gpu,
  tuning,
)
from tests.kernels import mosaic_gpu_lowering_test as lowering

# What a tile, a group or a block reaches beyond: tokens, channels, groups.
RAGGED_SPECS = {
  "tokens": dict(b=2, l=13, d=256, n=16),
  "one_block": dict(b=2, l=13, d=128, n=16),
  "groups_of_a_block": dict(b=2, l=16, d=128, n=16, g=2),
  "channels": dict(b=2, l=16, d=136, n=8),
  "half_blocks": dict(b=2, l=19, d=64, n=32),
  "one_state": dict(b=2, l=20, d=64, n=1),
  "one_state_two_channels": dict(b=2, l=20, d=256, n=1),
  "one_state_gate": dict(b=2, l=20, d=256, n=1, gate=True),
}


@pytest.fixture(name="overhangs")
def _overhangs(monkeypatch):
  """Boxes of stores that reach into what is not theirs, as (array, box)."""
  found, context = [], launch_context.LaunchContext
  prepare, copy, stores = context._prepare_tma, context.async_copy, [False]

  def async_copy(self, **arguments):
    source = ir.MemRefType(arguments["src_ref"].type)
    stores[0] = utils.is_smem_ref(source)
    return copy(self, **arguments)

  def prepare_tma(self, gmem_ref, *arguments):
    result = prepare(self, gmem_ref, *arguments)
    if stores[0]:
      array = ir.MemRefType(gmem_ref.type)
      strides, _ = array.get_strides_and_offset()
      found.extend(_overhanging(array.shape, strides, result[1], result[3]))
    return result

  monkeypatch.setattr(context, "async_copy", async_copy)
  monkeypatch.setattr(context, "_prepare_tma", prepare_tma)
  return found


def _overhanging(shape, strides, box, transforms):
  """The box, if it is contiguous and reaches beyond an inner dimension."""
  shape, strides = list(shape), list(strides)
  for transform in transforms:
    kind = type(transform).__name__
    if kind == "TransposeTransform":
      shape = [shape[i] for i in transform.permutation]
      strides = [strides[i] for i in transform.permutation]
    elif kind == "DropUnitDimsTransform":
      kept = [i for i in range(len(shape)) if i not in transform.unit_dims]
      shape, strides = [shape[i] for i in kept], [strides[i] for i in kept]
    else:
      assert kind == "CollapseLeadingIndicesTransform", kind
      leading = len(transform.strides)
      # Of one element in the box.
      shape = [1, *shape[leading:]]
      strides = [transform.common_stride, *strides[leading:]]
  expected = 1
  for size, stride in zip(reversed(box), reversed(strides), strict=True):
    if size != 1 and stride != expected:
      return []
    expected *= size
  outer = next((i for i, size in enumerate(shape) if size != 1), 0)
  inner = range(outer + 1, len(box))
  if any(shape[i] % box[i] for i in inner):
    return [(tuple(shape), tuple(box))]
  return []


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", RAGGED_SPECS)
def test_no_store_reaches_into_what_another_block_writes(
  name, chunks, overhangs
):
  spec = arg_specs.ArgSpec(**{"source": "", **RAGGED_SPECS[name]})
  config = tuning.Config(chunks=chunks)
  options = arguments.Options(True, False, jnp.float32)

  def call(given):
    every = arguments.Arguments(
      **{field: given.get(field) for field in arguments.Arguments._fields}
    )
    y, state = mosaic_gpu.selective_scan(every, options, config=config)
    return y.astype(jnp.float32).sum() + state.sum()

  with lowering.on_h100():
    text = lowering.lower(jax.grad(call), lowering.shapes(spec, jnp.float32))
  assert len(lowering.kernels(text)) >= 2
  assert overhangs == []


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
  "h, w, d, n", [(7, 7, 96, 16), (9, 5, 32, 16), (20, 18, 192, 1)]
)
def test_no_store_of_a_cross_scan_does(h, w, d, n, chunks, overhangs):
  k, array = cross_arguments.DIRECTIONS, jax.ShapeDtypeStruct
  rows, parameter = (
    array((2, h, w, k, n), jnp.float32),
    array((k, d), "float32"),
  )
  given = cross_arguments.Arguments(
    u=array((2, h, w, d), jnp.bfloat16),
    delta=array((2, h, w, k, d), jnp.bfloat16),
    A=array((k, d, n), jnp.float32),
    B=rows,
    C=rows,
    D=parameter,
    delta_bias=parameter,
  )
  options = cross_arguments.Options(True, jnp.float32)
  short = max(h, w) <= 8
  config = tuning.Config(tile=8 if short else 16, chunks=chunks)

  def call(given):
    y = cross_mosaic_gpu.cross_selective_scan(given, options, config=config)
    return y.astype(jnp.float32).sum()

  with lowering.on_h100():
    text = lowering.lower(jax.grad(call), given)
  assert len(lowering.kernels(text)) >= 2
  assert overhangs == []
