"""What is said of a GPU, by a program in the place of nvidia-smi."""

import pytest

from pallas_kernels import bench_compare, bench_environment


@pytest.fixture
def smi(tmp_path, monkeypatch):
  """Replaces nvidia-smi by a shell script."""

  def replace(script):
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

  return replace


def test_facts_of_a_gpu(smi, monkeypatch):
  smi("echo '580.1, 1980 MHz, 2619 MHz, 700.00 W'; echo 'another, GPU, 0, 0'")
  monkeypatch.setenv("XLA_FLAGS", "--some_flag")
  facts = bench_environment.gpu_facts()
  assert facts["driver"] == "580.1"
  assert facts["clocks.max.sm"] == "1980 MHz"
  assert facts["power.limit"] == "700.00 W"
  assert facts["XLA_FLAGS"] == "--some_flag"
  assert {"jax-cuda13-plugin", "nvidia-cudnn-cu13"} <= facts.keys()
  assert all(isinstance(value, str) for value in facts.values())


def test_nothing_fails_where_nvidia_smi_is_missing(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  monkeypatch.setenv("GIT_COMMIT", "abc")
  facts = bench_environment.gpu_facts()
  assert facts["commit"] == "abc"  # Git is missing, too.
  assert len(facts["source"]) == 12
  assert "driver" not in facts
  assert bench_environment.sm_clock_hz(lambda: None) is None


def test_the_clock_is_read_while_the_device_works(smi):
  smi("sleep 0.2; echo '1755 MHz'")
  calls = []
  assert bench_environment.sm_clock_hz(lambda: calls.append(1)) == 1.755e9
  assert len(calls) > 1
  smi("echo '[N/A]'")
  assert bench_environment.sm_clock_hz(lambda: None) is None
  smi("exit 9")
  assert bench_environment.sm_clock_hz(lambda: None) is None


def test_a_cpu_is_named_once():
  assert bench_compare.environment()["device"] == "cpu"
