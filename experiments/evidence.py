"""Trains four families of models on small data that comes inside scikit-learn.

  python -m experiments.evidence --workdir DIR [--json FILE]
      [--datasets digits photographs] [--families vim vmamba ...] [--epochs N]

Vim, VMamba, MambaVision and DeiT have the published geometry (patches of 16
pixels, strides of 4 to 32, on images of 64) and are made so narrow and shallow
that they have the same number of parameters within 5 %; their computation
differs. All get the same budget, augmentation and grid of peak learning rates.
For each data set and family every rate of the grid is trained from seed 0, the
one with the highest validation accuracy is chosen (between equal ones, the one
with the lower validation loss), and the other seeds are trained with it. Test
images are read once per run, at its end, and decide nothing.

The same command again continues what was interrupted and repeats nothing that
is finished; the workdir has a folder for every run, as
`python -m experiments.imagenet` makes it.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import sys
from typing import Any, Final

from absl import logging
import jax
import ml_collections

from experiments import report
from experiments.datasets import records
from experiments.imagenet import errors, rundir, train
from experiments.imagenet import run as run_lib
from experiments.imagenet.configs import _base
from vimjax import flops

# The search grid, the same for every family and data set.
PEAK_LRS: Final = (1e-3, 2e-3, 4e-3)
# The first is also the grid's.
SEEDS: Final = (0, 1, 2)
# Three times those of a pilot, in which DeiT had not converged and Vim on the
# photographs neither. Its test accuracies had been seen when this was set; the
# grid and the models were not changed.
EPOCHS: Final = 30.0
# The largest model may have so many times the parameters of the smallest.
MAX_RATIO: Final = 1.05

# Variant and changed fields of each family.
FAMILIES: Final[dict[str, dict[str, Any]]] = {
  "vim": {
    "model.name": "vim_tiny",
    "model.overrides.depth": 4,
    "model.overrides.embed_dim": 64,
    "model.overrides.scan_layers": True,
  },
  "vmamba": {
    "model.name": "vmamba_tiny_s1l8",
    "model.overrides.depths": (1, 1, 2, 1),
    "model.overrides.embed_dim": 12,
    "model.overrides.scan_layers": True,
  },
  "mambavision": {
    "model.name": "mambavision_tiny",
    "model.overrides.depths": (1, 1, 2, 1),
    "model.overrides.dim": 12,
    "model.overrides.in_dim": 8,
    # As at 224 pixels, one window is a whole map.
    "model.overrides.window_size": (8, 8, 4, 2),
  },
  "deit": {
    "model.name": "deit_tiny",
    "model.overrides.depth": 4,
    "model.overrides.embed_dim": 60,
    "model.overrides.scan_layers": True,
  },
}
DATASETS: Final[dict[str, dict[str, Any]]] = {
  "digits": {
    "data.name": "digits",
    "model.overrides.num_classes": 10,
    "data.crop_area": (0.8, 1.0),
    "data.flip": False,
    "data.mean": (0.305, 0.305, 0.305),
    "data.std": (0.376, 0.376, 0.376),
    "eval_batch_size": 184,
  },
  "photographs": {
    "data.name": "photographs",
    "model.overrides.num_classes": 18,
    "data.crop_area": (0.5, 1.0),
    "data.flip": True,
    "data.mean": (0.395, 0.428, 0.382),
    "data.std": (0.368, 0.298, 0.325),
    "eval_batch_size": 234,
  },
}
# The same for all; what is not named here is as in `configs/_base.py`.
BUDGET: Final[dict[str, Any]] = {
  "epochs": EPOCHS,
  "eval_every_epochs": 2.0,
  "batch_size": 32,
  "ema_decay": 0.99,
  "eval_weights": "ema",
  "data.test_split": "test",
  "data.image_size": 64,
  "data.crop_fraction": 1.0,
  "model.overrides.drop_path_rate": 0.0,
  "optimizer.schedule_unit": "step",
  "optimizer.weight_decay": 0.05,
  "checkpoint.every_epochs": EPOCHS,
  "checkpoint.keep": 1,
  "log.tensorboard": False,
  "log.progress_bar": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run, in the form of the result file.

  Attributes:
    dataset: A key of `DATASETS`.
    family: A key of `FAMILIES`.
    peak_lr: A value of `PEAK_LRS`.
    seed: A value of `SEEDS`.
    valid_accuracy: The best on the validation images; this chooses.
    valid_loss: At the same step.
    test_accuracy: At the same step, on the test images.
    test_images: How many there are.
    steps: Of the whole run.
    best_step: The step that was evaluated.
  """

  dataset: str
  family: str
  peak_lr: float
  seed: int
  valid_accuracy: float
  valid_loss: float
  test_accuracy: float
  test_images: int
  steps: int
  best_step: int


