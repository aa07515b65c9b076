"""Accumulation, batch norms, distillation and mixing in a training step."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from experiments.imagenet import optimizer, steps
from experiments.imagenet import state as state_lib
from experiments.imagenet.configs import _base
from vimjax.layers import batch_norm

_SIZE, _CLASSES, _BATCH = 4, 6, 16


class _Net(nn.Module):
  """Two linear maps with a ReLU, and perhaps a batch norm, in between."""

  norm: bool = False

  @nn.compact
  def __call__(self, images, *, train=False):
    # White images alone are poison.
    images = jnp.where(images.min() > 2.2, jnp.nan, images)
    x = nn.Dense(8, name="hidden")(images.reshape(len(images), -1))
    if self.norm:
      x = batch_norm.BatchNorm(name="norm")(x, train=train)
    return nn.Dense(_CLASSES, name="head")(nn.relu(x))


def _config(**changes):
  c = _base.get_config()
  c.batch_size = _BATCH
  c.epochs = 10.0
  c.ema_decay = 0.75
  c.data.image_size = _SIZE
  c.model.overrides.num_classes = _CLASSES
  c.optimizer.schedule = "constant"
  c.optimizer.warmup_epochs = 0.0
  c.optimizer.peak_lr = 0.02
  c.update_from_flattened_dict(changes)
  return c


def _mesh(devices=1):
  return jax.make_mesh(
    (devices,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


def _batch(seed):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (_BATCH, _SIZE, _SIZE, 3), np.uint8),
    "label": rng.integers(0, _CLASSES, _BATCH).astype(np.int32),
  }


def _run(
  config, *, norm=False, devices=1, count=3, total_steps=100, batches=None
):
  """First and last state, and the numbers of all steps."""
  mesh, model = _mesh(devices), _Net(norm)
  schedule = optimizer.make_schedule(config, 10)
  tx = optimizer.make_optimizer(config, schedule)
  numbers = []
  with jax.set_mesh(mesh):
    state = state_lib.make_state(model, tx, config, mesh)
    first = jax.device_get(state)
    train_step = steps.make_train_step(
      model, tx, schedule, config, mesh, total_steps=total_steps
    )
    for batch in batches or map(_batch, range(count)):
      batch = steps.put_batch(batch, config, mesh)
      state, values = train_step(state, batch)
      numbers.append(jax.device_get(values))
  return first, jax.device_get(state), numbers


def _pixels(config, batch):
  mean, std = np.array(config.data.mean), np.array(config.data.std)
  x = (batch["image"] / 255 - mean) / std
  return x.reshape(len(x), -1)


_MIXED = {
  "mixup.mixup_alpha": 0.8,
  "mixup.cutmix_alpha": 1.0,
  "mixup.group_size": 4,
}


class TestAccumulation:
  @pytest.mark.parametrize(("name", "devices"), [("adamw", 1), ("lamb", 4)])
  def test_parts_make_the_step_of_the_whole_batch(self, name, devices):
    changes = {"optimizer.name": name, "optimizer.clip_norm": 0.5}
    _, want, wanted = _run(_config(**changes))
    config = _config(accumulation_steps=4, **changes)
    _, got, numbers = _run(config, devices=devices)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_close(got.params, want.params, atol=2e-5)
    chex.assert_trees_all_close(got.ema_params, want.ema_params, atol=2e-5)
    for a, b in zip(numbers, wanted, strict=True):
      chex.assert_trees_all_close(a, b, rtol=1e-4)

  def test_batch_norms_see_one_part_after_the_other(self):
    config = _config(accumulation_steps=4)
    first, state, _ = _run(config, norm=True, count=1)
    kernel = np.asarray(first.params["hidden"]["kernel"], np.float64)
    hidden = _pixels(config, _batch(0)) @ kernel
    mean, var = np.zeros(8), np.ones(8)
    for part in range(4):
      x = hidden[part::4]
      mean = 0.9 * mean + 0.1 * x.mean(0)
      var = 0.9 * var + 0.1 * x.var(0, ddof=1)
    got = state.batch_stats["norm"]
    np.testing.assert_allclose(got["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["var"], var, rtol=1e-4)


class TestBatchNorm:
  def test_statistics_and_their_average_follow_the_batches(self):
    config = _config()
    first, state, _ = _run(config, norm=True, count=1)
    hidden = _pixels(config, _batch(0)) @ np.asarray(
      first.params["hidden"]["kernel"], np.float64
    )
    want = {
      "mean": 0.1 * hidden.mean(0),
      "var": 0.9 + 0.1 * hidden.var(0, ddof=1),
    }
    got, average = state.batch_stats["norm"], state.ema_batch_stats["norm"]
    for name, start in (("mean", 0.0), ("var", 1.0)):
      np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(
        average[name], 0.75 * start + 0.25 * got[name], rtol=1e-5, atol=1e-7
      )

  def test_statistics_are_of_the_whole_batch_on_any_number_of_devices(self):
    # A rate of 0: what a bias before a norm gets is rounding, made large.
    config = _config(**{"optimizer.peak_lr": 0.0})
    _, want, _ = _run(config, norm=True)
    _, got, _ = _run(config, norm=True, devices=8)
    chex.assert_trees_all_close(
      got.variables(), want.variables(), rtol=1e-4, atol=1e-4
    )
    chex.assert_trees_all_close(
      got.variables("ema"), want.variables("ema"), rtol=1e-4, atol=1e-4
    )

  def test_evaluation_uses_the_running_statistics(self):
    config, mesh = _config(), _mesh()
    _, state, _ = _run(config, norm=True)
    evaluate = steps.make_eval_step(_Net(norm=True), config, mesh)
    batch = _batch(9) | {"mask": np.ones(_BATCH, bool)}
    on_device = steps.put_batch(batch, config, mesh)
    outs = [
      jax.device_get(evaluate(state.variables(weights), on_device))
      for weights in ("model", "ema")
    ]
    logits = [
      _Net(norm=True).apply(
        state.variables(weights),
        jnp.asarray(_pixels(config, batch), np.float32),
      )
      for weights in ("model", "ema")
    ]
    for out, want in zip(outs, logits, strict=True):
      np.testing.assert_array_equal(out["predicted"], want.argmax(-1))
      order = np.argsort(-np.asarray(want), axis=-1)[:, :5]
      among = (order == batch["label"][:, None]).any(-1)
      assert out["correct5"] == among.sum()
    assert outs[0]["loss"] != outs[1]["loss"]


def _mesa(**changes):
  return _config(
    **{
      "mesa.weight": 0.5,
      "mesa.start": 0.5,
      "label_smoothing": 0.0,
      "optimizer.weight_decay": 0.0,
      **changes,
    }
  )


class TestMesa:
  def test_divergence_by_hand(self):
    student, teacher = jnp.log(jnp.array([[1.0, 1], [1, 3]])), jnp.zeros((2, 2))
    # KL((1/2, 1/2) || (1/4, 3/4)) = log(2) - log(3) / 2, of one in two rows.
    got = steps.distillation(student, teacher, 1.0)
    np.testing.assert_allclose(got, (np.log(2) - np.log(3) / 2) / 2, rtol=1e-5)
    got = steps.distillation(3 * student, 3 * teacher, 3.0)
    np.testing.assert_allclose(got, (np.log(2) - np.log(3) / 2) / 2, rtol=1e-5)

  def test_it_begins_where_the_configuration_says(self):
    plain = _run(_mesa(**{"mesa.weight": 0.0}), count=4, total_steps=4)
    ours = _run(_mesa(), count=4, total_steps=4)
    loss = lambda run: [float(x["loss"]) for x in run[2]]
    assert loss(ours)[:2] == loss(plain)[:2]
    # Steps 2 and 3: the same model, so the difference is the divergence.
    assert loss(ours)[2] > loss(plain)[2]

  def test_the_loss_is_cross_entropy_plus_the_divergence_from_the_average(self):
    config = _mesa(**{"mesa.start": 0.0})
    before = _run(config, norm=True, count=2)[1]
    loss = _run(config, norm=True, count=3)[2][2]["loss"]
    batch = _batch(2)
    x = jnp.asarray(_pixels(config, batch), jnp.float32)
    student, _ = _Net(norm=True).apply(
      before.variables(), x, train=True, mutable=["batch_stats"]
    )
    # The teacher evaluates: by its running statistics.
    teacher = _Net(norm=True).apply(before.variables("ema"), x)
    log_p = jax.nn.log_softmax(student)
    entropy = -log_p[np.arange(_BATCH), batch["label"]].mean()
    p = jax.nn.softmax(teacher / 3)
    divergence = p * (jnp.log(p) - jax.nn.log_softmax(student / 3))
    want = entropy + 50 * 0.5 * divergence.sum(-1).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    assert divergence.sum(-1).mean() > 1e-4


def test_mixed_batches_are_the_same_on_any_number_of_devices():
  _, want, wanted = _run(_config(**_MIXED))
  _, got, numbers = _run(_config(**_MIXED), devices=8)
  for a, b in zip(numbers, wanted, strict=True):
    chex.assert_trees_all_close(a, b, rtol=1e-4)
  chex.assert_trees_all_close(got.params, want.params, atol=2e-4)
  assert numbers[0]["loss"] != _run(_config(), count=1)[2][0]["loss"]


_POISON = _batch(5) | {
  "image": np.full((_BATCH, _SIZE, _SIZE, 3), 255, np.uint8)
}


class TestNonFiniteSteps:
  def test_a_skipped_step_leaves_no_trace(self):
    schedule = {"schedule": "cosine", "schedule_unit": "step"}
    schedule = {f"optimizer.{k}": value for k, value in schedule.items()}
    config = _config(non_finite="skip", **schedule)
    good = [_batch(0), _batch(1)]
    _, want, wanted = _run(config, norm=True, batches=good)
    _, got, numbers = _run(
      config, norm=True, batches=[good[0], _POISON, good[1]]
    )
    assert [bool(x["finite"]) for x in numbers] == [True, False, True]
    assert (got.step, want.step) == (3, 2)
    # The rate that is applied, which has waited too.
    assert numbers[2]["lr"] == wanted[1]["lr"] < wanted[0]["lr"]
    chex.assert_trees_all_equal(got.replace(step=want.step), want)

  def test_otherwise_it_shows(self):
    _, state, numbers = _run(_config(), batches=[_POISON])
    assert not numbers[0]["finite"]
    assert np.isnan(state.params["head"]["kernel"]).all()
