"""The compiled steps and the bookkeeping around them, without processes."""

import datetime
import json
import math
import os
import pty
import select
import sys
import termios
import time
import types

import chex
from flax import linen as nn
import jax
from jax.sharding import AxisType
import numpy as np
import optax
import pytest
from tensorboardX import proto

from experiments.imagenet import (
  checks,
  errors,
  metrics,
  optimizer,
  rundir,
  sharding,
  steps,
)
from experiments.imagenet import corrupt as corrupt_lib
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet import window as window_lib
from experiments.imagenet.configs import _base

_SIZE, _CLASSES = 8, 4


class _Linear(nn.Module):
  """Logits that are linear in the pixels, with optional noise in training."""

  noise: float = 0.0

  @nn.compact
  def __call__(self, images, *, train=False):
    x = images.reshape(len(images), -1)
    if train and self.noise:
      x += self.noise * jax.random.normal(self.make_rng("drop_path"), x.shape)
    return nn.Dense(_CLASSES, name="head")(x)


def _config(**changes):
  c = _base.get_config()
  _base.smoke(c)
  c.data.image_size = _SIZE
  c.model.overrides.num_classes = _CLASSES
  c.optimizer.schedule = "constant"
  c.optimizer.warmup_epochs = 0.0
  c.update_from_flattened_dict(changes)
  return c


