"""PyTorch's files without PyTorch: read, written, damaged and malicious."""

import io
import os
import pickle
import random
import shutil
import struct
import tarfile
import types
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from vimjax.weights import (
  checkpoint_files,
  pickle_values,
  torch_files,
  torch_writer,
)

# Made by PyTorch; make.py there says how.
FILES = os.path.join(os.path.dirname(__file__), "torch_files")
BOTH = pytest.mark.parametrize("form", ["", "_legacy"], ids=["zip", "legacy"])


def _path(tmp_path, name):
  """A copy, so that a test may change it."""
  return shutil.copy(os.path.join(FILES, name), tmp_path)


def _read(path):
  return torch_files.read(torch_files.pathlib.Path(path))


def _count(*shape, dtype=np.float32):
  return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


BASE = _count(4, 6)
TENSORS = {
  **{
    name: _count(2, 3, dtype=name)
    for name in "float64 float32 float16 int64 int32 int16 int8 uint8 bool "
    "complex64".split()
  },
  "bfloat16": _count(2, 3, dtype=jnp.bfloat16),
  "shared": BASE,
  "shared_transposed": BASE.T,
  "shared_strided": BASE[1::2, ::3],
  "shared_offset": BASE[2],
  "scalar": np.array(7, np.float32),
  "empty": np.zeros((0, 3), np.float32),
  "expanded": np.ones(5, np.float32),
  "parameter": _count(3),
}


@BOTH
def test_tensors_of_every_dtype_and_stride(form):
  tree = _read(os.path.join(FILES, f"tensors{form}.pth"))
  assert set(tree) == set(TENSORS)
  for name, want in TENSORS.items():
    assert tree[name].shape == want.shape, name
    assert tree[name].dtype == want.dtype, name
    got = np.asarray(tree[name])
    np.testing.assert_array_equal(got, want, err_msg=name, strict=True)


@BOTH
def test_a_training_checkpoint(form):
  tree = _read(os.path.join(FILES, f"training{form}.pth"))
  np.testing.assert_array_equal(tree["model"]["0.weight"], _count(2, 3))
  moments = tree["optimizer"]["state"][0]["exp_avg"]
  assert np.asarray(moments).shape == (2, 3)
  assert tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
  assert tree["lr_scheduler"]["T_max"] == 10
  assert tree["epoch"] == 3
  assert str(tree["args"].kind) == "argparse.Namespace"
  assert tree["args"].state["lr"] == 1e-3
  assert str(tree["config"].kind) == "yacs.config.CfgNode"
  inner = dict(tree["config"].items)["MODEL"]
  assert dict(inner.items) == {"NAME": "tiny", "DEPTHS": [2, 2]}
  assert tree["max_accuracy"] == 76.1
  np.testing.assert_array_equal(tree["history"], _count(2, 3))
  np.testing.assert_array_equal(tree["fortran"], _count(2, 3, dtype=np.int64))
  np.testing.assert_array_equal(tree["marked_parameter"], _count(3))


@BOTH
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_state_dict_inside_a_checkpoint(form, weights):
  path = os.path.join(FILES, f"training{form}.pth")
  state_dict = checkpoint_files.read_state_dict(path, weights)
  prefix, shift = ("", 0) if weights == "model" else ("module.", 1)
  assert len(state_dict) == 7
  assert all(key.startswith(prefix) for key in state_dict)
  got = np.asarray(state_dict[prefix + "0.weight"])
  np.testing.assert_array_equal(got, _count(2, 3) + shift)


def test_a_state_dict_can_be_elsewhere_or_bare(tmp_path):
  path = tmp_path / "x.pth"
  for place in ("model", "state_dict", "bare"):
    rows = b"".join(torch_writer._pickle({"w": np.ones(2, np.float32)}))
    if place != "bare":
      old = torch_writer._string("model")
      rows = rows.replace(old, torch_writer._string(place))
      _write_zip(path, rows)
    else:
      _write_zip(path, b"\x80\x02}" + rows[14:-2] + b".")
    state_dict = checkpoint_files.read_state_dict(path)
    np.testing.assert_array_equal(state_dict["w"], np.ones(2))


