"""What every implementation of the selective scan must do.

A leaf class in `selective_scan_test.py` names the implementation. Compiling
takes nearly all the time, so cases are few, tiny, and checked in full.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import tolerances
from tests.kernels import selective_scan_golden


class Case(NamedTuple):
  """Shapes, optional arrays and options of a call."""

  shape: tuple[int, int, int, int, int]  # b, l, d, n, g
  optional: tuple[str, ...] = ()
  options: tuple[tuple[str, bool], ...] = ()


_ALL = ("D", "z", "delta_bias", "initial_state")
_SOFTPLUS = ("delta_softplus", True)
_REVERSE = ("reverse", True)
CASES = {
  "bare": Case((2, 7, 6, 3, 1)),
  "one_token": Case((1, 1, 5, 2, 5), _ALL, (_SOFTPLUS,)),
  "everything": Case((2, 37, 8, 4, 2), _ALL, (_SOFTPLUS,)),
  "reverse": Case((2, 33, 12, 1, 4), _ALL, (_SOFTPLUS, _REVERSE)),
  "no_softplus": Case((1, 17, 6, 2, 3), ("delta_bias", "z"), (_REVERSE,)),
  "long": Case((1, 131, 4, 2, 1), ("D", "initial_state"), (_SOFTPLUS,)),
}
EVERYTHING = CASES["everything"]
# For what depends on no length; the first crosses the end of one interval.
SMALL = Case((2, 18, 4, 2, 2), _ALL, (_SOFTPLUS,))
TINY = Case((1, 3, 4, 2, 2), _ALL, (_SOFTPLUS,))


def make_arrays(case: Case) -> dict[str, np.ndarray]:
  """Random float32 arguments, and cotangents "dy" and "dstate"."""
  b, l, d, n, g = case.shape
  rng = np.random.default_rng(sum(case.shape))
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  arrays = {
    "u": normal(b, l, d),
    "delta": normal(b, l, d),
    "A": -np.exp(normal(d, n)),
    # Without groups these are (b, l, n).
    "B": normal(b, l, n) if g == 1 else normal(b, l, g, n),
    "C": normal(b, l, n) if g == 1 else normal(b, l, g, n),
    "dy": normal(b, l, d),
    "dstate": normal(b, d, n),
  }
  if ("delta_softplus", True) not in case.options:
    arrays["delta"] = np.abs(arrays["delta"])
  optional = {
    "D": normal(d),
    "z": normal(b, l, d),
    "delta_bias": np.abs(normal(d)) - 1,
    "initial_state": normal(b, d, n),
  }
  return arrays | {name: optional[name] for name in case.optional}


def run(implementation, options, arrays):
  """(y, state) and the gradient by every argument, for the cotangents."""
  arguments = dict(arrays)
  dy, dstate = arguments.pop("dy"), arguments.pop("dstate")

  def loss(arguments):
    y, state = pallas_kernels.selective_scan(
      **arguments,
      **dict(options),
      return_final_state=True,
      implementation=implementation,
    )
    return (y * dy).sum() + (state * dstate).sum(), (y, state)

  gradients, outputs = jax.grad(loss, has_aux=True)(arguments)
  return dict(zip(("y", "state"), outputs, strict=True)), gradients


jitted_run = jax.jit(run, static_argnums=(0, 1))


@functools.cache
def expected(case: Case):
  """What `run` must give, from the definition in float64."""
  return in_float64("reference", case)


def in_float64(implementation: str, case: Case):
  with jax.enable_x64(True):
    arrays = {
      name: jnp.asarray(x, jnp.float64) for name, x in make_arrays(case).items()
    }
    return jitted_run(implementation, case.options, arrays)


def assert_matches(got, want, dtype="float32"):
  """Compares two results of `run` by the table of tolerances."""
  for table, ours, theirs in zip(
    (tolerances.FORWARD, tolerances.GRADIENT), got, want, strict=True
  ):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
      tolerances.assert_close(x, theirs[name], table[dtype], name)


class SelectiveScanSuite:
  """The tests; a leaf class sets `IMPLEMENTATION`."""

  IMPLEMENTATION: str

  def scan(self, *args: Any, **kwargs: Any) -> Any:
    return pallas_kernels.selective_scan(
      *args, **kwargs, implementation=self.IMPLEMENTATION
    )

  @pytest.mark.parametrize("name", CASES)
  def test_outputs_and_gradients_equal_the_definition(self, name):
    case = CASES[name]
    arrays = make_arrays(case)
    got = jitted_run(self.IMPLEMENTATION, case.options, arrays)
    chex.assert_type([*got[0].values(), *got[1].values()], jnp.float32)
    assert_matches(got, expected(case))

  def test_float64_is_computed_in_float64(self):
    got = in_float64(self.IMPLEMENTATION, SMALL)
    chex.assert_type([*got[0].values(), *got[1].values()], np.float64)
    assert_matches(got, expected(SMALL), "float64")

  @pytest.mark.parametrize("name", selective_scan_golden.names())
  def test_outputs_and_gradients_equal_the_official_code(self, name):
    case = selective_scan_golden.load(name)
    arrays = {
      **case.arrays,
      "dy": np.asarray(case.cotangent, np.float32),
      "dstate": np.zeros_like(case.state, np.float32),
    }
    options = tuple(case.options.items())
    got = jitted_run(self.IMPLEMENTATION, options, arrays)
    outputs = {"y": case.y, "state": case.state}
    assert_matches(got, (outputs, case.gradients))

  def test_bfloat16_is_as_good_as_the_plain_form(self):
    """Errors at most twice those of xla_associative, in u's dtype."""
    half = ("u", "delta", "B", "C", "z", "dy")
    arrays = make_arrays(SMALL)
    arrays |= {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in half}
    with jax.enable_x64(True):
      exact = {k: jnp.asarray(x, jnp.float64) for k, x in arrays.items()}
      want = jitted_run("reference", SMALL.options, exact)
    got = jitted_run(self.IMPLEMENTATION, SMALL.options, arrays)
    plain = jitted_run("xla_associative", SMALL.options, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, plain)
    assert got[0]["y"].dtype == jnp.bfloat16
    assert got[0]["state"].dtype == jnp.float32
    for i in range(2):  # Outputs, then gradients.
      for name, x in got[i].items():
        error = tolerances.relative_error(x, want[i][name])
        bound = tolerances.GRADIENT["float32"]
        if x.dtype == jnp.bfloat16:
          other = tolerances.relative_error(plain[i][name], want[i][name])
          bound = tolerances.LOW_PRECISION_FACTOR * other
          assert error <= tolerances.BFLOAT16, (name, error)
        assert error <= bound, (name, error, bound)

  def test_mixed_dtypes_follow_u_and_gradients_their_own(self):
    b, l, d, n, _ = SMALL.shape
    dtypes = {
      "u": jnp.float16,
      "z": jnp.float32,
      "B": jnp.bfloat16,
      "A": jnp.float16,
    }
    arrays = {k: jnp.asarray(x) for k, x in make_arrays(SMALL).items()}
    arrays |= {name: arrays[name].astype(dtypes[name]) for name in dtypes}
    outputs, gradients = jax.eval_shape(
      functools.partial(run, self.IMPLEMENTATION, SMALL.options), arrays
    )
    chex.assert_shape([outputs["y"], outputs["state"]], [(b, l, d), (b, d, n)])
    assert outputs["y"].dtype == jnp.float16
    assert outputs["state"].dtype == jnp.float32
    for name, gradient in gradients.items():
      assert gradient.shape == arrays[name].shape
      assert gradient.dtype == arrays[name].dtype

  def test_the_same_call_gives_the_same_bits(self):
    case = CASES["no_softplus"]
    arrays = make_arrays(case)
    first, second = (
      jitted_run(self.IMPLEMENTATION, case.options, arrays) for _ in range(2)
    )
    chex.assert_trees_all_equal(first, second)

  def test_vmap_over_any_arguments(self):
    """Each mapped alone and all together, gradients included."""
    size = 2
    arrays = make_arrays(TINY)
    run_one = functools.partial(run, self.IMPLEMENTATION, TINY.options)
    # Scaling keeps signs, which matter for A and delta.
    scale = lambda x: jnp.stack([x, 0.5 * x])
    subsets = [["A"], ["u", "z", "initial_state"], ["delta", "B", "D"], arrays]

    def mapped(arrays):
      results = []
      for subset in subsets:
        axes = {name: 0 if name in subset else None for name in arrays}
        inputs = {k: scale(x) if k in subset else x for k, x in arrays.items()}
        results.append(jax.vmap(run_one, in_axes=(axes,))(inputs))
      return results

    single = jax.jit(run_one)
    for subset, got in zip(subsets, jax.jit(mapped)(arrays), strict=True):
      for i in range(size):
        inputs = {
          k: scale(x)[i] if k in subset else x for k, x in arrays.items()
        }
        one = jax.tree.map(lambda x, i=i: x[i], got)
        assert_matches(one, single(inputs))

  def test_remat_and_eager_calls_change_nothing(self):
    arrays = make_arrays(TINY)
    dy, dstate = arrays.pop("dy"), arrays.pop("dstate")

    @jax.checkpoint
    def scan(arrays):
      y, state = self.scan(
        **arrays, **dict(TINY.options), return_final_state=True
      )
      return (y * dy).sum() + (state * dstate).sum()

    _, want = expected(TINY)
    got = jax.jit(jax.grad(scan))(arrays)
    for name in want:
      tolerance = tolerances.GRADIENT["float32"]
      tolerances.assert_close(got[name], want[name], tolerance, name)
    y = self.scan(**arrays, **dict(TINY.options))  # No jit.
    want_y = expected(TINY)[0]["y"]
    tolerances.assert_close(y, want_y, tolerances.FORWARD["float32"])

  @pytest.mark.parametrize("reverse", [False, True])
  def test_final_state_continues_a_sequence(self, reverse):
    arrays = make_arrays(CASES["bare"])
    del arrays["dy"], arrays["dstate"]
    A = arrays.pop("A")
    scan = functools.partial(
      self.scan, A=A, reverse=reverse, return_final_state=True
    )
    y, state = scan(**arrays)
    parts = [
      {k: x[:, a:b] for k, x in arrays.items()} for a, b in ((0, 3), (3, 7))
    ]
    first, second = reversed(parts) if reverse else parts
    y_first, between = scan(**first)
    y_second, final = scan(**second, initial_state=between)
    ys = (y_second, y_first) if reverse else (y_first, y_second)
    chex.assert_trees_all_close(jnp.concatenate(ys, 1), y, atol=1e-5)
    chex.assert_trees_all_close(final, state, atol=1e-5)

  @pytest.mark.parametrize("bad", [np.nan, np.inf])
  def test_nan_and_infinity_reach_what_depends_on_them(self, bad):
    arrays = make_arrays(CASES["bare"])
    del arrays["dy"], arrays["dstate"]
    arrays["u"][0, 3, 1] = bad
    y, state = self.scan(**arrays, return_final_state=True)
    hit = np.zeros(y.shape, bool)
    hit[0, 3:, 1] = True
    np.testing.assert_array_equal(np.isfinite(y), ~hit)
    assert not np.isfinite(state[0, 1]).any()
    assert np.isfinite(state[1]).all()

  def test_empty_batch(self):
    arrays = make_arrays(CASES["bare"])
    del arrays["dy"], arrays["dstate"]
    arrays = {k: x if k == "A" else x[:0] for k, x in arrays.items()}
    y, state = self.scan(**arrays, return_final_state=True)
    chex.assert_shape([y, state], [(0, 7, 6), (0, 6, 3)])
