"""The backward Mosaic GPU kernels, on the CPU.

Interpreted with race detection on tiny sizes, since the interpreter calls back
into Python for each access to shared memory; and lowered for CUDA, which has
restrictions that the interpreter does not know, on the sizes of real models.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import (
  arguments,
  mosaic_gpu_backward,
  mosaic_gpu_common,
  reference,
  tuning,
)

CHECKED = mosaic_gpu_common.Interpret(detect_races=True)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")

# Relative to the largest gradient; float32 arithmetic over a few tokens.
TOLERANCE = 2e-6
# Results in bfloat16 are rounded to half a unit in the last place.
BFLOAT16_TOLERANCE = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and options of a scan."""

  b: int = 1
  l: int = 8
  g: int = 1
  e: int = 8
  n: int = 4
  reverse: bool = False
  chunks: int = 1
  tile: int = 4  # Of the backward kernel.
  optional: bool = True
  dtype: str = "float32"


def make_arguments(case):
  """Arguments, the state before the scan, and the gradients that come in."""
  rng = np.random.default_rng(0)
  b, l, g, n, d = case.b, case.l, case.g, case.n, case.g * case.e

  def normal(*shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  args = arguments.Arguments(
    u=normal(b, l, d, dtype=case.dtype),
    delta=normal(b, l, d, dtype=case.dtype),
    A=-jnp.exp(normal(d, n)),
    B=normal(b, l, g, n),
    C=normal(b, l, g, n),
    D=normal(d),
    z=normal(b, l, d, dtype=case.dtype),
    delta_bias=normal(d) - 1.0,
    initial_state=normal(b, d, n),
  )
  if not case.optional:
    args = args._replace(
      delta=jax.nn.softplus(args.delta), D=None, z=None, delta_bias=None
    )
  dy = normal(b, l, d, dtype=case.dtype)
  dstate = normal(b, d, n) if case.optional else None
  return args, dy, dstate


def expected(case, args, dy, dstate):
  """The gradients in float64, by JAX's derivative of the definition."""
  with jax.enable_x64(True):
    args, dy, dstate = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, dy, dstate)
    )
    options = arguments.Options(case.optional, case.reverse, jnp.float64)
    (_, state), pull = jax.vjp(
      lambda x: reference.selective_scan(x, options), args
    )
    if dstate is None:
      dstate = jnp.zeros_like(state)
    return jax.tree.map(np.asarray, pull((dy, dstate))[0])


