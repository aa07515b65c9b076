"""Times groups of cases; whatever happens to one of them, the others go on."""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import math
import sys
import time
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import cases, programs
from pallas_kernels import bench_timing

# A round is at least this long, or one call.
_ROUND_SECONDS: Final = 0.1
_MOST_CALLS: Final = 50
_PROFILED_STEPS: Final = 3
_LONGEST_KERNELS: Final = 15
_SCAN: Final = "selective_scan"  # Part of the names of the scans' kernels.

OUT_OF_MEMORY: Final = "out of memory"
UNFINISHED: Final = "unfinished"  # What a killed process leaves.


class DeviceLostError(RuntimeError):
  """The device computes nothing any more; a new process may bring it back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What was measured of a case.

  Attributes:
    case: The case.
    error: Why it was not timed, such as "out of memory"; else None.
    median_s: Median over rounds of the time of one step, in seconds.
    quartiles_s: First and third quartile.
    images_per_second: The batch over the median.
    compile_s: Tracing and compilation, in seconds.
    argument_bytes: Parameters and images, by the compiler's account.
    temp_bytes: What the program needs beside arguments and results.
    peak_bytes: Arguments, results and temporary memory together, by the
      compiler's account; an array that is updated in place counts once.
    device_peak_bytes: The device's own account of the most that was in use;
      None where there is none, or where earlier cases had needed more.
    device_us: Time of all kernels of a step, in microseconds; None on CPUs.
    scan_share: Part of it in the selective scans' own kernels, from 0 to 1.
    kernels_us: The kernels that take longest by name, each with its time in a
      step in microseconds.
  """

  case: cases.Case
  error: str | None = None
  median_s: float | None = None
  quartiles_s: tuple[float, float] | None = None
  images_per_second: float | None = None
  compile_s: float | None = None
  argument_bytes: int | None = None
  temp_bytes: int | None = None
  peak_bytes: int | None = None
  device_peak_bytes: int | None = None
  device_us: float | None = None
  scan_share: float | None = None
  kernels_us: dict[str, float] | None = None

  @property
  def is_finished(self) -> bool:
    """Whether nothing would be learned from trying it once more."""
    return self.error != UNFINISHED


def run_group(
  group: cases.Group,
  rounds: int,
  out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
  """Compiles all cases, then times them in turn, round by round.

  A disturbance of the machine then hits them alike. An exception of a case is
  the error of its row, and the others go on.

  Args:
    group: The cases.
    rounds: How often each is timed.
    out_of_time: Asked before each case is compiled; those that are, are timed
      nevertheless.

  Yields:
    Whatever is known of a case, as soon as it is: the last row is the result.

  Raises:
    DeviceLostError: After an error that the device did not survive.
  """
  rows: dict[cases.Case, Row] = {}
  steps: dict[cases.Case, Callable[[], Any]] = {}
  images = None
  for case in group.cases:
    if out_of_time():
      break
    yield Row(case=case, error=UNFINISHED)
    try:
      program = programs.compile_case(case)
      rows[case] = _compiled(program)
      yield rows[case]
      if not _fits(program):
        raise MemoryError(OUT_OF_MEMORY)
      if images is None:
        images = programs.make_images(case)
      steps[case] = program.start(images)
      rows[case] = dataclasses.replace(rows[case], **_warm_up(steps[case]))
    except Exception as error:
      steps.pop(case, None)
      yield _failed(rows.get(case, Row(case=case)), error)
      check_device()
  times: dict[cases.Case, list[float]] = {case: [] for case in steps}
  calls: dict[cases.Case, int] = {}
  for _ in range(rounds):
    for case in list(steps):
      try:
        if case not in calls:
          calls[case] = _calls(steps[case])
        times[case].append(_seconds(steps[case], calls[case]))
      except Exception as error:
        del steps[case]
        yield _failed(rows[case], error)
        check_device()
  for case, step in steps.items():
    yield _timed(rows[case], times[case], step)


def _compiled(program: programs.Program) -> Row:
  return Row(
    case=program.case,
    error=UNFINISHED,
    compile_s=program.compile_s,
    argument_bytes=program.argument_bytes,
    temp_bytes=program.temp_bytes,
    peak_bytes=program.peak_bytes,
  )


def _fits(program: programs.Program) -> bool:
  limit = memory_stats().get("bytes_limit")
  return limit is None or program.peak_bytes <= limit


def _failed(row: Row, error: Exception) -> Row:
  """The row, with what is known of the program, and the error."""
  text = str(error).strip() or type(error).__name__
  is_memory = "RESOURCE_EXHAUSTED" in text or OUT_OF_MEMORY in text.lower()
  reason = OUT_OF_MEMORY if is_memory else text.splitlines()[0][:200]
  return dataclasses.replace(row, error=reason)


def _warm_up(step: Callable[[], Any]) -> dict[str, Any]:
  """Runs a first step, which fails if it does not fit."""
  before = memory_stats().get("peak_bytes_in_use")
  jax.block_until_ready(step())
  after = memory_stats().get("peak_bytes_in_use")
  return {"device_peak_bytes": None if after == before else after}


def _calls(step: Callable[[], Any]) -> int:
  """How many steps make up a round."""
  once = _seconds(step, 1)
  return min(max(math.ceil(_ROUND_SECONDS / once), 1), _MOST_CALLS)


def _seconds(step: Callable[[], Any], calls: int) -> float:
  start = time.perf_counter()
  jax.block_until_ready([step() for _ in range(calls)])
  return (time.perf_counter() - start) / calls


def _timed(row: Row, times: list[float], step: Callable[[], Any]) -> Row:
  low, median, high = (float(x) for x in np.percentile(times, (25, 50, 75)))
  return dataclasses.replace(
    row,
    error=None,
    median_s=median,
    quartiles_s=(low, high),
    images_per_second=row.case.batch / median,
    **_profile(step),
  )


def _profile(step: Callable[[], Any]) -> dict[str, Any]:
  """Where the time of a step goes, on a GPU."""
  if jax.default_backend() != "gpu":
    return {}
  try:
    timing, kernels = bench_timing.profile(
      lambda _: step(), [None], calls=_PROFILED_STEPS
    )
  except Exception as error:  # Only a second look at what is timed already.
    print(f"no profile: {error}", file=sys.stderr)
    return {}
  scans = sum(time for name, time in kernels.items() if _SCAN in name)
  longest = itertools.islice(kernels.items(), _LONGEST_KERNELS)
  return {
    "device_us": timing.median_us,
    "scan_share": scans / sum(kernels.values()),
    "kernels_us": dict(longest),
  }


def memory_stats() -> dict[str, int]:
  """The device's own account of its memory; empty if it keeps none."""
  return jax.devices()[0].memory_stats() or {}


def check_device() -> None:
  """Raises DeviceLostError if an error before has taken the device along."""
  try:
    jax.block_until_ready(jnp.ones(8) + 1)
  except Exception as error:
    raise DeviceLostError(str(error).splitlines()[0][:200]) from error
