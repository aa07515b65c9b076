"""Trains the digits demo from several seeds and writes what came out.

  python -m experiments.digits_seeds --workdir DIR [--seeds 0 1 2 3 4]
      [--json experiments/results/digits.json]

Every run is `python -m experiments.imagenet --config digits` with another
`config.seed`, in a process of its own; runs that are finished are not repeated.
"""

import argparse
from collections.abc import Sequence
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

from experiments.imagenet import rundir
from experiments.imagenet.configs import digits

_SECONDS = "seconds.json"


def run_seed(seed: int, folder: pathlib.Path) -> dict[str, Any]:
  """Trains one seed to its end; returns its numbers.

  Args:
    seed: Value of `config.seed`.
    folder: The run's workdir.

  Raises:
    subprocess.CalledProcessError: The run failed; it has said why.
  """
  if rundir.read_json(folder / rundir.RESULT) is None:
    start = time.monotonic()
    command = [sys.executable, "-m", "experiments.imagenet"]
    command += ["--config", "digits", "--workdir", str(folder)]
    subprocess.run([*command, f"--config.seed={seed}"], check=True)
    rundir.write_json(folder / _SECONDS, time.monotonic() - start)
  result = rundir.read_json(folder / rundir.RESULT)
  return {
    "seed": seed,
    "test_accuracy": result["accuracy"],
    "test_images": result["examples"],
    "best_valid_accuracy": result["best_valid_accuracy"],
    "best_step": result["best_step"],
    "steps": result["total_steps"],
    "seconds": rundir.read_json(folder / _SECONDS),
  }


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; None means `sys.argv`."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.digits_seeds",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args(argv)
  runs = [run_seed(seed, args.workdir / str(seed)) for seed in args.seeds]
  config = rundir.read_json(args.workdir / str(args.seeds[0]) / "config.json")
  accuracies = [run["test_accuracy"] for run in runs]
  summary = {
    "date": datetime.date.today().isoformat(),
    "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
    "versions": config["versions"],
    "batch_size": digits.get_config().batch_size,
    "mean": sum(accuracies) / len(accuracies),
    "lowest": min(accuracies),
    "highest": max(accuracies),
    "runs": runs,
  }
  print(json.dumps(summary, indent=2))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(args.json, summary)


if __name__ == "__main__":
  main()
