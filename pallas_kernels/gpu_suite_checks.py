"""The checks of correctness of the GPU suite."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_checks, bench_ops
from pallas_kernels.selective_scan import arg_specs

_SOFTPLUS: Final = (("delta_softplus", True),)
_REVERSE: Final = (*_SOFTPLUS, ("reverse", True))
_STATE: Final = (*_REVERSE, ("return_final_state", True))

# What the models do not do: groups that end within a block of channels or
# within 16 bytes, lengths that end within a tile, all that is optional.
_AWKWARD: Final = {
  "groups of 96": (
    arg_specs.ArgSpec(b=2, l=197, d=288, n=16, g=3, gate=True, source=""),
    _STATE,
  ),
  "groups of 49": (
    arg_specs.ArgSpec(b=2, l=61, d=147, n=5, g=3, gate=True, source=""),
    _SOFTPLUS,
  ),
  "groups of 1": (
    arg_specs.ArgSpec(b=2, l=9, d=5, n=8, g=5, gate=True, source=""),
    _REVERSE,
  ),
  "groups of 49, one state": (
    arg_specs.ArgSpec(b=2, l=1003, d=98, n=1, g=2, gate=True, source=""),
    _STATE,
  ),
  "64 states": (
    arg_specs.ArgSpec(b=2, l=70, d=136, n=64, gate=True, source=""),
    _REVERSE,
  ),
  "one token": (
    arg_specs.ArgSpec(b=1, l=1, d=200, n=16, gate=True, source=""),
    _STATE,
  ),
  "many short rows": (
    arg_specs.ArgSpec(b=300, l=19, d=130, n=4, gate=True, source=""),
    _SOFTPLUS,
  ),
}

_BATCH: Final = 2  # Of the calls of models, to save time.
_REPEATS: Final = 3
_POISON_BYTES: Final = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A call to check.

  Attributes:
    name: For the results.
    op: The operation.
    spec: Its sizes, one of the operation's `ArgSpec`s.
    dtype: That of the sequences.
    options: Keyword arguments of the operation, by name.
  """

  name: str
  op: bench_ops.Op
  spec: Any
  dtype: str
  options: tuple[tuple[str, Any], ...] = _SOFTPLUS


def cases(calls: Sequence[tuple[bench_ops.Op, str]]) -> Iterator[Case]:
  """The checks for these calls, the most important ones first."""
  seen = set()
  for dtype in ("bfloat16", "float32"):
    for op, name in calls:
      spec = op.specs[name]
      spec = dataclasses.replace(spec, b=min(spec.b, _BATCH), source="")
      if (op.name, spec, dtype) in seen:
        continue
      seen.add((op.name, spec, dtype))
      yield Case(
        name=f"{op.name} {name} {dtype}", op=op, spec=spec, dtype=dtype
      )
    if any(op.name == "selective_scan" for op, _ in calls):
      op = bench_ops.OPS["selective_scan"]
      for name, (spec, options) in _AWKWARD.items():
        yield Case(
          name=f"{op.name} {name} {dtype}",
          op=op,
          spec=spec,
          dtype=dtype,
          options=options,
        )


def check(case: Case, implementation: str) -> dict[str, Any]:
  """Compares with the definition, and runs with one another.

  The results go where arrays of zeros were in one run and arrays of NaN in the
  others: what a kernel leaves unwritten shows as a difference. Memory that
  kernels use between is filled with NaN, too.

  Returns:
    The errors by result, relative to the largest magnitude, and the failures.
  """
  options = dict(case.options)
  arrays = case.op.make_arguments(case.spec, dtype=jnp.dtype(case.dtype))
  if "return_final_state" in options:
    spec = case.spec
    rng = np.random.default_rng(2)
    state = rng.standard_normal((spec.b, spec.d, spec.n))
    arrays["initial_state"] = jnp.asarray(state, jnp.float32)
  function = functools.partial(
    case.op.function, **options, implementation=implementation
  )
  dy = bench_checks.cotangents(function, arrays)
  program = bench_checks.both_ways(function)
  shapes: Any = jax.eval_shape(program, arrays, dy)

  def into(buffers, arrays, dy):
    del buffers  # Their memory is that of the results.
    return program(arrays, dy)

  compiled = jax.jit(into, donate_argnums=0, keep_unused=True)

  def run(value: float) -> dict[str, np.ndarray]:
    poison = jnp.full((_POISON_BYTES // 4,), value, jnp.float32)
    buffers = jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
    jax.block_until_ready((poison, buffers))
    del poison
    results: dict[str, Any] = compiled(buffers, arrays, dy)
    return {name: np.asarray(x) for name, x in results.items()}

  first = run(0.0)
  want = bench_checks.expected(case.op, options, arrays, dy)
  errors, failures = bench_checks.compare(first, want)
  for _ in range(_REPEATS):
    again = run(np.nan)
    failures += [
      f"{name}: differs from run to run, or is not fully written"
      for name, x in first.items()
      if x.tobytes() != again[name].tobytes()
    ]
  return {
    # As text: JSON has no infinity.
    "errors": {name: f"{error:.2g}" for name, error in errors.items()},
    "failures": sorted(set(failures)),
  }
