"""Fine-tunes a published model on your own images.

  python -m experiments.imagenet --config finetune --workdir runs/mine \\
      --config.data.folder=DIR [--config.model.name=vmamba_tiny_s1l8] \\
      [--config.init_from=FILE] [--config.data.image_size=384]

DIR has a subfolder for each class, see `experiments/datasets/folder.py`. The
published weights of the model are downloaded, or read from FILE. Images have
the size that these are for, and are prepared for validation as for the
published accuracy, unless you set the fields (image_size, crop_fraction,
crop_mode, mean and std of config.data). The other values are ours, moderate,
and tuned on nothing.
"""

import ml_collections

from experiments.imagenet import eval_images
from experiments.imagenet.configs import _base


def get_config() -> ml_collections.ConfigDict:
  """A short run at a small rate, whose best weights are kept as a file."""
  c = _base.get_config()
  c.init_from = "published"
  c.batch_size = 64
  c.eval_batch_size = 64
  c.epochs = 30.0
  c.ema_decay = 0.0
  c.data.name = "folder"
  eval_images.follow_model(c)
  c.data.randaugment = "rand-m9-mstd0.5-inc1"
  c.data.erase_probability = 0.25
  # Crops keep most of the image: the classes need not fill it.
  c.data.crop_area = (0.25, 1.0)
  c.model.overrides.num_classes = 0
  c.model.overrides.drop_path_rate = 0.1
  c.optimizer.peak_lr = 1e-4
  c.optimizer.final_lr = 1e-6
  c.optimizer.warmup_epochs = 3.0
  c.optimizer.schedule_unit = "step"
  c.optimizer.weight_decay = 0.05
  c.optimizer.clip_norm = 1.0
  # The first layers, which see edges and colours, move less than the last.
  c.optimizer.layer_decay = 0.9
  c.checkpoint.export = True
  c.log.plots = True
  return c
