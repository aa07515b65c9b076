"""The functions of the CPU scan's inner loop against NumPy's in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan import xla_math


def test_exp_is_accurate_wherever_it_is_finite():
  x = np.linspace(-87, 88, 200_001, dtype=np.float32)
  y = jax.jit(xla_math.exp)(x)
  assert y.dtype == jnp.float32
  # Two units in the last place.
  np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=1.2e-7)


def test_exp_at_the_ends():
  x = jnp.asarray([0.0, -0.0, -90.0, -jnp.inf, 89.0, jnp.inf, jnp.nan])
  y = xla_math.exp(x)
  np.testing.assert_array_equal(y, [1.0, 1.0, 0.0, 0.0, np.inf, np.inf, np.nan])


def test_exp_is_its_own_derivative():
  x = jnp.asarray([-3.0, 0.0, 2.0])
  y, dy = jax.jvp(xla_math.exp, (x,), (jnp.ones_like(x),))
  chex.assert_trees_all_equal(y, dy)
  second = jax.grad(jax.grad(xla_math.exp))(jnp.float32(2.0))
  np.testing.assert_allclose(second, np.exp(2.0), rtol=1.2e-7)


def test_softplus_keeps_its_digits_for_very_negative_inputs():
  x = np.linspace(-80, 30, 100_001, dtype=np.float32)
  y = jax.jit(xla_math.softplus)(x)
  expected = np.logaddexp(0, x.astype(np.float64))
  np.testing.assert_allclose(y, expected, rtol=3e-7)
