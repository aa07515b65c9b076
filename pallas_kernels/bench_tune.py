"""Finds the best settings of the selective scan's GPU kernels.

For each call that models make, in bfloat16 and float32, settings are varied
one at a time, from those of the heuristics. Each candidate must compute what
`xla_associative` does before it is timed, forward plus backward, in another
process, which it may take along. The best are written to the table of this kind
of device, beside `tuning`, or to another file; what was measured for other
calls stays in it.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import (
  bench_checks,
  bench_child,
  bench_ops,
  bench_timing,
  dispatch,
  gpu_suite,
)
from pallas_kernels.selective_scan import arguments, mosaic_gpu, tuning

# Tried for each setting, beside these multiples of the number of chunks.
_VALUES: Final = {
  "tile": (8, 16, 32, 64),
  "unroll": (1, 2, 4, 8),
  "buffers": (1, 2, 3, 4),
  "backward_tile": (4, 8, 16),
}
_CHUNK_FACTORS: Final = (0.25, 0.5, 2, 4)

# Less is noise.
_GAIN: Final = 0.98
_PASSES: Final = 2

_SECONDS: Final = 45  # A candidate that takes longer is none.
_ROWS: Final = 16  # That are checked at a time.

Timer = Callable[..., float]


class CandidateError(Exception):
  """These settings compute something wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """What became of a candidate.

  Attributes:
    config: The settings.
    microseconds: Its time; None if it could not be timed.
    reason: Why not; empty otherwise.
  """

  config: tuning.Config
  microseconds: float | None
  reason: str = ""


def neighbours(config: tuning.Config) -> Iterator[tuning.Config]:
  """Settings that differ in one respect and are valid."""
  chunks = sorted(
    {max(1, int(config.chunks * x)) for x in _CHUNK_FACTORS} | {1}
  )
  for name, values in {"chunks": chunks, **_VALUES}.items():
    for value in values:
      if value == getattr(config, name):
        continue
      try:
        yield dataclasses.replace(config, **{name: value})
      except ValueError:  # Does not divide what it must.
        continue


def search(
  start: tuning.Config,
  time_one: Callable[[tuning.Config], float],
  report: Callable[[Trial], None] = lambda trial: None,
  is_over: Callable[[], bool] = lambda: False,
) -> Trial:
  """The fastest of the settings around `start`, by going downhill.

  Args:
    start: Where to begin; it must work.
    time_one: The microseconds of a candidate; what it raises disqualifies it.
    report: Called with every trial.
    is_over: Whether to be content with what is known.
  """
  tried: dict[tuning.Config, Trial] = {}

  def attempt(config: tuning.Config) -> Trial:
    if config not in tried:
      try:
        tried[config] = Trial(config=config, microseconds=time_one(config))
      # What settings do not lower, or not compile, shows in many ways: errors
      # of the kernels, of Pallas, of the compiler, of the device.
      except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {line[:200]}"
        tried[config] = Trial(config=config, microseconds=None, reason=reason)
      report(tried[config])
    return tried[config]

  best = attempt(start)
  if best.microseconds is None:
    raise CandidateError(f"the heuristic settings fail: {best.reason}")
  for _ in range(_PASSES):
    before = best
    for config in neighbours(best.config):
      if is_over():
        return best
      trial = attempt(config)
      if trial.microseconds is None or best.microseconds is None:
        continue
      if trial.microseconds < _GAIN * best.microseconds:
        best = trial
    if best == before:
      break
  return best


