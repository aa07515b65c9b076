"""The comparison with timm: its report, and what it says without PyTorch."""

import json

import jax.numpy as jnp
import pytest

from experiments.throughput import against_timm, programs
import vimjax


@pytest.fixture
def small(monkeypatch):
  """Tiny models, no PyTorch, and no limit on this process's cores."""

  def build(case):
    fields = dict(num_classes=10, depth=1, dtype=jnp.dtype(case.dtype))
    return vimjax.create_model(case.model, image_size=case.size, **fields)

  settings = (against_timm.Setting(("vim_tiny", "deit_tiny"), 32, 2),)
  monkeypatch.setattr(programs, "build", build)
  monkeypatch.setattr(against_timm, "SETTINGS", settings)
  monkeypatch.setattr(
    against_timm.os, "sched_setaffinity", lambda *_: None, raising=False
  )


def test_all_models_are_related_to_the_peer(small, monkeypatch, tmp_path):
  del small
  calls = []
  monkeypatch.setattr(
    against_timm, "peer_step", lambda *sizes: lambda: calls.append(sizes)
  )
  monkeypatch.setattr(
    against_timm, "environment", lambda threads: {"threads": str(threads)}
  )
  path = tmp_path / "results.json"
  argv = ["--rounds", "3", "--threads", "1", "--json", str(path)]
  assert against_timm.main(argv) == 0
  assert calls == [(32, 2, 1)] * 6  # A warm-up before each of three rounds.
  content = json.loads(path.read_text())
  assert content["environment"] == {"threads": "1"}
  vim, deit, peer = content["rows"]
  assert [vim["model"], deit["model"]] == ["vim_tiny", "deit_tiny"]
  assert (peer["model"], peer["relative"]) == (against_timm.PEER, 1.0)
  for row in (vim, deit):
    low, high = row["quartiles_s"]
    assert 0 < low <= row["median_s"] <= high
    assert row["images_per_second"] == pytest.approx(2 / row["median_s"])
    expected = peer["median_s"] / row["median_s"]
    assert row["relative"] == pytest.approx(expected)
    assert row["temp_bytes"] > 0


def test_table_has_a_line_for_each_row():
  shared = dict(size=224, batch=8, quartiles_s=(1.0, 3.0))
  rows = [
    against_timm.Row(
      model="vim_tiny",
      median_s=4.0,
      images_per_second=2.0,
      relative=0.5,
      temp_bytes=3 * 2**20,
      **shared,
    ),
    against_timm.Row(
      model=against_timm.PEER,
      median_s=2.0,
      images_per_second=4.0,
      relative=1.0,
      temp_bytes=None,
      **shared,
    ),
  ]
  vim, peer = against_timm.markdown(rows).splitlines()[2:]
  assert vim == "| vim_tiny | 8 of 224 x 224 | 2.00 | 0.50 | 3 MiB |"
  assert peer.endswith("| 4.00 | 1.00 |  |")


def test_without_pytorch_it_names_the_extra(small, monkeypatch, capsys):
  del small

  def require(module, *, extra):
    raise ModuleNotFoundError(f"no {module}: vimjax[{extra}]", name=module)

  monkeypatch.setattr(against_timm.optional, "require", require)
  assert against_timm.main([]) == 1
  assert "vimjax[compare]" in capsys.readouterr().err
