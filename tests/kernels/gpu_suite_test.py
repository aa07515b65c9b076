"""The GPU suite's plumbing, on tiny calls and on the CPU."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  bench_checks,
  bench_ops,
  gpu_suite,
  gpu_suite_checks,
  gpu_suite_peers,
  gpu_suite_timings,
)
from pallas_kernels.selective_scan import api, arg_specs

_TINY = arg_specs.ArgSpec(b=2, l=5, d=4, n=2, g=2, gate=True, source="")
_SETTINGS = gpu_suite.Settings(
  rotation_bytes=1000, copy_bytes=4096, rounds=2, round_seconds=1e-4, larger=2
)


@pytest.fixture
def op():
  return dataclasses.replace(
    bench_ops.OPS["selective_scan"], specs={"tiny": _TINY}
  )


@pytest.fixture
def small(monkeypatch):
  """Smaller checks, and no awkward ones."""
  monkeypatch.setattr(gpu_suite_checks, "_POISON_BYTES", 4096)
  monkeypatch.setattr(gpu_suite_checks, "_AWKWARD", {})


def _case(op, dtype="float32", **options):
  return gpu_suite_checks.Case(
    name="a case",
    op=op,
    spec=_TINY,
    dtype=dtype,
    options=tuple(({"delta_softplus": True} | options).items()),
  )


def test_a_run_checks_then_times_and_writes_everything(
  op, small, tmp_path, capsys
):
  path = tmp_path / "results.json"
  results = gpu_suite.run(
    [(op, "tiny")],
    implementation="xla_sequential",
    path=path,
    settings=_SETTINGS,
  )
  assert results["passed"], results["steps"]
  assert results["complete"]
  assert json.loads(path.read_text()) == json.loads(json.dumps(results))
  assert list(tmp_path.iterdir()) == [path]  # No temporary file is left.
  steps = results["steps"]
  assert [step["check"] for step in steps[:3]] == [True, True, False]
  assert steps[0]["name"] == "check selective_scan tiny bfloat16"
  assert set(steps[1]["errors"]) == {
    *("y", "state", "y_alone", "du", "ddelta", "dA", "dB", "dC", "dD", "dz"),
    "ddelta_bias",
  } - {"state"}
  assert steps[2]["bytes_per_second"] > 0
  timing = next(step for step in steps if step["name"].startswith("time"))
  for direction in bench_ops.DIRECTIONS:
    row = timing[direction]
    low, high = row["quartiles_us"]
    assert 0 < low <= row["median_us"] <= high
    assert row["floor_us"] > 0
    assert row["bytes_at_copy_rate_us"] > 0
    assert "saw no kernel on a GPU" in row["device_us"]
  peers = [step for step in steps if "mamba_ssm" in step["name"]]
  assert peers
  for step in peers:
    assert step["status"] == "skipped"
    assert "not installed" in step["reason"] or "no GPU" in step["reason"]
  printed = capsys.readouterr().out
  assert "check selective_scan tiny float32" in printed
  assert printed.rstrip().splitlines()[-1].startswith("passed in")


def test_results_are_there_when_it_is_killed(op, small, tmp_path, monkeypatch):
  path = tmp_path / "results.json"

  def killed(settings):
    raise KeyboardInterrupt

  monkeypatch.setattr(gpu_suite_timings, "copy_bandwidth", killed)
  with pytest.raises(KeyboardInterrupt):
    gpu_suite.run(
      [(op, "tiny")],
      implementation="xla_sequential",
      path=path,
      settings=_SETTINGS,
    )
  results = json.loads(path.read_text())
  assert [step["status"] for step in results["steps"]] == ["passed"] * 2
  assert results["running"] == "bandwidth of a copy"


def _fake_steps(clock, seconds, is_check):
  def run(duration):
    clock.now += duration
    return {}

  return [
    gpu_suite.Step(
      name=f"step {i}",
      run=functools.partial(run, duration),
      is_check=check,
    )
    for i, (duration, check) in enumerate(zip(seconds, is_check, strict=True))
  ]


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.mark.parametrize(
  ("seconds", "order", "late", "passed"),
  [
    ((1, 1, 1, 1), [0, 1, 2, 3], [], True),
    # Checks give way to timings after 60 s, and come back.
    ((70, 1, 1, 1), [0, 2, 3, 1], [], True),
    # What is left when the time is up is skipped; a check left is no pass.
    ((1, 1, 120, 1), [0, 1, 2, 3], [3], True),
    ((70, 1, 50, 1), [0, 2, 3, 1], [3, 1], False),
  ],
)
def test_the_time_limit_is_kept(seconds, order, late, passed, monkeypatch):
  clock = _Clock()
  steps = _fake_steps(clock, seconds, (True, True, False, False))
  monkeypatch.setattr(gpu_suite, "_steps", lambda *arguments: steps)
  results = gpu_suite.run(
    [],
    implementation="reference",
    settings=gpu_suite.Settings(seconds=100, check_share=0.6),
    clock=clock,
  )
  names = [f"step {i}" for i in order]
  assert [step["name"] for step in results["steps"]] == names
  skipped = [s["name"] for s in results["steps"] if s["status"] == "skipped"]
  assert skipped == [f"step {i}" for i in late]
  assert results["complete"] == (not late)
  assert results["passed"] == passed


def test_an_error_in_a_step_is_written_down_and_the_rest_goes_on(monkeypatch):
  def broken():
    raise RuntimeError("out of memory")

  steps = [
    gpu_suite.Step(name="a", run=broken, is_check=True),
    gpu_suite.Step(name="b", run=lambda: {"failures": ["y"]}, is_check=True),
    gpu_suite.Step(name="c", run=lambda: {}, is_check=True),
  ]
  monkeypatch.setattr(gpu_suite, "_steps", lambda *arguments: steps)
  results = gpu_suite.run([], implementation="reference")
  found = [step["status"] for step in results["steps"]]
  assert found == ["error", "failed", "passed"]
  assert results["steps"][0]["reason"] == "RuntimeError: out of memory"
  assert not results["passed"]


def _with(op, function):
  """The operation with another implementation."""

  def changed(*, implementation, **arguments):
    y = api.selective_scan(**arguments, implementation="reference")
    return y if implementation == "reference" else function(y)

  return dataclasses.replace(op, function=changed)


def test_what_is_wrong_is_found(op, small):
  check = gpu_suite_checks.check
  assert not check(_case(op), "xla_associative")["failures"]

  off = check(_case(_with(op, lambda y: 1.001 * y)), "mine")["failures"]
  assert any(x.startswith("y: relative error 0.001") for x in off)
  assert any(x.startswith("du: relative error") for x in off)

  nan = check(_case(_with(op, lambda y: y.at[0, 0, 0].set(jnp.nan))), "mine")
  assert any("relative error inf" in x for x in nan["failures"])


def test_runs_that_differ_are_found(op, small):
  runs = iter(range(100))

  def differ(y):
    new = lambda: np.float32(1e-7 * next(runs))
    noise = jax.pure_callback(new, jax.ShapeDtypeStruct((), jnp.float32))
    return y + jax.lax.stop_gradient(noise)

  found = gpu_suite_checks.check(_case(_with(op, differ)), "mine")
  message = "y: differs from run to run, or is not fully written"
  assert message in found["failures"]


def test_cases_are_small_distinct_and_cover_the_awkward(op):
  cases = list(gpu_suite_checks.cases([(op, "tiny")]))
  assert [case.spec.b for case in cases[:1]] == [2]
  assert len({case.name for case in cases}) == len(cases)
  widths = {case.spec.d // case.spec.g for case in cases}
  assert {96, 49, 1} <= widths
  assert {case.dtype for case in cases} == {"bfloat16", "float32"}
  options = {name for case in cases for name, _ in case.options}
  assert options == {"delta_softplus", "reverse", "return_final_state"}


def test_initial_and_final_states_are_checked(op, small):
  case = _case(op, reverse=True, return_final_state=True)
  found = gpu_suite_checks.check(case, "xla_sequential")
  assert not found["failures"]
  assert {"state", "dinitial_state"} <= set(found["errors"])


def test_bfloat16_may_be_off_by_its_rounding_only():
  want = {"y": np.array([1.0, 0.5])}
  near = {"y": jnp.asarray([1.0, 0.501], jnp.bfloat16)}
  far = {"y": jnp.asarray([1.0, 0.51], jnp.bfloat16)}
  assert not bench_checks.compare(near, want)[1]
  assert bench_checks.compare(far, want)[1]
  assert bench_checks.relative_error(np.zeros(3), np.zeros(2)) == float("inf")


def test_peers_that_cannot_be_timed_say_why(op):
  cross = bench_ops.OPS["cross_selective_scan"]
  with pytest.raises(gpu_suite_peers.SkipError, match="has no cross_selective"):
    gpu_suite_peers.time_mamba_ssm(cross, {}, bench_ops.FORWARD, _SETTINGS)


def test_many_calls_are_thinned_out_and_every_stage_remains():
  names = [f"{model}_stage{i}" for model in "abcdef" for i in range(1, 5)]
  some = gpu_suite._some(names)
  assert len(some) == 4
  assert {name[-1] for name in some} == {"1", "2", "3", "4"}
  assert list(gpu_suite._some(names[:4])) == names[:4]


def test_the_interpreted_kernels_pass_the_check(op, small, monkeypatch):
  monkeypatch.setattr(gpu_suite_checks, "_REPEATS", 1)  # It takes seconds.
  spec = arg_specs.ArgSpec(b=1, l=3, d=8, n=4, source="")
  case = dataclasses.replace(_case(op, dtype="bfloat16"), spec=spec)
  found = gpu_suite_checks.check(case, "mosaic_gpu_interpret")
  assert not found["failures"]


def test_there_is_no_gpu_here():
  assert "needs an NVIDIA GPU" in (gpu_suite.why_no_gpu() or "")
