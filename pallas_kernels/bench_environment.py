"""What measurements on a GPU depend on beside the code and JAX's version."""

from collections.abc import Callable
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import time
from typing import Final

# Of what compiles for the GPU, and runs there.
_PACKAGES: Final = (
  "jax-cuda13-plugin",
  "jax-cuda13-pjrt",
  "nvidia-cudnn-cu13",
)
_SECONDS: Final = 10  # More than nvidia-smi ever takes.


def commit() -> str:
  """The commit that is checked out; "+" if files of it were changed.

  Where there is no repository, what the variable GIT_COMMIT says.
  """
  folder = pathlib.Path(__file__).parent
  git = lambda *words: _output(["git", "-C", str(folder), *words])
  head = git("rev-parse", "--short=12", "HEAD")
  if not head:
    return os.environ.get("GIT_COMMIT", "unknown")
  changed = git("status", "--porcelain", "--untracked-files=no")
  return head + ("+" if changed else "")


def source_digest() -> str:
  """That of this package's code and tuning tables."""
  folder = pathlib.Path(__file__).parent
  return digest(folder, "**/*.py", "**/tuning_*.json")


def digest(folder: pathlib.Path, *patterns: str) -> str:
  """Of names and contents of files: whether two folders have the same."""
  found = hashlib.sha256()
  for path in sorted(x for name in patterns for x in folder.glob(name)):
    found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
  return found.hexdigest()[:12]


def gpu_facts() -> dict[str, str]:
  """The driver, the clocks, the code, and the settings of JAX on a GPU."""
  facts = {"commit": commit(), "source": source_digest()}
  query = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
  values = _smi_line(_output(_smi(*query)))
  facts |= zip(("driver", *query[1:]), values, strict=False)
  for package in _PACKAGES:
    try:
      facts[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      facts[package] = "not from a wheel"
  for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    facts[name] = os.environ.get(name, "")
  return facts


def sm_clock_hz(busy: Callable[[], object]) -> float | None:
  """The clock of the first GPU's multiprocessors while it works.

  Args:
    busy: Keeps the GPU busy for some milliseconds; called until the clock is
      read.

  Returns:
    None if nvidia-smi is missing or does not say.
  """
  try:
    process = subprocess.Popen(
      _smi("clocks.sm"),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
  except OSError:
    return None
  with process:
    end = time.monotonic() + _SECONDS
    while process.poll() is None:
      busy()
      if time.monotonic() > end:
        process.kill()
    text = process.stdout.read() if process.stdout else ""
  (value, *_) = _smi_line(text) or ["?"]
  try:
    return 1e6 * float(value.removesuffix("MHz"))
  except ValueError:  # "[N/A]"
    return None


def _smi(*names: str) -> list[str]:
  return [
    "nvidia-smi",
    f"--query-gpu={','.join(names)}",
    "--format=csv,noheader",
  ]


def _smi_line(text: str) -> list[str]:
  """The values of the first GPU; empty if there is none."""
  line = (text.splitlines() or [""])[0]
  return [value.strip() for value in line.split(",")] if line else []


def _output(command: list[str]) -> str:
  """What a command prints; nothing if it is missing or fails."""
  try:
    result = subprocess.run(
      command, capture_output=True, text=True, timeout=_SECONDS, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return result.stdout.strip()
