"""The operations of traced programs, in terms of those of ONNX.

Control flow is in `vimjax.onnx_program`.
"""

from collections.abc import Callable, Sequence
import string
from typing import Any, Final

from jax.extend import core
import numpy as np

from vimjax import onnx_graph


def _shape(x: Any) -> tuple[Any, ...]:
  return x.aval.shape


def _same(operator: str, **attributes: Any) -> Callable[..., onnx_graph.Value]:
  """An operation that ONNX has in the same form."""
  return lambda graph, eqn, *inputs: graph.add(operator, *inputs, **attributes)


def _not(operator: str) -> Callable[..., onnx_graph.Value]:
  return lambda graph, eqn, *inputs: graph.add(
    "Not", graph.add(operator, *inputs)
  )


def _like(eqn: core.JaxprEqn, value: float) -> np.ndarray:
  """A scalar of the type of the result."""
  aval: Any = eqn.outvars[0].aval
  return np.asarray(value, aval.dtype)


def _rsqrt(graph, eqn, x):
  return graph.add("Reciprocal", graph.add("Sqrt", x))


def _log1p(graph, eqn, x):
  # log(1 + x) alone would lose the digits of a small x.
  one, zero = _like(eqn, 1), _like(eqn, 0)
  plus = graph.add("Add", x, one)
  rounded = graph.add("Sub", plus, one)
  ratio = graph.add("Div", graph.add("Mul", graph.add("Log", plus), x), rounded)
  return graph.add("Where", graph.add("Equal", rounded, zero), x, ratio)


def _erfc(graph, eqn, x):
  return graph.add("Sub", _like(eqn, 1), graph.add("Erf", x))


def _expm1(graph, eqn, x):
  # exp(x) - 1 = tanh(x / 2) (exp(x) + 1), without the difference.
  half = graph.add("Tanh", graph.add("Mul", x, _like(eqn, 0.5)))
  plus = graph.add("Add", graph.add("Exp", x), _like(eqn, 1))
  return graph.add("Mul", half, plus)


def _one_minus_square(graph, eqn, x):
  return graph.add("Sub", _like(eqn, 1), graph.add("Mul", x, x))


def _clamp(graph, eqn, low, x, high):
  return graph.add("Min", graph.add("Max", x, low), high)


def _integer_pow(graph, eqn, x):
  return graph.add("Pow", x, _like(eqn, eqn.params["y"]))


def _select(graph, eqn, which, *cases):
  if len(cases) != 2:
    raise onnx_graph.unknown(eqn, f"it chooses between {len(cases)} cases")
  return graph.add("Where", which, cases[1], cases[0])


def _cast(graph, eqn, x):
  kind = np.dtype(eqn.params["new_dtype"])
  return graph.add(
    "Cast", x, to=graph.onnx.helper.np_dtype_to_tensor_dtype(kind)
  )


def _reshape(graph, eqn, x):
  sizes = [s if isinstance(s, int) else -1 for s in _shape(eqn.outvars[0])]
  if sizes.count(-1) > 1:
    return graph.add("Reshape", x, graph.shape(_shape(eqn.outvars[0])))
  return graph.add("Reshape", x, onnx_graph.int64(*sizes))


def _broadcast(graph, eqn, x):
  places, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
  added = [axis for axis in range(len(shape)) if axis not in places]
  if added:
    x = graph.add("Unsqueeze", x, onnx_graph.int64(*added))
  old = dict(zip(places, _shape(eqn.invars[0]), strict=True))
  # Sizes that are right already need not be known.
  wanted = [1 if old.get(i) == size else size for i, size in enumerate(shape)]
  if all(size == 1 for size in wanted):
    return x
  return graph.add("Expand", x, graph.shape(wanted))


def _transpose(graph, eqn, x):
  return _permute(graph, x, eqn.params["permutation"])


def _permute(
  graph: onnx_graph.Graph, x: onnx_graph.Value, order: Sequence[int]
) -> onnx_graph.Value:
  if list(order) == list(range(len(order))):
    return x
  if isinstance(x, np.ndarray):
    return np.transpose(x, order)
  return graph.add("Transpose", x, perm=list(order))


def _concatenate(graph, eqn, *parts):
  return graph.add("Concat", *parts, axis=eqn.params["dimension"])


def _stack(graph, eqn, *parts):
  axis = eqn.params["axis"]
  each = [graph.add("Unsqueeze", x, onnx_graph.int64(axis)) for x in parts]
  return graph.add("Concat", *each, axis=axis)


def _unstack(graph, eqn, x):
  axis, names = eqn.params["axis"], [graph.new_name() for _ in eqn.outvars]
  ones = onnx_graph.int64(*[1] * len(names))
  graph.add("Split", x, ones, names=names, axis=axis)
  return [graph.add("Squeeze", y, onnx_graph.int64(axis)) for y in names]


