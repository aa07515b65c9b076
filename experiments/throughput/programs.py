"""Compiles cases, from shapes alone, and makes what they run on."""

from collections.abc import Callable
import contextlib
import dataclasses
import time
from typing import Any, Final

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import cases
import vimjax
from vimjax import registry

_PRECISIONS: Final = {"full": "highest", "tf32": "tensorfloat32"}
_ATTENTION: Final = {"materialised": "xla", "flash": "cudnn"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled case; none of its arrays exists yet.

  Attributes:
    case: The case.
    compiled: Called with the variables and images, and labels in training.
    variables: Shapes and dtypes of the variables.
    num_classes: Labels are smaller.
    compile_s: Tracing and compilation, in seconds.
    argument_bytes: Parameters and images, by the compiler's account.
    temp_bytes: What the program needs beside arguments and results.
    peak_bytes: Arguments, results and temporary memory together; an array that
      is updated in place counts once.
  """

  case: cases.Case
  compiled: jax.stages.Compiled
  variables: Any
  num_classes: int
  compile_s: float
  argument_bytes: int
  temp_bytes: int
  peak_bytes: int

  def start(self, images: jax.Array) -> Callable[[], Any]:
    """Makes variables; the result runs a step and returns what to wait for."""
    state = [_values(self.variables)]
    if self.case.mode == "inference":
      return lambda: self.compiled(state[0], images)
    labels = jnp.arange(self.case.batch) % self.num_classes

    def step() -> jax.Array:
      state[0], loss = self.compiled(state[0], images, labels)
      return loss

    return step


def build(case: cases.Case) -> Any:
  """The model of a case."""
  fields: dict[str, Any] = dict(dtype=jnp.dtype(case.dtype))
  known = registry.field_names(vimjax.get_variant(case.model).module)
  if "image_size" in known:
    fields["image_size"] = case.size
  if case.attention is not None:
    fields["attention_implementation"] = _ATTENTION[case.attention]
  return vimjax.create_model(case.model, **fields)


def compile_case(
  case: cases.Case, sharding: jax.sharding.Sharding | None = None
) -> Program:
  """Compiles a case without allocating anything.

  Args:
    case: The case.
    sharding: Names the device to compile for; None for JAX's default device.
  """
  model = build(case)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  images = jax.ShapeDtypeStruct(image_shape(case), jnp.float32)
  labels = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  precision: Any = contextlib.nullcontext()
  if case.precision is not None:
    precision = jax.default_matmul_precision(_PRECISIONS[case.precision])
  start = time.perf_counter()
  with precision:
    if case.mode == "inference":
      function, arguments = jax.jit(model.apply), (variables, images)
    else:
      function = jax.jit(_training_step(model), donate_argnums=0)
      arguments = variables, images, labels
    compiled = function.lower(*jax.tree.map(place, arguments)).compile()
  seconds = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  inputs, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return Program(
    case=case,
    compiled=compiled,
    variables=variables,
    num_classes=model.num_classes,
    compile_s=seconds,
    argument_bytes=inputs,
    temp_bytes=temp,
    peak_bytes=inputs + results + temp,
  )


def image_shape(case: cases.Case) -> tuple[int, int, int, int]:
  return case.batch, case.size, case.size, 3


def make_images(case: cases.Case) -> jax.Array:
  """Noise, made on the device: it may be more than a gigabyte."""
  return jax.random.normal(jax.random.key(0), image_shape(case))


def _values(shapes: Any) -> dict[str, Any]:
  """Values of the usual size; initialising would mean compiling once more."""
  rng = np.random.default_rng(0)
  flat: dict[Any, Any] = traverse_util.flatten_dict(shapes)
  ones = ("scale", "var")
  filled = {
    path: jnp.ones(leaf.shape, leaf.dtype)
    if path[-1] in ones
    else jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)
    for path, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(filled)


def _training_step(model: Any) -> Callable[..., Any]:
  def step(variables, images, labels):
    params = variables["params"]
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
      logits, updated = model.apply(
        {"params": params, **rest},
        images,
        train=True,
        mutable=list(rest),
        rngs={"drop_path": jax.random.key(0)},
      )
      losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, labels[:, None], -1
      ).squeeze(-1)
      return losses.mean(), updated

    (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)
    return {"params": params, **updated}, value

  return step
