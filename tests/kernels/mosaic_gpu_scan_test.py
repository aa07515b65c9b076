"""The suite of the selective scan, for the interpreted Mosaic GPU kernels.

With race detection, as always under this name. The interpreter needs seconds
for what compiled code does in microseconds, so this runs a part of the suite;
marked `gpu`, the whole suite runs on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.kernels import selective_scan_suite as suite


class _MosaicGpuSuite(suite.SelectiveScanSuite):
  """Of a kernel for float32 and bfloat16."""

  def test_float64_is_computed_in_float64(self):
    with pytest.raises(pallas_kernels.UnsupportedError, match="is float64"):
      suite.in_float64(self.IMPLEMENTATION, suite.EVERYTHING)

  def test_mixed_dtypes_follow_u_and_gradients_their_own(self):
    arrays = suite.make_arrays(suite.EVERYTHING)
    del arrays["dy"], arrays["dstate"]
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    u = arrays["u"].astype(jnp.bfloat16)
    y, state = jax.eval_shape(
      lambda arrays: self.scan(**arrays, return_final_state=True),
      arrays | {"u": u},
    )
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    with pytest.raises(pallas_kernels.UnsupportedError, match="is float16"):
      jax.eval_shape(
        lambda arrays: self.scan(**arrays),
        arrays | {"u": u.astype(jnp.float16)},
      )


@pytest.mark.gpu
@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"
)
class TestMosaicGpu(_MosaicGpuSuite):
  IMPLEMENTATION = "mosaic_gpu"


class TestMosaicGpuInterpreted:
  """What no other test of the kernels covers, through the public function."""

  scan = staticmethod(
    lambda **arrays: pallas_kernels.selective_scan(
      **arrays, implementation="mosaic_gpu_interpret"
    )
  )

  @pytest.mark.parametrize("name", ["bare", "one_token", "no_softplus"])
  def test_outputs_and_gradients_equal_the_definition(self, name):
    case = suite.CASES[name]
    got = suite.jitted_run(
      "mosaic_gpu_interpret", case.options, suite.make_arrays(case)
    )
    suite.assert_matches(got, suite.expected(case))

  def test_one_state_and_groups_in_reverse(self):
    everything = suite.CASES["reverse"]
    case = everything._replace(shape=(1, 9, 6, 1, 2))
    got = suite.jitted_run(
      "mosaic_gpu_interpret", case.options, suite.make_arrays(case)
    )
    suite.assert_matches(got, suite.expected(case))

  def test_vmap_over_A_alone(self):
    case = suite.Case((1, 3, 4, 2, 1))
    arrays = suite.make_arrays(case)
    del arrays["dy"], arrays["dstate"]
    A = jnp.stack([arrays.pop("A"), -jnp.ones((4, 2))])
    got = jax.jit(jax.vmap(lambda A: self.scan(A=A, **arrays)))(A)
    for i in range(2):
      want = pallas_kernels.selective_scan(
        A=A[i], **arrays, implementation="reference"
      )
      np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)

  def test_an_empty_batch(self):
    y, state = self.scan(
      u=jnp.zeros((0, 7, 6)),
      delta=jnp.zeros((0, 7, 6)),
      A=jnp.zeros((6, 3)),
      B=jnp.zeros((0, 7, 3)),
      C=jnp.zeros((0, 7, 3)),
      return_final_state=True,
    )
    assert (y.shape, state.shape) == ((0, 7, 6), (0, 6, 3))
