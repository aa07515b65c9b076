"""The forward Mosaic GPU kernels on the CPU, interpreted with race detection.

A data race raises. Sizes are tiny: the interpreter calls back into Python for
each access to shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import (
  mosaic_gpu_chunked,
  mosaic_gpu_common,
  mosaic_gpu_forward,
  mosaic_gpu_forward_n1,
  tuning,
)

CONFIG = tuning.Config(tile=8, unroll=2, backward_tile=4)
CHECKED = mosaic_gpu_common.Interpret(detect_races=True)
TOLERANCE = 1e-6  # Of float32 states over a few dozen steps.


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and options of a scan."""

  b: int = 1
  l: int = 16
  g: int = 1
  e: int = 8
  n: int = 4
  reverse: bool = False
  chunks: int = 1
  optional: bool = True
  lanes: int = 128  # Of a block, for n = 1.


def make_inputs(case, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  b, l, g, n, d = case.b, case.l, case.g, case.n, case.g * case.e

  def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  inputs = mosaic_gpu_forward.Inputs(
    u=normal(b, l, d, dtype=dtype),
    delta=normal(b, l, d, dtype=dtype),
    A=-jnp.exp(normal(d, n)),
    B=normal(b, g, l, n),
    C=normal(b, g, l, n),
    D=normal(d),
    z=normal(b, l, d, dtype=dtype),
    delta_bias=normal(d) - 3.0,
    state=normal(b, d, n),
  )
  if case.optional:
    return inputs
  return inputs._replace(
    delta=jax.nn.softplus(inputs.delta),
    D=None,
    z=None,
    delta_bias=None,
    state=None,
  )


def run(case, inputs, *, checkpoints=True):
  if case.n == 1:
    padding = [(0, 0), (0, 0), (0, -case.l % 4)]
    state = inputs.state
    inputs = inputs._replace(
      A=inputs.A[:, 0],
      B=jnp.pad(inputs.B[..., 0], padding),
      C=jnp.pad(inputs.C[..., 0], padding),
      state=None if state is None else state[..., 0],
    )
    cell = mosaic_gpu_forward_n1.ScalarCell(case.lanes)
  else:
    cell = mosaic_gpu_forward.VectorCell(case.n)
  plan = mosaic_gpu_forward.Plan(
    b=case.b,
    l=case.l,
    g=case.g,
    e=case.e,
    config=dataclasses.replace(CONFIG, chunks=case.chunks),
    cell=cell,
    softplus=case.optional,
    reverse=case.reverse,
    checkpoint_tile=CONFIG.backward_tile if checkpoints else 0,
  )
  scan = jax.jit(lambda x: mosaic_gpu_chunked.scan(x, plan, CHECKED))
  return scan(inputs)


def expected(case, inputs):
  """y, the last state and the checkpoints in float64, from the definition."""
  x = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs)
  delta = x.delta
  if case.optional:
    delta = np.logaddexp(0, delta + x.delta_bias)
  B, C = (np.repeat(rows, case.e, axis=1) for rows in (x.B, x.C))
  d = case.g * case.e
  h = np.zeros((case.b, d, case.n)) if x.state is None else x.state
  y = np.zeros(delta.shape)
  tile = CONFIG.backward_tile
  checkpoints = np.zeros((case.b, -(-case.l // tile), d, case.n))
  for t in list(range(case.l))[:: -1 if case.reverse else 1]:
    enters = t % tile == 0
    if case.reverse:
      enters = t % tile == tile - 1 or t == case.l - 1
    if enters:
      checkpoints[:, t // tile] = h
    step = (delta[:, t] * x.u[:, t])[..., None] * B[:, :, t]
    h = np.exp(delta[:, t, :, None] * x.A) * h + step
    y[:, t] = (h * C[:, :, t]).sum(-1)
  if x.D is not None:
    y = y + x.D * x.u
  if x.z is not None:
    y = y * x.z / (1 + np.exp(-x.z))
  return y, h, checkpoints


def assert_close(got, want, tolerance=TOLERANCE):
  assert got.shape == want.shape
  got = np.asarray(got, np.float64)
  assert np.isfinite(got).all()
  assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize(
  "case",
  [
    Case(l=16, e=8, n=4),
    Case(b=2, l=11, g=2, e=136, n=8, reverse=True),  # Two blocks of a group.
    Case(l=9, g=3, e=96, optional=False),  # Groups of less than a block.
    Case(l=1, e=4, n=8, reverse=True),
    Case(b=2, l=33, g=2, chunks=5, reverse=True),
    Case(l=29, e=12, chunks=3),
    Case(b=2, l=11, g=2, e=264, n=1, lanes=256, reverse=True),
    Case(l=9, g=2, n=1, optional=False),
    Case(l=50, n=1, chunks=7, reverse=True),
  ],
  ids=str,
)
def test_matches_the_definition(case):
  inputs = make_inputs(case)
  y, state, checkpoints = expected(case, inputs)
  outputs = run(case, inputs)
  n = (case.n,) if case.n > 1 else ()
  assert outputs.y.dtype == jnp.float32
  assert outputs.state.dtype == outputs.checkpoints.dtype == jnp.float32
  assert_close(outputs.y, y)
  assert_close(outputs.state, state.reshape(case.b, 1, -1, *n))
  shape = (*checkpoints.shape[:3], *n)
  assert_close(outputs.checkpoints, checkpoints.reshape(shape))


@pytest.mark.parametrize("n", [1, 4])
def test_bfloat16_sequences_have_a_float32_state(n):
  case = Case(l=12, e=8, n=n)
  inputs = make_inputs(case, jnp.bfloat16)
  y, state, _ = expected(case, inputs)
  outputs = run(case, inputs, checkpoints=False)
  assert outputs.y.dtype == jnp.bfloat16
  assert outputs.state.dtype == jnp.float32
  assert outputs.checkpoints is None
  assert_close(outputs.y, y, 2**-8)  # One rounding.
  assert_close(outputs.state.reshape(state.shape), state)


def test_the_same_inputs_give_the_same_bits():
  case = Case(l=24, chunks=3)
  first, second = (run(case, make_inputs(case)) for _ in range(2))
  for x, y in zip(first, second, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_reaches_the_tokens_after_it_and_no_others(reverse):
  case = Case(l=11, reverse=reverse)
  inputs = make_inputs(case)
  u = inputs.u.at[0, 5, 2].set(jnp.nan)
  outputs = run(case, inputs._replace(u=u))
  reached = np.zeros((11, 8), bool)
  reached[slice(0, 6) if reverse else slice(5, None), 2] = True
  np.testing.assert_array_equal(np.isnan(outputs.y[0]), reached)
  assert np.isnan(outputs.state[0, 0, 2]).all()


def test_softplus_is_accurate_to_float32_at_every_step_size():
  steps = np.geomspace(1e-6, 50.0, 2000)
  x = np.log(np.expm1(steps)).astype(np.float32)
  got = np.asarray(mosaic_gpu_common.softplus(jnp.asarray(x)), np.float64)
  want = np.logaddexp(0, x.astype(np.float64))
  np.testing.assert_allclose(got, want, rtol=3e-6)


def test_softplus_of_the_extremes():
  x = jnp.asarray([-jnp.inf, -200.0, 200.0, jnp.inf, jnp.nan])
  got = mosaic_gpu_common.softplus(x)
  np.testing.assert_array_equal(got, [0.0, 0.0, 200.0, jnp.inf, jnp.nan])


def test_step_sizes_of_a_millionth_are_integrated():
  case = Case(l=16)
  inputs = make_inputs(case)._replace(
    delta=jnp.zeros((1, 16, 8)),
    delta_bias=jnp.full(8, np.log(np.expm1(1e-6)), jnp.float32),
    D=None,
    state=None,
  )
  y, state, _ = expected(case, inputs)
  outputs = run(case, inputs, checkpoints=False)
  assert_close(outputs.y, y, 5e-6)
  assert_close(outputs.state[:, 0], state, 5e-6)
