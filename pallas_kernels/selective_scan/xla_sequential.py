"""The selective scan as a loop over time, made for CPUs.

The loop runs on the arrays as they are: a step slices its token out of
(b, l, d), computes the exponentials on the spot and updates a state that stays
in the first-level cache. No array of b * l * d * n elements ever exists.

Blocks. The state of one loop is (r, n, g', e): r batch rows, n states, g'
groups of e channels, channels innermost so that everything vectorises over
them. `_block_size` chooses r and g'.

Derivative. The forward pass saves the state before every `_INTERVAL`-th token.
The backward pass takes the intervals last to first: it recomputes the states
inside one into a buffer, then walks back through it. With G the cotangent of
h[t], which arrives as exp(delta[t+1] A) G[t+1] and gains C[t] dy[t],

  dC[t] = sum_e dy[t] h[t]           dB[t] = sum_e delta[t] u[t] G
  W     = G exp(delta[t] A) h[t-1]   dA   += delta[t] W
  ddelta[t] = sum_n A W + u[t] sum_n B[t] G

h[t-1] comes from the buffer. (h[t] - delta[t] B[t] u[t] in the place of
exp(delta[t] A) h[t-1] would cancel where the state decays fast.)

b batch, l length, d = g e channels, n state size, g groups.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import partition
from pallas_kernels.selective_scan import arguments

# Tokens between saved states. The saved states take l / _INTERVAL states, the
# buffer _INTERVAL states of one block.
_INTERVAL = 32

# A block's state should leave room in a first-level cache of 32 to 48 KiB.
_BLOCK_BYTES = 24 * 1024


def selective_scan(
  args: arguments.Arguments, options: arguments.Options
) -> tuple[jax.Array, jax.Array]:
  """Returns (y, final state); see `pallas_kernels.selective_scan`."""
  dtype = options.compute_dtype
  b, _, d = args.u.shape
  g, n = args.B.shape[2:]
  split = lambda x: None if x is None else x.reshape(*x.shape[:-1], g, d // g)
  to_float = lambda x: None if x is None else x.astype(dtype)
  state = args.initial_state
  if state is None:
    state = partition.zeros((b, d, n), dtype, like=args.u)
  y, state = _scan(
    _Inputs(
      u=split(args.u),
      delta=split(args.delta),
      A=split(to_float(args.A).T),
      B=args.B,
      C=args.C,
      D=split(to_float(args.D)),
      z=split(args.z),
      delta_bias=split(to_float(args.delta_bias)),
      state=split(jnp.moveaxis(to_float(state), 2, 1)),
    ),
    options,
  )
  state = jnp.moveaxis(state.reshape(b, n, d), 1, 2)
  return y.reshape(args.u.shape), state


class _Inputs(NamedTuple):
  """The arrays in the layout of the loop."""

  u: Float[Array, "b l g e"]
  delta: Float[Array, "b l g e"]
  A: Float[Array, "n g e"]
  B: Float[Array, "b l g n"]
  C: Float[Array, "b l g n"]
  D: Float[Array, "g e"] | None
  z: Float[Array, "b l g e"] | None
  delta_bias: Float[Array, "g e"] | None
  state: Float[Array, "b n g e"]


class _Residuals(NamedTuple):
  """What the backward pass keeps.

  Attributes:
    inputs: The arguments of the scan, not copied.
    saved: The states before every `_INTERVAL`-th token in scan order.
  """

  inputs: _Inputs
  saved: Float[Array, "b k n g e"]


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
  b, l, g, e = inputs.u.shape
  n = inputs.A.shape[0]
  intervals = -(-l // _INTERVAL)
  dtype = options.compute_dtype
  zeros = functools.partial(partition.zeros, like=inputs.state)
  blocks = _Blocks.of(inputs)

  def block(i, carry):
    y, states, saved = carry
    params = blocks.params(inputs, i)

    def step(s, carry):
      y, h = carry
      t = _position(s, l, options)
      token = blocks.token(inputs, i, t)
      h, _ = _advance(params, token, h, options)
      out = _output(params, token, h)
      if inputs.z is not None:
        out = out * jax.nn.silu(token.z.astype(dtype))
      return blocks.write_token(y, out, i, t), h

    def interval(k, carry):
      y, saved, h = carry
      if save:
        saved = blocks.write_saved(saved, h, i, k)
      start = k * _INTERVAL
      stop = jnp.minimum(start + _INTERVAL, l)
      y, h = jax.lax.fori_loop(start, stop, step, (y, h))
      return y, saved, h

    h = blocks.state(inputs.state, i)
    y, saved, h = jax.lax.fori_loop(0, intervals, interval, (y, saved, h))
    return y, blocks.write_state(states, h, i), saved

  y = zeros((b, l, g, e), inputs.u.dtype)
  states = zeros((b, n, g, e), dtype)
  saved = zeros((b, intervals, n, g, e), dtype) if save else None
  return jax.lax.fori_loop(0, blocks.count, block, (y, states, saved))


def _position(s, l, options):
  """The place in the sequence of the s-th token in scan order."""
  return l - 1 - s if options.reverse else s


class _Params(NamedTuple):
  """Parameters of one block."""

  A: Float[Array, "n g e"]
  D: Float[Array, "g e"] | None
  delta_bias: Float[Array, "g e"] | None


class _Token(NamedTuple):
  """One token of the rows and groups of a block; B and C broadcast over e."""

  u: Float[Array, "r g e"]
  delta: Float[Array, "r g e"]
  B: Float[Array, "r n g 1"]
  C: Float[Array, "r n g 1"]
  z: Float[Array, "r g e"] | None


def _step_size(params, token, options):
  """delta after bias and softplus, and before the softplus."""
  raw = token.delta
  if params.delta_bias is not None:
    raw = raw + params.delta_bias
  return jax.nn.softplus(raw) if options.delta_softplus else raw, raw


def _advance(params, token, h, options):
  """The state (r, n, g, e) after a token, and the decay that it took."""
  delta, _ = _step_size(params, token, options)
  decay = jnp.exp(delta[:, None] * params.A)
  h = decay * h + (delta * token.u)[:, None] * token.B
  return h, decay


def _output(params, token, h):
  """y before the gate, (r, g, e)."""
  y = _sum_states(h * token.C)
  return y if params.D is None else y + params.D * token.u


def _sum_states(x):
  """Sums (r, n, g, e) over n; written out, it vectorises over e."""
  return sum(x[:, i] for i in range(x.shape[1]))


class _Blocks(NamedTuple):
  """Parts of the arrays that one loop over time works on.

  Attributes:
    rows: Batch rows in a block.
    groups: Groups in a block.
    columns: Blocks beside each other along the groups.
    count: Blocks in all.
  """

  rows: int
  groups: int
  columns: int
  count: int
  dtype: jax.typing.DTypeLike

  @classmethod
  def of(cls, inputs):
    b, n, g, e = inputs.state.shape
    rows, groups = _block_size(b, n, g, e, inputs.state.dtype.itemsize)
    columns = g // groups
    count = b // rows * columns
    return cls(rows, groups, columns, count, inputs.state.dtype)

  def _corner(self, i):
    return i // self.columns * self.rows, i % self.columns * self.groups

  def params(self, inputs, i):
    _, group = self._corner(i)
    cut = lambda x: (
      None
      if x is None
      else jax.lax.dynamic_slice_in_dim(x, group, self.groups, axis=-2)
    )
    return _Params(cut(inputs.A), cut(inputs.D), cut(inputs.delta_bias))

  def token(self, inputs, i, t):
    row, group = self._corner(i)

    def cut(x):
      if x is None:
        return None
      size = (self.rows, 1, self.groups, x.shape[3])
      x = jax.lax.dynamic_slice(x, (row, t, group, 0), size)
      return x[:, 0].astype(self.dtype)

    over_channels = lambda x: jnp.moveaxis(x, 2, 1)[..., None]
    return _Token(
      u=cut(inputs.u),
      delta=cut(inputs.delta),
      B=over_channels(cut(inputs.B)),
      C=over_channels(cut(inputs.C)),
      z=cut(inputs.z),
    )

  def write_token(self, x, value, i, t):
    row, group = self._corner(i)
    value = value[:, None].astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, value, (row, t, group, 0))

  def state(self, x, i):
    row, group = self._corner(i)
    size = (self.rows, x.shape[1], self.groups, x.shape[3])
    return jax.lax.dynamic_slice(x, (row, 0, group, 0), size)

  def write_state(self, x, h, i):
    row, group = self._corner(i)
    return jax.lax.dynamic_update_slice(x, h, (row, 0, group, 0))

  def saved(self, x, i, k):
    row, group = self._corner(i)
    size = (self.rows, 1, x.shape[2], self.groups, x.shape[4])
    return jax.lax.dynamic_slice(x, (row, k, 0, group, 0), size)[:, 0]

  def write_saved(self, x, h, i, k):
    row, group = self._corner(i)
    return jax.lax.dynamic_update_slice(x, h[:, None], (row, k, 0, group, 0))


def _block_size(b, n, g, e, itemsize):
  """Rows and groups of a block."""
  if n == 1:
    return b, g
  return 1, 1


def _backward(residuals, dy, dstate, options):
  """The cotangents of the inputs."""
  inputs, saved = residuals
  b, l, g, e = inputs.u.shape
  n = inputs.A.shape[0]
  dtype = options.compute_dtype
  zeros = functools.partial(partition.zeros, like=inputs.state)
  blocks = _Blocks.of(inputs)
  r, gb = blocks.rows, blocks.groups
  intervals = saved.shape[1]

  def block(i, grads):
    params = blocks.params(inputs, i)

    def recompute(s, carry):
      before, h = carry
      before = jax.lax.dynamic_update_index_in_dim(before, h, s % _INTERVAL, 0)
      token = blocks.token(inputs, i, _position(s, l, options))
      h, _ = _advance(params, token, h, options)
      return before, h

    def walk(start, stop, before, j, carry):
      s = stop - 1 - j
      t = _position(s, l, options)
      grads, dparams, h, G = carry
      token = blocks.token(inputs, i, t)
      dout = blocks.token_of(dy, i, t)
      h_before = jax.lax.dynamic_index_in_dim(
        before, s % _INTERVAL, 0, keepdims=False
      )
      dtoken, dparams, G = _step_back(
        params, token, dout, h, h_before, G, dparams, options
      )
      grads = blocks.write_grads(grads, dtoken, i, t)
      return grads, dparams, h_before, G

    def interval(j, carry):
      grads, dparams, before, G = carry
      k = intervals - 1 - j
      start = k * _INTERVAL
      stop = jnp.minimum(start + _INTERVAL, l)
      h = blocks.saved(saved, i, k)
      before, h = jax.lax.fori_loop(start, stop, recompute, (before, h))
      grads, dparams, _, G = jax.lax.fori_loop(
        0,
        stop - start,
        functools.partial(walk, start, stop, before),
        (grads, dparams, h, G),
      )
      return grads, dparams, before, G

    dparams = _Params(
      A=zeros((r, n, gb, e), dtype),
      D=None if inputs.D is None else zeros((r, gb, e), dtype),
      delta_bias=None if inputs.delta_bias is None else zeros((r, gb, e), dtype),
    )
    before = zeros((_INTERVAL, r, n, gb, e), dtype)
    G = blocks.state(dstate, i)
    tokens, sums, dinitial = grads
    tokens, dparams, _, G = jax.lax.fori_loop(
      0, intervals, interval, (tokens, dparams, before, G)
    )
    sums = blocks.add_params(sums, dparams, i)
    return tokens, sums, blocks.write_state(dinitial, G, i)

  tokens = _Token(
    *(
      None if x is None else zeros(x.shape, x.dtype)
      for x in (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)
    )
  )
  sums = _Params(
    *(
      None if x is None else zeros(x.shape, x.dtype)
      for x in (inputs.A, inputs.D, inputs.delta_bias)
    )
  )
  dinitial = zeros((b, n, g, e), dtype)
  tokens, sums, dinitial = jax.lax.fori_loop(
    0, blocks.count, block, (tokens, sums, dinitial)
  )
  return _Inputs(
    u=tokens.u,
    delta=tokens.delta,
    A=sums.A,
    B=tokens.B,
    C=tokens.C,
    D=sums.D,
    z=tokens.z,
    delta_bias=sums.delta_bias,
    state=dinitial,
  )


def _step_back(params, token, dout, h, h_before, G, dparams, options):
  """The derivative of one step."""
  delta, raw = _step_size(params, token, options)
  dz = None
  if token.z is not None:
    gate = jax.nn.sigmoid(token.z)
    dz = dout * _output(params, token, h) * gate * (1 + token.z * (1 - gate))
    dout = dout * token.z * gate
  G = G + dout[:, None] * token.C
  dC = (dout[:, None] * h).sum(-1)
  dB = (G * (delta * token.u)[:, None]).sum(-1)
  G_before = G * jnp.exp(delta[:, None] * params.A)
  W = G_before * h_before
  dinput = _sum_states(G * token.B)
  ddelta = _sum_states(W * params.A) + dinput * token.u
  du = dinput * delta
  dD = dparams.D
  if dD is not None:
    du = du + dout * params.D
    dD = dD + dout * token.u
  if options.delta_softplus:
    ddelta = ddelta * jax.nn.sigmoid(raw)
  dbias = dparams.delta_bias
  if dbias is not None:
    dbias = dbias + ddelta
  dparams = _Params(dparams.A + W * delta[:, None], dD, dbias)
  return _Token(du, ddelta, dB, dC, dz), dparams, G_before


def _token_of(self, x, i, t):
  row, group = self._corner(i)
  size = (self.rows, 1, self.groups, x.shape[3])
  return jax.lax.dynamic_slice(x, (row, t, group, 0), size)[:, 0].astype(
    self.dtype
  )


def _write_grads(self, grads, dtoken, i, t):
  u, delta, B, C, z = dtoken
  swap = lambda x: jnp.moveaxis(x, 1, 2)
  values = _Token(u, delta, swap(B), swap(C), z)
  return jax.tree.map(
    lambda x, v: self.write_token(x, v, i, t), grads, values
  )


def _add_params(self, sums, dparams, i):
  _, group = self._corner(i)

  def add(x, v):
    old = jax.lax.dynamic_slice_in_dim(x, group, self.groups, axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(
      x, old + v.sum(0), group, axis=x.ndim - 2
    )

  return jax.tree.map(add, sums, dparams)


_Blocks.token_of = _token_of
_Blocks.write_grads = _write_grads
_Blocks.add_params = _add_params
