"""Image files in memory, for the data sets that are made here."""

import io
from typing import Any

import numpy as np
from PIL import Image


def encode(image: np.ndarray, file_format: str, **options: Any) -> bytes:
  """The bytes of an image file.

  Args:
    image: uint8 (h, w) or (h, w, 3).
    file_format: Pillow's name of the format, such as "PNG".
    **options: Of Pillow for that format.
  """
  file = io.BytesIO()
  Image.fromarray(image).save(file, file_format, **options)
  return file.getvalue()
