"""One run on a GPU that answers what could not be known without one.

Whether the kernels compute what the definition says, the same at every run and
all of it; how long they take, beside what bounds them and beside others. Steps
run in order of importance, in another process that may hang or die, until the
time is up. The results are written after each of them, and a later run goes on
from there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import (
  bench_child,
  bench_compare,
  bench_ops,
  bench_timing,
  gpu_suite_checks,
  gpu_suite_peers,
  gpu_suite_report,
  gpu_suite_timings,
)
from pallas_kernels.selective_scan import arg_specs, arguments

Calls = Sequence[tuple[bench_ops.Op, str]]
Execute = Callable[..., Any]

# Calls with such names come first, in this order.
_IMPORTANT: Final = ("vim_", "vmamba_tiny_s1l8", "mambavision_")
_DTYPES: Final = ("bfloat16", "float32")
_LATE: Final = "the time was up"
_BANDWIDTH: Final = "bandwidth of a copy"
START_SECONDS: Final = 120  # For the device, too, to start.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One line of the results.

  Attributes:
    name: What it does, and on what.
    function: Does it; returns what is to be written down. "failures", if there
      are any in it, are sentences.
    arguments: Its arguments. They and the function can be pickled.
    is_check: Whether it must pass for the run to pass.
  """

  name: str
  function: Callable[..., dict[str, Any]]
  arguments: tuple[Any, ...] = ()
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


def why_no_gpu_there(child: bench_child.Child) -> str | None:
  """`why_no_gpu` in another process, which may not come that far."""
  try:
    return child.run(why_no_gpu, seconds=START_SECONDS)
  except bench_child.ChildError as error:
    return f"a process that asked for it {error}"


def run_on_gpu(
  calls: Calls,
  path: pathlib.Path | None,
  mamba_ssm: pathlib.Path | None,
  seconds: float | None,
) -> dict[str, Any] | str:
  """`run` with all steps in another process; or why there is no GPU.

  This process never touches the device, whose memory the other one takes.
  """
  settings = gpu_suite_timings.Settings()
  if seconds is not None:
    settings = dataclasses.replace(settings, seconds=seconds)
  with bench_child.Child() as child:
    if reason := why_no_gpu_there(child):
      return reason
    facts = child.run(bench_compare.environment, seconds=START_SECONDS)
    return run(
      calls,
      implementation="mosaic_gpu",
      environment=facts,
      execute=child.run,
      path=path,
      mamba_ssm=mamba_ssm,
      settings=settings,
    )


def run(
  calls: Calls,
  *,
  implementation: str,
  environment: Mapping[str, str],
  execute: Execute,
  path: pathlib.Path | None = None,
  mamba_ssm: pathlib.Path | None = None,
  settings: gpu_suite_timings.Settings | None = None,
  clock: bench_timing.Clock = time.perf_counter,
) -> dict[str, Any]:
  """Runs the suite.

  Args:
    calls: Operations and names of their calls.
    implementation: What to check and to time.
    environment: What the results depend on beside the code.
    execute: Calls a function, its first argument, with the others, in at most
      `seconds`; may raise `bench_child.ChildError`.
    path: Where to write the results; None for nowhere. What is there already,
      of the same environment, is not run again, but for contenders that
      failed.
    mamba_ssm: Where `gpu_suite_peers` built the CUDA kernel; None to time
      without it.
    settings: What the run may cost.
    clock: Seconds since any moment.

  Returns:
    The results: "environment", "settings", "steps", what is "running", whether
    all checks "passed", and whether the time was enough, "complete".
  """
  settings = settings or gpu_suite_timings.Settings()
  results: dict[str, Any] = {
    "environment": dict(environment),
    "implementation": implementation,
    "settings": dataclasses.asdict(settings),
    "running": None,
    "passed": False,
    "complete": False,
    "steps": _steps_done(path, environment),
  }
  print("  ".join(f"{k} {v}" for k, v in environment.items()))
  done = {row["name"] for row in results["steps"]}
  start = clock()
  for step in _steps(calls, implementation, settings, mamba_ssm):
    if step.name in done:
      continue
    # Should all of this be killed, the file says in what.
    results["running"] = step.name
    _write(path, results)
    began = clock()
    if began - start > settings.seconds:
      row = {"status": "skipped", "reason": _LATE}
    else:
      row = _run_step(step, execute, settings)
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
  _summarise(results)
  _write(path, results)
  print(f"\n{gpu_suite_report.table(results)}")
  print(f"\n{gpu_suite_report.targets(results)}")
  verdict = "passed" if results["passed"] else "FAILED"
  late = "" if results["complete"] else ", not all of it run"
  print(f"\n{verdict}{late} in {clock() - start:.0f} s", flush=True)
  return results


