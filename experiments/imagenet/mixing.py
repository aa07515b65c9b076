"""Mixup, CutMix and soft labels, on the devices, inside the training step.

What is mixed with what, and how much, depends on the step's key and on an
image's place in the global batch alone: not on the number of devices or hosts.
As in timm, the images of a group (there: of one GPU) share their weight, and
image j of a group of g is mixed with image g - 1 - j.

Axis letters: b images of the whole batch, h and w pixels, k classes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import ml_collections


def is_on(config: ml_collections.ConfigDict) -> bool:
  """Whether `config.mixup` mixes anything."""
  c = config.mixup
  return c.probability > 0 and (c.mixup_alpha > 0 or c.cutmix_alpha > 0)


def soft_labels(
  labels: Int[Array, "b"], classes: int, smoothing: float
) -> Float[Array, "b k"]:
  """1 - smoothing + smoothing / k at the label, smoothing / k elsewhere."""
  one_hot = jax.nn.one_hot(labels, classes)
  return (1.0 - smoothing) * one_hot + smoothing / classes


def mix(
  images: Float[Array, "b h w c"],
  targets: Float[Array, "b k"],
  key: Array,
  config: ml_collections.ConfigDict,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Mixes a batch by mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899).

  Args:
    images: Normalised images of the whole batch.
    targets: Their soft labels.
    key: Of this step.
    config: The run's configuration; see `config.mixup`.

  Returns:
    Images and targets of the same shapes.
  """
  b, h, w, _ = images.shape
  g = config.mixup.group_size or b
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b // g))
  weights, maps = jax.vmap(lambda key: _draw(key, h, w, config))(keys)

  def blend(x: Array, own: Array) -> Array:
    groups = x.reshape(b // g, g, *x.shape[1:])
    return (groups * own + groups[:, ::-1] * (1 - own)).reshape(x.shape)

  images = blend(images, maps[:, None, :, :, None].astype(images.dtype))
  return images, blend(targets, weights[:, None, None])


def _draw(
  key: Array, h: int, w: int, config: ml_collections.ConfigDict
) -> tuple[Float[Array, ""], Float[Array, "h w"]]:
  """A group's weight of its own labels, and of its own pixels."""
  c = config.mixup
  on, switch, beta, centre = jax.random.split(key, 4)
  cuts = jnp.asarray(c.cutmix_alpha > 0)
  if c.mixup_alpha > 0 and c.cutmix_alpha > 0:
    cuts = jax.random.uniform(switch) < c.switch_probability
  # An alpha of 0 is never chosen; the other value only keeps it a number.
  alpha = jnp.where(cuts, c.cutmix_alpha or 1.0, c.mixup_alpha or 1.0)
  own = jax.random.beta(beta, alpha, alpha)
  own = jnp.where(jax.random.uniform(on) < c.probability, own, 1.0)
  row, column = jax.random.randint(
    centre, (2,), jnp.zeros(2, int), jnp.array([h, w])
  )
  box = cut_box(own, h, w, row, column)
  weight = jnp.where(cuts, 1 - box.mean(), own)
  return weight, jnp.where(cuts, 1.0 - box, own)


def cut_box(
  own: Float[Array, ""],
  h: int,
  w: int,
  row: Int[Array, ""],
  column: Int[Array, ""],
) -> Bool[Array, "h w"]:
  """Where CutMix puts the other image: a box cut off at the image's edge.

  Args:
    own: Share of the own image, before cutting off.
    h: Rows of the image.
    w: Columns of the image.
    row: Of the box's centre.
    column: Of the box's centre.

  Returns:
    True inside. The sides are rounded down, as in timm.
  """
  inside = []
  for size, middle in ((h, row), (w, column)):
    side = jnp.floor(size * jnp.sqrt(1.0 - own)).astype(int)
    position = jnp.arange(size)
    start, stop = middle - side // 2, middle + side // 2
    inside.append((position >= start) & (position < stop))
  return inside[0][:, None] & inside[1][None, :]
