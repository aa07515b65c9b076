"""Speed and memory of whole models: the command, its cases and its report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.throughput import __main__ as throughput
from experiments.throughput import cases, measure, report
import vimjax


def _row(model="vim_tiny", size=224, seconds=1.0, attention=None, **values):
  case = cases.Case(
    model=model,
    size=size,
    batch=2,
    mode="inference",
    dtype="float32",
    precision="full",
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

  monkeypatch.setattr(measure, "build", build)


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
    precision="tf32",
    flash=True,
  )
  single, half = cases.groups(plan)
  assert [(c.label, c.precision) for c in single] == [
    ("vim_tiny", "tf32"),
    ("deit_tiny (materialised)", "tf32"),
  ]
  assert [(c.label, c.precision) for c in half] == [
    ("vim_tiny", None),
    ("deit_tiny (materialised)", None),
    ("deit_tiny (flash)", None),
  ]


def test_cases_become_models():
  vim, deit = cases.groups(cases.PRESETS["cpu"][0])[0]
  assert deit.attention == "materialised"
  model = measure.build(dataclasses.replace(vim, dtype="bfloat16", size=96))
  assert (type(model), model.image_size) == (vimjax.Vim, 96)
  assert model.dtype == jnp.bfloat16
  flash = dataclasses.replace(vim, model="deit_tiny", attention="flash")
  assert measure.build(flash).attention_implementation == "cudnn"


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
  assert content["groups_left_out"] == 0
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


def test_time_limit_leaves_groups_out_and_says_so(small_models, capsys):
  del small_models
  argv = ["--models", "vim_tiny", "--sizes", "32", "--time-limit=-1"]
  assert throughput.main(argv) == 0
  assert "1 groups were left out" in capsys.readouterr().out


def test_training_step_learns(small_models):
  del small_models
  case = dataclasses.replace(_row(size=32).case, mode="training")
  program = measure.compile_case(case)
  losses = [float(program.step()) for _ in range(5)]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < losses[0]


def test_what_does_not_fit_gets_a_row(monkeypatch):
  def compile_case(case):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")

  monkeypatch.setattr(measure, "compile_case", compile_case)
  case = _row().case
  assert measure.run_group([case], rounds=1) == [
    measure.Row(case=case, error="out of memory")
  ]
  assert "out of memory" in report.markdown(
    [measure.Row(case=case, error="out of memory")]
  )


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
