"""Named downloads: pinned by SHA-256, cached, resumed, and never used before the hash is checked."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dn_lib.data.tokens import DataError


@dataclass(frozen=True)
class Download:
    """A file on the network.

    url, sha256: of the file as it is downloaded.  member: the file inside, if it is a zip archive.
    train, validation: bytes of the text in each part, from its beginning; None for nine tenths and the rest.
    """

    url: str
    sha256: str
    member: str | None = None
    train: int | None = None
    validation: int | None = None


DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": Download(
        "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        member="enwik8",
        train=90_000_000,
        validation=5_000_000,
    ),
}


def cache_folder() -> Path:
    """Where downloads and prepared corpora are kept: `DN_LIB_CACHE`, or the user's cache folder."""
    if "DN_LIB_CACHE" in os.environ:
        return Path(os.environ["DN_LIB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dn_lib"


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, sha256: str, target: str | Path, *, progress: bool = False) -> Path:
    """Download `url` to `target` unless it is there; return `target`, whose hash has been checked.

    What has arrived is kept in `target.part`, and the next call asks only for the rest (HTTP Range).
    Raises DataError on a network failure, or on a wrong hash, in which case the file is deleted.
    """
    target = Path(target)
    if target.exists():
        if sha256_of(target) == sha256:
            return target
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        _transfer(url, part, progress)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"could not download {url}: {reason}; run again to go on where it stopped") from None
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DataError(f"{url} has SHA-256 {found}, expected {sha256}: the file was deleted, not used")
    os.replace(part, target)
    return target


def _transfer(url: str, part: Path, progress: bool) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the part is complete, or is no good
            return
        raise
    with response:
        resumed = response.status == 206
        left = response.headers.get("Content-Length")
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=(int(left) + (have if resumed else 0)) if left else None,
                initial=have if resumed else 0,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=not progress,
            ) as bar,
        ):
            received = 0
            while block := response.read(1 << 18):
                file.write(block)
                received += len(block)
                bar.update(len(block))
        if left and received < int(left):
            raise OSError(f"the connection closed {int(left) - received} bytes before the end")


def named_text(name: str, *, progress: bool = False) -> tuple[bytes, bytes]:
    """(training text, validation text) of a named download.  Raises DataError as `fetch` does."""
    download = DOWNLOADS[name]
    path = cache_folder() / "downloads" / f"{name}{Path(download.url).suffix}"
    fetch(download.url, download.sha256, path, progress=progress)
    if download.member:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(download.member)
    else:
        text = path.read_bytes()
    train = download.train or len(text) * 9 // 10
    return text[:train], text[train : train + (download.validation or len(text))]
