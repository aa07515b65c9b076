"""Vim against the official model, and what our module adds to it."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.weights import vim as vim_weights

TINY = ("vim_mid", "vim_mid_stride8", "vim_frontcls", "vim_nocls_mean")
FULL = ("vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224")


def _model(args, **fields):
  """Our model with the fields of an official constructor call."""
  token = "none"
  if args["if_cls_token"]:
    token = "middle" if args["use_middle_cls_token"] else "first"
  return vimjax.Vim(
    num_classes=args["num_classes"],
    image_size=tuple(args["img_size"]),
    patch_size=args["patch_size"],
    stride=args["stride"],
    depth=args["depth"],
    embed_dim=args["embed_dim"],
    state_size=args["d_state"],
    class_token=token,
    **fields,
  )


def _tiny(name, **fields):
  """(model, variables, images, references) of a tiny official model."""
  case = golden_data.load_json("vim", "tiny/manifest")[name]
  model = _model(case["constructor_args"], **fields)
  shapes = golden_data.expand_keys(case["keys"])
  state_dict = golden_data.make_state_dict(shapes)
  variables = vimjax.convert_state_dict(model, state_dict)
  images = golden_data.make_images(name, tuple(case["input_shape"]))
  return model, variables, images, golden_data.load("vim", f"tiny/{name}")


def _small(**fields):
  """A model that compiles quickly, with its variables and images."""
  model = vimjax.Vim(
    **{
      **dict(num_classes=5, image_size=32, depth=3, embed_dim=16, state_size=4),
      **fields,
    }
  )
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  return model, jax.jit(model.init)(jax.random.key(0), images), images


def _to_official(key, params):
  """The array of an official key, in its layout, from our flat parameters."""
  for rule in vim_weights.RULES:
    path = rule.target(key)
    if path:
      return rule.layout.to_official(np.asarray(params[path]))
  raise KeyError(key)


def _official_features(intermediates, depth):
  """Our intermediates under the names of the references."""
  flat = traverse_util.flatten_dict(intermediates, sep="/")
  ours = {path.removesuffix("/__call__"): x for path, (x,) in flat.items()}
  features = {
    "patch_embed": ours["patch_embed"],
    "tokens": ours["tokens"],
    "pooled": ours["norm"],
  }
  for i in range(depth):
    features[f"layers.{i}.out0"] = ours[f"layers_{i}/mixer"]
    features[f"layers.{i}.out1"] = ours[f"layers_{i - 1}" if i else "tokens"]
  return features


def _check_features(model, intermediates, want):
  got = _official_features(intermediates, model.depth)
  if model.class_token == "none":
    got["pooled"] = got["pooled"].mean(axis=1)
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
  def run(variables, images):
    def loss(variables, images):
      logits, state = model.apply(
        variables,
        images,
        capture_intermediates=True,
        mutable=["intermediates"],
      )
      return jnp.sum(cotangent * logits), (logits, state["intermediates"])

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      variables, images
    )

  (_, (logits, intermediates)), gradients = run(variables, images)
  assert logits.shape == (2, 10)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(
    logits, want["logits_f64"].reshape(2, 10), rtol=0, atol=1e-4
  )
  _check_features(model, intermediates, want)
  golden_data.assert_close(
    gradients[1].transpose(0, 3, 1, 2), want["grad_input_f64"], relative=1e-4
  )
  params = traverse_util.flatten_dict(gradients[0]["params"], sep="/")
  keys = [n.removeprefix("grad/") for n in want if n.startswith("grad/")]
  assert len(keys) == len(params)
  for key in keys:
    golden_data.assert_close(
      _to_official(key, params), want[f"grad/{key}"], relative=1e-4, name=key
    )


@pytest.mark.parametrize("name", FULL)
def test_full_models_equal_the_official_ones(name):
  want = golden_data.load("vim", f"full/{name}")
  keys = golden_data.load_json("vim", "keys")[name]
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  short = name.replace("_patch16", "").removesuffix("_224")
  # Scanned: it compiles in a fraction of the time.
  model = vimjax.create_model(short, scan_layers=True)
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
