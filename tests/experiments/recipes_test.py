"""Every published recipe: its values, its model, and a real step of it."""

import jax
from jax.sharding import AxisType
import numpy as np
import pytest

from experiments.imagenet import (
  input_pipeline,
  mixing,
  optimizer,
  recipes,
  rundir,
  steps,
)
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet.configs import _base, _recipe
import vimjax

# From the papers and the official scripts and configurations.
_ALL = {
  "data.randaugment": "rand-m9-mstd0.5-inc1",
  "data.erase_probability": 0.25,
  "mixup.mixup_alpha": 0.8,
  "mixup.cutmix_alpha": 1.0,
  "mixup.probability": 1.0,
  "mixup.switch_probability": 0.5,
  "label_smoothing": 0.1,
  "optimizer.schedule": "cosine",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.warmup_lr": 1e-6,
}
_BY_EPOCH = _ALL | {
  "data.repeats": 3,
  "epochs": 300.0,
  "ema_decay": 0.99996,
  "eval_weights": "model",
  "optimizer.name": "adamw",
  "optimizer.eps": 1e-8,
  "optimizer.peak_lr": 1e-3,
  "optimizer.final_lr": 1e-5,
  "optimizer.warmup_epochs": 5.0,
  "optimizer.schedule_unit": "epoch",
  "optimizer.clip_norm": 0.0,
}
_VIM = _BY_EPOCH | {
  "data.color_jitter": 0.3,
  "model.overrides.dtype": "float32",
}
_DEIT = _BY_EPOCH | {
  "data.color_jitter": 0.4,
  "model.overrides.dtype": "bfloat16",
}
_VMAMBA = _ALL | {
  "data.color_jitter": 0.4,
  "epochs": 300.0,
  "optimizer.name": "adamw",
  "optimizer.eps": 1e-8,
  "optimizer.peak_lr": 1e-3,
  "optimizer.final_lr": 1e-5,
  "optimizer.warmup_epochs": 20.0,
  "optimizer.warmup_prefix": True,
  "optimizer.schedule_unit": "step",
  "optimizer.clip_norm": 5.0,
  "model.overrides.dtype": "bfloat16",
}
_MAMBAVISION = _ALL | {
  "seed": 31,
  "data.color_jitter": 0.4,
  "data.crop_interpolation": "random",
  "epochs": 310.0,
  "ema_decay": 0.9998,
  "eval_weights": "ema",
  "optimizer.name": "lamb",
  "optimizer.eps": 1e-6,
  "optimizer.peak_lr": 5e-3,
  "optimizer.final_lr": 5e-6,
  "optimizer.cooldown_epochs": 10.0,
  "optimizer.schedule_unit": "step",
  "optimizer.clip_norm": 5.0,
  "mesa.factor": 50.0,
  "mesa.temperature": 3.0,
  "model.overrides.dtype": "bfloat16",
}
_FINE_TUNING = {
  "epochs": 30.0,
  "optimizer.peak_lr": 1e-5,
  "optimizer.warmup_lr": 1e-5,
  "optimizer.final_lr": 1e-5,
  "model.overrides.pos_embed_resize": "official",
}
_MORE = (
  "batch_size",
  "mixup.group_size",
  "optimizer.weight_decay",
  "model.overrides.drop_path_rate",
)
_EMA = ("ema_decay", "eval_weights")
_MESA = (
  "optimizer.warmup_epochs",
  "mesa.weight",
  "mesa.start",
  "data.crop_fraction",
)


def _row(family, *values, names=_MORE, **changes):
  return family | dict(zip(names, values, strict=True)) | changes


def _vmamba(drop_path_rate, ema_decay=0.9999, eval_weights="ema"):
  values = (1024, 128, 0.05, drop_path_rate, ema_decay, eval_weights)
  return _row(_VMAMBA, *values, names=_MORE + _EMA)


def _mambavision(*values):
  return _row(_MAMBAVISION, 4096, 128, *values, names=_MORE + _MESA)


