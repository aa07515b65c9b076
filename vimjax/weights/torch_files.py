"""Reads PyTorch's checkpoint files without PyTorch.

Since PyTorch 1.6 a checkpoint is a zip archive of uncompressed entries: a
pickle ("data.pkl") whose tensors refer to storages, and one entry per storage
("data/0", ...). Before, and still on request, it was a sequence of pickles with
the storages behind them. Storages are read when a tensor is first used, so an
optimiser's state costs nothing.
"""

from collections.abc import Callable
import dataclasses
import io
import math
import mmap
import pathlib
import struct
import sys
from typing import Any, Final
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from vimjax.weights import pickle_values, unpickler

CheckpointError = pickle_values.CheckpointError

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
# More elements than a view of few elements may have, as `expand` makes them.
_MAX_EXPANDED: Final = 2**20
# NumPy's limit.
_MAX_AXES: Final = 64

_DTYPES: Final[dict[str, np.dtype]] = {
  "float64": np.dtype("f8"),
  "float32": np.dtype("f4"),
  "float16": np.dtype("f2"),
  "bfloat16": np.dtype(jnp.bfloat16),
  "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
  "float8_e5m2": np.dtype(jnp.float8_e5m2),
  "int64": np.dtype("i8"),
  "int32": np.dtype("i4"),
  "int16": np.dtype("i2"),
  "int8": np.dtype("i1"),
  "uint64": np.dtype("u8"),
  "uint32": np.dtype("u4"),
  "uint16": np.dtype("u2"),
  "uint8": np.dtype("u1"),
  "bool": np.dtype("?"),
  "complex64": np.dtype("c8"),
  "complex128": np.dtype("c16"),
}
_STORAGES: Final = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
  "UntypedStorage": "uint8",
}


@dataclasses.dataclass(eq=False)
class Storage:
  """A run of numbers in a file.

  Attributes:
    dtype: Of its elements.
    size: How many elements.
    load: Reads the bytes, all of them or none.
  """

  dtype: np.dtype
  size: int
  load: Callable[[], Any]

  def flat(self, dtype: np.dtype) -> np.ndarray:
    raw = self.load()
    if len(raw) != self.size * self.dtype.itemsize:
      raise CheckpointError(
        f"A storage has {len(raw)} bytes, expected {self.size} elements of "
        f"{self.dtype.name}; the file is damaged."
      )
    return np.frombuffer(raw, dtype)


class Tensor:
  """A strided view of a storage; `np.asarray` reads it."""

  def __init__(
    self,
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype | None = None,
  ):
    self.shape = shape
    self.dtype = dtype or storage.dtype
    self._view = (storage, offset, strides)
    available = storage.size * storage.dtype.itemsize // self.dtype.itemsize
    count = math.prod(shape)
    last = offset + sum(
      (n - 1) * s for n, s in zip(shape, strides, strict=True)
    )
    if count and last >= available:
      raise CheckpointError(
        f"A tensor of shape {_short(shape)} reaches beyond its storage of "
        f"{available} elements; the file is damaged."
      )
    if count > max(available, _MAX_EXPANDED):
      raise CheckpointError(
        f"A tensor claims the shape {_short(shape)}, but its storage has only "
        f"{available} elements."
      )

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    storage, offset, strides = self._view
    if not math.prod(self.shape):
      array = np.empty(self.shape, self.dtype)
    else:
      flat = storage.flat(self.dtype)[offset:]
      steps = [stride * self.dtype.itemsize for stride in strides]
      array = np.lib.stride_tricks.as_strided(
        flat, self.shape, steps, writeable=False
      )
    return np.array(array, dtype=dtype, copy=copy)


def _short(shape: tuple[int, ...]) -> str:
  text = str(shape[:8])
  return text if len(text) < 80 else text[:80] + "..."


