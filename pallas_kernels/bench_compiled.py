"""What the GPU kernels are compiled to, and how fast that could run.

`figures` compiles the kernels of a call for an H100, without having one, and
counts. The predicted time follows from these counts alone; nothing here is
measured on a GPU.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import bench_ops, compiled, compiled_sass
from pallas_kernels.selective_scan import mosaic_gpu_backward_n1
from pallas_kernels.selective_scan import mosaic_gpu_common as common

DEVICE: Final = AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3",
  num_cores=bench_ops.MULTIPROCESSORS,
  platform="cuda",
)
DTYPES: Final = ("bfloat16", "float32")

_SCHEDULERS: Final = 4  # Of a multiprocessor; each starts one warp per cycle.
_WARP: Final = 32
_THREADS: Final = common.LANES  # Of a block.

# The most `Figures.instructions_per_state`; forward, for so many states.
FORWARD_TARGET: Final = 8.0
FORWARD_TARGET_STATES: Final = 16
BACKWARD_TARGET: Final = 34.0
BACKWARD_GOAL: Final = 28.0
BLOCKS_TARGET: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """One kernel of a call.

  Attributes:
    op: The operation.
    spec: The call.
    dtype: That of its sequences.
    direction: One of `bench_ops.DIRECTIONS`.
    kernel: The kernel's name.
    n: States per channel.
    blocks: Blocks of the grid.
    registers: Registers of a thread.
    spill_bytes: Bytes that a thread spills, stores and loads together.
    shared_memory: Bytes of shared memory of a block.
    blocks_per_multiprocessor: How many blocks fit at a time.
    instructions: Instructions of the whole kernel.
    instructions_per_state: Instructions that a thread runs per token, channel
      and state, copies and barriers of its tiles included; None if the
      kernel's loops are not those expected.
    predicted_us: Predicted time in microseconds, without its launch; None as
      before.
    batch_factor: How many times the call's batch.
  """

  op: str
  spec: str
  dtype: str
  direction: str
  kernel: str
  n: int
  blocks: int
  registers: int
  spill_bytes: int
  shared_memory: int
  blocks_per_multiprocessor: int
  instructions: int
  instructions_per_state: float | None
  predicted_us: float | None
  batch_factor: int = 1

  @property
  def is_backward(self) -> bool:
    return self.kernel.endswith("_backward")


def why_not(op: bench_ops.Op) -> str | None:
  """None if `figures` can work here, otherwise what to do."""
  if "mosaic_gpu" not in op.implementations:
    return f"{op.name} has no GPU kernel"
  if wanted := compiled.missing():
    return f"the kernels cannot be compiled here; install: {wanted}"
  return None


def figures(
  op: bench_ops.Op,
  spec_name: str,
  dtype: str,
  direction: str,
  batch_factor: int = 1,
) -> list[Figures]:
  """The kernels of a call, in the order in which they run.

  Args:
    op: The operation.
    spec_name: The call.
    dtype: That of its sequences.
    direction: One of `bench_ops.DIRECTIONS`.
    batch_factor: How many times its batch.

  Raises:
    RuntimeError: `why_not` says why.
  """
  if reason := why_not(op):
    raise RuntimeError(reason)
  spec = bench_ops.enlarged(op.specs[spec_name], batch_factor)
  with on_h100():
    blocks = op.blocks(spec, jnp.dtype(dtype).itemsize)
    kernels = compiled.kernels(
      bench_ops.program(op, direction, "mosaic_gpu"),
      bench_ops.argument_shapes(op, spec, jnp.dtype(dtype)),
    )
  sizes = op.sizes(spec)
  return [
    _figures(kernel, sizes, blocks)(
      op=op.name,
      spec=spec_name,
      dtype=dtype,
      direction=direction,
      batch_factor=batch_factor,
    )
    for kernel in kernels
  ]


def on_h100() -> contextlib.AbstractContextManager[Any]:
  """Makes `dispatch.target_device()` an H100 that is not there."""
  mesh = AbstractMesh((1,), ("device",), abstract_device=DEVICE)
  return jax.sharding.use_abstract_mesh(mesh)


def steps(
  nest: Sequence[compiled_sass.Loop],
  kernel: str,
  sizes: bench_ops.Sizes,
  blocks: bench_ops.Blocks,
) -> tuple[float, ...] | None:
  """Tokens times channels that a thread does in an iteration of each loop.

  None if these are not the loops of such a kernel. The backward kernel for
  several states has one loop, over tiles. The others have, inside that, with
  checkpoints perhaps one over what lies between these, and one over a few
  tokens, of which the exponentials tell how many; or all of this is one loop.
  """
  config = blocks.config
  states = sizes.n if sizes.n == 1 else -(-sizes.n // common.VECTOR) * 4
  tile, channels = config.tile, blocks.forward_channels
  is_backward = kernel.endswith("_backward")
  if is_backward:
    tile, channels = config.backward_tile, blocks.backward_channels
  lanes = channels / _THREADS
  if is_backward and sizes.n > 1:
    return (lanes * tile,) if len(nest) == 1 else None
  if is_backward:
    tile = max(tile, mosaic_gpu_backward_n1.TOKENS)
  inner = nest[-1].exponentials / (
    states + 1 + (sizes.gate and not kernel.endswith("_states"))
  )
  outer = {1: (), 2: (tile,), 3: (tile, config.backward_tile)}
  if len(nest) not in outer or inner % lanes:
    return None
  return (*(lanes * x for x in outer[len(nest)]), inner)


def _figures(
  kernel: compiled.Kernel, sizes: bench_ops.Sizes, blocks: bench_ops.Blocks
) -> Any:
  """`Figures` of a kernel, but for what names the call."""
  nests = compiled_sass.nests(kernel.loops)
  counted = [steps(nest, kernel.launch.name, sizes, blocks) for nest in nests]

  def cost(measure: Callable[[compiled_sass.Loop], int]) -> float:
    """That of a step, on the longest of the kernel's paths."""
    return max(
      compiled_sass.per_step(kernel.loops, nest, count, measure)
      for nest, count in zip(nests, counted, strict=True)
      if count is not None
    )

  instructions = predicted = None
  if counted and None not in counted:
    instructions = cost(lambda loop: loop.instructions)
    predicted = predict_seconds(
      kernel,
      sizes.steps,
      instructions,
      cost(lambda loop: loop.special_functions),
      cost(lambda loop: loop.stall_cycles),
    )
  return functools.partial(
    Figures,
    kernel=kernel.launch.name,
    n=sizes.n,
    blocks=kernel.launch.blocks,
    registers=kernel.registers,
    spill_bytes=kernel.spill_bytes,
    shared_memory=kernel.launch.shared_memory,
    blocks_per_multiprocessor=kernel.blocks_per_multiprocessor,
    instructions=kernel.opcodes.total(),
    instructions_per_state=(
      None if instructions is None else round(instructions / sizes.n, 2)
    ),
    predicted_us=None if predicted is None else round(1e6 * predicted, 1),
  )


