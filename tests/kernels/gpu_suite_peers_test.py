"""What is said where the CUDA kernel to compare with cannot run."""

import pathlib

import pytest

from pallas_kernels import (
  bench_child,
  bench_ops,
  gpu_suite,
  gpu_suite_peers,
  gpu_suite_report,
  gpu_suite_timings,
)

_FOLDER = pathlib.Path("/nowhere")


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
  code = gpu_suite_peers.main([str(tmp_path)])
  assert code == gpu_suite_peers.UNAVAILABLE
  error = capsys.readouterr().err
  assert "is no unpacked source distribution of mamba-ssm: there is no" in error

  source = tmp_path / "csrc" / "selective_scan"
  source.mkdir(parents=True)
  for name in gpu_suite_peers._SOURCES:
    (source / name).touch()
  find_spec = gpu_suite_peers.importlib.util.find_spec
  monkeypatch.setattr(
    gpu_suite_peers.importlib.util,
    "find_spec",
    lambda name: None if name == "torch" else find_spec(name),
  )
  assert gpu_suite_peers.main([str(tmp_path)]) == gpu_suite_peers.UNAVAILABLE
  assert "the package torch is not installed" in capsys.readouterr().err


def test_its_steps_come_beside_ours_and_say_that_it_was_not_built():
  calls = [(op, name) for op in bench_ops.OPS.values() for name in op.specs]
  settings = gpu_suite_timings.Settings()
  steps = list(gpu_suite._steps(calls, "mosaic_gpu", settings, _FOLDER))
  peers = [x for x in steps if x.name.endswith(gpu_suite_report.PEER)]
  scans = len(bench_ops.OPS["selective_scan"].specs)
  assert len(peers) == 4 * scans  # Two dtypes, two batches.
  assert not any(x.is_check for x in peers)
  with (
    bench_child.Child() as child,
    pytest.raises(bench_child.ChildError, match="PeerError: there is no /nowh"),
  ):
    child.run(peers[0].function, *peers[0].arguments, seconds=100)
