"""What a Mosaic GPU kernel is compiled to, read on a machine without a GPU.

`kernels(function, *args)` lowers a function for CUDA, compiles its Mosaic GPU
kernels with the compiler inside JAX's CUDA plugin, and returns registers,
spills, shared memory and machine instructions, loop by loop. `missing()` says
what has to be installed for that.

The plugin asks the driver for one thing, the compute capability. Where there
is no driver, a stub of twelve functions answers; it is compiled on the spot,
and found through the library path of a child process.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax

_COMPILERS = ("cc", "gcc", "clang")

# Names the loop that a branch closes; a label otherwise.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*$")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")

_STUB = r"""
#include <stdlib.h>
typedef int R;
static int capability(void) { return atoi(getenv("STUB_CAPABILITY")); }
R cuInit(unsigned f) { return 0; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuCtxGetDevice(int *d) { *d = 0; return 0; }
R cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? capability() / 10 : a == 76 ? capability() % 10 : 0;
  return 0;
}
R cuGetErrorString(R e, const char **s) { *s = "stub"; return 0; }
R cuGetErrorName(R e, const char **s) { *s = "stub"; return 0; }
R cuModuleLoadData(void **m, const void *d) { *m = (void *)1; return 0; }
R cuModuleGetFunction(void **f, void *m, const char *n) {
  *f = (void *)1;
  return 0;
}
R cuModuleUnload(void *m) { return 0; }
R cuFuncSetAttribute(void *f, int a, int v) { return 0; }
"""


@dataclasses.dataclass(frozen=True)
class Loop:
  """The instructions of a loop, those of loops inside it included.

  Attributes:
    start: Index of its first instruction in the kernel.
    opcodes: How often each instruction occurs, without modifiers ("FFMA");
      of the special function unit with the function ("MUFU.EX2").
  """

  start: int
  opcodes: collections.Counter[str]

  @property
  def instructions(self) -> int:
    return self.opcodes.total()


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A compiled kernel.

  Attributes:
    name: The name that it was given.
    registers: Registers of a thread.
    spill_bytes: Bytes that a thread spills, stores and loads together.
    shared_memory: Bytes of shared memory of a block.
    opcodes: How often each instruction occurs, as in `Loop`.
    loops: Its loops, innermost ones included.
  """

  name: str
  registers: int
  spill_bytes: int
  shared_memory: int
  opcodes: collections.Counter[str]
  loops: tuple[Loop, ...]


def missing() -> str | None:
  """What to install before `kernels` can run here; None if nothing."""
  wanted = []
  if not _is_installed("jax_plugins.xla_cuda13"):
    wanted.append("pip install 'jax[cuda13]'")
  if _disassembler() is None:
    wanted.append("pip install nvidia-cuda-nvdisasm")
  if not _has_driver() and not any(map(shutil.which, _COMPILERS)):
    wanted.append("a C compiler (cc, gcc or clang)")
  return ", ".join(wanted) or None


def kernels(
  function: Callable[..., Any], *args: Any, capability: tuple[int, int] = (9, 0)
) -> list[Kernel]:
  """Compiles the Mosaic GPU kernels that `function(*args)` runs.

  Args:
    function: What to lower; call it where `dispatch.target_device()` is the
      GPU, as under `jax.sharding.use_abstract_mesh`.
    *args: Arrays or `jax.ShapeDtypeStruct`s.
    capability: Compute capability to compile for.

  Raises:
    RuntimeError: Something is missing here, or the compiler failed.
  """
  if wanted := missing():
    raise RuntimeError(f"Compiling needs more to be installed: {wanted}.")
  with tempfile.TemporaryDirectory() as folder:
    with _dumping_to(folder):
      modules = lowered_modules(function, *args)
    for i, module in enumerate(modules):
      pathlib.Path(folder, f"{i:03}.module").write_bytes(module)
    result = subprocess.run(
      [sys.executable, "-m", __name__, folder],
      env=_environment(folder, capability),
      capture_output=True,
      text=True,
      check=False,
    )
    if result.returncode:
      raise RuntimeError(f"The compiler failed:\n{result.stderr[-4000:]}")
    # Lowering and compiling number their dumps apart, both in order.
    reports = zip(
      _by_age(folder, "*.sass_ctrl"),
      _by_age(folder, "*.resources.txt"),
      strict=True,
    )
    return [_read(*files) for files in reports]


def lowered_modules(function: Callable[..., Any], *args: Any) -> list[bytes]:
  """The Mosaic GPU modules of a function lowered for CUDA, in order."""
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
  module: Any = lowered.compiler_ir()
  found = []

  def visit(operation):
    if operation.name == "stablehlo.custom_call":
      attributes = operation.attributes
      if "mosaic_gpu" in attributes["call_target_name"].value:
        config = attributes["mhlo.backend_config"]
        found.append(config["module"].value_bytes)
    for region in operation.regions:
      for block in region.blocks:
        for child in block.operations:
          visit(child.operation)

  with module.context:
    visit(module.operation)
  return found


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # Its parent package is missing.
    return False


