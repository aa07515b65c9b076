"""Variables of unrolled layers to those of scanned layers, and back."""

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vimjax


def _variables(module=jnp):
  half = jnp.bfloat16 if module is jnp else np.float16

  def layer(i):
    return {
      "norm": {"scale": module.full((3,), i, np.float32)},
      "kernel": module.full((2, 3), 10 + i, half),
    }

  # More than ten: sorted as text, layers_10 would follow layers_1.
  layers = {f"layers_{i}": layer(i) for i in range(12)}
  return {
    "params": {**layers, "head": {"bias": module.zeros(2)}},
    "statistics": {f"layers_{i}": {"mean": module.ones(4)} for i in range(2)},
  }


@pytest.mark.parametrize("module", [jnp, np])
def test_unstack_is_the_exact_inverse_of_stack(module):
  variables = _variables(module)
  stacked = vimjax.stack_layers(variables)
  scale = stacked["params"]["layers"]["norm"]["scale"]
  np.testing.assert_array_equal(scale[:, 0], np.arange(12))
  assert isinstance(scale, np.ndarray) == (module is np)
  back = vimjax.unstack_layers(stacked)
  chex.assert_trees_all_equal(back, variables, strict=True)
  again = vimjax.stack_layers(back)
  chex.assert_trees_all_equal(again, stacked, strict=True)


def test_a_tree_without_layers_stays_as_it_is():
  tree = {"params": {"head": {"bias": np.zeros(2)}}}
  assert vimjax.stack_layers(tree) == tree
  assert vimjax.unstack_layers(tree) == tree


def test_frozen_dicts_are_accepted():
  stacked = vimjax.stack_layers(flax.core.freeze(_variables()))
  assert stacked["params"]["layers"]["kernel"].shape == (12, 2, 3)


def test_stacking_works_under_jit():
  variables = _variables()
  chex.assert_trees_all_equal(
    jax.jit(vimjax.stack_layers)(variables), vimjax.stack_layers(variables)
  )


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({"layers_0": {"a": np.ones(1)}, "layers_2": {"a": np.ones(1)}}, "0 to 1"),
    ({"layers_0": {"a": np.ones(1)}, "layers_1": {"a": np.ones(2)}}, "differ"),
    ({"layers_0": {"a": np.ones(1)}, "layers_1": {"b": np.ones(1)}}, "differ"),
    ({"layers_0": {"a": np.ones(1)}, "layers": {"a": np.ones(1)}}, "both"),
  ],
)
def test_layers_that_do_not_stack_are_reported(tree, message):
  with pytest.raises(ValueError, match=f"stack_layers: .*{message}"):
    vimjax.stack_layers({"params": tree})


def test_stacks_of_unequal_depth_are_reported():
  tree = {"layers": {"a": np.ones((2, 1)), "b": np.ones((3, 1))}}
  with pytest.raises(ValueError, match=r"differ: \[2, 3\]"):
    vimjax.unstack_layers(tree)