def _steps_done(
  path: pathlib.Path | None, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
  """What a run before has found; its file is put aside if it is of no use.

  Every run measures the bandwidth, beside which its timings stand.
  """
  if path is None or not path.exists():
    return []
  # "source" tells of the code what matters; results may be committed between.
  constant = lambda facts: {
    k: v for k, v in facts.items() if k not in ("date", "commit")
  }
  try:
    before = json.loads(path.read_text())
    is_same = constant(before["environment"]) == constant(environment)
    steps = [
      x
      for x in before["steps"]
      if x["check"] and x.get("reason") != _LATE or x["status"] == "passed"
    ]
  except (ValueError, KeyError, TypeError, AttributeError):
    is_same, steps = False, []
  if is_same:
    return [
      row | {"name": f"{_BANDWIDTH}, before"}
      if row["name"] == _BANDWIDTH
      else row
      for row in steps
    ]
  aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
  path.replace(aside)
  print(f"{path} is of other code or another device: now {aside}")
  return []


def _run_step(
  step: Step, execute: Execute, settings: gpu_suite_timings.Settings
) -> dict[str, Any]:
  try:
    found = execute(
      step.function, *step.arguments, seconds=settings.step_seconds
    )
  except bench_child.ChildError as error:
    return {"status": "error", "reason": str(error)}
  return {"status": "failed" if found.get("failures") else "passed", **found}


def _summarise(results: dict[str, Any]) -> None:
  checks = [row for row in results["steps"] if row["check"]]
  results["passed"] = bool(checks) and all(
    row["status"] == "passed" for row in checks
  )
  results["complete"] = not any(
    row.get("reason") == _LATE for row in results["steps"]
  )


def _write(path: pathlib.Path | None, results: dict[str, Any]) -> None:
  """In one step, so that a kill leaves the results of the step before."""
  if path is None:
    return
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(results, indent=2) + "\n")
  temporary.replace(path)


def _print_step(row: Mapping[str, Any]) -> None:
  print(f"{row['status']:8}{row['seconds']:7.1f} s  {row['name']}", flush=True)
  for name in ("reason", "errors", "failures"):
    if value := row.get(name):
      print(f"{'':19}{name}: {str(value)[:1000]}", flush=True)


def _steps(
  calls: Calls,
  implementation: str,
  settings: gpu_suite_timings.Settings,
  mamba_ssm: pathlib.Path | None,
) -> Iterator[Step]:
  """All steps, the most important ones first."""
  yield Step(
    name=_BANDWIDTH,
    function=gpu_suite_timings.copy_bandwidth,
    arguments=(settings,),
  )
  important = [
    call for x in _IMPORTANT for call in calls if call[1].startswith(x)
  ]
  others = [call for call in calls if call not in important]
  scans = lambda group: [x for x in group if x[0].name == "selective_scan"]
  for group in (important, others):
    for dtype in _DTYPES:
      cases = [*gpu_suite_checks.of_models(group, dtype)]
      if group is important and scans(calls):
        cases += gpu_suite_checks.awkward(dtype)
      for case in cases:
        yield Step(
          name=case.name,
          function=gpu_suite_checks.check,
          arguments=(case, implementation),
          is_check=True,
        )
      for job in _jobs(group, dtype, implementation, settings):
        job = dataclasses.replace(job, is_checked=True)
        yield _timing(job, gpu_suite_timings.time_call, job, settings)
      if mamba_ssm is not None:
        name = gpu_suite_report.PEER
        for job in _jobs(scans(group), dtype, name, settings):
          yield _timing(
            job, gpu_suite_peers.time_call, job, settings, mamba_ssm
          )
    # Last, as it takes the longest to compile.
    for dtype in _DTYPES:
      for job in _jobs(group, dtype, gpu_suite_report.XLA, settings):
        yield _timing(job, gpu_suite_timings.time_call, job, settings)


def _jobs(
  calls: Calls,
  dtype: str,
  implementation: str,
  settings: gpu_suite_timings.Settings,
) -> Iterator[gpu_suite_timings.Job]:
  """The timings of calls, each with a larger batch and with its own."""
  for op, name in calls:
    for factor in (settings.larger, 1):
      yield gpu_suite_timings.Job(
        op=op.name,
        call=name,
        dtype=dtype,
        batch_factor=factor,
        implementation=implementation,
        is_checked=False,
      )


def _timing(
  job: gpu_suite_timings.Job,
  function: Callable[..., dict[str, Any]],
  *arguments: Any,
) -> Step:
  return Step(
    name=f"time {job.op} {job.call} {job.dtype} batch x{job.batch_factor} "
    f"{job.implementation}",
    function=function,
    arguments=arguments,
    is_check=job.is_checked,
  )
