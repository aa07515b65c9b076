"""Vim: a plain vision backbone of bidirectional state-space layers.

Vision Mamba (https://arxiv.org/abs/2401.09417).

Axes: b batch, h and w rows and columns of the patch grid, l tokens, d channels,
e inner channels (expand * d), n state size.
"""

import math
from typing import Any, Final, get_args, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

import pallas_kernels
from vimjax import variants
from vimjax.layers import basic, bidirectional, checks, pos_embed, stack

ClassToken = Literal["middle", "first", "none"]
PosEmbedResize = Literal["class_aware", "official"]

_SIZES: Final = (
  "num_classes",
  "in_chans",
  "patch_size",
  "stride",
  "depth",
  "embed_dim",
  "state_size",
  "expand",
  "conv_size",
)


class Block(nn.Module):
  """x + drop_path(mixer(RMSNorm(x))), x in float32.

  Attributes:
    mixer: Fields of the `bidirectional.BidirectionalMixer`.
    dtype: Computation dtype of the mixer.
    param_dtype: Dtype of the parameters.
  """

  mixer: dict[str, Any]
  dtype: basic.Dtype
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], drop_rate: float | Array | None = None
  ) -> Float[Array, "b l d"]:
    """Runs the block; None as `drop_rate` means no drop path."""
    dtypes: dict[str, Any] = dict(
      dtype=self.dtype, param_dtype=self.param_dtype
    )
    y = nn.RMSNorm(epsilon=1e-5, name="norm", **dtypes)(x)
    mixer = bidirectional.BidirectionalMixer(
      **self.mixer, name="mixer", **dtypes
    )
    y = mixer(y).astype(x.dtype)
    return x + basic.DropPath(name="drop_path")(y, drop_rate)


