"""RandAugment, colour jitter and random erasing on the CPU, in OpenCV.

The operations are Pillow's as timm uses them, on uint8 arrays (h, w, 3) in RGB.
Those that map each value by itself are equal to Pillow's; the others (rotation
and its like, colour, sharpness) differ by rounding and by how OpenCV
interpolates.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, Final

import cv2
from jaxtyping import UInt8
import numpy as np

Image = UInt8[np.ndarray, "h w 3"]

# What rotations leave empty: ImageNet's mean colour.
FILL: Final = (124, 116, 104)
# OpenCV's names for what Pillow calls bilinear and bicubic.
INTERPOLATIONS: Final = {
  "bilinear": cv2.INTER_LINEAR,
  "bicubic": cv2.INTER_CUBIC,
}
_HIGHEST: Final = 10.0
_RANGE: Final = np.arange(256)
# Pillow's ImageFilter.SMOOTH.
_SMOOTH: Final = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
# A box must be smaller than the image: so many draws, as in torchvision.
_ERASE_TRIES: Final = 10


def _lookup(image: Image, table: np.ndarray) -> Image:
  """Replaces every value v by table[v], or in channel c by table[v, c]."""
  table = np.clip(table, 0, 255).astype(np.uint8)
  return cv2.LUT(image, table.reshape(1, 256, -1))


def autocontrast(image: Image) -> Image:
  """Stretches each channel to the values 0 to 255."""
  table = np.empty((256, 3))
  for c in range(3):
    low, high = int(image[..., c].min()), int(image[..., c].max())
    if high <= low:
      table[:, c] = _RANGE
    else:
      scale = 255.0 / (high - low)
      table[:, c] = np.trunc(_RANGE * scale - low * scale)
  return _lookup(image, table)


def equalize(image: Image) -> Image:
  """Spreads the values of each channel evenly."""
  table = np.empty((256, 3))
  for c in range(3):
    counts = np.bincount(image[..., c].ravel(), minlength=256)
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    if step == 0:  # One value alone, or a tiny image.
      table[:, c] = _RANGE
    else:
      table[:, c] = (step // 2 + np.cumsum(counts) - counts) // step
  return _lookup(image, table)


def invert(image: Image) -> Image:
  """255 - v."""
  return 255 - image


def posterize(image: Image, bits: int) -> Image:
  """Keeps the highest bits."""
  return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: Image, threshold: int) -> Image:
  """Inverts values from the threshold on."""
  return _lookup(image, np.where(threshold > _RANGE, _RANGE, 255 - _RANGE))


def solarize_add(image: Image, amount: int) -> Image:
  """Adds to values below 128."""
  return _lookup(image, np.where(_RANGE < 128, _RANGE + amount, _RANGE))


def _gray(image: Image) -> UInt8[np.ndarray, "h w"]:
  return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def color(image: Image, factor: float) -> Image:
  """Blends with its gray version: 0 is gray, 1 the image."""
  gray = cv2.cvtColor(_gray(image), cv2.COLOR_GRAY2RGB)
  return cv2.addWeighted(image, factor, gray, 1 - factor, 0)


def contrast(image: Image, factor: float) -> Image:
  """Blends with its mean gray: 0 is gray, 1 the image."""
  mean = int(_gray(image).mean() + 0.5)
  return _lookup(image, mean + factor * (_RANGE - mean))


def brightness(image: Image, factor: float) -> Image:
  """Blends with black: 0 is black, 1 the image."""
  return _lookup(image, factor * _RANGE)


def sharpness(image: Image, factor: float) -> Image:
  """Blends with a smoothed version: 0 is smooth, 1 the image."""
  smooth = cv2.filter2D(image, -1, _SMOOTH)
  # As Pillow does, which has no neighbours to smooth the edges with.
  for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
    smooth[edge] = image[edge]
  return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def _affine(
  image: Image, matrix: Sequence[Sequence[float]], interpolation: int
) -> Image:
  """Takes each pixel from matrix (x, y, 1), at the pixels' centres."""
  m = np.array(matrix, np.float64)
  # OpenCV counts from the centre of the first pixel, Pillow from its corner.
  m[:, 2] += 0.5 * (m[:, 0] + m[:, 1]) - 0.5
  h, w = image.shape[:2]
  return cv2.warpAffine(
    image,
    m,
    (w, h),
    flags=interpolation | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=FILL,
  )


