"""Classifies images: `python -m vimjax.predict IMAGE... --model NAME`.

Prints the most probable classes of each image. Without --weights, the published
checkpoint is downloaded on first use. An image that cannot be read is named on
standard error, the others go on, and the exit code is 1.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vimjax import (
  command_line,
  imagenet_classes,
  optional,
  preprocessing,
  registry,
  variants,
)
from vimjax.weights import download, pretrained, published


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  try:
    optional.require("PIL.Image", extra="image")
    loaded = _load(args)
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  results = _predict_all(loaded, args)
  print(json.dumps(results, indent=2) if args.json else _table(results))
  return int(any("error" in result for result in results))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.predict",
    description="Prints the most probable classes of images.",
  )
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
  parser.add_argument(
    "--model",
    required=True,
    choices=registry.list_models(),
    metavar="NAME",
    help="model, such as vim_tiny",
  )
  parser.add_argument(
    "--weights",
    metavar="FILE",
    help="checkpoint, official or converted (default: download the published "
    "one)",
  )
  parser.add_argument(
    "--ema",
    action="store_true",
    help="take the running average of the weights, where a checkpoint has one",
  )
  parser.add_argument(
    "--accept-license",
    action="store_true",
    help="accept the licence of weights that may not be used commercially",
  )
  parser.add_argument(
    "--top",
    type=command_line.positive_integer,
    default=5,
    help="classes per image (default: 5)",
  )
  parser.add_argument(
    "--batch-size",
    type=command_line.positive_integer,
    default=32,
    help="images at a time (default: 32)",
  )
  parser.add_argument(
    "--json", action="store_true", help="print JSON instead of a table"
  )
  return parser


def _load(args: argparse.Namespace) -> pretrained.Loaded:
  path = args.weights
  if path is None:
    path = download.fetch(
      published.checkpoint(args.model, "predict"),
      accept_license=args.accept_license,
      consent="--accept-license",
    )
  which = "ema" if args.ema else "model"
  # Scanned layers compile in a fraction of the time.
  return pretrained.load(args.model, path, which, scan_layers=True)


def _class_names(loaded: pretrained.Loaded) -> Sequence[str] | None:
  """Names of the model's classes, if they are known."""
  names = loaded.class_names or imagenet_classes.names()
  return names if len(names) == loaded.model.num_classes else None


def _predict_all(
  loaded: pretrained.Loaded, args: argparse.Namespace
) -> list[dict[str, Any]]:
  """One entry per image, in order; unreadable ones have an "error"."""

  @jax.jit
  def probabilities(variables: Any, images: jax.Array) -> jax.Array:
    logits: Any = loaded.model.apply(variables, images)
    return jax.nn.softmax(logits, axis=-1)

  class_names = _class_names(loaded)
  results = []
  total = len(args.images)
  # Few images do not fill a batch: no need to compute a whole one.
  size = min(args.batch_size, total)
  for names in _batched(args.images, size):
    entries, pixels = _read(names, loaded.preprocessing)
    if pixels:
      padding = [np.zeros_like(pixels[0])] * (size - len(pixels))
      batch = jnp.asarray(np.stack(pixels + padding))
      rows = iter(np.asarray(probabilities(loaded.variables, batch)))
      for entry in entries:
        if "error" not in entry:
          entry["predictions"] = _top(next(rows), args.top, class_names)
    results += entries
    _progress(len(results), total)
  return results


def _batched(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
  return itertools.batched(items, size)


def _read(
  names: Iterable[str], how: variants.Preprocessing
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
  """Entries of all images, and the pixels of those that can be read."""
  pil = optional.require("PIL.Image", extra="image")
  entries, pixels = [], []
  for name in names:
    try:
      with pil.open(name) as image:
        pixels.append(preprocessing.prepare(image, how))
      entries.append({"image": name})
    except Exception as error:
      # Decoders of damaged files raise almost anything.
      reason = str(error) or type(error).__name__
      print(f"error: cannot read {name}: {reason}", file=sys.stderr)
      entries.append({"image": name, "error": reason})
  return entries, pixels


def _top(
  row: np.ndarray, count: int, names: Sequence[str] | None
) -> list[dict[str, Any]]:
  """The most probable classes, by falling probability."""
  best = np.argsort(-row, kind="stable")[:count]
  return [
    {
      "class": names[i] if names else f"class {i}",
      "index": int(i),
      "probability": float(row[i]),
    }
    for i in best
  ]


def _progress(done: int, total: int) -> None:
  filled = 30 * done // total
  bar = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} images"
  # On a terminal the bar stays on one line; a log gets a line per batch.
  terminal = sys.stderr.isatty()
  end = "\r" if terminal and done < total else "\n"
  print(bar, end=end, file=sys.stderr, flush=True)


def _table(results: Iterable[dict[str, Any]]) -> str:
  lines = []
  for result in results:
    lines.append(result["image"])
    if "error" in result:
      lines.append("  cannot be read")
    for row in result.get("predictions", ()):
      lines.append(
        f"  {100 * row['probability']:6.2f} %  {row['index']:4d}  "
        f"{row['class']}"
      )
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
