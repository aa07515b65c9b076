"""What our VMamba adds to the official one: sizes, training, layouts."""

import functools

import chex
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.cross_selective_scan import arg_specs
from tests import golden_data
from tests.models import vmamba_test
import vimjax
from vimjax.layers import conv, cross_scan, ssd

GENERATIONS = {
  "v0": dict(
    state_size=2,
    expand=2.0,
    gate=True,
    conv_bias=True,
    mlp_ratio=0.0,
    stem="patches",
    downsample="patch_merging",
  ),
  "v2": dict(),
  "m2": dict(mixer="ssd", state_size=4, activation="gelu"),
}


@functools.cache
def _small(generation="v2", **fields):
  """A model that compiles quickly, with its variables and images."""
  model = vimjax.VMamba(
    **{
      **dict(num_classes=5, depths=(2, 1), embed_dim=8),
      **GENERATIONS[generation],
      **fields,
    }
  )
  images = golden_data.make_images("small", (2, 3, 20, 12))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, variables, images, method=None):
  return model.apply(variables, images, method=method)


def _images(h=20, w=12):
  return golden_data.make_images("small", (2, 3, h, w))


@pytest.mark.parametrize("name", vimjax.list_models("vmamba_*"))
def test_variants_are_as_published(name):
  variant = vimjax.get_variant(name)
  want = golden_data.load_json("vmamba", "variants")[variant.official]
  assert vimjax.create_model(name) == vmamba_test.model_of(
    want["constructor_args"]
  )
  weights = variant.pretrained
  if want["checkpoint"] is None:
    assert weights is None
    return
  assert weights.top1 == want["published_top1"]
  url = f"{weights.source}/{weights.files[0]}"
  assert url == "https://" + want["checkpoint"]
  assert weights.license == "MIT"
  assert weights.commercial_use
  assert variant.preprocessing == vimjax.get_variant("vim_tiny").preprocessing


