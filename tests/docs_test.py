"""The pages in docs/ are true: code, shapes in pictures, tables, links."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from tests import api_reference, doc_blocks, readme_tables
import vimjax

# The model that each page loads and draws.
MODELS = {
  "vim": "vim_tiny",
  "vmamba": "vmamba_tiny_s1l8",
  "mambavision": "mambavision_tiny",
  "deit": "deit_tiny",
}
_ANY_MODULE = re.compile(r"([\w/]+) +(\([\d, ]+\))")


def _page(family):
  return readme_tables.DOCS / f"{family}.md"


@pytest.mark.parametrize("family", MODELS)
def test_the_code_of_the_guides_runs(family, tmp_path, monkeypatch, capsys):
  name = MODELS[family]
  published = vimjax.get_variant(name).pretrained
  state_dict = doc_blocks.official_weights(name)
  doc_blocks.write_checkpoint(tmp_path / published.files[0], state_dict)
  doc_blocks.publish(monkeypatch, tmp_path)
  monkeypatch.chdir(tmp_path)
  blocks = doc_blocks.blocks(_page(family), "python")
  assert len(blocks) >= 2
  names = {}
  for block in blocks:
    doc_blocks.run(block, names)
  head = names["variables"]["params"]["head"]["bias"]
  assert head.shape == (10,)
  # A new head may start at zero, but not be what the file has.
  assert names["model"].num_classes == 10
  assert published.license in capsys.readouterr().err


def _computed(name):
  """Module paths and the shapes that they compute, without the batch axis."""
  model = vimjax.create_model(name)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def run(key, images):
    _, computed = model.init_with_output(key, images, mutable=True)
    variables = {k: v for k, v in computed.items() if k != "intermediates"}
    _, seen = model.apply(
      variables, images, capture_intermediates=True, mutable=["intermediates"]
    )
    return seen["intermediates"]

  seen = jax.eval_shape(run, jax.random.key(0), images)
  shapes = {"images": images.shape[1:]}
  for path, leaf in jax.tree_util.tree_flatten_with_path(seen)[0]:
    keys = [entry.key for entry in path if hasattr(entry, "key")]
    shapes["/".join(k for k in keys if k != "__call__")] = leaf.shape[1:]
  return shapes


@pytest.mark.parametrize("family", MODELS)
def test_the_pictures_have_the_shapes_of_the_models(family):
  (picture,) = doc_blocks.blocks(_page(family), "text")
  drawn = _ANY_MODULE.findall(picture)
  assert len(drawn) >= 10
  # The picture's shapes, and no others, stand in parentheses.
  assert len(re.findall(r"\([\d,]", picture)) == len(drawn)
  computed = _computed(MODELS[family])
  for path, shape in drawn:
    got = "(" + ", ".join(map(str, computed[path])) + ")"
    assert got == shape, path


def test_every_model_is_in_the_table_of_its_page():
  listed = [
    name
    for family in MODELS
    for name in re.findall(r"(?m)^\| `(\w+)`", _page(family).read_text())
  ]
  assert sorted(listed) == vimjax.list_models()


@pytest.mark.parametrize("family", MODELS)
def test_tables_are_current(family):
  _, generate = readme_tables.PARTS[family]
  assert readme_tables.current(family) == generate()


def test_the_api_reference_is_current():
  assert api_reference.PAGE.read_text() == api_reference.generate()


def test_every_public_function_and_class_has_an_example():
  public = {f"vimjax.{n}" for n in api_reference.public_names(vimjax)}
  kernels = api_reference.public_names(pallas_kernels)
  public |= {f"pallas_kernels.{n}" for n in kernels}
  # A type and an exception.
  without = {"pallas_kernels.Implementation", "pallas_kernels.UnsupportedError"}
  assert public - without <= set(api_reference.EXAMPLES)
  titles = set(
    re.findall(r"(?m)^### `([\w.]+)`$", api_reference.PAGE.read_text())
  )
  assert public | set(api_reference.EXAMPLES) <= titles


@pytest.mark.parametrize("name", [name for name in api_reference.EXAMPLES])
def test_examples_of_the_api_reference_run(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  api_reference.run_example(name)


def test_links_lead_somewhere():
  pages = [readme_tables.README, *readme_tables.DOCS.glob("*.md")]
  assert len(pages) == 6
  for page in pages:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
      if not target.startswith("https://"):
        assert (page.parent / target).exists(), (page.name, target)
