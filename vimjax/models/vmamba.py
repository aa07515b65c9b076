"""VMamba: a hierarchical vision backbone that scans images in four directions.

VMamba (https://arxiv.org/abs/2401.10166). One class covers the three published
generations: the first ("v0": gate, no MLP), the second ("s2l5", "s1l8", ...:
no gate, state size 1, MLP) and the one with Mamba-2's scan ("m2").

Axes: b batch, h and w rows and columns of a feature map, d channels, e inner
channels (expand * d), n state size.
"""

from typing import Any, Final, get_args, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

import pallas_kernels
from vimjax import variants
from vimjax.layers import basic, checks, pyramid, ss2d

_SIZES: Final = (
  "num_classes",
  "in_chans",
  "embed_dim",
  "state_size",
  "conv_size",
)


class VMamba(nn.Module):
  """VMamba.

  `model.apply(variables, images)` gives logits, float32 whatever `dtype`;
  `method="pooled"` the vector before the head; `method="features"` a tuple of
  feature maps at strides 4, 8, 16, 32 for detection and segmentation heads.
  Images may have any size: there is no positional embedding.

  Training needs `train=True` and, with drop path, `rngs={"drop_path": key}`.

  To see inside, `model.apply(variables, images, capture_intermediates=True,
  mutable=["intermediates"])` also returns what every submodule computed:
  "stem", "stages_0/layers_i" (the residual stream after block i, with a leading
  axis under "layers" where `scan_layers` is set), "downsample_0", ...

  Attributes:
    num_classes: Outputs of the head.
    in_chans: Channels of the images; 3 are red, green and blue.
    depths: Blocks of each stage; each stage after the first has half the
      resolution and twice the channels of the one before.
    embed_dim: Channels d of the first stage.
    mixer: What scans: "selective_scan" (Mamba) or "ssd" (Mamba-2).
    state_size: Length n of the state per channel.
    expand: Inner channels of the mixer per channel.
    dt_rank: Rank of the step-size projection, or heads of "ssd"; None means
      ceil(d / 16).
    gate: Multiply the mixer's result by the activation of a second projection.
    conv_size: Side of the mixer's depthwise filters, odd.
    conv_bias: Whether that convolution has a bias.
    activation: In the mixer.
    mlp_ratio: Hidden channels of the MLP per channel; 0 leaves it out.
    stem: "overlapping" (two convolutions) or "patches" (4x4).
    downsample: "conv" or "patch_merging", between stages.
    drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
    scan_layers: Run the blocks of a stage as one `nn.scan` over stacked
      parameters: short to compile. `vimjax.stack_layers` converts variables.
    remat: Recompute each block in the backward pass instead of storing it.
    scan_implementation: See `pallas_kernels.cross_selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the images. The residual stream, the
      recurrence, norms and the head are float32 at least.
    param_dtype: Dtype of the parameters.
  """

  num_classes: int = 1000
  in_chans: int = 3
  depths: tuple[int, ...] = (2, 2, 8, 2)
  embed_dim: int = 96
  mixer: ss2d.Mixer = "selective_scan"
  state_size: int = 1
  expand: float = 1.0
  dt_rank: int | None = None
  gate: bool = False
  conv_size: int = 3
  conv_bias: bool = False
  activation: ss2d.Activation = "silu"
  mlp_ratio: float = 4.0
  stem: pyramid.Stem = "overlapping"
  downsample: pyramid.Downsample = "conv"
  drop_path_rate: float = 0.0
  scan_layers: bool = False
  remat: bool = False
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    checks.positive_integers(self, _SIZES)
    if self.dt_rank is not None:
      checks.positive_integers(self, ["dt_rank"])
    checks.depths(self, self.depths)
    checks.positive(self, ["expand"])
    checks.not_negative(self, ["mlp_ratio"])
    checks.one_of(self, "mixer", get_args(ss2d.Mixer))
    checks.one_of(self, "activation", get_args(ss2d.Activation))
    checks.one_of(self, "stem", get_args(pyramid.Stem))
    checks.one_of(self, "downsample", get_args(pyramid.Downsample))
    checks.probability(self, "drop_path_rate")
    checks.dtypes(self)
    if self.conv_size % 2 == 0:
      raise ValueError(f"VMamba: conv_size must be odd, got {self.conv_size}.")

  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b classes"]:
    """Classifies images.

    Args:
      images: Normalised pixels, see `vimjax.preprocess`.
      train: Applies drop path.

    Returns:
      Logits in float32 (float64 if the computation is).

    Raises:
      ValueError: Wrong rank, channel count or dtype, or smaller than a patch.
    """
    return self._run(images, train, "logits")

  def pooled(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """The mean of the normalised last feature map, before the head."""
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> tuple[Float[Array, "b i j d"], ...]:
    """What each stage computes, from stride 4 to stride 32.

    Map i has embed_dim * 2 ** i channels and no norm yet: the official backbone
    for detection puts a norm of its own, trained with the head, on each. Sides
    are divided by two with rounding up from stage to stage, and by four in the
    stem: rounded up by the overlapping one, down by patches.
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
    checks.smallest_side(self, images, 4 if self.stem == "patches" else 1)
    dtype = basic.compute_dtype(self.dtype, images)
    wide = basic.wide(dtype)
    shared: dict[str, Any] = dict(
      precision=self.precision, dtype=dtype, param_dtype=self.param_dtype
    )
    x = pyramid.STEMS[self.stem](self.embed_dim, name="stem", **shared)(
      images.astype(dtype)
    )
    maps = []
    for i, rates in enumerate(self._drop_rates(train)):
      x = ss2d.BlockStack(
        depth=self.depths[i],
        block=dict(mixer=self._mixer(), mlp_ratio=self.mlp_ratio, **shared),
        drop_rates=rates,
        scan_layers=self.scan_layers,
        remat=self.remat,
        name=f"stages_{i}",
      )(x)
      maps.append(x.astype(dtype))
      if i < len(self.depths) - 1:
        downsample = pyramid.DOWNSAMPLES[self.downsample]
        x = downsample(name=f"downsample_{i}", **shared)(x)
    if output == "features":
      return tuple(maps)
    x = basic.layer_norm("norm", wide, self.param_dtype)(x).mean(axis=(1, 2))
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

  def _mixer(self) -> dict[str, Any]:
    """Fields of every `SS2D`."""
    return dict(
      mixer=self.mixer,
      state_size=self.state_size,
      expand=self.expand,
      dt_rank=self.dt_rank,
      gate=self.gate,
      conv_size=self.conv_size,
      conv_bias=self.conv_bias,
      activation=self.activation,
      scan_implementation=self.scan_implementation,
    )

  def _drop_rates(self, train: bool) -> list[tuple[float, ...] | None]:
    """For each stage the drop-path rates of its blocks, if there is any."""
    if not train or self.drop_path_rate == 0:
      return [None] * len(self.depths)
    rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
    ends = np.cumsum(self.depths)[:-1]
    return [tuple(map(float, part)) for part in np.split(rates, ends)]


def _weights(
  generation: str, file: str, top1: float, top5: float | None = None
) -> variants.Pretrained:
  return variants.Pretrained(
    source="https://github.com/MzeroMiko/VMamba/releases/download/"
    f"%23{generation}cls",
    files=(file,),
    license="MIT",
    commercial_use=True,
    top1=top1,
    top5=top5,
  )


_V0: Final[dict[str, Any]] = dict(
  state_size=16,
  expand=2.0,
  gate=True,
  conv_bias=True,
  mlp_ratio=0.0,
  stem="patches",
  downsample="patch_merging",
)
_M2: Final[dict[str, Any]] = dict(mixer="ssd", state_size=64, activation="gelu")


def _variant(
  official: str, pretrained: variants.Pretrained | None = None, **fields: Any
) -> variants.Variant:
  return variants.Variant(
    module=VMamba,
    fields=fields,
    paper="arXiv:2401.10166",
    official=official,
    pretrained=pretrained,
  )


# Names, sizes, drop path and accuracies as in the official vmamba.py and its
# table of results; the top-5 accuracies are from its notes.
VARIANTS: Final = {
  "vmamba_tiny_v0": _variant(
    "vanilla_vmamba_tiny",
    _weights("v0", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, 96.032),
    depths=(2, 2, 9, 2),
    drop_path_rate=0.2,
    **_V0,
  ),
  "vmamba_small_v0": _variant(
    "vanilla_vmamba_small",
    _weights("v0", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, 96.470),
    depths=(2, 2, 27, 2),
    drop_path_rate=0.3,
    **_V0,
  ),
  "vmamba_base_v0": _variant(
    "vanilla_vmamba_base",
    _weights("v0", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7, 96.624),
    depths=(2, 2, 27, 2),
    embed_dim=128,
    drop_path_rate=0.6,
    **_V0,
  ),
  "vmamba_tiny_s2l5": _variant(
    "vmamba_tiny_s2l5",
    _weights("v2", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, 95.996),
    depths=(2, 2, 5, 2),
    expand=2.0,
    drop_path_rate=0.2,
  ),
  "vmamba_small_s2l15": _variant(
    "vmamba_small_s2l15",
    _weights("v2", "vssm_small_0229_ckpt_epoch_222.pth", 83.6, 96.594),
    depths=(2, 2, 15, 2),
    expand=2.0,
    drop_path_rate=0.3,
  ),
  "vmamba_base_s2l15": _variant(
    "vmamba_base_s2l15",
    _weights("v2", "vssm_base_0229_ckpt_epoch_237.pth", 83.9, 96.712),
    depths=(2, 2, 15, 2),
    embed_dim=128,
    expand=2.0,
    drop_path_rate=0.6,
  ),
  "vmamba_tiny_s1l8": _variant(
    "vmamba_tiny_s1l8",
    _weights("v2", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
    depths=(2, 2, 8, 2),
    drop_path_rate=0.2,
  ),
  "vmamba_small_s1l20": _variant(
    "vmamba_small_s1l20",
    _weights("v2", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3, 96.426),
    depths=(2, 2, 20, 2),
    drop_path_rate=0.3,
  ),
  "vmamba_base_s1l20": _variant(
    "vmamba_base_s1l20",
    _weights("v2", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, 96.614),
    depths=(2, 2, 20, 2),
    embed_dim=128,
    drop_path_rate=0.5,
  ),
  # Nothing was published for the m2 models.
  "vmamba_tiny_m2": _variant(
    "vmamba_tiny_m2", depths=(2, 2, 4, 2), drop_path_rate=0.2, **_M2
  ),
  "vmamba_small_m2": _variant(
    "vmamba_small_m2", depths=(2, 2, 12, 2), drop_path_rate=0.3, **_M2
  ),
  "vmamba_base_m2": _variant(
    "vmamba_base_m2",
    depths=(2, 2, 12, 2),
    embed_dim=128,
    drop_path_rate=0.3,
    **_M2,
  ),
}
