"""VMamba: a hierarchical vision backbone that scans images in four directions.

VMamba (https://arxiv.org/abs/2401.10166). One class covers the three published
generations: the first ("v0": gate, no MLP), the second ("s2l5", "s1l8", ...:
no gate, state size 1, MLP) and the one with Mamba-2's scan ("m2").

Axes: b batch, h and w rows and columns of a feature map, d channels, e inner
channels (expand * d), n state size.
"""

import math
from typing import Any, Final, get_args, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

import pallas_kernels
from vimjax import variants
from vimjax.layers import basic, checks, conv, cross_scan, mlp, ssd, stack

Mixer = Literal["selective_scan", "ssd"]
Activation = Literal["silu", "gelu"]
Stem = Literal["overlapping", "patches"]
Downsample = Literal["conv", "patch_merging"]

_ACTIVATIONS: Final = {
  "silu": nn.silu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


_SIZES: Final = ("num_classes", "embed_dim", "state_size", "conv_size")


class SS2D(nn.Module):
  """2-D selective scan: projection, depthwise convolution, scan, projection.

  Paper, figure 3.

  Attributes:
    mixer: What scans: "selective_scan" (Mamba) or "ssd" (Mamba-2).
    state_size: Length n of the state per channel.
    expand: Inner channels per channel.
    dt_rank: Rank of the step-size projection, or heads of "ssd"; None means
      ceil(d / 16).
    gate: Multiply the result by the activation of a second projection.
    conv_size: Side of the depthwise convolution's filters, odd.
    conv_bias: Whether that convolution has a bias.
    activation: After the convolution, and of the gate.
    scan_implementation: See `pallas_kernels.cross_selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  mixer: Mixer = "selective_scan"
  state_size: int = 1
  expand: float = 1.0
  dt_rank: int | None = None
  gate: bool = False
  conv_size: int = 3
  conv_bias: bool = False
  activation: Activation = "silu"
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Mixes an image; the result has the computation dtype."""
    d = x.shape[-1]
    e = int(self.expand * d)
    dtype = basic.compute_dtype(self.dtype, x)
    dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=self.param_dtype)
    dense: dict[str, Any] = dict(
      use_bias=False,
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      **dtypes,
    )
    activate = _ACTIVATIONS[self.activation]

    u = nn.Dense(2 * e if self.gate else e, name="in_proj", **dense)(x)
    z = None
    if self.gate:
      u, z = jnp.split(u, 2, axis=-1)  # (b, h, w, e) each
    u = conv.DepthwiseConv2d(
      self.conv_size, self.conv_bias, name="conv", **dtypes
    )(u)
    y = self._scan(activate(u), self.dt_rank or math.ceil(d / 16), dtypes)
    y = _norm("out_norm", **dtypes)(y)
    if z is not None:
      y = y * activate(z)
    return nn.Dense(d, name="out_proj", **dense)(y)

  def _scan(
    self, u: Float[Array, "b h w e"], rank: int, dtypes: dict[str, Any]
  ) -> Float[Array, "b h w e"]:
    fields: dict[str, Any] = dict(
      state_size=self.state_size,
      dt_rank=rank,
      precision=self.precision,
      name="ssm",
      **dtypes,
    )
    if self.mixer == "ssd":
      return ssd.CrossSSD(**fields)(u)
    return cross_scan.CrossSelectiveSSM(
      scan_implementation=self.scan_implementation, **fields
    )(u)


class Block(nn.Module):
  """x + drop_path(SS2D(norm(x))), then the same with an MLP; x in float32.

  Attributes:
    mixer: Fields of the `SS2D`.
    mlp_ratio: Hidden channels of the MLP per channel; 0 leaves it out.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype of both branches.
    param_dtype: Dtype of the parameters.
  """

  mixer: dict[str, Any]
  mlp_ratio: float
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w d"], drop_rate: float | Array | None = None
  ) -> Float[Array, "b h w d"]:
    """Runs the block; None as `drop_rate` means no drop path."""
    shared: dict[str, Any] = dict(
      precision=self.precision, dtype=self.dtype, param_dtype=self.param_dtype
    )
    dtypes: dict[str, Any] = dict(
      dtype=self.dtype, param_dtype=self.param_dtype
    )
    y = _norm("norm", **dtypes)(x)
    y = SS2D(**self.mixer, name="mixer", **shared)(y)
    y = basic.DropPath(name="drop_path")(y, drop_rate)
    x = x + y.astype(x.dtype)
    if self.mlp_ratio == 0:
      return x
    y = _norm("mlp_norm", **dtypes)(x)
    hidden = int(self.mlp_ratio * x.shape[-1])
    y = mlp.Mlp(hidden, name="mlp", **shared)(y)
    y = basic.DropPath(name="mlp_drop_path")(y, drop_rate)
    return x + y.astype(x.dtype)


