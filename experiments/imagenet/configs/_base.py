"""Every field of a training run, with its default, unit and meaning.

A configuration file calls `get_config()` and changes values, and so do the
recipes of the published models (`recipes.py`); neither adds fields. Code reads
`config.x.y`, never `config.get("x", default)`.
"""

from collections.abc import Callable, Mapping
import difflib

import ml_collections
from ml_collections import config_dict


def _data() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # A name in `experiments.datasets.registry.DATASETS`.
  c.name = "imagenet2012"
  # For the data set "folder": where its classes are, each in a subfolder.
  c.folder = ""
  # TFDS folder; None means $TFDS_DATA_DIR, else ~/tensorflow_datasets.
  c.dir = config_dict.placeholder(str)
  # TFDS split expressions. `valid_split` picks checkpoints and settings;
  # `test_split` is read once, after training ("" means none).
  c.train_split = "train"
  c.valid_split = "validation"
  c.test_split = ""
  # Side of the square images that the model sees, in pixels.
  c.image_size = 224
  # Evaluation resizes the shorter side to image_size / crop_fraction.
  c.crop_fraction = 0.875
  # "center" keeps the aspect and cuts; "squash" resizes both sides, then cuts.
  c.crop_mode = "center"
  # Random-resized-crop: the crop's share of the image area, and its aspect.
  c.crop_area = (0.08, 1.0)
  c.crop_ratio = (3 / 4, 4 / 3)
  # Mirror half of the training images.
  c.flip = True
  # Filter where a crop is enlarged, and of RandAugment's rotations and the
  # like: "bicubic", "bilinear", or "random" for one of them each time.
  c.crop_interpolation = "bicubic"
  # RandAugment in timm's notation, such as "rand-m9-mstd0.5-inc1"; "" is none.
  c.randaugment = ""
  # Strength of random brightness, contrast and saturation. As in timm, it has
  # no effect beside RandAugment, which the published recipes also set.
  c.color_jitter = 0.0
  # Share of the images in which a box is replaced by noise.
  c.erase_probability = 0.0
  # How often each drawn image comes in an epoch, augmented anew, while an
  # epoch has as many images as ever: repeated augmentation.
  c.repeats = 1
  # Pixel statistics (0 to 1) subtracted and divided on the device.
  c.mean = (0.485, 0.456, 0.406)
  c.std = (0.229, 0.224, 0.225)
  # Worker processes that decode; 0 decodes in threads of the main process.
  c.workers = 0
  # Unreadable images that a run tolerates (distinct records) before it stops.
  c.max_corrupt = 100
  return c


def _model() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # A name from `vimjax.list_models()`.
  c.name = "vim_tiny"
  # Fields of the module to override; those listed here can be set from the
  # command line. None keeps the variant's own value (of image_size: takes
  # data.image_size).
  o = c.overrides = ml_collections.ConfigDict()
  # 0 means as many as the data set has.
  o.num_classes = 1000
  o.image_size = config_dict.placeholder(int)
  o.patch_size = config_dict.placeholder(int)
  o.stride = config_dict.placeholder(int)
  o.depth = config_dict.placeholder(int)
  o.depths = config_dict.placeholder(tuple)
  o.embed_dim = config_dict.placeholder(int)
  o.dim = config_dict.placeholder(int)
  o.in_dim = config_dict.placeholder(int)
  o.window_size = config_dict.placeholder(tuple)
  o.pos_embed_resize = config_dict.placeholder(str)
  o.drop_path_rate = config_dict.placeholder(float)
  o.scan_layers = config_dict.placeholder(bool)
  o.remat = config_dict.placeholder(bool)
  o.scan_implementation = config_dict.placeholder(str)
  o.attention_implementation = config_dict.placeholder(str)
  # Computation dtype: "float32" or "bfloat16". Parameters are float32.
  o.dtype = "float32"
  return c


def _optimizer() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # "adamw" or "lamb" (timm's: clips to a global norm of 1, and arrays that do
  # not decay take no trust ratio).
  c.name = "adamw"
  # Peak learning rate of a step at `batch_size`.
  c.peak_lr = 1e-3
  # Learning rates at the start of warm-up and at the end of training.
  c.warmup_lr = 1e-6
  c.final_lr = 1e-5
  # Length of the linear warm-up, in epochs.
  c.warmup_epochs = 5.0
  c.schedule = "cosine"
  # Whether the cosine counts from the end of the warm-up, not from step 0.
  c.warmup_prefix = False
  # Epochs at the end, within `epochs`, in which the rate stays at final_lr.
  c.cooldown_epochs = 0.0
  # "epoch" holds the rate for an epoch, as timm does; "step" moves each step.
  c.schedule_unit = "epoch"
  c.b1 = 0.9
  c.b2 = 0.999
  c.eps = 1e-8
  # Decoupled; 1-D parameters, biases, positional embeddings and the class
  # token are not decayed (what the official code does; A_log is decayed).
  c.weight_decay = 0.1
  # The official code decays A_log, and some more of the scan's parameters;
  # False exempts A_log, D and dt_bias, which sets time scales, as Mamba's
  # authors intended.
  c.decay_scan_parameters = True
  # Factor of the rate from each layer to the one before it; 1 means none.
  c.layer_decay = 1.0
  # Global norm that gradients are clipped to; 0 means no clipping.
  c.clip_norm = 0.0
  return c


