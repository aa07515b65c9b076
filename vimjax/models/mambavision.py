"""MambaVision: convolutions, then windows of state-space and attention blocks.

MambaVision: A Hybrid Mamba-Transformer Vision Backbone
(https://arxiv.org/abs/2407.08083). Written from the paper and from published
facts about the official models, whose code is not free.

Axes: b batch, h and w rows and columns of a map, l tokens of a window, d
channels, n state size.
"""

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any, Final, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

import pallas_kernels
from vimjax import variants
from vimjax.layers import (
  attention,
  basic,
  batch_norm,
  checks,
  conv_block,
  window_block,
  windows,
)


class WindowStage(nn.Module):
  """A row of blocks inside windows: first half scans, second half attention.

  Of an odd number of blocks the larger half scans. Padding, where the windows
  do not fit, takes part in everything, as in the official code.

  Attributes:
    window_size: Side of a window.
    scan: Makes a `window_block.MambaVisionMixer`, given its name.
    attend: Makes an `attention.Attention`, given its name.
    block: Other fields of every `window_block.Block`.
    remat: Recompute blocks in the backward pass instead of storing them.
  """

  window_size: int
  scan: Callable[..., nn.Module]
  attend: Callable[..., nn.Module]
  block: dict[str, Any]
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w d"], drop_rates: conv_block.Rates
  ) -> Float[Array, "b h w d"]:
    """Runs a block per drop-path rate."""
    block = nn.remat(window_block.Block) if self.remat else window_block.Block
    shape = (x.shape[1], x.shape[2])
    x = windows.partition(x, self.window_size)  # (windows, l, d)
    scans = math.ceil(len(drop_rates) / 2)
    for i, rate in enumerate(drop_rates):
      mixer = self.scan if i < scans else self.attend
      x = block(mixer=mixer, name=f"blocks_{i}", **self.block)(x, rate)
    return windows.merge(x, self.window_size, shape)


