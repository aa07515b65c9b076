"""Measures a model's accuracy: top-1 and top-5.

  python -m experiments.evaluate --model NAME [--weights FILE] [--data DATA]

FILE is an official checkpoint (.pth, .pth.tar, .safetensors) or one of ours;
without it the published weights are downloaded. Images are prepared as the
published accuracy of the model was measured, or as a run of ours recorded with
its weights.

DATA is "imagenet" (the validation split of TFDS's imagenet2012), "imagenet_v2"
(its matched-frequency images; or "imagenet_v2/threshold-0.7" and
"imagenet_v2/topimages"; --data_dir names TFDS's folder), or a folder with a
subfolder for each class, named by WordNet ids (n01440764, ...), by class
numbers as in the archives of ImageNet-V2, or, for weights of a run of yours, as
in its training data.

Of a folder with parts (train, and val or test) --split is "validation" unless
you choose another. Of one without, all images are measured, but of weights that
a run of yours trained on a folder only "validation", what such a run holds out.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import pathlib
import re
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.datasets import folder, imagenet, imagenet_v2, records
from experiments.imagenet import (
  checks,
  errors,
  eval_images,
  input_pipeline,
  rundir,
  sharding,
  steps,
)
from experiments.imagenet.configs import _base
import vimjax
from vimjax import variants
from vimjax.weights import download, pretrained, published

_IMAGENET_CLASSES = 1000
_IMAGENET_V2 = (
  imagenet_v2.NAME,
  *(f"{imagenet_v2.NAME}/{variant}" for variant in imagenet_v2.SOURCES),
)


def make_config(
  how: variants.Preprocessing,
  *,
  data: str,
  data_dir: str | None,
  classes: int,
  batch_size: int,
  split: str | None = None,
  metadata: Mapping[str, str] | None = None,
) -> tuple[ml_collections.ConfigDict, str]:
  """The configuration and the split of an evaluation.

  Args:
    how: How images are prepared.
    data: "imagenet", "imagenet_v2" or one of its variants, or a folder.
    data_dir: TFDS's folder, for all but a folder.
    classes: How many the weights have.
    batch_size: Images at a time; rounded up to a multiple of the devices.
    split: Of the data; None means the one that is meant for it.
    metadata: What the file of the weights says of itself.

  Returns:
    The configuration for `input_pipeline.eval_batches`, and the split.

  Raises:
    records.DataError: The folder is not there or not understood.
  """
  c = _base.get_config()
  eval_images.apply(c, how)
  devices = jax.device_count()
  c.eval_batch_size = -(-batch_size // devices) * devices
  c.model.overrides.num_classes = classes
  c.data.dir = data_dir
  if data == "imagenet":
    return c, split or "validation"
  if data in _IMAGENET_V2:
    c.data.name = data
    return c, split or "test"
  c.data.name, c.data.folder = "folder", data
  return c, split or _split_of_folder(data, metadata or {})


def _split_of_folder(data: str, metadata: Mapping[str, str]) -> str:
  """What to measure of a folder: not what the weights were trained on."""
  if "all" not in folder.splits(data):
    return "validation"
  if metadata.get("data") != "folder":
    return "all"
  print(
    "These weights are of a run on a folder: only the images that it holds out "
    "for validation are measured, one in ten. Give --split=all for all.",
    file=sys.stderr,
  )
  return "validation"


def label_table(
  names: Sequence[str] | None,
  classes: int,
  known: Sequence[str] | None = None,
) -> np.ndarray:
  """The model's class for each label of the data.

  Args:
    names: Of the data's classes, by label.
    classes: How many the model has.
    known: Names of the model's classes, if its weights say them; the data may
      have some of them only.

  Returns:
    Integers of shape (labels,).

  Raises:
    ValueError: The data's classes are not the model's.
  """
  names = list(names or [])
  if known and names and len(known) == classes:
    return _by_name(names, {name: i for i, name in enumerate(known)})
  if len(names) == classes == _IMAGENET_CLASSES and not names[0].isdecimal():
    return np.arange(classes, dtype=np.int32)  # In the order of their names.
  if classes == _IMAGENET_CLASSES:
    ids = {name: i for i, name in enumerate(imagenet.wordnet_ids())}
    if all(name in ids for name in names):
      return _by_name(names, ids)
    if all(re.fullmatch(r"\d{1,3}", name) for name in names):
      return np.array([int(name) for name in names], np.int32)
  if len(names) != classes:
    raise ValueError(
      f"The weights have {classes} classes, the data {len(names)} "
      f"({', '.join(names[:3])}, ...), and their names are neither WordNet ids "
      "nor class numbers."
    )
  return np.arange(classes, dtype=np.int32)


def _by_name(names: Sequence[str], known: Mapping[str, int]) -> np.ndarray:
  others = [name for name in names if name not in known]
  if others:
    raise ValueError(
      f"The data has {len(others)} classes that the weights do not have "
      f"({', '.join(others[:3])}, ...); theirs are {', '.join([*known][:3])}, "
      "..."
    )
  return np.array([known[name] for name in names], np.int32)


def evaluate(
  model: Any,
  variables: Any,
  config: ml_collections.ConfigDict,
  split: str,
  *,
  class_names: Sequence[str] | None = None,
) -> dict[str, float]:
  """Top-1 and top-5 accuracy and loss of a split, and how it was read.

  Args:
    model: A linen module.
    variables: For its `apply`.
    config: From `make_config`.
    split: From `make_config`.
    class_names: Of the model, if its weights say them.

  Returns:
    As `steps.evaluate`, and `unreadable`, the number of images left out.
  """
  mesh = sharding.make_mesh()
  table = label_table(
    input_pipeline.class_names(config, split),
    config.model.overrides.num_classes,
    class_names,
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
  parser.add_argument("--split", help="of a folder: train, validation, ...")
  parser.add_argument("--image_size", type=_count, help="default: the weights'")
  parser.add_argument("--batch_size", type=_count, default=128)
  parser.add_argument(
    "--dtype", choices=sorted(checks.DTYPES), default="float32"
  )
  parser.add_argument("--accept_license", action="store_true")
  parser.add_argument("--json", type=pathlib.Path, help="write the result")
  return parser.parse_args(argv)


def _count(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{number} is not at least 1")
  return number


def _run(args: argparse.Namespace) -> dict[str, Any]:
  vimjax.get_variant(args.model)  # Before anything is downloaded.
  path = args.weights or download.fetch(
    published.checkpoint(args.model, "evaluate"),
    accept_license=args.accept_license,
  )
  loaded = pretrained.load(
    args.model,
    path,
    args.which,
    image_size=args.image_size,
    dtype=checks.DTYPES[args.dtype],
  )
  config, split = make_config(
    loaded.preprocessing,
    data=args.data,
    data_dir=args.data_dir,
    classes=loaded.model.num_classes,
    batch_size=args.batch_size,
    split=args.split,
    metadata=loaded.metadata,
  )
  values = evaluate(
    loaded.model,
    loaded.variables,
    config,
    split,
    class_names=loaded.class_names,
  )
  return {
    "model": args.model,
    "weights": args.weights or "published",
    "data": args.data,
    "split": split,
    "image_size": loaded.preprocessing.size,
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
  size = result["image_size"]
  print(
    f"{result['model']}: top-1 {100 * result['accuracy']:.3f} %, top-5 "
    f"{100 * result['top5_accuracy']:.3f} % ({result['examples']} images, "
    f"{result['unreadable']} unreadable; {result['split']!r} of "
    f"{result['data']}, {size}x{size} pixels)",
    flush=True,
  )
  if args.json:
    try:
      rundir.write_json(args.json, result)
    except OSError as error:
      print(f"error: {error}", file=sys.stderr)
      return errors.ExitCode.IO_ERROR
  return errors.ExitCode.FINISHED


if __name__ == "__main__":
  sys.exit(main())
