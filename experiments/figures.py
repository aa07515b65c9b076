"""Figures of matplotlib, drawn into files."""

from typing import Any

from vimjax import optional


def make(**kwargs: Any) -> Any:
  """A `matplotlib.figure.Figure` that finds room for its labels.

  Not pyplot: a figure of its own needs no display and leaves no state.

  Args:
    **kwargs: As `Figure` takes them.

  Raises:
    ModuleNotFoundError: matplotlib is missing; the message names the extra.
  """
  optional.require("matplotlib", extra="plot")
  figure = optional.require("matplotlib.figure", extra="plot")
  return figure.Figure(layout="constrained", **kwargs)
