"""Reads pickles as data: nothing is imported, and nothing in them is called.

A pickle is a program for a stack machine, and Python's own machine runs any
function that the program names. This one interprets the opcodes itself. Plain
containers, numbers and strings are built; a name such as `os.system` stays a
`Name`, and whatever the program would make with it becomes an inert `Opaque`
record of the name, the arguments and the state. A few names that checkpoints
are made of have a builder, in a table; callers add theirs for tensors.
"""

from collections.abc import Callable, Mapping
import io
import mmap
import pickletools
from typing import Any, Final

from vimjax.weights import pickle_values

_MARK: Final = object()
# How many times the pickle's own size its builders may copy. A program can name
# one long list many times, and have it copied every time.
_COPIES: Final = 4
# What opcodes do on a stack that they were not written for.
_DAMAGE: Final = (
  IndexError,
  KeyError,
  MemoryError,
  OverflowError,
  RecursionError,
  TypeError,
  ValueError,
)


def load(
  file: io.BytesIO | mmap.mmap,
  *,
  builders: Mapping[str, pickle_values.Builder] | None = None,
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
  size = len(file.getbuffer()) if isinstance(file, io.BytesIO) else len(file)
  machine = _Machine(
    {**pickle_values.BUILDERS, **(builders or {})},
    persistent,
    allowance=_COPIES * size,
  )
  stream: Any = file  # A mapped file is enough of a file for pickletools.
  try:
    for opcode, argument, _ in pickletools.genops(stream):
      machine.step(opcode.name, argument)
  except pickle_values.CheckpointError:
    raise
  except _DAMAGE as error:
    raise _damaged(f"{type(error).__name__}: {error}") from error
  return machine.result()


class _Machine:
  """The stack, the memo, and a method for each group of opcodes."""

  def __init__(
    self,
    builders: Mapping[str, pickle_values.Builder],
    persistent: Callable[[Any], Any] | None,
    *,
    allowance: int,
  ):
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._builders = builders
    self._persistent = persistent
    self._allowance = allowance

  def result(self) -> Any:
    if len(self._stack) != 1:
      raise _damaged(f"{len(self._stack)} values at its end")
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
      raise _damaged(f"it has the unsupported opcode {name}")

  def _pop(self) -> Any:
    value = self._stack.pop()
    if value is _MARK:
      raise _damaged("a mark instead of a value")
    return value

  def _top(self) -> Any:
    if self._stack[-1] is _MARK:
      raise _damaged("a mark instead of a value")
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
    self._stack.append(pickle_values.Name(module, attribute))

  def _stack_global(self, _: Any) -> None:
    attribute, module = self._pop(), self._pop()
    if not isinstance(module, str) or not isinstance(attribute, str):
      raise _damaged("a name is not a string")
    self._stack.append(pickle_values.Name(module, attribute))

  def _reduce(self, _: Any) -> None:
    args, kind = self._pop(), self._pop()
    self._stack.append(self._make(kind, args))

  def _new_object(self, _: Any) -> None:
    args, kind = self._pop(), self._pop()
    self._stack.append(self._make(kind, args))

  def _new_object_with_keywords(self, _: Any) -> None:
    keywords, args, kind = self._pop(), self._pop(), self._pop()
    self._stack.append(pickle_values.Opaque(kind, (args, keywords)))

  def _instance(self, argument: str) -> None:
    module, _, attribute = argument.partition(" ")
    args = tuple(self._pop_mark())
    self._stack.append(self._make(pickle_values.Name(module, attribute), args))

  def _object(self, _: Any) -> None:
    kind, *args = self._pop_mark()
    self._stack.append(self._make(kind, tuple(args)))

  def _make(self, kind: Any, args: Any) -> Any:
    builder = (
      self._builders.get(str(kind))
      if isinstance(kind, pickle_values.Name)
      else None
    )
    if builder is None or not isinstance(args, tuple):
      return pickle_values.Opaque(kind, args)
    self._allowance -= sum(len(a) for a in args if isinstance(a, _SIZED))
    if self._allowance < 0:
      raise _damaged("it copies the same values again and again")
    try:
      built = builder(args)
    except pickle_values.CheckpointError as error:
      raise pickle_values.CheckpointError(f"{self._near()}{error}") from error
    return pickle_values.Opaque(kind, args) if built is None else built

  def _near(self) -> str:
    """The key of what is being made: it lies below, on the stack."""
    for value in reversed(self._stack):
      if isinstance(value, str):
        return f"{value[:80]}: "
    return ""

  def _build(self, _: Any) -> None:
    state = self._pop()
    target = self._top()
    if isinstance(target, pickle_values.Opaque):
      target.state = state
    elif isinstance(target, pickle_values.DType | pickle_values.NumpyArray):
      target.set_state(state)
    elif not isinstance(target, dict | list | set):
      raise _damaged(f"it sets the state of a {_kind(target)}")
    # Attributes of a container, as `_metadata` of a state dict, are dropped.

  def _persistent_id(self, argument: Any) -> None:
    self._resolve(argument)

  def _binary_persistent_id(self, _: Any) -> None:
    self._resolve(self._pop())

  def _resolve(self, identifier: Any) -> None:
    if self._persistent is None:
      raise _damaged("it has a persistent id where none belong")
    self._stack.append(self._persistent(identifier))


def _damaged(reason: str) -> pickle_values.CheckpointError:
  return pickle_values.CheckpointError(f"The pickle is damaged: {reason}.")


def _kind(value: Any) -> str:
  return type(value).__name__


def _extend(target: Any, values: list[Any]) -> None:
  if isinstance(target, list):
    target += values
  elif isinstance(target, set):
    target.update(pickle_values.hashable(value) for value in values)
  elif isinstance(target, pickle_values.Opaque):
    target.items += values
  else:
    raise _damaged(f"it appends to a {_kind(target)}")


def _update(target: Any, values: list[Any]) -> None:
  """Sets items from [key, value, key, value, ...]."""
  pairs = pickle_values.pairs(values)
  if isinstance(target, dict):
    target.update(pairs)
  elif isinstance(target, pickle_values.Opaque):
    target.items += pairs
  else:
    raise _damaged(f"it sets items of a {_kind(target)}")


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
_SIZED: Final = (bytearray, bytes, list, str, tuple)
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: Final[dict[str, Callable[[list[Any]], Any]]] = {
  "LIST": list,
  "TUPLE": tuple,
  "DICT": lambda values: dict(pickle_values.pairs(values)),
  "FROZENSET": lambda values: frozenset(
    pickle_values.hashable(value) for value in values
  ),
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
