"""The one table of numerical tolerances.

All are relative to the largest magnitude in the reference array, which is in
float64. A test that needs more says why beside its number.
"""

import numpy as np

# Results of one operation, and of its derivative.
FORWARD = {"float32": 1e-5, "float64": 1e-13}
GRADIENT = {"float32": 1e-4, "float64": 1e-12}

# Below float32 the error may be this many times that of the plain XLA form in
# the same dtype, and no more than two units in the last place of bfloat16.
LOW_PRECISION_FACTOR = 2.0
BFLOAT16 = 2.0**-6


def relative_error(got, want) -> float:
  """Largest difference, relative to the largest magnitude in `want`."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  assert np.isfinite(got).all()
  largest = np.abs(want).max(initial=0.0)
  return float(np.abs(got - want).max(initial=0.0) / (largest or 1.0))


def assert_close(got, want, relative: float, name: str = "") -> None:
  """Asserts `relative_error(got, want) <= relative`, shapes and finiteness."""
  error = relative_error(got, want)
  assert error <= relative, f"{name}: error {error:.3g} above {relative:.3g}"