class BlockStack(nn.Module):
  """The blocks of one stage, at one resolution.

  Attributes:
    depth: How many.
    block: Fields of each `Block`.
    drop_rates: Drop-path rate of each, or None for no drop path.
    scan_layers: Run them as one `nn.scan` over stacked parameters.
    remat: Recompute each block in the backward pass.
  """

  depth: int
  block: dict[str, Any]
  drop_rates: tuple[float, ...] | None
  scan_layers: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Runs the blocks in turn."""
    rates = None if self.drop_rates is None else np.asarray(self.drop_rates)
    return stack.run_layers(
      Block,
      self.block,
      x,
      rates,
      depth=self.depth,
      scan=self.scan_layers,
      remat=self.remat,
    )


class OverlappingStem(nn.Module):
  """Two 3x3 convolutions of stride 2, each with its norm: 4 pixels a cell.

  Odd sides are rounded up.

  Attributes:
    features: Channels of the result; half as many in between.
    precision: Of the convolutions, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolutions.
    param_dtype: Dtype of the parameters.
  """

  features: int
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    """Embeds images; the result is float32 at least."""
    shared = (self.precision, self.dtype, self.param_dtype)
    x = _conv(self.features // 2, 3, 2, x.shape[-1], "conv1", *shared)(x)
    x = _norm("norm1", self.dtype, self.param_dtype)(x)
    x = nn.gelu(x, approximate=False)
    x = _conv(self.features, 3, 2, x.shape[-1], "conv2", *shared)(x)
    return _norm("norm2", _wide(x.dtype), self.param_dtype)(x)


class PatchStem(nn.Module):
  """A linear map of 4x4 patches, and a norm.

  Pixels beyond the last whole patch are dropped.

  Attributes:
    features: Channels of the result.
    precision: Of the convolution, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolution.
    param_dtype: Dtype of the parameters.
  """

  features: int
  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    """Embeds images; the result is float32 at least."""
    shared = (self.precision, self.dtype, self.param_dtype)
    x = _conv(self.features, 4, 4, x.shape[-1], "conv1", *shared)(x)
    return _norm("norm1", _wide(x.dtype), self.param_dtype)(x)


class ConvDownsample(nn.Module):
  """A 3x3 convolution of stride 2 to twice the channels, and a norm.

  Odd sides are rounded up.

  Attributes:
    precision: Of the convolution, see `jax.lax.Precision`.
    dtype: Computation dtype of the convolution.
    param_dtype: Dtype of the parameters.
  """

  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j f"]:
    """Halves both sides; the result is float32 at least."""
    d = x.shape[-1]
    shared = (self.precision, self.dtype, self.param_dtype)
    y = _conv(2 * d, 3, 2, d, "conv", *shared)(x)
    return _norm("norm", _wide(y.dtype), self.param_dtype)(y)


class PatchMerging(nn.Module):
  """Norm and linear map of 2x2 neighbours side by side, as in Swin.

  Odd sides are rounded up: a row or column of zeros is added before the norm.

  Attributes:
    precision: Of the matrix product, see `jax.lax.Precision`.
    dtype: Computation dtype of the matrix product.
    param_dtype: Dtype of the parameters.
  """

  precision: basic.Precision
  dtype: basic.Dtype
  param_dtype: basic.Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j f"]:
    """Halves both sides; the result is float32 at least."""
    _, h, w, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    corners = ((0, 0), (1, 0), (0, 1), (1, 1))
    y = jnp.concatenate([x[:, i::2, j::2] for i, j in corners], axis=-1)
    y = _norm("norm", self.dtype, self.param_dtype)(y)
    y = nn.Dense(
      2 * d,
      use_bias=False,
      kernel_init=nn.initializers.normal(0.02),
      precision=self.precision,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="reduction",
    )(y)
    return y.astype(_wide(y.dtype))


_STEMS: Final = {"overlapping": OverlappingStem, "patches": PatchStem}
_DOWNSAMPLES: Final = {"conv": ConvDownsample, "patch_merging": PatchMerging}


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
  depths: tuple[int, ...] = (2, 2, 8, 2)
  embed_dim: int = 96
  mixer: Mixer = "selective_scan"
  state_size: int = 1
  expand: float = 1.0
  dt_rank: int | None = None
  gate: bool = False
  conv_size: int = 3
  conv_bias: bool = False
  activation: Activation = "silu"
  mlp_ratio: float = 4.0
  stem: Stem = "overlapping"
  downsample: Downsample = "conv"
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
    checks.one_of(self, "mixer", get_args(Mixer))
    checks.one_of(self, "activation", get_args(Activation))
    checks.one_of(self, "stem", get_args(Stem))
    checks.one_of(self, "downsample", get_args(Downsample))
    checks.probability(self, "drop_path_rate")
    if self.conv_size % 2 == 0:
      raise ValueError(f"VMamba: conv_size must be odd, got {self.conv_size}.")

  def __call__(
    self, images: Float[Array, "b h w 3"], *, train: bool = False
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
    self, images: Float[Array, "b h w 3"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """The mean of the normalised last feature map, before the head."""
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w 3"], *, train: bool = False
  ) -> tuple[Float[Array, "b i j d"], ...]:
    """What each stage computes, from stride 4 to stride 32.

    Map i has embed_dim * 2 ** i channels and, as in the official backbone for
    detection, no norm yet: heads add their own. Sides are divided by two with
    rounding up from stage to stage, and by four in the stem: rounded up by the
    overlapping one, down by patches.
    """
    return self._run(images, train, "features")

  @nn.compact
  def _run(
    self,
    images: Float[Array, "b h w 3"],
    train: bool,
    output: Literal["logits", "pooled", "features"],
  ) -> Any:
    checks.images(self, images)
    checks.smallest_side(self, images, 4 if self.stem == "patches" else 1)
    dtype = basic.compute_dtype(self.dtype, images)
    wide = _wide(dtype)
    shared: dict[str, Any] = dict(
      precision=self.precision, dtype=dtype, param_dtype=self.param_dtype
    )
    x = _STEMS[self.stem](self.embed_dim, name="stem", **shared)(
      images.astype(dtype)
    )
    maps = []
    for i, rates in enumerate(self._drop_rates(train)):
      x = BlockStack(
        depth=self.depths[i],
        block=dict(mixer=self._mixer(), mlp_ratio=self.mlp_ratio, **shared),
        drop_rates=rates,
        scan_layers=self.scan_layers,
        remat=self.remat,
        name=f"stages_{i}",
      )(x)
      maps.append(x.astype(dtype))
      if i < len(self.depths) - 1:
        downsample = _DOWNSAMPLES[self.downsample]
        x = downsample(name=f"downsample_{i}", **shared)(x)
    if output == "features":
      return tuple(maps)
    x = _norm("norm", wide, self.param_dtype)(x).mean(axis=(1, 2))
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


def _wide(dtype: basic.Dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _norm(
  name: str, dtype: basic.Dtype, param_dtype: basic.Dtype
) -> nn.LayerNorm:
  """Over the channels; statistics are float32 at least whatever the dtype."""
  return nn.LayerNorm(
    epsilon=1e-5,
    use_fast_variance=False,  # The fast one cancels where the mean is large.
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )


def _conv(
  features: int,
  size: int,
  stride: int,
  inputs: int,
  name: str,
  precision: basic.Precision,
  dtype: basic.Dtype,
  param_dtype: basic.Dtype,
) -> nn.Conv:
  """A square convolution with PyTorch's padding and initialisation."""
  padding = (size - 1) // 2 if size % 2 else 0
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=padding,
    kernel_init=basic.torch_linear(),
    bias_init=basic.uniform(1 / (size * math.sqrt(inputs))),
    precision=precision,
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )


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
