"""Where arrays lie: the mesh of devices, and the table of what is divided.

Three axes, of which a mesh has "data" and those that divide something:

* "data": each group of devices works on its share of the images.
* "fsdp": so too, and the group shares one copy of the state besides (ZeRO,
  arXiv:1910.02054): between steps each device keeps a part of every large
  parameter, of its average and of the optimiser's moments. A step puts the
  parameters together, and divides the gradients before it uses them.
* "sequence": the devices of a group work on the same images, each on its part
  of the tokens.

No number depends on the mesh but for the order of summation.
"""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

DATA, FSDP, SEQUENCE = "data", "fsdp", "sequence"
# The axes that divide the images of a batch.
_BATCH_AXES = (DATA, FSDP)

# The first pattern found in an array's path decides. A spec is for the last
# dimensions: those before, of stacked layers or directions, are not divided.
# The optimiser's state and the average have the parameters' names, and so their
# rules; what no pattern matches (biases, scales, tokens, batch statistics, the
# counters) is small, and every device keeps a copy.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  # (features, classes): there may be any number of classes.
  (r"\bhead/kernel$", PartitionSpec(FSDP, None)),
  # (channels, states), and (channels, step rank and twice the states).
  (r"\bA_log$", PartitionSpec(FSDP, None)),
  (r"\bx_proj/kernel$", PartitionSpec(FSDP, None)),
  # (tokens, channels).
  (r"\bpos_embed$", PartitionSpec(None, FSDP)),
  # (..., inputs, outputs) of projections and convolutions.
  (r"\bkernel$", PartitionSpec(FSDP)),
)
# Elements below which an array is not divided: to put it together would take
# longer than its copies are worth.
SMALLEST = 1024


def axis_sizes(
  *, data: int = -1, fsdp: int = 1, sequence: int = 1, devices: int
) -> dict[str, int]:
  """The sizes of the three axes, with -1 filled in.

  Args:
    data: Of the axis "data"; -1 means what the others leave.
    fsdp: Of the axis "fsdp".
    sequence: Of the axis "sequence".
    devices: How many there are.

  Raises:
    ValueError: The product is not the number of devices.
  """
  others = fsdp * sequence
  if data == -1 and others > 0 and not devices % others:
    data = devices // others
  sizes = {DATA: data, FSDP: fsdp, SEQUENCE: sequence}
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
    raise ValueError(
      f"A mesh of data={data} x fsdp={fsdp} x sequence={sequence} does not fit "
      f"{devices} device(s): the product must be their number, and data=-1 "
      "stands for what the others leave."
    )
  return sizes


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  sequence: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The mesh that `config.mesh` describes.

  Args:
    data: As in `axis_sizes`.
    fsdp: As in `axis_sizes`.
    sequence: As in `axis_sizes`.
    devices: All of the program by default.

  Returns:
    A mesh with the axis "data" and those others that are larger than 1.

  Raises:
    ValueError: As in `axis_sizes`.
  """
  count = jax.device_count() if devices is None else len(devices)
  sizes = axis_sizes(data=data, fsdp=fsdp, sequence=sequence, devices=count)
  names = [name for name in sizes if name == DATA or sizes[name] > 1]
  # Auto: linen's own annotations and the compiler place what we do not.
  return jax.make_mesh(
    tuple(sizes[name] for name in names),
    tuple(names),
    axis_types=(AxisType.Auto,) * len(names),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: jax.sharding.Mesh, *, axis: int = 0) -> NamedSharding:
  """The placement of a batch: `axis`, the images', divided over the devices.

  Devices that differ in their place along "sequence" alone hold the same
  images.
  """
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, _batch_axes(mesh)))


def _batch_axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  return tuple(name for name in _BATCH_AXES if name in mesh.shape)


def spec(path: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
  """What `RULES` say of one array.

  Args:
    path: Its names, joined by "/".
    shape: Its shape.
    fsdp: Over how many devices to divide it.

  Returns:
    A spec as long as the shape; an empty one if the array is small, if its
    size does not divide, or if there is no rule for it.
  """
  rule = next((spec for name, spec in RULES if re.search(name, path)), None)
  if rule is None or len(rule) > len(shape):
    return PartitionSpec()
  if fsdp == 1 or math.prod(shape) < SMALLEST:
    return PartitionSpec()
  full = (None,) * (len(shape) - len(rule)) + tuple(rule)
  sizes = zip(full, shape, strict=True)
  if any(name == FSDP and size % fsdp for name, size in sizes):
    return PartitionSpec()
  return PartitionSpec(*full)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The placement of every array of a state, or of a part of it.

  Args:
    tree: Arrays, or anything with shapes.
    mesh: From `make_mesh`.
  """
  fsdp = mesh.shape.get(FSDP, 1)

  def place(path: Any, x: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, spec(name, x.shape, fsdp))

  return jax.tree_util.tree_map_with_path(place, tree)


def put_together(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Inside a compiled step: every array whole, on every device.

  Left to itself, the compiler might divide the work of a layer as its
  parameters are, and move activations, which are larger.
  """
  if FSDP not in mesh.shape:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def divide(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Inside a compiled step: every array as `RULES` say."""
  if FSDP not in mesh.shape:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def from_local(
  x: np.ndarray, placement: NamedSharding, shape: tuple[int, ...]
) -> jax.Array:
  """An array of which this process has the part that its devices hold.

  Args:
    x: The part.
    placement: Where all of it lies.
    shape: Of all of it.
  """
  # JAX counts this as an accident where an array is spread over processes.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.make_array_from_process_local_data(placement, x, shape)


def put(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Places arrays that every process has on the host, as `RULES` say."""
  return jax.tree.map(
    lambda x, placement: jax.make_array_from_callback(
      x.shape, placement, lambda index: x[index]
    ),
    tree,
    shardings(tree, mesh),
  )


def gather(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Whole arrays on the host; every process must take part."""
  if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
    return jax.device_get(tree)
  whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return jax.device_get(whole)


def batch_slice(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of every batch this process loads, and of how many.

  Processes whose devices share images, along "sequence", load the same ones.
  """
  shards = math.prod(mesh.shape[name] for name in _batch_axes(mesh))
  held: Any = batch_sharded(mesh).addressable_devices_indices_map((shards,))
  rows = {index[0].indices(shards)[:2] for index in held.values()}
  first = min(start for start, _ in rows)
  size = max(stop for _, stop in rows) - first
  return first // size, shards // size
