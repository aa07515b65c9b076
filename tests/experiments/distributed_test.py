"""Which processes a run is started in, and what is said of mistakes."""

import pytest

from experiments.imagenet import distributed, errors
from tests import doc_blocks, readme_tables

_SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[01-02]",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "3",
}
_KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
_POD = _KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}
_NONE = distributed.Processes()


@pytest.mark.parametrize(
  ("by_hand", "environment"),
  [
    (_NONE, {}),
    # A notebook in a pod, an allocation without `srun`, a job of one task.
    (_NONE, _KUBERNETES),
    (_NONE, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}),
    (_NONE, _SLURM | {"SLURM_NTASKS": "1"}),
    (distributed.Processes(num_processes=1), _SLURM),
    (distributed.Processes("host:1", 1, 0), {}),
  ],
)
def test_nothing_is_started_for_a_single_process(by_hand, environment):
  assert distributed.find(by_hand, environment) is None


def test_flags_come_before_slurm():
  given = distributed.Processes("host:1234", 2, 1)
  assert distributed.find(given, {}) == given
  assert distributed.find(given, _SLURM) == given
  assert distributed.find(_NONE, _SLURM) == _NONE


@pytest.mark.parametrize("installed", [True, False])
def test_kubernetes_needs_its_package(monkeypatch, installed):
  monkeypatch.setattr(
    distributed.importlib.util,
    "find_spec",
    lambda name: object() if installed and name == "kubernetes" else None,
  )
  if installed:
    assert distributed.find(_NONE, _POD) == _NONE
    return
  with pytest.raises(errors.ConfigError, match="pip install kubernetes"):
    distributed.find(_NONE, _POD)


@pytest.mark.parametrize(
  ("by_hand", "message"),
  [
    (("host:1", 2, None), "Give --process_id too"),
    ((None, None, 0), "Give --coordinator and --num_processes too"),
    (("host", 2, 0), "--coordinator=host must be HOST:PORT"),
    (("host:1", 2, 2), "--process_id=2 must be from 0"),
    (("host:1", 0, 0), "--num_processes=0 positive"),
  ],
)
def test_wrong_flags_are_named(by_hand, message):
  with pytest.raises(errors.ConfigError, match=message):
    distributed.find(distributed.Processes(*by_hand), {})


def test_the_readme_asks_slurm_and_kubernetes_for_what_jax_needs():
  text = readme_tables.README.read_text()
  (script,) = doc_blocks.blocks(readme_tables.README, "sh")
  (manifest,) = doc_blocks.blocks(readme_tables.README, "yaml")
  # A process per GPU, in tasks of `srun`.
  assert "--ntasks-per-node=8 --gpus-per-node=8" in script
  assert script.splitlines()[-1].startswith("srun python -m experiments.")
  # JAX finds the pods of an indexed Job with a headless service.
  service, job = manifest.split("---")
  assert "clusterIP: None" in service
  assert "completionMode: Indexed" in job
  assert "subdomain: vim" in job
  for name in ("coordinator", "num_processes", "process_id"):
    assert f"--{name}" in text
