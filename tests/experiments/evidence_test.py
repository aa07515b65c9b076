"""The comparison of four families: its rules, its command, its result file."""

import dataclasses
import json

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from experiments import evidence
from experiments.imagenet import errors
from tests import readme_tables

_RUN = evidence.Run(
  dataset="digits",
  family="vim",
  peak_lr=1e-3,
  seed=0,
  valid_accuracy=0.5,
  valid_loss=1.0,
  test_accuracy=0.5,
  test_images=360,
  steps=390,
  best_step=390,
)


def _runs(*changes):
  return [dataclasses.replace(_RUN, **each) for each in changes]


class TestChoice:
  def test_validation_accuracy_decides_whatever_the_test_accuracy(self):
    runs = _runs(
      dict(peak_lr=1e-3, valid_accuracy=0.8, test_accuracy=0.9),
      dict(peak_lr=2e-3, valid_accuracy=0.9, test_accuracy=0.1),
    )
    assert evidence.choose(runs) == 2e-3
    assert evidence.choose(runs[::-1]) == 2e-3

  def test_between_equal_ones_the_validation_loss_decides(self):
    runs = _runs(
      dict(peak_lr=1e-3, valid_loss=0.3, test_accuracy=0.9),
      dict(peak_lr=2e-3, valid_loss=0.2, test_accuracy=0.1),
      dict(peak_lr=4e-3, valid_loss=0.1, valid_accuracy=0.4),
    )
    assert evidence.choose(runs) == 2e-3

  def test_rows_are_over_the_seeds_of_the_chosen_rate(self):
    runs = _runs(
      dict(peak_lr=1e-3, valid_accuracy=0.9, test_accuracy=0.6),
      dict(peak_lr=2e-3, valid_accuracy=0.8, test_accuracy=1.0),
      # Better on validation than the grid's best, but not of the grid.
      dict(peak_lr=1e-3, seed=1, valid_accuracy=1.0, test_accuracy=0.7),
      dict(peak_lr=1e-3, seed=2, test_accuracy=0.8),
      dict(family="deit", valid_accuracy=1.0, test_accuracy=0.0),
    )
    model = dict(dataset="digits", family="vim", parameters=1234, macs=2.5e6)
    result = {
      "models": [model],
      "runs": [dataclasses.asdict(run) for run in runs],
    }
    (row,) = evidence.rows(result)
    assert row == model | {
      "peak_lr": 1e-3,
      "runs": 4,
      "seeds": 3,
      "mean": pytest.approx(0.7),
      "lowest": 0.6,
      "highest": 0.8,
    }
    assert evidence.table(result).splitlines()[-1] == (
      "| digits | vim | 1,234 | 2.5 | 0.001 | 70.0 | 60.0, 80.0 |"
    )


class TestModels:
  def test_unequal_models_are_refused(self, monkeypatch):
    wide = evidence.FAMILIES["deit"] | {"model.overrides.embed_dim": 66}
    families = {**evidence.FAMILIES, "deit": wide}
    monkeypatch.setattr(evidence, "FAMILIES", families)
    with pytest.raises(ValueError, match=r"equally many.*1\.05.*'deit': 26"):
      evidence.sizes("digits", ["mambavision", "deit"])

  def test_families_differ_in_the_model_alone(self):
    for dataset in evidence.DATASETS:
      configs = [
        evidence.make_config(dataset, family).to_dict()
        for family in evidence.FAMILIES
      ]
      names = {config.pop("model")["name"] for config in configs}
      assert len(names) == len(configs)
      assert configs == configs[:1] * len(configs)


@pytest.fixture
def own_cache():
  """Leaves later tests without the cache that the command sets up."""
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


@pytest.mark.long
@pytest.mark.usefixtures("own_cache")
def test_the_command_trains_grid_and_seeds_and_repeats_nothing(
  tmp_path, monkeypatch, capsys
):
  tiny = evidence.FAMILIES["deit"] | {
    "model.overrides.depth": 1,
    "model.overrides.embed_dim": 12,
  }
  monkeypatch.setattr(evidence, "FAMILIES", {"deit": tiny})
  monkeypatch.setattr(evidence, "PEAK_LRS", (1e-3, 2e-3))
  monkeypatch.setattr(evidence, "SEEDS", (0, 1))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  file = tmp_path / "results" / "evidence.json"
  arguments = [
    *("--workdir", str(tmp_path / "runs"), "--json", str(file)),
    *("--datasets", "digits", "--epochs", "0.05"),
  ]
  assert evidence.main(arguments) == errors.ExitCode.FINISHED
  result = json.loads(file.read_text())
  assert capsys.readouterr().out.endswith(evidence.table(result) + "\n")
  grid = [(1e-3, 0), (2e-3, 0)]
  (row,) = evidence.rows(result)
  assert [(run["peak_lr"], run["seed"]) for run in result["runs"]] == [
    *grid,
    (row["peak_lr"], 1),
  ]
  assert {run["steps"] for run in result["runs"]} == {2}
  assert {run["test_images"] for run in result["runs"]} == {360}

  folders = sorted((tmp_path / "runs" / "digits" / "deit").iterdir())
  assert len(folders) == 3
  # A run that is lost is trained again, to the same numbers; no other is.
  (folders[0] / "result.json").unlink()
  before = [f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")]
  assert evidence.main(arguments) == errors.ExitCode.FINISHED
  after = [f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")]
  assert len(set(after) - set(before)) == 1
  assert set(before) < set(after)
  assert json.loads(file.read_text()) == result


@pytest.fixture(scope="module")
def result():
  """The committed result file."""
  return json.loads((readme_tables.RESULTS / "evidence.json").read_text())


def test_every_run_of_the_stated_grid_is_listed(result):
  listed = [
    (run["dataset"], run["family"], run["peak_lr"], run["seed"])
    for run in result["runs"]
  ]
  wanted = [
    (row["dataset"], row["family"], peak_lr, seed)
    for row in evidence.rows(result)
    for peak_lr, seed in [
      *((peak_lr, evidence.SEEDS[0]) for peak_lr in evidence.PEAK_LRS),
      *((row["peak_lr"], seed) for seed in evidence.SEEDS[1:]),
    ]
  ]
  assert listed == wanted
  assert [(x["dataset"], x["family"]) for x in result["models"]] == [
    (dataset, family)
    for dataset in evidence.DATASETS
    for family in evidence.FAMILIES
  ]


def test_listed_budget_and_models_are_those_of_the_code(result):
  assert result["epochs"] == evidence.EPOCHS
  assert result["batch_size"] == evidence.BUDGET["batch_size"]
  assert result["peak_lrs"] == list(evidence.PEAK_LRS)
  assert result["seeds"] == list(evidence.SEEDS)
  steps = {(run["dataset"], run["steps"]) for run in result["runs"]}
  assert len(steps) == len(evidence.DATASETS)
  families = list(evidence.FAMILIES)
  assert result["models"][: len(families)] == evidence.sizes("digits", families)
