"""Vim-Ti on ImageNet-1k as published; `vim_tiny:smoke` is a one-minute run.

Sources: Vision Mamba (https://arxiv.org/abs/2401.09417), section 4.1 and
table 1; the official scripts pt-vim-t.sh and main.py.
"""

import ml_collections

from experiments.imagenet.configs import _base


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The paper's recipe, or with "smoke" the same code on a toy."""
  # The defaults are this recipe: 300 epochs of 8 x 128 images, 1e-3 after 5
  # epochs of warm-up, weight decay 0.1, no drop path, no clipping, float32.
  c = _base.get_config()
  c.model.name = "vim_tiny"
  _base.apply_argument(c, argument, {"smoke": _base.smoke})
  return c