def test_missing_weights_are_refused_with_a_list_of_what_is_there(tmp_path):
  path = _path(tmp_path, "tensors.pth")
  with pytest.raises(pickle_values.CheckpointError) as caught:
    checkpoint_files.read_state_dict(path, "ema")
  assert path in str(caught.value)
  assert "'model_ema' or 'state_dict_ema'" in str(caught.value)
  assert "a state dict of 19 entries" in str(caught.value)

  _write_zip(tmp_path / "x.pth", pickle.dumps({"epoch": 3, "net": {}}, 2))
  with pytest.raises(pickle_values.CheckpointError) as caught:
    checkpoint_files.read_state_dict(tmp_path / "x.pth")
  assert "'model' or 'state_dict'" in str(caught.value)
  assert "epoch: int\n  net: 0 entries" in str(caught.value)


def test_a_whole_module_is_refused_with_what_to_do():
  path = os.path.join(FILES, "module.pth")
  with pytest.raises(
    pickle_values.CheckpointError, match=r"Linear.*state_dict\(\)"
  ):
    checkpoint_files.read_state_dict(path)


def test_a_module_in_a_checkpoint_is_refused_with_what_to_do(tmp_path):
  path = tmp_path / "x.pth"
  module = torch_writer._name("torch.nn.modules.linear", "Linear")
  for place, weights in (("model", "model"), ("state_dict_ema", "ema")):
    key = torch_writer._string(place)
    _write_zip(path, b"\x80\x02}" + key + module + b")\x81s.")
    with pytest.raises(
      pickle_values.CheckpointError,
      match=rf"Its '{place}' is a pickled object, <.*Linear>.*state_dict\(\)",
    ):
      checkpoint_files.read_state_dict(path, weights)


def test_the_choice_of_weights_is_checked():
  with pytest.raises(ValueError, match='must be "model" or "ema"'):
    checkpoint_files.read_state_dict("x.pth", "best")


