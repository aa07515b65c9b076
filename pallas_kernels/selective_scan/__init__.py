"""The selective scan of Mamba; `api` holds the public function."""

from pallas_kernels.selective_scan.api import Implementation as Implementation
from pallas_kernels.selective_scan.api import selective_scan as selective_scan
