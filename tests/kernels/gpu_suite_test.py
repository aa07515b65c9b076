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
  bench_child,
  bench_ops,
  gpu_suite,
  gpu_suite_checks,
  gpu_suite_timings,
)
from pallas_kernels.selective_scan import api, arg_specs

_TINY = arg_specs.ArgSpec(b=2, l=5, d=4, n=2, g=2, gate=True, source="")
_SETTINGS = gpu_suite_timings.Settings(
  rotation_bytes=1000, copy_bytes=4096, rounds=2, round_seconds=1e-4, larger=2
)
_FACTS = {"device": "none", "date": "today"}


def _execute(function, *arguments, seconds):
  """Like a child, but here, where functions may be replaced."""
  del seconds
  try:
    return function(*arguments)
  except Exception as error:
    raise bench_child.ChildError(f"{type(error).__name__}: {error}") from error


_run = functools.partial(
  gpu_suite.run,
  implementation="xla_sequential",
  environment=_FACTS,
  execute=_execute,
  settings=_SETTINGS,
)


@pytest.fixture
def op(monkeypatch):
  tiny = dataclasses.replace(
    bench_ops.OPS["selective_scan"], specs={"tiny": _TINY}
  )
  monkeypatch.setitem(bench_ops.OPS, "selective_scan", tiny)
  return tiny


@pytest.fixture
def small(monkeypatch):
  """Smaller checks, fewer calls, and no awkward ones."""
  monkeypatch.setattr(bench_checks, "_POISON_BYTES", 4096)
  monkeypatch.setattr(gpu_suite_checks, "_AWKWARD", {})
  monkeypatch.setattr(gpu_suite_timings, "_WARM_UP_SECONDS", 0.0)


def _case(dtype="float32", **options):
  return gpu_suite_checks.Case(
    name="a case",
    op="selective_scan",
    spec=_TINY,
    dtype=dtype,
    options=tuple(({"delta_softplus": True} | options).items()),
  )


