"""Pictures of a run: whatever classes are called, and what a failure costs."""

import types

import numpy as np
from PIL import Image
import pytest

from experiments.imagenet import metrics, plots, train
from experiments.imagenet.configs import _base

# A formula that is none, bytes that are no UTF-8, letters that no font here
# has to have; and a class beyond the names.
_NAMES = ["a$_b^$", b"caf\xe9".decode(errors="surrogateescape"), "x" * 40]


@pytest.fixture
def examples():
  image = np.zeros((4, 4, 3), np.uint8)
  return [(image, label, 3 - label) for label in range(3)]


@pytest.mark.parametrize("names", [_NAMES, None])
def test_any_name_of_a_class_is_drawn(examples, names, tmp_path):
  name = plots.predictions(tmp_path, examples, names)
  with Image.open(tmp_path / name) as picture:
    assert picture.size == (1320, 936)


def test_a_run_goes_on_without_pictures(
  examples, tmp_path, monkeypatch, caplog
):
  with metrics.Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.write(1, "train", {"loss": 1.0, "accuracy": 0.5, "lr": 0.1})
  config = _base.get_config()
  run = types.SimpleNamespace(
    config=config, folder=tmp_path, class_names=["a", "b", "c"]
  )
  drawn = ["learning_curves.png", "predictions.png"]
  assert train.draw(run, examples) == drawn
  monkeypatch.setattr(plots, "predictions", lambda *args: [][0])
  assert train.draw(run, examples) == []
  assert "No plots: IndexError: list index out of range" in caplog.text
