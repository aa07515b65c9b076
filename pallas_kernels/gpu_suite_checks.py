"""The checks of correctness of the GPU suite."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp

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
  # A single pass, with more blocks than fit on the device at a time, each of
  # which goes many times through its slots in shared memory.
  "many long rows": (
    arg_specs.ArgSpec(b=272, l=205, d=200, n=16, gate=True, source=""),
    _STATE,
  ),
  "many long rows, one state": (
    arg_specs.ArgSpec(b=272, l=405, d=272, n=1, g=2, source=""),
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

# Calls with more tokens times channels are compared on the device.
_MOST_STEPS: Final = 10_000_000
_ROWS: Final = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A call to check.

  Attributes:
    name: For the results.
    op: The operation's name.
    spec: Its sizes, one of the operation's `ArgSpec`s.
    dtype: That of the sequences.
    options: Keyword arguments of the operation, by name.
  """

  name: str
  op: str
  spec: Any
  dtype: str
  options: tuple[tuple[str, Any], ...] = _SOFTPLUS


def of_models(
  calls: Sequence[tuple[bench_ops.Op, str]], dtype: str
) -> Iterator[Case]:
  """The checks of these calls."""
  for op, name in calls:
    spec = op.specs[name]
    yield Case(
      name=f"check {op.name} {name} {dtype}",
      op=op.name,
      spec=dataclasses.replace(spec, b=min(spec.b, _BATCH)),
      dtype=dtype,
    )


def awkward(dtype: str) -> Iterator[Case]:
  """The checks of calls of the selective scan that no model makes."""
  for name, (spec, options) in _AWKWARD.items():
    yield Case(
      name=f"check selective_scan {name} {dtype}",
      op="selective_scan",
      spec=spec,
      dtype=dtype,
      options=options,
    )


def check(case: Case, implementation: str) -> dict[str, Any]:
  """Compares with the definition, and runs with one another.

  Returns:
    The errors by result, relative to the largest magnitude, and the failures.
  """
  op = bench_ops.OPS[case.op]
  options = dict(case.options)
  sizes = op.sizes(case.spec)
  is_large = sizes.steps > _MOST_STEPS
  if is_large:
    arrays = bench_ops.random_arguments(case.op, case.spec, case.dtype)
  else:
    arrays = op.make_arguments(case.spec, dtype=jnp.dtype(case.dtype))
  if "return_final_state" in options:
    shape = (sizes.b, sizes.d, sizes.n)
    arrays["initial_state"] = jax.random.normal(jax.random.key(2), shape)
  function = functools.partial(
    op.function, **options, implementation=implementation
  )
  dy = bench_checks.cotangents(function, arrays)
  program = jax.jit(bench_checks.both_ways(function))
  shapes: Any = jax.eval_shape(program, arrays, dy)
  got, failures = bench_checks.repeat(
    bench_checks.into_buffers(program), shapes, arrays, dy
  )
  if is_large:
    errors = bench_checks.on_device(op, options, arrays, dy, got, rows=_ROWS)
    failures += bench_checks.too_large(errors, got)
  else:
    want = bench_checks.expected(op, options, arrays, dy)
    errors, more = bench_checks.compare(got, want)
    failures += more
  return {"errors": as_text(errors), "failures": failures}


def as_text(errors: dict[str, float]) -> dict[str, str]:
  """JSON has no infinity."""
  return {name: f"{error:.2g}" for name, error in errors.items()}
