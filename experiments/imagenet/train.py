"""Trains and evaluates an image classifier; survives what interrupts it.

A run is a pure function of its configuration: stopped anywhere and started
again with the same command, it ends with the same parameters, bit for bit, on
the same devices. What is due at a step is decided by its number alone, and
what a checkpoint holds is enough to go on from it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from experiments.imagenet import (
  agreement,
  checkpoints,
  checks,
  errors,
  input_pipeline,
  interrupts,
  metrics,
  plots,
  rundir,
  sharding,
  steps,
  wandb_log,
)
from experiments.imagenet import corrupt as corrupt_lib
from experiments.imagenet import initial as initial_lib
from experiments.imagenet import run as run_lib
from experiments.imagenet import state as state_lib
from experiments.imagenet import window as window_lib
import vimjax

# The best weights, where `config.checkpoint.export` asks for them.
WEIGHTS = "weights.safetensors"


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Runs `config` in `workdir` to the end, from wherever it stands.

  Args:
    config: See `configs/_base.py`.
    workdir: The run's folder; see `rundir.py` for what it holds.

  Returns:
    The content of result.json: accuracy, loss and number of images of the
    split that it names, and which step was chosen.

  Raises:
    errors.RunError: The run cannot go on; the class says why.
    records.DataError: The data set is missing or damaged.
    OSError: A file cannot be read or written.
  """
  agreement.check_equal(rundir.flatten(config.to_dict()))
  agreement.together(lambda: checks.check_config(config))
  config = agreement.together(lambda: run_lib.fill_in(config))
  with contextlib.ExitStack() as stack:
    folder = agreement.together(
      lambda: stack.enter_context(rundir.claim(workdir))
    )
    agreement.together(lambda: rundir.check_shared(folder))
    changed = agreement.on_first(lambda: rundir.compare_config(folder, config))
    result = agreement.on_first(
      lambda: rundir.read_json(folder / rundir.RESULT)
    )
    if result is not None and not changed:
      metrics.say(f"{folder} holds a finished run of this configuration.")
      report(result, folder)
      return result
    saved = stack.enter_context(
      checkpoints.Checkpoints(folder, keep=config.checkpoint.keep)
    )
    interrupt = stack.enter_context(interrupts.watch())
    mesh = sharding.make_mesh(**config.mesh)
    stack.enter_context(jax.set_mesh(mesh))
    run = agreement.together(
      lambda: run_lib.prepare(config, folder, mesh, saved, interrupt)
    )
    state, record = start(run)
    agreement.together(
      lambda: rundir.record_config(
        folder,
        config,
        step=record.step,
        changed=changed,
        initial=record.initial,
      )
    )
    # From an earlier configuration: if this one is cut off, it has no result.
    agreement.together(lambda: rundir.discard_result(folder))
    state, record = train(run, state, record)
    result = finish(run, state, record)
    report(result, folder)
    return result


def start(run: run_lib.Run) -> tuple[state_lib.State, checkpoints.Record]:
  """The state to go on from: the newest sound checkpoint, or a new one.

  Raises:
    errors.ConflictError: A split has grown or shrunk since.
  """
  examples = run.examples
  agreement.check_equal({f"images of {k!r}": n for k, n in examples.items()})
  shapes = state_lib.state_shapes(run.model, run.tx, run.config, run.mesh)
  total = run.plan.total_steps
  restored = run.checkpoints.restore(shapes)
  if restored is None:
    state, initial = _new_state(run)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    metrics.say(
      f"new run in {run.folder}: {run.config.model.name}, {parameters:,} "
      f"parameters, {total} steps of {run.config.batch_size} images on "
      f"{jax.device_count()} device(s)"
    )
    return state, checkpoints.Record(examples=examples, initial=initial)
  record = restored[1]
  for split, now in examples.items():
    then = record.examples.setdefault(split, now)
    if then != now:
      raise errors.ConflictError(
        f"{run.config.data.name!r} ({split}) had {then} images when "
        f"{run.folder} was saved, and has {now} now: the run would go on with "
        "others than it began with. Restore the data, or choose another "
        "--workdir."
      )
  metrics.say(f"resumed {run.folder} from step {record.step} of {total}")
  return restored


def _new_state(
  run: run_lib.Run,
) -> tuple[state_lib.State, dict[str, Any] | None]:
  """The state of a new run, and where its weights are from if from a file."""
  config, mesh = run.config, run.mesh
  variables = initial = None
  if config.init_from:
    # First: what is wrong with a file should not wait for the compiler.
    with jax.transfer_guard_host_to_device("allow"):
      variables, initial = agreement.together(
        lambda: initial_lib.load(config, run.model)
      )
  state = state_lib.make_state(run.model, run.tx, config, mesh)
  if initial is None:
    return state, None
  with jax.transfer_guard_host_to_device("allow"):
    state = state_lib.with_variables(state, variables, mesh)
  metrics.say(
    f"initial weights: {initial['path']} (licence: "
    f"{initial['license'] or 'unknown'})"
  )
  return state, initial


