"""Models as portable programs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vimjax
from vimjax import export

MODELS = {
  "vim": lambda: vimjax.Vim(depth=2, embed_dim=16, num_classes=4),
  "deit": lambda: vimjax.DeiT(
    depth=2, embed_dim=16, num_heads=2, num_classes=4
  ),
  "vmamba": lambda: vimjax.VMamba(
    depths=(1, 1, 1, 1), embed_dim=8, num_classes=4
  ),
  "mambavision": lambda: vimjax.MambaVision(
    dim=8, in_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4), num_classes=4
  ),
}


def create_small(name, **fields):
  """A published model with one layer."""
  return vimjax.create_model(name, **{"depth": 1, **fields})


@pytest.mark.parametrize(
  ("name", "batches"),
  # Two sizes once: every size is a compilation.
  [("vim", (1, 3)), ("deit", (3,)), ("vmamba", (3,)), ("mambavision", (3,))],
)
def test_a_loaded_program_gives_the_logits_for_any_batch(name, batches):
  model = MODELS[name]()
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 64, 32, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  data = export.export_model(model, variables, image_size=(64, 32))
  program = jax.jit(export.load_exported(data))
  apply = jax.jit(model.apply)
  for batch in batches:
    got = program(images[:batch])
    want = apply(variables, images[:batch])
    assert got.shape == (batch, 4)
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_damaged_programs_are_a_clear_error():
  with pytest.raises(ValueError, match="This is no exported program"):
    export.load_exported(b"something else")


def test_command_exports_a_checkpoint(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(export.registry, "create_model", create_small)
  model = create_small("vim_tiny", num_classes=7)
  images = np.ones((2, 64, 64, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  weights, output = tmp_path / "w.safetensors", tmp_path / "vim.stablehlo"
  vimjax.save_variables(weights, variables)
  argv = ["vim_tiny", "--weights", str(weights), "--output", str(output)]
  assert export.main([*argv, "--size", "64"]) == 0
  assert "images of 64x64" in capsys.readouterr().out
  got = export.load_exported(output.read_bytes())(images)
  want = jax.jit(model.apply)(variables, images)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  weights.unlink()
  assert export.main(argv) == 1
  assert "error: " in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  with pytest.raises(ModuleNotFoundError, match=r"vimjax\[export\]"):
    export.load_exported(b"")
