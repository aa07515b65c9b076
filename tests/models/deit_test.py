"""DeiT against the official model, and its two ways to attend."""

import functools

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import golden_data
import vimjax
from vimjax.layers import attention
from vimjax.weights import deit as deit_weights


@functools.cache
def _small(**fields):
  """A model that compiles quickly, with its variables and images."""
  model = vimjax.DeiT(
    **{
      **dict(num_classes=5, image_size=32, depth=2, embed_dim=16, num_heads=2),
      **fields,
    }
  )
  images = golden_data.make_images("small", (4, 3, 32, 32))
  shapes = jax.eval_shape(
    model.clone(scan_layers=False).init, jax.random.key(0), images
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes
  )
  if model.scan_layers:
    variables = vimjax.stack_layers(variables)
  return model, variables, images


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, variables, images, method=None):
  return model.apply(variables, images, method=method)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def _value_and_gradient(model, variables, images, train=False):
  def loss(variables):
    rngs = {"drop_path": jax.random.key(0)}
    logits = model.apply(variables, images, train=train, rngs=rngs)
    return jnp.sum(jnp.sin(logits))

  return jax.value_and_grad(loss)(variables)


def _official_state_dict(name):
  keys = golden_data.load_json("deit", "keys")[name]
  return golden_data.make_state_dict(golden_data.expand_keys(keys))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_the_full_model_equals_the_official_one(implementation):
  name = "deit_tiny_patch16_224"
  want = golden_data.load("deit", f"full/{name}")
  model = vimjax.create_model(
    "deit_tiny", scan_layers=True, attention_implementation=implementation
  )
  variables = vimjax.convert_state_dict(model, _official_state_dict(name))
  images = golden_data.make_images(name, (2, 3, 224, 224))
  logits = _apply(model, variables, images)
  assert logits.shape == (2, 1000)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, want["logits_f64"], rtol=0, atol=2e-4)
  np.testing.assert_array_equal(
    np.argmax(logits, -1), np.argmax(want["logits_f64"], -1)
  )
  pooled = _apply(model, variables, images, method="pooled")
  golden_data.assert_close(pooled, want["pooled"], relative=1e-4)


def test_attention_equals_its_definition_in_float64():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 12))
  module = attention.Attention(num_heads=3)
  variables = module.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  flat = {k: rng.normal(size=v.shape) for k, v in flat.items()}
  qkv = x @ flat["qkv/kernel"] + flat["qkv/bias"]
  q, k, v = qkv.reshape(2, 7, 3, 3, 4).transpose(2, 0, 3, 1, 4)
  weights = np.exp(q @ k.swapaxes(-1, -2) / 2.0)
  weights /= weights.sum(axis=-1, keepdims=True)
  want = (weights @ v).swapaxes(1, 2).reshape(2, 7, 12)
  want = want @ flat["proj/kernel"] + flat["proj/bias"]
  params = traverse_util.unflatten_dict(
    {k: v.astype(np.float32) for k, v in flat.items()}, sep="/"
  )
  got = module.apply({"params": params}, x.astype(np.float32))
  golden_data.assert_close(got, want, relative=1e-5)


def test_flash_attention_needs_a_gpu_and_says_so():
  model, variables, images = _small(attention_implementation="cudnn")
  with pytest.raises(
    pallas_kernels.UnsupportedError,
    match=r"needs an NVIDIA GPU, this runs on 'cpu'. Pass attention_impl",
  ):
    model.apply(variables, images)


@pytest.mark.parametrize(
  ("size", "dtype", "message"),
  [
    (64, "float32", "needs dtype bfloat16 or float16, got float32"),
    (49, "bfloat16", "multiple of 8 and at most 128, got 49"),
    (256, "bfloat16", "multiple of 8 and at most 128, got 256"),
  ],
)
def test_flash_attention_names_what_it_cannot_take(
  monkeypatch, size, dtype, message
):
  monkeypatch.setattr(attention.dispatch, "default_platform", lambda: "gpu")
  module = attention.Attention(num_heads=2, implementation="cudnn", dtype=dtype)
  x = jnp.zeros((1, 4, 2 * size))
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  with pytest.raises(pallas_kernels.UnsupportedError, match=message):
    jax.eval_shape(module.apply, variables, x)


