"""Depthwise convolutions with activations, and what gradients keep of them."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_data
from vimjax.layers import conv

_KINDS = {
  "causal": (conv.DepthwiseConv1d, dict(kernel_size=4), (2, 9, 6)),
  "reverse": (
    conv.DepthwiseConv1d,
    dict(kernel_size=4, reverse=True),
    (2, 9, 6),
  ),
  "centred": (
    conv.DepthwiseConv1d,
    dict(kernel_size=3, centered=True),
    (2, 9, 6),
  ),
  "image": (conv.DepthwiseConv2d, dict(use_bias=True), (2, 5, 4, 6)),
}


def _case(kind, dtype=jnp.float32):
  """A module without and with an activation, variables, and an input."""
  module, fields, shape = _KINDS[kind]
  plain = module(**fields, dtype=dtype)
  x = jax.random.normal(jax.random.key(0), shape)
  variables = plain.init(jax.random.key(1), x)
  return plain, module(**fields, activation=nn.silu, dtype=dtype), variables, x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", _KINDS)
def test_an_activation_inside_is_one_after_the_convolution(kind, dtype):
  plain, activated, variables, x = _case(kind, dtype)
  dy = jax.random.normal(jax.random.key(2), x.shape).astype(dtype)

  def outputs(function):
    y, pull = jax.vjp(function, variables, x)
    return y, pull(dy)

  got = jax.jit(lambda: outputs(activated.apply))()
  want = jax.jit(lambda: outputs(lambda v, x: nn.silu(plain.apply(v, x))))()
  assert got[0].dtype == dtype
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  # In bfloat16 the compiler may round at other places.
  relative = 1e-6 if dtype == jnp.float32 else 2**-6
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    want_array = np.asarray(other, np.float32)
    golden_data.assert_close(one, want_array, relative=relative)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_gradient_keeps_the_input_alone(kind):
  _, activated, variables, x = _case(kind)
  _, pull = jax.eval_shape(
    lambda v, x: jax.vjp(activated.apply, v, x), variables, x
  )
  kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
  assert kept == [x.shape]
