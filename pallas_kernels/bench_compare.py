"""Times the implementations of the selective scan against a fixed baseline.

All implementations of a call are timed in turn, round by round, so that a
disturbance of the machine hits them alike; the table has medians and
quartiles. Memory is what the compiler reserves beside arguments and results.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import functools
import platform
import time
from typing import Any, Final

import jax
import jax.extend
import jax.numpy as jnp
import jaxlib
import numpy as np

from pallas_kernels import bench_environment
from pallas_kernels.selective_scan import api, arg_specs

BASELINE: Final = "baseline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
  """What an implementation must reach on CPU, forward plus backward.

  Attributes:
    implementation: Name of the implementation.
    speedup: At least this many times as fast as the baseline.
    memory: At most one part in this many of the baseline's temporary memory.
  """

  implementation: str
  speedup: float
  memory: float


GATES: Final = {
  "vim_tiny_224": Gate(implementation="xla_sequential", speedup=7, memory=50),
  "vmamba_tiny_stage1": Gate(
    implementation="xla_sequential", speedup=4, memory=8
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the table.

  Attributes:
    spec: Name of the call.
    implementation: Name of the implementation, or "baseline".
    direction: "forward" or "forward+backward".
    median_ms: Median time of a call.
    quartiles_ms: First and third quartile.
    temp_mib: Temporary memory.
    speedup: Baseline's median time over this one's.
    memory_ratio: Baseline's temporary memory over this one's.
  """

  spec: str
  implementation: str
  direction: str
  median_ms: float
  quartiles_ms: tuple[float, float]
  temp_mib: float
  speedup: float
  memory_ratio: float


def baseline_selective_scan(u, delta, A, B, C, D, *, delta_bias, z=None):
  """What one would write first: one associative scan over the whole length.

  Kept as it is, whatever becomes of the implementations, so that numbers of
  different versions can be compared. Softplus is always applied.
  """
  d = u.shape[2]
  g = B.shape[2]
  delta = jax.nn.softplus(delta + delta_bias)
  B, C = (jnp.repeat(x, d // g, axis=2) for x in (B, C))  # (b, l, d, n)
  decay = jnp.exp(delta[..., None] * A)
  inputs = (delta * u)[..., None] * B
  compose = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
  _, states = jax.lax.associative_scan(compose, (decay, inputs), axis=1)
  y = (states * C).sum(-1) + D * u
  return y if z is None else y * jax.nn.silu(z)


def _functions(names: Sequence[str]) -> dict[str, Callable[..., jax.Array]]:
  """The baseline and the named implementations, of the same signature."""
  functions = {BASELINE: baseline_selective_scan}
  for name in names:
    functions[name] = functools.partial(
      api.selective_scan, delta_softplus=True, implementation=name
    )
  return functions


def _compile(
  function: Callable[..., jax.Array], arrays: Mapping[str, jax.Array]
) -> dict[str, tuple[Any, Callable[[], Any]]]:
  """By direction: the compiled program, and a call of it."""

  def forward(arrays):
    return function(**arrays)

  def both(arrays, cotangent):
    y, back = jax.vjp(forward, arrays)
    return y, back(cotangent)

  cotangent = jnp.cos(arrays["u"])
  first = jax.jit(forward).lower(arrays).compile()
  second = jax.jit(both).lower(arrays, cotangent).compile()
  return {
    "forward": (first, lambda: first(arrays)),
    "forward+backward": (second, lambda: second(arrays, cotangent)),
  }


def measure(
  spec_name: str, spec: arg_specs.ArgSpec, names: Sequence[str], rounds: int
) -> list[Row]:
  """Compiles, then times everything `rounds` times in turn."""
  arrays = arg_specs.make_arguments(spec)
  programs = {
    (name, direction): program
    for name, function in _functions(names).items()
    for direction, program in _compile(function, arrays).items()
  }
  times = {key: [] for key in programs}
  for turn in range(rounds + 1):
    for key, (_, call) in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn > 0:  # The first one warms up.
        times[key].append(1e3 * (time.perf_counter() - start))
  temp = {
    key: compiled.memory_analysis().temp_size_in_bytes / 2**20
    for key, (compiled, _) in programs.items()
  }
  rows = []
  for name, direction in programs:
    low, median, high = np.percentile(times[name, direction], (25, 50, 75))
    base = (BASELINE, direction)
    rows.append(
      Row(
        spec=spec_name,
        implementation=name,
        direction=direction,
        median_ms=float(median),
        quartiles_ms=(float(low), float(high)),
        temp_mib=temp[name, direction],
        speedup=float(np.median(times[base]) / median),
        memory_ratio=temp[base] / max(temp[name, direction], 2**-20),
      )
    )
  return rows


def check_gates(rows: Sequence[Row]) -> list[str]:
  """One line for each gate that the rows allow to check."""
  lines = []
  for row in rows:
    gate = GATES.get(row.spec)
    if gate is None or row.direction != "forward+backward":
      continue
    if row.implementation != gate.implementation:
      continue
    for what, reached, wanted in (
      ("speed", row.speedup, gate.speedup),
      ("memory", row.memory_ratio, gate.memory),
    ):
      verdict = "PASS" if reached >= wanted else "FAIL"
      lines.append(
        f"{verdict} {row.spec} {row.implementation} {what}: "
        f"{reached:.1f}x better than the baseline, wanted {wanted:g}x"
      )
  return lines


def environment() -> dict[str, str]:
  """What the numbers depend on; on a GPU, more of it."""
  device = jax.extend.backend.get_default_device()
  # A CPU's kind is "cpu".
  names = dict.fromkeys((device.platform, device.device_kind))
  facts = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "device": " ".join(names),
    "machine": f"{platform.machine()} {platform.system()}",
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "python": platform.python_version(),
  }
  if device.platform == "gpu":
    facts |= bench_environment.gpu_facts()
  return facts


def table(rows: Sequence[Row]) -> str:
  lines = [
    f"{'implementation':18}{'direction':18}{'median ms':>10}"
    f"{'quartiles ms':>20}{'speed':>8}{'temp MiB':>10}{'memory':>9}"
  ]
  for row in rows:
    low, high = row.quartiles_ms
    lines.append(
      f"{row.implementation:18}{row.direction:18}{row.median_ms:10.2f}"
      f"{f'{low:.2f} to {high:.2f}':>20}{row.speedup:7.1f}x"
      f"{row.temp_mib:10.2f}{row.memory_ratio:8.1f}x"
    )
  return "\n".join(lines)
