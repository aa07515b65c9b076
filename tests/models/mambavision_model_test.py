"""What our MambaVision adds to the official one: sizes, training, dtypes."""

import functools
import math
import re

import chex
import flax
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.layers import batch_norm, conv, windows
from vimjax.weights import mambavision as mambavision_weights


@functools.cache
def _small(**fields):
  """A model that compiles quickly, with its variables and images."""
  model = vimjax.MambaVision(
    **{
      **dict(
        num_classes=5,
        dim=8,
        in_dim=4,
        depths=(1, 1, 2, 1),
        num_heads=(1, 1, 2, 2),
        window_size=(8, 8, 2, 1),
        state_size=4,
      ),
      **fields,
    }
  )
  images = golden_data.make_images("small", (8, 3, 32, 32))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes
  )
  variables["batch_stats"] = jax.tree.map(
    lambda x: np.abs(x) + np.float32(0.5), variables["batch_stats"]
  )
  return model, variables, images


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, variables, images, method=None):
  return model.apply(variables, images, method=method)


@functools.partial(jax.jit, static_argnums=0)
def _train_step(model, variables, images):
  """(loss, (logits, new statistics)), gradient."""

  def loss(params):
    logits, updates = model.apply(
      {**variables, "params": params},
      images,
      train=True,
      rngs={"drop_path": jax.random.key(7)},
      mutable=["batch_stats"],
    )
    return jnp.sum(jnp.sin(logits)), (logits, updates["batch_stats"])

  return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize(
  "name", vimjax.list_models("mambavision_*"), ids=lambda n: n[12:]
)
def test_variants_are_as_published(name):
  variant = vimjax.get_variant(name)
  want = golden_data.load_json("mambavision", "variants")[variant.official]
  model = vimjax.create_model(name)
  for field, value in want["constructor_args"].items():
    if hasattr(model, field):  # Others are the same for all.
      value = tuple(value) if isinstance(value, list) else value
      assert getattr(model, field) == value, field
  weights = variant.pretrained
  assert weights.top1 == want["published_top1"]
  url = f"https://huggingface.co/{weights.source}/resolve/main/"
  assert want["checkpoint"] == url + weights.files[0]
  assert weights.license == "CC-BY-NC-SA-4.0"
  assert not weights.commercial_use
  how, cfg = variant.preprocessing, want["eval_cfg"]
  assert [3, how.size, how.size] == cfg["input_size"]
  assert how.crop_fraction == cfg["crop_pct"]
  for field in ("crop_mode", "interpolation"):
    assert getattr(how, field) == cfg[field]
  assert list(how.mean) == cfg["mean"]
  assert list(how.std) == cfg["std"]


def test_windows_are_cut_as_in_the_official_model():
  want = golden_data.load("mambavision", "ops/mambavision_window_partition")
  index = jnp.arange(48.0).reshape(1, 6, 8, 1)
  got = windows.partition(index, 2)
  np.testing.assert_array_equal(got[..., 0], want["index_6x8_ws2"])


def test_windows_that_do_not_fit_are_padded_with_zeros_and_cropped():
  x = jnp.arange(1.0, 2 * 5 * 7 * 3 + 1).reshape(2, 5, 7, 3)
  parts = windows.partition(x, 4)
  assert parts.shape == (2 * 2 * 2, 16, 3)
  assert parts.sum() == x.sum()
  np.testing.assert_array_equal(parts[1].reshape(4, 4, 3)[:, 3], 0)
  np.testing.assert_array_equal(parts[4, 0], x[1, 0, 0])
  np.testing.assert_array_equal(windows.merge(parts, 4, (5, 7)), x)