@pytest.mark.parametrize(
  ("generation", "size", "want"),
  [
    ("v2", (21, 13), ((6, 4, 8), (3, 2, 16))),
    ("v0", (23, 13), ((5, 3, 8), (3, 2, 16))),
    ("m2", (1, 4), ((1, 1, 8), (1, 1, 16))),
  ],
)
def test_feature_maps_of_any_image_size(generation, size, want):
  model, variables = _small(generation)
  images = _images(*size)
  maps = _apply(model, variables, images, method="features")
  assert tuple(x.shape for x in maps) == tuple((2, *shape) for shape in want)
  chex.assert_tree_all_finite(maps)
  pooled = _apply(model, variables, images, method="pooled")
  scale, bias = (variables["params"]["norm"][k] for k in ("scale", "bias"))
  last = np.float64(maps[-1])
  last = last - last.mean(-1, keepdims=True)
  last = last / np.sqrt(last.var(-1, keepdims=True) + 1e-5) * scale + bias
  np.testing.assert_allclose(pooled, last.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_scanned_and_rematerialised_blocks_change_nothing():
  model, variables = _small(depths=(2,))
  images = _images()
  loss = lambda model: jax.jit(
    jax.value_and_grad(lambda v: jnp.sin(model.apply(v, images)).sum())
  )
  want, want_gradient = loss(model)(variables)
  other = model.clone(scan_layers=True, remat=True)
  got, gradient = loss(other)(vimjax.stack_layers(variables))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  chex.assert_trees_all_close(
    vimjax.unstack_layers(gradient), want_gradient, rtol=1e-3, atol=1e-4
  )


def test_drop_path_grows_over_the_blocks_and_only_in_training():
  model, variables = _small(drop_path_rate=0.6, scan_layers=True)
  variables = vimjax.stack_layers(variables)
  images = _images()
  run = jax.jit(
    lambda key: model.apply(
      variables, images, train=True, rngs={"drop_path": key}
    )
  )
  first, again, other = (run(jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  without = _apply(model.clone(drop_path_rate=0.0), variables, images)
  np.testing.assert_array_equal(_apply(model, variables, images), without)

  seen = []

  def record(next_fun, args, kwargs, context):
    if type(context.module).__name__ == "DropPath":
      seen.append(args[1])
    return next_fun(*args, **kwargs)

  model, variables = _small(drop_path_rate=0.6)
  with nn.intercept_methods(record):
    jax.eval_shape(
      lambda: model.apply(
        variables, images, train=True, rngs={"drop_path": jax.random.key(0)}
      )
    )
  # Mixer and MLP of each block have the same rate; the first is never dropped.
  np.testing.assert_allclose(seen, [0, 0, 0.3, 0.3, 0.6, 0.6])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bfloat16_stays_near_float32(generation):
  model, variables = _small(generation)
  images = _images()
  want = _apply(model, variables, images)
  narrow = model.clone(dtype="bfloat16")
  got = _apply(narrow, variables, images)
  assert got.dtype == jnp.float32
  maps = jax.eval_shape(
    lambda: narrow.apply(variables, images, method="features")
  )
  assert {x.dtype for x in maps} == {jnp.bfloat16.dtype}
  # 8 bits of mantissa through 3 blocks with weights larger than any model's.
  assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()


def test_one_trace_per_image_size():
  model, variables = _small("m2")
  traces = []

  @jax.jit
  def run(variables, images):
    traces.append(images.shape)
    return model.apply(variables, images)

  for size in ((8, 8), (8, 8), (12, 8), (8, 8)):
    run(variables, _images(*size))
  assert len(traces) == 2


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(mixer="mamba2"), r"mixer must be one of .*'ssd'\], got 'mamba2'"),
    (dict(stem="conv"), "stem must be one of .* got 'conv'"),
    (dict(downsample="v3"), "downsample must be one of"),
    (dict(activation="relu"), "activation must be one of"),
    (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\), got 1.0"),
    (dict(conv_size=4), "conv_size must be odd, got 4"),
    (dict(conv_size=-1), "conv_size must be a positive integer, got -1"),
    (dict(num_classes=0), "num_classes must be a positive integer, got 0"),
    (dict(embed_dim=9.5), "embed_dim must be a positive integer, got 9.5"),
    (dict(state_size=0), "state_size must be a positive integer, got 0"),
    (dict(dt_rank=0), "dt_rank must be a positive integer, got 0"),
    (dict(depths=(2, 0)), r"depths must be positive integers, .* got \(2, 0\)"),
    (dict(depths=()), r"depths must be positive integers, one per stage, got"),
    (dict(depths=3), "depths must be positive integers, one per stage, got 3"),
    (dict(expand=0), "expand must be positive, got 0"),
    (dict(mlp_ratio=-1), "mlp_ratio must not be negative, got -1"),
  ],
)
def test_impossible_fields_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    vimjax.VMamba(**fields)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((2, 3, 8), r"images must have shape \(batch, height, width, 3\)"),
    ((1, 8, 3, 3), "an image of 8x3 pixels is smaller than 4x4"),
    ((1, 0, 8, 3), "an image of 0x8 pixels is smaller than 4x4"),
  ],
)
def test_impossible_images_are_refused(shape, message):
  model, variables = _small("v0")
  with pytest.raises(ValueError, match=message):
    model.apply(variables, jnp.zeros(shape))


def test_heads_that_do_not_divide_the_channels_are_refused():
  with pytest.raises(ValueError, match="dt_rank=3 heads must divide the 8"):
    ssd.CrossSSD(state_size=2, dt_rank=3).init(
      jax.random.key(0), jnp.zeros((1, 2, 2, 8))
    )


def _ssd_by_hand(x, delta, A, B, C, reverse):
  """The recurrence, token by token."""

  def step(state, token):
    x, delta, B, C = token
    state = jnp.exp(delta * A)[..., None, None] * state
    state = state + (delta[..., None] * x)[..., None] * B[:, None, None]
    return state, jnp.einsum("bmpn,bn->bmp", state, C)

  first = lambda x: jnp.moveaxis(x, 1, 0)
  state = jnp.zeros((*x.shape[:1], *x.shape[2:], B.shape[-1]), x.dtype)
  tokens = tuple(map(first, (x, delta, B, C)))
  _, y = jax.lax.scan(step, state, tokens, reverse=reverse)
  return jnp.moveaxis(y, 0, 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [5, 130])