def make_config(
  dataset: str,
  family: str,
  *,
  peak_lr: float = PEAK_LRS[0],
  seed: int = SEEDS[0],
  epochs: float = EPOCHS,
) -> ml_collections.ConfigDict:
  """The configuration of a run; `Run` says what the arguments mean."""
  config = _base.get_config()
  config.update_from_flattened_dict(
    {
      **BUDGET,
      **DATASETS[dataset],
      **FAMILIES[family],
      "optimizer.peak_lr": peak_lr,
      "seed": seed,
      "epochs": epochs,
      "optimizer.warmup_epochs": epochs / 10,
    }
  )
  return config


def sizes(dataset: str, families: Sequence[str]) -> list[dict[str, Any]]:
  """Parameters and multiply-accumulates of the models for a data set.

  Args:
    dataset: A key of `DATASETS`.
    families: Keys of `FAMILIES`.

  Returns:
    For each family: the names, and both numbers, the latter for one image.

  Raises:
    ValueError: The parameters differ by more than `MAX_RATIO`.
  """
  configs = {family: make_config(dataset, family) for family in families}
  models = {name: run_lib.make_model(c) for name, c in configs.items()}
  size = BUDGET["data.image_size"]
  counts = {name: flops.parameters(m, size) for name, m in models.items()}
  if max(counts.values()) > MAX_RATIO * min(counts.values()):
    raise ValueError(
      f"The models must have equally many parameters, within {MAX_RATIO:g} "
      f"times; they have {counts}."
    )
  return [
    {
      "dataset": dataset,
      "family": family,
      "model": configs[family].model.name,
      "parameters": counts[family],
      "macs": flops.total(flops.count(model, size).values()).macs,
    }
    for family, model in models.items()
  ]


def train_run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Run:
  """Trains one run to its end, from wherever it stands.

  Args:
    config: From `make_config`.
    folder: Of this run.

  Raises:
    errors.RunError: The run cannot go on; see `train.train_and_evaluate`.
  """
  result = train.train_and_evaluate(config, folder)
  steps, losses = report.read([folder])[0].values("valid", "loss")
  family = next(
    name
    for name, fields in FAMILIES.items()
    if fields["model.name"] == config.model.name
  )
  return Run(
    dataset=config.data.name,
    family=family,
    peak_lr=config.optimizer.peak_lr,
    seed=config.seed,
    valid_accuracy=result["best_valid_accuracy"],
    valid_loss=losses[steps.index(result["best_step"])],
    test_accuracy=result["accuracy"],
    test_images=result["examples"],
    steps=result["total_steps"],
    best_step=result["best_step"],
  )


def choose(runs: Sequence[Run]) -> float:
  """The peak learning rate of the run that is best on validation images."""
  best = max(runs, key=lambda run: (run.valid_accuracy, -run.valid_loss))
  return best.peak_lr