def _rebuild(args: tuple[Any, ...]) -> Any:
  """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
  match args:
    case (
      Storage() as storage,
      offset,
      tuple() as shape,
      tuple() as strides,
      *_,
    ):
      _check_view(offset, shape, strides, storage.dtype)
      return Tensor(storage, offset, shape, strides)
  return None


def _rebuild_v3(args: tuple[Any, ...]) -> Any:
  """torch._utils._rebuild_tensor_v3: the dtype is an argument."""
  match args:
    case (
      Storage() as storage,
      offset,
      tuple() as shape,
      tuple() as strides,
      _,
      _,
      pickle_values.Name("torch", name),
      *_,
    ) if name in _DTYPES:
      dtype = _DTYPES[name]
      _check_view(offset, shape, strides, dtype)
      return Tensor(storage, offset, shape, strides, dtype)
  return None


def _check_view(
  offset: Any,
  shape: tuple[Any, ...],
  strides: tuple[Any, ...],
  dtype: np.dtype,
) -> None:
  """Raises CheckpointError unless NumPy can describe such a view."""
  numbers = (offset, *shape, *strides)
  possible = len(shape) == len(strides) <= _MAX_AXES and all(
    type(n) is int and 0 <= n < 2**63 for n in numbers
  )
  if possible:
    # Also where an axis has no or one element, so that nothing is read.
    sizes = [max(n, 1) for n in shape]
    reach = sum(n * s for n, s in zip(sizes, strides, strict=True))
    possible = max(math.prod(sizes), reach) * dtype.itemsize < 2**63
  if not possible:
    raise CheckpointError("A tensor has an impossible shape; file damaged.")


def _first_tensor(args: tuple[Any, ...]) -> Any:
  return args[0] if args and isinstance(args[0], Tensor) else None


def _subclass(args: tuple[Any, ...]) -> Any:
  """torch._tensor._rebuild_from_type_v2: (function, type, arguments, state)."""
  match args:
    case (pickle_values.Name() as function, _, tuple() as inner, *_):
      builder = _TENSORS.get(str(function))
      return builder(inner) if builder else None
  return None


def _size(args: tuple[Any, ...]) -> Any:
  return tuple(args[0]) if args and isinstance(args[0], list | tuple) else ()


_TENSORS: Final[dict[str, pickle_values.Builder]] = {
  "torch._utils._rebuild_tensor": _rebuild,
  "torch._utils._rebuild_tensor_v2": _rebuild,
  "torch._utils._rebuild_tensor_v3": _rebuild_v3,
  "torch._utils._rebuild_parameter": _first_tensor,
  "torch._utils._rebuild_parameter_with_state": _first_tensor,
}
_BUILDERS: Final[dict[str, pickle_values.Builder]] = {
  **_TENSORS,
  "torch._tensor._rebuild_from_type_v2": _subclass,
  "torch.Size": _size,
}


def _check_order(little: bool) -> None:
  if not little or sys.byteorder != "little":
    raise CheckpointError(
      "The checkpoint was written on a big-endian machine, or this is one; "
      "convert it to safetensors with PyTorch."
    )


def _storage_type(kind: Any) -> np.dtype:
  if isinstance(kind, pickle_values.Name) and kind.attribute in _STORAGES:
    return _DTYPES[_STORAGES[kind.attribute]]
  # Only names are printed: whatever else is there may be endless.
  name = kind if isinstance(kind, pickle_values.Name) else type(kind).__name__
  raise CheckpointError(f"The checkpoint has a storage of unknown type {name}.")


def _check_size(size: Any, dtype: np.dtype, available: int, key: str) -> None:
  if type(size) is not int or size < 0:
    raise CheckpointError(f"Storage {key!r} has no valid size; file damaged.")
  if size * dtype.itemsize > available:
    raise CheckpointError(
      f"Storage {key!r} claims {size} elements of {dtype.name}, but the file "
      f"holds {available} bytes for it; it is truncated or damaged."
    )


def _same(storage: Storage, dtype: np.dtype, size: Any, key: str) -> Storage:
  if storage.dtype != dtype or type(size) is not int or storage.size != size:
    raise CheckpointError(
      f"Storage {key!r} is mentioned with two types or sizes, which torch.save "
      "never does; the file is damaged."
    )
  return storage


def read(path: pathlib.Path) -> Any:
  """Reads a file of `torch.save`, zip archive or legacy.

  Returns:
    What was saved: plain containers, `Tensor`, and `pickle_values.Opaque` for
    every other object.

  Raises:
    CheckpointError: It is not such a file, or damaged.
    OSError: It cannot be read.
  """
  with path.open("rb") as file:
    try:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
      raise CheckpointError("The file is empty.") from None
  if data[:4] == b"PK\x03\x04":
    return _Archive(data).load()
  if data[257:262] == b"ustar":
    raise CheckpointError(
      "This is a tar archive (PyTorch before 0.1.10, or not a checkpoint); "
      "load it with PyTorch and save it again."
    )
  if data[:1] != b"\x80":
    raise CheckpointError("This is not a file of torch.save.")
  return _load_legacy(data)


class _Archive:
  """The zip form. Every entry is looked up by its exact name."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    mapped: Any = data  # A mapped file is enough of a file for zipfile.
    try:
      entries = zipfile.ZipFile(mapped).infolist()
    except Exception as error:
      # BadZipFile, or whatever wrong offsets and sizes lead to.
      raise CheckpointError(
        f"The zip archive is truncated or damaged: {error}"
      ) from error
    self._entries = {entry.filename: entry for entry in entries}
    if len(self._entries) != len(entries):
      raise CheckpointError("The zip archive has two entries of one name.")
    names = [n for n in self._entries if n.count("/") == 1]
    roots = [n[: -len("data.pkl")] for n in names if n.endswith("/data.pkl")]
    if len(roots) != 1:
      raise CheckpointError(
        f"The zip archive has {len(roots)} entries data.pkl, expected one: it "
        "is not a file of torch.save."
      )
    self._root = roots[0]
    self._sound: set[str] = set()  # Entries whose checksum was compared.
    if self._root + "constants.pkl" in self._entries:
      raise CheckpointError(
        "This is a TorchScript program, not a checkpoint; save its state_dict."
      )
    order = self._root + "byteorder"
    _check_order(order not in self._entries or self._entry(order) == b"little")
    self._storages: dict[str, Storage] = {}

  def load(self) -> Any:
    return unpickler.load(
      io.BytesIO(self._entry(self._root + "data.pkl")),
      builders=_BUILDERS,
      persistent=self._storage,
    )

  def _storage(self, identifier: Any) -> Storage:
    match identifier:
      case ("storage", kind, str() as key, str(), size):
        pass
      case _:
        raise CheckpointError("The pickle has an unknown persistent id.")
    name, dtype = f"{self._root}data/{key}", _storage_type(kind)
    if key in self._storages:
      return _same(self._storages[key], dtype, size, key)
    if name not in self._entries:
      raise CheckpointError(f"Storage {key!r} is missing; the file is damaged.")
    _check_size(size, dtype, self._entries[name].file_size, key)
    self._storages[key] = Storage(dtype, size, lambda: self._entry(name))
    return self._storages[key]

  def _entry(self, name: str) -> memoryview:
    """The bytes of an entry, in the mapped file; the checksum is compared."""
    entry = self._entries[name]
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
      raise CheckpointError(
        f"The entry {name!r} is compressed or encrypted, which torch.save "
        "never does."
      )
    start = entry.header_offset
    header = self._data[start : start + 30]
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
      raise CheckpointError(f"The entry {name!r} is damaged.")
    start += 30 + sum(struct.unpack("<HH", header[26:30]))
    content = memoryview(self._data)[start : start + entry.file_size]
    # torch.save writes 0 for all entries when told to leave checksums out.
    unchecked = entry.CRC and name not in self._sound
    damaged = len(content) != entry.file_size
    if damaged or (unchecked and zlib.crc32(content) != entry.CRC):
      raise CheckpointError(
        f"The entry {name!r} is truncated, or its checksum is wrong: the file "
        "is damaged. Download or copy it again."
      )
    self._sound.add(name)
    return content


