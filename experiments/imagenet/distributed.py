"""Starting a run in several processes, and ending it in all of them.

Each process gets some of the devices, and all run the same program. They find
each other

* under SLURM, in the tasks of `srun`, by its environment variables;
* in the pods of an indexed Kubernetes Job or JobSet, by asking its API;
* anywhere, by `--coordinator`, `--num_processes` and `--process_id`.

A process that ends takes the others with it, within seconds (`watch.py`). When
it is process 0 that is killed, which serves JAX's own connections, JAX may be
faster and end the others by SIGABRT (134 in a shell).
"""

from collections.abc import Mapping
import dataclasses
import importlib.util
import re
import socket
import time

import jax

from experiments.imagenet import errors, watch

# Variables of a task that `srun` has started; JAX needs all of them.
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
# How long a process that is finished waits for the others.
_SHUTDOWN_SECONDS = 30
# What the errors of JAX say when a collective operation lost a process.
_LOST = re.compile(
  "Gloo|NCCL|Connection closed|Connection reset|Socket closed|heartbeat|"
  "coordination|UNAVAILABLE",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Processes:
  """The processes of a run; all None where the environment tells.

  Attributes:
    coordinator: HOST:PORT on which process 0 waits for the others.
    num_processes: How many there are.
    process_id: Which one this is, from 0.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def find(
  by_hand: Processes, environment: Mapping[str, str]
) -> Processes | None:
  """Whether this is one of several processes, and where the others are.

  Args:
    by_hand: From the three flags.
    environment: The environment variables.

  Returns:
    What `start` takes; None for a single process.

  Raises:
    errors.ConfigError: A flag is missing or wrong, or a package is missing.
  """
  given = dataclasses.asdict(by_hand)
  if by_hand.num_processes == 1:
    return None
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise errors.ConfigError(
      f"Give {' and '.join(missing)} too: several processes need all of "
      "--coordinator=HOST:PORT (of process 0), --num_processes and "
      "--process_id (from 0)."
    )
  if not missing:
    return _checked(by_hand)
  if all(name in environment for name in _SLURM):
    return None if environment["SLURM_NTASKS"] == "1" else by_hand
  if all(name in environment for name in _KUBERNETES):
    if importlib.util.find_spec("kubernetes") is None:
      raise errors.ConfigError(
        "This is a pod of an indexed Kubernetes Job, but the package that "
        "finds the other pods is not installed: pip install kubernetes, or "
        "give --coordinator, --num_processes and --process_id "
        "(--num_processes=1 for a single pod)."
      )
    return by_hand
  return None


def _checked(by_hand: Processes) -> Processes:
  coordinator, count, index = dataclasses.astuple(by_hand)
  if not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise errors.ConfigError(
      f"--coordinator={coordinator} must be HOST:PORT, where process 0 runs."
    )
  if count < 1 or not 0 <= index < count:
    raise errors.ConfigError(
      f"--process_id={index} must be from 0 to --num_processes - 1, and "
      f"--num_processes={count} positive."
    )
  return by_hand


def start(
  processes: Processes, *, connect_seconds: int, heartbeat_seconds: int
) -> watch.Watch:
  """Connects this process to the others; before any other use of JAX.

  Args:
    processes: From `find`.
    connect_seconds: How long to wait for all of them.
    heartbeat_seconds: After so long without a sign of life, a process counts
      as lost.

  Returns:
    By which this process must leave.

  Raises:
    errors.PeerLostError: They cannot be reached in that time.
  """
  # It would take SIGTERM for itself; `agreement.Poll` does the same for all
  # signals, without a service.
  jax.config.update("jax_enable_preemption_service", False)
  if processes.coordinator is not None and processes.process_id:
    _wait_for(processes.coordinator, connect_seconds)
  try:
    jax.distributed.initialize(
      processes.coordinator,
      processes.num_processes,
      processes.process_id,
      initialization_timeout=connect_seconds,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except Exception as error:  # Of JAX, gRPC, or the client of Kubernetes.
    lines = str(error).strip().splitlines()
    raise errors.PeerLostError(
      f"The processes of this run could not be connected within "
      f"{connect_seconds} s: {lines[0] if lines else type(error).__name__}"
    ) from error
  host = (processes.coordinator or "").rpartition(":")[0].strip("[]")
  return watch.start(host or None)


def _wait_for(coordinator: str, seconds: int) -> None:
  """Returns once process 0 listens; JAX ends the process if it never does."""
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + seconds
  while True:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline:
        raise errors.PeerLostError(
          f"--coordinator={coordinator} cannot be reached ({error}) within "
          f"{seconds} s. Is process 0 running there, on a port that no "
          "firewall closes?"
        ) from error
    time.sleep(0.2)


def lost_peer(error: BaseException | None) -> bool:
  """Whether an error comes from a process that is gone."""
  while error is not None:
    if isinstance(error, errors.PeerLostError):
      return True
    if isinstance(error, jax.errors.JaxRuntimeError):
      several = jax.distributed.is_initialized()
      return several and bool(_LOST.search(str(error)))
    error = error.__cause__ or error.__context__
  return False
