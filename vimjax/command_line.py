"""What the commands of this package share."""

import argparse
from collections.abc import Iterator
import contextlib
import logging


def positive_integer(text: str) -> int:
  """For `type=` of an argument.

  Raises:
    ArgumentTypeError: It is none.
  """
  try:
    value = int(text)
  except ValueError:
    value = 0
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
  return value


@contextlib.contextmanager
def messages() -> Iterator[None]:
  """Shows on standard error what this package logs, and only that."""
  logger, handler = logging.getLogger("vimjax"), logging.StreamHandler()
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  try:
    yield
  finally:
    logger.setLevel(level)
    logger.removeHandler(handler)
