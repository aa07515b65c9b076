"""What is left of the log where a file cannot be written."""

import logging
import sys

import pytest

from experiments.imagenet import quiet

_FAILED_WRITES = [
  OSError(28, "No space left on device"),
  ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"),
]


@pytest.fixture
def printed(monkeypatch):
  """Arguments of the hook that prints errors which nobody can catch."""
  lost = []
  monkeypatch.setattr(sys, "unraisablehook", lost.append)
  return lost


@pytest.fixture
def log(printed):
  """A log, with its filter, as `install` leaves absl's."""
  from absl import logging as absl_logging

  handler = absl_logging.get_absl_handler()
  before = list(handler.filters)
  quiet.install()
  (added,) = (f for f in handler.filters if f not in before)
  yield added
  handler.removeFilter(added)


def _record(name, error):
  exc_info = (type(error), error, None)
  return logging.makeLogRecord(
    {"name": name, "levelno": logging.ERROR, "msg": "x", "exc_info": exc_info}
  )


@pytest.mark.parametrize("error", _FAILED_WRITES, ids=["python", "tensorstore"])
def test_failed_writes_are_logged_in_one_line_and_not_by_asyncio(log, error):
  record = _record("absl", error)
  assert log(record)
  assert logging.Formatter().format(record) == "x"
  assert not log(_record("asyncio", error))


def test_other_errors_are_logged_as_ever(log):
  for name in ("absl", "asyncio"):
    record = _record(name, ValueError("a defect"))
    assert log(record)
    assert "ValueError: a defect" in logging.Formatter().format(record)
  assert log(logging.makeLogRecord({"name": "asyncio", "msg": "slow"}))


def _lose(error):
  class Loses:
    def __del__(self):
      raise error

  Loses()


def test_only_a_closed_event_loop_is_not_printed(log, printed):
  _lose(RuntimeError("Event loop is closed"))
  assert not printed
  _lose(RuntimeError("a defect"))
  (lost,) = printed
  assert str(lost.exc_value) == "a defect"
