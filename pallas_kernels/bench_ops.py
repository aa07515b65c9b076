"""The operations as the benchmark's tools see them, and the work they must do.

b batch, l length, d channels, n state size, g groups of channels. An image of
h w tokens that is scanned in k directions counts as l = h w, g = k groups and
k d channels.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cross_selective_scan import api as cross_api
from pallas_kernels.cross_selective_scan import arg_specs as cross_arg_specs
from pallas_kernels.cross_selective_scan import arguments as cross_arguments
from pallas_kernels.cross_selective_scan import mosaic_gpu as cross_mosaic_gpu
from pallas_kernels.selective_scan import (
  api,
  arg_specs,
  mosaic_gpu_backward_n1,
  mosaic_gpu_backward_plan,
  mosaic_gpu_forward_n1,
  tuning,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

# An H100: memory as measured, not as sold; streaming multiprocessors, their
# clock, and what each can start in a cycle.
BYTES_PER_SECOND: Final = 3.0e12
MULTIPROCESSORS: Final = 132
CLOCK_HZ: Final = 1.755e9
EXPONENTIALS_PER_CYCLE: Final = 16
FMAS_PER_CYCLE: Final = 128

FORWARD: Final = "forward"
GRADIENT: Final = "forward+backward"
DIRECTIONS: Final = (FORWARD, GRADIENT)

# The arguments whose first dimension is the batch.
BATCHED: Final = frozenset(("u", "delta", "B", "C", "z", "initial_state"))

# Per token, channel and state, the multiplications and additions, fused where
# they can be. Forward: delta A, exp(delta A) h, h and y. Backward: the first
# three of these again; g, g exp(delta A), and what goes into dA, dB, dC, the
# gradients of delta (two) and of u.
_FMAS: Final = {FORWARD: 4, GRADIENT: 4 + 11}
# Per token and channel: n decays; softplus and gate are two each.
_OTHER_EXPONENTIALS: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """A call of any operation, as a selective scan.

  Attributes:
    b: Batch rows.
    l: Tokens.
    d: Channels, of all groups together.
    n: States per channel.
    g: Groups of channels.
    gate: Whether there is a gate.
    inputs: Channels of u and y, d but for directions that share them.
  """

  b: int
  l: int
  d: int
  n: int
  g: int
  gate: bool
  inputs: int

  @property
  def steps(self) -> int:
    """Tokens times channels."""
    return self.b * self.l * self.d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What an operation must do, whoever computes it.

  Attributes:
    bytes: Read and written, every array once.
    exponentials: Exponentials, logarithms and reciprocals.
    fmas: Multiplications and additions, fused where they can be.
  """

  bytes: int
  exponentials: int
  fmas: int

  def floor_seconds(
    self,
    *,
    bytes_per_second: float = BYTES_PER_SECOND,
    clock_hz: float = CLOCK_HZ,
  ) -> float:
    """The time that an H100 needs at the least."""
    cycles = MULTIPROCESSORS * clock_hz
    return max(
      self.bytes / bytes_per_second,
      self.exponentials / (EXPONENTIALS_PER_CYCLE * cycles),
      self.fmas / (FMAS_PER_CYCLE * cycles),
    )


