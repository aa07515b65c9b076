"""Optional dependencies: import late, and say which extra is missing."""

import importlib
import types


def require(module: str, *, extra: str) -> types.ModuleType:
  """Imports an optional dependency, or says how to install it.

  Args:
    module: Full module name, such as "PIL.Image".
    extra: The extra of this distribution that brings the module.

  Returns:
    The imported module.

  Raises:
    ModuleNotFoundError: `module` is not installed; the message names the
      extra. An error inside an installed module is raised as it is.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    root = module.partition(".")[0]
    if error.name is None or error.name.partition(".")[0] != root:
      raise
    raise ModuleNotFoundError(
      f"This needs the package `{root}`, which is not installed. Install it "
      f"with: pip install 'vimjax[{extra}]'",
      name=error.name,
    ) from None