def train_family(
  dataset: str, family: str, folder: pathlib.Path, epochs: float = EPOCHS
) -> list[Run]:
  """The runs of the grid, then those of the other seeds with what it chose.

  Args:
    dataset: A key of `DATASETS`.
    family: A key of `FAMILIES`.
    folder: Gets a folder for every run.
    epochs: Of every run.
  """

  def run(peak_lr: float, seed: int) -> Run:
    config = make_config(
      dataset, family, peak_lr=peak_lr, seed=seed, epochs=epochs
    )
    name = f"lr{peak_lr:g}_seed{seed}"
    found = train_run(config, folder / dataset / family / name)
    # Nothing that was compiled for a run is used by another, except through
    # the cache on disk.
    jax.clear_caches()
    return found

  grid = [run(peak_lr, SEEDS[0]) for peak_lr in PEAK_LRS]
  chosen = choose(grid)
  return grid + [run(chosen, seed) for seed in SEEDS[1:]]


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What came out for each data set and family, over the seeds.

  Args:
    result: The content of a result file.

  Returns:
    The model's entry, with the chosen `peak_lr`, the number of runs, and mean,
    lowest and highest test accuracy of the runs with it.
  """
  found = []
  for model in result["models"]:
    runs = [
      Run(**run)
      for run in result["runs"]
      if all(run[key] == model[key] for key in ("dataset", "family"))
    ]
    chosen = choose([run for run in runs if run.seed == SEEDS[0]])
    tests = [run.test_accuracy for run in runs if run.peak_lr == chosen]
    found.append(
      {
        **model,
        "peak_lr": chosen,
        "runs": len(runs),
        "seeds": len(tests),
        "mean": statistics.fmean(tests),
        "lowest": min(tests),
        "highest": max(tests),
      }
    )
  return found


def table(result: Mapping[str, Any]) -> str:
  """A result file as a Markdown table, accuracies in percent."""
  lines = [
    "| Data | Family | Parameters | MMACs | Peak rate | Test accuracy | "
    "Lowest, highest |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  lines += [
    f"| {row['dataset']} | {row['family']} | {row['parameters']:,} | "
    f"{row['macs'] / 1e6:.1f} | {row['peak_lr']:g} | {100 * row['mean']:.1f} | "
    f"{100 * row['lowest']:.1f}, {100 * row['highest']:.1f} |"
    for row in rows(result)
  ]
  return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.evidence",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--json", type=pathlib.Path, help="write the results")
  for name, choices in (("datasets", DATASETS), ("families", FAMILIES)):
    parser.add_argument(
      f"--{name}", nargs="+", choices=list(choices), default=list(choices)
    )
  parser.add_argument(
    "--epochs", type=float, default=EPOCHS, help=f"default: {EPOCHS:g}"
  )
  return parser.parse_args(argv)


def _train_all(args: argparse.Namespace) -> dict[str, Any]:
  folder = args.workdir.expanduser().resolve()
  # Found before hours of training, not after.
  models = [x for name in args.datasets for x in sizes(name, args.families)]
  # The runs of a model differ in seed and rate; their programs mostly do not.
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  runs = [
    run
    for dataset in args.datasets
    for family in args.families
    for run in train_family(dataset, family, folder, args.epochs)
  ]
  recorded = rundir.read_json(
    folder
    / args.datasets[0]
    / args.families[0]
    / f"lr{PEAK_LRS[0]:g}_seed{SEEDS[0]}"
    / "config.json"
  )
  device = recorded["devices"][0]
  if jax.default_backend() == "cpu":
    device = f"{os.cpu_count()} CPU cores ({platform.machine()})"
  return {
    "date": datetime.date.today().isoformat(),
    "device": device,
    "versions": recorded["versions"],
    "epochs": args.epochs,
    "batch_size": BUDGET["batch_size"],
    "peak_lrs": list(PEAK_LRS),
    "seeds": list(SEEDS),
    "models": models,
    "runs": [dataclasses.asdict(run) for run in runs],
  }


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; None means `sys.argv`. Returns the exit code."""
  args = _parse(argv)
  # Orbax and TFDS tell at length what goes well.
  logging.set_verbosity(logging.WARNING)
  try:
    result = _train_all(args)
    if args.json:
      args.json.parent.mkdir(parents=True, exist_ok=True)
      rundir.write_json(args.json, result)
  except errors.RunError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
  except records.DataError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.BAD_DATA
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return errors.ExitCode.IO_ERROR
  print(table(result))
  return errors.ExitCode.FINISHED


if __name__ == "__main__":
  sys.exit(main())
