"""Names of the 1000 classes of ImageNet-1k, in the models' order.

The names are in imagenet_classes.json, which also says where they are from and
under which licence.
"""

import functools
from importlib import resources
import json


@functools.cache
def names() -> tuple[str, ...]:
  """Words for each class, such as "tench, Tinca tinca"; index is the label."""
  return tuple(words for _, words in _classes())


@functools.cache
def synsets() -> tuple[str, ...]:
  """WordNet ids, such as "n01440764", as ImageNet's folders are named."""
  return tuple(synset for synset, _ in _classes())


def _classes() -> list[tuple[str, str]]:
  text = resources.files("vimjax").joinpath("imagenet_classes.json").read_text()
  return [(synset, words) for synset, words in json.loads(text)["classes"]]
