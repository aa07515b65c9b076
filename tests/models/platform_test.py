"""What models do otherwise on CPUs than elsewhere gives the same numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.layers import basic, cross_scan

_SMALL = {
  "vim": lambda: vimjax.Vim(
    num_classes=3, depth=2, embed_dim=16, image_size=32
  ),
  "vmamba": lambda: vimjax.VMamba(num_classes=3, depths=(1, 1), embed_dim=8),
}


def _h100():
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  )


def test_products_of_all_directions_at_once_equal_those_one_by_one(monkeypatch):
  module = cross_scan.DirectionalDense(5)
  x = jax.random.normal(jax.random.key(0), (2, 4, 3, cross_scan.DIRECTIONS, 6))
  variables = module.init(jax.random.key(1), x)

  def value_and_gradients():
    # A new function each time: JAX would find the other platform's program.
    return jax.jit(
      jax.value_and_grad(lambda v, x: (module.apply(v, x) ** 2).mean(), (0, 1))
    )(variables, x)

  on_cpu = value_and_gradients()
  monkeypatch.setattr(basic, "for_cpu", lambda: False)
  elsewhere = value_and_gradients()
  chex.assert_trees_all_equal_shapes_and_dtypes(on_cpu, elsewhere)
  chex.assert_tree_all_finite(elsewhere)
  for got, want in zip(
    jax.tree.leaves(elsewhere), jax.tree.leaves(on_cpu), strict=True
  ):
    golden_data.assert_close(got, np.asarray(want), relative=1e-5)


@pytest.mark.parametrize("family", _SMALL)
def test_fusions_are_held_back_on_cpus_alone(family):
  model, images = _SMALL[family](), jnp.zeros((1, 32, 32, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), images)

  def barriers():
    traced = jax.jit(lambda v: model.apply(v, images)).trace(variables)
    return str(traced.jaxpr).count("optimization_barrier")

  on_cpu = barriers()
  with _h100():
    on_gpu = barriers()
  # What scan and projection read is computed once, on every platform.
  layers = 4 if family == "vim" else 2
  assert on_cpu > on_gpu == layers
