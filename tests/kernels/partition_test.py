"""The selective scan on meshes of eight virtual devices."""

import dataclasses
import functools

import chex
import jax
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
import pytest

import pallas_kernels
from pallas_kernels import partition
from pallas_kernels.selective_scan import (
  api,
  arg_specs,
  arguments,
  mosaic_gpu,
  mosaic_gpu_common,
)
from tests.kernels import selective_scan_suite as suite

P = jax.P
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
IMPLEMENTATIONS = ("xla_sequential", "xla_associative", "reference")
_OPTIONS = (("delta_softplus", True),)
_OPTIONAL = ("D", "z", "delta_bias", "initial_state")
_EVEN = suite.Case((8, 5, 8, 2, 2), _OPTIONAL, _OPTIONS)
_ODD = suite.Case((1, 5, 6, 2, 3), _OPTIONAL, _OPTIONS)


def _mesh(kind, **axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
  )


def _layout(name):
  return {"dy": "bld", "dstate": "bdn", **arguments.LAYOUTS}[name]


def _place(mesh, arrays, **by_letter):
  """Puts arrays on the mesh, split along the dimensions with these letters."""
  axes = {"b": by_letter.get("b"), "d": by_letter.get("d")}
  place = lambda name, x: jax.device_put(
    x, NamedSharding(mesh, P(*(axes.get(letter) for letter in _layout(name))))
  )
  return {name: place(name, x) for name, x in arrays.items()}


def _run(implementation, case, arrays):
  # Traced anew: whether there is a mesh is no part of jit's cache key here.
  run = functools.partial(suite.run, implementation, case.options)
  return jax.jit(run)(arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("kind", "axes", "split"),
  [
    (AUTO, {"data": 8}, {"b": "data"}),
    (AUTO, {"data": 4, "model": 2}, {"b": "data", "d": "model"}),
    (EXPLICIT, {"data": 4, "model": 2}, {"b": "data", "d": "model"}),
  ],
  ids=["auto", "auto_channels", "explicit"],
)
def test_a_mesh_changes_no_result(implementation, kind, axes, split):
  mesh = _mesh(kind, **axes)
  arrays = suite.make_arrays(_EVEN)
  with jax.set_mesh(mesh):
    got = _run(implementation, _EVEN, _place(mesh, arrays, **split))
  suite.assert_matches(got, suite.expected(_EVEN))
  wanted = NamedSharding(mesh, P(*(split.get(letter) for letter in "bld")))
  assert got[0]["y"].sharding.is_equivalent_to(wanted, 3)


def test_explicit_axes_come_with_the_arrays_where_no_mesh_is_set():
  arrays = suite.make_arrays(_EVEN)
  placed = _place(_mesh(EXPLICIT, data=8), arrays, b="data")
  got = _run(None, _EVEN, placed)
  suite.assert_matches(got, suite.expected(_EVEN))
  assert len(got[0]["y"].addressable_shards[0].data) == 1

  # Outside of jit too, the parameters being on one device as they were made.
  del placed["dy"], placed["dstate"]
  placed |= {name: jnp.asarray(arrays[name]) for name in ("A", "D")}
  y = pallas_kernels.selective_scan(**placed, **dict(_EVEN.options))
  chex.assert_trees_all_close(y, got[0]["y"], rtol=1e-5, atol=1e-6)
  assert y.sharding == got[0]["y"].sharding


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_a_mesh_changes_no_result_of_the_interpreted_kernels(kind, monkeypatch):
  # Without race detection, which is for one device: it knows no order between
  # what several do. Nor is the check at the end of a kernel, that all barriers
  # are gone, those of the other devices included.
  monkeypatch.setattr(
    shared_memory.GPUSharedMemory,
    "assert_no_barriers_allocated",
    lambda self: None,
  )
  interpreted = functools.partial(
    mosaic_gpu.selective_scan, interpret=mosaic_gpu_common.Interpret()
  )
  impl = api.IMPLEMENTATIONS["mosaic_gpu_interpret"]
  monkeypatch.setitem(
    api.IMPLEMENTATIONS,
    "mosaic_gpu_interpret",
    dataclasses.replace(impl, function=interpreted),
  )
  case = suite.Case((8, 3, 4, 2, 2), ("D",), _OPTIONS)
  mesh = _mesh(kind, data=8)
  arrays = suite.make_arrays(case)
  with jax.set_mesh(mesh):
    placed = _place(mesh, arrays, b="data")
    got = _run("mosaic_gpu_interpret", case, placed)
  suite.assert_matches(got, suite.expected(case))
  assert len(got[0]["y"].addressable_shards[0].data) == 1


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_sizes_that_do_not_divide_run_unsplit(kind):
  mesh = _mesh(kind, data=4, model=2)
  arrays = suite.make_arrays(_ODD)
  with jax.set_mesh(mesh):
    # Two shards divide six channels, but not three groups.
    placed = _place(mesh, arrays, d="model")
    got = _run("xla_sequential", _ODD, placed)
  suite.assert_matches(got, suite.expected(_ODD))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_of_the_sequences_is_gathered(implementation):
  mesh = _mesh(AUTO, data=8)
  arrays = _place(mesh, suite.make_arrays(_EVEN), b="data")
  with jax.set_mesh(mesh):
    run = functools.partial(suite.run, implementation, _EVEN.options)
    text = jax.jit(run).lower(arrays).compile().as_text()
  assert "all-reduce" in text  # dA and its like are summed over the shards.
  assert "all-gather" not in text
  assert "all-to-all" not in text


