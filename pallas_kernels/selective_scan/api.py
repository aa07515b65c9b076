"""The public selective scan and the table of its implementations.

b batch, l length, d channels, n state size, g groups of channels.
"""

import functools
from typing import Final, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partition
from pallas_kernels.selective_scan import (
  arguments,
  mosaic_gpu,
  mosaic_gpu_common,
  reference,
  sequence,
  xla_associative,
  xla_sequential,
)

Implementation = Literal[
  "mosaic_gpu",
  "xla_sequential",
  "xla_associative",
  "reference",
  "mosaic_gpu_interpret",
]

IMPLEMENTATIONS: Final = {  # In order of preference.
  "mosaic_gpu": dispatch.Impl(
    function=mosaic_gpu.selective_scan,
    why_not=mosaic_gpu.why_not,
    platforms=("gpu",),
  ),
  "xla_sequential": dispatch.Impl(
    function=xla_sequential.selective_scan, platforms=("cpu",)
  ),
  "xla_associative": dispatch.Impl(function=xla_associative.selective_scan),
  "reference": dispatch.Impl(function=reference.selective_scan, platforms=()),
  # The GPU kernels, interpreted on the CPU: for their tests, and slow.
  "mosaic_gpu_interpret": dispatch.Impl(
    function=functools.partial(
      mosaic_gpu.selective_scan,
      interpret=mosaic_gpu_common.Interpret(detect_races=True),
    ),
    why_not=mosaic_gpu.why_not_interpreted,
    platforms=(),
  ),
}


@overload
def selective_scan(
  u: Float[Array, "b l d"],
  delta: Float[Array, "b l d"],
  A: Float[Array, "d n"],
  B: Float[Array, "b l n"] | Float[Array, "b l g n"],
  C: Float[Array, "b l n"] | Float[Array, "b l g n"],
  D: Float[Array, "d"] | None = None,
  *,
  z: Float[Array, "b l d"] | None = None,
  delta_bias: Float[Array, "d"] | None = None,
  delta_softplus: bool = False,
  reverse: bool = False,
  initial_state: Float[Array, "b d n"] | None = None,
  return_final_state: Literal[False] = False,
  implementation: Implementation | None = None,
) -> Float[Array, "b l d"]: ...


@overload
def selective_scan(
  u: Float[Array, "b l d"],
  delta: Float[Array, "b l d"],
  A: Float[Array, "d n"],
  B: Float[Array, "b l n"] | Float[Array, "b l g n"],
  C: Float[Array, "b l n"] | Float[Array, "b l g n"],
  D: Float[Array, "d"] | None = None,
  *,
  z: Float[Array, "b l d"] | None = None,
  delta_bias: Float[Array, "d"] | None = None,
  delta_softplus: bool = False,
  reverse: bool = False,
  initial_state: Float[Array, "b d n"] | None = None,
  return_final_state: Literal[True],
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]: ...


def selective_scan(
  u: Float[Array, "b l d"],
  delta: Float[Array, "b l d"],
  A: Float[Array, "d n"],
  B: Float[Array, "b l n"] | Float[Array, "b l g n"],
  C: Float[Array, "b l n"] | Float[Array, "b l g n"],
  D: Float[Array, "d"] | None = None,
  *,
  z: Float[Array, "b l d"] | None = None,
  delta_bias: Float[Array, "d"] | None = None,
  delta_softplus: bool = False,
  reverse: bool = False,
  initial_state: Float[Array, "b d n"] | None = None,
  return_final_state: bool = False,
  implementation: Implementation | None = None,
) -> (
  Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b d n"]]
):
  """Runs a diagonal state-space model whose parameters depend on the input.

  For every batch row and channel, with a state of size n that starts at zero:

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

  Mamba (https://arxiv.org/abs/2312.00752), eq. 2 and algorithm 2: A by
  zero-order hold, B by an Euler step. Sequences are channel-last.

  State, delta and A are computed in float32, or in float64 when `u` is float64
  (which needs x64 enabled). Each array may have any of the dtypes bfloat16,
  float16, float32 and float64, whatever the others have; it is converted to
  that precision where it is used, and its gradient has its own dtype.

  Reverse-mode differentiable with respect to every array (more than once only
  with "xla_associative" and "reference"), under `jax.jit`, `jax.vmap`,
  `jax.checkpoint` and `jax.shard_map`. On a mesh set by `jax.set_mesh`, and
  on the Explicit axes of arrays without one, it runs per shard over batch,
  channels and tokens (split tokens are scanned twice, and exchange one state
  per device); the rules are those of `pallas_kernels.partition`. NaN and
  infinity propagate.

  Args:
    u: The input.
    delta: Step sizes; positive, unless `delta_softplus` makes them so.
    A: Decay rates, negative for a state that fades.
    B: How the input enters the state; channel i uses group i // (d // g).
    C: How the output reads the state, with the groups of `B`.
    D: Weight of a skip connection; None leaves it out.
    z: Gate: y is multiplied by silu(z); None leaves it out.
    delta_bias: Added to delta, before the softplus; None leaves it out.
    delta_softplus: Whether delta (with its bias) goes through softplus.
    reverse: Scans from the last token to the first. Inputs and outputs stay in
      place: y[t] then depends on the tokens from t on.
    initial_state: State before the first token in scan order; None is zero.
    return_final_state: Whether to return the state after the last token in
      scan order too.
    implementation: None for the best that runs here, or the name of one.

  Returns:
    y with the shape and dtype of `u`; with `return_final_state` the pair of y
    and the final state, float32 (float64 if `u` is).

  Raises:
    TypeError: An argument is no array, or not of one of the dtypes above.
    ValueError: A shape does not fit, l, d or n is 0, or there is no
      implementation of that name.
    UnsupportedError: The named implementation cannot run this call here.
  """
  args = arguments.normalise(
    u=u,
    delta=delta,
    A=A,
    B=B,
    C=C,
    D=D,
    z=z,
    delta_bias=delta_bias,
    initial_state=initial_state,
  )
  dispatch.check_name("selective_scan", IMPLEMENTATIONS, implementation)
  is_double = args.u.dtype == jnp.float64
  options = arguments.Options(
    delta_softplus=bool(delta_softplus),
    reverse=bool(reverse),
    compute_dtype=jnp.float64 if is_double else jnp.float32,
  )

  def run(arrays, token_axes):
    local = arguments.Arguments(**arrays)
    impl = dispatch.choose(
      "selective_scan", IMPLEMENTATIONS, implementation, local, options
    )
    if token_axes:
      return sequence.selective_scan(local, options, impl.function, token_axes)
    return impl.function(local, options)

  shards = partition.sequence_shards(args.u, arguments.LAYOUTS["u"])
  y, state = partition.per_shard(
    run,
    sequence.pad(args, options, shards)._asdict(),
    layouts=arguments.LAYOUTS,
    out_layouts=(arguments.LAYOUTS["u"], arguments.STATE_LAYOUT),
    lead="u",
    split_tokens=True,
  )
  if y.shape != args.u.shape:
    y = y[:, : args.u.shape[1]]
  return (y, state) if return_final_state else y
