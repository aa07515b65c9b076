"""The public cross selective scan and the table of its implementations.

b batch, h and w rows and columns, k directions, d channels, n state size.
"""

import functools
from typing import Final, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partition
from pallas_kernels.cross_selective_scan import (
  arguments,
  mosaic_gpu,
  reference,
  xla,
)
from pallas_kernels.selective_scan import (
  mosaic_gpu_common,
  xla_sequential,
)

# Named as those of the selective scan, so that one choice serves both.
Implementation = Literal[
  "mosaic_gpu",
  "xla_sequential",
  "xla_associative",
  "reference",
  "mosaic_gpu_interpret",
]

IMPLEMENTATIONS: Final = {  # In order of preference.
  "mosaic_gpu": dispatch.Impl(
    function=mosaic_gpu.cross_selective_scan,
    why_not=mosaic_gpu.why_not,
    platforms=("gpu",),
  ),
  "xla_sequential": dispatch.Impl(
    function=functools.partial(
      xla.cross_selective_scan, scan=xla_sequential.selective_scan
    ),
    platforms=("cpu",),
  ),
  "xla_associative": dispatch.Impl(
    function=functools.partial(
      xla.cross_selective_scan, scan=xla.associative_scan
    ),
  ),
  "reference": dispatch.Impl(
    function=reference.cross_selective_scan, platforms=()
  ),
  # The GPU kernels, interpreted on the CPU: for their tests, and slow.
  "mosaic_gpu_interpret": dispatch.Impl(
    function=functools.partial(
      mosaic_gpu.cross_selective_scan,
      interpret=mosaic_gpu_common.Interpret(detect_races=True),
    ),
    why_not=mosaic_gpu.why_not_interpreted,
    platforms=(),
  ),
}


def cross_selective_scan(
  u: Float[Array, "b h w d"],
  delta: Float[Array, "b h w k d"],
  A: Float[Array, "k d n"],
  B: Float[Array, "b h w k n"],
  C: Float[Array, "b h w k n"],
  D: Float[Array, "k d"] | None = None,
  *,
  delta_bias: Float[Array, "k d"] | None = None,
  delta_softplus: bool = False,
  implementation: Implementation | None = None,
) -> Float[Array, "b h w d"]:
  """Scans an image along four directions and adds the results.

  The image is read as four sequences of h w tokens: row by row, column by
  column, and both of these from the last token to the first. Direction k of
  these runs the selective scan (see `pallas_kernels.selective_scan`) with
  delta[:, :, :, k], A[k], B[:, :, :, k], C[:, :, :, k], D[k] and delta_bias[k].
  All arrays are in image order, and so is the sum that is returned.

  VMamba (https://arxiv.org/abs/2401.10166), section 4.2, cross-scan and
  cross-merge. State, delta, A and the sum are computed in float32, or in
  float64 when `u` is float64; dtypes, differentiation and meshes are as for the
  selective scan. NaN and infinity propagate.

  Args:
    u: The input.
    delta: Step sizes; positive, unless `delta_softplus` makes them so.
    A: Decay rates, negative for a state that fades.
    B: How the input enters the state, shared by all channels.
    C: How the output reads the state, shared by all channels.
    D: Weight of a skip connection; None leaves it out.
    delta_bias: Added to delta, before the softplus; None leaves it out.
    delta_softplus: Whether delta (with its bias) goes through softplus.
    implementation: None for the best that runs here, or the name of one.

  Returns:
    The sum over the directions, with the shape and dtype of `u`.

  Raises:
    TypeError: An argument is no array, or not bfloat16, float16, float32 or
      float64.
    ValueError: A shape does not fit, h, w, d or n is 0, or there is no
      implementation of that name.
    UnsupportedError: The named implementation cannot run this call here.
  """
  args = arguments.check(
    u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias
  )
  dispatch.check_name("cross_selective_scan", IMPLEMENTATIONS, implementation)
  is_double = args.u.dtype == jnp.float64
  options = arguments.Options(
    delta_softplus=bool(delta_softplus),
    compute_dtype=jnp.float64 if is_double else jnp.float32,
  )

  def run(arrays, _):
    local = arguments.Arguments(**arrays)
    impl = dispatch.choose(
      "cross_selective_scan", IMPLEMENTATIONS, implementation, local, options
    )
    return impl.function(local, options)

  return partition.per_shard(
    run,
    args._asdict(),
    layouts=arguments.LAYOUTS,
    out_layouts=arguments.LAYOUTS["u"],
    lead="u",
  )
