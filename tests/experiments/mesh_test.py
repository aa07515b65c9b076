"""A run is the same on every mesh: losses, parameters, checkpoints."""

import dataclasses
import functools
import pathlib

import chex
import jax
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from experiments.imagenet import (
  checkpoints,
  checks,
  errors,
  optimizer,
  sharding,
  steps,
)
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet.configs import _base

_STEPS = 6
_MESHES = {
  "one": {"devices": 1},
  "data": {"data": 8},
  "fsdp": {"data": 4, "fsdp": 2},
  "sequence": {"data": 2, "sequence": 4},
  "all": {"data": 2, "fsdp": 2, "sequence": 2},
}
# float32 sums in another order: a few units in the last of 24 bits, which the
# steps before carry on.
_LOSS = 1e-5
# Adam divides a gradient by its own size, so where the gradient is all rounding
# a step differs by a share of the rate of 1e-3, not of the parameter.
_PARAMS = 1e-4


def _mesh(name):
  axes = dict(_MESHES[name])
  if "devices" in axes:
    axes["devices"] = jax.devices()[: axes["devices"]]
  return sharding.make_mesh(**axes)


def _config(**changes):
  c = _base.get_config()
  _base.smoke(c)
  c.data.image_size = 32
  c.batch_size = 16
  c.ema_decay = 0.9
  c.mixup.mixup_alpha = 0.8
  c.optimizer.schedule = "constant"
  c.optimizer.warmup_epochs = 0.0
  c.model.overrides.depth = 2
  c.model.overrides.scan_layers = True
  c.model.overrides.patch_size = 8
  c.model.overrides.stride = 8
  c.model.overrides.embed_dim = 32
  c.model.overrides.drop_path_rate = 0.1
  c.update_from_flattened_dict(changes)
  return c


def _batch(step):
  rng = np.random.default_rng(step)
  return {
    "image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
    "label": rng.integers(0, 10, 16).astype(np.int32),
  }


class _Trainer:
  """Trains on a mesh, from step 0 or from a state."""

  def __init__(self, config, name):
    self.config, self.mesh = config, _mesh(name)
    self.model = run_lib.make_model(config)
    schedule = optimizer.make_schedule(config, 10)
    self.tx = optimizer.make_optimizer(config, schedule)
    self.step = steps.make_train_step(
      self.model, self.tx, schedule, config, self.mesh
    )

  def new(self):
    with jax.set_mesh(self.mesh):
      return state_lib.make_state(self.model, self.tx, self.config, self.mesh)

  def shapes(self):
    return state_lib.state_shapes(self.model, self.tx, self.config, self.mesh)

  def train(self, state, first, last):
    """The state after the steps, and their losses."""
    losses = []
    with jax.set_mesh(self.mesh):
      for i in range(first, last):
        batch = steps.put_batch(_batch(i), self.config, self.mesh)
        state, numbers = self.step(state, batch)
        losses.append(numbers["loss"].item())
    return state, losses


