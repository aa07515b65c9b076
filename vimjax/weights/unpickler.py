"""Reads pickles as data: nothing is imported, and nothing in them is called.

A pickle is a program for a stack machine, and Python's own machine runs any
function that the program names. This one interprets the opcodes itself. Plain
containers, numbers and strings are built; a name such as `os.system` stays a
`Name`, and whatever the program would make with it becomes an inert `Opaque`
record of the name, the arguments and the state. A few names that checkpoints
are made of have a builder here, in a table; callers add theirs for tensors.
"""

from collections.abc import Callable, Mapping
import dataclasses
import io
import mmap
import pickletools
from typing import Any, Final

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

_MARK: Final = object()
# What opcodes do on a stack that they were not written for.
_DAMAGE: Final = (
  IndexError,
  KeyError,
  MemoryError,
  OverflowError,
  TypeError,
  ValueError,
)
_ATOMS: Final = (str, bytes, int, float, type(None), np.generic, Name, Opaque)


def load(
  file: io.BytesIO | mmap.mmap,
  *,
  builders: Mapping[str, Builder] | None = None,
  persistent: Callable[[Any], Any] | None = None,
) -> Any:
  """Reads one pickle, and leaves `file` behind it.

  Args:
    file: In memory or mapped, so that a claimed length cannot allocate more
      than there is.
    builders: More builders, from full names such as "torch.Size".
    persistent: Resolves persistent ids.

  Raises:
    CheckpointError: The pickle is truncated, damaged or nonsensical.
  """
  machine = _Machine({**_BUILDERS, **(builders or {})}, persistent)
  stream: Any = file  # A mapped file is enough of a file for pickletools.
  try:
    for opcode, argument, _ in pickletools.genops(stream):
      machine.step(opcode.name, argument)
  except CheckpointError:
    raise
  except _DAMAGE as error:
    raise CheckpointError(
      f"The pickle is damaged: {type(error).__name__}: {error}"
    ) from error
  return machine.result()


class _Machine:
  """The stack, the memo, and a method for each group of opcodes."""

  def __init__(
    self,
    builders: Mapping[str, Builder],
    persistent: Callable[[Any], Any] | None,
  ):
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._builders = builders
    self._persistent = persistent

  def result(self) -> Any:
    if len(self._stack) != 1:
      raise CheckpointError(
        f"The pickle is damaged: {len(self._stack)} values at its end."
      )
    return self._top()

  def step(self, name: str, argument: Any) -> None:
    if name in _CONSTANTS:
      self._stack.append(argument)
    elif name in _MAKERS:
      self._stack.append(_MAKERS[name]())
    elif name in _TUPLES:
      size = _TUPLES[name]
      values = [self._pop() for _ in range(size)][::-1]
      self._stack.append(tuple(values))
    elif name in _FROM_MARK:
      self._stack.append(_FROM_MARK[name](self._pop_mark()))
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      self._stack.append(self._memo[argument])
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memo[argument] = self._top()
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = self._top()
    elif name in ("PROTO", "FRAME", "STOP"):
      pass
    elif name in _METHODS:
      _METHODS[name](self, argument)
    else:
      raise CheckpointError(f"The pickle has the unsupported opcode {name}.")

  def _pop(self) -> Any:
    value = self._stack.pop()
    if value is _MARK:
      raise CheckpointError("The pickle is damaged: a mark instead of a value.")
    return value

  def _top(self) -> Any:
    if self._stack[-1] is _MARK:
      raise CheckpointError("The pickle is damaged: a mark instead of a value.")
    return self._stack[-1]

  def _pop_mark(self) -> list[Any]:
    """Everything above the last mark."""
    values = []
    while self._stack[-1] is not _MARK:
      values.append(self._stack.pop())
    self._stack.pop()
    return values[::-1]

  def _drop(self, _: Any) -> None:
    self._stack.pop()

  def _drop_mark(self, _: Any) -> None:
    self._pop_mark()

  def _duplicate(self, _: Any) -> None:
    self._stack.append(self._top())

  def _append(self, _: Any) -> None:
    value = self._pop()
    _extend(self._top(), [value])

  def _appends(self, _: Any) -> None:
    values = self._pop_mark()
    _extend(self._top(), values)

  def _set_item(self, _: Any) -> None:
    value, key = self._pop(), self._pop()
    _update(self._top(), [key, value])

  def _set_items(self, _: Any) -> None:
    values = self._pop_mark()
    _update(self._top(), values)

  def _global(self, argument: str) -> None:
    module, _, attribute = argument.partition(" ")
    self._stack.append(Name(module, attribute))

  def _stack_global(self, _: Any) -> None:
    attribute, module = self._pop(), self._pop()
    if not isinstance(module, str) or not isinstance(attribute, str):
      raise CheckpointError("The pickle is damaged: a name is not a string.")
    self._stack.append(Name(module, attribute))

  def _reduce(self, _: Any) -> None:
    args, kind = self._pop(), self._pop()
    self._stack.append(self._make(kind, args))

  def _new_object(self, _: Any) -> None:
    args, kind = self._pop(), self._pop()
    self._stack.append(self._make(kind, args))

  def _new_object_with_keywords(self, _: Any) -> None:
    keywords, args, kind = self._pop(), self._pop(), self._pop()
    self._stack.append(Opaque(kind, (args, keywords)))

  def _instance(self, argument: str) -> None:
    module, _, attribute = argument.partition(" ")
    args = tuple(self._pop_mark())
    self._stack.append(self._make(Name(module, attribute), args))

  def _object(self, _: Any) -> None:
    kind, *args = self._pop_mark()
    self._stack.append(self._make(kind, tuple(args)))

  def _make(self, kind: Any, args: Any) -> Any:
    builder = self._builders.get(str(kind)) if isinstance(kind, Name) else None
    if builder is None or not isinstance(args, tuple):
      return Opaque(kind, args)
    built = builder(args)
    return Opaque(kind, args) if built is None else built

  def _build(self, _: Any) -> None:
    state = self._pop()
    target = self._top()
    if isinstance(target, Opaque):
      target.state = state
    elif isinstance(target, DType | NumpyArray):
      target.set_state(state)
    elif not isinstance(target, dict | list | set):
      raise CheckpointError(
        f"The pickle is damaged: it sets the state of a {_kind(target)}."
      )
    # Attributes of a container, as `_metadata` of a state dict, are dropped.

  def _persistent_id(self, argument: Any) -> None:
    self._resolve(argument)

  def _binary_persistent_id(self, _: Any) -> None:
    self._resolve(self._pop())

  def _resolve(self, identifier: Any) -> None:
    if self._persistent is None:
      raise CheckpointError("The pickle has a persistent id where none belong.")
    self._stack.append(self._persistent(identifier))


