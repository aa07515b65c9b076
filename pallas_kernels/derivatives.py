"""Says clearly which derivatives an implementation does not have."""

import functools
from typing import Any

import jax

from pallas_kernels import dispatch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_once(operation: str, values: Any) -> Any:
  """`values`, in the rules of a gradient that has no gradient itself.

  Args:
    operation: Name of the operation, for the message.
    values: What a rule starts from, any tree of arrays.

  Raises:
    UnsupportedError: JAX differentiates the gradient, in either mode. Without
      this its message would be about a loop or a kernel inside.
  """
  del operation
  return values


def _refuse(operation: str, values: Any) -> Any:
  del values
  raise dispatch.UnsupportedError(
    f"{operation}: this implementation has first derivatives only; for those "
    'of gradients pass implementation="xla_associative" or "reference".'
  )


# The last one is never reached.
differentiable_once.defvjp(_refuse, _refuse)
