"""The forward scan, in chunks that run in parallel where that pays.

A block has to walk its sequence step by step; with a small batch there are too
few blocks to fill the device. Then the sequence is cut into chunks:

1. every chunk is scanned from a state of zero, for its last state and the sum
   of its delta only;
2. these are combined, chunk after chunk, to the state before each chunk;
3. every chunk is scanned again from that state, for the output.

The second phase is part of the kernel of the third. Together they compute
nearly twice as many exponentials as one pass, so one pass is better once it
fills the device.
"""

import dataclasses

from pallas_kernels.selective_scan import mosaic_gpu_common as common
from pallas_kernels.selective_scan import mosaic_gpu_forward as forward


def scan(
  inputs: forward.Inputs,
  plan: forward.Plan,
  interpret: common.Interpret | None = None,
) -> forward.Outputs:
  """Runs `plan`, in one pass if `plan.chunks` is 1, else in three phases.

  The state it returns is that after the last token, (b, 1, d, n).
  """
  if plan.chunks == 1:
    return forward.scan(inputs, plan, interpret)
  first = forward.scan(
    inputs._replace(C=None, D=None, z=None, state=None),
    dataclasses.replace(
      plan, states_only=True, final_state=True, checkpoint_tile=0
    ),
    interpret,
  )
  outputs = forward.scan(
    inputs._replace(chunk_state=first.state, chunk_delta_sum=first.delta_sum),
    plan,
    interpret,
  )
  if outputs.state is None:
    return outputs
  last = 0 if plan.reverse else plan.chunks - 1
  return outputs._replace(state=outputs.state[:, last : last + 1])
