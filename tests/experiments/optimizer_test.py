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
from experiments.imagenet.configs import _recipe
import vimjax

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "training"


def _config(**changes):
  c = _recipe.get_config("vim_tiny")
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


def test_step_schedule_is_timms_where_the_cosine_follows_the_warm_up():
  want = json.loads((_GOLDEN / "training.json").read_text())
  want = want["schedules"]["vmamba_step_prefix"]
  c = _config(
    **{
      "optimizer.schedule_unit": "step",
      "optimizer.warmup_prefix": True,
      "optimizer.warmup_epochs": 20.0,
    }
  )
  got = optimizer.make_schedule(c, 1251)(jnp.array(want["t"]))
  np.testing.assert_allclose(got, want["lr"], rtol=2e-5, atol=1e-9)


def test_cool_down_keeps_the_last_rate_to_the_end():
  want = json.loads((_GOLDEN / "training.json").read_text())
  want = want["schedules"]["vim_epoch"]  # 300 epochs, and ten more.
  c = _config(**{"epochs": 310.0, "optimizer.cooldown_epochs": 10.0})
  got = optimizer.make_schedule(c, 10)(10 * jnp.array(want["t"]))
  np.testing.assert_allclose(got, want["lr"], rtol=2e-5)
  with pytest.raises(ValueError, match="no time beside the cool-down"):
    c = _config(**{"epochs": 10.0, "optimizer.cooldown_epochs": 10.0})
    optimizer.make_schedule(c, 10)


@pytest.mark.parametrize(
  ("case", "name", "weight_decay", "rates"),
  [
    ("adamw_wd0.05", "adamw", 0.05, [1e-3] * 10),
    ("adamw_wd0.1_warmup", "adamw", 0.1, [1e-4 * (i + 1) for i in range(10)]),
    ("lamb_wd0.05", "lamb", 0.05, [5e-3] * 10),
    ("lamb_wd0.12_biggrad", "lamb", 0.12, [5e-3] * 10),
  ],
)
def test_ten_steps_agree_with_torch_and_timm(case, name, weight_decay, rates):
  golden = np.load(_GOLDEN / "optimizers.npz")
  names = ("w", "b", "A_log")
  with jax.enable_x64(True):
    c = _config(
      **{
        "optimizer.name": name,
        "optimizer.weight_decay": weight_decay,
        "optimizer.eps": {"adamw": 1e-8, "lamb": 1e-6}[name],
      }
    )
    # All gradients are longer than 1, where LAMB clips them first.
    scale = 50.0 if "biggrad" in case else 1.0
    tx = optimizer.make_optimizer(c, lambda step: jnp.asarray(rates)[step])
    params = {k: jnp.asarray(golden[f"init/{k}"]) for k in names}
    state = tx.init(params)
    for i in range(10):
      grads = {k: scale * golden[f"grad/{k}"][i] for k in names}
      grads = jax.tree.map(jnp.asarray, grads)
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


def test_lamb_scales_by_the_norm_of_each_layer_however_they_are_stored():
  c = _config(**{"optimizer.name": "lamb", "optimizer.weight_decay": 0.1})
  tx = optimizer.make_optimizer(c, lambda step: 1.0)
  rng = np.random.default_rng(0)
  params, grads = (
    {
      f"layers_{i}": {"kernel": jnp.asarray(rng.normal(size=(3, 2)) * 4**i)}
      for i in range(3)
    }
    for _ in range(2)
  )
  want, _ = tx.update(grads, tx.init(params), params)
  params, grads = vimjax.stack_layers(params), vimjax.stack_layers(grads)
  got, _ = tx.update(grads, tx.init(params), params)
  chex.assert_trees_all_close(got, vimjax.stack_layers(want), rtol=1e-6)
  zeros = jax.tree.map(jnp.zeros_like, params)
  got, _ = tx.update(zeros, tx.init(params), zeros)
  chex.assert_trees_all_equal(got, zeros)


def _shapes(name, **overrides):
  model = vimjax.create_model(name, **overrides)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  return model, shapes["params"]


def _vim_shapes(**overrides):
  return _shapes("vim_tiny", depth=2, embed_dim=32, image_size=32, **overrides)[
    1
  ]


_VMAMBA = {"depths": (1, 1, 1, 1), "embed_dim": 16}
_SMALL = {
  "vim_tiny": {"depth": 1, "embed_dim": 32, "image_size": 32},
  "vmamba_tiny_v0": _VMAMBA,
  "vmamba_tiny_s1l8": _VMAMBA,
  "vmamba_tiny_m2": _VMAMBA | {"embed_dim": 32},
  "mambavision_base": {"depths": (1, 1, 2, 2), "dim": 16, "in_dim": 8},
  "deit_tiny": {"depth": 1, "embed_dim": 32, "num_heads": 1, "image_size": 32},
}


