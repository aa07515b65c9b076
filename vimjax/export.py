"""Saves a model as one portable program: `python -m vimjax.export NAME`.

The file has the weights in it and takes any number of normalised images of one
size. Two formats:

  stablehlo  in the form of `jax.export`: JAX runs it without this package, and
             compilers that read StableHLO take `exported.mlir_module()`
  onnx       for ONNX Runtime and others; here the recurrence of a scan runs
             token by token, which is slower than in JAX
"""

import argparse
from collections.abc import Callable, Sequence
import pathlib
import sys
from typing import Any, Final

from flax import linen as nn
import jax
from jax import export
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from vimjax import command_line, onnx_program, optional, registry
from vimjax.weights import pretrained

# What ONNX has operations for: a loop over tokens, and products of matrices.
_PLAIN: Final = {
  "scan_implementation": "reference",
  "attention_implementation": "xla",
}


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
  (b,) = export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct(
    (b, *_image_shape(model, image_size)), jnp.float32
  )
  function = jax.jit(lambda images: model.apply(variables, images))
  return bytes(export.export(function)(images).serialize())


def _image_shape(
  model: nn.Module, image_size: int | tuple[int, int]
) -> tuple[int, int, int]:
  h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
  return h, w, model.in_chans


def load_exported(
  data: bytes,
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b classes"]]:
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


def export_onnx(
  model: nn.Module, variables: Any, *, image_size: int | tuple[int, int]
) -> bytes:
  """An ONNX program that maps images to logits, with the variables in it.

  Its input is `images`, (batch, h, w, in_chans) float32 with a batch of any
  size from 1, its output `logits`, (batch, classes) float32. Scanned layers
  load much faster than layers one by one.

  Args:
    model: A model of this package that computes in float32.
    variables: Its variables.
    image_size: Side of the images, or (h, w), in pixels.

  Returns:
    The content of an `.onnx` file.

  Raises:
    ModuleNotFoundError: The extra `onnx` is not installed.
    ValueError: The model computes in another dtype.
    UnsupportedError: The weights are larger than the 2 GB that a file can
      have, or the model has an operation that is not known.
  """
  dtype = getattr(model, "dtype", None)
  if dtype is not None and jnp.dtype(dtype) != jnp.float32:
    raise ValueError(
      "export_onnx: the model must compute in float32, got dtype="
      f"{jnp.dtype(dtype).name}. Create it without `dtype`."
    )
  known = registry.field_names(type(model))
  fields: Any = {name: x for name, x in _PLAIN.items() if name in known}
  plain: Any = model.clone(**fields)
  function = lambda images: plain.apply(variables, images)
  return onnx_program.write(function, _image_shape(model, image_size))


_FORMATS: Final = {"stablehlo": export_model, "onnx": export_onnx}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m vimjax.export",
    description="Saves a model with its weights as one portable program.",
  )
  add = parser.add_argument
  add("name", metavar="NAME", choices=registry.list_models())
  add("--weights", required=True, metavar="FILE", help="checkpoint")
  add("--format", choices=list(_FORMATS), default="stablehlo")
  add("--output", type=pathlib.Path, help="default: NAME.FORMAT")
  add(
    "--size",
    type=command_line.positive_integer,
    help="side of the images; default: that of the weights",
  )
  args = parser.parse_args(argv)
  output = args.output or pathlib.Path(f"{args.name}.{args.format}")
  try:
    # Scanned layers make a program of a fraction of the size.
    loaded = pretrained.load(
      args.name, args.weights, image_size=args.size, scan_layers=True
    )
    size = loaded.preprocessing.size
    write = _FORMATS[args.format]
    data = write(loaded.model, loaded.variables, image_size=size)
    output.write_bytes(data)
  except (
    OSError,
    ValueError,
    ModuleNotFoundError,
    pallas_kernels.UnsupportedError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"wrote {output} ({len(data) / 1e6:.1f} MB, images of {size}x{size})")
  return 0


if __name__ == "__main__":
  sys.exit(main())
