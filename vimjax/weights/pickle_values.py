"""What a pickle holds: plain values, inert records, and NumPy's arrays.

`BUILDERS` is the short list of calls that are carried out, by functions of this
file, when a pickle asks for them; see `unpickler`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Final, Literal

import numpy as np


class CheckpointError(ValueError):
  """A checkpoint is damaged, or of a form that is not read here."""


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
  """A class or function that a pickle mentions; it was not imported."""

  module: str
  attribute: str

  def __str__(self) -> str:
    return f"{self.module}.{self.attribute}"


@dataclasses.dataclass(eq=False, repr=False)
class Opaque:
  """What a pickle says about an object that is not built here.

  Attributes:
    kind: What would have been called: a `Name`, or any other value.
    args: The arguments.
    state: The attributes, often a dict; None if none are given.
    items: What is appended, or (key, value) pairs, of a list or dict subclass.
  """

  kind: Any
  args: Any = ()
  state: Any = None
  items: list[Any] = dataclasses.field(default_factory=list)

  def __repr__(self) -> str:
    return f"<{self.kind if isinstance(self.kind, Name) else 'object'}>"


# A builder gets the arguments as a tuple. It returns None for arguments that
# it does not know, and the object becomes opaque.
Builder = Callable[[tuple[Any, ...]], Any]

_ATOMS: Final = (str, bytes, int, float, type(None), np.generic, Name, Opaque)
_LONGEST_KEY: Final = 64


def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
  """(key, value) pairs of [key, value, key, value, ...]."""
  if len(values) % 2:
    raise CheckpointError("The pickle is damaged: a key without a value.")
  keys = (hashable(part) for part in values[::2])
  return list(zip(keys, values[1::2], strict=True))


def hashable(value: Any) -> Any:
  """A value that can be hashed."""
  # Tuples of tuples are out: hashing a deep one overflows Python's own stack.
  # Long ones are, too: they would be hashed at every mention.
  flat = value if type(value) is tuple else (value,)
  if len(flat) > _LONGEST_KEY or not all(
    isinstance(part, _ATOMS) for part in flat
  ):
    return Opaque("key", value)
  return value


class DType:
  """A NumPy dtype of numbers: a letter for its kind, and its size."""

  def __init__(self, code: str):
    self.numpy = np.dtype(code)

  def set_state(self, state: Any) -> None:
    # (version, byte order, ...), the rest for structured types.
    match state:
      case (int(), "<" | ">" | "|" | "=" as order, *_):
        self.numpy = self.numpy.newbyteorder(order)
      case _:
        raise CheckpointError("The pickle is damaged: state of a NumPy dtype.")


class NumpyArray:
  """An array while it is read, and afterwards: `np.asarray` gives it."""

  def __init__(self, value: np.ndarray | None = None):
    self._value = value

  def set_state(self, state: Any) -> None:
    match state:
      case (int(), tuple() as shape, DType() as dtype, fortran, bytes() as raw):
        self._value = _frombuffer(raw, dtype, shape, "F" if fortran else "C")
      case _:  # Such as arrays of objects.
        self._value = None

  @property
  def shape(self) -> tuple[int, ...]:
    return () if self._value is None else self._value.shape

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(object) if self._value is None else self._value.dtype

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    if self._value is None:
      raise CheckpointError("This NumPy array is not one of plain numbers.")
    return np.array(self._value, dtype=dtype, copy=copy)


def _frombuffer(
  raw: Any, dtype: DType, shape: Any, order: Literal["C", "F"]
) -> np.ndarray | None:
  sizes = all(type(size) is int and size >= 0 for size in shape)
  values = np.frombuffer(raw, dtype.numpy)
  if not sizes:
    raise CheckpointError("The pickle is damaged: shape of a NumPy array.")
  return values.reshape(shape, order=order)


def _ordered_dict(args: tuple[Any, ...]) -> Any:
  match args:
    case ():
      return {}
    case (list() as rows,):
      if not all(type(r) in (list, tuple) and len(r) == 2 for r in rows):
        raise CheckpointError("The pickle is damaged: rows of an OrderedDict.")
      return dict(pairs([part for row in rows for part in row]))
  return None


def _set(args: tuple[Any, ...]) -> Any:
  match args:
    case (list() as values,):
      return {hashable(value) for value in values}
  return None


def _frozenset(args: tuple[Any, ...]) -> Any:
  values = _set(args)
  return None if values is None else frozenset(values)


def _bytearray(args: tuple[Any, ...]) -> Any:
  match args:
    case ():
      return bytearray()
    case (bytes() as raw,):
      return bytearray(raw)
  return None


def _encode(args: tuple[Any, ...]) -> Any:
  # How protocols before 3 store bytes.
  match args:
    case (str() as text, "latin1"):
      return text.encode("latin1")
  return None


def _dtype(args: tuple[Any, ...]) -> Any:
  match args:
    case (str() as code, *_) if (
      code[:1] in ("b", "i", "u", "f", "c") and code[1:] in _SIZES
    ):
      return DType(code)
  return None


def _scalar(args: tuple[Any, ...]) -> Any:
  match args:
    case (DType() as dtype, bytes() as raw):
      if len(raw) != dtype.numpy.itemsize:
        raise CheckpointError("The pickle is damaged: size of a NumPy scalar.")
      return np.frombuffer(raw, dtype.numpy)[0]
  return None


def _buffer_array(args: tuple[Any, ...]) -> Any:
  match args:
    case (
      bytes() | bytearray() as raw,
      DType() as dtype,
      tuple() as shape,
      # Nothing else is looked at: printing it might never end.
      "C" | "F" as order,
    ):
      return NumpyArray(_frombuffer(raw, dtype, shape, order))
  return None


_SIZES: Final = ("1", "2", "4", "8", "16")
_NUMPY_CORES: Final = ("numpy.core", "numpy._core")
BUILDERS: Final[dict[str, Builder]] = {
  "collections.OrderedDict": _ordered_dict,
  "collections.defaultdict": lambda args: {} if len(args) < 2 else None,
  **{
    f"{module}.{name}": builder
    for module in ("builtins", "__builtin__")
    for name, builder in (
      # Older protocols have no opcodes for these.
      ("set", _set),
      ("frozenset", _frozenset),
      ("bytearray", _bytearray),
      ("bytes", lambda args: None if args else b""),
    )
  },
  "_codecs.encode": _encode,
  "numpy.dtype": _dtype,
  **{f"{core}.multiarray.scalar": _scalar for core in _NUMPY_CORES},
  **{
    f"{core}.multiarray._reconstruct": lambda args: NumpyArray()
    for core in _NUMPY_CORES
  },
  **{f"{core}.numeric._frombuffer": _buffer_array for core in _NUMPY_CORES},
}
