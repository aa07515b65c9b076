"""Configurations by name: `--config vim_tiny` instead of a file's path."""

from collections.abc import Sequence
import difflib
import pathlib

from experiments.imagenet import recipes

# The file that makes a configuration of a recipe.
_RECIPE = "_recipe.py"


class UnknownConfigError(ValueError):
  """No configuration has this name; the message lists those that exist."""


def list_configs(folder: pathlib.Path) -> list[str]:
  """All names of configurations, sorted: recipes, and files in `folder`."""
  files = [p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")]
  return sorted([*files, *recipes.RECIPES])


def resolve(argv: Sequence[str], folder: pathlib.Path) -> list[str]:
  """Replaces the name after `--config` by what ml_collections wants.

  That is a path, and after a colon an argument: the model, for a recipe.

  Both `--config NAME` and `--config=NAME` are understood. A name may carry an
  argument (`vim_tiny:smoke`), and a path to an existing file stays as it is.

  Args:
    argv: The command line, program name included.
    folder: Where the other configurations are, one file each.

  Returns:
    The command line with the path in place of the name.

  Raises:
    UnknownConfigError: There is neither such a name nor such a file.
  """
  out = list(argv)
  for i, arg in enumerate(out):
    flag, equals, value = arg.partition("=")
    if flag not in ("-config", "--config"):
      continue
    if equals:
      out[i] = f"{flag}={_path(value, folder)}"
    elif i + 1 < len(out):
      out[i + 1] = _path(out[i + 1], folder)
    break
  return out


def _path(value: str, folder: pathlib.Path) -> str:
  name, colon, argument = value.partition(":")
  names = list_configs(folder)
  if name in recipes.RECIPES:
    return f"{folder / _RECIPE}:{value}"
  if name in names:
    return f"{folder / name}.py{colon}{argument}"
  if name.endswith(".py") and pathlib.Path(name).is_file():
    return value
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise UnknownConfigError(
    f"There is no configuration {name!r}.{hint} Choose from "
    f"{', '.join(names)}, or give the path of a .py file."
  )
