"""ImageNet-V2: from (fake) archives to an accuracy."""

import dataclasses
import io
import pathlib
import tarfile

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from experiments import evaluate, prepare_imagenet
from experiments.datasets import (
  imagenet_preparation,
  imagenet_v2,
  records,
  registry,
)
from experiments.imagenet import errors
import vimjax

_FOLDER = "imagenetv2-matched-frequency-format-val"
# Class and gray level; the models below expect a fourth of the class.
_IMAGES = [(4 * i, i) for i in (0, 2, 10, 30, 99, 100, 101, 200, 249)]
_WRONG = (40, 77)


def _jpeg(level: int) -> bytes:
  file = io.BytesIO()
  pixels = np.full((40, 30, 3), level, np.uint8)
  Image.fromarray(pixels).save(file, "JPEG", quality=95)
  return file.getvalue()


def _write_archive(
  folder: pathlib.Path, images=(*_IMAGES, _WRONG), top=f"{_FOLDER}/"
) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  path = folder / "imagenetv2-matched-frequency.tar.gz"
  with tarfile.open(path, "w:gz") as tar:
    for label, level in images:
      data = _jpeg(level)
      member = tarfile.TarInfo(f"{top}{label}/{level:06d}.jpeg")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A TFDS folder with the prepared images."""
  folder = tmp_path_factory.mktemp("v2")
  _write_archive(folder / "tars")
  arguments = ["--v2", "--tar_dir", str(folder / "tars"), "--subset"]
  code = prepare_imagenet.main([*arguments, "--data_dir", str(folder / "tfds")])
  assert code == 0
  return str(folder / "tfds")


def test_tfds_own_builder_reads_every_image(data_dir):
  builder = tfds.builder(
    "imagenet_v2/matched-frequency",
    data_dir=data_dir,
    file_format="array_record",
  )
  assert builder.is_prepared()
  source = builder.as_data_source(
    "test", decoders={"image": tfds.decode.SkipDecoding()}
  )
  got = {
    (source[i]["label"], source[i]["file_name"].decode(), source[i]["image"])
    for i in range(len(source))
  }
  assert got == {
    (label, f"{label}/{level:06d}.jpeg", _jpeg(level))
    for label, level in (*_IMAGES, _WRONG)
  }


class _Levels(nn.Module):
  """Takes an image for the class that is four times its gray level."""

  @nn.compact
  def __call__(self, images, *, train=False):
    gray = images.mean((1, 2)) * jnp.array([0.229, 0.224, 0.225])
    gray = 255 * (gray + jnp.array([0.485, 0.456, 0.406])).mean(-1)
    return -jnp.square(4 * gray[:, None] - jnp.arange(1000))


@pytest.mark.parametrize("variant", ["", "/matched-frequency"])
def test_it_can_be_evaluated(data_dir, variant):
  config, split = evaluate.make_config(
    dataclasses.replace(vimjax.get_variant("vim_tiny").preprocessing, size=16),
    data=f"imagenet_v2{variant}",
    data_dir=data_dir,
    classes=1000,
    batch_size=3,  # Rounded up: there are 8 devices.
  )
  values = evaluate.evaluate(_Levels(), {}, config, split)
  assert values["examples"] == len(_IMAGES) + 1
  assert values["unreadable"] == 0
  assert values["accuracy"] == pytest.approx(len(_IMAGES) / (len(_IMAGES) + 1))


class TestMissing:
  @pytest.mark.parametrize("variant", imagenet_v2.SOURCES)
  def test_the_message_says_how_to_get_it(self, tmp_path, variant):
    with pytest.raises(records.MissingDataError) as caught:
      registry.open_split(f"imagenet_v2/{variant}", "test", str(tmp_path))
    (tar,) = imagenet_v2.SOURCES[variant].tars.values()
    for part in (
      "'imagenet_v2' is not on this machine",
      f"{tmp_path}/imagenet_v2/{variant}/3.0.0",
      tar.name,
      tar.url,
      f"python -m experiments.prepare_imagenet --v2 {variant} --tar_dir FOLDER "
      f"--data_dir {tmp_path}",
    ):
      assert part in str(caught.value)

  def test_the_command_lines_end_with_it(self, tmp_path, capsys):
    how = vimjax.get_variant("vim_tiny").preprocessing
    config, split = evaluate.make_config(
      how,
      data="imagenet_v2/topimages",
      data_dir=str(tmp_path),
      classes=1000,
      batch_size=8,
    )
    with pytest.raises(records.MissingDataError, match="--v2 topimages"):
      evaluate.evaluate(_Levels(), {}, config, split)
    arguments = ["--v2", "topimages", "--tar_dir", str(tmp_path)]
    code = prepare_imagenet.main([*arguments, "--data_dir", str(tmp_path)])
    assert code == errors.ExitCode.NO_INPUT
    said = capsys.readouterr().err
    assert f"no imagenetv2-top-images.tar.gz in {tmp_path}" in said
    assert "https://" in said


class TestBadArchives:
  def _prepare(self, folder, **options):
    return imagenet_preparation.prepare(
      folder,
      str(folder / "tfds"),
      source=imagenet_v2.SOURCES["matched-frequency"],
      **options,
    )

  @pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
  def test_a_truncated_one_is_named_and_leaves_nothing(self, tmp_path, keep):
    path = _write_archive(tmp_path)
    data = path.read_bytes()
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    path.write_bytes(data[:keep])
    with pytest.raises(records.DataError, match=f"{path} is truncated"):
      self._prepare(tmp_path, subset=True)
    assert not list((tmp_path / "tfds").glob("imagenet_v2/*/*/"))

  @pytest.mark.parametrize("top", ["", f"{_FOLDER}/n0144", f"{_FOLDER}/1"])
  def test_other_folders_are_refused(self, tmp_path, top):
    path = _write_archive(tmp_path, images=[(999, 1)], top=top)
    if not top:
      with pytest.raises(records.DataError, match="1 images instead of 10,000"):
        self._prepare(tmp_path)
      return
    with pytest.raises(records.DataError, match=f"{path} holds .*999/000001"):
      self._prepare(tmp_path, subset=True)
