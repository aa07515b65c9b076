"""Accuracy from a file of weights: which images, and how they are prepared."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from experiments import evaluate
from experiments.imagenet import errors, initial
from experiments.imagenet import run as run_lib
from experiments.imagenet.configs import finetune
import vimjax
from vimjax import registry
from vimjax.weights import checkpoint_files, pretrained, trained

_TINY = {
  "vim_tiny": {"depth": 1, "embed_dim": 16},
  "mambavision_tiny2": {"depths": (1, 1, 1, 1), "dim": 8, "in_dim": 8},
}
_DONE = {
  "loss": 1.0,
  "accuracy": 0.5,
  "top5_accuracy": 1.0,
  "examples": 3,
  "unreadable": 0,
}


def _variables(model):
  """Random variables, without compiling the model's own initialisation."""
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.uniform(0.1, 0.2, x.shape).astype(x.dtype), shapes
  )


@pytest.fixture
def tiny(monkeypatch):
  """Makes the models of two names tiny."""
  for name, fields in _TINY.items():
    variant = vimjax.get_variant(name)
    small = dataclasses.replace(variant, fields={**variant.fields, **fields})
    monkeypatch.setitem(registry._VARIANTS, name, small)


@pytest.fixture
def evaluated(monkeypatch):
  """What was evaluated, instead of doing it."""
  seen = {}

  def note(model, variables, config, split, *, class_names):
    seen.update(model=model, config=config, split=split, names=class_names)
    return dict(_DONE)

  monkeypatch.setattr(evaluate, "evaluate", note)
  return seen


def _photos(root, *parts):
  for part in parts or (".",):
    for name in ("ant", "bee", "cat"):
      folder = root / part / name
      folder.mkdir(parents=True)
      for i in range(5):
        image = Image.new("RGB", (70, 60), (40 * i, 90, 20))
        image.save(folder / f"{i}.png")
  return root


def _config(name="vim_tiny", **changes):
  """Of a run that fine-tunes a model at another size."""
  config = finetune.get_config()
  config.model.name = name
  config.model.overrides.num_classes = 3
  config.data.image_size = 64
  config.update_from_flattened_dict(changes)
  return config


def _weights(path, config, *, told=True):
  """A file of such a run's weights."""
  said = {"data": config.data.name}
  if told:
    said |= initial.metadata(config, None, ["ant", "bee", "cat"])
  variables = _variables(run_lib.make_model(config))
  vimjax.save_variables(path, variables, metadata=said)
  return path


def _main(weights, data, *arguments, model="vim_tiny"):
  return evaluate.main(
    [
      *("--model", model, "--weights", str(weights), "--data", str(data)),
      *arguments,
    ]
  )


def test_folders_are_matched_to_classes_by_name():
  table = evaluate.label_table(["n01443537", "n01440764"], 1000)
  np.testing.assert_array_equal(table, [1, 0])
  np.testing.assert_array_equal(evaluate.label_table(["0", "7"], 1000), [0, 7])
  np.testing.assert_array_equal(evaluate.label_table(["a", "b"], 2), [0, 1])
  with pytest.raises(ValueError, match="1000 classes, the data 2"):
    evaluate.label_table(["cat", "dog"], 1000)
  known = ["ant", "bee", "cat"]
  np.testing.assert_array_equal(
    evaluate.label_table(["cat", "ant"], 3, known), [2, 0]
  )
  with pytest.raises(
    ValueError, match="do not have .dog, ....; theirs are ant"
  ):
    evaluate.label_table(["ant", "bee", "dog"], 3, known)


