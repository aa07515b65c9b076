"""What happens to a run when something goes wrong: real processes, real limits.

The uninterrupted run is the measure: whatever happened, the run that is resumed
to the end must have its parameters, bit for bit, and its log.
"""

import fcntl
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from experiments.datasets import generated
from tests.experiments import job as job_lib


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
  """The folder of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  code, out, err = job.run(workdir, "--config.log.plots")
  assert code == 0, err
  last = out.splitlines()[-1]
  assert last.startswith("test accuracy: ")
  assert last.endswith("(80 images)")
  return workdir


@pytest.fixture(scope="module")
def half(job, tmp_path_factory):
  """The folder of a run with five checkpoints, stopped by SIGTERM halfway."""
  workdir = tmp_path_factory.mktemp("half")
  process = job.start(workdir, "--config.checkpoint.keep=5")
  job_lib.wait_for_step(process, 50)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 75, err
  assert "SIGTERM" in err
  assert len(job_lib.saved_steps(workdir)) >= 5
  return workdir


@pytest.fixture
def copy(half, tmp_path):
  """A copy of `half` that a test may damage."""
  shutil.copytree(half, tmp_path / "run")
  return tmp_path / "run"


def _assert_ends_like(workdir, whole):
  step = job_lib.TOTAL_STEPS
  job_lib.assert_same_bits(
    job_lib.load(workdir, step), job_lib.load(whole, step)
  )
  got, want = job_lib.metrics(workdir), job_lib.metrics(whole)
  key = lambda line: (line["step"], line["split"])
  assert [key(x) for x in got] == [key(x) for x in want]
  # Training lines are means that a restart cuts short; these are not.
  valid = lambda lines: [x for x in lines if x["split"] == "valid"]
  assert valid(got) == valid(want)
  result = lambda folder: {
    k: v
    for k, v in json.loads((folder / "result.json").read_text()).items()
    if k != "plots"
  }
  assert result(workdir) == result(whole)


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.long)])
def test_kill_9_at_random_times_loses_nothing(job, whole, tmp_path, times):
  rng = random.Random(times)
  often = "--config.checkpoint.every_epochs=0.2"
  # Two kills while the program starts, the others while it trains and saves.
  for delay in (rng.uniform(0, 2), rng.uniform(0, 4)):
    process = job.start(tmp_path, often)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  for step in sorted(rng.sample(range(2, job_lib.TOTAL_STEPS - 8), times)):
    process = job.start(tmp_path, often)
    job_lib.wait_for_step(process, step)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  code, out, err = job.run(tmp_path, often)
  assert code == 0, err
  assert "resumed" in out
  _assert_ends_like(tmp_path, whole)


@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_a_signal_saves_and_the_next_run_goes_on(job, whole, tmp_path, number):
  process = job.start(tmp_path)
  job_lib.wait_for_step(process, 7)
  process.send_signal(number)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 75
  assert "Traceback" not in err
  stopped = job_lib.saved_steps(tmp_path)[-1]
  assert f"{number.name}; saved at step {stopped} of" in err
  code, out, err = job.run(tmp_path)
  assert code == 0, err
  assert f"resumed {tmp_path} from step {stopped} " in out
  _assert_ends_like(tmp_path, whole)


def test_a_second_signal_ends_the_process_at_once(job, tmp_path):
  # Large steps: the two under way take longer than the signals do.
  process = job.start(
    tmp_path,
    "--config.data.image_size=256",
    "--config.batch_size=64",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_epochs=100.0",
  )
  job_lib.wait_for_step(process, 1)
  process.send_signal(signal.SIGINT)
  for line in process.stderr:
    if "once more to quit" in line:
      break
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGINT
  assert not (tmp_path / "checkpoints").exists()


def test_a_finished_run_is_not_trained_again(job, whole):
  before = job_lib.contents(whole)
  code, out, err = job.run(whole, "--config.log.plots")
  assert code == 0, err
  assert "step " not in out
  result = json.loads((whole / "result.json").read_text())
  want = f"test accuracy: {result['accuracy']:.4f} (80 images)"
  assert out.splitlines()[-1] == want
  for name in ("learning_curves.png", "predictions.png"):
    assert f"plot: {whole / name}" in out
    assert (whole / name).read_bytes().startswith(b"\x89PNG")
  after = job_lib.contents(whole)
  del before[".lock"], after[".lock"]
  assert after == before


def _message(err):
  """The one line for the user; Orbax's threads may log lines after it."""
  assert "Traceback" not in err
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1, err
  return lines[0]


