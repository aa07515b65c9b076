"""Decoding and augmentation of single images."""

import io

import numpy as np
from PIL import Image
import pytest

from experiments.imagenet import transforms


def _photo(mode: str, size=(40, 30)) -> Image.Image:
  """A smooth image (JPEG keeps it nearly), so that formats can be compared."""
  w, h = size
  y, x = np.mgrid[:h, :w]
  rgb = np.stack([x * 255 // w, y * 255 // h, (x + y) * 255 // (w + h)], -1)
  return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def _encode(image: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize(
  ("mode", "kind"),
  [
    ("RGB", "JPEG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "PNG"),
    ("L", "PNG"),
    ("P", "PNG"),
    ("RGBA", "PNG"),
  ],
)
def test_every_kind_of_image_is_decoded_to_rgb(mode, kind):
  image = _photo(mode)
  options = {"quality": 95} if kind == "JPEG" else {}
  got = transforms.decode(_encode(image, kind, **options))
  want = np.asarray(image.convert("RGB"))
  assert got.dtype == np.uint8
  assert got.shape == (30, 40, 3)
  # JPEG loses a little at quality 95; PNG nothing.
  error = np.abs(got.astype(int) - want).mean()
  assert error <= (3 if kind == "JPEG" else 0)


def test_fast_jpeg_decoder_agrees_with_pillow():
  data = _encode(_photo("RGB", (151, 97)), "JPEG", quality=90)
  fast = transforms.decode(data).astype(int)
  pillow = np.asarray(transforms.decode_pillow(data)).astype(int)
  # Both are libjpeg-turbo; builds may round differently.
  assert np.abs(fast - pillow).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0, 0.03, 0.5, 0.9])
def test_truncated_images_are_errors(kind, keep):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = _encode(Image.fromarray(noise), kind)
  cut = data[: int(keep * len(data))]
  with pytest.raises((OSError, SyntaxError)):
    transforms.decode(cut)
  with pytest.raises((OSError, SyntaxError)):
    transforms.decode_pillow(cut)


@pytest.mark.parametrize("data", [bytes(100), b"\xff\xd8\xff" + bytes(100)])
def test_garbage_is_an_error(data):
  with pytest.raises(OSError, match="cannot identify image"):
    transforms.decode(data)


@pytest.mark.parametrize(
  "shape", [(1, 1), (8, 8), (1, 50), (50, 1), (37, 211), (480, 640)]
)
def test_crops_lie_inside_and_keep_to_area_and_ratio(shape):
  rng = np.random.default_rng(0)
  height, width = shape
  area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
  for _ in range(300):
    top, left, h, w = transforms.sample_crop(
      height, width, rng, area=area, ratio=ratio
    )
    assert min(top, left) >= 0
    assert min(h, w) >= 1
    assert top + h <= height
    assert left + w <= width
    # Sides are rounded to whole pixels.
    assert (w - 0.5) / (h + 0.5) <= ratio[1]
    assert (w + 0.5) / (h - 0.5) >= ratio[0]
    if min(shape) > 100:
      assert 0.079 <= h * w / (height * width) <= 1


def test_crops_share_of_area_is_uniform():
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(4000):
    _, _, h, w = transforms.sample_crop(
      1000, 1000, rng, area=(0.2, 0.6), ratio=(3 / 4, 4 / 3)
    )
    shares.append(h * w / 1e6)
  quartiles = np.quantile(shares, [0.25, 0.5, 0.75])
  # Four standard errors of the median of 4000 uniform draws.
  np.testing.assert_allclose(quartiles, [0.3, 0.4, 0.5], atol=0.013)


def test_crop_of_everything_is_the_whole_square():
  rng = np.random.default_rng(0)
  for side in (8, 9, 224):
    box = transforms.sample_crop(side, side, rng, area=(1, 1), ratio=(1, 1))
    assert box == (0, 0, side, side)


@pytest.mark.parametrize(
  ("shape", "want"),
  [
    ((10, 100), (0, 43, 10, 13)),  # Too wide: 10 * 4/3 columns.
    ((100, 10), (43, 0, 13, 10)),  # Too tall: 10 / (3/4) rows.
    ((30, 30), (0, 0, 30, 30)),
  ],
)
def test_fallback_is_the_largest_central_crop(shape, want):
  # No box of twice the image's area fits.
  got = transforms.sample_crop(
    *shape, np.random.default_rng(0), area=(2, 2), ratio=(3 / 4, 4 / 3)
  )
  assert got == want


def test_shrinking_averages_and_enlarging_keeps_the_range_of_a_constant():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  half = transforms.resize(image, 4)
  blocks = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
  assert np.abs(half - blocks).max() <= 0.5
  flat = np.full((8, 8, 3), 77, np.uint8)
  large = transforms.resize(flat, 32)
  assert large.shape == (32, 32, 3)
  assert (large == 77).all()
  np.testing.assert_array_equal(transforms.resize(image, 8), image)


def test_random_resized_crop_repeats_with_its_seed():
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)

  def crop(seed):
    return transforms.random_resized_crop(
      image,
      np.random.default_rng(seed),
      size=16,
      area=(0.08, 1),
      ratio=(0.75, 4 / 3),
    )

  assert crop(1).shape == (16, 16, 3)
  assert crop(1).dtype == np.uint8
  np.testing.assert_array_equal(crop(1), crop(1))
  assert not np.array_equal(crop(1), crop(2))


def test_flip_mirrors_about_half_of_the_images():
  image = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
  rng = np.random.default_rng(0)
  flipped = 0
  for _ in range(400):
    got = transforms.random_flip(image, rng)
    if not np.array_equal(got, image):
      np.testing.assert_array_equal(got, image[:, ::-1])
      flipped += 1
  assert 160 <= flipped <= 240  # Four standard deviations.
