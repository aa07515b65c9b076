"""Memory of models compiled for a GPU that is not there: all but compiling."""

import jax
import pytest

from experiments.throughput import compiled_memory, programs


class _Compiled:
  """A program that calls two kernels."""

  def as_text(self):
    return 2 * 'custom_call_target="mosaic_gpu_v2"'


@pytest.fixture
def no_plugin(monkeypatch):
  """No CUDA plugin, and programs that need ten times as much in DeiT."""

  def compile_case(case, sharding):
    assert jax.sharding.get_abstract_mesh() == sharding.mesh.abstract_mesh
    return programs.Program(
      case=case,
      compiled=_Compiled(),
      variables={},
      num_classes=10,
      compile_s=1.0,
      argument_bytes=1,
      # Two images, three heads, 4 x 4 patches and the class token.
      temp_bytes=2 * (4 * 2 * 3 * 17**2) + 1,
      peak_bytes=10**9 if case.attention else 10**8,
    )

  mesh = jax.sharding.Mesh(jax.devices()[:1], ("device",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  monkeypatch.setattr(programs, "compile_case", compile_case)
  monkeypatch.setattr(compiled_memory, "h100", lambda: sharding)
  monkeypatch.setattr(
    compiled_memory.importlib.metadata, "version", lambda name: "0.0"
  )


def test_attention_weights_are_counted(no_plugin, tmp_path, capsys):
  del no_plugin
  path = tmp_path / "results.json"
  argv = ["--size", "64", "--batch", "2", "--json", str(path)]
  assert compiled_memory.main(argv) == 0
  facts, (vim, deit) = compiled_memory.read(path)
  assert (vim.case.label, vim.matrices) == ("vim_tiny", None)
  assert vim.scan_kernels == 2
  assert deit.case.label == "deit_tiny (materialised)"
  assert deit.matrix_bytes == 4 * 2 * 3 * 17**2
  assert deit.matrices == pytest.approx(2, rel=1e-3)
  assert facts["jax"] == jax.__version__
  assert facts["run"].startswith("on none")
  text = compiled_memory.text([vim, deit], facts)
  assert text in capsys.readouterr().out
  words = " ".join(text.split())
  assert "90.0 % less than 1.0 GB in deit_tiny" in words
  assert "2 such L x L copies live at once" in words


def test_missing_wheels_are_named(monkeypatch, capsys):
  monkeypatch.setattr(
    compiled_memory.importlib.util, "find_spec", lambda name: None
  )
  assert compiled_memory.main([]) == 1
  assert "pip install 'jax[cuda13]'" in capsys.readouterr().err
