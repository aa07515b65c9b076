"""Vim on images whose tokens are split over eight virtual devices."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import pytest

from tests import tolerances
import vimjax


def _setup(class_token):
  model = vimjax.Vim(
    num_classes=10,
    image_size=128,
    patch_size=8,
    stride=8,
    depth=1,
    embed_dim=16,
    state_size=4,
    class_token=class_token,
  )
  rng = np.random.default_rng(0)
  images = rng.standard_normal((1, 128, 128, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)

  def loss(variables, images):
    logits = model.apply(variables, images)
    return jnp.sum(logits**2), logits

  # A new function each time: its trace depends on the mesh in context.
  run = lambda variables, images: jax.value_and_grad(loss, has_aux=True)(
    variables, images
  )
  return run, variables, images


# With the class token the tokens are 257, which eight does not divide.
@pytest.mark.parametrize("class_token", ["middle", "none"])
def test_splitting_the_tokens_changes_no_result(class_token):
  run, variables, images = _setup(class_token)
  want = jax.jit(run)(variables, images)
  run, variables, images = _setup(class_token)
  mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    placed = jax.device_put((variables, images), NamedSharding(mesh, jax.P()))
    program = jax.jit(run).lower(*placed).compile()
    got = program(*placed)
  (_, logits), gradients = got
  (_, want_logits), want_gradients = want
  tolerances.assert_close(logits, want_logits, tolerances.FORWARD["float32"])
  for ours, theirs in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True
  ):
    tolerances.assert_close(ours, theirs, tolerances.GRADIENT["float32"])
  if class_token == "none":
    _check_communication(program.as_text())


def _check_communication(text):
  """Convolutions exchange their edges; no layer gathers its tokens."""
  assert "collective-permute" in text
  gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
  # The images' patches, once, and per scan the states of eight shards.
  assert set(gathered) == {"1,16,16,16", "8,1,32,4"}
  assert gathered.count("1,16,16,16") == 1
