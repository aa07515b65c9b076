"""The cross selective scan: one suite for all implementations."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.cross_selective_scan import (
  api,
  arg_specs,
  arguments,
  mosaic_gpu,
  mosaic_gpu_image,
  reference,
)
from pallas_kernels.selective_scan import tuning

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "vmamba"
KERNELS = (
  "mosaic_gpu_interpret",
  pytest.param(
    "mosaic_gpu",
    marks=[
      pytest.mark.gpu,
      pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"
      ),
    ],
  ),
)
XLA = ("xla_sequential", "xla_associative")
# Channels for two blocks of a kernel.
TWO_BLOCKS = dict(b=1, h=2, w=3, d=130, n=1)
OPTIMISED = (*XLA, *KERNELS)


def _arrays(b=2, h=3, w=5, d=4, n=3, seed=0):
  """Float32 arguments whose states neither vanish nor blow up."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "u": normal(b, h, w, d),
    "delta": normal(b, h, w, 4, d) - 1,
    "A": -np.exp(normal(4, d, n)),
    "B": normal(b, h, w, 4, n),
    "C": normal(b, h, w, 4, n),
    "D": normal(4, d),
    "delta_bias": normal(4, d),
  }


def _by_hand(u, delta, A, B, C, D=None, delta_bias=None, softplus=True):
  """The definition in float64, token by token, over the official orders."""
  (b, h, w, d), total = u.shape, 0.0
  orders = json.loads((GOLDEN / "scan_orders.json").read_text())[f"{h}x{w}"]
  u, delta, A, B, C = (np.float64(x) for x in (u, delta, A, B, C))
  if delta_bias is not None:
    delta = delta + delta_bias
  if softplus:
    delta = np.log1p(np.exp(delta))
  for k, order in enumerate(orders):
    y = np.zeros((b, h, w, d))
    state = np.zeros((b, d, A.shape[-1]))
    for position in order:
      i, j = divmod(position, w)
      step = delta[:, i, j, k, :, None]
      enter = step * u[:, i, j, :, None] * B[:, i, j, k, None, :]
      state = np.exp(step * A[k]) * state + enter
      y[:, i, j] = (state * C[:, i, j, k, None, :]).sum(-1)
    total = total + y + (0.0 if D is None else np.float64(D[k]) * u)
  return total


def _scan(arrays, implementation=None, softplus=True):
  return pallas_kernels.cross_selective_scan(
    **arrays, delta_softplus=softplus, implementation=implementation
  )


def _value_and_gradients(implementation, softplus, arrays):
  """The result, and gradients of a loss that no permutation leaves alone."""

  def loss(arrays):
    y = _scan(arrays, implementation, softplus)
    weights = jnp.arange(y.size) * 7 % 13 - 6  # Exact in every dtype.
    weights = weights.astype(y.dtype).reshape(y.shape)
    return (weights * y).sum(), y

  (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
  return y, gradients


def _assert_close(got, want, relative, name=""):
  got, want = np.float64(got), np.float64(want)
  assert got.shape == want.shape, name
  assert np.isfinite(got).all(), name
  error = np.abs(got - want).max() / np.abs(want).max()
  assert error <= relative, f"{name}: {error:.3g}"


def test_orders_are_the_official_ones():
  for size, want in json.loads(
    (GOLDEN / "scan_orders.json").read_text()
  ).items():
    h, w = map(int, size.split("x"))
    np.testing.assert_array_equal(reference.orders(h, w), want)


@pytest.mark.parametrize("implementation", ["reference", *OPTIMISED])
@pytest.mark.parametrize(
  ("sizes", "absent", "softplus"),
  [
    (dict(h=3, w=2), (), True),
    (dict(h=5, w=7, n=1), ("D",), True),
    (dict(h=1, w=4, d=1), ("delta_bias",), True),
    (dict(h=4, w=1, b=1), ("D", "delta_bias"), False),
  ],
)
def test_equals_the_definition(implementation, sizes, absent, softplus):
  arrays = {k: v for k, v in _arrays(**sizes).items() if k not in absent}
  if not softplus:
    arrays["delta"] = np.abs(arrays["delta"])
  got = _scan(arrays, implementation, softplus)
  assert got.dtype == jnp.float32
  # On a GPU exponentials are approximations, the softplus good to 3e-6.
  close = 1e-5 if implementation == "mosaic_gpu" else 1e-6
  _assert_close(got, _by_hand(**arrays, softplus=softplus), close)


@functools.cache
def _exact(**sizes):
  """Result and gradients of the reference in float64."""
  with jax.enable_x64(True):
    arrays = jax.tree.map(np.float64, _arrays(**sizes))
    run = functools.partial(_value_and_gradients, "reference", True)
    return jax.tree.map(np.asarray, jax.jit(run)(arrays))


@functools.cache
def _compiled(implementation):
  return jax.jit(functools.partial(_value_and_gradients, implementation, True))


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_equal_those_of_the_definition(implementation, n):
  _check_gradients(implementation, dict(n=n))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
  "sizes",
  [
    dict(b=1, h=17, w=1, n=1),  # Two tiles in a line, and tiles of one token.
    TWO_BLOCKS,
    dict(b=1, h=2, w=9, d=3, n=3),  # Channels and states to be padded.
  ],
  ids=str,
)
def test_gradients_of_kernels_equal_the_definition(implementation, sizes):
  _check_gradients(implementation, sizes)


