"""Official state dicts to variables: what fits, what is refused and why."""

import logging

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.weights import rules
from vimjax.weights import vim as vim_weights


def _model(**fields):
  return vimjax.Vim(
    **{
      **dict(num_classes=10, image_size=(64, 96), depth=3, embed_dim=32),
      **fields,
    }
  )


def _state_dict():
  case = golden_data.load_json("vim", "tiny/manifest")["vim_mid"]
  return golden_data.make_state_dict(golden_data.expand_keys(case["keys"]))


def _square_state_dict(side):
  """As if trained on images of `side` x `side` patches."""
  pos_embed = golden_data.make_tensor("pos_embed", (1, side * side + 1, 32))
  return _state_dict() | {"pos_embed": pos_embed}


def test_all_problems_are_in_one_message():
  state_dict = _state_dict()
  del state_dict["layers.1.mixer.D_b"]
  state_dict["layers.0.mixer.extra"] = np.zeros(3)
  state_dict["layers.7.norm.weight"] = np.zeros(32)
  state_dict["norm_f.weight"] = np.zeros(31)
  state_dict["cls_token"] = np.zeros((1, 1, 32), np.int64)
  state_dict["rope.freqs_cos"] = np.zeros((4, 4))
  with pytest.raises(ValueError) as caught:  # noqa: PT011 - matched below.
    vimjax.convert_state_dict(_model(), state_dict)
  for expected in (
    "missing layers_1/mixer/backward_ssm/D (64,)",
    "unexpected layers.0.mixer.extra (3,)",
    "unexpected layers.7.norm.weight (32,): no layers_7/norm/scale here",
    "norm_f.weight has shape (31,), expected (32,)",
    "cls_token has dtype int64, expected a float",
    "unexpected rope.freqs_cos (4, 4)",
  ):
    assert expected in str(caught.value)
  assert len(str(caught.value).splitlines()) == 7


def _rule(key):
  (rule,) = [r for r in vim_weights.RULES if r.target(key)]
  return rule


def test_every_key_is_needed():
  # The rules alone: building the model once per key would take minutes.
  state_dict = _state_dict()
  wanted = {
    _rule(key).target(key): _rule(key).layout.to_ours(value)
    for key, value in state_dict.items()
  }
  for key in state_dict:
    rest = {k: v for k, v in state_dict.items() if k != key}
    params, problems = rules.apply(vim_weights.RULES, {}, rest, wanted)
    assert len(problems) == 1
    assert problems[0].startswith("missing"), key
    assert len(params) == len(rest)


def test_layouts_are_exact_inverses():
  for key, value in _state_dict().items():
    layout = _rule(key).layout
    back = layout.to_official(layout.to_ours(value))
    np.testing.assert_array_equal(back, value, err_msg=key)


def test_two_keys_for_one_parameter_are_reported():
  both = (rules.Rule("a", "x"), rules.Rule("b", "x"), rules.Rule("a|c", "y"))
  one = np.zeros(1)
  wanted = {"x": one, "y": one}
  _, problems = rules.apply(both[:2], {}, {"a": one, "b": one}, {"x": one})
  assert problems == ["b and a both fill x"]
  _, problems = rules.apply(both, {}, {"a": one, "c": one, "b": one}, wanted)
  assert problems == ["a matches 2 rules"]


def test_ignored_keys_are_left_out():
  one = np.zeros(1)
  params, problems = rules.apply(
    (rules.Rule("a", "x"),),
    {r".*\.num_batches_tracked": "a counter"},
    {"a": one, "bn.num_batches_tracked": one},
    {"x": one},
  )
  assert list(params) == ["x"]
  assert not problems


@pytest.mark.parametrize(
  "dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=str
)
def test_checkpoints_of_other_float_dtypes_become_float32(dtype):
  state_dict = {k: v.astype(dtype) for k, v in _state_dict().items()}
  params = vimjax.convert_state_dict(_model(), state_dict)["params"]
  kernel = params["layers_0"]["mixer"]["in_proj"]["kernel"]
  assert kernel.dtype == jnp.float32
  want = state_dict["layers.0.mixer.in_proj.weight"].T.astype(np.float32)
  np.testing.assert_array_equal(kernel, want)


