"""Which implementation runs, and what is said when none can."""

import functools
import logging
from typing import get_args

import jax
from jax.sharding import AbstractDevice, AbstractMesh
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.selective_scan import api, arg_specs

_SPEC = arg_specs.ArgSpec(b=1, l=3, d=2, n=2, source="")


def _impl(name, *, reason=None, platforms=None):
  return dispatch.Impl(
    function=lambda: name, why_not=lambda *_: reason, platforms=platforms
  )


def _h100_mesh():
  device = AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  return AbstractMesh((1,), ("data",), abstract_device=device)


def test_first_that_fits_is_taken():
  table = {
    "by_name": _impl("by_name", platforms=()),
    "elsewhere": _impl("elsewhere", platforms=("gpu",)),
    "picky": _impl("picky", reason="needs an even length"),
    "good": _impl("good"),
    "later": _impl("later"),
  }
  assert dispatch.choose("op", table, None).function() == "good"
  assert dispatch.choose("op", table, "later").function() == "later"
  assert dispatch.choose("op", table, "by_name").function() == "by_name"


def test_a_named_implementation_runs_or_says_why_not():
  table = {"picky": _impl("picky", reason="needs an even length, got 3")}
  with pytest.raises(pallas_kernels.UnsupportedError) as error:
    dispatch.choose("op", table, "picky")
  assert str(error.value) == (
    "`op` cannot run with implementation='picky': needs an even length, got 3. "
    "Pass implementation=None to choose automatically."
  )


def test_all_reasons_are_listed_when_nothing_fits():
  table = {
    "picky": _impl("picky", reason="needs an even length"),
    "elsewhere": _impl("elsewhere", platforms=("gpu",)),
  }
  with pytest.raises(
    pallas_kernels.UnsupportedError, match="'picky': needs an even length"
  ):
    dispatch.choose("op", table, None)
  del table["picky"]
  with pytest.raises(
    pallas_kernels.UnsupportedError, match="on 'cpu': none is offered there"
  ):
    dispatch.choose("op", table, None)


@pytest.mark.parametrize("name", ["cuda", "", 3])
def test_unknown_implementation_lists_the_valid_ones(name):
  arrays = arg_specs.make_arguments(_SPEC)
  with pytest.raises(ValueError) as error:
    pallas_kernels.selective_scan(**arrays, implementation=name)
  assert str(error.value) == (
    f"Unknown implementation {name!r} for `selective_scan`; expected None or "
    "one of ['mosaic_gpu', 'mosaic_gpu_interpret', 'reference', "
    "'xla_associative', 'xla_sequential']."
  )


def test_table_and_type_name_the_same_implementations():
  assert set(get_args(pallas_kernels.Implementation)) == set(
    api.IMPLEMENTATIONS
  )


def test_arguments_reach_why_not():
  seen = []
  impl = dispatch.Impl(
    function=lambda: None, why_not=lambda *args: seen.append(args)
  )
  dispatch.choose("op", {"one": impl}, None, 1, 2)
  assert seen == [(1, 2)]


def test_the_platform_is_that_of_the_mesh_or_the_default_device():
  assert dispatch.default_platform() == "cpu"
  with jax.default_device(jax.devices("cpu")[1]):
    assert dispatch.default_platform() == "cpu"
  with jax.sharding.use_abstract_mesh(_h100_mesh()):
    assert dispatch.default_platform() == "gpu"


@pytest.fixture(name="log_of")
def _log_of(caplog):
  """Returns what is logged while a call is traced, as if for the first time."""
  arrays = arg_specs.make_arguments(_SPEC)

  def log_of(implementation=None):
    dispatch._log_choice.cache_clear()
    scan = functools.partial(
      pallas_kernels.selective_scan, implementation=implementation
    )
    with caplog.at_level(logging.INFO, "pallas_kernels"):
      jax.eval_shape(lambda arrays: scan(**arrays), arrays)
      jax.eval_shape(lambda arrays: scan(**arrays), arrays)
    return caplog.messages

  return log_of


def test_the_choice_is_logged_once(log_of):
  assert log_of() == [
    "selective_scan runs as 'xla_sequential' (first choice on cpu)."
  ]


def test_a_choice_by_name_is_logged(log_of):
  assert log_of("reference") == [
    "selective_scan runs as 'reference' (asked for by name)."
  ]


def test_code_for_a_gpu_is_made_without_having_one(log_of):
  arrays = arg_specs.make_arguments(_SPEC)
  scan = jax.jit(lambda arrays: pallas_kernels.selective_scan(**arrays))
  with jax.sharding.use_abstract_mesh(_h100_mesh()):
    assert log_of() == [
      "selective_scan runs as 'mosaic_gpu' (first choice on gpu)."
    ]
    lowered = scan.trace(arrays).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()
