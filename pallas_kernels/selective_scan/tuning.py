"""Settings of the Mosaic GPU kernels: heuristics, and a table per device.

An explicit `Config` wins, else what `python -m pallas_kernels.bench --tune`
measured for this device and shape (`tuning_<device>.json` beside this file),
else the heuristics.
"""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any, Final

# Tokens between two states that are kept for the derivative.
BACKWARD_TILE: Final = 8

# Streaming multiprocessors of an H100, for devices that do not say.
_CORES: Final = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the kernels, forward and backward.

  Attributes:
    tile: Tokens that are fetched at once by the forward kernel.
    unroll: Tokens per iteration of its inner loop; divides
      `backward_tile`.
    buffers: Tiles in flight or in use.
    chunks: Parts of the sequence that are scanned in parallel; 1 is none.
    backward_tile: Tokens per checkpoint, and per tile of the backward kernel;
      divides `tile`.
  """

  tile: int = 16
  unroll: int = 4
  buffers: int = 2
  chunks: int = 1
  backward_tile: int = BACKWARD_TILE

  def __post_init__(self):
    for small, large, name, whole in (
      (self.unroll, self.backward_tile, "unroll", "backward_tile"),
      (self.backward_tile, self.tile, "backward_tile", "tile"),
    ):
      if small < 1 or large < 1 or large % small:
        raise ValueError(
          f"Config: `{name}` must divide `{whole}`, got {small} and {large}."
        )
    if self.buffers < 1 or self.chunks < 1:
      raise ValueError(
        "Config: `buffers` and `chunks` must be at least 1, got "
        f"{self.buffers} and {self.chunks}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What the best settings depend on.

  Attributes:
    b: Batch size.
    l: Tokens.
    d: Channels.
    g: Groups of channels.
    n: States per channel.
    itemsize: Bytes of an element of u.
  """

  b: int
  l: int
  d: int
  g: int
  n: int
  itemsize: int


def lookup(problem: Problem, device: Any) -> Config:
  """The settings for a problem on a device (real or abstract; None: no GPU)."""
  if device is not None:
    measured = _table(device.device_kind).get(problem)
    if measured is not None:
      return measured
  return heuristic(problem, cores=core_count(device))


def heuristic(problem: Problem, *, cores: int) -> Config:
  """Settings from what is known about the kernels.

  Args:
    problem: The sizes.
    cores: Streaming multiprocessors of the device.
  """
  # With one state a step is short, and what bounds it is memory: longer tiles
  # keep more bytes in flight.
  tile, unroll = (16, 4) if problem.n > 1 else (32, 8)
  return Config(tile=tile, unroll=unroll, chunks=_chunks(problem, cores, tile))


def _chunks(problem: Problem, cores: int, tile: int) -> int:
  """In how many chunks to scan a sequence; 1 for a single pass.

  Three phases cost about twice the work of one pass, and two blocks on a core
  hide each other's latencies: below four chunks there is nothing to gain. A
  chunk of fewer than four tiles has too much overhead.
  """
  blocks = problem.b * problem.g * -(-problem.d // problem.g // 128)
  chunks = min(2 * cores // blocks, -(-problem.l // (4 * tile)))
  return chunks if chunks >= 4 else 1


def core_count(device: Any) -> int:
  """The streaming multiprocessors of a real or an abstract device."""
  for name in ("core_count", "num_cores"):
    if count := getattr(device, name, None):
      return int(count)
  return _CORES


def table_name(device_kind: str) -> str:
  """The file with what was measured on this kind of device."""
  return f"tuning_{re.sub('[^a-z0-9]+', '_', device_kind.lower())}.json"


@functools.cache
def _table(device_kind: str) -> dict[Problem, Config]:
  """What was measured on this kind of device; empty if nothing was."""
  path = table_path(device_kind)
  return read_table(path) if path.is_file() else {}


def table_path(device_kind: str) -> pathlib.Path:
  """Where the table of this kind of device is, or would be."""
  return pathlib.Path(__file__).parent / table_name(device_kind)


def read_table(path: pathlib.Path) -> dict[Problem, Config]:
  """The settings in a table.

  Raises:
    ValueError: The file is damaged; the message says where.
  """
  try:
    entries = json.loads(path.read_text())["entries"]
    return {
      _record(Problem, e["problem"]): _record(Config, e["config"])
      for e in entries
    }
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is no table of settings: {error!r}. Every entry needs a "
      "`problem` and a `config` with the fields of `tuning`; write it anew "
      "with python -m pallas_kernels.bench --tune, or delete it."
    ) from error


def _record(kind: Any, values: Any) -> Any:
  """A `Problem` or a `Config`, all of whose fields are given and whole."""
  fields = {field.name for field in dataclasses.fields(kind)}
  if not isinstance(values, dict) or values.keys() != fields:
    raise ValueError(f"a {kind.__name__} has {sorted(fields)}, got {values}")
  for name, value in values.items():
    if type(value) is not int or value < 1:
      raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}")
  return kind(**values)


def write_table(
  path: pathlib.Path, device_kind: str, note: str, entries: Any
) -> None:
  """Replaces a table, in one step.

  Args:
    path: That of `table_path`.
    device_kind: The kind of device that was measured.
    note: When and with what.
    entries: Dictionaries with "problem", "config" and anything else.
  """
  table = {"device_kind": device_kind, "note": note, "entries": entries}
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(table, indent=2) + "\n")
  read_table(temporary)  # Nothing is replaced by what cannot be read.
  temporary.replace(path)
