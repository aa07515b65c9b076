"""Renames and reshapes arrays by rules, and checks that nothing is left over.

A family's rules list every key of its official state dict once. `apply` turns
official arrays into ours. Problems are reported in one message.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array is stored there and here.

  Attributes:
    to_ours: Official array to ours.
    to_official: The exact inverse.
  """

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_official: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
# Linear weights: (out, in) there.
LINEAR = Layout(np.transpose, np.transpose)
# 2-D convolutions: (out, in, h, w) there, (h, w, in, out) here.
CONV2D = Layout(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# Depthwise 1-D convolutions: (d, 1, k) there, (k, d) here.
DEPTHWISE1D = Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None])
# A batch axis of 1 that we do not keep, once and twice.
UNBATCH = Layout(lambda x: x[0], lambda x: x[None])
UNBATCH2 = Layout(lambda x: x[0, 0], lambda x: x[None, None])


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""Where one kind of array goes.

  Attributes:
    pattern: Regular expression that the whole official key matches.
    path: Our path, "/" between levels; \1 stands for the first group. Under
      "batch_stats/" are running statistics, all else are parameters.
    layout: How the array is stored.
  """

  pattern: str
  path: str
  layout: Layout = SAME

  def target(self, key: str) -> str | None:
    """Our path for an official key, or None if the rule is for others."""
    match = re.fullmatch(self.pattern, key)
    return match.expand(self.path) if match else None

  def source(self, path: str) -> str | None:
    """The official key for our path: the inverse of `target`."""
    groups = _GROUP.findall(self.pattern)
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
      number = match[1]
      if number in seen:
        return f"(?P=g{number})"
      seen.add(number)
      return f"(?P<g{number}>{groups[int(number) - 1]})"

    match = re.fullmatch(_REFERENCE.sub(group, self.path), path)
    if match is None:
      return None
    numbers = iter(range(1, len(groups) + 1))
    key = _GROUP.sub(lambda _: match[f"g{next(numbers)}"], self.pattern)
    return key.replace(r"\.", ".")


# Patterns and paths are plain names with groups: they can be turned around.
_GROUP = re.compile(r"\(([^()]*)\)")
_REFERENCE = re.compile(r"\\(\d)")
# A file of another model has hundreds; a layer has fewer.
_MOST_PROBLEMS = 40


def listed(problems: Sequence[str]) -> str:
  """Lines of a message, of very many the first ones."""
  lines = list(problems[:_MOST_PROBLEMS])
  if len(problems) > len(lines):
    lines.append(f"and {len(problems) - len(lines)} more")
  return "".join(f"\n  {line}" for line in lines)


def share(
  rules: Sequence[Rule], ignored: Mapping[str, str], keys: Collection[str]
) -> float:
  """The share of the official keys that the rules know."""
  known = [
    any(r.target(key) for r in rules)
    or any(re.fullmatch(pattern, key) for pattern in ignored)
    for key in keys
  ]
  return sum(known) / max(1, len(known))


def apply(
  rules: Sequence[Rule],
  ignored: Mapping[str, str],
  state_dict: Mapping[str, np.ndarray],
  wanted: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Converts official arrays.

  Args:
    rules: Each official key matches exactly one.
    ignored: Patterns of official keys that have no place here, and why.
    state_dict: Official keys and arrays.
    wanted: Our paths and what belongs there (anything with shape and dtype).

  Returns:
    Our paths and arrays, cast to the wanted dtypes, and all problems found.
  """
  params, problems, source = {}, [], {}
  for key, value in state_dict.items():
    targets = [(r.target(key), r.layout) for r in rules if r.target(key)]
    if not targets:
      if not any(re.fullmatch(pattern, key) for pattern in ignored):
        problems.append(f"unexpected {key} {value.shape}")
      continue
    if len(targets) > 1:
      problems.append(f"{key} matches {len(targets)} rules")
      continue
    path, layout = targets[0]
    if path not in wanted:
      problems.append(f"unexpected {key} {value.shape}: no {path} here")
    elif path in params:
      problems.append(f"{key} and {source[path]} both fill {path}")
    else:
      source[path] = key
      params[path], problem = _fit(key, value, layout, wanted[path])
      problems += problem
  problems += [
    f"missing {path} {tuple(leaf.shape)}"
    for path, leaf in wanted.items()
    if path not in params
  ]
  return params, problems


def invert(
  rules: Sequence[Rule], ours: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Converts our arrays to official ones: the exact inverse of `apply`.

  Args:
    rules: As for `apply`.
    ours: Our paths and arrays.

  Returns:
    Official keys and arrays in the rules' order, and all problems found.
  """
  found: list[dict[str, np.ndarray]] = [{} for _ in rules]
  problems = []
  for path, value in ours.items():
    sources = [(i, r.source(path)) for i, r in enumerate(rules)]
    sources = [(i, key) for i, key in sources if key]
    if len(sources) != 1:
      problems.append(
        f"{path} {value.shape} matches {len(sources)} rules"
        if sources
        else f"unknown {path} {value.shape}"
      )
      continue
    ((i, key),) = sources
    found[i][key] = rules[i].layout.to_official(value)
  return {k: v for part in found for k, v in part.items()}, problems


def _fit(
  key: str, value: np.ndarray, layout: Layout, leaf: Any
) -> tuple[np.ndarray, list[str]]:
  """Brings an array into our layout and dtype, or says why it cannot."""
  official = layout.to_official(np.empty(leaf.shape, bool)).shape
  if value.shape != official:
    return value, [f"{key} has shape {value.shape}, expected {official}"]
  if not _is_float(value.dtype):
    return value, [f"{key} has dtype {value.dtype}, expected a float"]
  return layout.to_ours(value).astype(leaf.dtype, copy=False), []


def _is_float(dtype: np.dtype) -> bool:
  # ml_dtypes' bfloat16 is of kind "V", as are structured dtypes.
  return dtype.kind == "f" or dtype.name == "bfloat16"