def _kind(value: Any) -> str:
  return type(value).__name__


def _extend(target: Any, values: list[Any]) -> None:
  if isinstance(target, list):
    target += values
  elif isinstance(target, set):
    target.update(_key(value) for value in values)
  elif isinstance(target, Opaque):
    target.items += values
  else:
    raise CheckpointError(
      f"The pickle is damaged: it appends to a {_kind(target)}."
    )


def _update(target: Any, values: list[Any]) -> None:
  """Sets items from [key, value, key, value, ...]."""
  pairs = _pairs(values)
  if isinstance(target, dict):
    target.update(pairs)
  elif isinstance(target, Opaque):
    target.items += pairs
  else:
    raise CheckpointError(
      f"The pickle is damaged: it sets items of a {_kind(target)}."
    )


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
  if len(values) % 2:
    raise CheckpointError("The pickle is damaged: a key without a value.")
  keys = (_key(key) for key in values[::2])
  return list(zip(keys, values[1::2], strict=True))


def _key(value: Any) -> Any:
  """A value that can be hashed."""
  # Tuples of tuples are out: hashing a deep one overflows Python's own stack.
  flat = value if type(value) is tuple else (value,)
  if not all(isinstance(part, _ATOMS) for part in flat):
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
    return np.asarray(self).shape

  @property
  def dtype(self) -> np.dtype:
    return np.asarray(self).dtype

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    if self._value is None:
      raise CheckpointError("This NumPy array is not one of plain numbers.")
    return np.array(self._value, dtype=dtype, copy=copy)


def _frombuffer(
  raw: Any, dtype: DType, shape: Any, order: str
) -> np.ndarray | None:
  sizes = all(type(size) is int and size >= 0 for size in shape)
  values = np.frombuffer(raw, dtype.numpy)
  if not sizes:
    raise CheckpointError("The pickle is damaged: shape of a NumPy array.")
  return values.reshape(shape, order="F" if order == "F" else "C")


def _ordered_dict(args: tuple[Any, ...]) -> Any:
  match args:
    case ():
      return {}
    case (list() as pairs,):
      flat = [part for pair in pairs for part in pair]
      return dict(_pairs(flat))
  return None


def _set(args: tuple[Any, ...]) -> Any:
  match args:
    case (list() as values,):
      return {_key(value) for value in values}
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
    case (bytes() | bytearray() as raw, DType() as dtype, tuple() as shape, o):
      return NumpyArray(_frombuffer(raw, dtype, shape, str(o)))
  return None


_SIZES: Final = ("1", "2", "4", "8", "16")
_NUMPY_CORES: Final = ("numpy.core", "numpy._core")
_BUILDERS: Final[dict[str, Builder]] = {
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

_CONSTANTS: Final = frozenset(
  "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
  "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE "
  "BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_MAKERS: Final[dict[str, Callable[[], Any]]] = {
  "MARK": lambda: _MARK,
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
  "EMPTY_SET": set,
  "EMPTY_TUPLE": tuple,
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: Final[dict[str, Callable[[list[Any]], Any]]] = {
  "LIST": list,
  "TUPLE": tuple,
  "DICT": lambda values: dict(_pairs(values)),
  "FROZENSET": lambda values: frozenset(_key(value) for value in values),
}
_METHODS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
  "POP": _Machine._drop,
  "POP_MARK": _Machine._drop_mark,
  "DUP": _Machine._duplicate,
  "APPEND": _Machine._append,
  "APPENDS": _Machine._appends,
  "ADDITEMS": _Machine._appends,
  "SETITEM": _Machine._set_item,
  "SETITEMS": _Machine._set_items,
  "GLOBAL": _Machine._global,
  "STACK_GLOBAL": _Machine._stack_global,
  "REDUCE": _Machine._reduce,
  "NEWOBJ": _Machine._new_object,
  "NEWOBJ_EX": _Machine._new_object_with_keywords,
  "INST": _Machine._instance,
  "OBJ": _Machine._object,
  "BUILD": _Machine._build,
  "PERSID": _Machine._persistent_id,
  "BINPERSID": _Machine._binary_persistent_id,
}
