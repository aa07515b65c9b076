"""What the README shows is true: its code runs, its tables are current."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
from PIL import Image
import pytest

from experiments.imagenet import errors
from tests import doc_blocks, readme_tables
import vimjax
from vimjax import export
from vimjax.weights import checkpoint_files

TEXT = readme_tables.README.read_text()
CI = (readme_tables.ROOT / ".ci" / "run").read_text()
_HERE = "tests/readme_test.py"
_TRAIN = "python -m experiments.imagenet --config"
# Where each command of the README is run: the text to look for in .ci/run, or
# a test.
COMMANDS = {
  "make demo": "make demo",
  "make test": "make test",
  "pip install .": "dist/*.whl",
  # Several GB, and of use on a GPU machine only: its name is tested below.
  "pip install '.[cuda]'": _HERE,
  "pip install '.[weights,image]'": "dist/*.whl)[weights,image]",
  "pip install '.[train,plot]'": "make demo",
  "python -m vimjax.convert --model vim_tiny in.pth out.safetensors": _HERE,
  "python -m vimjax.convert --model vim_tiny --to-torch out.safetensors "
  "back.pth": _HERE,
  "python -m vimjax.predict cat.jpg --model vim_tiny": _HERE,
  "python -m vimjax.visualize scan cat.jpg --model vim_tiny --output "
  "scan.png": _HERE,
  "python -m vimjax.flops vim_tiny --json": _HERE,
  "python -m vimjax.export vim_tiny --weights in.pth --output "
  "vim.stablehlo": _HERE,
  "python -m vimjax.export vim_tiny --weights in.pth --format onnx --output "
  "vim.onnx": _HERE,
  "python -m experiments.throughput --preset cpu --json throughput.json": (
    "experiments.throughput --preset cpu --json"
  ),
  # PyTorch and timm are several GB; the test does without them.
  "python -m experiments.throughput.against_timm": (
    "tests/experiments/against_timm_test.py"
  ),
  "python -m pallas_kernels.bench": "pallas_kernels.bench",
  f"{_TRAIN} vim_tiny:smoke --workdir runs/smoke": "--config vim_tiny:smoke",
  "python -m experiments.prepare_imagenet --tar_dir ~/ILSVRC2012": (
    "tests/experiments/prepare_imagenet_test.py"
  ),
  # These need trained weights; the test takes other ones and tiny models.
  f"{_TRAIN} finetune --config.data.folder=photos --workdir runs/mine": (
    "tests/experiments/finetune_test.py"
  ),
  "python -m experiments.evaluate --model vim_tiny --weights "
  "runs/mine/weights.safetensors --data photos --split validation": (
    "tests/experiments/evaluate_test.py"
  ),
  "python -m experiments.report runs/mine": (
    "tests/experiments/report_test.py"
  ),
  "python -m experiments.input_bench": (
    "tests/experiments/input_bench_test.py"
  ),
  # An hour; the test takes one family, one data set and two steps.
  "python -m experiments.evidence --workdir runs/evidence": (
    "tests/experiments/evidence_test.py"
  ),
  # In two processes on one machine, with a tiny model.
  f"{_TRAIN} vim_tiny --workdir runs/vim_tiny --coordinator host0:4321 "
  "--num_processes 2 --process_id 0": "tests/experiments/multihost_test.py",
  f"{_TRAIN} vim_tiny --workdir runs/vim_tiny --coordinator host0:4321 "
  "--num_processes 2 --process_id 1": "tests/experiments/multihost_test.py",
  # Without ImageNet it can only say what is missing.
  f"{_TRAIN} vim_tiny --workdir runs/vim_tiny": "--config vim_tiny --workdir",
}


def test_every_command_is_run_by_ci_or_a_test():
  blocks = doc_blocks.blocks(readme_tables.README, "bash")
  commands = [line for block in blocks for line in block.splitlines()]
  assert sorted(commands) == sorted(COMMANDS)
  for where in COMMANDS.values():
    if where.startswith("tests/"):
      assert (readme_tables.ROOT / where).exists()
    else:
      assert where in CI


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The files that the README speaks of, and two published checkpoints."""
  folder = tmp_path_factory.mktemp("readme")
  Image.new("RGB", (90, 60), "orange").save(folder / "cat.jpg")
  state_dict = doc_blocks.official_weights("vim_tiny")
  tree = {"model": state_dict, "model_ema": state_dict}
  doc_blocks.write_checkpoint(folder / "in.pth", tree)
  other = doc_blocks.official_weights("mambavision_tiny")
  published = {"vim_tiny": state_dict, "mambavision_tiny": other}
  for name, arrays in published.items():
    file = vimjax.get_variant(name).pretrained.files[0]
    doc_blocks.write_checkpoint(folder / file, arrays)
  return folder


_PYTHON = doc_blocks.blocks(readme_tables.README, "python")


