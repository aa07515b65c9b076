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
from vimjax.layers import basic, conv, pos_embed, ssm, stack

ClassToken = Literal["middle", "first", "none"]
PosEmbedResize = Literal["class_aware", "official"]


class BidirectionalMixer(nn.Module):
  """Mixes tokens by one scan in each direction (paper, algorithm 1).

  Both directions share the input and output projections and the gate. The
  backward one convolves and scans from the last token to the first in place;
  nothing is flipped.

  Attributes:
    depth: Layers of the model; the output projection starts 1/sqrt(depth)
      times as large as PyTorch's default.
    state_size: Length n of the state per channel.
    expand: Inner channels per channel.
    conv_size: Taps of the depthwise convolutions.
    dt_rank: Rank of the step-size projection.
    scan_implementation: See `pallas_kernels.selective_scan`.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the input.
    param_dtype: Dtype of the parameters.
  """

  depth: int
  state_size: int
  expand: int
  conv_size: int
  dt_rank: int
  scan_implementation: pallas_kernels.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """Mixes x along l; the result has the computation dtype."""
    d, e = x.shape[-1], self.expand * x.shape[-1]
    dtype = basic.compute_dtype(self.dtype, x)
    shared: dict[str, Any] = dict(dtype=dtype, param_dtype=self.param_dtype)
    dense: dict[str, Any] = dict(
      use_bias=False, precision=self.precision, **shared
    )

    xz = nn.Dense(
      2 * e, kernel_init=basic.torch_linear(), name="in_proj", **dense
    )(x)
    u, z = jnp.split(xz, 2, axis=-1)  # (b, l, e) each
    mixed = []
    for direction in ("forward", "backward"):
      reverse = direction == "backward"
      v = conv.DepthwiseConv1d(
        self.conv_size, reverse, name=f"{direction}_conv", **shared
      )(u)
      y = ssm.SelectiveSSM(
        state_size=self.state_size,
        dt_rank=self.dt_rank,
        reverse=reverse,
        # The official code starts the backward bias at zero.
        dt_bias_init=nn.initializers.zeros if reverse else ssm.step_bias(),
        scan_implementation=self.scan_implementation,
        precision=self.precision,
        name=f"{direction}_ssm",
        **shared,
      )(nn.silu(v))
      mixed.append(y)
    # The directions have the same gate: once on the mean, not once on each.
    y = 0.5 * (mixed[0] + mixed[1]) * nn.silu(z)
    small = basic.torch_linear(1 / math.sqrt(self.depth))
    return nn.Dense(d, kernel_init=small, name="out_proj", **dense)(y)


class Block(nn.Module):
  """x + drop_path(mixer(RMSNorm(x))), x in float32.

  Attributes:
    mixer: Fields of the `BidirectionalMixer`.
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
    y = BidirectionalMixer(**self.mixer, name="mixer", **dtypes)(y)
    y = basic.DropPath(name="drop_path")(y, drop_rate)
    return x + y.astype(x.dtype)


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
    for name in ("patch_size", "stride", "depth", "embed_dim", "num_classes"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f"Vim: {name} must be a positive integer, got {value!r}."
        )
    for name, choices in (
      ("class_token", get_args(ClassToken)),
      ("pos_embed_resize", get_args(PosEmbedResize)),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(
          f"Vim: {name} must be one of {list(choices)}, got {value!r}."
        )
    if not 0.0 <= self.drop_path_rate < 1.0:
      raise ValueError(
        f"Vim: drop_path_rate must be in [0, 1), got {self.drop_path_rate}."
      )
    self.grid(_pair(self.image_size))

  def grid(self, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of (h, w) pixels.

    Raises:
      ValueError: The image is smaller than a patch.
    """
    if min(size) < self.patch_size:
      raise ValueError(
        f"Vim: an image of {size[0]}x{size[1]} pixels is smaller than one "
        f"patch of {self.patch_size}x{self.patch_size}; enlarge it."
      )
    h, w = ((side - self.patch_size) // self.stride + 1 for side in size)
    return h, w

  def class_row(self, patches: int) -> int | None:
    """Position of the class token among `patches` patches, if there is one."""
    return {"middle": patches // 2, "first": 0, "none": None}[self.class_token]

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
    """The normalised class token, or mean of all tokens, before the head."""
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w 3"], *, train: bool = False
  ) -> Float[Array, "b rows columns d"]:
    """The normalised patch tokens as a grid, without the class token."""
    return self._run(images, train, "features")

  @nn.compact
  def _run(
    self,
    images: Float[Array, "b h w 3"],
    train: bool,
    output: Literal["logits", "pooled", "features"],
  ) -> Array:
    _check_images(images)
    dtype = basic.compute_dtype(self.dtype, images)
    wide = jnp.promote_types(dtype, jnp.float32)
    h, w = self.grid((images.shape[1], images.shape[2]))
    row = self.class_row(h * w)

    x = self._embed(images.astype(dtype), (h, w)).astype(wide)
    self.sow("intermediates", "tokens", x)
    x = self._layers(x, dtype, train)

    norm = nn.RMSNorm(
      epsilon=1e-5, dtype=wide, param_dtype=self.param_dtype, name="norm"
    )
    if output == "features":
      x = norm(x if row is None else _without_row(x, row))
      return x.reshape(-1, h, w, self.embed_dim).astype(dtype)
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
    self, images: Float[Array, "b h w 3"], grid: tuple[int, int]
  ) -> Float[Array, "b l d"]:
    """Patches, the class token among them, and where each of them is."""
    d, dtype = self.embed_dim, images.dtype
    x = nn.Conv(
      d,
      (self.patch_size, self.patch_size),
      strides=self.stride,
      padding="VALID",
      precision=self.precision,
      dtype=dtype,
      param_dtype=self.param_dtype,
      name="patch_embed",
    )(images)
    x = x.reshape(-1, grid[0] * grid[1], d)  # row by row
    init = nn.initializers.normal(0.02)
    row = self.class_row(x.shape[1])
    if row is not None:
      token = self.param("class_token", init, (d,), self.param_dtype)
      token = jnp.broadcast_to(token.astype(dtype), (x.shape[0], 1, d))
      x = jnp.concatenate([x[:, :row], token, x[:, row:]], axis=1)
    made_for = self.grid(_pair(self.image_size))
    made_row = self.class_row(made_for[0] * made_for[1])
    tokens = made_for[0] * made_for[1] + (made_row is not None)
    position = self.param("pos_embed", init, (tokens, d), self.param_dtype)
    if made_for != grid:
      if row is not None and self.pos_embed_resize == "official":
        row = made_row = 0
      position = pos_embed.resize(
        position, made_for, grid, old_class_row=made_row, new_class_row=row
      )
    return x + position.astype(dtype)

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


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  h, w = (size, size) if isinstance(size, int) else size
  return h, w