def rotate(image: Image, degrees: float, interpolation: int) -> Image:
  """Turns it about its centre, against the clock."""
  h, w = image.shape[:2]
  c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  x, y = w / 2, h / 2
  matrix = ((c, -s, x - c * x + s * y), (s, c, y - s * x - c * y))
  return _affine(image, matrix, interpolation)


def shear_x(image: Image, factor: float, interpolation: int) -> Image:
  """Moves rows sideways, in proportion to their height."""
  return _affine(image, ((1, factor, 0), (0, 1, 0)), interpolation)


def shear_y(image: Image, factor: float, interpolation: int) -> Image:
  """Moves columns up or down, in proportion to their place."""
  return _affine(image, ((1, 0, 0), (factor, 1, 0)), interpolation)


def translate_x(image: Image, share: float, interpolation: int) -> Image:
  """Moves it left by a share of its width."""
  shift = share * image.shape[1]
  return _affine(image, ((1, 0, shift), (0, 1, 0)), interpolation)


def translate_y(image: Image, share: float, interpolation: int) -> Image:
  """Moves it up by a share of its height."""
  shift = share * image.shape[0]
  return _affine(image, ((1, 0, 0), (0, 1, shift)), interpolation)


@dataclasses.dataclass(frozen=True)
class Operation:
  """One of RandAugment's operations.

  Attributes:
    apply: Takes the image and, depending on the others, an argument and an
      interpolation.
    argument: From the magnitude, 0 to 10, and a sign of 1 or -1.
    geometric: Whether it interpolates.
  """

  apply: Callable[..., Any]
  argument: Callable[[float, int], float] | None = None
  geometric: bool = False


def _enhance(magnitude: float, sign: int) -> float:
  return max(0.1, 1.0 + sign * magnitude / _HIGHEST * 0.9)


def _signed(limit: float) -> Callable[[float, int], float]:
  return lambda magnitude, sign: sign * magnitude / _HIGHEST * limit


# timm's "increasing" set: a larger magnitude is a stronger change everywhere.
OPERATIONS: Final[dict[str, Operation]] = {
  "AutoContrast": Operation(autocontrast),
  "Equalize": Operation(equalize),
  "Invert": Operation(invert),
  "Rotate": Operation(rotate, _signed(30.0), geometric=True),
  "PosterizeIncreasing": Operation(
    posterize, lambda magnitude, sign: 4 - int(magnitude / _HIGHEST * 4)
  ),
  "SolarizeIncreasing": Operation(
    solarize,
    lambda magnitude, sign: 256 - min(256, int(magnitude / _HIGHEST * 256)),
  ),
  "SolarizeAdd": Operation(
    solarize_add,
    lambda magnitude, sign: min(128, int(magnitude / _HIGHEST * 110)),
  ),
  "ColorIncreasing": Operation(color, _enhance),
  "ContrastIncreasing": Operation(contrast, _enhance),
  "BrightnessIncreasing": Operation(brightness, _enhance),
  "SharpnessIncreasing": Operation(sharpness, _enhance),
  "ShearX": Operation(shear_x, _signed(0.3), geometric=True),
  "ShearY": Operation(shear_y, _signed(0.3), geometric=True),
  "TranslateXRel": Operation(translate_x, _signed(0.45), geometric=True),
  "TranslateYRel": Operation(translate_y, _signed(0.45), geometric=True),
}
_SPECIFICATION: Final = re.compile(
  r"rand-m(\d+(?:\.\d+)?)-mstd(\d+(?:\.\d+)?)-inc1(?:-n(\d+))?"
)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """RandAugment (https://arxiv.org/abs/1909.13719) as timm has it.

  Attributes:
    magnitude: Mean strength of the operations, 0 to 10.
    deviation: Standard deviation of the strength.
    count: Operations per image, each applied with probability 1/2.
    interpolations: Of the geometric ones, OpenCV's; drawn for each.
    operations: What is drawn from.
  """

  magnitude: float
  deviation: float
  count: int = 2
  interpolations: tuple[int, ...] = (cv2.INTER_CUBIC,)
  operations: Mapping[str, Operation] = dataclasses.field(
    default_factory=lambda: OPERATIONS
  )

  def __call__(self, image: Image, rng: np.random.Generator) -> Image:
    """Changes an image."""
    names = tuple(self.operations)
    for _ in range(self.count):
      operation = self.operations[names[rng.integers(len(names))]]
      if rng.random() < 0.5:
        continue
      arguments = []
      if operation.argument is not None:
        magnitude = rng.normal(self.magnitude, self.deviation)
        magnitude = min(max(magnitude, 0.0), _HIGHEST)
        sign = 1 if rng.random() < 0.5 else -1
        arguments.append(operation.argument(magnitude, sign))
      if operation.geometric:
        which = rng.integers(len(self.interpolations))
        arguments.append(self.interpolations[which])
      image = operation.apply(image, *arguments)
    return image


