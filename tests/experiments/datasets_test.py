"""The data sets: what is in them, and what happens when they are not whole."""

import io
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
from sklearn import datasets as sklearn_datasets
from sklearn import neighbors

from experiments.datasets import (
  digits,
  generated,
  photographs,
  records,
  registry,
)

_ROOT = pathlib.Path(__file__).parents[2]
_OPEN = """
import sys
from experiments.datasets import registry
try:
  split = registry.open_split(*sys.argv[1:])
  print(len(split.records))
except (OSError, RuntimeError) as error:
  print(type(error).__name__, error)
assert "tensorflow" not in sys.modules
"""


def _start(name, split, data_dir, before: str = "") -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", before + _OPEN, name, split, str(data_dir)],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def own_dir(data_dir, tmp_path):
  """A copy of the generated data that a test may damage; (root, folder)."""
  registry.open_split("generated", "train", data_dir)
  name = "vimjax_generated"
  shutil.copytree(pathlib.Path(data_dir) / name, tmp_path / name)
  return str(tmp_path), tmp_path / name / "1.0.0"


class TestDigits:
  def test_test_split_is_every_fifth_image_and_splits_are_disjoint(self):
    labels = sklearn_datasets.load_digits().target
    splits = digits.split_indices(labels)
    np.testing.assert_array_equal(splits["test"], np.arange(0, 1797, 5))
    assert len(splits["test"]) == 360
    together = np.concatenate(list(splits.values()))
    np.testing.assert_array_equal(np.sort(together), np.arange(1797))
    # Validation holds an eighth of each class.
    counts = np.bincount(labels[splits["validation"]], minlength=10)
    assert counts.min() >= 16
    assert counts.max() <= 20

  def test_records_are_the_packages_images_and_labels(self, data_dir):
    package = sklearn_datasets.load_digits()
    indices = digits.split_indices(package.target)
    for split, members in indices.items():
      opened = registry.open_split("digits", split, data_dir)
      assert opened.class_names == tuple("0123456789")
      got = set()
      for i in range(len(opened.records)):
        record = opened.records[i]
        gray = np.asarray(Image.open(io.BytesIO(record["image"])))
        got.add((gray.tobytes(), record["label"]))
      assert len(opened.records) == len(members)
      want = set()
      for i in members:
        gray = np.round(package.images[i] * 255 / 16).astype(np.uint8)
        want.add((gray.tobytes(), int(package.target[i])))
      assert got == want

  def test_an_existing_set_is_not_written_again(self, data_dir):
    registry.open_split("digits", "train", data_dir)
    files = sorted(pathlib.Path(data_dir, "sklearn_digits/1.0.0").iterdir())
    before = [(f.name, f.stat().st_mtime_ns) for f in files]
    registry.open_split("digits", "test", data_dir)
    assert before == [(f.name, f.stat().st_mtime_ns) for f in files]


@pytest.fixture(scope="module")
def whole():
  """The photographs, as they are in the package."""
  return {
    name: sklearn_datasets.load_sample_image(f"{name}.jpg")
    for name in photographs.PHOTOGRAPHS
  }


def _pixels(whole, crop):
  return whole[crop.photograph][crop.top :, crop.left :][:32, :32]


