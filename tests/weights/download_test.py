"""Downloads from a real server on this machine, good and bad."""

import functools
import hashlib
import http.server
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from vimjax import variants
from vimjax.weights import download

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
  """A release, a hub repository, and ways to fail."""

  def __init__(self, log, *args):
    self.log = log
    super().__init__(*args)

  def do_HEAD(self):
    self.do_GET(body=False)

  def do_GET(self, body=True):
    self.log.append((self.command, self.path))
    if self.path.startswith("/missing") or "absent" in self.path:
      self.send_response(404)
      self.send_header("X-Error-Code", "EntryNotFound")
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    self.send_response(200)
    extra = 10 if self.path.startswith("/short") else 0
    self.send_header("Content-Length", str(len(CONTENT) + extra))
    changed = self.path.startswith("/changed")
    tag = {True: "0" * 64, False: SHA256}[changed]
    self.send_header("ETag", f'"{"1" * 40 if "small" in self.path else tag}"')
    self.send_header("X-Repo-Commit", "0" * 40)
    self.end_headers()
    if body:
      self.wfile.write(CONTENT)

  def log_message(self, *args):
    del args  # Nothing on standard error.


@pytest.fixture
def server():
  """Its address, and the requests that it got."""
  log = []
  handler = functools.partial(_Handler, log)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{running.server_port}", log
    finally:
      running.shutdown()
      thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("VIMJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def _pretrained(source, file="weights.pth", **facts):
  return variants.Pretrained(
    **{
      **dict(source=source, files=(file,), license="MIT", commercial_use=True),
      **dict(top1=80.0),
      **facts,
    }
  )


def _files(cache):
  return [path for path in cache.rglob("*") if path.is_file()]


def test_a_release_is_downloaded_once_and_its_licence_printed(
  server, cache, capsys
):
  address, log = server
  release = _pretrained(f"{address}/releases/%23v2cls", sha256=SHA256)
  path = download.fetch(release)
  assert path.read_bytes() == CONTENT
  assert _files(cache) == [path]
  assert path.name == "weights.pth"
  assert "licence MIT" in capsys.readouterr().err
  assert download.fetch(release) == path
  assert log == [("GET", "/releases/%23v2cls/weights.pth")]


def test_two_releases_with_one_file_name_are_kept_apart(server, cache):
  address, log = server
  paths = {download.fetch(_pretrained(f"{address}/{n}")) for n in ("a", "b")}
  assert len(paths) == len(log) == len(_files(cache)) == 2


@pytest.mark.parametrize(
  ("file", "facts"),
  [
    ("weights.pth", dict(sha256="0" * 64)),
    ("weights-a1311bcf.pth", {}),  # The checksum's first digits.
  ],
)
def test_a_wrong_checksum_leaves_nothing_behind(server, cache, file, facts):
  with pytest.raises(download.DownloadError, match="checksum") as caught:
    download.fetch(_pretrained(server[0], file, **facts))
  assert SHA256 in str(caught.value)
  assert not _files(cache)


def test_a_checksum_in_the_name_is_compared(server):
  download.fetch(_pretrained(server[0], f"weights-{SHA256[:8]}.pth"))


def test_a_connection_that_ends_early_leaves_nothing_behind(server, cache):
  with pytest.raises(download.DownloadError, match="ended after 1280000 of"):
    download.fetch(_pretrained(server[0] + "/short"))
  assert not _files(cache)


def test_errors_say_what_failed_and_what_to_do(server, cache):
  with pytest.raises(
    download.DownloadError, match="weights.pth.*404.*its path"
  ):
    download.fetch(_pretrained(server[0] + "/missing"))
  with pytest.raises(download.DownloadError, match="refused.*its path"):
    download.fetch(_pretrained("http://127.0.0.1:9/nothing"))
  assert not _files(cache)


def test_a_cache_that_cannot_be_written(server, cache):
  cache.write_text("a file where the folder should be")
  with pytest.raises(download.DownloadError, match="Could not download"):
    download.fetch(_pretrained(server[0]))


def test_a_noncommercial_licence_must_be_accepted(server, capsys):
  address, log = server
  restricted = _pretrained(
    address, license="CC-BY-NC-SA-4.0", commercial_use=False
  )
  with pytest.raises(ValueError, match="NC-SA.*No commercial.*accept_license"):
    download.fetch(restricted)
  assert not log
  assert download.fetch(restricted, accept_license=True).exists()
  assert "No commercial use is allowed" in capsys.readouterr().err


_HUB = """
import sys
from vimjax import variants
from vimjax.weights import download

for case in sys.argv[1:]:
  source, sha256, *files = case.split("=")
  release = variants.Pretrained(
    source=source, files=files or ("weights.pth",), sha256=sha256 or None,
    license="MIT", commercial_use=True, top1=80.0,
  )
  try:
    print(download.fetch(release))
  except download.DownloadError as error:
    print("DownloadError", str(error).replace("\\n", " "))
"""


def _hub(tmp_path, *cases, **settings):
  """In a process of its own: the library reads its settings when imported."""
  run = subprocess.run(
    [sys.executable, "-c", _HUB, *cases],
    env={
      **os.environ,
      "HF_HOME": str(tmp_path / "hub"),
      "HF_HUB_DISABLE_TELEMETRY": "1",
      "HF_HUB_DISABLE_XET": "1",
      **settings,
    },
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  return run.stdout.splitlines()


def test_the_hub(server, tmp_path):
  address, log = server
  good, changed, missing = _hub(
    tmp_path,
    f"owner/repository={SHA256}",
    f"owner/repository={'0' * 64}",
    f"missing/repository={SHA256}",
    HF_ENDPOINT=address,
  )
  assert pathlib.Path(good).read_bytes() == CONTENT
  assert log.count(("GET", "/owner/repository/resolve/main/weights.pth")) == 1
  assert changed.startswith("DownloadError The checksum of weights.pth is")
  assert missing.startswith("DownloadError Could not download weights.pth")


def test_what_the_hub_says_of_large_files_is_compared(server, tmp_path):
  address, _ = server
  same, changed, small = _hub(
    tmp_path,
    "owner/repository=",
    "changed/repository=",
    "owner/small=",  # Its tag is no SHA-256.
    HF_ENDPOINT=address,
  )
  assert pathlib.Path(same).read_bytes() == CONTENT
  assert changed.startswith("DownloadError The checksum of weights.pth is")
  assert pathlib.Path(small).read_bytes() == CONTENT


def test_the_second_file_stands_in_for_the_first(server, tmp_path):
  address, _ = server
  second, neither = _hub(
    tmp_path,
    f"owner/repository={'0' * 64}=absent.pth.tar=model.safetensors",
    "owner/repository==absent.pth.tar=absent.safetensors",
    HF_ENDPOINT=address,
  )
  assert second.endswith("model.safetensors")
  assert pathlib.Path(second).read_bytes() == CONTENT
  assert neither.startswith("DownloadError Could not download absent.pth.tar")


def test_without_a_network_the_message_says_what_to_do(tmp_path):
  (message,) = _hub(
    tmp_path,
    f"owner/repository={SHA256}",
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_OFFLINE="1",  # Otherwise it waits and tries again, for minutes.
  )
  assert message.startswith("DownloadError Could not download weights.pth from")
  assert "pass its path" in message
