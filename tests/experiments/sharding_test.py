"""Where arrays lie on a mesh: the axes, the table of rules, the batches."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from experiments.imagenet import optimizer, sharding
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet.configs import _base


class TestMesh:
  def test_axes_that_divide_nothing_are_left_out(self):
    assert dict(sharding.make_mesh().shape) == {"data": 8}
    mesh = sharding.make_mesh(fsdp=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    mesh = sharding.make_mesh(data=2, sequence=4)
    assert dict(mesh.shape) == {"data": 2, "sequence": 4}
    mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2}

  @pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 3}, {"data": 4}, {"fsdp": 0}, {"data": 8, "sequence": -1}],
  )
  def test_another_product_than_the_devices_is_an_error(self, sizes):
    with pytest.raises(ValueError, match="does not fit 8 device"):
      sharding.make_mesh(**sizes)


class TestRules:
  @pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
      ("params/layers_0/mixer/in_proj/kernel", (192, 768), P(None, "fsdp")),
      # The layers of `scan_layers`, the directions of VMamba.
      ("params/layers/mixer/in_proj/kernel", (24, 192, 768), P(0, 0, "fsdp")),
      ("opt_state/0/mu/s/ssm/A_log", (4, 96, 16), P(0, "fsdp", 0)),
      ("ema_params/ssm/x_proj/kernel", (384, 44), P("fsdp", 0)),
      ("params/patch_embed/kernel", (16, 16, 3, 192), P(0, 0, 0, "fsdp")),
      ("params/head/kernel", (192, 10), P("fsdp", 0)),
      ("params/pos_embed", (197, 192), P(0, "fsdp")),
      # 10 does not divide, and the array keeps a copy everywhere.
      ("params/fc/kernel", (192, 10), P()),
      ("params/small/kernel", (16, 16), P()),
      ("params/norm/scale", (4096,), P()),
      ("batch_stats/norm/mean", (4096,), P()),
      ("step", (), P()),
    ],
  )
  def test_the_first_rule_decides_for_the_last_dimensions(
    self, path, shape, want
  ):
    want = P(*(name or None for name in want))
    assert sharding.spec(path, shape, 4) == want
    assert sharding.spec(path, shape, 1) == P()

  @pytest.mark.parametrize(
    "name", ["vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny", "deit_tiny"]
  )
  def test_next_to_nothing_of_a_model_is_left_whole(self, name):
    config = _base.get_config()
    config.model.name = name
    model = run_lib.make_model(config)
    tx = optimizer.make_optimizer(config, lambda step: 0.1)
    mesh = sharding.make_mesh(fsdp=8)
    shapes = state_lib.state_shapes(model, tx, config, mesh)
    size = lambda x: int(np.prod(x.shape)) * x.dtype.itemsize
    held = lambda x: (
      int(np.prod(x.sharding.shard_shape(x.shape))) * (x.dtype.itemsize)
    )
    total, mine = (sum(map(f, jax.tree.leaves(shapes))) for f in (size, held))
    # An eighth, and the 1 to 3 % that are biases, scales and D.
    assert mine < total * (1 / 8 + 0.03)


class TestBatches:
  @pytest.mark.parametrize("axes", [{}, {"fsdp": 2}, {"sequence": 4}])
  def test_one_process_loads_all_images(self, axes):
    assert sharding.batch_slice(sharding.make_mesh(**axes)) == (0, 1)

  def test_devices_along_the_sequence_hold_the_same_images(self):
    mesh = sharding.make_mesh(data=2, sequence=4)
    x = jax.device_put(np.arange(6), sharding.batch_sharded(mesh))
    held = sorted(tuple(s.data.tolist()) for s in x.addressable_shards)
    assert held == [(0, 1, 2)] * 4 + [(3, 4, 5)] * 4
