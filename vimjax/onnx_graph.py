"""An ONNX program while it is being written.

Values that depend on no image are arrays, all others names of tensors.
"""

from collections.abc import Sequence
import itertools
from typing import Any, Final

from jax.extend import core
import numpy as np

import pallas_kernels

# A file is one protocol buffer, which can have 2 GiB; the rest is for nodes.
_MOST_BYTES: Final = 2**31 - 2**24

type Value = np.ndarray | str


def int64(*values: int) -> np.ndarray:
  """Sizes, axes or positions, as operators take them."""
  return np.asarray(values, np.int64)


def unknown(eqn: core.JaxprEqn, why: str) -> Exception:
  """The error for an operation that cannot be written."""
  where = str(eqn.source_info.name_stack) or "the model"
  return pallas_kernels.UnsupportedError(
    f"ONNX export: cannot write the operation `{eqn.primitive.name}` of "
    f"{where}: {why}. Export the model as StableHLO, which has no such limits."
  )


class Graph:
  """A program, or the body of a loop in one, while it is being written.

  Bodies see the tensors and constants of what is around them.
  """

  def __init__(self, onnx: Any, batch: Any, root: "Graph | None" = None):
    self.onnx, self.batch = onnx, batch
    self.root: Graph = root or self
    self.nodes: list[Any] = []
    if root is None:
      self.constants: dict[Any, Any] = {}
      self.bytes = 0
      self.sizes: dict[int, str] = {}  # Of multiples of the batch.
      self.numbers = itertools.count()

  def body(self) -> "Graph":
    """A graph inside of this one."""
    return Graph(self.onnx, self.batch, self.root)

  def new_name(self) -> str:
    """One that no tensor of the program has."""
    return f"t{next(self.root.numbers)}"

  def add(
    self,
    operator: str,
    *inputs: Value,
    names: Sequence[str] | None = None,
    **attributes: Any,
  ) -> str:
    """Appends an operation; returns the name of its first result."""
    names = [self.new_name()] if names is None else names
    self.nodes.append(
      self.onnx.helper.make_node(
        operator, [self.name(x) for x in inputs], names, **attributes
      )
    )
    return names[0]

  def name(self, value: Value) -> str:
    """The name of a tensor, which a constant gets here."""
    if isinstance(value, str):
      return value
    key: Any = object()
    if value.nbytes <= 256:  # Small ones, such as axes, are many and alike.
      key = (value.dtype, value.shape, value.tobytes())
    if key not in self.root.constants:
      self.root.bytes += value.nbytes
      if self.root.bytes > _MOST_BYTES:
        raise pallas_kernels.UnsupportedError(
          "ONNX export: the weights are larger than the 2 GB that a file can "
          "have. Export the model as StableHLO, which has no such limit."
        )
      made = self.onnx.numpy_helper.from_array(value, self.new_name())
      self.root.constants[key] = made
    return self.root.constants[key].name

  def shape(self, dims: Sequence[Any]) -> Value:
    """Sizes as a tensor; those that depend on the batch are computed."""
    if all(isinstance(size, int) for size in dims):
      return int64(*dims)
    parts = [
      int64(size) if isinstance(size, int) else self._size(size)
      for size in dims
    ]
    return self.add("Concat", *parts, axis=0)

  def _size(self, size: Any) -> str:
    """A multiple of the batch, as a tensor of one element."""
    sizes, factor = self.root.sizes, size // self.batch
    if not isinstance(factor, int) or factor * self.batch != size:
      raise pallas_kernels.UnsupportedError(
        f"ONNX export: a size of {size} is no multiple of the batch."
      )
    if factor not in sizes:
      batch = self.root.add("Shape", "images", start=0, end=1)
      sizes[factor] = self.root.add("Mul", batch, int64(factor))
    return sizes[factor]

  def info(self, name: str, aval: Any) -> Any:
    """Type and shape of an input or output."""
    helper = self.onnx.helper
    shape = [x if isinstance(x, int) else str(x) for x in aval.shape]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
    return helper.make_tensor_value_info(name, kind, shape)

  def finish(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]):
    """The graph; the outermost one holds the constants of all."""
    constants = self.constants.values() if self.root is self else ()
    return self.onnx.helper.make_graph(
      self.nodes, name, inputs, outputs, initializer=list(constants)
    )