def test_a_run_checks_and_times_and_writes_everything(
  op, small, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(gpu_suite, "_DTYPES", ("bfloat16",))
  path = tmp_path / "results.json"
  results = _run([(op, "tiny")], path=path)
  assert results["passed"], results["steps"]
  assert results["complete"]
  assert json.loads(path.read_text()) == json.loads(json.dumps(results))
  assert list(tmp_path.iterdir()) == [path]  # No temporary file is left.
  steps = results["steps"]
  assert [step["name"] for step in steps] == [
    "bandwidth of a copy",
    "check selective_scan tiny bfloat16",
    *(
      f"time selective_scan tiny bfloat16 batch x{factor} {implementation}"
      for factor in (2, 1)
      for implementation in ("xla_sequential", "xla_associative")
    ),
  ]
  assert [step["check"] for step in steps] == [0, 1, 1, 0, 1, 0]
  assert steps[0]["bytes_per_second"] > 0
  names = {"du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias"}
  for step in (steps[1], steps[2], steps[4]):
    assert set(step["errors"]) == {*names, "y", "y_alone"}
  for step in steps[2:]:
    for direction in bench_ops.DIRECTIONS:
      row = step[direction]
      low, high = row["quartiles_us"]
      assert 0 < low <= row["median_us"] <= high
      assert row["bytes"] > 0
      assert row["source"] == "host"
      assert "saw no kernel on a GPU" in row["reason"]
  printed = capsys.readouterr().out
  assert "| `tiny` | bfloat16 | 4 |" in printed
  assert "| forward at most 1.4 times the floor, batch x2 | " in printed
  assert printed.rstrip().splitlines()[-1].startswith("passed in")


def test_the_batch_that_is_timed_is_checked(op, small, monkeypatch):
  """Rows that a smaller batch does not have are wrong."""
  changed = _with(lambda y: y.at[3].multiply(1.01))
  monkeypatch.setitem(bench_ops.OPS, op.name, changed)
  job = gpu_suite_timings.Job(
    op=op.name,
    call="tiny",
    dtype="float32",
    batch_factor=2,
    implementation="mine",
    is_checked=True,
  )
  failures = gpu_suite_timings.time_call(job, _SETTINGS)["failures"]
  for name in ("y", "y_alone", "du", "dA"):
    assert any(x.startswith(f"{name}: relative error") for x in failures)


def _steps(clock, seconds):
  def run(duration):
    clock.now += duration
    return {}

  return [
    gpu_suite.Step(
      name=f"step {i}", function=run, arguments=(duration,), is_check=i < 2
    )
    for i, duration in enumerate(seconds)
  ]


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def steps(monkeypatch):
  """Sets the steps of runs."""
  return lambda x: monkeypatch.setattr(gpu_suite, "_steps", lambda *_: x)


@pytest.mark.parametrize(
  ("seconds", "late", "passed"),
  [
    ((1, 1, 1, 1), [], True),
    ((1, 1, 120, 1), [3], True),
    ((120, 1, 1, 1), [1, 2, 3], False),  # A check that is left is no pass.
  ],
)
def test_the_time_limit_is_kept(seconds, late, passed, steps):
  clock = _Clock()
  steps(_steps(clock, seconds))
  settings = gpu_suite_timings.Settings(seconds=100)
  results = _run([], settings=settings, clock=clock)
  assert [row["name"] for row in results["steps"]] == [
    f"step {i}" for i in range(4)
  ]
  skipped = [s["name"] for s in results["steps"] if s["status"] == "skipped"]
  assert skipped == [f"step {i}" for i in late]
  assert results["complete"] == (not late)
  assert results["passed"] == passed


def _forbidden():
  raise AssertionError("run twice")


def test_a_second_run_goes_on(steps, tmp_path):
  path = tmp_path / "results.json"
  clock = _Clock()
  settings = gpu_suite_timings.Settings(seconds=100)
  again = functools.partial(_run, [], settings=settings, path=path)
  bandwidth = gpu_suite.Step(
    name="bandwidth of a copy", function=lambda: {"bytes_per_second": 1.0}
  )
  steps([bandwidth, *_steps(clock, (1, 120, 1, 1))])
  assert not again(clock=clock)["complete"]

  later = _steps(clock, (1, 1, 1, 1))
  later[:2] = [dataclasses.replace(x, function=_forbidden) for x in later[:2]]
  steps([bandwidth, *later])
  results = again(environment=_FACTS | {"date": "tomorrow"})
  assert results["complete"]
  assert results["passed"]
  assert [(row["name"], row["status"]) for row in results["steps"]] == [
    ("bandwidth of a copy, before", "passed"),
    *((f"step {i}", "passed") for i in range(2)),
    ("bandwidth of a copy", "passed"),
    *((f"step {i}", "passed") for i in range(2, 4)),
  ]


@pytest.mark.parametrize("damaged", [False, True])
def test_results_of_another_device_are_put_aside(damaged, steps, tmp_path):
  path = tmp_path / "results.json"
  steps(_steps(_Clock(), (1, 1)))
  _run([], path=path)
  if damaged:
    path.write_text("{")
  before = path.read_text()
  results = _run([], path=path, environment={"device": "another"})
  assert [row["name"] for row in results["steps"]] == ["step 0", "step 1"]
  (aside,) = tmp_path.glob("results.json.*")
  assert aside.read_text() == before


def test_what_hangs_or_breaks_is_written_down_and_the_rest_goes_on(
  steps, tmp_path
):
  reasons = ["timed out after 45 s", "died: signal 6", "RuntimeError: memory"]

  def execute(function, *arguments, seconds):
    assert seconds == 45
    if function is not dict:
      raise bench_child.ChildError(function)
    return dict(*arguments)

  found = [dict(function=dict, arguments=({"failures": ["y"]},))]
  found += [dict(function=dict)]
  steps(
    [
      gpu_suite.Step(name=str(i), is_check=True, **x)
      for i, x in enumerate([*({"function": x} for x in reasons), *found])
    ]
  )
  path = tmp_path / "results.json"
  settings = gpu_suite_timings.Settings(step_seconds=45)
  _run([], path=path, execute=execute, settings=settings)
  results = json.loads(path.read_text())
  rows = results["steps"]
  assert [row["status"] for row in rows] == [*["error"] * 3, "failed", "passed"]
  assert [row["reason"] for row in rows[:3]] == reasons
  assert not results["passed"]


def test_results_are_there_when_it_is_killed(steps, tmp_path):
  path = tmp_path / "results.json"

  def killed(*_, seconds):
    if seconds and path.exists() and "step 0" in path.read_text():
      results = json.loads(path.read_text())
      if results["steps"]:
        raise KeyboardInterrupt
    return {}

  steps(_steps(_Clock(), (1, 1)))
  with pytest.raises(KeyboardInterrupt):
    _run([], path=path, execute=killed)
  results = json.loads(path.read_text())
  assert [row["status"] for row in results["steps"]] == ["passed"]
  assert results["running"] == "step 1"


def test_steps_can_be_sent_to_a_child_in_order_of_importance():
  calls = [(op, name) for op in bench_ops.OPS.values() for name in op.specs]
  found = list(gpu_suite._steps(calls, "mosaic_gpu", _SETTINGS))
  names = [step.name for step in found]
  assert len({*names}) == len(names)
  timed = [name for name in names if name.startswith("time")]
  # Of every call two dtypes, two batches, two implementations.
  assert len(timed) == 8 * len(calls)
  wanted = [
    *("vim_tiny_224", "vim_tiny_1248"),
    *(f"vmamba_tiny_s1l8_stage{i}" for i in range(1, 5)),
    *("mambavision_tiny_stage3", "vmamba_tiny_stage1"),
  ]
  order = list(dict.fromkeys(name.split()[2] for name in timed))
  assert order[: len(wanted)] == wanted
  first = f"time selective_scan {wanted[0]} bfloat16 batch x2 mosaic_gpu"
  assert names.index(first) < names.index(
    "check selective_scan groups of 96 float32"
  )
  with bench_child.Child() as child:
    step = found[0]
    settings = dataclasses.replace(_SETTINGS, rounds=1)
    assert child.run(step.function, settings, seconds=100)["bytes_per_second"]


def _with(function):
  """The operation with another implementation."""
  op = bench_ops.OPS["selective_scan"]

  def changed(*, implementation, **arguments):
    y = api.selective_scan(**arguments, implementation="reference")
    return function(y) if implementation == "mine" else y

  return dataclasses.replace(op, function=changed)


@pytest.fixture
def broken(monkeypatch):
  """The check of an implementation that does something to y."""

  def check(function, case):
    changed = _with(function)
    monkeypatch.setitem(bench_ops.OPS, "selective_scan", changed)
    return gpu_suite_checks.check(case, "mine")["failures"]

  return check


@pytest.mark.parametrize("most_steps", [10**6, 1])
def test_what_is_wrong_is_found(most_steps, broken, small, monkeypatch):
  """By the definition on the CPU, and on the device."""
  monkeypatch.setattr(gpu_suite_checks, "_MOST_STEPS", most_steps)
  monkeypatch.setattr(gpu_suite_checks, "_ROWS", 1)
  case = _case()
  assert not gpu_suite_checks.check(case, "xla_sequential")["failures"]
  off = broken(lambda y: 1.001 * y, case)
  assert any(x.startswith("y: relative error 0.001") for x in off)
  assert any(x.startswith("du: relative error") for x in off)
  assert any(x.startswith("dA: relative error") for x in off)
  nan = broken(lambda y: y.at[0, 0, 0].set(jnp.nan), case)
  assert any(x.startswith("y: relative error") for x in nan)


def test_runs_that_differ_are_found(broken, small):
  runs = iter(range(100))

  def differ(y):
    new = lambda: np.float32(1e-7 * next(runs))
    noise = jax.pure_callback(new, jax.ShapeDtypeStruct((), jnp.float32))
    return y + jax.lax.stop_gradient(noise)

  message = "y: differs from run to run, or is not fully written"
  assert message in broken(differ, _case())


def test_cases_cover_the_awkward():
  cases = list(gpu_suite_checks.awkward("bfloat16"))
  assert len({case.name for case in cases}) == len(cases)
  widths = {case.spec.d // case.spec.g for case in cases}
  assert {96, 49, 1} <= widths
  options = {name for case in cases for name, _ in case.options}
  assert options == {"delta_softplus", "reverse", "return_final_state"}
  # A single pass of many tiles, by more blocks than fit at a time.
  op = bench_ops.OPS["selective_scan"]
  long = [case.spec for case in cases if "many long rows" in case.name]
  assert {spec.n == 1 for spec in long} == {True, False}
  for spec in long:
    assert spec.b % gpu_suite_checks._ROWS == 0
    assert op.sizes(spec).steps > gpu_suite_checks._MOST_STEPS
    config = op.blocks(spec, 2).config
    assert config.chunks == 1
    assert spec.l > 4 * config.tile * config.buffers
    assert spec.b * spec.g >= 264


@pytest.mark.parametrize("most_steps", [10**6, 1])
def test_initial_and_final_states_are_checked(most_steps, small, monkeypatch):
  monkeypatch.setattr(gpu_suite_checks, "_MOST_STEPS", most_steps)
  monkeypatch.setattr(gpu_suite_checks, "_ROWS", 1)
  case = _case(reverse=True, return_final_state=True)
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


def test_the_interpreted_kernels_pass_the_check(small, monkeypatch):
  monkeypatch.setattr(bench_checks, "_REPEATS", 1)  # It takes seconds.
  spec = arg_specs.ArgSpec(b=1, l=3, d=8, n=4, source="")
  case = dataclasses.replace(_case(dtype="bfloat16"), spec=spec)
  found = gpu_suite_checks.check(case, "mosaic_gpu_interpret")
  assert not found["failures"]


def test_there_is_no_gpu_here():
  assert "needs an NVIDIA GPU" in (gpu_suite.why_no_gpu() or "")
