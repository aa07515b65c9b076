"""Functions in another process, and what may become of them."""

import os
import time

import pytest

from pallas_kernels import bench_child


def test_the_process_is_another_and_goes_on():
  with bench_child.Child() as child:
    first = child.run(os.getpid, seconds=60)
    assert first != os.getpid()
    assert child.run(os.getpid, seconds=60) == first
    assert child.run(divmod, 7, 2, seconds=60) == (3, 1)


@pytest.mark.parametrize(
  ("function", "arguments", "seconds", "reason"),
  [
    (time.sleep, (600,), 0.2, "timed out after 0.2 s"),
    (os.abort, (), 60, "died: signal 6"),
    (os._exit, (3,), 60, "died: exit code 3"),
    (divmod, (1, 0), 60, "ZeroDivisionError: "),
  ],
)
def test_after_a_failure_another_process_goes_on(
  function, arguments, seconds, reason
):
  with bench_child.Child() as child:
    with pytest.raises(bench_child.ChildError, match=reason):
      child.run(function, *arguments, seconds=seconds)
    assert child.run(abs, -1, seconds=60) == 1
