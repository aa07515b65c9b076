"""Tables, growth exponents and plots of measured rows."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from experiments import figures
from experiments.throughput import cases, measure
import vimjax

_COLUMNS = (
  "model",
  "image",
  "batch",
  "step",
  "dtype",
  "images/s",
  "ms (quartiles)",
  "peak MiB",
  "against DeiT",
  "against flash DeiT",
  "in the scan",
  "compile s",
)
# In a table only where there is something in it.
_RARE = ("against flash DeiT", "in the scan")


# What two runs must have in common for their rows to be compared.
_SAME = (
  "device",
  "driver",
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "nvidia-cudnn-cu13",
  "XLA_FLAGS",
  "source",
  "models",
)


def write(
  path: pathlib.Path,
  environment: Mapping[str, Any],
  rows: Sequence[measure.Row],
) -> None:
  """Writes what was measured, and where, as JSON; all of it or nothing."""
  content = {
    "environment": dict(environment),
    "rows": [dataclasses.asdict(row) for row in rows],
  }
  whole = path.with_name(path.name + ".part")
  whole.write_text(json.dumps(content, indent=2) + "\n")
  whole.replace(path)


def resume(
  path: pathlib.Path, environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[measure.Row]]:
  """What is in a file, to go on with it.

  Raises:
    ValueError: The file is none of `write`'s, or was begun elsewhere.
  """
  try:
    before, rows = read(path)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} has no results, move it away: {error}") from error
  for key in _SAME:
    old, new = before.get(key), environment.get(key)
    if old != new:
      raise ValueError(
        f"{path} was begun with {key} {old}, not {new}: name another file."
      )
  return before | {"continued": environment["date"]}, rows


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[measure.Row]]:
  """The environment and the rows of what `write` wrote."""
  content = json.loads(path.read_text())
  rows = []
  for fields in content["rows"]:
    case = cases.Case(**fields.pop("case"))
    rows.append(measure.Row(case=case, **fields))
  return content["environment"], rows


def markdown(rows: Sequence[measure.Row]) -> str:
  """One line per row, as a Markdown table."""
  by_case = {row.case: row for row in rows}
  table = [_cells(row, by_case) for row in rows]
  columns = [
    name
    for name in _COLUMNS
    if name not in _RARE or any(cells[name] for cells in table)
  ]
  lines = [columns, ["---" for _ in columns]]
  lines += [[cells[name] for name in columns] for cells in table]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: measure.Row, rows: Mapping[cases.Case, measure.Row]):
  """What stands in the columns of a row."""
  case = row.case
  cells = dict.fromkeys(_COLUMNS, "") | {
    "model": case.label,
    "image": str(case.size),
    "batch": str(case.batch),
    "step": case.mode,
    "dtype": case.dtype + (f", {case.precision}" if case.precision else ""),
    "images/s": row.error or "",
    "against DeiT": _against(row, rows, "materialised"),
    "against flash DeiT": _against(row, rows, "flash"),
  }
  if row.peak_bytes is not None and row.compile_s is not None:
    cells["peak MiB"] = _peak(row.peak_bytes, row.device_peak_bytes)
    cells["compile s"] = f"{row.compile_s:.1f}"
  speed = row.images_per_second
  if speed is not None and row.median_s is not None and row.quartiles_s:
    low, high = (f"{1e3 * x:.1f}" for x in row.quartiles_s)
    cells["images/s"] = f"{speed:.{1 if speed >= 10 else 2}f}"
    cells["ms (quartiles)"] = f"{1e3 * row.median_s:.1f} ({low} to {high})"
  if row.scan_share is not None:
    cells["in the scan"] = f"{100 * row.scan_share:.0f} %"
  return cells


def _peak(compiler: int, device: int | None) -> str:
  """MiB by the compiler's account, and by the device's where it has one."""
  text = f"{compiler / 2**20:.0f}"
  return text + (f" (device {device / 2**20:.0f})" if device else "")


def _against(
  row: measure.Row,
  rows: Mapping[cases.Case, measure.Row],
  attention: cases.Attention,
) -> str:
  """Speed and memory relative to the DeiT that attends like this."""
  speed, memory = ratios(row, rows, attention)
  parts = [
    f"{ratio:.2f}x {what}"
    for what, ratio in (("speed", speed), ("memory", memory))
    if ratio is not None
  ]
  return ", ".join(parts)


def ratios(
  row: measure.Row,
  rows: Mapping[cases.Case, measure.Row],
  attention: cases.Attention,
) -> tuple[float | None, float | None]:
  """Speed and peak memory in units of the baseline's, where both are known."""
  if row.case.is_baseline:
    return None, None
  name = cases.baseline(row.case.model)
  base = rows.get(
    dataclasses.replace(row.case, model=name, attention=attention)
  )
  if base is None:
    return None, None
  speed = memory = None
  if row.median_s and base.median_s:
    speed = base.median_s / row.median_s
  if row.peak_bytes and base.peak_bytes:
    memory = row.peak_bytes / base.peak_bytes
  return speed, memory


