"""`python -m vimjax.convert`: there, back, and what it refuses."""

import logging
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
  assert "deit_tiny: if derived from the published weights, " in output
  assert "licence Apache-2.0" in output
  assert "wrote out.safetensors (152 arrays)" in output
  with safetensors.safe_open(folder / "out.safetensors", "np") as file:
    metadata = file.metadata()
    assert file.get_tensor("params/head/kernel").shape == (192, 3)
  assert metadata["model"] == "deit_tiny"
  assert metadata["published_license"] == "Apache-2.0"
  assert metadata["published_commercial_use"] == "true"
  assert metadata["published_source"].startswith("https://")
  assert metadata["converted_from"] == "in.pth"
  assert metadata["image_size"] == "224x224"
  assert "license" not in metadata  # Whose weights these are is not known.


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
  message = _error(
    capsys, "--model", "mambavision_tiny", "--to-torch", ours, new
  )
  assert "These are no variables of a MambaVision" in message
  assert "The file is of vimjax.create_model('deit_tiny')." in message
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
  shape = checkpoint_files.read_state_dict(back)["pos_embed"].shape
  assert shape == (1, 17, 192)
  # Our files say their size: it need not be given.
  again = tmp_path / "again.safetensors"
  arguments = ["--model", "deit_tiny", "--to-torch", str(new), str(again)]
  assert convert.main(arguments) == 0
  assert checkpoint_files.read_metadata(again)["image_size"] == "64x64"


def test_metadata_of_our_own_files_is_carried_over(files, tmp_path):
  variables = checkpoint_files.unflatten(
    checkpoint_files.read_state_dict(files[0] / "out.safetensors")
  )
  ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
  said = {"license": "mine", "converted_from": "x.pth", "weights": "ema"}
  checkpoint_files.save_variables(ours, variables, metadata=said)
  named = ["--model", "deit_tiny", "--to-torch"]
  assert convert.main([*named, str(ours), str(back)]) == 0
  metadata = checkpoint_files.read_metadata(back)
  assert said.items() <= metadata.items()
  assert metadata["format"] == "pt"
  again = tmp_path / "again.safetensors"
  assert convert.main(["--model", "deit_tiny", str(back), str(again)]) == 0
  metadata = checkpoint_files.read_metadata(again)
  assert said.items() <= metadata.items()
  assert "format" not in metadata
  # What others say of their files stays there.
  foreign = checkpoint_files.read_state_dict(back)
  checkpoint_files.write_safetensors(ours, foreign, {"license": "theirs"})
  assert convert.main(["--model", "deit_tiny", str(ours), str(again)]) == 0
  assert "license" not in checkpoint_files.read_metadata(again)


def test_only_this_package_speaks(files, tmp_path, capsys):
  new = str(tmp_path / "new.safetensors")
  named = ["--model", "deit_tiny", "--image-size", "64"]
  handlers = list(logging.getLogger().handlers)

  def speak(*args, **kwargs):
    logging.getLogger("pallas_kernels").info("selective_scan runs as xla")
    return original(*args, **kwargs)

  original = checkpoint_files.save_variables
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint_files, "save_variables", speak)
    assert convert.main([*named, str(files[0] / "in.pth"), new]) == 0
  output = capsys.readouterr()
  assert "Resizing pos_embed from a grid of 14x14 to 4x4.\n" in output.err
  assert "runs as" not in output.err + output.out
  assert logging.getLogger().handlers == handlers
  assert not logging.getLogger("vimjax").handlers


@pytest.mark.parametrize("value", ["0", "-1", "x", "2.5"])
def test_the_image_size_is_a_positive_integer(value, capsys):
  arguments = ["--model", "vmamba_tiny_s1l8", "--image-size", value, "a", "b"]
  with pytest.raises(SystemExit, match="2"):
    convert.main(arguments)
  message = f"--image-size: '{value}' is no positive integer"
  assert message in capsys.readouterr().err


def test_an_image_size_where_it_makes_no_difference(tmp_path):
  """Any size works for VMamba and MambaVision, in both directions."""
  keys = golden_data.load_json("vmamba", "keys")["vmamba_tiny_s1l8"]
  official = {
    key: np.zeros(shape, np.float32)
    for key, shape in golden_data.expand_keys(keys).items()
  }
  torch_writer.write(tmp_path / "in.pth", official)
  ours, back = (str(tmp_path / n) for n in ("x.safetensors", "back.pth"))
  named = ["--model", "vmamba_tiny_s1l8", "--image-size", "64"]
  assert convert.main([*named, str(tmp_path / "in.pth"), ours]) == 0
  assert "image_size" not in checkpoint_files.read_metadata(ours)
  assert convert.main([*named, "--to-torch", ours, back]) == 0


def test_a_dtype_that_pytorch_does_not_have(files, tmp_path, capsys):
  state_dict = checkpoint_files.read_state_dict(files[0] / "out.safetensors")
  rows = {k: v.astype(np.uint16) for k, v in state_dict.items()}
  ours = tmp_path / "x.safetensors"
  checkpoint_files.write_safetensors(ours, rows, {})
  named = ["--model", "deit_tiny", "--to-torch"]
  error = _error(capsys, *named, ours, tmp_path / "x.pth")
  assert error == "error: PyTorch has no dtype uint16.\n"