def _check_gradients(implementation, sizes):
  want_y, want = _exact(**sizes)
  y, got = _compiled(implementation)(_arrays(**sizes))
  _assert_close(y, want_y, 1e-6)
  for name in want:
    assert got[name].dtype == jnp.float32
    _assert_close(got[name], want[name], 1e-5, name)


def _narrowed(arrays):
  """In bfloat16, except for the parameters, and the same in float32."""
  narrow = {
    k: jnp.asarray(v, jnp.bfloat16 if k in ("u", "delta", "B", "C") else None)
    for k, v in arrays.items()
  }
  return narrow, jax.tree.map(lambda x: x.astype(jnp.float32), narrow)


@pytest.mark.parametrize("implementation", [None, *KERNELS])
def test_bfloat16_is_rounded_once(implementation):
  narrow, widened = _narrowed(_arrays(h=3, w=4))
  got = _scan(narrow, implementation)
  assert got.dtype == jnp.bfloat16
  # Everything inside is float32: only the result loses digits.
  want = _scan(widened, "reference").astype(jnp.bfloat16)
  _assert_close(got, want, 2**-8)
  assert np.mean(np.asarray(got != want)) < 0.1


@pytest.mark.parametrize(("h", "w", "n"), [(3, 4, 1), (4, 3, 4)])
def test_gradients_of_images_in_chunks(monkeypatch, h, w, n):
  config = tuning.Config(tile=8, chunks=2)
  monkeypatch.setattr(mosaic_gpu, "config_for", lambda *_, **__: config)
  _check_gradients("mosaic_gpu_interpret", dict(b=1, h=h, w=w, n=n))


def test_a_chunk_has_a_row_and_a_column():
  chunks = mosaic_gpu_image.chunks_for
  assert chunks(56, 56, 8) == 8
  assert chunks(7, 7, 6) == 4  # Of two lines, the last of one.
  assert chunks(9, 4, 4) == 2
  assert chunks(1, 40, 5) == 1


@pytest.mark.parametrize("implementation", KERNELS)
def test_gradients_in_bfloat16_are_rounded_once(implementation):
  narrow, widened = _narrowed(_arrays(**TWO_BLOCKS))
  _, got = _compiled(implementation)(narrow)
  _, want = _compiled("reference")(widened)
  for name, x in narrow.items():
    assert got[name].dtype == x.dtype, name
    rounded = want[name].astype(x.dtype)
    tolerance = 2**-8 if x.dtype == jnp.bfloat16 else 1e-5
    _assert_close(got[name], rounded, tolerance, name)


@pytest.mark.parametrize("implementation", KERNELS)
def test_the_same_inputs_give_the_same_bits(implementation):
  run, arrays = _compiled(implementation), _arrays(**TWO_BLOCKS)
  first, second = (jax.tree.leaves(run(arrays)) for _ in range(2))
  for x, y in zip(first, second, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_under_vmap_and_without_images(implementation):
  scan = functools.partial(_scan, implementation=implementation)
  arrays = _arrays(b=2, h=2, w=2, n=1)
  mapped = jax.tree.map(lambda x: np.stack([x, x[::-1]]), arrays)
  got = jax.jit(jax.vmap(scan))(mapped)
  for i in range(2):
    each = jax.tree.map(lambda x, i=i: x[i], mapped)
    _assert_close(got[i], _scan(each, "reference"), 1e-6)
  empty = {
    k: x[:0] if k in ("u", "delta", "B", "C") else x for k, x in arrays.items()
  }
  assert scan(empty).shape == (0, 2, 2, 4)


def test_vmap_and_remat_change_nothing():
  arrays = _arrays(b=4)
  split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arrays)
  shared = {k: arrays[k] for k in ("A", "D", "delta_bias")}
  each = {k: split[k] for k in arrays if k not in shared}
  want = _scan(arrays)
  got = jax.vmap(lambda x: _scan({**x, **shared}))(each)
  _assert_close(got.reshape(want.shape), want, 1e-6)

  gradient = lambda scan: jax.jit(jax.grad(lambda x: jnp.sin(scan(x)).sum()))
  want_gradient = gradient(_scan)(arrays)
  got_gradient = gradient(jax.checkpoint(_scan))(arrays)
  chex.assert_trees_all_equal_shapes_and_dtypes(got_gradient, want_gradient)
  for name, want in want_gradient.items():
    _assert_close(got_gradient[name], want, 1e-5, name)


