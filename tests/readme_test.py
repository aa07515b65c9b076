"""What the README shows is true: its code runs, its tables are current."""

import re
import tomllib

import pytest

from experiments.imagenet import errors
from tests import readme_tables

TEXT = readme_tables.README.read_text()
CI = (readme_tables.ROOT / ".ci" / "run").read_text()
_TRAIN = "python -m experiments.imagenet --config"
# Where each command of the README is run: the text to look for in .ci/run, or
# a test.
COMMANDS = {
  "make demo": "make demo",
  "make test": "make test",
  "pip install .": "dist/*.whl",
  # Several GB, and of use on a GPU machine only: its name is tested below.
  "pip install '.[cuda]'": "tests/readme_test.py",
  "pip install '.[train,plot]'": "make demo",
  "python -m pallas_kernels.bench": "pallas_kernels.bench",
  f"{_TRAIN} vim_tiny:smoke --workdir runs/smoke": "--config vim_tiny:smoke",
  "python -m experiments.prepare_imagenet --tar_dir ~/ILSVRC2012": (
    "tests/experiments/prepare_imagenet_test.py"
  ),
  # Without ImageNet it can only say what is missing.
  f"{_TRAIN} vim_tiny --workdir runs/vim_tiny": "--config vim_tiny --workdir",
}


def _blocks(language: str) -> list[str]:
  return re.findall(rf"(?ms)^```{language}\n(.*?)^```", TEXT)


def test_every_command_is_run_by_ci_or_a_test():
  commands = [line for block in _blocks("bash") for line in block.splitlines()]
  assert sorted(commands) == sorted(COMMANDS)
  for where in COMMANDS.values():
    if where.startswith("tests/"):
      assert (readme_tables.ROOT / where).exists()
    else:
      assert where in CI


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_code_runs_and_shapes_are_as_said(block):
  names: dict[str, object] = {}
  exec(compile(block, "README.md", "exec"), names)
  said = re.findall(r"(?m)^(\w+) = .*# (\([\d, ]+\))$", block)
  assert {n: str(getattr(names[n], "shape", None)) for n, _ in said} == dict(
    said
  )


@pytest.mark.parametrize("name", readme_tables.PARTS)
def test_generated_parts_are_current(name):
  assert readme_tables.current(name) == readme_tables.PARTS[name]()


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
