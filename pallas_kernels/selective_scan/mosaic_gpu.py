"""The selective scan by Pallas Mosaic GPU kernels: what fits, and the calls.

The forward kernel (`mosaic_gpu_forward`) leaves, for a derivative, the state
at the first token of every few in memory; the backward kernel
(`mosaic_gpu_backward`) computes the states between again. Nothing of size
b l d n is ever stored.

Both want states in multiples of four and float32 for all that is not a sequence
of channels. `_prepare` sees to that with JAX operations, outside the custom
derivative. TMA wants channels in whole 16-byte units for each group: if they
are not a multiple of 8 (bfloat16) or 4 (float32), parameters and states are
padded, u, delta, z and dy come token by token (`mosaic_gpu_walk`), and y and
the gradients are written with room between groups, which is cut out of them.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group.
"""

import functools
import re
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import derivatives, dispatch
from pallas_kernels.selective_scan import (
  arguments,
  mosaic_gpu_backward,
  mosaic_gpu_chunked,
  mosaic_gpu_common,
  mosaic_gpu_forward,
  mosaic_gpu_forward_n1,
  mosaic_gpu_walk,
  tuning,
)

MAX_STATES: Final = 64  # As many as a lane can keep in registers.

# With more, a block of the backward kernel has too few channels for copies of
# single tokens in bfloat16.
_MAX_STATES_OF_ROWS: Final = 32

# An element's position in its array must fit a signed 32-bit integer.
MAX_ELEMENTS: Final = 2**31 - 1

DTYPES: Final = ("bfloat16", "float32")

# Why not on other NVIDIA GPUs, by the first number of the compute capability.
_LACKS: Final = {
  7: "it has no TMA, by which all tiles come and go",
  8: "it has no TMA, by which all tiles come and go",
  12: "a block has 99 KiB of shared memory there, the backward kernel takes "
  "up to 126",
}

# Abstract devices have a name, but no compute capability.
_CAPABILITIES: Final = (
  (r"\b(A100|A800|A30)\b", (8, 0)),
  (r"\bG?H(100|200|800|20)\b", (9, 0)),
  (r"\bG?B(100|200)\b", (10, 0)),
  (r"\bG?B300\b", (10, 3)),
  (r"\bRTX 50[0-9]0\b", (12, 0)),
)


def why_not(
  args: arguments.Arguments, options: arguments.Options
) -> str | None:
  """None if the kernels can run this call here, otherwise why they cannot."""
  return why_not_device(dispatch.target_device()) or why_not_interpreted(
    args, options
  )


def why_not_interpreted(
  args: arguments.Arguments, options: arguments.Options
) -> str | None:
  """Like `why_not`, wherever it runs."""
  del options
  for name, x in args._asdict().items():
    if x is not None and x.dtype.name not in DTYPES:
      return f"`{name}` is {x.dtype}, it takes {' and '.join(DTYPES)}"
  b, l, d = args.u.shape
  n = args.A.shape[1]
  if n > MAX_STATES:
    return f"`A` has {n} states per channel, it takes at most {MAX_STATES}"
  e, unit = d // args.B.shape[2], _unit(args)
  if n > _MAX_STATES_OF_ROWS and unit > 4 and e % unit:
    return (
      f"`A` has {n} states per channel, and a group has {e} channels, no "
      f"multiple of {unit}: in bfloat16 it then takes at most "
      f"{_MAX_STATES_OF_ROWS} states"
    )
  sizes = {
    "`u`": b * l * d,
    "`B`": args.B.size,
    "the states it keeps for the derivative": (
      b * mosaic_gpu_common.cdiv(l, tuning.BACKWARD_TILE) * d * n
    ),
  }
  for what, size in sizes.items():
    if size > MAX_ELEMENTS:
      return (
        f"with {b=}, {l=}, {d=}, {n=} {what} would have {size} elements, it "
        f"takes at most {MAX_ELEMENTS} (32-bit offsets); split the batch, or "
        "the sequence with `initial_state`"
      )
  return None


def why_not_device(device: Any) -> str | None:
  """What keeps the kernels from a device, real or abstract."""
  capability = _compute_capability(device)
  if capability is not None and capability[0] in (9, 10):
    return None
  has = device.device_kind
  if capability is not None:
    has += f" of {capability[0]}.{capability[1]}"
    if lacks := _LACKS.get(capability[0]):
      has += f" ({lacks})"
  return f"it needs an NVIDIA GPU of compute capability 9.0 or 10.x, not {has}"


