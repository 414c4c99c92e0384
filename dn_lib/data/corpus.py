"""A corpus is two token arrays, training and validation, and what one needs to know about them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dn_lib.data.downloads import DOWNLOADS, cache_folder, named_text, sha256_of
from dn_lib.data.stdlib import stdlib_documents
from dn_lib.data.tokens import (
    SEPARATOR,
    BPETokenizer,
    ByteTokenizer,
    DataError,
    Tokenizer,
    load_tokenizer,
)

VALIDATION_SHARE = 0.1


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
        either all of them or nothing."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.train.tofile(work / "train.bin")
            self.validation.tofile(work / "validation.bin")
            self.tokenizer.save(work)
            about = {
                "dtype": str(self.train.dtype),
                "bytes_per_token": self.bytes_per_token,
                "facts": self.facts,
            }
            (work / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """A saved corpus, memory-mapped: nothing is read before it is used."""
        folder = Path(folder)
        if not (folder / "corpus.json").exists():
            raise DataError(f"{folder} holds no prepared corpus (no corpus.json)")
        about = json.loads((folder / "corpus.json").read_text())
        parts = [np.memmap(folder / f"{part}.bin", dtype=about["dtype"], mode="r") for part in ("train", "validation")]
        return cls(*parts, load_tokenizer(folder), about["bytes_per_token"], about["facts"])


def in_validation(name: str, share: float = VALIDATION_SHARE) -> bool:
    """Whether the document called `name` is held out: decided by a hash of the name alone, so the same
    file is on the same side on every machine, whatever else is in the corpus.

    >>> in_validation("textwrap.py"), in_validation("json/decoder.py")
    (False, False)
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def build_corpus(
    documents: Iterable[tuple[str, bytes]],
    *,
    name: str,
    vocab: int | Tokenizer | None = None,
    split_by: str = "file",
    **facts: Any,
) -> Corpus:
    """A corpus of (name, content) documents, split by the hash of their names.

    vocab: None for bytes; a number trains byte-pair encoding of that size on the training part; or a
      tokenizer.
    split_by: "file", or "folder" to keep the files of one folder on the same side.
    Raises DataError if either part would be empty.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    digest, count, size = hashlib.sha256(), 0, 0
    for path, content in documents:
        digest.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        count, size = count + 1, size + len(content)
        unit = str(PurePosixPath(path).parent) if split_by == "folder" else path
        parts[in_validation(unit)].append(content)
    if not all(parts):
        raise DataError(f"corpus {name} has {count} files, too few to hold some out for validation")
    facts = {
        "name": name,
        "files": count,
        "bytes": size,
        "file_list_sha256": digest.hexdigest(),
        **facts,
    }
    return _tokenise(parts[0], parts[1], vocab, facts)


def _tokenise(train: list[bytes], validation: list[bytes], vocab, facts: dict[str, Any]) -> Corpus:
    tokenizer = BPETokenizer.train(train, vocab) if isinstance(vocab, int) else vocab or ByteTokenizer()

    def join(texts: list[bytes]) -> np.ndarray:
        if isinstance(tokenizer, ByteTokenizer):
            return tokenizer.encode(bytes([SEPARATOR]).join([b"", *texts]))
        separator = np.array([SEPARATOR], dtype=tokenizer.dtype)
        return np.concatenate([piece for text in texts for piece in (separator, tokenizer.encode(text))])

    tokens = join(validation)
    size = sum(len(text) + 1 for text in validation)  # a separator counts as one byte
    facts = {**facts, "tokenizer": tokenizer.name}
    return Corpus(join(train), tokens, tokenizer, size / max(len(tokens), 1), facts)


def split_text(text: bytes, *, name: str, vocab: int | Tokenizer | None = None, **facts: Any) -> Corpus:
    """A corpus of one text: its last tenth, cut at a line, is the validation part."""
    if len(text) < 2:
        raise DataError(f"corpus {name} is empty")
    cut = max(1, min(text.rfind(b"\n", 0, int(len(text) * (1 - VALIDATION_SHARE))) + 1, len(text) - 1))
    if cut == 1:
        cut = max(1, int(len(text) * (1 - VALIDATION_SHARE)))
    facts = {"name": name, "files": 1, "bytes": len(text), "file_list_sha256": _hash(text), **facts}
    return _tokenise([text[:cut]], [text[cut:]], vocab, facts)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load_corpus(spec: str | Path = "stdlib", *, vocab: int | Tokenizer | None = None, progress: bool = False) -> Corpus:
    """The corpus that `spec` names.

    spec:
      - "stdlib": the Python standard library's own source;
      - "wheels": the prepared wheels corpus (`python -m dn_lib prepare-data wheels`);
      - "tinyshakespeare", "enwik8": downloaded once, hash checked;
      - "hf:NAME", "hf:NAME:CONFIG" or "hf:FOLDER": a Hugging Face dataset with a `text` column;
      - a folder with `corpus.json`, or a `.tar.xz` of one: a prepared corpus;
      - any other folder: its text files, split by file; any other file: its last tenth held out.
    vocab: None for bytes, or the size of a byte-pair encoding to train, or a tokenizer.

    Raises DataError (a ValueError) with one line that names the remedy.

    >>> corpus = load_corpus("stdlib")
    >>> corpus.vocab_size, corpus.train.dtype, len(corpus.train) > 5 * len(corpus.validation)
    (256, dtype('uint8'), True)
    """
    name = str(spec)
    if name == "stdlib":
        return build_corpus(stdlib_documents(), name=name, vocab=vocab, python=platform.python_version())
    if name == "wheels":
        return _prepared(_wheels_folder(), vocab)
    if name in DOWNLOADS:
        train, validation = named_text(name, progress=progress)
        facts = {"name": name, "files": 1, "bytes": len(train) + len(validation)}
        facts["file_list_sha256"] = DOWNLOADS[name].sha256
        return _tokenise([train], [validation], vocab, facts)
    if name.startswith("hf:"):
        return build_corpus(_huggingface_documents(name[3:]), name=name, vocab=vocab)
    path = Path(spec)
    if (path / "corpus.json").exists():
        return _prepared(path, vocab)
    if path.name.endswith(".tar.xz") and path.exists():
        return _prepared(unpack(path), vocab)
    if path.is_dir():
        return build_corpus(_folder_documents(path), name=path.resolve().name, vocab=vocab)
    if path.is_file():
        return split_text(path.read_bytes(), name=path.name, vocab=vocab)
    known = ", ".join(["stdlib", "wheels", *DOWNLOADS])
    raise DataError(f"corpus {name!r} does not exist: give a file, a folder, hf:NAME or one of {known}")


def _prepared(folder: Path, vocab) -> Corpus:
    corpus = Corpus.open(folder)
    if vocab is not None and getattr(vocab, "vocab_size", vocab) != corpus.vocab_size:
        raise DataError(
            f"vocab {getattr(vocab, 'vocab_size', vocab)} was asked for, but {folder} was prepared with "
            f"{corpus.vocab_size}: prepare it again, or leave vocab out"
        )
    return corpus


def _wheels_folder() -> Path:
    folder = cache_folder() / "wheels"
    if not (folder / "corpus.json").exists():
        raise DataError("corpus 'wheels' is not prepared yet: run `python -m dn_lib prepare-data wheels`")
    return folder


def _folder_documents(folder: Path) -> Iterable[tuple[str, bytes]]:
    """Every file below `folder` that holds text (no NUL byte), hidden ones left out."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not names:
        raise DataError(f"corpus folder {folder} holds no files")
    for name in names:
        content = (folder / name).read_bytes()
        if content and b"\0" not in content:
            yield name, content


