"""Reference cases of the selective scan, made by the official PyTorch code.

A choice of them is in `tests/golden/scan`; where `../shared/golden` is beside
the repository, all of that are used.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

_TESTS = pathlib.Path(__file__).resolve().parent.parent
_OWN = _TESTS / "golden" / "scan"
_SHARED = _TESTS.parent.parent / "shared" / "golden" / "ops"

# B and C that do not depend on the input, (d, n), are not part of this op.
_UNSUPPORTED = ("scan_constant_BC",)
_SEQUENCES = ("u", "delta", "B", "C", "z")


class Case(NamedTuple):
  """A call, channel-last, and what it must give in float64.

  Attributes:
    arrays: The arguments, float32.
    options: `delta_softplus` and `reverse`.
    cotangent: Of y; the gradients are those of sum(y * cotangent).
    y: The output.
    state: The final state.
    gradients: With respect to each of `arrays`.
  """

  arrays: Mapping[str, np.ndarray]
  options: Mapping[str, bool]
  cotangent: np.ndarray
  y: np.ndarray
  state: np.ndarray
  gradients: Mapping[str, np.ndarray]


def names() -> list[str]:
  """All cases that there are here."""
  paths = [*_OWN.glob("scan_*.npz"), *_SHARED.glob("scan_*.npz")]
  return sorted({path.stem for path in paths} - set(_UNSUPPORTED))


def load(name: str) -> Case:
  folder = _OWN if (_OWN / f"{name}.npz").exists() else _SHARED
  manifest = json.loads((folder / "manifest.json").read_text())[name]
  with np.load(folder / f"{name}.npz") as file:
    data: dict[str, Any] = dict(file)
  last = lambda x: np.moveaxis(x, -1, 1)  # (b, d, l) to (b, l, d)
  given = [key[5:-4] for key in data if key.startswith("grad_")]
  given = [key for key in given if f"grad_{key}_f64" in data]
  place = lambda key, x: last(x) if key in _SEQUENCES else x
  return Case(
    arrays={key: place(key, data[key]) for key in given},
    options={key: manifest[key] for key in ("delta_softplus", "reverse")},
    cotangent=last(data["cotangent"]),
    y=last(data["out_f64"]),
    state=data["last_state_f64"],
    gradients={key: place(key, data[f"grad_{key}_f64"]) for key in given},
  )
