"""The implementations of the selective scan, and its checks of arguments."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.selective_scan import arg_specs
from tests.kernels import selective_scan_suite as suite


def _largest_buffer(compiled) -> int:
  """Elements of the largest array in a compiled program."""
  shapes = re.findall(
    r"\b(?:f32|f64|bf16|f16)\[([0-9,]+)\]", compiled.as_text()
  )
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


class _BoundedMemorySuite(suite.SelectiveScanSuite):
  """For implementations that hold the states of a part of the tokens only.

  `MEMORY` bounds the temporary memory of a gradient, in units of one array of
  all states (b * l * d * n elements).
  """

  MEMORY: float

  def test_no_array_of_all_states(self):
    spec = arg_specs.ArgSpec(b=2, l=512, d=32, n=16, gate=True, source="")
    arrays = arg_specs.make_arguments(spec)

    def loss(arrays):
      return self.scan(**arrays, delta_softplus=True).sum()

    compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
    states = spec.b * spec.l * spec.d * spec.n
    # Chunks are an eighth at most; the factor leaves room for their padding.
    assert _largest_buffer(compiled) <= states / 4
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= self.MEMORY * 4 * states


class TestReference(suite.SelectiveScanSuite):
  IMPLEMENTATION = "reference"


class TestXlaAssociative(_BoundedMemorySuite):
  IMPLEMENTATION = "xla_associative"
  MEMORY = 3.0  # Some twenty arrays of an eighth of the tokens.


class TestXlaSequential(_BoundedMemorySuite):
  IMPLEMENTATION = "xla_sequential"
  MEMORY = 0.5


def _arrays(**changes):
  """Valid arguments, (b, l, d, n, g) = (2, 8, 6, 4, 1), with some changed."""
  arrays = {
    "u": jnp.zeros((2, 8, 6)),
    "delta": jnp.zeros((2, 8, 6)),
    "A": jnp.zeros((6, 4)),
    "B": jnp.zeros((2, 8, 4)),
    "C": jnp.zeros((2, 8, 4)),
  }
  return arrays | changes


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"u": jnp.zeros((8, 6))},
      r"`u` must have shape \(b, l, d\), got \(8, 6\)",
    ),
    ({"u": jnp.zeros((2, 0, 6))}, r"`u` has no tokens, got .*\(2, 0, 6\)"),
    ({"u": jnp.zeros((2, 8, 0)), "A": jnp.zeros((0, 4))}, "one channel"),
    ({"A": jnp.zeros((6, 0))}, "at least one state"),
    ({"A": jnp.zeros(6)}, r"`A` must have shape \(d, n\), got \(6,\)"),
    (
      {"A": jnp.zeros((4, 6))},
      r"`A` must have shape \(6, 6\) to match `u`, got \(4, 6\)",
    ),
    (
      {"delta": jnp.zeros((2, 6, 8))},
      r"`delta` must have shape \(2, 8, 6\) to match `u`, got \(2, 6, 8\)\. "
      r"Sequences are channel-last",
    ),
    ({"z": jnp.zeros((1, 8, 6))}, r"`z` must have shape \(2, 8, 6\)"),
    (
      {"B": jnp.zeros((2, 7, 4))},
      r"`B` must have shape \(2, 8, 4\) or \(2, 8, groups, 4\) to match `u` "
      r"and `A`, got \(2, 7, 4\)",
    ),
    ({"C": jnp.zeros((6, 4))}, r"`C` must have shape \(2, 8, 4\) or"),
    (
      {"B": jnp.zeros((2, 8, 4, 4))},
      r"the 4 groups of `B`.*must divide the 6 channels",
    ),
    ({"B": jnp.zeros((2, 8, 0, 4))}, "the 0 groups of `B`"),
    (
      {"B": jnp.zeros((2, 8, 3, 4))},
      r"`B` and `C` must have the same number of groups, got .*3, 4\).*8, 4\)",
    ),
    ({"D": jnp.zeros((4,))}, r"`D` must have shape \(6,\) to match"),
    ({"delta_bias": jnp.zeros((6, 1))}, r"`delta_bias` must have .*\(6,\)"),
    (
      {"initial_state": jnp.zeros((2, 4, 6))},
      r"`initial_state` must have shape \(2, 6, 4\)",
    ),
  ],
)
def test_wrong_shapes_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    pallas_kernels.selective_scan(**_arrays(**changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"u": jnp.zeros((2, 8, 6), jnp.int32)}, "`u` must .*float32.*got int32"),
    ({"A": jnp.zeros((6, 4), jnp.complex64)}, "`A` must .*got complex64"),
    (
      {"B": jnp.zeros((2, 8, 4), jnp.float8_e4m3fn)},
      "`B` must .*got float8_e4m3fn",
    ),
    ({"delta": None}, "`delta` must be an array, got NoneType"),
    ({"D": [1.0] * 6}, "`D` must be an array, got list"),
  ],
)
def test_wrong_types_are_named(changes, message):
  with pytest.raises(TypeError, match=message):
    pallas_kernels.selective_scan(**_arrays(**changes))


def test_final_state_is_returned_on_request():
  y = pallas_kernels.selective_scan(**_arrays())
  assert y.shape == (2, 8, 6)
  y, state = pallas_kernels.selective_scan(**_arrays(), return_final_state=True)
  assert (y.shape, state.shape) == ((2, 8, 6), (2, 6, 4))


@pytest.mark.parametrize(
  "implementation", [None, "mosaic_gpu_interpret", "xla_associative"]
)
def test_gradients_of_gradients_are_given_or_refused(implementation):
  arrays = _arrays()

  def loss(u):
    return pallas_kernels.selective_scan(
      **arrays | {"u": u}, implementation=implementation
    ).sum()

  def of_gradient(u):
    return jax.grad(lambda u: jax.grad(loss)(u).sum())(u)

  if implementation == "xla_associative":
    assert jax.eval_shape(of_gradient, arrays["u"]).shape == (2, 8, 6)
    return
  # All are traced once in any case; nothing has to be compiled for this.
  assert jax.eval_shape(jax.grad(loss), arrays["u"]).shape == (2, 8, 6)
  for twice in (of_gradient, jax.jit(of_gradient)):
    with pytest.raises(
      pallas_kernels.UnsupportedError,
      match='selective_scan: .* first derivatives only.*"xla_associative"',
    ):
      jax.eval_shape(twice, arrays["u"])
