"""How much memory a run takes."""

import pathlib
import resource

import jax


def usage() -> dict[str, int]:
  """Memory of this process, in bytes.

  Returns:
    "peak_device_memory": the most that was in use on one of its devices since
    the process started, where the backend counts it. On CPUs, where arrays lie
    in the process, "process_memory": what is resident now (without worker
    processes). Nothing where neither is known.
  """
  devices = jax.local_devices()
  counted = [d.memory_stats() or {} for d in devices]
  peaks = [c["peak_bytes_in_use"] for c in counted if "peak_bytes_in_use" in c]
  if peaks:
    return {"peak_device_memory": max(peaks)}
  if devices[0].platform != "cpu":
    return {}
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:  # Linux has it.
    return {}
  return {"process_memory": pages * resource.getpagesize()}
