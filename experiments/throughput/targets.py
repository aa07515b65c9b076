"""What is wanted of inference on a GPU, beside what was measured."""

from collections.abc import Iterator, Mapping, Sequence

from experiments.throughput import cases, measure, report

# Images per second in bfloat16 at batch 128.
_RATES = {"mambavision_tiny": 12_000, "vmamba_tiny_s1l8": 3_300}


def lines(rows: Sequence[measure.Row]) -> list[str]:
  """One line for each target that the rows allow to check."""
  by_case = {row.case: row for row in rows}
  found = []
  for row in rows:
    case = row.case
    if case.mode != "inference" or case.is_baseline:
      continue
    dtype = case.dtype + (f", {case.precision}" if case.precision else "")
    for value, wanted, unit in _goals(row, by_case):
      if value is not None:
        found.append(
          f"{'met' if value >= wanted else 'missed'}: {case.label} at "
          f"{case.size} x {case.size}, batch {case.batch}, {dtype}: "
          f"{value:,.2f} {unit}, wanted {wanted:,g}"
        )
  return found


def _goals(
  row: measure.Row, rows: Mapping[cases.Case, measure.Row]
) -> Iterator[tuple[float | None, float, str]]:
  """What was reached, or None; at least how much is wanted; and of what."""
  case = row.case
  if case.model == "vim_tiny" and case.size in (1248, 2048):
    flash, _ = report.ratios(row, rows, "flash")
    wanted = 1.0 if case.size == 1248 else 1.5
    yield flash, wanted, "times the speed of flash attention"
  if case.model == "vim_tiny" and case.size == 1248:
    speed, memory = report.ratios(row, rows, "materialised")
    saved = None if memory is None else 100 * (1 - memory)
    yield speed, 2.8, "times the speed of materialised attention"
    yield saved, 86.8, "% less memory than materialised attention"
  is_published = (case.size, case.batch, case.dtype) == (224, 128, "bfloat16")
  if is_published and case.model in _RATES:
    yield row.images_per_second, _RATES[case.model], "images/s"