@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_centred_convolutions_pad_as_pytorch_does(taps, reverse):
  x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
  kernel = np.random.default_rng(1).normal(size=(taps, 3)).astype(np.float32)
  module = conv.DepthwiseConv1d(taps, reverse, centered=True, use_bias=False)
  got = module.apply({"params": {"kernel": kernel}}, x)
  if reverse:
    x, got = x[:, ::-1], got[:, ::-1]
  behind = (taps - 1) // 2  # An even kernel reaches further ahead.
  padded = np.pad(x, ((0, 0), (behind, taps - 1 - behind), (0, 0)))
  want = sum(kernel[i] * padded[:, i : i + 6] for i in range(taps))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_batch_norm_trains_as_pytorch_does():
  want = golden_data.load("mambavision", "ops/batchnorm_train")
  variables = {
    "params": {"scale": want["before_weight"], "bias": want["before_bias"]},
    "batch_stats": {
      "mean": want["before_running_mean"],
      "var": want["before_running_var"],
    },
  }
  x = want["input"].transpose(0, 2, 3, 1)
  out, updates = batch_norm.BatchNorm(epsilon=1e-4).apply(
    variables, x, train=True, mutable=["batch_stats"]
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  close(out.transpose(0, 3, 1, 2), want["out"], atol=1e-5)
  close(updates["batch_stats"]["mean"], want["after_running_mean"])
  close(updates["batch_stats"]["var"], want["after_running_var"])


def test_batch_norm_of_bfloat16_counts_in_float32():
  # A large mean: bfloat16 sums would lose the deviation.
  x = 100 + jax.random.normal(jax.random.key(0), (64, 8, 3))
  x = x.astype(jnp.bfloat16)
  norm = batch_norm.BatchNorm(param_dtype=jnp.bfloat16)
  variables = norm.init(jax.random.key(0), x)
  out, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  assert out.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves(updates):
    assert leaf.dtype == jnp.float32
  exact = np.asarray(x, np.float64)
  unbiased = exact.var((0, 1), ddof=1)
  np.testing.assert_allclose(
    updates["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-5
  )
  want = (exact - exact.mean((0, 1))) / np.sqrt(exact.var((0, 1)) + 1e-5)
  # One rounding to bfloat16.
  golden_data.assert_close(out.astype(jnp.float32), want, relative=2**-8)


def test_one_value_per_channel_cannot_be_normalised_in_training():
  norm = batch_norm.BatchNorm()
  x = jnp.ones((1, 1, 1, 4))
  variables = norm.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"more than one value per channel"):
    norm.apply(variables, x, train=True, mutable=["batch_stats"])


def test_making_variables_in_training_leaves_the_statistics_alone():
  norm = batch_norm.BatchNorm()
  x = 5 + jax.random.normal(jax.random.key(0), (8, 4))
  variables = norm.init(jax.random.key(0), x, train=True)
  want = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
  chex.assert_trees_all_equal(variables["batch_stats"], want, strict=True)


def test_training_without_room_for_the_statistics_is_an_error():
  model, variables, images = _small()
  with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
    jax.eval_shape(
      functools.partial(model.apply, train=True), variables, images
    )


def _over_devices(x):
  """The batch spread over all devices, and the mesh to compute in."""
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("data")
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)), mesh


def test_a_sharded_batch_counts_as_a_whole():
  norm = batch_norm.BatchNorm()
  x = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
  variables = norm.init(jax.random.key(0), x)

  @jax.jit
  def run(x):
    def f(x):
      return norm.apply(variables, x, train=True, mutable=["batch_stats"])

    out, pull, updates = jax.vjp(f, x, has_aux=True)
    return out, updates, pull(jnp.sin(x))

  want = run(x)
  sharded, mesh = _over_devices(x)
  with jax.set_mesh(mesh):
    got = run(sharded)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def _train(model, variables, images):
  """(logits, new statistics)."""
  logits, updates = model.apply(
    variables, images, train=True, mutable=["batch_stats"]
  )
  return logits, updates["batch_stats"]


def test_training_on_a_sharded_batch_gives_the_same_numbers():
  model, variables, images = _small()
  want = _train(model, variables, images)
  sharded, mesh = _over_devices(images)
  with jax.set_mesh(mesh):
    got = _train(model, variables, sharded)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  # Sums over eight parts round differently.
  chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)
  old = traverse_util.flatten_dict(variables["batch_stats"])
  for path, new in traverse_util.flatten_dict(got[1]).items():
    assert np.abs(new - old[path]).max() > 1e-3, path


def test_evaluation_uses_the_recorded_statistics():
  model, variables, images = _small()
  _, statistics = _train(model, variables, images)
  want = _apply(model, variables, images)
  got = _apply(model, variables | {"batch_stats": statistics}, images)
  assert np.abs(got - want).max() > 1e-2
  # One image alone gives what it gives among others.
  alone = jnp.broadcast_to(images[:1], images.shape)
  np.testing.assert_allclose(
    _apply(model, variables, alone)[0], want[0], rtol=0, atol=1e-4
  )


