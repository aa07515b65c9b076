"""Mixup, CutMix and soft labels against timm's numbers and by hand."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.imagenet import mixing
from experiments.imagenet.configs import _base

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "training"
_KEY = jax.random.key(0)


def _config(**changes):
  c = _base.get_config()
  c.mixup.update(changes)
  return c


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(16, 6, 8, 3)).astype(np.float32)
  return images, np.asarray(mixing.soft_labels(np.arange(16) % 5, 5, 0.1))


@functools.cache
def _compiled(**changes):
  return jax.jit(lambda *xs: mixing.mix(*xs, _config(**changes)))


def _mix(batch, key=_KEY, **changes):
  return [np.asarray(x) for x in _compiled(**changes)(*batch, key)]


def test_targets_are_timms():
  cases = json.loads((_GOLDEN / "training.json").read_text())["mixup_targets"]
  for case in cases:
    soft = mixing.soft_labels(
      jnp.array(case["labels"]), case["num_classes"], case["smoothing"]
    )
    got = case["lam"] * soft + (1 - case["lam"]) * soft[::-1]
    np.testing.assert_allclose(got, case["target"], atol=1e-6)


def test_mixup_blends_pixels_and_labels_alike(batch):
  images, targets = batch
  mixed, labels = _mix(batch, mixup_alpha=0.8)
  # Image 1 is of class 1, its partner of class 4.
  weight = (labels[1, 1] - 0.02) / 0.9
  assert 0 < weight < 1
  np.testing.assert_allclose(
    mixed, weight * images + (1 - weight) * images[::-1], atol=1e-5
  )
  np.testing.assert_allclose(
    labels, weight * targets + (1 - weight) * targets[::-1], atol=1e-6
  )


def test_cutmix_pastes_a_box_and_weighs_labels_by_its_area(batch):
  images, targets = batch
  for seed in range(4):
    mixed, labels = _mix(batch, jax.random.key(seed), cutmix_alpha=1.0)
    pasted = (mixed == images[::-1]).all(-1)
    assert (pasted | (mixed == images).all(-1)).all()
    # The same box in all images, and it is one.
    assert (pasted == pasted[0]).all()
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    np.testing.assert_array_equal(pasted[0], np.outer(rows, columns))
    own = 1 - pasted[0].mean()
    want = own * targets + (1 - own) * targets[::-1]
    np.testing.assert_allclose(labels, want, atol=1e-6)


@pytest.mark.parametrize(
  ("own", "row", "column", "rows", "columns"),
  [
    (0.75, 3, 4, (2, 4), (2, 6)),  # Sides 3.0 and 4.0 of 6 x 8, halves 1, 2.
    (0.75, 0, 7, (0, 1), (5, 8)),  # Cut off at a corner.
    (0.0, 3, 4, (0, 6), (0, 8)),
    (1.0, 3, 4, (0, 0), (0, 0)),
  ],
)
def test_boxes_by_hand(own, row, column, rows, columns):
  got = mixing.cut_box(
    jnp.float32(own), 6, 8, jnp.int32(row), jnp.int32(column)
  )
  want = np.zeros((6, 8), bool)
  want[slice(*rows), slice(*columns)] = True
  np.testing.assert_array_equal(got, want)


def test_groups_have_their_own_weights_and_mix_among_themselves(batch):
  images, _ = batch
  whole, _ = _mix(batch, mixup_alpha=0.8, group_size=4)
  weights = set()
  for start in range(0, 16, 4):
    group, mixed = images[start : start + 4], whole[start : start + 4]
    other = group[::-1]
    own = ((mixed - other) * (group - other)).sum() / (
      (group - other) ** 2
    ).sum()
    np.testing.assert_allclose(
      mixed, own * group + (1 - own) * other, atol=1e-5
    )
    weights.add(round(float(own), 5))
  assert len(weights) == 4


def test_switch_and_probability_are_shares_of_the_groups():
  n = 2048
  images, targets = np.ones((2 * n, 4, 4, 1)), np.eye(2)[np.arange(2 * n) % 2]
  images[1::2] = -1
  options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "group_size": 2}
  mixed, labels = _mix(
    (images.astype(np.float32), targets.astype(np.float32)),
    probability=0.8,
    switch_probability=0.25,
    **options,
  )
  first = mixed[::2].reshape(n, 16)
  untouched = (labels[::2, 0] == 1) & (first == 1).all(1)
  cut = ~untouched & (np.abs(first) == 1).all(1)
  blended = ~untouched & ~cut
  # A box of less than two pixels is none: of 4x4 pixels that is common.
  np.testing.assert_allclose(blended.mean(), 0.8 * 0.75, atol=0.03)
  assert 0.05 < cut.mean() < 0.8 * 0.25
  # Beta(0.8, 0.8): variance 1 / (4 (2 * 0.8 + 1)).
  spread = labels[::2, 0][blended]
  np.testing.assert_allclose(spread.mean(), 0.5, atol=0.03)
  np.testing.assert_allclose(spread.var(), 1 / (4 * 2.6), atol=0.01)


def test_nothing_is_mixed_where_it_is_off():
  assert not mixing.is_on(_config())
  assert not mixing.is_on(_config(mixup_alpha=0.8, probability=0.0))
  assert mixing.is_on(_config(cutmix_alpha=1.0))
