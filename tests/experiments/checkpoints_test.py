"""Which checkpoints are kept, which are restored, and what counts as damage."""

import os
import shutil

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from experiments.imagenet import checkpoints, errors, sharding
from experiments.imagenet import state as state_lib

# Reads that Orbax leaves behind when it fails may end, with complaints, as late
# as in the next test; see `checkpoints._quiet`.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def _state(seed):
  key = jax.random.key(seed)
  params = {
    "w": jax.random.normal(key, (64, 32)),
    "b": jnp.zeros(3, jnp.bfloat16),
  }
  return state_lib.State(
    step=jnp.int32(seed),
    params=params,
    opt_state=(params, None),
    ema_params=None,
    rng=jax.random.key_data(key),
    batch_stats={"norm": {"mean": jax.random.normal(key, (32,))}},
  )


def _shapes(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def _save(folder, *records, keep=10):
  with checkpoints.Checkpoints(folder, keep=keep) as saved:
    for record in records:
      saved.save(_state(record.step), record)


@pytest.fixture
def three(tmp_path):
  """A folder with sound checkpoints of steps 1, 2 and 3."""
  _save(tmp_path, *(checkpoints.Record(step=i) for i in (1, 2, 3)))
  return tmp_path


def _restore(folder):
  saved = checkpoints.Checkpoints(folder, keep=10)
  return saved.restore(_shapes(_state(0)))


def _largest_file(folder):
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_state_and_record_come_back_as_they_were(tmp_path):
  record = checkpoints.Record(
    step=7,
    evaluated_step=5,
    best_step=7,
    best_accuracy=0.1 + 0.2,
    best_loss=1 / 3,
    corrupt={"train": [3, 9], "validation": [1]},
  )
  _save(tmp_path, record)
  state, restored = _restore(tmp_path)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, _state(7))
  chex.assert_trees_all_equal(state, _state(7))
  assert restored == record


def test_a_folder_without_checkpoints_starts_anew(tmp_path):
  assert _restore(tmp_path) is None
  (tmp_path / "checkpoints").mkdir()
  assert _restore(tmp_path) is None


def test_an_unfinished_save_is_not_a_checkpoint(three):
  folder = three / "checkpoints"
  shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
  assert _restore(three)[1].step == 3


def test_the_newest_and_the_best_are_kept(tmp_path):
  records = [
    checkpoints.Record(step=i, best_step=min(i, 2)) for i in range(1, 7)
  ]
  _save(tmp_path, *records, keep=2)
  saved = checkpoints.Checkpoints(tmp_path, keep=2)
  assert saved.saved_steps() == [6, 5, 2]


def test_the_best_is_still_kept_after_a_restart(tmp_path):
  _save(tmp_path, checkpoints.Record(step=1, best_step=1), keep=1)
  with checkpoints.Checkpoints(tmp_path, keep=1) as saved:
    _, record = saved.restore(_shapes(_state(0)))
    for step in (2, 3):
      record.step = step
      saved.save(_state(step), record)
  assert saved.saved_steps() == [3, 1]


def test_saving_a_restored_step_again_does_nothing(three):
  with checkpoints.Checkpoints(three, keep=10) as saved:
    state, record = saved.restore(_shapes(_state(0)))
    saved.save(state, record)
  assert saved.saved_steps() == [3, 2, 1]


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def _flip_a_bit(folder):
  path = _largest_file(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _random_bytes(folder):
  path = _largest_file(folder)
  path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _change_the_record(folder):
  path = folder / "meta" / "metadata"
  text = path.read_text()
  assert '"best_accuracy": 0.0' in text
  path.write_text(text.replace('"best_accuracy": 0.0', '"best_accuracy": 0.9'))


DAMAGES = {
  "emptied": _empty,
  "bit_flipped": _flip_a_bit,
  "random_bytes": _random_bytes,
  "truncated": lambda folder: os.truncate(_largest_file(folder), 100),
  "data_deleted": lambda folder: _largest_file(folder).unlink(),
  "state_deleted": lambda folder: shutil.rmtree(folder / "state"),
  "record_deleted": lambda folder: shutil.rmtree(folder / "meta"),
  "record_changed": _change_the_record,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_one_before_is_taken(three, damage, caplog):
  newest = three / "checkpoints" / "3"
  DAMAGES[damage](newest)
  before = sorted(p.name for p in newest.rglob("*"))
  state, record = _restore(three)
  assert record.step == 2
  chex.assert_trees_all_equal(state, _state(2))
  assert "Skipped checkpoint 3: " in caplog.text
  # Out of the way of the next checkpoint 3, but not deleted.
  aside = three / "checkpoints_damaged" / "3"
  assert sorted(p.name for p in aside.rglob("*")) == before
  assert not newest.exists()
  _save(three, checkpoints.Record(step=3))
  assert _restore(three)[1].step == 3


def test_damaged_steps_of_one_number_are_all_kept(three):
  for _ in range(2):
    _empty(three / "checkpoints" / "3")
    assert _restore(three)[1].step == 2
    _save(three, checkpoints.Record(step=3))
  aside = three / "checkpoints_damaged"
  assert sorted(p.name for p in aside.iterdir()) == ["3", "3_2"]


def test_no_sound_checkpoint_is_an_error_that_changes_nothing(three):
  for step in (1, 2, 3):
    _flip_a_bit(three / "checkpoints" / str(step))
  with pytest.raises(errors.CheckpointError, match=r"step 3.*step 2.*step 1"):
    _restore(three)
  assert [p.name for p in three.iterdir()] == ["checkpoints"]


def test_a_state_of_another_shape_is_not_restored(three):
  shapes = _shapes(_state(0))
  shapes.params["w"] = jax.ShapeDtypeStruct(
    (64, 33), jnp.float32, sharding=shapes.params["w"].sharding
  )
  saved = checkpoints.Checkpoints(three, keep=1)
  with pytest.raises(errors.CheckpointError):
    saved.restore(shapes)


def test_checksums_see_every_change_and_no_sharding():
  record = checkpoints.Record()
  state = _state(1)
  want = checkpoints.checksums(state, record)
  mesh = sharding.make_mesh()
  w = state.params["w"]
  columns = NamedSharding(mesh, PartitionSpec(None, "data"))
  for same in (jax.device_put(w, columns), jnp.array(w)):
    moved = state.replace(params=state.params | {"w": same})
    assert checkpoints.checksums(moved, record) == want
  for other in (
    w.at[3, 5].set(-w[3, 5]),
    w.at[0].set(w[1]).at[1].set(w[0]),
    w.T.reshape(w.shape),
    jnp.nextafter(w, w + 1),
  ):
    changed = state.replace(params=state.params | {"w": other})
    got = checkpoints.checksums(changed, record)
    assert {k for k in want if got[k] != want[k]} == {"params"}
  record.best_step = 1
  got = checkpoints.checksums(state, record)
  assert {k for k in want if got[k] != want[k]} == {"record"}
