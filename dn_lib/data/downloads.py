"""Named downloads: pinned by SHA-256, cached, resumed, and never used before the hash is checked.

Written here and not taken from a package because of what a class on poor lines needs at once: a download that was cut
off goes on where it stopped, several processes share one, and it ends, whatever the server does.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from dn_lib.data.files import alone, make_folder
from dn_lib.data.tokens import DataError

LARGEST = 2**30
"""Bytes of a download, or of a file inside it, whose size is not declared."""
DEADLINE = 3600.0
"""Seconds that a download may take in all; the next call goes on where it stopped."""
STALL = 60.0
"""Seconds without a byte after which the connection is given up."""
BLOCK = 1 << 18


@dataclass(frozen=True)
class Download:
    """A file on the network.

    url, sha256: of the file as it is downloaded.  member: the file inside, if it is a zip archive.
    train, validation: bytes of the text in each part, from its beginning; None for nine tenths and the rest.
    size: bytes of the file as it is downloaded; more are refused.
    """

    url: str
    sha256: str
    member: str | None = None
    train: int | None = None
    validation: int | None = None
    size: int | None = None


DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
    ),
    "enwik8": Download(
        "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        member="enwik8",
        train=90_000_000,
        validation=5_000_000,
        size=36_445_475,
    ),
}


def cache_folder() -> Path:
    """Where downloads and prepared corpora are kept: `DN_LIB_CACHE`, or `dn_lib` in the user's cache folder.

    A variable that is empty counts as not set. Raises DataError if there is no home folder either.
    """
    own = os.environ.get("DN_LIB_CACHE", "").strip()
    shared = os.environ.get("XDG_CACHE_HOME", "").strip()
    try:
        if own:
            return Path(own).expanduser()
        if os.path.isabs(shared):  # by its specification, a relative one is to be ignored
            return Path(shared) / "dn_lib"
        return Path.home() / ".cache" / "dn_lib"
    except RuntimeError:
        raise DataError("no home folder was found for the cache: set DN_LIB_CACHE to a folder") from None


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    url: str,
    sha256: str,
    target: str | Path,
    *,
    size: int | None = None,
    deadline: float = DEADLINE,
    progress: bool = False,
) -> Path:
    """Download `url` to `target` unless it is there; return `target`, whose hash has been checked.

    url: begins with https:// or http://; followed to other addresses, but never from https to anything else.
    size: bytes that the file has; None allows up to 1 GiB.  deadline: seconds for all of it.
    What has arrived is kept in `target.part`, and the next call asks only for the rest (HTTP Range). A file at
    `target` with another hash stays until the right one takes its place. Of several processes that want one target,
    one downloads, and the others wait for it and take its file.

    Raises DataError on a network failure, on too many bytes, after `deadline`, or on a wrong hash; in the last case
    what was downloaded is deleted.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise DataError(f"url must begin with https:// or http://, got {url}")
    target = Path(target)
    until = time.monotonic() + deadline
    if _is_there(target, sha256):
        return target
    make_folder(target.parent, "the place of a download")
    with alone(target, deadline):
        if _is_there(target, sha256):  # another process brought it meanwhile
            return target
        part = target.with_name(target.name + ".part")
        limit = LARGEST if size is None else size
        found, resumed = None, _size(part) > 0
        while found != sha256:
            found = _download(url, part, limit, until, deadline, progress)
            if found == sha256:
                os.replace(part, target)
                return target
            part.unlink()
            if not resumed:
                break
            resumed = False  # what was there did not belong to this file: once more, from the beginning
    raise DataError(f"{url} has SHA-256 {found}, expected {sha256}: the file was deleted, not used")


def _is_there(target: Path, sha256: str) -> bool:
    if target.exists() and not target.is_file():
        raise DataError(f"target must be a file, {target} is none")
    return target.exists() and sha256_of(target) == sha256


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, part: Path, limit: int, until: float, deadline: float, progress: bool) -> str:
    """Bring `part` to its end; return its hash."""
    if _size(part) > limit:
        part.unlink()
    try:
        _transfer(url, part, limit, until, progress)
    except _TooLarge as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{url} {error}: what had arrived was deleted") from None
    except TimeoutError as error:
        reason = str(error) or f"no end within {deadline:.0f} seconds"
        raise DataError(f"could not download {url}: {reason}; run again to go on where it stopped") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError, InvalidURL a ValueError
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        code = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        message = f"could not download {url}: {code}{reason}; run again to go on where it stopped"
        raise DataError(" ".join(message.split())) from None
    return sha256_of(part)


