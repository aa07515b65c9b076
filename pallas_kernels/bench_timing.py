"""Timing of programs on a device that runs them asynchronously."""

from collections.abc import Callable, Sequence
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
  return _timing(times, launches=launches)


def profile(
  call: Callable[[Any], Any],
  rotation: Sequence[Any],
  *,
  calls: int = 32,
  warm_up: int = 0,
) -> tuple[Timing, dict[str, float]]:
  """What calls cost the device, from JAX's profiler: the sum of its kernels.

  Args:
    call: A compiled function; every call of it runs the same kernels.
    rotation: Arguments, in turn.
    calls: How many calls to look at.
    warm_up: How many to run before these.

  Returns:
    The time of a call, and the median time of each kernel in it, slowest first,
    in microseconds. If the kernels cannot be told apart by calls, the time is
    an average, that of one round.

  Raises:
    RuntimeError: The profiler saw no kernel on a GPU.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = options.host_tracer_level = 0
  launches = warm_up + calls
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      out = None
      for i in range(launches):
        out = call(rotation[i % len(rotation)])
      jax.block_until_ready(out)
    events = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      data = jax.profiler.ProfileData.from_file(str(path))
      events += _kernel_events(data)
  if not events:
    raise RuntimeError("the profiler saw no kernel on a GPU")
  return _by_call(sorted(events), launches, calls)


_Event = tuple[float, str, float]


def _kernel_events(data: Any) -> list[_Event]:
  """Start, name and duration in ns of what ran on the streams of a GPU."""
  return [
    (event.start_ns, event.name, event.duration_ns)
    for plane in data.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]


def _by_call(
  events: Sequence[_Event], launches: int, calls: int
) -> tuple[Timing, dict[str, float]]:
  """What `profile` returns, from the events of all launches in order."""
  each, rest = divmod(len(events), launches)
  if rest:  # Not the same for every call.
    groups, share = [events], 1e-3 / launches
  else:
    groups = [
      events[i * each : (i + 1) * each]
      for i in range(launches - calls, launches)
    ]
    share = 1e-3
  times: dict[str, list[float]] = {}
  for i, group in enumerate(groups):
    for _, name, duration in group:
      times.setdefault(name, [0.0] * len(groups))[i] += share * duration
  kernels = {name: float(np.median(x)) for name, x in times.items()}
  slowest_first = sorted(kernels.items(), key=lambda item: -item[1])
  totals = np.sum([*times.values()], axis=0)
  return _timing(totals, launches=1 if not rest else launches), dict(
    slowest_first
  )


def _timing(times: Any, *, launches: int) -> Timing:
  low, median, high = (float(x) for x in np.percentile(times, (25, 50, 75)))
  return Timing(
    median_us=median,
    quartiles_us=(low, high),
    launches=launches,
    rounds=len(times),
  )
