"""What the Mosaic GPU kernels of the selective scan share.

Arithmetic in the form that these kernels want (base-two exponentials, no
function that Mosaic cannot lower), the register layouts, and the few calls
that differ between the supported versions of JAX.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group, t tokens of a tile.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, Final

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import partition

LOG2E: Final = math.log2(math.e)

# Channels of a block: one for each lane of a warpgroup.
LANES: Final = 128

# States that a lane keeps as one register vector, the widest that 16-byte
# loads allow.
VECTOR: Final = 4

# TMA wants strides, and rows in shared memory, of whole 16-byte units.
TMA_BYTES: Final = 16

# More than a block ever has under way.
_MANY_COPIES: Final = 64

# log1p(t) / t for 0 <= t <= 1, lowest power first: minimax in relative error,
# 2e-7, 4e-7 when evaluated in float32.
_LOG1P_OVER_T: Final = (
  0.9999998211860657,
  -0.4999740421772003,
  0.33275479078292847,
  -0.24495461583137512,
  0.17745240032672882,
  -0.10768169164657593,
  0.04408961534500122,
  -0.008539204485714436,
)


def state_layout() -> Any:
  """(LANES, VECTOR): lane i owns row i, its columns in registers."""
  return plgpu.Layout.TCGEN05_TMEM_NATIVE(VECTOR)


def channel_layout() -> Any:
  """(LANES,): lane i owns channel i, as in `state_layout`."""
  return state_layout().reduce(1)


def row_layout() -> Any:
  """(VECTOR,): every lane holds all of it, as in `state_layout`."""
  return state_layout().reduce(0)


def exp2(x: jax.Array) -> jax.Array:
  """2**x; the exponential that the hardware has."""
  return jnp.exp2(x)


def softplus(x: jax.Array) -> jax.Array:
  """log(1 + exp(x)) to a relative error of about 1e-6 at every x.

  The usual log(1 + t) with t = exp(x) rounds 1 + t, which costs small step
  sizes their last digits (6e-5 at 1e-3, 0.06 at 1e-6), and the logarithm of the
  hardware is no more accurate next to 1. With t = exp(-|x|) <= 1 a polynomial
  on the arithmetic units does instead; it costs one exponential fewer, too.
  """
  t = exp2(jnp.abs(x) * -LOG2E)
  return jnp.maximum(x, 0.0) + t * _polynomial(t, _LOG1P_OVER_T)


def sigmoid(x: jax.Array) -> jax.Array:
  """1 / (1 + exp(-x)); also the derivative of softplus."""
  return 1.0 / (1.0 + exp2(x * -LOG2E))


def softplus_and_sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`softplus` and its derivative, for one exponential and one reciprocal."""
  t = exp2(jnp.abs(x) * -LOG2E)
  r = reciprocal(1.0 + t)
  value = jnp.maximum(x, 0.0) + t * _polynomial(t, _LOG1P_OVER_T)
  return value, jnp.where(x >= 0.0, r, t * r)


def reciprocal(x: jax.Array) -> jax.Array:
  """1 / x for x >= 1, infinity included, to about 2e-7.

  Division handles denormal numbers at four more instructions.
  """
  r = lax.rsqrt(x)
  return r * r


def silu(x: jax.Array) -> jax.Array:
  """x * sigmoid(x)."""
  # One instruction shorter than x * sigmoid(x).
  return x / (1.0 + exp2(x * -LOG2E))


def _polynomial(x: jax.Array, coefficients: Sequence[float]) -> jax.Array:
  """Horner's scheme; `coefficients` with the lowest power first."""
  value = x * coefficients[-1] + coefficients[-2]
  for c in coefficients[-3::-1]:
    value = value * x + c
  return value


def load(ref: Any, layout: Any) -> jax.Array:
  """The content of `ref` as float32 in registers, laid out as asked."""
  # Not "optimized": a lane reads its own channel, rows are broadcast.
  value = plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
  if jax.typeof(value).manual_axis_type.varying:
    # Under `shard_map` what is read from an argument has a type that varies
    # over the mesh, and what is computed in a kernel has not; a loop that
    # starts with one would end with the other. The compiler drops the product.
    value = value * 1.0
  return value


