"""Writes a function of a batch of images as an ONNX program.

The function is traced, and its operations are written one by one: those that
the models of this package are made of, for inference. What depends on no image
is computed here, so that weights arrive in their final form and little but the
model's own arithmetic is left. The size of the batch stays open; it is a symbol
in the traced shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from jax import export
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from vimjax import onnx_graph, onnx_operations, optional, version

# The oldest that has all operators in the form used.
_OPSET: Final = 18
# Operations that hold a program, with the parameter that has it.
_CALLS: Final = {
  "jit": "jaxpr",
  "closed_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "remat2": "jaxpr",
  "checkpoint": "jaxpr",
}
# Operations that matter to compilers and derivatives only.
_UNCHANGED: Final = ("copy", "copy_p", "optimization_barrier", "stop_gradient")


def write(
  function: Callable[[jax.Array], jax.Array], image_shape: tuple[int, int, int]
) -> bytes:
  """The program, from `images` (batch, h, w, c) float32 to `logits`.

  Args:
    function: To be traced; arrays that it uses become constants.
    image_shape: (h, w, c).

  Raises:
    ModuleNotFoundError: The extra `onnx` is not installed.
    UnsupportedError: The function has an operation that this module does not
      know, or its constants are larger than the 2 GB that a file can have.
  """
  onnx = optional.require("onnx", extra="onnx")
  (batch,) = export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
  traced = jax.make_jaxpr(function)(images)
  graph = onnx_graph.Graph(onnx, batch)
  (result,) = _run(graph, traced.jaxpr, traced.consts, ["images"])
  graph.add("Identity", result, names=["logits"])
  (out,) = traced.jaxpr.outvars
  model = onnx.helper.make_model(
    graph.finish(
      "vimjax", [graph.info("images", images)], [graph.info("logits", out.aval)]
    ),
    producer_name="vimjax",
    producer_version=version.__version__,
    opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
    ir_version=onnx.helper.OP_SET_ID_VERSION_MAP[("ai.onnx", _OPSET)],
  )
  return model.SerializeToString()


def _run(
  graph: onnx_graph.Graph,
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  inputs: Sequence[onnx_graph.Value],
) -> list[onnx_graph.Value]:
  """Writes the operations that the results depend on; returns the results."""
  env: dict[Any, onnx_graph.Value] = dict(
    zip(jaxpr.constvars, map(np.asarray, consts), strict=True)
  )
  env.update(zip(jaxpr.invars, inputs, strict=True))

  def read(x: Any) -> onnx_graph.Value:
    if isinstance(x, core.Literal):
      aval: Any = x.aval
      return np.asarray(x.val, aval.dtype)
    return env[x]

  for eqn in _needed(jaxpr):
    values = [read(x) for x in eqn.invars]
    env.update(zip(eqn.outvars, _apply(graph, eqn, values), strict=True))
  return [read(x) for x in jaxpr.outvars]


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """The operations without those whose results nobody reads."""
  kept, read = [], set(map(id, jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    if read.intersection(map(id, eqn.outvars)):
      kept.append(eqn)
      read.update(map(id, eqn.invars))
  return kept[::-1]


def _apply(
  graph: onnx_graph.Graph,
  eqn: core.JaxprEqn,
  values: Sequence[onnx_graph.Value],
) -> Sequence[onnx_graph.Value]:
  """The results of one operation."""
  name, params = eqn.primitive.name, eqn.params
  if name in _CALLS:
    inner = params[_CALLS[name]]
    inner = inner if isinstance(inner, core.ClosedJaxpr) else _closed(inner)
    return _run(graph, inner.jaxpr, inner.consts, values)
  if name in _UNCHANGED:
    return values
  if all(isinstance(x, np.ndarray) for x in values) and not _has_batch(eqn):
    results = eqn.primitive.bind(*map(jnp.asarray, values), **params)
    results = results if eqn.primitive.multiple_results else [results]
    return [np.asarray(x) for x in results]
  if name == "scan":
    return _scan(graph, eqn, values)
  if name not in onnx_operations.OPERATIONS:
    raise onnx_graph.unknown(eqn, "it is not among the known operations")
  results = onnx_operations.OPERATIONS[name](graph, eqn, *values)
  return results if isinstance(results, list) else [results]


def _has_batch(eqn: core.JaxprEqn) -> bool:
  """Whether an operation, or the size of a result, depends on the batch."""
  avals: Any = [x.aval for x in eqn.outvars]
  sizes = [size for aval in avals for size in aval.shape]
  return any(map(export.is_symbolic_dim, [*sizes, *eqn.params.values()]))


def _closed(jaxpr: core.Jaxpr) -> core.ClosedJaxpr:
  return core.ClosedJaxpr(jaxpr, ())


def _scan(
  graph: onnx_graph.Graph,
  eqn: core.JaxprEqn,
  values: Sequence[onnx_graph.Value],
) -> Sequence[str]:
  """A loop over the slices of arrays."""
  jaxpr = eqn.params["jaxpr"]
  # What runs through the loop keeps its shape; what is sliced or stacked has
  # one dimension less inside.
  sliced = _ranks_lost(eqn.invars, jaxpr.jaxpr.invars)
  carry = len(eqn.outvars) - _ranks_lost(eqn.outvars, jaxpr.jaxpr.outvars)
  consts = len(values) - carry - sliced
  if not sliced:
    raise onnx_graph.unknown(eqn, "it is a loop over nothing")
  body = graph.body()
  slots = jaxpr.jaxpr.invars[consts:]
  inputs = [graph.new_name() for _ in slots]
  results = _run(body, jaxpr.jaxpr, jaxpr.consts, [*values[:consts], *inputs])
  # Results of a body are made inside of it.
  outputs = [body.add("Identity", x) for x in results]
  info = lambda names, slots: [
    body.info(name, slot.aval) for name, slot in zip(names, slots, strict=True)
  ]
  names = [graph.new_name() for _ in outputs]
  reverse, stacked = int(eqn.params["reverse"]), len(outputs) - carry
  directions: dict[str, Any] = dict(scan_input_directions=[reverse] * sliced)
  if stacked:
    directions["scan_output_directions"] = [reverse] * stacked
  graph.add(
    "Scan",
    *values[consts:],
    names=names,
    body=body.finish(
      names[0], info(inputs, slots), info(outputs, jaxpr.jaxpr.outvars)
    ),
    num_scan_inputs=sliced,
    **directions,
  )
  return names


def _ranks_lost(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """How many arrays have one dimension less inside of a loop."""
  return sum(
    len(x.aval.shape) - len(y.aval.shape)
    for x, y in zip(outside, inside, strict=True)
  )
