"""Writes the tables of pallas_kernels/README.md.

  python -m tests.kernels.bench_readme

Each stands between `<!-- NAME... -->` and `<!-- end of NAME -->`. What was
compiled is read from what `python -m pallas_kernels.bench --compiled OP --json
experiments/results/OP_compiled.json` wrote; what was measured on a GPU from
what `python -m pallas_kernels.bench --suite gpu --json
pallas_kernels/results/gpu_suite.json` wrote, if it did.
"""

from collections.abc import Callable, Iterator
import json
import pathlib
import re
from typing import Any

from pallas_kernels import bench_compiled, bench_ops, gpu_suite_report

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "pallas_kernels" / "README.md"
RESULTS = ROOT / "experiments" / "results"
_ITEMSIZE = 2  # bfloat16
_NAMED = 4  # Calls that a row names.


def compiled_ops() -> list[str]:
  """The operations that have GPU kernels."""
  return [
    name
    for name, op in bench_ops.OPS.items()
    if "mosaic_gpu" in op.implementations
  ]


def results(op: str) -> Any:
  """The file with what the kernels of an operation are compiled to."""
  return json.loads((RESULTS / f"{op}_compiled.json").read_text())


def rows() -> list[bench_compiled.Figures]:
  """All kernels of all calls."""
  return [
    bench_compiled.Figures(**row)
    for op in compiled_ops()
    for row in results(op)["rows"]
  ]


def _predicted(op: str, spec: str, direction: str) -> float | None:
  """Microseconds; None if a kernel is not compiled, or could not be counted."""
  times = [
    row.predicted_us
    for row in rows()
    if (row.op, row.spec, row.direction) == (op, spec, direction)
    and row.dtype == "bfloat16"
  ]
  known = [x for x in times if x is not None]
  return sum(known) if times and len(known) == len(times) else None


