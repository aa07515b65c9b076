"""Makes the checkpoints of this folder: `python make.py`, with PyTorch.

They were made with torch 2.13.0, numpy 2.4 and yacs 0.1.8 on a CPU, and are
here because neither torch nor yacs is a dependency. `torch_files_test.py` knows
the numbers: each tensor counts upwards from 0.
"""

import argparse
import collections
import pathlib

import numpy as np
import torch
import yacs.config

HERE = pathlib.Path(__file__).parent
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (
  *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
  *(torch.bool, torch.complex64),
)


def count(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
  return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def tensors() -> dict[str, torch.Tensor]:
  """Every dtype, and views of many kinds."""
  base = count(4, 6)
  return {
    **{str(t).removeprefix("torch."): count(2, 3, dtype=t) for t in FLOATS},
    **{str(t).removeprefix("torch."): count(2, 3, dtype=t) for t in OTHERS},
    "shared": base,
    "shared_transposed": base.T,
    "shared_strided": base[1::2, ::3],
    "shared_offset": base[2],
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "expanded": torch.ones(1).expand(5),
    "parameter": torch.nn.Parameter(count(3)),
  }


def training() -> dict[str, object]:
  """What training scripts save."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
  schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
  model(torch.ones(4, 3)).sum().backward()
  optimizer.step()
  schedule.step()
  with torch.no_grad():
    model[0].weight.copy_(count(2, 3))
  config = yacs.config.CfgNode({"MODEL": {"NAME": "tiny", "DEPTHS": [2, 2]}})
  parameter = torch.nn.Parameter(count(3))
  parameter._no_weight_decay = True
  return {
    "model": model.state_dict(),
    "model_ema": collections.OrderedDict(
      (f"module.{key}", value + 1) for key, value in model.state_dict().items()
    ),
    "optimizer": optimizer.state_dict(),
    "lr_scheduler": schedule.state_dict(),
    "scaler": torch.amp.GradScaler("cpu").state_dict(),
    "epoch": 3,
    "args": argparse.Namespace(lr=1e-3, device=torch.device("cpu")),
    "config": config,
    "path": pathlib.PurePosixPath("runs/1"),
    "max_accuracy": np.float64(76.1),
    "history": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "counts": collections.Counter("aab"),
    "marked_parameter": parameter,
  }


def main() -> None:
  for name, tree in (("tensors", tensors()), ("training", training())):
    torch.save(tree, HERE / f"{name}.pth")
    legacy = HERE / f"{name}_legacy.pth"
    torch.save(tree, legacy, _use_new_zipfile_serialization=False)
  torch.save(torch.nn.Linear(2, 2), HERE / "module.pth")


if __name__ == "__main__":
  main()
