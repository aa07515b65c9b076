"""What the results of the GPU suite say: times beside floors, and the targets.

A floor is the longest of a call's bytes at the bandwidth of a copy in the same
run, and of its exponentials and FMAs at the clock that was read meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, Final

from pallas_kernels import bench_ops

FOLDER: Final = pathlib.Path(__file__).parent / "results"
RESULTS: Final = FOLDER / "gpu_suite.json"

# By `python -m pallas_kernels.bench --compiled --batch-factor ...`.
COMPILED: Final = FOLDER / "compiled_larger_batch.json"

PEER: Final = "mamba_ssm"
XLA: Final = "xla_associative"

FORWARD_FLOORS: Final = 1.4
BACKWARD_BOUNDS: Final = 1.6
FORWARD_PEER: Final = 3.0
BACKWARD_PEER: Final = 2.0
LONG_CALL: Final = "vim_tiny_1248"
LONG_FLOORS: Final = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A call with some batch and dtype, in one direction.

  Attributes:
    op: The operation.
    call: The call.
    dtype: That of its sequences.
    batch_factor: How many times its batch.
    direction: One of `bench_ops.DIRECTIONS`.
    us: The median time, in microseconds.
    by_host: Whether the host's clock measured it, launches included.
    floor_us: The least time; None if no bandwidth was measured.
    backward_us: Of it, everything but the forward kernels; None if forward.
    backward_kernel_us: Of it, the kernels with "_backward" in their names.
    bound_us: What the instructions of that kernel take at the least.
    peers_us: The times of others, by name.
    peers_backward_us: The same of the backward pass alone.
  """

  op: str
  call: str
  dtype: str
  batch_factor: int
  direction: str
  us: float
  by_host: bool
  floor_us: float | None
  backward_us: float | None
  backward_kernel_us: float | None
  bound_us: float | None
  peers_us: Mapping[str, float]
  peers_backward_us: Mapping[str, float]

  @property
  def floors(self) -> float | None:
    return _ratio(self.us, self.floor_us)

  @property
  def bounds(self) -> float | None:
    return _ratio(self.backward_kernel_us, self.bound_us)


def _ratio(x: float | None, y: float | None) -> float | None:
  return x / y if x and y else None


def parts(kernels_us: Mapping[str, float]) -> dict[str, float]:
  """Times by kernel added up: "forward", "states", "backward" and "other"."""
  found = dict.fromkeys(("forward", "states", "backward", "other"), 0.0)
  for name, time in kernels_us.items():
    kind = "forward" if "selective_scan" in name else "other"
    for suffix in ("states", "backward"):
      kind = suffix if f"selective_scan_{suffix}" in name else kind
    found[kind] += time
  return found


def rows(results: Mapping[str, Any]) -> list[Row]:
  """What was timed of the implementation that the suite is for."""
  bounds = _bounds()
  timed: dict[tuple[Any, ...], dict[str, Any]] = {}
  rates: dict[tuple[Any, ...], float] = {}
  rate = 0.0
  for step in results["steps"]:
    rate = step.get("bytes_per_second", rate)
    if "implementation" in step:
      key = tuple(step[x] for x in ("op", "call", "dtype", "batch_factor"))
      timed.setdefault(key, {})[step["implementation"]] = step
      rates[key] = rate
  return [
    _row(key, direction, found, results["implementation"], rates[key], bounds)
    for key, found in timed.items()
    if results["implementation"] in found
    for direction in bench_ops.DIRECTIONS
  ]


def _row(
  key: tuple[Any, ...],
  direction: str,
  found: Mapping[str, Any],
  implementation: str,
  rate: float,
  bounds: Mapping[tuple[Any, ...], float],
) -> Row:
  op, call, dtype, batch_factor = key
  mine = found[implementation][direction]
  work = bench_ops.Work(
    **{x.name: mine[x.name] for x in dataclasses.fields(bench_ops.Work)}
  )
  floor = None
  if rate:
    floor = work.floor_seconds(
      bytes_per_second=rate,
      clock_hz=mine.get("clock_hz") or bench_ops.CLOCK_HZ,
    )
  backward = kernel = None
  is_gradient = direction == bench_ops.GRADIENT
  if is_gradient and mine["kernels_us"]:
    by_part = parts(mine["kernels_us"])
    backward = mine["median_us"] - by_part["forward"]
    kernel = by_part["backward"]
  peers = {k: v for k, v in found.items() if k != implementation}
  return Row(
    op=op,
    call=call,
    dtype=dtype,
    batch_factor=batch_factor,
    direction=direction,
    us=mine["median_us"],
    by_host=mine["source"] == "host",
    floor_us=floor and 1e6 * floor,
    backward_us=backward,
    backward_kernel_us=kernel,
    bound_us=bounds.get(key) if is_gradient else None,
    peers_us={k: x[direction]["median_us"] for k, x in peers.items()},
    peers_backward_us={
      k: x["backward"]["median_us"] for k, x in peers.items() if "backward" in x
    },
  )


