"""Vim against the official model, and what our module adds to it."""

import contextlib
import functools

import chex
from flax import linen as nn
from flax import traverse_util
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.layers import bidirectional, conv, pos_embed
from vimjax.models import vim
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
  """A model that compiles quickly, with made-up variables and images."""
  small = dict(num_classes=5, image_size=32, depth=2, embed_dim=16)
  model = vimjax.Vim(**{**small, "state_size": 4, **fields})
  images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
  images = images.astype(np.float32)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    model.clone(scan_layers=False).init, jax.random.key(0), images
  )
  # The same values for every way to run the same layers.
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes
  )
  if model.scan_layers:
    variables = vimjax.stack_layers(variables)
  return model, variables, images


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, variables, images, method=None):
  return model.apply(variables, images, method=method)


@functools.partial(jax.jit, static_argnums=0)
def _look_inside(model, variables, images, drop_path_key=None):
  """(logits, intermediates), in training where there is a key."""
  logits, state = model.apply(
    variables,
    images,
    train=drop_path_key is not None,
    rngs=None if drop_path_key is None else {"drop_path": drop_path_key},
    capture_intermediates=True,
    mutable=["intermediates"],
  )
  return logits, state["intermediates"]


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
  layers = vimjax.unstack_layers(intermediates)
  got = _official_features(layers, model.depth)
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
  # Scanned layers compile sooner; one case covers the unrolled ones.
  scanned = name != "vim_mid"
  model, variables, images, want = _tiny(name, scan_layers=scanned)
  cotangent = golden_data.make_cotangent(name, (2, 10))

  def loss(variables, images):
    logits, intermediates = _look_inside(model, variables, images)
    return jnp.sum(cotangent * logits), (logits, intermediates)

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
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
  params = vimjax.unstack_layers(gradients[0])["params"]
  params = traverse_util.flatten_dict(params, sep="/")
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
  logits, intermediates = _look_inside(model, variables, images)
  assert logits.shape == (batch, 1000)
  np.testing.assert_allclose(logits, want["logits_f64"], rtol=0, atol=2e-4)
  np.testing.assert_array_equal(
    np.argmax(logits, -1), np.argmax(want["logits_f64"], -1)
  )
  _check_features(model, intermediates, want)


def test_float64_models_equal_the_float64_reference():
  with jax.enable_x64(True):
    model, variables, images, want = _tiny("vim_mid")
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)
    model = model.clone(param_dtype=jnp.float64)
    logits = jax.jit(model.apply)(variables, images.astype(np.float64))
    assert logits.dtype == jnp.float64
    golden_data.assert_close(logits, want["logits_f64"], relative=1e-12)


@pytest.mark.parametrize("length", [1, 13])
def test_the_mixer_equals_the_official_one(length):
  want = golden_data.load("vim", f"ops/vim_mixer_v2_L{length}")
  mixer = bidirectional.BidirectionalMixer(
    depth=1, state_size=16, expand=2, conv_size=4, dt_rank=2
  )

  def run(params, x, _):
    return mixer.apply({"params": params["layers_0"]["mixer"]}, x)

  _check_op(_with_gradients(run), want, "layers.0.mixer.")


def test_the_block_equals_the_official_one():
  fields = dict(depth=1, state_size=16, expand=2, conv_size=4, dt_rank=2)
  block = vim.Block(mixer=fields, dtype=jnp.float32)

  def run(params, hidden, residual):
    # The official block adds at its beginning, ours at its end.
    residual = residual + hidden
    out = block.apply({"params": params["layers_0"]}, residual)
    return jnp.concatenate([out - residual, residual], axis=-1)

  run = _with_gradients(run)
  for kind in ("fused", "unfused"):
    want = golden_data.load("vim", f"ops/vim_block_rms_{kind}")
    _check_op(run, want, "layers.0.")


