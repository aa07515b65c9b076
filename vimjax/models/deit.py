"""DeiT: a plain vision transformer, the baseline of the papers.

Training data-efficient image transformers & distillation through attention
(https://arxiv.org/abs/2012.12877), without distillation.

Axes: b batch, h and w rows and columns of the patch grid, l tokens, d channels.
"""

from typing import Any, Final, Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vimjax import variants
from vimjax.layers import attention, basic, checks, mlp, pos_embed, stack


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), x in float32.

  Attributes:
    attention: Fields of the `attention.Attention`.
    mlp_ratio: Hidden channels of the MLP per channel.
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype of attention and MLP.
    param_dtype: Dtype of the parameters.
  """

  attention: dict[str, Any]
  mlp_ratio: float
  precision: basic.Precision
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
    fields: dict[str, Any] = dict(precision=self.precision, **dtypes)
    branches = (
      attention.Attention(**self.attention, name="attention", **fields),
      mlp.Mlp(int(self.mlp_ratio * x.shape[-1]), name="mlp", **fields),
    )
    for i, branch in enumerate(branches, start=1):
      norm = nn.LayerNorm(
        epsilon=1e-6, use_fast_variance=False, name=f"norm{i}", **dtypes
      )
      y = branch(basic.apart(norm(x))).astype(x.dtype)
      x = x + basic.DropPath(name=f"drop_path{i}")(y, drop_rate)
    return x


class DeiT(nn.Module):
  """Data-efficient image transformer.

  `model.apply(variables, images)` gives logits, float32 whatever `dtype`;
  `method="pooled"` the vector before the head; `method="features"` the grid of
  patch features for detection and segmentation heads. Images may have any size
  of at least one patch: the positional embedding is resized to their grid, and
  pixels that no patch covers, at the right and bottom edges, are dropped.

  Training needs `train=True` and, with drop path, `rngs={"drop_path": key}`.

  To see inside, `capture_intermediates=True, mutable=["intermediates"]` also
  returns what every submodule computed, "layers_i" being the residual stream
  after layer i (with a leading layer axis under "layers" for `scan_layers`).

  Attributes:
    num_classes: Outputs of the head.
    in_chans: Channels of the images; 3 are red, green and blue.
    image_size: Side, or (h, w), that the positional embedding is made for.
    patch_size: Side of a patch in pixels.
    depth: Layers.
    embed_dim: Channels d.
    num_heads: Heads of the attention.
    mlp_ratio: Hidden channels of the MLPs per channel.
    drop_path_rate: Stochastic depth of the last layer; grows linearly from 0.
    scan_layers: Run the layers as one `nn.scan` over stacked parameters: short
      to compile. `vimjax.stack_layers` converts variables.
    remat: Recompute each layer in the backward pass instead of storing it.
    attention_implementation: "xla" is plain attention. "cudnn" is flash
      attention, which never stores the l x l matrix: NVIDIA GPUs, with dtype
      "bfloat16" or "float16". None leaves the choice to JAX, which takes "xla".
    precision: Of the matrix products, see `jax.lax.Precision`.
    dtype: Computation dtype; None follows the images. The residual stream,
      norms, the softmax and the head are float32 at least.
    param_dtype: Dtype of the parameters.
  """

  num_classes: int = 1000
  in_chans: int = 3
  image_size: int | tuple[int, int] = 224
  patch_size: int = 16
  depth: int = 12
  embed_dim: int = 192
  num_heads: int = 3
  mlp_ratio: float = 4.0
  drop_path_rate: float = 0.0
  scan_layers: bool = False
  remat: bool = False
  attention_implementation: attention.Implementation | None = None
  precision: basic.Precision = None
  dtype: basic.Dtype | None = None
  param_dtype: basic.Dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    sizes = [
      "num_classes",
      "in_chans",
      "patch_size",
      "depth",
      "embed_dim",
      "num_heads",
    ]
    checks.positive_integers(self, sizes)
    checks.positive(self, ["mlp_ratio"])
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"DeiT: embed_dim={self.embed_dim} does not divide into "
        f"num_heads={self.num_heads}."
      )
    checks.probability(self, "drop_path_rate")
    checks.dtypes(self)
    attention.check_implementation("DeiT", self.attention_implementation)
    self.grid(self.image_size)

  @nn.nowrap  # No part of the computation.
  def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Args:
      size: Side of the image, or (h, w), in pixels.

    Raises:
      ValueError: The image is smaller than a patch, or `size` is no size.
    """
    h, w = checks.pair(self, size)
    if min(h, w) < self.patch_size:
      raise ValueError(
        f"DeiT: an image of {h}x{w} pixels is smaller than one patch of "
        f"{self.patch_size}x{self.patch_size}; enlarge it."
      )
    return h // self.patch_size, w // self.patch_size

  @nn.nowrap  # No part of the computation.
  def resize_pos_embed(
    self,
    position: Float[Array, "tokens d"],
    old: tuple[int, int],
    new: tuple[int, int],
  ) -> Float[Array, "new_tokens d"]:
    """A positional embedding of grid `old` for grid `new`, both (h, w)."""
    return pos_embed.resize(
      position, old, new, old_class_row=0, new_class_row=0
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
      UnsupportedError: `attention_implementation` cannot run here.
    """
    return self._run(images, train, "logits")

  def pooled(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """The normalised class token, before the head."""
    return self._run(images, train, "pooled")

  def features(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b rows columns d"]:
    """The normalised patch tokens as a grid, without the class token."""
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
    x = self._embed(images.astype(dtype), wide)
    x = self._layers(x, dtype, train)
    norm = nn.LayerNorm(
      epsilon=1e-6,
      use_fast_variance=False,
      dtype=wide,
      param_dtype=self.param_dtype,
      name="norm",
    )
    if output == "features":
      return norm(x[:, 1:]).reshape(x.shape[0], h, w, x.shape[2]).astype(dtype)
    x = norm(x[:, 0])  # Norm is per token: the others need none.
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
    """The class token and the patches, and where each of them is."""
    d, p = self.embed_dim, self.patch_size
    x = nn.Conv(
      d,
      (p, p),
      strides=p,
      padding="VALID",
      kernel_init=basic.torch_linear(),
      bias_init=basic.uniform((self.in_chans * p * p) ** -0.5),  # PyTorch's.
      precision=self.precision,
      dtype=images.dtype,
      param_dtype=self.param_dtype,
      name="patch_embed",
    )(images).astype(wide)
    b, h, w, _ = x.shape
    x = x.reshape(b, h * w, d)  # row by row
    token = self.param(
      "class_token", nn.initializers.normal(1e-6), (d,), self.param_dtype
    )
    token = basic.repeat_for_images(token.astype(wide), like=x)
    made_for = self.grid(self.image_size)
    position = self.param(
      "pos_embed",
      nn.initializers.normal(0.02),
      (1 + made_for[0] * made_for[1], d),
      self.param_dtype,
    )
    position = self.resize_pos_embed(position.astype(wide), made_for, (h, w))
    return jnp.concatenate([token, x], axis=1) + position

  def _layers(
    self, x: Float[Array, "b l d"], dtype: jnp.dtype, train: bool
  ) -> Float[Array, "b l d"]:
    """Runs all layers on the residual stream x."""
    rates = None
    if train and self.drop_path_rate > 0:
      rates = np.linspace(0, self.drop_path_rate, self.depth)
      rates[-1] = self.drop_path_rate  # Also where there is one layer.
    return stack.run_layers(
      Block,
      dict(
        attention=dict(
          num_heads=self.num_heads, implementation=self.attention_implementation
        ),
        mlp_ratio=self.mlp_ratio,
        precision=self.precision,
        dtype=dtype,
        param_dtype=self.param_dtype,
      ),
      x,
      rates,
      depth=self.depth,
      scan=self.scan_layers,
      remat=self.remat,
    )


def _variant(
  official: str, file: str, *, top1: float, top5: float, **fields: Any
) -> variants.Variant:
  return variants.Variant(
    module=DeiT,
    fields=dict(fields, drop_path_rate=0.1),
    paper="arXiv:2012.12877",
    official=official,
    pretrained=variants.Pretrained(
      source="https://dl.fbaipublicfiles.com/deit",
      files=(file,),
      license="Apache-2.0",
      commercial_use=True,
      top1=top1,
      top5=top5,
    ),
  )


# arXiv:2012.12877, table 1; drop path as in its table 9. The files' names end
# in the first digits of their SHA-256.
VARIANTS: Final = {
  "deit_tiny": _variant(
    "deit_tiny_patch16_224",
    "deit_tiny_patch16_224-a1311bcf.pth",
    top1=72.2,
    top5=91.1,
    embed_dim=192,
    num_heads=3,
  ),
  "deit_small": _variant(
    "deit_small_patch16_224",
    "deit_small_patch16_224-cd65a155.pth",
    top1=79.9,
    top5=95.0,
    embed_dim=384,
    num_heads=6,
  ),
  "deit_base": _variant(
    "deit_base_patch16_224",
    "deit_base_patch16_224-b5f2ef4d.pth",
    top1=81.8,
    top5=95.6,
    embed_dim=768,
    num_heads=12,
  ),
}