def train(
  run: run_lib.Run, state: state_lib.State, record: checkpoints.Record
) -> tuple[state_lib.State, checkpoints.Record]:
  """Trains to the last step, evaluating and saving on the way.

  Args:
    run: From `run.prepare`.
    state: From `start`; consumed.
    record: From `start`.

  Returns:
    The state and the record of the last step, which are saved.

  Raises:
    errors.NonFiniteError: With the step; nothing is saved from there on.
    errors.InterruptedRunError: After saving, when a signal asked for it.
  """
  config, plan = run.config, run.plan
  corrupt = corrupt_lib.Corrupt(config.data.max_corrupt, record.corrupt)
  with contextlib.ExitStack() as stack:
    writer = stack.enter_context(_writer(run, record.step))
    progress = metrics.Progress(
      step=record.step,
      total=plan.total_steps,
      batch_size=config.batch_size,
      progress_bar=config.log.progress_bar,
    )
    stack.callback(progress.close)
    window = window_lib.Window(run, writer, progress, corrupt)

    def validate() -> None:
      if not plan.evaluates(record.step):
        return
      if record.evaluated_step != record.step and not run.poll.stop:
        with progress.paused():
          _validate(run, state, record, corrupt, writer, progress)

    # A run that was interrupted in an evaluation resumes with it.
    validate()
    step = record.step
    part, parts = sharding.batch_slice(run.mesh)
    batches = input_pipeline.train_batches(
      config, start_step=step, process_index=part, process_count=parts
    )
    while step < plan.total_steps and not run.poll.stop:
      with progress.waiting():
        batch = next(batches)
      corrupt.see("train", batch)
      run.poll.take(corrupt)
      if not step:
        writer.images(step, "train/images", batch["image"])
      state, numbers = run.train_step(
        state, steps.put_batch(batch, config, run.mesh)
      )
      step += 1
      window.add(step, numbers)
      if plan.evaluates(step) or plan.saves(step):
        window.drain()
        run.poll.drain(corrupt)
        record.step = step
        validate()
        if plan.saves(step) or record.best_step == step:
          record.corrupt = corrupt.by_split()
          run.checkpoints.save(state, record)
    window.drain()
    run.poll.drain(corrupt)
    record.step = step
    record.corrupt = corrupt.by_split()
    run.checkpoints.save(state, record)
    run.checkpoints.wait()
  _stop_if_interrupted(run, step)
  return state, record


def _writer(run: run_lib.Run, step: int) -> metrics.Writer:
  """Where the numbers go, with the configuration to read beside them."""
  log, wandb = run.config.log, None
  if log.wandb and not jax.process_index():
    wandb = wandb_log.WandbLog(run.folder, log.wandb, run.config.to_dict())
  writer = metrics.Writer(
    run.folder, start_step=step, tensorboard=log.tensorboard, wandb=wandb
  )
  recorded = rundir.read_json(run.folder / rundir.CONFIG)
  writer.text(step, "config", json.dumps(recorded, indent=2))
  return writer


def _stop_if_interrupted(run: run_lib.Run, step: int) -> None:
  if run.poll.stop:
    raise errors.InterruptedRunError(
      f"Stopped by {run.poll.stop}; saved at step {step} of "
      f"{run.plan.total_steps}. Run the same command again to go on."
    )


def _validate(
  run: run_lib.Run,
  state: state_lib.State,
  record: checkpoints.Record,
  corrupt: corrupt_lib.Corrupt,
  writer: metrics.Writer,
  progress: metrics.Progress,
) -> None:
  split = run.config.data.valid_split
  values = steps.evaluate(
    run.eval_step, run.eval_variables(state), _eval_batches(run, split, corrupt)
  )
  if run.poll.stop:
    return
  if not np.isfinite(values["loss"]):
    raise window_lib.non_finite(
      run, record.step, {"validation loss": values["loss"]}
    )
  record.evaluated_step = record.step
  # The larger accuracy; between equal ones, the smaller loss.
  rank = (values["accuracy"], -values["loss"])
  if record.best_step is None or rank > (
    record.best_accuracy,
    -record.best_loss,
  ):
    record.best_step = record.step
    record.best_accuracy, record.best_loss = values["accuracy"], values["loss"]
  writer.write(record.step, "valid", values)
  progress.say(
    f"step {record.step}/{run.plan.total_steps}  validation loss "
    f"{values['loss']:.4f}  accuracy {values['accuracy']:.4f}  (best "
    f"{record.best_accuracy:.4f} at step {record.best_step})"
  )


