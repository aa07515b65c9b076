"""Official VMamba checkpoints: names and layouts.

The primary layout is that of the official classification code. `adapt` brings
the others to it: the names of the first release, the single-file version of the
code, and linear weights stored as 1x1 convolutions.
"""

from collections.abc import Sequence
import re
from typing import Final

import numpy as np

from vimjax.layers import cross_scan
from vimjax.models import vmamba
from vimjax.weights import pos_embed, rules

_K = cross_scan.DIRECTIONS

# (d, 1, h, w) there, (h, w, d) here.
_DEPTHWISE2D = rules.Layout(
  lambda x: x[:, 0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[:, None]
)
# (k, out, in) there, (k, in, out) here.
_DIRECTIONAL = rules.Layout(
  lambda x: x.transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1)
)
# (k * d, ...) there, (k, d, ...) here.
_FOLDED = rules.Layout(
  lambda x: x.reshape(_K, -1, *x.shape[1:]),
  lambda x: x.reshape(-1, *x.shape[2:]),
)

_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_DOWN = r"layers\.(\d+)\.downsample\."
_SAME_BLOCK = r"layers.\1.blocks.\2."
_OURS = r"stages_\1/layers_\2/"


def _affine(official: str, ours: str, weight: str) -> tuple[rules.Rule, ...]:
  """Weight and bias; `weight` is our name of the former."""
  layouts = {"scale": rules.SAME, "kernel": rules.LINEAR, "conv": rules.CONV2D}
  name = weight.replace("conv", "kernel")
  return (
    rules.Rule(official + r"\.weight", f"{ours}/{name}", layouts[weight]),
    rules.Rule(official + r"\.bias", f"{ours}/bias"),
  )


_COMMON: Final = (
  *_affine(r"patch_embed\.0", "stem/conv1", "conv"),
  *_affine(r"patch_embed\.2", "stem/norm1", "scale"),
  *_affine(r"patch_embed\.5", "stem/conv2", "conv"),
  *_affine(r"patch_embed\.7", "stem/norm2", "scale"),
  *_affine(_BLOCK + "norm", _OURS + "norm", "scale"),
  rules.Rule(
    _BLOCK + r"op\.(in|out)_proj\.weight",
    _OURS + r"mixer/\3_proj/kernel",
    rules.LINEAR,
  ),
  *_affine(_BLOCK + r"op\.out_norm", _OURS + "mixer/out_norm", "scale"),
  rules.Rule(
    _BLOCK + r"op\.x_proj_weight",
    _OURS + "mixer/ssm/x_proj/kernel",
    _DIRECTIONAL,
  ),
  rules.Rule(_BLOCK + r"op\.dt_projs_bias", _OURS + "mixer/ssm/dt_bias"),
  *_affine(_BLOCK + "norm2", _OURS + "mlp_norm", "scale"),
  *_affine(_BLOCK + r"mlp\.(fc1|fc2)", _OURS + r"mlp/\3", "kernel"),
  *_affine(r"classifier\.norm", "norm", "scale"),
  *_affine(r"classifier\.head", "head", "kernel"),
)


def _conv_rules(official: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(
      _BLOCK + official + r"\.weight", _OURS + "mixer/conv/kernel", _DEPTHWISE2D
    ),
    rules.Rule(_BLOCK + official + r"\.bias", _OURS + "mixer/conv/bias"),
  )


_SELECTIVE_SCAN: Final = (
  *_conv_rules(r"op\.conv2d"),
  rules.Rule(
    _BLOCK + r"op\.dt_projs_weight",
    _OURS + "mixer/ssm/dt_proj/kernel",
    _DIRECTIONAL,
  ),
  rules.Rule(_BLOCK + r"op\.A_logs", _OURS + "mixer/ssm/A_log", _FOLDED),
  rules.Rule(_BLOCK + r"op\.Ds", _OURS + "mixer/ssm/D", _FOLDED),
)
_SSD: Final = (
  *_conv_rules(r"op\.conv2d\.1"),
  rules.Rule(_BLOCK + r"op\.A_logs", _OURS + "mixer/ssm/A_log"),
  rules.Rule(_BLOCK + r"op\.Ds", _OURS + "mixer/ssm/D"),
)

_CONV: Final = (
  *_affine(_DOWN + "1", r"downsample_\1/conv", "conv"),
  *_affine(_DOWN + "3", r"downsample_\1/norm", "scale"),
)
_PATCH_MERGING: Final = (
  *_affine(_DOWN + "norm", r"downsample_\1/norm", "scale"),
  rules.Rule(
    _DOWN + r"reduction\.weight",
    r"downsample_\1/reduction/kernel",
    rules.LINEAR,
  ),
)

IGNORED: Final[dict[str, str]] = {}
HEAD: Final = ("classifier.head.weight", "classifier.head.bias")

_NEW_NAMES: Final = (
  (r"patch_embed\.proj\.", "patch_embed.0."),
  (r"patch_embed\.norm\.", "patch_embed.2."),
  (_BLOCK + r"ln_1\.", _SAME_BLOCK + "norm."),
  (_BLOCK + r"self_attention\.", _SAME_BLOCK + "op."),
  (_BLOCK + r"op\.(x_proj|dt_projs)\.weight", _SAME_BLOCK + r"op.\3_weight"),
  (r"(norm|head)\.", r"classifier.\1."),
)
_LINEAR = re.compile(
  r".*\.(in_proj|out_proj|fc1|fc2|x_proj|dt_projs|reduction|head)[._]weight"
)


def rules_for(model: vmamba.VMamba) -> Sequence[rules.Rule]:
  """Rules of the primary layout, in which one name can mean two things."""
  mixer = _SSD if model.mixer == "ssd" else _SELECTIVE_SCAN
  down = _CONV if model.downsample == "conv" else _PATCH_MERGING
  return _COMMON + mixer + down


def adapt(
  model: vmamba.VMamba,
  state_dict: dict[str, np.ndarray],
  origin: pos_embed.Origin,
) -> dict[str, np.ndarray]:
  """Brings a state dict of any layout to the primary one.

  No array depends on the image size.

  Raises:
    ValueError: Two keys are different names of one array.
  """
  del origin
  adapted, source = {}, {}
  for key, value in state_dict.items():
    name = _primary_name(model, key)
    if name in adapted:
      raise ValueError(
        f"This state dict has both {source[name]} and {key}, which are names "
        "of the same array in different versions; remove one."
      )
    source[name] = key
    adapted[name] = _primary_shape(name, value)
  return adapted


def _primary_name(model: vmamba.VMamba, key: str) -> str:
  names = list(_NEW_NAMES)
  if model.downsample == "patch_merging":
    names.append((_DOWN + r"1\.", r"layers.\1.downsample.norm."))
    names.append((_DOWN + r"2\.", r"layers.\1.downsample.reduction."))
  if model.mixer == "ssd":
    names.append(
      (_BLOCK + r"op\.conv2d\.(?=[wb])", _SAME_BLOCK + "op.conv2d.1.")
    )
  for old, new in names:
    match = re.match(old, key)
    if match:
      key = match.expand(new) + key[match.end() :]
  return key


def _primary_shape(name: str, value: np.ndarray) -> np.ndarray:
  if _LINEAR.fullmatch(name) and value.shape[2:] == (1, 1):
    value = value[:, :, 0, 0]
  folded = name.endswith((".x_proj_weight", ".dt_projs_weight"))
  if folded and value.ndim == 2 and value.shape[0] % _K == 0:
    value = value.reshape(_K, -1, value.shape[1])
  return value
