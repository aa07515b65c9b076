"""The benchmark's arithmetic, and its command line on a tiny call."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bench
from pallas_kernels.selective_scan import arg_specs

_TINY = arg_specs.ArgSpec(b=1, l=5, d=4, n=2, g=2, gate=True, source="a test")


def _row(**changes):
  row = bench.Row(
    spec="vim_tiny_224",
    implementation="xla_sequential",
    direction="forward+backward",
    median_ms=10.0,
    quartiles_ms=(9.0, 11.0),
    temp_mib=1.0,
    speedup=7.5,
    memory_ratio=49.0,
  )
  return dataclasses.replace(row, **changes)


def test_gates_judge_speed_and_memory_of_forward_plus_backward():
  rows = [
    _row(),
    _row(direction="forward", speedup=1.0),
    _row(implementation="xla_associative", speedup=1.0),
    _row(spec="vim_tiny_1248", speedup=1.0),
  ]
  speed, memory = bench.check_gates(rows)
  assert speed.startswith("PASS vim_tiny_224 xla_sequential speed: 7.5x")
  assert memory.startswith("FAIL vim_tiny_224 xla_sequential memory: 49.0x")


def test_gates_belong_to_calls_that_exist():
  assert bench.GATES.keys() <= arg_specs.ARG_SPECS.keys()


def test_baseline_computes_the_same():
  arrays = arg_specs.make_arguments(_TINY)
  want = pallas_kernels.selective_scan(
    **arrays, delta_softplus=True, implementation="reference"
  )
  got = jax.jit(lambda arrays: bench.baseline_selective_scan(**arrays))(arrays)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_command_line_prints_a_table_and_writes_json(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.setitem(arg_specs.ARG_SPECS, "a_tiny_call", _TINY)
  path = tmp_path / "results.json"
  bench.main(["--filter", "a_tiny_call", "--rounds", "2", "--json", str(path)])
  results = json.loads(path.read_text())
  assert results["environment"]["jax"] == jax.__version__
  found = {(row["implementation"], row["direction"]) for row in results["rows"]}
  names = ("baseline", "xla_associative", "xla_sequential")
  assert found == {
    (name, direction)
    for name in names
    for direction in ("forward", "forward+backward")
  }
  for row in results["rows"]:
    low, high = row["quartiles_ms"]
    assert 0 < low <= row["median_ms"] <= high
  assert results["gates"] == []  # None is set for this call.
  printed = capsys.readouterr().out
  assert all(name in printed for name in (*names, "temp MiB", "quartiles"))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--filter", "resnet"], "no call has 'resnet' in its name; there are vim"),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    (["convolution"], "invalid choice: 'convolution'"),
  ],
)
def test_wrong_command_lines_are_explained(arguments, message, capsys):
  with pytest.raises(SystemExit):
    bench.main(arguments)
  assert message in capsys.readouterr().err
