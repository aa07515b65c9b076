"""What holds for every published model, checked without its weights."""

import functools
import math
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax import registry
from vimjax.weights import convert, rules

# Parameters, as published; computed with the official code. Where the official
# keys and shapes are: "family/name", None where nothing was published.
OFFICIAL = {
  "vim_tiny": (7_148_008, "vim/vim_tiny_patch16_224"),
  "vim_small": (25_796_584, "vim/vim_small_patch16_224"),
  "vim_base": (97_598_440, "vim/vim_base_patch16_224"),
  "vim_tiny_stride8": (7_250_344, "vim/vim_tiny_patch16_stride8_224"),
  "vim_small_stride8": (26_001_256, "vim/vim_small_patch16_stride8_224"),
  "vim_base_stride8": (98_007_784, None),
  "vmamba_tiny_v0": (22_893_448, "vmamba/vanilla_vmamba_tiny"),
  "vmamba_small_v0": (44_417_416, "vmamba/vanilla_vmamba_small"),
  "vmamba_base_v0": (76_254_056, "vmamba/vanilla_vmamba_base"),
  "vmamba_tiny_s2l5": (30_705_832, "vmamba/vmamba_tiny_s2l5"),
  "vmamba_small_s2l15": (50_147_752, "vmamba/vmamba_small_s2l15"),
  "vmamba_base_s2l15": (88_557_800, "vmamba/vmamba_base_s2l15"),
  "vmamba_tiny_s1l8": (30_249_064, "vmamba/vmamba_tiny_s1l8"),
  "vmamba_small_s1l20": (49_012_840, "vmamba/vmamba_small_s1l20"),
  "vmamba_base_s1l20": (86_614_504, "vmamba/vmamba_base_s1l20"),
  "vmamba_tiny_m2": (25_340_296, "vmamba/vmamba_tiny_m2"),
  "vmamba_small_m2": (39_079_816, "vmamba/vmamba_small_m2"),
  "vmamba_base_m2": (67_527_528, "vmamba/vmamba_base_m2"),
  "mambavision_tiny": (31_794_248, "mambavision/mamba_vision_T"),
  "mambavision_tiny2": (35_104_008, "mambavision/mamba_vision_T2"),
  "mambavision_small": (50_140_584, "mambavision/mamba_vision_S"),
  "mambavision_base": (97_685_288, "mambavision/mamba_vision_B"),
  "mambavision_base_21k": (97_685_288, "mambavision/mamba_vision_B"),
  "mambavision_large": (227_961_048, "mambavision/mamba_vision_L"),
  "mambavision_large_21k": (227_961_048, "mambavision/mamba_vision_L"),
  "mambavision_large2": (241_554_824, "mambavision/mamba_vision_L2"),
  "mambavision_large2_512_21k": (241_554_824, "mambavision/mamba_vision_L2"),
  "mambavision_large3_256_21k": (739_570_472, "mambavision/mamba_vision_L3"),
  "mambavision_large3_512_21k": (739_570_472, "mambavision/mamba_vision_L3"),
  "deit_tiny": (5_717_416, "deit/deit_tiny_patch16_224"),
  "deit_small": (22_050_664, "deit/deit_small_patch16_224"),
  "deit_base": (86_567_656, "deit/deit_base_patch16_224"),
}
# Names with a number at the end that we chose.
NUMBERED = re.compile(r"(layers|stages|blocks|downsample)_\d+")

_IMAGES = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)


def _abstract(model):
  return jax.eval_shape(model.init, jax.random.key(0), _IMAGES)


@functools.cache
def _published(name):
  """Variables of a model as published, shapes and dtypes only."""
  return _abstract(vimjax.create_model(name))


