"""The suite of the selective scan, for the Mosaic GPU kernels.

Marked `gpu` all of it runs on the device. Without one the kernels are
interpreted, with race detection as always under that name; the interpreter
needs seconds for what compiled code does in microseconds, so only the smaller
cases take part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import tolerances
from tests.kernels import selective_scan_golden
from tests.kernels import selective_scan_suite as suite

# A block of channels never spans two groups, whatever their width: that of
# VMamba's first stage, an odd one, and more than a block.
_WIDTHS = {
  "groups_of_96": suite.Case((1, 5, 192, 1, 2), ("D",)),
  "groups_of_49": suite.Case((1, 5, 98, 5, 2), ("D", "z")),
  "wider_than_a_block": suite.Case((1, 3, 131, 2, 1), ("D", "delta_bias")),
}
_SMALL_GOLDEN = {"scan_L2", "scan_reverse_full", "scan_tiny_dt"}


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

  @pytest.mark.parametrize("name", _WIDTHS)
  def test_groups_of_any_width(self, name):
    case = _WIDTHS[name]
    got = suite.jitted_run(
      self.IMPLEMENTATION, case.options, suite.make_arrays(case)
    )
    suite.assert_matches(got, suite.expected(case))

  def test_infinity_stays_in_its_group_and_batch_row(self):
    """Also where tiles have to be copied with channels of the next ones."""
    case = suite.Case((2, 7, 6, 2, 2), ("z",))
    arrays = suite.make_arrays(case)
    run = functools.partial(suite.jitted_run, self.IMPLEMENTATION, case.options)
    want = run(arrays)
    for name in ("u", "delta", "z", "dy"):
      arrays[name] = arrays[name].copy()
      arrays[name][1] = arrays[name][:, :, 3:] = np.inf
    got = run(arrays)
    for i, names in enumerate((("y",), ("u", "delta", "z"))):
      for name in names:
        np.testing.assert_array_equal(
          got[i][name][0, :, :3], want[i][name][0, :, :3], name
        )
    for name in "BC":
      np.testing.assert_array_equal(
        got[1][name][0, :, 0], want[1][name][0, :, 0], name
      )

  def test_steps_of_a_millionth_have_accurate_gradients(self):
    """exp(x) is 1e-6 there: 1 + exp(x) would keep one digit of it."""
    case = suite.Case((1, 5, 4, 2, 1), options=(("delta_softplus", True),))
    arrays = suite.make_arrays(case)
    arrays["delta"] += np.float32(np.log(1e-6))
    got = suite.jitted_run(self.IMPLEMENTATION, case.options, arrays)
    with jax.enable_x64(True):
      exact = {k: jnp.asarray(x, jnp.float64) for k, x in arrays.items()}
      want = suite.jitted_run("reference", case.options, exact)
    suite.assert_matches(got, want)

  def test_nan_in_a_cotangent_reaches_what_depends_on_it(self):
    case = suite.CASES["bare"]
    arrays = suite.make_arrays(case)
    arrays["dy"][0, 3, 1] = np.nan
    _, gradients = suite.jitted_run(self.IMPLEMENTATION, case.options, arrays)
    hit = np.zeros(arrays["u"].shape, bool)
    hit[0, :4, 1] = True  # Its own token and those before.
    for name in ("u", "delta"):
      np.testing.assert_array_equal(np.isnan(gradients[name]), hit, name)
    tokens = np.zeros(arrays["B"].shape, bool)
    tokens[0, :4] = True
    np.testing.assert_array_equal(np.isnan(gradients["B"]), tokens)


@pytest.mark.gpu
@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"
)
class TestMosaicGpu(_MosaicGpuSuite):
  IMPLEMENTATION = "mosaic_gpu"


class TestMosaicGpuInterpreted(_MosaicGpuSuite):
  IMPLEMENTATION = "mosaic_gpu_interpret"

  @pytest.mark.parametrize(
    "name", ["bare", "one_token", "reverse", "no_softplus"]
  )
  def test_outputs_and_gradients_equal_the_definition(self, name):
    super().test_outputs_and_gradients_equal_the_definition(name)

  @pytest.mark.parametrize(
    "name", sorted(_SMALL_GOLDEN.intersection(selective_scan_golden.names()))
  )
  def test_outputs_and_gradients_equal_the_official_code(self, name):
    super().test_outputs_and_gradients_equal_the_official_code(name)

  @pytest.mark.parametrize("subset", [["A"], ["u", "z", "initial_state"]])
  def test_vmap_over_any_arguments(self, subset):
    arrays = suite.make_arrays(suite.TINY)
    del arrays["dy"], arrays["dstate"]
    mapped = {k: np.stack([x, 0.5 * x]) for k, x in arrays.items()}
    scan = functools.partial(self.scan, **dict(suite.TINY.options))
    got = jax.jit(
      jax.vmap(
        lambda arrays: scan(**arrays),
        in_axes=({name: 0 if name in subset else None for name in arrays},),
      )
    )({name: (mapped if name in subset else arrays)[name] for name in arrays})
    for i in range(2):
      want = pallas_kernels.selective_scan(
        **{k: (mapped[k][i] if k in subset else x) for k, x in arrays.items()},
        **dict(suite.TINY.options),
        implementation="reference",
      )
      tolerances.assert_close(got[i], want, tolerances.FORWARD["float32"])

  def test_remat_and_eager_calls_change_nothing(self):
    """No remat: the interpreter's callbacks are effects, which it refuses.

    `mosaic_gpu_lowering_test` lowers the kernels under it.
    """
    arrays = suite.make_arrays(suite.TINY)
    del arrays["dy"], arrays["dstate"]
    y = self.scan(**arrays, **dict(suite.TINY.options))
    want = suite.expected(suite.TINY)[0]["y"]
    tolerances.assert_close(y, want, tolerances.FORWARD["float32"])

  @pytest.mark.parametrize("reverse", [True])
  def test_final_state_continues_a_sequence(self, reverse):
    super().test_final_state_continues_a_sequence(reverse)
