"""RandAugment, jitter and erasing against timm's arguments and Pillow."""

import itertools
import json
import pathlib

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
import pytest

from experiments.imagenet import augment, input_pipeline
from experiments.imagenet.configs import _base

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "training"


@pytest.fixture(scope="module")
def image():
  """A smooth image with some noise, of odd sides and a narrow range."""
  y, x = np.mgrid[:45, :61]
  rgb = np.stack([3 * x, 4 * y, 2 * x + y], -1) + 20
  noise = np.random.default_rng(0).normal(0, 4, rgb.shape)
  return np.clip(rgb + noise, 0, 230).astype(np.uint8)


def test_arguments_are_timms():
  wanted = json.loads((_GOLDEN / "training.json").read_text())["randaugment"]
  assert wanted["ops"].keys() == augment.OPERATIONS.keys()
  for name, levels in wanted["ops"].items():
    operation = augment.OPERATIONS[name]
    for level, want in levels.items():
      if want is None:
        assert operation.argument is None
        continue
      # The numbers there carry the negative sign.
      got = operation.argument(float(level), -1)
      np.testing.assert_allclose([got], want, rtol=1e-12, err_msg=name)
      other = operation.argument(float(level), 1)
      if operation.geometric:
        assert other == -got


def _pillow(function, image):
  return np.asarray(function(Image.fromarray(image)))


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    (augment.autocontrast, ImageOps.autocontrast),
    (augment.equalize, ImageOps.equalize),
    (augment.invert, ImageOps.invert),
    *(
      (lambda x, b=b: augment.posterize(x, b), lambda x, b=b: _posterize(x, b))
      for b in range(5)
    ),
    *(
      (
        lambda x, t=t: augment.solarize(x, t),
        lambda x, t=t: ImageOps.solarize(x, t),
      )
      for t in (0, 26, 128, 256)
    ),
    (
      lambda x: augment.solarize_add(x, 55),
      lambda x: x.point(
        [min(255, i + 55) if i < 128 else i for i in range(256)] * 3
      ),
    ),
    *(
      (
        lambda x, f=f: augment.brightness(x, f),
        lambda x, f=f: ImageEnhance.Brightness(x).enhance(f),
      )
      for f in (0.1, 0.73, 1.9)
    ),
  ],
)
def test_tables_are_pillows(image, ours, theirs):
  flat = np.full((4, 5, 3), 7, np.uint8)  # One value: nothing to stretch.
  for x in (image, flat):
    before = x.copy()
    np.testing.assert_array_equal(ours(x), _pillow(theirs, x))
    np.testing.assert_array_equal(x, before)


def _posterize(image, bits):
  # Pillow's own refuses 0 bits; timm calls it with as little.
  mask = 256 - 2 ** (8 - bits)
  return image.point([i & mask for i in range(256)] * 3)


@pytest.mark.parametrize("factor", [0.1, 0.73, 1.0, 1.9])
@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    (augment.color, ImageEnhance.Color),
    (augment.contrast, ImageEnhance.Contrast),
    (augment.sharpness, ImageEnhance.Sharpness),
  ],
)
def test_enhancements_are_pillows_but_for_rounding(image, ours, theirs, factor):
  got = ours(image, factor).astype(int)
  want = _pillow(lambda x: theirs(x).enhance(factor), image)
  # Gray, the smooth image and the blend each round to the nearest here.
  assert np.abs(got - want).max() <= 3
  assert np.abs(got - want).mean() <= 1
  assert ImageFilter.SMOOTH.filterargs[1] == 13


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
  ("ours", "matrix"),
  [
    (lambda x, i: augment.shear_x(x, -0.27, i), (1, -0.27, 0, 0, 1, 0)),
    (lambda x, i: augment.shear_y(x, 0.15, i), (1, 0, 0, 0.15, 1, 0)),
    (lambda x, i: augment.translate_x(x, 0.25, i), (1, 0, 15.25, 0, 1, 0)),
    (lambda x, i: augment.translate_y(x, -0.4, i), (1, 0, 0, 0, 1, -18)),
    (lambda x, i: augment.rotate(x, 27.0, i), 27.0),
  ],
)
def test_geometry_is_pillows_inside(image, ours, matrix, interpolation):
  code = augment.INTERPOLATIONS[interpolation]
  smooth = cv2.GaussianBlur(image, (0, 0), 2)
  resample = Image.Resampling[interpolation.upper()]

  def theirs(x):
    if isinstance(matrix, float):
      return x.rotate(matrix, resample=resample, fillcolor=augment.FILL)
    return x.transform(
      x.size, Image.Transform.AFFINE, matrix, resample, fillcolor=augment.FILL
    )

  got, want = ours(smooth, code).astype(int), _pillow(theirs, smooth)
  # OpenCV blends the fill in over a pixel at the edge, Pillow does not.
  edge = (want == augment.FILL).all(-1).astype(np.uint8)
  edge = cv2.dilate(edge, np.ones((5, 5), np.uint8)) > 0
  edge[:2] = edge[-2:] = edge[:, :2] = edge[:, -2:] = True
  far = cv2.erode(
    (want == augment.FILL).all(-1).astype(np.uint8), np.ones((5, 5))
  )
  assert 0.2 < edge.mean() < 0.9
  assert np.abs(got - want)[~edge].max() <= 3
  np.testing.assert_array_equal(got[far > 0], want[far > 0])


