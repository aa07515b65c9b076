"""The backward pass of the selective scan as a Mosaic GPU kernel, n > 1.

A block owns some channels of one group and one batch row (and one chunk of the
sequence) and walks its tiles of tokens against the scan. In each tile it first
runs the recurrence forward from the checkpoint with which the scan entered,

  p = exp(delta A) h',  h = p + delta u B,  y = C h,

with h' the state before, and keeps p, not h: with g the gradient of h, the rest
follows from p,

  g = dy C + exp(delta' A) g',  d(delta A) = g p,  dB = g delta u,  dC = dy h.

A tile is short enough that each state is computed once. The last `Plan.group`
tokens of a tile in scan order leave p and exp(delta A) in registers; the others
leave p in shared memory and repeat the exponential.

A lane holds up to four channels times four states. Sums over states (for y and
the gradients of u and delta) and over channels (for dB and dC) are taken within
lanes only. The partial sums of `Plan.group` tokens go to shared memory, where
all lanes add them up in a fixed order. That takes half the instructions of
shuffles for each token, and no atomics: results are reproducible.

b batch, l length, d channels, n state size, g groups, e = d // g channels of a
group, k chunks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan import (
  mosaic_gpu_backward_block,
  mosaic_gpu_backward_memory,
  mosaic_gpu_backward_n1,
  mosaic_gpu_backward_plan,
  mosaic_gpu_forward,
  mosaic_gpu_forward_n1,
  mosaic_gpu_walk,
  tuning,
)
from pallas_kernels.selective_scan import mosaic_gpu_common as common

Inputs = mosaic_gpu_backward_plan.Inputs
Outputs = mosaic_gpu_backward_plan.Outputs
Plan = mosaic_gpu_backward_plan.Plan


def backward(
  u: Float[Array, "b l d"],
  delta: Float[Array, "b l d"],
  A: Float[Array, "d n"],
  B: Float[Array, "b g l n"],
  C: Float[Array, "b g l n"],
  D: Float[Array, "d"] | None,
  z: Float[Array, "b l d"] | None,
  delta_bias: Float[Array, "d"] | None,
  checkpoints: Float[Array, "b tiles d n"],
  dy: Float[Array, "b l d"],
  dstate: Float[Array, "b d n"] | None,
  *,
  softplus: bool,
  reverse: bool,
  config: tuning.Config,
  interpret: common.Interpret | None = None,
) -> Outputs:
  """Gradients of the scan, from those of its output and its final state.

  Args:
    u: Input; of as many channels as A, or fewer in each group.
    delta: Step sizes.
    A: State matrix; n is 1 or a multiple of 4.
    B: Input matrix; for n = 1 (b, g, l), with l padded to a multiple of 4.
    C: Output matrix, like B.
    D: Skip connection.
    z: Gate.
    delta_bias: Added to delta.
    checkpoints: The state with which the scan enters each tile of
      `config.backward_tile` tokens, tiles in memory order.
    dy: Gradient of the output.
    dstate: Gradient of the state after the last token in scan order.
    softplus: Whether delta goes through softplus.
    reverse: Whether the scan goes from the last token to the first.
    config: Tile sizes.
    interpret: None to compile.

  Returns:
    Gradients of u, delta, A, B, C, D, z, delta_bias and of the state before the
    first token in scan order; None for what was not given.
  """
  inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, checkpoints, dy, dstate)
  b, l, _ = u.shape
  g, n = B.shape[1], A.shape[1]
  e = A.shape[0] // g
  tile = config.backward_tile
  if n == 1:
    tile = math.lcm(tile, mosaic_gpu_backward_n1.TOKENS)
  tokens = l
  if config.chunks > 1:
    first = _first_phase(inputs, tile, softplus, reverse, config)
    tokens = first.tiles_per_chunk * first.config.tile
    inputs = run_first_phase(inputs, first, interpret)
  sizes: dict[str, Any] = dict(
    b=b,
    l=l,
    g=g,
    e=e,
    width=mosaic_gpu_walk.width_of(u, A, g),
    tile=tile,
    tiles_per_chunk=common.cdiv(tokens, tile),
    softplus=softplus,
    reverse=reverse,
  )
  if n > 1:
    return scan(inputs, Plan(n=n, **sizes), interpret)
  return mosaic_gpu_backward_n1.scan(
    inputs,
    mosaic_gpu_backward_n1.Plan(
      checkpoint_tile=config.backward_tile,
      wide=mosaic_gpu_backward_n1.is_wide(e, u.dtype),
      **sizes,
    ),
    interpret,
  )


def _first_phase(
  inputs: Inputs,
  tile: int,
  softplus: bool,
  reverse: bool,
  config: tuning.Config,
) -> mosaic_gpu_forward.Plan:
  """How to get what each chunk adds to the gradient of the state before it.

  The gradients of the states of a chunk are linear in that of the state after
  it. As in the forward scan (`mosaic_gpu_chunked`) every chunk is run on its
  own first, from zero; here by the recurrence of the derivative.
  """
  b, l, _ = inputs.u.shape
  g, n = inputs.B.shape[1], inputs.A.shape[1]
  e = inputs.A.shape[0] // g
  # Chunks of whole tiles in both phases.
  tile = math.lcm(config.tile, tile)
  cell: mosaic_gpu_forward.Cell = mosaic_gpu_forward.VectorCell(n)
  if n == 1:
    sequences = (inputs.dy, inputs.delta, inputs.z)
    size = sum(x.dtype.itemsize for x in sequences if x is not None)
    cell = mosaic_gpu_forward_n1.ScalarCell.for_channels(e, size)
    tile = math.lcm(tile, 32)  # A copy of C has at least 128 bytes.
  return mosaic_gpu_forward.Plan(
    b=b,
    l=l,
    g=g,
    e=e,
    width=mosaic_gpu_walk.width_of(inputs.u, inputs.A, g),
    config=dataclasses.replace(config, tile=tile),
    cell=cell,
    softplus=softplus,
    reverse=not reverse,
    states_only=True,
    adjoint=True,
  )


def run_first_phase(
  inputs: Inputs,
  plan: mosaic_gpu_forward.Plan,
  interpret: common.Interpret | None,
) -> Inputs:
  """Adds what the first phase computes to the inputs of the second."""
  out = mosaic_gpu_forward.scan(
    mosaic_gpu_forward.Inputs(
      u=inputs.dy,
      delta=inputs.delta,
      A=inputs.A if inputs.A.shape[1] > 1 else inputs.A[:, 0],
      B=inputs.C,
      C=None,
      D=None,
      z=inputs.z,
      delta_bias=inputs.delta_bias,
      state=None,
    ),
    plan,
    interpret,
  )
  return inputs._replace(chunk_dstate=out.state, chunk_delta_sum=out.delta_sum)


def scan(
  inputs: Inputs, plan: Plan, interpret: common.Interpret | None = None
) -> Outputs:
  """Runs the kernel and adds up what its blocks share."""
  arrays = _blocked(inputs, plan)
  out_type = _out_type(inputs, plan)
  names = (*arrays, *(name + "_out" for name in out_type))

  def body(*refs, **scratch):
    refs = {**dict(zip(names, refs, strict=True)), **scratch}
    plan.run(functools.partial(mosaic_gpu_backward_block.run, refs))

  results = common.kernel(
    body,
    name=plan.name + "_backward",
    out_type=list(out_type.values()),
    scratch_types=mosaic_gpu_backward_memory.scratch_types(arrays, plan),
    grid={"block": plan.blocks},
    interpret=interpret,
    lane_semantics=True,
  )(*arrays.values())
  return _unblocked(dict(zip(out_type, results, strict=True)), plan)


def _blocked(inputs: Inputs, plan: Plan) -> dict[str, jax.Array]:
  """The given inputs as the kernel indexes them.

  What is long are views. What is small, and read without TMA, is padded to
  whole blocks.
  """
  b, l, g, e, n = plan.b, plan.l, plan.g, plan.e, plan.n
  states = (n // common.VECTOR, common.VECTOR)
  pad_e = plan.channel_blocks * plan.channels - e
  pad_n = plan.vectors * common.VECTOR - n
  arrays = {}
  for name, x in inputs._asdict().items():
    if x is None:
      continue
    if name in ("u", "delta", "z", "dy"):
      x = plan.view(x, name)
    elif name in ("B", "C"):
      x = x.reshape(b * g, l, *states)
    elif name == "checkpoints":
      x = x.reshape(-1, e // plan.inner, plan.inner, *states)
    elif name in ("A", "dstate", "chunk_dstate"):
      # exp(delta A) is computed as a power of two.
      x = x * common.LOG2E if name == "A" else x
      x = x.astype(jnp.float32).reshape(-1, g, e, n)
      x = jnp.pad(x, ((0, 0), (0, 0), (0, pad_e), (0, pad_n)))
      x = x.reshape(*x.shape[:2], -1, *plan.state_shape[1:])
    elif name == "chunk_delta_sum":
      x = x.reshape(-1, g, e)
      x = jnp.pad(x, ((0, 0), (0, 0), (0, pad_e)))
      x = x.reshape(*x.shape[:2], -1, plan.inner)
    else:  # D, delta_bias: a copy for each of `Plan.group` tokens.
      x = x.astype(jnp.float32).reshape(g, e)
      x = jnp.pad(x, ((0, 0), (0, pad_e)))
      x = x.reshape(g, plan.channel_blocks, plan.rows, plan.inner)
      x = jnp.tile(x, (1, 1, plan.group, 1))
    arrays[name] = x
  return arrays


def _out_type(inputs: Inputs, plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Partial sums have the blocks that made them as leading dimensions."""
  b, g, k = plan.b, plan.g, plan.chunks
  blocks = plan.channel_blocks
  # Whole tiles: those of dB and dC are contiguous, see `mosaic_gpu_walk`.
  rows = (b * g * blocks, common.cdiv(plan.l, plan.tile) * plan.tile)
  rows += (plan.n // common.VECTOR, common.VECTOR)
  state = (b * k, g, blocks * plan.rows, *plan.state_shape[1:])
  shapes = {
    "u": (),
    "delta": (),
    "A": state,
    "B": rows,
    "C": rows,
    "D": (b * k, g, blocks, *plan.group_shape),
    "z": (),
    "delta_bias": (b * k, g, blocks, *plan.group_shape),
    "dstate": state,
  }
  out = {}
  for name, shape in shapes.items():
    x = getattr(inputs, name)
    if x is None and name != "dstate":
      continue
    if name in ("u", "delta", "z"):
      out[name] = plan.result("d" + name, x.dtype, plan.tile, plan.channels)
    else:
      out[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return out


def _unblocked(results: dict[str, jax.Array], plan: Plan) -> Outputs:
  """The results with the shapes of `Outputs`."""
  b, l, g, e, n = plan.b, plan.l, plan.g, plan.e, plan.n
  d, pad_n = g * e, plan.vectors * common.VECTOR
  out: dict[str, Any] = dict.fromkeys(Outputs._fields)
  for name, x in results.items():
    if name in ("u", "delta", "z"):
      x = plan.unview(x)
    elif name in ("B", "C"):
      x = x.reshape(b, g, plan.channel_blocks, -1, n)[:, :, :, :l].sum(2)
    elif name in ("A", "dstate"):
      x = x.sum(0) if name == "A" else plan.first_chunk(x)
      x = x.reshape(-1, g, plan.channel_blocks * plan.channels, pad_n)
      x = x[:, :, :e, :n].reshape(-1, d, n)
      x = x[0] if name == "A" else x
    else:  # D, delta_bias.
      x = x.reshape(-1, g, plan.channel_blocks, plan.group, plan.channels)
      x = x.sum((0, 3)).reshape(g, -1)[:, :e].reshape(d)
    out[name] = x
  return Outputs(**out)