def _compute_capability(device: Any) -> tuple[int, int] | None:
  """(9, 0) for an H100; None if there is none, or it is unknown."""
  if device.platform not in ("cuda", "gpu"):
    return None
  given = str(getattr(device, "compute_capability", ""))
  if re.fullmatch(r"\d+\.\d+", given):
    major, minor = given.split(".")
    return int(major), int(minor)
  for pattern, capability in _CAPABILITIES:
    if re.search(pattern, device.device_kind):
      return capability
  return None


class _Statics(NamedTuple):
  """What is known about a scan when it is traced."""

  delta_softplus: bool
  reverse: bool
  config: tuning.Config
  interpret: mosaic_gpu_common.Interpret | None


class _Inputs(NamedTuple):
  """The arrays of a scan as the kernels take them.

  All but u, delta and z are float32, and have d channels, those of u, or more,
  those of each group rounded up to whole 16-byte units. For n > 1, n is a
  multiple of 4; for n = 1, B and C are (b, g, l) with l padded to a multiple of
  4.
  """

  u: Float[Array, "b l d"]
  delta: Float[Array, "b l d"]
  A: Float[Array, "d n"]
  B: Float[Array, "b g l n"]
  C: Float[Array, "b g l n"]
  D: Float[Array, "d"] | None
  z: Float[Array, "b l d"] | None
  delta_bias: Float[Array, "d"] | None
  initial_state: Float[Array, "b d n"] | None


class _Residuals(NamedTuple):
  """What the forward scan leaves for the backward one."""

  inputs: _Inputs
  checkpoints: Float[Array, "b tiles d n"]


