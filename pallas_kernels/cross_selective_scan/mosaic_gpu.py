"""The cross selective scan by the Mosaic GPU kernels of the selective scan.

The kernels run once for all four directions, each block one direction of 128
or 256 channels of an image; `mosaic_gpu_image` tells them where its tokens lie.
No array with channels is copied, transposed or flipped. Where images are too
few to fill the device, they are scanned in chunks (`mosaic_gpu_chunked`), here
of whole rows and columns.

Each direction writes its own result in float32, and XLA adds the four in a
fixed order, with the skip connection, in one pass. For bfloat16 that moves, for
each pixel and channel, 8 bytes of delta, 2 to 8 of u (the directions of an
image run at the same time and find it in the cache), 16 of results written and
16 read, and 2 of y: 44 to 50. Were a block to run the four directions one after
the other and add to what it finds, that would be 12 written and 12 read, so 36
to 42, but with a quarter of the blocks and four times the steps of each. With
results in bfloat16 it would be 28 to 34, and each of the four rounded.

b batch, h and w rows and columns, k directions, d channels, n state size.
"""

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import derivatives, dispatch
from pallas_kernels.cross_selective_scan import arguments, mosaic_gpu_image
from pallas_kernels.selective_scan import mosaic_gpu as scan_mosaic_gpu
from pallas_kernels.selective_scan import (
  mosaic_gpu_backward,
  mosaic_gpu_backward_n1,
  mosaic_gpu_backward_plan,
  mosaic_gpu_chunked,
  mosaic_gpu_common,
  mosaic_gpu_forward,
  mosaic_gpu_forward_n1,
  tuning,
)

# Tokens of a tile of the kernels, and lines that are as short as the smaller.
_TILE: Final = 16
_SHORT_TILE: Final = 8

# Two for each core of an H100.
_MANY_BLOCKS: Final = 264


def why_not(
  args: arguments.Arguments, options: arguments.Options
) -> str | None:
  """None if the kernels can run this call here, otherwise why they cannot."""
  return scan_mosaic_gpu.why_not_device(
    dispatch.target_device()
  ) or why_not_interpreted(args, options)