@pytest.mark.parametrize("length", [4, 5])
def test_flash_attention_is_differentiated_at_even_lengths(monkeypatch, length):
  """JAX refuses others; here its plain attention stands for cuDNN's."""
  plain = jax.nn.dot_product_attention
  lengths = []

  def flash(q, k, v, *, implementation, **options):
    assert implementation == "cudnn"
    lengths.append(q.shape[1])
    return plain(q, k, v, implementation="xla", **options)

  module = attention.Attention(num_heads=2, dtype="bfloat16")
  x = jax.random.normal(jax.random.key(0), (2, length, 16), jnp.float32)
  variables = module.init(jax.random.key(1), x)
  loss = lambda module: lambda v, x: (module.apply(v, x) ** 2).sum()
  want = jax.value_and_grad(loss(module), (0, 1))(variables, x)
  monkeypatch.setattr(attention.dispatch, "default_platform", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", flash)
  module = module.clone(implementation="cudnn")
  got = jax.value_and_grad(loss(module), (0, 1))(variables, x)
  assert all(n % 2 == 0 for n in lengths)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  # One rounding to bfloat16 apart.
  chex.assert_trees_all_close(got, want, rtol=2e-2, atol=2e-2)
  lengths.clear()
  module.apply(variables, x)
  assert lengths == [length]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_attention_equals_plain_attention(dtype):
  if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU")
  model, variables, images = _small(
    embed_dim=128, dtype=dtype, scan_layers=True, image_size=96
  )
  images = golden_data.make_images("flash", (2, 3, 96, 96))
  flash = model.clone(attention_implementation="cudnn")
  text = jax.jit(flash.apply).lower(variables, images).as_text()
  assert "cudnn" in text
  want = _value_and_gradient(model.clone(dtype="float32"), variables, images)
  plain = _value_and_gradient(model, variables, images)
  got = _value_and_gradient(flash, variables, images)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, plain)
  chex.assert_tree_all_finite(got)
  for x, y, z in zip(*map(jax.tree.leaves, (got, plain, want)), strict=True):
    # No worse than twice plain attention in the same dtype.
    bound = 2 * np.abs(y - z).max() + 1e-2 * np.abs(z).max()
    assert np.abs(x - z).max() <= bound


def test_images_of_any_size_are_accepted():
  model, variables, _ = _small()
  images = golden_data.make_images("any", (1, 3, 51, 70))
  logits = _apply(model, variables, images)
  chex.assert_shape(logits, (1, 5))
  chex.assert_tree_all_finite(logits)
  # No patch covers the last rows and columns.
  np.testing.assert_allclose(
    _apply(model, variables, images[:, :48, :64]), logits, rtol=0, atol=1e-5
  )


def test_converting_for_another_size_equals_resizing_when_it_runs():
  model, variables, _ = _small()
  large = model.clone(image_size=(64, 96))
  images = golden_data.make_images("any", (1, 3, 64, 96))
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  state_dict = _to_state_dict(flat)
  for target, size in ((model, (64, 96)), (large, None)):
    got = vimjax.convert_state_dict(target, state_dict, image_size=size)
    assert got["params"]["pos_embed"].shape == (25, 16)
    np.testing.assert_allclose(
      _apply(large, got, images),
      _apply(model, variables, images),
      rtol=0,
      atol=1e-5,
    )


def _to_state_dict(flat):
  """The state dict of which our flat parameters are the conversion."""
  keys = golden_data.load_json("deit", "keys")["deit_tiny_patch16_224"]
  state_dict = {}
  for key in golden_data.expand_keys(keys):
    ((path, layout),) = [
      (r.target(key), r.layout) for r in deit_weights.RULES if r.target(key)
    ]
    if path in flat:
      state_dict[key] = layout.to_official(np.asarray(flat[path]))
  return state_dict


