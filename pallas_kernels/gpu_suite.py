"""One run on a GPU that answers what could not be known without one.

First whether the kernels compute what the definition says, the same at every
run and all of it; then how long they take, beside what bounds them. Steps run
in order of importance until the time is up, and the results are written after
each of them, so that little is lost if the run is cut short.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import (
  bench_compare,
  bench_ops,
  bench_timing,
  gpu_suite_checks,
  gpu_suite_peers,
  gpu_suite_timings,
)
from pallas_kernels.selective_scan import arg_specs, arguments

Calls = Sequence[tuple[bench_ops.Op, str]]

# Of an operation with many calls so many are checked and timed, at the most.
_MOST_CALLS: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a run may cost.

  Attributes:
    seconds: No step begins later than this.
    check_share: No check begins later than this part of `seconds` while there
      is something to time; those left are run at the end.
    rotation_bytes: Size of the inputs that a timing goes through.
    copy_bytes: Size of the array whose copy measures the bandwidth.
    rounds: Rounds of a timing.
    round_seconds: What a round should take.
    larger: Factor of the batch in the timings of a full device.
  """

  seconds: float = 440.0
  check_share: float = 0.5
  rotation_bytes: int = bench_timing.ROTATION_BYTES
  copy_bytes: int = 2**30
  rounds: int = 10
  round_seconds: float = 0.03
  larger: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One line of the results.

  Attributes:
    name: What it does, and on what.
    run: Does it; returns what is to be written down. "failures", if there are
      any in it, are sentences.
    is_check: Whether it is one of correctness.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  is_check: bool = False


def why_no_gpu() -> str | None:
  """None if the GPU kernels run on this machine, otherwise why not."""
  spec = arg_specs.ArgSpec(b=1, l=8, d=8, n=4, source="")
  arrays = jax.eval_shape(
    functools.partial(arg_specs.make_arguments, spec, dtype=jnp.bfloat16)
  )
  normal = arguments.Arguments(**arrays, z=None, initial_state=None)
  options = arguments.Options(
    delta_softplus=True, reverse=False, compute_dtype=jnp.float32
  )
  op = bench_ops.OPS["selective_scan"]
  return op.implementations["mosaic_gpu"].why_not(normal, options)


def run(
  calls: Calls,
  *,
  implementation: str,
  path: pathlib.Path | None = None,
  settings: Settings | None = None,
  clock: bench_timing.Clock = time.perf_counter,
) -> dict[str, Any]:
  """Runs the suite.

  Args:
    calls: Operations and names of their calls.
    implementation: What to check and to time.
    path: Where to write the results; None for nowhere.
    settings: What the run may cost.
    clock: Seconds since any moment.

  Returns:
    The results: "environment", "settings", "steps", what is "running", whether
    all checks "passed", and whether the time was enough, "complete".
  """
  settings = settings or Settings()
  results: dict[str, Any] = {
    "environment": bench_compare.environment(),
    "implementation": implementation,
    "settings": dataclasses.asdict(settings),
    "running": None,
    "passed": False,
    "complete": False,
    "steps": [],
  }
  print("  ".join(f"{k} {v}" for k, v in results["environment"].items()))
  start = clock()
  for step in _in_time(
    list(_steps(calls, implementation, settings, results)),
    settings,
    lambda: clock() - start,
  ):
    # Should it hang, the file says in what.
    results["running"] = step.name
    _write(path, results)
    began = clock()
    if began - start > settings.seconds:
      row = {"status": "skipped", "reason": "the time was up"}
    else:
      row = _run_step(step)
    row = {
      "name": step.name,
      "check": step.is_check,
      **row,
      "seconds": round(clock() - began, 2),
    }
    results["steps"].append(row)
    _print_step(row)
    _summarise(results)
    _write(path, results)
  results["running"] = None
  _write(path, results)
  verdict = "passed" if results["passed"] else "FAILED"
  done = "" if results["complete"] else ", not all of it run"
  print(f"\n{verdict}{done} in {clock() - start:.0f} s", flush=True)
  return results