def _without_row(x: Float[Array, "b l d"], row: int) -> Float[Array, "b m d"]:
  return jnp.concatenate([x[:, :row], x[:, row + 1 :]], axis=1)


def _check_images(images: Array) -> None:
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(
      "Vim: images must have shape (batch, height, width, 3), got "
      f"{images.shape}."
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"Vim: images must be floating point, got {images.dtype}; scale the "
      "pixels to [0, 1] and normalise them (see vimjax.preprocess)."
    )


def _weights(size: str, file: str, **facts: Any) -> variants.Pretrained:
  return variants.Pretrained(
    source=f"hustvl/Vim-{size}-midclstok",
    files=(file,),
    license="Apache-2.0",
    commercial_use=True,
    **facts,
  )


# arXiv:2401.09417, table 1; drop path as in the official training scripts,
# names as in the official models_mamba.py. stride8 is the paper's dagger:
# fine-tuned on overlapping patches.
VARIANTS: Final = {
  "vim_tiny": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=192),
    paper="arXiv:2401.09417",
    official="vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",  # noqa: E501
    pretrained=_weights(
      "tiny", "vim_t_midclstok_76p1acc.pth", top1=76.1, top5=93.0
    ),
  ),
  "vim_small": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=384, drop_path_rate=0.05),
    paper="arXiv:2401.09417",
    official="vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",  # noqa: E501
    pretrained=_weights(
      "small",
      "vim_s_midclstok_80p5acc.pth",
      sha256="aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
      top1=80.5,
      top5=95.1,
    ),
  ),
  "vim_base": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=768),
    paper="arXiv:2401.09417",
    official="vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",  # noqa: E501
    pretrained=_weights(
      "base", "vim_b_midclstok_81p9acc.pth", top1=81.9, top5=95.8
    ),
  ),
  "vim_tiny_stride8": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=192, stride=8),
    paper="arXiv:2401.09417",
    official="vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",  # noqa: E501
    pretrained=_weights(
      "tiny", "vim_t_midclstok_ft_78p3acc.pth", top1=78.3, top5=94.2
    ),
  ),
  "vim_small_stride8": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=384, stride=8),
    paper="arXiv:2401.09417",
    official="vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",  # noqa: E501
    pretrained=_weights(
      "small", "vim_s_midclstok_ft_81p6acc.pth", top1=81.6, top5=95.4
    ),
  ),
  "vim_base_stride8": variants.Variant(
    module=Vim,
    fields=dict(embed_dim=768, stride=8),
    paper="arXiv:2401.09417",
    official="vim_base_patch16_stride8_224",  # Nothing was published for it.
  ),
}
