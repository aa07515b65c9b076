"""Measures speed and memory of whole models.

  python -m experiments.throughput --preset cpu
  python -m experiments.throughput --models vim_tiny --sizes 224 512 \\
      --batches 8 --dtypes bfloat16 --json results.json --plots FOLDER

Every row stands beside the DeiT of the most similar size, with the attention
weights in memory as in the papers' comparisons; on a GPU bfloat16 rows stand
also beside one with flash attention. Rows that belong together are timed in
turn. The file has every row as soon as it is known, and

  python -m experiments.throughput --preset gpu --json FILE

goes on with a FILE that was begun on the same device with the same versions, so
that a time limit, or a process that is killed, costs one row.
"""

import argparse
import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import sys
import time
from typing import get_args

import jax

from experiments.throughput import cases, measure, report, targets
from pallas_kernels import bench_compare, bench_environment
import vimjax
from vimjax import command_line, optional


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.throughput",
    description="Measures speed and memory of whole models.",
  )
  add = parser.add_argument
  positive = command_line.positive_integer
  add("--preset", choices=list(cases.PRESETS), help="instead of the lists")
  add("--models", nargs="+", metavar="NAME", choices=vimjax.list_models())
  add("--sizes", nargs="+", type=positive, metavar="SIDE", default=[224])
  add("--batches", nargs="+", type=positive, metavar="SIZE", default=[1])
  add("--modes", nargs="+", choices=get_args(cases.Mode), default=["inference"])
  add("--dtypes", nargs="+", choices=get_args(cases.Dtype), default=["float32"])
  add(
    "--precision",
    nargs="+",
    choices=get_args(cases.Precision),
    default=["full"],
    help="of float32 matrix products; tf32 needs a GPU",
  )
  add(
    "--flash",
    action=argparse.BooleanOptionalAction,
    help="a baseline with flash attention beside bfloat16 rows; default: on a "
    "GPU",
  )
  add("--rounds", type=positive, default=5, help="default: 5")
  add(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="seconds after which no other case starts; 420 for --preset gpu",
  )
  add("--json", type=pathlib.Path, help="write the results to this file")
  add(
    "--cache",
    type=pathlib.Path,
    metavar="FOLDER",
    help="keep compiled programs here; a later run's compile time is then that "
    "of reading them",
  )
  add("--plots", type=pathlib.Path, help="draw PNG files into this folder")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = _parser()
  args = parser.parse_args(argv)
  if (args.preset is None) == (args.models is None):
    parser.error("pass either --preset or --models")
  if args.cache:
    jax.config.update("jax_compilation_cache_dir", str(args.cache))
  # JAX's own default is 0.75. Read when the device is first used: now.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  on_gpu = jax.default_backend() == "gpu"
  if args.flash is None:
    args.flash = on_gpu
  plans = cases.PRESETS[args.preset] if args.preset else [_plan(args)]
  if not on_gpu and any(p.flash or "tf32" in p.precisions for p in plans):
    print(
      "error: flash attention and tf32 need an NVIDIA GPU, and JAX sees only "
      f"{jax.devices()[0].device_kind}. Leave out --flash and --precision "
      "tf32, or use --preset cpu.",
      file=sys.stderr,
    )
    return 1
  if args.time_limit is None:
    args.time_limit = 420.0 if args.preset == "gpu" else float("inf")
  facts = _environment(args)
  try:  # Before the minutes that it takes, not after.
    if args.plots:
      optional.require("matplotlib", extra="plot")
      args.plots.mkdir(parents=True, exist_ok=True)
    rows = []
    if args.json:
      args.json.touch()
      if args.preset == "gpu" and args.json.stat().st_size:
        facts, rows = report.resume(args.json, facts)
  except (OSError, ModuleNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print("  ".join(f"{key} {value}" for key, value in facts.items()))
  run = _Run(facts, rows, args.json, time.monotonic() + args.time_limit)
  code = run.complete(plans, args.rounds)
  rows = list(run.rows.values())
  goals = "\n".join(targets.lines(rows))
  for part in filter(None, (report.markdown(rows), report.growth(rows), goals)):
    print(f"\n{part}")
  if run.left_out:
    print(f"\n{run.left_out} cases were left out: the time limit was reached")
  for name in report.plots(rows, args.plots) if args.plots else ():
    print(f"plot: {args.plots / name}")
  return code


def _plan(args: argparse.Namespace) -> cases.Plan:
  return cases.Plan(
    models=args.models,
    sizes=args.sizes,
    batches=args.batches,
    modes=args.modes,
    dtypes=args.dtypes,
    precisions=args.precision,
    flash=args.flash,
  )


def _environment(args: argparse.Namespace) -> dict[str, str]:
  facts = bench_compare.environment() | {
    "cores": str(os.cpu_count()),
    "models": _models_digest(),
  }
  if limit := measure.memory_stats().get("bytes_limit"):
    facts["memory_limit_bytes"] = str(limit)
  if args.cache:
    facts["compilation_cache"] = "used"
  return facts


def _models_digest() -> str:
  """Says whether two runs had the same models."""
  folder = pathlib.Path(vimjax.__file__).parent
  return bench_environment.digest(folder, "layers/*.py", "models/*.py")


class _Run:
  """What is measured so far, and how it goes on."""

  def __init__(
    self,
    facts: Mapping[str, str],
    rows: Sequence[measure.Row],
    path: pathlib.Path | None,
    end: float,
  ):
    self.rows = {row.case: row for row in rows}
    self.left_out = 0
    self._facts = facts
    self._path = path
    self._end = end

  def complete(self, plans: Sequence[cases.Plan], rounds: int) -> int:
    """Runs what has no result yet; returns the exit code."""
    groups = collections.deque(
      sorted(
        (group for plan in plans for group in cases.groups(plan)),
        key=self._was_killed,
      )
    )
    while groups:
      group = groups.popleft()
      todo = [case for case in group.cases if not self._is_finished(case)]
      try:
        for row in measure.run_group(
          dataclasses.replace(group, cases=tuple(todo)), rounds, self._is_over
        ):
          self._keep(row)
      except measure.DeviceLostError as error:
        print(
          f"error: the device is lost, start anew: {error}", file=sys.stderr
        )
        return 1
      self.left_out += sum(not self._is_finished(case) for case in todo)
      if group.halve and self._too_large(group):
        half = self._halved(group)
        if self._was_killed(half):
          groups.append(half)
        else:
          groups.appendleft(half)
    return 0

  def _is_over(self) -> bool:
    return time.monotonic() > self._end

  def _is_finished(self, case: cases.Case) -> bool:
    return case in self.rows and self.rows[case].is_finished

  def _was_killed(self, group: cases.Group) -> bool:
    """Whether a process ended here, which the next one may do as well."""
    rows = [self.rows[case] for case in group.cases if case in self.rows]
    return any(not row.is_finished for row in rows)

  def _too_large(self, group: cases.Group) -> bool:
    errors = [self.rows[c].error for c in group.cases if c in self.rows]
    return group.cases[0].batch > 1 and measure.OUT_OF_MEMORY in errors

  def _halved(self, group: cases.Group) -> cases.Group:
    """Half the batch, or the first half of a half that has a chance."""
    rows = [self.rows[case] for case in group.cases if case in self.rows]
    half, needs = group.halved(), max(row.peak_bytes or 0 for row in rows) / 2
    limit = measure.memory_stats().get("bytes_limit", math.inf)
    while needs > limit and half.cases[0].batch > 1:
      half, needs = half.halved(), needs / 2
    return half

  def _keep(self, row: measure.Row) -> None:
    self.rows[row.case] = row
    if self._path is not None:
      report.write(self._path, self._facts, list(self.rows.values()))
    if row.is_finished:
      print(_line(row), flush=True)


def _line(row: measure.Row) -> str:
  case = row.case
  dtype = case.dtype + (f" {case.precision}" if case.precision else "")
  name = f"{case.label} {case.size} x{case.batch} {case.mode} {dtype}"
  if row.error is not None:
    return f"{name}: {row.error}"
  return f"{name}: {row.images_per_second:.2f} images/s"


if __name__ == "__main__":
  sys.exit(main())
