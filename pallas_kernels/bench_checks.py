"""Whether an implementation computes what the definition says.

Outputs and all gradients are compared with those of the reference in float64,
computed on the CPU; or, where that would take too long, with those of
`xla_associative` in float32 on the same device.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_ops

# Relative to the largest magnitude of an array. Results in bfloat16 are
# computed in float32: their error is that of rounding, 2**-9, and a little.
FORWARD_TOLERANCE: Final = 1e-5
GRADIENT_TOLERANCE: Final = 1e-4
BFLOAT16_TOLERANCE: Final = 2.0**-8

Arrays = dict[str, Any]

_REPEATS: Final = 3
_POISON_BYTES: Final = 2**28


def both_ways(
  function: Callable[..., Any],
) -> Callable[[Arrays, Any], Arrays]:
  """The outputs and all gradients of a function of arrays by name.

  The function that is returned takes the arguments and the cotangents of the
  outputs. Its result has "y" (and "state" if there are two outputs), and for
  each argument its gradient, as "du". "y_alone" is y where no gradient is
  asked for, which is another program.
  """

  def run(arguments, cotangents):
    call = lambda arrays: _as_tuple(function(**arrays))
    outputs, back = jax.vjp(call, arguments)
    (gradients,) = back(cotangents)
    results = dict(zip(("y", "state"), outputs, strict=False))
    results |= {f"d{name}": x for name, x in gradients.items()}
    return results | {"y_alone": call(arguments)[0]}

  return run


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
  return outputs if isinstance(outputs, tuple) else (outputs,)


def cotangents(function: Callable[..., Any], arguments: Arrays) -> Any:
  """Random cotangents of the outputs of a function."""
  rng = np.random.default_rng(1)
  outputs = jax.eval_shape(lambda a: _as_tuple(function(**a)), arguments)
  return tuple(
    jnp.asarray(rng.standard_normal(x.shape), jnp.float32).astype(x.dtype)
    for x in outputs
  )


def expected(
  op: bench_ops.Op, options: Mapping[str, Any], arguments: Arrays, dy: Any
) -> dict[str, np.ndarray]:
  """What `both_ways` must give, by the definition in float64."""
  function = functools.partial(
    op.function, **options, implementation="reference"
  )
  with jax.enable_x64(True), jax.default_device(_cpu()):
    exact = lambda x: jnp.asarray(np.asarray(x).astype(np.float64))
    inputs = jax.tree.map(exact, (arguments, dy))
    results = jax.jit(both_ways(function))(*inputs)
    return {name: np.asarray(x) for name, x in results.items()}


def _cpu() -> Any:
  """A CPU device; the default device where JAX was told to use no CPU."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def relative_error(got: Any, want: np.ndarray) -> float:
  """Largest difference over the largest magnitude; infinity if not finite."""
  values = np.asarray(got).astype(np.float64)
  if values.shape != want.shape or not np.isfinite(values).all():
    return float("inf")
  largest = np.abs(want).max(initial=0.0)
  return float(np.abs(values - want).max(initial=0.0) / (largest or 1.0))


def tolerance(name: str, dtype: Any) -> float:
  """That of a result of `both_ways`."""
  if dtype == jnp.bfloat16:
    return BFLOAT16_TOLERANCE
  is_output = name in ("y", "y_alone", "state")
  return FORWARD_TOLERANCE if is_output else GRADIENT_TOLERANCE


def compare(
  got: Mapping[str, Any], want: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], list[str]]:
  """The errors by result, and a line for each that is too large."""
  errors = {name: relative_error(got[name], x) for name, x in want.items()}
  return errors, too_large(errors, got)


def too_large(errors: Mapping[str, float], got: Mapping[str, Any]) -> list[str]:
  """A line for each of these errors, of these results, that is too large."""
  failures = []
  for name, error in errors.items():
    allowed = tolerance(name, got[name].dtype)
    if not error <= allowed:
      failures.append(
        f"{name}: relative error {error:.2g}, at most {allowed:.2g}"
      )
  return failures