_WANTED = {
  "vim_tiny": _row(_VIM, 1024, 128, 0.1, 0.0),
  "vim_small": _row(_VIM, 512, 64, 0.05, 0.05),
  "vim_tiny_stride8": _row(
    _VIM | _FINE_TUNING | {"init_from": "published:vim_tiny"},
    1024,
    128,
    1e-8,
    0.0,
  ),
  "vim_small_stride8": _row(
    _VIM | _FINE_TUNING | {"init_from": "published:vim_small"},
    1024,
    128,
    1e-8,
    0.0,
  ),
  "vmamba_tiny_v0": _vmamba(0.2, 0.0, "model"),
  "vmamba_small_v0": _vmamba(0.3),
  "vmamba_base_v0": _vmamba(0.5),
  "vmamba_tiny_s2l5": _vmamba(0.2),
  "vmamba_small_s2l15": _vmamba(0.3),
  "vmamba_base_s2l15": _vmamba(0.6),
  "vmamba_tiny_s1l8": _vmamba(0.2),
  "vmamba_small_s1l20": _vmamba(0.3),
  "vmamba_base_s1l20": _vmamba(0.5),
  "vmamba_tiny_m2": _vmamba(0.2),
  "vmamba_small_m2": _vmamba(0.3),
  "vmamba_base_m2": _vmamba(0.3),
  "mambavision_tiny": _mambavision(0.05, 0.2, 20.0, 0.5, 0.25, 1.0),
  "mambavision_tiny2": _mambavision(0.05, 0.2, 20.0, 0.75, 0.25, 0.98),
  "mambavision_small": _mambavision(0.05, 0.2, 20.0, 1.0, 0.25, 0.93),
  "mambavision_base": _mambavision(0.075, 0.3, 35.0, 1.0, 0.3, 1.0),
  "mambavision_large": _mambavision(0.12, 0.3, 20.0, 6.0, 0.25, 1.0),
  "mambavision_large2": _mambavision(0.12, 0.3, 20.0, 6.0, 0.25, 1.0),
  "deit_tiny": _row(_DEIT, 1024, 128, 0.05, 0.1),
  "deit_small": _row(_DEIT, 1024, 128, 0.05, 0.1),
  "deit_base": _row(_DEIT, 1024, 128, 0.05, 0.1),
}
_WITHOUT = {
  "vim_base",
  "vim_base_stride8",
  "mambavision_base_21k",
  "mambavision_large_21k",
  "mambavision_large2_512_21k",
  "mambavision_large3_256_21k",
  "mambavision_large3_512_21k",
}


def test_every_model_has_a_recipe_or_none_was_published():
  assert recipes.RECIPES.keys() == _WANTED.keys()
  assert set(vimjax.list_models()) == _WANTED.keys() | _WITHOUT


