"""Compares inference on a CPU with timm's DeiT-Ti in PyTorch.

  python -m experiments.throughput.against_timm --json results.json

All models of a setting are timed in turn, round by round, in one process, on as
many cores as `--threads` says: only ratios between them mean anything. Needs
the extra `compare` (PyTorch is several GB, so no other extra brings it).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any, Final

import jax
import numpy as np

from experiments.throughput import cases, programs
from pallas_kernels import bench_compare
from vimjax import command_line, optional

PEER: Final = "deit_tiny (timm, PyTorch)"
_BASELINE: Final = "deit_tiny"


@dataclasses.dataclass(frozen=True)
class Setting:
  """Models that are timed in turn, and PyTorch's DeiT-Ti with them.

  Attributes:
    models: Names; a DeiT attends with the whole matrix of weights in memory.
    size: Side of the images.
    batch: Images at a time.
  """

  models: tuple[str, ...]
  size: int
  batch: int


SETTINGS: Final = (
  Setting(
    ("vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny", _BASELINE), 224, 8
  ),
  Setting(("vim_tiny", _BASELINE), 1248, 1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What was measured of a model in a setting.

  Attributes:
    model: Its name, or `PEER`.
    size: Side of the images.
    batch: Images at a time.
    median_s: Median time of a step, in seconds.
    quartiles_s: First and third quartile.
    images_per_second: The batch over the median.
    relative: Images per second in units of the peer's.
    temp_bytes: What the program needs beside arguments and results; None for
      the peer.
  """

  model: str
  size: int
  batch: int
  median_s: float
  quartiles_s: tuple[float, float]
  images_per_second: float
  relative: float
  temp_bytes: int | None


def run(setting: Setting, rounds: int, threads: int) -> list[Row]:
  """Times the models of a setting, the peer last.

  Args:
    setting: What to time.
    rounds: How often each model is timed.
    threads: Of PyTorch; JAX takes the cores that the process may use.

  Raises:
    ModuleNotFoundError: PyTorch or timm is not installed.
  """
  steps = {PEER: peer_step(setting.size, setting.batch, threads)}
  memory = {}
  for model in setting.models:
    case = _case(model, setting)
    program = programs.compile_case(case)
    step = program.start(programs.make_images(case))
    steps[model] = lambda s=step: jax.block_until_ready(s())
    memory[model] = program.temp_bytes
  times = _time(steps, rounds)
  peer = float(np.median(times[PEER]))
  rows = []
  for model in (*setting.models, PEER):
    low, median, high = np.percentile(times[model], (25, 50, 75)).tolist()
    rows.append(
      Row(
        model=model,
        size=setting.size,
        batch=setting.batch,
        median_s=median,
        quartiles_s=(low, high),
        images_per_second=setting.batch / median,
        relative=peer / median,
        temp_bytes=memory.get(model),
      )
    )
  return rows


def peer_step(size: int, batch: int, threads: int) -> Callable[[], Any]:
  """Inference of timm's DeiT-Ti, which attends by PyTorch's fused attention."""
  torch: Any = optional.require("torch", extra="compare")
  timm: Any = optional.require("timm", extra="compare")
  torch.set_num_threads(threads)
  model = timm.create_model("deit_tiny_patch16_224", img_size=size).eval()
  images = torch.randn(batch, 3, size, size)

  def step() -> Any:
    with torch.inference_mode():
      return model(images)

  return step


def _case(model: str, setting: Setting) -> cases.Case:
  return cases.Case(
    model=model,
    size=setting.size,
    batch=setting.batch,
    mode="inference",
    dtype="float32",
    precision="full",
    attention="materialised" if model in cases.BASELINES else None,
  )


def _time(
  steps: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  times: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(rounds):
    for name, step in steps.items():
      step()  # The caches are warm with this model, the other's threads asleep.
      start = time.perf_counter()
      step()
      times[name].append(time.perf_counter() - start)
  return times


def markdown(rows: Sequence[Row]) -> str:
  """One line per row, as a Markdown table."""
  lines = [
    "| Model | Images | Images/s | Of PyTorch's DeiT-Ti | Temporary memory |",
    "| --- | --- | ---: | ---: | ---: |",
  ]
  for row in rows:
    memory = "" if row.temp_bytes is None else f"{row.temp_bytes / 2**20:.0f}"
    lines.append(
      f"| {row.model} | {row.batch} of {row.size} x {row.size} | "
      f"{row.images_per_second:.2f} | {row.relative:.2f} | "
      f"{memory and memory + ' MiB'} |"
    )
  return "\n".join(lines)


def environment(threads: int) -> dict[str, str]:
  """What the numbers depend on beside the code."""
  torch: Any = optional.require("torch", extra="compare")
  timm: Any = optional.require("timm", extra="compare")
  return {
    **bench_compare.environment(),
    "torch": torch.__version__,
    "timm": timm.__version__,
    "threads": str(threads),
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.throughput.against_timm",
    description="Compares inference on a CPU with timm's DeiT-Ti in PyTorch.",
  )
  add, positive = parser.add_argument, command_line.positive_integer
  add("--rounds", type=positive, default=9, help="default: 9")
  add("--threads", type=positive, default=2, help="cores; default: 2")
  add("--json", type=pathlib.Path, help="write the results to this file")
  args = parser.parse_args(argv)
  # Before JAX starts its threads, one for each core that it may use.
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  jax.config.update("jax_platforms", "cpu")
  try:
    facts = environment(args.threads)
  except ModuleNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print("  ".join(f"{key} {value}" for key, value in facts.items()))
  rows = [
    row
    for setting in SETTINGS
    for row in run(setting, args.rounds, args.threads)
  ]
  print("\n" + markdown(rows))
  if args.json is not None:
    content = {
      "environment": facts,
      "rounds": args.rounds,
      "rows": [dataclasses.asdict(row) for row in rows],
    }
    args.json.write_text(json.dumps(content, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
