"""Official MambaVision checkpoints: names and layouts."""

from typing import Final

import numpy as np

from vimjax.weights import rules

_BLOCK = r"levels\.(\d+)\.blocks\.(\d+)\."
_CONV_BLOCK = r"levels\.([01])\.blocks\.(\d+)\."
_WINDOW_BLOCK = r"levels\.([23])\.blocks\.(\d+)\."
_OURS = r"stages_\1/blocks_\2/"


def _batch_norm(official: str, ours: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(official + r"\.weight", ours + "/scale"),
    rules.Rule(official + r"\.bias", ours + "/bias"),
    rules.Rule(official + r"\.running_mean", f"batch_stats/{ours}/mean"),
    rules.Rule(official + r"\.running_var", f"batch_stats/{ours}/var"),
  )


_CONV_RULES: Final = (
  *(
    rule
    for i, (conv, norm) in enumerate(((0, 1), (3, 4)), start=1)
    for rule in (
      rules.Rule(
        rf"patch_embed\.conv_down\.{conv}\.weight",
        f"patch_embed/conv{i}/kernel",
        rules.CONV2D,
      ),
      *_batch_norm(rf"patch_embed\.conv_down\.{norm}", f"patch_embed/norm{i}"),
    )
  ),
  rules.Rule(
    _CONV_BLOCK + r"conv(1|2)\.weight", _OURS + r"conv\3/kernel", rules.CONV2D
  ),
  rules.Rule(_CONV_BLOCK + r"conv(1|2)\.bias", _OURS + r"conv\3/bias"),
  *_batch_norm(_CONV_BLOCK + r"norm(1|2)", _OURS + r"norm\3"),
  rules.Rule(
    r"levels\.(\d+)\.downsample\.reduction\.0\.weight",
    r"downsample_\1/kernel",
    rules.CONV2D,
  ),
)

_WINDOW_RULES: Final = (
  rules.Rule(_BLOCK + r"gamma_(1|2)", _OURS + r"gamma\3"),
  rules.Rule(_WINDOW_BLOCK + r"norm(1|2)\.weight", _OURS + r"norm\3/scale"),
  rules.Rule(_WINDOW_BLOCK + r"norm(1|2)\.bias", _OURS + r"norm\3/bias"),
  rules.Rule(_BLOCK + r"mixer\.(A_log|D)", _OURS + r"mixer/ssm/\3"),
  rules.Rule(
    _BLOCK + r"mixer\.(x|dt)_proj\.weight",
    _OURS + r"mixer/ssm/\3_proj/kernel",
    rules.LINEAR,
  ),
  rules.Rule(_BLOCK + r"mixer\.dt_proj\.bias", _OURS + "mixer/ssm/dt_bias"),
  rules.Rule(
    _BLOCK + r"mixer\.conv1d_x\.weight",
    _OURS + "mixer/conv_u/kernel",
    rules.DEPTHWISE1D,
  ),
  rules.Rule(
    _BLOCK + r"mixer\.conv1d_z\.weight",
    _OURS + "mixer/conv_z/kernel",
    rules.DEPTHWISE1D,
  ),
  rules.Rule(
    _BLOCK + r"mixer\.(in_proj|out_proj|qkv|proj)\.weight",
    _OURS + r"mixer/\3/kernel",
    rules.LINEAR,
  ),
  rules.Rule(_BLOCK + r"mixer\.(qkv|proj)\.bias", _OURS + r"mixer/\3/bias"),
  rules.Rule(
    _BLOCK + r"mlp\.(fc1|fc2)\.weight", _OURS + r"mlp/\3/kernel", rules.LINEAR
  ),
  rules.Rule(_BLOCK + r"mlp\.(fc1|fc2)\.bias", _OURS + r"mlp/\3/bias"),
)

RULES: Final = (
  *_CONV_RULES,
  *_WINDOW_RULES,
  *_batch_norm("norm", "norm"),
  rules.Rule(r"head\.weight", "head/kernel", rules.LINEAR),
  rules.Rule(r"head\.bias", "head/bias"),
)

IGNORED: Final = {
  r".*\.num_batches_tracked": (
    "counts training steps, which nothing reads: the momentum is fixed"
  ),
}


def restore(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adds the counters of the batch norms, which the official model has."""
  counters = {
    key.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
    for key in state_dict
    if key.endswith("running_var")
  }
  return state_dict | counters
