"""Chooses the implementation that runs an operation.

An operation lists its implementations in one table, in order of preference:
`None` takes the first that is offered on this platform and fits the call, a
name takes that one or raises. The choice is made when the call is traced.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.extend

_logger = logging.getLogger("pallas_kernels")

# Abstract devices carry the compiler's name of a platform, real ones JAX's.
_PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


class UnsupportedError(NotImplementedError):
  """The call is right, but it cannot run here with this implementation."""


def fits_always(*args: Any, **kwargs: Any) -> None:
  """The `why_not` of an implementation without limits."""
  del args, kwargs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impl:
  """One implementation of an operation.

  Attributes:
    function: Computes the operation on normalised arguments.
    why_not: Called with the same arguments; None if `function` can run them
      here, otherwise a clause that says why not.
    platforms: Where `implementation=None` may take it; None means anywhere,
      an empty tuple only by name.
  """

  function: Callable[..., Any]
  why_not: Callable[..., str | None] = fits_always
  platforms: tuple[str, ...] | None = None


def target_device() -> Any:
  """The device that the traced code is for, real or abstract.

  The device of the mesh in context wins, an abstract one included, so that
  code can be lowered for a platform that this machine lacks; without a mesh
  it is JAX's default device. A real device stands for an abstract one of the
  same kind: it knows more about itself.
  """
  default = jax.extend.backend.get_default_device()
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None or device.device_kind == default.device_kind:
    return default
  return device


def default_platform() -> str:
  """The platform of `target_device`: "cpu", "gpu" or "tpu"."""
  device = target_device()
  return _PLATFORM_ALIASES.get(device.platform, device.platform)


def choose(
  op: str,
  table: Mapping[str, Impl],
  implementation: str | None,
  *args: Any,
  **kwargs: Any,
) -> Impl:
  """Returns the entry of `table` that runs `op` on these arguments.

  Args:
    op: Name of the operation, for messages.
    table: The implementations by name, in order of preference.
    implementation: One of the names, or None for the first that fits.
    *args: Arguments of the call, handed to `why_not`.
    **kwargs: Keyword arguments of the call, handed to `why_not`.

  Raises:
    ValueError: There is no implementation of that name.
    UnsupportedError: The named one, or with None every one, cannot run.
  """
  if implementation is not None:
    check_name(op, table, implementation)
    if reason := table[implementation].why_not(*args, **kwargs):
      raise UnsupportedError(
        f"`{op}` cannot run with {implementation=}: {reason}. "
        "Pass implementation=None to choose automatically."
      )
    _log_choice(op, implementation, "asked for by name")
    return table[implementation]

  platform = default_platform()
  reasons = []
  for name, impl in table.items():
    if impl.platforms is not None and platform not in impl.platforms:
      continue
    if reason := impl.why_not(*args, **kwargs):
      reasons.append(f"{name!r}: {reason}")
      continue
    _log_choice(op, name, "; ".join(reasons) or f"first choice on {platform}")
    return impl
  raise UnsupportedError(
    f"`{op}` has no implementation for this call on {platform!r}: "
    f"{'; '.join(reasons) or 'none is offered there'}."
  )


def check_name(op: str, table: Mapping[str, Impl], implementation: Any) -> None:
  """Raises ValueError unless `implementation` is None or in `table`."""
  if implementation is not None and implementation not in table:
    raise ValueError(
      f"Unknown implementation {implementation!r} for `{op}`; "
      f"expected None or one of {sorted(table)}."
    )


@functools.cache  # Once per choice, not once per trace.
def _log_choice(op: str, name: str, reason: str) -> None:
  _logger.info("%s runs as %r (%s).", op, name, reason)
