"""Writes a checkpoint that `torch.load` reads, without PyTorch."""

from collections.abc import Iterator, Mapping
import pathlib
import pickle
import struct
from typing import Any, Final
import zipfile

import numpy as np

_STORAGES: Final = {
  "float64": "DoubleStorage",
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
  "int32": "IntStorage",
  "int16": "ShortStorage",
  "int8": "CharStorage",
  "uint8": "ByteStorage",
  "bool": "BoolStorage",
}
_ROOT: Final = "checkpoint"
_ALIGNMENT: Final = 64
# Zip64 must be announced before an entry is written.
_LARGE: Final = 2**31


def write(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
  """Writes {"model": state_dict}, which every official loader accepts.

  Args:
    path: Where to.
    state_dict: Official names to arrays. Arrays of 0 to n axes, of a dtype that
      PyTorch has.

  Raises:
    TypeError: PyTorch has no such dtype.
  """
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    _entry(archive, "data.pkl", b"".join(_pickle(state_dict)))
    _entry(archive, "byteorder", b"little")
    for i, array in enumerate(state_dict.values()):
      array = np.array(array, order="C", copy=None)
      little = array.astype(array.dtype.newbyteorder("<"), copy=False)
      _entry(archive, f"data/{i}", little.tobytes())
    _entry(archive, "version", b"3\n")


def _entry(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
  info = zipfile.ZipInfo(f"{_ROOT}/{name}")
  large = len(content) >= _LARGE
  assert archive.fp is not None
  # Aligned, as torch.load(mmap=True) uses the file in place. The padding is an
  # extra field of its own, as torch.save writes it, behind zip64's of 20 bytes.
  start = archive.fp.tell() + 30 + len(info.filename) + 4 + (20 if large else 0)
  padding = -start % _ALIGNMENT
  info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
  with archive.open(info, "w", force_zip64=large) as file:
    file.write(content)


def _pickle(state_dict: Mapping[str, np.ndarray]) -> Iterator[bytes]:
  """The opcodes of {"model": {name: tensor}}, in protocol 2.

  Written out, because Python's pickler would have to import torch to name it.
  """
  yield pickle.PROTO + b"\x02"
  yield pickle.EMPTY_DICT + _string("model") + pickle.EMPTY_DICT + pickle.MARK
  for i, (name, array) in enumerate(state_dict.items()):
    yield _string(name)
    yield from _tensor(i, np.asarray(array))
  yield pickle.SETITEMS + pickle.SETITEM + pickle.STOP


def _tensor(index: int, array: np.ndarray) -> Iterator[bytes]:
  """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, {})."""
  if array.dtype.name not in _STORAGES:
    raise TypeError(f"PyTorch has no dtype {array.dtype}.")
  yield _name("torch._utils", "_rebuild_tensor_v2")
  yield pickle.MARK
  yield pickle.MARK + _string("storage")
  yield _name("torch", _STORAGES[array.dtype.name])
  yield _string(str(index)) + _string("cpu") + _number(array.size)
  yield pickle.TUPLE + pickle.BINPERSID
  yield _number(0)
  yield _numbers(array.shape)
  strides, step = [], 1
  for size in reversed(array.shape):
    strides.append(step)
    step *= max(size, 1)
  yield _numbers(strides[::-1])
  yield pickle.NEWFALSE
  yield _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
  yield pickle.TUPLE + pickle.REDUCE


def _string(text: str) -> bytes:
  raw = text.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _name(module: str, attribute: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _number(value: int) -> bytes:
  raw = value.to_bytes(9, "little", signed=True)
  return pickle.LONG1 + bytes([len(raw)]) + raw


def _numbers(values: Any) -> bytes:
  return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE
