"""MambaVision against the official model, and what our module adds to it."""

import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.layers import attention, conv_block, window_block
from vimjax.models import mambavision
from vimjax.weights import mambavision as mambavision_weights

TINY = (
  "mambavision_base",
  "mambavision_nonsq",
  "mambavision_ls",
  "mambavision_rank3_odd_depth",
)
FULL = {
  "mamba_vision_T": "mambavision_tiny",
  "mamba_vision_B": "mambavision_base",
}


def _tiny(name, **fields):
  """(model, variables, images, references) of a tiny official model."""
  case = golden_data.load_json("mambavision", "tiny/manifest")[name]
  # Our fields have the official names.
  model = vimjax.MambaVision(
    **{
      field: tuple(value) if isinstance(value, list) else value
      for field, value in case["constructor_args"].items()
    },
    **fields,
  )
  shapes = golden_data.expand_keys(case["keys"])
  variables = vimjax.convert_state_dict(
    model, golden_data.make_state_dict(shapes)
  )
  images = golden_data.make_images(name, tuple(case["input_shape"]))
  return (
    model,
    variables,
    images,
    golden_data.load("mambavision", f"tiny/{name}"),
  )


def _rule(key):
  (rule,) = [r for r in mambavision_weights.RULES if r.target(key)]
  return rule


def _to_official(key, flat):
  """The array of an official key, in its layout, from our flat variables."""
  rule = _rule(key)
  return rule.layout.to_official(np.asarray(flat[rule.target(key)]))


def _official_features(intermediates):
  """Our intermediates under the names and in the layouts of the references."""
  flat = traverse_util.flatten_dict(intermediates, sep="/")
  ours = {path.removesuffix("/__call__"): x for path, (x,) in flat.items()}
  features = {}
  for path, x in ours.items():
    name = path.replace("stages_", "levels.").replace("/blocks_", ".blocks.")
    if x.ndim == 4:
      x = x.transpose(0, 3, 1, 2)
    if name.startswith("downsample_"):  # The official level ends with it.
      features[f"levels.{name[-1]}"] = x
    elif name not in ("levels.0", "levels.1", "levels.2"):
      features[name] = x
  features["pooled"] = features["norm"].mean(axis=(2, 3))
  return features


def _check_features(intermediates, want):
  got = _official_features(intermediates)
  names = [n.removeprefix("feat/") for n in want if n.startswith("feat/")]
  assert names
  for name in names:
    golden_data.assert_close(
      got[name], want[f"feat/{name}"], relative=1e-4, name=name
    )


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_equal_the_official_ones(name):
  model, variables, images, want = _tiny(name)
  cotangent = golden_data.make_cotangent(name, (2, 10))

  @jax.jit
  def run(params, images):
    def loss(params, images):
      logits, state = model.apply(
        {**variables, "params": params},
        images,
        capture_intermediates=True,
        mutable=["intermediates"],
      )
      return jnp.sum(cotangent * logits), (logits, state["intermediates"])

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      params, images
    )

  (_, (logits, intermediates)), gradients = run(variables["params"], images)
  assert logits.shape == (2, 10)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(
    logits, want["logits_f64"].reshape(2, 10), rtol=0, atol=1e-4
  )
  _check_features(intermediates, want)
  golden_data.assert_close(
    gradients[1].transpose(0, 3, 1, 2), want["grad_input_f64"], relative=1e-4
  )
  params = traverse_util.flatten_dict(gradients[0], sep="/")
  keys = [n.removeprefix("grad/") for n in want if n.startswith("grad/")]
  assert len(keys) == len(params)
  for key in keys:
    golden_data.assert_close(
      _to_official(key, params), want[f"grad/{key}"], relative=1e-4, name=key
    )


@pytest.mark.parametrize("name", FULL)
def test_full_models_equal_the_official_ones(name):
  want = golden_data.load("mambavision", f"full/{name}")
  keys = golden_data.load_json("mambavision", "keys")[name]
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  model = vimjax.create_model(FULL[name])
  variables = vimjax.convert_state_dict(model, state_dict)
  reference = want.get("logits_f64", want.get("logits"))
  batch = reference.shape[0]
  images = golden_data.make_images(name, (batch, 3, 224, 224))
  logits, state = jax.jit(
    lambda v, x: model.apply(
      v, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )(variables, images)
  assert logits.shape == (batch, 1000)
  np.testing.assert_allclose(logits, reference, rtol=0, atol=2e-4)
  np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(reference, -1))
  _check_features(state["intermediates"], want)


