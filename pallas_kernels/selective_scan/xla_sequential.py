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

b batch, l length, d = g e channels, n state size, g groups, k groups in a block.
"""

import functools
from typing import NamedTuple

import jax
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import partition
from pallas_kernels.selective_scan import arguments

# Tokens between saved states, and in the buffer of the backward pass: states
# and decays of 16 tokens fit a second-level cache, 32 are slower.
_INTERVAL = 16

# Bound on a block's state, so that it leaves room in a first-level cache for
# the token and what is computed from it. More rows at a time are slower too.
_BLOCK_BYTES = 24 * 1024


def selective_scan(
  args: arguments.Arguments, options: arguments.Options
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`."""
  b, _, d = args.u.shape
  g, n = args.B.shape[2:]
  cast = lambda x: None if x is None else x.astype(options.compute_dtype)
  split = lambda x: None if x is None else x.reshape(*x.shape[:-1], g, d // g)
  if args.initial_state is None:
    shape = (b, n, g, d // g)
    state = partition.full(shape, 0, options.compute_dtype, like=args.u)
  else:
    state = split(jnp.moveaxis(cast(args.initial_state), 2, 1))
  inputs = _Inputs(
    tokens=_Tokens(
      u=split(args.u),
      delta=split(args.delta),
      B=args.B,
      C=args.C,
      z=split(args.z),
    ),
    params=_Params(
      A=split(cast(args.A).T),
      D=split(cast(args.D)),
      delta_bias=split(cast(args.delta_bias)),
    ),
    state=state,
  )
  y, state = _scan(inputs, options)
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


class _Block(NamedTuple):
  """The place of a block: a batch row, its first group, and how many."""

  row: Int[Array, ""]
  group: Int[Array, ""]
  groups: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: _Inputs, options: arguments.Options):
  y, state, _ = _forward(inputs, options, save=False)
  return y, state


def _scan_fwd(inputs, options):
  y, state, saved = _forward(inputs, options, save=True)
  return (y, state), _Residuals(inputs, saved)


def _scan_bwd(options, residuals, cotangents):
  dy, dstate = cotangents
  return (_backward(residuals, dy, dstate, options),)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(inputs, options, *, save):
  """Returns y (b, l, g, e), the final and, if `save`, the saved states."""
  l = inputs.tokens.u.shape[1]

  def run_block(block, carry):
    y, finals, saved = carry
    params = _read_params(inputs.params, block)

    def step(s, carry):
      y, h = carry
      t = _position(s, l, options)
      token = _read_token(inputs.tokens, block, t, options)
      delta = _step_size(params, token, options)
      h = _advance(jnp.exp(delta * params.A), delta, token, h)
      out = _output(params, token, h)
      if token.z is not None:
        out = out * jax.nn.silu(token.z)
      return _write(y, out, (block.row, t), block), h

    def interval(i, carry):
      y, saved, h = carry
      if save:
        saved = _write(saved, h, (block.row, i), block)
      start = i * _INTERVAL
      stop = jnp.minimum(start + _INTERVAL, l)
      y, h = jax.lax.fori_loop(start, stop, step, (y, h))
      return y, saved, h

    h = _read(inputs.state, (block.row,), block)
    carry = (y, saved, h)
    y, saved, h = jax.lax.fori_loop(0, _intervals(l), interval, carry)
    return y, _write(finals, h, (block.row,), block), saved

  u, state = inputs.tokens.u, inputs.state
  b, n, g, e = state.shape
  full = functools.partial(partition.full, like=state)
  saved = full((b, _intervals(l), n, g, e), 0, state.dtype) if save else None
  carry = (full(u.shape, 0, u.dtype), full(state.shape, 0, state.dtype), saved)
  return _over_blocks(inputs.state, run_block, carry)


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
      decay = jnp.exp(delta * params.A)
      h = _advance(decay, delta, token, _at(steps.states, j))
      put = dynamic_update_index_in_dim
      return _Steps(
        states=put(steps.states, h, j + 1, 0),
        decays=put(steps.decays, decay, j, 0),
        deltas=put(steps.deltas, delta, j, 0),
      )

    def walk_back(start, size, steps, j, carry):
      dtokens, dparams, G = carry
      j = size - 1 - j
      t = _position(start + j, l, options)
      dout = _read(dy, (block.row, t), block).astype(G.dtype)
      dtoken, dparams, G = _step_back(
        params, read_token(t), dout, steps, j, G, dparams, options
      )
      write = lambda x, value: _write(x, value, (block.row, t), block)
      return jax.tree.map(write, dtokens, dtoken), dparams, G

    def interval(i, carry):
      dtokens, dparams, steps, G = carry
      i = _intervals(l) - 1 - i
      start = i * _INTERVAL
      size = jnp.minimum(_INTERVAL, l - start)
      h = _read(saved, (block.row, i), block)
      states = dynamic_update_index_in_dim(steps.states, h, 0, 0)
      again = functools.partial(recompute, start)
      steps = steps._replace(states=states)
      steps = jax.lax.fori_loop(0, size, again, steps)
      back = functools.partial(walk_back, start, size, steps)
      carry = (dtokens, dparams, G)
      dtokens, dparams, G = jax.lax.fori_loop(0, size, back, carry)
      return dtokens, dparams, steps, G

    G = _read(dstate, (block.row,), block)
    local = jax.tree.map(jnp.zeros_like, params)
    carry = (dtokens, local, _empty_steps(G), G)
    dtokens, local, _, G = jax.lax.fori_loop(0, _intervals(l), interval, carry)
    add = lambda x, value: _write(x, _read(x, (), block) + value, (), block)
    dparams = jax.tree.map(add, dparams, local)
    return dtokens, dparams, _write(dinitials, G, (block.row,), block)

  # Equal buffers would be merged into one, and then copied.
  fills = _Tokens(u=0, delta=1, B=2, C=3, z=4)
  fills = fills._replace(z=None) if inputs.tokens.z is None else fills
  like = lambda x, fill: partition.full(x.shape, fill, x.dtype, like=x)
  carry = (
    jax.tree.map(like, inputs.tokens, fills),
    jax.tree.map(jnp.zeros_like, inputs.params),
    jnp.zeros_like(inputs.state),
  )
  return _Inputs(*_over_blocks(inputs.state, run_block, carry))


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
    delta = jax.lax.optimization_barrier(_softplus(delta))
  return delta


def _biased(params, token):
  if params.delta_bias is None:
    return token.delta
  return token.delta + params.delta_bias


def _softplus(x):
  """log(1 + exp(x)), to the last digits also for very negative x.

  As `jax.nn.softplus`, but without log1p, which is slow on CPUs.
  """
  exp = jnp.exp(-jnp.abs(x))
  # log1p(exp) = 2 atanh(ratio) by its power series; ratio is at most 1 / 3.
  ratio = exp / (2 + exp)
  square = ratio * ratio
  terms = 8 if x.dtype == jnp.float32 else 17
  series = 0.0
  for i in reversed(range(terms)):
    series = series * square + 1 / (2 * i + 1)
  return jnp.maximum(x, 0) + 2 * ratio * series


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
  """The place in the sequence of the s-th token in scan order."""
  return l - 1 - s if options.reverse else s


def _over_blocks(state, function, carry):
  """Runs carry = function(block, carry) for all blocks."""
  b, n, g, e = state.shape
  fitting = _BLOCK_BYTES // (n * e * state.dtype.itemsize)
  groups = max(k for k in range(1, g + 1) if g % k == 0 and k <= max(1, fitting))
  columns = g // groups

  def body(i, carry):
    return function(_Block(i // columns, i % columns * groups, groups), carry)

  return jax.lax.fori_loop(0, b * columns, body, carry)


def _empty_steps(h):
  full = lambda *shape: partition.full(shape, 0, h.dtype, like=h)
  return _Steps(
    states=full(_INTERVAL + 1, *h.shape),
    decays=full(_INTERVAL, *h.shape),
    deltas=full(_INTERVAL, *h.shape[1:]),
  )


def _at(x, i):
  return dynamic_index_in_dim(x, i, keepdims=False)


def _read_params(params, block):
  return jax.tree.map(lambda x: _read(x, (), block), params)


def _read_token(tokens, block, t, options):
  def read(x):
    return _read(x, (block.row, t), block).astype(options.compute_dtype)

  u, delta, B, C, z = jax.tree.map(read, tokens)
  return _Token(u, delta, B.T[..., None], C.T[..., None], z)


def _read(x, indices, block):
  """x[indices] of the block's groups; the groups are the last axis but one."""
  starts, sizes = _window(x, indices, block)
  return jax.lax.dynamic_slice(x, starts, sizes).reshape(sizes[len(indices) :])


def _write(x, value, indices, block):
  """Returns x with x[indices] of the block's groups set, in the dtype of x."""
  starts, sizes = _window(x, indices, block)
  value = value.astype(x.dtype).reshape(sizes)
  return jax.lax.dynamic_update_slice(x, value, starts)


def _window(x, indices, block):
  rank = len(indices)
  middle = x.shape[rank:-2]
  starts = (*indices, *(0 for _ in middle), block.group, 0)
  return starts, (*(1 for _ in indices), *middle, block.groups, x.shape[-1])