def _sharded_loss(mesh, *, inside):
  """Gradients by every array, taken inside or outside `shard_map`."""
  names = [*suite.make_arrays(_EVEN)]
  split = lambda name: P("data") if _layout(name)[0] == "b" else P()
  specs = {name: split(name) for name in names}

  def loss(implementation, arrays):
    arrays = dict(arrays)
    dy, dstate = arrays.pop("dy"), arrays.pop("dstate")
    y, state = pallas_kernels.selective_scan(
      **arrays,
      **dict(_EVEN.options),
      return_final_state=True,
      implementation=implementation,
    )
    local = (y * dy).sum() + (state * dstate).sum()
    return jax.lax.psum(local, "data")

  def gradients(implementation, arrays):
    function = functools.partial(loss, implementation)
    if inside:
      return jax.shard_map(
        jax.grad(function), mesh=mesh, in_specs=(specs,), out_specs=specs
      )(arrays)
    function = jax.shard_map(
      function, mesh=mesh, in_specs=(specs,), out_specs=P()
    )
    return jax.grad(function)(arrays)

  return jax.jit(gradients, static_argnums=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_gradients_under_the_callers_shard_map(implementation, inside):
  mesh = _mesh(AUTO, data=8)
  got = _sharded_loss(mesh, inside=inside)(
    implementation, suite.make_arrays(_EVEN)
  )
  outputs, want = suite.expected(_EVEN)
  got = {name: got[name] for name in want}  # Without the cotangents' own.
  suite.assert_matches((outputs, got), (outputs, want))


def test_axes_that_the_caller_leaves_are_split():
  """Manual over data, Auto over model: the op splits the channels."""
  mesh = _mesh(AUTO, data=4, model=2)
  arrays = suite.make_arrays(_EVEN)
  del arrays["dy"], arrays["dstate"]
  split = lambda name: P("data") if _layout(name)[0] == "b" else P()
  scan = lambda arrays: pallas_kernels.selective_scan(
    **arrays, **dict(_EVEN.options)
  )
  with jax.set_mesh(mesh):
    y = jax.jit(
      jax.shard_map(
        scan,
        in_specs=({name: split(name) for name in arrays},),
        out_specs=P("data"),
        axis_names={"data"},
      )
    )(arrays)
  want = suite.expected(_EVEN)[0]["y"]
  suite.tolerances.assert_close(y, want, suite.tolerances.FORWARD["float32"])


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_vmap_on_a_mesh(kind):
  mesh = _mesh(kind, data=8)
  arrays = suite.make_arrays(_EVEN)
  run = functools.partial(suite.run, "xla_sequential", _EVEN.options)
  with jax.set_mesh(mesh):
    placed = _place(mesh, arrays, b="data")
    both = {k: jnp.stack([x, 0.5 * x]) for k, x in placed.items()}
    got = jax.jit(jax.vmap(run))(both)
  first = jax.tree.map(lambda x: x[0], got)
  suite.assert_matches(first, suite.expected(_EVEN))
  halves = {k: 0.5 * x for k, x in arrays.items()}
  want = jax.jit(run)(halves)
  suite.assert_matches(jax.tree.map(lambda x: x[1], got), want)


@pytest.mark.parametrize(
  ("axes", "shape", "batch", "channels"),
  [
    ({"data": 8}, (16, 4, 2), ("data",), ()),
    ({"data": 8}, (12, 4, 2), (), ()),
    ({"data": 4, "model": 2}, (8, 4, 1), ("data",), ("model",)),
    ({"data": 4, "model": 2}, (8, 4, 2), ("data",), ("model",)),
    ({"data": 2, "fsdp": 4}, (8, 4, 1), ("data", "fsdp"), ()),
    ({"data": 2, "fsdp": 4}, (2, 4, 1), ("data",), ()),
    ({"data": 2, "sequence": 4}, (8, 4, 1), ("data",), ()),
    # Three groups on two shards: none would hold whole ones.
    ({"data": 4, "tensor": 2}, (4, 6, 3), ("data",), ()),
    ({"data": 4, "channel": 2}, (1, 6, 1), (), ("channel",)),
  ],
)
def test_auto_axes_split_by_their_names(axes, shape, batch, channels):
  b, d, g = shape
  spec = arg_specs.ArgSpec(b=b, l=2, d=d, n=1, g=g, source="")
  arrays = arg_specs.make_arguments(spec)
  mesh = AbstractMesh(
    tuple(axes.values()), tuple(axes), axis_types=(AUTO,) * len(axes)
  )
  with jax.sharding.use_abstract_mesh(mesh):
    split = partition.plan(arrays, arguments.LAYOUTS, "u")
  assert split is not None
  assert split.mesh_axes == set(axes)
  assert split.spec("bld") == P(batch or None, None, channels or None)
  groups = channels if g > 1 else ()
  assert split.spec("blgn") == P(batch or None, None, groups or None, None)
  assert split.spec("dn") == P(channels or None, None)


def test_without_a_mesh_or_with_one_device_nothing_is_split():
  arrays = arg_specs.make_arguments(
    arg_specs.ArgSpec(b=8, l=2, d=4, n=1, source="")
  )
  assert partition.plan(arrays, arguments.LAYOUTS, "u") is None
  mesh = AbstractMesh((1,), ("data",), axis_types=(AUTO,))
  with jax.sharding.use_abstract_mesh(mesh):
    assert partition.plan(arrays, arguments.LAYOUTS, "u") is None
