"""Memory of whole models compiled for an H100, on a machine without one.

  python -m experiments.throughput.compiled_memory --json results.json

The setting is the one in which Vim's paper compares with DeiT: inference in
float32 on 64 images of 1248 x 1248 pixels. The compiler is that of JAX's CUDA
plugin (`pip install 'jax[cuda13]'`), which is told what an H100 is like and
asks no driver; nothing runs. Bytes are the compiler's account, the same as in
a measured row: it is exact for what the program itself allocates, and knows
nothing of what else is on the device.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import textwrap
from typing import Final

import jax
from jax.experimental import topologies
import numpy as np

from experiments.throughput import cases, programs
from pallas_kernels import bench_compare
from vimjax import command_line

_MODELS: Final = ("vim_tiny", "deit_tiny")
_SIZE: Final = 1248
_BATCH: Final = 64
_DEVICE: Final = "NVIDIA H100 80GB HBM3"
_PLUGIN: Final = "jax-cuda13-plugin"
_FLOAT32_BYTES: Final = 4

# What the compiler asks of a device, as the driver of an H100 SXM answers.
_H100: Final = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{
    major: 9
    minor: 0
    feature_extension: ACCELERATED_FEATURES
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{_DEVICE}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What a compiled program needs, in bytes.

  Attributes:
    case: The case.
    argument_bytes: Parameters and images.
    temp_bytes: What it needs beside arguments and results.
    peak_bytes: Arguments, results and temporary memory.
    scan_kernels: How many Mosaic GPU kernels it calls.
    matrix_bytes: Of attention weights, float32, one for each head and image:
      the L x L copy that materialised attention writes; None without attention.
    matrices: How many of those the temporary memory would hold.
  """

  case: cases.Case
  argument_bytes: int
  temp_bytes: int
  peak_bytes: int
  scan_kernels: int
  matrix_bytes: int | None = None
  matrices: float | None = None


def h100() -> jax.sharding.NamedSharding:
  """Of an H100 to compile for, which need not be here.

  Raises:
    ModuleNotFoundError: JAX's CUDA plugin is not installed.
  """
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    raise ModuleNotFoundError(
      "the CUDA plugin is missing: pip install 'jax[cuda13]'"
    )
  # The plugin would look for a driver and its libraries.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  topology = topologies.get_topology_desc(
    "h100", "cuda", target_config=_H100, topology="1x1x1"
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def run(case: cases.Case, sharding: jax.sharding.NamedSharding) -> Row:
  """Compiles a case for the device of a sharding."""
  with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
    program = programs.compile_case(case, sharding)
  hlo = program.compiled.as_text() or ""
  row = Row(
    case=case,
    argument_bytes=program.argument_bytes,
    temp_bytes=program.temp_bytes,
    peak_bytes=program.peak_bytes,
    scan_kernels=hlo.count('custom_call_target="mosaic_gpu'),
  )
  if case.attention != "materialised":
    return row
  model = programs.build(case)
  h, w = model.grid(case.size)
  matrix = _FLOAT32_BYTES * case.batch * model.num_heads * (h * w + 1) ** 2
  return dataclasses.replace(
    row, matrix_bytes=matrix, matrices=program.temp_bytes / matrix
  )


def text(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
  """What the compiler says, in words, the rows being those of `main`."""
  vim, deit = rows
  if deit.matrices is None or deit.matrix_bytes is None:
    raise ValueError("the last row has no attention weights in memory")
  case = deit.case
  less = 100 * (1 - vim.peak_bytes / deit.peak_bytes)
  return textwrap.fill(
    f"Compiled for an {environment['device']}, run on none: inference in "
    f"{case.dtype} on {case.batch} images of {case.size} x {case.size} takes "
    f"{vim.peak_bytes / 1e9:.1f} GB in {vim.case.label}, parameters and images "
    f"included, {less:.1f} % less than {deit.peak_bytes / 1e9:.1f} GB in "
    f"{case.label}, whose temporary memory is {deit.matrices:.2f} times the "
    f"attention weights of a layer, {deit.matrix_bytes / 1e9:.1f} GB: "
    f"{int(deit.matrices)} such L x L copies live at once (jax "
    f"{environment['jax']}, {environment['date'][:10]}).",
    80,
  )


def _cases(size: int, batch: int) -> list[cases.Case]:
  return [
    cases.Case(
      model=model,
      size=size,
      batch=batch,
      mode="inference",
      dtype="float32",
      precision="full",
      attention="materialised" if model in cases.BASELINES else None,
    )
    for model in _MODELS
  ]


def read(path: pathlib.Path) -> tuple[dict[str, str], list[Row]]:
  """The environment and the rows of what `main` wrote."""
  content = json.loads(path.read_text())
  rows = [
    Row(**row | {"case": cases.Case(**row["case"])}) for row in content["rows"]
  ]
  return content["environment"], rows


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.throughput.compiled_memory",
    description="Memory of whole models compiled for an H100, without one.",
  )
  add, positive = parser.add_argument, command_line.positive_integer
  add("--size", type=positive, default=_SIZE, help=f"default: {_SIZE}")
  add("--batch", type=positive, default=_BATCH, help=f"default: {_BATCH}")
  add("--json", type=pathlib.Path, help="write the results to this file")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")
  try:
    sharding = h100()
  except ModuleNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  facts = bench_compare.environment() | {
    "device": _DEVICE,
    "run": "on none: compiled for the device, which was not there",
    _PLUGIN: importlib.metadata.version(_PLUGIN),
  }
  rows = [run(case, sharding) for case in _cases(args.size, args.batch)]
  print(text(rows, facts))
  if args.json is not None:
    content = {
      "environment": facts,
      "rows": [dataclasses.asdict(row) for row in rows],
    }
    args.json.write_text(json.dumps(content, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
