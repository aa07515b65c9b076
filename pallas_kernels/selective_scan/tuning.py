"""Settings of the Mosaic GPU kernels: heuristics, and a table per device.

An explicit `Config` wins, else what `python -m pallas_kernels.bench --tune`
measured for this device and shape (`tuning_<device>.json` beside this file),
else the heuristics.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the kernels, forward and backward.

  Attributes:
    tile: Tokens that are fetched at once by the forward kernel.
    unroll: Tokens per iteration of its inner loop; divides
      `backward_tile`.
    buffers: Tiles in flight or in use.
    chunks: Parts of the sequence that are scanned in parallel; 1 is none.
    backward_tile: Tokens per checkpoint, and per tile of the backward kernel;
      divides `tile`.
  """

  tile: int = 16
  unroll: int = 4
  buffers: int = 2
  chunks: int = 1
  backward_tile: int = 8

  def __post_init__(self):
    for small, large, name, whole in (
      (self.unroll, self.backward_tile, "unroll", "backward_tile"),
      (self.backward_tile, self.tile, "backward_tile", "tile"),
    ):
      if small < 1 or large < 1 or large % small:
        raise ValueError(
          f"Config: `{name}` must divide `{whole}`, got {small} and {large}."
        )
    if self.buffers < 1 or self.chunks < 1:
      raise ValueError(
        "Config: `buffers` and `chunks` must be at least 1, got "
        f"{self.buffers} and {self.chunks}."
      )
