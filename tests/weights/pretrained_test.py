"""`load_pretrained`: files of all kinds, and what is refused."""

import pickle
import struct
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests import golden_data
import vimjax
from vimjax.weights import pretrained, torch_writer, trained

LEFT_OUT = ("layers.1", "layers.2")


def _model(**fields):
  small = dict(num_classes=10, image_size=64, depth=1, embed_dim=32)
  return vimjax.Vim(**{**small, **fields})


def _state_dict(shift=0):
  case = golden_data.load_json("vim", "tiny/manifest")["vim_mid"]
  shapes = golden_data.expand_keys(case["keys"])
  shapes["pos_embed"] = (1, 17, 32)
  kept = {k: v for k, v in shapes.items() if k[:8] not in LEFT_OUT}
  state_dict = golden_data.make_state_dict(kept)
  return {key: value + np.float32(shift) for key, value in state_dict.items()}


def _assert_loads(path, want=None, model=None, **arguments):
  model = model or _model()
  got = vimjax.load_pretrained(model, path, **arguments)
  if want is None:
    want = vimjax.convert_state_dict(_model(), _state_dict())
  chex.assert_trees_all_equal(got, want, strict=True)


def test_every_format_gives_the_same_variables(tmp_path):
  torch_writer.write(tmp_path / "x.pth", _state_dict())
  _assert_loads(tmp_path / "x.pth")
  torch_writer.write(tmp_path / "x.pth.tar", _state_dict())
  _assert_loads(str(tmp_path / "x.pth.tar"))
  prefixed = {f"module.{k}": v for k, v in _state_dict().items()}
  torch_writer.write(tmp_path / "y.pth", prefixed)
  _assert_loads(tmp_path / "y.pth")
  encoder = {f"encoder.{k}": v for k, v in _state_dict().items()}
  rows = {k: np.array(v, order="C") for k, v in encoder.items()}
  safetensors.save_file(rows, tmp_path / "x.safetensors")
  _assert_loads(tmp_path / "x.safetensors")
  wrong_name = tmp_path / "x.bin"
  (tmp_path / "x.safetensors").rename(wrong_name)
  _assert_loads(wrong_name)


def test_our_own_files_load_into_every_layout(tmp_path):
  path = tmp_path / "ours.safetensors"
  variables = vimjax.convert_state_dict(_model(), _state_dict())
  vimjax.save_variables(path, variables)
  _assert_loads(path)
  scanned = _model(scan_layers=True)
  _assert_loads(path, vimjax.stack_layers(variables), scanned)
  vimjax.save_variables(path, vimjax.stack_layers(variables))
  _assert_loads(path)
  with pytest.raises(ValueError, match='expected {"params": ...}'):
    vimjax.save_variables(path, variables["params"])
  _assert_loads(path)  # The old file is still there.
  assert list(tmp_path.iterdir()) == [path]


def test_our_own_files_say_which_grid_they_have(tmp_path, caplog):
  """16 patches as 2x8: neither scrambled nor taken for 4x4."""
  path = tmp_path / "ours.safetensors"
  model = _model(image_size=(32, 128))
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
  position = variables["params"]["pos_embed"]
  vimjax.save_variables(path, variables, image_size=(32, 128))
  _assert_loads(path, variables, model)
  assert not caplog.records
  got = vimjax.load_pretrained(_model(image_size=64), path)["params"]
  want = model.resize_pos_embed(position, (2, 8), (4, 4))
  np.testing.assert_allclose(got["pos_embed"], want, rtol=0, atol=1e-6)
  assert "Resizing pos_embed from a grid of 2x8 to 4x4; pass" in caplog.text
  # Without the size: as the model's own, if it has as many patches.
  vimjax.save_variables(path, variables)
  _assert_loads(path, variables, model)


def test_an_impossible_size_or_collection_is_not_saved(tmp_path):
  path = tmp_path / "x.safetensors"
  variables = {"params": {"a": np.zeros(1)}}
  with pytest.raises(ValueError, match="save_variables: image_size must be"):
    vimjax.save_variables(path, variables, image_size=0)
  with pytest.raises(ValueError, match='perhaps "batch_stats", got .*cache'):
    vimjax.save_variables(path, {**variables, "cache": {}})
  assert not path.exists()


def _as_float8(path):
  """A file of one array in a type that NumPy does not have."""
  header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
  path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
  path = tmp_path / "x.safetensors"
  _as_float8(path)
  with pytest.raises(ValueError, match="x.safetensors: w has dtype F8_E4M3"):
    vimjax.load_pretrained(_model(), path)


def _write_checkpoint(path, tree):
  """{"model": {...}, "model_ema": {...}, "epoch": 3} as torch.save does."""
  program, arrays = b"\x80\x02}", []
  for place, state_dict in tree.items():
    program += torch_writer._string(place) + b"}("
    for key, value in state_dict.items():
      program += torch_writer._string(key)
      program += b"".join(torch_writer._tensor(len(arrays), value))
      arrays.append(value)
    program += b"us"
  program += torch_writer._string("epoch") + b"K\x03s."
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", program)
    for i, value in enumerate(arrays):
      archive.writestr(f"x/data/{i}", value.tobytes())


