"""Turns the official ImageNet tar files into TFDS array_record files.

  python -m experiments.prepare_imagenet --tar_dir DIR [--data_dir DIR]
  python -m experiments.prepare_imagenet --v2 [VARIANT] --tar_dir DIR

The first is ImageNet-2012, the second ImageNet-V2. Needs no TensorFlow, and as
much free space as the tar files take (155 GB; 1.3 GB). The result is read by
the official builders:
  tfds.builder("imagenet2012", file_format="array_record")
  tfds.builder("imagenet_v2/VARIANT", file_format="array_record")
An interrupted preparation leaves nothing that could be taken for the data set.

Exit codes: 0 done (or done before); 2 wrong command line; 65 a tar file is
damaged; 66 a tar file is missing; 69 a package is missing; 74 the data cannot
be written; 75 interrupted.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from experiments.imagenet import errors
from vimjax import optional

_PACKAGES = ("array_record", "PIL", "tensorflow_datasets", "tqdm")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.prepare_imagenet",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--tar_dir",
    type=pathlib.Path,
    required=True,
    help="folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or "
    "of an archive of ImageNet-V2",
  )
  parser.add_argument(
    "--v2",
    nargs="?",
    const="matched-frequency",
    choices=("matched-frequency", "threshold-0.7", "topimages"),
    metavar="VARIANT",
    help="prepare ImageNet-V2: %(choices)s (default: %(const)s)",
  )
  parser.add_argument(
    "--data_dir",
    help="TFDS folder to write to (default: $TFDS_DATA_DIR, else "
    "~/tensorflow_datasets)",
  )
  parser.add_argument(
    "--subset",
    action="store_true",
    help="accept tar files with fewer images than the official ones",
  )
  return parser.parse_args(argv)


def _fail(message: object, code: errors.ExitCode) -> errors.ExitCode:
  print(f"error: {message}", file=sys.stderr)
  return code


def main(argv: Sequence[str] | None = None) -> errors.ExitCode:
  """The command line; None means `sys.argv`."""
  args = _parse(argv)
  try:
    for package in _PACKAGES:
      optional.require(package, extra="train")
  except ModuleNotFoundError as error:
    return _fail(error, errors.ExitCode.UNAVAILABLE)
  from experiments.datasets import (
    imagenet,
    imagenet_preparation,
    imagenet_v2,
    records,
  )

  source = imagenet_v2.SOURCES[args.v2] if args.v2 else imagenet.SOURCE
  try:
    target = imagenet_preparation.prepare(
      args.tar_dir, args.data_dir, source=source, subset=args.subset
    )
  except KeyboardInterrupt:
    return _fail("interrupted; nothing was kept", errors.ExitCode.INTERRUPTED)
  except records.MissingDataError as error:
    return _fail(error, errors.ExitCode.NO_INPUT)
  except records.DataError as error:
    return _fail(error, errors.ExitCode.BAD_DATA)
  except OSError as error:
    return _fail(error, errors.ExitCode.IO_ERROR)
  print(f"{source.title} is ready in {target}")
  return errors.ExitCode.FINISHED


if __name__ == "__main__":
  sys.exit(main())
