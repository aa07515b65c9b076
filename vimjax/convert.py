"""Converts checkpoints: `python -m vimjax.convert --model NAME IN OUT`.

Official to ours (.pth, .pth.tar or .safetensors to .safetensors), or with
--to-torch ours to official (.safetensors to .pth or .safetensors), which the
official code loads. PyTorch is not needed. The licence of the published weights
is printed, and kept in the metadata of safetensors files.
"""

import argparse
from collections.abc import Sequence
import logging
import pathlib
import sys
from typing import Any

import jax

from vimjax import registry, version
from vimjax.weights import (
  checkpoint_files,
  convert,
  download,
  export,
  pretrained,
  torch_writer,
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  logging.basicConfig(format="%(message)s", level=logging.INFO)
  try:
    _check_paths(args)
    arrays = _to_official(args) if args.to_torch else _to_ours(args)
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  published = registry.get_variant(args.model).pretrained
  if published is not None:
    print(
      f"{args.model}: {download.license_notice(published)} Weights derived "
      "from these keep that licence."
    )
  print(f"wrote {args.output} ({arrays} arrays)")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.convert",
    description="Converts official checkpoints to ours, or ours to official.",
  )
  parser.add_argument("input", type=pathlib.Path, help="checkpoint to read")
  parser.add_argument("output", type=pathlib.Path, help="file to write")
  parser.add_argument(
    "--model",
    required=True,
    choices=registry.list_models(),
    metavar="NAME",
    help="model of the weights, such as vim_tiny",
  )
  parser.add_argument(
    "--weights",
    choices=("model", "ema"),
    default="model",
    help="which of a checkpoint's weights to read (default: model)",
  )
  parser.add_argument(
    "--image-size",
    type=int,
    metavar="PIXELS",
    help="image side that the result is for, where the model has positional "
    "embeddings (default: the published one; with --to-torch, the weights' "
    "own must be given)",
  )
  parser.add_argument(
    "--to-torch",
    action="store_true",
    help="write official names and layouts: .pth for torch.load, or "
    ".safetensors",
  )
  return parser


def _check_paths(args: argparse.Namespace) -> None:
  suffixes = (".safetensors", ".pth", ".pt", ".tar", ".bin")
  allowed = suffixes if args.to_torch else suffixes[:1]
  if args.output.suffix not in allowed:
    raise ValueError(
      f"{args.output}: the name should end in one of {', '.join(allowed)}."
    )
  if args.output.exists() and args.output.samefile(args.input):
    raise ValueError("The output would replace the input; choose another name.")
  if not args.output.absolute().parent.is_dir():
    raise ValueError(f"The folder of {args.output} does not exist.")


def _to_ours(args: argparse.Namespace) -> int:
  model = registry.create_model(args.model)
  state_dict = pretrained.read_official(model, args.input, args.weights)
  model = _for_classes(args.model, state_dict)
  variables = convert.convert_state_dict(
    model, state_dict, image_size=args.image_size
  )
  checkpoint_files.save_variables(
    args.output, variables, metadata=_metadata(args)
  )
  return len(jax.tree.leaves(variables))


def _for_classes(name: str, state_dict: Any, **fields: Any) -> Any:
  """The model with the classifier of a state dict."""
  classes = pretrained.class_count(state_dict)
  if classes is not None:
    fields["num_classes"] = classes
  return registry.create_model(name, **fields)


def _to_official(args: argparse.Namespace) -> int:
  state_dict = checkpoint_files.read_state_dict(args.input, args.weights)
  if not checkpoint_files.is_ours(state_dict):
    raise ValueError(f"{args.input} has official names already.")
  variables = checkpoint_files.unflatten(state_dict)
  model = registry.create_model(args.model)
  names = export.official_names(model, variables)
  size = {"image_size": args.image_size} if args.image_size else {}
  official = export.export_state_dict(
    _for_classes(args.model, names, **size), variables
  )
  if args.output.suffix == ".safetensors":
    # "format" is what the official ecosystem's loaders look for.
    checkpoint_files.write_safetensors(
      args.output, official, {**_metadata(args), "format": "pt"}
    )
  else:
    with checkpoint_files.replacing(args.output) as temporary:
      torch_writer.write(temporary, official)
  return len(official)


def _metadata(args: argparse.Namespace) -> dict[str, str]:
  metadata = {
    "model": args.model,
    "converted_from": args.input.name,
    "weights": args.weights,
    "converter": f"vimjax {version.__version__}",
  }
  published = registry.get_variant(args.model).pretrained
  if published is not None:
    metadata |= {
      "license": published.license,
      "commercial_use": str(published.commercial_use).lower(),
      "source": download.web_page(published),
    }
  return metadata


if __name__ == "__main__":
  sys.exit(main())