def _load_legacy(data: mmap.mmap) -> Any:
  """Magic number, protocol, system, the object, storage keys, storages."""
  if unpickler.load(data) != _LEGACY_MAGIC:
    raise CheckpointError(
      "This is a pickle, but not a file of torch.save (its magic number is "
      "missing)."
    )
  if unpickler.load(data) != _LEGACY_PROTOCOL:
    raise CheckpointError("The file has an unknown version of torch's format.")
  system = unpickler.load(data)
  _check_order(
    not isinstance(system, dict) or system.get("little_endian", True)
  )
  storages: dict[str, Storage] = {}
  tree = unpickler.load(
    data,
    builders=_BUILDERS,
    persistent=lambda found: _legacy_storage(found, storages, len(data)),
  )
  keys = unpickler.load(data)
  listed = keys if isinstance(keys, list) else []
  names = {key for key in listed if isinstance(key, str)}
  if keys is not listed or len(names) < len(listed) or names != set(storages):
    raise CheckpointError("The list of storages is damaged.")
  for key in listed:
    _place(data, storages[key], key)
  return tree


def _legacy_storage(
  identifier: Any, storages: dict[str, Storage], available: int
) -> Any:
  match identifier:
    case ("module", kind, *_):
      return kind  # Its source code follows, for a warning.
    case ("storage", kind, str() as key, str(), size, None):
      pass
    case ("storage", _, str(), str(), _, _):
      raise CheckpointError(
        "The checkpoint was written by a PyTorch before 0.4; load it with "
        "PyTorch and save it again."
      )
    case _:
      raise CheckpointError("The pickle has an unknown persistent id.")
  dtype = _storage_type(kind)
  if key in storages:
    return _same(storages[key], dtype, size, key)
  _check_size(size, dtype, available, key)
  storages[key] = Storage(dtype, size, lambda: b"")
  return storages[key]


def _place(data: mmap.mmap, storage: Storage, key: str) -> None:
  """Notes where a legacy storage is, and goes behind it."""
  head = data.read(8)
  (size,) = struct.unpack("<q", head) if len(head) == 8 else (-1,)
  start, length = data.tell(), storage.size * storage.dtype.itemsize
  if size != storage.size or start + length > len(data):
    raise CheckpointError(
      f"Storage {key!r} should have {storage.size} elements, found {size} in "
      f"{len(data) - start} bytes; the file is truncated or damaged."
    )
  storage.load = lambda: memoryview(data)[start : start + length]
  data.seek(start + length)