class _PaddedLevel(nn.Module):
  """An official level: three blocks in windows of 4, and what follows them."""

  @nn.compact
  def __call__(self, x):
    x = mambavision.WindowStage(
      window_size=4,
      scan=window_block.MambaVisionMixer,
      attend=functools.partial(attention.Attention, num_heads=2),
      block={},
      name="stages_2",
    )(x, (None, None, None))
    return _downsample(name="downsample_2")(x)


def _downsample(features=32, **fields):
  return nn.Conv(
    features, (3, 3), strides=2, padding=1, use_bias=False, **fields
  )


_MIXER = window_block.MambaVisionMixer()
_SCAN_BLOCK = window_block.Block(window_block.MambaVisionMixer, layer_scale=1.0)
_ATTENTION_BLOCK = window_block.Block(
  functools.partial(attention.Attention, num_heads=4)
)
# Reference -> our module; where its weights, there under "levels.0.", are in a
# whole model, officially and in ours.
OPS = {
  "mixer_L49": (_MIXER, "levels.2.blocks.0.mixer.", "stages_2/blocks_0/mixer/"),
  "mixer_L1": (_MIXER, "levels.2.blocks.0.mixer.", "stages_2/blocks_0/mixer/"),
  "mixer_d40": (_MIXER, "levels.2.blocks.0.mixer.", "stages_2/blocks_0/mixer/"),
  "attention": (
    attention.Attention(num_heads=4),
    "levels.2.blocks.0.mixer.",
    "stages_2/blocks_0/mixer/",
  ),
  "block_attn": (_ATTENTION_BLOCK, "levels.2.blocks.0.", "stages_2/blocks_0/"),
  "block_mamba_ls": (_SCAN_BLOCK, "levels.2.blocks.0.", "stages_2/blocks_0/"),
  "convblock": (
    conv_block.ConvBlock(),
    "levels.0.blocks.0.",
    "stages_0/blocks_0/",
  ),
  "patch_embed": (
    conv_block.PatchEmbed(in_dim=8, dim=16),
    "patch_embed.",
    "patch_embed/",
  ),
  "downsample": (_downsample(16), "levels.0.downsample.", "downsample_0/"),
  "layer_padded": (_PaddedLevel(), "levels.2.", ""),
}


def _channel_last(x):
  return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def _channel_first(x):
  return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


@pytest.mark.parametrize("name", OPS)
def test_parts_equal_the_official_ones(name):
  module, official, ours = OPS[name]
  name = f"mambavision_{name}"
  want = golden_data.load("mambavision", f"ops/{name}")
  keys = golden_data.load_json("mambavision", "ops/manifest")[name]
  if "weight_keys" in keys:  # As in ../shared.
    keys = keys["weight_keys"]
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  flat = {}
  for key, value in state_dict.items():
    whole = key.replace("levels.0.", official, 1)
    if not whole.endswith("num_batches_tracked"):
      rule = _rule(whole)
      path = rule.target(whole).replace(ours, "", 1)
      if not path.startswith("batch_stats/"):
        path = f"params/{path}"
      flat[path] = rule.layout.to_ours(value)
  variables = traverse_util.unflatten_dict(flat, sep="/")
  x = _channel_last(want["input"])

  @jax.jit
  def run(params, x):
    def f(params, x):
      return module.apply({**variables, "params": params}, x)

    y, pull = jax.vjp(f, params, x)
    cotangent = golden_data.make_cotangent(name, _channel_first(y).shape)
    return y, pull(_channel_last(cotangent))

  y, (grad_params, grad_x) = run(variables["params"], x)
  assert y.dtype == jnp.float32
  close = functools.partial(golden_data.assert_close, relative=1e-4)
  golden_data.assert_close(_channel_first(y), want["out_f64"], relative=1e-5)
  close(_channel_first(grad_x), want["grad_input_f64"])
  flat = traverse_util.flatten_dict(grad_params, sep="/")
  names = [n.removeprefix("grad/") for n in want if n.startswith("grad/")]
  assert len(names) == len(flat)
  for key in names:
    rule = _rule(key.replace("levels.0.", official, 1))
    path = rule.target(key.replace("levels.0.", official, 1))
    got = rule.layout.to_official(np.asarray(flat[path.replace(ours, "", 1)]))
    close(got, want[f"grad/{key}"], name=key)