class TestPhotographs:
  def test_no_pixel_is_in_two_splits_or_two_classes(self):
    splits = ("train", "validation", "test")
    # For each pixel, 1 + split + 3 * label; 0 where no crop is.
    owners = {
      name: np.zeros((427, 640), int) for name in photographs.PHOTOGRAPHS
    }
    for i, split in enumerate(splits):
      for crop in photographs.crops(split):
        pixels = owners[crop.photograph][crop.top :, crop.left :][:32, :32]
        assert pixels.shape == (32, 32)
        assert set(np.unique(pixels)) <= {0, 1 + i + 3 * crop.label}
        pixels[:] = 1 + i + 3 * crop.label
    for owner in owners.values():
      # Nor are two of them near each other.
      for distance in range(1, 11):
        for a, b in (
          (owner[distance:], owner[:-distance]),
          (owner[:, distance:], owner[:, :-distance]),
        ):
          assert ((a == b) | (a == 0) | (b == 0)).all()

  def test_classes_are_equally_frequent_in_every_split(self):
    per_class = {"train": 78, "validation": 26, "test": 26}
    for split, wanted in per_class.items():
      labels = [crop.label for crop in photographs.crops(split)]
      np.testing.assert_array_equal(np.bincount(labels), [wanted] * 18)

  def test_what_colour_alone_tells_is_as_the_readme_says(self, whole):
    mean, labels = {}, {}
    for split in ("train", "test"):
      crops = list(photographs.crops(split))
      labels[split] = [crop.label for crop in crops]
      mean[split] = [_pixels(whole, crop).mean((0, 1)) for crop in crops]
    nearest = neighbors.KNeighborsClassifier(n_neighbors=5)
    nearest.fit(mean["train"], labels["train"])
    found = nearest.score(mean["test"], labels["test"])
    readme = (_ROOT / "README.md").read_text()
    said = re.search(r"by mean colour get\s([\d.]+) %", readme)
    assert f"{100 * found:.1f}" == said[1]

  def test_records_are_crops_of_the_packages_photographs(self, data_dir, whole):
    for split in ("train", "validation", "test"):
      opened = registry.open_split("photographs", split, data_dir)
      assert opened.class_names == tuple(photographs.class_names())
      got = set()
      for i in range(len(opened.records)):
        record = opened.records[i]
        image = np.asarray(Image.open(io.BytesIO(record["image"])))
        assert image.shape == (32, 32, 3)
        got.add((image.tobytes(), record["label"]))
      want = set()
      for crop in photographs.crops(split):
        image = _pixels(whole, crop)
        assert image.shape == (32, 32, 3)
        want.add((image.tobytes(), crop.label))
      assert got == want


class TestGenerated:
  def test_images_are_jpegs_of_many_sizes_in_ten_classes(self, data_dir):
    split = registry.open_split("generated", "train", data_dir)
    examples = [split.records[i] for i in range(len(split.records))]
    images = [Image.open(io.BytesIO(e["image"])) for e in examples]
    assert {image.format for image in images} == {"JPEG"}
    assert len({image.size for image in images}) > 100
    counts = np.bincount([e["label"] for e in examples])
    np.testing.assert_array_equal(counts, [32] * 10)

  def test_images_are_the_same_every_time_and_differ(self):
    a = generated.make_image(3, np.random.default_rng(0))
    b = generated.make_image(3, np.random.default_rng(0))
    c = generated.make_image(3, np.random.default_rng(1))
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or not np.array_equal(a, c)


class TestNames:
  def test_unknown_data_set_is_answered_with_the_nearest(self, data_dir):
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
      registry.open_split("digit", "train", data_dir)

  def test_unknown_split_is_answered_with_the_nearest(self, data_dir):
    with pytest.raises(ValueError, match="Did you mean 'validation'.*'train'"):
      registry.open_split("digits", "valid", data_dir)

  def test_empty_split_is_an_error(self, data_dir):
    with pytest.raises(ValueError, match="is empty"):
      registry.open_split("digits", "train[:0]", data_dir)

  def test_parts_of_splits_can_be_opened(self, data_dir):
    part = registry.open_split("digits", "train[:100]", data_dir)
    rest = registry.open_split("digits", "train[100:]+test", data_dir)
    assert len(part.records) == 100
    assert len(rest.records) == 1154 + 360


