"""`python -m vimjax.convert`: there, back, and what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors

from tests import golden_data
from vimjax import convert
from vimjax.weights import checkpoint_files, torch_writer


def _official():
  keys = golden_data.load_json("deit", "keys")["deit_tiny_patch16_224"]
  state_dict = golden_data.make_state_dict(golden_data.expand_keys(keys))
  # Three classes: a model that was fine-tuned.
  return state_dict | {
    key: state_dict[key][:3] for key in ("head.weight", "head.bias")
  }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """An official checkpoint, and ours made of it by the real command."""
  folder = tmp_path_factory.mktemp("files")
  torch_writer.write(folder / "in.pth", _official())
  run = subprocess.run(
    [sys.executable, "-m", "vimjax.convert", "--model", "deit_tiny"]
    + ["in.pth", "out.safetensors"],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  return folder, run.stdout


def _assert_official(path):
  state_dict = checkpoint_files.read_state_dict(path)
  want = _official()
  assert set(state_dict) == set(want)
  for key, value in want.items():
    np.testing.assert_array_equal(state_dict[key], value, strict=True)


def test_there(files):
  folder, output = files
  assert "licence Apache-2.0" in output
  assert "wrote out.safetensors (152 arrays)" in output
  with safetensors.safe_open(folder / "out.safetensors", "np") as file:
    metadata = file.metadata()
    assert file.get_tensor("params/head/kernel").shape == (192, 3)
  assert metadata["model"] == "deit_tiny"
  assert metadata["license"] == "Apache-2.0"
  assert metadata["commercial_use"] == "true"
  assert metadata["source"].startswith("https://")
  assert metadata["converted_from"] == "in.pth"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_and_back(files, suffix, tmp_path):
  back = tmp_path / f"back{suffix}"
  ours = str(files[0] / "out.safetensors")
  assert (
    convert.main(["--model", "deit_tiny", "--to-torch", ours, str(back)]) == 0
  )
  _assert_official(back)
  assert list(tmp_path.iterdir()) == [back]


def _error(capsys, *arguments):
  assert convert.main([str(argument) for argument in arguments]) == 1
  return capsys.readouterr().err


def test_what_is_refused(files, tmp_path, capsys):
  folder, _ = files
  official, ours = folder / "in.pth", folder / "out.safetensors"
  new = tmp_path / "new.safetensors"
  named = ("--model", "deit_tiny")
  assert "does not fit DeiT" in _error(
    capsys, "--model", "deit_small", official, new
  )
  assert "do not fit DeiT" in _error(
    capsys, "--model", "deit_small", "--to-torch", ours, new
  )
  assert "Unknown variables" in _error(
    capsys, "--model", "mambavision_tiny", "--to-torch", ours, new
  )
  assert "official names already" in _error(
    capsys, *named, "--to-torch", official, new
  )
  assert "model_ema" in _error(
    capsys, *named, "--weights", "ema", official, new
  )
  assert "should end in one of .safetensors." in _error(
    capsys, *named, official, tmp_path / "x.pth"
  )
  assert "replace the input" in _error(capsys, *named, ours, ours)
  assert "does not exist" in _error(
    capsys, *named, official, tmp_path / "no" / "x.safetensors"
  )
  assert "No such file" in _error(capsys, *named, tmp_path / "no.pth", new)
  assert not list(tmp_path.iterdir())
  with pytest.raises(SystemExit) as caught:
    convert.main(["--model", "deit", str(official), str(new)])
  assert caught.value.code == 2


def test_another_image_size(files, tmp_path):
  new = tmp_path / "new.safetensors"
  named = ["--model", "deit_tiny", "--image-size", "64"]
  assert convert.main([*named, str(files[0] / "in.pth"), str(new)]) == 0
  with safetensors.safe_open(new, "np") as file:
    assert file.get_tensor("params/pos_embed").shape == (17, 192)
  back = tmp_path / "back.pth"
  assert convert.main([*named, "--to-torch", str(new), str(back)]) == 0
  assert checkpoint_files.read_state_dict(back)["pos_embed"].shape == (
    1,
    17,
    192,
  )
