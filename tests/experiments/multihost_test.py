"""A run in two processes of two devices each, with real collectives.

As in `faults_test.py`, the uninterrupted run is the measure.
"""

import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest

from tests.experiments import job as job_lib

# Two epochs of 20 steps; the state divided over pairs of devices, which are of
# the same process here, and the images over both processes.
_CONFIG = (*job_lib.TINY, "--config.epochs=2.0", "--config.mesh.fsdp=2")
_STEPS = 40
# What a process ends with that has lost another one: on its own, or by JAX.
_LOST = (76, -signal.SIGABRT)


def _free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def _start(job, workdir, *arguments, config=_CONFIG, only=None, **options):
  """Two processes; `only` holds arguments for one of them alone."""
  coordinator = f"--coordinator=localhost:{_free_port()}"
  return [
    job.start(
      workdir,
      *arguments,
      *(only or {}).get(i, ()),
      coordinator,
      "--num_processes=2",
      f"--process_id={i}",
      config=config,
      environment={"JAX_NUM_CPU_DEVICES": "2"},
      **options,
    )
    for i in range(2)
  ]


def _end(processes):
  """Exit codes and error output of both; neither is left behind."""
  try:
    errs = [p.communicate(timeout=300)[1] for p in processes]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [p.returncode for p in processes], errs


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
  """The folder of an uninterrupted run, started as SLURM would."""
  workdir = tmp_path_factory.mktemp("whole")
  # JAX derives the port from the number of the job.
  number = next(n for n in range(os.getpid(), os.getpid() + 100) if _is_free(n))
  processes = [
    job.start(
      workdir,
      "--config.checkpoint.export",
      config=_CONFIG,
      environment={
        "JAX_NUM_CPU_DEVICES": "2",
        "SLURM_JOB_ID": str(number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
      },
    )
    for i in range(2)
  ]
  codes, errs = _end(processes)
  assert codes == [0, 0], errs
  return workdir


def _is_free(number):
  try:
    with socket.create_server(("", number % 2**12 + 2**16 - 2**12)):
      return True
  except OSError:
    return False


def _lines(workdir, split):
  return [x for x in job_lib.metrics(workdir) if x["split"] == split]


def test_two_processes_compute_what_one_does(job, whole, tmp_path):
  process = job.start(
    tmp_path,
    "--config.checkpoint.export",
    config=_CONFIG,
    environment={"JAX_NUM_CPU_DEVICES": "4"},
  )
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  for split in ("train", "valid"):
    got, want = _lines(whole, split), _lines(tmp_path, split)
    assert [x["step"] for x in got] == [x["step"] for x in want]
    # The same images on the same devices; only the order in which gradients
    # are summed differs, and what 40 steps make of that.
    np.testing.assert_allclose(
      [x["loss"] for x in got], [x["loss"] for x in want], rtol=1e-5
    )
  got, want = (job_lib.load(x, _STEPS) for x in (whole, tmp_path))
  assert got.keys() == want.keys()
  for name, x in want.items():
    if "params" in name:
      np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-5, err_msg=name)
  results = [
    json.loads((x / "result.json").read_text()) for x in (whole, tmp_path)
  ]
  assert results[0]["examples"] == results[1]["examples"] == 80
  sizes = {
    (x / "weights.safetensors").stat().st_size for x in (whole, tmp_path)
  }
  assert len(sizes) == 1


@pytest.mark.long
def test_every_interruption_of_one_process_ends_both_and_loses_nothing(
  job, whole, tmp_path
):
  processes = _start(job, tmp_path)
  job_lib.wait_for_step(processes[0], 6)
  processes[1].send_signal(signal.SIGTERM)
  codes, errs = _end(processes)
  assert codes == [75, 75], errs
  stopped = job_lib.saved_steps(tmp_path)[-1]
  for err in errs:
    assert f"Stopped by SIGTERM; saved at step {stopped} of" in err

  for victim, step in ((1, stopped + 5), (0, stopped + 13)):
    processes = _start(job, tmp_path)
    job_lib.wait_for_step(processes[0], step)
    processes[victim].kill()
    codes, errs = _end(processes)
    assert codes[victim] == -signal.SIGKILL
    # JAX ends a process that loses process 0, unless it is slower.
    assert codes[1 - victim] in (_LOST if victim == 0 else _LOST[:1]), errs
    if codes[1 - victim] == 76:
      assert "Start all processes again" in errs[1 - victim]

  codes, errs = _end(_start(job, tmp_path))
  assert codes == [0, 0], errs
  job_lib.assert_same_bits(
    job_lib.load(tmp_path, _STEPS), job_lib.load(whole, _STEPS)
  )
  assert _lines(tmp_path, "valid") == _lines(whole, "valid")


def test_processes_that_are_not_started_alike_say_so(job, tmp_path):
  only = {1: ["--config.optimizer.peak_lr=0.5"]}
  codes, errs = _end(_start(job, tmp_path, only=only))
  assert codes == [2, 2], errs
  for err in errs:
    assert "optimizer.peak_lr: 0.001 in process 0, 0.5 in process 1" in err
  assert not list(tmp_path.iterdir())


def test_a_coordinator_out_of_reach_is_an_error_in_time(job, tmp_path):
  code, out, err = job.run(
    tmp_path,
    f"--coordinator=localhost:{_free_port()}",
    "--num_processes=2",
    "--process_id=1",
    "--connect_seconds=1",
  )
  assert code == 76, err
  assert out == ""
  assert "cannot be reached" in err
  assert "Traceback" not in err


@pytest.mark.long
def test_an_error_of_one_process_ends_both_with_its_message(
  job, whole, tmp_path
):
  shutil.copytree(whole, tmp_path / "run")
  (tmp_path / "run" / "result.json").unlink()
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  # Process 0 writes the log, and may not write more than a kilobyte.
  limit = ("bash", "-c", 'ulimit -f 1 && exec "$@"', "limit")
  codes, errs = _end(_start(job, tmp_path / "run", prefix=limit))
  assert codes == [74, 74], errs
  assert "File too large" in errs[0]
  assert "error: Process 0: " in errs[1]
  assert "File too large" in errs[1]


@pytest.mark.long
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(
  job, whole, tmp_path
):
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  (run / "result.json").unlink()
  newest = job_lib.saved_steps(run)[-1]
  files = (run / "checkpoints" / str(newest) / "state").rglob("d/*")
  os.truncate(max(files, key=lambda path: path.stat().st_size), 1000)
  codes, errs = _end(_start(job, run, "--config.checkpoint.export"))
  assert codes == [0, 0], errs
  for err in errs:
    assert f"Skipped checkpoint {newest}: " in err
  assert (run / "checkpoints_damaged" / str(newest)).is_dir()
  job_lib.assert_same_bits(
    job_lib.load(run, _STEPS), job_lib.load(whole, _STEPS)
  )


@pytest.mark.long
def test_tokens_may_be_split_over_processes(job, tmp_path):
  config = (
    *job_lib.TINY,
    "--config.epochs=0.2",
    "--config.model.overrides.patch_size=4",
    "--config.model.overrides.stride=4",
  )
  code, _, err = job.run(tmp_path / "one", config=config)
  assert code == 0, err
  # Both processes load all images.
  split = (*config, "--config.mesh.sequence=4")
  codes, errs = _end(_start(job, tmp_path / "two", config=split))
  assert codes == [0, 0], errs
  losses = [
    [x["loss"] for x in job_lib.metrics(tmp_path / name)]
    for name in ("one", "two")
  ]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
