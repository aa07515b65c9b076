"""VMamba against the official model."""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.layers import pyramid, ss2d
from vimjax.weights import vmamba as vmamba_weights

TINY = (
  "vmamba_s1",
  "vmamba_s1_odd",
  "vmamba_s2",
  "vmamba_v0",
  "vmamba_v0_odd",
  "vmamba_m2",
)
FULL = {
  "vanilla_vmamba_tiny": "vmamba_tiny_v0",
  "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
  "vmamba_tiny_s1l8": "vmamba_tiny_s1l8",
}


def model_of(args):
  """Our model with the fields of an official constructor call."""
  form = args["forward_type"]
  return vimjax.VMamba(
    num_classes=args["num_classes"],
    depths=tuple(args["depths"]),
    embed_dim=args["dims"],
    mixer="ssd" if form.startswith("m0") else "selective_scan",
    state_size=args["ssm_d_state"],
    expand=args["ssm_ratio"],
    gate=not form.endswith("_noz"),
    conv_size=args["ssm_conv"],
    conv_bias=args["ssm_conv_bias"],
    activation=args["ssm_act_layer"],
    mlp_ratio=args["mlp_ratio"],
    stem={"v1": "patches", "v2": "overlapping"}[args["patchembed_version"]],
    downsample={"v1": "patch_merging", "v3": "conv"}[
      args["downsample_version"]
    ],
    drop_path_rate=args["drop_path_rate"],
  )


def _tiny(name):
  """(model, variables, images, references) of a tiny official model."""
  cases = golden_data.load_json("vmamba", "tiny/manifest")
  case = cases[name]
  model = model_of(case["constructor_args"])
  keys = case["keys"]
  keys = cases[keys]["keys"] if isinstance(keys, str) else keys
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  variables = vimjax.convert_state_dict(model, state_dict)
  images = golden_data.make_images(name, tuple(case["input_shape"]))
  return model, variables, images, golden_data.load("vmamba", f"tiny/{name}")


def _rule(model, key):
  (rule,) = [r for r in vmamba_weights.rules_for(model) if r.target(key)]
  return rule


def to_official(model, key, flat):
  """The array of an official key, in its layout, from our flat parameters."""
  rule = _rule(model, key)
  return rule.layout.to_official(np.asarray(flat[rule.target(key)]))


def _official_features(intermediates, channel_first):
  """Our intermediates under the names and in the layouts of the references."""
  flat = traverse_util.flatten_dict(intermediates, sep="/")
  ours = {path.removesuffix("/__call__"): x for path, (x,) in flat.items()}
  features = {
    "patch_embed": ours["stem"],
    "layers.3": ours["stages_3"],
    "classifier.norm": ours["norm"],
  }
  for path, x in ours.items():
    if path.startswith("downsample_") and "/" not in path:
      features[f"layers.{path[-1]}"] = x  # The official stage ends with it.
    stage, _, block = path.partition("/layers_")
    if block.isdigit():
      features[f"layers.{stage[-1]}.blocks.{block}"] = x
  if channel_first:
    features = {k: x.transpose(0, 3, 1, 2) for k, x in features.items()}
  features["pooled"] = ours["norm"].mean(axis=(1, 2))
  return features


def _check_features(model, intermediates, want):
  # The official second generation is channel-first.
  channel_first = model.stem == "overlapping" and model.mixer != "ssd"
  got = _official_features(intermediates, channel_first)
  names = [n.removeprefix("feat/") for n in want if n.startswith("feat/")]
  assert names
  for name in names:
    golden_data.assert_close(
      got[name], want[f"feat/{name}"], relative=1e-4, name=name
    )


