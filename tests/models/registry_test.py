"""Models by name, and what is said about wrong names and fields."""

import dataclasses

import jax.numpy as jnp
import pytest

import vimjax
from vimjax import registry, variants


def test_list_models_filters_by_pattern():
  assert vimjax.list_models("vim_tiny*") == ["vim_tiny", "vim_tiny_stride8"]
  assert vimjax.list_models("no_such_*") == []


def test_an_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match=r"'vim_tinny'. Did you mean \['vim_tin"):
    vimjax.create_model("vim_tinny")


def test_a_name_like_no_other_is_answered_with_all():
  with pytest.raises(ValueError, match=r"Choose from \[.*'vim_tiny'"):
    vimjax.get_variant("zzz")


def test_an_unknown_field_is_answered_with_all_fields():
  message = r"no field \['embed_dims'\]; fields are .*'embed_dim'"
  with pytest.raises(TypeError, match=message):
    vimjax.create_model("vim_tiny", embed_dims=10)


def test_fields_of_linen_itself_are_no_configuration():
  with pytest.raises(TypeError, match="no field"):
    vimjax.create_model("vim_tiny", parent=None)


def test_overrides_replace_published_values():
  model = vimjax.create_model("vim_small", embed_dim=32, dtype="bfloat16")
  assert (model.embed_dim, model.depth) == (32, 24)
  assert model.drop_path_rate == 0.05
  assert jnp.dtype(model.dtype) == jnp.bfloat16


@pytest.mark.parametrize(
  "name", ["vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny", "deit_tiny"]
)
def test_a_dtype_must_be_floating_point(name):
  for dtype in (None, "float16", jnp.bfloat16, jnp.dtype("float64")):
    assert vimjax.create_model(name, dtype=dtype).dtype == dtype
  for field, value in [
    ("dtype", "bf16"),
    ("dtype", 16),
    ("dtype", "int32"),
    ("param_dtype", None),
  ]:
    message = f": {field} must be a floating point type, .* got {value!r}"
    with pytest.raises(ValueError, match=message):
      vimjax.create_model(name, **{field: value})


def test_a_name_in_two_families_is_an_error():
  family = {"vim_tiny": vimjax.get_variant("vim_tiny")}
  with pytest.raises(ValueError, match="'vim_tiny'"):
    registry.merge([family, family])


@pytest.mark.parametrize("name", vimjax.list_models())
def test_every_variant_says_where_it_comes_from(name):
  variant = vimjax.get_variant(name)
  assert variant.paper.startswith("arXiv:")
  assert variant.official
  fields = set(registry.field_names(variant.module))
  assert set(variant.fields) <= fields
  with pytest.raises(dataclasses.FrozenInstanceError):
    variant.paper = "another"
  weights = variant.pretrained
  if weights is None:
    return
  assert isinstance(weights, variants.Pretrained)
  assert weights.source
  assert weights.files
  assert weights.license
  assert 50 < weights.top1 < 100
  assert weights.top5 is None or weights.top1 < weights.top5 < 100
  assert weights.sha256 is None or len(weights.sha256) == 64