def test_chunks_of_matrix_products_equal_the_recurrence(length, reverse):
  rng = np.random.default_rng(length)
  b, m, p, n = 2, 3, 2, 4
  arrays = (
    rng.normal(size=(b, length, m, p)),
    np.exp(rng.normal(size=(b, length, m)) - 1),
    -np.exp(rng.normal(size=(m,))),
    rng.normal(size=(b, length, n)),
    rng.normal(size=(b, length, n)),
  )
  weights = rng.normal(size=(b, length, m, p))

  def run(scan, arrays):
    def loss(*arrays):
      y = scan(*arrays, reverse=reverse)
      return (weights.astype(y.dtype) * y).sum(), y

    every = tuple(range(len(arrays)))
    f = jax.value_and_grad(loss, argnums=every, has_aux=True)
    return jax.jit(f)(*arrays)

  with jax.enable_x64(True):
    want = jax.tree.map(np.asarray, run(_ssd_by_hand, arrays))
  got = run(ssd.ssd, jax.tree.map(np.float32, arrays))
  (_, got_y), got_gradients = got
  (_, want_y), want_gradients = want
  assert got_y.dtype == jnp.float32
  golden_data.assert_close(got_y, want_y, relative=1e-5)
  for name, x, y in zip(
    ("x", "delta", "A", "B", "C"), got_gradients, want_gradients, strict=True
  ):
    assert x.dtype == jnp.float32
    golden_data.assert_close(x, y, relative=1e-4, name=name)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_depthwise_convolutions_equal_the_general_one(size):
  rng = np.random.default_rng(size)
  x = rng.normal(size=(2, 4, 7, 3)).astype(np.float32)
  params = {
    "kernel": rng.normal(size=(size, size, 3)).astype(np.float32),
    "bias": rng.normal(size=3).astype(np.float32),
  }
  got = conv.DepthwiseConv2d(size, use_bias=True).apply({"params": params}, x)
  want = jax.lax.conv_general_dilated(
    x,
    params["kernel"][:, :, None],
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=3,
  )
  np.testing.assert_allclose(got, want + params["bias"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "name", sorted({n.rpartition("_")[0] for n in arg_specs.ARG_SPECS})
)
def test_benchmarked_calls_are_those_of_the_models(name, monkeypatch):
  calls = set()

  def record(u, delta, A, B, C, D, **options):
    assert options["delta_softplus"]
    assert D.shape == options["delta_bias"].shape == A.shape[:2]
    calls.add((*u.shape[1:], A.shape[-1]))
    return u

  monkeypatch.setattr(cross_scan.pallas_kernels, "cross_selective_scan", record)
  model = vimjax.create_model(name, scan_layers=True)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  jax.eval_shape(model.init, jax.random.key(0), images)
  specs = (arg_specs.ARG_SPECS[f"{name}_stage{i}"] for i in range(1, 5))
  assert calls == {(spec.h, spec.w, spec.d, spec.n) for spec in specs}
  assert cross_scan.DIRECTIONS == arg_specs.arguments.DIRECTIONS
  assert pallas_kernels.cross_selective_scan is record


INITIAL = {
  "vanilla_vmamba_tiny": "vmamba_tiny_v0",
  "vmamba_tiny_s1l8": "vmamba_tiny_s1l8",
}


@pytest.mark.parametrize("official", INITIAL)
def test_initial_values_are_distributed_as_the_official_ones(official):
  model = vimjax.create_model(INITIAL[official], scan_layers=True)
  # Compiled, the forward pass is dropped.
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))))
  params = vimjax.unstack_layers(init(jax.random.key(0)))["params"]
  flat = traverse_util.flatten_dict(params, sep="/")
  for key, facts in golden_data.load_json(
    "vmamba", f"init_stats/{official}"
  ).items():
    if isinstance(facts, dict):  # As in ../shared.
      facts = [facts[name] for name in ("shape", "mean", "std", "min", "max")]
    shape, mean, std, low, high = facts
    x = np.float64(vmamba_test.to_official(model, key, flat))
    assert list(x.shape) == shape, key
    # Four standard errors of the difference of two samples.
    error = 4 * np.sqrt(2 / x.size) * std + 1e-6 * abs(mean)
    assert abs(x.mean() - mean) <= error, (key, x.mean(), mean)
    if low == -2.0:
      # One of the 768,000 numbers hit the bound of PyTorch's truncated normal,
      # a hundred deviations out, by the rounding of its inverse error function.
      std = np.sqrt(std**2 - 4 / x.size)
    error = 4 * np.sqrt(1 / x.size) * std + 1e-6 * std
    assert abs(x.std() - std) <= error, (key, x.std(), std)
    if ".dt_projs_weight" in key or ".x_proj_weight" in key:  # Uniform.
      np.testing.assert_allclose([x.min(), x.max()], [low, high], rtol=0.02)


