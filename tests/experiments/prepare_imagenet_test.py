"""From (fake) official tar files to what TFDS's own builder reads."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from experiments import prepare_imagenet
from experiments.datasets import (
  imagenet,
  imagenet_preparation,
  records,
  registry,
  shard_writer,
)
from experiments.imagenet import errors

_ROOT = pathlib.Path(__file__).parents[2]
_CLASSES = ("n01440764", "n02105855", "n13037406")
_CMYK = "n13037406_4650.JPEG"
_PNG = "n02105855_2933.JPEG"


def _image(seed: int, mode: str = "RGB") -> Image.Image:
  rng = np.random.default_rng(seed)
  colour = rng.integers(40, 216, 3, dtype=np.uint8)
  pixels = np.tile(colour, (20 + seed % 5, 24, 1))
  return Image.fromarray(pixels).convert(mode)


def _encode(image: Image.Image, kind: str = "JPEG") -> bytes:
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return file.getvalue()


def _train_files() -> dict[str, dict[str, bytes]]:
  files = {
    c: {f"{c}_{i}.JPEG": _encode(_image(10 * k + i)) for i in range(8)}
    for k, c in enumerate(_CLASSES)
  }
  files["n13037406"][_CMYK] = _encode(_image(70, "CMYK"))
  files["n02105855"][_PNG] = _encode(_image(71), "PNG")
  return files


def _write_tars(folder: pathlib.Path) -> dict[str, bytes]:
  """Writes both tars; returns the training images by file name."""
  train = _train_files()
  inner = {f"{name}.tar": _tar(files) for name, files in train.items()}
  (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner))
  validation = {
    f"ILSVRC2012_val_{i:08d}.JPEG": _encode(_image(i)) for i in range(1, 13)
  }
  (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(validation))
  return {k: v for files in train.values() for k, v in files.items()}


@pytest.fixture
def tars(tmp_path):
  folder = tmp_path / "tars"
  folder.mkdir()
  _write_tars(folder)
  return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """(folder of the data, training images by name, what the program printed)"""
  folder = tmp_path_factory.mktemp("imagenet")
  train = _write_tars(folder)
  code = (
    "import sys\n"
    "from experiments import prepare_imagenet\n"
    "code = prepare_imagenet.main(sys.argv[1:])\n"
    'assert "tensorflow" not in sys.modules\n'
    "sys.exit(code)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, "--tar_dir", folder, "--data_dir"]
    + [folder / "tfds", "--subset"],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return str(folder / "tfds"), train, done


def _partial(data_dir: pathlib.Path) -> list[pathlib.Path]:
  return list((data_dir / "imagenet2012").glob("*/"))


class TestResult:
  def test_program_shows_progress_and_says_where_the_data_is(self, prepared):
    data_dir, _, done = prepared
    folder = f"{data_dir}/imagenet2012/5.1.0"
    assert done.stdout == f"ImageNet-2012 is ready in {folder}\n"
    assert "train:" in done.stderr
    assert "validation: 100%" in done.stderr

  def test_official_builder_reads_every_training_image(self, prepared):
    data_dir, train, _ = prepared
    builder = tfds.builder(
      "imagenet2012", data_dir=data_dir, file_format="array_record"
    )
    assert builder.is_prepared()
    source = builder.as_data_source(
      "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    names = builder.info.features["label"].names
    assert len(names) == 1000
    seen = set()
    for i in range(len(source)):
      example = source[i]
      name = example["file_name"].decode()
      assert names[example["label"]] == name.partition("_")[0]
      seen.add(name)
      if name not in (_CMYK, _PNG):
        assert example["image"] == train[name]
        continue
      image = Image.open(io.BytesIO(example["image"]))
      assert (image.format, image.mode) == ("JPEG", "RGB")
      want = Image.open(io.BytesIO(train[name])).convert("RGB")
      error = np.abs(np.asarray(image).astype(int) - np.asarray(want))
      assert error.max() <= 3  # Constant colour at quality 100.
    assert seen == set(train)

  def test_validation_labels_come_from_the_official_list(self, prepared):
    data_dir, _, _ = prepared
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    labels = path.read_text().split()
    builder = imagenet.make_builder(data_dir)
    names = builder.info.features["label"].names
    source = builder.as_data_source(
      "validation", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert len(source) == 12
    for i in range(12):
      example = source[i]
      number = int(example["file_name"][15:23])
      assert names[example["label"]] == labels[number - 1]
      assert example["image"] == _encode(_image(number))

  def test_input_pipeline_opens_it(self, prepared):
    data_dir, train, _ = prepared
    split = registry.open_split("imagenet2012", "train", data_dir)
    assert len(split.records) == len(train)
    assert split.class_names is not None
    assert split.class_names[0] == "n01440764"

  def test_prepared_data_is_left_alone(self, prepared):
    data_dir, _, _ = prepared
    got = imagenet_preparation.prepare(pathlib.Path("/nowhere"), data_dir)
    assert got == pathlib.Path(data_dir, "imagenet2012/5.1.0")


def test_a_missing_package_is_answered_with_its_extra(tmp_path):
  code = (
    "import sys\n"
    'sys.modules["tensorflow_datasets"] = None\n'
    "from experiments import prepare_imagenet\n"
    "sys.exit(prepare_imagenet.main(sys.argv[1:]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, "--tar_dir", tmp_path],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == errors.ExitCode.UNAVAILABLE
  assert "pip install 'vimjax[train]'" in done.stderr
  assert "Traceback" not in done.stderr


def test_every_shard_is_a_random_sample(tmp_path):
  builder = imagenet.make_builder(str(tmp_path))
  folder = pathlib.Path(builder.data_dir)
  folder.mkdir(parents=True)
  examples = [
    (f"{c}_{i}.JPEG", {"image": b"x", "label": c, "file_name": f"{c}_{i}.JPEG"})
    for c in _CLASSES
    for i in range(200)
  ]
  info = shard_writer.write_split(
    builder, folder, "train", examples, num_shards=4
  )
  shard_writer.write_info(builder, folder, [info])
  assert sum(info.shard_lengths) == 600
  names = []
  for i in range(4):
    start, stop = sum(info.shard_lengths[:i]), sum(info.shard_lengths[: i + 1])
    split = f"train[{start}:{stop}]"
    part = registry.open_split("imagenet2012", split, str(tmp_path)).records
    labels = np.bincount([part[j]["label"] for j in range(len(part))])
    # 50 of each class on average; five standard deviations.
    assert labels[labels > 0].shape == (3,)
    assert np.abs(labels[labels > 0] - 50).max() <= 31
  source = imagenet.make_builder(str(tmp_path)).as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()}
  )
  names = {source[i]["file_name"].decode() for i in range(len(source))}
  assert names == {name for name, _ in examples}


class TestBadTars:
  def test_missing_tar_is_named_with_where_to_get_it(self, tmp_path, capsys):
    code = prepare_imagenet.main(
      ["--tar_dir", str(tmp_path), "--data_dir", str(tmp_path / "tfds")]
    )
    assert code == errors.ExitCode.NO_INPUT
    message = capsys.readouterr().err
    assert f"no ILSVRC2012_img_train.tar in {tmp_path}" in message
    assert "https://image-net.org/download-images" in message

  def test_incomplete_download_is_refused_by_its_size(self, tars, capsys):
    code = prepare_imagenet.main(
      ["--tar_dir", str(tars), "--data_dir", str(tars / "tfds")]
    )
    assert code == errors.ExitCode.BAD_DATA
    assert "official file has 147,897,477,120" in capsys.readouterr().err

  @pytest.mark.parametrize("name", ["train", "val"])
  @pytest.mark.parametrize("where", ["start", "header", "data", "end"])
  def test_truncated_tar_is_refused(self, tars, name, where):
    path = tars / f"ILSVRC2012_img_{name}.tar"
    with tarfile.open(path) as tar:
      middle, last = tar.getmembers()[1], tar.getmembers()[-1]
    blocks = -(-last.size // tarfile.BLOCKSIZE)
    keep = {
      "start": 0,
      "header": middle.offset + 100,
      "data": middle.offset_data + 100,
      "end": last.offset_data + blocks * tarfile.BLOCKSIZE,
    }[where]
    os.truncate(path, keep)
    with pytest.raises(records.DataError, match=f"{path} is truncated"):
      imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)
    assert not _partial(tars / "tfds")

  def test_truncated_tar_inside_the_training_tar_is_named(self, tars):
    inner = _tar(_train_files()["n01440764"])
    for keep in (100, 512, 700, len(inner) // 2, 5 * 1024):
      path = tars / "ILSVRC2012_img_train.tar"
      path.write_bytes(_tar({"n01440764.tar": inner[:keep]}))
      with pytest.raises(records.DataError, match="n01440764.tar inside"):
        imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)
      assert not _partial(tars / "tfds")

  def test_broken_header_in_the_middle_is_not_taken_for_the_end(self, tars):
    path = tars / "ILSVRC2012_img_val.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
      offset = tar.getmembers()[5].offset
    data[offset : offset + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(records.DataError, match=f"{path} is truncated or no"):
      imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)

  def test_swapped_or_foreign_tars_are_refused(self, tars):
    train = tars / "ILSVRC2012_img_train.tar"
    shutil.copy(tars / "ILSVRC2012_img_val.tar", train)
    with pytest.raises(records.DataError, match="none of ImageNet-2012's 1000"):
      imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)

  def test_data_of_another_format_is_not_overwritten(self, tars, capsys):
    folder = tars / "tfds/imagenet2012/5.1.0"
    folder.mkdir(parents=True)
    info = {
      "name": "imagenet2012",
      "version": "5.1.0",
      "fileFormat": "tfrecord",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    code = prepare_imagenet.main(
      ["--tar_dir", str(tars), "--data_dir", str(tars / "tfds"), "--subset"]
    )
    assert code == errors.ExitCode.BAD_DATA
    assert "Only array_record files can be read" in capsys.readouterr().err
    assert json.loads((folder / "dataset_info.json").read_text()) == info


class TestDisk:
  def test_too_small_a_disk_is_refused_before_writing(self, tars):
    path = tars / "ILSVRC2012_img_train.tar"
    free = shutil.disk_usage(tars).free
    try:
      os.truncate(path, 2 * free)  # Sparse: takes no space.
    except OSError:
      pytest.skip("this file system has no such large files")
    with pytest.raises(OSError, match="Cannot write .* GB are free"):
      imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)
    assert not _partial(tars / "tfds")

  def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_nothing(self, tars):
    code = (
      "import resource, sys\n"
      "from experiments import prepare_imagenet\n"
      "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
      "sys.exit(prepare_imagenet.main(sys.argv[1:]))"
    )
    done = subprocess.run(
      [sys.executable, "-c", code, "--subset"]
      + ["--tar_dir", tars, "--data_dir", tars / "tfds"],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == errors.ExitCode.IO_ERROR
    assert "Cannot write the data set into" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not _partial(tars / "tfds")

  def test_what_a_killed_preparation_left_is_replaced(self, tars):
    target = tars / "tfds/imagenet2012"
    process = subprocess.Popen(
      [sys.executable, "-m", "experiments.prepare_imagenet", "--subset"]
      + ["--tar_dir", tars, "--data_dir", tars / "tfds"],
      cwd=_ROOT,
      stderr=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
    )
    while not target.exists():
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Whatever the moment of the kill, leave more behind.
    (target / "incomplete.vimjax_5.1.0").mkdir(exist_ok=True)
    (target / "incomplete.vimjax_5.1.0/shard").write_text("")
    got = imagenet_preparation.prepare(tars, str(tars / "tfds"), subset=True)
    assert _partial(tars / "tfds") == [got]
    assert "shard" not in os.listdir(got)
    assert imagenet.make_builder(str(tars / "tfds")).is_prepared()
