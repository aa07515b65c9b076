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
    unroll: Tokens per iteration of its inner loop; divides `tile`.
    buffers: Tiles in flight or in use.
    chunks: Parts of the sequence that are scanned in parallel; 1 is none.
    backward_tile: Tokens per checkpoint, and per tile of the backward kernel;
      a multiple of `tile`.
    backward_unroll: Tokens between the states that the backward kernel keeps
      in shared memory; divides `backward_tile`.
  """

  tile: int = 16
  unroll: int = 4
  buffers: int = 2
  chunks: int = 1
  backward_tile: int = 16
  backward_unroll: int = 2

  def __post_init__(self):
    for small, large in (
      ("unroll", "tile"),
      ("tile", "backward_tile"),
      ("backward_unroll", "backward_tile"),
    ):
      sizes = getattr(self, small), getattr(self, large)
      if min(sizes) < 1 or sizes[1] % sizes[0]:
        raise ValueError(
          f"Config: `{small}` must divide `{large}`, got {sizes[0]} and "
          f"{sizes[1]}."
        )
    if self.buffers < 1 or self.chunks < 1:
      raise ValueError(
        "Config: `buffers` and `chunks` must be at least 1, got "
        f"{self.buffers} and {self.chunks}."
      )