class _Tensor:
  """An array-like as foreign as a CPU tensor."""

  def __init__(self, value):
    self._value = value

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self._value, dtype=dtype)


def test_a_prefix_and_array_likes_are_accepted():
  state_dict = _state_dict()
  want = vimjax.convert_state_dict(_model(), state_dict)
  foreign = {f"module.{k}": _Tensor(v) for k, v in state_dict.items()}
  got = vimjax.convert_state_dict(_model(), foreign)
  chex.assert_trees_all_equal(got, want, strict=True)


def test_scanned_layers_get_stacked_parameters():
  want = vimjax.convert_state_dict(_model(), _state_dict())
  got = vimjax.convert_state_dict(_model(scan_layers=True), _state_dict())
  chex.assert_trees_all_equal(got, vimjax.stack_layers(want), strict=True)


def test_the_whole_checkpoint_is_refused_with_what_to_pass():
  with pytest.raises(TypeError, match=r"Pass the state dict inside.*'model'"):
    vimjax.convert_state_dict("vim_tiny", {"model": _state_dict()})


def test_a_list_is_refused():
  with pytest.raises(TypeError, match="must map official names to arrays"):
    vimjax.convert_state_dict("vim_tiny", list(_state_dict().items()))


def test_a_model_without_official_weights_is_refused():
  with pytest.raises(TypeError, match=r"expected a name or one of \['Vim'"):
    vimjax.convert_state_dict(object(), {})


def test_another_class_count_needs_a_key_for_the_new_head():
  with pytest.raises(ValueError, match="10 classes, the model 7; pass rng="):
    vimjax.convert_state_dict(_model(num_classes=7), _state_dict())


def test_another_class_count_gives_a_new_head_and_says_so(caplog):
  model = _model(num_classes=300, scan_layers=True)
  with caplog.at_level(logging.WARNING):
    variables = vimjax.convert_state_dict(
      model, _state_dict(), rng=jax.random.key(3)
    )
  assert "New head" in caplog.text
  same = vimjax.convert_state_dict(_model(scan_layers=True), _state_dict())
  head = variables["params"].pop("head")
  del same["params"]["head"]
  chex.assert_trees_all_equal(variables, same, strict=True)
  assert head["kernel"].shape == (32, 300)
  np.testing.assert_array_equal(head["bias"], np.zeros(300))
  # As the model initialises it: normal, deviation 0.02; 9600 numbers.
  np.testing.assert_allclose(np.std(head["kernel"]), 0.02, rtol=0.03)


@pytest.mark.parametrize("resize", ["class_aware", "official"])
def test_another_image_size_resizes_the_positional_embedding(resize):
  state_dict = _square_state_dict(4)
  fields = dict(pos_embed_resize=resize, scan_layers=True)
  small = _model(image_size=64, **fields)
  large = _model(image_size=(64, 96), **fields)
  images = golden_data.make_images("any", (1, 3, 64, 96))
  # Resized when the model runs, or once when it is converted.
  variables = vimjax.convert_state_dict(small, state_dict)
  want = jax.jit(small.apply)(variables, images)
  run = jax.jit(large.apply)
  for model, size in ((small, (64, 96)), (large, None)):
    variables = vimjax.convert_state_dict(model, state_dict, image_size=size)
    assert variables["params"]["pos_embed"].shape == (25, 32)
    np.testing.assert_allclose(run(variables, images), want, rtol=0, atol=1e-5)


def test_a_grid_that_cannot_be_told_is_refused():
  with pytest.raises(ValueError, match="24 patches, the model needs 4x4"):
    vimjax.convert_state_dict(_model(image_size=64), _state_dict())


