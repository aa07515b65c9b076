"""Times the operations, tunes their kernels, and reads their machine code.

  python -m pallas_kernels.bench [--filter vim] [--rounds 30] [--json out.json]
    The implementations of the selective scan against a fixed baseline.
  python -m pallas_kernels.bench --compiled [OP] [--filter vim] [--json ...]
    Registers, spills, shared memory and instructions of the GPU kernels.
    Needs no GPU, but the wheels of jax[cuda13].
  python -m pallas_kernels.bench --tune [--filter vim]
    On a GPU: finds the best settings of the kernels, and keeps them.
  python -m pallas_kernels.bench --suite gpu [--json results.json]
    On a GPU: correctness and timings, in under nine minutes; with the same file
    again, what is left of it.

It exits with 1 if a check failed, with 2 for a wrong command line and with 69
if this machine lacks what was asked for.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import sys
from typing import Any, Final

from pallas_kernels import (
  bench_compare,
  bench_compiled,
  bench_ops,
  bench_tune,
  gpu_suite,
)

FAILED: Final = 1
UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h.

# What a compiled kernel depends on, beside JAX.
_COMPILER_PACKAGES: Final = (
  "jax-cuda13-plugin",
  "nvidia-cuda-nvcc",
  "nvidia-nvvm",
  "nvidia-cuda-nvdisasm",
)


def _pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(
      f"{text!r} is no regular expression: {error}"
    ) from error


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "op",
    nargs="?",
    choices=[*bench_ops.OPS],
    help="the operation; all that have GPU kernels if left out, or, where "
    "only the selective scan can be asked for, that",
  )
  parser.add_argument(
    "--filter",
    type=_pattern,
    default="",
    help="only calls in whose name this regular expression is found",
  )
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument(
    "--compiled", action="store_true", help="what the kernels are compiled to"
  )
  mode.add_argument("--tune", action="store_true", help="find settings")
  mode.add_argument("--suite", choices=["gpu"], help="check and time on a GPU")
  parser.add_argument(
    "--dtype",
    choices=bench_compiled.DTYPES,
    help="with --compiled: only this dtype of the sequences",
  )
  parser.add_argument(
    "--batch-factor",
    type=int,
    default=1,
    help="with --compiled or --tune: so many times the batch of each call",
  )
  parser.add_argument(
    "--rounds", type=int, default=20, help="how often each call is timed"
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="also write the results to this file"
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Does what the command line asks for; returns the exit code."""
  parser = _parser()
  options = parser.parse_args(argv)
  if options.rounds < 1:
    parser.error(f"--rounds must be at least 1, got {options.rounds}")
  if options.batch_factor < 1:
    parser.error(
      f"--batch-factor must be at least 1, got {options.batch_factor}"
    )
  if options.batch_factor > 1 and not (options.compiled or options.tune):
    parser.error("--batch-factor goes with --compiled or --tune only")
  if options.dtype and not options.compiled:
    parser.error("--dtype goes with --compiled only")
  if options.json and options.tune:
    parser.error("--tune writes the table beside selective_scan/tuning.py")
  several = options.compiled or options.suite
  if not several and options.op not in (None, "selective_scan"):
    parser.error(f"{options.op} can be asked for with --compiled or --suite")
  ops = [bench_ops.OPS[options.op or "selective_scan"]]
  if several and options.op is None:
    ops = [
      op for op in bench_ops.OPS.values() if "mosaic_gpu" in op.implementations
    ]
  calls = [
    (op, name) for op in ops for name in op.specs if options.filter.search(name)
  ]
  if not calls:
    names = ", ".join(name for op in ops for name in op.specs)
    parser.error(
      f"no call has {options.filter.pattern!r} in its name; there are {names}"
    )
  if options.json and not options.json.parent.is_dir():
    parser.error(f"--json: there is no folder {options.json.parent}")

  if options.compiled:
    return _compiled(calls, options)
  if options.tune:
    return _tune([name for _, name in calls])
  if options.suite:
    return _suite(calls, options)
  return _compare([name for _, name in calls], options)


def _compare(names: Sequence[str], options: argparse.Namespace) -> int:
  facts = bench_compare.environment()
  print("  ".join(f"{key} {value}" for key, value in facts.items()))
  op = bench_ops.OPS["selective_scan"]
  rows: list[bench_compare.Row] = []
  for name in names:
    spec = op.specs[name]
    print(f"\n{name}: {op.describe(spec)} ({spec.source})", flush=True)
    # The reference is the definition, not a contender.
    contenders = ("xla_associative", "xla_sequential")
    rows += bench_compare.measure(name, spec, contenders, options.rounds)
    of_call = [row for row in rows if row.spec == name]
    print(bench_compare.table(of_call), flush=True)
  verdicts = []
  if facts["device"].startswith("cpu"):
    verdicts = bench_compare.check_gates(rows)
  print("\n" + "\n".join(verdicts) if verdicts else "")
  results = {
    "environment": facts,
    "rows": [dataclasses.asdict(row) for row in rows],
    "gates": verdicts,
  }
  _write(options.json, results)
  return 0


def _compiled(
  calls: Sequence[tuple[bench_ops.Op, str]], options: argparse.Namespace
) -> int:
  for op in {op.name: op for op, _ in calls}.values():
    if reason := bench_compiled.why_not(op):
      return _unavailable(reason)
  facts = bench_compare.environment() | {
    "device": f"compiled for {bench_compiled.DEVICE.device_kind}, run on none"
  }
  for package in _COMPILER_PACKAGES:
    try:
      facts[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      facts[package] = "not from a wheel"
  print("  ".join(f"{key} {value}" for key, value in facts.items()))
  print(bench_compiled.HEADER)
  rows: list[bench_compiled.Figures] = []
  for op, name in calls:
    for dtype in [options.dtype] if options.dtype else bench_compiled.DTYPES:
      for direction in bench_ops.DIRECTIONS:
        for row in bench_compiled.figures(
          op, name, dtype, direction, options.batch_factor
        ):
          rows.append(row)
          print(bench_compiled.line(row), flush=True)
  for row in rows:
    for clause in bench_compiled.missed(row):
      where = f"{row.spec} {row.dtype} {row.direction} {row.kernel}"
      print(f"MISSED {where}: {clause}")
  results = {
    "environment": facts,
    "rows": [dataclasses.asdict(row) for row in rows],
  }
  _write(options.json, results)
  return 0


def _tune(names: Sequence[str]) -> int:
  if reason := gpu_suite.why_no_gpu():
    return _unavailable(f"tuning times kernels on a GPU: {reason}")
  bench_tune.tune(names)
  return 0


def _suite(
  calls: Sequence[tuple[bench_ops.Op, str]], options: argparse.Namespace
) -> int:
  results = gpu_suite.run_on_gpu(calls, options.json)
  if isinstance(results, str):
    return _unavailable(f"the GPU suite needs a GPU: {results}")
  return 0 if results["passed"] else FAILED


def _unavailable(reason: str) -> int:
  print(f"python -m pallas_kernels.bench: {reason}.", file=sys.stderr)
  return UNAVAILABLE


def _write(path: pathlib.Path | None, results: Any) -> None:
  if path is not None:
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(main())