def test_u_is_neither_transposed_nor_flipped():
  text = jax.jit(_scan).lower(_arrays(b=2, h=3, w=5, d=4)).as_text()
  assert "stablehlo.while" in text
  assert "stablehlo.reverse" not in text
  assert "stablehlo.gather" not in text
  transposed = [
    line
    for line in text.splitlines()
    if "stablehlo.transpose" in line and "-> tensor<2x5x3x4xf32>" in line
  ]
  assert not transposed


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_splits_batch_and_channels_without_gathering(axis_type):
  arrays = _arrays(b=4, d=4, n=2)
  gradient = jax.grad(lambda x: jnp.sin(_scan(x)).sum())
  want = jax.jit(gradient)(arrays)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  axes = {"b": "data", "d": "model"}
  with jax.set_mesh(mesh):
    placed = {
      name: jax.device_put(
        arrays[name], jax.NamedSharding(mesh, jax.P(*map(axes.get, layout)))
      )
      for name, layout in arguments.LAYOUTS.items()
    }
    compiled = jax.jit(gradient).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(placed)
  for name in want:
    assert got[name].sharding.shard_shape(got[name].shape) == placed[
      name
    ].sharding.shard_shape(got[name].shape)
    _assert_close(got[name], want[name], 1e-5, name)


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu_interpret"])
def test_gradients_of_gradients_are_refused(implementation):
  gradient = jax.grad(lambda x: _scan(x, implementation).sum())
  with pytest.raises(
    pallas_kernels.UnsupportedError, match="first derivatives only"
  ):
    jax.eval_shape(jax.grad(lambda x: gradient(x)["A"].sum()), _arrays())


def test_nan_propagates():
  arrays = _arrays()
  arrays["u"][0, 1, 1, 2] = np.nan
  y = np.asarray(_scan(arrays))
  assert np.isnan(y[0, 1, 1, 2])
  assert np.isfinite(y[1]).all()
  assert np.isfinite(y[0, ..., :2]).all()


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (
      {"u": np.zeros((2, 15, 4))},
      ValueError,
      r"`u` must have shape \(b, h, w, d\), got \(2, 15, 4\)",
    ),
    ({"A": np.zeros((4, 4))}, ValueError, r"`A` must have shape \(k, d, n\)"),
    (
      {"delta": np.zeros((2, 3, 5, 2, 4))},
      ValueError,
      r"`delta` must have shape \(b, h, w, k, d\) = \(2, 3, 5, 4, 4\)",
    ),
    (
      {"B": np.zeros((2, 5, 3, 4, 3))},
      ValueError,
      r"`B` must have shape .* got \(2, 5, 3, 4, 3\)",
    ),
    ({"D": np.zeros((4,))}, ValueError, r"`D` must have shape \(k, d\)"),
    ({"u": np.zeros((2, 0, 5, 4))}, ValueError, "at least one row"),
    ({"C": None}, TypeError, "`C` must be an array, got NoneType"),
    (
      {"delta_bias": np.zeros((4, 4), np.int32)},
      TypeError,
      "`delta_bias` must have one of the dtypes .* got int32",
    ),
    ({"implementation": "cuda"}, ValueError, "Unknown implementation 'cuda'"),
  ],
)
def test_wrong_calls_say_what_was_wanted(change, error, message):
  with pytest.raises(error, match=message):
    pallas_kernels.cross_selective_scan(**{**_arrays(), **change})


def test_cpus_take_the_sequential_form():
  impl = dispatch.choose("cross_selective_scan", api.IMPLEMENTATIONS, None)
  assert impl is api.IMPLEMENTATIONS["xla_sequential"]


@pytest.mark.parametrize("name", arg_specs.ARG_SPECS)
def test_shapes_of_real_models_are_accepted(name):
  spec = arg_specs.ARG_SPECS[name]
  out = jax.eval_shape(
    lambda: _scan(arg_specs.make_arguments(spec, dtype=jnp.bfloat16))
  )
  assert out.shape == (spec.b, spec.h, spec.w, spec.d)
  assert out.dtype == jnp.bfloat16


def test_random_arguments_have_the_dtypes_that_models_use():
  spec = arg_specs.ArgSpec(b=1, h=2, w=3, d=4, n=2, source="a test")
  arrays = arg_specs.make_arguments(spec, dtype=jnp.bfloat16)
  narrow = {name for name, x in arrays.items() if x.dtype == jnp.bfloat16}
  assert narrow == {"u", "delta", "B", "C"}
  assert np.isfinite(np.float32(_scan(arrays))).all()
