"""Models by name: `create_model`, `list_models`, `get_variant`."""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import fnmatch
from typing import Any, Final

from flax import linen as nn

from vimjax import variants
from vimjax.models import deit, mambavision, vim, vmamba


def merge(
  families: Iterable[Mapping[str, variants.Variant]],
) -> dict[str, variants.Variant]:
  """One table of all families.

  Raises:
    ValueError: A name occurs twice.
  """
  table = {}
  for family in families:
    for name, variant in family.items():
      if name in table:
        raise ValueError(f"Two models have the name {name!r}.")
      table[name] = variant
  return table


_VARIANTS: Final = merge(
  [vim.VARIANTS, vmamba.VARIANTS, mambavision.VARIANTS, deit.VARIANTS]
)


def list_models(pattern: str = "*") -> list[str]:
  """Names of all models that match a shell pattern such as "vim_*"."""
  return fnmatch.filter(sorted(_VARIANTS), pattern)


def get_variant(name: str) -> variants.Variant:
  """What is known about a model.

  Args:
    name: One of `list_models()`.

  Raises:
    ValueError: There is no such model; the message has the nearest names.
  """
  if name in _VARIANTS:
    return _VARIANTS[name]
  near = difflib.get_close_matches(name, _VARIANTS, n=3)
  hint = f"Did you mean {near}?" if near else f"Choose from {list_models()}."
  raise ValueError(f"Unknown model {name!r}. {hint}")


def create_model(name: str, **overrides: Any) -> nn.Module:
  """Builds a published model.

  Linen keeps a model and its variables apart: `model.init` makes new variables,
  `vimjax.convert_state_dict` those of an official checkpoint.

  Args:
    name: One of `list_models()`.
    **overrides: Fields of the module, instead of the published values, such as
      num_classes=10 or dtype="bfloat16".

  Returns:
    A Flax linen module.

  Raises:
    ValueError: There is no such model, or a value is not possible.
    TypeError: The module has no such field; the message lists them.
  """
  variant = get_variant(name)
  fields = field_names(variant.module)
  unknown = sorted(set(overrides) - set(fields))
  if unknown:
    raise TypeError(
      f"{variant.module.__name__} ({name!r}) has no field {unknown}; fields "
      f"are {fields}."
    )
  return variant.module(**{**variant.fields, **with_tuples(overrides)})


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The same with tuples for lists.

  JSON and command lines have lists, which nothing hashable can have.
  """
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def any_model(module: type[nn.Module]) -> Any:
  """Some published model of a family."""
  names = (name for name in _VARIANTS if _VARIANTS[name].module is module)
  return create_model(next(names))


def with_scan_layers(model: Any, scan: bool) -> Any:
  """The model with its layers scanned, or one by one, if it has the choice."""
  if "scan_layers" in field_names(type(model)):
    return model.clone(scan_layers=scan)
  return model


def field_names(module: type[nn.Module]) -> list[str]:
  """Fields of a module that make up its configuration."""
  # Linen adds `parent` and `name`, which place a module inside another.
  own = (field.name for field in dataclasses.fields(module))
  return [name for name in own if name not in ("parent", "name")]