def test_rematerialised_blocks_give_the_same_numbers():
  model, variables, images = _small(
    depths=(1, 1, 1, 1), drop_path_rate=0.5, layer_scale=1.0
  )
  want = _train_step(model, variables, images)
  got = _train_step(model.clone(remat=True), variables, images)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)


def test_drop_path_rates_grow_over_all_blocks():
  model, variables, _ = _small(drop_path_rate=0.4, window_size=(8, 8, 1, 1))
  images = golden_data.make_images("any", (256, 3, 16, 16))
  _, state = jax.jit(
    lambda v, x: model.apply(
      v,
      x,
      train=True,
      rngs={"drop_path": jax.random.key(1)},
      capture_intermediates=lambda module, _: module.name == "drop_path",
      mutable=["batch_stats", "intermediates"],
    )
  )(variables, images)
  # Both convolution stages have one such module, window blocks have two.
  conv_blocks = [
    state["intermediates"][f"stages_{i}"]["blocks_0"]["drop_path"]
    for i in range(2)
  ]
  for block, rate in zip(conv_blocks, (0.0, 0.1), strict=True):
    dropped = (np.asarray(block["__call__"][0]) == 0).all(axis=(1, 2, 3))
    error = 4 * np.sqrt(rate * (1 - rate) / 256)
    assert abs(dropped.mean() - rate) <= error
  rates = model._drop_rates(train=True)
  np.testing.assert_allclose(np.concatenate(rates), np.linspace(0, 0.4, 5))
  assert model._drop_rates(train=False) == [(None,) * n for n in model.depths]


def test_images_of_any_size_give_maps_at_four_strides():
  model, variables, _ = _small(window_size=(8, 8, 2, 2))
  images = golden_data.make_images("any", (1, 3, 37, 70))
  logits = _apply(model, variables, images)
  chex.assert_shape(logits, (1, 5))
  maps = _apply(model, variables, images, method="features")
  chex.assert_tree_all_finite((logits, maps))
  assert isinstance(maps, tuple)
  assert [x.shape for x in maps] == [
    (1, 10, 18, 8),
    (1, 5, 9, 16),
    (1, 3, 5, 32),
    (1, 2, 3, 64),
  ]


def test_pooled_is_the_mean_of_the_normalised_last_map():
  model, variables, images = _small()
  last = _apply(model, variables, images, method="features")[-1]
  norm = batch_norm.BatchNorm()
  x = norm.apply(
    {name: variables[name]["norm"] for name in ("params", "batch_stats")}, last
  )
  pooled = _apply(model, variables, images, method="pooled")
  np.testing.assert_allclose(pooled, x.mean((1, 2)), rtol=1e-4, atol=1e-5)
  head = variables["params"]["head"]
  np.testing.assert_allclose(
    _apply(model, variables, images),
    pooled @ head["kernel"] + head["bias"],
    rtol=1e-4,
    atol=1e-5,
  )


