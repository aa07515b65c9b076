"""Runs the code of README.md and of the pages in docs/.

A line that ends in a comment such as `# (1, 10)` says the shape of what it
assigns or evaluates, and that is checked.
"""

import ast
import pathlib
import pickle
import re
from typing import Any
import zipfile

import huggingface_hub
import jax
import numpy as np

from tests import readme_tables
import vimjax
from vimjax.weights import download

_SAID = re.compile(r"# (\([\d, ]+\))$")


def blocks(path: pathlib.Path, language: str) -> list[str]:
  """What is fenced as that language, in order."""
  return re.findall(rf"(?ms)^```{language}\n(.*?)^```", path.read_text())


def run(block: str, names: dict[str, Any]) -> None:
  """Runs a block with these names, and checks the shapes that it says."""
  lines = block.splitlines()
  for node in ast.parse(block).body:
    code = compile(ast.Module([node], []), "documentation", "exec")
    exec(code, names)
    said = _SAID.search(lines[node.end_lineno - 1])
    if said:
      shown = node.targets[0] if isinstance(node, ast.Assign) else node.value
      assert str(names[shown.id].shape) == said[1], ast.unparse(node)


def official_weights(name: str) -> dict[str, np.ndarray]:
  """A state dict of the official form, all numbers zero."""
  model = readme_tables.quick_model(name)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return vimjax.export_state_dict(model, zeros)


def write_checkpoint(path: pathlib.Path, tree: dict[str, Any]) -> None:
  """Writes a file like `torch.save`, with arrays in place of tensors."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", pickle.dumps(tree, protocol=2))


def publish(monkeypatch: Any, folder: pathlib.Path) -> None:
  """Lets downloads of published weights find files of a folder instead."""

  def refuse(*args, **kwargs):
    raise OSError("The tests do not use the network.")

  found = lambda repository, file: str(folder / file)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
  monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
  from_release = lambda published: folder / published.files[0]
  monkeypatch.setattr(download, "_from_release", from_release)