def _mixup() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # Parameters of the beta distributions of the weights; 0 never uses it.
  c.mixup_alpha = 0.0
  c.cutmix_alpha = 0.0
  # Share of the groups that are mixed, and of those, where both are used, the
  # share mixed by CutMix.
  c.probability = 1.0
  c.switch_probability = 0.5
  # Images that share a weight and are mixed among themselves: in the official
  # code those of one GPU. 0 means the whole batch.
  c.group_size = 0
  return c


def _mesa() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # Self-distillation (MESA, arXiv:2205.14083): `factor` times `weight` times
  # the divergence from the model's own running average is added to the loss. A
  # weight of 0 means none.
  c.weight = 0.0
  c.factor = 50.0
  # Divides both logits.
  c.temperature = 3.0
  # Share of the training before the loss begins.
  c.start = 0.25
  return c


def _log() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # Steps between lines in metrics.jsonl and TensorBoard.
  c.every_steps = 50
  c.tensorboard = True
  # A project of Weights & Biases that gets the same numbers (needs the extra
  # `wandb`); "" means none.
  c.wandb = ""
  c.progress_bar = True
  # Draw learning curves and a grid of predictions as PNG at the end.
  c.plots = False
  return c


def _checkpoint() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # Epochs between checkpoints; one is also written at the end and on SIGTERM.
  c.every_epochs = 1.0
  # Write the best weights to weights.safetensors when the run is finished.
  c.export = False
  # How many of the newest to keep, beside the best on `valid_split`.
  c.keep = 2
  return c


def _mesh() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  # How the devices are arranged: the product of the three is their number, and
  # -1 stands for what the others leave. No number of a run depends on it but
  # for the order of summation, and a run may go on with another. `data` and
  # `fsdp` divide the images of a batch.
  c.data = -1
  # Devices that keep one copy of the parameters, averages and moments among
  # them, each a part; see `sharding.RULES`.
  c.fsdp = 1
  # Devices that work on the same images, each on a part of the tokens, for
  # very large images; Vim only.
  c.sequence = 1
  return c


def get_config() -> ml_collections.ConfigDict:
  """The defaults: a plain run of Vim-Ti on ImageNet-1k, no published recipe."""
  c = ml_collections.ConfigDict()
  # Seeds the initial parameters, the data order and every random choice.
  c.seed = 0
  # Weights to start from: a file (official, or of `vimjax.save_variables`),
  # "published" for those of the model, or "published:NAME"; "" means none. The
  # head is replaced where the number of classes differs.
  c.init_from = ""
  # Which weights of that file: "model", or "ema" for an average.
  c.init_weights = "model"
  # Whether the licence of published weights is accepted, where it has to be.
  c.accept_license = False
  # Images per step over all devices.
  c.batch_size = 1024
  # Images per evaluation step over all devices.
  c.eval_batch_size = 1024
  # Passes over `train_split`.
  c.epochs = 300.0
  # Epochs between evaluations on `valid_split`.
  c.eval_every_epochs = 1.0
  # Share of the target spread evenly over all classes.
  c.label_smoothing = 0.1
  # Decay per step of the averaged parameters; 0 keeps no average.
  c.ema_decay = 0.99996
  # Which parameters validation and the final result use: "model" or "ema".
  c.eval_weights = "model"
  # What a step with a loss, gradient or update that is no finite number does:
  # "stop" ends the run at its last checkpoint; "skip" leaves parameters,
  # averages and the optimiser as they were, and stops after more than so many
  # such steps in a row. The optimiser's count of steps, which the rate depends
  # on, waits too, so the schedule ends so many steps early.
  c.non_finite = "stop"
  c.max_skipped_steps = 10
  # Parts that a batch is divided into, to need less memory: one after the
  # other, and one step for all. Statistics of batch norms are of a part.
  c.accumulation_steps = 1
  c.mesh = _mesh()
  c.data = _data()
  c.mixup = _mixup()
  c.mesa = _mesa()
  c.model = _model()
  c.optimizer = _optimizer()
  c.log = _log()
  c.checkpoint = _checkpoint()
  return c


def smoke(c: ml_collections.ConfigDict) -> None:
  """Turns a recipe into a one-minute run of the same code on two cores."""
  c.init_from = ""
  c.data.name = "generated"
  c.data.image_size = 64
  c.data.test_split = "test"
  c.model.overrides.num_classes = 10
  if c.model.name.startswith(("vim_", "deit_")):
    c.model.overrides.depth = 2
  else:
    c.model.overrides.depths = (1, 1, 2, 2)
  c.batch_size = 32
  c.eval_batch_size = 40
  c.mixup.group_size = 8 if c.mixup.group_size else 0
  c.epochs = 4.0
  c.ema_decay = 0.9 if c.ema_decay else 0.0
  c.optimizer.warmup_epochs = 1.0
  c.optimizer.cooldown_epochs = 0.0
  c.log.every_steps = 5


def apply_argument(
  c: ml_collections.ConfigDict,
  argument: str,
  choices: Mapping[str, Callable[[ml_collections.ConfigDict], None]],
) -> None:
  """Changes `c` as the part after the colon of `--config NAME:ARGUMENT` says.

  Args:
    c: The configuration, changed in place.
    argument: The part after the colon; "" changes nothing.
    choices: The arguments that this configuration takes.

  Raises:
    ValueError: There is no such argument.
  """
  if not argument:
    return
  if argument not in choices:
    near = difflib.get_close_matches(argument, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"This configuration takes no argument {argument!r}.{hint} Choose from "
      f"{sorted(choices)}."
    )
  choices[argument](c)