@pytest.mark.parametrize("name", _SMALL)
def test_decay_masks_are_the_official_codes(name):
  """By the rule of timm and Swin, on the official names and shapes."""
  model, shapes = _shapes(name, **_SMALL[name])
  image = jnp.zeros((1, 32, 32, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  # Every element of an array says whether it decays.
  ours = jax.tree.map(
    lambda leaf, decays: np.full(leaf.shape, decays, np.float32),
    shapes,
    optimizer.decay_mask(shapes),
  )
  rest = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32),
    {k: v for k, v in variables.items() if k != "params"},
  )
  official = vimjax.export_state_dict(model, {"params": ours, **rest})
  decayed = set()
  for key, value in official.items():
    if "running_" in key or key.endswith("num_batches_tracked"):
      continue
    decays = (
      value.ndim > 1
      and not key.endswith(".bias")
      and key not in ("pos_embed", "cls_token")
    )
    np.testing.assert_array_equal(value, float(decays), err_msg=key)
    decayed |= {key.rpartition(".")[2]} if decays else set()
  assert any(name.startswith("A_") for name in decayed) != ("deit" in name)
  assert ("dt_projs_bias" in decayed) == ("vmamba" in name)
  assert ("Ds" in decayed) == ("m2" in name)


def test_the_scans_parameters_can_be_exempt_from_decay():
  _, shapes = _shapes("vmamba_tiny_s1l8", **_VMAMBA)
  mask = optimizer.decay_mask(shapes, scan_parameters=False)
  ssm = mask["stages_0"]["layers_0"]["mixer"]["ssm"]
  assert not any(ssm[name] for name in ("A_log", "D", "dt_bias"))
  assert ssm["x_proj"]["kernel"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_layer_decay_falls_from_the_head_to_the_stem(scan_layers):
  _, shapes = _shapes(
    "vmamba_tiny_s1l8",
    depths=(1, 2, 1, 1),
    embed_dim=16,
    scan_layers=scan_layers,
  )
  scales = optimizer.layer_scales(shapes, 0.5)
  assert scales["head"]["bias"] == scales["norm"]["scale"] == 1
  assert scales["stem"]["conv1"]["kernel"] == 0.5**6
  assert scales["downsample_0"]["norm"]["bias"] == 0.5**5
  assert scales["downsample_1"]["norm"]["bias"] == 0.5**3
  if scan_layers:
    got = scales["stages_1"]["layers"]["mixer"]["conv"]["kernel"]
    np.testing.assert_array_equal(got.ravel(), [0.5**4, 0.5**3])
    assert got.ndim == 4
  else:
    assert scales["stages_1"]["layers_0"]["norm"]["scale"] == 0.5**4
    assert scales["stages_1"]["layers_1"]["norm"]["scale"] == 0.5**3


def test_layer_decay_scales_whole_steps():
  params = {
    "patch_embed": {"bias": jnp.ones(2)},
    "layers": {"bias": jnp.ones((2, 2))},
    "head": {"bias": jnp.ones(2)},
  }
  c = _config(**{"optimizer.layer_decay": 0.5, "optimizer.weight_decay": 0.0})
  tx = optimizer.make_optimizer(c, lambda step: 1.0)
  updates, _ = tx.update(params, tx.init(params), params)
  # The first step of Adam is the rate, whatever the gradient.
  want = {
    "patch_embed": {"bias": np.full(2, -(0.5**3))},
    "layers": {"bias": np.array([[-0.25, -0.25], [-0.5, -0.5]])},
    "head": {"bias": np.full(2, -1.0)},
  }
  chex.assert_trees_all_close(updates, want, rtol=1e-5)


def test_layer_decay_of_vim_and_mambavision_counts_their_layers():
  scales = optimizer.layer_scales(_vim_shapes(), 0.5)
  assert scales["pos_embed"] == scales["patch_embed"]["kernel"] == 0.5**3
  assert scales["layers_0"]["norm"]["scale"] == 0.5**2
  _, shapes = _shapes("mambavision_base", **_SMALL["mambavision_base"])
  scales = optimizer.layer_scales(shapes, 0.5)
  assert scales["patch_embed"]["conv1"]["kernel"] == 0.5**7
  assert scales["stages_2"]["blocks_1"]["gamma1"] == 0.5**3
  assert scales["norm"]["scale"] == 1


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
