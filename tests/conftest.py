"""Set-up that every test shares."""

import gc
import os

import jax
import pytest

# Most of the time goes into LLVM's optimisations of programs that run once.
# Without them results differ by rounding only. The demo, the benchmark and the
# other commands that CI runs are compiled as users compile them.
_FAST_COMPILATION = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def pytest_configure(config):
  # On a GPU, `pytest -m gpu`, the flags would change what is tested.
  if "gpu" not in config.option.markexpr:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_FAST_COMPILATION}".strip()
  config.addinivalue_line(
    "markers", "long: left to `make test-long` (`pytest -m long`)"
  )


def pytest_collection_modifyitems(config, items):
  if "long" in config.option.markexpr:
    return
  for item in items:
    # Not `item.keywords`, which has the names of parameters too.
    if item.get_closest_marker("long"):
      item.add_marker(pytest.mark.skip(reason="left to `make test-long`"))


# Tracing makes many small objects beside the large heap of a long session: with
# Python's thresholds a twelfth of the time goes into looking for garbage.
gc.set_threshold(100_000, 50, 100)
# Eight virtual devices: mesh tests need them, and other tests run on the first.
jax.config.update("jax_num_cpu_devices", 8)
