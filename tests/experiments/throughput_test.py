"""Speed and memory of whole models: the command, its cases and its report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.throughput import __main__ as throughput
from experiments.throughput import (
  cases,
  measure,
  programs,
  report,
  targets,
)
from tests import readme_tables
import vimjax


def _row(
  model="vim_tiny",
  size=224,
  seconds=1.0,
  attention=None,
  dtype="float32",
  **values,
):
  case = cases.Case(
    model=model,
    size=size,
    batch=2,
    mode="inference",
    dtype=dtype,
    precision="full" if dtype == "float32" else None,
    attention=attention,
  )
  measured = dict(
    median_s=seconds,
    quartiles_s=(0.9 * seconds, 1.1 * seconds),
    images_per_second=2 / seconds,
    compile_s=3.0,
    argument_bytes=2**20,
    temp_bytes=2**20 * size,
    peak_bytes=2**21 * size,
  )
  return measure.Row(case=case, **(measured | values))


@pytest.fixture
def small_models(monkeypatch):
  """Published names, models that compile in a second."""

  def build(case):
    fields = dict(num_classes=10, depth=1, dtype=jnp.dtype(case.dtype))
    return vimjax.create_model(case.model, image_size=case.size, **fields)

  monkeypatch.setattr(programs, "build", build)


def test_baselines_are_of_similar_size():
  assert cases.baseline("vim_tiny") == "deit_tiny"
  assert cases.baseline("mambavision_tiny") == "deit_small"


def test_flash_attention_stands_beside_bfloat16_rows_only():
  plan = cases.Plan(
    models=("vim_tiny",),
    sizes=(224,),
    batches=(1,),
    modes=("inference",),
    dtypes=("float32", "bfloat16"),
    precisions=("tf32", "full"),
    flash=True,
  )
  *singles, half = cases.groups(plan)
  for group, precision in zip(singles, ("tf32", "full"), strict=True):
    assert [(c.label, c.precision) for c in group.cases] == [
      ("vim_tiny", precision),
      ("deit_tiny (materialised)", precision),
    ]
  assert [(c.label, c.precision) for c in half.cases] == [
    ("vim_tiny", None),
    ("deit_tiny (materialised)", None),
    ("deit_tiny (flash)", None),
  ]


def test_flash_attention_inside_a_model_is_compared_too():
  plan = cases.Plan(
    models=("mambavision_tiny", "vim_tiny"),
    sizes=(224,),
    batches=(128,),
    modes=("inference",),
    dtypes=("bfloat16",),
    flash=True,
  )
  (group,) = cases.groups(plan)
  _, _, flash, *baselines = group.cases
  assert flash.label == "mambavision_tiny (flash)"
  assert [case.is_baseline for case in group.cases] == 3 * [False] + 4 * [True]
  assert programs.build(flash).attention_implementation == "cudnn"
  rows = {
    case: measure.Row(
      case=case, median_s=1.0 + case.is_baseline, images_per_second=128.0
    )
    for case in group.cases
  }
  assert report.ratios(rows[flash], rows, "materialised") == (2.0, None)
  assert report.ratios(rows[baselines[0]], rows, "flash") == (None, None)
  (line,) = targets.lines([rows[flash]])
  assert line.startswith("missed: mambavision_tiny (flash) at 224 x 224")


def test_cases_become_models():
  vim, deit = cases.groups(cases.PRESETS["cpu"][0])[0].cases
  assert deit.attention == "materialised"
  model = programs.build(dataclasses.replace(vim, dtype="bfloat16", size=96))
  assert (type(model), model.image_size) == (vimjax.Vim, 96)
  assert model.dtype == jnp.bfloat16
  flash = dataclasses.replace(vim, model="deit_tiny", attention="flash")
  assert programs.build(flash).attention_implementation == "cudnn"


def test_command_measures_reports_and_draws(small_models, tmp_path, capsys):
  del small_models
  path = tmp_path / "results.json"
  code = throughput.main(
    [
      *("--models", "vim_tiny", "--sizes", "32", "64"),
      *("--modes", "inference", "training", "--rounds", "2"),
      *("--json", str(path), "--plots", str(tmp_path / "plots")),
    ]
  )
  assert code == 0
  out = capsys.readouterr().out
  content = json.loads(path.read_text())
  assert content["environment"]["jax"] == jax.__version__
  rows = content["rows"]
  assert len(rows) == 2 * 2 * 2
  for row in rows:
    assert row["error"] is None
    low, high = row["quartiles_s"]
    assert 0 < low <= row["median_s"] <= high
    assert row["images_per_second"] == pytest.approx(1 / row["median_s"])
    assert row["peak_bytes"] > row["temp_bytes"] > 0
    assert row["case"]["precision"] == "full"
  facts, measured = report.read(path)
  assert facts == content["environment"]
  assert report.markdown(measured) in out
  assert out.count("| vim_tiny |") == 4
  assert out.count("x speed") == 4
  assert "vim_tiny, training, float32, full, batch 1: time grows as" in out
  for name in ("throughput", "memory", "accuracy"):
    png = (tmp_path / "plots" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert f"plot: {tmp_path / 'plots' / name}.png" in out


def test_time_limit_leaves_cases_out_and_says_so(small_models, capsys):
  del small_models
  argv = ["--models", "vim_tiny", "--sizes", "32", "--time-limit=-1"]
  assert throughput.main(argv) == 0
  assert "2 cases were left out" in capsys.readouterr().out


def test_training_step_learns(small_models):
  del small_models
  case = dataclasses.replace(_row(size=32).case, mode="training")
  step = programs.compile_case(case).start(programs.make_images(case))
  losses = [float(step()) for _ in range(5)]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < losses[0]


def _program(case, step, peak_bytes=2**20):
  """A compiled case that does as it is told."""

  class Program(programs.Program):
    def start(self, images):
      assert images.shape == (case.batch, case.size, case.size, 3)
      return step

  return Program(
    case=case,
    compiled=step,
    variables={},
    num_classes=10,
    compile_s=3.0,
    argument_bytes=1,
    temp_bytes=2,
    peak_bytes=peak_bytes,
  )


def _fails(error):
  def step():
    raise error

  return step


def _group(count=2):
  names = ("vim_tiny", "vim_small", "vim_base")[:count]
  return cases.Group(cases=tuple(_row(name, size=32).case for name in names))


def _last(rows):
  return list({row.case: row for row in rows}.values())


@pytest.mark.parametrize(
  ("error", "reason"),
  [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), "out of memory"),
    (ValueError("cuDNN does not\nlike it"), "cuDNN does not"),
    (KeyError(), "KeyError"),
  ],
)
def test_what_fails_gets_a_row_and_the_others_go_on(monkeypatch, error, reason):
  group = _group(3)
  first, second, third = group.cases

  def compile_case(case):
    if case == first:
      raise error
    return _program(case, _fails(error) if case == second else lambda: 0.0)

  monkeypatch.setattr(programs, "compile_case", compile_case)
  rows = _last(measure.run_group(group, rounds=1))
  assert [row.case for row in rows] == [first, second, third]
  assert [row.error for row in rows] == [reason, reason, None]
  assert [row.peak_bytes for row in rows] == [None, 2**20, 2**20]
  assert rows[2].images_per_second is not None
  assert reason in report.markdown(rows)


def test_what_does_not_fit_is_not_run_and_tells_its_memory(monkeypatch):
  monkeypatch.setattr(measure, "memory_stats", lambda: {"bytes_limit": 2**30})
  monkeypatch.setattr(
    programs,
    "compile_case",
    lambda case: _program(case, _fails(AssertionError("it ran")), 2**30 + 1),
  )
  (row,) = _last(measure.run_group(_group(1), rounds=1))
  assert (row.error, row.peak_bytes) == ("out of memory", 2**30 + 1)
  assert "| out of memory |  | 1024 |" in report.markdown([row])


@pytest.fixture
def preset(monkeypatch):
  """A preset that may be continued: two sizes of two models, and no device."""
  plan = cases.Plan(
    models=("vim_tiny",), sizes=(32, 64), batches=(4,), modes=("inference",)
  )
  monkeypatch.setattr(
    cases, "PRESETS", {"gpu": (dataclasses.replace(plan, halve=True),)}
  )
  monkeypatch.setattr(
    programs, "compile_case", lambda case: _program(case, lambda: 0.0)
  )


def test_a_lost_device_ends_the_run_after_its_row(
  preset, monkeypatch, tmp_path, capsys
):
  del preset
  step = _fails(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"))
  monkeypatch.setattr(programs, "compile_case", lambda c: _program(c, step))
  lost = _fails(measure.DeviceLostError("CUDA_ERROR"))
  monkeypatch.setattr(measure, "check_device", lost)
  path = tmp_path / "results.json"
  assert throughput.main(["--preset", "gpu", "--json", str(path)]) == 1
  assert "error: the device is lost" in capsys.readouterr().err
  (row,) = report.read(path)[1]
  assert row.error == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_a_killed_run_goes_on_elsewhere_first(preset, monkeypatch, tmp_path):
  del preset
  path = tmp_path / "results.json"
  argv = ["--preset", "gpu", "--json", str(path), "--rounds", "1"]

  def killed(case):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(programs, "compile_case", killed)
    with pytest.raises(KeyboardInterrupt):
      throughput.main(argv)
  (row,) = report.read(path)[1]
  assert (row.case.size, row.error) == (32, measure.UNFINISHED)
  order = []

  def compiles(case):
    order.append(case)
    return _program(case, lambda: 0.0)

  monkeypatch.setattr(programs, "compile_case", compiles)
  assert throughput.main(argv) == 0
  assert [case.size for case in order] == [64, 64, 32, 32]
  facts, rows = report.read(path)
  assert "continued" in facts
  assert all(row.images_per_second for row in rows)
  assert throughput.main(argv) == 0
  assert len(order) == 4  # Nothing twice.
  assert report.read(path)[1] == rows


def test_the_batch_is_halved_until_all_fit(preset, monkeypatch, tmp_path):
  del preset
  monkeypatch.setattr(measure, "memory_stats", lambda: {"bytes_limit": 100})

  order = []

  def compiles(case):
    order.append((case.size, case.batch))
    each = {32: 30, 64: 60}[case.size] if case.attention else 1
    return _program(case, lambda: 0.0, peak_bytes=each * case.batch)

  monkeypatch.setattr(programs, "compile_case", compiles)
  path = tmp_path / "results.json"
  assert throughput.main(["--preset", "gpu", "--json", str(path)]) == 0
  facts, rows = report.read(path)
  assert facts["memory_limit_bytes"] == "100"
  assert [
    (row.case.label, row.case.batch, row.error)
    for row in rows
    if row.case.size == 32
  ] == [
    ("vim_tiny", 4, None),
    ("deit_tiny (materialised)", 4, "out of memory"),
    ("vim_tiny", 2, None),
    ("deit_tiny (materialised)", 2, None),
  ]
  # Half of 240 is no less than 100 either.
  assert order == [
    *(2 * [(32, 4)] + 2 * [(32, 2)]),
    *(2 * [(64, 4)] + 2 * [(64, 1)]),
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "has no results"),
    ('{"environment": {"jax": "0.1"}, "rows": []}', "was begun with device"),
  ],
)
def test_only_what_was_measured_alike_goes_on(
  preset, content, message, tmp_path, capsys
):
  del preset
  path = tmp_path / "results.json"
  path.write_text(content)
  assert throughput.main(["--preset", "gpu", "--json", str(path)]) == 1
  assert message in capsys.readouterr().err
  assert path.read_text() == content


def test_a_profile_tells_the_share_of_the_scan(monkeypatch):
  times = {f"fusion_{i}": float(i) for i in range(19, -1, -1)}
  timing = measure.bench_timing.Timing(
    median_us=201.0, quartiles_us=(200.0, 202.0), launches=1, rounds=3
  )

  def profile(call, rotation, calls):
    del call, rotation, calls
    return timing, times | {"selective_scan_forward": 10.0}

  monkeypatch.setattr(measure.bench_timing, "profile", profile)
  monkeypatch.setattr(measure.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(
    programs, "compile_case", lambda case: _program(case, lambda: 0.0)
  )
  (row,) = _last(measure.run_group(_group(1), rounds=1))
  assert row.device_us == 201.0
  assert row.scan_share == 0.05
  assert row.kernels_us is not None
  assert len(row.kernels_us) == 15
  assert list(row.kernels_us)[0] == "fusion_19"
  assert "| in the scan |" in report.markdown([row])
  assert "| 5 % |" in report.markdown([row])


def test_the_device_has_an_account_of_its_own():
  row = _row(seconds=2.0, device_peak_bytes=500 * 2**20)
  assert "| 448 (device 500) |" in report.markdown([row])


def test_report_compares_with_materialised_attention():
  rows = [
    _row(seconds=2.0),
    _row(
      "deit_tiny", seconds=4.0, attention="materialised", peak_bytes=896 * 2**20
    ),
  ]
  vim, deit = report.markdown(rows).splitlines()[2:]
  assert "| 2.00x speed, 0.50x memory |" in vim
  assert "x speed" not in deit


def test_report_compares_with_flash_attention_where_it_is():
  rows = [
    _row(seconds=2.0, dtype="bfloat16"),
    _row("deit_tiny", seconds=3.0, attention="flash", dtype="bfloat16"),
  ]
  head, _, vim, _ = report.markdown(rows).splitlines()
  assert "| against DeiT | against flash DeiT |" in head
  assert "|  | 1.50x speed, 1.00x memory |" in vim


def test_targets_are_met_or_missed():
  shared = dict(size=1248, peak_bytes=1000, dtype="bfloat16")
  rows = [
    _row(seconds=1.0, **(shared | dict(peak_bytes=132))),
    _row("deit_tiny", seconds=2.0, attention="materialised", **shared),
    _row("deit_tiny", seconds=0.5, attention="flash", **shared),
    _row("vim_small", seconds=0.5),
  ]
  assert targets.lines(rows) == [
    "missed: vim_tiny at 1248 x 1248, batch 2, bfloat16: 0.50 times the speed "
    "of flash attention, wanted 1",
    "missed: vim_tiny at 1248 x 1248, batch 2, bfloat16: 2.00 times the speed "
    "of materialised attention, wanted 2.8",
    "met: vim_tiny at 1248 x 1248, batch 2, bfloat16: 86.80 % less memory than "
    "materialised attention, wanted 86.8",
  ]


def test_the_gpu_preset_asks_the_most_wanted_first():
  first, *_ = cases.groups(cases.PRESETS["gpu"][0])
  assert [case.label for case in first.cases] == [
    *("vim_tiny", "vim_small", "vmamba_tiny_s1l8", "mambavision_tiny"),
    "mambavision_tiny (flash)",
    *("deit_small (materialised)", "deit_small (flash)"),
    *("deit_tiny (materialised)", "deit_tiny (flash)"),
  ]
  groups = [g for plan in cases.PRESETS["gpu"] for g in cases.groups(plan)]
  every = [case for group in groups for case in group.cases]
  assert len(set(every)) == len(every)
  for size in (512, 1024, 1248, 2048):
    for mode in ("inference", "training"):
      assert {
        (case.label, case.dtype, case.precision)
        for case in every
        if (case.size, case.mode) == (size, mode)
      } == {
        ("vim_tiny", "bfloat16", None),
        ("deit_tiny (materialised)", "bfloat16", None),
        ("deit_tiny (flash)", "bfloat16", None),
        ("vim_tiny", "float32", "tf32"),
        ("deit_tiny (materialised)", "float32", "tf32"),
        ("vim_tiny", "float32", "full"),
        ("deit_tiny (materialised)", "float32", "full"),
      }


def test_a_gpu_table_needs_a_gpu(monkeypatch, tmp_path):
  path = tmp_path / "throughput_gpu.json"
  monkeypatch.setattr(readme_tables, "THROUGHPUT_GPU", path)
  none = "No GPU figure has been measured yet."
  assert readme_tables.throughput_gpu() == none
  facts = {"device": "gpu NVIDIA X", "jax": "0.0", "date": "2000-01-01T00:00"}
  rows = [_row(size=1248, dtype="bfloat16", scan_share=0.25)]
  report.write(path, facts, rows)
  part = readme_tables.throughput_gpu()
  assert report.markdown(rows) in part
  assert "Measured on gpu NVIDIA X, jax 0.0, 2000-01-01." in part


def test_growth_is_an_exponent_of_the_pixels():
  rows = [_row(size=s, seconds=(s / 64) ** 4) for s in (64, 128, 256)]
  assert report.growth(rows) == (
    "vim_tiny, inference, float32, full, batch 2: time grows as pixels^2.00, "
    "temporary memory as pixels^0.50 (64 to 256)"
  )


@pytest.mark.parametrize(
  "argv", [["--flash", "--models", "vim_tiny"], ["--preset", "gpu"]]
)
def test_gpu_options_without_a_gpu_are_one_clean_line(argv, capsys):
  assert throughput.main(argv) == 1
  assert "need an NVIDIA GPU" in capsys.readouterr().err


def test_files_that_cannot_be_written_are_told_before_measuring(
  tmp_path, capsys
):
  argv = ["--models", "vim_tiny", "--json", str(tmp_path / "no" / "x.json")]
  assert throughput.main(argv) == 1
  assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv",
  [
    [],
    ["--models", "vim_tiny", "--sizes", "0"],
    ["--models", "vim_tiny", "--preset", "cpu"],
    ["--models", "x"],
  ],
)
def test_wrong_command_lines(argv):
  with pytest.raises(SystemExit) as error:
    throughput.main(argv)
  assert error.value.code == 2
