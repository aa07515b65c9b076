"""The table of settings, and the search that fills it."""

import dataclasses
import json

import jax
import pytest

from pallas_kernels import bench_checks, bench_child, bench_timing, bench_tune
from pallas_kernels.selective_scan import api, arg_specs, tuning

_PROBLEM = tuning.Problem(b=2, l=100, d=64, g=1, n=16, itemsize=2)
_CONFIG = tuning.Config(tile=32, unroll=4, buffers=3, chunks=5)
_KIND = "NVIDIA H100 80GB HBM3"


def _entry(problem=_PROBLEM, config=_CONFIG, **more):
  return {
    "problem": dataclasses.asdict(problem),
    "config": dataclasses.asdict(config),
    **more,
  }


def _write(path, entries):
  tuning.write_table(path, _KIND, "a test", entries)


def test_the_committed_tables_can_be_read():
  folder = tuning.table_path(_KIND).parent
  paths = sorted(folder.glob("tuning_*.json"))
  assert tuning.table_path(_KIND) in paths
  for path in paths:
    tuning.read_table(path)
    assert tuning.table_name(json.loads(path.read_text())["device_kind"]) == (
      path.name
    )


def test_what_is_written_is_read_and_wins_over_the_heuristics(
  tmp_path, monkeypatch
):
  path = tmp_path / tuning.table_name(_KIND)
  _write(path, [_entry(microseconds=12.5)])
  assert tuning.read_table(path) == {_PROBLEM: _CONFIG}
  device = jax.sharding.AbstractDevice(
    device_kind=_KIND, num_cores=132, platform="cuda"
  )
  other = dataclasses.replace(_PROBLEM, b=3)
  monkeypatch.setattr(tuning, "table_path", lambda kind: path)
  tuning._table.cache_clear()
  try:
    assert tuning.lookup(_PROBLEM, device) == _CONFIG
    assert tuning.lookup(other, device) == tuning.heuristic(other, cores=132)
  finally:
    tuning._table.cache_clear()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("entries"), "KeyError"),
    (lambda t: t["entries"][0].pop("config"), "KeyError"),
    (lambda t: t["entries"][0]["config"].pop("tile"), "a Config has"),
    (lambda t: t["entries"][0]["problem"].update(k=3), "a Problem has"),
    (lambda t: t["entries"][0]["config"].update(tile="16"), "`tile` must be"),
    (lambda t: t["entries"][0]["config"].update(unroll=3), "`unroll` must"),
    (lambda t: t["entries"][0]["config"].update(chunks=0), "`chunks` must be"),
    (lambda t: t.update(entries=[None]), "TypeError"),
  ],
)
def test_a_damaged_table_is_an_error_that_names_it(tmp_path, change, message):
  path = tmp_path / "tuning_x.json"
  _write(path, [_entry()])
  table = json.loads(path.read_text())
  change(table)
  path.write_text(json.dumps(table))
  with pytest.raises(ValueError, match=message) as error:
    tuning.read_table(path)
  assert str(path) in str(error.value)
  assert "bench --tune" in str(error.value)


def test_a_table_is_not_replaced_by_a_damaged_one(tmp_path):
  path = tmp_path / "tuning_x.json"
  _write(path, [_entry()])
  before = path.read_text()
  with pytest.raises(ValueError, match="no table of settings"):
    _write(path, [{"problem": {}, "config": {}}])
  assert path.read_text() == before


def test_neighbours_differ_in_one_respect_and_are_valid():
  start = tuning.Config(chunks=4)
  found = list(bench_tune.neighbours(start))
  assert len(set(found)) == len(found) > 8
  for config in found:
    before, after = dataclasses.asdict(start), dataclasses.asdict(config)
    assert sum(before[name] != after[name] for name in before) == 1
  assert {1, 2, 8, 16} <= {config.chunks for config in found}


def test_the_search_finds_the_fastest_and_skips_what_fails():
  """A fake device likes tile 32, buffers 3; unroll 8 does not lower."""

  def time(config):
    if config.unroll == 8:
      raise NotImplementedError("does not lower\nat all")
    if config.buffers == 4:
      raise bench_tune.CandidateError("y: relative error 1")
    return 100 + abs(config.tile - 32) + 10 * abs(config.buffers - 3)

  trials = []
  best = bench_tune.search(tuning.Config(), time, trials.append)
  assert (best.config.tile, best.config.buffers) == (32, 3)
  assert best.microseconds == 100
  reasons = {t.reason for t in trials if t.microseconds is None}
  assert reasons == {
    "NotImplementedError: does not lower",
    "CandidateError: y: relative error 1",
  }
  assert len({t.config for t in trials}) == len(trials)  # None timed twice.