@dataclasses.dataclass
class _Run:
  """Six steps of a tiny Vim on a mesh, with a checkpoint in the middle."""

  trainer: _Trainer
  placements: state_lib.State
  folder: pathlib.Path
  halfway: state_lib.State
  state: state_lib.State
  losses: list[float]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The run on the mesh of a name, made when asked for."""

  @functools.cache
  def get(name):
    trainer = _Trainer(_config(), name)
    folder = tmp_path_factory.mktemp(name)
    state = trainer.new()
    placements = _placements(state)
    state, losses = trainer.train(state, 0, _STEPS // 2)
    with checkpoints.Checkpoints(folder, keep=1) as saved:
      saved.save(state, checkpoints.Record(step=_STEPS // 2))
    halfway = jax.device_get(state)
    state, more = trainer.train(state, _STEPS // 2, _STEPS)
    return _Run(trainer, placements, folder, halfway, state, losses + more)

  return get


def _placements(state):
  return jax.tree.map(lambda x: x.sharding, state)


def _assert_close(state, losses, want):
  np.testing.assert_allclose(losses, want.losses, rtol=_LOSS)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, want.state)
  for field in ("params", "ema_params"):
    got, wanted = (
      jax.device_get(getattr(x, field)) for x in (state, want.state)
    )
    chex.assert_trees_all_close(got, wanted, rtol=0, atol=_PARAMS)


@pytest.mark.parametrize(
  "name",
  ["data", "fsdp", "sequence", pytest.param("all", marks=pytest.mark.long)],
)
def test_losses_and_parameters_are_those_of_one_device(run, name):
  got, one = run(name), run("one")
  assert (np.diff(got.losses) != 0).all()
  _assert_close(got.state, got.losses, one)
  # A step leaves everything where it was, and so is compiled once.
  same = lambda x, where: x.sharding.is_equivalent_to(where, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, got.state, got.placements)))
  assert got.trainer.step._cache_size() == 1


def _per_device_bytes(tree):
  """Bytes that the arrays take on the fullest device."""
  held = {}
  for x in jax.tree.leaves(tree):
    for shard in x.addressable_shards:
      size = np.prod(shard.data.shape, dtype=int) * x.dtype.itemsize
      held[shard.device] = held.get(shard.device, 0) + int(size)
  return max(held.values())


def test_fsdp_divides_parameters_averages_and_moments(run):
  whole, parts = run("one").state, run("fsdp").state
  for tree in (
    parts.params,
    parts.ema_params,
    optax.tree.get(parts.opt_state, "mu"),
    optax.tree.get(parts.opt_state, "nu"),
  ):
    kernel = tree["layers"]["mixer"]["in_proj"]["kernel"]
    assert kernel.shape == (2, 32, 128)
    assert kernel.sharding.spec == PartitionSpec(None, None, "fsdp")
    shapes = {shard.data.shape for shard in kernel.addressable_shards}
    assert shapes == {(2, 32, 64)}
  for field in ("params", "ema_params", "opt_state"):
    ours, all_of_it = (
      _per_device_bytes(getattr(s, field)) for s in (parts, whole)
    )
    # Half, and the other half of the biases and the like.
    assert 0.5 * all_of_it < ours < 0.55 * all_of_it


@pytest.mark.long
def test_a_model_with_batch_norms_is_the_same_on_fsdp():
  config = _config(
    **{
      "model.name": "mambavision_tiny",
      "model.overrides.depth": None,
      "model.overrides.scan_layers": None,
      "model.overrides.patch_size": None,
      "model.overrides.stride": None,
      "model.overrides.embed_dim": None,
      "model.overrides.depths": (1, 1, 2, 2),
      "model.overrides.dim": 16,
      "model.overrides.in_dim": 8,
    }
  )
  (got, losses), (want, want_losses) = (
    trainer.train(trainer.new(), 0, 3)
    for trainer in (_Trainer(config, name) for name in ("fsdp", "data"))
  )
  # Not the parameters: a bias before a batch norm has no gradient but
  # rounding, of which Adam makes a full step.
  np.testing.assert_allclose(losses, want_losses, rtol=1e-4)
  for ours, theirs in zip(
    jax.tree.leaves(jax.device_get(got.batch_stats)),
    jax.tree.leaves(jax.device_get(want.batch_stats)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("before", "after"), [("fsdp", "one"), ("one", "fsdp")]
)
def test_a_checkpoint_goes_from_mesh_to_mesh(run, before, after):
  old, new = run(before), run(after)
  folder = checkpoints.Checkpoints(old.folder, keep=1)
  state, record = folder.restore(new.trainer.shapes())
  assert record.step == _STEPS // 2
  chex.assert_trees_all_equal_shapes_and_dtypes(state, old.halfway)
  same_bytes = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes()
  assert all(jax.tree.leaves(jax.tree.map(same_bytes, state, old.halfway)))
  assert _placements(state) == new.placements
  state, losses = new.trainer.train(state, _STEPS // 2, _STEPS)
  _assert_close(state, old.losses[: _STEPS // 2] + losses, run("one"))


class TestConfig:
  @pytest.mark.parametrize(
    ("field", "value", "message"),
    [
      ("mesh.fsdp", 3, "fsdp=3 x sequence=1 does not fit 8 device"),
      ("mesh.data", 2, "data=2 x fsdp=1"),
      ("batch_size", 4, "batch_size=4 must be a multiple of the 8 devices"),
    ],
  )
  def test_what_does_not_fit_is_named(self, field, value, message):
    with pytest.raises(errors.ConfigError, match=message):
      checks.check_config(_config(**{field: value}))

  def test_a_batch_is_divided_over_data_and_fsdp_alone(self):
    config = _config(**{"mesh.sequence": 4, "batch_size": 2})
    config.eval_batch_size = 2
    checks.check_config(config)

  def test_only_vim_splits_its_tokens(self):
    config = _config(**{"mesh.sequence": 2, "model.name": "vmamba_tiny_s1l8"})
    with pytest.raises(errors.ConfigError, match="only Vim's layers can"):
      checks.check_config(config)
