"""What is measured: cases, in groups that are timed together."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any, Final, Literal

import vimjax
from vimjax import flops, registry

Mode = Literal["inference", "training"]
Dtype = Literal["float32", "bfloat16"]
Precision = Literal["full", "tf32"]
Attention = Literal["materialised", "flash"]

BASELINES: Final = ("deit_tiny", "deit_small", "deit_base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One program.

  Attributes:
    model: Name of a published model.
    size: Side of the images.
    batch: Images at a time.
    mode: "inference": logits. "training": forward and backward pass of the
      cross-entropy, and an SGD update in place.
    dtype: Of the computation; parameters are float32.
    precision: Of float32 matrix products; None in bfloat16.
    attention: How a baseline attends: with the whole matrix of weights in
      memory, as in the papers' comparisons, or by flash attention. None in
      others for what they do by default.
  """

  model: str
  size: int
  batch: int
  mode: Mode
  dtype: Dtype
  precision: Precision | None
  attention: Attention | None = None

  @property
  def label(self) -> str:
    """The model, with what it attends by."""
    return self.model + (f" ({self.attention})" if self.attention else "")

  @property
  def is_baseline(self) -> bool:
    """Whether the model is what others are compared with."""
    return self.model in BASELINES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Cases that differ in the model only, to be timed in turn.

  Attributes:
    cases: Models first, then their baselines.
    halve: See `Plan`.
  """

  cases: tuple[Case, ...]
  halve: bool = False

  def halved(self) -> "Group":
    """The same with half the batch."""
    smaller = [
      dataclasses.replace(case, batch=case.batch // 2) for case in self.cases
    ]
    return dataclasses.replace(self, cases=tuple(smaller))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Lists of which every combination is measured.

  Attributes:
    models: Names of models; each brings the baseline nearest in size.
    sizes: Sides of the images.
    batches: Batch sizes.
    modes: See `Case`.
    dtypes: See `Case`.
    precisions: Of float32 rows, the same for models and baselines.
    flash: Whether bfloat16 rows get a flash attention baseline too, and models
      that have some attention a second row with it.
    halve: Whether half the batch follows where a case does not fit, until all
      that are timed in turn do.
  """

  models: Sequence[str]
  sizes: Sequence[int]
  batches: Sequence[int]
  modes: Sequence[Mode] = ("inference", "training")
  dtypes: Sequence[Dtype] = ("float32",)
  precisions: Sequence[Precision] = ("full",)
  flash: bool = False
  halve: bool = False


_MODELS: Final = (
  "vim_tiny",
  "vim_small",
  "vmamba_tiny_s1l8",
  "mambavision_tiny",
)


def _published(mode: Mode, dtype: Dtype) -> Plan:
  """All models at the size that they are published for."""
  return Plan(
    models=_MODELS,
    sizes=(224,),
    batches=(128,),
    modes=(mode,),
    dtypes=(dtype,),
    precisions=("tf32", "full"),
    flash=True,
  )


def _large(
  mode: Mode, dtype: Dtype, sizes: Sequence[int], batch: int = 8
) -> Plan:
  """Images of which attention has long sequences."""
  return Plan(
    models=("vim_tiny",),
    sizes=sizes,
    batches=(batch,),
    modes=(mode,),
    dtypes=(dtype,),
    precisions=("tf32", "full"),
    flash=True,
    halve=True,
  )


PRESETS: Final[Mapping[str, Sequence[Plan]]] = {
  "cpu": (
    Plan(
      models=("vim_tiny",),
      sizes=(224, 512, 1248),
      batches=(1,),
      modes=("inference",),
    ),
    Plan(
      models=("vim_tiny", "vmamba_tiny_s1l8", "mambavision_tiny"),
      sizes=(224,),
      batches=(8,),
    ),
  ),
  # The most wanted first: a time limit cuts from the end.
  "gpu": (
    _published("inference", "bfloat16"),
    _large("inference", "bfloat16", (1248, 2048), batch=64),
    _published("training", "bfloat16"),
    _large("inference", "float32", (1248,), batch=64),  # Vim's own setting.
    _published("inference", "float32"),
    _large("inference", "float32", (2048,)),
    _large("inference", "bfloat16", (512, 1024), batch=64),
    _large("inference", "float32", (512, 1024)),
    _large("training", "bfloat16", (1248, 2048, 512, 1024)),
    _published("training", "float32"),
    _large("training", "float32", (1248, 2048, 512, 1024)),
  ),
}


@functools.cache
def parameters(model: str) -> int:
  """How many numbers training changes."""
  return flops.parameters(vimjax.create_model(model), 64)


def baseline(model: str) -> str:
  """The DeiT with the most similar number of parameters."""
  own = math.log(parameters(model))
  return min(BASELINES, key=lambda name: abs(math.log(parameters(name)) - own))


def can_choose_attention(model: str) -> bool:
  """Whether a model has attention, and thus a field that says which."""
  module = vimjax.get_variant(model).module
  return "attention_implementation" in registry.field_names(module)


def groups(plan: Plan) -> list[Group]:
  """The cases of a plan; those of a group belong side by side."""
  found = []
  for dtype, mode, size, batch in itertools.product(
    plan.dtypes, plan.modes, plan.sizes, plan.batches
  ):
    for precision in plan.precisions if dtype == "float32" else (None,):
      shared: dict[str, Any] = dict(
        size=size, batch=batch, mode=mode, dtype=dtype, precision=precision
      )
      group = [Case(model=name, **shared) for name in plan.models]
      # Flash attention takes half precision only.
      flash = plan.flash and dtype == "bfloat16"
      if flash:
        group += [
          Case(model=name, attention="flash", **shared)
          for name in plan.models
          if can_choose_attention(name)
        ]
      for name in sorted({baseline(name) for name in plan.models}):
        for attention in ("materialised", "flash")[: 1 + flash]:
          group.append(Case(model=name, attention=attention, **shared))
      found.append(Group(cases=tuple(group), halve=plan.halve))
  return found
