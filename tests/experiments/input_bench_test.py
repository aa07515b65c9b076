"""The benchmark of the pipeline compares the same work."""

import json

import cv2
import numpy as np
from PIL import Image
import pytest

from experiments import input_bench
from experiments.imagenet import augment


def test_both_sides_have_the_same_operations():
  assert input_bench.PILLOW.keys() == augment.OPERATIONS.keys()


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_does_the_same_on_both_sides(name):
  y, x = np.mgrid[:60, :80]
  image = np.stack([3 * x, 4 * y, 2 * x + y], -1).astype(np.uint8)
  image = cv2.GaussianBlur(image, (0, 0), 2)
  operation = augment.OPERATIONS[name]
  arguments = []
  if operation.argument is not None:
    arguments.append(operation.argument(6.0, 1))
  if operation.geometric:
    arguments.append(cv2.INTER_CUBIC)
  ours = operation.apply(image, *arguments).astype(int)
  theirs = input_bench.PILLOW[name](Image.fromarray(image), *arguments)
  # At the edge of what is left empty OpenCV blends over a pixel.
  assert np.abs(ours - np.asarray(theirs)).mean() <= 2
  assert (ours != image).any()


def test_a_short_run_prints_a_row_for_each_kind_of_work(tmp_path, capsys):
  file = tmp_path / "bench.json"
  arguments = ["--images", "3", "--rounds", "1", "--json", str(file)]
  assert input_bench.main(arguments) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line[:29].strip() for line in lines[1:]] == [
    "decode",
    "decode and crop",
    "RandAugment",
    "whole pipeline",
  ]
  assert all(float(x) > 0 for line in lines[1:] for x in line[29:].split())
  result = json.loads(file.read_text())
  assert (result["images"], result["rounds"]) == (3, 1)
  for row in result["rows"]:
    assert row["ratio"] == row["ours"] / row["pillow"] > 0


def test_numbers_are_medians_of_rounds_in_turn(monkeypatch):
  # Seconds for two images: ours, theirs; three rounds.
  clock = np.cumsum([0.0, 1, 0, 2, 0, 2, 0, 2, 0, 4, 0, 16])
  monkeypatch.setattr(
    input_bench.time, "process_time", iter(clock.tolist()).__next__
  )
  seen = []
  works = [
    (lambda x, rng, who=who: seen.append(who), [None] * 2) for who in "ab"
  ]
  assert input_bench.measure(works, 3) == ([1.0, 1.0], 2.0)
  assert "".join(seen) == "aabb" * 3
