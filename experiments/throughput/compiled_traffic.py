"""Memory traffic of a model's kernels, compiled for an H100 that is not here.

  python -m experiments.throughput.compiled_traffic vim_tiny --mode training

A program for a GPU is a list of kernels, and most of those of these models are
bound by the memory that they read and write. The compiled program says what
each has as operands and results; summed up, that gives the least time in which
the memory could do its part, and tells where XLA copies. Counted once for each
kernel: an operand, or the slices that it takes of it, and its results. What
stays in the cache between two kernels is therefore counted as if it did not.

Without a GPU the compiler cannot try out its implementations of a matrix
product: on one it may take others, so the list of a real run (a profile) may
differ. Nothing here is a time.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import re
import sys
from typing import Final, get_args

import jax

from experiments.throughput import cases, compiled_memory, programs
from vimjax import command_line

# Instructions that run no kernel.
_FREE: Final = frozenset(
  (
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "partition-id",
  )
)
_HEADER: Final = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION: Final = re.compile(
  r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$"
)
_SHAPE: Final = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_COMMENT: Final = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
  """A line of a program.

  Attributes:
    name: What others call it.
    opcode: What it does.
    size: Bytes of its results.
    operands: Names of its operands, in order.
    rest: What follows the operands.
  """

  name: str
  opcode: str
  size: int
  operands: tuple[str, ...]
  rest: str

  def attribute(self, pattern: str) -> str | None:
    """The group of a pattern in the rest of the line."""
    found = re.search(pattern, self.rest)
    return found.group(1) if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """What the kernels from one place of a model read and write.

  Attributes:
    place: Its name in the model, layers by "#"; as the compiler has it.
    kernels: How many run.
    read: Bytes that these read.
    written: Bytes that these write.
  """

  place: str
  kernels: int
  read: int
  written: int

  @property
  def total(self) -> int:
    """Bytes read and written."""
    return self.read + self.written


def measure(hlo: str) -> list[Traffic]:
  """The traffic of a compiled program, by place, the largest first.

  Args:
    hlo: The program's text, `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: The text is no program.
  """
  entry, computations = _parse(hlo)
  sums: dict[str, list[int]] = {}
  for runs, traffic in _kernels(entry, computations):
    total = sums.setdefault(traffic.place, [0, 0, 0])
    for i, value in enumerate((1, traffic.read, traffic.written)):
      total[i] += runs * value
  rows = [
    Traffic(place=place, kernels=kernels, read=read, written=written)
    for place, (kernels, read, written) in sums.items()
  ]
  return sorted(rows, key=lambda row: -row.total)


def _kernels(
  entry: str, computations: Mapping[str, Mapping[str, _Instruction]]
) -> Iterator[tuple[int, Traffic]]:
  """Each kernel with the number of its runs."""
  for instruction in computations[entry].values():
    # What was started asynchronously is counted where it starts.
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      continue
    called = instruction.attribute(r"(?:body|to_apply)=%([\w.\-]+)")
    if instruction.opcode in ("while", "call") and called:
      trips = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1
      for runs, traffic in _kernels(called, computations):
        yield int(trips) * runs, traffic
      continue
    read = _read(instruction, computations[entry], computations)
    yield (
      1,
      Traffic(
        place=_place(instruction),
        kernels=1,
        read=read,
        written=instruction.size,
      ),
    )


def _place(instruction: _Instruction) -> str:
  name = instruction.attribute(r'op_name="([^"]*)"') or instruction.opcode
  return re.sub(r"\d+", "#", name)


def _read(
  instruction: _Instruction,
  around: Mapping[str, _Instruction],
  computations: Mapping[str, Mapping[str, _Instruction]],
) -> int:
  """Bytes of the operands, each counted once, slices by what they take."""
  fused = instruction.attribute(r"calls=%([\w.\-]+)")
  sliced = _sliced(computations[fused]) if fused else {}
  read: dict[str, int] = {}
  for i, name in enumerate(instruction.operands):
    if name in around:
      whole = around[name].size
      taken = read.get(name, 0) + sliced.get(i, whole)
      read[name] = min(whole, taken)
  return sum(read.values())


def _sliced(fused: Mapping[str, _Instruction]) -> dict[int, int]:
  """Bytes taken of the parameters of which a fusion takes slices only."""
  taken = {}
  for parameter in fused.values():
    if parameter.opcode != "parameter":
      continue
    names, readers = {parameter.name}, []
    for other in fused.values():  # In order of their computation.
      if names.isdisjoint(other.operands):
        continue
      if other.opcode in ("bitcast", "reshape"):
        names.add(other.name)
      else:
        readers.append(other)
    if readers and all(reader.opcode == "slice" for reader in readers):
      # The same slice may be there several times.
      each = {r.attribute(r"slice=\{([^}]*)\}"): r.size for r in readers}
      taken[int(parameter.operands[0])] = sum(each.values())
  return taken


def _parse(hlo: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
  """The name of the entry computation, and all computations by name."""
  entry, computations = None, {}
  current: dict[str, _Instruction] = {}
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header.group(2), {})
      entry = header.group(2) if header.group(1) else entry
    elif found := _INSTRUCTION.match(_COMMENT.sub("", line)):
      name, shape, opcode, rest = found.groups()
      operands, rest = rest.split(")", 1)
      current[name] = _Instruction(
        name=name,
        opcode=opcode,
        size=_size(shape),
        operands=tuple(x.split()[-1].lstrip("%") for x in operands.split(", "))
        if operands
        else (),
        rest=rest,
      )
  if entry is None:
    raise ValueError("this is no program: it has no ENTRY computation")
  return entry, computations


@functools.cache
def _size(shape: str) -> int:
  """Bytes of an array, or of all arrays of a tuple."""
  total = 0
  for kind, bits, dims in _SHAPE.findall(shape):
    size = 1 if kind == "pred" else int(bits or 0) // 8
    for dim in filter(None, dims.split(",")):
      size *= int(dim)
    total += size
  return total


def text(rows: Sequence[Traffic], top: int) -> str:
  """A table of the largest rows, with the sum of all."""
  lines = [f"{'GB':>7} {'kernels':>7}  place"]
  total = sum(row.total for row in rows)
  kernels = sum(row.kernels for row in rows)
  shown = [(row.total, row.kernels, row.place) for row in rows[:top]]
  for size, count, place in [(total, kernels, "all"), *shown]:
    lines.append(f"{size / 1e9:7.2f} {count:7d}  {place}")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.throughput.compiled_traffic",
    description="Memory traffic of a model compiled for an H100, without one.",
  )
  add, positive = parser.add_argument, command_line.positive_integer
  add("model", help="name of a model")
  add("--size", type=positive, default=224, help="default: 224")
  add("--batch", type=positive, default=128, help="default: 128")
  add("--mode", choices=get_args(cases.Mode), default="inference")
  add("--dtype", choices=get_args(cases.Dtype), default="bfloat16")
  add("--attention", choices=get_args(cases.Attention))
  add("--top", type=positive, default=20, help="rows to print; default: 20")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")
  case = cases.Case(
    model=args.model,
    size=args.size,
    batch=args.batch,
    mode=args.mode,
    dtype=args.dtype,
    precision="tf32" if args.dtype == "float32" else None,
    attention=args.attention,
  )
  try:
    sharding = compiled_memory.h100()
  except ModuleNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
    program = programs.compile_case(case, sharding)
  print(text(measure(program.compiled.as_text() or ""), args.top))
  return 0


if __name__ == "__main__":
  sys.exit(main())