def why_not_interpreted(
  args: arguments.Arguments, options: arguments.Options
) -> str | None:
  """Like `why_not`, wherever it runs."""
  del options
  for name, x in args._asdict().items():
    if x is not None and x.dtype.name not in scan_mosaic_gpu.DTYPES:
      wanted = " and ".join(scan_mosaic_gpu.DTYPES)
      return f"`{name}` is {x.dtype}, it takes {wanted}"
  b, h, w, d = args.u.shape
  n = args.A.shape[2]
  most = scan_mosaic_gpu.MAX_STATES
  if n > most:
    return f"`A` has {n} states per channel, it takes at most {most}"
  unit = mosaic_gpu_common.TMA_BYTES // 2
  rows = b * arguments.DIRECTIONS * mosaic_gpu_common.cdiv(d, unit) * unit
  tokens = mosaic_gpu_image.stored_tokens(h, w, _TILE)
  sizes = {
    "`delta`": rows * h * w,
    "the states it keeps for the derivative": (
      rows * n * (tokens // tuning.BACKWARD_TILE)
    ),
  }
  most = scan_mosaic_gpu.MAX_ELEMENTS
  for what, size in sizes.items():
    if size > most:
      return (
        f"with {b=}, {h=}, {w=}, {d=}, {n=} {what} would have {size} elements, "
        f"it takes at most {most} (32-bit offsets); split the batch"
      )
  return None


def config_for(
  shape: tuple[int, int, int, int], n: int, *, cores: int
) -> tuning.Config:
  """Settings for an image (b, h, w, d) on so many streaming multiprocessors.

  A tile does not reach beyond a line, so short lines have small tiles, and more
  of them on their way.
  """
  b, h, w, d = shape
  is_short = max(h, w) <= _SHORT_TILE
  k = arguments.DIRECTIONS
  problem = tuning.Problem(b=b, l=h * w, d=k * d, g=k, n=n, itemsize=4)
  wanted = tuning.heuristic(problem, cores=cores).chunks
  return tuning.Config(
    tile=_SHORT_TILE if is_short else _TILE,
    unroll=4,
    buffers=4 if is_short else 2,
    chunks=mosaic_gpu_image.chunks_for(h, w, wanted),
  )


class _Statics(NamedTuple):
  """What is known about a scan when it is traced."""

  delta_softplus: bool
  unit: int
  config: tuning.Config
  interpret: mosaic_gpu_common.Interpret | None


class _Inputs(NamedTuple):
  """The arrays of a scan as the kernels take them.

  Only u and delta may be narrower than float32. Channels are whole 16-byte
  units, n is 1 or a multiple of 4, and l counts tokens as stored.
  """

  u: Float[Array, "b h w d"]
  delta: Float[Array, "b h w k d"]
  A: Float[Array, "k d n"]
  B: Float[Array, "b k l n"]
  C: Float[Array, "b k l n"]
  D: Float[Array, "k d"] | None
  delta_bias: Float[Array, "k d"] | None


class _Residuals(NamedTuple):
  """What the forward scan leaves for the backward one."""

  inputs: _Inputs
  checkpoints: Float[Array, "b tiles kd n"]


# Compiled as a function of its own, so that the many equal layers of a model
# are traced once.
@functools.partial(jax.jit, static_argnames=("options", "config", "interpret"))
def cross_selective_scan(
  args: arguments.Arguments,
  options: arguments.Options,
  *,
  config: tuning.Config | None = None,
  interpret: mosaic_gpu_common.Interpret | None = None,
) -> jax.Array:
  """Returns y; see `pallas_kernels.cross_selective_scan`.

  Args:
    args: The arrays; `why_not` must be None for them.
    options: The choices of the call.
    config: Settings of the kernels; None for those of `config_for`.
    interpret: None to compile, else how to interpret the kernels on the CPU.
  """
  b, h, w, d = args.u.shape
  n = args.A.shape[2]
  if b == 0:
    return args.u
  if config is None:
    device = None if interpret else dispatch.target_device()
    cores = tuning.core_count(device)
    config = config_for((b, h, w, d), n, cores=cores)
  unit = max(config.tile, mosaic_gpu_backward_n1.TOKENS if n == 1 else 1)
  statics = _Statics(options.delta_softplus, unit, config, interpret)
  return _scan(statics, _prepare(args, unit))[..., :d]


def _prepare(args: arguments.Arguments, unit: int) -> _Inputs:
  """The arrays as `_Inputs` has them: dtypes, order, padding."""
  n = args.A.shape[2]
  itemsize = min(args.u.dtype.itemsize, args.delta.dtype.itemsize)
  channels = -args.u.shape[-1] % (mosaic_gpu_common.TMA_BYTES // itemsize)
  states = 0 if n == 1 else -n % mosaic_gpu_common.VECTOR

  def pad_channels(x):
    return scan_mosaic_gpu.pad_last(x, padding=channels)

  def pad_states(x):
    x = x.astype(jnp.float32)
    return scan_mosaic_gpu.pad_last(x, padding=states)

  def stored(x):
    return mosaic_gpu_image.to_stored(pad_states(x), unit)

  def parameter(x):
    return None if x is None else pad_channels(x.astype(jnp.float32))

  A = jnp.swapaxes(pad_channels(jnp.swapaxes(pad_states(args.A), 1, 2)), 1, 2)
  return _Inputs(
    u=pad_channels(args.u),
    delta=pad_channels(args.delta),
    A=A,
    B=stored(args.B),
    C=stored(args.C),
    D=parameter(args.D),
    delta_bias=parameter(args.delta_bias),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(statics: _Statics, inputs: _Inputs) -> jax.Array:
  """Returns y (b, h, w, d)."""
  return _run_forward(statics, inputs, checkpoint_tile=0)[0]


def _scan_fwd(statics: _Statics, inputs: _Inputs):
  inputs = derivatives.differentiable_once("cross_selective_scan", inputs)
  y, checkpoints = _run_forward(
    statics, inputs, checkpoint_tile=statics.config.backward_tile
  )
  assert checkpoints is not None  # They were asked for.
  return y, _Residuals(inputs, checkpoints)


def _scan_bwd(statics: _Statics, residuals: _Residuals, dy: jax.Array):
  residuals, dy = derivatives.differentiable_once(
    "cross_selective_scan", (residuals, dy)
  )
  inputs = residuals.inputs
  gradients = _run_backward(statics, residuals, dy)
  shape = inputs.delta.shape
  wide_dy = dy.astype(jnp.float32)
  du = gradients.u.reshape(shape).sum(3)
  dD = None
  if inputs.D is not None:
    du = du + inputs.D.sum(0) * wide_dy
    # The skip connections of all directions are one.
    dD = (wide_dy * inputs.u).sum((0, 1, 2))
    dD = jnp.broadcast_to(dD, inputs.D.shape)
  dbias = gradients.delta_bias
  return (
    _Inputs(
      u=du.astype(inputs.u.dtype),
      delta=gradients.delta.reshape(shape),
      A=gradients.A.reshape(inputs.A.shape),
      B=gradients.B.reshape(inputs.B.shape),
      C=gradients.C.reshape(inputs.C.shape),
      D=dD,
      delta_bias=None if dbias is None else dbias.reshape(shape[3:]),
    ),
  )


_scan.defvjp(_scan_fwd, _scan_bwd)


def _sizes(statics: _Statics, inputs: _Inputs) -> dict[str, Any]:
  """What all plans have in common."""
  b, h, w, d = inputs.u.shape
  return dict(
    b=b,
    l=inputs.B.shape[2],
    g=arguments.DIRECTIONS,
    e=d,
    softplus=statics.delta_softplus,
    reverse=False,
    h=h,
    w=w,
    unit=statics.unit,
    chunks=mosaic_gpu_image.chunks_for(h, w, statics.config.chunks),
  )


def _by_kernel(inputs: _Inputs) -> dict[str, Any]:
  """The arrays that both kernels take, by the names that these have."""
  n = inputs.A.shape[2]
  bias = inputs.delta_bias
  arrays = {
    "A": inputs.A.reshape(-1, n),
    "B": inputs.B,
    "C": inputs.C,
    "delta_bias": None if bias is None else bias.reshape(-1),
  }
  if n == 1:
    arrays |= {name: arrays[name][..., 0] for name in ("B", "C")}
  return arrays | dict(u=inputs.u, delta=inputs.delta, D=None, z=None)


def _forward_plan(
  statics: _Statics, inputs: _Inputs, **settings: Any
) -> mosaic_gpu_image.ForwardPlan:
  n = inputs.A.shape[2]
  cell: mosaic_gpu_forward.Cell = mosaic_gpu_forward.VectorCell(n)
  if n == 1:
    cell = scalar_cell(inputs.u.shape)
  sizes = _sizes(statics, inputs) | settings
  return mosaic_gpu_image.ForwardPlan(config=statics.config, cell=cell, **sizes)


def scalar_cell(shape: tuple[int, ...]) -> mosaic_gpu_forward_n1.ScalarCell:
  """Two channels for a lane, where there are blocks enough even so."""
  size = 3 * 4  # u, delta and y, in float32 at most.
  cell = mosaic_gpu_forward_n1.ScalarCell.for_channels(shape[-1], size)
  blocks = shape[0] * arguments.DIRECTIONS
  blocks *= mosaic_gpu_common.cdiv(shape[-1], cell.lanes)
  if blocks < _MANY_BLOCKS:
    cell = mosaic_gpu_forward_n1.ScalarCell(mosaic_gpu_common.LANES)
  return cell


def _run_forward(
  statics: _Statics, inputs: _Inputs, *, checkpoint_tile: int
) -> tuple[jax.Array, jax.Array | None]:
  """Returns y, and the checkpoints (None without)."""
  plan = _forward_plan(
    statics, inputs, checkpoint_tile=checkpoint_tile, final_state=False
  )
  arrays = _by_kernel(inputs)
  if inputs.A.shape[2] == 1:
    arrays["A"] = arrays["A"][:, 0]
  out = mosaic_gpu_chunked.scan(
    mosaic_gpu_forward.Inputs(**arrays, state=None), plan, statics.interpret
  )
  assert out.y is not None
  y = out.y.reshape(inputs.delta.shape).sum(3)
  if inputs.D is not None:
    y = y + inputs.D.sum(0) * inputs.u
  return y.astype(inputs.u.dtype), out.checkpoints


def _run_backward(
  statics: _Statics, residuals: _Residuals, dy: jax.Array
) -> mosaic_gpu_backward_plan.Outputs:
  inputs = residuals.inputs
  n = inputs.A.shape[2]
  arrays = mosaic_gpu_backward_plan.Inputs(
    **_by_kernel(inputs),
    checkpoints=residuals.checkpoints,
    dy=dy,
    dstate=None,
  )
  sizes = _sizes(statics, inputs)
  if sizes["chunks"] > 1:
    first = _forward_plan(
      statics, inputs, reverse=True, states_only=True, adjoint=True
    )
    arrays = mosaic_gpu_backward.run_first_phase(
      arrays, first, statics.interpret
    )
  tile = statics.config.backward_tile
  # Chunks are what `Image` makes them.
  sizes["tiles_per_chunk"] = sizes["l"]
  if n > 1:
    plan = mosaic_gpu_image.BackwardPlan(n=n, tile=tile, **sizes)
    return mosaic_gpu_backward.scan(arrays, plan, statics.interpret)
  plan = mosaic_gpu_image.BackwardPlanN1(
    tile=mosaic_gpu_backward_n1.TOKENS,
    checkpoint_tile=tile,
    # Two blocks of twice the width do not fit on a core, with du in float32.
    wide=False,
    **sizes,
  )
  return mosaic_gpu_backward_n1.scan(arrays, plan, statics.interpret)
