"""Measures a model's accuracy: top-1 and top-5.

  python -m experiments.evaluate --model NAME [--weights FILE] [--data DATA]

FILE is an official checkpoint (.pth, .pth.tar, .safetensors) or one of ours;
without it the published weights are downloaded. Images are prepared as the
published accuracy of the model was measured.

DATA is "imagenet" (the validation split of TFDS's imagenet2012), "imagenet_v2"
(its matched-frequency images; or "imagenet_v2/threshold-0.7" and
"imagenet_v2/topimages"; --data_dir names TFDS's folder), or a folder with a
subfolder for each class, named by WordNet ids (n01440764, ...), by class
numbers as in the archives of ImageNet-V2, or, for weights of a run of yours, as
in its training data.
"""

import argparse
from collections.abc import Iterator, Sequence
import json
import pathlib
import re
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.datasets import imagenet, imagenet_v2, records
from experiments.imagenet import errors, input_pipeline, sharding, steps
from experiments.imagenet import run as run_lib
from experiments.imagenet.configs import _base
import vimjax
from vimjax import variants
from vimjax.weights import pretrained

_IMAGENET_CLASSES = 1000


def make_config(
  how: variants.Preprocessing,
  *,
  data: str,
  data_dir: str | None,
  classes: int,
  batch_size: int,
  image_size: int | None = None,
) -> tuple[ml_collections.ConfigDict, str]:
  """The configuration and the split of an evaluation.

  Args:
    how: The variant's preprocessing.
    data: "imagenet", "imagenet_v2" or one of its variants, or a folder.
    data_dir: TFDS's folder, for all but a folder.
    classes: How many the weights have.
    batch_size: Images at a time.
    image_size: Instead of the preprocessing's, in pixels.

  Returns:
    The configuration for `input_pipeline.eval_batches`, and the split.
  """
  c = _base.get_config()
  c.data.image_size = image_size or how.size
  c.data.crop_fraction = how.crop_fraction
  c.data.crop_mode = how.crop_mode
  c.data.mean, c.data.std = how.mean, how.std
  c.eval_batch_size = batch_size
  c.model.overrides.num_classes = classes
  c.data.dir = data_dir
  if data == "imagenet":
    return c, "validation"
  if data.startswith(imagenet_v2.NAME):
    c.data.name = data
    return c, "test"
  c.data.name, c.data.folder = "folder", data
  parts = [
    p for p in ("validation", "val", "valid", "test") if p in _names(data)
  ]
  both = parts and {"train", "training"} & _names(data)
  return c, "validation" if both else "all"


def _names(folder: str) -> set[str]:
  path = pathlib.Path(folder).expanduser()
  return {p.name for p in path.iterdir()} if path.is_dir() else set()


def label_table(names: Sequence[str] | None, classes: int) -> np.ndarray:
  """The model's class for each label of the data.

  Args:
    names: Of the data's classes, by label.
    classes: How many the model has.

  Returns:
    Integers of shape (labels,).

  Raises:
    ValueError: The data's classes are not the model's.
  """
  names = list(names or [])
  if len(names) == classes == _IMAGENET_CLASSES and not names[0].isdecimal():
    return np.arange(classes, dtype=np.int32)  # In the order of their names.
  if classes == _IMAGENET_CLASSES:
    known = {name: i for i, name in enumerate(imagenet.wordnet_ids())}
    if all(name in known for name in names):
      return np.array([known[name] for name in names], np.int32)
    if all(re.fullmatch(r"\d{1,3}", name) for name in names):
      return np.array([int(name) for name in names], np.int32)
  if len(names) != classes:
    raise ValueError(
      f"The weights have {classes} classes, the data {len(names)} "
      f"({', '.join(names[:3])}, ...), and their names are neither WordNet ids "
      "nor class numbers."
    )
  return np.arange(classes, dtype=np.int32)


def evaluate(
  model: Any,
  variables: Any,
  config: ml_collections.ConfigDict,
  split: str,
) -> dict[str, float]:
  """Top-1 and top-5 accuracy and loss of a split, and how it was read.

  Args:
    model: A linen module.
    variables: For its `apply`.
    config: From `make_config`.
    split: From `make_config`.

  Returns:
    As `steps.evaluate`, and `unreadable`, the number of images left out.
  """
  mesh = sharding.make_mesh()
  table = label_table(
    input_pipeline.class_names(config, split),
    config.model.overrides.num_classes,
  )
  total = input_pipeline.num_examples(config, split)

  def batches() -> Iterator[steps.Batch]:
    done = 0
    for batch in input_pipeline.eval_batches(config, split):
      labels = table[batch["label"]]
      yield steps.put_batch(batch | {"label": labels}, config, mesh)
      done += int(batch["mask"].sum())
      print(f"\r{done}/{total} images", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

  with jax.set_mesh(mesh):
    variables = jax.device_put(
      jax.device_get(variables), sharding.replicated(mesh)
    )
    eval_step = steps.make_eval_step(model, config, mesh)
    values = steps.evaluate(eval_step, variables, batches())
  return values | {"unreadable": total - values["examples"]}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True)
  parser.add_argument("--weights", help="default: the published ones")
  parser.add_argument("--which", choices=("model", "ema"), default="model")
  parser.add_argument(
    "--data", default="imagenet", help="imagenet, imagenet_v2 or a folder"
  )
  parser.add_argument("--data_dir", help="TFDS's folder")
  parser.add_argument("--image_size", type=int, help="default: the variant's")
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument(
    "--dtype", choices=sorted(run_lib.DTYPES), default="float32"
  )
  parser.add_argument("--accept_license", action="store_true")
  parser.add_argument("--json", type=pathlib.Path, help="write the result")
  return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> dict[str, Any]:
  variant = vimjax.get_variant(args.model)
  fields: dict[str, Any] = {"dtype": run_lib.DTYPES[args.dtype]}
  model = vimjax.create_model(args.model)
  size = args.image_size or variant.preprocessing.size
  if args.weights:
    found = pretrained.read(model, args.weights, args.which)
    model = found.model(args.model, **fields)
    with pretrained.naming(args.weights):
      variables = found.convert_for(model, image_size=size)
  else:
    model = vimjax.create_model(args.model, **fields)
    variables = vimjax.load_pretrained(
      args.model,
      weights=args.which,
      image_size=size,
      accept_license=args.accept_license,
    )
  if hasattr(model, "image_size"):
    model = model.clone(image_size=size)
  config, split = make_config(
    variant.preprocessing,
    data=args.data,
    data_dir=args.data_dir,
    classes=model.num_classes,
    batch_size=args.batch_size,
    image_size=args.image_size,
  )
  values = evaluate(model, variables, config, split)
  return {
    "model": args.model,
    "weights": args.weights or "published",
    "data": args.data,
    "image_size": size,
    **values,
  }


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; None means `sys.argv`. Returns the exit code."""
  args = _parse(argv)
  try:
    result = _run(args)
  except records.MissingDataError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.NO_INPUT
  except (
    ModuleNotFoundError,
    OSError,
    TypeError,
    ValueError,
    records.DataError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.USAGE
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + "\n")
  print(
    f"{result['model']}: top-1 {100 * result['accuracy']:.3f} %, top-5 "
    f"{100 * result['top5_accuracy']:.3f} % ({result['examples']} images, "
    f"{result['unreadable']} unreadable)"
  )
  return errors.ExitCode.FINISHED


if __name__ == "__main__":
  sys.exit(main())