def work(sizes: Sizes, direction: str, itemsize: int) -> Work:
  """The work of a call with softplus, D and a bias.

  Args:
    sizes: The call.
    direction: One of `DIRECTIONS`.
    itemsize: Bytes of a number in a sequence; parameters have four.
  """
  b, l, n = sizes.b, sizes.l, sizes.n
  u = b * l * sizes.inputs
  sequences = sizes.steps * (1 + sizes.gate) + 2 * b * l * sizes.g * n
  parameters = sizes.d * (n + 2)
  inputs = itemsize * (u + sequences) + 4 * parameters
  bytes_ = inputs + itemsize * u  # y.
  exponentials = sizes.steps * (n + _OTHER_EXPONENTIALS)
  if direction == GRADIENT:
    # All inputs and dy are read, the gradients of all inputs written.
    bytes_ += 2 * inputs + itemsize * u
    exponentials *= 2
  return Work(
    bytes=bytes_,
    exponentials=exponentials,
    fmas=sizes.steps * n * _FMAS[direction],
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """How the GPU kernels cut a call into blocks and tiles.

  Attributes:
    config: Their settings.
    forward_channels: Channels of a block of the forward kernel.
    backward_channels: Channels of a block of the backward kernel.
  """

  config: tuning.Config
  forward_channels: int
  backward_channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """An operation.

  Attributes:
    name: Its name.
    function: Computes it; takes `implementation` and `delta_softplus`.
    implementations: Its implementations by name.
    specs: The calls that models make, by name.
    make_arguments: Makes the arguments of such a call.
    sizes: The sizes of such a call.
    blocks: Of such a call and the bytes of a number, on the target device.
    describe: The sizes of such a call, for people.
  """

  name: str
  function: Callable[..., Any]
  implementations: Mapping[str, Any]
  specs: Mapping[str, Any]
  make_arguments: Callable[..., dict[str, Any]]
  sizes: Callable[[Any], Sizes]
  blocks: Callable[[Any, int], Blocks]
  describe: Callable[[Any], str]


def program(
  op: Op, direction: str, implementation: str
) -> Callable[[dict[str, Any]], Any]:
  """A function of a call's arguments that does what is timed.

  Forward it computes y; in the other direction y and, with y for its gradient,
  the gradients of all arguments.
  """

  def forward(arguments):
    return op.function(
      **arguments, delta_softplus=True, implementation=implementation
    )

  def both(arguments):
    y, back = jax.vjp(forward, arguments)
    return y, back(y)

  return forward if direction == FORWARD else both


def enlarged(spec: Any, batch_factor: int) -> Any:
  """A call with so many times the batch."""
  return dataclasses.replace(spec, b=spec.b * batch_factor)


def argument_shapes(
  op: Op, spec: Any, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """The arguments of a call, without their values."""
  # Values are made on the way: of one row only.
  one = dataclasses.replace(spec, b=1)
  make = functools.partial(op.make_arguments, one, dtype=dtype)
  return {
    name: jax.ShapeDtypeStruct((spec.b, *x.shape[1:]), x.dtype)
    if name in BATCHED
    else x
    for name, x in jax.eval_shape(make).items()
  }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_arguments(op_name: str, spec: Any, dtype: str) -> dict[str, Any]:
  """What `make_arguments` makes, made on the device: other random numbers."""
  shapes = argument_shapes(OPS[op_name], spec, jnp.dtype(dtype))
  keys = jax.random.split(jax.random.key(0), len(shapes))
  arrays = {}
  for key, (name, shape) in zip(keys, shapes.items(), strict=True):
    values = jax.random.normal(key, shape.shape)
    if name == "A":
      values = -jnp.exp(values)
    if name == "delta_bias":
      values = values - 3
    arrays[name] = values.astype(shape.dtype)
  return arrays


def _scan_sizes(spec: arg_specs.ArgSpec) -> Sizes:
  return Sizes(
    b=spec.b,
    l=spec.l,
    d=spec.d,
    n=spec.n,
    g=spec.g,
    gate=spec.gate,
    inputs=spec.d,
  )


def _cross_sizes(spec: cross_arg_specs.ArgSpec) -> Sizes:
  k = cross_arguments.DIRECTIONS
  return Sizes(
    b=spec.b,
    l=spec.h * spec.w,
    d=k * spec.d,
    n=spec.n,
    g=k,
    gate=False,
    inputs=spec.d,
  )


def _scan_blocks(spec: arg_specs.ArgSpec, itemsize: int) -> Blocks:
  problem = tuning.Problem(
    b=spec.b, l=spec.l, d=spec.d, g=spec.g, n=spec.n, itemsize=itemsize
  )
  e = spec.d // spec.g
  forward, wide = common.LANES, False
  if spec.n == 1:
    size = itemsize * (4 if spec.gate else 3)
    forward = mosaic_gpu_forward_n1.ScalarCell.for_channels(e, size).lanes
    dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
    wide = mosaic_gpu_backward_n1.is_wide(e, dtype)
  return Blocks(
    config=tuning.lookup(problem, dispatch.target_device()),
    forward_channels=forward,
    backward_channels=_backward_channels(spec.n, wide=wide),
  )


def _cross_blocks(spec: cross_arg_specs.ArgSpec, itemsize: int) -> Blocks:
  del itemsize
  forward = common.LANES
  shape = (spec.b, spec.h, spec.w, spec.d)
  if spec.n == 1:
    forward = cross_mosaic_gpu.scalar_cell(shape).lanes
  cores = tuning.core_count(dispatch.target_device())
  return Blocks(
    config=cross_mosaic_gpu.config_for(shape, spec.n, cores=cores),
    forward_channels=forward,
    backward_channels=_backward_channels(spec.n, wide=False),
  )


def _backward_channels(n: int, *, wide: bool) -> int:
  """Channels of a block of the backward kernel."""
  if n == 1:
    return common.LANES * (2 if wide else 1)
  # What it leaves open does not matter.
  rest: dict[str, Any] = dict(b=1, l=1, g=1, e=1, tile=tuning.BACKWARD_TILE)
  plan = mosaic_gpu_backward_plan.Plan(
    n=-(-n // common.VECTOR) * common.VECTOR,
    tiles_per_chunk=1,
    softplus=True,
    reverse=False,
    **rest,
  )
  return plan.channels


OPS: Final = {
  op.name: op
  for op in (
    Op(
      name="selective_scan",
      function=api.selective_scan,
      implementations=api.IMPLEMENTATIONS,
      specs=arg_specs.ARG_SPECS,
      make_arguments=arg_specs.make_arguments,
      sizes=_scan_sizes,
      blocks=_scan_blocks,
      describe=lambda s: f"b={s.b} l={s.l} d={s.d} n={s.n} g={s.g}",
    ),
    Op(
      name="cross_selective_scan",
      function=cross_api.cross_selective_scan,
      implementations=cross_api.IMPLEMENTATIONS,
      specs=cross_arg_specs.ARG_SPECS,
      make_arguments=cross_arg_specs.make_arguments,
      sizes=_cross_sizes,
      blocks=_cross_blocks,
      describe=lambda s: f"b={s.b} h={s.h} w={s.w} d={s.d} n={s.n}",
    ),
  )
}
