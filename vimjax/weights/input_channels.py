"""Weights that read red, green and blue, for images of other channels."""

from collections.abc import Mapping
import logging
import math

import numpy as np

_LOG = logging.getLogger(__name__)


def adapt(
  arrays: Mapping[str, np.ndarray], key: str, channels: int
) -> dict[str, np.ndarray]:
  """Fits the convolution that reads the images to their channels, as timm does.

  One channel gets the sum over the three: what a grey image would give that is
  repeated. More of them take the three in turn, scaled by 3 / channels, so that
  outputs stay about as large.

  Args:
    arrays: An official state dict.
    key: That of the convolution's weight, (out, in, h, w).
    channels: The model's `in_chans`.

  Returns:
    The state dict; the same arrays if the channels are not three, or need no
    change.
  """
  arrays = dict(arrays)
  weight = arrays.get(key)
  if weight is None or weight.ndim != 4 or weight.shape[1] != 3:
    return arrays  # If it is a problem, the rules report it.
  if channels == 3:
    return arrays
  if channels == 1:
    arrays[key] = weight.sum(axis=1, keepdims=True)
  else:
    repeated = np.tile(weight, (1, math.ceil(channels / 3), 1, 1))
    scale = weight.dtype.type(3 / channels)
    arrays[key] = repeated[:, :channels] * scale
  _LOG.warning("%s reads 3 channels; fitted to %d.", key, channels)
  return arrays
