"""Reads NVIDIA machine code: instructions, loops, and what they cost.

The text is that of `nvdisasm` with control codes, as the compiler of Mosaic GPU
kernels dumps it: labels, and lines such as

  -:-:-:Y:04    /*0120*/    @P0 FFMA R1, R2, R3, R4

whose control code ends in the cycles that the warp waits after issuing it.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Final

EXPONENTIAL: Final = "MUFU.EX2"

_INSTRUCTION = re.compile(
  r"(?::(?P<stall>\d+)\s+)?/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;?\s*$"
)
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


@dataclasses.dataclass(frozen=True)
class Loop:
  """The instructions of a loop, those of loops inside it included.

  Or of a block with exponentials that a branch may skip: what the compiler
  makes of a loop which it knows to run at most once.

  Attributes:
    start: Index of its first instruction in the kernel.
    opcodes: How often each instruction occurs, without modifiers ("FFMA");
      of the special function unit with the function ("MUFU.EX2").
    stall_cycles: Cycles that a warp waits after issuing them, one by one. What
      it waits for loads comes on top.
    repeats: Whether it is a loop.
  """

  start: int
  opcodes: collections.Counter[str]
  stall_cycles: int
  repeats: bool = True

  @property
  def exponentials(self) -> int:
    return self.opcodes[EXPONENTIAL]

  @property
  def instructions(self) -> int:
    return self.opcodes.total()

  @property
  def special_functions(self) -> int:
    """Instructions of the unit for exponentials, reciprocals and the like."""
    return sum(
      count for name, count in self.opcodes.items() if name.startswith("MUFU")
    )

  def has(self, other: "Loop") -> bool:
    """Whether another loop is inside this one."""
    end, other_end = (x.start + x.instructions for x in (self, other))
    inside = self.start <= other.start and other_end <= end
    return inside and other.instructions < self.instructions


def parse(text: str) -> tuple[collections.Counter[str], tuple[Loop, ...]]:
  """How often each instruction of a kernel occurs, and all its `Loop`s."""
  opcodes: list[str] = []
  stalls: list[int] = []
  branches: list[tuple[int, str]] = []
  labels: dict[str, int] = {}
  for line in text.splitlines():
    if match := _INSTRUCTION.search(line):
      if branch := _BRANCH.search(match["text"]):
        branches.append((len(opcodes), branch.group(1)))
      opcodes.append(_opcode(match["text"]))
      stalls.append(int(match["stall"] or 0))
    elif match := _LABEL.match(line):
      labels[match.group(1)] = len(opcodes)

  ends: dict[int, int] = {}  # By start: several branches may close a loop.
  for end, label in branches:
    start = labels.get(label, end)
    # Code after the end of the kernel, for barriers that have to wait, jumps
    # back too; and a kernel ends by jumping to itself.
    if start < end and "EXIT" not in opcodes[start:end]:
      ends[start] = end + 1
  loops = [(start, end, True) for start, end in ends.items()]
  for start, label in branches:
    end = labels.get(label, start)
    block = opcodes[start + 1 : end]
    if EXPONENTIAL in block and not {"BRA", "EXIT"} & {*block}:
      loops.append((start + 1, end, False))
  return collections.Counter(opcodes), tuple(
    Loop(
      start, collections.Counter(opcodes[start:end]), sum(stalls[start:end]), x
    )
    for start, end, x in loops
  )


def _opcode(text: str) -> str:
  name, *modifiers = _PREDICATE.sub("", text).split()[0].split(".")
  return f"{name}.{modifiers[0]}" if name == "MUFU" else name


def nests(loops: Sequence[Loop]) -> list[tuple[Loop, ...]]:
  """The loops that do a kernel's work, outermost first, for each of its paths.

  Those that compute exponentials: the one with the most instructions, then the
  one with the most inside it, and so on. A kernel may have another such nest
  beside it, for blocks with other work; it counts if it is half as long.
  """
  working = [loop for loop in loops if loop.repeats and loop.exponentials]
  tops = [x for x in working if not any(y.has(x) for y in working)]
  longest = max((loop.instructions for loop in tops), default=0)
  return [
    _chain(top, working) for top in tops if 2 * top.instructions >= longest
  ]


def _chain(top: Loop, working: Sequence[Loop]) -> tuple[Loop, ...]:
  inside = [loop for loop in working if top.has(loop)]
  if not inside:
    return (top,)
  largest = max(inside, key=lambda loop: loop.instructions)
  return (top, *_chain(largest, inside))


def per_step(
  loops: Sequence[Loop],
  nest: Sequence[Loop],
  steps: Sequence[float],
  measure: Callable[[Loop], int],
) -> float:
  """What a step of a kernel's work costs, all levels of its loops included.

  A loop beside a working one, for the last tokens of a tile that is not full,
  is taken as never run; and so is a block that may be skipped, if it has at
  most half as many exponentials.

  Args:
    loops: All loops of the kernel.
    nest: One of `nests`.
    steps: The steps of work in an iteration of each of its loops.
    measure: The cost of a loop's code, as `Loop.instructions`.
  """
  cost = 0.0
  for depth, (loop, count) in enumerate(zip(nest, steps, strict=True)):
    own = measure(loop)
    if depth + 1 < len(nest):
      most = nest[depth + 1].exponentials / 2
      inside = [
        x
        for x in loops
        if loop.has(x) and (x.repeats or x.exponentials <= most)
      ]
      direct = [x for x in inside if not any(y.has(x) for y in inside)]
      own -= sum(measure(x) for x in direct)
    cost += own / count
  return cost
