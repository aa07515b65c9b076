"""pallas_kernels/README.md is true: its tables are current, its names exist."""

import dataclasses
import re

import pytest

from pallas_kernels import bench, bench_compiled, bench_ops
from pallas_kernels.selective_scan import api
from tests.kernels import bench_readme

TEXT = bench_readme.README.read_text()


@pytest.mark.parametrize("name", bench_readme.PARTS)
def test_generated_parts_are_current(name):
  assert bench_readme.current(name) == bench_readme.PARTS[name]()


def test_figures_are_there_for_every_call():
  found = [
    (row.spec, row.dtype, row.direction)
    for row in bench_readme.rows()
    if row.op == "selective_scan"
  ]
  assert {*found} == {
    (spec, dtype, direction)
    for spec in bench_ops.OPS["selective_scan"].specs
    for dtype in bench_compiled.DTYPES
    for direction in bench_ops.DIRECTIONS
  }


@pytest.mark.parametrize("name", bench_readme.compiled_ops())
def test_figures_are_there_for_every_state_size(name):
  op = bench_ops.OPS[name]
  found = {
    (row.n, row.direction) for row in bench_readme.rows() if row.op == name
  }
  assert found == {
    (spec.n, direction)
    for spec in op.specs.values()
    for direction in bench_ops.DIRECTIONS
  }


def test_missed_targets_are_listed(monkeypatch):
  row = next(row for row in bench_readme.rows() if row.is_backward)
  good = dataclasses.replace(
    row, spill_bytes=0, instructions_per_state=20.0, blocks_per_multiprocessor=2
  )
  bad = dataclasses.replace(good, spill_bytes=8, instructions_per_state=30.0)
  monkeypatch.setattr(bench_readme, "rows", lambda: [good])
  lines = bench_readme.targets().splitlines()[2:]
  assert all("| yes |  |" in line for line in lines)
  monkeypatch.setattr(bench_readme, "rows", lambda: [good, bad])
  lines = bench_readme.targets().splitlines()[2:]
  assert ["| no |" in line for line in lines] == [
    True,
    False,
    False,
    True,
    False,
  ]
  assert f"`{row.kernel}`, n = {row.n}, {row.dtype}: 8" in lines[0]


def test_the_implementations_are_those_of_the_table():
  section = TEXT.partition("## Which implementation runs")[2]
  section = section.partition("\n## ")[0]
  names = re.findall(r"(?m)^\| `(\w+)` \|", section)
  assert names == [*api.IMPLEMENTATIONS]


def test_every_command_is_understood():
  commands = re.findall(
    r"(?m)^\| `python -m pallas_kernels.bench([^`]*)`", TEXT
  )
  assert len(commands) == 4
  for command in commands:
    bench._parser().parse_args(command.split())


def test_predictions_are_called_that():
  assert "Predicted, not measured on a GPU" in TEXT


def test_exit_codes_are_those_of_the_program():
  assert (
    f"1 a check failed, 2 a wrong\ncommand line, {bench.UNAVAILABLE}" in TEXT
  )
  assert bench.FAILED == 1
