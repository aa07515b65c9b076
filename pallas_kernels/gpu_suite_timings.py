"""The timings of the GPU suite."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, Final

import jax

from pallas_kernels import (
  bench_checks,
  bench_environment,
  bench_ops,
  bench_timing,
  gpu_suite_checks,
)

_CALLS: Final = 32  # That the profiler looks at.
# Before these, so that the clock is that of a device at work.
_WARM_UP_SECONDS: Final = 0.1
_MOST_WARM_UP: Final = 2000
_NAMED: Final = 12  # Kernels that are named in the results.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a run may cost.

  Attributes:
    seconds: No step begins later than this.
    step_seconds: A step that takes longer is ended.
    rotation_bytes: Size of the inputs that a timing goes through.
    copy_bytes: Size of the array whose copy measures the bandwidth.
    rounds: Rounds of a timing.
    round_seconds: What a round should take.
    larger: Factor of the batch in the timings of a full device.
  """

  seconds: float = 440.0
  step_seconds: float = 60.0
  rotation_bytes: int = bench_timing.ROTATION_BYTES
  copy_bytes: int = 2**30
  rounds: int = 10
  round_seconds: float = 0.03
  larger: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to time.

  Attributes:
    op: The operation's name.
    call: The call's name.
    dtype: That of its sequences.
    batch_factor: How many times its batch.
    implementation: One of the operation's.
    is_checked: Whether its results are checked, too, on the same arrays.
  """

  op: str
  call: str
  dtype: str
  batch_factor: int
  implementation: str
  is_checked: bool


def copy_bandwidth(settings: Settings) -> dict[str, Any]:
  """Bytes per second of a copy, read and written."""
  shape = (settings.copy_bytes // 4,)
  # Not x itself, which would not be read.
  call = jax.jit(lambda x: x + 1.0)
  found = _time(call, [jax.numpy.zeros(shape)], settings)
  rate = 2 * settings.copy_bytes / (1e-6 * found["median_us"])
  return {"bytes_per_second": rate, **found}


def time_call(job: Job, settings: Settings) -> dict[str, Any]:
  """Times a call, forward and forward plus backward.

  Returns:
    The job; for each direction its times, by the profiler where there is one
    and by the host's clock, its work, and the clock of the device during it; if
    it is checked, the errors and the failures.
  """
  op = bench_ops.OPS[job.op]
  spec, arrays = inputs(job)
  itemsize = jax.numpy.dtype(job.dtype).itemsize
  found: dict[str, Any] = dataclasses.asdict(job)
  results: dict[str, Any] = {}
  failures: list[str] = []
  for direction in bench_ops.DIRECTIONS:
    program = jax.jit(_program(op, direction, job.implementation))
    into = bench_checks.into_buffers(program)
    shapes = jax.eval_shape(program, arrays)
    # Not the inputs alone rotate.
    rotation = [
      [bench_checks.filled(shapes, 0), inputs]
      for inputs in bench_timing.copies(arrays, settings.rotation_bytes)
    ]
    call = functools.partial(_run, into)
    times = _time(call, rotation, settings)
    work = bench_ops.work(op.sizes(spec), direction, itemsize)
    found[direction] = {**times, **dataclasses.asdict(work)}
    if job.is_checked:
      busy = functools.partial(_round, call, rotation)
      found[direction]["clock_hz"] = bench_environment.sm_clock_hz(busy)
      del rotation, busy
      result, moved = bench_checks.repeat(into, shapes, arrays)
      results |= result
      failures += moved
  if job.is_checked:
    errors = errors_of(job, arrays, results)
    failures += bench_checks.too_large(errors, results)
    found["errors"] = gpu_suite_checks.as_text(errors)
    found["failures"] = failures
  return found


def inputs(job: Job) -> tuple[Any, dict[str, Any]]:
  """The sizes and the arrays of what to time."""
  spec = bench_ops.OPS[job.op].specs[job.call]
  spec = bench_ops.enlarged(spec, job.batch_factor)
  return spec, bench_ops.random_arguments(job.op, spec, job.dtype)


def errors_of(
  job: Job, arrays: dict[str, Any], results: dict[str, Any]
) -> dict[str, float]:
  """Those of results on these arrays, y being the cotangent of y."""
  op = bench_ops.OPS[job.op]
  return bench_checks.on_device(
    op,
    {"delta_softplus": True},
    arrays,
    (results["y"],),
    results,
    rows=op.specs[job.call].b,
  )


def _run(into: Callable[..., Any], cell: list[Any]) -> Any:
  """The results take the place of those before, which XLA may not keep."""
  cell[0] = into(*cell)
  return cell[0]


def _round(call: Callable[[Any], Any], rotation: Sequence[Any]) -> None:
  jax.block_until_ready([call(cell) for cell in rotation][-1])


def _program(
  op: bench_ops.Op, direction: str, implementation: str
) -> Callable[..., bench_checks.Arrays]:
  """`bench_ops.program`, its results named as `bench_checks.both_ways` does."""
  program = bench_ops.program(op, direction, implementation)

  def named(arguments):
    if direction == bench_ops.FORWARD:
      return {"y_alone": program(arguments)}
    y, (gradients,) = program(arguments)
    return {"y": y, **{f"d{name}": x for name, x in gradients.items()}}

  return named


def _time(
  call: Callable[[Any], Any], rotation: Sequence[Any], settings: Settings
) -> dict[str, Any]:
  """By the profiler if it sees the device, by the host's clock in any case."""
  wall = bench_timing.measure(
    call,
    rotation,
    rounds=settings.rounds,
    round_seconds=settings.round_seconds,
  )
  found = {
    **dataclasses.asdict(wall),
    "source": "host",
    "host_us": wall.median_us,
    "kernels_us": {},
  }
  warm_up = math.ceil(_WARM_UP_SECONDS / (1e-6 * wall.median_us))
  try:
    timing, kernels = bench_timing.profile(
      call, rotation, calls=_CALLS, warm_up=min(warm_up, _MOST_WARM_UP)
    )
  except RuntimeError as error:
    return found | {"reason": str(error)}
  return found | {
    **dataclasses.asdict(timing),
    "source": "profiler",
    "kernels_us": {
      name: round(x, 2) for name, x in list(kernels.items())[:_NAMED]
    },
  }