# The odd forms of these show as much.
_LONG = ("vmamba_s1", "vmamba_v0")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.long) if n in _LONG else n for n in TINY],
)
def test_tiny_models_equal_the_official_ones(name):
  model, variables, images, want = _tiny(name)
  cotangent = golden_data.make_cotangent(name, (2, 10))

  @jax.jit
  def run(params, images):
    def loss(params, images):
      logits, state = model.apply(
        {"params": params},
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
  _check_features(model, intermediates, want)
  golden_data.assert_close(
    gradients[1].transpose(0, 3, 1, 2), want["grad_input_f64"], relative=1e-4
  )
  params = traverse_util.flatten_dict(gradients[0], sep="/")
  keys = [n.removeprefix("grad/") for n in want if n.startswith("grad/")]
  assert len(keys) == len(params)
  for key in keys:
    golden_data.assert_close(
      to_official(model, key, params),
      want[f"grad/{key}"],
      relative=1e-4,
      name=key,
    )


@pytest.mark.parametrize("name", FULL)
def test_full_models_equal_the_official_ones(name):
  want = golden_data.load("vmamba", f"full/{name}")
  keys = golden_data.load_json("vmamba", "keys")[name]
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  # Scanned: it compiles in a fraction of the time.
  model = vimjax.create_model(FULL[name], scan_layers=True)
  variables = vimjax.convert_state_dict(model, state_dict)
  batch = want["logits"].shape[0]
  images = golden_data.make_images(name, (batch, 3, 224, 224))
  logits, state = jax.jit(
    lambda v, x: model.apply(
      v, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )(variables, images)
  assert logits.shape == (batch, 1000)
  np.testing.assert_allclose(logits, want["logits_f64"], rtol=0, atol=2e-4)
  np.testing.assert_array_equal(
    np.argmax(logits, -1), np.argmax(want["logits_f64"], -1)
  )
  unrolled = vimjax.unstack_layers(state["intermediates"])
  _check_features(model, unrolled, want)


_DTYPES = dict(dtype=jnp.float32, param_dtype=jnp.float32)
_OP = ("layers.0.blocks.0.op.", "stages_0/layers_0/mixer/")
# Reference -> our module; where its weights are in a whole model, officially
# and in ours; whether it is channel-first.
OPS = {
  "ss2d_v05_noz": (ss2d.SS2D(), *_OP, True),
  "ss2d_v05_noz_1x1": (ss2d.SS2D(), *_OP, True),
  "ss2d_v05_chlast": (ss2d.SS2D(), *_OP, False),
  "ss2d_v05_z": (ss2d.SS2D(gate=True), *_OP, True),
  "ss2d_v05_noz_r2_n4": (
    ss2d.SS2D(expand=2.0, state_size=4, conv_bias=True),
    *_OP,
    True,
  ),
  "ss2d_rank2": (ss2d.SS2D(), *_OP, True),
  "ss2d_v0": (
    ss2d.SS2D(expand=2.0, state_size=16, conv_bias=True, gate=True),
    *_OP,
    False,
  ),
  "vssblock": (
    ss2d.Block(mixer={}, mlp_ratio=4.0, precision=None, **_DTYPES),
    "layers.0.blocks.0.",
    "stages_0/layers_0/",
    True,
  ),
  "patch_embed_v2": (
    pyramid.OverlappingStem(16, precision=None, **_DTYPES),
    "patch_embed.",
    "stem/",
    True,
  ),
  "patch_merging_even": (
    pyramid.PatchMerging(precision=None, **_DTYPES),
    "layers.0.downsample.",
    "downsample_0/",
    False,
  ),
}


@pytest.mark.parametrize("name", OPS)
def test_parts_equal_the_official_ones(name):
  module, official, ours, channel_first = OPS[name]
  want = golden_data.load("vmamba", f"ops/vmamba_{name}")
  merging = isinstance(module, pyramid.PatchMerging)
  whole = vimjax.VMamba(downsample="patch_merging" if merging else "conv")
  rules = {
    name.removeprefix("grad/"): _rule(whole, name.replace("grad/", official, 1))
    for name in want
    if name.startswith("grad/")
  }
  paths = {
    key: rule.target(official + key).replace(ours, "", 1)
    for key, rule in rules.items()
  }
  flat = {
    paths[key]: rule.layout.to_ours(want[f"w/{key}"])
    for key, rule in rules.items()
  }
  params = traverse_util.unflatten_dict(flat, sep="/")
  to_ours = lambda x: x.transpose(0, 2, 3, 1) if channel_first else x
  to_official = lambda x: x.transpose(0, 3, 1, 2) if channel_first else x

  @jax.jit
  def run(params, x, cotangent):
    f = lambda params, x: module.apply({"params": params}, x)
    y, pull = jax.vjp(f, params, x)
    return y, pull(cotangent.astype(y.dtype))

  y, (grad_params, grad_x) = run(
    params, to_ours(want["input"]), to_ours(want["cotangent"])
  )
  assert y.dtype == jnp.float32
  close = functools.partial(golden_data.assert_close, relative=1e-4)
  golden_data.assert_close(to_official(y), want["out_f64"], relative=1e-5)
  close(to_official(grad_x), want["grad_input_f64"])
  got = traverse_util.flatten_dict(grad_params, sep="/")
  assert len(got) == len(rules)
  for key, rule in rules.items():
    value = rule.layout.to_official(np.asarray(got[paths[key]]))
    close(value, want[f"grad/{key}"], name=key)
