"""Runs an operation per shard of the mesh in context.

The compiler does not look inside a kernel, and gathers an array that a loop
slices along a sharded dimension. Operations that are independent along some
dimensions are therefore wrapped in `jax.shard_map` here, so that each device
works on its own part and nothing is gathered.

Which part that is, given a mesh set by `jax.set_mesh`, or without one the mesh
in the type of the leading array, if it has Explicit axes:

* **Manual axes** (the caller is inside `shard_map`) are the caller's business.
* **Explicit axes** split what they split in the type of the leading array.
* **Auto axes** are unknown while tracing, so a convention on their names
  holds: those in `CHANNEL_AXES` split the channels, those in `SEQUENCE_AXES`
  the tokens, all others the batch, each as long as sizes divide.

Tokens are split only for operations that can pass a state from shard to shard;
they ask for it. For others these axes split nothing.

Whatever does not divide runs unsplit over that axis, on every device alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

CHANNEL_AXES = ("model", "tensor", "channel")
SEQUENCE_AXES = ("sequence",)

# Letters that a layout string uses for the dimensions that may be split.
BATCH, CHANNEL, GROUP, TOKEN = "b", "d", "g", "l"


@dataclasses.dataclass(frozen=True)
class Split:
  """The mesh axes that split each dimension of an operation.

  Attributes:
    mesh_axes: All mesh axes that become manual, whether they split or not.
    by_letter: For each letter of a layout string, the axes that split it.
  """

  mesh_axes: frozenset[str]
  by_letter: Mapping[str, tuple[str, ...]]

  def spec(self, layout: str) -> jax.P:
    """The partition spec of an array with this layout, for instance "bld"."""
    return jax.P(*(self.by_letter.get(letter) or None for letter in layout))


def per_shard(
  function: Callable[[Mapping[str, Any], tuple[str, ...]], Any],
  arrays: Mapping[str, jax.Array | None],
  *,
  layouts: Mapping[str, str],
  out_layouts: str | tuple[str, ...],
  lead: str,
  split_tokens: bool = False,
) -> Any:
  """Returns `function(arrays, axes)`, computed per shard of the mesh.

  Args:
    function: The operation; independent along batch and channels, except that
      all channels of a group share the arrays that have a group dimension. Its
      second argument has the mesh axes that split the tokens, often none.
    arrays: Its arrays by name; absent optional ones are None.
    layouts: For each name one letter per dimension, "b" for the batch, "d" for
      the channels, "g" for groups of channels, "l" for tokens; others are never
      split.
    out_layouts: The same for the result, or for each of the results.
    lead: Name of the array whose sharding decides on Explicit axes; it has a
      batch and a channel dimension.
    split_tokens: Whether `function` can work on a part of the tokens.
  """
  given = {name: x for name, x in arrays.items() if x is not None}
  split = plan(given, layouts, lead, split_tokens)
  if split is None:
    return function({**arrays, **_vary_together(given)}, ())

  token_axes = split.by_letter[TOKEN]

  def body(local):
    # A state that comes from other shards varies over their axes.
    varying = _vary_together(local, token_axes)
    return function({**arrays, **varying}, token_axes)

  specs = {name: split.spec(layouts[name]) for name in given}
  out_specs = jax.tree.map(split.spec, out_layouts)
  mesh = _mesh_of(given[lead])
  return jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=out_specs,
    axis_names=split.mesh_axes,
  )(_reshard_explicit(given, specs, mesh))


def _mesh_of(x: jax.Array) -> jax.sharding.AbstractMesh | jax.sharding.Mesh:
  """The mesh in context, else the one that x is split over explicitly.

  An array on Explicit axes brings its mesh along in its type, whether or not
  `jax.set_mesh` has set one. Without either the mesh is empty.
  """
  mesh = jax.sharding.get_abstract_mesh()
  own = jax.typeof(x).sharding.mesh
  if not mesh.empty or not own.explicit_axes:
    return mesh
  if isinstance(x, jax.core.Tracer):
    return own
  # Outside of jit devices are needed, to bring other arrays there.
  sharding = x.sharding
  return sharding.mesh if isinstance(sharding, NamedSharding) else own


def full(
  shape: Sequence[int],
  fill_value: float,
  dtype: jax.typing.DTypeLike,
  *,
  like: jax.Array,
) -> jax.Array:
  """A constant array that varies over the same manual mesh axes as `like`.

  A loop needs this for its first carry: a plain constant is the same on every
  shard, and the type of a carry may not change from step to step.
  """
  return _cast(jnp.full(shape, fill_value, dtype), _varying(like))


def vary_like(x: jax.Array, *, like: jax.Array) -> jax.Array:
  """`x` with a type that varies over the manual mesh axes of `like` too.

  Results of a kernel need this: they are computed from shards, but JAX cannot
  see that.
  """
  return _cast(x, _varying(like))


def sequence_shards(x: jax.Array, layout: str) -> int:
  """Over how many shards `per_shard` would split the tokens if they divided."""
  mesh = _mesh_of(x)
  free, explicit = _usable_axes(mesh)
  _, _, tokens = _wanted(x, layout, free, explicit)
  return math.prod(mesh.shape[name] for name in tokens)


def plan(
  arrays: Mapping[str, jax.Array],
  layouts: Mapping[str, str],
  lead: str,
  split_tokens: bool = False,
) -> Split | None:
  """How `per_shard` splits over the mesh of the leading array.

  None is to leave everything as it is: there is no mesh, the caller has made
  all its axes manual, or it has one device.
  """
  mesh = _mesh_of(arrays[lead])
  free, explicit = _usable_axes(mesh)
  if not explicit and math.prod(mesh.shape[name] for name in free) == 1:
    return None

  sizes = {
    letter: size
    for name, x in arrays.items()
    for letter, size in zip(layouts[name], x.shape, strict=True)
  }
  batch, channels, tokens = _wanted(arrays[lead], layouts[lead], free, explicit)
  groups = sizes.get(GROUP, 1)
  batch = _dividing(batch, mesh.shape, sizes[BATCH])
  # A shard must hold whole groups, or a part of the only one.
  channels = _dividing(
    channels, mesh.shape, sizes[CHANNEL] if groups == 1 else groups
  )
  tokens = _dividing(tokens, mesh.shape, sizes.get(TOKEN, 1))
  by_letter = {
    BATCH: batch,
    CHANNEL: channels,
    GROUP: channels if groups > 1 else (),
    TOKEN: tokens if split_tokens else (),
  }
  return Split(frozenset(free), by_letter)


def _usable_axes(
  mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh,
) -> tuple[list[str], list[str]]:
  """Axes that the caller has not made manual; of these, the Explicit ones."""
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  free = [name for name in types if types[name] is not AxisType.Manual]
  return free, [name for name in free if types[name] is AxisType.Explicit]


def _wanted(
  lead: jax.Array, layout: str, free: list[str], explicit: list[str]
) -> tuple[list[str], list[str], list[str]]:
  """The mesh axes that should split the batch, the channels and the tokens."""
  spec = jax.typeof(lead).sharding.spec
  of_letter = {
    letter: [name for name in _names(entry) if name in explicit]
    for letter, entry in zip(layout, spec, strict=False)
  }
  auto = [name for name in free if name not in explicit]
  channels = [name for name in auto if name in CHANNEL_AXES]
  tokens = [name for name in auto if name in SEQUENCE_AXES]
  batch = [name for name in auto if name not in channels + tokens]
  return (
    of_letter.get(BATCH, []) + batch,
    of_letter.get(CHANNEL, []) + channels,
    of_letter.get(TOKEN, []) + tokens,
  )


def _names(entry: Any) -> tuple[str, ...]:
  """The axis names in one entry of a partition spec."""
  if isinstance(entry, str):
    return (entry,)
  return entry if isinstance(entry, tuple) else ()


def _dividing(
  names: Sequence[str], axis_sizes: Mapping[str, int], size: int
) -> tuple[str, ...]:
  """The axes, taken greedily in order, whose product divides `size`."""
  taken, product = [], 1
  for name in names:
    if size % (product * axis_sizes[name]) == 0:
      taken.append(name)
      product *= axis_sizes[name]
  return tuple(taken)


def _reshard_explicit(
  arrays: Mapping[str, jax.Array],
  specs: Mapping[str, jax.P],
  mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh,
) -> Mapping[str, jax.Array]:
  """Brings arrays on Explicit axes to what `shard_map` is about to demand."""
  explicit = set(mesh.abstract_mesh.explicit_axes)
  if not explicit:
    return arrays

  def reshard(x, spec):
    entries = (
      tuple(n for n in _names(entry) if n in explicit) or None for entry in spec
    )
    sharding = NamedSharding(mesh, jax.P(*entries))
    return jax.sharding.reshard(x, sharding)

  return {name: reshard(x, specs[name]) for name, x in arrays.items()}


def _vary_together(
  arrays: Mapping[str, jax.Array], more: Iterable[str] = ()
) -> dict[str, jax.Array]:
  """Casts all arrays to the union of the manual axes that any varies over.

  A custom derivative must return cotangents that vary like their primals;
  after this cast all do, and the transpose of the cast sums over the shards.
  """
  union = frozenset(more).union(*(_varying(x) for x in arrays.values()))
  return {name: _cast(x, union) for name, x in arrays.items()}


def _varying(x: jax.Array) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying


def _cast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  missing = tuple(sorted(axes - _varying(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