def on_device(
  op: bench_ops.Op,
  options: Mapping[str, Any],
  arguments: Arrays,
  dy: tuple[Any, ...],
  got: Arrays,
  *,
  rows: int,
) -> dict[str, float]:
  """Relative errors of `both_ways` by `xla_associative` in float32.

  Args:
    op: The operation.
    options: Its keyword arguments.
    arguments: Its arrays.
    dy: The cotangents of its outputs.
    got: The results to judge, some or all of them.
    rows: So many rows of the batch are computed at a time; divides it.
  """
  function = functools.partial(
    op.function, **options, implementation="xla_associative"
  )
  summed = {
    name: jnp.zeros(x.shape, jnp.float32)
    for name, x in got.items()
    if name[1:] in arguments and name[1:] not in bench_ops.BATCHED
  }

  @jax.jit
  def add(i, summed, largest, arguments, dy, got):
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * rows, rows)
    exact = lambda x: x.astype(jnp.float32)
    mine = {
      name: exact(part(x) if name in bench_ops.BATCHED else x)
      for name, x in arguments.items()
    }
    cotangents = jax.tree.map(lambda x: exact(part(x)), dy)
    want = both_ways(function)(mine, cotangents)
    summed = {name: x + want[name] for name, x in summed.items()}
    largest = {
      name: jnp.maximum(x, _largest(exact(part(got[name])), want[name]))
      for name, x in largest.items()
    }
    return summed, largest

  largest = {name: jnp.zeros(2) for name in got if name not in summed}
  for i in range(dy[0].shape[0] // rows):
    summed, largest = add(i, summed, largest, arguments, dy, got)
  for name, x in summed.items():
    largest[name] = _largest(got[name], x)
  return {
    name: float(difference / jnp.where(magnitude > 0, magnitude, 1))
    for name, (difference, magnitude) in largest.items()
  }


def _largest(got: jax.Array, want: jax.Array) -> jax.Array:
  """The largest difference, and the largest magnitude of what is wanted."""
  return jnp.stack([jnp.abs(got - want).max(), jnp.abs(want).max()])


def into_buffers(program: Callable[..., Any]) -> Callable[..., Any]:
  """The compiled program; its results go where its first argument was."""

  def into(buffers, *arguments):
    del buffers  # Their memory is that of the results.
    return program(*arguments)

  return jax.jit(into, donate_argnums=0, keep_unused=True)


def filled(shapes: Any, value: float) -> Any:
  """Arrays of these shapes with this value everywhere."""
  return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)


def repeat(
  compiled: Callable[..., Any], shapes: Any, *arguments: Any
) -> tuple[Arrays, list[str]]:
  """Runs a program a few times; all runs must give the same bits.

  The results go where arrays of zeros were in one run and arrays of NaN in the
  others: what a kernel leaves unwritten shows as a difference. Memory that
  kernels use between is filled with NaN, too.

  Args:
    compiled: What `into_buffers` returned.
    shapes: Those of its results, a dictionary.
    *arguments: Its other arguments.

  Returns:
    The results, and a line for each that was not the same.
  """

  def run(value: float) -> Arrays:
    poison = jnp.full((_POISON_BYTES // 4,), value, jnp.float32)
    buffers = filled(shapes, value)
    jax.block_until_ready((poison, buffers))
    del poison
    return compiled(buffers, *arguments)

  first = run(0.0)
  moved: dict[str, None] = {}
  for _ in range(_REPEATS):
    same = _same_bits(first, run(np.nan))
    moved |= {name: None for name, x in same.items() if not x}
  return first, [
    f"{name}: differs from run to run, or is not fully written"
    for name in moved
  ]


@jax.jit
def _same_bits(x: Arrays, y: Arrays) -> dict[str, jax.Array]:
  bits = lambda a: jax.lax.bitcast_convert_type(a, f"uint{8 * a.itemsize}")
  return {name: (bits(x[name]) == bits(y[name])).all() for name in x}