class MambaVision(nn.Module):
  """MambaVision.

  `model.apply(variables, images)` gives logits, float32 whatever `dtype`;
  `method="pooled"` the vector before the head; `method="features"` the maps of
  the four stages for detection and segmentation heads. Images may have any
  size: maps round up, and windows that do not fit are padded.

  Variables have two collections, "params" and "batch_stats". Training needs
  `train=True` with `mutable=["batch_stats"]`, which also returns the new
  statistics, and, with drop path, `rngs={"drop_path": key}`:

      logits, updates = model.apply(
        variables, images, train=True, rngs={"drop_path": key},
        mutable=["batch_stats"],
      )
      variables = {**variables, **updates}

  To see inside, `capture_intermediates=True, mutable=["intermediates"]` also
  returns what every submodule computed: "patch_embed", "stages_i/blocks_j" (of
  the last two stages in windows), "downsample_i", "norm".

  Attributes:
    num_classes: Outputs of the head.
    in_chans: Channels of the images; 3 are red, green and blue.
    dim: Channels of the first stage; each next one has twice as many.
    in_dim: Channels between the first two convolutions.
    depths: Blocks of each stage: two of convolutions, two of windows.
    num_heads: Heads of the attention in each stage; the first two have none.
    window_size: Side of the windows in each stage; the first two have none.
    mlp_ratio: Hidden channels of the MLPs per channel.
    state_size: Length n of the state per channel.
    conv_size: Taps of the mixers' convolutions.
    layer_scale: Initial factor of the window blocks' branches; None: without.
    drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
    remat: Recompute each block in the backward pass instead of storing it.
    scan_implementation: See `pallas_kernels.selective_scan`.
    attention_implementation: See `vimjax.layers.attention.Attention`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the images. The residual stream of
      the window stages, the recurrence, norms and the head are float32 at
      least.
    param_dtype: Dtype of the parameters.
  """

  num_classes: int = 1000
  in_chans: int = 3
  dim: int = 80
  in_dim: int = 32
  depths: tuple[int, int, int, int] = (1, 3, 8, 4)
  num_heads: tuple[int, int, int, int] = (2, 4, 8, 16)
  window_size: tuple[int, int, int, int] = (8, 8, 14, 7)
  mlp_ratio: float = 4.0
  state_size: int = 8
  conv_size: int = 3
  layer_scale: float | None = None
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_implementation: pallas_kernels.Implementation | None = None
  attention_implementation: attention.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    checks.positive_integers(
      self,
      ["num_classes", "in_chans", "dim", "in_dim", "state_size", "conv_size"],
    )
    checks.positive(self, ["mlp_ratio"])
    checks.four_positive_integers(self, ["depths", "num_heads", "window_size"])
    for i in (2, 3):
      if (self.dim * 2**i) % self.num_heads[i]:
        raise ValueError(
          f"MambaVision: {self.dim * 2**i} channels of stage {i} do not divide "
          f"into num_heads[{i}]={self.num_heads[i]}."
        )
    checks.probability(self, "drop_path_rate")
    checks.dtypes(self)
    attention.check_implementation("MambaVision", self.attention_implementation)

  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b classes"]:
    """Classifies images.

    Args:
      images: Normalised pixels, see `vimjax.preprocess`.
      train: Applies drop path; normalises by the batch's statistics and
        records them.

    Returns:
      Logits in float32 (float64 if the computation is).

    Raises:
      ValueError: Wrong rank, channel count or dtype, or no pixels.
    """
    return self._run(images, train, "logits")

  def pooled(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """The mean of the normalised last map, before the head."""
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> tuple[Float[Array, "b rows columns channels"], ...]:
    """The maps at the end of the four stages, at strides 4, 8, 16 and 32.

    Sides are those of the image divided by the stride and rounded up, channels
    `dim`, 2 `dim`, 4 `dim` and 8 `dim`. They are not normalised: heads bring a
    norm for each map.
    """
    return self._run(images, train, "features")

  @nn.compact
  def _run(
    self,
    images: Float[Array, "b h w c"],
    train: bool,
    output: Literal["logits", "pooled", "features"],
  ) -> Any:
    checks.images(self, images)
    checks.smallest_side(self, images, 1)
    dtype = basic.compute_dtype(self.dtype, images)
    wide = jnp.promote_types(dtype, jnp.float32)
    fields: dict[str, Any] = dict(
      precision=self.precision, dtype=dtype, param_dtype=self.param_dtype
    )
    rates = self._drop_rates(train)

    x = conv_block.PatchEmbed(
      self.in_dim, self.dim, name="patch_embed", **fields
    )(images.astype(dtype), train=train)
    maps = []
    for i in range(4):
      if i > 0:
        x = conv_block.conv3x3(
          self.dim * 2**i,
          strides=2,
          use_bias=False,
          name=f"downsample_{i - 1}",
          **fields,
        )(x.astype(dtype))
      if i < 2:
        stage = conv_block.ConvStage(
          block=fields, remat=self.remat, name=f"stages_{i}"
        )
        x = stage(x, rates[i], train=train)
      else:
        x = self._window_stage(i, fields)(x.astype(wide), rates[i])
      maps.append(x)
    if output == "features":
      return tuple(x.astype(dtype) for x in maps)

    x = batch_norm.BatchNorm(
      dtype=wide, param_dtype=self.param_dtype, name="norm"
    )(x, train=train)
    x = basic.apart(x).mean(axis=(1, 2))
    if output == "pooled":
      return x
    # One vector per image: float32 costs nothing here.
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      dtype=wide,
      param_dtype=self.param_dtype,
      name="head",
    )(x)

  def _window_stage(self, i: int, fields: dict[str, Any]) -> WindowStage:
    return WindowStage(
      window_size=self.window_size[i],
      scan=functools.partial(
        window_block.MambaVisionMixer,
        state_size=self.state_size,
        conv_size=self.conv_size,
        scan_implementation=self.scan_implementation,
        **fields,
      ),
      attend=functools.partial(
        attention.Attention,
        num_heads=self.num_heads[i],
        implementation=self.attention_implementation,
        **fields,
      ),
      block=dict(
        mlp_ratio=self.mlp_ratio, layer_scale=self.layer_scale, **fields
      ),
      remat=self.remat,
      name=f"stages_{i}",
    )

  def _drop_rates(self, train: bool) -> list[conv_block.Rates]:
    """Per stage and block; None where nothing is dropped."""
    total = sum(self.depths)
    rates: conv_block.Rates = (None,) * total
    if train and self.drop_path_rate > 0:
      rates = tuple(np.linspace(0, self.drop_path_rate, total).tolist())
    iterator = iter(rates)
    return [tuple(itertools.islice(iterator, depth)) for depth in self.depths]


def _variant(
  official: str,
  repository: str,
  file: str,
  *,
  top1: float,
  top5: float,
  preprocessing: variants.Preprocessing,
  **fields: Any,
) -> variants.Variant:
  return variants.Variant(
    module=MambaVision,
    fields=fields,
    paper="arXiv:2407.08083",
    official=official,
    preprocessing=preprocessing,
    pretrained=variants.Pretrained(
      source=f"nvidia/MambaVision-{repository}",
      files=(file, "model.safetensors"),
      license="CC-BY-NC-SA-4.0",
      commercial_use=False,
      top1=top1,
      top5=top5,
    ),
  )


