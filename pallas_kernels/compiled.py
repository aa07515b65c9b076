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
from collections.abc import Callable
import ctypes
import dataclasses
import importlib
import importlib.util
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any, Final

import jax
from jax.extend.mlir import ir

from pallas_kernels import compiled_sass

_COMPILERS = ("cc", "gcc", "clang")

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

# Of a streaming multiprocessor of compute capability 9.0 and 10.x.
_REGISTERS: Final = 65_536
_SHARED_MEMORY: Final = 233_472
_WARPS: Final = 64
# Each block has this much shared memory taken from it.
_RESERVED_SHARED_MEMORY: Final = 1024
_WARP: Final = 32
_REGISTER_UNIT: Final = 256  # Registers are handed to warps in such units.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
  """How a kernel is started.

  Attributes:
    name: The name that it was given.
    blocks: Blocks of the grid.
    threads: Threads of a block.
    shared_memory: Bytes of shared memory of a block.
    bytes_accessed: Size of all its arguments and results.
  """

  name: str
  blocks: int
  threads: int
  shared_memory: int
  bytes_accessed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """A compiled kernel.

  Attributes:
    launch: How it is started.
    registers: Registers of a thread.
    spill_bytes: Bytes that a thread spills, stores and loads together.
    opcodes: How often each instruction occurs, as in `compiled_sass.Loop`.
    loops: Its loops, innermost ones included.
  """

  launch: Launch
  registers: int
  spill_bytes: int
  opcodes: collections.Counter[str]
  loops: tuple[compiled_sass.Loop, ...]

  @property
  def blocks_per_multiprocessor(self) -> int:
    """How many blocks fit on a streaming multiprocessor at a time."""
    warps = -(-self.launch.threads // _WARP)
    unit = _REGISTER_UNIT
    registers = -(-self.registers * _WARP // unit) * unit * warps
    shared_memory = self.launch.shared_memory + _RESERVED_SHARED_MEMORY
    return min(
      _REGISTERS // registers, _SHARED_MEMORY // shared_memory, _WARPS // warps
    )


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
  lowered = lowered_kernels(function, *args)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for i, (_, module) in enumerate(lowered):
      (folder / str(i)).mkdir()
      (folder / str(i) / "module").write_bytes(module)
    result = subprocess.run(
      [sys.executable, "-m", __name__, name],
      env=_environment(folder, capability),
      capture_output=True,
      text=True,
      check=False,
    )
    if result.returncode:
      raise RuntimeError(f"The compiler failed:\n{result.stderr[-4000:]}")
    return [
      _read(launch, folder / str(i)) for i, (launch, _) in enumerate(lowered)
    ]


def lowered_kernels(
  function: Callable[..., Any], *args: Any
) -> list[tuple[Launch, bytes]]:
  """The Mosaic GPU kernels of a function lowered for CUDA, in order.

  Returns:
    For each how it is started, and its module.
  """
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
  module: Any = lowered.compiler_ir()
  found = []
  with module.context as context:
    context.allow_unregistered_dialects = True  # Mosaic's stable form.
    for call in _operations(module.operation, "stablehlo.custom_call"):
      attributes = call.attributes
      if "mosaic_gpu" in attributes["call_target_name"].value:
        config = attributes["mhlo.backend_config"]
        code = config["module"].value_bytes
        arrays = (*call.operands, *call.results)
        found.append((_launch(code, sum(map(_size, arrays))), code))
  return found


def _launch(code: bytes, bytes_accessed: int) -> Launch:
  """How a module starts its one kernel."""
  module: Any = ir.Module.parse(code)
  (launch,) = _operations(module.operation, "stable_mosaic_gpu.gpu.launch")
  # After a token: the grid's three sizes, the block's, and shared memory.
  numbers = [
    x.owner.attributes["value"].value for x in list(launch.operands)[1:8]
  ]
  return Launch(
    name=module.operation.attributes["sym_name"].value,
    blocks=math.prod(numbers[:3]),
    threads=math.prod(numbers[3:6]),
    shared_memory=numbers[6],
    bytes_accessed=bytes_accessed,
  )


def _operations(operation: Any, name: str) -> list[Any]:
  """The operations of this name inside an operation."""
  found = [operation] if operation.name == name else []
  for region in operation.regions:
    for block in region.blocks:
      for child in block.operations:
        found += _operations(child.operation, name)
  return found


def _size(value: Any) -> int:
  """Bytes of an array in a lowered program."""
  kind: Any = ir.RankedTensorType(value.type)
  return math.prod(kind.shape) * kind.element_type.width // 8


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


def _environment(
  folder: pathlib.Path, capability: tuple[int, int]
) -> dict[str, str]:
  """The environment of the child process that compiles."""
  env = dict(os.environ)
  if not _has_driver():
    source = folder / "stub.c"
    source.write_text(_STUB)
    compiler = next(filter(None, map(shutil.which, _COMPILERS)))
    library = folder / "libcuda.so.1"
    subprocess.run(
      [compiler, "-shared", "-fPIC", "-o", str(library), str(source)],
      check=True,
    )
    env["LD_LIBRARY_PATH"] = os.pathsep.join(
      filter(None, [str(folder), env.get("LD_LIBRARY_PATH")])
    )
  root = _cuda_root()
  if root is not None:
    env["PATH"] = os.pathsep.join([str(root / "bin"), env["PATH"]])
    env["MOSAIC_GPU_CUDA_ROOT"] = str(root)
  major, minor = capability
  env["STUB_CAPABILITY"] = str(10 * major + minor)
  env.update({f"MOSAIC_GPU_DUMP_{x}": "1" for x in ("PTXAS", "SASS_CTRL")})
  env["JAX_PLATFORMS"] = "cpu"
  env["PYTHONPATH"] = os.pathsep.join(sys.path)
  return env


def _compile_all(folder: pathlib.Path) -> None:
  """Compiles the module in each folder inside this one; it gets the dumps."""
  plugin = importlib.import_module("jax_plugins.xla_cuda13")
  library = ctypes.CDLL(str(plugin._get_library_path()))
  compile_module = library.MosaicGpuCompile
  compile_module.argtypes = [ctypes.c_char_p, ctypes.c_int]
  compile_module.restype = ctypes.c_void_p
  for path in sorted(folder.glob("*/module")):
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(path.parent)
    module = path.read_bytes()
    if not compile_module(module, len(module)):
      raise RuntimeError(f"MosaicGpuCompile failed for {path.parent.name}.")


def _read(launch: Launch, folder: pathlib.Path) -> Kernel:
  """The kernel whose dumps are in a folder."""
  (sass,) = folder.glob("*.sass_ctrl")
  report = sass.with_suffix(".ptxas").read_text(errors="replace")
  opcodes, loops = compiled_sass.parse(sass.read_text(errors="replace"))
  return Kernel(
    launch=launch,
    registers=max(map(int, re.findall(r"[Uu]sed (\d+) registers", report))),
    spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
    opcodes=opcodes,
    loops=loops,
  )


if __name__ == "__main__":
  _compile_all(pathlib.Path(sys.argv[1]))
