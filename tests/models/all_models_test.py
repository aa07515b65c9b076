"""What holds for every published model, checked without its weights."""

import math
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax

# As published; computed with the official code.
PARAMETERS = {
  "vim_tiny": 7_148_008,
  "vim_small": 25_796_584,
  "vim_base": 97_598_440,
  "vim_tiny_stride8": 7_250_344,
  "vim_small_stride8": 26_001_256,
  "vim_base_stride8": 98_007_784,
}
# Where the official keys and shapes are: (family, name). None was published
# for vim_base_stride8.
KEYS = {
  "vim_tiny": ("vim", "vim_tiny_patch16_224"),
  "vim_small": ("vim", "vim_small_patch16_224"),
  "vim_base": ("vim", "vim_base_patch16_224"),
  "vim_tiny_stride8": ("vim", "vim_tiny_patch16_stride8_224"),
  "vim_small_stride8": ("vim", "vim_small_patch16_stride8_224"),
}
# Names with a number at the end that we chose.
NUMBERED = re.compile(r"layers_\d+")

_IMAGES = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)


def _abstract_params(model):
  variables = jax.eval_shape(model.init, jax.random.key(0), _IMAGES)
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _count(params):
  return sum(math.prod(leaf.shape) for leaf in params.values())


def test_every_model_is_in_the_table():
  assert sorted(PARAMETERS) == vimjax.list_models()


@pytest.mark.parametrize("name", vimjax.list_models())
def test_parameters(name):
  model = vimjax.create_model(name)
  params = _abstract_params(model)
  assert _count(params) == PARAMETERS[name]
  assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
  for path in params:
    for part in path.split("/"):
      assert not re.search(r"_\d+$", part) or NUMBERED.fullmatch(part), path
  assert (
    _count(_abstract_params(model.clone(scan_layers=True)))
    == (PARAMETERS[name])
  )


@pytest.mark.parametrize("name", vimjax.list_models())
def test_output_shapes(name):
  # Scanned layers trace in a tenth of the time.
  model = vimjax.create_model(name, num_classes=10, scan_layers=True)
  variables = jax.eval_shape(model.init, jax.random.key(0), _IMAGES)

  def shape(method=None):
    out = jax.eval_shape(
      lambda v, x: model.apply(v, x, method=method), variables, _IMAGES
    )
    assert out.dtype == jnp.float32
    return out.shape

  h, w = model.grid((64, 96))
  assert shape() == (2, 10)
  assert shape("pooled") == (2, model.embed_dim)
  assert shape("features") == (2, h, w, model.embed_dim)


@pytest.mark.parametrize("name", KEYS)
def test_all_official_keys_convert(name):
  family, keys = KEYS[name]
  shapes = golden_data.expand_keys(golden_data.load_json(family, "keys")[keys])
  # Views of one number: the largest model costs no memory.
  state_dict = {
    key: np.broadcast_to(np.float32(i), shape)
    for i, (key, shape) in enumerate(shapes.items())
  }
  variables = vimjax.convert_state_dict(name, state_dict)
  params = traverse_util.flatten_dict(variables["params"], sep="/")
  want = _abstract_params(vimjax.create_model(name))
  assert {k: v.shape for k, v in params.items()} == {
    k: v.shape for k, v in want.items()
  }
  # Each official tensor arrived exactly once.
  numbers = sorted(int(leaf.reshape(-1)[0]) for leaf in params.values())
  assert numbers == list(range(len(shapes)))
