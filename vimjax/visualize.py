"""Draws what models look at: `python -m vimjax.visualize WHAT IMAGE...`.

  erf       how much the middle of the last feature map depends on each pixel
  scan      what a token takes from the others in one layer (implicit attention)
  features  the main directions of a feature map, as colours

Writes one PNG file. `vimjax.maps` has the functions, for notebooks.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vimjax import maps, optional, preprocessing, registry, variants
from vimjax.layers import stack
from vimjax.weights import pretrained

# Dark blue, violet, red, yellow, white: brightness grows with the value.
_COLOURS = np.array(
  [(0, 0, 40), (90, 20, 120), (220, 60, 70), (250, 190, 60), (255, 255, 230)]
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  try:
    pil = optional.require("PIL.Image", extra="image")
    model, variables, how = _load(args)
    pixels, images = _read(args, how)
    picture = _DRAW[args.what](model, variables, images, pixels, args)
    pil.fromarray(picture).save(args.output, format="PNG")
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"wrote {args.output} ({picture.shape[1]}x{picture.shape[0]} pixels)")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.visualize",
    description="Draws what models look at.",
  )
  add = parser.add_argument
  add("what", choices=list(_DRAW))
  add("images", nargs="+", metavar="IMAGE", help="image file")
  add(
    "--model",
    required=True,
    choices=registry.list_models(),
    metavar="NAME",
    help="such as vim_tiny",
  )
  add(
    "--weights",
    metavar="FILE",
    help="checkpoint, official or converted (default: random weights)",
  )
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("picture.png"),
    help="default: picture.png",
  )
  add("--size", type=int, help="side of the images; default: the weights'")
  add(
    "--layer",
    type=int,
    default=-1,
    help="for scan: which layer that mixes tokens, from 0; default: the last",
  )
  add(
    "--token",
    type=int,
    nargs=2,
    metavar=("ROW", "COLUMN"),
    help="for scan; default: the class token, or the middle",
  )
  add(
    "--stage",
    type=int,
    default=-1,
    help="for features: which map, from 0; default: the last",
  )
  return parser


def _load(
  args: argparse.Namespace,
) -> tuple[nn.Module, Any, variants.Preprocessing]:
  """The model, its variables, and how its images are prepared."""
  if args.weights is None:
    model = registry.create_model(args.model)
    print(
      "no --weights: the weights are random, and so is what they look at",
      file=sys.stderr,
    )
    image = jnp.zeros((1, 64, 64, 3))
    scanned = registry.with_scan_layers(model, True)
    # Scanned layers compile in a fraction of the time.
    variables = jax.jit(scanned.init)(jax.random.key(0), image)
    usual = registry.get_variant(args.model).preprocessing
    return model, stack.unstack_layers(variables), usual
  loaded = pretrained.load(args.model, args.weights)
  return loaded.model, loaded.variables, loaded.preprocessing


def _read(
  args: argparse.Namespace, how: variants.Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
  """Pixels (b, h, w, 3) in [0, 255] and normalised images."""
  pil = optional.require("PIL.Image", extra="image")
  size = how.size if args.size is None else args.size
  if size < 1:
    raise ValueError(f"--size must be positive, got {size}.")
  pixels = []
  for name in args.images:
    with pil.open(name) as image:
      cropped = preprocessing.resize_and_crop(
        image,
        size=size,
        crop_fraction=how.crop_fraction,
        crop_mode=how.crop_mode,
        interpolation=how.interpolation,
      )
    pixels.append(np.asarray(cropped, np.float32))
  stacked = np.stack(pixels)
  return stacked, preprocessing.normalize(stacked, how.mean, how.std)


def _draw_erf(model, variables, images, pixels, args) -> np.ndarray:
  del pixels, args
  field = np.asarray(maps.effective_receptive_field(model, variables, images))
  # As in VMamba's figure.
  return _heat((field / max(field.max(), 1e-30)) ** 0.2)


def _draw_scan(model, variables, images, pixels, args) -> np.ndarray:
  found = maps.token_attention(
    model,
    variables,
    images,
    layer=args.layer,
    token=None if args.token is None else tuple(args.token),
  )
  pairs = []
  for weights, image in zip(np.asarray(found), pixels, strict=True):
    heat = _heat(_enlarge(_bright(weights), image.shape))
    mixed = (0.4 * image + 0.6 * heat).astype(np.uint8)
    pairs.append(np.concatenate([image.astype(np.uint8), mixed], axis=1))
  return np.concatenate(pairs)


def _bright(weights: np.ndarray) -> np.ndarray:
  """Weights in [0, 1]; the largest 5 % alike.

  A token takes most from itself, through the skip connection of a scan, which
  would leave all others dark.
  """
  seen = weights[weights > 0]
  most = np.percentile(seen, 95) if seen.size else 1.0
  return np.clip(weights / most, 0, 1)


def _draw_features(model, variables, images, pixels, args) -> np.ndarray:
  apply = jax.jit(model.apply, static_argnames="method")
  features = apply(variables, images, method="features")
  if isinstance(features, tuple):
    if not -len(features) <= args.stage < len(features):
      raise ValueError(
        f"--stage must be from {-len(features)} to {len(features) - 1}, got "
        f"{args.stage}."
      )
    features = features[args.stage]
  pairs = []
  for colours, image in zip(maps.feature_pca(features), pixels, strict=True):
    large = (255 * _enlarge(colours, image.shape)).astype(np.uint8)
    pairs.append(np.concatenate([image.astype(np.uint8), large], axis=1))
  return np.concatenate(pairs)


_DRAW = {"erf": _draw_erf, "scan": _draw_scan, "features": _draw_features}


def _enlarge(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Repeats rows and columns until the map has the size of the image."""
  rows = np.arange(shape[0]) * x.shape[0] // shape[0]
  columns = np.arange(shape[1]) * x.shape[1] // shape[1]
  return x[rows[:, None], columns]


def _heat(x: np.ndarray) -> np.ndarray:
  """Colours (h, w, 3) for values in [0, 1]."""
  at = np.linspace(0, 1, len(_COLOURS))
  channels = [np.interp(x, at, _COLOURS[:, i]) for i in range(3)]
  return np.stack(channels, axis=-1).astype(np.uint8)


if __name__ == "__main__":
  sys.exit(main())