def _mesh(devices=1):
  return jax.make_mesh(
    (devices,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


def _batch(b=8, size=_SIZE, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (b, size, size, 3), np.uint8),
    "label": rng.integers(0, _CLASSES, b).astype(np.int32),
  }


def _trainer(model, config, mesh):
  schedule = optimizer.make_schedule(config, 10)
  tx = optimizer.make_optimizer(config, schedule)
  with jax.set_mesh(mesh):
    state = state_lib.make_state(model, tx, config, mesh)
  return state, steps.make_train_step(model, tx, schedule, config, mesh)


def _run(model, config, mesh, batches):
  """State and metrics after one step on each batch."""
  state, train_step = _trainer(model, config, mesh)
  numbers = None
  with jax.set_mesh(mesh):
    for batch in batches:
      on_device = steps.put_batch(batch, config, mesh)
      state, numbers = train_step(state, on_device)
  return jax.device_get((state, numbers))


class TestTrainStep:
  def test_loss_is_the_smoothed_cross_entropy_of_normalised_pixels(self):
    config, mesh, batch = _config(), _mesh(), _batch()
    state, _ = _trainer(_Linear(), config, mesh)
    head = jax.device_get(state.params["head"])
    _, got = _run(_Linear(), config, mesh, [batch])

    mean, std = np.array(config.data.mean), np.array(config.data.std)
    x = ((batch["image"] / 255 - mean) / std).reshape(8, -1)
    logits = x @ head["kernel"].astype(np.float64) + head["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((8, _CLASSES), 0.1 / _CLASSES)
    target[np.arange(8), batch["label"]] += 0.9
    np.testing.assert_allclose(
      got["loss"], -(target * log_p).sum(-1).mean(), rtol=1e-5
    )
    right = (logits.argmax(-1) == batch["label"]).mean()
    np.testing.assert_allclose(got["accuracy"], right, rtol=1e-6)
    np.testing.assert_allclose(got["lr"], 1e-3, rtol=1e-6)
    assert got["finite"]

  def test_average_moves_towards_the_new_parameters(self):
    config, mesh = _config(ema_decay=0.75), _mesh()
    start = jax.device_get(_trainer(_Linear(), config, mesh)[0])
    chex.assert_trees_all_equal(start.ema_params, start.params)
    state, _ = _run(_Linear(), config, mesh, [_batch()])
    want = jax.tree.map(
      lambda old, new: 0.75 * old + 0.25 * new, start.params, state.params
    )
    chex.assert_trees_all_close(state.ema_params, want, rtol=1e-6, atol=1e-8)

  def test_no_average_is_kept_with_decay_0(self):
    state, _ = _run(_Linear(), _config(ema_decay=0.0), _mesh(), [_batch()])
    assert state.ema_params is None

  def test_noise_depends_on_seed_and_step_alone(self):
    mesh, model = _mesh(), _Linear(noise=1.0)
    losses = []
    for seed in (0, 1):
      # A rate of 0: the two steps differ in nothing but their noise.
      config = _config(**{"seed": seed, "optimizer.peak_lr": 0.0})
      first, train_step = _trainer(model, config, mesh)
      batch = steps.put_batch(_batch(), config, mesh)
      for _ in range(2):
        state = jax.tree.map(lambda x: x.copy(), first)
        for _ in range(2):
          state, numbers = train_step(state, batch)
          losses.append(float(numbers["loss"]))
    assert losses[:2] == losses[2:4]
    assert losses[4:6] == losses[6:]
    assert len(set(losses)) == 4

  @pytest.mark.parametrize("rate", [1e30, float("nan")])
  def test_a_step_that_destroys_the_parameters_is_not_finite(self, rate):
    config = _config(**{"optimizer.peak_lr": rate})
    _, numbers = _run(_Linear(), config, _mesh(), [_batch()])
    assert np.isfinite(numbers["loss"])
    assert not numbers["finite"]

  def test_clipping_changes_the_step_but_not_the_reported_norm(self):
    (free, a), (clipped, b) = (
      _run(
        _Linear(), _config(**{"optimizer.clip_norm": c}), _mesh(), [_batch()]
      )
      for c in (0.0, 0.01)
    )
    assert a["grad_norm"] == b["grad_norm"] > 0.01
    # The first moment is a tenth of the first gradient.
    norm = lambda state: float(
      optax.tree.norm(optax.tree.get(state.opt_state, "mu"))
    )
    np.testing.assert_allclose(norm(clipped), 0.1 * 0.01, rtol=1e-4)
    np.testing.assert_allclose(norm(free), 0.1 * a["grad_norm"], rtol=1e-4)


def _vim_config(**changes):
  return _config(
    **{
      "data.image_size": 32,
      "model.overrides.patch_size": 8,
      "model.overrides.stride": 8,
      "model.overrides.embed_dim": 32,
      "model.overrides.depth": 1,
      "batch_size": 16,
      **changes,
    }
  )


_VIM_BATCHES = [_batch(16, 32, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def one_device():
  """State and metrics of a small Vim after three steps on one device."""
  config = _vim_config()
  return _run(run_lib.make_model(config), config, _mesh(), _VIM_BATCHES)


class TestOnAMesh:
  @pytest.mark.parametrize("scan_layers", [False, True])
  def test_train_step_of_vim_gathers_nothing_over_8_devices(self, scan_layers):
    config = _vim_config(
      **{
        "model.overrides.scan_layers": scan_layers,
        "model.overrides.depth": 2 if scan_layers else 1,
        "model.overrides.drop_path_rate": 0.1,
      }
    )
    mesh = sharding.make_mesh()
    assert mesh.shape == {"data": 8}
    with jax.set_mesh(mesh):
      state, train_step = _trainer(run_lib.make_model(config), config, mesh)
      batch = steps.put_batch(_batch(16, 32), config, mesh)
      text = train_step.lower(state, batch).compile().as_text()
    assert "all-reduce" in text  # The gradients, so the mesh was used.
    for collective in ("all-gather", "all-to-all", "collective-permute"):
      assert collective not in text

  def test_8_devices_compute_what_one_does(self, one_device):
    config = _vim_config()
    model = run_lib.make_model(config)
    state, numbers = _run(model, config, _mesh(8), _VIM_BATCHES)
    want_state, want_numbers = one_device
    np.testing.assert_allclose(numbers["loss"], want_numbers["loss"], rtol=1e-5)
    # Adam divides by the gradient's size, so rounding shows as a share of the
    # rate of 1e-3, not of the parameter.
    chex.assert_trees_all_close(state.params, want_state.params, atol=1e-4)

  def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters(
    self, one_device
  ):
    config = _vim_config(**{"model.overrides.dtype": "bfloat16"})
    model = run_lib.make_model(config)
    state, numbers = _run(model, config, _mesh(), _VIM_BATCHES)
    chex.assert_tree_all_finite(state.params)
    dtypes = {x.dtype for x in jax.tree.leaves(state.params)}
    assert dtypes == {np.dtype("float32")}
    want = one_device[1]["loss"]
    # 8 bits of mantissa: 2**-8 relative.
    np.testing.assert_allclose(numbers["loss"], want, rtol=2**-8)
    assert numbers["loss"] != want


class TestEvaluation:
  def test_masked_images_do_not_count_and_all_others_count_once(self):
    config, mesh = _config(), _mesh(8)
    state, _ = _trainer(_Linear(), config, mesh)
    eval_step = steps.make_eval_step(_Linear(), config, mesh)
    batches = [_batch(16, seed=1), _batch(16, seed=2)]
    masks = [np.ones(16, bool), np.arange(16) < 5]
    want = []
    for batch, mask in zip(batches, masks, strict=True):
      batch["mask"] = mask
      for i in np.flatnonzero(mask):
        one = {k: v[i : i + 1].repeat(8, 0) for k, v in batch.items()}
        with jax.set_mesh(mesh):
          on_device = steps.put_batch(one, config, mesh)
          out = jax.device_get(eval_step(state.variables(), on_device))
        assert out["count"] == 8
        want.append((out["loss"] / 8, out["correct"] / 8))
    with jax.set_mesh(mesh):
      got = steps.evaluate(
        eval_step,
        state.variables(),
        (steps.put_batch(batch, config, mesh) for batch in batches),
      )
    assert got["examples"] == 21
    loss, accuracy = np.mean(want, axis=0)
    np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(got["accuracy"], accuracy, rtol=1e-6)

  def test_a_split_without_readable_images_is_an_error(self):
    with pytest.raises(ValueError, match="no readable image"):
      steps.evaluate(lambda variables, batch: {}, {}, iter(()))


class TestWrongBatches:
  @pytest.mark.parametrize(
    ("name", "value", "message"),
    [
      ("image", np.zeros((8, 8, 8, 3), np.float32), "uint8.*got float32"),
      ("image", np.zeros((8, 9, 9, 3), np.uint8), r"got .*\(8, 9, 9, 3\)"),
      ("image", np.zeros((8, 3, 8, 8), np.uint8), r"got .*\(8, 3, 8, 8\)"),
      ("image", np.zeros((7, 8, 8, 3), np.uint8), r"got .*\(7, 8, 8, 3\)"),
      ("label", np.zeros(8, np.int64), "int32.*got int64"),
      ("label", np.zeros((8, 1), np.int32), r"got int32 .*\(8, 1\)"),
      ("label", np.full(8, _CLASSES, np.int32), "num_classes=4"),
      ("label", np.full(8, -1, np.int32), "got -1 to -1"),
      ("mask", np.ones(8, np.int32), "bool.*got int32"),
    ],
  )
  def test_what_is_wrong_is_named(self, name, value, message):
    batch = _batch() | {name: value}
    with pytest.raises(ValueError, match=message):
      steps.put_batch(batch, _config(), _mesh())


class TestConfigChecks:
  @pytest.mark.parametrize(
    ("field", "value", "message"),
    [
      ("batch_size", 12, "batch_size=12 must be a multiple of the 8 devices "),
      ("batch_size", 0, "batch_size=0 must be positive"),
      ("eval_batch_size", 12, "eval_batch_size=12 must be a multiple"),
      ("epochs", 0.0, "epochs=0.0 must be positive"),
      ("ema_decay", 1.0, "ema_decay=1.0"),
      ("eval_weights", "best", "'model' or 'ema'"),
      ("non_finite", "ignore", "'stop' or 'skip'"),
      ("accumulation_steps", 3, "accumulation_steps=3 must be positive, and"),
      ("mixup.group_size", 6, "even and a divisor of batch_size"),
      ("mesa.weight", -1.0, "mesa.weight=-1.0"),
      ("data.valid_split", "", "data.valid_split='' must be given"),
      ("model.overrides.dtype", "float64", "one of ['bfloat16', 'float32']"),
      ("log.every_steps", 0, "every_steps=0 must be >= 1"),
      ("checkpoint.keep", 0, "keep=0 must be >= 1"),
      ("checkpoint.every_epochs", -2.0, "every_epochs=-2.0 must be positive"),
      ("eval_every_epochs", 0.0, "eval_every_epochs=0.0 must be positive"),
      ("label_smoothing", 2.0, "label_smoothing=2.0 must be in [0, 1)"),
      ("data.crop_fraction", 0.0, "crop_fraction=0.0 must be in (0, 1]"),
      ("data.crop_mode", "middle", "'middle' must be 'center' or 'squash'"),
      ("data.crop_area", (0.0, 1.0), "two shares in (0, 1], the smaller"),
      ("data.crop_area", (0.5, 2.0), "two shares in (0, 1], the smaller"),
      ("data.crop_ratio", (2.0, 1.0), "two positive numbers, the smaller"),
      ("data.std", (0.2, 0.0, 0.2), "must be three positive numbers"),
      ("data.workers", -1, "workers=-1 must be 0 or more"),
      ("data.max_corrupt", -1, "max_corrupt=-1 must be 0 or more"),
      ("mixup.mixup_alpha", -1.0, "mixup_alpha=-1.0 must be 0 or more"),
      ("mixup.probability", 2.0, "probability=2.0 must be in [0, 1]"),
      ("mesa.temperature", 0.0, "temperature=0.0 must be positive"),
      ("optimizer.layer_decay", 0.0, "layer_decay=0.0 must be in (0, 1]"),
      ("optimizer.peak_lr", math.nan, "peak_lr=nan must be a finite number"),
    ],
  )
  def test_impossible_values_are_named(self, field, value, message):
    checks.check_config(_config())
    with pytest.raises(errors.ConfigError) as error:
      checks.check_config(_config(**{field: value}))
    assert f"config.{field}" in str(error.value)
    assert message in str(error.value)

  def test_evaluating_the_average_needs_one(self):
    config = _config(eval_weights="ema", ema_decay=0.0)
    with pytest.raises(errors.ConfigError, match="eval_weights='ema'"):
      checks.check_config(config)

  def test_plan_rounds_epochs_to_steps_and_never_to_none(self):
    config = _config(
      **{
        "epochs": 2.5,
        "eval_every_epochs": 0.01,
        "checkpoint.every_epochs": 0.5,
      }
    )
    plan = run_lib.make_plan(config, 10)
    assert (plan.total_steps, plan.eval_every, plan.checkpoint_every) == (
      25,
      1,
      5,
    )
    assert [s for s in range(26) if plan.saves(s)] == [0, 5, 10, 15, 20, 25]
    assert not plan.evaluates(0)
    assert plan.evaluates(25)


class TestRecordedConfig:
  def test_free_fields_may_change_and_are_kept(self, tmp_path):
    rundir.record_config(tmp_path, _config(), step=0, changed={})
    now = _config(**{"epochs": 9.0, "model.overrides.dtype": "bfloat16"})
    changed = rundir.compare_config(tmp_path, now)
    assert changed == {
      "epochs": (4.0, 9.0),
      "model.overrides.dtype": ("float32", "bfloat16"),
    }
    rundir.record_config(tmp_path, now, step=7, changed=changed)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["config"]["epochs"] == 9.0
    assert recorded["changes"][0] == {
      "step": 7,
      "field": "epochs",
      "from": 4.0,
      "to": 9.0,
    }
    assert recorded["versions"]["jax"] == jax.__version__
    assert rundir.compare_config(tmp_path, now) == {}

  def test_every_session_says_what_it_was_computed_with(
    self, tmp_path, monkeypatch, caplog
  ):
    licence = {"path": "a.pth", "license": "Apache-2.0", "sha256": "0"}
    record = lambda step: rundir.record_config(
      tmp_path, _config(), step=step, changed={}, initial=licence
    )
    record(0)
    then = rundir.environment()
    assert then["devices"] == ["8 x cpu"]
    assert then["versions"].keys() >= {"python", "vimjax", "jax", "optax"}
    record(4)
    assert not caplog.messages
    later = then | {
      "git_revision": "0123abcd",
      "versions": then["versions"] | {"jax": "9.0"},
    }
    monkeypatch.setattr(rundir, "environment", lambda: later)
    record(9)
    recorded = json.loads((tmp_path / rundir.CONFIG).read_text())
    sessions = recorded["sessions"]
    assert [x["step"] for x in sessions] == [0, 4, 9]
    for session, wanted in zip(sessions, (then, then, later), strict=True):
      started = datetime.datetime.fromisoformat(session["started"])
      age = datetime.datetime.now(datetime.UTC) - started
      assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=10)
      assert session == wanted | {k: session[k] for k in ("step", "started")}
    assert {k: recorded[k] for k in later} == later
    assert recorded["initial_weights"] == licence
    assert len(caplog.messages) == 2
    assert "git_revision was" in caplog.text
    assert f"versions.jax was '{jax.__version__}' and is '9.0'" in caplog.text

  @pytest.mark.parametrize(
    "field",
    [
      *("seed", "batch_size", "data.name", "data.image_size"),
      "model.overrides.depth",
    ],
  )
  def test_fields_that_checkpoints_depend_on_may_not(self, tmp_path, field):
    rundir.record_config(tmp_path, _config(), step=0, changed={})
    value = "digits" if field == "data.name" else 16
    with pytest.raises(errors.ConflictError, match=f"config.{field}: "):
      rundir.compare_config(tmp_path, _config(**{field: value}))


class TestMetrics:
  def test_lines_beyond_the_restored_step_and_torn_ones_are_dropped(
    self, tmp_path
  ):
    writer = metrics.Writer(tmp_path, start_step=0, tensorboard=False)
    for step in (1, 2, 3):
      writer.write(step, "train", {"loss": 1 / step})
    writer.write(2, "valid", {"loss": 9.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
      file.write('{"step": 4, "spl')

    writer = metrics.Writer(tmp_path, start_step=2, tensorboard=False)
    writer.write(2, "valid", {"loss": 9.0})  # There already.
    writer.write(3, "train", {"loss": 7.0})
    writer.close()
    assert metrics.read(tmp_path) == [
      {"step": 1, "split": "train", "loss": 1.0},
      {"step": 2, "split": "train", "loss": 0.5},
      {"step": 2, "split": "valid", "loss": 9.0},
      {"step": 3, "split": "train", "loss": 7.0},
    ]

  def test_damaged_lines_are_named_and_left_out(self, tmp_path, caplog):
    good = '{"step": 1, "split": "train", "loss": 1.0}\n'
    # What a crash of the machine may leave, and what is none of ours.
    damaged = b"\0" * 40 + b"\n" + b'{"step": 2, "sp\xff\n' + b"3\n{}\n"
    (tmp_path / "metrics.jsonl").write_bytes(
      good.encode() + damaged + good.replace("1", "3").encode()
    )
    with metrics.Writer(tmp_path, start_step=9, tensorboard=False):
      pass
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == good + good.replace("1", "3")
    for number in (2, 3, 4, 5):
      assert f"Ignored line {number} of {tmp_path}" in caplog.text
    assert len(caplog.messages) == 4

  def test_tensorboard_gets_every_number_and_the_step_of_a_restart(
    self, tmp_path
  ):
    for start in (0, 2):
      writer = metrics.Writer(tmp_path, start_step=start, tensorboard=True)
      writer.write(start + 1, "train", {"loss": 0.5, "lr": 0.25})
      writer.close()
    events = [e for f in _event_files(tmp_path) for e in _read_events(f)]
    values = [
      (e.step, v.tag, v.simple_value) for e in events for v in e.summary.value
    ]
    assert sorted(values) == [
      (1, "train/loss", 0.5),
      (1, "train/lr", 0.25),
      (3, "train/loss", 0.5),
      (3, "train/lr", 0.25),
    ]
    restarts = [e.step for e in events if e.HasField("session_log")]
    assert restarts == [3]


class _Lines:
  """Stands for the writer and the progress bar."""

  def __init__(self):
    self.lines = []

  def write(self, step, split, values):
    self.lines.append((step, values))

  def update(self, step, values):
    return {"seconds_left": 0.0}

  def check(self):
    pass

  def saved_steps(self):
    return [1]


class TestNonFiniteSteps:
  def _read(self, finite, **changes):
    """The lines of a log every two steps, of steps that are finite or not."""
    lines = _Lines()
    config = _config(**{"log.every_steps": 2, **changes})
    run = types.SimpleNamespace(
      config=config, plan=run_lib.Plan(10, 10, 10, 10), checkpoints=lines
    )
    corrupt = corrupt_lib.Corrupt(0, {})
    window = window_lib.Window(run, lines, lines, corrupt)
    for step, good in enumerate(finite, start=1):
      numbers = {"loss": step if good else np.nan, "lr": 0.1, "finite": good}
      window.add(step, {k: np.asarray(v) for k, v in numbers.items()})
    window.drain()
    return lines.lines

  def test_they_end_the_run(self):
    with pytest.raises(errors.NonFiniteError, match="Step 2 is not finite"):
      self._read([True, False, True])

  def test_or_are_counted_and_left_out_of_the_means(self):
    lines = self._read(
      [True, False] + 2 * [False] + 2 * [True], non_finite="skip"
    )
    assert [(step, x["loss"], x["skipped"]) for step, x in lines] == [
      (2, 1.0, 1),
      (6, 5.5, 2),
    ]

  def test_too_many_in_a_row_end_the_run_all_the_same(self):
    changes = {"non_finite": "skip", "max_skipped_steps": 2}
    self._read([False, False, True, False, False], **changes)
    with pytest.raises(errors.NonFiniteError, match="Step 3"):
      self._read([False, False, False], **changes)


class TestProgress:
  _VALUES = {"loss": 0.5, "accuracy": 0.25}

  def test_plain_lines_away_from_a_terminal(self, capsys):
    progress = metrics.Progress(
      step=0, total=100, batch_size=8, progress_bar=True
    )
    progress.update(10, self._VALUES)
    progress.close()
    line = capsys.readouterr().out
    assert line.startswith("step 10/100  loss 0.5000  accuracy 0.2500  ")
    assert " images/s  input wait 0%  process memory " in line
    assert line.endswith(" GiB  0:00:00 left\n")

  def test_a_bar_on_a_terminal(self, monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    with open(theirs, "w") as terminal:
      monkeypatch.setattr(sys, "stderr", terminal)
      progress = metrics.Progress(
        step=50, total=100, batch_size=8, progress_bar=True
      )
      time.sleep(0.2)  # tqdm draws ten times a second.
      progress.update(75, self._VALUES)
      progress.close()
      screen = b""
      while select.select([ours], [], [], 0.5)[0]:
        screen += os.read(ours, 4096)
    os.close(ours)
    shown = screen.decode()
    assert "50/100" in shown
    assert "75/100" in shown
    assert "loss 0.5000  accuracy 0.2500" in shown
    assert "images/s" in shown
    assert "<" in shown  # Time taken < time left.


def _event_files(folder):
  return sorted((folder / "tensorboard").iterdir())


def _read_events(path):
  """Events of a TFRecord file: length, its checksum, data, its checksum."""
  data, at = path.read_bytes(), 0
  while at < len(data):
    n = int.from_bytes(data[at : at + 8], "little")
    yield proto.event_pb2.Event.FromString(data[at + 12 : at + 12 + n])
    at += 12 + n + 4


class TestCorrupt:
  def _see(self, counter, split, ids, corrupt):
    batch = {"index": np.array(ids), "corrupt": np.array(corrupt, bool)}
    counter.see(split, batch)

  def test_a_record_counts_once_per_split(self):
    counter = corrupt_lib.Corrupt(3, {"train": [4]})
    self._see(counter, "train", [4, 5, 6], [1, 1, 0])
    self._see(counter, "train", [4, 5, 6], [1, 1, 0])
    self._see(counter, "validation", [4, -1], [1, 0])
    assert counter.count == 3
    assert counter.by_split() == {"train": [4, 5], "validation": [4]}
    counter.add({"train": [5, 7], "test": [0]})
    assert counter.by_split()["train"] == [4, 5, 7]
    assert counter.by_split()["test"] == [0]

  def test_one_more_than_the_limit_is_an_error_with_the_records(self):
    counter = corrupt_lib.Corrupt(1, {})
    self._see(counter, "train", [8], [1])
    counter.check()
    self._see(counter, "train", [9], [1])
    with pytest.raises(errors.CorruptDataError, match=r"max_corrupt=1.*8, 9"):
      counter.check()
