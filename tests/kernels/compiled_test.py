"""The reader of machine code, on a sample; the compiler, where there is one."""

import collections
import dataclasses
import re

import jax.numpy as jnp
import pytest

from pallas_kernels import bench_compiled, bench_ops, compiled, compiled_sass
from pallas_kernels.selective_scan import arg_specs, tuning

# The shape of a forward kernel: a loop over tiles with two tokens at a time and
# a loop for what is left of a tile, a wait out of line, and the end.
SASS = """
        .type           selective_scan_mosaic_gpu_kernel,@function
.text.selective_scan_mosaic_gpu_kernel:
   -:-:1:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   -:-:-:-:05        /*0010*/                   IMAD.SHL.U32 R9, R20, 0x2, RZ
.L_x_1:
   -:-:-:Y:02        /*0020*/               @P0 SYNCS.PHASECHK.TRANS64 P0, [R2]
   -:-:-:Y:05        /*0030*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
   -:-:-:Y:04        /*0040*/                   FMUL.FTZ R3, R4, R5
   2:-:3:Y:08        /*0050*/                   MUFU.EX2 R3, R3
   -:-:-:Y:04        /*0060*/                   FFMA R6, R3, R6, R7
   2:-:3:Y:08        /*0070*/             @!UP1 MUFU.EX2 R8, R8
   -:-:3:Y:02        /*0080*/                   MUFU.RCP R8, R8
   -:-:-:Y:05        /*0090*/               @P1 BRA `(.L_x_2)
.L_x_3:
   2:-:3:Y:08        /*00a0*/                   MUFU.EX2 R3, R3
   -:-:-:Y:05        /*00b0*/               @P2 BRA `(.L_x_3)
   -:-:-:Y:01        /*00c0*/                   IADD3 R1, R1, 0x1, RZ
   -:-:-:Y:05        /*00d0*/               @P3 BRA `(.L_x_1)
   -:-:-:Y:05        /*00e0*/                   EXIT
.L_x_5:
   -:-:-:Y:02        /*00f0*/                   SYNCS.PHASECHK.TRANS64 P0, [R2]
   -:-:-:Y:05        /*0100*/              @!P0 BRA `(.L_x_5)
   -:-:-:Y:05        /*0110*/                   BRA `(.L_x_2)
.L_x_6:
   -:-:-:Y:00        /*0120*/                   BRA `(.L_x_6);
"""


def _instructions(loop):
  return loop.instructions


def test_instructions_are_counted_without_modifiers_and_predicates():
  opcodes, _ = compiled_sass.parse(SASS)
  assert opcodes.total() == 19
  assert opcodes["BRA"] == 7
  assert opcodes["FMUL"] == opcodes["FFMA"] == opcodes["MUFU.RCP"] == 1
  assert opcodes[compiled_sass.EXPONENTIAL] == 3


def test_loops_are_found_and_those_after_the_end_are_not_taken_for_work():
  _, loops = compiled_sass.parse(SASS)
  by_start = {loop.start: loop for loop in loops}
  # The tile, two tokens, the rest, and the wait: two instructions.
  assert {x: loop.instructions for x, loop in by_start.items()} == {
    2: 12,
    4: 6,
    10: 2,
    15: 2,
  }
  assert by_start[4].stall_cycles == 4 + 8 + 4 + 8 + 2 + 5
  assert by_start[4].special_functions == 3
  assert by_start[2].has(by_start[4])
  assert not by_start[4].has(by_start[10])
  (nest,) = compiled_sass.nests(loops)
  assert [loop.start for loop in nest] == [2, 4]


def test_a_step_costs_its_share_of_all_loops_around_it():
  _, loops = compiled_sass.parse(SASS)
  (nest,) = compiled_sass.nests(loops)
  # A tile of 8 tokens: 4 instructions of its own beside the loops in it.
  cost = compiled_sass.per_step(loops, nest, (8, 2), _instructions)
  assert cost == 6 / 2 + 4 / 8


def test_a_block_that_may_be_skipped_is_not_counted():
  """The loop for the rest of a tile has become a branch over one token."""
  text = SASS.replace(".L_x_3:\n", "   @P2 BRA `(.L_x_3)\n")
  text = text.replace(
    "/*00b0*/               @P2 BRA `(.L_x_3)", "/*00b0*/  FADD R1, R2, R3"
  ).replace(
    "   -:-:-:Y:01        /*00c0*/", ".L_x_3:\n   -:-:-:Y:01        /*00c0*/"
  )
  text = text.replace(
    "   @P2 BRA `(.L_x_3)", "   -:-:-:Y:05  /*0098*/  @P2 BRA `(.L_x_3)"
  )
  _, loops = compiled_sass.parse(text)
  (block,) = (loop for loop in loops if not loop.repeats)
  assert block.opcodes == {"MUFU.EX2": 1, "FADD": 1}
  (nest,) = compiled_sass.nests(loops)
  # The branch itself is run; the two tokens have twice the exponentials.
  cost = compiled_sass.per_step(loops, nest, (8, 2), _instructions)
  assert cost == 6 / 2 + 5 / 8