def checkpoints(case, args):
  """The state with which the scan enters each tile."""
  x = jax.tree.map(lambda a: np.asarray(a, np.float64), args)
  delta = x.delta
  if case.optional:
    delta = np.logaddexp(0, delta + x.delta_bias)
  B = np.repeat(x.B, case.e, axis=2)
  h, states = x.initial_state, {}
  for t in list(range(case.l))[:: -1 if case.reverse else 1]:
    # Entering a tile overwrites what was the state within it.
    edge = case.tile - 1 if case.reverse else 0
    if t % case.tile == edge or t // case.tile not in states:
      states[t // case.tile] = h
    step = (delta[:, t] * x.u[:, t])[..., None] * B[:, t]
    h = np.exp(delta[:, t, :, None] * x.A) * h + step
  tiles = [states[i] for i in range(len(states))]
  return jnp.asarray(np.stack(tiles, 1), jnp.float32)


def call(case, args, checkpoints, dy, dstate, *, interpret):
  """Runs the kernel on arguments in the form that it wants."""

  def rows(x):
    x = jnp.swapaxes(x, 1, 2)
    if case.n > 1:
      return x
    return jnp.pad(x[..., 0], [(0, 0), (0, 0), (0, -case.l % 4)])

  config = tuning.Config(
    tile=16,
    unroll=min(4, case.tile),
    backward_tile=case.tile,
    chunks=case.chunks,
  )
  return mosaic_gpu_backward.backward(
    args.u,
    args.delta,
    args.A,
    rows(args.B),
    rows(args.C),
    args.D,
    args.z,
    args.delta_bias,
    checkpoints,
    dy,
    dstate,
    softplus=case.optional,
    reverse=case.reverse,
    config=config,
    interpret=interpret,
  )


def as_arguments(case, gradients):
  """The kernel's gradients as `Arguments`."""

  def rows(x):
    if case.n == 1:
      x = x[..., : case.l, None]
    return jnp.swapaxes(x, 1, 2)

  gradients = arguments.Arguments(*gradients)
  return gradients._replace(B=rows(gradients.B), C=rows(gradients.C))


@pytest.mark.parametrize(
  "case",
  [
    # A tile of which half stays in registers, the last one ragged.
    Case(l=11, g=2, n=8, tile=8),
    Case(b=2, l=14, e=12, n=4, reverse=True, tile=8),
    Case(l=4, e=8, n=16, optional=False),
    Case(l=5, e=8, n=12, optional=False, reverse=True),
    # Two blocks of a group.
    Case(l=3, e=136, n=8, dtype="bfloat16"),
    Case(l=36, n=4, chunks=3, tile=8),
    Case(l=18, n=1, reverse=True),
    Case(b=2, l=7, e=136, n=1, tile=16, dtype="bfloat16"),
    Case(l=3, g=2, n=1, tile=16, optional=False),
    Case(l=33, n=1, chunks=2, tile=16, reverse=True),
  ],
  ids=str,
)
def test_matches_the_derivative_of_the_definition(case):
  args, dy, dstate = make_arguments(case)
  want = expected(case, args, dy, dstate)
  run = jax.jit(functools.partial(call, case, interpret=CHECKED))
  got = run(args, checkpoints(case, args), dy, dstate)
  got = as_arguments(case, got)
  for name, x, y in zip(NAMES, got, want, strict=True):
    if x is None or y is None:
      assert x is y, name
      continue
    assert x.shape == y.shape, name
    narrow = name in ("u", "delta", "z") and case.dtype == "bfloat16"
    assert x.dtype == (case.dtype if narrow else jnp.float32), name
    error = np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
    assert error <= (BFLOAT16_TOLERANCE if narrow else TOLERANCE), name


def test_tile_of_an_odd_size_is_refused():
  case = Case(tile=2)
  args, dy, dstate = make_arguments(case)
  with pytest.raises(ValueError, match="`backward_tile` must be a multiple"):
    call(case, args, checkpoints(case, args), dy, dstate, interpret=CHECKED)


# A direction of Vim-Ti, a window of MambaVision, a stage of VMamba with one
# state and with 16, long sequences in chunks, and the largest state.
@pytest.mark.parametrize(
  "case",
  [
    Case(b=128, l=197, e=384, n=16, tile=8, dtype="bfloat16"),
    Case(b=128, l=49, e=160, n=8, tile=8, dtype="bfloat16", reverse=True),
    Case(b=64, l=3136, g=4, e=96, n=1, tile=8, dtype="bfloat16"),
    Case(b=8, l=196, g=4, e=96, n=16, tile=8, optional=False),
    Case(b=1, l=6085, e=384, n=16, tile=8, chunks=44, dtype="bfloat16"),
    Case(b=1, l=10**6, g=2, e=48, n=1, tile=8, chunks=88),
    Case(b=1, l=12, e=8, n=64, tile=8),
  ],
  ids=str,
)
def test_lowers_for_cuda(case):
  b, l, d, n = case.b, case.l, case.g * case.e, case.n

  def shaped(*shape, dtype="float32") -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)

  sequence = shaped(b, l, d, dtype=case.dtype)
  rows = shaped(b, l, case.g, n)
  channels = shaped(d) if case.optional else None
  args = arguments.Arguments(
    u=sequence,
    delta=sequence,
    A=shaped(d, n),
    B=rows,
    C=rows,
    D=channels,
    z=sequence if case.optional else None,
    delta_bias=channels,
    initial_state=None,
  )
  states = shaped(b, -(-l // case.tile), d, n)
  text = (
    jax.jit(functools.partial(call, case, interpret=None))
    .trace(args, states, sequence, shaped(b, d, n))
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )
  assert text.count("mosaic_gpu") >= (2 if case.chunks > 1 else 1)
  # No buffer of all states: the checkpoints are the largest.
  assert f"x{l}x{d}x{n}x" not in text
