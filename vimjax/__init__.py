"""Vision state-space models in JAX and Flax, and their official weights."""

from vimjax.layers.stack import stack_layers as stack_layers
from vimjax.layers.stack import unstack_layers as unstack_layers
from vimjax.models.deit import DeiT as DeiT
from vimjax.models.mambavision import MambaVision as MambaVision
from vimjax.models.vim import Vim as Vim
from vimjax.models.vmamba import VMamba as VMamba
from vimjax.preprocessing import preprocess as preprocess
from vimjax.registry import create_model as create_model
from vimjax.registry import get_variant as get_variant
from vimjax.registry import list_models as list_models
from vimjax.version import __version__ as __version__
from vimjax.weights.checkpoint_files import save_variables as save_variables
from vimjax.weights.convert import convert_state_dict as convert_state_dict
from vimjax.weights.export import export_state_dict as export_state_dict
from vimjax.weights.pretrained import load_pretrained as load_pretrained
