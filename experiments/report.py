"""Compares runs: their curves in one PNG, their numbers in one table.

  python -m experiments.report WORKDIR [WORKDIR ...] [--out DIR]

Writes report.md and report.png to DIR, by default the first run's folder, and
prints the table. Runs that are not finished are shown as far as they are.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import statistics
import sys
from typing import Any

from experiments import figures
from experiments.imagenet import errors, metrics, rundir

# Okabe and Ito's, which stay apart for colour-blind eyes.
_COLOURS = (
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#e69f00",
  "#56b4e9",
  "#000000",
)
_CURVES = (
  ("train", "loss", "training loss"),
  ("valid", "loss", "validation loss"),
  ("valid", "accuracy", "validation accuracy"),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's folder says.

  Attributes:
    name: To tell it from the others.
    config: The resolved configuration.
    recorded: All of config.json.
    lines: Of metrics.jsonl.
    result: Of result.json, or None before the end.
  """

  name: str
  config: dict[str, Any]
  recorded: dict[str, Any]
  lines: list[dict[str, Any]]
  result: dict[str, Any] | None

  def values(self, split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a curve."""
    drawn = [x for x in self.lines if x["split"] == split and name in x]
    return [x["step"] for x in drawn], [x[name] for x in drawn]


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Reads runs; names are what differs in their paths.

  Raises:
    errors.WorkdirError: A folder holds no run.
  """
  folders = [folder.expanduser().resolve() for folder in folders]
  common = pathlib.Path(os.path.commonpath([f.parent for f in folders]))
  runs = []
  for folder in folders:
    recorded = rundir.read_json(folder / rundir.CONFIG)
    if recorded is None:
      raise errors.WorkdirError(
        f"{folder} holds no run: there is no {rundir.CONFIG}."
      )
    runs.append(
      Run(
        name=str(folder.relative_to(common)),
        config=recorded["config"],
        recorded=recorded,
        lines=metrics.read(folder),
        result=rundir.read_json(folder / rundir.RESULT),
      )
    )
  return runs


def table(runs: Sequence[Run]) -> str:
  """The runs as rows of a Markdown table."""
  rows = [_row(run) for run in runs]
  names = list(rows[0])
  lines = [names, ["---"] * len(names), *(list(row.values()) for row in rows)]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(run: Run) -> dict[str, str]:
  c, result = run.config, run.result
  _, valid = run.values("valid", "accuracy")
  _, speed = run.values("train", "images_per_second")
  initial = run.recorded.get("initial_weights")
  return {
    "run": run.name,
    "model": c["model"]["name"],
    "data": c["data"]["name"],
    "seed": str(c["seed"]),
    "batch": str(c["batch_size"]),
    "steps": str(max((x["step"] for x in run.lines), default=0)),
    "best validation accuracy": f"{max(valid):.4f}" if valid else "-",
    "final accuracy": (
      f"{result['accuracy']:.4f} ({result['name']}, {result['examples']})"
      if result
      else "not finished"
    ),
    "images/s": f"{statistics.median(speed):,.0f}" if speed else "-",
    "initial weights": (
      f"licence {initial['license'] or 'unknown'}" if initial else "none"
    ),
    "revision": _revisions(run.recorded),
  }


def _revisions(recorded: dict[str, Any]) -> str:
  """Of the code that the run was computed with, from first to last."""
  found = [
    (x.get("git_revision") or "-")[:9]
    for x in (*recorded.get("sessions", []), recorded)
  ]
  return ", ".join(dict.fromkeys(found))


def draw(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Draws the curves of all runs over their steps."""
  figure = figures.make(figsize=(13, 4))
  axes = figure.subplots(1, len(_CURVES))
  for ax, (split, name, title) in zip(axes, _CURVES, strict=True):
    for i, run in enumerate(runs):
      ax.plot(
        *run.values(split, name),
        color=_COLOURS[i % len(_COLOURS)],
        linestyle=("-", "--", ":")[i // len(_COLOURS) % 3],
        label=run.name,
      )
    ax.set_xlabel("step")
    ax.set_title(title)
    ax.grid(alpha=0.3)
  axes[0].legend(fontsize="small")
  figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; None means `sys.argv`. Returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args(argv)
  out = (args.out or args.workdirs[0]).expanduser()
  try:
    runs = read(args.workdirs)
    text = table(runs)
    print(text, end="", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, out / "report.png")
    (out / "report.md").write_text(f"{text}\n![curves](report.png)\n")
  except errors.RunError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
  except ModuleNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.UNAVAILABLE
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.IO_ERROR
  return errors.ExitCode.FINISHED


if __name__ == "__main__":
  sys.exit(main())