def test_features_and_pooled_are_the_normalised_tokens():
  model, variables, images = _small()
  logits, state = jax.jit(
    lambda v, x: model.apply(
      v, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )(variables, images)
  last = np.asarray(state["intermediates"]["layers_1"]["__call__"][0])
  mean, var = last.mean(-1, keepdims=True), last.var(-1, keepdims=True)
  norm, head = variables["params"]["norm"], variables["params"]["head"]
  tokens = (last - mean) / np.sqrt(var + 1e-6) * norm["scale"] + norm["bias"]
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
  pooled = _apply(model, variables, images, method="pooled")
  close(pooled, tokens[:, 0])
  features = _apply(model, variables, images, method="features")
  close(features, tokens[:, 1:].reshape(4, 2, 2, 16))
  close(logits, pooled @ head["kernel"] + head["bias"])


def test_scanned_and_rematerialised_layers_give_the_same_numbers():
  model, variables, images = _small(drop_path_rate=0.5)
  value, gradient = _value_and_gradient(model, variables, images)
  stacked = vimjax.stack_layers(variables)
  want = (value, vimjax.stack_layers(gradient))
  same = model.clone(scan_layers=True, remat=True)
  got = _value_and_gradient(same, stacked, images)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  dropped, _ = _value_and_gradient(same, stacked, images, train=True)
  assert abs(dropped - value) > 1e-3


def test_bfloat16_computes_in_bfloat16_around_a_float32_stream():
  model, variables, images = _small()
  want = _apply(model, variables, images)
  explicit = model.clone(dtype="bfloat16")
  for run_model, x in ((explicit, images), (model, images.astype("bfloat16"))):
    logits, state = jax.jit(
      lambda v, x, m=run_model: m.apply(
        v, x, capture_intermediates=True, mutable=["intermediates"]
      )
    )(variables, x)
    assert logits.dtype == jnp.float32
    chex.assert_tree_all_finite(logits)
    # bfloat16 has 8 bits; measured: 0.02 of the largest logit.
    golden_data.assert_close(logits, np.asarray(want), relative=0.05)
    layer = state["intermediates"]["layers_1"]
    assert layer["__call__"][0].dtype == jnp.float32
    assert layer["attention"]["__call__"][0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "precision",
  ["highest", jax.lax.Precision.HIGHEST, ("default", "highest")],
  ids=str,
)
def test_precision_reaches_every_matrix_product(precision):
  model, variables, images = _small(precision=precision, depth=1)
  text = str(jax.make_jaxpr(model.apply)(variables, images))
  products = text.count("dot_general[") + text.count("conv_general_dilated[")
  assert products == 6 + 2
  both = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
  mixed = text.count("precision=(Precision.DEFAULT, Precision.HIGHEST)")
  if isinstance(precision, tuple):  # Inside the attention: the finer one.
    assert (both, mixed) == (2, 6)
  else:
    assert both == products


@pytest.mark.parametrize(
  "precision", ["BF16_BF16_F32", jax.lax.DotAlgorithmPreset.BF16_BF16_F32]
)
def test_a_preset_reaches_every_matrix_product(precision):
  model, variables, images = _small(precision=precision, depth=1)
  text = str(jax.make_jaxpr(model.apply)(variables, images))
  assert text.count("precision=BF16_BF16_F32") == 6 + 2


def test_bfloat16_does_not_round_the_sum_with_the_position():
  model, variables, images = _small(dtype="bfloat16", depth=1)
  variables = jax.tree.map(np.zeros_like, variables)
  position = variables["params"]["pos_embed"]
  position += np.float32(1 + 2.0**-12)  # bfloat16 would take it for 1.
  _, state = jax.jit(
    lambda v, x: model.apply(
      v, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )(variables, images)
  (tokens,) = state["intermediates"]["layers_0"]["__call__"]
  np.testing.assert_array_equal(tokens[0], position, strict=True)


def test_float64_images_of_numpy_need_no_jit():
  # Warnings are errors here: JAX has one for float64 where it has none.
  model, variables, images = _small(depth=1)
  got = model.apply(variables, images[:1].astype(np.float64))
  assert got.dtype == jnp.float32
  want = _apply(model, variables, images[:1])
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_a_list_of_images_is_refused():
  model, variables, _ = _small()
  with pytest.raises(TypeError, match="images must be an array .* got a list"):
    model.apply(variables, [[[[0.0, 0.0, 0.0]]]])


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
  assert traces == [(4, 32, 32, 3), (4, 16, 32, 3)]


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((32, 32, 3), np.float32), r"\(batch, height, width, 3\), got"),
    (np.zeros((1, 32, 32, 3), np.uint8), "floating point, got uint8"),
    (np.zeros((1, 15, 32, 3), np.float32), "smaller than one patch of 16x16"),
  ],
)
def test_wrong_images_are_refused(images, message):
  model, *_ = _small()
  with pytest.raises(ValueError, match=f"DeiT: .*{message}"):
    jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(depth=0), "depth must be a positive integer, got 0"),
    (dict(num_heads=5), "embed_dim=192 does not divide into num_heads=5"),
    (dict(mlp_ratio=0), "mlp_ratio must be positive, got 0"),
    (dict(mlp_ratio=float("nan")), "mlp_ratio must be positive, got nan"),
    (dict(image_size=8), "8x8 pixels is smaller than one patch"),
    (dict(drop_path_rate=-0.1), r"drop_path_rate must be in \[0, 1\), got -0"),
    (dict(attention_implementation="flash"), r"None or one of \['xla', 'cud"),
  ],
)
def test_impossible_fields_are_refused_when_the_model_is_made(fields, message):
  with pytest.raises(ValueError, match=f"DeiT: .*{message}"):
    vimjax.create_model("deit_tiny", **fields)


def test_initial_values_are_those_of_the_official_code():
  model = vimjax.create_model("deit_tiny", scan_layers=True)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  for path, leaf in flat.items():
    x = np.asarray(leaf, np.float64)
    kind = path.rpartition("/")[2]
    if path.startswith("patch_embed"):
      bound = (3 * 16 * 16) ** -0.5  # Uniform.
      mean, std = 0.0, bound / 3**0.5
      assert np.abs(x).max() <= bound
    else:
      mean = 1.0 if kind == "scale" else 0.0
      std = {"kernel": 0.02, "pos_embed": 0.02, "class_token": 1e-6}.get(
        kind, 0
      )
    assert abs(x.mean() - mean) <= 4 * std / np.sqrt(x.size), path
    assert abs(x.std() - std) <= 4 * std / np.sqrt(2 * x.size), path
