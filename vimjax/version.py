"""The one version of this distribution (vimjax and pallas_kernels)."""

__version__ = "0.1.0"