def test_a_second_path_of_a_kernel_counts_and_a_short_loop_does_not():
  def loop(start, instructions, exponentials=1):
    opcodes = collections.Counter(FFMA=instructions - exponentials)
    opcodes["MUFU.EX2"] = exponentials
    return compiled_sass.Loop(start, opcodes, 0)

  short, rows, row, columns = (
    loop(*x) for x in ((0, 20), (30, 100), (40, 50), (200, 70))
  )
  nests = compiled_sass.nests([short, rows, row, columns, loop(300, 99, 0)])
  assert nests == [(rows, row), (columns,)]


def _kernel(**changes):
  opcodes, loops = compiled_sass.parse(SASS)
  launch = {
    "name": "selective_scan",
    "blocks": 264,
    "threads": 128,
    "shared_memory": 50_000,
    "bytes_accessed": 1000,
  }
  kernel = {"registers": 64, "spill_bytes": 0} | {
    name: changes.pop(name) for name in [*changes] if name not in launch
  }
  return compiled.Kernel(
    launch=compiled.Launch(**(launch | changes)),
    opcodes=opcodes,
    loops=loops,
    **kernel,
  )


@pytest.mark.parametrize(
  ("registers", "shared_memory", "blocks"),
  [
    (64, 1000, 8),  # 65,536 registers: 64 for each of 1024 threads.
    (65, 1000, 7),  # Rounded up to 72.
    (255, 1000, 2),
    (32, 1000, 16),  # 64 warps.
    (32, 115_712, 2),
    (32, 115_713, 1),
  ],
)
def test_blocks_per_multiprocessor(registers, shared_memory, blocks):
  kernel = _kernel(registers=registers, shared_memory=shared_memory)
  assert kernel.blocks_per_multiprocessor == blocks


def test_prediction_takes_the_slowest_of_what_bounds_a_kernel():
  # 4 blocks fit, 2 are there for each multiprocessor, 100 steps for a thread.
  steps = 264 * 128 * 100
  clock = bench_ops.CLOCK_HZ
  predict = bench_compiled.predict_seconds
  issue = predict(_kernel(), steps, 30.0, 2.0, 50.0)
  assert issue == pytest.approx(100 * 2 * 30 / clock)
  special = predict(_kernel(), steps, 30.0, 5.0, 50.0)
  assert special == pytest.approx(100 * 2 * 5 * 8 / clock)
  latency = predict(_kernel(), steps, 30.0, 2.0, 90.0)
  assert latency == pytest.approx(100 * 90 / clock)
  memory = predict(_kernel(bytes_accessed=10**9), steps, 30.0, 2.0, 50.0)
  assert memory == pytest.approx(1e9 / bench_ops.BYTES_PER_SECOND)
  # One block too many for the first wave waits for a second.
  two = _kernel(shared_memory=110_000, blocks=265)
  waves = predict(two, 265 * 128 * 100, 30.0, 2.0, 50.0)
  assert waves == pytest.approx(100 * (2 * 30 + 50) / clock)


def _figures(**changes):
  row = bench_compiled.Figures(
    op="selective_scan",
    spec="vim_tiny_224",
    dtype="bfloat16",
    direction=bench_ops.FORWARD,
    kernel="selective_scan",
    n=16,
    blocks=96,
    registers=110,
    spill_bytes=0,
    shared_memory=70_000,
    blocks_per_multiprocessor=3,
    instructions=1240,
    instructions_per_state=7.65,
    predicted_us=5.1,
  )
  return dataclasses.replace(row, **changes)


def test_missed_targets_are_named():
  back = {"kernel": "selective_scan_backward", "instructions_per_state": 34.0}
  assert not bench_compiled.missed(_figures())
  assert not bench_compiled.missed(_figures(**back))
  # The target for the forward kernel is one for n = 16.
  assert not bench_compiled.missed(_figures(n=1, instructions_per_state=29.5))
  for changes, message in (
    ({"spill_bytes": 8}, "spills 8 bytes"),
    ({"instructions_per_state": 8.01}, "8.01 instructions per .* wanted 8"),
    ({"instructions_per_state": None}, "could not be counted"),
    (back | {"instructions_per_state": 35.0}, "35.00 .* wanted 34"),
    (back | {"blocks_per_multiprocessor": 1}, "1 blocks .* wanted 2"),
  ):
    (clause,) = bench_compiled.missed(_figures(**changes))
    assert re.search(message, clause)


