"""Imports go one way: experiments -> vimjax -> pallas_kernels."""

import ast
from collections.abc import Iterator
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORBIDDEN = {
  "pallas_kernels": ("vimjax", "experiments", "tests", "flax", "optax"),
  "vimjax": ("experiments", "tests"),
  "experiments": ("tests",),
}
# What the base packages may import at module level, beside themselves.
BASE = (
  "flax",
  "jax",
  "jaxlib",
  "jaxtyping",
  "numpy",
  "pallas_kernels",
  "vimjax",
)


def _imports(node: ast.AST) -> Iterator[tuple[str, int]]:
  for child in ast.walk(node):
    if isinstance(child, ast.Import):
      for alias in child.names:
        yield alias.name.partition(".")[0], child.lineno
    elif isinstance(child, ast.ImportFrom) and child.module:
      assert child.level == 0, "relative import"
      yield child.module.partition(".")[0], child.lineno


def _is_for_type_checkers(node: ast.AST) -> bool:
  return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _files(package: str) -> list[pathlib.Path]:
  files = sorted((ROOT / package).rglob("*.py"))
  assert files
  return files


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_downwards(package):
  found = [
    f"{path.relative_to(ROOT)}:{line} imports {name}"
    for path in _files(package)
    for name, line in _imports(ast.parse(path.read_text()))
    if name in FORBIDDEN[package]
  ]
  assert not found


@pytest.mark.parametrize("package", ["pallas_kernels", "vimjax"])
def test_module_level_imports_need_only_the_base_installation(package):
  found = [
    f"{path.relative_to(ROOT)}:{line} imports {name}"
    for path in _files(package)
    for statement in ast.parse(path.read_text()).body
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
    and not _is_for_type_checkers(statement)
    for name, line in _imports(statement)
    if name not in BASE and name not in sys.stdlib_module_names
  ]
  assert not found


def _base_distributions() -> set[str]:
  """Names of all distributions that `pip install vimjax` brings."""
  todo, seen = ["jax", "flax", "numpy", "jaxtyping"], set()
  while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in seen:
      continue
    seen.add(name)
    try:
      requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
      continue  # Behind a marker that does not hold here.
    for requirement in requirements:
      if "extra ==" not in requirement:
        todo.append(re.match(r"[\w.-]+", requirement).group())
  return seen


_IMPORT_WITH_BASE_ONLY = """
import importlib.metadata, sys

base = set(sys.argv[1].split(","))
allowed = {"pallas_kernels", "vimjax", *sys.stdlib_module_names}
extra = set()
for module, dists in importlib.metadata.packages_distributions().items():
  names = {d.lower().replace("_", "-").replace(".", "-") for d in dists}
  (allowed if names & base else extra).add(module)

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in extra - allowed:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import pallas_kernels
import vimjax
model = vimjax.create_model("vim_tiny")
print(vimjax.__version__, type(model).__name__)
"""


def test_both_packages_work_with_only_the_base_installed():
  """Every distribution outside the base is hidden from the import system."""
  run = subprocess.run(
    [
      sys.executable,
      "-c",
      _IMPORT_WITH_BASE_ONLY,
      ",".join(_base_distributions()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.split()[1:] == ["Vim"]


def test_a_missing_optional_package_names_its_extra():
  from vimjax import optional

  with pytest.raises(ModuleNotFoundError, match=r"vimjax\[plot\]"):
    optional.require("no_such_package_at_all.sub", extra="plot")
