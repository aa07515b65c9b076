"""The timings of the GPU suite."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import bench_ops, bench_timing, gpu_suite_peers

PEER: Final = "mamba_ssm"


def copy_bandwidth(settings: Any) -> dict[str, Any]:
  """Bytes per second of a copy, read and written."""
  x = jnp.zeros((settings.copy_bytes // 4,), jnp.float32)
  # Not x itself, which would not be read.
  call = jax.jit(lambda x: x + 1.0)
  timing = bench_timing.measure(
    call,
    [x],
    rounds=settings.rounds,
    round_seconds=settings.round_seconds,
  )
  rate = 2 * x.nbytes / (1e-6 * timing.median_us)
  return {"bytes_per_second": rate, **dataclasses.asdict(timing)}


def time_call(
  op: bench_ops.Op,
  name: str,
  *,
  dtype: str,
  batch_factor: int,
  implementation: str,
  profile: bool,
  settings: Any,
  steps: Sequence[dict[str, Any]],
) -> dict[str, Any]:
  """Times a call, forward and forward plus backward.

  Args:
    op: The operation.
    name: The call.
    dtype: That of its sequences.
    batch_factor: How many times its batch.
    implementation: One of the operation's, or `PEER`.
    profile: Whether to ask the profiler, too, which takes seconds.
    settings: Those of the suite.
    steps: The results so far, for the bandwidth.

  Returns:
    For each direction the times, the floor by the constants of `bench_ops` and
    by the bandwidth of this run, and, by kernel, what the profiler saw.
  """
  spec = dataclasses.replace(op.specs[name], b=op.specs[name].b * batch_factor)
  arrays = op.make_arguments(spec, dtype=jnp.dtype(dtype))
  rate = bandwidth(steps)
  found: dict[str, Any] = {}
  for direction in bench_ops.DIRECTIONS:
    if implementation == PEER:
      timing = gpu_suite_peers.time_mamba_ssm(op, arrays, direction, settings)
      found[direction] = dataclasses.asdict(timing)
      continue
    call = jax.jit(bench_ops.program(op, direction, implementation))
    rotation = bench_timing.copies(arrays, settings.rotation_bytes)
    timing = bench_timing.measure(
      call,
      rotation,
      rounds=settings.rounds,
      round_seconds=settings.round_seconds,
    )
    work = bench_ops.work(op.sizes(spec), direction, jnp.dtype(dtype).itemsize)
    found[direction] = {
      **dataclasses.asdict(timing),
      "floor_us": 1e6 * work.floor_seconds,
      "bytes": work.bytes,
      "exponentials": work.exponentials,
      "fmas": work.fmas,
      "bytes_at_copy_rate_us": 1e6 * work.bytes / rate if rate else None,
    }
    if profile:
      found[direction]["device_us"] = _device_times(call, rotation)
  return found


def bandwidth(steps: Sequence[dict[str, Any]]) -> float | None:
  """What `copy_bandwidth` found in this run."""
  rates = [x["bytes_per_second"] for x in steps if "bytes_per_second" in x]
  return rates[-1] if rates else None


def _device_times(call: Callable[[Any], Any], rotation: Sequence[Any]) -> Any:
  """By kernel, in microseconds; or why the profiler gave none."""
  try:
    times = bench_timing.device_times(call, rotation[:8])
  except Exception as error:  # Only a second look at what is timed already.
    return f"{type(error).__name__}: {error}"
  return {name: round(x, 2) for name, x in list(times.items())[:12]}