def test_bfloat16_computes_in_bfloat16_around_float32_tokens():
  model, variables, images = _small()
  want = _apply(model, variables, images)
  explicit = model.clone(dtype="bfloat16")
  logits, state = jax.jit(
    lambda v, x: explicit.apply(
      v, x, capture_intermediates=True, mutable=["intermediates"]
    )
  )(variables, images)
  assert logits.dtype == jnp.float32
  chex.assert_tree_all_finite(logits)
  # bfloat16 has 8 bits; measured: 0.02 of the largest logit.
  golden_data.assert_close(logits, np.asarray(want), relative=0.05)
  inside = state["intermediates"]
  for stage, dtype in enumerate((jnp.bfloat16,) * 2 + (jnp.float32,) * 2):
    (x,) = inside[f"stages_{stage}"]["blocks_0"]["__call__"]
    assert x.dtype == dtype
  mixer = inside["stages_2"]["blocks_0"]["mixer"]
  assert mixer["__call__"][0].dtype == jnp.bfloat16
  assert mixer["ssm"]["__call__"][0].dtype == jnp.bfloat16
  made = jax.eval_shape(explicit.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_precision_reaches_every_product():
  model, variables, images = _small(precision="highest")
  text = str(jax.make_jaxpr(model.apply)(variables, images))
  products = text.count("dot_general[") + text.count("conv_general_dilated[")
  # Convolutions: stem, two blocks, downsampling; two scan blocks with six
  # products and one of attention with six; the head.
  assert products == 2 + 2 * 2 + 3 + 2 * 6 + 6 + 1
  highest = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
  assert highest + text.count("precision=Precision.HIGHEST") == products


def test_one_trace_per_image_size():
  model, variables, images = _small()
  traces = []

  @jax.jit
  def run(variables, images):
    traces.append(images.shape)
    return model.apply(variables, images)

  for _ in range(3):
    run(variables, images)
    run(variables, images[:, :16])
  assert traces == [(8, 32, 32, 3), (8, 16, 32, 3)]


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((32, 32, 3), np.float32), r"\(batch, height, width, 3\), got"),
    (np.zeros((1, 32, 32, 3), np.uint8), "floating point, got uint8"),
    (np.zeros((1, 0, 32, 3), np.float32), "0x32 pixels is smaller than 1x1"),
  ],
)
def test_wrong_images_are_refused(images, message):
  model, *_ = _small()
  with pytest.raises(ValueError, match=f"MambaVision: .*{message}"):
    jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(dim=0), "dim must be a positive integer, got 0"),
    (dict(mlp_ratio=-1.0), "mlp_ratio must be positive, got -1.0"),
    (dict(depths=(1, 2, 3)), r"depths must be four positive integers, got \(1"),
    (dict(num_heads=3), "num_heads must be four positive integers, got 3"),
    (dict(window_size=(8, 8, 14, 0)), "window_size must be four positive"),
    (dict(num_heads=(2, 4, 7, 16)), r"320 channels of stage 2 do not divide"),
    (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\), got 1"),
    (dict(attention_implementation="flash"), r"None or one of \['xla', 'cud"),
  ],
)
def test_impossible_fields_are_refused_when_the_model_is_made(fields, message):
  with pytest.raises(ValueError, match=f"MambaVision: .*{message}"):
    vimjax.create_model("mambavision_tiny", **fields)


@pytest.mark.parametrize("name", ["mamba_vision_T", "mamba_vision_B"])
def test_initial_values_have_the_official_mean_and_deviation(name):
  stats = golden_data.load_json("mambavision", f"init_stats/{name}")
  full = vimjax.create_model(
    {
      "mamba_vision_T": "mambavision_tiny",
      "mamba_vision_B": "mambavision_base",
    }[name]
  )
  # One block of each kind stands for all: they start alike.
  model = full.clone(depths=(1, 1, 2, 2))
  flat = _initial_values(model)
  for key, want in stats.items():
    if key.endswith("num_batches_tracked"):
      continue
    block = re.fullmatch(r"(levels\.(\d)\.blocks\.)(\d+)(.*)", key)
    if block:
      stage, i = int(block[2]), int(block[3])
      attends = stage > 1 and i >= math.ceil(full.depths[stage] / 2)
      key = f"{block[1]}{int(attends)}{block[4]}"
    ((path, layout),) = [
      (r.target(key), r.layout)
      for r in mambavision_weights.RULES
      if r.target(key)
    ]
    x = layout.to_official(flat[path])
    assert list(x.shape) == want["shape"]
    mean, std = _without_outlier(want, x.size)
    # Four standard errors of the difference of two samples; of a deviation for
    # the normal distribution, the widest of those here.
    error = 4 * np.sqrt(2 / x.size) * std + 1e-6 * abs(mean)
    assert abs(x.mean() - mean) <= error, (key, x.mean(), mean)
    error = 4 * np.sqrt(1 / x.size) * std + 1e-6 * abs(std)
    assert abs(x.std() - std) <= error, (key, x.std(), std)


def _initial_values(model):
  """Our paths as in rules, and float64 values."""
  image = jnp.zeros((1, 32, 32, 3))
  variables = jax.jit(model.init)(jax.random.key(0), image)
  flat = traverse_util.flatten_dict(variables, sep="/")
  return {
    path.removeprefix("params/"): np.asarray(x, np.float64)
    for path, x in flat.items()
  }


def _without_outlier(stats, count):
  """Mean and deviation without the value -2 that PyTorch sometimes draws.

  Its normal distribution of deviation 0.02, truncated at -2 and 2, gives -2
  where the uniform number beneath is exactly 0: once in 2^24 draws.
  """
  mean, std = stats["mean"], stats["std"]
  if stats["min"] != -2.0:
    return mean, std
  square = (std**2 + mean**2) * count - 4.0
  mean = (mean * count + 2.0) / (count - 1)
  return mean, np.sqrt(square / (count - 1) - mean**2)