@pytest.mark.parametrize("name", _WANTED)
def test_recipes_are_the_published_ones_in_every_field(name):
  got = rundir.flatten(_recipe.get_config(name).to_dict())
  want = rundir.flatten(_base.get_config().to_dict())
  assert _WANTED[name].keys() <= want.keys()
  assert got == want | {"model.name": name} | _WANTED[name]
  # Runs are evaluated as the published accuracy was measured.
  how = vimjax.get_variant(name).preprocessing
  data = _recipe.get_config(name).data
  assert (data.image_size, data.crop_fraction) == (how.size, how.crop_fraction)
  assert (data.crop_mode, data.mean, data.std) == (
    how.crop_mode,
    how.mean,
    how.std,
  )
  model = run_lib.make_model(_recipe.get_config(name))
  assert model.num_classes == 1000
  assert model.drop_path_rate == _WANTED[name]["model.overrides.drop_path_rate"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


def _tiny(name, data_dir):
  c = _recipe.get_config(f"{name}:smoke")
  c.data.dir = data_dir
  c.data.image_size = 32
  c.batch_size = 16
  c.mesa.start = 0.0
  o = c.model.overrides
  # Compiles fastest.
  o.scan_implementation = None if name.startswith("deit") else "reference"
  if name.startswith("vim"):
    o.depth, o.embed_dim, o.patch_size = 1, 16, 16
    o.stride = 8 if "stride8" in name else 16
  elif name.startswith("deit"):
    o.depth, o.embed_dim = 1, 24
  elif name.startswith("vmamba"):
    o.depths, o.embed_dim = (1, 1), 16
  else:
    o.depths, o.dim, o.in_dim = (1, 1, 1, 2), 16, 8
  return c


def _filled(shapes):
  """Values for a state's shapes: compiling the real start takes longer."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    name = path[-1].key if hasattr(path[-1], "key") else ""
    if name in ("scale", "var", "gamma1", "gamma2", "D"):
      return np.ones(leaf.shape, leaf.dtype)
    if name in ("kernel", "pos_embed", "class_token"):
      return rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype)
    return np.zeros(leaf.shape, leaf.dtype)

  state = jax.tree_util.tree_map_with_path(fill, shapes)
  zeros = jax.tree.map(np.zeros_like, state.opt_state)
  return state.replace(opt_state=zeros, rng=np.zeros(2, np.uint32))


def _program(name, data_dir):
  """Configuration, training step, state and batch of a tiny version."""
  config = _tiny(name, data_dir)
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  batches = input_pipeline.train_batches(config)
  batch = steps.put_batch(next(batches), config, mesh)
  batches.close()
  model = run_lib.make_model(config)
  schedule = optimizer.make_schedule(config, 20)
  tx = optimizer.make_optimizer(config, schedule)
  assert mixing.is_on(config)
  shapes = state_lib.state_shapes(model, tx, config, mesh)
  train_step = steps.make_train_step(
    model, tx, schedule, config, mesh, total_steps=80
  )
  return config, train_step, shapes, batch


# One of each family; most of the others differ from these in numbers only.
_KINDS = ("vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny", "deit_tiny")


@pytest.mark.parametrize(
  "name",
  [
    name if name in _KINDS else pytest.param(name, marks=pytest.mark.long)
    for name in _WANTED
  ],
)
def test_every_recipe_takes_a_step(name, data_dir):
  """Its own pipeline, optimiser, schedule and losses, on a small model.

  What `_tiny` makes smaller: one or two layers of 16 to 24 channels, images of
  32 pixels, ten classes and a batch of 16. (Compiling a model of published size
  takes minutes on two cores.) All else is the recipe's.
  """
  config, train_step, shapes, batch = _program(name, data_dir)
  before = _filled(shapes)
  state, numbers = jax.device_get(train_step(before, batch))
  assert numbers["finite"]
  # Ten classes, and no idea yet. To that MESA adds what drop path and the
  # statistics of the batch make of student and average, weighted up to 6 x 50.
  mesa = 0.2 * config.mesa.weight
  np.testing.assert_allclose(numbers["loss"], np.log(10), atol=0.7 + mesa)
  assert numbers["lr"] == np.float32(config.optimizer.warmup_lr)
  assert (state.batch_stats is not None) == ("mambavision" in name)
  assert (state.ema_params is not None) == (name != "vmamba_tiny_v0")
  moved = jax.tree.map(
    lambda old, new: np.abs(new - old).max(), before.params, state.params
  )
  assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("name", sorted(_WANTED.keys() - set(_KINDS)))
def test_the_step_of_every_recipe_can_be_traced(name, data_dir):
  _, train_step, shapes, batch = _program(name, data_dir)
  state, numbers = jax.eval_shape(train_step, shapes, batch)
  assert jax.tree.structure(state) == jax.tree.structure(shapes)
  assert {k: v.shape for k, v in numbers.items()} == dict.fromkeys(
    ("loss", "accuracy", "grad_norm", "update_norm", "lr", "finite"), ()
  )
