"""Schedules, optimisers and decay masks against timm's and torch's numbers."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.imagenet import optimizer
from experiments.imagenet.configs import vim_tiny
import vimjax

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "training"


def _config(**changes):
  c = vim_tiny.get_config()
  c.update_from_flattened_dict(changes)
  return c


def test_vim_schedule_is_timms_at_every_epoch():
  want = json.loads((_GOLDEN / "training.json").read_text())
  want = want["schedules"]["vim_epoch"]
  steps_per_epoch = 1251
  schedule = jax.jit(optimizer.make_schedule(_config(), steps_per_epoch))
  got = schedule(jnp.array(want["t"]) * steps_per_epoch)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want["lr"], rtol=2e-5)
  # The last step of an epoch still has the epoch's rate.
  last = schedule((jnp.array(want["t"]) + 1) * steps_per_epoch - 1)
  np.testing.assert_array_equal(got, last)


def test_step_schedule_moves_every_step_between_the_same_ends():
  c = _config(**{"epochs": 10.0, "optimizer.schedule_unit": "step"})
  rates = optimizer.make_schedule(c, 10)(jnp.arange(101))
  warm, cosine = rates[:50], rates[50:]
  assert rates[0] == np.float32(c.optimizer.warmup_lr)
  assert (jnp.diff(warm) > 0).all()
  assert (jnp.diff(cosine) < 0).all()
  np.testing.assert_allclose(rates[-1], c.optimizer.final_lr, rtol=1e-3)


def test_no_warmup_starts_at_the_peak():
  c = _config(**{"optimizer.warmup_epochs": 0.0})
  rate = optimizer.make_schedule(c, 10)(0)
  np.testing.assert_allclose(rate, c.optimizer.peak_lr, rtol=1e-6)


def test_step_schedule_is_timms_where_the_cosine_counts_from_step_0():
  want = json.loads((_GOLDEN / "training.json").read_text())
  want = want["schedules"]["mambavision_step"]
  steps_per_epoch = 1251
  c = _config(
    **{
      "optimizer.schedule_unit": "step",
      "optimizer.peak_lr": want["base_lr"],
      "optimizer.final_lr": want["min_lr"],
      "optimizer.warmup_lr": want["warmup_lr"],
      "optimizer.warmup_epochs": want["warmup_steps"] / steps_per_epoch,
      "epochs": want["steps"] / steps_per_epoch,
    }
  )
  got = optimizer.make_schedule(c, steps_per_epoch)(jnp.array(want["t"]))
  # float32: the cosine of a number near pi keeps few digits of the distance.
  np.testing.assert_allclose(got, want["lr"], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
  ("case", "weight_decay", "rates"),
  [
    ("adamw_wd0.05", 0.05, [1e-3] * 10),
    ("adamw_wd0.1_warmup", 0.1, [1e-4 * (i + 1) for i in range(10)]),
  ],
)
def test_ten_adamw_steps_agree_with_torch(case, weight_decay, rates):
  golden = np.load(_GOLDEN / "optimizers.npz")
  names = ("w", "b", "A_log")
  with jax.enable_x64(True):
    c = _config(**{"optimizer.weight_decay": weight_decay})
    tx = optimizer.make_optimizer(c, lambda step: jnp.asarray(rates)[step])
    params = {k: jnp.asarray(golden[f"init/{k}"]) for k in names}
    state = tx.init(params)
    for i in range(10):
      grads = {k: jnp.asarray(golden[f"grad/{k}"][i]) for k in names}
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      want = {k: golden[f"{case}/{k}"][i] for k in names}
      chex.assert_trees_all_equal_shapes_and_dtypes(params, want)
      chex.assert_trees_all_close(params, want, atol=1e-6, rtol=0)


def test_clipping_scales_large_gradients_and_leaves_small_ones():
  grads = {"w": jnp.array([[3.0, 4.0]])}
  params = {"w": jnp.zeros((1, 2))}

  def first_moment(clip_norm):
    c = _config(**{"optimizer.clip_norm": clip_norm})
    tx = optimizer.make_optimizer(c, lambda step: 1.0)
    _, state = tx.update(grads, tx.init(params), params)
    return optax.tree.get(state, "mu")["w"]

  np.testing.assert_allclose(first_moment(0.0), [[0.3, 0.4]], rtol=1e-6)
  np.testing.assert_allclose(first_moment(1.0), [[0.06, 0.08]], rtol=1e-6)
  np.testing.assert_allclose(first_moment(10.0), [[0.3, 0.4]], rtol=1e-6)


def test_clipping_can_be_switched_on_when_a_run_is_resumed():
  params = {"w": jnp.zeros((1, 2))}
  states = [
    optimizer.make_optimizer(
      _config(**{"optimizer.clip_norm": clip_norm}), lambda step: 1.0
    ).init(params)
    for clip_norm in (0.0, 1.0)
  ]
  chex.assert_trees_all_equal_structs(*states)


def _vim_shapes(**overrides):
  model = vimjax.create_model(
    "vim_tiny", depth=2, embed_dim=32, image_size=32, **overrides
  )
  return jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )["params"]


def test_decay_mask_of_vim_is_the_official_codes():
  leaves = jax.tree_util.tree_leaves_with_path(
    optimizer.decay_mask(_vim_shapes())
  )
  names = {True: set(), False: set()}
  for path, decays in leaves:
    names[decays].add(path[-1].key)
  assert names[True] == {"kernel", "A_log"}
  assert names[False] == {
    "bias",
    "class_token",
    "D",
    "dt_bias",
    "pos_embed",
    "scale",
  }


def test_decay_mask_does_not_depend_on_how_layers_are_stored():
  shapes = _vim_shapes()
  stacked = optimizer.decay_mask(_vim_shapes(scan_layers=True))
  unstacked = optimizer.decay_mask(shapes)
  assert stacked["layers"] == unstacked["layers_0"] == unstacked["layers_1"]
  del stacked["layers"], unstacked["layers_0"], unstacked["layers_1"]
  assert stacked == unstacked


@pytest.mark.parametrize(
  ("field", "value", "names"),
  [
    ("schedule", "cosin", "cosine"),
    ("schedule_unit", "iteration", "epoch"),
  ],
)
def test_unknown_schedule_is_an_error_listing_the_choices(field, value, names):
  c = _config(**{f"optimizer.{field}": value})
  with pytest.raises(ValueError, match=f"{field}.*{names}"):
    optimizer.make_schedule(c, 10)


def test_unknown_optimizer_is_an_error_listing_the_choices():
  c = _config(**{"optimizer.name": "adam"})
  with pytest.raises(ValueError, match=r"optimizer.name.*adamw"):
    optimizer.make_optimizer(c, lambda step: 1.0)
