"""Configurations: found by name, complete, and wrong ones answered clearly."""

import pathlib
import subprocess
import sys

import pytest

from experiments import config_names
from experiments.imagenet import checks, recipes, rundir
from experiments.imagenet import run as run_lib
from experiments.imagenet.configs import _base, _recipe, digits

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / "experiments" / "imagenet" / "configs"
_RECIPE = _FOLDER / "_recipe.py"


class TestNames:
  @pytest.mark.parametrize(
    ("given", "wanted"),
    [
      (["--config", "vim_tiny"], ["--config", f"{_RECIPE}:vim_tiny"]),
      (["--config=vim_tiny"], [f"--config={_RECIPE}:vim_tiny"]),
      (["-config=vim_tiny"], [f"-config={_RECIPE}:vim_tiny"]),
      (["--config=vim_tiny:smoke"], [f"--config={_RECIPE}:vim_tiny:smoke"]),
      (["--config=digits"], [f"--config={_FOLDER}/digits.py"]),
      ([f"--config={__file__}:x"], [f"--config={__file__}:x"]),
      (["--config.seed=vim_tiny"], ["--config.seed=vim_tiny"]),
      (["--workdir", "d", "--config"], ["--workdir", "d", "--config"]),
    ],
  )
  def test_a_name_becomes_a_path_and_nothing_else_changes(self, given, wanted):
    assert config_names.resolve(["prog", *given], _FOLDER) == ["prog", *wanted]

  @pytest.mark.parametrize(
    ("name", "hint"),
    [
      ("vim_tny", "Did you mean 'vim_tiny'?"),
      ("vimsmall:smoke", "Did you mean 'vim_small'?"),
      ("nowhere/vim_tiny.py", "Choose from"),
      ("_base", "Choose from"),
      ("", "Choose from"),
    ],
  )
  def test_a_wrong_name_is_answered_with_the_nearest(self, name, hint):
    with pytest.raises(config_names.UnknownConfigError) as error:
      config_names.resolve(["prog", f"--config={name}"], _FOLDER)
    assert hint in str(error.value)
    for known in ("digits", "vim_tiny", "vmamba_tiny_s1l8", "deit_base"):
      assert f" {known}," in str(error.value)


class TestFiles:
  @pytest.mark.parametrize("argument", ["", ":smoke"])
  @pytest.mark.parametrize("name", recipes.RECIPES)
  def test_a_recipe_changes_values_and_adds_no_field(self, name, argument):
    c = _recipe.get_config(name + argument)
    base = _base.get_config()
    assert (
      rundir.flatten(c.to_dict()).keys()
      == rundir.flatten(base.to_dict()).keys()
    )

  def test_digits_never_mirrors_and_keeps_test_images_for_the_end(self):
    c = digits.get_config()
    assert not c.data.flip
    splits = (c.data.train_split, c.data.valid_split, c.data.test_split)
    assert splits == ("train", "validation", "test")

  @pytest.mark.parametrize("argument", ["", ":smoke"])
  @pytest.mark.parametrize("name", recipes.RECIPES)
  def test_no_check_refuses_a_recipe(self, name, argument):
    checks.check_config(_recipe.get_config(name + argument))

  def test_a_wrong_argument_is_answered_with_the_nearest(self):
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
      _recipe.get_config("vim_tiny:smok")

  def test_the_models_have_the_papers_sizes(self):
    model = run_lib.make_model(_recipe.get_config("vim_small"))
    assert (model.embed_dim, model.depth, model.image_size) == (384, 24, 224)
    assert model.drop_path_rate == 0.05
    smoke = run_lib.make_model(_recipe.get_config("vim_tiny:smoke"))
    assert (smoke.embed_dim, smoke.depth, smoke.image_size) == (192, 2, 64)


class TestCommandLine:
  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      (["--config=vim_tny"], "Did you mean 'vim_tiny'?"),
      (["--config=vim_tiny:smok"], "Did you mean 'smoke'?"),
      (
        ["--config=vim_tiny", "--config.optimizer.peaklr=1"],
        "no field 'peaklr'. Did you mean 'peak_lr'?",
      ),
      (
        ["--config=vim_tiny", "--config.optimiser.peak_lr=1"],
        "no field 'optimiser'. Did you mean 'optimizer'?",
      ),
      (["--config=vim_tiny", "--config.batch_size=many"], "config.batch_size"),
      (["--config=vim_tiny", "--wrkdir=x"], "Did you mean: workdir"),
      (["--config=vim_tiny", "extra"], "unexpected argument 'extra'"),
      ([], "--config must have a value"),
      (
        ["--config=vim_tiny:smoke", "--config.model.name=vim_tny"],
        "Did you mean ['vim_tiny'",
      ),
      (
        ["--config=vim_tiny:smoke", "--config.model.overrides.num_classes=5"],
        "num_classes=5 is too small",
      ),
      (
        ["--config=vim_tiny:smoke", "--config.model.overrides.patch_size=80"],
        "64x64 pixels is smaller than one patch of 80x80",
      ),
      (
        ["--config=vim_tiny:smoke", "--config.batch_size=1000"],
        "config.batch_size=1000 is larger than the training data",
      ),
      (
        ["--config=vim_tiny:smoke", "--config.data.name=imagnet"],
        "Unknown data set 'imagnet'",
      ),
      (
        [
          "--config=vim_tiny:smoke",
          "--config.eval_weights=average",
          "--config.model.overrides.dtype=float8",
        ],
        "config.eval_weights='average' must be",
      ),
    ],
  )
  def test_a_mistake_is_one_clear_message(
    self, job, tmp_path, arguments, message
  ):
    code, out, err = job.run(tmp_path, config=arguments)
    assert code == 2, err
    assert out == ""
    assert message in err
    assert "Traceback" not in err

  def test_help_lists_configurations_and_exit_codes(self, job):
    code, out, _ = job.run(None, config=["--help"])
    assert code == 0
    assert " digits, " in out
    assert " mambavision_tiny, " in out
    assert "75  interrupted" in out

  def test_a_missing_package_names_the_extra(self, job):
    script = (
      "import runpy, sys; sys.modules['optax'] = None;"
      "runpy.run_module('experiments.imagenet', run_name='__main__')"
    )
    done = subprocess.run(
      [sys.executable, "-c", script],
      cwd=_ROOT,
      env=job.environment(),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 69
    assert "pip install 'vimjax[train]'" in done.stderr
    assert "Traceback" not in done.stderr