class _TooLarge(Exception):
    """More bytes than were declared."""


class _AnotherPart(OSError):
    """Not the bytes that were asked for."""


@dataclass(frozen=True)
class _Head:
    """The beginning of an answer: from which byte on it tells, and how many follow, if the server says."""

    start: int
    left: int | None


def _transfer(url: str, part: Path, limit: int, until: float, progress: bool) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    arriving = _answer(request, have, until)
    try:
        head = next(arriving)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the part is complete, or is no good
            return
        raise
    except _AnotherPart:
        part.unlink(missing_ok=True)  # the next call begins anew
        raise
    received, total = head.start, None if head.left is None else head.start + head.left
    if total is not None and total > limit:
        raise _TooLarge(f"has {total:,} bytes, more than the {limit:,} that are allowed")
    bar = tqdm(total=total, initial=received, unit="B", unit_scale=True, desc=part.stem, disable=not progress)
    with open(part, "ab" if received else "wb") as file, bar:
        for block in arriving:
            received += len(block)
            if received > limit:
                raise _TooLarge(f"sends more than the {limit:,} bytes that are allowed")
            file.write(block)
            bar.update(len(block))
    if total is not None and received < total:
        raise OSError(f"the connection closed {total - received} bytes before the end")


def _answer(request: urllib.request.Request, have: int, until: float) -> Iterator:
    """The head of the answer to `request`, then its blocks.

    A thread reads them, for a socket's own time limit bounds one wait, not the sum of them: a server that sends a
    byte now and then would hold the caller for ever. Raises TimeoutError at `until`, and what the thread meets.
    """
    arrived: queue.Queue = queue.Queue(maxsize=8)
    given_up = threading.Event()

    def hand_over(item) -> None:
        while not given_up.is_set():
            try:
                return arrived.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        try:
            with _opener().open(request, timeout=STALL) as response:
                hand_over(_Head(_start(response, have), response.length))
                while not given_up.is_set() and (block := response.read1(BLOCK)):
                    hand_over(block)
            hand_over(None)
        except Exception as error:
            hand_over(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                item = arrived.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        given_up.set()


def _start(response: http.client.HTTPResponse, have: int) -> int:
    """The first byte that `response` holds: `have` if the server goes on, 0 if it begins anew."""
    if response.status != 206:
        return 0
    place = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    if not have or (place and int(place[1]) != have):
        raise _AnotherPart(f"the server sent another part than that from byte {have} on")
    return have


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https, and to http from http only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise urllib.error.URLError(f"the server leads on to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def named_text(name: str, *, progress: bool = False, most: int = LARGEST) -> tuple[bytes, bytes]:
    """(training text, validation text) of a named download, at most `most` bytes.  Raises DataError as `fetch` does."""
    download = DOWNLOADS[name]
    path = cache_folder() / "downloads" / f"{name}{Path(download.url).suffix}"
    fetch(download.url, download.sha256, path, size=download.size, progress=progress)
    parts = [part for part in (download.train, download.validation) if part is not None]
    needed = sum(parts) if len(parts) == 2 else None
    text = _member(path, download.member, needed, most) if download.member else path.read_bytes()
    train = download.train or len(text) * 9 // 10
    return text[:train], text[train : train + (download.validation or len(text))]


def _member(path: Path, name: str, needed: int | None, most: int) -> bytes:
    """The first `needed` bytes of the file `name` in the zip archive `path`; all of it, up to `most`, if None."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            text = file.read(most + 1 if needed is None else needed)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{path} holds no {name} that can be read: {' '.join(str(error).split())}") from None
    if needed is None and len(text) > most:
        raise DataError(f"{name} in {path} has more than the {most:,} bytes that are allowed")
    return text