def test_files_that_are_no_checkpoints(tmp_path):
  path = tmp_path / "x.pth"
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
    archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
  _fails(path, "tar archive")
  for content, message in (
    (b"", "empty"),
    (b"<!DOCTYPE html>", "not a file of torch.save"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (pickle.dumps({"model": {}}), "magic number"),
    (pickle.dumps(torch_files._LEGACY_MAGIC, 2), "before seeing STOP"),
    (b"\x08\0\0\0\0\0\0\0{not JSON", "safetensors file is damaged"),
    (b"PK\x03\x04 and no more", "truncated or damaged"),
  ):
    path.write_bytes(content)
    _fails(path, message)
  with pytest.raises(FileNotFoundError):
    checkpoint_files.read_state_dict(tmp_path / "absent.pth")


def _fails(path, message):
  with pytest.raises(pickle_values.CheckpointError, match=message) as caught:
    checkpoint_files.read_state_dict(path)
  assert str(caught.value).startswith(f"{path}: ")


# Python's own warning about odd text in a pickle.
@pytest.mark.filterwarnings("ignore:invalid (escape|octal escape) sequence")
@BOTH
def test_truncated_and_changed_files_give_one_clear_error(form, tmp_path):
  """Nothing but CheckpointError, or numbers; no crash and no other error."""
  path = tmp_path / "x.pth"
  with open(os.path.join(FILES, f"training{form}.pth"), "rb") as file:
    whole = file.read()
  random_numbers = random.Random(0)
  failures = 0
  for i in range(300):
    data = bytearray(whole)
    if i % 3 == 0:
      data = data[: random_numbers.randrange(len(data))]
    else:
      data[random_numbers.randrange(len(data))] ^= random_numbers.randrange(256)
    path.write_bytes(data)
    try:
      checkpoint_files.read_state_dict(path)
    except pickle_values.CheckpointError:
      failures += 1
  assert failures >= 100  # All that are cut, at the least.


def test_a_changed_number_is_noticed(tmp_path):
  path = tmp_path / "x.pth"
  with open(os.path.join(FILES, "tensors.pth"), "rb") as file:
    whole = file.read()
  assert whole.count(BASE.tobytes()) == 1
  path.write_bytes(whole.replace(BASE.tobytes(), (BASE + 1).tobytes()))
  _fails(path, "its checksum is wrong")


# --- Written by hand, in torch's layout.


TWO = (np.ones(2, np.float32).tobytes(),)


def _write_zip(path, program, storages=TWO, **k):
  compression = k.pop("compression", zipfile.ZIP_STORED)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", program)
    for i, content in enumerate(storages):
      archive.writestr(f"archive/data/{i}", content)
    for name, content in k.items():
      archive.writestr(f"archive/{name}", content)


def _program(
  *, kind="FloatStorage", key="0", size=2, offset=0, shape=(2,), strides=(1,)
):
  """{"w": a tensor} as torch.save writes it."""
  return b"".join(
    [
      b"\x80\x02}",
      torch_writer._string("w"),
      torch_writer._name("torch._utils", "_rebuild_tensor_v2"),
      b"((",
      torch_writer._string("storage"),
      torch_writer._name("torch", kind),
      torch_writer._string(key) + torch_writer._string("cpu"),
      torch_writer._number(size) + b"tQ",
      torch_writer._number(offset),
      torch_writer._numbers(shape) + torch_writer._numbers(strides),
      b"\x89Nt" + b"Rs.",
    ]
  )


IMPOSSIBLE = {
  "size beyond the file": (dict(size=2**40), "claims 1099511627776 elements"),
  "negative size": (dict(size=-1), "no valid size"),
  "too few elements": (dict(size=1), "reaches beyond its storage of 1"),
  "shape beyond": (dict(shape=(3,)), "reaches beyond"),
  "offset beyond": (dict(offset=1), "reaches beyond"),
  "stride beyond": (dict(strides=(2,)), "reaches beyond"),
  "negative offset": (dict(offset=-1), "impossible shape"),
  "negative stride": (dict(strides=(-1,)), "impossible shape"),
  "axes and strides": (dict(strides=(1, 1)), "impossible shape"),
  "expanded bomb": (
    dict(shape=(2**30, 2**30), strides=(0, 0)),
    "claims the shape",
  ),
  "overflowing shape": (
    dict(shape=(2**62,) * 4, strides=(0,) * 4),
    "w: .*impossible shape",
  ),
  "overflowing stride": (dict(shape=(1,), strides=(2**62,)), "impossible"),
  "too many axes": (dict(shape=(1,) * 100, strides=(1,) * 100), "impossible"),
  "overflow of nothing": (
    dict(shape=(0, 2**62, 2**62), strides=(1, 1, 1)),
    "impossible shape",
  ),
  "missing storage": (dict(key="7"), "'7' is missing"),
  "storage elsewhere": (dict(key="../data.pkl"), "is missing"),
  "absolute path": (dict(key="/etc/passwd"), "is missing"),
  "unknown type": (dict(kind="QUInt8Storage"), "unknown type"),
  "not a type": (dict(kind="nn.Module"), "unknown type"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_tensors_are_refused(case, tmp_path):
  fields, message = IMPOSSIBLE[case]
  _write_zip(tmp_path / "x.pth", _program(**fields))
  _fails(tmp_path / "x.pth", message)


def test_the_hand_written_layout_is_right(tmp_path):
  _write_zip(tmp_path / "x.pth", _program())
  state_dict = checkpoint_files.read_state_dict(tmp_path / "x.pth")
  np.testing.assert_array_equal(state_dict["w"], np.ones(2))


@BOTH
@pytest.mark.parametrize(
  "other", [dict(kind="IntStorage"), dict(kind="HalfStorage", size=4)]
)
def test_one_storage_has_one_type(form, other, tmp_path):
  path = tmp_path / "x.pth"
  program = _program()[:-1] + _program(**other)[3:]
  if form == "_legacy":
    # There the persistent id has one more part, None for a whole storage.
    program = program.replace(b"tQ", b"NtQ")
    path.write_bytes(_legacy(program, pickle.dumps(["0"], 2)))
  else:
    _write_zip(path, program)
  _fails(path, "Storage '0' is mentioned with two types or sizes")


def test_a_checksum_is_computed_once(tmp_path, monkeypatch):
  """Many views of one storage, as of an optimiser's flat buffer."""
  lengths = []

  def crc32(content):
    lengths.append(len(content))
    return zlib.crc32(content)

  view = _program()[3:-1]
  names = [torch_writer._string(str(i)) for i in range(20)]
  views = [view.replace(torch_writer._string("w"), name) for name in names]
  _write_zip(tmp_path / "x.pth", b"\x80\x02}" + b"".join(views) + b".")
  monkeypatch.setattr(torch_files, "zlib", types.SimpleNamespace(crc32=crc32))
  state_dict = checkpoint_files.read_state_dict(tmp_path / "x.pth")
  assert len(state_dict) == 20
  assert lengths.count(8) == 1


def test_odd_archives_are_refused(tmp_path):
  path = tmp_path / "x.pth"
  bomb = bytes(10**6)
  size = len(bomb) // 4
  program = _program(size=size)
  _write_zip(path, program, [bomb], compression=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 10**4
  _fails(path, "is compressed or encrypted")
  _write_zip(path, _program(), **{"constants.pkl": b""})
  _fails(path, "TorchScript")
  _write_zip(path, _program(), byteorder=b"big")
  _fails(path, "big-endian")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", _program())
    archive.writestr("b/data.pkl", _program())
  _fails(path, "2 entries data.pkl")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme.txt", "no checkpoint")
  _fails(path, "0 entries data.pkl")
  _write_zip(path, _program())
  with (
    zipfile.ZipFile(path, "a") as archive,
    pytest.warns(UserWarning, match="Duplicate"),
  ):
    archive.writestr("archive/data/0", bytes(8))
  _fails(path, "two entries of one name")


def test_nothing_runs_in_either_form(tmp_path):
  target = tmp_path / "executed"
  run = f"open({str(target)!r}, 'w').close()"
  call = torch_writer._name("builtins", "exec") + torch_writer._string(run)
  program = b"\x80\x02}" + torch_writer._string("model") + call + b"\x85Rs."
  _write_zip(tmp_path / "x.pth", program)
  _fails(tmp_path / "x.pth", "Its 'model' is a .*<builtins.exec>")
  legacy = _legacy(program, pickle.dumps([], 2))
  (tmp_path / "y.pth").write_bytes(legacy)
  _fails(tmp_path / "y.pth", "Its 'model' is a .*<builtins.exec>")
  assert not target.exists()
  pickle.loads(program)  # It would have run.
  assert target.exists()


def _legacy(program, keys):
  return b"".join(
    [
      pickle.dumps(torch_files._LEGACY_MAGIC, 2),
      pickle.dumps(torch_files._LEGACY_PROTOCOL, 2),
      pickle.dumps({"little_endian": True}, 2),
      program,
      keys,
    ]
  )


def test_endless_values_are_not_printed(tmp_path):
  """Python's own printing of a deep value is an error, or never ends."""
  path, deep = tmp_path / "x.pth", b"]" * 5000 + b"a" * 4999
  number = b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096
  storage = torch_writer._name("torch", "FloatStorage")
  _write_zip(path, _program().replace(storage, deep))
  _fails(path, "unknown type list")
  _write_zip(path, b"\x80\x02}" + number + b"Ns.")
  _fails(path, r"\(int\): NoneType")
  path.write_bytes(_legacy(b"\x80\x02}.", deep.join([b"\x80\x02](", b"e."])))
  _fails(path, "list of storages is damaged")
  objects = pickle.dumps({"a": np.array([None])}, 2)
  _write_zip(path, objects)
  _fails(path, "not one of plain numbers")


def test_legacy_storages_must_be_as_long_as_they_claim(tmp_path):
  with open(os.path.join(FILES, "tensors_legacy.pth"), "rb") as file:
    whole = file.read()
  path = tmp_path / "x.pth"
  path.write_bytes(whole[:-1])
  _fails(path, "truncated or damaged")
  # The first storage of 24 float32 elements claims more.
  where = whole.index(struct.pack("<q", 24) + BASE.tobytes())
  path.write_bytes(
    whole[:where] + struct.pack("<q", 2**50) + whole[where + 8 :]
  )
  _fails(path, "should have 24 elements, found 1125899906842624")


def test_files_without_checksums_are_read(tmp_path):
  """As torch.serialization.set_crc32_options(False) makes them."""
  path = _path(tmp_path, "tensors.pth")
  with zipfile.ZipFile(path) as archive:
    sums = [struct.pack("<I", entry.CRC) for entry in archive.infolist()]
  with open(path, "rb") as file:
    data = file.read()
  for checksum in sums:
    data = data.replace(checksum, bytes(4))
  with open(path, "wb") as file:
    file.write(data)
  state_dict = checkpoint_files.read_state_dict(path)
  np.testing.assert_array_equal(state_dict["shared"], BASE)


def test_written_files_are_read_back(tmp_path):
  """Also checked against torch.load: the same numbers, strides and dtypes."""
  path = tmp_path / "x.pth"
  written = {k: v for k, v in TENSORS.items() if v.dtype.kind != "c"}
  torch_writer.write(path, written)
  state_dict = checkpoint_files.read_state_dict(path)
  assert list(state_dict) == list(written)
  for name, want in written.items():
    got = np.asarray(state_dict[name])
    np.testing.assert_array_equal(got, want, err_msg=name, strict=True)
  with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
  with pytest.raises(TypeError, match="no dtype"):
    torch_writer.write(path, {"w": np.array(["text"])})
