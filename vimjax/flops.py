"""Counts a model's multiply-accumulates: `python -m vimjax.flops NAME`.

The convention is that of VMamba's counter, which the published numbers follow:
one multiplication with its addition counts as one; matrix products and
convolutions count; norms count as in fvcore; a selective scan counts
9 b l d n + b l d (with the skip connection D); everything else is free.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import math
import sys
from typing import Any, Final

from flax import linen as nn
from flax import traverse_util
import jax
from jax.extend import core
import jax.numpy as jnp

from vimjax import command_line, registry
from vimjax.layers import batch_norm, conv, cross_scan, ssm

# Per value, as fvcore counts them with a scale, and a bias except for RMSNorm;
# batch norm with fixed statistics.
_NORMS: Final[dict[type[nn.Module], int]] = {
  nn.LayerNorm: 5,
  nn.RMSNorm: 4,
  batch_norm.BatchNorm: 2,
}


@dataclasses.dataclass(frozen=True)
class Count:
  """Multiply-accumulates of one image, the parts adding up to `macs`.

  Attributes:
    macs: All of them.
    scan_macs: Selective scans. Mamba-2's chunked scan is made of matrix
      products and counts as these.
    norm_macs: Normalisation layers.
  """

  macs: int = 0
  scan_macs: int = 0
  norm_macs: int = 0

  def __add__(self, other: "Count") -> "Count":
    return Count(
      self.macs + other.macs,
      self.scan_macs + other.scan_macs,
      self.norm_macs + other.norm_macs,
    )


def count(
  model: nn.Module, size: int | tuple[int, int]
) -> dict[tuple[str, ...], Count]:
  """Counts the multiply-accumulates of classifying one image.

  The program is traced, never run or compiled, so this takes seconds and no
  memory whatever the size. The count does not depend on the implementation of
  the scan, nor on `scan_layers`.

  Args:
    model: A model of this package.
    size: Side of the image, or (h, w), in pixels.

  Returns:
    A count per module that computes something itself, by its path in the model,
    in the order of the calls; their sum is the model's.
  """
  counts: dict[tuple[str, ...], Count] = {}
  calls: list[tuple[str, ...]] = []

  def add(path: tuple[str, ...], more: Count) -> None:
    if more.macs:
      counts[path] = counts.get(path, Count()) + more

  def intercept(function, args, kwargs, context):
    if context.method_name == "__call__":
      calls.append(context.module.path)
      add(context.module.path, _module_macs(context.module, args[0]))
    return function(*args, **kwargs)

  # The body of a scan is traced once, whatever its length.
  model = registry.with_scan_layers(model, False)
  image, variables = _shapes(model, size)
  with nn.intercept_methods(intercept):
    traced = jax.make_jaxpr(model.apply)(variables, image)
  modules = _module_paths(variables)
  for names, macs in _products(traced.jaxpr, ()):
    path = _longest_path(names, modules)
    # How an implementation computes the scan is no matter: it is counted.
    if not counts.get(path, Count()).scan_macs:
      add(path, Count(macs))
  place = {path: i for i, path in enumerate(calls)}
  order = sorted(counts, key=lambda path: place.get(path, len(place)))
  return {path: counts[path] for path in order}


def total(counts: Iterable[Count]) -> Count:
  """The sum."""
  return sum(counts, Count())


def parameters(model: nn.Module, size: int | tuple[int, int]) -> int:
  """Numbers that training changes; does not depend on the size."""
  # Scanned layers have as many numbers, and are much less to trace.
  _, variables = _shapes(registry.with_scan_layers(model, True), size)
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _shapes(model: nn.Module, size: int | tuple[int, int]) -> tuple[Any, Any]:
  """Shapes of one image, and of the variables."""
  h, w = (size, size) if isinstance(size, int) else size
  image = jax.ShapeDtypeStruct((1, h, w, model.in_chans), jnp.float32)
  return image, jax.eval_shape(model.init, jax.random.key(0), image)


def _module_paths(variables: Any) -> set[tuple[str, ...]]:
  """Paths of everything that has parameters."""
  leaves = traverse_util.flatten_dict(variables["params"])
  return {path[:i] for path in leaves for i in range(len(path))}


def _longest_path(
  names: Sequence[str], modules: set[tuple[str, ...]]
) -> tuple[str, ...]:
  """The module in a stack of names, which has those of methods and ops too."""
  path: tuple[str, ...] = ()
  for name in names:
    if (*path, name) in modules:
      path = (*path, name)
  return path


def _module_macs(module: nn.Module, x: Any) -> Count:
  """What a module computes without matrix products and convolutions."""
  if isinstance(module, ssm.SelectiveSSM):
    scan = 9 * x.size * module.state_size + x.size
    return Count(scan, scan_macs=scan)
  if isinstance(module, cross_scan.CrossSelectiveSSM):
    scan = cross_scan.DIRECTIONS * (9 * x.size * module.state_size + x.size)
    return Count(scan, scan_macs=scan)
  if isinstance(module, conv.DepthwiseConv1d):  # Shifted products.
    return Count(x.size * module.kernel_size)
  if isinstance(module, conv.DepthwiseConv2d):
    return Count(x.size * module.kernel_size**2)
  per_value = [n for kind, n in _NORMS.items() if isinstance(module, kind)]
  norm = sum(per_value) * x.size
  return Count(norm, norm_macs=norm)


def _products(
  jaxpr: core.Jaxpr, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], int]]:
  """Path and multiply-accumulates of each matrix product and convolution."""
  for eqn in jaxpr.eqns:
    names = str(eqn.source_info.name_stack)
    here = path + tuple(names.split("/") if names else ())
    macs = _product_macs(eqn)
    if macs:
      yield here, macs
    repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    for inner in _inner(eqn):
      for place, macs in _products(inner, here):
        if eqn.primitive.name == "while":
          raise NotImplementedError(
            f"{'/'.join(place)}: a matrix product in a loop whose number of "
            "steps is not in the program."
          )
        yield place, repeats * macs


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """The programs inside an operation."""
  for value in eqn.params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x


def _product_macs(eqn: core.JaxprEqn) -> int:
  """Multiply-accumulates of an operation that is one product, else 0."""
  name, params = eqn.primitive.name, eqn.params
  if name not in ("dot_general", "conv_general_dilated"):
    return 0
  shapes: Any = [x.aval for x in (*eqn.invars, *eqn.outvars)]
  left, right, out = (x.shape for x in shapes)
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    return math.prod(out) * math.prod(left[i] for i in contract)
  outputs = params["dimension_numbers"].rhs_spec[0]
  return math.prod(out) * math.prod(right) // right[outputs]


def _table(counts: dict[tuple[str, ...], Count], depth: int) -> list[str]:
  """Lines of GMACs per module, to a depth of the module tree."""
  rows: dict[str, Count] = {}
  for path, value in counts.items():
    name = "/".join(path[:depth]) or "(the model itself)"
    rows[name] = rows.get(name, Count()) + value
  rows["total"] = total(counts.values())
  width = max(map(len, rows))
  lines = [f"{'GMACs':{width}} {'all':>10} {'scan':>10} {'norm':>10}"]
  for name, value in rows.items():
    parts = (value.macs, value.scan_macs, value.norm_macs)
    lines.append(
      f"{name:{width}} " + " ".join(f"{x / 1e9:10.4f}" for x in parts)
    )
  return lines


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.flops",
    description="Counts the multiply-accumulates of classifying one image.",
  )
  parser.add_argument("name", metavar="NAME", choices=registry.list_models())
  positive = command_line.positive_integer
  parser.add_argument(
    "--size",
    type=positive,
    help="side of the image; default: the published one",
  )
  parser.add_argument(
    "--depth",
    type=positive,
    default=2,
    help="of the table of modules; default: 2",
  )
  parser.add_argument(
    "--json", action="store_true", help="print the sums as JSON at the end"
  )
  args = parser.parse_args(argv)
  variant = registry.get_variant(args.name)
  size = variant.preprocessing.size if args.size is None else args.size
  model = registry.create_model(args.name)
  try:
    counts = count(model, size)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{args.name}, one image of {size}x{size}")
  print("\n".join(_table(counts, args.depth)))
  if args.json:
    sums = dataclasses.asdict(total(counts.values()))
    print(json.dumps({"params": parameters(model, size)} | sums))
  return 0


if __name__ == "__main__":
  sys.exit(main())