def test_noise_does_not_change_settings():
  start = tuning.Config()
  time = lambda config: 100.0 if config == start else 99.0
  assert bench_tune.search(start, time).config == start


def test_settings_that_fail_from_the_start_are_an_error():
  def time(config):
    raise RuntimeError("no such kernel")

  with pytest.raises(bench_tune.CandidateError, match="no such kernel"):
    bench_tune.search(tuning.Config(), time)


_DEVICE = bench_tune.Device(device_kind=_KIND, core_count=132)


def test_tuning_rewrites_its_calls_and_keeps_the_others(tmp_path, capsys):
  path = tmp_path / "tuning_x.json"
  spec = arg_specs.ARG_SPECS["mambavision_tiny_stage3"]
  mine = tuning.Problem(
    b=16 * spec.b, l=spec.l, d=spec.d, g=spec.g, n=spec.n, itemsize=2
  )
  _write(path, [_entry(), _entry(mine)])

  def timer(call, dtype, config):
    assert call.b == mine.b
    if dtype == "float32":
      raise bench_child.ChildError("timed out after 45 s")
    return 10.0 * config.buffers

  bench_tune.tune(
    ["mambavision_tiny_stage3"],
    device=_DEVICE,
    timer=timer,
    path=path,
    batch_factor=16,
  )
  table = tuning.read_table(path)
  assert table.keys() == {_PROBLEM, mine}
  assert table[_PROBLEM] == _CONFIG
  assert table[mine].buffers == 1
  written = json.loads(path.read_text())
  assert jax.__version__ in written["note"]
  assert written["entries"][-1]["microseconds"] == 10.0
  printed = capsys.readouterr().out
  assert "best: Config(" in printed
  assert "left as it is: the heuristic settings fail: ChildError: ti" in printed


def test_tuning_keeps_what_it_knows_when_the_time_is_up(tmp_path, capsys):
  path = tmp_path / "tuning_x.json"
  now = 0.0

  def timer(call, dtype, config):
    nonlocal now
    now += 10
    return 1e3 - now

  bench_tune.tune(
    ["vim_tiny_224"],
    device=_DEVICE,
    timer=timer,
    path=path,
    seconds=45,
    clock=lambda: now,
  )
  assert now == 50
  ((problem, _),) = tuning.read_table(path).items()
  assert problem.itemsize == 2
  assert "vim_tiny_224 float32: the time is up" in capsys.readouterr().out


def test_settings_are_timed_once_they_compute_what_they_must(monkeypatch):
  spec = arg_specs.ArgSpec(b=2, l=3, d=4, n=2, source="")
  seen = []

  def scan(config, **arrays):
    seen.append(config)
    y = api.selective_scan(
      **arrays, delta_softplus=True, implementation="reference"
    )
    return y if config == _CONFIG else 1.01 * y

  monkeypatch.setattr(bench_tune, "with_config", scan)
  monkeypatch.setattr(bench_checks, "_POISON_BYTES", 4096)
  monkeypatch.setattr(bench_timing, "_MAX_COPIES", 2)
  assert bench_tune.time_on_device(spec, "float32", _CONFIG) > 0
  with pytest.raises(bench_tune.CandidateError, match="y: relative error 0.01"):
    bench_tune.time_on_device(spec, "float32", tuning.Config())
  assert set(seen) == {_CONFIG, tuning.Config()}


def test_given_settings_reach_the_kernels(monkeypatch):
  seen = []

  def scan(args, options, *, config):
    seen.append((config, options.delta_softplus, args.z))
    return args.u, None

  monkeypatch.setattr(bench_tune.mosaic_gpu, "selective_scan", scan)
  spec = arg_specs.ArgSpec(b=1, l=5, d=4, n=2, source="")
  arrays = arg_specs.make_arguments(spec)
  y = bench_tune.with_config(_CONFIG, **arrays)
  assert y is arrays["u"]
  assert seen == [(_CONFIG, True, None)]
