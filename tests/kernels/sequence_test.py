"""Sequences whose tokens are split over eight virtual devices."""

import functools

import jax
from jax.sharding import AxisType, NamedSharding
import pytest

from pallas_kernels.selective_scan import arguments
from tests.kernels import selective_scan_suite as suite

P = jax.P
_OPTIONAL = ("D", "z", "delta_bias", "initial_state")
_SOFTPLUS = ("delta_softplus", True)
_REVERSE = ("reverse", True)
CASES = {
  "everything": suite.Case((2, 16, 4, 2, 2), _OPTIONAL, (_SOFTPLUS,)),
  "reverse": suite.Case((2, 16, 4, 2, 2), _OPTIONAL, (_SOFTPLUS, _REVERSE)),
  # No multiple of the number of shards.
  "ragged": suite.Case((1, 13, 4, 2, 1), _OPTIONAL, (_SOFTPLUS,)),
  "ragged_reverse": suite.Case((1, 13, 4, 2, 1), _OPTIONAL, (_REVERSE,)),
  "bare": suite.Case((2, 7, 4, 3, 1)),
}


def _mesh(kind=AxisType.Auto, **axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
  )


def _run(mesh, case, arrays, implementation="xla_sequential"):
  run = functools.partial(suite.run, implementation, case.options)
  with jax.set_mesh(mesh):
    return jax.jit(run)(arrays)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_splitting_the_tokens_changes_no_result(case):
  mesh = _mesh(data=2, sequence=4)
  got = _run(mesh, case, suite.make_arrays(case))
  suite.assert_matches(got, suite.expected(case))


@pytest.mark.parametrize("implementation", ["xla_associative", "reference"])
def test_other_implementations(implementation):
  mesh = _mesh(sequence=8)
  case = CASES["everything"]
  got = _run(mesh, case, suite.make_arrays(case), implementation)
  suite.assert_matches(got, suite.expected(case))


def test_explicit_axes_split_what_the_input_says():
  mesh = _mesh(AxisType.Explicit, rows=2, columns=4)
  case = CASES["everything"]
  axes = {"b": "rows", "l": "columns"}
  layouts = {"dy": "bld", "dstate": "bdn", **arguments.LAYOUTS}
  arrays = {
    name: jax.device_put(
      x, NamedSharding(mesh, P(*(axes.get(c) for c in layouts[name])))
    )
    for name, x in suite.make_arrays(case).items()
  }
  got = _run(mesh, case, arrays)
  suite.assert_matches(got, suite.expected(case))
  wanted = NamedSharding(mesh, P("rows", "columns", None))
  assert got[0]["y"].sharding.is_equivalent_to(wanted, 3)


def test_only_states_are_gathered():
  mesh = _mesh(sequence=8)
  b, l, d, n = 1, 512, 4, 2
  case = suite.Case((b, l, d, n, 1), _OPTIONAL, (_SOFTPLUS,))
  arrays = suite.make_arrays(case)
  layouts = {"dy": "bld", "dstate": "bdn", **arguments.LAYOUTS}
  for name in arrays:
    spec = P(*("sequence" if c == "l" else None for c in layouts[name]))
    if arrays[name].ndim == 3 and name in ("B", "C"):
      spec = P(None, "sequence")
    arrays[name] = jax.device_put(arrays[name], NamedSharding(mesh, spec))
  run = functools.partial(suite.run, "xla_sequential", case.options)
  with jax.set_mesh(mesh):
    text = jax.jit(run).lower(arrays).compile().as_text()
  gathered = [line for line in text.splitlines() if " all-gather(" in line]
  assert gathered
  for line in gathered:
    # The states of eight shards, never their tokens.
    assert f"[8,{b},{d},{n}]" in line.replace("{", "[", 1), line
  assert "all-to-all" not in text
