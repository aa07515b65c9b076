"""The published recipes: for each model, what differs from `configs/_base.py`.

One table per family, one entry per model; the keys are fields of the
configuration. Where a paper and the official code differ, the code counts.
Models whose training was not published (Vim-B, and what MambaVision trained on
ImageNet-21k) have none.

Two things hold for all: the official code trains in float16 where it is said to
use mixed precision, and ours in bfloat16, which needs no scaling of the loss;
and RandAugment replaces colour jitter, whose strength is given all the same.
"""

from collections.abc import Mapping
from typing import Any, Final

Recipe = Mapping[str, Any]

# timm's augmentation, which all families share.
_AUGMENTATION: Final = {
  "data.randaugment": "rand-m9-mstd0.5-inc1",
  "data.erase_probability": 0.25,
  "mixup.mixup_alpha": 0.8,
  "mixup.cutmix_alpha": 1.0,
  "mixup.probability": 1.0,
  "mixup.switch_probability": 0.5,
  "label_smoothing": 0.1,
}

# DeiT, arXiv:2012.12877, table 9, and its main.py, which Vim's follows: 5e-4
# per 512 images, cosine by epoch after 5 epochs of warm-up, each image thrice.
_DEIT: Final = {
  **_AUGMENTATION,
  "data.repeats": 3,
  "epochs": 300.0,
  "batch_size": 1024,
  "mixup.group_size": 128,
  "optimizer.name": "adamw",
  "optimizer.eps": 1e-8,
  "optimizer.peak_lr": 1e-3,
  "optimizer.warmup_lr": 1e-6,
  "optimizer.final_lr": 1e-5,
  "optimizer.warmup_epochs": 5.0,
  "optimizer.schedule": "cosine",
  "optimizer.schedule_unit": "epoch",
  "optimizer.weight_decay": 0.05,
  "optimizer.clip_norm": 0.0,
  "ema_decay": 0.99996,
  "eval_weights": "model",
}
DEIT: Final[dict[str, Recipe]] = {
  name: {
    **_DEIT,
    "data.color_jitter": 0.4,
    "model.overrides.drop_path_rate": 0.1,
    "model.overrides.dtype": "bfloat16",
  }
  for name in ("deit_tiny", "deit_small", "deit_base")
}

# Vim, arXiv:2401.09417, section 4.1; pt-vim-t.sh and pt-vim-s.sh, on 8 GPUs.
_VIM: Final = {
  **_DEIT,
  "data.color_jitter": 0.3,
  "model.overrides.dtype": "float32",
}
# ft-vim-t.sh and ft-vim-s.sh: from the weights of stride 16, whose positional
# embedding the official code resizes as if the class token came first.
_VIM_STRIDE8: Final = {
  **_VIM,
  "epochs": 30.0,
  "optimizer.peak_lr": 1e-5,
  "optimizer.warmup_lr": 1e-5,
  "optimizer.final_lr": 1e-5,
  "optimizer.weight_decay": 1e-8,
  "model.overrides.drop_path_rate": 0.0,
  "model.overrides.pos_embed_resize": "official",
}
VIM: Final[dict[str, Recipe]] = {
  "vim_tiny": {
    **_VIM,
    "optimizer.weight_decay": 0.1,
    "model.overrides.drop_path_rate": 0.0,
  },
  # 8 x 64 images, at the rate of Vim-Ti's 8 x 128.
  "vim_small": {
    **_VIM,
    "batch_size": 512,
    "mixup.group_size": 64,
    "optimizer.weight_decay": 0.05,
    "model.overrides.drop_path_rate": 0.05,
  },
  "vim_tiny_stride8": _VIM_STRIDE8 | {"init_from": "published:vim_tiny"},
  "vim_small_stride8": _VIM_STRIDE8 | {"init_from": "published:vim_small"},
}

