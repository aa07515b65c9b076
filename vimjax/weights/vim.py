"""Official Vim checkpoints: names, layouts and positional embeddings."""

import logging
import math
from typing import Final

import jax.numpy as jnp
import numpy as np

from vimjax.layers import pos_embed
from vimjax.models import vim
from vimjax.weights import rules

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
  model: vim.Vim, state_dict: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Resizes the positional embedding to the model's grid if it has another.

  Raises:
    ValueError: The checkpoint's grid cannot be told, as it is not square.
  """
  old = state_dict.get("pos_embed")
  size = model.image_size
  h, w = model.grid((size, size) if isinstance(size, int) else size)
  new_row = model.class_row(h * w)
  extra = new_row is not None
  if old is None or old.ndim != 3 or old.shape[1] == h * w + extra:
    return state_dict
  patches = old.shape[1] - extra
  side = math.isqrt(max(patches, 0))
  if side == 0 or side * side != patches:
    raise ValueError(
      f"pos_embed has {old.shape[1]} rows, the model needs {h * w + extra} for "
      f"a grid of {h}x{w}, and {patches} patches are not a square grid. "
      "Convert with a model whose image_size is that of the checkpoint: it "
      "takes images of any size."
    )
  old_row = model.class_row(patches)
  if model.pos_embed_resize == "official" and extra:
    old_row = new_row = 0
  resized = pos_embed.resize(
    jnp.asarray(old[0], jnp.float32),
    (side, side),
    (h, w),
    old_class_row=old_row,
    new_class_row=new_row,
  )
  _LOG.info("Resized pos_embed from %dx%d to %dx%d.", side, side, h, w)
  return {**state_dict, "pos_embed": np.asarray(resized)[None]}
