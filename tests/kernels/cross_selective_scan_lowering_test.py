"""The Mosaic GPU kernels of the cross selective scan, lowered for CUDA.

On whatever machine runs this, for an abstract H100.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import pytest

import pallas_kernels
from pallas_kernels.cross_selective_scan import arg_specs, arguments
from tests.kernels import mosaic_gpu_lowering_test as lowering

SMALL = arg_specs.ArgSpec(b=2, h=7, w=5, d=128, n=1, source="")
# What the models do not do: images that are no squares, lines of several tiles,
# channels that end within a block or a TMA unit, states that are padded.
OTHER_SPECS = {
  "a_row": arg_specs.ArgSpec(b=1, h=1, w=40, d=49, n=5, source=""),
  "a_column": arg_specs.ArgSpec(b=1, h=40, w=1, d=300, n=1, source=""),
  "one_of_all": arg_specs.ArgSpec(b=1, h=1, w=1, d=1, n=2, source=""),
  "many_states": arg_specs.ArgSpec(b=1, h=9, w=30, d=24, n=64, source=""),
}


def shapes(spec, dtype=jnp.bfloat16):
  """Arguments of a call, as shapes."""
  sizes = dict(b=spec.b, h=spec.h, w=spec.w, k=4, d=spec.d, n=spec.n)
  return {
    name: jax.ShapeDtypeStruct(
      tuple(sizes[letter] for letter in layout),
      dtype if "b" in layout else jnp.float32,
    )
    for name, layout in arguments.LAYOUTS.items()
  }


def scan(implementation=None):
  def call(arrays):
    return pallas_kernels.cross_selective_scan(
      **arrays, delta_softplus=True, implementation=implementation
    )

  return call


def copies(text, size):
  """Operations that move arrays of at least so many elements about."""
  found = []
  for line in text.splitlines():
    moved = re.search(r"stablehlo\.(transpose|reverse|gather|pad)\b.*", line)
    if moved and lowering.largest_array(line) >= size:
      found.append(moved.group(0))
  return found


@pytest.mark.parametrize("name", arg_specs.ARG_SPECS)
def test_the_calls_of_models_lower_forward_and_backward(name):
  spec = arg_specs.ARG_SPECS[name]
  with lowering.on_h100():
    forward = lowering.lower(scan(), shapes(spec))
    both = lowering.lower(lowering.gradient(scan()), shapes(spec))
  pixels = f"{spec.b}x{spec.h}x{spec.w}"
  # All directions in one kernel, each with a result of its own. Where images
  # are scanned in chunks, a smaller kernel comes before each of these.
  y = f"{pixels}x4x{spec.d}xf32"
  ddelta = f"{pixels}x4x{spec.d}xbf16"
  types, types_both = lowering.kernels(forward), lowering.kernels(both)
  assert types[-1] == [y]
  assert types_both[-1][:2] == [y, ddelta]
  assert [y in results for results in types_both].count(True) == 2
  assert len(types) == 1 or not types[0][0].startswith(pixels)
  assert len(types_both) == 2 * len(types)
  elements = spec.b * spec.h * spec.w * spec.d
  assert not copies(both, elements)
  if spec.n > 1:
    assert lowering.largest_array(both) < 4 * elements * spec.n / 3


@pytest.mark.parametrize("name", OTHER_SPECS)
def test_awkward_sizes_lower_in_float32(name):
  with lowering.on_h100():
    arrays = shapes(OTHER_SPECS[name], jnp.float32)
    text = lowering.lower(lowering.gradient(scan()), arrays)
  in_chunks = name == "many_states"  # The others have too few lines.
  assert len(lowering.kernels(text)) == (4 if in_chunks else 2)


def test_the_name_and_none_take_the_same_kernels():
  with lowering.on_h100():
    unnamed, named, other = (
      lowering.lower(lowering.gradient(scan(name)), shapes(SMALL))
      for name in (None, "mosaic_gpu", "xla_associative")
    )
  assert lowering.kernels(unnamed) == lowering.kernels(named)
  assert len(lowering.kernels(named)) == 2
  assert not lowering.kernels(other)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_each_device_runs_its_shard(axis_type):
  spec = arg_specs.ArgSpec(b=16, h=7, w=5, d=128, n=1, source="")
  with lowering.on_h100(devices=8, axis_type=axis_type):
    mesh = jax.sharding.get_abstract_mesh()

    def place(name, x):
      if axis_type == AxisType.Auto:
        return x
      axes = ("data" if a == "b" else None for a in arguments.LAYOUTS[name])
      return x.update(sharding=NamedSharding(mesh, jax.P(*axes)))

    arrays = {name: place(name, x) for name, x in shapes(spec).items()}
    forward = lowering.kernels(lowering.lower(scan(), arrays))
    both = lowering.kernels(lowering.lower(lowering.gradient(scan()), arrays))
  assert forward == [["2x7x5x4x128xf32"]]
  assert len(both) == 2
  for types in both:
    assert types[0] == "2x7x5x4x128xf32"
  assert not any(x.startswith("16x") for types in both for x in types)


def test_vmap_adds_a_dimension_to_the_grid():
  mapped = jax.tree.map(lambda x: x.update(shape=(3, *x.shape)), shapes(SMALL))
  with lowering.on_h100():
    text = lowering.lower(jax.vmap(lowering.gradient(scan())), mapped)
  assert len(lowering.kernels(text)) == 2
  for types in lowering.kernels(text):
    assert types[0] == "3x2x7x5x4x128xf32"


def test_it_lowers_in_programs_that_enable_64_bits():
  spec = arg_specs.ArgSpec(b=1, h=20, w=19, d=20, n=4, source="")
  with jax.enable_x64(True), lowering.on_h100():
    text = lowering.lower(lowering.gradient(scan()), shapes(spec))
  assert len(lowering.kernels(text)) == 4  # In chunks.


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_gpu_interpret"])
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype=jnp.float16), "`u` is float16, it takes bfloat16 and float32"),
    (dict(n=65), "`A` has 65 states per channel, it takes at most 64"),
    (
      dict(h=2000, w=2000),
      "h=2000, w=2000.* states it keeps for the derivative would have "
      "4096000000 elements.*32-bit.*split the batch",
    ),
  ],
)
def test_what_does_not_fit_is_refused_and_xla_serves_it(name, change, message):
  change = dict(change)
  dtype = change.pop("dtype", jnp.bfloat16)
  sizes = dict(b=1, h=4, w=4, d=128, n=16, source="") | change
  arrays = shapes(arg_specs.ArgSpec(**sizes), dtype)
  with lowering.on_h100():
    with pytest.raises(pallas_kernels.UnsupportedError, match=message):
      jax.eval_shape(scan(name), arrays)
    assert jax.eval_shape(scan(), arrays).dtype == dtype


def test_float64_is_refused_and_xla_serves_it():
  with jax.enable_x64(True), lowering.on_h100():
    arrays = shapes(SMALL, jnp.float64)
    with pytest.raises(pallas_kernels.UnsupportedError, match="`u` is float64"):
      jax.eval_shape(scan("mosaic_gpu"), arrays)
    assert jax.eval_shape(scan(), arrays).dtype == jnp.float64


def test_without_such_a_gpu_it_is_refused_by_name():
  with pytest.raises(
    pallas_kernels.UnsupportedError, match="needs an NVIDIA GPU"
  ):
    jax.eval_shape(scan("mosaic_gpu"), shapes(SMALL))
