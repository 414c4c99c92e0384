"""A corpus is two token arrays, training and validation, and what one needs to know about them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dn_lib.data.downloads import cache_folder, sha256_of
from dn_lib.data.files import (
    is_being_replaced,
    make_folder,
    remove_files,
    remove_leftovers,
    replace_folder,
    temporary_name,
)
from dn_lib.data.tokens import DataError, Tokenizer, load_tokenizer

FORMAT = "dn_lib corpus 1"


FILES = frozenset({"corpus.json", "train.bin", "validation.bin", "tokenizer.json"})
"""All that a prepared corpus consists of, and all that `save` ever removes."""


LARGEST_NOTE = 2**24
"""Bytes of a `corpus.json`: more is somebody else's file."""


@dataclass
class Corpus:
    """Tokens to train on and tokens to measure on.

    train, validation: one-dimensional arrays, uint8 or uint16, in memory or memory-mapped.
    tokenizer: turns text into these tokens and back.
    bytes_per_token: of the validation part, so that a loss per token can be told in bits per byte.
    facts: name, number of files, hash of the file list and contents, Python version: all that a
      result has to say about its data.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def save(self, folder: str | Path) -> None:
        """Write `train.bin`, `validation.bin`, `corpus.json` (and `tokenizer.json`) so that `open` finds
        either all of them or nothing.

        A prepared corpus that is there is replaced. Raises DataError if anything else is (see `check_target`).
        """
        target = check_target(folder)
        make_folder(target.parent, "the parent of the corpus")
        remove_leftovers(target.parent, FILES)
        work = temporary_name(target.parent)
        make_folder(work, "the new corpus")
        try:
            self._write(work)
            replace_folder(work, target, check_contents, FILES)
        finally:
            remove_files(work, FILES)

    def _write(self, folder: Path) -> None:
        for name, part in (("train", self.train), ("validation", self.validation)):
            if part.ndim != 1 or part.dtype != self.tokenizer.dtype or len(part) == 0:
                wanted = np.dtype(self.tokenizer.dtype).name
                raise DataError(f"{name} must hold {wanted} tokens [n], n > 0, got {part.dtype} {list(part.shape)}")
        self.train.tofile(folder / "train.bin")
        self.validation.tofile(folder / "validation.bin")
        self.tokenizer.save(folder)
        about = {
            "format": FORMAT,
            "dtype": str(self.train.dtype),
            "tokens": {"train": len(self.train), "validation": len(self.validation)},
            "sha256": {part: sha256_of(folder / f"{part}.bin") for part in PARTS},
            "bytes_per_token": self.bytes_per_token,
            "facts": self.facts,
        }
        about = json.loads(json.dumps(about))  # as it will be read: a tuple is a list then
        about["digest"] = _digest(about)
        (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Corpus:
        """A saved corpus, memory-mapped: nothing is read before it is used.

        verify: read all of it once, and compare its hash with the one it was saved with.
        Raises DataError if a file is missing, damaged, or does not fit the others.
        """
        folder = Path(folder)
        for wait in (0.02, 0.05, 0.1, 0.2, 0.4, None):
            before = _stamp(folder)
            try:
                corpus = cls._open(folder, verify)
            except (DataError, FileNotFoundError):
                absent = before is None and is_being_replaced(folder)
                if wait is None or (before == _stamp(folder) and not absent):
                    raise
            else:
                if before == _stamp(folder):
                    return corpus
                if wait is None:
                    raise DataError(f"{folder} is being replaced by other processes all the time: stop them")
            time.sleep(wait)  # it was replaced while we read it
        raise AssertionError("unreachable")

    @classmethod
    def _open(cls, folder: Path, verify: bool) -> Corpus:
        about = read_about(folder)
        if about is None:
            raise DataError(f"{folder} holds no prepared corpus (no corpus.json that prepare-data wrote)")
        tokenizer = load_tokenizer(folder)
        wanted = about["facts"].get("tokenizer", tokenizer.name)
        if tokenizer.name != wanted:
            raise DataError(f"{folder} was prepared with tokenizer {wanted}, but holds {tokenizer.name}: {REMEDY}")
        if about["dtype"] != np.dtype(tokenizer.dtype).name:
            raise DataError(f"{folder} holds {about['dtype']} tokens, {tokenizer.name} makes others: {REMEDY}")
        train, validation = (_map(folder, part, about) for part in PARTS)
        for name, part in zip(PARTS, (train, validation), strict=True):
            if verify and about.get("sha256", {}).get(name) not in (None, hashlib.sha256(part.data).hexdigest()):
                raise DataError(f"{folder / name}.bin is not what was written (its hash differs): {REMEDY}")
        return cls(train, validation, tokenizer, float(about["bytes_per_token"]), about["facts"])


PARTS = ("train", "validation")
REMEDY = "it is damaged; prepare it again"


def _stamp(folder: Path) -> tuple | None:
    """What tells one corpus in `folder` from the next; None if there is none.

    The note alone would not, where another corpus was there for a moment; nor would an inode alone, which is used
    again as soon as it is free.
    """
    note = _note(folder)
    try:
        about = (folder / "corpus.json").stat()
    except OSError:
        return None
    return None if note is None else (note, about.st_ino, about.st_mtime_ns)


def _note(folder: Path) -> bytes | None:
    """The bytes of `folder/corpus.json`, which hold the hashes of all else; None if they cannot be read."""
    path = folder / "corpus.json"
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST_NOTE else None
    except OSError:
        return None


def read_about(folder: Path) -> dict[str, Any] | None:
    """What `save` wrote into `folder/corpus.json`; None if there is none, or it is not of our making."""
    note = _note(folder)
    try:
        about = None if note is None else json.loads(note)
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict):
        return None
    # Before formats had names, these three keys were all of it.
    older = set(about) == {"dtype", "bytes_per_token", "facts"}
    if about.get("format") != FORMAT and not older:
        return None
    rate, tokens = about.get("bytes_per_token"), about.get("tokens")
    whole = (
        about.get("dtype") in ("uint8", "uint16")
        and isinstance(rate, int | float)
        and not isinstance(rate, bool)
        and 0 < rate < float("inf")
        and isinstance(about.get("facts"), dict)
        and (older or (_are_counts(tokens) and isinstance(about.get("sha256"), dict)))
        and (older or about.get("digest") == _digest(about))
    )
    return about if whole else None


def _digest(about: dict[str, Any]) -> str:
    """The hash of all that `corpus.json` says."""
    rest = {key: value for key, value in about.items() if key != "digest"}
    return text_hash(json.dumps(rest, sort_keys=True).encode())


def _are_counts(tokens: Any) -> bool:
    whole = isinstance(tokens, dict) and set(tokens) == set(PARTS)
    return whole and all(type(count) is int for count in tokens.values())


def is_prepared(folder: str | Path) -> bool:
    """Whether `folder` is meant as a prepared corpus, whole or damaged, and not as a folder of texts."""
    folder = Path(folder)
    marks = (folder / "corpus.json", folder / "train.bin")
    return all(mark.exists() for mark in marks) or read_about(folder) is not None


def _map(folder: Path, part: str, about: dict[str, Any]) -> np.ndarray:
    path = folder / f"{part}.bin"
    if not path.is_file():
        raise DataError(f"{folder} holds no {path.name}: {REMEDY}")
    size, width = path.stat().st_size, np.dtype(about["dtype"]).itemsize
    wanted = about["tokens"][part] if "tokens" in about else size // width
    if size != wanted * width or size == 0:
        raise DataError(f"{path} must have {wanted} tokens of {width} bytes, it has {size} bytes: {REMEDY}")
    return np.memmap(path, dtype=about["dtype"], mode="r")


def check_target(folder: str | Path, *, source: str | Path | None = None) -> Path:
    """The resolved folder that a corpus may be written to as `folder`.

    It must be new, empty, or a prepared corpus and nothing else. It may not be the current folder, the cache or the
    home folder, nor hold one of them, nor hold the text `source` that the corpus is made of.
    Raises DataError otherwise; nothing is ever changed here.

    >>> check_target(".")
    Traceback (most recent call last):
    dn_lib.data.tokens.DataError: folder must be one of its own, '.' is or holds the current folder
    """
    try:
        target = Path(folder).resolve()
        if target.is_symlink():  # what Python 3.13 leaves of links in a circle; earlier ones raise
            raise OSError("its links lead in a circle")
        places = {"the current folder": Path.cwd(), "the cache": cache_folder().resolve()}
        if source is not None:
            places["the text to be prepared"] = Path(source).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no current folder, a NUL
        raise DataError(f"folder {str(folder)!r} cannot be resolved: {error}") from None
    with contextlib.suppress(RuntimeError):  # there need not be a home
        places["the home folder"] = Path.home()
    for what, place in places.items():
        prepared_anew = what == "the text to be prepared" and target == place and is_prepared(place)
        if (target == place and not prepared_anew) or target in place.parents:
            raise DataError(f"folder must be one of its own, {str(folder)!r} is or holds {what}")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        check_contents(target)
    return target


def check_contents(folder: Path) -> None:
    """Raise DataError unless `folder` is empty or holds a prepared corpus and nothing else, FileNotFoundError if it
    is not there (any more)."""
    about = folder.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise DataError(f"folder must be a folder for the corpus, {folder} is a file")
    names = sorted(os.listdir(folder))
    others = [name for name in names if name not in FILES or not (folder / name).is_file()]
    if others or (names and read_about(folder) is None):
        now = folder.stat()
        if (now.st_ino, now.st_ctime_ns) != (about.st_ino, about.st_ctime_ns):  # moved away while we looked
            raise FileNotFoundError(folder)
        shown = ", ".join((others or names)[:3])
        raise DataError(
            f"folder must be new, empty or a prepared corpus, {folder} holds other files ({shown}): "
            "nothing was changed; name another folder"
        )


def text_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