def _params(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _count(params):
  return sum(math.prod(leaf.shape) for leaf in params.values())


def _fields(name):
  return registry.field_names(vimjax.get_variant(name).module)


SCANNABLE = [n for n in vimjax.list_models() if "scan_layers" in _fields(n)]


def test_every_model_is_in_the_table():
  assert sorted(OFFICIAL) == vimjax.list_models()


@pytest.mark.parametrize("name", vimjax.list_models())
def test_parameters(name):
  params = _params(_published(name))
  assert _count(params) == OFFICIAL[name][0]
  assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
  for path in params:
    for part in path.split("/"):
      assert not re.search(r"_\d+$", part) or NUMBERED.fullmatch(part), path


@pytest.mark.parametrize("name", SCANNABLE)
def test_scanned_layers_have_the_same_parameters(name):
  model = vimjax.create_model(name, scan_layers=True)
  assert _count(_params(_abstract(model))) == OFFICIAL[name][0]


def _quick(name):
  """The model with the same outputs, but less to trace."""
  fields = _fields(name)
  less = {"scan_layers": True} if name in SCANNABLE else {}
  if "depths" in fields:
    less["depths"] = (1, 1, 2, 2)
  return vimjax.create_model(name, num_classes=10, **less)


@pytest.mark.parametrize(
  "name", ["vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny", "deit_tiny"]
)
def test_models_can_be_tabulated(name):
  table = _quick(name).tabulate(
    jax.random.key(0), jnp.zeros(_IMAGES.shape), console_kwargs={"width": 200}
  )
  assert "Total Parameters" in table


def _pooled_and_feature_shapes(model):
  """What `_IMAGES` should give."""
  if isinstance(model, vimjax.Vim | vimjax.DeiT):
    h, w = model.grid((64, 96))
    return (2, model.embed_dim), (2, h, w, model.embed_dim)
  d = model.embed_dim if isinstance(model, vimjax.VMamba) else model.dim
  maps = tuple((2, 16 >> i, 24 >> i, d << i) for i in range(4))
  return (2, 8 * d), maps


@pytest.mark.parametrize("name", vimjax.list_models())
def test_output_shapes(name):
  model = _quick(name)
  variables = _abstract(model)

  def shape(method=None):
    out = jax.eval_shape(
      lambda v, x: model.apply(v, x, method=method), variables, _IMAGES
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.float32.dtype}
    return jax.tree.map(lambda leaf: leaf.shape, out)

  pooled, features = _pooled_and_feature_shapes(model)
  assert shape() == (2, 10)
  assert shape("pooled") == pooled
  assert shape("features") == features


@pytest.mark.parametrize(
  "name",
  "vim_tiny vmamba_tiny_s1l8 vmamba_tiny_m2 mambavision_tiny deit_tiny".split(),
)
@pytest.mark.parametrize("method", ["__call__", "features"])
def test_an_empty_batch_gives_empty_results(name, method):
  model = _quick(name)
  images = jax.ShapeDtypeStruct((0, 64, 96, 3), jnp.float32)
  out = jax.eval_shape(
    lambda v, x: model.apply(v, x, method=method), _abstract(model), images
  )
  want = (0, 10)
  if method == "features":
    _, shapes = _pooled_and_feature_shapes(model)
    want = jax.tree.map(
      lambda shape: (0, *shape[1:]), shapes, is_leaf=_is_shape
    )
  assert jax.tree.map(lambda leaf: leaf.shape, out) == want


def _is_shape(x):
  return isinstance(x, tuple) and isinstance(x[0], int)


@pytest.mark.parametrize("name", [n for n in OFFICIAL if OFFICIAL[n][1]])
def test_all_official_keys_convert_and_back(name):
  family, keys = OFFICIAL[name][1].split("/")
  shapes = golden_data.expand_keys(golden_data.load_json(family, "keys")[keys])
  # Views of one number: the largest model costs no memory.
  official = {
    key: np.broadcast_to(np.float32(i), shape)
    for i, (key, shape) in enumerate(shapes.items())
  }
  reader = convert.FAMILIES[vimjax.get_variant(name).module]
  flat = traverse_util.flatten_dict(_published(name), sep="/")
  wanted = {path.removeprefix("params/"): leaf for path, leaf in flat.items()}
  rows = reader.rules(vimjax.create_model(name))
  ours, problems = rules.apply(rows, reader.ignored, official, wanted)
  assert not problems
  assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
    k: (v.shape, v.dtype) for k, v in wanted.items()
  }
  for key, value in official.items():
    if any(re.fullmatch(pattern, key) for pattern in reader.ignored):
      continue
    ((path, layout),) = [
      (r.target(key), r.layout) for r in rows if r.target(key)
    ]
    back = layout.to_official(ours.pop(path))
    assert back.shape == value.shape, key
    assert back.flat[0] == value.flat[0], key
  assert not ours
