"""What the GPU suite's results say, on numbers that nobody measured."""

import json

import pytest

from pallas_kernels import bench_ops, gpu_suite_report
from tests.kernels import bench_readme

_OP = bench_ops.OPS["selective_scan"]


def _direction(us, kernels, *, source="profiler"):
  return {
    "median_us": us,
    "quartiles_us": [us, us],
    "source": source,
    "kernels_us": kernels,
    "bytes": 10**6,
    "exponentials": 0,
    "fmas": 0,
    "clock_hz": 1e9,
  }


def _step(call="vim_tiny_224", factor=16, name="mosaic_gpu", scale=1.0):
  kernels = {
    "selective_scan_mosaic_gpu_kernel": 12.0 * scale,
    "selective_scan_backward_mosaic_gpu_kernel": 20.0 * scale,
    "wrapped_add": 4.0 * scale,
  }
  return {
    "op": "selective_scan",
    "call": call,
    "dtype": "bfloat16",
    "batch_factor": factor,
    "implementation": name,
    "forward": _direction(12.0 * scale, {"selective_scan": 12.0 * scale}),
    "forward+backward": _direction(36.0 * scale, kernels),
  }


@pytest.fixture
def results(tmp_path, monkeypatch):
  """Results in the place of measured ones: a floor of 10 us, a bound of 16."""
  compiled = tmp_path / "compiled.json"
  bound = {
    "op": "selective_scan",
    "spec": "vim_tiny_224",
    "dtype": "bfloat16",
    "batch_factor": 16,
    "kernel": "selective_scan_backward",
    "predicted_us": 16.0,
  }
  compiled.write_text(json.dumps({"rows": [bound]}))
  path = tmp_path / "gpu_suite.json"
  monkeypatch.setattr(gpu_suite_report, "COMPILED", compiled)
  monkeypatch.setattr(gpu_suite_report, "RESULTS", path)
  peer = _step(name="mamba_ssm", scale=3.5)
  peer["backward"] = _direction(36.0, {})
  found = {
    "environment": {
      "device": "gpu NVIDIA H100",
      "driver": "580",
      "jax": "0.11.2",
      "commit": "abc",
      "date": "2026-01-02T03:04:05",
    },
    "implementation": "mosaic_gpu",
    "settings": {"larger": 16},
    "passed": True,
    "complete": True,
    "steps": [
      {"bytes_per_second": 1e11},
      {"status": "error", "reason": "timed out after 60 s"},
      _step(),
      _step(name="xla_associative", scale=10.0),
      peer,
      _step(call="vim_tiny_1248", factor=1, scale=5.0),
    ],
  }
  path.write_text(json.dumps(found))
  return found


def test_times_stand_beside_the_floor_of_the_run_and_beside_others(results):
  forward, both, *_ = gpu_suite_report.rows(results)
  assert forward.floor_us == pytest.approx(10)
  assert forward.floors == pytest.approx(1.2)
  assert both.bounds == pytest.approx(20 / 16)
  assert both.backward_us == pytest.approx(24)
  (line, long) = gpu_suite_report.table(results).splitlines()[2:]
  assert line == (
    "| `vim_tiny_224` | bfloat16 | 128 | 12.0 / 36.0 | 1.20 / 3.60 | 1.25 "
    "| 10.00 / 10.00 | 3.50 / 1.50 |"
  )
  assert long.startswith("| `vim_tiny_1248` | bfloat16 | 1 | 60.0 / 180.0 |")
  assert long.endswith("| - | - | - |")


def test_targets_are_met_or_missed(results):
  lines = gpu_suite_report.targets(results).splitlines()[2:]
  met = [line.split(" | ")[1] for line in lines]
  assert met == ["yes", "yes", "yes", "no", "no"]
  assert lines[3].endswith("| 0 of 1 | `vim_tiny_224` 1.50 |")
  assert lines[4].endswith("| 0 of 1 | `vim_tiny_1248` 6.00 |")


def test_what_was_not_measured_is_no_target_met(results):
  results["steps"] = results["steps"][1:3]  # No bandwidth, no others.
  met = [
    line.split(" | ")[1]
    for line in gpu_suite_report.targets(results).splitlines()[2:]
  ]
  assert met == ["not measured", "yes", *["not measured"] * 3]
  results["steps"] = []
  assert len(gpu_suite_report.table(results).splitlines()) == 2
  assert gpu_suite_report.targets(results).count("not measured") == 5


def test_times_of_the_host_are_marked(results):
  step = _step()
  step["forward"] = _direction(12.0, {}, source="host")
  step["forward+backward"] = _direction(36.0, {}, source="host")
  results["steps"] = [step]
  (line,) = gpu_suite_report.table(results).splitlines()[2:]
  assert "| 12.0 (host) / 36.0 (host) | - | - |" in line


def test_the_readme_has_what_was_measured(results):
  part = bench_readme.gpu_suite()
  assert "gpu NVIDIA H100" in part
  assert "driver 580" in part
  assert "`vim_tiny_224`" in part
  assert "passed" in part
  assert "| yes |" in bench_readme.gpu_targets()


def test_the_readme_says_that_nothing_was_measured(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu_suite_report, "RESULTS", tmp_path / "none.json")
  for part in (bench_readme.gpu_suite(), bench_readme.gpu_targets()):
    assert part == "No GPU figure has been measured yet."


def test_bounds_are_those_of_compiled_kernels(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu_suite_report, "COMPILED", tmp_path / "none.json")
  assert gpu_suite_report._bounds() == {}
