"""The selective scan of VMamba in four directions; `api` holds the function."""

from pallas_kernels.cross_selective_scan.api import (
  cross_selective_scan as cross_selective_scan,
)
from pallas_kernels.cross_selective_scan.api import (
  Implementation as Implementation,
)