def test_a_square_grid_is_assumed_where_the_number_allows(caplog):
  """16 patches may be 4x4 or 2x8: the model's own grid is the second guess."""
  square = _model(image_size=64)
  want = vimjax.convert_state_dict(square, _square_state_dict(4))["params"]
  # The official file for a model of another grid, but as many patches.
  model = _model(image_size=(32, 128))
  with caplog.at_level(logging.WARNING):
    variables = vimjax.convert_state_dict(model, _square_state_dict(4))
  assert "from a grid of 4x4 to 2x8; pass image_size=" in caplog.text
  got = variables["params"]["pos_embed"]
  resized = square.resize_pos_embed(want["pos_embed"], (4, 4), (2, 8))
  np.testing.assert_allclose(got, resized, rtol=0, atol=1e-6)
  assert np.abs(got - want["pos_embed"]).max() > 0.1


def test_a_resize_that_was_asked_for_is_no_warning(caplog):
  with caplog.at_level(logging.INFO):
    vimjax.convert_state_dict(
      _model(image_size=64), _square_state_dict(4), image_size=96
    )
  (record,) = [r for r in caplog.records if "pos_embed" in r.message]
  assert record.levelno == logging.INFO
  assert record.message == "Resizing pos_embed from a grid of 4x4 to 6x6."


def _published_state_dict(official):
  keys = golden_data.load_json("vim", "keys")[official]
  return {
    key: np.broadcast_to(np.float32(1), shape)
    for key, shape in golden_data.expand_keys(keys).items()
  }


def test_the_weights_of_a_sibling_are_refused():
  """vim_tiny and vim_tiny_stride8 differ only in the positional embedding."""
  state_dict = _published_state_dict("vim_tiny_patch16_224")
  with pytest.raises(
    ValueError, match="the grid of 'vim_tiny': choose .* image_size=224 to"
  ):
    vimjax.convert_state_dict("vim_tiny_stride8", state_dict)
  # On purpose, as in the paper: fine-tuning on overlapping patches.
  model = vimjax.create_model("vim_tiny_stride8", scan_layers=True)
  variables = vimjax.convert_state_dict(model, state_dict, image_size=224)
  assert variables["params"]["pos_embed"].shape == (27 * 27 + 1, 192)
  # The same stride for larger images is no other model.
  model = vimjax.create_model("vim_tiny", scan_layers=True, image_size=384)
  variables = vimjax.convert_state_dict(model, state_dict)
  assert variables["params"]["pos_embed"].shape == (24 * 24 + 1, 192)


def test_keys_that_are_no_names_are_refused():
  with pytest.raises(TypeError, match="names to arrays, got the key 3"):
    vimjax.convert_state_dict(_model(), {**_state_dict(), 3: np.zeros(1)})


@pytest.mark.parametrize(
  "rng", [0, np.zeros(2), jax.random.split(jax.random.key(0))], ids=str
)
def test_what_is_no_key_is_refused_before_anything_is_said(rng, caplog):
  with (
    caplog.at_level(logging.INFO),
    pytest.raises(TypeError, match="rng must be one key, as from jax.random"),
  ):
    vimjax.convert_state_dict(_model(num_classes=7), _state_dict(), rng=rng)
  assert not caplog.records


@pytest.mark.parametrize("size", [0, -224, "x", (224,), (224, 0), 2.5])
@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "mambavision_tiny"])
def test_sizes_are_checked_where_they_make_no_difference(name, size):
  with pytest.raises(ValueError, match="image_size must be a positive integer"):
    vimjax.convert_state_dict(name, {}, image_size=size)


def test_a_grid_of_as_many_patches_is_resized_too():
  # 4x6 patches to 3x8: the number of rows alone does not tell.
  variables = vimjax.convert_state_dict(
    _model(), _state_dict(), image_size=(48, 128)
  )
  got = np.asarray(variables["params"]["pos_embed"])
  old = _state_dict()["pos_embed"][0]
  assert got.shape == old.shape
  np.testing.assert_array_equal(got[12], old[12])  # The class token's.
  assert np.abs(got - old).max() > 0.1
