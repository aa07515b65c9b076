"""Models as ONNX programs, run by ONNX Runtime."""

import sys

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import export_test
import vimjax
from vimjax import export, onnx_graph, onnx_program

onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip(
  "onnxruntime", reason="needs the extra `dev`, for ONNX Runtime"
)


def _session(data):
  onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
  return onnxruntime.InferenceSession(data)


def _run(session, images):
  (logits,) = session.run(["logits"], {"images": images})
  return logits


MODELS = export_test.MODELS | {
  # As the command writes it: the layers in a loop, with the scan's in it.
  "vim": lambda: vimjax.Vim(
    depth=2, embed_dim=16, num_classes=4, scan_layers=True
  ),
  "vmamba": lambda: vimjax.VMamba(depths=(1, 1), embed_dim=8, num_classes=4),
  "mamba2": lambda: vimjax.VMamba(
    depths=(1,), embed_dim=16, mixer="ssd", state_size=4, num_classes=4
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_program_gives_the_logits_for_any_batch(name):
  model = MODELS[name]()
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 64, 32, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  # Logits of the usual size, so that the tolerance says something.
  variables["params"]["head"]["kernel"] *= 50
  session = _session(export.export_onnx(model, variables, image_size=(64, 32)))
  (given,), (made,) = session.get_inputs(), session.get_outputs()
  assert (given.name, given.shape) == ("images", ["batch", 64, 32, 3])
  assert (made.name, made.shape) == ("logits", ["batch", 4])
  want = np.asarray(jax.jit(model.apply)(variables, images))
  assert np.abs(want).max() > 0.1
  for batch in (1, 3):
    got = _run(session, images[:batch])
    assert got.shape == (batch, 4)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want[:batch], rtol=0, atol=1e-4)


def _loop(x):
  """Sums over the rows so far from below, which stay, and their last."""
  rows = jnp.moveaxis(x, 1, 0)
  step = lambda total, row: (total + row, jnp.tanh(total) * row)
  last, sums = lax.scan(step, jnp.zeros_like(rows[0]), rows, reverse=True)
  (kept,), _ = lax.scan(lambda c, r: ((c[0] * r,), None), (last,), rows)
  return jnp.concatenate([jnp.moveaxis(sums, 0, 1), kept[:, None]], 1)


def _convolve(x):
  kernel = jnp.arange(3 * 2 * 1 * 6.0).reshape(3, 2, 1, 6)
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(2, 1),
    padding=((1, 2), (0, 1)),
    rhs_dilation=(1, 2),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=3,
  )


