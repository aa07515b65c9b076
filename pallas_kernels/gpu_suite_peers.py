"""The CUDA kernel of Mamba's authors, timed where it happens to be installed.

It is something to compare with, and nothing here depends on it.
"""

from collections.abc import Callable, Mapping
import importlib
import importlib.util
from typing import Any

import numpy as np

from pallas_kernels import bench_ops, bench_timing


class SkipError(Exception):
  """A step of the suite cannot run here; the message says why."""


def time_mamba_ssm(
  op: bench_ops.Op, arrays: Mapping[str, Any], direction: str, settings: Any
) -> bench_timing.Timing:
  """Times `selective_scan_fn` of the package mamba-ssm.

  Args:
    op: The operation.
    arrays: Its arguments by name, as ours takes them.
    direction: One of `bench_ops.DIRECTIONS`.
    settings: Those of the suite.

  Raises:
    SkipError: It is not installed, or has no such operation.
  """
  if op.name != "selective_scan":
    raise SkipError(f"mamba-ssm has no {op.name}")
  for module in ("torch", "mamba_ssm"):
    if importlib.util.find_spec(module) is None:
      raise SkipError(f"the package {module} is not installed")
  torch = importlib.import_module("torch")
  interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
  if not torch.cuda.is_available():
    raise SkipError("torch sees no GPU")
  call = _program(torch, interface.selective_scan_fn, arrays, direction)
  inputs = _as_tensors(torch, arrays)
  size = sum(x.nbytes for x in arrays.values())
  count = min(64, max(2, -(-settings.rotation_bytes // size)))
  clone = lambda x: x.detach().clone().requires_grad_(x.requires_grad)
  rotation = [
    inputs,
    *({k: clone(x) for k, x in inputs.items()} for _ in range(count - 1)),
  ]
  return bench_timing.measure(
    call,
    rotation,
    rounds=settings.rounds,
    round_seconds=settings.round_seconds,
    wait=lambda out: torch.cuda.synchronize(),
  )


def _as_tensors(torch: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays in the order of dimensions of that package, on its GPU."""
  tensors = {}
  for name, x in arrays.items():
    values = torch.from_numpy(np.array(x, np.float32))
    if name in ("u", "delta", "z"):
      values = values.permute(0, 2, 1)  # (b, d, l)
    elif name in ("B", "C"):
      values = values.permute(0, 2, 3, 1)  # (b, g, n, l)
    dtype = getattr(torch, x.dtype.name)
    tensors[name] = values.contiguous().to("cuda", dtype).requires_grad_()
  return tensors


def _program(
  torch: Any,
  scan: Callable[..., Any],
  arrays: Mapping[str, Any],
  direction: str,
) -> Callable[[Any], Any]:
  """Runs the scan on such tensors, with its gradient if asked for."""

  def forward(tensors):
    with torch.no_grad():
      return scan(**tensors, delta_softplus=True)

  def both(tensors):
    y = scan(**tensors, delta_softplus=True)
    return torch.autograd.grad(y, [tensors[name] for name in arrays], y)

  return forward if direction == bench_ops.FORWARD else both
