"""Measures speed and memory of whole models.

  python -m experiments.throughput --preset cpu
  python -m experiments.throughput --models vim_tiny --sizes 224 512 \\
      --batches 8 --dtypes bfloat16 --json results.json --plots FOLDER

Every row stands beside the DeiT of the most similar size, with the attention
weights in memory as in the papers' comparisons; on a GPU bfloat16 rows stand
also beside one with flash attention. Rows that belong together are timed in
turn.
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys
import time
from typing import get_args

import jax

from experiments.throughput import cases, measure, report
from pallas_kernels import bench_compare
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
    choices=get_args(cases.Precision),
    default="full",
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
    help="seconds after which no other group starts; 420 for --preset gpu",
  )
  add("--json", type=pathlib.Path, help="write the results to this file")
  add("--plots", type=pathlib.Path, help="draw PNG files into this folder")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = _parser()
  args = parser.parse_args(argv)
  if (args.preset is None) == (args.models is None):
    parser.error("pass either --preset or --models")
  on_gpu = jax.default_backend() == "gpu"
  if args.flash is None:
    args.flash = on_gpu
  plans = cases.PRESETS[args.preset] if args.preset else [_plan(args)]
  if not on_gpu and any(p.flash or p.precision == "tf32" for p in plans):
    print(
      "error: flash attention and tf32 need an NVIDIA GPU, and JAX sees only "
      f"{jax.devices()[0].device_kind}. Leave out --flash and --precision "
      "tf32, or use --preset cpu.",
      file=sys.stderr,
    )
    return 1
  limit = args.time_limit
  if limit is None:
    limit = 420.0 if args.preset == "gpu" else float("inf")
  try:  # Before the minutes that it takes, not after.
    if args.plots:
      optional.require("matplotlib", extra="plot")
      args.plots.mkdir(parents=True, exist_ok=True)
    if args.json:
      args.json.touch()
  except (OSError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  rows, skipped = _measure(plans, args.rounds, limit, args.json)
  print("\n" + report.markdown(rows))
  print("\n" + report.growth(rows))
  if skipped:
    print(f"\n{skipped} groups were left out: the time limit was reached")
  for name in report.plots(rows, args.plots) if args.plots else ():
    print(f"plot: {args.plots / name}")
  return 0


def _plan(args: argparse.Namespace) -> cases.Plan:
  return cases.Plan(
    models=args.models,
    sizes=args.sizes,
    batches=args.batches,
    modes=args.modes,
    dtypes=args.dtypes,
    precision=args.precision,
    flash=args.flash,
  )


def _measure(
  plans: Sequence[cases.Plan],
  rounds: int,
  limit: float,
  path: pathlib.Path | None,
) -> tuple[list[measure.Row], int]:
  """All rows, and how many groups the time limit left out."""
  facts = bench_compare.environment() | {"cores": str(os.cpu_count())}
  print("  ".join(f"{key} {value}" for key, value in facts.items()))
  groups = [group for plan in plans for group in cases.groups(plan)]
  start, rows, done = time.monotonic(), [], 0
  for group in groups:
    if time.monotonic() - start > limit:
      break
    for row in measure.run_group(group, rounds):
      rows.append(row)
      print(_line(row), flush=True)
    done += 1
    if path is not None:  # After every group: a killed process loses one.
      report.write(path, facts, rows, len(groups) - done)
  return rows, len(groups) - done


def _line(row: measure.Row) -> str:
  case = row.case
  name = f"{case.label} {case.size} x{case.batch} {case.mode} {case.dtype}"
  if row.error is not None:
    return f"{name}: {row.error}"
  return f"{name}: {row.images_per_second:.2f} images/s"


if __name__ == "__main__":
  sys.exit(main())