def test_ssd_starts_with_slow_steps_and_unit_decay():
  variables = ssd.CrossSSD(state_size=3, dt_rank=2).init(
    jax.random.key(0), jnp.zeros((1, 2, 2, 8))
  )
  params = variables["params"]
  np.testing.assert_array_equal(params["A_log"], np.zeros((4, 2)))
  np.testing.assert_array_equal(params["D"], np.ones((4, 2, 4)))
  bias = np.asarray(params["dt_bias"])
  assert bias.shape == (4, 2)
  assert 0 <= bias.min() < bias.max() < 0.1


def _official(name):
  """(model, state dict) of a tiny reference in the primary layout."""
  cases = golden_data.load_json("vmamba", "tiny/manifest")
  keys = golden_data.expand_keys(cases[name]["keys"])
  model = vmamba_test.model_of(cases[name]["constructor_args"])
  return model, golden_data.make_state_dict(keys)


def _single_file(key, x):
  """An array as the single-file version of the official code stores it."""
  for name in ("x_proj", "dt_projs"):
    if key.endswith(f"{name}_weight"):
      key = key.replace(f"{name}_weight", f"{name}.weight")
      return key, x.reshape(-1, x.shape[-1])
  return key, x


def _first_release(key, x):
  for new, old in (
    ("patch_embed.0.", "patch_embed.proj."),
    ("patch_embed.2.", "patch_embed.norm."),
    (".norm.", ".ln_1." if ".blocks." in key and ".op." not in key else None),
    (".op.", ".self_attention."),
    ("classifier.", ""),
  ):
    key = key if old is None else key.replace(new, old)
  return key.replace("downsample.ln_1", "downsample.norm"), x


def _single_file_merging(key, x):
  key, x = _single_file(key, x)
  key = key.replace("downsample.norm", "downsample.1")
  return key.replace("downsample.reduction", "downsample.2"), x


def _pointwise(key, x):
  """Linear weights as 1x1 convolutions."""
  linear = ("in_proj", "out_proj", "fc1", "fc2", "head")
  if key.split(".")[-2] in linear and key.endswith("weight"):
    return key, x[:, :, None, None]
  return key, x


@pytest.mark.parametrize(
  ("name", "layout"),
  [
    ("vmamba_s1_odd", _single_file),
    ("vmamba_s1_odd", _pointwise),
    ("vmamba_v0_odd", _first_release),
    ("vmamba_v0_odd", _single_file_merging),
    ("vmamba_m2", _single_file),
  ],
)
def test_checkpoints_of_every_layout_convert(name, layout):
  model, state_dict = _official(name)
  want = vimjax.convert_state_dict(model, state_dict)
  other = dict(layout(key, x) for key, x in state_dict.items())
  assert len(other) == len(state_dict)
  changed = [k for k in other if k not in state_dict]
  assert changed or layout is _pointwise
  got = vimjax.convert_state_dict(model, other)
  chex.assert_trees_all_equal(got, want, strict=True)
  # Back in the primary layout, bit for bit.
  exported = vimjax.export_state_dict(model, got)
  chex.assert_trees_all_equal(dict(exported), state_dict, strict=True)


def test_one_array_under_two_names_is_refused():
  model, state_dict = _official("vmamba_s1_odd")
  key = "layers.0.blocks.0.op.x_proj.weight"
  state_dict[key] = np.zeros((12, 16), np.float32)
  with pytest.raises(ValueError, match=r"x_proj_weight and .*x_proj\.weight"):
    vimjax.convert_state_dict(model, state_dict)


def test_another_class_count_gives_a_new_head():
  model, state_dict = _official("vmamba_s1_odd")
  variables = vimjax.convert_state_dict(
    model.clone(num_classes=7), state_dict, rng=jax.random.key(0)
  )
  head = variables["params"]["head"]
  assert head["kernel"].shape == (128, 7)
  np.testing.assert_array_equal(head["bias"], np.zeros(7))
