"""The selective scan as a loop over time, made for CPUs.

The loop runs on the arrays as they are: a step slices its token out of
(b, l, d), computes the exponentials on the spot and updates a state that stays
in the first-level cache. No array of b * l * d * n elements ever exists.

Blocks. One loop over time works on one batch row and k of its groups, with a
state (n, k, e): channels innermost, so that everything vectorises over them.

Derivative. The forward pass saves the state before every `_INTERVAL`-th token.
The backward pass takes the intervals last to first: it recomputes step sizes,
decays and states inside one into a buffer, then walks back through it. The
cotangent G of h[t] arrives as decay[t+1] G[t+1] and gains C[t] dy[t]; then

  dC[t] = sum_e h[t] dy[t]             dB[t] = sum_e G delta[t] u[t]
  W     = G decay[t] h[t-1]            dA   += W delta[t]
  ddelta[t] = sum_n W A + u[t] sum_n G B[t]

h[t-1] comes from the buffer. (h[t] - delta[t] B[t] u[t] in place of
decay[t] h[t-1] would need no buffer, but cancels where the state fades fast.)

b batch, l length, d = g e channels, n state size, g groups, k of them in a
block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import derivatives, partition
from pallas_kernels.selective_scan import arguments, xla_math
from pallas_kernels.selective_scan import xla_sequential_blocks as blocks

# Tokens between saved states, and in the buffer of the backward pass: the
# states and decays of this many should fit a second-level cache.
_INTERVAL = 16


class _Options(NamedTuple):
  """`arguments.Options`, and the order of the tokens.

  Attributes:
    delta_softplus: See there.
    reverse: See there.
    compute_dtype: See there.
    columns: See `selective_scan`.
  """

  delta_softplus: bool
  reverse: bool
  compute_dtype: DTypeLike
  columns: int | None


def selective_scan(
  args: arguments.Arguments,
  options: arguments.Options,
  *,
  columns: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`.

  Args:
    args: The arrays.
    options: The choices of the call.
    columns: The tokens are an image with so many columns, stored row by row,
      and are scanned column by column; None scans them as they are stored.
  """
  choices = _Options(*options, columns)
  b, _, d = args.u.shape
  g, n = args.B.shape[2:]
  dtype = options.compute_dtype
  split = lambda x: x.reshape(*x.shape[:-1], g, d // g)
  tokens = _Tokens(args.u, args.delta, args.B, args.C, args.z)
  params = _Params(args.A.T, args.D, args.delta_bias)
  if args.initial_state is None:
    state = partition.full((b, n, d), 0, dtype, like=args.u)
  else:
    state = jnp.moveaxis(args.initial_state.astype(dtype), 2, 1)
  inputs = _Inputs(
    tokens=jax.tree.map(lambda x: x if x.ndim == 4 else split(x), tokens),
    params=jax.tree.map(lambda x: split(x.astype(dtype)), params),
    state=split(state),
  )
  y, state = _scan(inputs, choices)
  state = jnp.moveaxis(state.reshape(b, n, d), 1, 2)
  return y.reshape(args.u.shape), state


class _Tokens(NamedTuple):
  """Arrays with a value for each token."""

  u: Float[Array, "b l g e"]
  delta: Float[Array, "b l g e"]
  B: Float[Array, "b l g n"]
  C: Float[Array, "b l g n"]
  z: Float[Array, "b l g e"] | None


class _Params(NamedTuple):
  """Arrays that all tokens share, or the part of them for one block."""

  A: Float[Array, "n g e"]
  D: Float[Array, "g e"] | None
  delta_bias: Float[Array, "g e"] | None


class _Inputs(NamedTuple):
  """Everything that the scan is differentiated by."""

  tokens: _Tokens
  params: _Params
  state: Float[Array, "b n g e"]


class _Residuals(NamedTuple):
  """What the backward pass keeps: the inputs and some states."""

  inputs: _Inputs
  saved: Float[Array, "b intervals n g e"]


class _Token(NamedTuple):
  """One token of a block, in the precision of the state."""

  u: Float[Array, "k e"]
  delta: Float[Array, "k e"]
  B: Float[Array, "n k 1"]
  C: Float[Array, "n k 1"]
  z: Float[Array, "k e"] | None


class _Steps(NamedTuple):
  """The steps of one interval of a block, for the walk back.

  Attributes:
    states: The state before the first step, then after each.
    decays: exp(delta A).
    deltas: The step sizes, after bias and softplus.
  """

  states: Float[Array, "interval+1 n k e"]
  decays: Float[Array, "interval n k e"]
  deltas: Float[Array, "interval k e"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: _Inputs, options: _Options):
  y, state, _ = _forward(inputs, options, save=False)
  return y, state


def _scan_fwd(inputs, options):
  inputs = derivatives.differentiable_once("selective_scan", inputs)
  y, state, saved = _forward(inputs, options, save=True)
  return (y, state), _Residuals(inputs, saved)


def _scan_bwd(options, residuals, cotangents):
  residuals, (dy, dstate) = derivatives.differentiable_once(
    "selective_scan", (residuals, cotangents)
  )
  return (_backward(residuals, dy, dstate, options),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(inputs, options, *, save):
  """Returns y (b, l, g, e), the final and, if `save`, the saved states."""
  u, delta = inputs.tokens.u, inputs.tokens.delta
  l = u.shape[1]
  # A step reads its delta, then writes its y in the same place. A buffer of its
  # own would be zeros, and those of all layers be made when the model starts.
  in_place = jnp.promote_types(delta.dtype, u.dtype) == u.dtype

  def run_block(block, carry):
    y, finals, saved = carry
    params = _read_params(inputs.params, block)

    def step(s, carry):
      y, h = carry
      t = _position(s, l, options)
      tokens = inputs.tokens._replace(delta=y) if in_place else inputs.tokens
      token = _read_token(tokens, block, t, options)
      delta = _step_size(params, token, options)
      h = _advance(xla_math.exp(delta * params.A), delta, token, h)
      out = _output(params, token, h)
      if token.z is not None:
        out = out * jax.nn.silu(token.z)
      return blocks.write(y, out, (block.row, t), block), h

    def interval(i, carry):
      y, saved, h = carry
      if save:
        saved = blocks.write(saved, h, (block.row, i), block)
      start = i * _INTERVAL
      stop = jnp.minimum(start + _INTERVAL, l)
      y, h = jax.lax.fori_loop(start, stop, step, (y, h))
      return y, saved, h

    h = blocks.read(inputs.state, (block.row,), block)
    carry = (y, saved, h)
    y, saved, h = jax.lax.fori_loop(0, _intervals(l), interval, carry)
    return y, blocks.write(finals, h, (block.row,), block), saved

  state = inputs.state
  b, n, g, e = state.shape
  full = functools.partial(partition.full, like=state)
  saved = full((b, _intervals(l), n, g, e), 0, state.dtype) if save else None
  y = delta.astype(u.dtype) if in_place else full(u.shape, 0, u.dtype)
  carry = (y, full(state.shape, 0, state.dtype), saved)
  return blocks.for_each(inputs.state, run_block, carry)


def _backward(residuals, dy, dstate, options):
  """The cotangent of the inputs."""
  inputs, saved = residuals
  l = inputs.tokens.u.shape[1]

  def run_block(block, carry):
    dtokens, dparams, dinitials = carry
    params = _read_params(inputs.params, block)
    read_token = lambda t: _read_token(inputs.tokens, block, t, options)

    def recompute(start, j, steps):
      token = read_token(_position(start + j, l, options))
      delta = _step_size(params, token, options)
      decay = xla_math.exp(delta * params.A)
      h = _advance(decay, delta, token, _at(steps.states, j))
      return _Steps(
        states=_put(steps.states, h, j + 1),
        decays=_put(steps.decays, decay, j),
        deltas=_put(steps.deltas, delta, j),
      )

    def walk_back(start, size, steps, j, carry):
      dtokens, dparams, G = carry
      j = size - 1 - j
      t = _position(start + j, l, options)
      dout = blocks.read(dy, (block.row, t), block).astype(G.dtype)
      dtoken, dparams, G = _step_back(
        params, read_token(t), dout, steps, j, G, dparams, options
      )
      write = lambda x, value: blocks.write(x, value, (block.row, t), block)
      return jax.tree.map(write, dtokens, dtoken), dparams, G

    def interval(i, carry):
      dtokens, dparams, steps, G = carry
      i = _intervals(l) - 1 - i
      start = i * _INTERVAL
      size = jnp.minimum(_INTERVAL, l - start)
      h = blocks.read(saved, (block.row, i), block)
      steps = steps._replace(states=_put(steps.states, h, 0))
      again = functools.partial(recompute, start)
      steps = jax.lax.fori_loop(0, size, again, steps)
      back = functools.partial(walk_back, start, size, steps)
      carry = (dtokens, dparams, G)
      dtokens, dparams, G = jax.lax.fori_loop(0, size, back, carry)
      return dtokens, dparams, steps, G

    G = blocks.read(dstate, (block.row,), block)
    local = jax.tree.map(jnp.zeros_like, params)
    carry = (dtokens, local, _empty_steps(G), G)
    dtokens, local, _, G = jax.lax.fori_loop(0, _intervals(l), interval, carry)
    add = lambda x, value: blocks.write(
      x, blocks.read(x, (), block) + value, (), block
    )
    dparams = jax.tree.map(add, dparams, local)
    return dtokens, dparams, blocks.write(dinitials, G, (block.row,), block)

  # Equal buffers would be merged into one, and then copied.
  leaves, structure = jax.tree.flatten(inputs.tokens)
  buffers = [
    partition.full(x.shape, fill, x.dtype, like=x)
    for fill, x in enumerate(leaves)
  ]
  carry = (
    structure.unflatten(buffers),
    jax.tree.map(jnp.zeros_like, inputs.params),
    jnp.zeros_like(inputs.state),
  )
  return _Inputs(*blocks.for_each(inputs.state, run_block, carry))


def _step_back(params, token, dout, steps, j, G, dparams, options):
  """Cotangents of a token and of the state before it; adds to `dparams`.

  Args:
    params: The parameters of the block.
    token: The token.
    dout: Cotangent of its output, (k, e).
    steps: The steps of the interval.
    j: Which of them belongs to the token.
    G: Cotangent of the state after the token, from later tokens, (n, k, e).
    dparams: Cotangents of the parameters, summed up so far.
    options: The options of the scan.
  """
  delta, decay = _at(steps.deltas, j), _at(steps.decays, j)
  h_before, h = _at(steps.states, j), _at(steps.states, j + 1)
  dz = None
  if token.z is not None:
    gate = jax.nn.sigmoid(token.z)
    dz = dout * _output(params, token, h) * gate * (1 + token.z * (1 - gate))
    dout = dout * token.z * gate
  G = G + dout * token.C
  G_before = G * decay
  W = G_before * h_before
  dinput = _sum_states(G * token.B)
  du = dinput * delta
  ddelta = _sum_states(W * params.A) + dinput * token.u
  dD, dbias = dparams.D, dparams.delta_bias
  if params.D is not None:
    du = du + dout * params.D
    dD = dD + dout * token.u
  if options.delta_softplus:
    ddelta = ddelta * jax.nn.sigmoid(_biased(params, token))
  if params.delta_bias is not None:
    dbias = dbias + ddelta
  dparams = _Params(A=dparams.A + W * delta, D=dD, delta_bias=dbias)
  dtoken = _Tokens(
    u=du,
    delta=ddelta,
    B=_sum_channels(G * (delta * token.u)).T,
    C=_sum_channels(h * dout).T,
    z=dz,
  )
  return dtoken, dparams, G_before


def _advance(decay, delta, token, h):
  """The state (n, k, e) after a token."""
  return decay * h + (delta * token.u) * token.B


def _output(params, token, h):
  """y before the gate, (k, e)."""
  y = _sum_states(h * token.C)
  return y if params.D is None else y + params.D * token.u


def _step_size(params, token, options):
  """The step sizes of a token, (k, e)."""
  delta = _biased(params, token)
  if options.delta_softplus:
    # The barrier keeps the compiler from computing it again at every use.
    delta = jax.lax.optimization_barrier(xla_math.softplus(delta))
  return delta


def _biased(params, token):
  if params.delta_bias is None:
    return token.delta
  return token.delta + params.delta_bias


def _sum_states(x):
  """Sums (n, k, e) over n; written out, it vectorises over e."""
  return functools.reduce(jnp.add, [x[i] for i in range(x.shape[0])])


def _sum_channels(x):
  """Sums (n, k, e) over e; halving it vectorises, and rounds less."""
  while x.shape[-1] % 2 == 0 and x.shape[-1] > 8:
    half = x.shape[-1] // 2
    x = x[..., :half] + x[..., half:]
  return x.sum(-1)


def _intervals(l):
  return -(-l // _INTERVAL)


def _position(s, l, options):
  """Where the s-th token in scan order is stored."""
  if options.reverse:
    s = l - 1 - s
  if options.columns is None:
    return s
  rows = l // options.columns
  return s % rows * options.columns + s // rows


def _empty_steps(h):
  full = lambda *shape: partition.full(shape, 0, h.dtype, like=h)
  return _Steps(
    states=full(_INTERVAL + 1, *h.shape),
    decays=full(_INTERVAL, *h.shape),
    deltas=full(_INTERVAL, *h.shape[1:]),
  )


def _at(x, i):
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x, value, i):
  return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _read_params(params, block):
  return jax.tree.map(lambda x: blocks.read(x, (), block), params)


def _read_token(tokens, block, t, options):
  def read(x):
    return blocks.read(x, (block.row, t), block).astype(options.compute_dtype)

  u, delta, B, C, z = jax.tree.map(read, tokens)
  return _Token(u, delta, B.T[..., None], C.T[..., None], z)
