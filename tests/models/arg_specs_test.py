"""The shapes that the op is tested and timed with are those of the models."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.selective_scan import arg_specs
import vimjax


@pytest.mark.parametrize(
  ("spec", "name", "size"),
  [("vim_tiny_224", "vim_tiny", 224), ("vim_tiny_1248", "vim_tiny", 1248)],
)
def test_models_make_the_calls_of_the_specs(spec, name, size, monkeypatch):
  want = arg_specs.ARG_SPECS[spec]
  calls = []
  op = pallas_kernels.selective_scan

  @functools.wraps(op)
  def recorded(u, delta, A, B, C, D=None, **options):
    calls.append((u, delta, A, B, C, D, options))
    return op(u, delta, A, B, C, D, **options)

  monkeypatch.setattr(pallas_kernels, "selective_scan", recorded)
  model = vimjax.create_model(name, depth=1)
  images = jax.ShapeDtypeStruct((want.b, size, size, 3), jnp.float32)
  jax.eval_shape(model.init, jax.random.key(0), images)

  assert [call[-1]["reverse"] for call in calls] == [False, True]
  for u, delta, A, B, C, D, options in calls:
    assert u.shape == delta.shape == (want.b, want.l, want.d)
    assert A.shape == (want.d, want.n)
    assert B.shape == C.shape == (want.b, want.l, want.n)
    assert want.g == 1
    assert D.shape == options["delta_bias"].shape == (want.d,)
    assert options["delta_softplus"]
    assert (options.get("z") is not None) == want.gate