def _tile(graph, eqn, x):
  return graph.add("Tile", x, onnx_graph.int64(*eqn.params["reps"]))


def _slice(graph, eqn, x):
  params, shape = eqn.params, _shape(eqn.invars[0])
  strides = params["strides"] or (1,) * len(shape)
  bounds = zip(
    params["start_indices"], params["limit_indices"], strides, strict=True
  )
  return _cut(graph, x, shape, list(bounds))


def _dynamic_slice(graph, eqn, x, *starts):
  shape, sizes = _shape(eqn.invars[0]), eqn.params["slice_sizes"]
  if not all(isinstance(start, np.ndarray) for start in starts):
    raise onnx_graph.unknown(eqn, "its place depends on the images")
  bounds = []
  for start, size, whole in zip(starts, sizes, shape, strict=True):
    # A slice stays inside the array.
    first = 0 if size == whole else min(max(int(start), 0), whole - size)
    bounds.append((first, first + size, 1))
  return _cut(graph, x, shape, bounds)


def _cut(
  graph: onnx_graph.Graph,
  x: onnx_graph.Value,
  shape: Sequence[Any],
  bounds: Sequence[tuple[Any, Any, int]],
) -> onnx_graph.Value:
  """From, to and step along every axis."""
  cut = [
    (axis, *bound)
    for axis, (bound, size) in enumerate(zip(bounds, shape, strict=True))
    if bound != (0, size, 1)
  ]
  if not cut:
    return x
  axes, starts, ends, steps = (
    onnx_graph.int64(*column) for column in zip(*cut, strict=True)
  )
  return graph.add("Slice", x, starts, ends, axes, steps)


def _reverse(graph, eqn, x):
  axes = eqn.params["dimensions"]
  every = lambda value: onnx_graph.int64(*[value] * len(axes))
  beyond = np.iinfo(np.int64).min
  return graph.add(
    "Slice", x, every(-1), every(beyond), onnx_graph.int64(*axes), every(-1)
  )


def _split(graph, eqn, x):
  sizes = onnx_graph.int64(*eqn.params["sizes"])
  names = [graph.new_name() for _ in sizes]
  graph.add("Split", x, sizes, names=names, axis=eqn.params["axis"])
  return names


def _squeeze(graph, eqn, x):
  return graph.add("Squeeze", x, onnx_graph.int64(*eqn.params["dimensions"]))


def _pad(graph, eqn, x, value):
  low, high, interior = zip(*eqn.params["padding_config"], strict=True)
  if any(interior):
    raise onnx_graph.unknown(eqn, "it pads between elements")
  return graph.add("Pad", x, onnx_graph.int64(*low, *high), value)


def _reduce(operator: str) -> Callable[..., onnx_graph.Value]:
  return lambda graph, eqn, x: graph.add(
    operator, x, onnx_graph.int64(*eqn.params["axes"]), keepdims=0
  )


def _cumsum(graph, eqn, x):
  axis = np.asarray(eqn.params["axis"], np.int64)
  return graph.add("CumSum", x, axis, reverse=int(eqn.params["reverse"]))


def _gather(graph, eqn, x, indices):
  numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  shape = _shape(eqn.invars[0])
  if not isinstance(indices, np.ndarray):
    raise onnx_graph.unknown(eqn, "its indices depend on the images")
  starts = dict(
    zip(numbers.start_index_map, np.moveaxis(indices, -1, 0), strict=True)
  )
  if numbers.operand_batching_dims or not all(
    _inside(start, sizes[i], shape[i]) for i, start in starts.items()
  ):
    raise onnx_graph.unknown(eqn, "its indices leave the array, or are batched")
  dropped = numbers.collapsed_slice_dims
  if indices.ndim == 1:  # One window.
    bounds = [
      (start := int(starts.get(i, 0)), start + size, 1)
      for i, size in enumerate(sizes)
    ]
    x = _cut(graph, x, shape, bounds)
    return graph.add("Squeeze", x, onnx_graph.int64(*dropped)) if dropped else x
  rest = [
    i for i, size in enumerate(shape) if i not in dropped and sizes[i] == size
  ]
  chosen = [i for i in range(len(shape)) if i not in rest]
  windows = [i for i in chosen if i not in dropped]
  x = _permute(graph, x, [*chosen, *rest])
  lead = indices.shape[:-1]
  # Where each element of each window is in the chosen dimensions.
  places = np.indices([sizes[i] for i in chosen])
  places = places.reshape(len(chosen), *[sizes[i] for i in windows])
  places = np.stack(
    [
      np.add.outer(starts.get(i, np.zeros(lead, np.int64)), inside)
      for i, inside in zip(chosen, places, strict=True)
    ],
    axis=-1,
  )
  x = graph.add("GatherND", x, places.astype(np.int64))
  # Now (dimensions of the indices, windows, rest); the result has them mixed.
  now = [*[None] * len(lead), *windows, *rest]
  offsets = dict(
    zip(numbers.offset_dims, sorted([*windows, *rest]), strict=True)
  )
  free = iter(range(len(lead)))
  order = [
    now.index(offsets[i]) if i in offsets else next(free)
    for i in range(len(now))
  ]
  return _permute(graph, x, order)


