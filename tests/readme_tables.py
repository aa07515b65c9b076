"""Writes the generated tables: `python -m tests.readme_tables`.

With --macs the multiply-accumulates of the models are counted first. The tables
are parts of README.md and of the pages in docs/. A part stands between
`<!-- NAME... -->` and `<!-- end of NAME -->`.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import re
import sys
import textwrap
from typing import Any

from experiments import evidence
from experiments.throughput import (
  against_timm,
  compiled_memory,
  report,
  targets,
)
import vimjax
from vimjax import flops, registry
from vimjax.weights import download

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = ROOT / "experiments" / "results"
# Speed and memory of whole models, and where its plots are.
THROUGHPUT = RESULTS / "throughput_cpu.json"
PLOTS = DOCS / "throughput_cpu"
THROUGHPUT_GPU = RESULTS / "throughput_gpu.json"
FAMILIES = ("vim", "vmamba", "mambavision", "deit")


def quick_model(name: str) -> Any:
  """A model with its layers scanned: as many numbers, much less to trace."""
  return registry.with_scan_layers(vimjax.create_model(name), True)


def parameter_count(name: str) -> int:
  """How many numbers a model learns, without computing any."""
  return flops.parameters(vimjax.create_model(name), 32)


def models() -> str:
  """One row per model: the families in turn, each from small to large."""
  macs = _result("model_macs.json")
  rows = [
    "| Name | Parameters | GMACs | Top-1 | Licence of the weights | Commercial "
    "use |",
    "| --- | ---: | ---: | ---: | --- | --- |",
  ]
  for family in FAMILIES:
    counts = {n: parameter_count(n) for n in vimjax.list_models(f"{family}_*")}
    for name in sorted(counts, key=lambda n: (counts[n], n)):
      pretrained = vimjax.get_variant(name).pretrained
      facts = "not published | none published | "
      if pretrained is not None:
        use = "yes" if pretrained.commercial_use else "**no**"
        facts = f"{pretrained.top1:.1f} | {pretrained.license} | {use}"
      work = f"{macs[name]['macs'] / 1e9:.2f}"
      rows.append(f"| `{name}` | {counts[name]:,} | {work} | {facts} |")
  return "\n".join(rows)


def variants(family: str) -> str:
  """One row per model of a family: what it is built with, and its weights."""
  rows = [
    "| Name | Official name | Fields | Top-1, top-5 | Image | Weights |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for name in vimjax.list_models(f"{family}_*"):
    variant = vimjax.get_variant(name)
    fields = ", ".join(f"{k}={v!r}" for k, v in variant.fields.items())
    how, pretrained = variant.preprocessing, variant.pretrained
    accuracy, weights = "not published", "none published"
    if pretrained is not None:
      accuracy = f"{pretrained.top1:.1f}"
      if pretrained.top5 is not None:
        accuracy += f", {pretrained.top5:.1f}"
      page = download.web_page(pretrained)
      if page == pretrained.source:  # A release: the folder is no page.
        page += f"/{pretrained.files[0]}"
      weights = f"[{pretrained.files[0]}]({page})"
    rows.append(
      f"| `{name}` | `{variant.official}` | `{fields}` | {accuracy} | "
      f"{how.size}, {how.crop_mode} {how.crop_fraction:g} | {weights} |"
    )
  return "\n".join(rows) + (
    "\n\nAccuracies on ImageNet-1k in percent, as published by the authors. "
    "Image: side in\npixels, and how `vimjax.preprocess` crops."
  )


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


def small_data() -> str:
  """Test accuracies of four families on two small data sets."""
  result = _result("evidence.json")
  rates = ", ".join(f"{rate:g}" for rate in result["peak_lrs"])
  seeds = ", ".join(str(seed) for seed in result["seeds"])
  tests = {run["dataset"]: run["test_images"] for run in result["runs"]}
  images = " and ".join(f"{n} ({name})" for name, n in tests.items())
  note = (
    f"Percent of the test images, {images}: mean, lowest and highest of seeds "
    f"{seeds}, after {result['epochs']:g} epochs in batches of "
    f"{result['batch_size']}, with the peak learning rate of {rates} that "
    "validation chose. MMACs: millions of multiply-accumulates for an image. "
    f"All {len(result['runs'])} runs are in experiments/results/evidence.json "
    f"({result['device']}, jax {result['versions']['jax']}, {result['date']})."
  )
  return f"{evidence.table(result)}\n\n{textwrap.fill(note, 80)}"


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


def input_bench() -> str:
  """Images per second of one core, beside Pillow's."""
  result = _result("input_bench.json")
  lines = [
    "| Work | Images/s | Pillow | Ratio |",
    "| --- | ---: | ---: | ---: |",
  ]
  lines += [
    f"| {row['work']} | {row['ours']:.0f} | {row['pillow']:.0f} | "
    f"{row['ratio']:.2f} |"
    for row in result["rows"]
  ]
  versions = result["versions"]
  note = (
    "JPEGs of 500 x 375 pixels to 224 x 224, of one core's time, medians of "
    f"{result['rounds']} rounds in turn ({result['device']}, OpenCV "
    f"{versions['opencv-python-headless']}, simplejpeg "
    f"{versions['simplejpeg']}, Pillow {versions['pillow']}, "
    f"{result['date']})."
  )
  return "\n".join(lines) + f"\n\n{textwrap.fill(note, 80)}"


