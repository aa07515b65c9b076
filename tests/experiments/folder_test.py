"""A user's own images: which are classes, which are parts, what is held out."""

import os
import pathlib

import pytest

from experiments.datasets import folder, records


def _write(root, *names):
  """Files that hold their own name."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(name))


def _images(root, split):
  opened = folder.open_split(split, str(root)).records
  return {os.fsdecode(opened[i]["image"]) for i in range(len(opened))}


def _names(*parts, count=30):
  return {f"{part}/{i}.jpg" for part in parts for i in range(count)}


class TestParts:
  def test_are_splits_with_the_training_parts_classes(self, tmp_path):
    _write(tmp_path, *_names("train/b", "train/a", count=3))
    _write(tmp_path, *_names("val/b", count=2), "train/a/notes.txt")
    train = folder.open_split("train", str(tmp_path))
    valid = folder.open_split("validation", str(tmp_path))
    assert train.class_names == valid.class_names == ("a", "b")
    assert len(train.records) == 6
    assert [valid.records[i]["label"] for i in range(2)] == [1, 1]
    assert valid.records[1]["image"] == b"val/b/1.jpg"
    with pytest.raises(ValueError, match="split of .*'test'"):
      folder.open_split("test", str(tmp_path))

  @pytest.mark.parametrize("split", ["train", "validation"])
  def test_a_bad_validation_part_is_found_before_training(
    self, tmp_path, split
  ):
    _write(tmp_path, *_names("train/b", "train/a", count=3))
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(records.MissingDataError, match="no image in .*val"):
      folder.open_split(split, str(tmp_path))
    _write(tmp_path, "val/c/0.jpg")
    with pytest.raises(records.DataError, match="training images: 'c'"):
      folder.open_split(split, str(tmp_path))

  @pytest.mark.parametrize("test", ["test", "Testing", None])
  def test_without_validation_a_tenth_of_training_is_held_out(
    self, tmp_path, test
  ):
    train = _names("Train/x", "Train/y", count=60)
    _write(tmp_path, *train)
    if test:
      _write(tmp_path, *_names(f"{test}/y"))
      assert _images(tmp_path, "test") == _names(f"{test}/y")
    names = ("train", "validation", "test") if test else ("train", "validation")
    assert folder.splits(str(tmp_path)) == names
    parts = _images(tmp_path, "train"), _images(tmp_path, "validation")
    assert parts[0] | parts[1] == train
    assert not parts[0] & parts[1]
    assert 3 < len(parts[1]) < 30
    # The same ones as if the part were the folder.
    assert _images(tmp_path / "Train", "validation") == parts[1]

  @pytest.mark.parametrize("part", ["test", "val"])
  def test_without_training_the_message_says_what_to_do(self, tmp_path, part):
    _write(tmp_path, *_names(f"{part}/x", f"{part}/y", count=2))
    for split in ("train", "all"):
      with pytest.raises(records.DataError, match="no 'train'") as error:
        folder.open_split(split, str(tmp_path))
      assert str(tmp_path / part) in str(error.value)
    assert len(_images(tmp_path / part, "all")) == 4

  def test_train_beside_other_vehicles_is_a_class(self, tmp_path):
    _write(tmp_path, *_names("car", "bus", "train"))
    opened = folder.open_split("all", str(tmp_path))
    assert opened.class_names == ("bus", "car", "train")
    assert folder.splits(str(tmp_path)) == ("train", "validation", "all")

  def test_two_parts_count_whatever_is_beside_them(self, tmp_path):
    _write(tmp_path, *_names("train/x", "train/y", "val/x", count=2))
    _write(tmp_path, "lists/train.txt")
    opened = folder.open_split("train", str(tmp_path))
    assert opened.class_names == ("x", "y")

  def test_one_part_twice_is_an_error(self, tmp_path):
    _write(tmp_path, *_names("train/x", "train/y", "val/x", "valid/x", count=2))
    with pytest.raises(records.DataError, match="'val', 'valid'"):
      folder.open_split("train", str(tmp_path))


class TestHeldOut:
  def test_is_a_tenth_whatever_else_is_there(self, tmp_path):
    _write(tmp_path, *_names("x", "y", count=200))
    train, valid = (_images(tmp_path, s) for s in ("train", "validation"))
    assert not train & valid
    assert train | valid == _images(tmp_path, "all")
    assert 20 < len(valid) < 60
    (gone, *_) = sorted(train)
    (tmp_path / gone).unlink()
    assert _images(tmp_path, "validation") == valid

  def test_is_never_nothing_and_never_all(self, tmp_path):
    seen = set()
    for i in range(40):
      root = tmp_path / str(i)
      _write(root, f"x/{i}.jpg", f"y/{7 * i}.jpg")
      train, valid = (_images(root, s) for s in ("train", "validation"))
      assert len(train) == len(valid) == 1
      assert train | valid == _images(root, "all")
      seen |= {name[0] for name in valid}
    assert seen == {"x", "y"}

  def test_one_image_cannot_be_divided(self, tmp_path):
    _write(tmp_path, "x/0.jpg")
    assert len(_images(tmp_path, "all")) == 1
    with pytest.raises(records.DataError, match="one image"):
      folder.open_split("validation", str(tmp_path))

  def test_names_need_not_be_text(self, tmp_path):
    name = os.fsdecode(b"x/caf\xe9.jpg")
    try:
      _write(tmp_path, name, *_names("x", "y", count=3))
    except OSError:
      pytest.skip("This file system takes text only.")
    train, valid = (_images(tmp_path, s) for s in ("train", "validation"))
    assert len(train | valid) == 7
    assert name in train | valid


class TestClasses:
  def test_what_systems_leave_behind_is_ignored(self, tmp_path):
    _write(tmp_path, "x/0.jpg", "y/deeper/0.png")
    _write(tmp_path, "x/._0.jpg", "x/.thumbnails/0.jpg", "y/__MACOSX/0.png")
    _write(tmp_path, "__MACOSX/x/._0.jpg", ".git/0.jpg", "y/deeper/.0.png")
    opened = folder.open_split("all", str(tmp_path))
    assert opened.class_names == ("x", "y")
    assert _images(tmp_path, "all") == {"x/0.jpg", "y/deeper/0.png"}

  @pytest.mark.parametrize("part", ["", "train"])
  @pytest.mark.parametrize("split", ["train", "validation"])
  def test_an_empty_one_is_named(self, tmp_path, part, split):
    _write(tmp_path / part, *_names("x", "y"), "z/notes.txt")
    with pytest.raises(records.DataError, match="without an image: 'z'"):
      folder.open_split(split, str(tmp_path))

  def test_training_needs_two(self, tmp_path):
    _write(tmp_path, *_names("x"))
    assert len(_images(tmp_path, "all")) == 30
    with pytest.raises(records.DataError, match="one class, 'x'"):
      folder.open_split("train", str(tmp_path))

  def test_numbers_count_as_numbers(self, tmp_path):
    _write(tmp_path, *_names("10", "9", "0", count=1))
    opened = folder.open_split("all", str(tmp_path))
    assert opened.class_names == ("0", "9", "10")

  @pytest.mark.parametrize("where", [None, "", "/nowhere"])
  def test_a_missing_folder_is_named(self, where):
    with pytest.raises(records.MissingDataError, match="folder"):
      folder.open_split("train", where)

  def test_an_empty_folder_says_what_it_needs(self, tmp_path):
    with pytest.raises(records.MissingDataError, match="subfolder for each"):
      folder.open_split("train", str(tmp_path))

  def test_a_folder_that_cannot_be_read_is_no_empty_class(
    self, tmp_path, monkeypatch
  ):
    _write(tmp_path, *_names("x", "y"))

    def refuse(path, *args):
      raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(
      pathlib.Path, "iterdir", lambda self: iter([self / "x", self / "y"])
    )
    with pytest.raises(PermissionError, match="x"):
      folder.open_split("all", str(tmp_path))
