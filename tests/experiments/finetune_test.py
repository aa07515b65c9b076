"""Other people's weights, your own images, and accuracy from a file."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from experiments import evaluate
from experiments.datasets import generated
from experiments.imagenet import (
  errors,
  initial,
  optimizer,
  sharding,
)
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet.configs import _base, finetune
import vimjax
from vimjax.weights import checkpoint_files, trained

_TINY = {"depth": 1, "embed_dim": 16, "patch_size": 16}


def _variables(model):
  """Random variables, without compiling the model's own initialisation."""
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes
  )


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  """A file with the official names of a tiny Vim of 5 classes at stride 16."""
  model = vimjax.create_model("vim_tiny", num_classes=5, image_size=64, **_TINY)
  path = tmp_path_factory.mktemp("weights") / "official.safetensors"
  arrays = vimjax.export_state_dict(model, _variables(model))
  arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
  safetensors.numpy.save_file(arrays, path)
  return path


def _config(path, **changes):
  c = _base.get_config()
  c.init_from = str(path)
  c.data.image_size = 64
  c.model.overrides.update(_TINY, num_classes=5)
  c.update_from_flattened_dict(changes)
  return c


class TestInitialWeights:
  def test_all_but_the_head_and_the_grid_is_kept(self, official):
    same = _config(official)
    want, source = initial.load(same, run_lib.make_model(same))
    config = _config(
      official,
      **{
        "model.name": "vim_tiny_stride8",
        "model.overrides.num_classes": 3,
        "model.overrides.pos_embed_resize": "official",
      },
    )
    got, _ = initial.load(config, run_lib.make_model(config))
    params = got["params"]
    assert params["head"]["kernel"].shape == (16, 3)
    # 64 pixels: 4 x 4 patches of 16 at stride 16, 7 x 7 at stride 8.
    assert want["params"]["pos_embed"].shape == (17, 16)
    assert params["pos_embed"].shape == (50, 16)
    for name in ("layers_0", "patch_embed", "norm", "class_token"):
      jax.tree.map(
        np.testing.assert_array_equal, params[name], want["params"][name]
      )
    assert source["license"] == "Apache-2.0"
    assert source["commercial_use"] is True
    assert len(source["sha256"]) == 64

  def test_a_new_run_and_its_average_start_from_them(self, official):
    config = _config(official, **{"model.overrides.num_classes": 3})
    model, mesh = run_lib.make_model(config), sharding.make_mesh()
    tx = optimizer.make_optimizer(config, lambda step: 0.1)
    shapes = state_lib.state_shapes(model, tx, config, mesh)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables, _ = initial.load(config, model)
    state = state_lib.with_variables(zeros, variables, mesh)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, zeros)
    for got in (state.params, state.ema_params):
      jax.tree.map(np.testing.assert_array_equal, got, variables["params"])
    assert len(state.params["head"]["bias"].sharding.device_set) == 8

  def test_our_files_say_their_licence_or_it_is_not_known(self, tmp_path):
    config = _config(tmp_path / "ours.safetensors")
    model = run_lib.make_model(config)
    path = tmp_path / "ours.safetensors"
    vimjax.save_variables(path, _variables(model))
    _, source = initial.load(config, model)
    assert source["license"] is None
    assert source["commercial_use"] is None
    said = initial.metadata(
      config, {"license": "CC-BY-NC-SA-4.0", "commercial_use": False}
    )
    vimjax.save_variables(path, _variables(model), metadata=said)
    _, source = initial.load(config, model)
    assert source["license"] == "CC-BY-NC-SA-4.0"
    assert source["commercial_use"] is False

  def test_a_licence_is_accepted_by_the_configuration(
    self, official, monkeypatch
  ):
    asked = []

    def fetch(published, *, accept_license, consent):
      del published, consent
      asked.append(accept_license)
      return official

    monkeypatch.setattr(initial.download, "fetch", fetch)
    for accept in (False, True):
      config = _config(
        official, init_from="published:vim_tiny", accept_license=accept
      )
      _, source = initial.load(config, run_lib.make_model(config))
      assert source["path"] == str(official)
    assert asked == [False, True]

  @pytest.mark.parametrize(
    ("field", "value", "message"),
    [
      ("init_from", "/nowhere/a.pth", "No such file"),
      ("init_from", "published:vim_base_stride8", "no weights were published"),
      (
        "init_from",
        "published:mambavision_tiny",
        "--config.accept_license=True",
      ),
      ("init_weights", "ema", "without an average"),
      ("model.overrides.embed_dim", 32, "has shape"),
    ],
  )
  def test_what_cannot_be_used_is_one_clear_error(
    self, official, field, value, message
  ):
    config = _config(official, **{field: value})
    with pytest.raises(errors.ConfigError, match=message) as error:
      initial.load(config, run_lib.make_model(config))
    assert "config.init_from=" in str(error.value)