def parse(
  specification: str, interpolations: tuple[int, ...] = (cv2.INTER_CUBIC,)
) -> RandAugment:
  """Reads timm's notation, such as "rand-m9-mstd0.5-inc1".

  Args:
    specification: Magnitude, its deviation, "inc1" and perhaps -n and the
      number of operations.
    interpolations: For `RandAugment`.

  Raises:
    ValueError: It is written otherwise.
  """
  match = _SPECIFICATION.fullmatch(specification)
  if match is None:
    raise ValueError(
      "config.data.randaugment must be '' or like 'rand-m9-mstd0.5-inc1', got "
      f"{specification!r}."
    )
  return RandAugment(
    float(match[1]), float(match[2]), int(match[3] or 2), interpolations
  )


def color_jitter(
  image: Image, strength: float, rng: np.random.Generator
) -> Image:
  """Changes brightness, contrast and saturation, in random order.

  Args:
    image: The image.
    strength: Factors are uniform in 1 - strength to 1 + strength, 0 at least.
    rng: Source of randomness.
  """
  operations = (brightness, contrast, color)
  for i in rng.permutation(len(operations)):
    factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
    image = operations[i](image, factor)
  return image


def random_erase(
  image: Image,
  rng: np.random.Generator,
  *,
  probability: float,
  mean: Sequence[float],
  std: Sequence[float],
) -> Image:
  """Replaces a box by noise (https://arxiv.org/abs/1708.04896).

  As timm's mode "pixel": of 2 % to a third of the area, with sides in
  proportions of 0.3 to 1 / 0.3. The noise is normal once the image is
  normalised; here it is cut off at the ends of the uint8 range, which changes 3
  % of its values.

  Args:
    image: The image; not changed.
    rng: Source of randomness.
    probability: Share of the images that a box is erased in.
    mean: Of the normalisation, per channel.
    std: Of the normalisation, per channel.
  """
  if rng.random() >= probability:
    return image
  height, width = image.shape[:2]
  for _ in range(_ERASE_TRIES):
    area = rng.uniform(0.02, 1 / 3) * height * width
    aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
    h = round(math.sqrt(area * aspect))
    w = round(math.sqrt(area / aspect))
    if h < height and w < width:
      top = rng.integers(0, height - h + 1)
      left = rng.integers(0, width - w + 1)
      noise = rng.standard_normal((h, w, 3), np.float32)
      noise = noise * np.asarray(std, np.float32)
      noise = 255 * (noise + np.asarray(mean, np.float32)) + 0.5
      image = image.copy()
      image[top : top + h, left : left + w] = np.clip(noise, 0, 255)
      break
  return image