class Vim(nn.Module):
  """Vision Mamba.

  `model.apply(variables, images)` gives logits, float32 whatever `dtype`;
  `method="pooled"` the vector before the head; `method="features"` the grid of
  patch features for detection and segmentation heads. Images may have any size
  of at least one patch: the positional embedding is resized to their grid, and
  pixels that no patch covers, at the right and bottom edges, are dropped as by
  the official convolution.

  Training needs `train=True` and, with drop path, `rngs={"drop_path": key}`.

  To see inside, `model.apply(variables, images, capture_intermediates=True,
  mutable=["intermediates"])` also returns what every submodule computed:
  "tokens" (the first layer's input), "layers_i/mixer" and "layers_i" (the
  residual stream after layer i), with a leading layer axis under "layers" where
  `scan_layers` is set.

  Attributes:
    num_classes: Outputs of the head.
    in_chans: Channels of the images; 3 are red, green and blue.
    image_size: Side, or (h, w), that the positional embedding is made for.
    patch_size: Side of a patch in pixels.
    stride: Pixels from patch to patch.
    depth: Layers.
    embed_dim: Channels d.
    state_size: Length n of the state per channel.
    expand: Inner channels per channel.
    conv_size: Taps of the depthwise convolutions.
    dt_rank: Rank of the step-size projection; None means ceil(d / 16).
    class_token: Where the class token stands in the sequence. Its output is
      pooled; with "none" the mean over all tokens is.
    drop_path_rate: Stochastic depth of the last layer; grows linearly from 0.
    pos_embed_resize: "class_aware" resizes the patches' embeddings. "official"
      does what the official fine-tuning does for any class token: it takes row
      0 for the class token's, so that with a middle one the grid is shifted.
    scan_layers: Run the layers as one `nn.scan` over stacked parameters: short
      to compile. `vimjax.stack_layers` converts variables.
    remat: Recompute each layer in the backward pass instead of storing it.
    scan_implementation: See `pallas_kernels.selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the images. The residual stream, the
      recurrence, norms and the head are float32 at least.
    param_dtype: Dtype of the parameters.
  """

  num_classes: int = 1000
  in_chans: int = 3
  image_size: int | tuple[int, int] = 224
  patch_size: int = 16
  stride: int = 16
  depth: int = 24
  embed_dim: int = 192
  state_size: int = 16
  expand: int = 2
  conv_size: int = 4
  dt_rank: int | None = None
  class_token: ClassToken = "middle"
  drop_path_rate: float = 0.0
  pos_embed_resize: PosEmbedResize = "class_aware"
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
    checks.one_of(self, "class_token", get_args(ClassToken))
    checks.one_of(self, "pos_embed_resize", get_args(PosEmbedResize))
    checks.probability(self, "drop_path_rate")
    checks.dtypes(self)
    self.grid(self.image_size)

  @nn.nowrap  # No part of the computation.
  def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Args:
      size: Side of the image, or (h, w), in pixels.

    Raises:
      ValueError: The image is smaller than a patch, or `size` is no size.
    """
    pair = checks.pair(self, size)
    if min(pair) < self.patch_size:
      raise ValueError(
        f"Vim: an image of {pair[0]}x{pair[1]} pixels is smaller than one "
        f"patch of {self.patch_size}x{self.patch_size}; enlarge it."
      )
    h, w = ((side - self.patch_size) // self.stride + 1 for side in pair)
    return h, w

  @nn.nowrap  # No part of the computation.
  def class_row(self, patches: int) -> int | None:
    """Position of the class token among `patches` patches, if there is one."""
    return {"middle": patches // 2, "first": 0, "none": None}[self.class_token]

  @nn.nowrap  # No part of the computation.
  def resize_pos_embed(
    self,
    position: Float[Array, "tokens d"],
    old: tuple[int, int],
    new: tuple[int, int],
  ) -> Float[Array, "new_tokens d"]:
    """A positional embedding of grid `old` for grid `new`, both (h, w)."""
    if old == new:
      return position
    rows = tuple(self.class_row(h * w) for h, w in (old, new))
    if self.pos_embed_resize == "official" and self.class_token != "none":
      rows = (0, 0)
    return pos_embed.resize(
      position, old, new, old_class_row=rows[0], new_class_row=rows[1]
    )

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
    """The normalised class token, or mean of all tokens, before the head.

    Like the logits in float32, or float64 if the computation is.
    """
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b rows columns d"]:
    """The normalised patch tokens as a grid, without the class token.

    One map at the stride of the patches, in the computation dtype.
    """
    return self._run(images, train, "features")

  @nn.compact
  def _run(
    self,
    images: Float[Array, "b h w c"],
    train: bool,
    output: Literal["logits", "pooled", "features"],
  ) -> Array:
    checks.images(self, images)
    dtype = basic.compute_dtype(self.dtype, images)
    wide = jnp.promote_types(dtype, jnp.float32)
    h, w = self.grid((images.shape[1], images.shape[2]))
    row = self.class_row(h * w)

    x = self._embed(images.astype(dtype), wide)
    self.sow("intermediates", "tokens", x)
    x = self._layers(x, dtype, train)

    norm = nn.RMSNorm(
      epsilon=1e-5, dtype=wide, param_dtype=self.param_dtype, name="norm"
    )
    if output == "features":
      x = norm(x if row is None else _without_row(x, row))
      return x.reshape(x.shape[0], h, w, self.embed_dim).astype(dtype)
    # Norm is per token: with a class token the others need none.
    x = norm(x).mean(axis=1) if row is None else norm(x[:, row])
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

  def _embed(
    self, images: Float[Array, "b h w c"], wide: jnp.dtype
  ) -> Float[Array, "b l d"]:
    """Patches, the class token among them, and where each of them is."""
    b, d = images.shape[0], self.embed_dim
    x = nn.Conv(
      d,
      (self.patch_size, self.patch_size),
      strides=self.stride,
      padding="VALID",
      precision=self.precision,
      dtype=images.dtype,
      param_dtype=self.param_dtype,
      name="patch_embed",
    )(images).astype(wide)
    h, w = x.shape[1:3]
    x = x.reshape(b, h * w, d)  # row by row
    made_for = self.grid(self.image_size)
    tokens = made_for[0] * made_for[1]
    init = nn.initializers.normal(0.02)
    row = self.class_row(x.shape[1])
    if row is not None:
      tokens += 1
      token = self.param("class_token", init, (d,), self.param_dtype)
      token = basic.repeat_for_images(token.astype(wide), like=x)
      x = jnp.concatenate([x[:, :row], token, x[:, row:]], axis=1)
    position = self.param("pos_embed", init, (tokens, d), self.param_dtype)
    return x + self.resize_pos_embed(position.astype(wide), made_for, (h, w))

  def _layers(
    self, x: Float[Array, "b l d"], dtype: jnp.dtype, train: bool
  ) -> Float[Array, "b l d"]:
    """Runs all layers on the residual stream x."""
    mixer = dict(
      depth=self.depth,
      state_size=self.state_size,
      expand=self.expand,
      conv_size=self.conv_size,
      dt_rank=self.dt_rank or math.ceil(self.embed_dim / 16),
      scan_implementation=self.scan_implementation,
      precision=self.precision,
    )
    rates = None
    if train and self.drop_path_rate > 0:
      rates = np.linspace(0, self.drop_path_rate, self.depth)
      rates[-1] = self.drop_path_rate  # Also where there is one layer.
    return stack.run_layers(
      Block,
      dict(mixer=mixer, dtype=dtype, param_dtype=self.param_dtype),
      x,
      rates,
      depth=self.depth,
      scan=self.scan_layers,
      remat=self.remat,
    )


def _without_row(x: Float[Array, "b l d"], row: int) -> Float[Array, "b m d"]:
  return jnp.concatenate([x[:, :row], x[:, row + 1 :]], axis=1)


def _variant(
  official: str, file: str, fields: dict[str, Any], **facts: Any
) -> variants.Variant:
  """A row of the table for a model with official weights."""
  size = official.split("_")[1]
  weights = variants.Pretrained(
    source=f"hustvl/Vim-{size}-midclstok",
    files=(file,),
    license="Apache-2.0",
    commercial_use=True,
    **facts,
  )
  return variants.Variant(
    module=Vim,
    fields=fields,
    paper="arXiv:2401.09417",
    official=official,
    pretrained=weights,
  )


# Table 1 of the paper; drop path as in the official training scripts. stride8
# is the paper's dagger: fine-tuned on overlapping patches.
VARIANTS: Final = {
  "vim_tiny": _variant(
    "vim_tiny_patch16_224",
    "vim_t_midclstok_76p1acc.pth",
    dict(embed_dim=192),
    top1=76.1,
    top5=93.0,
  ),
  "vim_small": _variant(
    "vim_small_patch16_224",
    "vim_s_midclstok_80p5acc.pth",
    dict(embed_dim=384, drop_path_rate=0.05),
    sha256="aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
    top1=80.5,
    top5=95.1,
  ),
  "vim_base": _variant(
    "vim_base_patch16_224",
    "vim_b_midclstok_81p9acc.pth",
    dict(embed_dim=768),
    top1=81.9,
    top5=95.8,
  ),
  "vim_tiny_stride8": _variant(
    "vim_tiny_patch16_stride8_224",
    "vim_t_midclstok_ft_78p3acc.pth",
    dict(embed_dim=192, stride=8),
    top1=78.3,
    top5=94.2,
  ),
  "vim_small_stride8": _variant(
    "vim_small_patch16_stride8_224",
    "vim_s_midclstok_ft_81p6acc.pth",
    dict(embed_dim=384, stride=8),
    top1=81.6,
    top5=95.4,
  ),
  # No weights were published for this one.
  "vim_base_stride8": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=768, stride=8),
    paper="arXiv:2401.09417",
    official="vim_base_patch16_stride8_224",
  ),
}
