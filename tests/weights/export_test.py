"""Variables back to official state dicts: the exact inverse of conversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
import vimjax
from vimjax.weights import convert, rules

# Of each family and key layout one model, and its official keys.
OFFICIAL = {
  "vim_tiny_stride8": "vim/vim_tiny_patch16_stride8_224",
  "mambavision_base": "mambavision/mamba_vision_B",
  "deit_tiny": "deit/deit_tiny_patch16_224",
  "vmamba_tiny_v0": "vmamba/vanilla_vmamba_tiny",
  "vmamba_tiny_s1l8": "vmamba/vmamba_tiny_s1l8",
  "vmamba_tiny_m2": "vmamba/vmamba_tiny_m2",
}


def _vim(**fields):
  small = dict(num_classes=10, image_size=(64, 96), depth=3, embed_dim=32)
  return vimjax.Vim(**{**small, **fields})


def _state_dict():
  case = golden_data.load_json("vim", "tiny/manifest")["vim_mid"]
  return golden_data.make_state_dict(golden_data.expand_keys(case["keys"]))


def _assert_equal(got, want):
  assert set(got) == set(want)
  for key, value in want.items():
    np.testing.assert_array_equal(got[key], value, err_msg=key, strict=True)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_key_comes_back_bit_for_bit(name):
  family, keys = OFFICIAL[name].split("/")
  shapes = golden_data.expand_keys(golden_data.load_json(family, "keys")[keys])
  official = golden_data.make_state_dict(shapes)
  variables = vimjax.convert_state_dict(name, official)
  _assert_equal(vimjax.export_state_dict(name, variables), official)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_stacked_layers_are_accepted(scan_layers):
  model = _vim(scan_layers=scan_layers)
  variables = vimjax.convert_state_dict(model, _state_dict())
  _assert_equal(vimjax.export_state_dict(_vim(), variables), _state_dict())


def test_bfloat16_parameters_stay_bfloat16():
  model = _vim(param_dtype=jnp.bfloat16)
  variables = vimjax.convert_state_dict(model, _state_dict())
  exported = vimjax.export_state_dict(model, variables)
  key = "layers.0.mixer.in_proj.weight"
  np.testing.assert_array_equal(
    exported[key], _state_dict()[key].astype(jnp.bfloat16), strict=True
  )


def test_all_problems_are_in_one_message():
  params = vimjax.convert_state_dict(_vim(), _state_dict())["params"]
  del params["norm"]
  params["extra"] = {"kernel": jnp.zeros(3)}
  params["head"]["bias"] = jnp.zeros(7)
  with pytest.raises(ValueError, match="do not fit Vim") as caught:
    vimjax.export_state_dict(_vim(), {"params": params})
  for expected in (
    "missing norm/scale (32,)",
    "unexpected extra/kernel (3,)",
    "head/bias has shape (7,), expected (10,)",
  ):
    assert expected in str(caught.value)


def test_a_model_without_official_weights_is_refused():
  with pytest.raises(TypeError, match="export_state_dict: expected a name"):
    vimjax.export_state_dict(object(), {})


@pytest.mark.parametrize("family", convert.FAMILIES, ids=lambda f: f.__name__)
def test_every_rule_can_be_turned_around(family):
  """`source` undoes `target`, with the numbers and words of all groups."""
  name = next(
    n for n in vimjax.list_models() if vimjax.get_variant(n).module is family
  )
  model = vimjax.create_model(name)
  rows = convert.FAMILIES[family].rules(model)
  paths = convert.shapes(model, convert.FAMILIES[family])
  arrays = {p: np.broadcast_to(np.zeros(()), s.shape) for p, s in paths.items()}
  official, problems = rules.invert(rows, arrays)
  assert not problems
  assert len(official) == len(arrays)
  for key, path in zip(official, _in_rule_order(rows, arrays), strict=True):
    (target,) = [r.target(key) for r in rows if r.target(key)]
    assert target == path


def _in_rule_order(rows, paths):
  return [p for row in rows for p in paths if row.source(p)]


def test_a_path_of_no_rule_has_no_source():
  rule = rules.Rule(r"a\.(\d+)\.(x|y)", r"b_\1/c_\1/\2")
  assert rule.source("b_12/c_12/y") == "a.12.y"
  assert rule.source("b_12/c_13/y") is None
  assert rule.source("b_12/c_12/z") is None
  assert rule.target("a.12.y") == "b_12/c_12/y"


def test_exported_variables_of_a_new_model_convert_back():
  model = _vim(num_classes=4)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  back = vimjax.convert_state_dict(
    model, vimjax.export_state_dict(model, variables)
  )
  assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, back))