def test_draws_two_operations_each_with_probability_half(monkeypatch):
  calls = []

  def note(name, operation):
    def apply(image, *arguments):
      calls.append((name, *arguments))
      return image

    return augment.Operation(apply, operation.argument, operation.geometric)

  noted = {k: note(k, v) for k, v in augment.OPERATIONS.items()}
  monkeypatch.setattr(augment, "OPERATIONS", noted)
  rand = augment.parse(
    "rand-m9-mstd0.5-inc1", tuple(augment.INTERPOLATIONS.values())
  )
  rng = np.random.default_rng(0)
  n = 20_000
  for _ in range(n):
    rand(np.zeros((2, 2, 3), np.uint8), rng)
  np.testing.assert_allclose(len(calls) / n, 1.0, atol=0.02)
  names = [call[0] for call in calls]
  shares = np.array([names.count(name) for name in noted]) / len(calls)
  np.testing.assert_allclose(shares, 1 / 15, atol=0.006)
  angles = np.array([call[1] for call in calls if call[0] == "Rotate"])
  np.testing.assert_allclose((angles > 0).mean(), 0.5, atol=0.05)
  # Normal about 9 of 10, cut off at 10: 27 degrees of 30.
  np.testing.assert_allclose(np.abs(angles).mean() / 3, 8.97, atol=0.05)
  assert np.abs(angles).max() == 30
  kinds = {call[2] for call in calls if call[0] == "Rotate"}
  assert kinds == {cv2.INTER_LINEAR, cv2.INTER_CUBIC}


@pytest.mark.parametrize(
  "text", ["rand-m9", "rand-m9-mstd0.5", "augmix", "rand-m9-mstd0.5-inc1-w0"]
)
def test_other_notations_are_errors(text):
  with pytest.raises(
    ValueError, match=r"config.data.randaugment.*rand-m9-mstd"
  ):
    augment.parse(text)


def test_color_jitter_keeps_to_its_strength(image):
  rng = np.random.default_rng(0)
  gray = np.full((4, 4, 3), 100, np.uint8)
  values = [augment.color_jitter(gray, 0.4, rng)[0, 0, 0] for _ in range(300)]
  # Contrast and saturation leave a plain gray alone.
  assert 60 <= min(values) < 66
  assert 134 < max(values) <= 140
  assert (augment.color_jitter(image, 0.4, rng) != image).any()


def test_erasing_keeps_to_area_and_proportions():
  rng = np.random.default_rng(0)
  image = np.zeros((64, 64, 3), np.uint8)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  areas, values, untouched = [], [], 0
  for _ in range(400):
    out = augment.random_erase(image, rng, probability=0.25, mean=mean, std=std)
    erased = out.any(-1)
    if not erased.any():
      untouched += 1
      continue
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 0.25 < h / w < 4
    areas.append(h * w / 64**2)
    values.append(out[erased])
  assert not image.any()
  np.testing.assert_allclose(untouched / 400, 0.75, atol=0.08)
  assert 0.015 < min(areas) < 0.06
  assert 0.27 < max(areas) < 0.35
  pixels = np.concatenate(values) / 255
  np.testing.assert_allclose(pixels.mean(0), mean, atol=0.02)
  np.testing.assert_allclose(pixels.std(0), std, atol=0.02)


def _pipeline(data_dir, **changes):
  c = _base.get_config()
  c.data.dir = data_dir
  c.data.name = "generated"
  c.data.image_size = 32
  c.batch_size = 48
  c.update_from_flattened_dict(changes)
  return c


def _first(config, count=1, **where):
  batches = input_pipeline.train_batches(config, **where)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


class TestInThePipeline:
  _ALL = {
    "data.randaugment": "rand-m9-mstd0.5-inc1",
    "data.crop_interpolation": "random",
    "data.color_jitter": 0.4,
    "data.erase_probability": 0.25,
    "data.repeats": 3,
    "mixup.group_size": 12,
  }

  def test_each_augmentation_acts(self, data_dir):
    (plain,) = _first(_pipeline(data_dir))
    for name in ("randaugment", "color_jitter", "erase_probability"):
      field = f"data.{name}"
      config = _pipeline(data_dir, **{field: self._ALL[field]})
      (batch,) = _first(config)
      np.testing.assert_array_equal(batch["index"], plain["index"])
      assert (batch["image"] != plain["image"]).any()

  def test_color_jitter_does_nothing_beside_randaugment(self, data_dir):
    both = {name: self._ALL[name] for name in list(self._ALL)[:3]}
    (want,) = _first(_pipeline(data_dir, **both | {"data.color_jitter": 0.0}))
    (got,) = _first(_pipeline(data_dir, **both))
    np.testing.assert_array_equal(got["image"], want["image"])

  def test_batches_do_not_depend_on_hosts_workers_or_resumption(self, data_dir):
    config = _pipeline(data_dir, **self._ALL)
    want = _first(config, 4)[3]
    parts = [
      _first(config, start_step=3, process_index=i, process_count=3)[0]
      for i in range(3)
    ]
    config.data.workers = 1
    (workers,) = _first(config, start_step=3)
    for name, x in want.items():
      joined = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(joined, x)
      np.testing.assert_array_equal(workers[name], x)

  def test_repeats_are_augmented_apart_and_mixed_with_others(self, data_dir):
    batches = _first(_pipeline(data_dir, **self._ALL), 12)
    for batch in batches:
      index, images = batch["index"], batch["image"]
      ids, counts = np.unique(index, return_counts=True)
      assert (counts == 3).all()
      for i in ids:
        copies = images[index == i]
        assert (copies[0] != copies[1]).any()
        assert len(set(np.flatnonzero(index == i) // 12)) == 3
    # Six steps are an epoch, which sees each image thrice or never.
    for epoch in (batches[:6], batches[6:]):
      assert len(set(np.concatenate([b["index"] for b in epoch]))) == 96
    assert (batches[0]["index"] != batches[6]["index"]).any()
