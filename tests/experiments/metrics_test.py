"""What can be seen of a run: speed, memory, images, Weights & Biases."""

import json
import os
import sys
import textwrap
import time
import types

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboardX import proto

from experiments.imagenet import (
  checks,
  errors,
  memory,
  metrics,
  rundir,
  wandb_log,
)
from experiments.imagenet.configs import _base
from tests.experiments import job as job_lib

_VALUES = {"loss": 0.5, "accuracy": 0.25}


class _Clock:
  """A `time.monotonic` that a test moves."""

  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: self.now)


class TestProgress:
  def _progress(self, total=1000, step=0):
    return metrics.Progress(
      step=step, total=total, batch_size=8, progress_bar=False
    )

  def test_speed_and_the_share_of_waiting_are_of_the_time_since_the_last_line(
    self, monkeypatch, capsys
  ):
    clock = _Clock(monkeypatch)
    progress = self._progress()
    for waited, worked in ((1.0, 3.0), (0.0, 2.0)):
      with progress.waiting():
        clock.now += waited
      clock.now += worked
      got = progress.update(progress._step + 10, _VALUES)
    assert got["images_per_second"] == 10 * 8 / 2
    assert got["input_wait"] == 0.0
    first, second = capsys.readouterr().out.splitlines()
    assert "  20 images/s  input wait 25%  " in first
    assert "  40 images/s  input wait 0%  " in second

  def test_time_left_leaves_compiling_out_and_evaluations_in(self, monkeypatch):
    clock = _Clock(monkeypatch)
    progress = self._progress()
    clock.now += 500  # Compiles.
    assert progress.update(10, _VALUES)["seconds_left"] == 990 * 50
    clock.now += 20
    assert progress.update(20, _VALUES)["seconds_left"] == 980 * 2
    clock.now += 5
    with progress.paused():
      clock.now += 90
    clock.now += 5
    # 30 steps in 30 seconds after the first ten, and 90 seconds beside.
    got = progress.update(30, _VALUES)
    assert got["images_per_second"] == 8.0
    assert got["seconds_left"] == pytest.approx(970 * (30 / 20 + 90 / 30))

  def test_a_resumed_run_counts_from_where_it_began(self, monkeypatch):
    clock = _Clock(monkeypatch)
    progress = self._progress(step=990)
    clock.now += 8
    got = progress.update(992, _VALUES)
    assert (got["images_per_second"], got["seconds_left"]) == (2.0, 32.0)


