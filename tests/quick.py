"""`jax.jit` for tests, whose time is spent in compiling, not in running."""

from collections.abc import Callable
from typing import Any

import jax

# LLVM's optimisations take most of the time; float32 results differ by
# rounding only.
_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def jit(function: Callable[..., Any], **options: Any) -> Any:
  """`jax.jit` that compiles in less time to slower code."""
  return jax.jit(function, compiler_options=_OPTIONS, **options)
