"""The benchmark's arithmetic, and its command line on a tiny call."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import (
  bench,
  bench_compare,
  bench_compiled,
  bench_ops,
  bench_timing,
  compiled,
)
from pallas_kernels.selective_scan import arg_specs

_TINY = arg_specs.ArgSpec(b=1, l=5, d=4, n=2, g=2, gate=True, source="a test")


def _row(**changes):
  row = bench_compare.Row(
    spec="vim_tiny_224",
    implementation="xla_sequential",
    direction="forward+backward",
    median_ms=10.0,
    quartiles_ms=(9.0, 11.0),
    temp_mib=1.0,
    speedup=7.5,
    memory_ratio=49.0,
  )
  return dataclasses.replace(row, **changes)


def test_gates_judge_speed_and_memory_of_forward_plus_backward():
  rows = [
    _row(),
    _row(direction="forward", speedup=1.0),
    _row(implementation="xla_associative", speedup=1.0),
    _row(spec="vim_tiny_1248", speedup=1.0),
  ]
  speed, memory = bench_compare.check_gates(rows)
  assert speed.startswith("PASS vim_tiny_224 xla_sequential speed: 7.5x")
  assert memory.startswith("FAIL vim_tiny_224 xla_sequential memory: 49.0x")


def test_gates_belong_to_calls_that_exist():
  assert bench_compare.GATES.keys() <= arg_specs.ARG_SPECS.keys()


def test_baseline_computes_the_same():
  arrays = arg_specs.make_arguments(_TINY)
  want = pallas_kernels.selective_scan(
    **arrays, delta_softplus=True, implementation="reference"
  )
  got = jax.jit(lambda arrays: bench_compare.baseline_selective_scan(**arrays))(
    arrays
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_command_line_prints_a_table_and_writes_json(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.setitem(arg_specs.ARG_SPECS, "a_tiny_call", _TINY)
  path = tmp_path / "results.json"
  bench.main(["--filter", "a_tiny_call", "--rounds", "2", "--json", str(path)])
  results = json.loads(path.read_text())
  assert results["environment"]["jax"] == jax.__version__
  found = {(row["implementation"], row["direction"]) for row in results["rows"]}
  names = ("baseline", "xla_associative", "xla_sequential")
  assert found == {
    (name, direction)
    for name in names
    for direction in ("forward", "forward+backward")
  }
  for row in results["rows"]:
    low, high = row["quartiles_ms"]
    assert 0 < low <= row["median_ms"] <= high
  assert results["gates"] == []  # None is set for this call.
  printed = capsys.readouterr().out
  assert all(name in printed for name in (*names, "temp MiB", "quartiles"))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--filter", "resnet"], "no call has 'resnet' in its name; there are vim"),
    (["--filter", "vim("], "'vim(' is no regular expression: "),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    (["convolution"], "invalid choice: 'convolution'"),
    (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    (["--dtype", "bfloat16"], "--dtype goes with --compiled only"),
    (["--batch-factor", "2"], "goes with --compiled or --tune only"),
    (["--compiled", "--batch-factor", "0"], "must be at least 1, got 0"),
    (["cross_selective_scan", "--tune"], "with --compiled or --suite"),
    (["--tune", "--compiled"], "not allowed with argument"),
    (["--tune", "--json", "x.json"], "--tune writes the table beside"),
  ],
)
def test_wrong_command_lines_are_explained(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    bench.main(arguments)
  assert error.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments", [["--tune"], ["--suite", "gpu", "--json", "results.json"]]
)
def test_without_a_gpu_it_says_so(arguments, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = bench.main([*arguments, "--filter", "vim"])
  assert code == bench.UNAVAILABLE == 69
  captured = capsys.readouterr()
  assert "needs an NVIDIA GPU of compute capability" in captured.err
  assert "not cpu" in captured.err
  assert not captured.out
  assert not [*tmp_path.iterdir()]


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(compiled, "missing", lambda: "pip install 'jax[cuda13]'")
  code = bench.main(["--compiled", "--filter", "vim"])
  assert code == bench.UNAVAILABLE
  error = capsys.readouterr().err
  assert "cannot be compiled here; install: pip install 'jax[cuda13]'" in error


def test_compiled_figures_are_printed_and_written(
  monkeypatch, tmp_path, capsys
):
  launch = compiled.Launch(
    name="selective_scan",
    blocks=2,
    threads=128,
    shared_memory=300_000,
    bytes_accessed=10,
  )
  kernel = compiled.Kernel(
    launch=launch,
    registers=255,
    spill_bytes=16,
    opcodes=collections.Counter(FFMA=100),
    loops=(),
  )
  monkeypatch.setattr(compiled, "missing", lambda: None)
  monkeypatch.setattr(compiled, "kernels", lambda *arguments: [kernel])
  path = tmp_path / "compiled.json"
  code = bench.main(
    ["--compiled", "selective_scan", "--filter", "224", "--json", str(path)]
  )
  assert code == 0
  results = json.loads(path.read_text())
  assert len(results["rows"]) == 4  # Two dtypes, two directions.
  rows = [bench_compiled.Figures(**row) for row in results["rows"]]
  assert {row.spec for row in rows} == {"vim_tiny_224"}
  assert rows[0].instructions == 100
  assert rows[0].instructions_per_state is None  # It has no loops.
  printed = capsys.readouterr().out
  assert "MISSED vim_tiny_224 bfloat16 forward selective_scan: spills 16" in (
    printed
  )
  assert results["environment"]["jax"] == jax.__version__


def test_work_is_what_the_shapes_say():
  sizes = bench_ops.OPS["selective_scan"].sizes(_TINY)
  forward = bench_ops.work(sizes, bench_ops.FORWARD, itemsize=2)
  # u, delta, z and y; B and C of two groups; A, D and the bias.
  assert forward.bytes == 2 * (4 * 5 * 4 + 2 * 5 * 2 * 2) + 4 * 4 * (2 + 2)
  assert forward.exponentials == 5 * 4 * (2 + 4)
  assert forward.fmas == 4 * 5 * 4 * 2
  both = bench_ops.work(sizes, bench_ops.GRADIENT, itemsize=2)
  assert both.exponentials == 2 * forward.exponentials
  # All but y twice more, as inputs and as gradients, and y's gradient.
  assert both.bytes == 3 * forward.bytes - 2 * (5 * 4)


def test_an_image_scanned_four_ways_is_read_once():
  op = bench_ops.OPS["cross_selective_scan"]
  spec = next(iter(op.specs.values()))
  sizes = op.sizes(spec)
  assert sizes.steps == 4 * spec.b * spec.h * spec.w * spec.d
  work = bench_ops.work(sizes, bench_ops.FORWARD, itemsize=2)
  arrays = jax.eval_shape(lambda: op.make_arguments(spec, dtype=jnp.bfloat16))
  read = sum(x.size * x.dtype.itemsize for x in arrays.values())
  assert work.bytes == read + 2 * arrays["u"].size


def test_the_floor_is_set_by_the_slowest_unit():
  cycles = 132 * 1.755e9
  work = lambda **given: bench_ops.Work(
    **({"bytes": 0, "exponentials": 0, "fmas": 0} | given)
  ).floor_seconds()
  assert work(bytes=3 * 10**12) == 1.0
  assert work(exponentials=16) == pytest.approx(1 / cycles)
  assert work(fmas=128, exponentials=15) == pytest.approx(1 / cycles)


def test_timing_counts_launches_and_rotates_inputs():
  now = 0.0
  seen = []

  def call(x):
    nonlocal now
    seen.append(x)
    now += 1e-3
    return x

  timing = bench_timing.measure(
    call, "abc", rounds=4, round_seconds=0.0101, clock=lambda: now
  )
  assert timing.launches == 10
  assert timing.median_us == pytest.approx(1000)
  assert timing.quartiles_us == pytest.approx((1000, 1000))
  assert "".join(seen[:16]) == "abcabc" + "abcabcabca"
  assert len(seen) == 3 + 3 + 4 * 10


def test_a_rotation_is_larger_than_the_cache():
  arrays = {"u": jnp.zeros(1000, jnp.float32)}
  rotation = bench_timing.copies(arrays, rotation_bytes=10_000)
  assert len(rotation) == 3
  pointers = {x["u"].unsafe_buffer_pointer() for x in rotation}
  assert len(pointers) == 3
  assert len(bench_timing.copies(arrays, rotation_bytes=1)) == 2


def test_the_measured_bandwidth_and_clock_set_the_floor():
  work = bench_ops.Work(bytes=10**9, exponentials=16 * 132, fmas=0)
  assert work.floor_seconds(bytes_per_second=1e12) == 1e-3
  slow = work.floor_seconds(bytes_per_second=1e15, clock_hz=1e3)
  assert slow == pytest.approx(1e-3)


@pytest.mark.parametrize("op", bench_ops.OPS.values(), ids=bench_ops.OPS)
def test_arguments_made_on_the_device_are_like_the_others(op):
  spec = dataclasses.replace([*op.specs.values()][-1], b=3)
  shapes = bench_ops.argument_shapes(op, spec, jnp.dtype("bfloat16"))
  want = op.make_arguments(spec, dtype=jnp.bfloat16)
  describe = lambda arrays: {k: (x.shape, x.dtype) for k, x in arrays.items()}
  assert describe(shapes) == describe(want)
  got = bench_ops.random_arguments(op.name, spec, "bfloat16")
  assert describe(got) == describe(want)
  assert (got["A"] < 0).all()
  assert abs(got["delta_bias"].mean() + 3) < 1
  assert len({float(x.ravel()[0]) for x in got.values()}) == len(got)


def _trace(*events):
  """What the profiler returns; events are (start, name, duration)."""
  event = collections.namedtuple("event", "start_ns name duration_ns")
  line = collections.namedtuple("line", "name events")
  plane = collections.namedtuple("plane", "name lines")
  stream = line("Stream #7", [event(*x) for x in events])
  other = line("XLA Ops", [event(0, "scan", 1e9)])
  return collections.namedtuple("data", "planes")(
    [plane("/host:CPU", [stream]), plane("/device:GPU:0", [stream, other])]
  )


def test_profiles_are_read_call_by_call():
  events = bench_timing._kernel_events(
    _trace(
      *((10 * i, "scan", 1e3 * i) for i in range(1, 5)),
      *((10 * i + 1, "pad", 500) for i in range(1, 5)),
    )
  )
  assert len(events) == 8
  timing, kernels = bench_timing._by_call(sorted(events), launches=4, calls=3)
  assert kernels == {"scan": 3.0, "pad": 0.5}  # The first one warms up.
  assert timing.median_us == 3.5
  assert timing.quartiles_us == (3.0, 4.0)
  assert (timing.launches, timing.rounds) == (1, 3)


def test_profiles_that_cannot_be_told_apart_by_calls_are_averages():
  events = [(1, "scan", 2e3), (2, "scan", 4e3), (3, "pad", 1e3)]
  timing, kernels = bench_timing._by_call(events, launches=2, calls=2)
  assert kernels == {"scan": 3.0, "pad": 0.5}
  assert timing.median_us == 3.5
  assert (timing.launches, timing.rounds) == (2, 1)


def test_without_a_gpu_there_is_no_profile():
  call = jax.jit(lambda x: x + 1)
  with pytest.raises(RuntimeError, match="saw no kernel on a GPU"):
    bench_timing.profile(call, [jnp.zeros(3)])