def test_limited_file_size_stops_the_run_with_its_checkpoints_intact(
  job, whole, copy
):
  before = job_lib.contents(copy / "checkpoints")
  # 30 kB; a checkpoint's largest file is ten times that.
  limit = ("bash", "-c", 'ulimit -f 30 && exec "$@"', "limit")
  code, _, err = job.run(copy, "--config.checkpoint.keep=5", prefix=limit)
  assert code == 74, err
  assert "Could not write a checkpoint to" in _message(err)
  assert "disk full" in _message(err)
  after = job_lib.contents(copy / "checkpoints")
  assert after.items() >= before.items()
  code, _, err = job.run(copy, "--config.checkpoint.keep=5")
  assert code == 0, err
  _assert_ends_like(copy, whole)


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 3 MB, where this process may mount one."""
  disk = tmp_path / "disk"
  disk.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
  try:
    subprocess.run(command, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("may not mount a tmpfs")
  yield disk
  subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_stops_the_run_and_room_lets_it_go_on(job, whole, small_disk):
  workdir = small_disk / "run"
  code, _, err = job.run(workdir, "--config.checkpoint.keep=100")
  assert code == 74, err
  assert "disk" in _message(err)
  steps = job_lib.saved_steps(workdir)
  assert steps
  command = ["mount", "-o", "remount,size=60m", str(small_disk)]
  subprocess.run(command, check=True)
  code, out, err = job.run(workdir, "--config.checkpoint.keep=100")
  assert code == 0, err
  assert f"resumed {workdir} from step {steps[-1]} " in out
  _assert_ends_like(workdir, whole)


def _data_file(workdir, step):
  files = (workdir / "checkpoints" / str(step) / "state").rglob("d/*")
  return max(files, key=lambda path: path.stat().st_size)


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_damaged_checkpoints_are_passed_over_named_and_kept(job, whole, copy):
  *_, sound, cut, flipped, deleted = job_lib.saved_steps(copy)
  (copy / "checkpoints" / "99").mkdir()
  shutil.rmtree(copy / "checkpoints" / str(deleted) / "state")
  _flip_a_bit(_data_file(copy, flipped))
  os.truncate(_data_file(copy, cut), 1000)
  flipped_before = job_lib.contents(copy / "checkpoints" / str(flipped))

  code, out, err = job.run(copy, "--config.checkpoint.keep=5")
  assert code == 0, err
  assert f"resumed {copy} from step {sound} " in out
  for step in (99, deleted, flipped, cut):
    assert f"Skipped checkpoint {step}: " in err
    assert (copy / "checkpoints_damaged" / str(step)).is_dir()
  kept = job_lib.contents(copy / "checkpoints_damaged" / str(flipped))
  assert kept == flipped_before
  _assert_ends_like(copy, whole)


def test_without_a_sound_checkpoint_nothing_is_started_or_changed(job, copy):
  for step in job_lib.saved_steps(copy):
    _flip_a_bit(_data_file(copy, step))
  before = job_lib.contents(copy)
  code, _, err = job.run(copy, "--config.checkpoint.keep=5")
  assert code == 65
  assert "None of the checkpoints in" in err.splitlines()[-1]
  after = job_lib.contents(copy)
  del before[".lock"], after[".lock"]
  assert after == before


def test_a_damaged_best_checkpoint_is_said_and_the_last_one_evaluated(
  job, copy
):
  best = 40  # The last evaluation before `half` was stopped.
  last = job_lib.saved_steps(copy)[-1]
  _flip_a_bit(_data_file(copy, best))
  # Shorter than the run already is: nothing is left but the result.
  code, out, err = job.run(
    copy, "--config.checkpoint.keep=5", "--config.epochs=2.0"
  )
  assert code == 0, err
  assert f"Cannot read the best checkpoint, step {best}" in err
  result = json.loads((copy / "result.json").read_text())
  assert result["best_step"] == last
  assert out.splitlines()[-1].startswith("test accuracy: ")


def test_non_finite_loss_names_the_step_and_saves_nothing(job, whole, copy):
  before = job_lib.contents(copy / "checkpoints")
  last = job_lib.saved_steps(copy)[-1]
  code, _, err = job.run(
    copy, "--config.checkpoint.keep=5", "--config.optimizer.peak_lr=1e30"
  )
  assert code == 65
  assert f"Step {last + 1} is not finite" in err.splitlines()[-1]
  assert "optimizer.peak_lr changed from 0.001 to 1e+30" in err
  assert job_lib.contents(copy / "checkpoints") == before
  recorded = json.loads((copy / "config.json").read_text())
  assert recorded["changes"][-1]["field"] == "optimizer.peak_lr"
  # What went wrong has left no trace.
  code, _, err = job.run(copy, "--config.checkpoint.keep=5")
  assert code == 0, err
  _assert_ends_like(copy, whole)


def test_skipped_steps_change_nothing_until_there_are_too_many(job, copy):
  last = job_lib.saved_steps(copy)[-1]
  before = job_lib.load(copy, last)
  code, _, err = job.run(
    copy,
    "--config.checkpoint.keep=5",
    "--config.optimizer.peak_lr=1e30",
    "--config.non_finite=skip",
    "--config.max_skipped_steps=9",
  )
  assert code == 65
  for step in range(last + 1, last + 10):
    assert f"Skipped step {step}, which is not finite" in err
  assert f"Step {last + 10} is not finite" in err.splitlines()[-1]
  # The steps are counted and saved; all else is as it was.
  saved = job_lib.saved_steps(copy)[-1]
  assert last + 4 < saved < last + 10
  after = job_lib.load(copy, saved)
  (step,) = (name for name in after if name.endswith("'step']"))
  assert after.pop(step) == before.pop(step) + saved - last
  job_lib.assert_same_bits(after, before)


class _Damaged(generated.VimjaxGenerated, skip_registration=True):
  """The generated images, some of them cut off."""

  name = "vimjax_generated"

  def _generate_examples(self, split):
    for i, (key, record) in enumerate(super()._generate_examples(split)):
      if i % 100 == 7:  # 4 of the 320 training images, 1 of the others.
        record["image"] = record["image"][:100]
      yield key, record


@pytest.fixture(scope="module")
def damaged_data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("damaged")
  _Damaged(data_dir=folder, file_format="array_record").download_and_prepare()
  return f"--config.data.dir={folder}"


def test_corrupt_images_are_skipped_counted_and_reported(
  job, damaged_data, tmp_path
):
  workdir = tmp_path / "whole"
  arguments = (damaged_data, "--config.epochs=3.0")
  code, out, err = job.run(workdir, *arguments)
  assert code == 0, err
  lines = out.splitlines()
  # Each record once, although the second epoch met it again.
  assert "unreadable images skipped in train: 4" in lines
  assert "unreadable images skipped in validation: 1" in lines
  assert "unreadable images skipped in test: 1" in lines
  assert lines[-1].endswith("(79 images)")
  assert job_lib.metrics(workdir)[-2]["corrupt"] == 5

  # And the same over an interruption.
  process = job.start(tmp_path / "run", *arguments)
  job_lib.wait_for_step(process, 9)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=120)
  assert process.returncode == 75
  code, _, err = job.run(tmp_path / "run", *arguments)
  assert code == 0, err
  got, want = (
    json.loads((tmp_path / name / "result.json").read_text())
    for name in ("run", "whole")
  )
  assert got == want
  job_lib.assert_same_bits(
    job_lib.load(tmp_path / "run", 60), job_lib.load(workdir, 60)
  )


class _Shrunk(generated.VimjaxGenerated, skip_registration=True):
  """The generated images, without some of those of a split."""

  name = "vimjax_generated"
  split, images = "train", 300

  def _generate_examples(self, split):
    images = self.images if split == self.split else None
    yield from itertools.islice(super()._generate_examples(split), images)


class _ShrunkValidation(_Shrunk, skip_registration=True):
  name = "vimjax_generated"
  split, images = "validation", 70


@pytest.mark.parametrize(
  ("builder", "then"), [(_Shrunk, 320), (_ShrunkValidation, 80)]
)
def test_a_data_set_that_shrank_is_refused_until_it_is_whole(
  job, whole, copy, tmp_path, builder, then
):
  builder(
    data_dir=tmp_path / "shrunk", file_format="array_record"
  ).download_and_prepare()
  before = job_lib.contents(copy)
  code, _, err = job.run(
    copy,
    "--config.checkpoint.keep=5",
    f"--config.data.dir={tmp_path / 'shrunk'}",
  )
  assert code == 78
  said = f"'generated' ({builder.split}) had {then} images"
  assert said in _message(err)
  assert f"has {builder.images} now" in _message(err)
  after = job_lib.contents(copy)
  del before[".lock"], after[".lock"]
  assert after == before
  if builder is _Shrunk:
    code, _, err = job.run(copy, "--config.checkpoint.keep=5")
    assert code == 0, err
    _assert_ends_like(copy, whole)


def test_a_split_that_is_not_there_is_noticed_before_the_training(
  job, tmp_path
):
  code, out, err = job.run(tmp_path, "--config.data.test_split=tset")
  assert code == 2
  assert "tset" in _message(err)
  assert "step" not in out
  assert "Traceback" not in err


def test_too_many_corrupt_images_stop_the_run(job, damaged_data, tmp_path):
  code, _, err = job.run(tmp_path, damaged_data, "--config.data.max_corrupt=2")
  assert code == 65
  last = err.splitlines()[-1]
  assert "3 images are unreadable" in last
  assert "max_corrupt=2" in last


@pytest.mark.parametrize("folder", ["/proc/run", "{file}/run"])
def test_unusable_workdir_is_named(job, tmp_path, folder):
  (tmp_path / "file").write_text("")
  workdir = folder.format(file=tmp_path / "file")
  code, out, err = job.run(pathlib.Path(workdir))
  assert code == 73
  assert out == ""
  assert f"Cannot use --workdir {workdir}: " in err
  assert "Traceback" not in err


def test_two_runs_do_not_share_a_workdir(job, tmp_path):
  with open(tmp_path / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write("1234\n")
    lock.flush()
    code, _, err = job.run(tmp_path)
  assert code == 73
  assert f"Another run (process 1234) is writing to {tmp_path}" in err


def test_another_configuration_is_refused_field_by_field(job, copy):
  before = job_lib.contents(copy)
  code, _, err = job.run(
    copy,
    "--config.seed=7",
    "--config.model.overrides.depth=2",
    "--config.model.overrides.drop_path_rate=0.1",
  )
  assert code == 78
  assert "config.seed: 0 then, 7 now" in err
  assert "config.model.overrides.depth: 1 then, 2 now" in err
  assert "drop_path_rate" not in err
  after = job_lib.contents(copy)
  del before[".lock"], after[".lock"]
  assert after == before


def test_missing_data_says_how_to_get_it(job, tmp_path):
  code, _, err = job.run(
    tmp_path / "run",
    f"--config.data.dir={tmp_path}",
    config=["--config", "vim_tiny"],
  )
  assert code == 66
  assert str(tmp_path) in err
  assert "prepare_imagenet" in err
  assert "make demo" in err
  assert "Traceback" not in err


def test_the_uninterrupted_run_learns(whole):
  train, valid = (
    [x for x in job_lib.metrics(whole) if x["split"] == split]
    for split in ("train", "valid")
  )
  losses = np.array([x["loss"] for x in train])
  assert np.isfinite(losses).all()
  assert losses[-5:].mean() < losses[:5].mean()
  # Augmentation keeps the training loss up; these images are as they are.
  assert valid[-1]["loss"] < valid[0]["loss"] - 0.2
  assert valid[-1]["accuracy"] > 0.4  # Ten classes.