def _series(
  rows: Sequence[measure.Row],
) -> list[tuple[str, list[measure.Row]]]:
  """Rows that differ in the image size only, smallest first, with a name."""

  def key(row: measure.Row) -> tuple[str, ...]:
    case = row.case
    parts = (case.label, case.mode, case.dtype, case.precision or "")
    return (*parts, f"batch {case.batch}")

  measured = sorted((r for r in rows if r.median_s is not None), key=key)
  return [
    (
      ", ".join(part for part in name if part),
      sorted(group, key=lambda row: row.case.size),
    )
    for name, group in itertools.groupby(measured, key=key)
  ]


def growth(rows: Sequence[measure.Row]) -> str:
  """How time and memory grow with the number of pixels, as exponents.

  Least squares on logarithms over all sizes of a model: 1 is linear.
  """
  lines = []
  for name, series in _series(rows):
    sizes = [row.case.size for row in series]
    if len(sizes) < 2:
      continue
    pixels = np.log(np.square(np.asarray(sizes, float)))
    exponents = [
      np.polyfit(pixels, np.log([float(value) for value in values]), 1)[0]
      for values in (
        [row.median_s or 0.0 for row in series],
        [row.temp_bytes or 1 for row in series],
      )
    ]
    lines.append(
      f"{name}: time grows as pixels^{exponents[0]:.2f}, temporary memory as "
      f"pixels^{exponents[1]:.2f} ({sizes[0]} to {sizes[-1]})"
    )
  return "\n".join(lines)


def _axes(**options: Any) -> tuple[Any, Any]:
  figure = figures.make(figsize=(6, 4))
  ax = figure.subplots()
  ax.grid(alpha=0.3)
  ax.set(**options)
  for axis in (ax.xaxis, ax.yaxis):  # 20, not 2 x 10^1.
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
  return figure, ax


def plots(rows: Sequence[measure.Row], folder: pathlib.Path) -> list[str]:
  """Draws throughput and memory by image size, and accuracy by throughput.

  The first two show what was measured at several sizes, or all if nothing was;
  the last inference at the size that the accuracy was published for.

  Returns:
    The names of the PNG files in `folder`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  series = _series(rows)
  growing = [(name, group) for name, group in series if len(group) > 1]
  names = []
  for name, title, value in (
    ("throughput.png", "images/s", lambda row: row.images_per_second),
    ("memory.png", "peak memory, MiB", lambda row: row.peak_bytes / 2**20),
  ):
    figure, ax = _axes(
      xlabel="side of the image", ylabel=title, xscale="log", yscale="log"
    )
    for label, group in growing or series:
      sizes = [row.case.size for row in group]
      ax.plot(sizes, [value(row) for row in group], "o-", label=label)
    sizes = sorted({row.case.size for _, group in series for row in group})
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    _finish(figure, ax, folder / name)
    names.append(name)
  figure, ax = _axes(
    xlabel="images/s (measured)", ylabel="top-1 % (published)", xscale="log"
  )
  for label, group in series:
    variant = vimjax.get_variant(group[0].case.model)
    at = [r for r in group if r.case.size == variant.preprocessing.size]
    is_inference = group[0].case.mode == "inference"
    if at and is_inference and variant.pretrained is not None:
      top1 = variant.pretrained.top1
      ax.plot([at[0].images_per_second], [top1], "o", label=label)
  _finish(figure, ax, folder / "accuracy.png")
  return [*names, "accuracy.png"]


def _finish(figure: Any, ax: Any, path: pathlib.Path) -> None:
  if ax.get_legend_handles_labels()[0]:
    ax.legend(fontsize=7)
  figure.savefig(path, dpi=100)