# VMamba, arXiv:2401.10166; classification/config.py, whose rates are per 512
# images and here for 8 x 128.
_VMAMBA: Final = {
  **_AUGMENTATION,
  "data.color_jitter": 0.4,
  "epochs": 300.0,
  "batch_size": 1024,
  "mixup.group_size": 128,
  "optimizer.name": "adamw",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.eps": 1e-8,
  "optimizer.peak_lr": 1e-3,
  "optimizer.warmup_lr": 1e-6,
  "optimizer.final_lr": 1e-5,
  "optimizer.warmup_epochs": 20.0,
  "optimizer.warmup_prefix": True,
  "optimizer.schedule": "cosine",
  "optimizer.schedule_unit": "step",
  "optimizer.weight_decay": 0.05,
  "optimizer.clip_norm": 5.0,
  "ema_decay": 0.9999,
  "eval_weights": "ema",
  "model.overrides.dtype": "bfloat16",
}


def _vmamba(drop_path_rate: float, **changes: Any) -> Recipe:
  return {
    **_VMAMBA,
    "model.overrides.drop_path_rate": drop_path_rate,
    **changes,
  }


# Drop path as in configs/vssm/*.yaml.
VMAMBA: Final[dict[str, Recipe]] = {
  # The published checkpoint has no average.
  "vmamba_tiny_v0": _vmamba(0.2, ema_decay=0.0, eval_weights="model"),
  "vmamba_small_v0": _vmamba(0.3),
  # The published checkpoint's name says 0.6.
  "vmamba_base_v0": _vmamba(0.5),
  "vmamba_tiny_s2l5": _vmamba(0.2),
  "vmamba_small_s2l15": _vmamba(0.3),
  "vmamba_base_s2l15": _vmamba(0.6),
  "vmamba_tiny_s1l8": _vmamba(0.2),
  "vmamba_small_s1l20": _vmamba(0.3),
  "vmamba_base_s1l20": _vmamba(0.5),
  # Nothing but these settings was published of the m2 models.
  "vmamba_tiny_m2": _vmamba(0.2),
  "vmamba_small_m2": _vmamba(0.3),
  "vmamba_base_m2": _vmamba(0.3),
}

# MambaVision, arXiv:2407.08083, section 4 and the released configurations: 32 x
# 128 images, 300 epochs and ten more at the last rate.
_MAMBAVISION: Final = {
  **_AUGMENTATION,
  "seed": 31,
  "data.color_jitter": 0.4,
  "data.crop_interpolation": "random",
  "epochs": 310.0,
  "batch_size": 4096,
  "mixup.group_size": 128,
  "optimizer.name": "lamb",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.eps": 1e-6,  # timm's default for LAMB.
  "optimizer.peak_lr": 5e-3,
  "optimizer.warmup_lr": 1e-6,
  "optimizer.final_lr": 5e-6,
  "optimizer.cooldown_epochs": 10.0,
  "optimizer.schedule": "cosine",
  "optimizer.schedule_unit": "step",
  "optimizer.clip_norm": 5.0,
  "ema_decay": 0.9998,
  "eval_weights": "ema",
  "mesa.factor": 50.0,
  "mesa.temperature": 3.0,
  "model.overrides.dtype": "bfloat16",
}


def _mambavision(
  drop_path_rate: float,
  weight_decay: float,
  mesa: float,
  *,
  crop_fraction: float = 1.0,
  warmup_epochs: float = 20.0,
  mesa_start: float = 0.25,
) -> Recipe:
  return {
    **_MAMBAVISION,
    "data.crop_fraction": crop_fraction,  # Of its evaluation.
    "model.overrides.drop_path_rate": drop_path_rate,
    "optimizer.weight_decay": weight_decay,
    "optimizer.warmup_epochs": warmup_epochs,
    "mesa.weight": mesa,
    "mesa.start": mesa_start,
  }


MAMBAVISION: Final[dict[str, Recipe]] = {
  "mambavision_tiny": _mambavision(0.2, 0.05, 0.5),
  "mambavision_tiny2": _mambavision(0.2, 0.05, 0.75, crop_fraction=0.98),
  "mambavision_small": _mambavision(0.2, 0.05, 1.0, crop_fraction=0.93),
  "mambavision_base": _mambavision(
    0.3, 0.075, 1.0, warmup_epochs=35.0, mesa_start=0.3
  ),
  "mambavision_large": _mambavision(0.3, 0.12, 6.0),
  "mambavision_large2": _mambavision(0.3, 0.12, 6.0),
}

RECIPES: Final[dict[str, Recipe]] = VIM | VMAMBA | MAMBAVISION | DEIT