def _inside(starts: np.ndarray, size: Any, whole: Any) -> bool:
  """Whether every window lies in the array, so that no mode matters."""
  last = 0 if size == whole else whole - size
  return bool((starts >= 0).all() and (starts <= last).all())


def _dot(graph, eqn, x, y):
  (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
  x_rank, y_rank = (len(_shape(v)) for v in eqn.invars)
  is_dense = list(x_sum) == [x_rank - 1] and list(y_sum) == [0]
  if is_dense and y_rank == 2 and not x_batch:
    return graph.add("MatMul", x, y)
  letters = iter(string.ascii_letters)
  x_names = [next(letters) for _ in range(x_rank)]
  y_names = [next(letters) for _ in range(y_rank)]
  for i, j in zip((*x_sum, *x_batch), (*y_sum, *y_batch), strict=True):
    y_names[j] = x_names[i]
  out = [x_names[i] for i in x_batch]
  out += [x_names[i] for i in range(x_rank) if i not in (*x_sum, *x_batch)]
  out += [y_names[j] for j in range(y_rank) if j not in (*y_sum, *y_batch)]
  form = f"{''.join(x_names)},{''.join(y_names)}->{''.join(out)}"
  return graph.add("Einsum", x, y, equation=form)


def _conv(graph, eqn, x, kernel):
  params = eqn.params
  numbers = params["dimension_numbers"]
  if params["batch_group_count"] != 1 or any(
    step != 1 for step in params["lhs_dilation"]
  ):
    raise onnx_graph.unknown(eqn, "it is no plain convolution")
  low, high = zip(*params["padding"], strict=True)
  y = graph.add(
    "Conv",
    _permute(graph, x, numbers.lhs_spec),
    _permute(graph, kernel, numbers.rhs_spec),
    strides=list(params["window_strides"]),
    dilations=list(params["rhs_dilation"]),
    pads=[int(n) for n in (*low, *high)],
    group=params["feature_group_count"],
  )
  return _permute(graph, y, np.argsort(numbers.out_spec).tolist())


OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
  **{
    name: _same(operator)
    for name, operator in {
      "abs": "Abs",
      "add": "Add",
      "and": "And",
      "ceil": "Ceil",
      "cos": "Cos",
      "div": "Div",
      "eq": "Equal",
      "erf": "Erf",
      "exp": "Exp",
      "floor": "Floor",
      "ge": "GreaterOrEqual",
      "gt": "Greater",
      "le": "LessOrEqual",
      "log": "Log",
      "logistic": "Sigmoid",
      "lt": "Less",
      "max": "Max",
      "min": "Min",
      "mul": "Mul",
      "neg": "Neg",
      "not": "Not",
      "or": "Or",
      "pow": "Pow",
      "sign": "Sign",
      "sin": "Sin",
      "sqrt": "Sqrt",
      "sub": "Sub",
      "tanh": "Tanh",
    }.items()
  },
  "broadcast_in_dim": _broadcast,
  "clamp": _clamp,
  "concatenate": _concatenate,
  "conv_general_dilated": _conv,
  "convert_element_type": _cast,
  "cumsum": _cumsum,
  "dot_general": _dot,
  "dynamic_slice": _dynamic_slice,
  "erfc": _erfc,
  "expm1": _expm1,
  "gather": _gather,
  "integer_pow": _integer_pow,
  "log1p": _log1p,
  "ne": _not("Equal"),
  "one_minus_square": _one_minus_square,
  "pad": _pad,
  "reduce_max": _reduce("ReduceMax"),
  "reduce_min": _reduce("ReduceMin"),
  "reduce_prod": _reduce("ReduceProd"),
  "reduce_sum": _reduce("ReduceSum"),
  "reshape": _reshape,
  "rev": _reverse,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "slice": _slice,
  "split": _split,
  "square": lambda graph, eqn, x: graph.add("Mul", x, x),
  "squeeze": _squeeze,
  "stack": _stack,
  "tile": _tile,
  "transpose": _transpose,
  "unstack": _unstack,
}