def work() -> str:
  """One row per call, with forward, and forward plus backward."""
  lines = [
    "| Call | Sizes | MB | Exponentials, 10^6 | FMAs, 10^6 | Floor, us "
    "| Predicted, us |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for op in bench_ops.OPS.values():
    for name, spec in op.specs.items():
      costs = [
        bench_ops.work(op.sizes(spec), direction, _ITEMSIZE)
        for direction in bench_ops.DIRECTIONS
      ]
      predicted = [
        _predicted(op.name, name, direction)
        for direction in bench_ops.DIRECTIONS
      ]
      columns = [
        [f"{cost.bytes / 1e6:,.1f}" for cost in costs],
        [f"{cost.exponentials / 1e6:,.1f}" for cost in costs],
        [f"{cost.fmas / 1e6:,.0f}" for cost in costs],
        [f"{1e6 * cost.floor_seconds():,.1f}" for cost in costs],
        ["-" if x is None else f"{x:,.1f}" for x in predicted],
      ]
      cells = [f"`{name}`", op.describe(spec), *map(" / ".join, columns)]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def compiled() -> str:
  """One row per kernel; calls for which it is compiled to the same together."""
  lines = [
    "| Kernel | n | Dtype | Registers | Spilled, bytes | Shared memory, bytes "
    "| Blocks | Instructions | Calls |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
  ]
  groups: dict[str, dict[str, None]] = {}
  for row in rows():
    checkpoints = (
      row.direction == bench_ops.GRADIENT
      and not row.is_backward
      and not row.kernel.endswith("_states")
    )
    figures = (
      f"| `{row.kernel}`{', checkpoints' if checkpoints else ''} | {row.n} "
      f"| {row.dtype} | {row.registers} | {row.spill_bytes} "
      f"| {row.shared_memory:,} | {row.blocks_per_multiprocessor} "
      f"| {_number(row.instructions_per_state, 1)} |"
    )
    groups.setdefault(figures, {})[f"`{row.spec}`"] = None
  for figures, calls in groups.items():
    named = list(calls)[:_NAMED]
    more = len(calls) - len(named)
    named += [f"{more} more"] if more else []
    lines.append(f"{figures} {', '.join(named)} |")
  facts = results(compiled_ops()[0])["environment"]
  return "\n".join(lines) + (
    f"\n\nCompiled by jax {facts['jax']} with nvidia-cuda-nvcc "
    f"{facts['nvidia-cuda-nvcc']}, {facts['date'][:10]}."
  )


def _number(x: float | None, digits: int) -> str:
  return "unknown" if x is None else f"{x:.{digits}f}"


def targets() -> str:
  """Whether each target is met, and by which kernels it is missed."""
  backward = [row for row in rows() if row.is_backward]
  forward = [row for row in rows() if not row.is_backward]
  per_state = lambda row, most: (
    row.instructions_per_state is None or row.instructions_per_state > most
  )
  most = bench_compiled.FORWARD_TARGET
  n = bench_compiled.FORWARD_TARGET_STATES
  wanted = [
    ("no spills", "spilled bytes", [r for r in rows() if r.spill_bytes]),
    (
      f"at most {most:g} instructions forward, n = {n}",
      "instructions",
      [r for r in forward if r.n == n and per_state(r, most)],
    ),
    (
      f"at most {bench_compiled.BACKWARD_TARGET:g} instructions backward",
      "instructions",
      [r for r in backward if per_state(r, bench_compiled.BACKWARD_TARGET)],
    ),
    (
      f"goal: {bench_compiled.BACKWARD_GOAL:g} instructions backward",
      "instructions",
      [r for r in backward if per_state(r, bench_compiled.BACKWARD_GOAL)],
    ),
    (
      f"at least {bench_compiled.BLOCKS_TARGET} backward blocks per "
      "multiprocessor",
      "blocks",
      [
        r
        for r in backward
        if r.blocks_per_multiprocessor < bench_compiled.BLOCKS_TARGET
      ],
    ),
  ]
  lines = ["| Target | Met | Missed by |", "| --- | --- | --- |"]
  for target, unit, missing in wanted:
    met = "no" if missing else "yes"
    lines.append(f"| {target} | {met} | {'; '.join(_missing(missing, unit))} |")
  return "\n".join(lines)


def _missing(kernels: list[bench_compiled.Figures], unit: str) -> Iterator[str]:
  """Kernels that miss a target, those of equal figures together."""
  values = {
    "spilled bytes": lambda r: str(r.spill_bytes),
    "blocks": lambda r: str(r.blocks_per_multiprocessor),
    "instructions": lambda r: _number(r.instructions_per_state, 2),
  }
  groups: dict[str, dict[str, None]] = {}
  for row in kernels:
    what = f"`{row.kernel}`, n = {row.n}, {row.dtype}"
    groups.setdefault(what, {})[values[unit](row)] = None
  for what, found in groups.items():
    yield f"{what}: {' or '.join(found)}"


_NOTHING = "No GPU figure has been measured yet."


def _measured() -> Any:
  """What the GPU suite found; None if it has not run on a GPU."""
  path = gpu_suite_report.RESULTS
  return json.loads(path.read_text()) if path.is_file() else None


def gpu_suite() -> str:
  """One row per call, dtype and batch that was timed on a GPU."""
  found = _measured()
  if found is None:
    return _NOTHING
  facts = found["environment"]
  verdict = "passed" if found["passed"] else "did not pass"
  rest = "" if found["complete"] else "; not all steps were run"
  return (
    f"{gpu_suite_report.table(found)}\n\nOn {facts['device']}, driver "
    f"{facts.get('driver', 'unknown')}, jax {facts['jax']}, commit "
    f"{facts['commit']}, {facts['date'][:10]}. The checks {verdict}{rest}."
  )


def gpu_targets() -> str:
  """Whether each target for times is met."""
  found = _measured()
  return _NOTHING if found is None else gpu_suite_report.targets(found)


PARTS: dict[str, Callable[[], str]] = {
  "gpu_suite": gpu_suite,
  "gpu_targets": gpu_targets,
  "work": work,
  "compiled": compiled,
  "targets": targets,
}


def _pattern(name: str) -> re.Pattern[str]:
  return re.compile(
    rf"(?s)(<!-- {name}\b[^\n]*-->\n)(.*?)\n?(<!-- end of {name} -->)"
  )


def current(name: str) -> str:
  """The part of the README as it stands."""
  match = _pattern(name).search(README.read_text())
  if match is None:
    raise ValueError(f"{README} has no part {name!r}")
  return match[2]


def write() -> None:
  """Generates every part anew."""
  text = README.read_text()
  for name, generate in PARTS.items():
    part = generate()
    text = _pattern(name).sub(lambda m, p=part: f"{m[1]}{p}\n{m[3]}", text)
  README.write_text(text)


if __name__ == "__main__":
  write()
