"""The CUDA kernel of Mamba's authors, to compare with.

  python -m pallas_kernels.gpu_suite_peers FOLDER

builds the selective scan, and nothing else, of the unpacked source distribution
of mamba-ssm in FOLDER, for the GPU at hand. It takes minutes, and a PyTorch
with CUDA, its compiler nvcc and ninja. Then `python -m pallas_kernels.bench
--suite gpu --mamba-ssm FOLDER` times it. Nothing else depends on it.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
from typing import Any, Final

import jax
import numpy as np

from pallas_kernels import (
  bench_ops,
  bench_timing,
  gpu_suite_checks,
  gpu_suite_timings,
)

UNAVAILABLE: Final = 69

_MODULE: Final = "selective_scan_of_mamba_ssm"
_SOURCES: Final = (
  "selective_scan.cpp",
  "selective_scan_fwd_bf16.cu",
  "selective_scan_fwd_fp32.cu",
  "selective_scan_bwd_bf16_real.cu",
  "selective_scan_bwd_fp32_real.cu",
)
# The flags of its setup.py.
_FLAGS: Final = (
  "-O3",
  "-std=c++17",
  "-U__CUDA_NO_HALF_OPERATORS__",
  "-U__CUDA_NO_HALF_CONVERSIONS__",
  "-U__CUDA_NO_BFLOAT16_OPERATORS__",
  "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
  "-U__CUDA_NO_BFLOAT162_OPERATORS__",
  "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
  "--expt-relaxed-constexpr",
  "--expt-extended-lambda",
  "--use_fast_math",
)
# Other dtypes are not built; the linker wants something in their place.
_LEFT_OUT: Final = """
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <cuda_runtime.h>
#include "selective_scan.h"
template <typename T, typename W>
void selective_scan_fwd_cuda(SSMParamsBase &params, cudaStream_t stream) {
  TORCH_CHECK(false, "not built");
}
template <typename T, typename W>
void selective_scan_bwd_cuda(SSMParamsBwd &params, cudaStream_t stream) {
  TORCH_CHECK(false, "not built");
}
using Complex = c10::complex<float>;
#define LEFT_OUT(KIND, PARAMS, T, W) \\
  template void selective_scan_##KIND##_cuda<T, W>(PARAMS &, cudaStream_t);
