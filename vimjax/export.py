"""Saves a model as one portable program: `python -m vimjax.export NAME`.

The file has the weights in it and takes any number of normalised images of one
size. It is StableHLO, in the form of `jax.export`: JAX runs it without this
package, and compilers that read StableHLO take `exported.mlir_module()`.
"""

import argparse
from collections.abc import Callable, Sequence
import pathlib
import sys
from typing import Any

from flax import linen as nn
import jax
from jax import export
import jax.numpy as jnp
from jaxtyping import Array, Float

from vimjax import optional, registry
from vimjax.weights import pretrained


def export_model(
  model: nn.Module, variables: Any, *, image_size: int | tuple[int, int]
) -> bytes:
  """A program that maps images to logits, with the variables in it.

  It runs on the kind of device that JAX uses now (the scan's implementation is
  chosen for it), with a batch of any size. It has no gradient.

  Args:
    model: A model of this package.
    variables: Its variables.
    image_size: Side of the images, or (h, w), in pixels.

  Returns:
    What `load_exported` and `jax.export.deserialize` read.

  Raises:
    ModuleNotFoundError: The extra `export` is not installed.
  """
  optional.require("flatbuffers", extra="export")
  h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
  (b,) = export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32)
  function = jax.jit(lambda images: model.apply(variables, images))
  return bytes(export.export(function)(images).serialize())


def load_exported(
  data: bytes,
) -> Callable[[Float[Array, "b h w 3"]], Float[Array, "b classes"]]:
  """The function in what `export_model` gave.

  Raises:
    ModuleNotFoundError: The extra `export` is not installed.
    ValueError: The data is something else, or damaged.
  """
  optional.require("flatbuffers", extra="export")
  try:
    exported = export.deserialize(bytearray(data))
  except Exception as error:
    # The reader of the format raises almost anything.
    raise ValueError(f"This is no exported program: {error}") from error
  return jax.jit(exported.call)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.export",
    description="Saves a model with its weights as one portable program.",
  )
  add = parser.add_argument
  add("name", metavar="NAME", choices=registry.list_models())
  add("--weights", required=True, metavar="FILE", help="checkpoint")
  add("--output", type=pathlib.Path, help="default: NAME.stablehlo")
  add("--size", type=int, help="side of the images; default: the published one")
  args = parser.parse_args(argv)
  size = registry.get_variant(args.name).preprocessing.size
  size = size if args.size is None else args.size
  output = args.output or pathlib.Path(f"{args.name}.stablehlo")
  try:
    found = pretrained.read(registry.create_model(args.name), args.weights)
    # Scanned layers make a program of a fraction of the size.
    model = registry.with_scan_layers(found.model(args.name), True)
    data = export_model(model, found.convert_for(model), image_size=size)
    output.write_bytes(data)
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"wrote {output} ({len(data) / 1e6:.1f} MB, images of {size}x{size})")
  return 0


if __name__ == "__main__":
  sys.exit(main())