def test_the_running_average(tmp_path):
  path = tmp_path / "x.pth"
  average = {f"module.{k}": v for k, v in _state_dict(shift=1).items()}
  _write_checkpoint(path, {"model": _state_dict(), "model_ema": average})
  _assert_loads(path)
  want = vimjax.convert_state_dict(_model(), _state_dict(shift=1))
  _assert_loads(path, want, weights="ema")
  _write_checkpoint(path, {"state_dict_ema": average})
  _assert_loads(path, want, weights="ema")
  listed = "state_dict_ema: .* arrays\n  epoch: int"
  with pytest.raises(ValueError, match=listed):
    vimjax.load_pretrained(_model(), path)
  with pytest.raises(ValueError, match='must be "model" or "ema"'):
    vimjax.load_pretrained(_model(), path, weights="best")


def test_fine_tuning(tmp_path):
  path = tmp_path / "x.pth"
  torch_writer.write(path, _state_dict())
  with pytest.raises(ValueError, match="(?s)x.pth: .*pass rng="):
    vimjax.load_pretrained(_model(num_classes=3), path)
  variables = vimjax.load_pretrained(
    _model(num_classes=3), path, image_size=96, rng=jax.random.key(0)
  )
  assert variables["params"]["head"]["kernel"].shape == (32, 3)
  assert variables["params"]["pos_embed"].shape == (37, 32)


def test_a_file_of_another_model_is_refused_with_all_problems(tmp_path):
  path = tmp_path / "x.pth"
  torch_writer.write(path, _state_dict())
  with pytest.raises(ValueError, match="x.pth: .*does not fit Vim") as caught:
    vimjax.load_pretrained(_model(depth=2), path)
  assert "missing layers_1/norm/scale" in str(caught.value)


def test_a_file_of_another_family_is_refused_with_its_name(tmp_path):
  keys = golden_data.load_json("deit", "keys")["deit_tiny_patch16_224"]
  shapes = golden_data.expand_keys(keys)
  state_dict = golden_data.make_state_dict(shapes)
  torch_writer.write(tmp_path / "x.pth", state_dict)
  with pytest.raises(ValueError, match="fit Vim; it is of a DeiT:") as caught:
    vimjax.load_pretrained(_model(), tmp_path / "x.pth")
  lines = str(caught.value).splitlines()
  assert len(lines) == 42
  assert lines[-1].endswith(" more")


def test_a_file_says_which_model_it_is_of(tmp_path):
  path = tmp_path / "x.safetensors"
  trained_one = _model(depth=2)
  variables = jax.jit(trained_one.init)(
    jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  how = vimjax.get_variant("vim_tiny").preprocessing
  fields = {"depth": 2, "embed_dim": 32}
  said = trained.describe("vim_tiny", fields=fields, preprocessing=how)
  vimjax.save_variables(path, variables, metadata=said)
  with pytest.raises(
    ValueError,
    match=r"(?s)x.safetensors: .*file is of vimjax.create_model\('vim_tiny', "
    r"depth=2, embed_dim=32\)",
  ):
    vimjax.load_pretrained(_model(), path)
  # Of another model it says nothing.
  assert trained.model_fields(said, "vim_small") == {}
  assert trained.model_fields(said, "vim_tiny") == fields
  assert trained.class_names(said) is None
  for damaged in ("[1]", "{"):
    with pytest.raises(ValueError, match="unknown 'model_fields'"):
      trained.model_fields(said | {"model_fields": damaged}, "vim_tiny")


def test_a_field_of_a_newer_version_is_named():
  how = vimjax.get_variant("vim_tiny").preprocessing
  fields = {"depth": 2, "rope": True}
  said = trained.describe("vim_tiny", fields=fields, preprocessing=how)
  file = pretrained.Checkpoint({}, None, said)
  with pytest.raises(ValueError, match=r"vim_tiny has the fields \['rope'\]"):
    file.model("vim_tiny")
  assert file.model("vim_small").depth == 24


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / "x.pth"
  torch_writer.write(path, _state_dict())
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="x.pth: .*truncated or damaged"):
    vimjax.load_pretrained(_model(), path)
  path.write_bytes(pickle.dumps({"model": {}}))
  with pytest.raises(ValueError, match="x.pth: .*not a file of torch.save"):
    vimjax.load_pretrained(_model(), path)
  with pytest.raises(FileNotFoundError):
    vimjax.load_pretrained(_model(), tmp_path / "absent.pth")


def test_without_a_path_there_must_be_one_published_file():
  for model in ("vim_base_stride8", vimjax.create_model("vim_base_stride8")):
    with pytest.raises(ValueError, match="no weights were published"):
      vimjax.load_pretrained(model)
  with pytest.raises(ValueError, match="no weights were published for this"):
    vimjax.load_pretrained(_model())
  with pytest.raises(ValueError, match="base', 'mambavision_base_21k'.* fit"):
    vimjax.load_pretrained(vimjax.create_model("mambavision_base"))
  with pytest.raises(ValueError, match="Did you mean"):
    vimjax.load_pretrained("vim_tinny")
  with pytest.raises(TypeError, match="load_pretrained: expected a name"):
    vimjax.load_pretrained(3)


@pytest.mark.parametrize("as_model", [False, True])
def test_mambavision_needs_its_licence_accepted(as_model):
  model = "mambavision_tiny"
  if as_model:
    model = vimjax.create_model(model, num_classes=10, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match="MambaVision-T-1K.*CC-BY-NC-SA") as e:
    vimjax.load_pretrained(model)
  assert "accept_license=True" in str(e.value)
