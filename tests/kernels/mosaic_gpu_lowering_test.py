"""The Mosaic GPU kernels, lowered for CUDA on whatever machine runs this.

The interpreter accepts operations that do not lower, so every shape of a real
model is lowered too, on an abstract H100.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.selective_scan import (
  arg_specs,
  mosaic_gpu,
  mosaic_gpu_backward_plan,
)

H100 = AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
)
# What the models do not do: groups that end within a block or a TMA unit, state
# sizes that are padded, few and many states.
OTHER_SPECS = {
  "groups_of_96": arg_specs.ArgSpec(b=2, l=50, d=288, n=8, g=3, source=""),
  "groups_of_49": arg_specs.ArgSpec(b=2, l=50, d=147, n=5, g=3, source=""),
  "groups_of_1": arg_specs.ArgSpec(b=2, l=9, d=5, n=2, g=5, source=""),
  "many_states": arg_specs.ArgSpec(b=2, l=9, d=24, n=64, source=""),
  "one_state": arg_specs.ArgSpec(b=2, l=9, d=14, n=1, g=2, source=""),
}


def on_h100(*, devices=1, axis_type=AxisType.Auto):
  mesh = AbstractMesh(
    (devices,), ("data",), axis_types=(axis_type,), abstract_device=H100
  )
  return jax.sharding.use_abstract_mesh(mesh)


def shapes(spec, dtype=jnp.bfloat16, **optional):
  """Arguments of a call, as shapes."""
  rows = (spec.b, spec.l, spec.g, spec.n)
  array = jax.ShapeDtypeStruct
  arguments = {
    "u": array((spec.b, spec.l, spec.d), dtype),
    "delta": array((spec.b, spec.l, spec.d), dtype),
    "A": array((spec.d, spec.n), jnp.float32),
    "B": array(rows, dtype),
    "C": array(rows, dtype),
    "D": array((spec.d,), jnp.float32),
    "delta_bias": array((spec.d,), jnp.float32),
  }
  if spec.gate:
    arguments["z"] = arguments["u"]
  return arguments | optional


def scan(implementation=None, **options):
  def call(arguments):
    return pallas_kernels.selective_scan(
      **arguments,
      delta_softplus=True,
      implementation=implementation,
      **options,
    )

  return call


def gradient(function):
  return jax.grad(lambda x: function(x).astype(jnp.float32).sum())


def lower(function, *arguments):
  traced = jax.jit(function).trace(*arguments)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
  """The types of the results of each Mosaic GPU kernel in a program."""
  calls = re.findall(r"custom_call @mosaic_gpu_v2.*-> (.*)", text)
  return [re.findall(r"tensor<([^>]*)>", types) for types in calls]


def largest_array(text):
  """Elements of the largest array in a program."""
  sizes = [0]
  for shape in re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16)>", text):
    size = 1
    for dimension in shape.rstrip("x").split("x"):
      size *= int(dimension)
    sizes.append(size)
  return max(sizes)


@pytest.mark.parametrize("name", arg_specs.ARG_SPECS)
def test_the_calls_of_models_lower_forward_and_backward(name):
  spec = arg_specs.ARG_SPECS[name]
  with on_h100():
    forward = lower(scan(), shapes(spec))
    both = lower(gradient(scan()), shapes(spec))
  sequences = f"{spec.b}x{spec.l}x"
  assert any(x.startswith(sequences) for x in sum(kernels(forward), []))
  assert len(kernels(both)) > len(kernels(forward))
  # All states at once are what the kernels exist to avoid. (With one state per
  # channel they are no larger than the input.)
  if spec.n > 1:
    states = spec.b * spec.l * spec.d * spec.n
    assert largest_array(both) <= states / min(spec.n, 7)


def test_equal_layers_are_lowered_once():
  spec = arg_specs.ArgSpec(b=2, l=50, d=32, n=4, source="")

  def count(layers, transform=lambda function: function):
    def model(arguments):
      for _ in range(layers):
        arguments = arguments | {"u": scan()(arguments)}
      return arguments["u"]

    return len(kernels(lower(transform(model), shapes(spec))))

  with on_h100():
    # To JAX the first layer, whose input is the program's, is another.
    assert count(5) == count(3) == 2
    assert count(5, gradient) == count(3, gradient)


@pytest.mark.parametrize("name", OTHER_SPECS)
def test_awkward_sizes_lower_in_float32_and_reverse(name):
  with on_h100():
    arguments = shapes(OTHER_SPECS[name], jnp.float32)
    text = lower(gradient(scan(reverse=True)), arguments)
  assert len(kernels(text)) == 2


def test_widths_that_no_tma_stride_allows_cost_no_copy_of_what_comes():
  spec = arg_specs.ArgSpec(b=8, l=50, d=147, n=8, g=3, gate=True, source="")
  with on_h100():
    text = lower(gradient(scan()), shapes(spec))
  assert len(kernels(text)) == 2
  # Nothing as long as a sequence is padded, and those that come stay as wide
  # as they are; what goes has room between its groups.
  assert not re.search(r"stablehlo.pad.*tensor<[\dx]*50x[\dx]+bf16>", text)
  assert "tensor<58800xbf16>" in text
  assert "8x50x3x56xbf16" in text


def test_the_name_and_none_take_the_same_kernels():
  spec = arg_specs.ArgSpec(b=264, l=20, d=128, n=4, source="")
  with on_h100():
    unnamed, named, other = (
      lower(gradient(scan(name)), shapes(spec))
      for name in (None, "mosaic_gpu", "xla_associative")
    )
  assert kernels(unnamed) == kernels(named)
  assert len(kernels(named)) == 2
  assert not kernels(other)


def test_all_optional_arguments_lower():
  spec = arg_specs.ArgSpec(b=2, l=21, d=40, n=6, gate=True, source="")
  state = jax.ShapeDtypeStruct((2, 40, 6), jnp.float32)
  call = scan(return_final_state=True)

  def loss(arguments):
    y, last = call(arguments)
    return y.astype(jnp.float32).sum() + last.sum()

  with on_h100():
    text = lower(jax.grad(loss), shapes(spec, initial_state=state))
  assert len(kernels(text)) == 2


@pytest.mark.parametrize("name", [None, "mosaic_gpu"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_each_device_runs_its_shard(axis_type, name):
  spec = arg_specs.ArgSpec(b=2112, l=20, d=128, n=8, gate=True, source="")
  with on_h100(devices=8, axis_type=axis_type):
    mesh = jax.sharding.get_abstract_mesh()

    def place(x):
      if axis_type == AxisType.Auto:
        return x
      axes = jax.P("data") if x.ndim >= 3 else jax.P()
      return x.update(sharding=NamedSharding(mesh, axes))

    arguments = jax.tree.map(place, shapes(spec))
    forward = kernels(lower(scan(name), arguments))
    both = kernels(lower(gradient(scan(name)), arguments))
  assert len(forward) == 1
  assert len(both) == 2
  for types in forward + both:
    sequences = [x for x in types if x.endswith("bf16")]
    assert sequences
    assert all(x.startswith("264x20x") for x in sequences)
  assert not any("2112x" in x for types in both for x in types)


def test_channels_are_split_too():
  spec = arg_specs.ArgSpec(b=4, l=20, d=512, n=1, g=4, source="")
  mesh = AbstractMesh(
    (4, 2),
    ("data", "model"),
    axis_types=(AxisType.Auto,) * 2,
    abstract_device=H100,
  )
  with jax.sharding.use_abstract_mesh(mesh):
    types = kernels(lower(gradient(scan()), shapes(spec)))
  assert len(types) == 2
  for results in types:
    sequences = [x for x in results if x.endswith("bf16")]
    assert sequences
    # Of b, l, g and d // g.
    assert set(sequences) == {"1x20x2x128xbf16"}


def test_remat_runs_the_forward_kernel_twice():
  spec = arg_specs.ArgSpec(b=264, l=20, d=128, n=4, source="")
  with on_h100():
    text = lower(gradient(jax.checkpoint(scan())), shapes(spec))
  # The output of the first is not used in this program.
  assert 2 <= len(kernels(text)) <= 3


def test_vmap_adds_a_dimension_to_the_grid():
  spec = arg_specs.ArgSpec(b=2, l=20, d=128, n=8, g=2, source="")
  mapped = jax.tree.map(
    lambda x: x.update(shape=(3, 2, *x.shape)), shapes(spec)
  )
  with on_h100():
    text = lower(jax.vmap(jax.vmap(gradient(scan()))), mapped)
  assert kernels(text)
  for types in kernels(text):
    assert all(x.startswith("3x2x") for x in types)


def test_it_lowers_in_programs_that_enable_64_bits():
  spec = arg_specs.ArgSpec(b=1, l=500, d=20, n=4, gate=True, source="")
  with jax.enable_x64(True), on_h100():
    text = lower(gradient(scan()), shapes(spec))
  assert kernels(text)


def test_a_million_tokens_lower():
  spec = arg_specs.ArgSpec(b=1, l=1_000_000, d=384, n=16, source="")
  with on_h100():
    text = lower(gradient(scan()), shapes(spec))
  # Too few blocks for one pass: chunks, in two kernels either way.
  assert len(kernels(text)) == 4
  assert largest_array(text) <= spec.l * spec.d * spec.n / 7


def test_a_batch_that_fills_the_device_is_scanned_in_one_pass():
  spec = arg_specs.ArgSpec(b=64, l=10_000, d=384, n=16, source="")
  with on_h100():
    assert len(kernels(lower(scan(), shapes(spec)))) == 1


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_gpu_interpret"])
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype=jnp.float16), r"`u` is float16, it takes bfloat16 and float32"),
    (dict(n=65), r"`A` has 65 states per channel, it takes at most 64"),
    (
      dict(l=8_000_000),
      r"l=8000000.*`u` would have 3072000000 elements.*32-bit.*split the batch",
    ),
  ],
)
def test_what_does_not_fit_is_refused_and_xla_serves_it(name, change, message):
  change = dict(change)
  dtype = change.pop("dtype", jnp.bfloat16)
  sizes = dict(b=1, l=20, d=384, n=16, source="") | change
  arguments = shapes(arg_specs.ArgSpec(**sizes), dtype)
  with on_h100():
    with pytest.raises(pallas_kernels.UnsupportedError, match=message):
      jax.eval_shape(scan(name), arguments)
    assert jax.eval_shape(scan(), arguments).dtype == dtype


def test_float64_is_refused_and_xla_serves_it():
  with jax.enable_x64(True), on_h100():
    arguments = shapes(
      arg_specs.ArgSpec(b=1, l=20, d=8, n=4, source=""), jnp.float64
    )
    with pytest.raises(pallas_kernels.UnsupportedError, match="`u` is float64"):
      jax.eval_shape(scan("mosaic_gpu"), arguments)
    assert jax.eval_shape(scan(), arguments).dtype == jnp.float64


@pytest.mark.parametrize(
  ("kind", "platform", "runs"),
  [
    ("NVIDIA H100 PCIe", "cuda", True),
    ("NVIDIA H200", "gpu", True),
    ("NVIDIA GH200 480GB", "cuda", True),
    ("NVIDIA B200", "cuda", True),
    ("NVIDIA GB300", "cuda", True),
    ("NVIDIA A100-SXM4-80GB", "cuda", False),
    ("NVIDIA GeForce RTX 5090", "cuda", False),
    ("AMD Instinct MI300X", "rocm", False),
    ("TPU v5 lite", "tpu", False),
  ],
)
def test_the_device_decides(kind, platform, runs):
  device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  arguments = shapes(arg_specs.ArgSpec(b=1, l=20, d=8, n=4, source=""))
  refused = pytest.raises(
    pallas_kernels.UnsupportedError,
    match=rf"'mosaic_gpu'.*capability 9.0 or 10.x, not {kind}",
  )
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((1,), ("data",), abstract_device=device)
  ):
    with contextlib.nullcontext() if runs else refused:
      jax.eval_shape(scan("mosaic_gpu"), arguments)
    # Under None it falls back, and under no circumstances to the interpreter.
    text = str(jax.make_jaxpr(scan())(arguments))
  assert ("custom_vjp_call" in text) == runs  # xla_associative has none.


@pytest.mark.parametrize(
  ("kind", "lacks"),
  [
    ("NVIDIA A100-SXM4-80GB", r"of 8.0 \(it has no TMA"),
    ("NVIDIA GeForce RTX 5090", r"of 12.0 \(.*99 KiB of shared memory.*126\)"),
  ],
)
def test_what_another_device_lacks_is_said(kind, lacks):
  device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
  assert re.search(lacks, mosaic_gpu.why_not_device(device))


def test_the_choice_and_its_reason_are_logged(caplog):
  dispatch._log_choice.cache_clear()
  arguments = shapes(arg_specs.ArgSpec(b=1, l=20, d=8, n=65, source=""))
  with caplog.at_level("INFO", logger="pallas_kernels"), on_h100():
    jax.eval_shape(scan(), arguments)
  (line,) = [r.message for r in caplog.records]
  assert "'xla_associative'" in line
  assert "'mosaic_gpu': `A` has 65 states" in line


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_many_states_of_odd_widths_go_elsewhere_in_bfloat16(dtype):
  spec = arg_specs.ArgSpec(b=2, l=9, d=147, n=40, source="")
  with on_h100():
    text = lower(gradient(scan()), shapes(spec, dtype))
    assert bool(kernels(text)) == (dtype == jnp.float32)
    if dtype == jnp.bfloat16:
      with pytest.raises(
        pallas_kernels.UnsupportedError, match="at most 32 states"
      ):
        lower(scan("mosaic_gpu"), shapes(spec, dtype))


def test_short_copies_of_a_backward_tile_are_refused():
  with pytest.raises(ValueError, match="`backward_tile` must be at least 8"):
    mosaic_gpu_backward_plan.Plan(
      b=1,
      l=8,
      g=1,
      e=8,
      softplus=True,
      reverse=False,
      tile=4,
      tiles_per_chunk=2,
      n=4,
    )
