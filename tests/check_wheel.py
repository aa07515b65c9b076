"""Checks what a wheel holds: `python tests/check_wheel.py FILE.whl`."""

import pathlib
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("vimjax", "pallas_kernels")
DATA_SUFFIXES = (".py", ".typed", ".json")


def _tracked() -> set[str]:
  listing = subprocess.run(
    ["git", "ls-files", *PACKAGES],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  files = listing.stdout.split()
  return {name for name in files if name.endswith(DATA_SUFFIXES)}


def problems(wheel: str) -> list[str]:
  """What is missing from `wheel`, and what should not be in it."""
  names = zipfile.ZipFile(wheel).namelist()
  content = {n for n in names if ".dist-info/" not in n}
  found = [f"missing: {name}" for name in sorted(_tracked() - content)]
  found += [f"extra: {name}" for name in sorted(content - _tracked())]
  for package in PACKAGES:
    if f"{package}/py.typed" not in content:
      found.append(f"missing: {package}/py.typed")
  if not any(name.endswith("licenses/LICENSE") for name in names):
    found.append("missing: LICENSE")
  return found


if __name__ == "__main__":
  issues = problems(sys.argv[1])
  if issues:
    sys.exit("\n".join([f"{sys.argv[1]}:", *issues]))
  print(f"{sys.argv[1]}: content is right")