_TABLE = jnp.arange(6.0)
# Of images (b, 4, 6, 3), where the models have such an operation or may.
OPERATIONS = {
  "log1p keeps small values": lambda x: 1e6 * jnp.log1p(jnp.exp(-15 + x)),
  "elementwise": lambda x: lax.rsqrt(x**2 + 1) ** 3 + lax.erfc(x) + lax.erf(x),
  "chosen": lambda x: jnp.where((x > 0) & (x != 1) | ~(x <= -1), x, x[:, :1]),
  "padded and cut": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)))[
    :, 1:-1, ::2
  ],
  "negative padding": lambda x: lax.pad(
    x, 7.0, ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 0, 0))
  ),
  "small numbers": lambda x: (
    jnp.expm1(1e-4 * x) + 1e4 * jnp.clip(x, -0.5, 0.5).prod(-1, keepdims=True)
  ),
  "tiled": lambda x: sum(jnp.unstack(jnp.tile(x, (1, 2, 1, 1)), axis=2)),
  "a slice that stays inside": lambda x: lax.dynamic_slice(
    x, (0, 3, 1, 0), (x.shape[0], 2, 2, 3)
  ),
  "reversed": lambda x: x[:, ::-1, :, ::-1] + jnp.cumsum(x, 2),
  "backward sums": lambda x: lax.cumsum(x, 2, reverse=True),
  "one place": lambda x: x[:, 2, :, 1],
  "some places": lambda x: x[:, np.array([3, 0, 1])],
  "places in two dimensions": lambda x: x[
    :, np.array([[3, 0]]), :, np.array([[1, 2]])
  ],
  "products": lambda x: (
    jnp.einsum("bhwc,bvwc->bwhv", x, x) - x[:, 0, :, None, :1]
  ),
  "dense": lambda x: x @ jnp.ones((3, 2)) - (x.min(-1) * x.max(-1))[..., None],
  "merged batch": lambda x: (
    x.reshape(x.shape[0] * 2, 2, 6, 3)
    + jnp.broadcast_to(_TABLE[:, None], (x.shape[0] * 2, 2, 6, 3))
  ).reshape(x.shape),
  "types": lambda x: (x > 0).astype(jnp.int32).sum((1, 2)) / 7,
  "parts": lambda x: jnp.concatenate(jnp.split(x, [1, 4], axis=2)[::-1], 2),
  "windows": lambda x: jnp.stack(
    [x[:, i : i + 2, ::2, 1] for i in range(3)], 1
  ),
  "scattered windows": lambda x: jax.vmap(
    lambda i: lax.dynamic_slice_in_dim(x, i, 2, axis=2)
  )(np.array([4, 0, 1])),
  "loop": _loop,
  "convolution": _convolve,
  "checkpoint": lambda x: jax.checkpoint(jnp.sin)(x) + jnp.squeeze(x[:, :1], 1),
  "constant": lambda x: jnp.ones((x.shape[0], 2)) * jnp.sort(_TABLE)[:2],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_jax(name):
  if name == "checkpoint":
    function = lambda x: OPERATIONS[name](x[:, :1])
  else:
    function = OPERATIONS[name]
  rng = np.random.default_rng(0)
  images = rng.standard_normal((5, 4, 6, 3), np.float32)
  got = _run(_session(onnx_program.write(function, (4, 6, 3))), images)
  want = np.asarray(function(jnp.asarray(images)))
  assert got.shape == want.shape
  assert got.dtype == want.dtype
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (lambda x: jnp.sort(x), "`sort` of the model: it is not among the known"),
    (lambda x: x.mean(0), "`dim_as_value` of the model"),
    (
      lambda x: _TABLE[(x[:, 0, 0, 0] > 0).astype(int)],
      "`gather` of the model: its indices depend on the images",
    ),
    (
      lambda x: lax.pad(x, 0.0, ((0, 0, 1), *[(0, 0, 0)] * 3)),
      "`pad` of the model: it pads between elements",
    ),
    (
      lambda x: lax.while_loop(lambda s: s.sum() < 9, lambda s: 2 * s, x),
      "`while` of the model",
    ),
  ],
)
def test_an_unknown_operation_is_named(function, message):
  with pytest.raises(pallas_kernels.UnsupportedError, match=message):
    onnx_program.write(function, (4, 6, 3))


def test_weights_beyond_two_gigabytes_are_refused(monkeypatch):
  monkeypatch.setattr(onnx_graph, "_MOST_BYTES", 4000)
  weights = np.ones(1001, np.float32)
  with pytest.raises(pallas_kernels.UnsupportedError, match="2 GB"):
    onnx_program.write(lambda x: x.sum() * weights, (4, 6, 3))


def test_other_dtypes_are_refused():
  model = export_test.MODELS["deit"]().clone(dtype="bfloat16")
  with pytest.raises(ValueError, match="float32, got dtype=bfloat16"):
    export.export_onnx(model, {}, image_size=32)


def test_command_writes_a_checkpoint_as_onnx(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(export.registry, "create_model", export_test.create_small)
  model = export_test.create_small("vim_tiny", num_classes=7)
  images = np.ones((2, 64, 64, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  vimjax.save_variables(tmp_path / "w.safetensors", variables)
  monkeypatch.chdir(tmp_path)
  argv = ["vim_tiny", "--weights", "w.safetensors", "--size", "64"]
  assert export.main([*argv, "--format", "onnx"]) == 0
  assert "wrote vim_tiny.onnx" in capsys.readouterr().out
  session = _session((tmp_path / "vim_tiny.onnx").read_bytes())
  want = jax.jit(model.apply)(variables, images)
  np.testing.assert_allclose(_run(session, images), want, rtol=0, atol=1e-4)


def test_without_the_extra_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ModuleNotFoundError, match=r"vimjax\[onnx\]"):
    onnx_program.write(lambda x: x, (4, 6, 3))
