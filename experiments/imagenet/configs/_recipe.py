"""The published recipe of a model: `--config NAME` leads here.

`NAME:smoke` is a run of the same code in about a minute. The values are in
`experiments/imagenet/recipes.py`.
"""

import ml_collections

from experiments.imagenet import recipes
from experiments.imagenet.configs import _base


def get_config(argument: str) -> ml_collections.ConfigDict:
  """The recipe of a model.

  Args:
    argument: A name in `recipes.RECIPES`, and perhaps ":smoke".

  Raises:
    ValueError: There is no such argument.
    KeyError: There is no such recipe.
  """
  name, _, variation = argument.partition(":")
  c = _base.get_config()
  c.model.name = name
  c.update_from_flattened_dict(recipes.RECIPES[name])
  _base.apply_argument(c, variation, {"smoke": _base.smoke})
  return c