LEFT_OUT(fwd, SSMParamsBase, at::Half, float)
LEFT_OUT(fwd, SSMParamsBase, at::Half, Complex)
LEFT_OUT(bwd, SSMParamsBwd, at::Half, float)
LEFT_OUT(bwd, SSMParamsBwd, at::Half, Complex)
LEFT_OUT(bwd, SSMParamsBwd, at::BFloat16, Complex)
LEFT_OUT(bwd, SSMParamsBwd, float, Complex)
"""

_CALLS: Final = 32
# The device does nothing for so long, while the host starts the calls: then no
# call waits for the host.
_SLEEP_CYCLES: Final = 60_000_000

Tensors = dict[str, Any]


class PeerError(Exception):
  """The kernel cannot be built or run here; the message says why."""


def build(folder: pathlib.Path) -> pathlib.Path:
  """Builds the extension; returns its file.

  Raises:
    PeerError: Something is missing.
  """
  source = folder / "csrc" / "selective_scan"
  for name in _SOURCES:
    if not (source / name).is_file():
      raise PeerError(
        f"{folder} is no unpacked source distribution of mamba-ssm: there is "
        f"no {source / name}"
      )
  _torch()
  extension = importlib.import_module("torch.utils.cpp_extension")
  if extension.CUDA_HOME is None:
    raise PeerError("PyTorch finds no CUDA compiler; set CUDA_HOME")
  path = _built(folder)
  path.parent.mkdir(exist_ok=True)
  left_out = path.parent / "left_out.cpp"
  left_out.write_text(_LEFT_OUT)
  os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
  extension.load(
    name=_MODULE,
    sources=[*(str(source / name) for name in _SOURCES), str(left_out)],
    extra_include_paths=[str(source)],
    extra_cflags=["-O3", "-std=c++17"],
    extra_cuda_cflags=[*_FLAGS],
    build_directory=str(path.parent),
    with_cuda=True,
    verbose=True,
  )
  return path


def _torch() -> Any:
  if importlib.util.find_spec("torch") is None:
    raise PeerError("the package torch is not installed")
  return importlib.import_module("torch")


def _built(folder: pathlib.Path) -> pathlib.Path:
  return folder / "build_of_selective_scan" / f"{_MODULE}.so"


@functools.cache
def _extension(folder: pathlib.Path) -> Any:
  path = _built(folder)
  if not path.is_file():
    raise PeerError(
      f"there is no {path}; python -m {__spec__.name} {folder} builds it"
    )
  _torch()  # Its libraries come first.
  loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(path))
  spec: Any = importlib.util.spec_from_file_location(
    _MODULE, path, loader=loader
  )
  module = importlib.util.module_from_spec(spec)
  loader.exec_module(module)
  return module


def time_call(
  job: gpu_suite_timings.Job,
  settings: gpu_suite_timings.Settings,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Times a call like `gpu_suite_timings.time_call`, and the backward alone.

  Its results are compared with those of `xla_associative`; errors are written
  down, and are no failures.

  Raises:
    PeerError: The kernel was not built, or the call has a gate.
  """
  extension = _extension(folder)
  torch = _torch()
  _, arrays = gpu_suite_timings.inputs(job)
  jax.block_until_ready(arrays)
  if "z" in arrays:
    raise PeerError("calls with a gate are not compared")
  size = sum(x.nbytes for x in arrays.values())
  count = max(2, -(-settings.rotation_bytes // size))
  first = _as_tensors(torch, arrays)
  rotation = [first]
  for _ in range(min(count, _CALLS) - 1):
    rotation.append({name: x.clone() for name, x in first.items()})
  forward = functools.partial(_forward, extension)
  outputs = [forward(tensors) for tensors in rotation]
  backward = lambda pair: _backward(extension, *pair)

  def both(tensors):
    return backward((tensors, forward(tensors)))

  time = functools.partial(_time, torch)
  found = dataclasses.asdict(job) | {
    bench_ops.FORWARD: time(forward, rotation),
    bench_ops.GRADIENT: time(both, rotation),
    "backward": time(backward, [*zip(rotation, outputs, strict=True)]),
  }
  y = outputs[0][0]
  gradients = _backward(extension, first, outputs[0])
  torch.cuda.synchronize()
  results = {"y": _as_array(y, "y")} | {
    f"d{name}": _as_array(x, name) for name, x in gradients.items()
  }
  errors = gpu_suite_timings.errors_of(job, arrays, results)
  return found | {"errors": gpu_suite_checks.as_text(errors)}


# Where the dimensions of ours, (b, l, d) and (b, l, g, n), go, and back.
_ORDERS: Final = {
  **dict.fromkeys(("u", "delta", "y"), ((0, 2, 1), (0, 2, 1))),
  **dict.fromkeys(("B", "C"), ((0, 2, 3, 1), (0, 3, 1, 2))),
}


def _as_tensors(torch: Any, arrays: Mapping[str, Any]) -> Tensors:
  """The arrays in the order of dimensions of that package."""
  tensors = {}
  for name, x in arrays.items():
    tensor = torch.from_dlpack(x)
    if name in _ORDERS:
      tensor = tensor.permute(_ORDERS[name][0])
    tensors[name] = tensor.contiguous().clone()
  return tensors


def _as_array(tensor: Any, name: str) -> jax.Array:
  """One of its results in the order of dimensions of ours."""
  if name in _ORDERS:
    tensor = tensor.permute(_ORDERS[name][1])
  return jax.dlpack.from_dlpack(tensor.contiguous())


def _forward(extension: Any, x: Tensors) -> list[Any]:
  """y, and the states at the ends of chunks."""
  arguments = (x[name] for name in ("u", "delta", "A", "B", "C", "D"))
  return extension.fwd(*arguments, None, x["delta_bias"], True)


def _backward(extension: Any, x: Tensors, outputs: Sequence[Any]) -> Tensors:
  """The gradients of all arguments, with y for that of y."""
  y, states = outputs
  arguments = (x[name] for name in ("u", "delta", "A", "B", "C", "D"))
  gradients = extension.bwd(
    *arguments, None, x["delta_bias"], y, states, None, None, True, False
  )
  names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
  return dict(zip(names, gradients, strict=True))


def _time(
  torch: Any, call: Callable[[Any], Any], rotation: Sequence[Any]
) -> dict[str, Any]:
  """The device's time from the end of one call to that of the next."""
  event = functools.partial(torch.cuda.Event, enable_timing=True)
  events = [event() for _ in range(_CALLS + 1)]
  for inputs in rotation:  # Warms up.
    call(inputs)
  torch.cuda.synchronize()
  torch.cuda._sleep(_SLEEP_CYCLES)
  call(rotation[-1])
  events[0].record()
  for i in range(_CALLS):
    call(rotation[i % len(rotation)])
    events[i + 1].record()
  torch.cuda.synchronize()
  times = [
    1e3 * before.elapsed_time(after)
    for before, after in zip(events[:-1], events[1:], strict=True)
  ]
  timing = bench_timing.timing(np.asarray(times), launches=1)
  return dataclasses.asdict(timing) | {"source": "events"}


def main(argv: Sequence[str] | None = None) -> int:
  """Builds the extension; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.gpu_suite_peers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", type=pathlib.Path, help="what was unpacked")
  try:
    print(f"Built {build(parser.parse_args(argv).folder.resolve())}")
  except PeerError as error:
    print(f"{parser.prog}: {error}.", file=sys.stderr)
    return UNAVAILABLE
  return 0


if __name__ == "__main__":
  sys.exit(main())
