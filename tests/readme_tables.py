"""Writes the generated parts of README.md: `python -m tests.readme_tables`.

A part stands between `<!-- NAME... -->` and `<!-- end of NAME -->`.
"""

from collections.abc import Callable
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

import vimjax

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "results"


def parameter_count(name: str) -> int:
  """How many numbers a model learns, without computing any."""
  model = vimjax.create_model(name)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def models() -> str:
  """One row per model."""
  rows = [
    "| Name | Parameters | ImageNet-1k top-1, published | Official weights |",
    "| --- | ---: | ---: | --- |",
  ]
  for name in vimjax.list_models():
    pretrained = vimjax.get_variant(name).pretrained
    accuracy, weights = "not published", "none"
    if pretrained is not None:
      accuracy = f"{pretrained.top1:.1f}"
      use = "" if pretrained.commercial_use else ", non-commercial"
      weights = f"{pretrained.license}{use}"
    rows.append(
      f"| `{name}` | {parameter_count(name):,} | {accuracy} | {weights} |"
    )
  return "\n".join(rows)


def _result(name: str) -> Any:
  return json.loads((RESULTS / name).read_text())


def digits() -> str:
  """Test accuracies of several seeds."""
  result = _result("digits.json")
  runs = result["runs"]
  seeds = ", ".join(str(run["seed"]) for run in runs)
  return (
    f"Seeds {seeds}: mean accuracy {result['mean']:.4f}, from "
    f"{result['lowest']:.4f} to {result['highest']:.4f}, on "
    f"{runs[0]['test_images']} test images after "
    f"{runs[0]['steps']} steps of {result['batch_size']} images "
    f"({result['device']}, jax {result['versions']['jax']}, {result['date']})."
  )


def bench() -> str:
  """Ratios to the baseline, forward plus backward, on a CPU."""
  result = _result("selective_scan_cpu.json")
  facts = result["environment"]
  lines = [
    "| Call | Implementation | Speed | Temporary memory |",
    "| --- | --- | ---: | ---: |",
  ]
  lines += [
    f"| `{row['spec']}` | `{row['implementation']}` | {row['speedup']:.1f} x | "
    f"1/{row['memory_ratio']:.1f} |"
    for row in result["rows"]
    if row["direction"] == "forward+backward"
    and row["implementation"] != "baseline"
  ]
  return "\n".join(lines) + (
    "\n\nForward plus backward, medians, relative to the baseline, float32, on "
    f"{facts['device']} ({facts['machine']}), jax {facts['jax']}, "
    f"{facts['date'][:10]}."
  )


PARTS: dict[str, Callable[[], str]] = {
  "models": models,
  "digits": digits,
  "bench": bench,
}


def _pattern(name: str) -> re.Pattern[str]:
  return re.compile(
    rf"(?s)(<!-- {name}\b[^\n]*-->\n)(.*?)\n?(<!-- end of {name} -->)"
  )


def current(name: str) -> str:
  """The part of the README as it stands."""
  match = _pattern(name).search(README.read_text())
  if match is None:
    raise ValueError(f"{README} has no part {name!r}")
  return match[2]


def write() -> None:
  """Generates every part anew."""
  text = README.read_text()
  for name, generate in PARTS.items():
    part = generate()
    text = _pattern(name).sub(lambda m, p=part: f"{m[1]}{p}\n{m[3]}", text)
  README.write_text(text)


if __name__ == "__main__":
  write()
