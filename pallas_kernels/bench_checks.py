"""Whether an implementation computes what the definition says.

Outputs and all gradients are compared with those of the reference in float64,
computed on the CPU.
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
  failures = []
  for name, error in errors.items():
    allowed = tolerance(name, got[name].dtype)
    if not error <= allowed:
      failures.append(
        f"{name}: relative error {error:.2g}, at most {allowed:.2g}"
      )
  return errors, failures
