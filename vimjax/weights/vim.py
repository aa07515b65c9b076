"""Official Vim checkpoints: names, layouts and positional embeddings."""

from typing import Final

import numpy as np

from vimjax.models import vim
from vimjax.weights import pos_embed, rules

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
  model: vim.Vim,
  state_dict: dict[str, np.ndarray],
  origin: pos_embed.Origin,
) -> dict[str, np.ndarray]:
  """Resizes the positional embedding if the model's grid is another."""
  return pos_embed.fit(
    model, state_dict, origin, class_token=model.class_token != "none"
  )
