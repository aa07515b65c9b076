"""Decoding and augmentation of training images on the CPU."""

import io
import math

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image
import simplejpeg

# Tries to fit a random crop into the image before the fallback, as torchvision.
_CROP_TRIES = 10


def one_thread() -> None:
  """Stops OpenCV's own threads in this process: the loader has its own."""
  cv2.setNumThreads(0)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes an image file of any kind that Pillow reads to RGB.

  JPEG goes through libjpeg-turbo directly, about 2.5 times as fast as Pillow;
  what it cannot decode without a warning (CMYK, damaged) goes to Pillow, which
  has the last word. A file that ends too early is an error.

  Args:
    data: The file's content.

  Returns:
    The image. Transparency is dropped, and EXIF rotation is not applied, as in
    the papers' code.

  Raises:
    Exception: The data is no whole image. Decoders raise many types on
      damaged bytes (OSError, SyntaxError, struct.error, ...).
  """
  if simplejpeg.is_jpeg(data):
    try:
      return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
      pass
  return np.asarray(decode_pillow(data))


def decode_pillow(data: bytes) -> Image.Image:
  """Decodes an image file to an RGB Pillow image; errors as in `decode`."""
  with Image.open(io.BytesIO(data)) as image:
    return image.convert("RGB")


def sample_crop(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws the box of a random-resized-crop, by torchvision's rule.

  The share of the area is uniform in `area`, the logarithm of width / height
  uniform in log `ratio`; after ten boxes that do not fit, the largest central
  one with an allowed ratio.

  Args:
    height: Image height in pixels.
    width: Image width in pixels.
    rng: Source of randomness; the number of draws varies.
    area: Least and greatest share of the image's area.
    ratio: Least and greatest width / height.

  Returns:
    (top, left, height, width) in pixels; it lies inside the image.
  """
  log_ratio = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(_CROP_TRIES):
    target = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(*log_ratio))
    w = round(math.sqrt(target * aspect))
    h = round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return top, left, h, w
  h, w = height, width
  if width / height < ratio[0]:
    h = min(height, max(1, round(width / ratio[0])))
  elif width / height > ratio[1]:
    w = min(width, max(1, round(height * ratio[1])))
  return (height - h) // 2, (width - w) // 2, h, w


def resize(
  image: UInt8[np.ndarray, "h w 3"],
  size: int,
  enlarge: int = cv2.INTER_CUBIC,
) -> UInt8[np.ndarray, "s s 3"]:
  """Resizes to a square: averages areas when shrinking, else interpolates.

  OpenCV's bicubic is a little sharper than the one of evaluation (Pillow's);
  it is several times as fast.

  Args:
    image: The image.
    size: Side of the result, in pixels.
    enlarge: OpenCV's interpolation where the area grows.
  """
  h, w = image.shape[:2]
  if (h, w) == (size, size):
    return np.ascontiguousarray(image)
  # OpenCV's bicubic does not antialias, so it is for enlarging only.
  shrinks = h * w > size * size
  interpolation = cv2.INTER_AREA if shrinks else enlarge
  return cv2.resize(image, (size, size), interpolation=interpolation)


def random_resized_crop(
  image: UInt8[np.ndarray, "h w 3"],
  rng: np.random.Generator,
  *,
  size: int,
  area: tuple[float, float],
  ratio: tuple[float, float],
  enlarge: int = cv2.INTER_CUBIC,
) -> UInt8[np.ndarray, "s s 3"]:
  """Cuts a random box (`sample_crop`) and resizes it to size x size."""
  h, w = image.shape[:2]
  top, left, ch, cw = sample_crop(h, w, rng, area=area, ratio=ratio)
  return resize(image[top : top + ch, left : left + cw], size, enlarge)


def random_flip(
  image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
  """Mirrors left and right with probability 1/2."""
  return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image
