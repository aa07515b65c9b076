"""Batches: what is in them, that they repeat, and what bad images do."""

import itertools
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.datasets import generated, registry, shard_writer
from experiments.imagenet import input_pipeline, stages, transforms
from experiments.imagenet.configs import _base
from vimjax import preprocessing

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(data_dir):
  c = _base.get_config()
  c.data.dir = data_dir
  c.data.name = "generated"
  c.data.image_size = 32
  c.batch_size = 48
  c.eval_batch_size = 48
  return c


def _take(batches, count):
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def _assert_equal(got, want):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    assert g.keys() == w.keys()
    for key in w:
      assert g[key].dtype == w[key].dtype
      np.testing.assert_array_equal(g[key], w[key], err_msg=key)


def _join(parts):
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


class TestTrainBatches:
  @pytest.mark.parametrize("name", ["digits", "generated"])
  @pytest.mark.parametrize("size", [8, 40])
  def test_shapes_and_types(self, config, name, size):
    config.data.name = name
    config.data.image_size = size
    (batch,) = _take(input_pipeline.train_batches(config), 1)
    got = {k: (v.shape, v.dtype) for k, v in batch.items()}
    assert got == {
      "image": ((48, size, size, 3), np.uint8),
      "label": ((48,), np.int32),
      "index": ((48,), np.int64),
      "corrupt": ((48,), bool),
    }
    assert not batch["corrupt"].any()
    assert batch["image"].std() > 10

  def test_labels_and_images_belong_to_their_records(self, config):
    config.data.crop_area = (1.0, 1.0)
    config.data.crop_ratio = (1.0, 1.0)
    config.data.flip = False
    config.data.name = "digits"
    config.data.image_size = 8
    split = registry.open_split("digits", "train", config.data.dir)
    (batch,) = _take(input_pipeline.train_batches(config), 1)
    for i, index in enumerate(batch["index"].tolist()):
      record = split.records[index]
      assert batch["label"][i] == record["label"]
      np.testing.assert_array_equal(
        batch["image"][i], transforms.decode(record["image"])
      )

  def test_a_stream_started_later_continues_the_same_stream(self, config):
    whole = _take(input_pipeline.train_batches(config), 9)
    again = _take(input_pipeline.train_batches(config), 9)
    _assert_equal(again, whole)
    for start in (1, 6, 7):  # An epoch is 6 steps.
      rest = input_pipeline.train_batches(config, start_step=start)
      _assert_equal(_take(rest, 9 - start), whole[start:])

  def test_the_seed_changes_order_and_augmentation(self, config):
    (a,) = _take(input_pipeline.train_batches(config), 1)
    config.seed = 1
    (b,) = _take(input_pipeline.train_batches(config), 1)
    assert (a["index"] != b["index"]).any()

  def test_worker_processes_make_the_same_batches(self, config):
    want = _take(input_pipeline.train_batches(config, start_step=3), 5)
    config.data.workers = 2
    got = _take(input_pipeline.train_batches(config, start_step=3), 5)
    _assert_equal(got, want)

  @pytest.mark.parametrize("hosts", [2, 3])
  def test_hosts_slices_make_up_the_global_batch(self, config, hosts):
    want = _take(input_pipeline.train_batches(config, start_step=5), 3)
    parts = [
      _take(
        input_pipeline.train_batches(
          config, start_step=5, process_index=i, process_count=hosts
        ),
        3,
      )
      for i in range(hosts)
    ]
    _assert_equal([_join(batch) for batch in zip(*parts, strict=True)], want)

  def test_an_epoch_sees_images_once_and_epochs_see_all(self, config):
    steps = input_pipeline.steps_per_epoch(config)
    assert steps == 320 // 48 == 6
    batches = _take(input_pipeline.train_batches(config), 6 * steps)
    indices = np.stack([b["index"] for b in batches]).reshape(6, -1)
    for epoch in indices:
      assert len(set(epoch)) == steps * 48
    # 32 of 320 are left out of an epoch: all six times with chance 1e-6.
    assert set(indices.flat) == set(range(320))
    orders = {tuple(epoch) for epoch in indices}
    assert len(orders) == 6

  def test_an_image_is_augmented_anew_every_time(self, config):
    steps = input_pipeline.steps_per_epoch(config)
    seen = {}
    for batch in _take(input_pipeline.train_batches(config), 2 * steps):
      for index, image in zip(batch["index"], batch["image"], strict=True):
        seen.setdefault(int(index), []).append(image)
    pairs = [images for images in seen.values() if len(images) == 2]
    assert len(pairs) > 200
    assert not any(np.array_equal(a, b) for a, b in pairs)

  def test_batch_larger_than_the_data_is_an_error(self, config):
    config.batch_size = 321
    message = r"batch_size=321 is larger.*'generated' \(train\) has 320 images"
    with pytest.raises(ValueError, match=message):
      input_pipeline.train_batches(config)
    with pytest.raises(ValueError, match=message):
      input_pipeline.steps_per_epoch(config)
    config.batch_size = 320
    assert input_pipeline.steps_per_epoch(config) == 1
    (batch,) = _take(input_pipeline.train_batches(config), 1)
    assert set(batch["index"]) == set(range(320))

  def test_batch_that_does_not_divide_among_hosts_is_an_error(self, config):
    with pytest.raises(ValueError, match="48 does not divide among 5"):
      input_pipeline.train_batches(config, process_index=0, process_count=5)

  def test_negative_workers_are_an_error(self, config):
    config.data.workers = -1
    with pytest.raises(ValueError, match="workers must not be negative"):
      input_pipeline.train_batches(config)


