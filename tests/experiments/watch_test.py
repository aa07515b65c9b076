"""What a process does when its connection to another one tells of an end."""

import json
import socket
import threading

import pytest

from experiments.imagenet import watch


@pytest.fixture
def ended(monkeypatch):
  """Exit codes, instead of the end of this process."""
  codes, event = [], threading.Event()

  def end(code):
    codes.append(code)
    event.set()

  monkeypatch.setattr(watch.os, "_exit", end)
  monkeypatch.setattr(watch, "_LOST_SECONDS", 0.01)
  monkeypatch.setattr(watch, "_GRACE_SECONDS", 0.01)
  monkeypatch.setattr(watch, "_LAST_SECONDS", 0.01)
  return codes, event


@pytest.fixture
def connected():
  """Process 0's watch of two others, and their ends of the connections."""
  pairs = [socket.socketpair() for _ in range(2)]
  ours, theirs = zip(*pairs, strict=True)
  one = watch.Watch([(i + 1, x) for i, x in enumerate(ours)])
  yield one, theirs
  for x in (*ours, *theirs):
    x.close()
  for thread in one._threads:
    thread.join()


def _say(peer, code, message):
  said = {"code": code, "message": message}
  peer.sendall(f"{json.dumps(said)}\n".encode())


def _hear(peer):
  return json.loads(peer.recv(1000).decode().splitlines()[0])


def test_an_error_of_one_process_ends_this_one_and_is_passed_on(
  connected, ended, capsys
):
  _, (one, two) = connected
  _say(one, 74, "Process 1: no space left")
  assert ended[1].wait(30)
  assert ended[0] == [74]
  assert _hear(two) == {"code": 74, "message": "Process 1: no space left"}
  assert "error: Process 1: no space left" in capsys.readouterr().err


def test_a_broken_connection_is_a_lost_process(connected, ended, capsys):
  _, (one, two) = connected
  two.close()
  assert ended[1].wait(30)
  assert ended[0] == [76]
  assert _hear(one)["code"] == 76
  assert "Process 2 of this run has ended without" in capsys.readouterr().err


def test_a_finished_process_ends_no_other(connected, ended):
  one, peers = connected
  for peer in peers:
    _say(peer, 0, "finished")
  for thread in one._threads:
    thread.join(30)
    assert not thread.is_alive()
  assert ended[0] == []


def test_a_process_that_leaves_says_why_and_listens_to_nobody(
  connected, ended, capsys
):
  one, peers = connected
  one.leave(65, "Step 3 is not finite")
  assert ended[0] == [65]
  for peer in peers:
    said = {"code": 65, "message": "Process 0: Step 3 is not finite"}
    assert _hear(peer) == said
    peer.close()
  for thread in one._threads:
    thread.join(30)
  assert ended[0] == [65]
  assert capsys.readouterr().err == ""