@pytest.mark.parametrize("block", _PYTHON, ids=range(len(_PYTHON)))
def test_python_code_runs_and_shapes_are_as_said(
  block, folder, monkeypatch, capsys
):
  monkeypatch.chdir(folder)
  doc_blocks.publish(monkeypatch, folder)
  doc_blocks.run(block, {})
  printed = capsys.readouterr().err
  assert ("CC-BY-NC-SA-4.0" in printed) == ("accept_license" in block)


def _run(command, folder):
  """Runs a command of the README where its files are, without a network."""
  assert command in COMMANDS
  python, *arguments = shlex.split(command)
  assert python == "python"
  run = subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env={
      **os.environ,
      "PYTHONPATH": str(readme_tables.ROOT),
      "HF_HOME": str(folder / "cache"),
      "HF_HUB_OFFLINE": "1",
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  return run


def test_convert_there_and_back(folder):
  convert = "python -m vimjax.convert --model vim_tiny"
  _run(f"{convert} in.pth out.safetensors", folder)
  _run(f"{convert} --to-torch out.safetensors back.pth", folder)
  there, back = (
    checkpoint_files.read_state_dict(folder / name)
    for name in ("in.pth", "back.pth")
  )
  assert set(back) == set(there)


def test_predict_with_a_downloaded_checkpoint(folder):
  published = vimjax.get_variant("vim_tiny").pretrained
  # As the library keeps what it has downloaded.
  repository = "models--" + published.source.replace("/", "--")
  cached = folder / "cache" / "hub" / repository
  commit = "0" * 40
  (cached / "refs").mkdir(parents=True)
  (cached / "refs" / "main").write_text(commit)
  (cached / "snapshots" / commit).mkdir(parents=True)
  (folder / published.files[0]).rename(
    cached / "snapshots" / commit / published.files[0]
  )
  run = _run("python -m vimjax.predict cat.jpg --model vim_tiny", folder)
  assert "licence Apache-2.0" in run.stderr
  name, *rows = run.stdout.splitlines()
  assert name == "cat.jpg"
  # All weights are zero, all classes equally probable.
  assert [row.split()[:2] for row in rows] == [["0.10", "%"]] * 5


def test_visualize_count_and_export(folder):
  _run(
    "python -m vimjax.visualize scan cat.jpg --model vim_tiny --output "
    "scan.png",
    folder,
  )
  with Image.open(folder / "scan.png") as picture:
    assert picture.size == (448, 224)
  run = _run("python -m vimjax.flops vim_tiny --json", folder)
  assert json.loads(run.stdout.splitlines()[-1])["params"] == 7148008
  _run(
    "python -m vimjax.export vim_tiny --weights in.pth --output vim.stablehlo",
    folder,
  )
  program = export.load_exported((folder / "vim.stablehlo").read_bytes())
  logits = program(np.ones((2, 224, 224, 3), np.float32))
  assert logits.shape == (2, 1000)
  # All weights are zero.
  assert (np.asarray(logits) == 0).all()


def test_export_to_onnx(folder):
  runtime = pytest.importorskip("onnxruntime", reason="needs the extra `dev`")
  _run(
    "python -m vimjax.export vim_tiny --weights in.pth --format onnx --output "
    "vim.onnx",
    folder,
  )
  session = runtime.InferenceSession(folder / "vim.onnx")
  images = np.ones((2, 224, 224, 3), np.float32)
  (logits,) = session.run(["logits"], {"images": images})
  assert logits.shape == (2, 1000)
  # All weights are zero.
  assert (logits == 0).all()


@pytest.mark.parametrize(
  "name",
  [
    *("models", "digits", "evidence", "input_bench", "bench"),
    *("throughput", "throughput_gpu", "model_memory"),
  ],
)
def test_generated_parts_are_current(name):
  file, generate = readme_tables.PARTS[name]
  assert file == readme_tables.README
  assert readme_tables.current(name) == generate()


def test_pictures_are_there_and_small():
  pictures = re.findall(r"!\[[^]]+\]\((docs/[^)]+\.png)\)", TEXT)
  assert len(pictures) == 3
  for name in pictures:
    assert (readme_tables.ROOT / name).stat().st_size < 60_000


def test_the_table_has_every_model():
  assert sorted(re.findall(r"(?m)^\| `(\w+)` \| [\d,]+ \|", TEXT)) == (
    vimjax.list_models()
  )


def test_exit_codes_are_listed():
  codes = [int(code) for code in re.findall(r"(?m)^\| (\d+) \|", TEXT)]
  assert codes == sorted(errors.ExitCode)


def test_the_cuda_extra_is_jax_with_cuda_at_the_base_version():
  text = (readme_tables.ROOT / "pyproject.toml").read_text()
  project = tomllib.loads(text)["project"]
  base = next(d for d in project["dependencies"] if d.startswith("jax>"))
  assert project["optional-dependencies"]["cuda"] == [
    base.replace("jax", "jax[cuda13]", 1)
  ]
