"""Finds the best settings of the selective scan's GPU kernels.

For each call that models make, in bfloat16 and float32, settings are varied
one at a time, from those of the heuristics. Each candidate must compute what
the definition says before it is timed, forward plus backward. The best are
written to the table of this kind of device, beside `tuning`; what was measured
for other calls stays in it.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import datetime
import functools
import json
import pathlib
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import bench_checks, bench_ops, bench_timing, dispatch
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

Timer = Callable[[tuning.Config], float]


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
  time: Timer,
  report: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
  """The fastest of the settings around `start`, by going downhill.

  Args:
    start: Where to begin; it must work.
    time: The microseconds of a candidate; what it raises disqualifies it.
    report: Called with every trial.
  """
  tried: dict[tuning.Config, Trial] = {}

  def attempt(config: tuning.Config) -> Trial:
    if config not in tried:
      try:
        tried[config] = Trial(config=config, microseconds=time(config))
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
  timer: Callable[..., Timer] | None = None,
  path: pathlib.Path | None = None,
) -> None:
  """Tunes the calls of these names and keeps what it finds, call by call.

  Args:
    names: Keys of the selective scan's `ARG_SPECS`.
    timer: Makes, from a call and a dtype, what times its settings; None for
      `device_timer`.
    path: The table; None for that of this device.
  """
  op = bench_ops.OPS["selective_scan"]
  device = dispatch.target_device()
  path = path or tuning.table_path(device.device_kind)
  for name in names:
    for dtype in (jnp.bfloat16, jnp.float32):
      spec = op.specs[name]
      problem = tuning.Problem(
        b=spec.b,
        l=spec.l,
        d=spec.d,
        g=spec.g,
        n=spec.n,
        itemsize=jnp.dtype(dtype).itemsize,
      )
      print(f"\n{name} {jnp.dtype(dtype).name}", flush=True)
      cores = tuning.core_count(device)
      start = tuning.heuristic(problem, cores=cores)
      make = timer or device_timer
      best = search(start, make(spec, dtype), _print_trial)
      print(f"best: {best.config}")
      _keep(path, device.device_kind, problem, best)
  print(f"\nWritten to {path}")


def device_timer(spec: Any, dtype: Any) -> Timer:
  """Times settings on this machine's GPU, once they compute what they must."""
  op = bench_ops.OPS["selective_scan"]
  arrays = op.make_arguments(spec, dtype=dtype)
  plain = functools.partial(
    op.function, delta_softplus=True, implementation="xla_associative"
  )
  dy = bench_checks.cotangents(plain, arrays)
  want = bench_checks.expected(op, {"delta_softplus": True}, arrays, dy)
  rotation = bench_timing.copies((arrays, dy))

  def time(config: tuning.Config) -> float:
    function = functools.partial(with_config, config)
    got = jax.jit(bench_checks.both_ways(function))(arrays, dy)
    _, failures = bench_checks.compare(got, want)
    if failures:
      raise CandidateError("; ".join(failures))

    def both(inputs):
      y, back = jax.vjp(lambda a: function(**a), inputs[0])
      return y, back(*inputs[1])

    return bench_timing.measure(jax.jit(both), rotation).median_us

  return time


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