def _huggingface_documents(spec: str) -> Iterable[tuple[str, bytes]]:
    try:
        import datasets
    except ImportError:
        raise DataError("corpus hf:... needs the datasets package: pip install datasets") from None
    if (Path(spec) / "dataset_info.json").exists() or (Path(spec) / "dataset_dict.json").exists():
        data = datasets.load_from_disk(spec)
    else:
        name, _, config = spec.partition(":")
        data = datasets.load_dataset(name, config or None)
    data = data["train"] if isinstance(data, dict) else data
    if "text" not in data.column_names:
        raise DataError(f"dataset {spec} has no column 'text', only {', '.join(data.column_names)}")
    for number, row in enumerate(data):
        if row["text"]:
            yield f"{number:09d}", row["text"].encode()


def pack(folder: str | Path, archive: str | Path) -> Path:
    """Compress a prepared corpus into one `.tar.xz`, to be carried to a machine without a network."""
    archive = Path(archive)
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:xz", preset=6) as tar:
        for path in sorted(Path(folder).iterdir()):
            tar.add(path, arcname=path.name)
    os.replace(part, archive)
    return archive


def unpack(archive: str | Path) -> Path:
    """The folder of a prepared corpus packed by `pack`, unpacked once into the cache."""
    folder = cache_folder() / "unpacked" / sha256_of(archive)[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            with tarfile.open(archive, "r:xz") as tar:
                tar.extractall(work, filter="data")
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder
