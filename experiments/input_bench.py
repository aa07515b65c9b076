"""Speed of the training pipeline's work on images, beside the same in Pillow.

  python -m experiments.input_bench [--images 100] [--rounds 5] [--json FILE]

Prints images per second of one core's time (not of the clock, so that a busy
machine matters less) for decoding, for decoding and random-resized-crop, for
RandAugment alone, and for all that the recipes do to an image: decode, crop,
flip, RandAugment and erase. The images are generated JPEGs of 500 x 375 pixels;
both sides take the same draws, and turns: numbers are medians over the rounds.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import datetime
import io
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from experiments.datasets import generated
from experiments.imagenet import augment, rundir, transforms

_SIZE = 224
_SIDES = (375, 500)
_QUALITY = 94
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SPECIFICATION = "rand-m9-mstd0.5-inc1"
Function = Callable[[Any, np.random.Generator], Any]
Work = tuple[Function, Sequence[Any]]


def make_jpegs(count: int) -> list[bytes]:
  """Generated photographs of a sort: stripes, colours and noise, as JPEG."""
  files = []
  for i in range(count):
    rng = np.random.default_rng(i)
    image = Image.fromarray(generated.make_image(i % 10, rng))
    image = image.resize(_SIDES[::-1], Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (*_SIDES, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    files.append(file.getvalue())
  return files


def _point(table: Callable[[int], int]) -> Callable[[Image.Image], Image.Image]:
  return lambda image: image.point([table(i) for i in range(256)] * 3)


def _affine(image: Image.Image, matrix: Sequence[float], _: int) -> Image.Image:
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    tuple(matrix),
    Image.Resampling.BICUBIC,
    fillcolor=augment.FILL,
  )


# What timm does with Pillow, by our names.
PILLOW: dict[str, Callable[..., Image.Image]] = {
  "AutoContrast": ImageOps.autocontrast,
  "Equalize": ImageOps.equalize,
  "Invert": ImageOps.invert,
  "Rotate": lambda image, degrees, _: image.rotate(
    degrees, Image.Resampling.BICUBIC, fillcolor=augment.FILL
  ),
  "PosterizeIncreasing": lambda image, bits: _point(
    lambda i: i & (256 - 2 ** (8 - bits))
  )(image),
  "SolarizeIncreasing": ImageOps.solarize,
  "SolarizeAdd": lambda image, amount: _point(
    lambda i: min(255, i + amount) if i < 128 else i
  )(image),
  "ColorIncreasing": lambda x, f: ImageEnhance.Color(x).enhance(f),
  "ContrastIncreasing": lambda x, f: ImageEnhance.Contrast(x).enhance(f),
  "BrightnessIncreasing": lambda x, f: ImageEnhance.Brightness(x).enhance(f),
  "SharpnessIncreasing": lambda x, f: ImageEnhance.Sharpness(x).enhance(f),
  "ShearX": lambda x, f, i: _affine(x, (1, f, 0, 0, 1, 0), i),
  "ShearY": lambda x, f, i: _affine(x, (1, 0, 0, f, 1, 0), i),
  "TranslateXRel": lambda x, f, i: _affine(
    x, (1, 0, f * x.size[0], 0, 1, 0), i
  ),
  "TranslateYRel": lambda x, f, i: _affine(
    x, (1, 0, 0, 0, 1, f * x.size[1]), i
  ),
}


def _pillow_operations() -> dict[str, augment.Operation]:
  return {
    name: dataclasses.replace(operation, apply=PILLOW[name])
    for name, operation in augment.OPERATIONS.items()
  }


def _pillow_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  w, h = image.size
  top, left, ch, cw = transforms.sample_crop(
    h, w, rng, area=_AREA, ratio=_RATIO
  )
  return image.resize(
    (_SIZE, _SIZE),
    Image.Resampling.BICUBIC,
    box=(left, top, left + cw, top + ch),
  )


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return transforms.random_resized_crop(
    image, rng, size=_SIZE, area=_AREA, ratio=_RATIO
  )


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return augment.random_erase(
    image, rng, probability=0.25, mean=_MEAN, std=_STD
  )


def _whole(data: bytes, rng: np.random.Generator, rand: Any) -> np.ndarray:
  image = transforms.random_flip(_crop(transforms.decode(data), rng), rng)
  return _erase(rand(image, rng), rng)


def _pillow_whole(
  data: bytes, rng: np.random.Generator, rand: Any
) -> np.ndarray:
  image = _pillow_crop(transforms.decode_pillow(data), rng)
  if rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return _erase(np.asarray(rand(image, rng)), rng)


def measure(works: Sequence[Work], rounds: int) -> tuple[list[float], float]:
  """Compares two ways, in turn.

  Args:
    works: Both ways: the function, which takes an input and a source of
      randomness, and the inputs of a round.
    rounds: How often both are measured.

  Returns:
    For both, images per second of one core's time, and how many times as fast
    the first is: medians over the rounds.
  """
  rates = [[_rate(*work) for work in works] for _ in range(rounds)]
  medians = [statistics.median(rate) for rate in zip(*rates, strict=True)]
  return medians, statistics.median(ours / other for ours, other in rates)


def _rate(function: Function, inputs: Sequence[Any]) -> float:
  start = time.process_time()
  for i, x in enumerate(inputs):
    function(x, np.random.default_rng(i))
  return len(inputs) / (time.process_time() - start)


def run(images: int, rounds: int) -> list[dict[str, Any]]:
  """One row per kind of work: its name, both rates, and their ratio."""
  transforms.one_thread()
  files = make_jpegs(images)
  small = [_crop(transforms.decode(f), np.random.default_rng(0)) for f in files]
  small_pillow = [Image.fromarray(x) for x in small]
  ours = augment.parse(_SPECIFICATION)
  theirs = dataclasses.replace(ours, operations=_pillow_operations())
  kinds = {
    "decode": (
      (lambda x, rng: transforms.decode(x), files),
      (lambda x, rng: np.asarray(transforms.decode_pillow(x)), files),
    ),
    "decode and crop": (
      (lambda x, rng: _crop(transforms.decode(x), rng), files),
      (lambda x, rng: _pillow_crop(transforms.decode_pillow(x), rng), files),
    ),
    "RandAugment": ((ours, small), (theirs, small_pillow)),
    "whole pipeline": (
      (lambda x, rng: _whole(x, rng, ours), files),
      (lambda x, rng: _pillow_whole(x, rng, theirs), files),
    ),
  }
  rows = []
  for name, works in kinds.items():
    (rate, of_pillow), ratio = measure(works, rounds)
    rows.append(dict(work=name, ours=rate, pillow=of_pillow, ratio=ratio))
  return rows


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; None means `sys.argv`. Returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.input_bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--images", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args(argv)
  rows = run(args.images, args.rounds)
  print("images per second of one core   ours   Pillow   ratio")
  for row in rows:
    print(
      f"{row['work']:29} {row['ours']:7.0f} {row['pillow']:8.0f} "
      f"{row['ratio']:7.2f}"
    )
  if args.json:
    environment = rundir.environment()
    result = {
      "date": datetime.date.today().isoformat(),
      "device": f"one CPU core ({platform.machine()})",
      "versions": environment["versions"],
      "images": args.images,
      "rounds": args.rounds,
      "rows": rows,
    }
    rundir.write_json(args.json, result)
  return 0


if __name__ == "__main__":
  sys.exit(main())
