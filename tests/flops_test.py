"""Counting multiply-accumulates."""

import dataclasses
import json

import pytest

from tests import readme_tables
import vimjax
from vimjax import flops

# GMACs by the code of VMamba's authors.
VMAMBA = {
  "vmamba_tiny_v0": 5.62689504,
  "vmamba_small_v0": 11.231522784,
  "vmamba_base_v0": 18.020115136,
  "vmamba_tiny_s2l5": 4.85774208,
  "vmamba_small_s2l15": 8.71577472,
  "vmamba_base_s2l15": 15.358944256,
  "vmamba_tiny_s1l8": 4.905609984,
  "vmamba_small_s1l20": 8.612211456,
  "vmamba_base_s1l20": 15.220859904,
}


def _macs(model, size=64):
  return flops.total(flops.count(model, size).values())


@pytest.mark.parametrize("name", VMAMBA)
def test_counts_are_the_official_ones(name):
  model = vimjax.create_model(name)
  assert _macs(model, 224).macs / 1e9 == pytest.approx(VMAMBA[name], rel=1e-3)


def test_plain_layers_by_hand():
  model = vimjax.create_model(
    "deit_tiny", depth=1, num_classes=10, image_size=64
  )
  l, d = 17, 192  # 4 x 4 patches and the class token
  products = {
    ("patch_embed",): 16 * 768 * d,
    ("layers_0", "attention", "qkv"): l * d * 3 * d,
    ("layers_0", "attention"): 2 * l * l * d,
    ("layers_0", "attention", "proj"): l * d * d,
    ("layers_0", "mlp", "fc1"): l * d * 4 * d,
    ("layers_0", "mlp", "fc2"): l * d * 4 * d,
    ("head",): d * 10,
  }
  norms = {
    ("layers_0", "norm1"): 5 * l * d,
    ("layers_0", "norm2"): 5 * l * d,
    ("norm",): 5 * d,  # of the class token alone
  }
  got = flops.count(model, 64)
  assert {path: value.macs for path, value in got.items()} == products | norms
  total = flops.total(got.values())
  assert total.norm_macs == sum(norms.values())
  assert total.scan_macs == 0


@pytest.mark.parametrize(
  "implementation", ["xla_sequential", "xla_associative", "reference"]
)
def test_a_scan_counts_the_same_however_it_is_computed(implementation):
  model = vimjax.create_model(
    "vim_tiny", depth=2, image_size=64, scan_implementation=implementation
  )
  got = _macs(model)
  l, e, n = 17, 384, 16
  assert got.scan_macs == 2 * 2 * (9 * l * e * n + l * e)
  assert got.norm_macs == 2 * 4 * l * 192 + 4 * 192
  mixer = 2 * (4 * l * e + l * e * (12 + 2 * n) + l * 12 * e)  # per direction
  layer = l * 192 * 2 * e + mixer + l * e * 192
  products = 16 * 768 * 192 + 2 * layer + 192 * 1000
  assert got.macs == products + got.scan_macs + got.norm_macs


def test_scanned_layers_count_like_a_loop():
  counts = [
    _macs(vimjax.create_model("vim_tiny", depth=3, scan_layers=scan))
    for scan in (False, True)
  ]
  assert counts[0] == counts[1]


def test_mamba2_and_windows_are_counted():
  mamba2 = _macs(vimjax.create_model("vmamba_tiny_m2", depths=(1, 1, 1, 1)))
  assert mamba2.scan_macs == 0
  assert mamba2.macs > 1e8
  windows = _macs(vimjax.create_model("mambavision_tiny"), 224)
  # ptflops, which does not count the scan and counts norms otherwise.
  assert windows.macs / 1e9 == pytest.approx(4.585, rel=1e-3)


@pytest.mark.parametrize("name", ["deit_tiny", "vim_tiny", "vmamba_tiny_m2"])
def test_the_readme_has_what_is_counted(name):
  path = readme_tables.RESULTS / "model_macs.json"
  counts = json.loads(path.read_text())
  assert list(counts) == vimjax.list_models()
  model = vimjax.create_model(name)
  total = dataclasses.asdict(_macs(model, 224))
  assert counts[name] == {
    "size": 224,
    "params": flops.parameters(model, 224),
    **total,
  }


def test_command_line_prints_a_table_and_json(capsys):
  assert flops.main(["deit_tiny", "--size", "224", "--json"]) == 0
  *table, last = capsys.readouterr().out.splitlines()
  sums = json.loads(last)
  assert list(sums) == ["params", "macs", "scan_macs", "norm_macs"]
  assert sums["params"] == 5717416
  assert table[0] == "deit_tiny, one image of 224x224"
  assert any(line.startswith("layers_0/attention") for line in table)
  assert f"{sums['macs'] / 1e9:.4f}" in table[-1]


def test_an_image_that_is_too_small_is_one_clean_line(capsys):
  assert flops.main(["deit_tiny", "--size", "8"]) == 1
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: DeiT: an image of 8x8 pixels is smaller")
