"""Pickles as data: what is built, what stays inert, and that nothing runs."""

import argparse
import collections
import fractions
import io
import os
import pathlib
import pickle
import struct
import sys

import numpy as np
import pytest

from vimjax.weights import pickle_values, torch_files, unpickler

PLAIN = {
  "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**70, -(2**2100), 0.5, True],
  "strings": ["", "läuft", "x" * 300, b"", b"\x00\xff", b"y" * 300],
  "nested": ({"a": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}, None),
  "sets": [{1, "a"}, frozenset({2}), {(1, "a"): False}],
  "bytearray": bytearray(b"abc"),
}


def _load(data):
  return unpickler.load(io.BytesIO(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_rebuilt(protocol):
  assert _load(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_and_recursive_values_keep_their_identity(protocol):
  shared = [1]
  tree = [shared, shared]
  tree.append(tree)
  loaded = _load(pickle.dumps(tree, protocol))
  assert loaded[0] is loaded[1]
  assert loaded[2] is loaded


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
  "value",
  [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.arange(4, dtype=">i2"),
    np.array([True, False]),
    np.array(2.5 + 1j),
    np.zeros((0, 3), np.float16),
    np.float64(76.1),
    np.int32(-3),
    np.bool_(True),
  ],
  ids=str,
)
def test_numpy_values_are_rebuilt(value, protocol):
  loaded = np.asarray(_load(pickle.dumps(value, protocol)))
  assert loaded.dtype == value.dtype
  np.testing.assert_array_equal(loaded, value, strict=True)


def test_numpy_of_both_module_layouts():
  data = pickle.dumps([np.arange(3), np.float32(2)], 2)
  assert b"numpy._core" in data
  old = _load(data.replace(b"numpy._core", b"numpy.core"))
  np.testing.assert_array_equal(old[0], np.arange(3))
  assert old[1] == np.float32(2)


def test_an_array_of_objects_is_not_readable():
  array = _load(pickle.dumps(np.array([object(), None])))
  with pytest.raises(pickle_values.CheckpointError, match="not one of plain"):
    np.asarray(array)


class _Config(dict):
  """Like yacs' CfgNode: a dict with attributes."""


class _Items(list):
  pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_objects_are_inert_records(protocol):
  config = _Config(a=1)
  config.frozen = True
  tree = {
    "args": argparse.Namespace(lr=0.1),
    "config": config,
    "items": _Items([1, 2]),
    "fraction": fractions.Fraction(1, 3),
    "ordered": collections.OrderedDict(b=1, a=2),
    "default": collections.defaultdict(dict, {0: {}}),
    "function": os.system,
  }
  loaded = _load(pickle.dumps(tree, protocol))
  assert str(loaded["function"]).endswith(".system")
  assert isinstance(loaded["function"], pickle_values.Name)
  assert loaded["ordered"] == {"b": 1, "a": 2}
  assert list(loaded["ordered"]) == ["b", "a"]
  assert loaded["default"] == {0: {}}
  for key in ("args", "config", "items", "fraction"):
    assert isinstance(loaded[key], pickle_values.Opaque), key
  assert loaded["args"].state == {"lr": 0.1}
  assert loaded["config"].state == {"frozen": True}
  if protocol >= 2:  # Before, everything is in the arguments of one call.
    assert str(loaded["args"].kind) == "argparse.Namespace"
    assert repr(loaded["args"]) == "<argparse.Namespace>"
    assert loaded["config"].items == [("a", 1)]
    assert loaded["items"].items == [1, 2]


def test_ordered_dicts_of_python_2():
  loaded = _load(b"ccollections\nOrderedDict\n(](](I1\nI2\ne](I0\nI3\neetR.")
  assert list(loaded.items()) == [(1, 2), (0, 3)]


class _Malicious:
  """Unpickling one would run a function."""

  def __init__(self, function, *args):
    self._call = (function, args)

  def __reduce__(self):
    return self._call


def _attacks(target: str) -> dict[str, bytes]:
  """Programs that would create `target` in Python's own unpickler."""
  run = f"open({target!r}, 'w').close()"
  text = struct.pack("<I", len(run)) + run.encode()
  name, argument = b"cbuiltins\nexec\n", b"X" + text
  touch = f"touch {target}"
  return {
    "system": pickle.dumps(_Malicious(os.system, touch)),
    "reduce": name + argument + b"\x85R.",
    "stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93"
    + argument
    + b"\x85R.",
    "inst": b"(" + argument + b"ibuiltins\nexec\n.",
    "obj": b"(" + name + argument + b"o.",
    "newobj": b"\x80\x02cpathlib\nPath\nX"
    + struct.pack("<I", len(target))
    + target.encode()
    + b"\x85\x81cpathlib\nPath.touch\n0.",
    "nested in a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n"
    + name
    + argument
    + b"\x85R\x85R.",
    "setstate": b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00"
    + b"__setstate__"
    + name
    + b"sb"
    + argument
    + b"b.",
    "in a dict subclass": b"\x80\x02ccollections\nUserDict\n)\x81"
    + argument
    + name
    + argument
    + b"\x85Rs.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(cos\nX\x06\x00\x00\x00systemtR"
    + b"X"
    + struct.pack("<I", len(touch))
    + touch.encode()
    + b"\x85R.",
  }


ATTACKS = list(_attacks(""))


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_programs_run_nothing(attack, tmp_path):
  target = tmp_path / "executed"
  data = _attacks(str(target))[attack]
  try:
    _load(data)
  except pickle_values.CheckpointError:
    pass
  assert not target.exists()


def test_the_attacks_are_real(tmp_path):
  """Python's own unpickler does run them, so the test above means something."""
  for attack in ("system", "reduce", "stack_global", "inst", "obj"):
    target = tmp_path / attack
    pickle.loads(_attacks(str(target))[attack])
    assert target.exists(), attack


def test_named_modules_are_not_imported():
  assert "antigravity" not in sys.modules
  loaded = _load(b"cantigravity\ngeohash\n.")
  assert str(loaded) == "antigravity.geohash"
  assert "antigravity" not in sys.modules


def test_a_builder_gets_no_state_from_the_file():
  # BUILD on one of our functions could change it for the whole process.
  with pytest.raises(pickle_values.CheckpointError, match="state of a Name"):
    _load(b"\x80\x02ccollections\nOrderedDict\n}b.")


DAMAGED = {
  "empty": (b"", "before seeing STOP"),
  "no stop": (b"\x80\x02N", "before seeing STOP"),
  "empty stack": (b"a.", "damaged"),
  "only a mark": (b"(.", "mark instead of a value"),
  "two values": (b"NN.", "2 values at its end"),
  "unknown memo": (b"h\x05.", "KeyError"),
  "odd items": (b"}(K\x01u.", "without a value"),
  "append to a number": (b"K\x01K\x02a.", "appends to a int"),
  "items of a list": (b"]K\x01K\x02s.", "items of a list"),
  "name of a number": (b"K\x01K\x02\x93.", "name is not a string"),
  "extension registry": (b"\x82\x01.", "unsupported opcode EXT1"),
  "out-of-band buffer": (b"\x97.", "unsupported opcode NEXT_BUFFER"),
  "persistent id": (b"K\x01Q.", "persistent id"),
  "unknown opcode": (b"\xfe.", "damaged"),
  "claims 2**63 bytes": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "damaged"),
  "claims 4 GiB": (b"B\xff\xff\xff\xffabc.", "damaged"),
  "many digits": (b"I" + b"9" * 5000 + b"\n.", "damaged"),
  "rows of an ordered dict": (
    b"ccollections\nOrderedDict\n(](](K\x01K\x02K\x03eetR.",
    "rows of an OrderedDict",
  ),
  "huge scalar": (
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    b"B\x04\x00\x00\x00abcdtR.",
    "size of a NumPy scalar",
  ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles_give_one_clear_error(case):
  data, message = DAMAGED[case]
  with pytest.raises(pickle_values.CheckpointError, match=message):
    _load(data)


@pytest.mark.parametrize(
  "data",
  [
    b"]" * 50_000 + b"a" * 49_999 + b".",
    b")" + b"\x85" * 50_000 + b".",
    b"})" + b"\x85" * 50_000 + b"Ns.",  # As a key, which would be hashed.
    b"cx\ny\n" + b")R" * 50_000 + b".",
  ],
  ids=["lists", "tuples", "key", "calls"],
)
def test_deep_nesting_does_not_overflow(data):
  assert repr(type(_load(data)))


def _repeated(build, times=1000):
  """A list of 1000 numbers, given to one builder again and again."""
  values = b"](" + b"K\x01" * 1000 + b"eq\x00"
  return values + b"](" + build * times + b"e\x86."


@pytest.mark.parametrize(
  "build",
  [
    b"cbuiltins\nset\nh\x00\x85R",
    b"cbuiltins\nfrozenset\nh\x00\x85R",
    b"ctorch\nSize\nh\x00\x85R",
    b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nNh\x00\x85tR",
  ],
  ids=["set", "frozenset", "Size", "nested"],
)
def test_copies_of_copies_do_not_add_up(build):
  """Python's own unpickler would make 1000 times 1000 values."""
  builders = torch_files._BUILDERS
  data = _repeated(build)
  if b"rebuild" in build:  # Stays a record that holds the list itself.
    lists, made = unpickler.load(io.BytesIO(data), builders=builders)
    assert all(record.args[2][0] is lists for record in made)
    return
  with pytest.raises(pickle_values.CheckpointError, match="again and again"):
    unpickler.load(io.BytesIO(data), builders=builders)
  few = unpickler.load(io.BytesIO(_repeated(build, 5)), builders=builders)
  assert len(few[1]) == 5


def test_doubled_bytes_do_not_add_up():
  once = b"B" + struct.pack("<I", 10**5) + bytes(10**5) + b"q\x00"
  copies = b"(" + b"cbuiltins\nbytearray\nh\x00\x85R" * 100 + b"t\x86."
  with pytest.raises(pickle_values.CheckpointError, match="again and again"):
    _load(once + copies)


def test_endless_values_are_never_printed():
  """Doubled 60 times: printing it, as `order` of an array, would not end."""
  endless = b")" + b"2\x86" * 60
  array = (
    b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n"
    b"(X\x02\x00\x00\x00f4tR(K\x01t"
  )
  loaded = _load(array + endless + b"tR.")
  assert isinstance(loaded, pickle_values.Opaque)
  letter = b"X\x01\x00\x00\x00"
  assert _load(array + letter + b"CtR.").shape == (1,)
  assert isinstance(_load(array + letter + b"AtR."), pickle_values.Opaque)


def test_long_keys_are_not_hashed():
  assert _load(b"}(" + b"N" * 64 + b"tNs.") == {(None,) * 64: None}
  (key,) = _load(b"}(" + b"N" * 65 + b"tNs.")
  assert isinstance(key, pickle_values.Opaque)


def test_an_error_of_recursion_is_a_damaged_pickle():
  def builder(args):
    return builder(args)

  with pytest.raises(pickle_values.CheckpointError, match="RecursionError"):
    unpickler.load(io.BytesIO(b"cx\ny\n)R."), builders={"x.y": builder})


def test_the_file_is_left_behind_the_pickle():
  file = io.BytesIO(pickle.dumps([1]) + pickle.dumps([2]))
  assert unpickler.load(file) == [1]
  assert unpickler.load(file) == [2]


def test_paths_are_inert():
  loaded = _load(pickle.dumps(pathlib.PurePosixPath("/etc/passwd")))
  assert isinstance(loaded, pickle_values.Opaque)
