"""Tells every process of a run, within seconds, that another one has ended.

JAX notices by a heartbeat, after minutes, and then cannot say why. Here each
process keeps a connection to process 0, which passes on what it hears: the exit
code and the message of a process that fails, or that a connection broke, as it
does when a process is killed. Then all end with that code.
"""

from collections.abc import Sequence
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import NoReturn

from absl import logging
import jax

from experiments.imagenet import agreement, errors

# How long a process that hears of another's end may go on, to end by itself
# (most errors are met by all, and a checkpoint may be under way).
_GRACE_SECONDS = 10.0
# The same where a process is gone, without which nothing can be finished.
_LOST_SECONDS = 2.0
# Process 0 serves JAX's own connections, without which the others abort: it
# goes last.
_LAST_SECONDS = 5.0
_CONNECT_SECONDS = 30.0


class Watch:
  """The connections of this process; threads listen to them."""

  def __init__(self, peers: Sequence[tuple[int, socket.socket]]):
    """Starts to listen.

    Args:
      peers: Number and connection: in process 0 of all others, in these of
        process 0; none where they could not be made.
    """
    self._ending = threading.Event()
    self._first = threading.Lock()
    self._peers = [peer for _, peer in peers]
    self._threads = [
      threading.Thread(target=self._listen, args=peer, daemon=True)
      for peer in peers
    ]
    for thread in self._threads:
      thread.start()

  def _listen(self, number: int, peer: socket.socket) -> None:
    try:
      with peer.makefile() as file:
        line = file.readline()
    except OSError:
      line = ""
    if not line:
      said = {
        "code": errors.ExitCode.PEER_LOST,
        "message": f"Process {number} of this run has ended without a word "
        "(killed, or out of reach). Start all processes again to go on from "
        "the last checkpoint.",
      }
      self._end(said, _LOST_SECONDS)
      return
    said = json.loads(line)
    if said["code"]:
      self._end(said, _GRACE_SECONDS)

  def _end(self, said: dict, seconds: float) -> None:
    """Ends this process unless it does so by itself in the given time."""
    if self._ending.is_set() or not self._first.acquire(blocking=False):
      return
    self._tell(said)
    if not self._ending.wait(seconds):
      errors.tell(said["message"])
      self._exit(said["code"])

  def _tell(self, said: dict) -> None:
    for peer in self._peers:
      try:
        peer.sendall(f"{json.dumps(said)}\n".encode())
      except OSError:
        continue  # It is gone already.

  def leave(self, code: int, message: str) -> NoReturn:
    """Ends this process, and the others if there was an error.

    Args:
      code: The exit code.
      message: What they say of it.
    """
    self._ending.set()
    message = f"Process {jax.process_index()}: {message}"
    self._tell({"code": code, "message": message})
    if not code or not self._peers:
      try:
        jax.distributed.shutdown()  # Waits for the others, for a while.
      except RuntimeError as error:
        print(f"while ending: {error}", file=sys.stderr)
    self._exit(code)

  def _exit(self, code: int) -> NoReturn:
    if not jax.process_index():
      deadline = time.monotonic() + _GRACE_SECONDS + _LAST_SECONDS
      for thread in self._threads:
        if thread is not threading.current_thread():
          thread.join(max(0.0, deadline - time.monotonic()))
      if self._threads:
        time.sleep(0.5)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: JAX would wait once more for processes that are gone.
    os._exit(code)


def start(host: str | None) -> Watch:
  """Connects all processes to process 0; each of them calls it.

  Args:
    host: The name of process 0's machine, if known.

  Returns:
    The connections. If any cannot be made, a warning says that only JAX's
    heartbeat is left.
  """
  count, index = jax.process_count(), jax.process_index()
  listener = None if index else socket.create_server(("", 0), backlog=count)
  offer = None
  if listener is not None:
    port, token = listener.getsockname()[1], secrets.token_hex(16)
    offer = [port, token, _names(host)]
  port, token, names = agreement.gather(offer)[0]
  if listener is None:
    peers = _connect(names, port, f"{token} {index}\n")
  else:
    with listener:
      peers = _accept(listener, count - 1, token)
  complete = len(peers) == (1 if index else count - 1)
  if not all(agreement.gather(complete)):
    logging.warning(
      "Processes cannot connect to process 0 at any of %s, port %d: only the "
      "heartbeat will tell that one has ended.",
      names,
      port,
    )
    peers = []
  return Watch(peers)


def _names(host: str | None) -> list[str]:
  """By which the other machines may know this one."""
  name = socket.gethostname()
  try:
    address = [socket.gethostbyname(name)]
  except OSError:
    address = []
  return [x for x in (host, name, socket.getfqdn(), *address) if x]


def _connect(
  names: Sequence[str], port: int, hello: str
) -> list[tuple[int, socket.socket]]:
  for name in names:
    try:
      peer = socket.create_connection((name, port), timeout=5.0)
    except OSError:
      continue
    peer.settimeout(None)
    peer.sendall(hello.encode())
    return [(0, peer)]
  return []


def _accept(
  listener: socket.socket, count: int, token: str
) -> list[tuple[int, socket.socket]]:
  peers = []
  deadline = time.monotonic() + _CONNECT_SECONDS
  while len(peers) < count and time.monotonic() < deadline:
    listener.settimeout(max(0.1, deadline - time.monotonic()))
    try:
      peer, _ = listener.accept()
      peer.settimeout(5.0)
      # No more than the line, which is short: the rest is the thread's.
      said = peer.recv(100).decode("ascii", "replace").split()
    except OSError:
      continue
    if len(said) != 2 or not secrets.compare_digest(said[0], token):
      peer.close()
      continue
    peer.settimeout(None)
    peers.append((int(said[1]), peer))
  return peers