def throughput() -> str:
  """What `experiments.throughput` measured on a CPU, and its plots."""
  facts, rows = report.read(THROUGHPUT)
  growth = "\n".join(f"- {line}" for line in report.growth(rows).splitlines())
  plots = "\n".join(
    f"![{title}]({(PLOTS / name).relative_to(ROOT)})"
    for name, title in (
      ("throughput.png", "Images per second by image size"),
      ("memory.png", "Peak memory by image size"),
      ("accuracy.png", "Published accuracy by images per second"),
    )
  )
  return (
    f"{report.markdown(rows)}\n\n{growth}\n\n"
    "Medians; peak: arguments, results and temporary memory by the compiler's\n"
    "account; full: float32 products in float32. Random weights. Measured on\n"
    f"{facts['device']} ({facts['machine']}, {facts['cores']} cores), jax "
    f"{facts['jax']}, {facts['date'][:10]}.\n\n{plots}"
  )


def throughput_gpu() -> str:
  """What `experiments.throughput --preset gpu` measured."""
  if not THROUGHPUT_GPU.exists():
    return "No GPU figure has been measured yet."
  facts, rows = report.read(THROUGHPUT_GPU)
  lines = [*targets.lines(rows), *report.growth(rows).splitlines()]
  listed = "\n".join(f"- {line}" for line in lines)
  return (
    f"{report.markdown(rows)}\n\n{listed}\n\n"
    f"Measured on {facts['device']}, jax {facts['jax']}, {facts['date'][:10]}."
  )


def model_memory() -> str:
  """What the compiler says that whole models need on an H100."""
  facts, rows = compiled_memory.read(RESULTS / "model_memory_compiled.json")
  return compiled_memory.text(rows, facts)


def cpu_models() -> str:
  """Inference of whole models on a CPU, beside PyTorch's DeiT-Ti."""
  result = _result("cpu_models.json")
  facts = result["environment"]
  rows = [against_timm.Row(**row) for row in result["rows"]]
  return (
    f"{against_timm.markdown(rows)}\n\nInference, float32, medians of "
    f"{result['rounds']} rounds in one run, {facts['threads']} threads of "
    f"{facts['device']}\n({facts['machine']}) that had other work too: only "
    f"ratios mean something.\njax {facts['jax']}, torch {facts['torch']}, timm "
    f"{facts['timm']}, {facts['date'][:10]}."
  )


# Which file each part is in, and what writes it.
PARTS: dict[str, tuple[pathlib.Path, Callable[[], str]]] = {
  "models": (README, models),
  "digits": (README, digits),
  "evidence": (README, small_data),
  "bench": (README, bench),
  "input_bench": (README, input_bench),
  "throughput": (README, throughput),
  "throughput_gpu": (README, throughput_gpu),
  "model_memory": (README, model_memory),
  "cpu_models": (README, cpu_models),
  **{
    family: (DOCS / f"{family}.md", functools.partial(variants, family))
    for family in FAMILIES
  },
}


def _pattern(name: str) -> re.Pattern[str]:
  return re.compile(
    rf"(?s)(<!-- {name}\b[^\n]*-->\n)(.*?)\n?(<!-- end of {name} -->)"
  )


def current(name: str) -> str:
  """A part as it stands."""
  file = PARTS[name][0]
  match = _pattern(name).search(file.read_text())
  if match is None:
    raise ValueError(f"{file} has no part {name!r}")
  return match[2]


def write() -> None:
  """Generates every part anew, and the plots."""
  report.plots(report.read(THROUGHPUT)[1], PLOTS)
  for name, (file, generate) in PARTS.items():
    part = generate()
    file.write_text(
      _pattern(name).sub(
        lambda m, p=part: f"{m[1]}{p}\n{m[3]}", file.read_text()
      )
    )


def write_macs() -> None:
  """Counts the multiply-accumulates of all models anew: minutes."""
  counts = {}
  for name in vimjax.list_models():
    size = vimjax.get_variant(name).preprocessing.size
    model = vimjax.create_model(name)
    total = flops.total(flops.count(model, size).values())
    params = flops.parameters(model, size)
    counts[name] = dict(size=size, params=params, **dataclasses.asdict(total))
  text = json.dumps(counts, indent=2) + "\n"
  (RESULTS / "model_macs.json").write_text(text)


if __name__ == "__main__":
  if "--macs" in sys.argv:
    write_macs()
  write()