def store(ref: Any, value: jax.Array) -> None:
  """Writes registers to shared or global memory, in the dtype of `ref`."""
  value = value.astype(ref.dtype)
  if hasattr(plgpu, "store"):  # Since JAX 0.12, which rejects ref[...] = value.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def over_states(x: jax.Array) -> jax.Array:
  """(LANES,) to (LANES, VECTOR)."""
  x = lax.broadcast_in_dim(x, (LANES, VECTOR), (0,))
  return plgpu.layout_cast(x, state_layout())


def over_channels(x: jax.Array) -> jax.Array:
  """(VECTOR,) to (LANES, VECTOR)."""
  x = lax.broadcast_in_dim(x, (LANES, VECTOR), (1,))
  return plgpu.layout_cast(x, state_layout())


def sync_lanes() -> None:
  """Waits for all lanes of a block, and for what they wrote for each other.

  `plgpu.commit_smem` without the fence that copies to global memory need. That
  barrier comes with waiting for copies, here for none of those under way.
  """
  plgpu.wait_smem_to_gmem(_MANY_COPIES, wait_read_only=True)


def zeros(shape: Sequence[int], layout: Any) -> jax.Array:
  """float32 zeros in registers; a loop carry needs the layout spelled out."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


@dataclasses.dataclass(frozen=True)
class Interpret:
  """Runs kernels on the CPU, by JAX's interpreter of Mosaic GPU programs.

  Attributes:
    detect_races: Whether to look for unordered accesses to shared memory.
  """

  detect_races: bool = False

  def params(self) -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(
      detect_races=self.detect_races,
      # Copies that reach beyond an array are meant: TMA clips them.
      out_of_bounds_reads="uninitialized",
      uninitialized_memory="zero",
    )


def kernel(
  body: Callable[..., None],
  *,
  name: str,
  out_type: Sequence[jax.ShapeDtypeStruct],
  scratch_types: Mapping[str, Any],
  grid: Mapping[str, int],
  interpret: Interpret | None,
  lane_semantics: bool = False,
) -> Callable[..., Sequence[jax.Array]]:
  """`plgpu.kernel` with the options that all kernels here share.

  Args:
    body: Called with the refs of inputs and outputs by position and those of
      `scratch_types` by name.
    name: Name of the kernel in profiles and in the lowered program.
    out_type: Shapes and dtypes of the results.
    scratch_types: Shared memory and barriers by name.
    grid: Sizes of the grid by axis name; the last axis varies fastest.
    interpret: None to compile.
    lane_semantics: Whether every layout is spelled out in the body, instead of
      found by the layout solver. Compiles faster, and to what was written.
  """
  semantics = plgpu.LoweringSemantics
  run = plgpu.kernel(
    body,
    out_type=list(out_type),
    scratch_types=dict(scratch_types),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    kernel_name=name,
    interpret=None if interpret is None else interpret.params(),
    compiler_params=plgpu.CompilerParams(
      # exp2 becomes one instruction instead of about eight.
      approx_math=True,
      # A barrier after each row that is written would cost a sixth of the
      # time; the bodies place the few that are needed.
      unsafe_no_auto_barriers=True,
      lowering_semantics=(
        semantics.Lane if lane_semantics else semantics.Warpgroup
      ),
    ),
  )

  def call(*args):
    return [partition.vary_like(x, like=args[0]) for x in run(*args)]

  return call


def split_index(index: Any, size: int) -> tuple[Any, Any]:
  """`divmod(index, size)` for an index that is known when the kernel runs."""
  if size == 1:
    return index, jnp.int32(0)
  # int32 spelled out, for the sake of programs that enable 64 bits.
  return lax.div(index, jnp.int32(size)), lax.rem(index, jnp.int32(size))


def cdiv(x: int, y: int) -> int:
  """x / y, rounded up."""
  return -(-x // y)