def _eval_batches(
  run: run_lib.Run, split: str, corrupt: corrupt_lib.Corrupt
) -> Iterator[steps.Batch]:
  """Every image of `split` once, on the devices; ends early on a signal."""
  for batch in _host_batches(run, split):
    corrupt.see(split, batch)
    yield steps.put_batch(batch, run.config, run.mesh)
    run.poll.take(corrupt)
    if run.poll.stop:
      return
  run.poll.drain(corrupt)


def _host_batches(
  run: run_lib.Run, split: str
) -> Iterator[input_pipeline.Batch]:
  part, parts = sharding.batch_slice(run.mesh)
  return input_pipeline.eval_batches(
    run.config, split, process_index=part, process_count=parts
  )


def finish(
  run: run_lib.Run, state: state_lib.State, record: checkpoints.Record
) -> dict[str, Any]:
  """Evaluates the best checkpoint, once, and writes result.json.

  Args:
    run: From `run.prepare`.
    state: The state of the last step.
    record: Its record.

  Returns:
    The result, as it was written.
  """
  c = run.config
  step = record.step
  if record.best_step is not None and record.best_step != step:
    shapes = state_lib.state_shapes(run.model, run.tx, c, run.mesh)
    restored = run.checkpoints.restore_step(record.best_step, shapes)
    if isinstance(restored, str):
      logging.warning(
        "Cannot read the best checkpoint, step %d (%s); evaluating step %d",
        record.best_step,
        restored,
        step,
      )
    else:
      state, step = restored[0], record.best_step
  split = c.data.test_split or c.data.valid_split
  corrupt = corrupt_lib.Corrupt(c.data.max_corrupt, record.corrupt)
  values = steps.evaluate(
    run.eval_step, run.eval_variables(state), _eval_batches(run, split, corrupt)
  )
  _stop_if_interrupted(run, record.step)
  recorded = rundir.read_json(run.folder / rundir.CONFIG) or {}
  result = {
    "model": c.model.name,
    "data": c.data.name,
    "seed": c.seed,
    "name": "test" if c.data.test_split else "validation",
    "split": split,
    **values,
    "weights": c.eval_weights,
    "best_step": step,
    "best_valid_accuracy": record.best_accuracy,
    "total_steps": run.plan.total_steps,
    "corrupt": corrupt.by_split(),
    "initial_weights": record.initial,
    "git_revision": recorded.get("git_revision"),
    "plots": [],
  }
  # All processes compute; the first one writes, and the others wait for it.
  predicted = _predict(run, state, split) if c.log.plots else []
  variables = None
  if c.checkpoint.export:
    variables = sharding.gather(run.eval_variables(state), run.mesh)

  def write() -> dict[str, Any]:
    if variables is not None:
      vimjax.save_variables(
        run.folder / WEIGHTS,
        variables,
        metadata=initial_lib.metadata(c, record.initial, run.class_names),
      )
    if c.log.plots:
      result["plots"] = draw(run, predicted)
    rundir.write_json(run.folder / rundir.RESULT, result)
    return result

  return agreement.on_first(write)


def draw(
  run: run_lib.Run, predicted: list[tuple[np.ndarray, int, int]]
) -> list[str]:
  """Names of the plots; none, and a warning, where they cannot be drawn."""
  try:
    return [
      plots.learning_curves(run.folder),
      plots.predictions(run.folder, predicted, run.class_names),
    ]
  except Exception as error:  # Whatever it is, the result is worth more.
    logging.warning("No plots: %s: %s", type(error).__name__, error)
    return []


def _predict(
  run: run_lib.Run, state: state_lib.State, split: str
) -> list[tuple[np.ndarray, int, int]]:
  """Image, label and prediction of the first batch of `split`."""
  batch = next(iter(_host_batches(run, split)))
  out = run.eval_step(
    run.eval_variables(state), steps.put_batch(batch, run.config, run.mesh)
  )
  part, _ = sharding.batch_slice(run.mesh)
  predicted = np.asarray(out["predicted"])[part * len(batch["mask"]) :]
  return [
    (batch["image"][i], int(batch["label"][i]), int(predicted[i]))
    for i in np.flatnonzero(batch["mask"])
  ]


def report(result: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints a result; the accuracy is the last line."""
  metrics.say(
    f"best of {result['total_steps']} steps: {result['best_step']} (validation "
    f"accuracy {result['best_valid_accuracy']:.4f})"
  )
  for split, ids in result["corrupt"].items():
    metrics.say(f"unreadable images skipped in {split}: {len(ids)}")
  for name in result["plots"]:
    metrics.say(f"plot: {folder / name}")
  metrics.say(
    f"{result['name']} accuracy: {result['accuracy']:.4f} "
    f"({result['examples']} images)"
  )
