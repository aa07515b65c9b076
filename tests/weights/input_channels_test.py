"""Models for images of other channels, and RGB weights in them."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vimjax
from vimjax.weights import export, input_channels

_MODELS = {
  "deit": vimjax.create_model(
    "deit_tiny", depth=1, image_size=32, num_classes=5
  ),
  "mambavision": vimjax.create_model(
    "mambavision_tiny", depths=(1, 1, 1, 1), num_classes=5
  ),
  "vim": vimjax.create_model("vim_tiny", depth=1, image_size=32, num_classes=5),
  "vmamba": vimjax.create_model("vmamba_tiny_s1l8", depths=(1,), num_classes=5),
}


def _official(model):
  """Any state dict of a model: official names, small random numbers."""
  image = jnp.zeros((1, 32, 32, model.in_chans))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: rng.normal(0.0, 0.1, leaf.shape).astype(leaf.dtype), shapes
  )
  return export.official_names(model, variables)


def _stem(variables):
  """The one convolution that reads images: (h, w, in, out)."""
  params = variables["params"]
  for name in ("patch_embed", "stem"):
    if name in params:
      return params[name].get("conv1", params[name])["kernel"]
  raise AssertionError(list(params))


@pytest.mark.parametrize("family", _MODELS)
def test_rgb_weights_fit_models_of_other_channels(family, caplog):
  model = _MODELS[family]
  state_dict = _official(model)
  with caplog.at_level(logging.WARNING):
    variables = vimjax.convert_state_dict(model.clone(in_chans=2), state_dict)
  assert "reads 3 channels; fitted to 2" in caplog.text
  (key,) = (k for k, v in state_dict.items() if v.shape[1:2] == (3,))
  want = state_dict[key][:, :2].transpose(2, 3, 1, 0) * 1.5
  chex.assert_trees_all_close(_stem(variables), want, rtol=1e-6)


def test_channels_are_summed_or_taken_in_turn():
  rgb = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
  red, green, blue = (rgb[:, i : i + 1] for i in range(3))
  for channels, want in [
    (1, red + green + blue),
    (3, rgb),
    (4, np.concatenate([red, green, blue, red], axis=1) * 0.75),
    (6, np.concatenate([rgb, rgb], axis=1) * 0.5),
  ]:
    got = input_channels.adapt({"a": rgb}, "a", channels)["a"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_one_channel_is_as_three_equal_ones():
  model = _MODELS["deit"]
  state_dict = _official(model)
  grey = np.random.default_rng(1).normal(size=(2, 32, 32, 1))
  logits = []
  for channels in (1, 3):
    one = model.clone(in_chans=channels)
    variables = vimjax.convert_state_dict(one, state_dict)
    images = jnp.asarray(np.repeat(grey, channels, axis=3), jnp.float32)
    logits.append(jax.jit(one.apply)(variables, images))
  assert logits[0].shape == (2, 5)
  assert jnp.std(logits[0]) > 1e-2
  # Three products less to add: rounding only.
  chex.assert_trees_all_close(*logits, rtol=1e-5, atol=1e-6)


def test_weights_of_other_channels_fit_only_models_of_these():
  four = _MODELS["deit"].clone(in_chans=4)
  state_dict = _official(four)
  assert _stem(vimjax.convert_state_dict(four, state_dict)).shape[2] == 4
  with pytest.raises(
    ValueError,
    match=r"weight has shape \(192, 4, 16, 16\), expected \(192, 3, 16, 16\)",
  ):
    vimjax.convert_state_dict(_MODELS["deit"], state_dict)


@pytest.mark.parametrize("family", _MODELS)
def test_images_of_other_channels_are_refused(family):
  model = _MODELS[family].clone(in_chans=1)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  with pytest.raises(ValueError, match=r"height, width, 1\), got \(1, 32, 32"):
    jax.eval_shape(model.init, jax.random.key(0), images)
  with pytest.raises(ValueError, match="in_chans must be a positive integer"):
    model.clone(in_chans=0)