def tune(
  names: Sequence[str],
  *,
  device: Any,
  timer: Timer,
  path: pathlib.Path,
  batch_factor: int = 1,
  seconds: float = math.inf,
  clock: bench_timing.Clock = time.monotonic,
) -> None:
  """Tunes the calls of these names and keeps what it finds, call by call.

  Args:
    names: Keys of the selective scan's `ARG_SPECS`.
    device: What they are tuned for.
    timer: The microseconds of settings for a call and a dtype.
    path: The table.
    batch_factor: How many times the batch of the calls.
    seconds: No candidate is timed later than this.
    clock: Seconds since any moment.
  """
  op = bench_ops.OPS["selective_scan"]
  end = clock() + seconds
  is_over = lambda: clock() > end
  for name in names:
    for dtype in ("bfloat16", "float32"):
      if is_over():
        print(f"\n{name} {dtype}: the time is up")
        continue
      spec = bench_ops.enlarged(op.specs[name], batch_factor)
      problem = tuning.Problem(
        b=spec.b,
        l=spec.l,
        d=spec.d,
        g=spec.g,
        n=spec.n,
        itemsize=jnp.dtype(dtype).itemsize,
      )
      print(f"\n{name} {dtype} {op.describe(spec)}", flush=True)
      start = tuning.heuristic(problem, cores=tuning.core_count(device))
      time_one = functools.partial(timer, spec, dtype)
      try:
        best = search(start, time_one, _print_trial, is_over)
      except CandidateError as error:
        print(f"left as it is: {error}", flush=True)
        continue
      print(f"best: {best.config}", flush=True)
      _keep(path, device.device_kind, problem, best)
  print(f"\nThe table is {path}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """What tuning has to know of a device, in a process that does not use it."""

  device_kind: str
  core_count: int


def tune_on_gpu(
  names: Sequence[str], *, path: pathlib.Path | None, **options: Any
) -> str | None:
  """`tune` with all candidates in another process; or why there is no GPU.

  Args:
    names: Keys of the selective scan's `ARG_SPECS`.
    path: The table; None for that of this device.
    **options: More arguments of `tune`.
  """
  with bench_child.Child() as child:
    if reason := gpu_suite.why_no_gpu_there(child):
      return reason
    device = child.run(this_device, seconds=gpu_suite.START_SECONDS)
    path = path or tuning.table_path(device.device_kind)
    timer = functools.partial(child.run, time_on_device, seconds=_SECONDS)
    tune(names, device=device, timer=timer, path=path, **options)
  return None


def this_device() -> Device:
  """The one that this process uses."""
  device = dispatch.target_device()
  return Device(
    device_kind=device.device_kind, core_count=tuning.core_count(device)
  )


def time_on_device(spec: Any, dtype: str, config: tuning.Config) -> float:
  """Microseconds of a call with these settings, if it computes what it must.

  Raises:
    CandidateError: It does not.
  """
  op = bench_ops.OPS["selective_scan"]
  function = functools.partial(with_config, config)
  arrays, dy = _inputs(spec, dtype)
  program = jax.jit(bench_checks.both_ways(function))
  shapes = jax.eval_shape(program, arrays, dy)
  got, failures = bench_checks.repeat(
    bench_checks.into_buffers(program), shapes, arrays, dy
  )
  errors = bench_checks.on_device(
    op, {"delta_softplus": True}, arrays, dy, got, rows=math.gcd(spec.b, _ROWS)
  )
  failures += bench_checks.too_large(errors, got)
  if failures:
    raise CandidateError("; ".join(failures))

  def both(inputs):
    y, back = jax.vjp(lambda a: function(**a), inputs[0])
    return y, back(*inputs[1])

  rotation = bench_timing.copies((arrays, dy))
  return bench_timing.measure(jax.jit(both), rotation).median_us


@functools.lru_cache(maxsize=1)
def _inputs(spec: Any, dtype: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
  """The arguments of a call and the cotangent of its result."""
  arrays = bench_ops.random_arguments("selective_scan", spec, dtype)
  return arrays, (jnp.flip(arrays["u"], axis=1),)


def with_config(config: tuning.Config, **arrays: Any) -> jax.Array:
  """The selective scan by the GPU kernels with these settings."""
  optional = {"D": None, "z": None, "delta_bias": None, "initial_state": None}
  args = arguments.normalise(**(optional | arrays))
  options = arguments.Options(
    delta_softplus=True, reverse=False, compute_dtype=jnp.float32
  )
  return mosaic_gpu.selective_scan(args, options, config=config)[0]


def _print_trial(trial: Trial) -> None:
  outcome = trial.reason
  if trial.microseconds is not None:
    outcome = f"{trial.microseconds:.1f} us"
  values = dataclasses.asdict(trial.config)
  settings = "  ".join(f"{name} {value}" for name, value in values.items())
  print(f"  {settings}: {outcome}", flush=True)


def _keep(
  path: pathlib.Path, device_kind: str, problem: tuning.Problem, best: Trial
) -> None:
  """Puts one entry into a table."""
  entries = []
  if path.is_file():
    tuning.read_table(path)  # Raises if it is damaged.
    entries = json.loads(path.read_text())["entries"]
  mine = dataclasses.asdict(problem)
  entries = [entry for entry in entries if entry["problem"] != mine]
  entries.append(
    {
      "problem": mine,
      "config": dataclasses.asdict(best.config),
      "microseconds": round(best.microseconds or 0.0, 2),
    }
  )
  today = datetime.datetime.now(datetime.UTC).date()
  note = (
    "Written by python -m pallas_kernels.bench --tune; times are of forward "
    f"plus backward. Last measured {today} with jax {jax.__version__}."
  )
  tuning.write_table(path, device_kind, note, entries)