@pytest.mark.parametrize("op", bench_ops.OPS.values(), ids=bench_ops.OPS)
def test_the_blocks_of_every_call_are_known(op):
  with bench_compiled.on_h100():
    for spec in op.specs.values():
      for itemsize in (2, 4):
        blocks = op.blocks(spec, itemsize)
        assert blocks.forward_channels in (128, 256)
        assert blocks.backward_channels in (64, 128, 256)
        assert blocks.config.tile % blocks.config.backward_tile == 0


@pytest.mark.parametrize(
  ("kernel", "n", "channels", "exponentials", "steps"),
  [
    # Four tokens, each with 16 decays and a softplus; tiles of 16.
    ("selective_scan", 16, 128, (85, 68), (16, 4)),
    ("selective_scan", 16, 128, (85, 85, 68), (16, 8, 4)),
    ("selective_scan", 15, 128, (85, 68), (16, 4)),  # Padded to 16 states.
    ("selective_scan", 16, 128, (85, 67), None),
    ("selective_scan", 16, 128, (85,), (5,)),
    ("selective_scan", 16, 128, (85, 85, 85, 85), None),
    # A lane has two channels, with a decay and a softplus each.
    ("selective_scan", 1, 256, (32, 32), (32, 16)),
    ("selective_scan_backward", 16, 128, (200,), (8,)),
    ("selective_scan_backward", 32, 64, (200,), (4,)),
    ("selective_scan_backward", 16, 128, (200, 100), None),
    ("selective_scan_backward", 1, 128, (16, 16), (16, 8)),
    ("selective_scan_backward", 1, 128, (16,), (8,)),
  ],
)
def test_the_steps_of_loops_are_known(kernel, n, channels, exponentials, steps):
  nest = [
    compiled_sass.Loop(0, collections.Counter({"MUFU.EX2": x}), 0)
    for x in exponentials
  ]
  spec = arg_specs.ArgSpec(b=1, l=1, d=8, n=n, source="")
  blocks = bench_ops.Blocks(
    config=tuning.Config(tile=16),
    forward_channels=channels,
    backward_channels=channels,
  )
  sizes = bench_ops.OPS["selective_scan"].sizes(spec)
  assert bench_compiled.steps(nest, kernel, sizes, blocks) == steps


def test_what_has_to_be_installed_is_said(monkeypatch):
  monkeypatch.setattr(compiled, "_is_installed", lambda module: False)
  monkeypatch.setattr(compiled.shutil, "which", lambda *args, **kwargs: None)
  monkeypatch.setattr(compiled, "_has_driver", lambda: False)
  wanted = compiled.missing()
  assert wanted is not None
  for part in ("jax[cuda13]", "nvidia-cuda-nvdisasm", "a C compiler"):
    assert part in wanted
  with pytest.raises(RuntimeError, match="more to be installed"):
    compiled.kernels(lambda x: x, 1.0)


def test_lowered_kernels_say_how_they_start():
  op = bench_ops.OPS["selective_scan"]
  spec = op.specs["mambavision_tiny_stage3"]
  with bench_compiled.on_h100():
    found = compiled.lowered_kernels(
      bench_ops.program(op, bench_ops.FORWARD, "mosaic_gpu"),
      bench_ops.argument_shapes(op, spec, jnp.dtype("bfloat16")),
    )
  launch, code = found[-1]
  assert launch.name == "selective_scan"
  assert launch.threads == 128
  # Each block owns one row of the batch, and at most 128 of 160 channels.
  assert launch.blocks % (2 * spec.b) == 0
  assert 0 < launch.shared_memory <= 227 * 1024
  sequence = 2 * spec.b * spec.l * spec.d
  assert launch.bytes_accessed > 3 * sequence  # u, delta and y.
  assert len(code) > 1000


@pytest.mark.skipif(
  compiled.missing() is not None, reason=f"needs {compiled.missing()}"
)
def test_a_kernel_is_compiled_without_spills():
  op = bench_ops.OPS["selective_scan"]
  rows = bench_compiled.figures(
    op, "mambavision_tiny_stage3", "bfloat16", bench_ops.FORWARD
  )
  assert rows
  for row in rows:
    assert row.spill_bytes == 0
    assert 20 < row.registers <= 255
    assert row.instructions_per_state is not None
    assert 5 < row.instructions_per_state < 20
