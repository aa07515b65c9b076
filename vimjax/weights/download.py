"""Downloads official checkpoints into the user's cache, and checks them."""

import hashlib
import http.client
import os
import pathlib
import re
import sys
from typing import Any, Final
import urllib.error
import urllib.request

from vimjax import optional, variants
from vimjax.weights import checkpoint_files

_TIMEOUT_SECONDS: Final = 30
_CHUNK: Final = 1 << 20
# As in "deit_tiny_patch16_224-a1311bcf.pth": the first digits of the SHA-256.
_NAMED_HASH: Final = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


class DownloadError(OSError):
  """A checkpoint could not be downloaded, or is not the published one."""


def fetch(
  pretrained: variants.Pretrained,
  *,
  accept_license: bool = False,
  consent: str = "accept_license=True",
) -> pathlib.Path:
  """The local file of an official checkpoint, downloaded on first use.

  Hugging Face repositories go into that library's cache (`HF_HOME`), releases
  into `VIMJAX_CACHE`, by default vimjax in the user's cache folder. Prints the
  licence to standard error.

  The SHA-256 is compared where it is known: from our table, the file's name, or
  the Hub's record of a large file, which needs a network. Otherwise (VMamba's
  releases) only the number of bytes is.

  Args:
    pretrained: From `vimjax.get_variant(name).pretrained`.
    accept_license: Needed for weights that may not be used commercially.
    consent: How the user says so, for the message.

  Raises:
    ValueError: The licence must be accepted.
    DownloadError: There is no network, no such file, or its checksum is wrong.
  """
  notice = license_notice(pretrained)
  if not pretrained.commercial_use and not accept_license:
    raise ValueError(
      f"{notice} Read the licence at {web_page(pretrained)} and pass "
      f"{consent} if you accept it."
    )
  print(notice, file=sys.stderr)
  if _is_url(pretrained):
    return _from_release(pretrained)
  return _from_hub(pretrained)


def license_notice(pretrained: variants.Pretrained) -> str:
  """One sentence or two: where the weights are from, and their licence."""
  use = "" if pretrained.commercial_use else " No commercial use is allowed."
  return (
    f"Weights from {web_page(pretrained)}, licence {pretrained.license}.{use}"
  )


def web_page(pretrained: variants.Pretrained) -> str:
  if _is_url(pretrained):
    return pretrained.source
  return f"https://huggingface.co/{pretrained.source}"


def _is_url(pretrained: variants.Pretrained) -> bool:
  return pretrained.source.startswith(("https://", "http://"))


def _from_hub(pretrained: variants.Pretrained) -> pathlib.Path:
  """The first of the files that is there."""
  hub = optional.require("huggingface_hub", extra="weights")
  errors = optional.require("huggingface_hub.errors", extra="weights")
  missing = None
  for file in pretrained.files:
    try:
      path = pathlib.Path(hub.hf_hub_download(pretrained.source, file))
    except errors.RemoteEntryNotFoundError as error:
      missing = missing or _failed(pretrained, file, error)
      continue
    except Exception as error:
      # The library's, its HTTP client's and the system's errors, all alike.
      raise _failed(pretrained, file, error) from error
    known = pretrained.sha256 if file == pretrained.files[0] else None
    expected = known or _recorded_sha256(hub, pretrained.source, file)
    if expected:
      _compare(_sha256(path), expected, path)
    return path
  assert missing is not None
  raise missing


def _recorded_sha256(hub: Any, repository: str, file: str) -> str | None:
  """What the Hub itself says of a file, if it is large and there is a network.

  The tag of a small file is not the SHA-256 of its content.
  """
  try:
    tag = hub.get_hf_file_metadata(hub.hf_hub_url(repository, file)).etag
  except Exception:  # As above. The file is in the cache.
    return None
  return tag if tag and re.fullmatch("[0-9a-f]{64}", tag) else None


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_release(pretrained: variants.Pretrained) -> pathlib.Path:
  file = pretrained.files[0]
  # One folder per release: its name is the URL's last part ("%23v2cls").
  folder = cache_folder() / re.sub(r"\W+", "_", pretrained.source)
  path = folder / file
  if path.exists():
    return path
  url = f"{pretrained.source}/{file}"
  named = _NAMED_HASH.search(file)
  expected = pretrained.sha256 or (named[1] if named else None)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint_files.replacing(path) as temporary:
      _compare(_download(url, temporary), expected, temporary)
  except DownloadError:
    raise
  except (OSError, http.client.HTTPException) as error:
    raise _failed(pretrained, file, error) from error
  return path


def cache_folder() -> pathlib.Path:
  """Where releases are kept."""
  chosen = os.environ.get("VIMJAX_CACHE")
  if chosen:
    return pathlib.Path(chosen)
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "vimjax"


def _download(url: str, path: pathlib.Path) -> str:
  """Streams a file to disk; returns its SHA-256."""
  digest, received = hashlib.sha256(), 0
  request = urllib.request.Request(url, headers={"User-Agent": "vimjax"})
  with (
    urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
    path.open("wb") as file,
  ):
    size = response.headers.get("Content-Length")
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      digest.update(chunk)
      received += len(chunk)
  # read() does not complain about a connection that ends early.
  if size is not None and received != int(size):
    raise DownloadError(
      f"{url}: the connection ended after {received} of {size} bytes; try "
      "again."
    )
  return digest.hexdigest()


def _compare(found: str, expected: str | None, path: pathlib.Path) -> None:
  if expected and not found.startswith(expected):
    raise DownloadError(
      f"The checksum of {path.name} is {found}, expected {expected}: the file "
      "is damaged or not the published one, and was not used. Delete it "
      f"({path}) if it is still there, and try again."
    )


def _failed(
  pretrained: variants.Pretrained, file: str, error: Exception
) -> DownloadError:
  reason = str(error).strip().partition("\n")[0] or type(error).__name__
  return DownloadError(
    f"Could not download {file} from {web_page(pretrained)}: {reason}. Without "
    "a network, download it elsewhere and pass its path."
  )