class TestPreparation:
  @pytest.mark.parametrize("name", vimjax.list_models())
  def test_is_that_of_the_published_accuracy(self, name):
    how = vimjax.get_variant(name).preprocessing
    c, split = evaluate.make_config(
      how, data="imagenet", data_dir="d", classes=1000, batch_size=8
    )
    assert split == "validation"
    assert how.interpolation == "bicubic"  # The pipeline's only one.
    got = (c.data.image_size, c.data.crop_fraction, c.data.crop_mode)
    assert got == (how.size, how.crop_fraction, how.crop_mode)
    assert (c.data.mean, c.data.std) == (how.mean, how.std)

  @pytest.mark.parametrize("name", _TINY)
  def test_is_the_runs_own(self, tiny, evaluated, tmp_path, name):
    config = _config(name, **{"data.mean": (0.1, 0.2, 0.3)})
    weights = _weights(tmp_path / "a.safetensors", config)
    assert _main(weights, _photos(tmp_path / "photos"), model=name) == 0
    used = evaluated["config"].data
    for field in ("image_size", "crop_fraction", "crop_mode", "mean", "std"):
      assert used[field] == config.data[field], field
    assert used.image_size == 64
    assert used.crop_fraction == (0.875 if name == "vim_tiny" else 0.98)
    if name == "vim_tiny":
      assert evaluated["model"].image_size == 64

  def test_is_with_the_runs_own_model(self, tiny, evaluated, tmp_path):
    changes = {"model.overrides.depth": 3, "model.overrides.dtype": "bfloat16"}
    config = _config(**changes)
    weights = _weights(tmp_path / "a.safetensors", config)
    assert _main(weights, _photos(tmp_path / "photos")) == 0
    assert evaluated["model"].depth == 3
    assert evaluated["model"].num_classes == 3
    # How the run computed is not what it made.
    assert evaluated["model"].dtype == jnp.float32
    said = checkpoint_files.read_metadata(weights)
    assert json.loads(said["model_fields"]) == {"depth": 3}
    assert evaluated["names"] == ["ant", "bee", "cat"]

  def test_a_positional_embedding_tells_its_size(self, tiny, tmp_path):
    path = _weights(tmp_path / "a.safetensors", _config(), told=False)
    found = pretrained.read("vim_tiny", path)
    assert found.preprocessing("vim_tiny").size == 64
    assert found.preprocessing("vim_tiny", image_size=96).size == 96

  @pytest.mark.parametrize(
    ("metadata", "message"),
    [
      ({"image_size": "64x96"}, "64x96 pixels; choose a square"),
      ({"preprocessing": "{"}, "unknown 'preprocessing'"),
      ({"preprocessing": '{"zoom": 2}'}, "unknown 'preprocessing'"),
      ({"preprocessing": "7"}, "unknown 'preprocessing'"),
    ],
  )
  def test_what_is_recorded_must_be_understood(self, metadata, message):
    usual = vimjax.get_variant("vim_tiny").preprocessing
    with pytest.raises(ValueError, match=message):
      trained.preprocessing(metadata, usual)

  def test_an_asked_size_needs_no_recorded_one(self):
    usual = vimjax.get_variant("vim_tiny").preprocessing
    how = trained.preprocessing({"image_size": "64x96"}, usual, image_size=32)
    assert how == dataclasses.replace(usual, size=32)


