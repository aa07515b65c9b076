"""`python -m vimjax.predict`: tables, JSON, batches and unreadable images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests import golden_data
import vimjax
from vimjax import imagenet_classes, predict, preprocessing
from vimjax.weights import torch_writer, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three images and the weights of a whole model."""
  folder = tmp_path_factory.mktemp("predict")
  keys = golden_data.load_json("deit", "keys")["deit_tiny_patch16_224"]
  shapes = golden_data.expand_keys(keys)
  torch_writer.write(folder / "x.pth", golden_data.make_state_dict(shapes))
  pixels = np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), np.uint8)
  for i, image in enumerate(pixels):
    Image.fromarray(image).save(folder / f"{i}.png")
  (folder / "broken.jpg").write_text("This is no image.")
  return folder


def _run(folder, *arguments):
  named = ["--model", "deit_tiny", "--weights", str(folder / "x.pth")]
  return predict.main([*named, *map(str, arguments)])


def test_json_in_batches_with_unreadable_images(folder, capsys):
  names = ["0.png", "broken.jpg", "1.png", "absent.png", "2.png"]
  paths = [str(folder / name) for name in names]
  assert _run(folder, "--json", "--batch-size", 2, *paths) == 1
  output = capsys.readouterr()
  results = json.loads(output.out)
  assert [result["image"] for result in results] == paths
  assert f"cannot read {paths[1]}: cannot identify" in output.err
  assert f"cannot read {paths[3]}: " in output.err
  assert "[############..................] 2/5 images" in output.err
  assert "] 5/5 images" in output.err
  assert "error" in results[1]
  assert "error" in results[3]

  model = vimjax.create_model("deit_tiny", scan_layers=True)
  variables = vimjax.load_pretrained(model, folder / "x.pth")
  readable = [i for i in range(5) if "error" not in results[i]]
  images = [
    vimjax.preprocess(Image.open(paths[i]), "deit_tiny") for i in readable
  ]
  logits = jax.jit(model.apply)(variables, np.stack(images))
  want = np.asarray(jax.nn.softmax(logits))
  for row, i in zip(want, readable, strict=True):
    found = results[i]["predictions"]
    best = np.argsort(-row)[:5]
    assert [entry["index"] for entry in found] == best.tolist()
    for entry, index in zip(found, best, strict=True):
      assert entry["class"] == imagenet_classes.names()[index]
      np.testing.assert_allclose(entry["probability"], row[index], rtol=1e-3)


def test_a_table(folder, capsys):
  assert _run(folder, "--top", 3, folder / "0.png") == 0
  name, *rows = capsys.readouterr().out.splitlines()
  assert name == str(folder / "0.png")
  assert len(rows) == 3
  probabilities = []
  for row in rows:
    percent, sign, index, words = row.split(maxsplit=3)
    assert sign == "%"
    assert words == imagenet_classes.names()[int(index)]
    probabilities.append(float(percent))
  assert probabilities == sorted(probabilities, reverse=True)
  assert 0 < probabilities[0] <= 100


def test_weights_of_a_run_of_yours_bring_all_they_need(tmp_path, capsys):
  # Another model, other images and other classes than the published ones.
  fields = dict(depth=1, embed_dim=64, num_heads=2)
  model = vimjax.create_model(
    "deit_tiny", **fields, num_classes=3, image_size=32
  )
  image = jnp.zeros((1, 32, 32, 3))
  variables = jax.jit(model.init)(jax.random.key(0), image)
  usual = vimjax.get_variant("deit_tiny").preprocessing
  how = dataclasses.replace(usual, size=32, crop_fraction=1.0, mean=(0, 0, 0))
  names = ["ant", "bee", "cat"]
  vimjax.save_variables(
    tmp_path / "x.safetensors",
    variables,
    metadata=trained.describe(
      "deit_tiny", fields=fields, preprocessing=how, classes=names
    ),
  )
  pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
  picture = Image.fromarray(pixels)
  picture.save(tmp_path / "0.png")
  arguments = ["--json", tmp_path / "0.png"]
  weights = ["--weights", tmp_path / "x.safetensors", "--model", "deit_tiny"]
  assert predict.main([*map(str, weights + arguments)]) == 0
  ((result,),) = [json.loads(capsys.readouterr().out)]
  found = result["predictions"]
  prepared = preprocessing.prepare(picture, how)
  assert prepared.shape == (32, 32, 3)
  want = jax.nn.softmax(model.apply(variables, prepared[None]))[0]
  for entry in found:
    assert entry["class"] == names[entry["index"]]
    np.testing.assert_allclose(
      entry["probability"], want[entry["index"]], rtol=1e-4
    )
  assert len(found) == 3


def test_what_is_refused(folder, tmp_path, capsys):
  image = str(folder / "0.png")
  for arguments, message in (
    (["--model", "vim_base_stride8"], "no weights were published"),
    (["--model", "mambavision_tiny"], "and pass --accept-license if you"),
    (["--model", "deit_tiny", "--weights", image], "not a file of torch.save"),
    (["--model", "deit_tiny", "--weights", str(tmp_path / "x")], "No such"),
    (
      ["--model", "deit_small", "--weights", str(folder / "x.pth")],
      "does not fit DeiT",
    ),
  ):
    assert predict.main([*arguments, image]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert not output.out
  for option, value in (("--top", "0"), ("--top", "a"), ("--batch-size", "-1")):
    with pytest.raises(SystemExit, match="2"):
      _run(folder, option, value, image)
    message = f"argument {option}: '{value}' is no positive integer"
    assert message in capsys.readouterr().err


def test_the_class_names():
  names, synsets = imagenet_classes.names(), imagenet_classes.synsets()
  assert len(names) == len(set(synsets)) == 1000
  assert list(synsets) == sorted(synsets)
  assert names[0] == "tench, Tinca tinca"
  assert names[207] == "golden retriever"
  assert (synsets[999], names[999].split(",")[0]) == (
    "n15075141",
    "toilet tissue",
  )
