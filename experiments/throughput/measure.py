"""Compiles and times groups of cases."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import math
import time
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import cases
import vimjax
from vimjax import registry

_PRECISIONS = {"full": "highest", "tf32": "tensorfloat32"}
_ATTENTION = {"materialised": "xla", "flash": "cudnn"}
# A round is at least this long, or one call.
_ROUND_SECONDS = 0.1
_MOST_CALLS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What was measured of a case.

  Attributes:
    case: The case.
    error: Why nothing was measured, such as "out of memory"; else None.
    median_s: Median over rounds of the time of one step, in seconds.
    quartiles_s: First and third quartile.
    images_per_second: The batch over the median.
    compile_s: Tracing and compilation, in seconds.
    argument_bytes: Parameters and images, by the compiler's account.
    temp_bytes: What the program needs beside arguments and results.
    peak_bytes: Arguments, results and temporary memory together, by the
      compiler's account; an array that is updated in place counts once.
    device_peak_bytes: The device's own account of the most that was in use;
      None where there is none, or where earlier cases had needed more.
  """

  case: cases.Case
  error: str | None = None
  median_s: float | None = None
  quartiles_s: tuple[float, float] | None = None
  images_per_second: float | None = None
  compile_s: float | None = None
  argument_bytes: int | None = None
  temp_bytes: int | None = None
  peak_bytes: int | None = None
  device_peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class _Program:
  """A compiled case. `step` runs it once and returns something to wait for."""

  step: Callable[[], Any]
  compile_s: float
  argument_bytes: int
  temp_bytes: int
  peak_bytes: int
  device_peak_bytes: int | None


def run_group(group: Sequence[cases.Case], rounds: int) -> list[Row]:
  """Compiles all cases, then times them in turn, round by round.

  A disturbance of the machine then hits them alike. What does not fit into
  memory gets a row that says so.
  """
  programs: dict[cases.Case, _Program] = {}
  errors: dict[cases.Case, str] = {}
  for case in group:
    try:
      programs[case] = compile_case(case)
    except jax.errors.JaxRuntimeError as error:
      errors[case] = _reason(error)
  times = _time(programs, rounds)
  return [
    Row(case=case, error=errors[case])
    if case in errors
    else _row(case, programs[case], times[case])
    for case in group
  ]


def _reason(error: Exception) -> str:
  text = str(error)
  if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
    return "out of memory"
  return text.splitlines()[0][:200]


def _row(case: cases.Case, program: _Program, times: Sequence[float]) -> Row:
  low, median, high = np.percentile(times, (25, 50, 75))
  return Row(
    case=case,
    median_s=float(median),
    quartiles_s=(float(low), float(high)),
    images_per_second=float(case.batch / median),
    compile_s=program.compile_s,
    argument_bytes=program.argument_bytes,
    temp_bytes=program.temp_bytes,
    peak_bytes=program.peak_bytes,
    device_peak_bytes=program.device_peak_bytes,
  )


def _time(
  programs: dict[cases.Case, _Program], rounds: int
) -> dict[cases.Case, list[float]]:
  """Seconds per step, one number per round."""
  calls = {}
  for case, program in programs.items():
    start = time.perf_counter()
    jax.block_until_ready(program.step())
    once = time.perf_counter() - start
    calls[case] = min(max(math.ceil(_ROUND_SECONDS / once), 1), _MOST_CALLS)
  times: dict[cases.Case, list[float]] = {case: [] for case in programs}
  for _ in range(rounds):
    for case, program in programs.items():
      start = time.perf_counter()
      results = [program.step() for _ in range(calls[case])]
      jax.block_until_ready(results)
      times[case].append((time.perf_counter() - start) / calls[case])
  return times


def build(case: cases.Case) -> Any:
  """The model of a case."""
  fields: dict[str, Any] = dict(dtype=jnp.dtype(case.dtype))
  known = registry.field_names(vimjax.get_variant(case.model).module)
  if "image_size" in known:
    fields["image_size"] = case.size
  if case.attention is not None:
    fields["attention_implementation"] = _ATTENTION[case.attention]
  return vimjax.create_model(case.model, **fields)


def compile_case(case: cases.Case) -> _Program:
  model = build(case)
  rng = np.random.default_rng(0)
  shape = (case.batch, case.size, case.size, 3)
  images = jnp.asarray(rng.standard_normal(shape, np.float32))
  variables = _variables(model, images, rng)
  labels = jnp.asarray(rng.integers(0, model.num_classes, case.batch))
  precision: Any = contextlib.nullcontext()
  if case.precision is not None:
    precision = jax.default_matmul_precision(_PRECISIONS[case.precision])
  before = _peak()
  start = time.perf_counter()
  with precision:
    if case.mode == "inference":
      function = jax.jit(model.apply)
      compiled = function.lower(variables, images).compile()
    else:
      function = jax.jit(_training_step(model), donate_argnums=0)
      compiled = function.lower(variables, images, labels).compile()
  seconds = time.perf_counter() - start
  state = [variables]

  def step() -> Any:
    if case.mode == "inference":
      return compiled(state[0], images)
    state[0], loss = compiled(state[0], images, labels)
    return loss

  jax.block_until_ready(step())  # Warms up, and fails here if it does not fit.
  peak, memory = _peak(), _memory(compiled)
  arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return _Program(
    step=step,
    compile_s=seconds,
    argument_bytes=arguments,
    temp_bytes=temp,
    peak_bytes=arguments + results + temp,
    device_peak_bytes=peak if peak is not None and peak != before else None,
  )


def _memory(compiled: Any) -> Any:
  return compiled.memory_analysis()


def _variables(
  model: Any, images: jax.Array, rng: np.random.Generator
) -> dict[str, Any]:
  """Values of the usual size; initialising would mean compiling once more."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
  flat: dict[Any, Any] = traverse_util.flatten_dict(shapes)
  ones = ("scale", "var")
  filled = {
    path: jnp.ones(leaf.shape, leaf.dtype)
    if path[-1] in ones
    else jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)
    for path, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(filled)


def _training_step(model: Any) -> Callable[..., Any]:
  def step(variables, images, labels):
    params = variables["params"]
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
      logits, updated = model.apply(
        {"params": params, **rest},
        images,
        train=True,
        mutable=list(rest),
        rngs={"drop_path": jax.random.key(0)},
      )
      losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, labels[:, None], -1
      ).squeeze(-1)
      return losses.mean(), updated

    (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)
    return {"params": params, **updated}, value

  return step


def _peak() -> int | None:
  """The most memory that was in use on the device since the process began."""
  stats = jax.devices()[0].memory_stats()
  return stats.get("peak_bytes_in_use") if stats else None
