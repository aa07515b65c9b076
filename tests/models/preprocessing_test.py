"""Evaluation preprocessing against the official pipelines, to the pixel."""

import hashlib
import json
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from tests import golden_data
import vimjax
from vimjax import preprocessing

_LOCAL = pathlib.Path(__file__).parent.parent / "golden" / "transforms"
# Reference name -> arguments.
CASES = {
  "vim_vmamba_224": dict(size=224, crop_fraction=0.875),
  "mv_T_B_L_crop1_224": dict(size=224, crop_fraction=1.0),
  "mv_T2_crop098_224": dict(size=224, crop_fraction=0.98),
  "mv_S_crop093_224": dict(size=224, crop_fraction=0.93),
  "mv_L3_256_crop1": dict(size=256, crop_fraction=1.0),
  "mv_512_crop093_squash": dict(
    size=512, crop_fraction=0.93, crop_mode="squash"
  ),
}


def _image(size=(60, 40), mode="RGB"):
  w, h = size
  noise = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
  return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("case", [c for c in CASES if "squash" not in c])
def test_pixels_equal_the_official_pipeline(case):
  hashes = json.loads((_LOCAL / "sha256.json").read_text())
  image = Image.open(_LOCAL / "image_180x240.png")
  pixels = np.asarray(preprocessing.resize_and_crop(image, **CASES[case]))
  assert pixels.dtype == np.uint8
  assert hashlib.sha256(pixels.tobytes()).hexdigest() == hashes[case]


def test_pixels_equal_all_shared_references():
  references = golden_data.load("transforms", "transforms/eval")
  compared = 0
  for name, want in references.items():
    match = re.fullmatch(r"(.*)_(\d+x\d+)_uint8", name)
    if match:
      image = Image.fromarray(references[f"image_{match[2]}"])
      got = preprocessing.resize_and_crop(image, **CASES[match[1]])
      np.testing.assert_array_equal(np.asarray(got), want, err_msg=name)
      compared += 1
  assert compared == 16
  image = Image.fromarray(references["image_300x400"])
  got = vimjax.preprocess(image, "vim_tiny").transpose(2, 0, 1)
  want = references["vim_224_300x400_normalised_CHW_every_16th"]
  np.testing.assert_allclose(got[:, ::16, ::16], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_every_image_mode_becomes_normalised_rgb(mode):
  pixels = vimjax.preprocess(_image(mode=mode), "vim_tiny")
  assert pixels.shape == (224, 224, 3)
  assert pixels.dtype == np.float32
  assert np.isfinite(pixels).all()
  channels_equal = np.ptp(pixels * (0.229, 0.224, 0.225), axis=-1).max() < 0.2
  assert channels_equal == (mode == "L")


def test_normalize_uses_the_given_statistics():
  white = np.full((2, 2, 3), 255, np.uint8)
  got = preprocessing.normalize(white, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))
  np.testing.assert_allclose(got[0, 0], [1.0, 2.0, 1.0], rtol=1e-6)


def test_squash_ignores_the_aspect_and_center_keeps_it():
  # Left half black, right half white, three times as wide as high.
  image = Image.new("RGB", (90, 30))
  image.paste((255, 255, 255), (45, 0, 90, 30))
  for mode in ("center", "squash"):
    got = np.asarray(
      preprocessing.resize_and_crop(
        image, size=30, crop_fraction=1.0, crop_mode=mode
      )
    )
    assert got[:, :10].max() == 0
    assert got[:, 20:].min() == 255


def test_a_very_long_image_keeps_its_centre():
  got = preprocessing.resize_and_crop(
    _image((2000, 10)), size=32, crop_fraction=0.875, interpolation="bilinear"
  )
  assert got.size == (32, 32)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(size=0), "size must be positive"),
    (dict(crop_fraction=1.5), r"crop_fraction must be in \(0, 1\], got 1.5"),
    (dict(crop_mode="middle"), "crop_mode must be one of .*got 'middle'"),
    (dict(interpolation="box"), "interpolation must be one of .*got 'box'"),
  ],
)
def test_impossible_arguments_are_named(change, message):
  arguments = dict(size=32, crop_fraction=0.875) | change
  with pytest.raises(ValueError, match=message):
    preprocessing.resize_and_crop(_image(), **arguments)


def test_an_array_is_refused_with_the_way_to_convert_it():
  with pytest.raises(TypeError, match="fromarray"):
    vimjax.preprocess(np.zeros((8, 8, 3), np.uint8), "vim_tiny")