def _in_time(
  steps: list[Step], settings: Settings, elapsed: Callable[[], float]
) -> Iterator[Step]:
  """The steps in order; checks that would come too late at the end."""
  late = []
  for step in steps:
    if step.is_check and elapsed() > settings.check_share * settings.seconds:
      late.append(step)
    else:
      yield step
  yield from late


def _run_step(step: Step) -> dict[str, Any]:
  try:
    found = step.run()
  except gpu_suite_peers.SkipError as error:
    return {"status": "skipped", "reason": str(error)}
  # Whatever goes wrong, the steps after this one still tell something.
  except Exception as error:
    return {"status": "error", "reason": f"{type(error).__name__}: {error}"}
  return {"status": "failed" if found.get("failures") else "passed", **found}


def _summarise(results: dict[str, Any]) -> None:
  checks = [row for row in results["steps"] if row["check"]]
  bad = ("failed", "error")
  results["passed"] = (
    any(row["status"] == "passed" for row in checks)
    and not any(row["status"] in bad for row in results["steps"])
    and not any(row["status"] == "skipped" for row in checks)
  )
  late = "the time was up"
  results["complete"] = not any(
    row.get("reason") == late for row in results["steps"]
  )


def _write(path: pathlib.Path | None, results: dict[str, Any]) -> None:
  """In one step, so that a kill leaves the results of the step before."""
  if path is None:
    return
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(results, indent=2) + "\n")
  temporary.replace(path)


def _print_step(row: dict[str, Any]) -> None:
  shown = ("name", "status", "check", "seconds")
  print(f"{row['status']:8}{row['seconds']:7.1f} s  {row['name']}")
  for name, value in row.items():
    if name not in shown and value not in ([], {}):
      print(f"{'':19}{name}: {value}", flush=True)


def _steps(
  calls: Calls, implementation: str, settings: Settings, results: Any
) -> Iterator[Step]:
  """All steps, the most important ones first."""
  chosen: list[tuple[bench_ops.Op, str]] = []
  for op in {op.name: op for op, _ in calls}.values():
    chosen += [(op, x) for x in _some([name for o, name in calls if o is op])]
  cases = list(gpu_suite_checks.cases(chosen))
  for case in cases:
    yield Step(
      name=f"check {case.name}",
      run=functools.partial(gpu_suite_checks.check, case, implementation),
      is_check=True,
    )

  copy_rate = functools.partial(gpu_suite_timings.copy_bandwidth, settings)
  yield Step(name="bandwidth of a copy", run=copy_rate)

  def timing(op, call, dtype, larger, contender):
    return functools.partial(
      gpu_suite_timings.time_call,
      op,
      call,
      dtype=dtype,
      batch_factor=larger,
      implementation=contender,
      profile=contender == implementation and dtype == "bfloat16",
      settings=settings,
      steps=results["steps"],
    )

  for dtype, larger, contender in (
    ("bfloat16", 1, implementation),
    ("bfloat16", settings.larger, implementation),
    ("bfloat16", settings.larger, gpu_suite_timings.PEER),
    ("bfloat16", 1, "xla_associative"),
    ("bfloat16", 1, gpu_suite_timings.PEER),
    ("float32", settings.larger, implementation),
  ):
    for op, name in chosen:
      yield Step(
        name=f"time {op.name} {name} {dtype} batch x{larger} {contender}",
        run=timing(op, name, dtype, larger, contender),
      )


def _some(names: Sequence[str]) -> Sequence[str]:
  """At most `_MOST_CALLS` of them, spread out.

  With an odd stride: models have four stages, and each should come up.
  """
  stride = -(-len(names) // _MOST_CALLS)
  return names[:: stride + (stride > 1 and stride % 2 == 0)]
