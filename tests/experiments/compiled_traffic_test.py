"""What the kernels of a compiled program read and write."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from experiments.throughput import compiled_memory, compiled_traffic, programs

_PROGRAM = textwrap.dedent(  # Lines are joined where they end in a backslash.
  """\
  HloModule jit_f, is_scheduled=true

  %fused (param_0: bf16[8,4], param_1: f32[4]) -> f32[8,2] {
    %param_0 = bf16[8,4]{1,0} parameter(0)
    %view = bf16[2,4,4]{2,1,0} bitcast(%param_0)
    %first = bf16[2,4,2]{2,1,0} slice(%view), slice={[0:2], [0:4], [0:2]}
    %again = bf16[2,4,2]{2,1,0} slice(%view), slice={[0:2], [0:4], [0:2]}
    %param_1 = f32[4]{0} parameter(1)
    ROOT %sum = f32[8,2]{1,0} add(%first, %param_1)
  }

  %body (state: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
    %state = (s32[], f32[8,2]{1,0}) parameter(0)
    %x = f32[8,2]{1,0} get-tuple-element(%state), index=1
    %square = f32[8,2]{1,0} fusion(%x, %x), kind=kLoop, calls=%squared, \
    metadata={op_name="f/layers_12/mul"}
    ROOT %next = (s32[], f32[8,2]{1,0}) tuple(%state, %square)
  }

  %squared (p: f32[8,2], q: f32[8,2]) -> f32[8,2] {
    %p = f32[8,2]{1,0} parameter(0)
    %q = f32[8,2]{1,0} parameter(1)
    ROOT %product = f32[8,2]{1,0} multiply(%p, %q)
  }

  ENTRY %main (a: bf16[8,4], b: f32[4]) -> (f32[8,2], pred[3]) {
    %a = bf16[8,4]{1,0} parameter(0)
    %b = f32[4]{0} parameter(1)
    %fusion = f32[8,2]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused, \
    metadata={op_name="f/layers_0/add"}
    %start = (s32[], f32[8,2]{1,0}) tuple(%b, %fusion)
    %loop = (s32[], f32[8,2]{1,0}) while(%start), condition=%c, body=%body, \
    backend_config={"known_trip_count":{"n":"5"}}
    %kernel = (f32[8,2]{1,0}, /*index=1*/pred[3]{0}) custom-call(%fusion, \
    %a), custom_call_target="mosaic_gpu_v2", metadata={op_name="f/scan"}
    ROOT %done = (f32[8,2]{1,0}, pred[3]{0}) tuple(%kernel)
  }
  """
)


def test_operands_slices_and_repeats_are_counted():
  rows = {row.place: row for row in compiled_traffic.measure(_PROGRAM)}
  assert set(rows) == {"f/layers_#/add", "f/layers_#/mul", "f/scan"}
  add, mul, scan = (
    rows["f/layers_#/add"],
    rows["f/layers_#/mul"],
    rows["f/scan"],
  )
  # Half of the bfloat16 array, once, and four float32 numbers.
  assert (add.kernels, add.read, add.written) == (1, 32 + 16, 64)
  # Five runs; an operand that is there twice is read once.
  assert (mul.kernels, mul.read, mul.written) == (5, 5 * 64, 5 * 64)
  assert (scan.kernels, scan.read, scan.written) == (1, 64 + 64, 64 + 3)


def test_the_largest_come_first_with_the_sum_of_all():
  rows = compiled_traffic.measure(_PROGRAM)
  assert [row.place for row in rows] == [
    "f/layers_#/mul",
    "f/scan",
    "f/layers_#/add",
  ]
  head, total, first = compiled_traffic.text(rows, top=1).splitlines()
  assert head.split() == ["GB", "kernels", "place"]
  assert total.split()[1:] == ["7", "all"]
  assert first.split()[1:] == ["5", "f/layers_#/mul"]


def test_a_program_as_this_compiler_writes_it():
  x = jnp.ones((100, 10))
  compiled = jax.jit(lambda x: jnp.tanh(x) + 1).lower(x).compile()
  rows = compiled_traffic.measure(compiled.as_text())
  assert sum(row.read for row in rows) == 4 * x.size
  assert sum(row.written for row in rows) == 4 * x.size


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    compiled_traffic.measure("nothing")


def test_the_command_compiles_the_case_asked_for(monkeypatch, capsys):
  asked = []

  class Program:
    compiled = type("Compiled", (), {"as_text": lambda self: _PROGRAM})()

  def compile_case(case, sharding):
    assert jax.sharding.get_abstract_mesh() == sharding.mesh.abstract_mesh
    asked.append(case)
    return Program()

  mesh = jax.sharding.Mesh(jax.devices()[:1], ("device",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  monkeypatch.setattr(programs, "compile_case", compile_case)
  monkeypatch.setattr(compiled_memory, "h100", lambda: sharding)
  argv = ["deit_tiny", "--mode", "training", "--attention", "flash"]
  assert compiled_traffic.main([*argv, "--batch", "2"]) == 0
  (case,) = asked
  assert case.label == "deit_tiny (flash)"
  assert (case.mode, case.batch, case.precision) == ("training", 2, None)
  assert "f/layers_#/mul" in capsys.readouterr().out


def test_missing_wheels_are_named(monkeypatch, capsys):
  monkeypatch.setattr(
    compiled_memory.importlib.util, "find_spec", lambda name: None
  )
  assert compiled_traffic.main(["vim_tiny"]) == 1
  assert "pip install 'jax[cuda13]'" in capsys.readouterr().err
