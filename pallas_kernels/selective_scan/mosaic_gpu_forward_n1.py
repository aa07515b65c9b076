"""One state per channel: the body of the forward scan for VMamba.

Everything around it, tiles and copies, is that of `mosaic_gpu_forward`. B and C
are one number per token, which all lanes read; a lane owns neighbouring
channels, so that it reads two bfloat16 values at once. The memory traffic of
u, delta and y bounds this scan.
"""

import dataclasses
from typing import Final

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan import mosaic_gpu_common as common

# A copy of B or C has at least 128 bytes.
_LEAST_TOKENS: Final = 32

# Of u, delta, z and y together, for each token and channel: with more, twice as
# many channels do not fit into shared memory.
_MOST_BYTES: Final = 12


@dataclasses.dataclass(frozen=True)
class ScalarCell:
  """A state of one number per channel; see `mosaic_gpu_forward.Cell`."""

  lanes: int

  @classmethod
  def for_channels(cls, e: int, size: int) -> "ScalarCell":
    """Two channels for each lane, unless half a block would have none.

    Args:
      e: Channels of a group.
      size: Bytes of all sequences that come and go, for a token and channel.
    """
    wide = 2 * common.LANES
    pays = (
      common.cdiv(e, wide) * wide == common.cdiv(e, common.LANES) * common.LANES
    )
    return cls(wide if pays and size <= _MOST_BYTES else common.LANES)

  def row_shape(self, tokens):
    return (max(tokens, _LEAST_TOKENS),)

  def state_shape(self):
    return (self.lanes,)

  def channel_layout(self):
    return plgpu.Layout.WG_STRIDED((self.lanes,), self.lanes // common.LANES)

  def zero_state(self):
    return (common.zeros((self.lanes,), self.channel_layout()),)

  def load_state(self, ref):
    return (common.load(ref, self.channel_layout()),)

  def store_state(self, ref, h):
    common.store(ref, h[0])

  def load_row(self, ref, token):
    return (ref[token],)

  def advance(self, A, h, delta, delta_u, B):
    return (common.exp2(delta * A[0]) * h[0] + delta_u * B[0],)

  def retreat(self, A, g, delta, dy, C):
    return (common.exp2(delta * A[0]) * (g[0] + dy * C[0]),)

  def decay(self, A, h, delta, inner):
    return (common.exp2(delta * A[0]) * h[0] + inner[0],)

  def read_out(self, h, C):
    return h[0] * C[0]