def _cuda_root() -> pathlib.Path | None:
  """The folder of the wheels with NVIDIA's tools."""
  if not _is_installed("nvidia.cu13"):
    return None
  spec = importlib.util.find_spec("nvidia.cu13")
  locations = None if spec is None else spec.submodule_search_locations
  return pathlib.Path(next(iter(locations))) if locations else None


def _disassembler() -> str | None:
  root = _cuda_root()
  path = os.pathsep.join(
    [*([str(root / "bin")] if root else []), os.environ.get("PATH", "")]
  )
  return shutil.which("nvdisasm", path=path)


def _has_driver() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return False
  return True


def _environment(folder: str, capability: tuple[int, int]) -> dict[str, str]:
  """The environment of the child process that compiles."""
  env = dict(os.environ)
  if not _has_driver():
    source = pathlib.Path(folder, "stub.c")
    source.write_text(_STUB)
    compiler = next(filter(None, map(shutil.which, _COMPILERS)))
    library = pathlib.Path(folder, "libcuda.so.1")
    subprocess.run(
      [compiler, "-shared", "-fPIC", "-o", str(library), str(source)],
      check=True,
    )
    env["LD_LIBRARY_PATH"] = os.pathsep.join(
      filter(None, [folder, env.get("LD_LIBRARY_PATH")])
    )
  root = _cuda_root()
  if root is not None:
    env["PATH"] = os.pathsep.join([str(root / "bin"), env["PATH"]])
    env["MOSAIC_GPU_CUDA_ROOT"] = str(root)
  major, minor = capability
  env["STUB_CAPABILITY"] = str(10 * major + minor)
  env.update(_dump_options(folder))
  env["JAX_PLATFORMS"] = "cpu"
  env["PYTHONPATH"] = os.pathsep.join(sys.path)
  return env


def _dump_options(folder: str) -> dict[str, str]:
  """Settings that make the compiler leave its reports in a folder."""
  kinds = ("PTXAS", "SASS_CTRL", "RESOURCES")
  return {
    "MOSAIC_GPU_DUMP_TO": folder,
    **{f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in kinds},
  }


@contextlib.contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
  """Lowering, too, reads those settings from the environment."""
  before = {name: os.environ.get(name) for name in _dump_options(folder)}
  os.environ.update(_dump_options(folder))
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _compile_all(folder: pathlib.Path) -> None:
  """Compiles each module in a folder, in order; the dumps go there, too."""
  import jax_plugins.xla_cuda13 as plugin

  library = ctypes.CDLL(str(plugin._get_library_path()))
  compile_module = library.MosaicGpuCompile
  compile_module.argtypes = [ctypes.c_char_p, ctypes.c_int]
  compile_module.restype = ctypes.c_void_p
  for path in sorted(folder.glob("*.module")):
    module = path.read_bytes()
    if not compile_module(module, len(module)):
      raise RuntimeError(f"MosaicGpuCompile failed for kernel {path.stem}.")


def _by_age(folder: str, pattern: str) -> list[pathlib.Path]:
  files = pathlib.Path(folder).glob(pattern)
  return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def _read(sass: pathlib.Path, resources: pathlib.Path) -> Kernel:
  """The kernel with this disassembly and these resources."""
  report = sass.with_suffix(".ptxas").read_text(errors="replace")
  shared = resources.read_text()
  opcodes, loops = _parse(sass.read_text(errors="replace").splitlines())
  return Kernel(
    name=re.sub(r"_\d+$", "", sass.stem),
    registers=max(map(int, re.findall(r"[Uu]sed (\d+) registers", report))),
    spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
    shared_memory=sum(
      map(int, re.findall(r"smem_scratch_bytes=(\d+)", shared))
    ),
    opcodes=opcodes,
    loops=loops,
  )


def _parse(
  lines: Sequence[str],
) -> tuple[collections.Counter[str], tuple[Loop, ...]]:
  """The instructions and the loops of a disassembly."""
  instructions, labels = [], {}
  for line in lines:
    if match := _INSTRUCTION.search(line):
      instructions.append(match.group(2))
    elif match := _LABEL.match(line):
      labels[match.group(1)] = len(instructions)
  opcodes = [_opcode(text) for text in instructions]
  loops = []
  for end, text in enumerate(instructions):
    match = _BRANCH.search(text)
    start = labels.get(match.group(1), end) if match else end
    body = opcodes[start : end + 1]
    # Code after the end of the kernel, for barriers that have to wait, jumps
    # back too; and a kernel ends by jumping to itself.
    if start < end and "EXIT" not in body:
      loops.append(Loop(start, collections.Counter(body)))
  return collections.Counter(opcodes), tuple(loops)


def _opcode(text: str) -> str:
  name, *modifiers = _PREDICATE.sub("", text).split()[0].split(".")
  return f"{name}.{modifiers[0]}" if name == "MUFU" else name


if __name__ == "__main__":
  _compile_all(pathlib.Path(sys.argv[1]))