def _write_images(root, classes, count, *, seed=0):
  for label, name in enumerate(classes):
    (root / name).mkdir(parents=True)
    for i in range(count):
      rng = np.random.default_rng((seed, label, i))
      image = Image.fromarray(generated.make_image(3 * label, rng))
      image.save(root / name / f"{i}.{'jpg' if i % 2 else 'PNG'}")


class TestPreparation:
  @pytest.mark.parametrize(
    "name", ["vim_tiny", "mambavision_tiny2", "mambavision_large3_512_21k"]
  )
  def test_validation_is_prepared_as_evaluate_does(self, name):
    config = finetune.get_config()
    config.model.name = name
    how = vimjax.get_variant(name).preprocessing
    want, _ = evaluate.make_config(
      how, data="imagenet", data_dir=None, classes=3, batch_size=8
    )
    for field in ("image_size", "crop_fraction", "crop_mode", "mean", "std"):
      assert config.data[field] == want.data[field], field
    resolved = pickle.loads(pickle.dumps(config.copy_and_resolve_references()))
    assert resolved.data.crop_fraction == how.crop_fraction

  def test_what_the_user_sets_stays(self):
    config = finetune.get_config()
    config.data.crop_fraction = 0.5
    config.data.mean = (0.1, 0.2, 0.3)
    config.model.name = "mambavision_tiny2"
    config.data.image_size = 48
    assert config.data.crop_fraction == 0.5
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.data.image_size == 48
    assert config.data.std == (0.229, 0.224, 0.225)

  def test_an_unknown_model_is_reported_by_whoever_makes_it(self):
    config = finetune.get_config()
    config.model.name = "vim_tny"
    assert config.to_dict()["data"]["crop_fraction"] == 0.875
    with pytest.raises(ValueError, match="Did you mean"):
      run_lib.make_model(config)


def test_fine_tuning_on_a_folder_from_official_weights(job, official, tmp_path):
  data, workdir = tmp_path / "data", tmp_path / "run"
  _write_images(data / "train", ["ant", "bee", "cat"], 12)
  _write_images(data / "val", ["ant", "bee", "cat"], 4, seed=1)
  arguments = [
    "--config=finetune",
    f"--config.data.folder={data}",
    f"--config.init_from={official}",
    "--config.data.image_size=48",
    "--config.batch_size=12",
    "--config.eval_batch_size=12",
    "--config.epochs=2.0",
    "--config.optimizer.warmup_epochs=1.0",
    "--config.log.plots=False",
    *(f"--config.model.overrides.{k}={v}" for k, v in _TINY.items()),
  ]
  code, out, err = job.run(workdir, config=arguments)
  assert code == 0, err
  assert "official.safetensors (licence: Apache-2.0)" in out
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["initial_weights"]["license"] == "Apache-2.0"
  assert recorded["initial_weights"]["path"] == str(official)
  assert recorded["config"]["model"]["overrides"]["num_classes"] == 3
  assert "git_revision" in recorded
  (session,) = recorded["sessions"]
  assert session["versions"] == recorded["versions"]

  # What it wrote is what it measured.
  result = json.loads((workdir / "result.json").read_text())
  assert result["initial_weights"] == recorded["initial_weights"]
  assert (result["model"], result["data"]) == ("vim_tiny", "folder")
  config = finetune.get_config()
  config.data.image_size = 48
  config.model.overrides.update(_TINY, num_classes=3)
  config.eval_batch_size = 16
  config.data.folder = str(data)
  model = run_lib.make_model(config)
  variables = vimjax.load_pretrained(model, workdir / "weights.safetensors")
  values = evaluate.evaluate(model, variables, config, "validation")
  assert values["examples"] == result["examples"] == 12
  assert values["accuracy"] == result["accuracy"]
  np.testing.assert_allclose(values["loss"], result["loss"], rtol=1e-5)
  assert values["unreadable"] == 0
  said = checkpoint_files.read_metadata(workdir / "weights.safetensors")
  usual = vimjax.get_variant("vim_tiny").preprocessing
  how = trained.preprocessing(said, usual)
  assert how == dataclasses.replace(usual, size=48)

  # Other data than the run began with would change what comes next.
  (data / "train" / "bee" / "3.jpg").unlink()
  code, _, err = job.run(workdir, "--config.epochs=3.0", config=arguments)
  assert code == errors.ExitCode.CONFIG_CONFLICT
  assert "'folder' (train) had 36 images" in err
  assert "has 35 now" in err