class TestMissingData:
  def test_message_says_what_where_and_what_to_do(self, tmp_path):
    with pytest.raises(records.MissingDataError) as caught:
      registry.open_split("imagenet2012", "train", str(tmp_path))
    message = str(caught.value)
    for part in (
      "'imagenet2012' is not on this machine",
      f"{tmp_path}/imagenet2012/5.1.0",
      "https://image-net.org/download-images",
      "ILSVRC2012_img_train.tar",
      f"python -m experiments.prepare_imagenet --tar_dir FOLDER --data_dir "
      f"{tmp_path}",
      "--config.data.dir",
      "make demo",
      "--config digits",
    ):
      assert part in message
    assert not list(tmp_path.iterdir())

  def test_environment_names_the_folder_and_an_argument_overrides_it(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    with pytest.raises(records.MissingDataError, match=f"{tmp_path}/env/imag"):
      registry.open_split("imagenet2012", "train")
    with pytest.raises(records.MissingDataError, match=f"{tmp_path}/arg/imag"):
      registry.open_split("imagenet2012", "train", str(tmp_path / "arg"))
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
      records.MissingDataError, match=f"{tmp_path}/tensorflow_datasets/imag"
    ):
      registry.open_split("imagenet2012", "train")

  def test_another_version_is_mentioned(self, tmp_path):
    (tmp_path / "imagenet2012/5.0.0").mkdir(parents=True)
    with pytest.raises(records.MissingDataError, match="only: 5.0.0"):
      registry.open_split("imagenet2012", "train", str(tmp_path))


class TestDamage:
  def test_another_file_format_is_refused(self, own_dir):
    root, folder = own_dir
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(records.DataError, match="Only array_record files"):
      registry.open_split("generated", "train", root)

  def test_unreadable_metadata_is_a_clear_error(self, own_dir):
    root, folder = own_dir
    (folder / "dataset_info.json").write_text('{"name')
    with pytest.raises(records.DataError, match=f"{root} cannot be opened"):
      registry.open_split("generated", "train", root)

  def test_missing_file_is_named(self, own_dir):
    root, folder = own_dir
    (shard,) = folder.glob("*train*")
    shard.unlink()
    with pytest.raises(records.DataError, match=f"{shard}: missing"):
      registry.open_split("generated", "train", root)
    # The other splits are whole.
    assert len(registry.open_split("generated", "test", root).records) == 80

  @pytest.mark.parametrize("keep", [0, 1000, 500_000])
  def test_truncated_file_is_named(self, own_dir, keep):
    root, folder = own_dir
    (shard,) = folder.glob("*train*")
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(records.DataError, match="1 of 1 files.*damaged") as e:
      registry.open_split("generated", "train", root)
    assert str(shard) in str(e.value)


class TestPreparation:
  def test_two_processes_may_prepare_at_once(self, tmp_path):
    processes = [_start("generated", "train", tmp_path) for _ in range(2)]
    for process in processes:
      output, _ = process.communicate(timeout=60)
      assert output == "320\n"
      assert process.returncode == 0
    (folder,) = (tmp_path / "vimjax_generated").glob("*/")
    assert folder.name == "1.0.0"

  def test_a_killed_preparation_leaves_no_broken_set(self, tmp_path):
    started = tmp_path / "vimjax_generated"
    for delay in (0, 0.1, 0.3):
      process = _start("generated", "train", tmp_path)
      while not started.exists():
        time.sleep(0.01)
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
      process.communicate(timeout=60)
    split = registry.open_split("generated", "train", str(tmp_path))
    assert len(split.records) == 320
    assert split.records[319]["image"]

  def test_a_folder_without_metadata_is_prepared_anew(self, tmp_path):
    (tmp_path / "vimjax_generated/1.0.0").mkdir(parents=True)
    split = registry.open_split("generated", "train", str(tmp_path))
    assert len(split.records) == 320

  def test_a_full_disk_is_a_clear_error_and_leaves_nothing(self, tmp_path):
    # The file would be larger than a file may be.
    limit = (
      "import resource\n"
      "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    )
    process = _start("generated", "train", tmp_path, before=limit)
    output, _ = process.communicate(timeout=60)
    assert output.startswith("OSError Cannot write the data set into")
    assert "File too large" in output
    assert not list((tmp_path / "vimjax_generated").glob("*/"))

  def test_a_folder_that_cannot_be_made_is_a_clear_error(self, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write the data set"):
      registry.open_split("digits", "train", str(tmp_path / "file"))
