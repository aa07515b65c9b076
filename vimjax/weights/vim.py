"""Official Vim checkpoints: names, layouts and positional embeddings."""

import logging
import math
from typing import Final

import jax.numpy as jnp
import numpy as np

from vimjax.models import vim
from vimjax.weights import rules

Size = int | tuple[int, int]

_LOG = logging.getLogger(__name__)

_MIXER = r"layers\.(\d+)\.mixer\."
_OURS = r"layers_\1/mixer/"

RULES: Final = (
  rules.Rule(r"cls_token", "class_token", rules.UNBATCH2),
  rules.Rule(r"pos_embed", "pos_embed", rules.UNBATCH),
  rules.Rule(r"patch_embed\.proj\.weight", "patch_embed/kernel", rules.CONV2D),
  rules.Rule(r"patch_embed\.proj\.bias", "patch_embed/bias"),
  rules.Rule(r"head\.weight", "head/kernel", rules.LINEAR),
  rules.Rule(r"head\.bias", "head/bias"),
  rules.Rule(_MIXER + r"A_log", _OURS + "forward_ssm/A_log"),
  rules.Rule(_MIXER + r"D", _OURS + "forward_ssm/D"),
  rules.Rule(_MIXER + r"A_b_log", _OURS + "backward_ssm/A_log"),
  rules.Rule(_MIXER + r"D_b", _OURS + "backward_ssm/D"),
  rules.Rule(
    _MIXER + r"(in|out)_proj\.weight", _OURS + r"\2_proj/kernel", rules.LINEAR
  ),
  *(
    rule
    for suffix, side in (("", "forward"), ("_b", "backward"))
    for rule in (
      rules.Rule(
        _MIXER + rf"conv1d{suffix}\.weight",
        _OURS + f"{side}_conv/kernel",
        rules.DEPTHWISE1D,
      ),
      rules.Rule(
        _MIXER + rf"conv1d{suffix}\.bias", _OURS + f"{side}_conv/bias"
      ),
      rules.Rule(
        _MIXER + rf"(x|dt)_proj{suffix}\.weight",
        _OURS + rf"{side}_ssm/\2_proj/kernel",
        rules.LINEAR,
      ),
      rules.Rule(
        _MIXER + rf"dt_proj{suffix}\.bias", _OURS + f"{side}_ssm/dt_bias"
      ),
    )
  ),
  rules.Rule(r"layers\.(\d+)\.norm\.weight", r"layers_\1/norm/scale"),
  rules.Rule(r"norm_f\.weight", "norm/scale"),
)

# The rotary tables of early checkpoints are not listed: those models rotate
# their tokens, ours do not, so loading them must fail.
IGNORED: Final[dict[str, str]] = {}


def adapt(
  model: vim.Vim, state_dict: dict[str, np.ndarray], image_size: Size
) -> dict[str, np.ndarray]:
  """Resizes the positional embedding if the model's grid is another.

  Args:
    model: What the arrays are for.
    state_dict: Official keys and arrays.
    image_size: What the checkpoint was made for, if its rows are as many as
      that gives; otherwise its grid must be square.

  Raises:
    ValueError: The checkpoint's grid cannot be told.
  """
  position = state_dict.get("pos_embed")
  if position is None or position.ndim != 3:
    return state_dict  # A problem for the rules to report.
  new, old = model.grid(model.image_size), model.grid(image_size)
  patches = position.shape[1] - (model.class_token != "none")
  if patches != old[0] * old[1]:
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
      raise ValueError(
        f"pos_embed has {patches} patches, the model needs {new[0]}x{new[1]}, "
        "and these are no square grid to resize. Convert with a model whose "
        "image_size is that of the checkpoint; it takes images of any size."
      )
    old = (side, side)
  if old == new:
    return state_dict
  _LOG.info("Resizing pos_embed from a grid of %s to %s.", old, new)
  resized = model.resize_pos_embed(
    jnp.asarray(position[0], jnp.float32), old, new
  )
  return {**state_dict, "pos_embed": np.asarray(resized)[None]}
