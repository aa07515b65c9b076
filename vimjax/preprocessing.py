"""Evaluation preprocessing, equal to the official code's to the pixel."""

from typing import Any, Final, TYPE_CHECKING

from jaxtyping import Float
import numpy as np

from vimjax import optional, registry, variants

if TYPE_CHECKING:
  from PIL import Image

_INTERPOLATIONS: Final = ("bicubic", "bilinear")
_CROP_MODES: Final = ("center", "squash")


def resize_and_crop(
  image: "Image.Image",
  *,
  size: int,
  crop_fraction: float,
  crop_mode: variants.CropMode = "center",
  interpolation: variants.Interpolation = "bicubic",
) -> "Image.Image":
  """Resizes to size / crop_fraction pixels and cuts the centre out.

  The same pixels as torchvision's Resize, antialiased, and CenterCrop on PIL
  images. Images of other modes are converted to RGB.

  Args:
    image: A PIL image.
    size: Side of the square result, in pixels.
    crop_fraction: The result's share of the resized side, in (0, 1].
    crop_mode: "center" resizes the shorter side and keeps the aspect; "squash"
      resizes both sides.
    interpolation: "bicubic" or "bilinear".

  Raises:
    TypeError: `image` is not a PIL image.
    ValueError: Another argument is not possible.
  """
  pil = optional.require("PIL.Image", extra="image")
  if not isinstance(image, pil.Image):
    raise TypeError(
      f"resize_and_crop: image must be a PIL image, got {type(image)}; "
      "PIL.Image.fromarray makes one of a uint8 array."
    )
  _check(size, crop_fraction, crop_mode, interpolation)
  resample = {
    "bicubic": pil.Resampling.BICUBIC,
    "bilinear": pil.Resampling.BILINEAR,
  }[interpolation]
  image = image.convert("RGB")
  w, h = image.size
  # Rounded down, like the longer side: 224 / 0.98 gives 228.
  short = int(size / crop_fraction)
  if crop_mode == "squash":
    resized = (short, short)
  elif w <= h:
    resized = (short, int(short * h / w))
  else:
    resized = (int(short * w / h), short)
  image = image.resize(resized, resample)
  # Round half to even, as torchvision does.
  left, top = (round((side - size) / 2) for side in resized)
  return image.crop((left, top, left + size, top + size))


def _check(
  size: int, crop_fraction: float, crop_mode: str, interpolation: str
) -> None:
  if size < 1:
    raise ValueError(f"resize_and_crop: size must be positive, got {size}.")
  if not 0.0 < crop_fraction <= 1.0:
    raise ValueError(
      f"resize_and_crop: crop_fraction must be in (0, 1], got {crop_fraction}."
    )
  for name, value, choices in (
    ("crop_mode", crop_mode, _CROP_MODES),
    ("interpolation", interpolation, _INTERPOLATIONS),
  ):
    if value not in choices:
      raise ValueError(
        f"resize_and_crop: {name} must be one of {list(choices)}, got "
        f"{value!r}."
      )


def normalize(
  image: Any,
  mean: tuple[float, float, float] = variants.IMAGENET_MEAN,
  std: tuple[float, float, float] = variants.IMAGENET_STD,
) -> Float[np.ndarray, "*dims 3"]:
  """(image / 255 - mean) / std in float32, of an RGB image or array."""
  pixels = np.asarray(image, np.float32) / np.float32(255)
  return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def preprocess(image: "Image.Image", name: str) -> Float[np.ndarray, "h w 3"]:
  """Prepares an image as the published accuracy of a model was measured.

  Args:
    image: A PIL image of any size and mode.
    name: One of `vimjax.list_models()`.

  Returns:
    Normalised pixels, float32, channel-last; `np.stack` them into a batch.

  Raises:
    ValueError: There is no such model.
    TypeError: `image` is not a PIL image.
  """
  return prepare(image, registry.get_variant(name).preprocessing)


def prepare(
  image: "Image.Image", how: variants.Preprocessing
) -> Float[np.ndarray, "h w 3"]:
  """As `preprocess`, in a way of your own."""
  cropped = resize_and_crop(
    image,
    size=how.size,
    crop_fraction=how.crop_fraction,
    crop_mode=how.crop_mode,
    interpolation=how.interpolation,
  )
  return normalize(cropped, how.mean, how.std)