def _bounds() -> dict[tuple[Any, ...], float]:
  """Predicted microseconds of the backward kernel, by call and batch."""
  if not COMPILED.is_file():
    return {}
  found = json.loads(COMPILED.read_text())["rows"]
  return {
    (x["op"], x["spec"], x["dtype"], x["batch_factor"]): x["predicted_us"]
    for x in found
    if x["kernel"].endswith("_backward") and x["predicted_us"]
  }


def table(results: Mapping[str, Any]) -> str:
  """A line for each call; forward / forward plus backward."""
  lines = [
    "| Call | Dtype | Batch | Time, us | Times the floor | Backward kernel, "
    "times its bound | XLA's time over it | CUDA's |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
  ]
  found = rows(results)
  for forward, both in zip(found[::2], found[1::2], strict=True):
    pair = (forward, both)
    op = bench_ops.OPS[forward.op]
    batch = op.specs[forward.call].b * forward.batch_factor
    cells = [
      f"`{forward.call}`",
      forward.dtype,
      f"{batch}",
      " / ".join(f"{x.us:,.1f}{' (host)' * x.by_host}" for x in pair),
      _pair(x.floors for x in pair),
      _number(both.bounds),
      _pair(_ratio(x.peers_us.get(XLA), x.us) for x in pair),
      _pair(
        (
          _ratio(forward.peers_us.get(PEER), forward.us),
          _ratio(both.peers_backward_us.get(PEER), both.backward_us),
        )
      ),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _pair(numbers: Iterator[float | None] | Sequence[float | None]) -> str:
  known = [*numbers]
  return " / ".join(map(_number, known)) if any(known) else "-"


def _number(x: float | None) -> str:
  return f"{x:.2f}" if x else "-"


def targets(results: Mapping[str, Any]) -> str:
  """Whether each target is met, and by which calls it is missed."""
  larger = results["settings"]["larger"]
  all_rows = [x for x in rows(results) if x.dtype == "bfloat16"]
  full = [x for x in all_rows if x.batch_factor == larger]
  forward = [x for x in full if x.direction == bench_ops.FORWARD]
  backward = [x for x in full if x.direction == bench_ops.GRADIENT]
  long = [
    x
    for x in all_rows
    if (x.call, x.batch_factor, x.direction)
    == (LONG_CALL, 1, bench_ops.FORWARD)
  ]
  wanted = [
    (
      f"forward at most {FORWARD_FLOORS:g} times the floor, batch x{larger}",
      {x.call: x.floors for x in forward},
      lambda ratio: ratio <= FORWARD_FLOORS,
    ),
    (
      f"backward kernel at most {BACKWARD_BOUNDS:g} times its own bound, "
      f"batch x{larger}",
      {x.call: x.bounds for x in backward},
      lambda ratio: ratio <= BACKWARD_BOUNDS,
    ),
    (
      f"forward {FORWARD_PEER:g} times as fast as the CUDA kernel",
      {x.call: _ratio(x.peers_us.get(PEER), x.us) for x in forward},
      lambda ratio: ratio >= FORWARD_PEER,
    ),
    (
      f"backward {BACKWARD_PEER:g} times as fast as the CUDA kernel",
      {
        x.call: _ratio(x.peers_backward_us.get(PEER), x.backward_us)
        for x in backward
      },
      lambda ratio: ratio >= BACKWARD_PEER,
    ),
    (
      f"`{LONG_CALL}`, batch 1, forward at most {LONG_FLOORS:g} times the "
      "floor",
      {x.call: x.floors for x in long},
      lambda ratio: ratio <= LONG_FLOORS,
    ),
  ]
  lines = ["| Target | Met | By | Missed by |", "| --- | --- | --- | --- |"]
  for target, ratios, is_good in wanted:
    known = {call: ratio for call, ratio in ratios.items() if ratio}
    missed = [
      f"`{call}` {ratio:.2f}"
      for call, ratio in known.items()
      if not is_good(ratio)
    ]
    met = "no" if missed else "yes" if known else "not measured"
    by = f"{len(known) - len(missed)} of {len(known)}" if known else "-"
    lines.append(f"| {target} | {met} | {by} | {', '.join(missed)} |")
  return "\n".join(lines)
