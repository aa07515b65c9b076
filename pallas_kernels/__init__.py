"""Kernels for state-space models: one function per operation.

Every operation has several implementations behind one signature; see
`pallas_kernels.dispatch` for how one is chosen and `pallas_kernels.partition`
for what happens on a mesh.
"""

from pallas_kernels.cross_selective_scan.api import (
  cross_selective_scan as cross_selective_scan,
)
from pallas_kernels.dispatch import UnsupportedError as UnsupportedError
from pallas_kernels.selective_scan.api import Implementation as Implementation
from pallas_kernels.selective_scan.api import selective_scan as selective_scan
