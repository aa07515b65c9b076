"""Reference numbers of the official models, and the weights they belong to.

The references were made by the official PyTorch code in evaluation mode with
weights and inputs from the recipe below, which needs only raw Philox bits and
is the same on every platform. Files are looked for in `tests/golden/FAMILY`,
then in `../shared/golden` beside the repository; where neither has one, the
test is skipped.
"""

from collections.abc import Mapping
import functools
import json
import math
import pathlib
import re
from typing import Any
import zlib

import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent
_SHARED = _ROOT.parent.parent / "shared" / "golden"

# First match wins: official key -> uniform in offset +- scale. None as scale
# means sqrt(3 / fan-in), variance 1 / fan-in.
_RECIPE = (
  (r"(.*\.)?running_mean", 0.0, 0.2),
  (r"(.*\.)?running_var", 1.0, 0.5),
  (r".*\.(A_log|A_b_log|A_logs)", 0.4, 1.1),
  (r".*\.(D|D_b|Ds)", 1.0, 0.5),
  # MambaVision, whose keys start with "levels", adds this bias twice.
  (r"levels\..*dt_proj\.bias", -1.0, 1.0),
  (r"(.*\.)?(dt_proj(_b)?\.bias|dt_projs_bias)", -3.0, 2.0),
  (r"(pos_embed|cls_token)", 0.0, 0.6),
  (r".*\.(gamma|gamma_1|gamma_2)", 0.6, 0.3),
  (r".*\.(x_proj_weight|dt_projs_weight)", 0.0, None),
  (r"(.*\.)?weight", 0.0, None),
  (r"(.*\.)?bias", 0.0, 0.2),
)


def find(family: str, name: str) -> pathlib.Path:
  """The file of a reference; skips the test where there is none."""
  for path in (_ROOT / "golden" / family / name, _SHARED / name):
    if path.exists():
      return path
  pytest.skip(f"{name} is neither in tests/golden nor in ../shared/golden")


def load(family: str, name: str) -> dict[str, np.ndarray]:
  """The arrays of an npz file.

  Many small arrays cost more as members of the file than their numbers do: some
  files hold them end to end as "values", with "names" and "sizes".
  """
  with np.load(find(family, name + ".npz")) as file:
    arrays = dict(file)
  if "values" not in arrays:
    return arrays
  ends = np.cumsum(arrays.pop("sizes"))[:-1]
  names = [str(name) for name in arrays.pop("names")]
  parts = np.split(arrays.pop("values"), ends)
  return arrays | dict(zip(names, parts, strict=True))


@functools.cache
def load_json(family: str, name: str) -> dict[str, Any]:
  return json.loads(find(family, name + ".json").read_text())


def expand_keys(keys: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Official keys and shapes from their short form: a.[0-2].b is three keys."""
  shapes = {}
  for key, shape in keys.items():
    numbers = re.search(r"\[(\d+)-(\d+)\]", key)
    if numbers is None:
      shapes[key] = tuple(shape)
      continue
    for i in range(int(numbers[1]), int(numbers[2]) + 1):
      shapes[key.replace(numbers[0], str(i))] = tuple(shape)
  return shapes


def _uniform(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Float64 in [-1, 1), determined by the name and the seed alone."""
  key = np.array([seed, zlib.crc32(name.encode())], np.uint64)
  raw = np.random.Philox(key=key, counter=0).random_raw(math.prod(shape))
  values = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
  return values.reshape(shape)


def make_tensor(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """The recipe's value for an official key, float32."""
  if key.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  found = [rule[1:] for rule in _RECIPE if re.fullmatch(rule[0], key)]
  if not found:
    raise KeyError(f"no recipe for {key}")
  offset, scale = found[0]
  if scale is None and len(shape) == 1:
    offset, scale = 1.0, 0.3  # A norm's scale.
  elif scale is None:
    batched = key.endswith(("x_proj_weight", "dt_projs_weight"))
    fan_in = shape[-1] if batched else math.prod(shape[1:])
    scale = (3.0 / fan_in) ** 0.5
  # In this order: rounding is part of the recipe.
  return (_uniform(key, shape, seed) * scale + offset).astype(np.float32)


def make_state_dict(
  shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, np.ndarray]:
  return {key: make_tensor(key, shape, seed) for key, shape in shapes.items()}


def make_images(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Channel-last images; `shape` is the reference's (b, 3, h, w)."""
  values = (_uniform("input:" + name, shape) * 3.0**0.5).astype(np.float32)
  return values.transpose(0, 2, 3, 1)


def make_cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """W of the loss sum(W * logits)."""
  return _uniform("cotangent:" + name, shape).astype(np.float32)


def strided(x: Any, like: np.ndarray) -> np.ndarray:
  """What a reference keeps of a large array: every so many-th element."""
  flat = np.asarray(x).reshape(-1)
  return flat[:: max(1, flat.size // like.size)][: like.size]


def assert_close(
  got: Any, want: np.ndarray, *, relative: float, name: str = ""
) -> None:
  """Compares with an error bound relative to the largest reference value."""
  got = strided(got, want).astype(np.float64)
  want = want.reshape(-1).astype(np.float64)
  assert got.shape == want.shape, (name, got.shape, want.shape)
  assert np.isfinite(got).all(), name
  error = np.abs(got - want).max()
  bound = relative * np.abs(want).max()
  assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"