_SQUASH_512: Final = variants.Preprocessing(
  size=512, crop_fraction=0.93, crop_mode="squash"
)
_CENTER_224: Final = variants.Preprocessing(crop_fraction=1.0)
_BASE: Final = dict(
  dim=128, in_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5, drop_path_rate=0.3
)
_LARGE: Final = dict(_BASE, dim=196, num_heads=(4, 8, 16, 32))
_LARGE2: Final = dict(_LARGE, depths=(3, 3, 12, 5))
_LARGE3: Final = dict(
  _LARGE, dim=256, depths=(3, 3, 20, 10), drop_path_rate=0.5
)

# arXiv:2407.08083, table 1, and the models published after it. "21k" was
# trained on ImageNet-21k first; all of these heads have 1000 classes.
VARIANTS: Final = {
  "mambavision_tiny": _variant(
    "mamba_vision_T",
    "T-1K",
    "mambavision_tiny_1k.pth.tar",
    top1=82.3,
    top5=96.2,
    preprocessing=_CENTER_224,
    drop_path_rate=0.2,
  ),
  "mambavision_tiny2": _variant(
    "mamba_vision_T2",
    "T2-1K",
    "mambavision_tiny2_1k.pth.tar",
    top1=82.7,
    top5=96.3,
    preprocessing=variants.Preprocessing(crop_fraction=0.98),
    depths=(1, 3, 11, 4),
    drop_path_rate=0.2,
  ),
  "mambavision_small": _variant(
    "mamba_vision_S",
    "S-1K",
    "mambavision_small_1k.pth.tar",
    top1=83.3,
    top5=96.5,
    preprocessing=variants.Preprocessing(crop_fraction=0.93),
    dim=96,
    in_dim=64,
    depths=(3, 3, 7, 5),
    drop_path_rate=0.2,
  ),
  "mambavision_base": _variant(
    "mamba_vision_B",
    "B-1K",
    "mambavision_base_1k.pth.tar",
    top1=84.2,
    top5=96.9,
    preprocessing=_CENTER_224,
    **_BASE,
  ),
  "mambavision_large": _variant(
    "mamba_vision_L",
    "L-1K",
    "mambavision_large_1k.pth.tar",
    top1=85.0,
    top5=97.1,
    preprocessing=_CENTER_224,
    **_LARGE,
  ),
  "mambavision_large2": _variant(
    "mamba_vision_L2",
    "L2-1K",
    "mambavision_large2_1k.pth.tar",
    top1=85.3,
    top5=97.2,
    preprocessing=_CENTER_224,
    **_LARGE2,
  ),
  "mambavision_base_21k": _variant(
    "mamba_vision_B_21k",
    "B-21K",
    "mambavision_base_21k.pth.tar",
    top1=84.9,
    top5=97.5,
    preprocessing=_CENTER_224,
    **_BASE,
  ),
  "mambavision_large_21k": _variant(
    "mamba_vision_L_21k",
    "L-21K",
    "mambavision_large_21k.pth.tar",
    top1=86.1,
    top5=97.9,
    preprocessing=_CENTER_224,
    **_LARGE,
  ),
  "mambavision_large2_512_21k": _variant(
    "mamba_vision_L2_512_21k",
    "L2-512-21K",
    "mambavision_L2_21k_240m_512.pth.tar",
    top1=87.3,
    top5=98.4,
    preprocessing=_SQUASH_512,
    **_LARGE2,
    window_size=(8, 8, 32, 16),
  ),
  "mambavision_large3_256_21k": _variant(
    "mamba_vision_L3_256_21k",
    "L3-256-21K",
    "mambavision_L3_21k_740m_256.pth.tar",
    top1=87.3,
    top5=98.3,
    preprocessing=variants.Preprocessing(size=256, crop_fraction=1.0),
    **_LARGE3,
    window_size=(8, 8, 16, 8),
  ),
  "mambavision_large3_512_21k": _variant(
    "mamba_vision_L3_512_21k",
    "L3-512-21K",
    "mambavision_L3_21k_740m_512.pth.tar",
    top1=88.1,
    top5=98.6,
    preprocessing=_SQUASH_512,
    **_LARGE3,
    window_size=(8, 8, 32, 16),
  ),
}