def predict_seconds(
  kernel: compiled.Kernel,
  steps: int,
  instructions: float,
  special_functions: float,
  stall_cycles: float,
) -> float:
  """The time of a kernel, its launch left out, from its machine code.

  The longer of two times. One is that of its memory traffic. The other is that
  of its steps: with w blocks on a multiprocessor, each scheduler has w warps,
  and a step of all of them takes the largest of w times the instructions, w
  times the special functions at 32 lanes over 4 units, and the cycles that a
  lone warp waits between its instructions, were all loads in time. Blocks run
  in waves of as many as fit.

  Args:
    kernel: The kernel, of four warps to a block.
    steps: Tokens times channels of the whole call.
    instructions: Instructions of a thread for a step.
    special_functions: Those of them for the special function unit.
    stall_cycles: Cycles between them for a lone warp.
  """
  launch, cores = kernel.launch, bench_ops.MULTIPROCESSORS
  # The width of the unit for each scheduler, from that of a multiprocessor.
  width = bench_ops.EXPONENTIALS_PER_CYCLE // _SCHEDULERS
  steps_of_block = steps / launch.blocks / launch.threads

  def cycles(warps: int) -> float:
    return steps_of_block * max(
      warps * instructions,
      warps * special_functions * _WARP / width,
      stall_cycles,
    )

  fit = kernel.blocks_per_multiprocessor
  waves, rest = divmod(launch.blocks, fit * cores)
  total = waves * cycles(fit)
  if rest:
    total += cycles(-(-rest // cores))
  return max(
    total / bench_ops.CLOCK_HZ,
    launch.bytes_accessed / bench_ops.BYTES_PER_SECOND,
  )


def target_per_state(row: Figures) -> float | None:
  """The most `instructions_per_state` that are wanted; None if not said."""
  if row.is_backward:
    return BACKWARD_TARGET
  return FORWARD_TARGET if row.n == FORWARD_TARGET_STATES else None


def missed(row: Figures) -> list[str]:
  """The targets that a kernel misses, one clause each."""
  clauses = []
  if row.spill_bytes:
    clauses.append(f"spills {row.spill_bytes} bytes")
  per_state = row.instructions_per_state
  target = target_per_state(row)
  if per_state is None:
    clauses.append("its instructions could not be counted")
  elif target is not None and per_state > target:
    clauses.append(
      f"{per_state:.2f} instructions per (t, d, n), wanted {target:g}"
    )
  if row.is_backward and row.blocks_per_multiprocessor < BLOCKS_TARGET:
    clauses.append(
      f"{row.blocks_per_multiprocessor} blocks per multiprocessor, wanted "
      f"{BLOCKS_TARGET}"
    )
  return clauses


HEADER: Final = (
  f"{'call':24}{'dtype':10}{'direction':18}{'kernel':31}{'regs':>5}"
  f"{'spill B':>9}{'shared B':>10}{'blocks/SM':>11}{'per (t,d,n)':>13}"
  f"{'predicted us':>14}"
)


def line(row: Figures) -> str:
  """The line of a kernel below `HEADER`."""
  per_state, predicted = (
    "?" if x is None else f"{x:.{digits}f}"
    for x, digits in ((row.instructions_per_state, 2), (row.predicted_us, 1))
  )
  return (
    f"{row.spec:24}{row.dtype:10}{row.direction:18}{row.kernel:31}"
    f"{row.registers:5}{row.spill_bytes:9}{row.shared_memory:10}"
    f"{row.blocks_per_multiprocessor:11}{per_state:>13}{predicted:>14}"
  )