class TestSplit:
  @pytest.fixture
  def weights(self, tiny, tmp_path):
    return _weights(tmp_path / "a.safetensors", _config())

  def test_of_a_folder_that_was_trained_on_is_what_was_held_out(
    self, weights, evaluated, tmp_path, capsys
  ):
    photos = _photos(tmp_path / "photos")
    assert _main(weights, photos) == 0
    assert evaluated["split"] == "validation"
    shown = capsys.readouterr()
    assert "--split=all" in shown.err
    assert f"'validation' of {photos}, 64x64 pixels" in shown.out
    for split in ("all", "validation"):
      assert _main(weights, photos, "--split", split) == 0
      assert evaluated["split"] == split
      assert not capsys.readouterr().err

  def test_of_other_weights_is_all(self, weights, evaluated, tmp_path):
    found = pretrained.read(vimjax.create_model("vim_tiny"), weights)
    vimjax.save_variables(tmp_path / "b.safetensors", found.variables)
    photos = _photos(tmp_path / "photos")
    assert _main(tmp_path / "b.safetensors", photos) == 0
    assert evaluated["split"] == "all"
    assert evaluated["config"].data.name == "folder"

  def test_of_parts_is_validation(self, weights, evaluated, tmp_path):
    photos = _photos(tmp_path / "photos", "train", "test")
    for arguments, split in (
      ((), "validation"),
      (("--split=test",), "test"),
    ):
      assert _main(weights, photos, *arguments) == 0
      assert evaluated["split"] == split

  def test_that_is_not_there_is_one_line(self, weights, tmp_path, capsys):
    photos = _photos(tmp_path / "photos")
    assert _main(weights, photos, "--split=valid") == errors.ExitCode.USAGE
    assert "Did you mean 'validation'" in capsys.readouterr().err

  def test_of_a_folder_with_a_data_sets_name_in_its_own(
    self, weights, evaluated, tmp_path, monkeypatch
  ):
    _photos(tmp_path / "imagenet_v2_mine")
    monkeypatch.chdir(tmp_path)
    assert _main(weights, "imagenet_v2_mine", "--split=all") == 0
    assert evaluated["config"].data.folder == "imagenet_v2_mine"


class TestCommandLine:
  @pytest.mark.parametrize(
    "argument", ["--batch_size=0", "--batch_size=-8", "--image_size=0"]
  )
  def test_counts_are_positive(self, argument, capsys):
    with pytest.raises(SystemExit) as ended:
      evaluate.main(["--model=vim_tiny", argument])
    assert ended.value.code == errors.ExitCode.USAGE
    assert "not at least 1" in capsys.readouterr().err

  @pytest.mark.parametrize(("asked", "used"), [(1, 8), (8, 8), (130, 136)])
  def test_batches_divide_among_the_devices(self, asked, used):
    how = vimjax.get_variant("vim_tiny").preprocessing
    config, _ = evaluate.make_config(
      how, data="imagenet", data_dir=None, classes=3, batch_size=asked
    )
    assert jax.device_count() == 8
    assert config.eval_batch_size == used

  def test_a_result_that_cannot_be_written_is_shown_first(
    self, tiny, evaluated, tmp_path, capsys
  ):
    weights = _weights(tmp_path / "a.safetensors", _config())
    photos = _photos(tmp_path / "photos")
    arguments = (weights, photos, "--json")
    code = _main(*arguments, str(tmp_path / "nowhere" / "a.json"))
    assert code == errors.ExitCode.IO_ERROR
    shown = capsys.readouterr()
    assert shown.out.startswith("vim_tiny: top-1 50.000 %, top-5 100.000 %")
    assert "error: " in shown.err
    assert _main(*arguments, str(tmp_path / "a.json")) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == {
      "model": "vim_tiny",
      "weights": str(weights),
      "data": str(photos),
      "split": "validation",
      "image_size": 64,
      **_DONE,
    }

  def test_mistakes_are_one_line(self, tmp_path, capsys):
    code = evaluate.main(["--model", "vim_tny"])
    assert code == errors.ExitCode.USAGE
    assert "Did you mean" in capsys.readouterr().err
    file = tmp_path / "a.pth"
    file.write_bytes(b"nothing")
    assert evaluate.main(["--model", "vim_tiny", "--weights", str(file)]) == 2
    assert "error: " in capsys.readouterr().err


def test_from_a_file_to_an_accuracy(tiny, tmp_path, capsys):
  weights = _weights(tmp_path / "a.safetensors", _config())
  photos = _photos(tmp_path / "photos")
  assert _main(weights, photos, "--batch_size=3", "--split=all") == 0
  assert "(15 images, 0 unreadable; 'all' of" in capsys.readouterr().out
