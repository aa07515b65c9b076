"""Official DeiT checkpoints: names, layouts and positional embeddings."""

from typing import Final

import numpy as np

from vimjax.models import deit
from vimjax.weights import pos_embed, rules

_BLOCK = r"blocks\.(\d+)\."
_OURS = r"layers_\1/"

RULES: Final = (
  rules.Rule(r"cls_token", "class_token", rules.UNBATCH2),
  rules.Rule(r"pos_embed", "pos_embed", rules.UNBATCH),
  rules.Rule(r"patch_embed\.proj\.weight", "patch_embed/kernel", rules.CONV2D),
  rules.Rule(r"patch_embed\.proj\.bias", "patch_embed/bias"),
  rules.Rule(_BLOCK + r"norm(1|2)\.weight", _OURS + r"norm\2/scale"),
  rules.Rule(_BLOCK + r"norm(1|2)\.bias", _OURS + r"norm\2/bias"),
  rules.Rule(
    _BLOCK + r"attn\.(qkv|proj)\.weight",
    _OURS + r"attention/\2/kernel",
    rules.LINEAR,
  ),
  rules.Rule(_BLOCK + r"attn\.(qkv|proj)\.bias", _OURS + r"attention/\2/bias"),
  rules.Rule(
    _BLOCK + r"mlp\.(fc1|fc2)\.weight", _OURS + r"mlp/\2/kernel", rules.LINEAR
  ),
  rules.Rule(_BLOCK + r"mlp\.(fc1|fc2)\.bias", _OURS + r"mlp/\2/bias"),
  rules.Rule(r"norm\.weight", "norm/scale"),
  rules.Rule(r"norm\.bias", "norm/bias"),
  rules.Rule(r"head\.weight", "head/kernel", rules.LINEAR),
  rules.Rule(r"head\.bias", "head/bias"),
)

# A distilled model's token and head are not listed: it computes something else.
IGNORED: Final[dict[str, str]] = {}


def adapt(
  model: deit.DeiT,
  state_dict: dict[str, np.ndarray],
  origin: pos_embed.Origin,
) -> dict[str, np.ndarray]:
  """Resizes the positional embedding if the model's grid is another."""
  return pos_embed.fit(model, state_dict, origin, class_token=True)
