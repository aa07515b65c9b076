"""Pictures of a finished run, as PNG files in its folder."""

from collections.abc import Sequence
import pathlib

import numpy as np

from experiments import figures
from experiments.imagenet import metrics

# Green and vermilion that stay apart for colour-blind eyes (Okabe and Ito).
_RIGHT, _WRONG = "#009e73", "#d55e00"
_COLUMNS, _ROWS = 10, 6


def learning_curves(folder: pathlib.Path) -> str:
  """Draws loss, accuracy and learning rate over the steps.

  Args:
    folder: The run's folder, with metrics.jsonl.

  Returns:
    The name of the file in `folder`.
  """
  lines = metrics.read(folder)
  figure = figures.make(figsize=(12, 3.5))
  axes = figure.subplots(1, 3)
  for ax, name in zip(axes, ("loss", "accuracy", "lr"), strict=True):
    for split, style in (("train", "-"), ("valid", "o-")):
      drawn = [x for x in lines if x["split"] == split and name in x]
      if drawn:
        ax.plot(
          [x["step"] for x in drawn],
          [x[name] for x in drawn],
          style,
          markersize=3,
          label=split,
        )
    ax.set_xlabel("step")
    ax.set_title({"lr": "learning rate"}.get(name, name))
    ax.grid(alpha=0.3)
  axes[0].legend()
  figure.savefig(folder / "learning_curves.png", dpi=120)
  return "learning_curves.png"


def predictions(
  folder: pathlib.Path,
  examples: Sequence[tuple[np.ndarray, int, int]],
  class_names: Sequence[str] | None,
) -> str:
  """Draws images with what the model takes them for.

  Args:
    folder: The run's folder.
    examples: Image (h, w, 3) uint8, label and prediction; mistakes are drawn
      first, and no more than fit.
    class_names: Name of each label; None shows the numbers.

  Returns:
    The name of the file in `folder`.
  """
  mistakes_first = sorted(examples, key=lambda x: x[1] == x[2])
  shown = mistakes_first[: _COLUMNS * _ROWS]
  figure = figures.make(figsize=(_COLUMNS * 1.1, _ROWS * 1.3))
  for i, ax in enumerate(figure.subplots(_ROWS, _COLUMNS).flat):
    ax.set_axis_off()
    if i >= len(shown):
      continue
    image, label, predicted = shown[i]
    ax.imshow(image, interpolation="nearest")
    right = label == predicted
    title = _name(predicted, class_names)
    if not right:
      title = f"{title}\nnot {_name(label, class_names)}"
    ax.set_title(
      title,
      fontsize=7,
      color=_RIGHT if right else _WRONG,
      pad=2,
      parse_math=False,  # A "$" in the name of a class is one.
    )
  wrong = sum(label != predicted for _, label, predicted in examples)
  figure.suptitle(
    f"predictions, mistakes first ({wrong} of {len(examples)} images)",
    fontsize=9,
  )
  figure.savefig(folder / "predictions.png", dpi=120)
  return "predictions.png"


def _name(label: int, class_names: Sequence[str] | None) -> str:
  """A short name, or the number where the model has more classes than names."""
  if class_names is None or label >= len(class_names):
    return str(label)
  # Names of files need not be UTF-8, but what is drawn must be.
  printable = class_names[label].encode(errors="replace").decode()
  return printable[:12]
