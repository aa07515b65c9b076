"""Set-up that the tests of the experiments share."""

import pytest

from tests.experiments import job as job_lib


@pytest.fixture(scope="session")
def job(tmp_path_factory):
  """Starts training jobs, which share their data and their compiled code."""
  return job_lib.Job(tmp_path_factory.mktemp("job"))