class TestMemory:
  def _with(self, monkeypatch, platform, *counted):
    devices = [
      types.SimpleNamespace(platform=platform, memory_stats=lambda c=c: c)
      for c in counted
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    return memory.usage()

  def test_a_process_on_cpus_says_what_is_resident(self):
    before = memory.usage()
    assert before.keys() == {"process_memory"}
    block = np.ones(2**27, np.uint8)
    grown = memory.usage()["process_memory"] - before["process_memory"]
    assert 0.9 * block.nbytes < grown < 2 * block.nbytes

  def test_devices_that_count_say_their_peak(self, monkeypatch):
    counted = [{"peak_bytes_in_use": n, "bytes_in_use": 1} for n in (5, 9)]
    got = self._with(monkeypatch, "gpu", *counted)
    assert got == {"peak_device_memory": 9}

  @pytest.mark.parametrize("counted", [None, {}, {"bytes_in_use": 1}])
  def test_nothing_is_made_up(self, monkeypatch, counted):
    assert self._with(monkeypatch, "tpu", counted) == {}


def _events(folder):
  """TFRecords: length, its checksum, data, its checksum."""
  for path in sorted((folder / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      n = int.from_bytes(data[at : at + 8], "little")
      yield proto.event_pb2.Event.FromString(data[at + 12 : at + 12 + n])
      at += 12 + n + 4


def test_tensorboard_shows_the_configuration_and_images(tmp_path):
  images = np.arange(6, dtype=np.uint8).repeat(4 * 5 * 3).reshape(6, 4, 5, 3)
  writer = metrics.Writer(tmp_path, start_step=0, tensorboard=True)
  writer.text(0, "config", '{\n  "seed": 1\n}')
  writer.images(0, "train/images", images)
  writer.close()
  values = {v.tag: v for e in _events(tmp_path) for v in e.summary.value}
  text = values["config/text_summary"].tensor.string_val[0].decode()
  assert textwrap.dedent(text) == '{\n  "seed": 1\n}'
  shown = values["train/images"].image
  assert (shown.height, shown.width) == (2 * 4, 3 * 5)
  (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
  with Image.open(tmp_path / "shown.png") as image:
    pixels = np.asarray(image)
  # Row by row, and not a pixel of one in another.
  np.testing.assert_array_equal(pixels[::4, ::5, 0], [[0, 1, 2], [3, 4, 5]])
  np.testing.assert_array_equal(pixels[4:, 10:], images[5])


# As much of the package as is used, and what it was given.
_WANDB = """
import json, os, pathlib

LOG = pathlib.Path(os.environ["FAKE_WANDB_LOG"])

def _add(**what):
  with LOG.open("a") as file:
    file.write(json.dumps(what) + "\\n")

class Image:
  def __init__(self, pixels):
    self.shape = pixels.shape

class Run:
  logged = 0

  def define_metric(self, name, step_metric=None):
    _add(metric=name, by=step_metric)

  def log(self, values):
    self.logged += 1
    if self.logged > int(os.environ.get("FAKE_WANDB_LAST", 1000)):
      raise ConnectionError("no route to host")
    _add(values={k: getattr(v, "shape", v) for k, v in values.items()})

  def finish(self, exit_code):
    _add(exit_code=exit_code)

def init(**settings):
  if os.environ.get("FAKE_WANDB_LAST") == "-1":
    raise ConnectionError("no route to host")
  _add(init=settings, mode=os.environ.get("WANDB_MODE"))
  return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Puts a package `wandb` on the path; returns a reader of its log."""
  (tmp_path / "fake").mkdir()
  (tmp_path / "fake" / "wandb.py").write_text(_WANDB)
  log = tmp_path / "fake" / "log"
  monkeypatch.setenv("FAKE_WANDB_LOG", str(log))
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.delenv("WANDB_NAME", raising=False)
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  monkeypatch.syspath_prepend(str(tmp_path / "fake"))
  yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
  sys.modules.pop("wandb", None)


class TestWandb:
  def _writer(self, folder, step=0):
    folder.mkdir(exist_ok=True)
    log = wandb_log.WandbLog(folder, "mine", {"seed": 3})
    return metrics.Writer(folder, start_step=step, tensorboard=False, wandb=log)

  def test_it_gets_every_line_and_keeps_its_identity(self, fake, tmp_path):
    folder = tmp_path / "run"
    with self._writer(folder) as writer:
      writer.images(0, "train/images", np.zeros((2, 4, 4, 3), np.uint8))
      writer.write(1, "train", {"loss": 0.5})
      writer.write(2, "valid", {"loss": 0.25})
    with pytest.raises(KeyError), self._writer(folder, step=2) as writer:
      writer.write(2, "valid", {"loss": 0.25})  # There already.
      writer.write(3, "train", {"loss": 0.125})
      raise KeyError
    first, second = (x for x in fake() if "init" in x)
    identity = json.loads((folder / "wandb.json").read_text())["id"]
    assert first["init"] == {
      "project": "mine",
      "id": identity,
      "name": "run",
      "resume": "allow",
      "dir": str(folder),
      "config": {"seed": 3},
    }
    assert second == first
    assert first["mode"] == "offline"  # The user's.
    assert {"metric": "*", "by": "step"} in fake()
    assert [x["values"] for x in fake() if "values" in x] == [
      {"step": 0, "train/images": [4, 8, 3]},
      {"step": 1, "train/loss": 0.5},
      {"step": 2, "valid/loss": 0.25},
      {"step": 3, "train/loss": 0.125},
    ]
    assert [x["exit_code"] for x in fake() if "exit_code" in x] == [0, 1]

  @pytest.mark.parametrize(("last", "sent"), [(-1, 0), (0, 0), (2, 2)])
  def test_its_failures_are_said_once_and_the_run_goes_on(
    self, fake, tmp_path, monkeypatch, caplog, last, sent
  ):
    monkeypatch.setenv("FAKE_WANDB_LAST", str(last))
    (tmp_path / "fake" / "log").touch()
    with self._writer(tmp_path / "run") as writer:
      for step in range(5):
        writer.write(step, "train", {"loss": 0.5})
    assert len([x for x in fake() if "values" in x]) == sent
    assert len(metrics.read(tmp_path / "run")) == 5
    (said,) = [x for x in caplog.messages if "Weights & Biases" in x]
    assert "ConnectionError: no route to host" in said

  def test_a_missing_package_is_answered_with_its_extra(self, monkeypatch):
    config = _base.get_config()
    checks.check_config(config)
    config.log.wandb = "mine"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(errors.MissingPackageError) as caught:
      checks.check_config(config)
    assert "config.log.wandb='mine'" in str(caught.value)
    assert "pip install 'vimjax[wandb]'" in str(caught.value)
    assert caught.value.exit_code == errors.ExitCode.UNAVAILABLE

  @pytest.mark.long
  def test_a_whole_run_with_a_failure_on_the_way(
    self, fake, job, tmp_path, monkeypatch
  ):
    monkeypatch.setenv("FAKE_WANDB_LAST", "3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    folder = tmp_path / "run"
    arguments = ("--config.epochs=1.0", "--config.log.wandb=mine")
    code, out, err = job.run(folder, *arguments)
    assert code == 0, err
    assert err.count("no route to host") == 1
    assert "Traceback" not in err
    assert out.splitlines()[-1].startswith("test accuracy: ")
    start = fake()[0]
    assert start["init"]["config"]["batch_size"] == 16
    sent = [x["values"] for x in fake() if "values" in x]
    assert [x["step"] for x in sent] == [0, 2, 4]
    assert sent[0]["train/images"] == [4 * 32, 4 * 32, 3]

    # And what the run says of itself.
    lines = job_lib.metrics(folder)
    train = [x for x in lines if x["split"] == "train"]
    for line in train:
      assert 0 <= line["input_wait"] <= 1
      assert line["images_per_second"] > 0
      assert line["process_memory"] > 2**26
    assert train[-1]["seconds_left"] == 0
    values = [v for e in _events(folder) for v in e.summary.value]
    tags = {v.tag for v in values}
    wanted = {f"train/{k}" for k in train[0]} - {"train/step", "train/split"}
    assert tags >= wanted | {"valid/loss", "valid/accuracy"}
    assert {"config/text_summary", "train/images"} <= tags
    (text,) = [v for v in values if v.tag == "config/text_summary"]
    config = json.loads(textwrap.dedent(text.tensor.string_val[0].decode()))
    assert config == json.loads((folder / rundir.CONFIG).read_text())
    assert os.path.exists(folder / wandb_log.IDENTITY)