def _with_gradients(run):
  """(gradients with respect to parameters and input, output)."""

  def loss(params, x, residual, cotangent):
    out = run(params, x, residual)
    return jnp.sum(cotangent * out), out

  return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def _check_op(run, want, prefix):
  """Output and every gradient of an op against its float64 reference."""
  flat = {}
  for name, value in want.items():
    if name.startswith("w/"):
      key = prefix + name.removeprefix("w/")
      (rule,) = [r for r in vim_weights.RULES if r.target(key)]
      flat[rule.target(key)] = rule.layout.to_ours(value)
  params = traverse_util.unflatten_dict(flat, sep="/")
  gradients, out = run(
    params, want["input"], want.get("residual"), want["cotangent"]
  )
  golden_data.assert_close(out, want["out_f64"], relative=1e-5)
  golden_data.assert_close(gradients[1], want["grad_input_f64"], relative=1e-4)
  flat = traverse_util.flatten_dict(gradients[0], sep="/")
  names = [n.removeprefix("grad/") for n in want if n.startswith("grad/")]
  assert len(names) == len(flat)
  for name in names:
    got, reference = _to_official(prefix + name, flat), want[f"grad/{name}"]
    golden_data.assert_close(got, reference, relative=1e-4, name=name)


@pytest.mark.parametrize("case", ["w4_L9", "w4_L2", "w3_L7"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_convolution_is_causal_in_either_direction(case, reverse):
  reference = golden_data.load("vim", "ops/causal_conv1d")
  x, weight, bias, want = (
    reference[f"{name}_{case}_silu"] for name in ("x", "weight", "bias", "out")
  )
  x, want = x.transpose(0, 2, 1), want.transpose(0, 2, 1)
  if reverse:
    x, want = x[:, ::-1], want[:, ::-1]
  module = conv.DepthwiseConv1d(weight.shape[1], reverse)
  params = {"kernel": weight.T.astype(np.float32), "bias": bias}
  got = module.apply({"params": params}, x.astype(np.float32))
  assert got.dtype == jnp.float32
  golden_data.assert_close(jax.nn.silu(got), want, relative=1e-5)


def test_the_norm_equals_the_official_one():
  want = golden_data.load("vim", "ops/rms_norm")
  norm = nn.RMSNorm(epsilon=1e-5)
  got = norm.apply({"params": {"scale": want["w/weight"]}}, want["input"])
  golden_data.assert_close(got, want["out_f64"], relative=1e-6)


def test_the_norm_of_the_float32_residual_rounds_once_to_bfloat16():
  want = golden_data.load("vim", "ops/rms_norm_fused_bf16")
  residual = want["residual"] + want["x"]
  np.testing.assert_allclose(residual, want["residual_out_f32"], rtol=1e-6)
  norm = nn.RMSNorm(epsilon=1e-5, dtype=jnp.bfloat16)
  got = norm.apply({"params": {"scale": want["weight"]}}, residual)
  assert got.dtype == jnp.bfloat16
  # The last bit of bfloat16, at most.
  golden_data.assert_close(
    got.astype(jnp.float32), want["out_bf16_as_f32"], relative=2**-8
  )


@pytest.mark.parametrize("side", [7, 14, 24, 27])
def test_positional_embeddings_resize_as_the_official_ones(side):
  want = golden_data.load("vim", "ops/pos_embed_bicubic")
  got = pos_embed.resize(
    want["in_14"][0], (14, 14), (side, side), old_class_row=0, new_class_row=0
  )
  np.testing.assert_allclose(got, want[f"out_{side}"][0], rtol=0, atol=1e-5)


def test_resizing_keeps_the_class_row_and_the_place_of_patches():
  # A ramp along the columns stays one, nearly; the class row does not leak.
  ramp = jnp.broadcast_to(jnp.arange(8.0)[None, :, None], (6, 8, 1))
  rows = jnp.insert(ramp.reshape(48, 1), 24, 1000.0, axis=0)
  got = pos_embed.resize(
    rows, (6, 8), (6, 16), old_class_row=24, new_class_row=48
  )
  assert got.shape == (97, 1)
  assert got[48, 0] == 1000.0
  grid = jnp.delete(got, 48, axis=0).reshape(6, 16)
  want = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
  np.testing.assert_allclose(grid, np.tile(want, (6, 1)), rtol=0, atol=0.2)


@pytest.mark.parametrize("token", ["middle", "first", "none"])
def test_images_of_any_size_are_accepted(token):
  model, variables, _ = _small(class_token=token, depth=1)
  images = golden_data.make_images("any", (1, 3, 51, 70))
  logits = _apply(model, variables, images)
  chex.assert_shape(logits, (1, 5))
  chex.assert_tree_all_finite(logits)
  features = jax.eval_shape(
    functools.partial(model.apply, method="features"), variables, images
  )
  assert features.shape == (1, 3, 4, 16)
  # The two ways to resize differ where the class token is not in row 0.
  official = model.clone(pos_embed_resize="official")
  difference = np.abs(_apply(official, variables, images) - logits).max()
  assert (difference > 1e-3) == (token == "middle")


def test_pixels_beyond_the_last_whole_patch_are_dropped():
  model, variables, _ = _small(depth=1)
  images = golden_data.make_images("any", (1, 3, 51, 70))
  np.testing.assert_allclose(
    _apply(model, variables, images[:, :48, :64]),
    _apply(model, variables, images),
    rtol=0,
    atol=1e-5,
  )


def test_features_and_pooled_are_the_normalised_tokens():
  model, variables, images = _small()
  logits, intermediates = _look_inside(model, variables, images)
  last = intermediates["layers_1"]["__call__"][0]
  norm = nn.RMSNorm(epsilon=1e-5)
  tokens = norm.apply({"params": variables["params"]["norm"]}, last)
  pooled = _apply(model, variables, images, method="pooled")
  np.testing.assert_allclose(pooled, tokens[:, 2], atol=1e-6)
  features = _apply(model, variables, images, method="features")
  patches = jnp.delete(tokens, 2, axis=1).reshape(2, 2, 2, 16)
  np.testing.assert_allclose(features, patches, atol=1e-6)
  head = variables["params"]["head"]
  np.testing.assert_allclose(
    logits, pooled @ head["kernel"] + head["bias"], atol=1e-6
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def _value_and_gradient(model, variables, images, train=False):
  def loss(variables):
    rngs = {"drop_path": jax.random.key(0)}
    logits = model.apply(variables, images, train=train, rngs=rngs)
    return jnp.sum(jnp.sin(logits))

  return jax.value_and_grad(loss)(variables)


def test_scanned_and_rematerialised_layers_give_the_same_numbers():
  model, variables, images = _small()
  value, gradient = _value_and_gradient(model, variables, images)
  scanned = model.clone(scan_layers=True)
  stacked = vimjax.stack_layers(variables)
  got = _value_and_gradient(scanned, stacked, images)
  want = (value, vimjax.stack_layers(gradient))
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  got = _value_and_gradient(model.clone(remat=True), variables, images)
  chex.assert_trees_all_close(got, (value, gradient), rtol=1e-4, atol=1e-5)


def test_remat_recomputes_the_same_drop_path_in_less_memory():
  model, variables, images = _small(
    scan_layers=True, drop_path_rate=0.5, depth=6
  )
  images = np.tile(images, (8, 1, 1, 1))
  results, memory = [], []
  for remat in (False, True):
    program = _value_and_gradient.lower(
      model.clone(remat=remat), variables, images, train=True
    ).compile()
    results.append(program(variables, images))
    memory.append(program.memory_analysis().temp_size_in_bytes)
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
  assert memory[1] < 0.6 * memory[0]


@pytest.mark.parametrize(
  "context",
  [
    pytest.param(jax.set_mesh, id="set", marks=pytest.mark.long),
    pytest.param(contextlib.nullcontext, id="of_arrays"),
  ],
)
def test_a_mesh_of_explicit_axes_gives_the_same_numbers(context):
  model, variables, images = _small(
    scan_layers=True, remat=True, drop_path_rate=0.5
  )
  images = np.tile(images, (4, 1, 1, 1))
  want = _value_and_gradient(model, variables, images, train=True)
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Explicit,))
  sharded = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
  replicated = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
  with context(mesh):
    got = _value_and_gradient(model, replicated, sharded, train=True)
  chex.assert_trees_all_close(
    jax.device_get(got), jax.device_get(want), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_drop_path_drops_whole_images_at_rates_that_grow(scan):
  model, variables, _ = _small(scan_layers=scan, drop_path_rate=0.5, depth=3)
  images = golden_data.make_images("any", (256, 3, 16, 16))

  logits, intermediates = _look_inside(
    model, variables, images, jax.random.key(4)
  )
  chex.assert_tree_all_finite(logits)
  layers = vimjax.unstack_layers(intermediates)
  dropped = []
  for i, rate in enumerate((0.0, 0.25, 0.5)):
    before, after = (
      np.asarray(layers[f"layers_{i}"][name]["__call__"][0])
      for name in ("mixer", "drop_path")
    )
    dropped.append((after == 0).all(axis=(1, 2)))
    # Four standard errors of 256 draws.
    error = 4 * np.sqrt(rate * (1 - rate) / 256)
    assert abs(dropped[i].mean() - rate) <= error
    kept = ~dropped[i]
    np.testing.assert_allclose(
      after[kept], before[kept] / (1 - rate), rtol=1e-5
    )
  # Each layer draws for itself; then a quarter of 0.5 falls together.
  assert abs((dropped[1] & dropped[2]).mean() - 0.125) < 4 * np.sqrt(0.11 / 256)
  again, _ = _look_inside(model, variables, images, jax.random.key(4))
  np.testing.assert_array_equal(again, logits)
  other, _ = _look_inside(model, variables, images, jax.random.key(5))
  assert np.abs(other - logits).max() > 1e-3


def test_one_layer_drops_at_the_full_rate():
  model, variables, _ = _small(depth=1, drop_path_rate=0.9)
  images = golden_data.make_images("any", (64, 3, 16, 16))
  key = jax.random.key(0)
  _, intermediates = _look_inside(model, variables, images, key)
  out = intermediates["layers_0"]["drop_path"]["__call__"][0]
  assert 0.75 < np.mean(np.all(out == 0, axis=(1, 2))) <= 1.0


def test_evaluation_and_rate_zero_need_no_rng():
  model, variables, images = _small(drop_path_rate=0.5)
  want = _apply(model, variables, images)
  without = model.clone(drop_path_rate=0.0)
  got = jax.jit(functools.partial(without.apply, train=True))(variables, images)
  np.testing.assert_array_equal(got, want)
  with pytest.raises(flax.errors.InvalidRngError, match="drop_path"):
    jax.eval_shape(
      functools.partial(model.apply, train=True), variables, images
    )


def test_bfloat16_computes_in_bfloat16_around_a_float32_stream():
  model, variables, images, _ = _tiny("vim_mid", scan_layers=True)
  want = _apply(model, variables, images)
  explicit = model.clone(dtype="bfloat16")
  for run_model, x in ((explicit, images), (model, images.astype("bfloat16"))):
    logits, intermediates = _look_inside(run_model, variables, x)
    assert logits.dtype == jnp.float32
    chex.assert_tree_all_finite(logits)
    # Measured: 0.0095 of the largest logit; bfloat16 has 8 bits.
    golden_data.assert_close(logits, np.asarray(want), relative=0.02)
    layer = intermediates["layers"]
    assert layer["__call__"][0].dtype == jnp.float32
    assert layer["mixer"]["__call__"][0].dtype == jnp.bfloat16
    assert layer["mixer"]["forward_ssm"]["__call__"][0].dtype == jnp.bfloat16
    features = jax.eval_shape(
      functools.partial(run_model.apply, method="features"), variables, x
    )
    assert features.dtype == jnp.bfloat16
  made = jax.eval_shape(explicit.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_precision_reaches_every_matrix_product():
  model, variables, images = _small(precision="highest")
  jaxpr = jax.make_jaxpr(model.apply)(variables, images)
  text = str(jaxpr)
  products = text.count("dot_general[") + text.count("conv_general_dilated[")
  # Per layer in, out, twice x and dt; the patches and the head.
  assert products == 2 * 6 + 2
  assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + (
    text.count("precision=Precision.HIGHEST")
  ) == (products)


def test_one_trace_per_image_size():
  model, variables, images = _small(scan_layers=True)
  traces = []

  @jax.jit
  def run(variables, images):
    traces.append(images.shape)
    return model.apply(variables, images)

  for _ in range(3):
    run(variables, images)
    run(variables, images[:, :16])
  assert traces == [(2, 32, 32, 3), (2, 16, 32, 3)]


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((32, 32, 3)), r"shape \(batch, height, width, 3\), got \(32"),
    (np.zeros((1, 3, 32, 32)), r"\(batch, height, width, 3\), got \(1, 3, 32"),
    (np.zeros((1, 32, 32, 3), np.uint8), "floating point, got uint8.*normal"),
    (np.zeros((1, 15, 32, 3)), "15x32 pixels is smaller than one patch of 16"),
  ],
)
def test_wrong_images_are_refused(images, message):
  if images.dtype == np.float64:
    images = images.astype(np.float32)
  model = vimjax.create_model("vim_tiny", depth=1)
  with pytest.raises(ValueError, match=f"(?s)Vim: .*{message}"):
    jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(class_token="center"), r"class_token must be one of \['middle'"),
    (dict(pos_embed_resize="bad"), "pos_embed_resize must be one of"),
    (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\), got 1"),
    (dict(image_size=8), "8x8 pixels is smaller than one patch"),
    (dict(image_size=(64,)), r"image_size must be an integer or \(h, w\), got"),
    (dict(image_size=64.0), "image_size must be an integer"),
    (dict(depth=0), "depth must be a positive integer, got 0"),
    (dict(stride=0), "stride must be a positive integer, got 0"),
    (dict(embed_dim=1.5), "embed_dim must be a positive integer, got 1.5"),
  ],
)
def test_impossible_fields_are_refused_when_the_model_is_made(fields, message):
  with pytest.raises(ValueError, match=f"Vim: .*{message}"):
    vimjax.create_model("vim_tiny", **fields)


def test_initial_values_have_the_official_mean_and_deviation():
  model = vimjax.create_model("vim_tiny", scan_layers=True)
  image = jnp.zeros((1, 16, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(0), image)
  params = vimjax.unstack_layers(variables)["params"]
  flat = traverse_util.flatten_dict(params, sep="/")
  compared = 0
  for name, want in golden_data.load_json("vim", "init_stats").items():
    for i, (mean, std) in enumerate(
      zip(want["mean"], want["std"], strict=True)
    ):
      key = name.replace("*", str(i))
      x = np.asarray(_to_official(key, flat), np.float64)
      # Four standard errors of the difference of two samples.
      error = 4 * np.sqrt(2 / x.size) * std + 1e-6 * abs(mean)
      assert abs(x.mean() - mean) <= error, (key, x.mean(), mean)
      error = 4 * np.sqrt(1 / x.size) * std + 1e-6 * abs(std)
      assert abs(x.std() - std) <= error, (key, x.std(), std)
      compared += 1
  assert compared == len(flat) == 415
