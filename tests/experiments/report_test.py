"""The comparison of runs."""

import json

from PIL import Image

from experiments import report
from experiments.imagenet import errors, metrics, rundir
from experiments.imagenet.configs import digits


def _write(folder, *, accuracy, finished, initial=None):
  folder.mkdir(parents=True)
  config = digits.get_config()
  rundir.record_config(folder, config, step=0, changed={}, initial=initial)
  writer = metrics.Writer(folder, start_step=0, tensorboard=False)
  for step in (10, 20):
    writer.write(step, "train", {"loss": 1 / step, "images_per_second": 1500.0})
    writer.write(step, "valid", {"loss": 2 / step, "accuracy": accuracy})
    accuracy -= 0.1
  writer.close()
  if finished:
    result = {"name": "test", "accuracy": 0.875, "examples": 360}
    rundir.write_json(folder / rundir.RESULT, result)


def test_a_table_and_curves_of_several_runs(tmp_path, capsys):
  _write(tmp_path / "a" / "run", accuracy=0.9, finished=True)
  licence = {"license": "CC-BY-NC-SA-4.0", "commercial_use": False}
  _write(tmp_path / "b" / "run", accuracy=0.8, finished=False, initial=licence)
  folders = [str(tmp_path / name / "run") for name in ("a", "b")]
  code = report.main([*folders, "--out", str(tmp_path / "out")])
  assert code == 0
  shown = capsys.readouterr().out
  head, _, first, second = shown.splitlines()
  column = [name.strip() for name in head.split("|")]
  cells = [
    dict(zip(column, (cell.strip() for cell in row.split("|")), strict=True))
    for row in (first, second)
  ]
  assert [row["run"] for row in cells] == ["a/run", "b/run"]
  assert cells[0]["best validation accuracy"] == "0.9000"
  assert cells[0]["final accuracy"] == "0.8750 (test, 360)"
  assert cells[0]["steps"] == "20"
  assert cells[0]["images/s"] == "1,500"
  assert cells[0]["initial weights"] == "none"
  assert cells[1]["final accuracy"] == "not finished"
  assert cells[1]["initial weights"] == "licence CC-BY-NC-SA-4.0"
  assert (tmp_path / "out" / "report.md").read_text().startswith(shown)
  with Image.open(tmp_path / "out" / "report.png") as image:
    assert image.size == (1560, 480)
    assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_one_run_is_reported_in_its_own_folder(tmp_path, capsys):
  _write(tmp_path / "run", accuracy=0.9, finished=True)
  assert report.main([str(tmp_path / "run")]) == 0
  assert (
    capsys.readouterr().out.splitlines()[2].startswith("| run | vim_tiny |")
  )
  assert (tmp_path / "run" / "report.png").is_file()
  assert json.loads((tmp_path / "run" / "config.json").read_text())


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
  assert report.main([str(tmp_path)]) == errors.ExitCode.CANNOT_CREATE
  assert f"error: {tmp_path} holds no run" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_shown_first(tmp_path, capsys):
  _write(tmp_path / "run", accuracy=0.9, finished=True)
  (tmp_path / "out" / "report.md").mkdir(parents=True)
  arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "out")]
  assert report.main(arguments) == errors.ExitCode.IO_ERROR
  shown = capsys.readouterr()
  assert "| run | vim_tiny |" in shown.out
  assert "error: " in shown.err
