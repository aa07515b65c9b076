"""Timing of programs on a device that runs them asynchronously."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import tempfile
import time
from typing import Any, Final

import jax
import numpy as np

# More than twice the second-level cache of an H100, 50 MB: a rotation through
# inputs of this size leaves none of them in it.
ROTATION_BYTES: Final = 120_000_000
_MAX_COPIES: Final = 128

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Times of a call, in microseconds.

  Attributes:
    median_us: The median over rounds of many launches each.
    quartiles_us: The first and the third quartile.
    launches: Launches of a round.
    rounds: How many rounds.
  """

  median_us: float
  quartiles_us: tuple[float, float]
  launches: int
  rounds: int


def copies(inputs: Any, rotation_bytes: int = ROTATION_BYTES) -> list[Any]:
  """A few copies of some arrays, of at least `rotation_bytes` together."""
  size = sum(x.nbytes for x in jax.tree.leaves(inputs))
  count = min(max(2, -(-rotation_bytes // size)), _MAX_COPIES)
  copy = lambda x: jax.numpy.array(x, copy=True)
  return [inputs, *(jax.tree.map(copy, inputs) for _ in range(count - 1))]


def measure(
  call: Callable[[Any], Any],
  rotation: Sequence[Any],
  *,
  rounds: int = 10,
  round_seconds: float = 0.03,
  wait: Callable[[Any], Any] = jax.block_until_ready,
  clock: Clock = time.perf_counter,
) -> Timing:
  """Times `call`, one after the other of `rotation` as its argument.

  A round starts many calls and waits for the last one, so that what starting
  costs is hidden, unless a call takes the device less time than that.

  Args:
    call: A compiled function; the device runs its calls in order.
    rotation: Arguments, in turn.
    rounds: How often to time a round.
    round_seconds: What a round should take, about.
    wait: Waits for the result of a call, and so for all before it.
    clock: Seconds since any moment.
  """

  def round_of(launches: int) -> float:
    start = clock()
    out = None
    for i in range(launches):
      out = call(rotation[i % len(rotation)])
    wait(out)
    return clock() - start

  round_of(len(rotation))  # Warms up.
  once = round_of(len(rotation)) / len(rotation)
  launches = max(len(rotation), int(round_seconds / max(once, 1e-7)))
  times = [1e6 * round_of(launches) / launches for _ in range(rounds)]
  low, median, high = (float(x) for x in np.percentile(times, (25, 50, 75)))
  return Timing(
    median_us=median,
    quartiles_us=(low, high),
    launches=launches,
    rounds=rounds,
  )


def device_times(
  call: Callable[[Any], Any], rotation: Sequence[Any]
) -> dict[str, float]:
  """Microseconds of a call on the device, by kernel, from JAX's profiler.

  Raises:
    RuntimeError: The profiler saw no kernel on a GPU.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready([call(inputs) for inputs in rotation])
    totals: dict[str, float] = {}
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      data = jax.profiler.ProfileData.from_file(str(path))
      for name, nanoseconds in _kernel_events(data):
        totals[name] = totals.get(name, 0.0) + nanoseconds
  if not totals:
    raise RuntimeError("the profiler saw no kernel on a GPU")
  return _per_call(totals, len(rotation))


def _kernel_events(data: Any) -> list[tuple[str, float]]:
  """Name and duration of what ran on the streams of a GPU."""
  return [
    (event.name, event.duration_ns)
    for plane in data.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]


def _per_call(totals: Mapping[str, float], calls: int) -> dict[str, float]:
  slowest_first = sorted(totals.items(), key=lambda item: -item[1])
  return {name: 1e-3 * total / calls for name, total in slowest_first}