class TestEvalBatches:
  @pytest.mark.parametrize("batch_size", [80, 48, 7, 100])
  def test_every_image_once_and_padding_masked(self, config, batch_size):
    config.eval_batch_size = batch_size
    batches = list(input_pipeline.eval_batches(config, "validation"))
    assert len(batches) == -(-80 // batch_size)
    assert all(b["image"].shape == (batch_size, 32, 32, 3) for b in batches)
    joined = _join(batches)
    assert joined["mask"].dtype == bool
    real = joined["mask"]
    np.testing.assert_array_equal(joined["index"][real], np.arange(80))
    assert (joined["index"][~real] == stages.PADDING).all()
    assert not joined["corrupt"].any()
    assert not joined["image"][~real].any()

  def test_images_are_preprocessed_as_by_vimjax(self, config):
    config.data.crop_fraction = 0.8
    records = registry.open_split(
      "generated", "validation", config.data.dir
    ).records
    batch = next(iter(input_pipeline.eval_batches(config, "validation")))
    for i in (0, 17):
      image = transforms.decode_pillow(records[i]["image"])
      want = preprocessing.resize_and_crop(image, size=32, crop_fraction=0.8)
      np.testing.assert_array_equal(batch["image"][i], np.asarray(want))
      assert batch["label"][i] == records[i]["label"]

  def test_hosts_and_workers_do_not_matter(self, config):
    want = list(input_pipeline.eval_batches(config, "validation"))
    parts = [
      list(
        input_pipeline.eval_batches(
          config, "validation", process_index=i, process_count=2
        )
      )
      for i in range(2)
    ]
    _assert_equal([_join(batch) for batch in zip(*parts, strict=True)], want)
    config.data.workers = 2
    _assert_equal(
      _take(input_pipeline.eval_batches(config, "validation"), 2), want
    )


def test_sizes_and_names_of_the_data(config):
  assert input_pipeline.num_examples(config, "train") == 320
  assert input_pipeline.num_examples(config, "validation[:25%]") == 20
  assert input_pipeline.class_names(config) == list("0123456789")


# Record id -> what is done to the JPEG's bytes.
_DAMAGE = {
  3: lambda data: data[: len(data) // 2],
  4: lambda data: b"",
  7: lambda data: bytes(len(data)),
  19: lambda data: b"not an image",
  23: lambda data: data[:200],
}
_BAD = frozenset({*_DAMAGE, 11})


def _write(root, examples, splits):
  """Writes examples, in this order, under the name of the generated data."""
  builder = generated.VimjaxGenerated(
    data_dir=str(root), file_format="array_record"
  )
  folder = pathlib.Path(builder.data_dir)
  folder.mkdir(parents=True)
  pairs = [(example["file_name"], example) for example in examples]
  infos = [
    shard_writer.write_split(builder, folder, split, pairs, num_shards=1)
    for split in splits
  ]
  shard_writer.write_info(builder, folder, infos)
  return folder


@pytest.fixture(scope="module")
def damaged(data_dir, tmp_path_factory):
  """24 images, five of them bad, and one record with a wrong checksum."""
  good = registry.open_split("generated", "train", data_dir).records
  examples = []
  for i in range(24):
    data = _DAMAGE.get(i, lambda data: data)(good[i]["image"])
    name = f"mark{i:05d}"
    examples.append(
      {"image": data, "label": good[i]["label"], "file_name": name}
    )
  root = tmp_path_factory.mktemp("damaged")
  folder = _write(root, examples, ["train", "validation"])
  for shard in folder.glob("*.array_record*"):
    content = shard.read_bytes()
    assert content.count(b"mark00011") == 1
    shard.write_bytes(content.replace(b"mark00011", b"mork00011"))
  return str(root)


class TestCorruptImages:
  @pytest.fixture
  def config(self, config, damaged):
    config.data.dir = damaged
    config.data.crop_area = (1.0, 1.0)
    config.data.flip = False
    config.batch_size = 24
    config.eval_batch_size = 16
    return config

  @pytest.mark.parametrize("workers", [0, 2])
  def test_training_puts_the_next_readable_record_in_place(
    self, config, workers
  ):
    config.data.workers = workers
    records = registry.open_split("generated", "train", config.data.dir).records
    (batch,) = _take(input_pipeline.train_batches(config), 1)
    assert set(batch["index"]) == set(range(24))
    assert set(batch["index"][batch["corrupt"]]) == _BAD
    position = {int(index): i for i, index in enumerate(batch["index"])}
    # 3 and 4 are bad: 5 stands in. 23 is the last one: 0 stands in.
    for bad, instead in {3: 5, 4: 5, 7: 8, 11: 12, 19: 20, 23: 0}.items():
      i = position[bad]
      assert batch["label"][i] == records[instead]["label"]
      assert batch["image"][i].std() > 10

  def test_evaluation_masks_them(self, config):
    joined = _join(list(input_pipeline.eval_batches(config, "validation")))
    np.testing.assert_array_equal(joined["index"][:24], np.arange(24))
    assert set(joined["index"][joined["corrupt"]]) == _BAD
    assert set(joined["index"][joined["mask"]]) == set(range(24)) - _BAD

  def test_reasons_can_be_asked_for(self, config):
    def why(index):
      return input_pipeline.why_unreadable(config, "train", index)

    assert why(0) is None
    assert "truncated" in why(3)
    assert "cannot identify image" in why(19)
    assert "hash mismatch" in why(11)

  def test_a_set_without_a_readable_image_still_flags_them_all(
    self, tmp_path, config
  ):
    examples = [
      {"image": b"", "label": 1, "file_name": str(i)} for i in range(30)
    ]
    _write(tmp_path, examples, ["train"])
    config.data.dir = str(tmp_path)
    (batch,) = _take(input_pipeline.train_batches(config), 1)
    assert batch["corrupt"].all()
    assert len(set(batch["index"])) == 24


def test_loading_needs_no_tensorflow_and_no_device(config):
  """A worker process that touched the GPU would take its memory."""
  code = f"""
import sys
import time
from experiments.imagenet import input_pipeline
from experiments.imagenet.configs import _base
config = _base.get_config()
config.data.dir = {config.data.dir!r}
config.data.name = "digits"
config.data.image_size = 8
config.batch_size = 4
one = dict(process_index=0, process_count=1)
next(input_pipeline.train_batches(config, **one))
next(input_pipeline.eval_batches(config, "test", **one))
assert "tensorflow" not in sys.modules
"""
  registry.open_split("digits", "train", config.data.dir)
  # With a platform that does not exist, any use of a device fails.
  environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def _runs(pid: int) -> bool:
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  except FileNotFoundError:
    return False
  return state.split()[0] not in "ZX"


def test_workers_outlive_signals_to_the_group_but_not_their_run(
  config, tmp_path
):
  script = tmp_path / "run.py"
  script.write_text(f"""
import multiprocessing, os, signal, time
from experiments.imagenet import input_pipeline
from experiments.imagenet.configs import _base
if __name__ == "__main__":
  config = _base.get_config()
  config.data.dir = {config.data.dir!r}
  config.data.name = "digits"
  config.data.image_size = 8
  config.data.workers = 2
  config.batch_size = 4
  batches = input_pipeline.train_batches(config)
  for _ in range(4):  # Now each worker has started.
    next(batches)
  workers = [c.pid for c in multiprocessing.active_children()]
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
    os.killpg(os.getpgid(0), number)
  time.sleep(0.5)
  for _ in range(20):
    next(batches)
  print(*workers, flush=True)
  time.sleep(600)
""")
  registry.open_split("digits", "train", config.data.dir)
  with subprocess.Popen(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
  assert len(workers) == 2
  deadline = time.monotonic() + 60
  while any(_runs(pid) for pid in workers):
    assert time.monotonic() < deadline, "the workers outlived their run"
    time.sleep(0.1)