def selective_scan(
  args: arguments.Arguments,
  options: arguments.Options,
  *,
  config: tuning.Config | None = None,
  interpret: mosaic_gpu_common.Interpret | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`.

  Args:
    args: The arrays; `why_not` must be None for them.
    options: The choices of the call.
    config: Settings of the kernels; None for those of `tuning`.
    interpret: None to compile, else how to interpret the kernels on the CPU.
  """
  b, l, d = args.u.shape
  g, n = args.B.shape[2:]
  if b == 0:
    return args.u, jnp.zeros((0, d, n), jnp.float32)
  if config is None:
    problem = tuning.Problem(
      b=b, l=l, d=d, g=g, n=n, itemsize=args.u.dtype.itemsize
    )
    device = None if interpret else dispatch.target_device()
    config = tuning.lookup(problem, device)
  statics = _Statics(options.delta_softplus, options.reverse, config, interpret)
  y, state = _shared(statics, _prepare(args))
  e = d // g
  state = state.reshape(b, g, -1, state.shape[-1])[:, :, :e, :n]
  return y, state.reshape(b, d, n)


def _prepare(args: arguments.Arguments) -> _Inputs:
  """The arrays as `_Inputs` has them: dtypes, dimensions, padding."""
  d = args.u.shape[2]
  g, n = args.B.shape[2:]
  padding = -(d // g) % _unit(args)
  channels = functools.partial(pad_channels, g=g, padding=padding)
  pad_states = functools.partial(
    pad_last, padding=0 if n == 1 else -n % mosaic_gpu_common.VECTOR
  )

  def states(x):
    return pad_states(x.astype(jnp.float32))

  def rows(x):  # (b, l, g, n) to (b, g, l, n).
    x = jnp.swapaxes(states(x), 1, 2)
    if n > 1:
      return x
    return pad_last(x[..., 0], padding=-x.shape[2] % mosaic_gpu_common.VECTOR)

  def maybe(function, x):
    return None if x is None else function(x)

  return _Inputs(
    u=args.u,
    delta=args.delta,
    A=channels(states(args.A), axis=0),
    B=rows(args.B),
    C=rows(args.C),
    D=maybe(lambda x: channels(x.astype(jnp.float32), axis=0), args.D),
    z=args.z,
    delta_bias=maybe(
      lambda x: channels(x.astype(jnp.float32), axis=0), args.delta_bias
    ),
    initial_state=maybe(
      lambda x: channels(states(x), axis=1), args.initial_state
    ),
  )


def _unit(args: arguments.Arguments) -> int:
  """Channels of a TMA unit in the narrowest of the sequences."""
  sequences = (args.u, args.delta, args.z)
  itemsize = min(x.dtype.itemsize for x in sequences if x is not None)
  return mosaic_gpu_common.TMA_BYTES // itemsize


def pad_channels(x: jax.Array, *, axis: int, g: int, padding: int):
  """Adds zero channels at the end of each of the g groups along `axis`."""
  if not padding:
    return x
  before, d, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
  x = x.reshape(*before, g, d // g, *after)
  widths = [(0, 0)] * x.ndim
  widths[axis + 1] = (0, padding)
  return jnp.pad(x, widths).reshape(*before, d + g * padding, *after)


def pad_last(x: jax.Array, *, padding: int) -> jax.Array:
  if not padding:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])


# A function of its own, so that the many equal layers of a model are traced and
# lowered once: three seconds for each layer of a training step otherwise.
@functools.partial(jax.jit, static_argnums=0)
def _shared(statics: _Statics, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
  return _scan(statics, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(statics: _Statics, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
  """Returns y (b, l, d) and the final state (b, d, n)."""
  y, state, _ = _run_forward(statics, inputs, checkpoint_tile=0)
  return y, state


def _scan_fwd(statics: _Statics, inputs: _Inputs):
  inputs = derivatives.differentiable_once("selective_scan", inputs)
  y, state, checkpoints = _run_forward(
    statics, inputs, checkpoint_tile=statics.config.backward_tile
  )
  assert checkpoints is not None  # They were asked for.
  return (y, state), _Residuals(inputs, checkpoints)


def _scan_bwd(statics: _Statics, residuals: _Residuals, cotangents):
  residuals, (dy, dstate) = derivatives.differentiable_once(
    "selective_scan", (residuals, cotangents)
  )
  inputs = residuals.inputs
  gradients = mosaic_gpu_backward.backward(
    inputs.u,
    inputs.delta,
    inputs.A,
    inputs.B,
    inputs.C,
    inputs.D,
    inputs.z,
    inputs.delta_bias,
    residuals.checkpoints,
    dy,
    dstate,
    softplus=statics.delta_softplus,
    reverse=statics.reverse,
    config=statics.config,
    interpret=statics.interpret,
  )
  dinitial_state = None if inputs.initial_state is None else gradients.dstate
  return (_Inputs(*gradients[:-1], initial_state=dinitial_state),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _run_forward(
  statics: _Statics, inputs: _Inputs, *, checkpoint_tile: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns y, the final state and the checkpoints (None without)."""
  b, l, _ = inputs.u.shape
  g = inputs.B.shape[1]
  d, n = inputs.A.shape
  if n == 1:
    size = sum(
      x.dtype.itemsize
      for x in (inputs.u, inputs.delta, inputs.z, inputs.u)  # And y.
      if x is not None
    )
    cell = mosaic_gpu_forward_n1.ScalarCell.for_channels(d // g, size)
  else:
    cell = mosaic_gpu_forward.VectorCell(n)
  plan = mosaic_gpu_forward.Plan(
    b=b,
    l=l,
    g=g,
    e=d // g,
    width=mosaic_gpu_walk.width_of(inputs.u, inputs.A, g),
    config=statics.config,
    cell=cell,
    softplus=statics.delta_softplus,
    reverse=statics.reverse,
    checkpoint_tile=checkpoint_tile,
  )
  state = inputs.initial_state
  y, last, _, checkpoints = mosaic_gpu_chunked.scan(
    mosaic_gpu_forward.Inputs(
      u=inputs.u,
      delta=inputs.delta,
      A=inputs.A if n > 1 else inputs.A[:, 0],
      B=inputs.B,
      C=inputs.C,
      D=inputs.D,
      z=inputs.z,
      delta_bias=inputs.delta_bias,
      state=state if n > 1 or state is None else state[..., 0],
    ),
    plan,
    statics.interpret,
  )
  assert y is not None
  assert last is not None
  if checkpoints is not None:
    checkpoints = checkpoints.reshape(b, -1, d, n)
  return y, last.reshape(b, d, n), checkpoints
