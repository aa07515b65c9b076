"""Vision state-space models in JAX and Flax, and their official weights."""

from vimjax.layers.stack import stack_layers as stack_layers
from vimjax.layers.stack import unstack_layers as unstack_layers
from vimjax.models.vim import Vim as Vim
from vimjax.preprocessing import preprocess as preprocess
from vimjax.registry import create_model as create_model
from vimjax.registry import get_variant as get_variant
from vimjax.registry import list_models as list_models
from vimjax.version import __version__ as __version__
from vimjax.weights.convert import convert_state_dict as convert_state_dict
