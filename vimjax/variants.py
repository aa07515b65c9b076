"""Records of what is known about each published model."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

from flax import linen as nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CropMode = Literal["center", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
  """How images are prepared for evaluation; `vimjax.preprocess` does it.

  Attributes:
    size: Side of the square that the model sees, in pixels.
    crop_fraction: Its share of the resized image's side.
    crop_mode: "center" resizes the shorter side and keeps the aspect;
      "squash" resizes both sides.
    interpolation: Filter of the resize, antialiased.
    mean: Per channel, of pixels in [0, 1].
    std: Per channel, of pixels in [0, 1].
  """

  size: int = 224
  crop_fraction: float = 0.875
  crop_mode: CropMode = "center"
  interpolation: Interpolation = "bicubic"
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """An official checkpoint.

  Attributes:
    source: Where it is: a Hugging Face repository, or a release's URL.
    files: File names there, the preferred one first.
    sha256: Of the first file, where known.
    license: Licence of the weights.
    commercial_use: Whether that licence allows commercial use.
    top1: Published ImageNet-1k top-1 accuracy in percent.
    top5: Published ImageNet-1k top-5 accuracy in percent.
  """

  source: str
  files: tuple[str, ...]
  sha256: str | None = None
  license: str
  commercial_use: bool
  top1: float
  top5: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """One published model.

  Attributes:
    module: Class of the model.
    fields: What the model is built with; every other field has its default.
    paper: Where the model is described.
    official: Its name in the official code.
    preprocessing: Evaluation preprocessing of the published accuracy.
    pretrained: The official checkpoint, if there is one.
  """

  module: type[nn.Module]
  fields: Mapping[str, Any]
  paper: str
  official: str
  preprocessing: Preprocessing = Preprocessing()
  pretrained: Pretrained | None = None
