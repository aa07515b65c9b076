"""Converts checkpoints: `python -m vimjax.convert --model NAME IN OUT`.

Official to ours (.pth, .pth.tar or .safetensors to .safetensors), or with
--to-torch ours to official (.safetensors to .pth or .safetensors), which the
official code loads. PyTorch is not needed. The licence of the published weights
is printed, and kept in the metadata of safetensors files, beside what the
metadata of the input said.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import jax

from vimjax import command_line, registry, version
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
  try:
    _check_paths(args)
    with command_line.messages():
      arrays = _to_official(args) if args.to_torch else _to_ours(args)
  except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  published = registry.get_variant(args.model).pretrained
  if published is not None:
    print(
      f"{args.model}: if derived from the published weights, the file keeps "
      f"their licence. {download.license_notice(published)}"
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
    type=command_line.positive_integer,
    metavar="PIXELS",
    help="image side that the result is for; makes a difference to models with "
    "a positional embedding (default: the published one; with --to-torch, the "
    "weights' own, which must be given if the file does not say it)",
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
  found = _read(args)
  model = convert.resized(found.model(args.model), args.image_size)
  variables = convert.convert(
    found.model(args.model),
    found.state_dict,
    image_size=args.image_size,
    made_for=found.made_for,
  )
  checkpoint_files.save_variables(
    args.output, variables, metadata=_metadata(args, found, model)
  )
  return len(jax.tree.leaves(variables))


def _read(args: argparse.Namespace) -> pretrained.Checkpoint:
  return pretrained.read(args.model, args.input, args.weights)


def _to_official(args: argparse.Namespace) -> int:
  found = _read(args)
  if found.variables is None:
    raise ValueError(f"{args.input} has official names already.")
  size = args.image_size or checkpoint_files.recorded_size(found.metadata)
  model = convert.resized(found.model(args.model), size)
  official = export.export_state_dict(model, found.variables)
  if args.output.suffix == ".safetensors":
    # "format" is what the official ecosystem's loaders look for.
    checkpoint_files.write_safetensors(
      args.output, official, {**_metadata(args, found, model), "format": "pt"}
    )
  else:
    with checkpoint_files.replacing(args.output) as temporary:
      torch_writer.write(temporary, official)
  return len(official)


def _metadata(
  args: argparse.Namespace, found: pretrained.Checkpoint, model: Any
) -> dict[str, str]:
  """What the input says about itself, and what is known about the model.

  Whether these are the published weights, or were trained from them, cannot be
  told; so the keys say whose licence and source they are.
  """
  metadata = {
    "converted_from": args.input.name,
    "weights": args.weights,
    **_kept(found),
    "model": args.model,
    "converter": f"vimjax {version.__version__}",
  }
  if hasattr(model, "image_size"):
    metadata |= checkpoint_files.size_metadata(model.image_size)
  pretrained_weights = registry.get_variant(args.model).pretrained
  if pretrained_weights is not None:
    metadata |= {
      "published_license": pretrained_weights.license,
      "published_commercial_use": str(
        pretrained_weights.commercial_use
      ).lower(),
      "published_source": download.web_page(pretrained_weights),
    }
  return metadata


def _kept(found: pretrained.Checkpoint) -> dict[str, str]:
  """The metadata of files that we wrote."""
  if found.variables is None and "converter" not in found.metadata:
    return {}
  return {k: v for k, v in found.metadata.items() if k != "format"}


if __name__ == "__main__":
  sys.exit(main())
