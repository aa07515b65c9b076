"""Vim-S on ImageNet-1k as published; `vim_small:smoke` is a one-minute run.

Sources: Vision Mamba (https://arxiv.org/abs/2401.09417), section 4.1 and
table 1; the official scripts pt-vim-s.sh and main.py.
"""

import ml_collections

from experiments.imagenet.configs import _base


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The paper's recipe, or with "smoke" the same code on a toy."""
  c = _base.get_config()
  c.model.name = "vim_small"
  # 8 x 64 images; the rate is the same as for Vim-Ti's 8 x 128.
  c.batch_size = 512
  c.optimizer.peak_lr = 1e-3
  c.optimizer.weight_decay = 0.05
  c.model.overrides.drop_path_rate = 0.05
  _base.apply_argument(c, argument, {"smoke": _base.smoke})
  return c
